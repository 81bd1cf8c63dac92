"""Measurements against closed forms, scikit-learn, and tensors whose size is known."""

import numpy as np
import pytest
import torch
import transformers as tf
from sklearn.metrics import roc_auc_score

import keeprate as kr
from keeprate import measure as M
from keeprate.models import Loaded
from keeprate_kernels import attention_received

WIDTH, MLP, DEPTH, PATCHES, CLASSES = 48, 96, 4, 64, 5


class Images:
    """A task of ten noise images whose first patches matter."""

    name = "noise"
    labels = torch.arange(10) % CLASSES
    truth = torch.arange(PATCHES).expand(10, -1) < 8

    def __len__(self):
        return len(self.labels)

    def batches(self, loaded, batch_size):
        pixels = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        for rows in torch.arange(10).split(batch_size):
            yield {"pixel_values": pixels[rows], "labels": self.labels[rows], "truth": self.truth[rows]}


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    config = tf.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=3,
        intermediate_size=MLP,
        image_size=32,
        patch_size=4,
        num_labels=CLASSES,
    )
    return Loaded("tiny", tf.ViTForImageClassification(config).eval(), None)


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# --- intervals -------------------------------------------------------------------------------------------------------


def test_bootstrap_of_a_mean_matches_theory():
    x = np.random.default_rng(0).normal(3, 2, 400)
    found = M.bootstrap(x)
    error = x.std() / 20
    assert found.value == pytest.approx(x.mean()) and found.n == 400
    assert found.low == pytest.approx(x.mean() - 1.96 * error, abs=0.25 * error)
    assert found.high == pytest.approx(x.mean() + 1.96 * error, abs=0.25 * error)
    assert M.bootstrap(x) == found and M.bootstrap(x, confidence=0.5).high < found.high
    assert found.excludes_zero and not M.bootstrap(x - x.mean()).excludes_zero
    assert found.bounds == (found.low, found.high)
    assert repr(M.Interval(0.5, 0.25, 0.75, 8)) == "0.5 [0.25, 0.75] (n=8)"


def test_bootstrap_of_another_statistic_resamples_rows():
    pairs = np.repeat(np.arange(30.0)[:, None], 2, 1)
    found = M.bootstrap(pairs, lambda x: np.corrcoef(x.T)[0, 1], n=100)  # rows stay together: correlation stays 1
    assert found.value == pytest.approx(1) and found.low == pytest.approx(1)


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 5, 200)
    a, b = base + 0.5 + rng.normal(0, 0.5, 200), base
    found = M.paired_difference(torch.tensor(a), torch.tensor(b))
    assert found.excludes_zero and found.high - found.low < 0.3
    with pytest.raises(ValueError, match=r"\(200,\) and \(3,\)"):
        M.paired_difference(a, a[:3])


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_bootstrap_refuses(values):
    with pytest.raises(ValueError, match="no NaN"):
        M.bootstrap(values)


# --- accuracy --------------------------------------------------------------------------------------------------------


def test_evaluate(vit):
    dense = M.evaluate(vit, Images(), batch_size=4, progress=False)
    whole = next(Images().batches(vit, 10))
    with torch.no_grad():
        logits = vit.model(whole["pixel_values"]).logits
    torch.testing.assert_close(dense.logits, logits, atol=1e-5, rtol=1e-4)
    assert dense.trace is None and dense.seconds > 0
    assert dense.accuracy.value == pytest.approx((logits.argmax(1) == whole["labels"]).float().mean().item())
    pruned = M.evaluate(vit, Images(), kr.vit.TopK(keep=0.5), batch_size=4, progress=False)
    assert pruned.correct.shape == (10,) and pruned.trace.counts().shape == (10, DEPTH)
    assert pruned.trace.mask().sum(1).tolist() == [8] * 10
    same = M.evaluate(vit, Images(), kr.vit.TopK(keep=1.0), batch_size=4, progress=False)
    assert torch.equal(same.logits, dense.logits)


def test_evaluate_seeds_the_method(vit):
    kept = [M.evaluate(vit, Images(), kr.vit.Random(keep=0.5), seed=s, progress=False).trace.mask() for s in (0, 0, 1)]
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])


def test_evaluate_refuses_a_task_of_other_classes(vit):
    task = Images()
    task.labels = torch.arange(10)
    with pytest.raises(ValueError, match="labels up to 9; tiny knows 5 classes"):
        M.evaluate(vit, task, progress=False)


# --- cost ------------------------------------------------------------------------------------------------------------


def dense_flops(b):
    """Closed form of a ViT, 2 FLOP per multiply-add."""
    n = PATCHES + 1
    block = 2 * n * (4 * WIDTH * WIDTH + 2 * WIDTH * MLP) + 2 * 2 * n * n * WIDTH
    return b * (DEPTH * block + 2 * PATCHES * 3 * 4 * 4 * WIDTH + 2 * WIDTH * CLASSES)


def test_flops_of_the_dense_model_equal_the_closed_form(vit, pixels):
    assert M.flops(vit.model, pixels) == dense_flops(2)
    assert M.flops(vit.model, {"pixel_values": pixels[:1]}) == dense_flops(1)
    assert M.flops_estimate(vit.model, torch.full((2, DEPTH), PATCHES)) == dense_flops(2)


@pytest.mark.parametrize("method", [kr.vit.TopK(keep=0.5), kr.vit.ToMe(r=8), kr.vit.DPCKNN(keep=0.5)], ids=repr)
def test_flops_count_the_selection_and_nothing_else(vit, pixels, method):
    with method(vit.model) as trace, torch.no_grad():
        vit.model(pixels)
    counted, estimate = M.flops(vit.model, pixels, method), M.flops_estimate(vit.model, trace.counts(), method.where)
    assert counted < dense_flops(2)
    assert 0 < counted - estimate < 0.1 * estimate  # what is left over is the selection


def test_estimate_knows_where_tokens_go(vit):
    counts = torch.full((1, DEPTH), PATCHES)
    counts[:, 1:] = PATCHES // 2
    before, middle, after = (M.flops_estimate(vit.model, counts, where) for where in ("before", "middle", "after"))
    assert before < middle < after
    assert after - middle == 2 * (PATCHES // 2) * 2 * WIDTH * MLP  # one MLP more on the dropped half
    with pytest.raises(ValueError, match=r"\[batch, 4\]"):
        M.flops_estimate(vit.model, counts[:, :2])


def test_distances_are_counted_once():
    from torch.utils.flop_counter import FlopCounterMode

    for n in (10, 50):  # torch computes few and many distances by different operations
        with FlopCounterMode(display=False, custom_mapping=M.cost.EXTRA) as counter:
            torch.cdist(torch.randn(2, n, 8), torch.randn(2, n + 1, 8))
        assert counter.get_total_flops() == 2 * 2 * n * (n + 1) * 8


def test_race_takes_turns_and_keeps_to_its_budget():
    import time

    seen = []
    calls = (lambda: seen.append("a"), lambda: (seen.append("b"), time.sleep(0.005)))
    times = M.race(calls, repeats=4, warmup=1)
    assert "".join(seen) == "ab" + "abba" * 2  # one untimed round, then the order turns
    assert times.shape == (4, 2) and (times[:, 1] >= 5).all() and np.median(times[:, 0]) < 5
    assert M.race(calls, repeats=1000, seconds_budget=0.0).shape == (3, 2)
    with pytest.raises(ValueError, match="repeats must be an integer of at least 1"):
        M.race(calls, repeats=0)


def test_speed_of_a_method_that_sleeps(vit, pixels, monkeypatch):
    import time

    reduce = kr.vit.TopK.reduce
    monkeypatch.setattr(kr.vit.TopK, "reduce", lambda self, t: (time.sleep(0.01), reduce(self, t))[1])
    found = M.speed(vit.model, pixels, kr.vit.TopK(keep=0.5, layers=(2, 3)), repeats=4)
    assert found.select_ms >= 20 and found.method_ms >= 20 and found.method_ms > found.dense_ms
    assert found.ratio.low <= found.ratio.value <= found.ratio.high < 1 and found.ratio.n == 4
    assert found.break_even_ms == pytest.approx(found.dense_ms - found.method_ms + found.select_ms)
    assert (found.batch, found.attention) == (2, "sdpa") and "sdpa" in repr(found)


def test_speed_keeps_to_its_budget_and_to_sdpa(vit, pixels):
    assert M.speed(vit.model, pixels, kr.vit.TopK(), repeats=1000, seconds_budget=0.0).ratio.n == 3
    vit.model.set_attn_implementation("eager")
    try:
        with pytest.raises(ValueError, match="SDPA; this model runs 'eager'"):
            M.speed(vit.model, pixels, kr.vit.TopK())
    finally:
        vit.model.set_attn_implementation("sdpa")


def test_operations_name_what_selection_does(vit, pixels):
    table = M.operations(vit.model, pixels, kr.vit.TopK(keep=0.5), top=50)
    assert list(table.columns) == ["operation", "ms", "share", "calls"]
    assert {"sort", "bmm"} <= set(table["operation"]) and "convolution" not in set(table["operation"])
    assert table["share"].sum() == pytest.approx(1) and table["ms"].is_monotonic_decreasing


def test_peak_memory_of_known_tensors(capfd):
    def work():
        a = torch.ones(1000, 1000)
        b = a + 1
        del a
        return b + 1

    assert M.peak_memory(work) == pytest.approx(2 * 4e6, rel=0.01)
    assert M.peak_memory(lambda: None) == 0
    assert capfd.readouterr() == ("", "")


def test_scoring_memory_grows_linearly():
    heads, peak = 4, {}
    for n in (256, 1024, 4096):
        q, k = torch.randn(2, 1, heads, n, 16, generator=torch.Generator().manual_seed(0))
        peak[n] = M.peak_memory(lambda q=q, k=k: attention_received(q, k, scaling=0.25))
    # below 4 where buffers of a fixed size still weigh; a matrix would give 16
    assert peak[1024] / peak[256] < 6 and peak[4096] / peak[1024] < 6
    assert peak[4096] < 4096 * 4096 * heads * 4 / 10  # bytes of the full matrix


# --- localisation ----------------------------------------------------------------------------------------------------


def test_auroc_equals_sklearn_with_ties_and_absent_tokens():
    g = torch.Generator().manual_seed(0)
    scores, truth = torch.randint(0, 6, (8, 40), generator=g).float(), torch.rand(8, 40, generator=g) < 0.3
    scores[:, 5] = float("inf")
    scores[0, :10] = float("nan")
    expected = []
    for s, t in zip(scores, truth, strict=True):
        there = ~s.isnan()
        expected.append(roc_auc_score(t[there], s[there].clamp_max(99)))
    torch.testing.assert_close(M.auroc(scores, truth), torch.tensor(expected, dtype=torch.float32))


def test_auroc_without_two_classes_is_nan():
    truth = torch.tensor([[True, True], [False, False], [True, False]])
    assert M.auroc(torch.rand(3, 2), truth).isnan().tolist() == [True, True, False]
    with pytest.raises(ValueError, match="truth boolean"):
        M.auroc(torch.rand(3, 2), truth.float())


def test_recall():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.2], [0.9, float("nan"), 0.8, 0.1]])
    truth = torch.tensor([[False, True, False, True], [True, True, False, False]])
    assert M.recall_at_budget(scores, truth, 2).tolist() == [0.5, 0.5]
    assert M.recall_at_budget(scores, truth, 4).tolist() == [1, 1]
    assert M.recall_at_budget(scores, truth, torch.tensor([3, 1])).tolist() == [1, 0.5]
    assert M.recall(truth, truth).tolist() == [1, 1] and M.recall(~truth, truth).tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.4; got 5"):
        M.recall_at_budget(scores, truth, 5)


def test_localisation_of_traces(vit):
    task = Images()
    pruned = M.localisation(M.evaluate(vit, task, kr.vit.TopK(keep=0.5), progress=False).trace, task.truth)
    assert torch.equal(pruned.recall, pruned.represented)
    torch.testing.assert_close(pruned.chance, torch.full((10,), 8 / PATCHES))
    assert set(pruned.summary()) == {"auroc", "recall", "represented", "chance"}
    trace = M.evaluate(vit, task, kr.vit.ToMe(r=8), progress=False).trace
    merged = M.localisation(trace, task.truth)
    assert merged.auroc is None and (merged.represented == 1).all() and (merged.recall < 1).any()
    with pytest.raises(ValueError, match="one of the 4 reductions"):
        M.localisation(trace, task.truth, step=4)
    with pytest.raises(ValueError, match=r"\(10, 64\) and \(10, 9\)"):
        M.localisation(trace, task.truth[:, :9])


def test_localisation_of_an_oracle_and_its_opposite(vit, monkeypatch):
    task = Images()
    first = torch.arange(PATCHES).flip(0).float()  # highest on the patches that matter
    for scores, expected in ((first, 1.0), (-first, 0.0)):
        monkeypatch.setattr("keeprate.vit.base.Tokens.importance", lambda t, scores=scores: scores[t.ids.clamp_min(0)])
        method = kr.vit.TopK(keep=0.125, layers=(2,))
        found = M.localisation(M.evaluate(vit, task, method, progress=False).trace, task.truth)
        assert (found.auroc == expected).all() and (found.recall == expected).all()
