"""What the methods that read the vision encoder promise, against plain loops over an eager model."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import keeprate as kr
from keeprate import Budget
from keeprate.attention import AttentionView
from keeprate.mllm.flowcut import information_flow
from keeprate.mllm.fopru import best_rows
from keeprate.mllm.prumerge import evenly, neighbour_weights, quartiles
from keeprate.mllm.visionzip import add_mean, nearest, strided
from keeprate.mllm.vscan import local_global

SIDE, BLOCKS, DEPTH, IMAGE = 6, 7, 4, 50  # patches a side, blocks of the encoder, decoder layers, placeholder
N, FEATURE = SIDE * SIDE, BLOCKS - 2  # tokens; 0-based block that gives the features
quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(attention: str) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=BLOCKS, num_attention_heads=4, image_size=SIDE * 4,
        patch_size=4,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=DEPTH, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-2)
    config._attn_implementation = attention
    model = LlavaForConditionalGeneration(config).eval()
    g = torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3) + (p.dim() == 1)
    return model


@pytest.fixture(scope="module")
def model():
    return build("sdpa")


@pytest.fixture(scope="module")
def plain():
    return build("eager")


PIXELS = rand(2, 3, SIDE * 4, SIDE * 4, seed=1)
IDS = torch.tensor([[1, 4] + [IMAGE] * N + [7, 8, 9, 10], [1, 5] + [IMAGE] * N + [11, 12, 13, 14]])
FIRST = 2  # position of the first visual token


@pytest.fixture(scope="module")
def seen(plain):
    """The encoder at work, eagerly: attention of every block, its hidden states, keys and queries of the last one."""
    tower, held = plain.model.vision_tower, {}
    attention = tower.encoder.layers[-1].self_attn
    hooks = [
        getattr(attention, name).register_forward_hook(lambda m, a, out, name=name: held.update({name: out}))
        for name in ("q_proj", "k_proj")
    ]
    key = tower.encoder.layers[FEATURE].self_attn.k_proj.register_forward_hook(lambda m, a, out: held.update(keys=out))
    with torch.no_grad():
        out = tower(PIXELS, output_attentions=True, output_hidden_states=True)
    for hook in (*hooks, key):
        hook.remove()
    return {"attention": out.attentions, "hidden": out.hidden_states, **held}


def run(model, method, **options):
    """Trace of one pass, what enters the first decoder layer at every sample's visual tokens, and the logits."""
    held = {}

    def note(layer, args, kwargs):
        held["x"] = args[0] if args else kwargs["hidden_states"]

    with torch.no_grad(), method(model, **options) as trace:
        hook = model.model.language_model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
        try:
            logits = model(input_ids=IDS, pixel_values=PIXELS).logits
        finally:
            hook.remove()
    x = [held["x"][i, FIRST : FIRST + n] for i, n in enumerate(trace.counts()[:, 0].tolist())]
    return trace, x, logits


def kept(trace, step: int = 0) -> list[list[int]]:
    return [[i for i in row if i >= 0] for row in trace.steps[step].kept.tolist()]


def top(scores: torch.Tensor, k: int) -> list[int]:
    return sorted(scores.sort(descending=True, stable=True).indices[:k].tolist())


def close(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


# --- VTC-CLS ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [None, 0, 2, FEATURE])
def test_vtccls_sums_class_attention_up_to_the_features(model, seen, start):
    trace, _, _ = run(model, kr.mllm.VTCCLS(keep=7, start=start))
    begin = FEATURE + 1 - BLOCKS // 3 if start is None else start
    want = sum(seen["attention"][i].mean(1)[:, 0, 1:] for i in range(begin, FEATURE + 1))
    close(trace.steps[0].score, want)
    assert kept(trace) == [top(row, 7) for row in want]


def test_vtccls_with_one_block_is_fastervlm(model):
    one, other = kr.mllm.VTCCLS(keep=0.3, start=FEATURE), kr.mllm.FasterVLM(keep=0.3)
    assert torch.equal(run(model, one)[2], run(model, other)[2])
    assert not torch.equal(run(model, kr.mllm.VTCCLS(keep=0.3, start=0))[2], run(model, other)[2])


def test_vtccls_says_which_blocks_there_are(model):
    with pytest.raises(ValueError, match=rf"0\.\.{FEATURE}.*got {FEATURE + 1}"):
        kr.mllm.VTCCLS(start=FEATURE + 1)(model)
    with pytest.raises(ValueError, match="start"):
        kr.mllm.VTCCLS(start=-1)


# --- FoPru ------------------------------------------------------------------------------------------------------------


def test_fopru_reads_the_attention_received(model, seen):
    want = seen["attention"][FEATURE].mean((1, 2))[:, 1:]
    trace, _, _ = run(model, kr.mllm.FoPru(keep=11))
    close(trace.steps[0].score, want)
    assert kept(trace) == [top(row, 11) for row in want]
    trace, _, _ = run(model, kr.mllm.FoPru(keep=0.4, strategy="row"))  # 14 tokens: two rows of six
    rows = want.view(2, SIDE, SIDE).sum(-1)
    want = [[r * SIDE + c for r in top(row, 2) for c in range(SIDE)] for row in rows]
    assert kept(trace) == want


@quick
@given(seeds, st.integers(1, 40))
def test_best_rows_are_whole_and_fit(seed, count):
    """Two views of different widths, the second sample without the last row; against a loop."""
    place = [(0, r, c) for r, c in product(range(3), range(4))] + [(1, r, c) for r, c in product(range(4), range(6))]
    place = torch.tensor([place, place])
    scores, valid = rand(2, 36, seed=seed), torch.ones(2, 36, dtype=torch.bool)
    valid[1, 30:] = False
    got = best_rows(scores, place, torch.tensor([count, count]), valid)
    for i in range(2):
        rows = {}
        for t in range(36):
            if valid[i, t]:
                rows.setdefault((int(place[i, t, 0]), int(place[i, t, 1])), []).append(t)
        ranked = sorted(rows.values(), key=lambda row: -scores[i, row].mean().item())
        want, left = list(ranked[0]), count - len(ranked[0])
        for row in ranked[1:]:
            if len(row) > left:
                break
            want, left = want + row, left - len(row)
        assert got[i].nonzero().flatten().tolist() == sorted(want)


# --- VisionZip --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "contextual"), [(12, 10 / 64), (0.5, 0.5), (2, 0.0), (35, 0.3)])
def test_visionzip_against_a_loop(model, plain, seen, keep, contextual):
    trace, x, _ = run(model, kr.mllm.VisionZip(keep=keep, contextual=contextual))
    total = keep if isinstance(keep, int) else int(N * keep)
    context = min(int(total * contextual + 0.5), total - 1)
    for i in range(2):
        features = seen["hidden"][FEATURE + 1][i]
        keys = seen["keys"][i, 1:].view(N, 4, -1).mean(1)
        dominant = top(seen["attention"][FEATURE][i].sum(0)[0, 1:], total - context - 1)
        left = [j for j in range(N) if j not in dominant]
        targets = left[:: max(1, len(left) // context)][:context] if context else []
        joined = {t: [] for t in targets}
        for j in left:
            if joined and j not in targets:
                near = [torch.cosine_similarity(keys[j], keys[t], 0).item() for t in targets]
                joined[targets[near.index(max(near))]].append(j)
        made = {j: features[1 + j] for j in dominant}
        for t, members in joined.items():
            made[t] = features[1 + t] + (sum(features[1 + j] for j in members) / len(members) if members else 0)
        made[next(j for j in left if j not in targets)] = features[0]  # the class token
        assert kept(trace)[i] == sorted(made) and len(made) == total
        with torch.no_grad():
            want = plain.model.multi_modal_projector(torch.stack([made[j] for j in sorted(made)]))
        close(x[i], want)


def test_visionzip_uses_every_token_once(model):
    step = run(model, kr.mllm.VisionZip(keep=16))[0].steps[0]
    assert (step.assignment >= 0).all() and (step.size.sum(1) == N).all()


@quick
@given(seeds, st.integers(0, 12))
def test_merging_into_the_nearest(seed, count):
    """`strided`, `nearest` and `add_mean` against loops, rows of different length."""
    metric, there = rand(2, 20, 5, seed=seed), rand(2, 20, seed=seed + 1) > -0.5
    targets = strided(there, torch.tensor([count, 1]))
    home = nearest(metric, targets, there)
    x = rand(2, 20, 3, seed=seed + 2)
    got = add_mean(x, home, there & ~targets)
    for i, c in enumerate((count, 1)):
        real = there[i].nonzero().flatten().tolist()
        c = min(c, len(real))
        want = real[:: len(real) // c][:c] if c else []
        assert targets[i].nonzero().flatten().tolist() == want
        groups = {t: [] for t in want}
        for j in range(20):
            if j not in real or not want:
                assert home[i, j] == -1
                continue
            near = torch.stack([torch.cosine_similarity(metric[i, j], metric[i, t], 0) for t in want])
            near = near.masked_fill(torch.tensor([j in want and t != j for t in want]), -2)
            assert home[i, j] == want[int(near.argmax())]
            if j not in want:
                groups[int(home[i, j])].append(j)
        for j in range(20):
            members = groups.get(j, [])
            close(got[i, j], x[i, j] + (x[i, members].mean(0) if members else 0))


def test_nearest_takes_the_first_of_equals():
    """An overview and its only tile hold the same patches: rounding must not decide."""
    half = rand(1, 8, 16)
    targets = torch.zeros(1, 16, dtype=torch.bool)
    targets[0, [3, 11]] = True
    x = torch.cat([half, half * (1 + 1e-7)], 1)
    assert nearest(x, targets)[0].tolist() == [3] * 11 + [11] + [3] * 4


# --- PruMerge ---------------------------------------------------------------------------------------------------------


def prumerge(seen, i: int, plus: bool, keep: int | None, neighbours: int) -> tuple[dict[int, torch.Tensor], int]:
    """Slots of one image by the published rules, in loops."""
    q, k = seen["q_proj"][i], seen["k_proj"][i]
    a = (q[0] @ k.T / math.sqrt(k.shape[-1])).softmax(-1)[1:]
    k, x = k[1:], seen["hidden"][FEATURE + 1][i, 1:]
    if keep is None:
        q1, q3 = np.percentile(a.numpy(), [25, 75])
        count = max(1, int((a > q3 + 1.5 * (q3 - q1)).sum()))
        chosen = set(top(a, count))
        if plus:
            chosen |= set(range(0, N, max(1, int(int(N / count) / 3))))
    else:
        count = max(1, keep - 1)
        chosen = set(top(a, max(1, count // 4) if plus else count))
        left = [j for j in range(N) if j not in chosen]
        more = count - len(chosen)
        chosen |= {left[math.ceil((r + 1) * len(left) / more) - 1] for r in range(more)}
    rest = [j for j in range(N) if j not in chosen]
    made = {}
    for j in chosen:
        near = sorted((o for o in range(N) if o != j), key=lambda o: -torch.cosine_similarity(k[j], k[o], 0).item())
        made[j] = x[j] + sum(a[o] * x[o] for o in near[:neighbours])
    host = max(rest, key=lambda j: a[j].item())
    made[host] = sum(a[j] * x[j] for j in rest)
    return made, host


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize(("keep", "neighbours"), [(None, 32), (None, 5), (9, 6), (2, 40), (20, 3)])
def test_prumerge_against_a_loop(model, plain, seen, plus, keep, neighbours):
    method = kr.mllm.PruMerge(plus=plus, neighbours=neighbours, **({} if keep is None else {"keep": keep}))
    trace, x, _ = run(model, method)
    for i in range(2):
        made, host = prumerge(seen, i, plus, keep, neighbours)
        assert kept(trace)[i] == sorted(made)
        if keep is not None:
            assert len(made) == keep
        slot = trace.steps[0].assignment[i]
        assert all(slot[j] == sorted(made).index(j if j in made else host) for j in range(N))
        with torch.no_grad():
            want = plain.model.multi_modal_projector(torch.stack([made[j] for j in sorted(made)]))
        close(x[i], want)


def test_prumerge_leaves_one_token_without_an_extra(model):
    assert run(model, kr.mllm.PruMerge(keep=Budget(tokens=1)))[0].counts()[:, 0].tolist() == [1, 1]


def test_prumerge_adds_nothing_where_other_tokens_have_no_weight():
    """If every weight but those of the kept tokens is zero, kept tokens take only from each other."""
    keys, weight = rand(1, 8, 4), torch.zeros(1, 8)
    weight[0, 2] = 0.7
    mix = neighbour_weights(keys, weight, torch.tensor([[2, 5]]), 7, torch.ones(1, 8, dtype=torch.bool))
    assert mix[0, 0].tolist() == [0.0] * 8
    assert mix[0, 1].tolist() == [0, 0, pytest.approx(0.7), 0, 0, 0, 0, 0]


@quick
@given(seeds, st.integers(0, 9))
def test_prumerge_pieces(seed, count):
    """Quartiles are numpy's; the stride keeps exactly its number, without two at the same place or a gap of two."""
    x, valid = rand(2, 13, seed=seed), torch.arange(13) < torch.tensor([[13], [9]])
    for i, n in enumerate((13, 9)):
        want = np.percentile(x[i, :n].numpy(), [25, 75])
        assert [q[i].item() for q in quartiles(x, valid)] == pytest.approx(want.tolist(), abs=1e-6)
    picked = evenly(valid, torch.tensor([count, count]))
    assert picked.sum(1).tolist() == [count, count] and not (picked & ~valid).any()
    if count:
        for i, n in enumerate((13, 9)):
            gaps = torch.cat([torch.tensor([-1]), picked[i].nonzero().flatten()]).diff()
            assert set(gaps.tolist()) <= {n // count, -(-n // count)}


# --- VScan and STAR ---------------------------------------------------------------------------------------------------


def test_vscan_default_is_the_papers_schedule():
    """96, then 32, of 576 tokens in 32 layers; the mean is what `keep` says, and everything stays at 1."""
    method, total = kr.mllm.VScan(), torch.tensor([576])
    assert [x.item() for x in method.shares(total, 32)] == pytest.approx([96, 32])
    assert [x.item() for x in kr.mllm.VScan(keep=64).shares(total, 32)] == pytest.approx([96, 32])
    for keep, layer in product((0.05, 0.3, 0.7, 0.9, 1.0), (4, 16, 27)):
        first, then = kr.mllm.VScan(keep=keep, layer=layer).shares(total, 32)
        assert (first * layer + then * (32 - layer)).item() / 32 == pytest.approx(576 * keep)
        assert 0 < then <= first <= 576
    assert [x.item() for x in kr.mllm.VScan(keep=1.0).shares(total, 32)] == [576, 576]
    assert [x.item() for x in kr.mllm.VScan(keep=(96, 0.25)).shares(total, 32)] == [96, 96]


@pytest.mark.parametrize("bad", [(0.5,), (0.5, 0.4, 0.3), Budget(coverage=0.5)])
def test_two_stages_take_two_counts(bad):
    with pytest.raises(ValueError, match="keep"):
        kr.mllm.VScan(keep=bad)


@quick
@given(seeds, st.integers(1, 40), st.integers(2, 4))
def test_local_global_against_a_loop(seed, count, window):
    place = torch.tensor([[(v, r, c) for v, r, c in product(range(2), range(4), range(5))]] * 2)
    local, wide, valid = rand(2, 40, seed=seed), rand(2, 40, seed=seed + 1), torch.ones(2, 40, dtype=torch.bool)
    valid[1, 33:] = False
    number = torch.tensor([count, min(count, 33)])
    got = local_global(local, wide, place, number, window, valid)
    for i in range(2):
        windows = {}
        for t in range(40):
            if valid[i, t]:
                v, r, c = place[i, t].tolist()
                windows.setdefault((v, r // window, c // window), []).append(t)
        quota = int(number[i]) // 2 // len(windows)
        want = {t for w in windows.values() for t in sorted(w, key=lambda t: -local[i, t].item())[:quota]}
        left = sorted((t for t in range(40) if valid[i, t] and t not in want), key=lambda t: -wide[i, t].item())
        want |= set(left[: int(number[i]) - len(want)])
        assert got[i].nonzero().flatten().tolist() == sorted(want)


def test_vscan_merges_by_the_mean(model, plain, seen):
    """Every window gives its share, and the count-weighted sum of what is left is the sum of all tokens."""
    method = kr.mllm.VScan(keep=(20, 5), window=3)
    trace, x, _ = run(model, method)
    step = trace.steps[0]
    with torch.no_grad():
        everything = plain.model.multi_modal_projector(seen["hidden"][FEATURE + 1][:, 1:])
    for i in range(2):
        close((x[i] * step.size[i, :, None]).sum(0), everything[i].sum(0))
        tokens = torch.tensor(kept(trace)[i])
        held = torch.stack([tokens // SIDE // 3, tokens % SIDE // 3])
        assert min((held == torch.tensor(w)[:, None]).all(0).sum() for w in product(range(2), range(2))) >= 2
        local = seen["attention"][BLOCKS // 4 - 1][i].mean(0)[0, 1:].view(SIDE, SIDE)
        best = local[:3, :3].flatten().argmax().item()
        assert best // 3 * SIDE + best % 3 in tokens
    assert trace.counts()[:, [0, DEPTH // 2 - 1, DEPTH // 2, DEPTH - 1]].tolist() == [[20, 20, 5, 5]] * 2


def test_star_reads_both_attentions(model, plain, seen):
    method = kr.mllm.STAR(keep=(1.0, 6), layer=2)
    trace, _, _ = run(model, method)
    with torch.no_grad():
        attention = plain(input_ids=IDS, pixel_values=PIXELS, output_attentions=True).attentions[1]
    want = attention[:, :, FIRST + N :, FIRST : FIRST + N].mean((1, 2))
    assert [step.layer for step in trace.steps] == [2]
    close(trace.steps[0].score, want)
    assert kept(trace) == [top(row, 6) for row in want]
    received = seen["attention"][FEATURE].mean((1, 2))[:, 1:]
    trace, _, _ = run(model, kr.mllm.STAR(keep=(9, 9)))
    assert [step.layer for step in trace.steps] == [0] and kept(trace) == [top(row, 9) for row in received]


# --- FlowCut ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 1])
def test_information_flow_against_a_loop(prefix):
    """Of the patches that exist; padding gets nothing and changes nothing."""
    h, n, d = 3, 7, 4
    q, k, v = (rand(2, h, prefix + n, d, seed=s) for s in range(3))
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[1, 5:] = False
    mask = torch.nn.functional.pad(valid, (prefix, 0), value=True)[:, None, None]
    flow, relation = information_flow(AttentionView(q, k, v, mask, d**-0.5), prefix, valid)
    for i, m in enumerate((7, 5)):
        m += prefix
        probs = (q[i, :, :m] @ k[i, :, :m].transpose(1, 2) * d**-0.5).softmax(-1)
        r = probs[:, 0, prefix:].mean(0) if prefix else probs.mean((0, 1))
        r = r / r.sum()
        size = v[i, :, prefix:m].mean(0).abs().sum(-1)
        want = r * size
        if prefix:
            s = torch.stack([(v[i, g, :m] @ v[i, g, 0]).softmax(0)[1:] for g in range(h)]).mean(0)
            want = (r + s / s.sum()) * size
        close(flow[i, : m - prefix], want)
        close(relation[i, : m - prefix], r)
    assert (flow[1, 5:] == 0).all() and (relation[1, 5:] == 0).all()


def flowcut(plain, i: int, target: int, momentum: float, every: int) -> tuple[list[int], torch.Tensor, list[int]]:
    """Kept patches of one image, their features, and the patches that every block sees; image by image, no padding."""
    tower = plain.model.vision_tower
    x = tower.pre_layrnorm(tower.embeddings(PIXELS[i : i + 1]))
    alive, score, last, lengths = list(range(N)), None, FEATURE - 1, []
    for number, block in enumerate(tower.encoder.layers[: FEATURE + 1]):
        held = {}
        hook = block.self_attn.v_proj.register_forward_hook(lambda m, a, out, held=held: held.update(v=out))
        attention = block.self_attn(block.layer_norm1(x), None)[1]
        hook.remove()
        lengths.append(x.shape[1] - 1)
        x = block(x, None)
        if number > last or len(alive) <= target:
            continue
        v = held["v"][0].view(len(alive) + 1, 4, -1).transpose(0, 1)
        r = attention[0, :, 0, 1:].mean(0)
        s = torch.stack([(value @ value[0]).softmax(0)[1:] for value in v]).mean(0)
        r, s = r / r.sum(), s / s.sum()
        new = (r + s) * v.mean(0)[1:].abs().sum(-1)
        score = new if score is None else (1 - momentum) * score + momentum * new
        m = last - number
        if m % every == 0:
            spread = -(r * r.log()).sum() / math.log(len(alive))
            gone = round(((len(alive) - target) / math.sqrt(m) * (1 - spread**2)).item()) if m else N
            keep = top(score, max(len(alive) - gone, target))
            alive, score = [alive[j] for j in keep], score[keep]
            x = x[:, [0] + [1 + j for j in keep]]
    return alive, x[0, 1:], lengths


@pytest.mark.parametrize(("keep", "momentum", "every"), [(8, 0.5, 2), (0.5, 0.5, 1), (2, 0.2, 2), (20, 1.0, 3)])
@torch.no_grad()
def test_flowcut_against_a_loop(model, plain, keep, momentum, every):
    method = kr.mllm.FlowCut(keep=keep, momentum=momentum, every=every)
    target = keep if isinstance(keep, int) else int(keep * N)
    lengths, hooks = [], []
    for block in model.model.vision_tower.encoder.layers:
        hooks.append(block.mlp.register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1] - 1)))
    trace, x, _ = run(model, method)
    for hook in hooks:
        hook.remove()
    loops = [flowcut(plain, i, target, momentum, every) for i in range(2)]
    assert kept(trace) == [alive for alive, _, _ in loops]
    assert trace.counts()[:, 0].tolist() == [target, target]
    for i, (_, features, _) in enumerate(loops):
        close(x[i], plain.model.multi_modal_projector(features))
    # blocks run on the longest image of the batch, those behind the features on the target too
    assert lengths[: FEATURE + 1] == [max(pair) for pair in zip(*(seen for _, _, seen in loops), strict=True)]
    assert lengths[FEATURE:] == [target] * (BLOCKS - FEATURE) and lengths[0] == N


def test_flowcut_waits_while_attention_is_spread(model):
    """Equal attention to all patches (H = log N) drops nothing before the last step."""
    flat = build("sdpa")
    for block in flat.model.vision_tower.encoder.layers:
        block.self_attn.q_proj.weight.data.zero_()
        block.self_attn.q_proj.bias.data.zero_()
    lengths, hooks = [], []
    for block in flat.model.vision_tower.encoder.layers:
        hooks.append(block.mlp.register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1] - 1)))
    run(flat, kr.mllm.FlowCut(keep=5, every=1))
    assert lengths == [N] * FEATURE + [5] * (BLOCKS - FEATURE)


def test_flowcut_leaves_the_encoder_as_it_was(model):
    with torch.no_grad():
        before = model(input_ids=IDS, pixel_values=PIXELS).logits
        with kr.mllm.FlowCut(keep=1.0)(model):
            assert torch.equal(model(input_ids=IDS, pixel_values=PIXELS).logits, before)
        with kr.mllm.FlowCut(keep=5)(model):
            assert not torch.equal(model(input_ids=IDS, pixel_values=PIXELS).logits, before)
        assert torch.equal(model(input_ids=IDS, pixel_values=PIXELS).logits, before)


def test_flowcut_works_under_a_wrapper(model):
    """A wrapper's session runs the encoder of its base."""
    base = kr.mllm.FlowCut(keep=5)
    assert torch.equal(run(model, kr.mllm.GAP(base=base))[2], run(model, kr.mllm.FlowCut(keep=5, positions="keep"))[2])


@pytest.mark.parametrize("bad", [{"keep": Budget(threshold=0.1)}, {"momentum": 1.5}, {"every": 0}])
def test_flowcut_says_what_it_needs(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        kr.mllm.FlowCut(**bad)
