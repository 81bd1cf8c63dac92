"""What each KV-cache method promises beyond what all of them do (`tests/conformance/test_kv.py`)."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import keeprate as kr
from keeprate import select
from keeprate.anatomy import decoder
from keeprate.attention import AttentionView
from keeprate.kv import KVLayer, KVTrace, Step
from keeprate.kv.blocks import Blocks
from keeprate.kv.rcstat import above
from keeprate.kv.rope import rotate

B, G, R, N, D = 2, 2, 3, 24, 8  # samples, KV heads, query heads each, tokens, channels
H = G * R
quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        vocab_size=61, hidden_size=48, intermediate_size=48, num_hidden_layers=3, num_attention_heads=H,
        num_key_value_heads=G, head_dim=D, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = 0.25 * torch.randn(p.shape, generator=g) if p.dim() > 1 else p.data
    return model


class Tape:
    """One layer of a model: tokens come in, steps go out."""

    def __init__(self, body=None, layer: int = 0, depth: int = 1, seed: int = 0):
        self.cache, self.layer, self.depth, self.seed = KVLayer(), layer, depth, seed
        self.body = SimpleNamespace(treated=tuple(range(depth))) if body is None else body
        self.cache.owner = SimpleNamespace(running=True, reads_flat=False, trace=KVTrace())

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float = D**-0.5, **more) -> Step:
        """Queries [b, h, m, d] of m new tokens, their keys and values [b, g, m, d]."""
        first = self.cache.seen == 0
        keys, values = self.cache.update(k, v)
        b, m = len(q), q.shape[2]
        zero = torch.zeros(b, dtype=torch.long)
        self.cache.extra |= {"start": zero, "lengths": zero + self.cache.seen, "aligned": True}
        ids = torch.arange(self.cache.seen - m, self.cache.seen)[None]
        self.cache.note_positions(ids)
        view = AttentionView(q, keys, values, None, scaling, causal=m > 1, position_ids=ids)
        generator = torch.Generator().manual_seed(self.seed)
        settings = {"real": None, "ids": None, "common": {}, **more}
        return Step(view, self.cache, None, self.body, self.layer, self.depth, first, **settings, generator=generator)

    def random(self, m: int, seed: int = 0, **more) -> Step:
        """Random new tokens."""
        q, k, v = rand(B, H, m, D, seed=seed), rand(B, G, m, D, seed=seed + 1), rand(B, G, m, D, seed=seed + 2)
        return self.step(2 * q, k, v, **more)


def chosen(method: kr.kv.EvictMethod, step: Step) -> torch.Tensor:
    """[b, g, n] what the method keeps."""
    scores = method.score(step)
    return select.keep_top(scores, method.counts(step, scores), method.protect(step), step.valid).mask(step.n)


def attention(q: torch.Tensor, k: torch.Tensor, scaling: float = D**-0.5) -> torch.Tensor:
    """Causal probabilities [b, h, m, n] in double precision, row by row."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = scaling * q.double() @ k.transpose(-1, -2)
    m, n = logits.shape[-2:]
    for row in range(m):
        logits[..., row, n - m + row + 1 :] = float("-inf")
    return logits.softmax(-1)


def group(x: torch.Tensor, how: str = "sum") -> torch.Tensor:
    """Query heads to KV heads by slices."""
    return torch.stack([getattr(x[:, i * R : (i + 1) * R], how)(1) for i in range(G)], 1)


def prompt_and_steps(fold, decode: int = 3) -> tuple[Step, torch.Tensor]:
    """Run `fold` over a prompt, all but one of `decode` tokens at once and the last one: the last step, all rows."""
    tape, rows = Tape(), []
    for seed, m in enumerate([N, decode - 1, 1] if decode else [N]):
        step = tape.random(m, seed=10 * seed)
        fold(step)
        rows.append(torch.nn.functional.pad(attention(step.view.q, step.view.k), (0, N + decode - step.n)))
    return step, torch.cat(rows, 2)


# --- eviction ---------------------------------------------------------------------------------------------------------


def test_h2o_sums_add_up_to_the_rows():
    method = kr.kv.H2O()
    step, rows = prompt_and_steps(method.fold)
    scores = method.score(step)
    torch.testing.assert_close(scores.sum(-1), torch.full((B, G), float(R * (N + 3))))
    torch.testing.assert_close(scores, group(rows.sum(2)).float())


def test_h2o_gives_half_of_the_budget_to_the_recent():
    step, _ = prompt_and_steps(kr.kv.H2O().fold, decode=0)
    kept = chosen(kr.kv.H2O(keep=10), step)
    assert bool(kept[..., -5:].all()) and bool((kept.sum(-1) == 10).all())
    heavy = step.cache.carry("received")[..., :-5].topk(5).indices
    assert bool(kept.gather(2, heavy).all())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.95, 1.0])
def test_a2sf_decays_every_row_by_its_age(alpha):
    method = kr.kv.A2SF(alpha=alpha)
    step, rows = prompt_and_steps(method.fold)
    age = torch.arange(N + 2, -1, -1, dtype=torch.double)
    want = group((rows * (alpha**age)[:, None]).sum(2))
    torch.testing.assert_close(method.score(step), want.float(), rtol=1e-4, atol=1e-6)


def test_a2sf_ends_in_h2o_and_in_the_last_row():
    scores = {}
    for method in (kr.kv.H2O(), kr.kv.A2SF(alpha=1.0), kr.kv.A2SF(alpha=0.0)):
        step, rows = prompt_and_steps(method.fold)
        scores[method] = method.score(step)
    h2o, one, none = scores.values()
    torch.testing.assert_close(one, h2o)
    torch.testing.assert_close(none, group(rows[:, :, -1]).float())


@pytest.mark.parametrize("history", [4, 16, 100])
def test_scissorhands_counts_as_a_loop_does(history):
    method = kr.kv.Scissorhands(keep=12, history=history, recent=2)
    step, rows = prompt_and_steps(method.fold, decode=5)
    a = group(rows, "mean")[:, :, -history:]
    n = rows.shape[-1]
    votes = torch.zeros(B, G, n)
    for r in range(a.shape[2]):
        sees = n - a.shape[2] + r + 1
        votes[..., :sees] += a[:, :, r, :sees] < 1 / sees
    scores = method.score(step)
    assert torch.equal(scores - scores.amax(-1, keepdim=True), votes.amin(-1, keepdim=True) - votes)
    assert bool((scores >= 0).all()), "modifiers multiply scores"


def test_snapkv_is_the_pooled_mean_of_the_window():
    step = Tape().random(N)
    window = 5
    scores = kr.kv.SnapKV(window=window, kernel=3).score(step)
    a = group(attention(step.view.q, step.view.k)[:, :, -window:].mean(2), "mean")[..., :-window]
    for k in range(N - window):
        near = a[..., max(0, k - 1) : min(N - window, k + 2)]
        torch.testing.assert_close(scores[..., k], near.mean(-1).float())


def test_tova_keeps_the_same_tokens_in_every_head():
    step = Tape().random(N)
    method = kr.kv.TOVA(keep=8)
    kept = chosen(method, step)
    assert bool((kept == kept[:, :1]).all()) and bool(kept[..., -1].all())
    torch.testing.assert_close(method.score(step)[:, 0], attention(step.view.q, step.view.k)[:, :, -1].mean(1).float())


def test_knorm_does_not_feel_the_rotary_embedding(llama):
    step, positions = Tape().random(N), torch.arange(N)[None] + 100
    turned = rotate(step.view.k, positions, decoder(llama), 0)
    assert not torch.allclose(turned, step.view.k, atol=0.1)
    other = Tape().step(step.view.q, turned, step.view.v)
    torch.testing.assert_close(kr.kv.KNorm().score(step), kr.kv.KNorm().score(other))


def test_keydiff_looks_at_directions_only():
    step = Tape().random(N)
    k = step.view.k.clone()
    k[:, :, 5] *= 40
    k[:, 0, 7] *= 0.01
    want = kr.kv.KeyDiff().score(step)
    torch.testing.assert_close(kr.kv.KeyDiff().score(Tape().step(step.view.q, k, step.view.v)), want)
    unit = step.view.k / step.view.k.norm(dim=-1, keepdim=True)
    anchor = unit.mean(2, keepdim=True)
    torch.testing.assert_close(want, -(unit * anchor).sum(-1) / anchor.norm(dim=-1))


def test_keydiff_ties_duplicates():
    step = Tape().random(N)
    k = step.view.k.clone()
    k[:, :, 9] = k[:, :, 2]
    scores = kr.kv.KeyDiff().score(Tape().step(step.view.q, k, step.view.v))
    assert torch.equal(scores[..., 9], scores[..., 2])


def test_streaming_llm_depends_on_the_length_only(llama):
    sets = []
    for seed in (0, 1):
        ids = torch.randint(3, 61, (1, 20), generator=torch.Generator().manual_seed(seed))
        for parts in ((20,), (13, 4, 3), (19, 1)):
            with kr.kv.StreamingLLM(keep=9, sinks=3)(llama) as trace, torch.no_grad():
                cache = None
                for part in ids.split(parts, 1):
                    cache = llama(part, past_key_values=cache, use_cache=True).past_key_values
                sets += trace.kept
    want = torch.tensor([0, 1, 2, *range(14, 20)]).expand(1, G, -1)
    assert all(torch.equal(kept, want) for kept in sets)


@pytest.mark.parametrize("params", [{"separators": ()}, {"separators": (3, 5, 8), "most": 0}])
def test_sepllm_without_separators_is_streaming_llm(llama, params):
    ids = torch.randint(3, 12, (2, 20), generator=torch.Generator().manual_seed(0))
    kept = []
    for method in (kr.kv.SepLLM(keep=9, initial=3, **params), kr.kv.StreamingLLM(keep=9, sinks=3)):
        with method(llama) as trace, torch.no_grad():
            cache = llama(ids[:, :17], use_cache=True).past_key_values
            for token in ids[:, 17:].split(1, 1):
                llama(token, past_key_values=cache)
            kept.append(trace.kept)
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_sepllm_keeps_the_newest_separators(llama):
    ids, marks = torch.full((1, 24), 9), [2, 5, 6, 11, 15]
    ids[0, marks] = 4
    with kr.kv.SepLLM(keep=10, separators=(4,), initial=2, most=3)(llama) as trace, torch.no_grad():
        llama(ids)
    want = [0, 1, 6, 11, 15, *range(19, 24)]
    assert all(layer[0, head].tolist() == want for layer in trace.kept for head in range(G))


# --- expected attention -----------------------------------------------------------------------------------------------


def _expected(llama, covariance: bool):
    """Step, mean and covariance of its plain queries [b, h, ...], mean rotation [d, d], the method's answer."""
    body, sinks, horizon = decoder(llama), 2, 6
    plain = 0.6 * rand(B, H, N, D) + rand(1, H, 1, D, seed=1)
    q = rotate(plain, torch.arange(N)[None], body, 0)
    step = Tape(body).step(q, rand(B, G, N, D, seed=2), rand(B, G, N, D, seed=3))
    method = kr.kv.ExpectedAttention(sinks=sinks, horizon=horizon, covariance=covariance)
    plain = plain[:, :, sinks:]
    mean = plain.mean(2)
    centred = plain - mean[:, :, None]
    sigma = centred.transpose(-1, -2) @ centred / centred.shape[2]
    basis = torch.eye(D)[None, :, None].expand(1, D, horizon, D)  # one head a unit vector
    turned = rotate(basis, N + torch.arange(horizon)[None], body, 0).mean(2)[0].T  # columns are turned unit vectors
    return step, mean, sigma, turned, method.expected(step)


def test_expected_attention_of_the_mean_query(llama):
    step, mean, _, turned, got = _expected(llama, covariance=False)
    k = step.view.k.repeat_interleave(R, 1)
    want = (torch.einsum("ij,bhj,bhni->bhn", turned, mean, k) * D**-0.5).softmax(-1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_expected_attention_is_the_mean_over_gaussian_queries(llama):
    step, mean, sigma, turned, got = _expected(llama, covariance=True)
    draws = torch.distributions.MultivariateNormal(mean[0, 0].double(), sigma[0, 0].double() + 1e-9 * torch.eye(D))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        q = draws.sample((200_000,)) @ turned.double().T
    pay = (q @ step.view.k[0, 0].double().T * D**-0.5).exp().mean(0)  # E[exp(q . k)]
    torch.testing.assert_close(got[0, 0].double(), pay / pay.sum(), rtol=0.03, atol=0)


# --- relative contextualisation ---------------------------------------------------------------------------------------


@quick
@given(seeds, st.integers(1, 9), st.integers(1, 9))
def test_above_is_the_mean_over_all_pairs(seed, n, m):
    u, w = 3 * rand(2, n, seed=seed), 3 * rand(2, m, seed=seed + 1)
    u[0, 0] = float("-inf")
    w[1, 1:] = float("-inf")
    w[0, 0] = u[0, -1] if n > 1 else w[0, 0]  # a tie
    pairs = (u[:, :, None] - w[:, None]).clamp_min(0.0)
    real = w.isfinite()[:, None].expand_as(pairs)
    want = torch.where(real, pairs, 0.0).nan_to_num(0.0).sum(-1) / real.sum(-1)
    torch.testing.assert_close(above(u, w), want, rtol=1e-4, atol=1e-5)


def test_rcstat_does_not_feel_a_constant():
    class Shifted(Step):
        def logits(self, count: int = 1) -> torch.Tensor:
            return super().logits(count) + 8.0

    step, method = Tape().random(N), kr.kv.RCStat(keep=12, window=6)
    shifted = Shifted(**{name: getattr(step, name) for name in Step.__dataclass_fields__})
    before = method.score(step)
    torch.testing.assert_close(method.score(shifted), before, rtol=1e-3, atol=1e-4)
    assert bool((before[..., :-6].std(-1) > 0).all())


# --- modifiers --------------------------------------------------------------------------------------------------------


def test_vatp_ignores_values_of_equal_norm():
    step = Tape().random(N)
    signs = rand(B, G, N, D, seed=5).sign()
    step = Tape().step(step.view.q, step.view.k, signs)
    for base in (kr.kv.TOVA(keep=9), kr.kv.SnapKV(keep=9, window=3)):
        method = kr.kv.VATP(base=base, sinks=0)
        assert torch.equal(chosen(method, step), chosen(base, step))


def test_vatp_is_the_score_times_the_l1_norm():
    step, base = Tape().random(N), kr.kv.TOVA(keep=9)
    want = base.score(step) * step.view.v.norm(p=1, dim=-1)
    torch.testing.assert_close(kr.kv.VATP(base=base, sinks=0).score(step), want)


def test_vatp_ignores_the_scale_of_all_values_but_not_of_one():
    step = Tape().random(N)
    method = kr.kv.VATP(base=kr.kv.TOVA(keep=9), sinks=2)
    kept = chosen(method, step)
    scaled = Tape().step(step.view.q, step.view.k, 4 * step.view.v)
    assert torch.equal(chosen(method, scaled), kept) and bool(kept[..., :2].all())
    v = step.view.v.clone()
    v[~kept] *= 1e4
    assert not torch.equal(chosen(method, Tape().step(step.view.q, step.view.k, v)), kept)


def test_caote_is_the_change_of_the_output():
    step = Tape().random(N)
    base = kr.kv.SnapKV(keep=9, window=4)
    a = base.score(step).double()
    a = a / a.sum(-1, keepdim=True)
    v = step.view.v.double()
    output = torch.einsum("bgn,bgnd->bgd", a, v)
    change = torch.empty(B, G, N, dtype=torch.double)
    for j in range(N):
        rest = a.clone()
        rest[..., j] = 0
        rest = rest / rest.sum(-1, keepdim=True)
        change[..., j] = (output - torch.einsum("bgn,bgnd->bgd", rest, v)).norm(dim=-1)
    torch.testing.assert_close(kr.kv.CAOTE(base=base).score(step).double(), change, rtol=1e-5, atol=1e-5)
    fast = a / (1 - a) * (v.mean(2, keepdim=True) - v).norm(dim=-1)
    torch.testing.assert_close(kr.kv.CAOTE(base=base, fast=True).score(step).double(), fast, rtol=1e-4, atol=1e-5)


def test_caote_loses_nothing_with_a_token_that_says_what_all_say():
    step = Tape().random(N)
    base = kr.kv.TOVA(keep=9)
    a = base.score(step)
    v = step.view.v.clone()
    rest = a.clone()
    rest[..., 3] = 0
    v[:, :, 3] = torch.einsum("bgn,bgnd->bgd", rest, v) / rest.sum(-1, keepdim=True)  # so that v_3 = o
    scores = kr.kv.CAOTE(base=base).score(Tape().step(step.view.q, step.view.k, v))
    assert bool((scores[..., 3] < 1e-3 * scores.mean(-1)).all()) and bool((scores.argmin(-1) == 3).all())


@quick
@given(st.data())
def test_pyramid_layers_share_the_budget(data):
    depth, n = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 200))
    tokens = data.draw(st.integers(1, n))
    window = data.draw(st.integers(1, tokens))
    beta = data.draw(st.sampled_from([1.0, 2.0, 4.0, 20.0]))
    method = kr.kv.PyramidKV(keep=max(2, tokens), base=kr.kv.SnapKV(keep=max(2, tokens), window=window), beta=beta)
    tokens = min(max(2, tokens), n)
    lengths, counts = torch.tensor([n]), []
    for layer in range(depth):
        cache = SimpleNamespace(extra={"lengths": lengths})
        step = SimpleNamespace(common={}, lengths=lengths, layer=layer, depth=depth, cache=cache)
        counts.append(int(method.target(step)))
    assert all(window <= c <= n for c in counts)
    assert sum(counts) == depth * tokens
    assert all(low >= high - 1 for low, high in pairwise(counts)), "never more above, but for rounding"
    if beta == 1.0:
        assert counts == [tokens] * depth
    elif depth > 1 and beta * 2 <= tokens - window <= (n - window) / 2:
        assert counts[0] > counts[-1]


@quick
@given(seeds, st.integers(1, 4), st.integers(2, 16), st.sampled_from([0.0, 0.2, 0.7, 1.0]), st.booleans(), st.data())
def test_ada_heads_share_the_budget(seed, g, n, floor, blend, data):
    tokens = data.draw(st.integers(2, n))
    method = kr.kv.AdaKV(base=kr.kv.KNorm(), keep=tokens, floor=floor, rule="blend" if blend else "floor")
    scores = rand(2, g, n, seed=seed).exp()
    lengths = torch.tensor([n, n])
    step = SimpleNamespace(common={}, lengths=lengths, layer=0, depth=1, groups=g, valid=None)
    counts = method.counts(step, scores)
    assert bool((counts.sum(1) == g * tokens).all()) and bool((counts <= n).all())
    assert bool((counts >= int(floor * tokens)).all())
    if not floor:  # the best of all heads: no even split holds more
        held = (scores * select.keep_top(scores, counts).mask(n)).sum((1, 2))
        even = scores.topk(tokens).values.sum((1, 2))
        assert bool((held >= even - 1e-4 * even).all())
    if floor == 1.0:
        assert bool((counts == tokens).all())


@quick
@given(seeds, st.integers(2, 5), st.integers(4, 16), st.floats(0.2, 1.0))
def test_kvcompose_layers_share_the_budget(seed, depth, n, keep):
    method = kr.kv.KVCompose(keep=keep)
    scores = [rand(1, G, n, seed=seed + i).exp() for i in range(depth)]
    lengths = torch.tensor([n])
    steps = [SimpleNamespace(valid=None, lengths=lengths, layer=i) for i in range(depth)]
    counts = method.across(steps, scores)
    assert all(bool((c == c[:, :1]).all()) and c.shape == (1, G) for c in counts)
    total = int(keep * depth * n + 1e-6)
    composite = torch.stack([s.sort(-1, descending=True).values.mean(1)[0] for s in scores])
    composite[0] = composite.amax(0)
    best = composite.flatten().sort(descending=True, stable=True).indices[:total] // n
    want = torch.bincount(best, minlength=depth).clamp_min(1)
    assert torch.equal(torch.cat([c[0, :1] for c in counts]), want)
    if bool((torch.bincount(best, minlength=depth) > 0).all()):
        assert sum(int(c[0, 0]) for c in counts) == total


# --- fewer bits, shared keys ------------------------------------------------------------------------------------------


class Even(AttentionView):
    """Every row gives every token it sees the same weight."""

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        n = self.k.shape[2]
        return (torch.arange(n) <= index[..., None]).float()[:, None].expand(-1, H, -1, -1)


def test_zipcache_normalises_age_away():
    step = Tape().random(N)
    view = Even(**{name: getattr(step.view, name) for name in AttentionView.__dataclass_fields__})
    step = replace(step, view=view)
    params = {"probes": 1.0}
    assert kr.kv.ZipCache(**params).probe_rows(step)[1].sum(1).tolist() == [N, N]
    normalised, raw = (kr.kv.ZipCache(**params, normalise=how).score(step) for how in ("visible", "none"))
    torch.testing.assert_close(normalised, torch.full((B, G, N), float(R)))
    torch.testing.assert_close(raw, (R * torch.arange(N, 0, -1.0)).expand(B, G, N))
    # with a tenth of the rows, the full causal count punishes old tokens; the number of probes that see them does not
    few, causal = (kr.kv.ZipCache(normalise=how).score(step) for how in ("visible", "causal"))
    torch.testing.assert_close(few, normalised)
    assert bool((causal[..., 0] < causal[..., -1]).all())


def test_zipcache_in_16_bits_changes_nothing(llama):
    ids = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = llama(ids[:, 15:], past_key_values=llama(ids[:, :15], use_cache=True).past_key_values).logits
        with kr.kv.ZipCache(keep=0.3, bits=(16, 16))(llama):
            cache = llama(ids[:, :15], use_cache=True).past_key_values
            assert torch.equal(llama(ids[:, 15:], past_key_values=cache).logits, plain)


@pytest.mark.parametrize("method", [kr.kv.PoD(keep=64), kr.kv.PoD(keep=6, leaders=(0, 1, 2))])
def test_pod_is_exact_where_nothing_is_shared(llama, method):
    ids = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = llama(ids[:, 15:], past_key_values=llama(ids[:, :15], use_cache=True).past_key_values).logits
        with method(llama):
            cache = llama(ids[:, :15], use_cache=True).past_key_values
            assert torch.equal(llama(ids[:, 15:], past_key_values=cache).logits, plain)


def test_pod_merges_the_leaders_logits_with_its_own():
    sinks, near, n = 2, 7, 16
    tape, leader = Tape(layer=1, depth=2), Tape(layer=0, depth=2)
    method = kr.kv.PoD(keep=near, sinks=sinks)
    k = rand(B, G, n, D, seed=1)
    for each, keys in ((leader, rand(B, G, n, D, seed=7)), (tape, k)):
        method.fold(each.step(rand(B, H, n, D), keys, rand(B, G, n, D, seed=3)))
    distant = list(range(sinks, n - (near - sinks)))
    assert sorted(tape.cache.index[0, 0, : tape.cache.n_cold].tolist()) == distant
    common = {}
    q, new = rand(B, H, 1, D, seed=11), [rand(B, G, 1, D, seed=s) for s in (12, 13, 14)]
    lead = leader.step(rand(B, H, 1, D, seed=10), new[0], new[2], common=common)
    assert method.attend(lead) is None
    got = method.attend(tape.step(q, new[1], new[2], common=common))
    v = torch.cat([rand(B, G, n, D, seed=3), new[2]], 2).repeat_interleave(R, 1)
    logits = q @ torch.cat([k, new[1]], 2).repeat_interleave(R, 1).transpose(-1, -2) * D**-0.5
    logits[..., distant] = (lead.view.q @ lead.view.k.repeat_interleave(R, 1).transpose(-1, -2) * D**-0.5)[..., distant]
    torch.testing.assert_close(got, logits.softmax(-1) @ v, rtol=1e-4, atol=1e-5)


# --- read-time selection ----------------------------------------------------------------------------------------------


def decode(method, prompt: int = N, seed: int = 0) -> Step:
    """A decode step behind a prompt that the method has seen."""
    tape = Tape()
    method.fold(tape.random(prompt, seed=seed))
    return tape.random(1, seed=seed + 50)


def products(step: Step) -> torch.Tensor:
    """[b, g, r, n] q . k of the decode row."""
    return (step.view.q @ step.view.k.repeat_interleave(R, 1).transpose(-1, -2)).view(B, G, R, step.n)


@quick
@given(seeds, st.integers(1, 9))
def test_quest_bounds_hold(seed, page):
    method = kr.kv.Quest(page=page, skip=0)
    step = decode(method, seed=seed % 10_000)
    pages = Blocks.of(step, page)
    low, high = method.bounds(step, pages)
    q = step.view.q[:, :, 0].view(B, G, R, 1, D)
    bound = torch.maximum(q * low[:, :, None], q * high[:, :, None]).sum(-1)
    best = products(step)[..., : pages.full.shape[1] * page].unflatten(3, (-1, page)).amax(-1)
    assert bool((bound >= best - 1e-5).all())


def test_quest_with_pages_of_one_token_is_exact():
    method = kr.kv.Quest(keep=7, page=1, skip=0)
    step = decode(method)
    best = products(step).amax(2).topk(7).indices.sort(-1).values
    assert torch.equal(method.choose(step).index, best)
    assert kr.kv.Quest(keep=7, skip=2).choose(step) is None, "the first layers read everything"


@pytest.mark.parametrize(("similarity", "again"), [(-1.0, False), (1.5, True)])
def test_token_select_chooses_again_never_or_always(similarity, again):
    method = kr.kv.TokenSelect(keep=9, initial=2, local=3, similarity=similarity)
    tape, kept, fresh = Tape(), [], []
    tape.random(N)
    for seed in (50, 70):
        step = tape.random(1, seed=seed)
        kept.append(set(method.choose(step).index[0, 0].tolist()) & set(range(2, N - 3)))
        votes = products(step).view(B, H, -1)[0] * D**-0.5
        best = votes[:, 2 : step.n - 3].softmax(-1).sum(0).topk(4).indices + 2
        fresh.append(set(best.tolist()) & set(range(2, N - 3)))
    assert kept[0] == fresh[0] and fresh[0] != fresh[1]
    assert kept[1] == (fresh[1] if again else kept[0])


def test_fasa_with_all_chunks_is_the_oracle():
    method = kr.kv.FASA(keep=8, share=1.0, rows=4, top=5, initial=0, local=1)
    step = decode(method)
    want = products(step).mean(2)
    want[..., -1] = float("inf")
    assert torch.equal(method.choose(step).index, want.topk(8).indices.sort(-1).values)


def test_fasa_chunks_add_up_to_the_logit():
    step = decode(kr.kv.FASA())
    q = step.view.q.view(B, G, R, D)
    chunks = [torch.full((B, G, 1), f) for f in range(D // 2)]
    part = kr.kv.FASA.part
    total = sum(part(q, f) @ part(step.view.k, f).transpose(-1, -2) for f in chunks)
    torch.testing.assert_close(total, products(step), rtol=1e-4, atol=1e-4)


def test_fasa_finds_the_chunk_that_decides():
    tape = Tape()
    q, k, v = 0.01 * rand(B, H, N, D), rand(B, G, N, D, seed=1), rand(B, G, N, D, seed=2)
    q[..., [1, 1 + D // 2]] *= 1000  # only the second chunk of the queries is not close to zero
    method = kr.kv.FASA(share=2 / D, rows=4, top=5)
    method.fold(tape.step(q, k, v))
    assert bool((tape.cache.extra["dominant"] == 1).all())


def act_step(scale: float, method: kr.kv.ActQKV) -> Step:
    """A prompt and a decode row whose queries are larger and whose attention is the same."""
    tape = Tape()
    for seed, m in ((0, 40), (50, 1)):
        q, k, v = rand(B, H, m, D, seed=seed), rand(B, G, m, D, seed=seed + 1), rand(B, G, m, D, seed=seed + 2)
        step = tape.step(scale * q, k, v, scaling=D**-0.5 / scale)
        if m > 1:
            method.fold(step)
    return step


def test_actqkv_does_not_feel_the_scale_of_the_queries():
    method = kr.kv.ActQKV(keep=16, block=4, representatives=2, window=6, initial=2, local=3, least=1)
    one, four = (act_step(scale, method) for scale in (1.0, 4.0))
    torch.testing.assert_close(method.probe(four), 4 * method.probe(one), rtol=1e-4, atol=1e-4)
    assert torch.equal(method.choose(one).index, method.choose(four).index)


def test_actqkv_probes_with_the_mean_of_equally_unusual_queries():
    centre, off = rand(B, H, 1, D), rand(B, H, 1, D, seed=1)
    method, tape = kr.kv.ActQKV(window=2), Tape()
    method.fold(tape.step(torch.cat([centre + off, centre - off], 2), rand(B, G, 2, D), rand(B, G, 2, D)))
    step = tape.step(centre + off, rand(B, G, 1, D), rand(B, G, 1, D))
    torch.testing.assert_close(method.probe(step), centre.flatten(1), rtol=1e-4, atol=1e-5)


def test_tidaldecode_lends_its_choice_to_the_layers_above():
    method, common = kr.kv.TidalDecode(keep=7, start=1, correction=3), {}
    tapes = [Tape(layer=layer, depth=5) for layer in range(5)]
    kept, best = [], []
    for i, tape in enumerate(tapes):
        tape.random(N, seed=10 * i)
        step = tape.random(1, seed=10 * i + 5, common=common)
        kept.append(method.choose(step))
        weight = (products(step) * D**-0.5).softmax(-1).mean(2)
        weight[..., -1] = float("inf")
        best.append(weight.topk(7).indices.sort(-1).values)
    assert kept[0] is None and kept[1] is None and kept[3] is None
    assert torch.equal(kept[2].index, best[1]) and torch.equal(kept[4].index, best[3])
