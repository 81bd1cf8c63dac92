"""Measuring KV-cache methods: the shortcut equals the real run, truths equal brute force, shares equal counting."""

from dataclasses import replace

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from keeprate import kv, measure
from keeprate.attention import AttentionView
from keeprate.kv import future_attention
from keeprate.measure import kv as M
from keeprate.tasks.recall import Recall

N, M_ROWS, VOCAB = 48, 7, 61
PREFILL = (
    kv.SnapKV(keep=0.5, window=4),
    kv.RandomKV(keep=0.25),
    kv.KNorm(keep=0.25),
    kv.AdaKV(keep=0.25, base=kv.SnapKV(window=4)),
    kv.PyramidKV(keep=0.5, base=kv.SnapKV(window=4)),
    kv.KVCompose(keep=0.25),
)
DECODE = (kv.H2O(keep=12), kv.TOVA(keep=0.25), kv.StreamingLLM(keep=0.25))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.4,  # peaked attention: every layer has tokens that matter
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def drawn():
    """Random tokens in the form of a recall sample; the truth is five tokens of each context."""
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(1, VOCAB, (6, n), generator=generator) for n in (N, 4, 3)]
    truth = torch.zeros(6, N, dtype=torch.bool)
    truth[:, 10:15] = True
    return Recall("needle", *ids, truth, torch.zeros_like(truth))


def tokens(drawn, question):
    cached, future = M.split(drawn, question)
    return cached[:2], future[:2]


# --- the shortcut -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*PREFILL, *DECODE], ids=lambda m: m.name)
@torch.no_grad()
def test_resuming_is_what_the_model_does(model, drawn, method):
    cached, future = tokens(drawn, "unknown")
    begin = M.prefill(model, cached)
    for _ in range(2):  # the first resumption leaves the record as it was
        with begin.resume(method, seed=5) as now:
            kept, nbytes = now.trace.kept, now.trace.nbytes
            short = [model(future[:, i : i + 1], past_key_values=now.cache).logits for i in range(3)]
            scores = now.trace.scores
        with method(model, seed=5) as trace:
            cache = DynamicCache(config=model.config)
            first = model(cached, past_key_values=cache).logits[:, -1]
            assert all(map(torch.equal, kept, trace.kept)) and nbytes == trace.nbytes == now.nbytes
            long = [model(future[:, i : i + 1], past_key_values=cache).logits for i in range(3)]
        assert scores.keys() == trace.scores.keys()
        assert all(torch.equal(scores[i].nan_to_num(), trace.scores[i].nan_to_num()) for i in scores)
        torch.testing.assert_close(now.logits, first)
        for a, b in zip(short, long, strict=True):
            assert torch.equal(a, b)


@torch.no_grad()
def test_column_sums_are_computed_once_and_only_for_the_same_question(model, drawn, monkeypatch):
    view = M.prefill(model, drawn.context).views[1]
    plain = AttentionView(view.q, view.k, view.v, view.mask, view.scaling, view.causal)
    calls, real = [], AttentionView.received
    monkeypatch.setattr(AttentionView, "received", lambda self, *a: (calls.append(1), real(self, *a))[1])
    weight = torch.rand(N)
    for ask in ((None, "sum"), (weight, "sum"), (1 - weight, "sum"), (None, "max")):
        for asked in (view, replace(view, k=view.k.clone())):
            asked.received(*ask).zero_()  # what one method does to it, another does not see
            torch.testing.assert_close(asked.received(*ask), real(plain, *ask))
    assert len(calls) == 4
    torch.testing.assert_close(view.tail(5).received(), real(plain.tail(5)))
    few = torch.arange(10)[None].expand(6, -1)
    torch.testing.assert_close(view.take(few).received(), real(plain.take(few)))


@torch.no_grad()
def test_full_cache_continues_as_the_model_does(model, drawn):
    cached, future = tokens(drawn, "unknown")
    begin = M.prefill(model, cached)
    with begin.resume() as now:
        got = model(future, past_key_values=now.cache).logits
        assert now.nbytes == 2 * 2 * 3 * N * 2 * 8 * 4 and now.tokens.tolist() == [N, N]
    torch.testing.assert_close(got, model(torch.cat([cached, future], 1)).logits[:, N:])


@torch.no_grad()
def test_method_that_changes_the_reading_gets_a_real_one(model, drawn):
    class Deaf(kv.RandomKV):
        """Attends to nothing while it reads the prompt."""

        def attend(self, step):
            return torch.zeros_like(step.view.q)

    cached, _ = tokens(drawn, "unknown")
    with M.prefill(model, cached).resume(Deaf(keep=0.5)) as now:
        pass
    with Deaf(keep=0.5)(model):
        real = model(cached).logits[:, -1]
    torch.testing.assert_close(now.logits, real)
    assert (real - model(cached).logits[:, -1]).abs().max() > 1e-3


def test_bad_prompts(model):
    with pytest.raises(ValueError, match=r"\(0, 4\)"):
        M.prefill(model, torch.zeros(0, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="'hidden'"):
        M.split(Recall("needle", *[torch.zeros(1, 1)] * 5), "hidden")


# --- ground truth against brute force ---------------------------------------------------------------------------------


@torch.no_grad()
def test_oracle_is_future_attention(model, drawn):
    cached, future = tokens(drawn, "unknown")
    got = M.oracle(M.prefill(model, cached), future)
    for a, b in zip(got, future_attention(model, cached, future), strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_leave_one_out_is_attention_without_the_pair(model, drawn):
    cached, future = tokens(drawn, "known")
    begin = M.prefill(model, cached)
    n, m, layer, pair = cached.shape[1], future.shape[1], 0, 20
    got = M.leave_one_out(begin, future)[layer]
    whole = M.prefill(model, torch.cat([cached, future], 1)).views[layer]  # layer 0 does not depend on the cache
    k, v = (x.repeat_interleave(2, 1) for x in (whole.k, whole.v))
    logits = whole.q[:, :, n:] @ k.transpose(2, 3) * whole.scaling
    logits = logits.masked_fill(~torch.ones(m, n + m).tril(n).bool(), float("-inf"))
    without = logits.clone()
    without[..., pair] = float("-inf")
    change = (logits.softmax(-1) @ v - without.softmax(-1) @ v).norm(dim=-1)  # b h m
    torch.testing.assert_close(got[..., pair], change.unflatten(1, (2, 2)).mean((2, 3)))


@torch.no_grad()
def test_leave_one_out_loss_is_a_run_without_the_token(model, drawn):
    cached, future = tokens(drawn, "unknown")
    begin, n, targets = M.prefill(model, cached), cached.shape[1], 3

    def loss(hidden):
        mask = torch.ones(2, n + future.shape[1], dtype=torch.long)
        mask[:, hidden] = 0
        place = torch.arange(n, n + future.shape[1])[None]
        logits = model(future, past_key_values=begin.full(), attention_mask=mask, position_ids=place).logits
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), future[:, 1:], reduction="none")[:, -targets:].mean(1)

    got = M.leave_one_out_loss(begin, future, targets, rows=5 * future.shape[1] * 2)
    assert got.shape == cached.shape
    some = [0, 1, 13, n - 1]
    brute = torch.stack([loss([i]) - loss([]) for i in some], 1)
    torch.testing.assert_close(got[:, some], brute, atol=1e-5, rtol=1e-4)
    assert brute.abs().max() > 1e-3
    part = M.leave_one_out_loss(begin, future, targets, positions=torch.tensor(some))
    torch.testing.assert_close(part, brute, atol=1e-5, rtol=1e-4)


def test_grad_x_input_is_the_slope_towards_zero(model, drawn):
    cached, future = tokens(drawn, "unknown")
    begin, targets = M.prefill(model, cached), 3
    got = M.grad_x_input(begin, future, targets)

    @torch.no_grad()
    def loss(layer, head, token, scale):
        cache = DynamicCache(config=model.config)
        for i, view in enumerate(begin.views):
            k, v = view.k.clone(), view.v.clone()
            if i == layer:
                k[:, head, token] *= scale
                v[:, head, token] *= scale
            cache.update(k, v, i)
        logits = model(future, past_key_values=cache).logits
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), future[:, 1:], reduction="none")[:, -targets:].mean(1)

    for layer, head, token in ((0, 1, 5), (2, 0, 30), (1, 0, 0)):
        slope = (loss(layer, head, token, 1.01) - loss(layer, head, token, 0.99)).abs() / 0.02
        torch.testing.assert_close(got[layer][:, head, token], slope, rtol=0.05, atol=2e-5)


def test_truths_by_name(model, drawn):
    cached, future = tokens(drawn, "known")
    found = M.truths(M.prefill(model, cached), future, 2)
    assert tuple(found) == M.TRUTHS
    assert all(len(x) == 3 and x[0].shape == (2, 2, cached.shape[1]) for x in found.values())
    with pytest.raises(ValueError, match="'future'"):
        M.truths(M.prefill(model, cached), future, 2, ["future"])
    with pytest.raises(ValueError, match=r"1\.\.2.*got 3"):
        M.grad_x_input(M.prefill(model, cached), future, 3)


# --- shares -----------------------------------------------------------------------------------------------------------


def test_recall_at_budget_counts():
    truth = torch.tensor([[[0.5, 0.3, 0.1, 0.1, 0.0], [0.0, 0.0, 0.2, 0.3, 0.5]]])
    kept = torch.tensor([[[0, 2, 7], [4, -1, -1]]])  # 7 came after the prompt; the second head holds one token
    recall, mass = M.recall_at_budget([kept], [truth])
    assert recall.item() == pytest.approx((1 / 2 + 1) / 2)
    assert mass.item() == pytest.approx((0.6 / 0.8 + 1) / 2)
    assert M.found([kept], torch.tensor([[True, False, False, False, True]])).item() == pytest.approx(0.5)
    assert M.votes([kept, kept], 5).tolist() == [[0.5, 0.0, 0.5, 0.0, 0.5]]
    with pytest.raises(ValueError, match="a layer in both"):
        M.recall_at_budget([kept, kept], [truth])


def test_rank_correlation_is_spearmans():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (2, 2, 30), generator=generator).float()  # many ties
    truth = torch.randn(2, 2, 25, generator=generator) + scores[..., :25]
    scores[0, 1, 3:6] = float("nan")
    expected = []
    for b in range(2):
        rho = []
        for g in range(2):
            there = ~scores[b, g, :25].isnan()
            rho.append(stats.spearmanr(scores[b, g, :25][there], truth[b, g][there]).statistic)
        expected.append(np.mean(rho))
    np.testing.assert_allclose(M.rank_correlation([scores], [truth]), expected, rtol=1e-5)


def test_errors_are_zero_for_the_same_and_known_for_others():
    logits = torch.tensor([[[0.0, 0.0]]])
    assert M.kl(logits, logits).item() == 0
    other = torch.tensor([[[np.log(0.25), np.log(0.75)]]], dtype=torch.float32)
    assert M.kl(logits, other).item() == pytest.approx(0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75))
    o = torch.ones(1, 2, 4)
    assert M.output_error([o, o], [o, 1.5 * o]).item() == pytest.approx(0.25)


def test_wilson_against_the_textbook():
    found = measure.wilson(torch.tensor([True] * 9 + [False]))
    assert found.value == 0.9 and found.bounds == pytest.approx((0.5958, 0.9821), abs=1e-4)
    every = measure.wilson([True] * 20)
    assert every.high == 1 and 0.8 < every.low < 0.9
    with pytest.raises(ValueError, match="boolean"):
        measure.wilson([0.5, 1.0])


# --- the experiments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", M.QUESTIONS)
@pytest.mark.parametrize("method", [None, kv.SnapKV(keep=0.3, window=4), kv.H2O(keep=12)], ids=["full", "snap", "h2o"])
def test_study_agrees_with_generate(model, drawn, method, question):
    """`correct` is what greedy decoding says, against answers that greedy decoding itself gave to half of the rows."""
    cached, _ = M.split(drawn, question)

    def greedy(ids):
        if method is None:
            return model.generate(**ids)
        with method(model):
            return model.generate(**ids)

    cache = DynamicCache(config=model.config)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    if question == "known":
        given = {"input_ids": cached}
        answers = greedy({**given, "attention_mask": torch.ones_like(cached), **options})[:, -3:]
    else:
        whole = drawn.prompt

        def run():
            with torch.no_grad():
                model(cached, past_key_values=cache)
                rows = drawn.question.split(1, 1) if M.one_by_one(method) else [drawn.question]
                for row in rows:
                    logits = model(row, past_key_values=cache).logits[:, -1]
                taken = [logits.argmax(-1)]
                for _ in range(2):
                    taken.append(model(taken[-1][:, None], past_key_values=cache).logits[:, -1].argmax(-1))
                return torch.stack(taken, 1)

        assert whole.shape[1] == N + 4
        if method is None:
            answers = run()
        else:
            with method(model):
                answers = run()
    answers = answers.clone()
    answers[::2, -1] = (answers[::2, -1] + 1) % VOCAB  # every second one wrong in its last token
    changed = replace(drawn, answer=answers)
    table = M.study(model, changed, {"it": method}, question, batch=4, progress=False)
    assert table["correct"].tolist() == [False, True] * 3
    assert table["sample"].tolist() == list(range(6))


def test_study_columns(model, drawn):
    methods = {"full": None, "oracle": kv.OracleKV(keep=0.25), "random": kv.RandomKV(keep=0.25), "tova": kv.TOVA(0.25)}
    table = M.study(model, drawn, methods, "unknown", batch=4, truth=M.TRUTHS, progress=False)
    mean = table.groupby("method")[table.select_dtypes("number").columns.tolist()].mean()
    assert len(table) == 24 and table["correct"].dtype == bool
    assert mean["tokens"].to_dict() == {"full": 48, "oracle": 12, "random": 12, "tova": 12}
    assert (
        mean.loc["full", "bytes"] == 2 * 3 * 48 * 2 * 8 * 4 and mean.loc["random", "bytes"] == mean["bytes"]["full"] / 4
    )
    assert mean.loc["full", ["error", "kl"]].tolist() == [0, 0] and (mean["kl"][1:] > 0).all()
    assert mean.loc["full", "found"] == 1
    assert mean.loc["oracle", "recall_oracle"] == 1 and mean.loc["oracle", "mass_oracle"] == pytest.approx(1)
    assert mean.loc["oracle", "correlation_oracle"] == pytest.approx(1)
    assert 0.1 < mean.loc["random", "recall_oracle"] < 0.45
    assert table[table["method"] == "full"]["correlation_oracle"].isna().all()
    assert mean.loc["oracle", "correlation_leave_one_out"] > 0.5 > abs(mean.loc["random", "correlation_leave_one_out"])


def test_study_takes_samples_of_several_lengths(model, drawn):
    short = replace(drawn, context=drawn.context[:, 8:], truth=drawn.truth[:, 8:])
    methods = {"full": None, "knorm": kv.KNorm(keep=0.25)}
    both = M.study(model, [drawn, short], methods, batch=4, progress=False)
    alone = [M.study(model, one, methods, batch=6, progress=False) for one in (drawn, short)]
    alone[1]["sample"] += 6
    for name in methods:
        parts = [table[table["method"] == name].reset_index(drop=True) for table in (both, pd.concat(alone))]
        assert parts[0]["sample"].tolist() == list(range(12))
        np.testing.assert_allclose(*(part[["nll", "tokens", "found", "kl"]] for part in parts), rtol=1e-4, atol=1e-6)


def test_study_of_answers_of_one_token(model, drawn):
    short = replace(drawn, answer=drawn.answer[:, :1])
    table = M.study(model, short, {"knorm": kv.KNorm(keep=0.25)}, "known", truth=M.TRUTHS, progress=False)
    assert table[["recall_oracle", "recall_leave_one_out"]].notna().all(None)
    assert table[["recall_grad_x_input", "mass_leave_one_out_loss", "correlation_grad_x_input"]].isna().all(None)


def test_study_refuses(model, drawn):
    with pytest.raises(ValueError, match="no samples"):
        M.study(model, [], {"full": None})
    with pytest.raises(ValueError, match="'asked'"):
        M.study(model, drawn, {"full": None}, "asked")
    with pytest.raises(ValueError, match="'SnapKV'"):
        M.study(model, drawn, {"x": "SnapKV"})
    with pytest.raises(ValueError, match="no methods"):
        M.study(model, drawn, {})


def test_perplexity_of_the_full_cache_is_the_models(model):
    text = torch.randint(1, VOCAB, (3, 40), generator=torch.Generator().manual_seed(8))
    methods = {"full": None, "all": kv.H2O(keep=1000), "few": kv.H2O(keep=4)}
    table = M.perplexity(model, text, methods, context=20, batch=2, progress=False)
    with torch.no_grad():
        logits = model(text).logits[:, 20:-1]
    expected = F.cross_entropy(logits.transpose(1, 2), text[:, 21:], reduction="none").mean(1)
    by = {name: part.reset_index(drop=True) for name, part in table.groupby("method")}
    np.testing.assert_allclose(by["full"]["nll"], expected, rtol=1e-4)
    np.testing.assert_allclose(by["all"]["nll"], expected, rtol=1e-4)
    assert (by["few"]["kl"] > 1e-4).all() and (by["few"]["tokens"] == 4).all()
    summary = M.summarise(table).set_index("method")
    assert summary.loc["full", "perplexity"] == pytest.approx(np.exp(expected.mean().item()), rel=1e-4)
    with pytest.raises(ValueError, match="context=39"):
        M.perplexity(model, text, methods, context=39)


def test_summarise():
    table = pd.DataFrame(
        {"method": ["a"] * 4 + ["b"] * 4, "keep": 0.5, "sample": [0, 1, 2, 3] * 2, "correct": [True] * 6 + [False] * 2}
    ).assign(kl=[0.0, 1, 2, 3, 4, 4, 4, np.nan])
    found = M.summarise(table, ["method", "keep"])
    assert found["accuracy"].tolist() == [1.0, 0.5] and found["n"].tolist() == [4, 4]
    assert found["accuracy_low"][0] == pytest.approx(0.5101, abs=1e-4)
    assert found["kl"].tolist() == [1.5, 4.0] and found["kl_low"][0] < 1.5 < found["kl_high"][0]
    with pytest.raises(ValueError, match="budget"):
        M.summarise(table, ["budget"])


# --- cost -------------------------------------------------------------------------------------------------------------


def test_costs_have_a_row_per_method(model):
    ids = torch.randint(1, VOCAB, (2, 64), generator=torch.Generator().manual_seed(8))
    methods = {"snap": kv.SnapKV(keep=0.25, window=8), "full again": None}
    compression = M.prefill_cost(model, ids, methods, repeats=3, seconds_budget=5)
    assert compression["method"].tolist() == list(methods) and (compression["rounds"] == 3).all()
    assert (compression["low"] <= compression["share"]).all() and (compression["share"] <= compression["high"]).all()
    generation = M.generation_cost(model, ids, methods, new_tokens=4, repeats=2, seconds_budget=5)
    assert generation["method"].tolist() == list(methods) and (generation["ratio"] > 0).all()
    with pytest.raises(ValueError, match="new_tokens"):
        M.generation_cost(model, ids, methods, new_tokens=1)


def test_scoring_memory_is_linear(model):
    methods = {"snap": kv.SnapKV(keep=0.25, window=8), "h2o": kv.H2O(keep=0.25), "knorm": kv.KNorm(keep=0.25)}
    table = M.scoring_memory(model, methods, (2048, 8192))
    for _, part in table.groupby("method"):
        short, long = part["bytes"]
        assert 3 < long / short < 5, "four times the context, about four times the memory"
    assert (table["cache_bytes"] == table["length"] * 2 * 2 * 8 * 4).all()
    with pytest.raises(ValueError, match="'o'"):
        M.scoring_memory(model, {"o": kv.OracleKV(keep=0.5)})
