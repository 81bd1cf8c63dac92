"""The benchmark runs, and shows what it is there to show: a step without logits in memory."""

import keeprate as kr
from keeprate.sft import bench
from keeprate.sft import head as heads


def test_a_step_takes_a_quarter_of_the_memory_of_logits_at_most(monkeypatch):
    monkeypatch.setattr(heads, "HELD", 0)
    monkeypatch.setattr(heads, "ROWS", heads.ROWS // 16)  # as small beside these logits as it is beside many
    chosen = [kr.sft.SFT(), kr.sft.Rho1(), kr.sft.SsToken(), kr.sft.EntropyWeight(), kr.sft.EntropyWeight(top=None)]
    found = bench.measure(chosen, vocabulary=20_000, batch=2, length=256, width=64, layers=1, repeats=1)
    assert found["method"].tolist() == ["SFT", "Rho1", "SsToken", "EntropyWeight", "EntropyWeight"]
    assert (found[["time", "ms", "plain ms"]] > 0).all(axis=None)
    # 512 x 20,000 logits in fp32, at least
    assert (found["plain MiB"] > 39).all() and (found["memory"] <= 0.25).all(), found
