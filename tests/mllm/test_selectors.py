"""Methods that choose by diversity, by the question or by the graph of the image: their formulas on small tensors."""

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import LocalOutlierFactor
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import keeprate as kr
from keeprate.anatomy import multimodal
from keeprate.mllm import text, zooprune
from keeprate.mllm.base import Visual
from keeprate.mllm.gprune import walk
from keeprate.mllm.mmtok import coverage
from keeprate.mllm.scores import above_fence, local_outliers, unit_range
from keeprate.mllm.script import redundancy
from keeprate.mllm.tsc import clusters
from keeprate.mllm.zooprune import layered_sensitivity, sensitivity, two_layers
from keeprate.tasks import scenes
from keeprate_kernels import farthest_point

from ..conformance.multimodal import Models, inputs


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def visual(x, valid=None, features=None, words=None, words_valid=None, project=None, attention=None, keys=None):
    """Images as a method sees them, without a model behind."""
    i, n, d = x.shape
    features = x if features is None else features
    project = project or nn.Identity()
    encoder = SimpleNamespace(
        parts=None,
        features=lambda: features.flatten(0, 1),
        project=project,
        one_head=lambda layer: attention.flatten()[:, None],
        keys=lambda layer, values=False: keys.flatten(0, 1)[:, None],
    )
    return Visual(
        x=x,
        valid=valid,
        place=torch.zeros(i, n, 3, dtype=torch.long),
        text=rand(i, 5, d, seed=99) if words is None else words,
        text_valid=words_valid,
        words=None,
        parts=SimpleNamespace(has_cls=True, projector=project, name="llava"),
        encoder=encoder,
        token=torch.arange(i * n).view(i, n),
        generator=torch.Generator().manual_seed(0),
    )


def kept(choice, i=0):
    """Positions of an image's slots."""
    reduction = getattr(choice, "reduction", choice)
    there = slice(None) if reduction.valid is None else reduction.valid[i]
    return reduction.rep[i][there].tolist()


def padded(x, extra):
    """Garbage behind every image, and the mask that says so."""
    noise = rand(len(x), extra, *x.shape[2:], seed=7) * 5
    valid = torch.arange(x.shape[1] + extra).expand(len(x), -1) < x.shape[1]
    return torch.cat([x, noise], 1), valid


# --- counts that the image sets ---------------------------------------------------------------------------------------


def test_above_fence_is_the_interquartile_rule():
    scores = rand(4, 37).exp()
    low, high = np.percentile(scores, [25, 75], axis=1)
    expected = (scores.numpy() > (high + 1.5 * (high - low))[:, None]).sum(1)
    assert expected.max() > 0
    assert above_fence(scores).tolist() == expected.tolist()
    assert above_fence(*padded(scores, 5)).tolist() == expected.tolist()


@pytest.mark.parametrize("n", [6, 40, 144])
def test_local_outliers_are_those_of_scikit_learn(n):
    scores = torch.cat([rand(3, n - 2).softmax(1), torch.tensor([[0.5, 0.9]]).expand(3, -1)], 1)
    expected = [
        int((LocalOutlierFactor(n_neighbors=min(10, n - 1)).fit_predict(row[:, None].double()) == -1).sum())
        for row in scores
    ]
    assert n == 6 or max(expected) > 0
    assert local_outliers(scores).tolist() == expected
    assert local_outliers(*padded(scores, 4)).tolist() == expected
    shuffled, valid = padded(scores, 4)  # what does not count may stand anywhere
    order = torch.randperm(n + 4, generator=torch.Generator().manual_seed(1))
    assert local_outliers(shuffled[:, order], valid[:, order]).tolist() == expected


def test_equal_scores_have_no_outliers():
    assert local_outliers(torch.full((2, 30), 0.25)).tolist() == [0, 0]
    assert above_fence(torch.full((2, 30), 0.25)).tolist() == [0, 0]
    assert local_outliers(torch.zeros(1, 1)).tolist() == [0]


def test_unit_range():
    scores = torch.tensor([[2.0, 4.0, 3.0, 9.0], [5.0, 5.0, 5.0, 7.0]])
    valid = torch.tensor([[True] * 3 + [False]] * 2)
    assert unit_range(scores, valid).tolist() == [[0, 1, 0.5, 0], [1, 1, 1, 0]]


# --- ToDRE and GreedyPrune, in a model --------------------------------------------------------------------------------

PLACEHOLDER, DEPTH = 100, 4


@pytest.fixture(scope="module")
def llava():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=40, patch_size=8
    )
    words = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=DEPTH, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=120,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=words, image_token_id=PLACEHOLDER, image_seq_length=25)
    model = LlavaForConditionalGeneration(config).eval()
    for weight in model.parameters():
        weight.data.mul_(4 if weight.dim() > 1 else 1)
    return model


def prompt(n=25, question=(8, 9, 10, 11, 12), before=(1, 5), seed=0):
    ids = [*before, *[PLACEHOLDER] * n, *question]
    return {"input_ids": torch.tensor([ids]), "pixel_values": rand(1, 3, 40, 40, seed=seed)}


@torch.no_grad()
def embeddings(model, inputs):
    return model.model.get_image_features(inputs["pixel_values"]).pooler_output[0]


@torch.no_grad()
def test_todre_adds_what_is_least_like_all_chosen(llava):
    inputs = prompt()
    with kr.mllm.ToDRE(keep=6, tau=0)(llava) as trace:
        llava(**inputs)
    x = F.normalize(embeddings(llava, inputs), dim=-1)
    tower = llava.model.vision_tower
    tower.set_attn_implementation("eager")
    class_row = tower(inputs["pixel_values"], output_attentions=True).attentions[-1][0, :, 0, 1:].mean(0)
    tower.set_attn_implementation("sdpa")
    chosen = [int(class_row.argmax())]
    while len(chosen) < 6:
        total = torch.stack([x @ x[c] for c in chosen]).sum(0)
        total[chosen] = float("inf")
        chosen.append(int(total.argmin()))
    assert trace.kept[0][0].tolist() == sorted(chosen)
    with kr.mllm.ToDRE(keep=6, tau=0, objective="max_min")(llava) as trace:
        llava(**inputs)
    order, _ = farthest_point(x[None], 6, start=chosen[0])
    assert trace.kept[0][0].tolist() == order[0].sort().values.tolist()


@torch.no_grad()
def test_todre_parts_where_the_attention_of_both_sides_is_below_tau(llava):
    inputs = prompt()
    llava.set_attn_implementation("eager")
    rows = llava(**inputs, output_attentions=True).attentions[DEPTH - 2][0].mean(0)
    llava.set_attn_implementation("sdpa")
    image, question = slice(2, 27), slice(27, 32)
    share = rows[question, image].sum(1).mean().item()
    assert rows[image, question].abs().max() == 0 and 0.05 < share < 0.95
    base = llava(**inputs).logits
    for tau, left in ((0, 25), (share - 1e-4, 25), (share + 1e-4, 0), (1, 0)):
        with kr.mllm.ToDRE(keep=25, tau=tau, layer=DEPTH - 1)(llava) as trace:  # the first stage keeps all
            logits = llava(**inputs).logits
        assert trace.counts()[0].tolist() == [25] * (DEPTH - 1) + [left]
        assert torch.equal(logits, base) == (left == 25)
    with kr.mllm.ToDRE(keep=1.0, tau=1)(llava):
        assert torch.equal(llava(**inputs).logits, base)


@torch.no_grad()
def test_todre_hears_a_question_before_the_image(llava):
    """Rows of a second image see the words between: with them the second share is no longer zero."""
    ids = [1, 5, *[PLACEHOLDER] * 25, 7, 8, *[PLACEHOLDER] * 25, 9]
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": rand(2, 3, 40, 40)}
    llava.set_attn_implementation("eager")
    rows = llava(**inputs, output_attentions=True).attentions[DEPTH - 2][0].mean(0)
    llava.set_attn_implementation("sdpa")
    image = torch.tensor(ids) == PLACEHOLDER
    words = ~image & (torch.arange(len(ids)) > 1)
    shares = rows[words][:, image].sum(1).mean().item(), rows[image][:, words].sum(1).mean().item()
    assert shares[1] > 0
    for tau in (max(shares) + 1e-4, max(shares) - 1e-4):
        with kr.mllm.ToDRE(keep=25, tau=tau, layer=DEPTH - 1)(llava) as trace:
            llava(**inputs)
        assert trace.counts()[0, -1].item() == (0 if tau > max(shares) else 50)


@torch.no_grad()
@pytest.mark.parametrize("tau", [-1.0, 0.3, 0.8, 1.0])
def test_greedyprune_is_suppression_by_saliency(llava, tau):
    inputs, k = prompt(), 8
    states = llava(**inputs, output_hidden_states=True).hidden_states[1][0]
    x, last = F.normalize(states[2:27], dim=-1), F.normalize(states[-1], dim=0)
    saliency = x @ last
    chosen, contest = [], set(range(25))
    while contest and len(chosen) < k:
        best = max(contest, key=lambda j: saliency[j].item())
        chosen.append(best)
        contest = {j for j in contest if j != best and (x[j] @ x[best]).item() <= tau}
    fill = [j for j in saliency.argsort(descending=True).tolist() if j not in chosen]
    chosen += fill[: k - len(chosen)]
    with kr.mllm.GreedyPrune(keep=k, tau=tau, layer=1)(llava) as trace:
        llava(**inputs)
    assert trace.kept[0][0].tolist() == sorted(chosen)
    if tau == 1:
        assert sorted(chosen) == saliency.topk(k).indices.sort().values.tolist()


@torch.no_grad()
def test_greedyprune_records_saliency(llava):
    inputs = prompt()
    states = llava(**inputs, output_hidden_states=True).hidden_states[1][0]
    with kr.mllm.GreedyPrune(keep=8, layer=1)(llava) as trace:
        llava(**inputs)
    torch.testing.assert_close(trace.scores[0][0], F.cosine_similarity(states[2:27], states[-1][None]))


# --- G-Prune ----------------------------------------------------------------------------------------------------------


def test_walk_spreads_norms_along_edges():
    x, t, tau, m = rand(1, 12, 3) + 0.5, 0.5, 0.2, 3
    unit = F.normalize(x[0], dim=-1)
    edge = (unit @ unit.T) >= t
    step = torch.zeros(12, 12)
    for a in range(12):
        out = [b for b in range(12) if edge[a, b]]
        step[a, out] = ((unit[a] @ unit[out].T) / tau).softmax(0)
    expected = x[0].norm(dim=-1) @ torch.linalg.matrix_power(step, m) / edge.sum(1)
    whole = torch.ones(1, 12, dtype=torch.bool)
    got = walk(x, whole, None, t, tau, m)
    torch.testing.assert_close(got[0], expected)
    torch.testing.assert_close((got[0] * edge.sum(1)).sum(), x[0].norm(dim=-1).sum())  # mass is neither made nor lost
    more, valid = padded(x, 4)
    torch.testing.assert_close(walk(more, torch.ones_like(valid), valid, t, tau, m)[:, :12], got)


def test_gprune_keeps_overview_and_tiles_at_one_share():
    t = visual(rand(1, 30, 8) + 1)
    t.place[:, 10:, 0] = 1
    choice = kr.mllm.GPrune(keep=0.5).before(t)
    assert sum(j < 10 for j in kept(choice)) == 5 and len(kept(choice)) == 15
    alone = kr.mllm.GPrune(keep=0.5).before(visual(t.x[:, :10]))
    assert kept(alone) == [j for j in kept(choice) if j < 10]


def test_gprune_covers_more_clusters_than_norms_do():
    reached = {"graph": 0, "norm": 0}
    for seed in range(8):
        centre = F.normalize(rand(6, 32, seed=seed), dim=-1)
        size = torch.tensor([40, 20, 12, 8, 6, 4])
        group = torch.arange(6).repeat_interleave(size)
        loud = torch.tensor([3.0, 1, 1, 1, 1, 1])[group]  # one large cluster has the longest vectors
        x = ((centre[group] + 0.08 * rand(90, 32, seed=seed + 50)) * loud[:, None])[None]
        reached["graph"] += len(set(group[kept(kr.mllm.GPrune(keep=0.25).before(visual(x)))].tolist()))
        reached["norm"] += len(set(group[x[0].norm(dim=-1).topk(22).indices].tolist()))
    assert reached["graph"] > 2 * reached["norm"]


# --- MMTok ------------------------------------------------------------------------------------------------------------


def covered(matrix, weight, chosen):
    return (matrix[:, list(chosen)].amax(1) * weight).sum().item()


def test_mmtok_covers_nearly_as_much_as_any_choice():
    t = visual(rand(1, 9, 6), features=rand(1, 9, 4, seed=3))
    matrix, weight = coverage(t, 0.5, 0.2, 0.2)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(1, 14))
    torch.testing.assert_close(weight.sum(), torch.tensor(1.5))
    values = []
    for k in (2, 3, 4):
        chosen = kept(kr.mllm.MMTok(keep=k, tv_temperature=0.2).before(t))
        values.append(covered(matrix[0], weight[0], chosen))
        assert values[-1] >= (1 - 1 / np.e) * max(covered(matrix[0], weight[0], s) for s in combinations(range(9), k))
    assert values[0] < values[1] < values[2]
    assert values[2] - values[1] <= values[1] - values[0] + 1e-6
    assert kr.mllm.MMTok(keep=9).before(t) is None


def test_mmtok_weighs_words_against_the_image():
    x = torch.eye(8)[None]
    word = torch.eye(8)[None, 5:6] + 0.01
    t = visual(x, words=word)
    assert 5 in kept(kr.mllm.MMTok(keep=2, alpha=0.0).before(t))
    # without words that matter, the tokens that stand for many
    features = torch.cat([torch.eye(3)[:1].expand(6, -1), torch.eye(3)[1:]])[None]
    t = visual(x, features=features, words=word)
    assert set(kept(kr.mllm.MMTok(keep=3, alpha=1e4, vv_temperature=0.01).before(t))) & {6, 7} == {6, 7}


def test_mmtok_leaves_padding_out():
    x, features = rand(1, 10, 6), rand(1, 10, 4, seed=3)
    words, spoken = padded(rand(1, 3, 6, seed=5), 2)
    alone = kept(kr.mllm.MMTok(keep=4).before(visual(x, features=features, words=words[:, :3])))
    more, valid = padded(x, 3)
    t = visual(more, valid, padded(features, 3)[0], words, spoken)
    assert kept(kr.mllm.MMTok(keep=4).before(t)) == alone


# --- TSC --------------------------------------------------------------------------------------------------------------


def test_clusters_are_found_and_stand_at_their_middle():
    group = torch.arange(5).repeat_interleave(6)[torch.randperm(30, generator=torch.Generator().manual_seed(2))]
    x = 10 * rand(5, 8)[group] + 0.1 * rand(30, 8, seed=1)
    home = clusters(x[None], torch.tensor([5]), None, 10)[0]
    for c in range(5):
        members = (group == c).nonzero().flatten()
        nearest = members[(x[members] - x[members].mean(0)).norm(dim=-1).argmin()]
        assert home[members].unique().tolist() == [nearest]


def test_cluster_means_weighted_by_size_keep_the_mean_of_the_image():
    x = rand(2, 24, 8)
    reduction = kr.mllm.TSC(keep=5).before(visual(x))
    size = reduction.total(torch.ones(2, 24))
    torch.testing.assert_close((reduction(x) * size[..., None]).sum(1) / 24, x.mean(1))
    assert size.sum(1).tolist() == [24, 24] and kept(reduction) == sorted(kept(reduction))
    same = kr.mllm.TSC(keep=5, aggregate="nearest").before(visual(x))
    assert kept(same) == kept(reduction) and same.slot is None
    assert kr.mllm.TSC(keep=24).before(visual(x)) is None


def test_clusters_do_not_see_padding_or_the_batch_and_none_is_empty():
    x = rand(1, 20, 8)
    alone = clusters(x, torch.tensor([6]), None, 10)
    more, valid = padded(x, 5)
    batch = clusters(
        torch.cat([more, rand(1, 25, 8, seed=9)]), torch.tensor([6, 11]), torch.cat([valid, valid | True]), 10
    )
    assert torch.equal(batch[0, :20], alone[0]) and (batch[0, 20:] == -1).all()
    assert len(batch[1].unique()) == 11
    assert len(clusters(torch.ones(1, 12, 4), torch.tensor([5]), None, 10).unique()) == 5


# --- TRIM -------------------------------------------------------------------------------------------------------------


def test_trim_keeps_the_likest_and_the_mean_of_the_others():
    project = nn.Linear(6, 8)
    features = rand(2, 20, 6)
    with torch.no_grad():
        x = project(features)
        t = visual(x, features=features, project=project)
        choice = kr.mllm.TRIM(keep=5).before(t)
    score = text.relevance(t)
    for i in range(2):
        likest = score[i].topk(5).indices
        assert kept(choice, i) == likest.sort().values.tolist()  # the mean stands at the best of the others
        rest = [j for j in range(20) if j not in likest[:4].tolist()]
        slot = kept(choice, i).index(int(likest[4]))
        torch.testing.assert_close(choice.x[i, slot], project(features[i, rest].mean(0)))
        for j in likest[:4].tolist():
            assert torch.equal(choice.x[i, kept(choice, i).index(j)], x[i, j])
    assert choice.reduction.total(torch.ones(2, 20)).sum(1).tolist() == [20, 20]
    with torch.no_grad():
        other = kr.mllm.TRIM(keep=5, sign=-1).before(t)
        assert kept(other) == (-score[0]).topk(5).indices.sort().values.tolist()
        assert kr.mllm.TRIM(keep=20).before(t) is None


@torch.no_grad()
def test_trim_leaves_an_image_alone_that_keeps_everything():
    """Beside a larger one; features that do not project to the tokens stand for a model that resizes them behind."""
    x = rand(2, 12, 6)
    valid = torch.arange(12) < torch.tensor([[5], [12]])
    choice = kr.mllm.TRIM(keep=5).before(visual(x, valid, features=rand(2, 12, 6, seed=3)))
    assert kept(choice) == list(range(5)) and torch.equal(choice.x[0], x[0, :5])


def test_trim_counts_what_stands_out():
    words = F.normalize(rand(1, 1, 8), dim=-1)
    x = F.normalize(rand(1, 40, 8, seed=2) - (rand(1, 40, 8, seed=2) * words).sum(-1, keepdim=True) * words, dim=-1)
    x = x + 0.01 * rand(1, 40, 1, seed=4) * words
    x[0, [3, 11, 29]] = words[0, 0]
    choice = kr.mllm.TRIM().before(visual(x, words=words))
    assert {3, 11, 29} <= set(kept(choice))
    assert choice.reduction.m == above_fence((x @ words[0, 0]).softmax(1)).item() + 1 < 8
    more, valid = padded(x, 6)
    again = kr.mllm.TRIM().before(visual(more, valid, words=words))
    assert kept(again) == kept(choice)
    torch.testing.assert_close(again.x, choice.x)


# --- Recoverable Compression ------------------------------------------------------------------------------------------


def recoverable(x, attention, keys, words, keep, merge=4, weight=2.0):
    """One image, token by token."""
    a = attention
    s = F.normalize(x, dim=-1) @ F.normalize(words, dim=-1).mean(0)

    def outliers(values):
        return int(local_outliers(torch.tensor([values]))[0]) if len(values) > 1 else 0

    by_sight = a.argsort(descending=True).tolist()
    by_text = s.argsort(descending=True).tolist()
    if keep is None:
        chosen = set(by_sight[: outliers(a.tolist())]) | set(by_text[: outliers(s.tolist())])
        left = [j for j in by_sight if j not in chosen]
        centres = left[: outliers([a[j].item() for j in sorted(left)])]
    else:
        third = (keep - 1) // 3
        chosen = set(by_sight[: keep - 1 - 2 * third])
        chosen |= set([j for j in by_text if j not in chosen][:third])
        left = [j for j in by_sight if j not in chosen]
        centres = left[:third]
    rest = [j for j in left if j not in centres]
    value = {j: x[j] for j in chosen}
    unit = F.normalize(keys, dim=-1)
    for c in centres:
        near = sorted(rest, key=lambda j: -(unit[c] @ unit[j] + weight * s[j]).item())[:merge]
        value[c] = x[c] + sum(a[j] * x[j] for j in near)
    if rest:
        value[rest[0]] = sum(a[j] * x[j] for j in rest)
    return value


@pytest.mark.parametrize("keep", [None, 1 / 3, 8, 2])
def test_recoverable_compression_is_its_description(keep):
    x, keys, words = rand(2, 30, 6), rand(2, 30, 5, seed=1), rand(2, 3, 6, seed=2)
    attention = rand(2, 30, seed=3).mul(2).softmax(1)
    method = kr.mllm.RecoverableCompression(keep=keep, merge=4, text_weight=2.0)
    choice = method.before(visual(x, words=words, attention=attention, keys=keys))
    number = None if keep is None else 10 if keep == 1 / 3 else keep
    for i in range(2):
        expected = recoverable(x[i], attention[i], keys[i], words[i], number)
        assert kept(choice, i) == sorted(expected)
        assert number is None or len(expected) == number
        torch.testing.assert_close(choice.x[i, : len(expected)], torch.stack([expected[j] for j in sorted(expected)]))
    more, valid = padded(x, 4)
    t = visual(more, valid, words=words, attention=padded(attention, 4)[0], keys=padded(keys, 4)[0])
    again = method.before(t)
    for i in range(2):
        assert kept(again, i) == kept(choice, i)
        torch.testing.assert_close(again.x[i, : len(kept(choice, i))], choice.x[i, : len(kept(choice, i))])


def test_recoverable_compression_without_anything_that_stands_out_is_one_token():
    x, even = torch.ones(1, 20, 4), torch.full((1, 20), 0.05)
    t = visual(x, words=torch.ones(1, 2, 4), attention=even, keys=rand(1, 20, 4))
    choice = kr.mllm.RecoverableCompression().before(t)
    torch.testing.assert_close(choice.x, torch.ones(1, 1, 4))


# --- Script -----------------------------------------------------------------------------------------------------------


def test_redundancy_by_edges():
    x = rand(1, 14, 4)
    unit = F.normalize(x[0], dim=-1)
    expected = []
    for a in range(14):
        cosine = unit @ unit[a]
        near = cosine[cosine >= 0.2]
        by_edges = len(near) * torch.exp(1.5 * (near.mean() - 0.2))
        expected.append(by_edges if len(near) >= 4 else (by_edges + cosine.mean()) / 2)
    got = redundancy(kr.score.similarity(x), None, 0.2, 4, 1.5)
    torch.testing.assert_close(got[0], torch.stack(expected))
    more, valid = padded(x, 3)
    torch.testing.assert_close(redundancy(kr.score.similarity(more), valid, 0.2, 4, 1.5)[:, :14], got)


def test_script_chooses_by_relevance_and_determinant_among_what_is_not_redundant():
    # eight directions, the first three repeated; the question is most like the repeated ones
    x = torch.cat([torch.eye(8), torch.eye(8)[:3], torch.eye(8)[:3]])[None]
    words = torch.tensor([[[3.0, 2.8, 2.6, 1.0, 0.9, 0.8, 0.7, 0.1]]])
    t = visual(x, words=words)
    plain = kept(kr.mllm.Script(keep=5, redundant=0.0).before(t))
    assert plain == [0, 1, 2, 3, 4]  # never a duplicate while there is another direction
    nearest = text.relevance(t)[0].topk(5).indices.tolist()
    assert len({j if j < 8 else (j - 8) % 3 for j in nearest}) < 5  # which relevance alone does take
    left = kept(kr.mllm.Script(keep=5, redundant=9 / 14).before(t))  # all nine repeated ones go
    assert left == [3, 4, 5, 6, 7]


def test_script_with_equal_relevance_is_diversity_alone():
    x = rand(1, 20, 16)
    t = visual(x, words=torch.zeros(1, 2, 16))
    order, gain = farthest_point(x, 6, objective="dpp")
    assert kept(kr.mllm.Script(keep=6, redundant=0.0).before(t)) == order[0].sort().values.tolist()
    assert (gain[0] >= 0).all() and (gain[0].diff() <= 1e-6).all()


@pytest.mark.parametrize(("n", "share", "gone"), [(300, 0.39, 117), (100, 0.53, 53), (40, 0.999, 38)])
def test_script_drops_the_share_it_is_told(n, share, gone):
    """A product in fp32 falls short of a whole number."""
    choice = kr.mllm.Script(keep=2, redundant=share).before(visual(rand(1, n, 16)))
    assert (choice.score == 0).sum() == gone


# --- ZOO-Prune --------------------------------------------------------------------------------------------------------


def test_sensitivity_is_the_length_of_directional_derivatives():
    project = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 8)).double()
    features, directions = rand(2, 7, 6).double(), F.normalize(rand(5, 6, seed=3), dim=-1).double()
    got = sensitivity(project, features, directions, 1e-3)
    exact = torch.stack([torch.func.jvp(project, (features,), (u.expand_as(features),))[1] for u in directions])
    torch.testing.assert_close(got, exact.norm(dim=-1).mean(0), check_dtype=False, atol=1e-6, rtol=1e-5)


def mlp(c, e, d, act=None, **options):
    """A projector of two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(c, e, **options), act or nn.GELU(), nn.Linear(e, d, **options))


@pytest.mark.parametrize("chunk", [1, 200, 3000, 1 << 20])
@pytest.mark.parametrize("widths", [(6, 16, 8), (16, 6, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_sensitivity_by_layers_is_that_of_the_projector(monkeypatch, chunk, widths, bias):
    monkeypatch.setitem(zooprune.CHUNK, "cpu", chunk)
    project = mlp(*widths, bias=bias)
    features, directions = rand(3, 21, widths[0]), F.normalize(rand(5, widths[0], seed=3), dim=-1)
    layers = two_layers(project, project, features)
    torch.testing.assert_close(
        layered_sensitivity(*layers, features, directions, 0.01),
        sensitivity(project, features, directions, 0.01),
        rtol=1e-3,
        atol=0,
    )
    # in fp64 nothing but the formula is left; and no piece is larger than allowed, one token along one direction aside
    sizes = []

    def act(x):
        sizes.append(x.numel() // widths[1] * max(widths[1:]))
        return F.gelu(x)

    weight, at, _, outer = (p.double() if isinstance(p, torch.Tensor) else p for p in layers)
    got = layered_sensitivity(weight, at, act, outer, features.double(), directions.double(), 0.01)
    exact = sensitivity(project.double(), features.double(), directions.double(), 0.01)
    torch.testing.assert_close(got, exact, check_dtype=False, rtol=1e-6, atol=0)
    assert max(sizes) <= max(chunk // 4, max(widths[1:]))


def test_sensitivity_by_layers_takes_the_products_it_promises():
    (c, e, d), n, m = (6, 16, 8), 3 * 21, 5
    project, features, directions = mlp(c, e, d), rand(3, 21, c), rand(m, c, seed=3)
    layers = two_layers(project, project, features)
    with FlopCounterMode(display=False) as layered:
        layered_sensitivity(*layers, features, directions, 0.01)
    with FlopCounterMode(display=False) as general:
        sensitivity(project, features, directions, 0.01)
    assert layered.get_total_flops() == 2 * (n * c * e + m * c * e + m * n * e * d)
    assert general.get_total_flops() == 2 * 2 * m * n * (c * e + e * d)


class Residual(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + x


class Shared(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + x.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("project", "found"),
    [
        (mlp(8, 16, 8), True),
        (mlp(8, 16, 8, nn.ReLU(), bias=False), True),
        (nn.Sequential(mlp(8, 16, 4)), True),
        (nn.Linear(8, 4), False),
        (nn.Sequential(nn.LayerNorm(8), mlp(8, 16, 4)), False),
        (mlp(8, 16, 8, nn.PReLU()), False),  # weights of its own
        (mlp(8, 16, 8, nn.Softmax(-1)), False),
        (mlp(8, 16, 8, nn.Softmax(1)), False),
        (mlp(8, 16, 8, nn.LayerNorm(16, elementwise_affine=False)), False),
        (nn.Sequential(nn.Linear(8, 16), nn.GLU(), nn.Linear(8, 4)), False),
        (mlp(8, 16, 8, nn.Dropout(0.5)), False),
        (Residual(*mlp(8, 16, 8)), False),
        (Shared(*mlp(8, 16, 8)), False),
    ],
)
def test_two_layers_are_found_by_what_they_do(project, found):
    assert (two_layers(project, project, rand(2, 20, 8)) is not None) == found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("multimodal"))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl"])
def test_zooprune_by_layers_keeps_what_the_general_way_keeps(monkeypatch, models, name, dtype):
    model, batch = models(name, dtype), inputs(name, (((1, 2),), ((1, 1),)), (12, 9))
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    calls, layers = [], []
    monkeypatch.setattr(zooprune, "two_layers", lambda *args: layers.append(two_layers(*args)) or layers[-1])
    watch = multimodal(model).projector.register_forward_hook(lambda *args: calls.append(1))
    with kr.mllm.ZOOPrune(keep=4)(model) as trace:
        model(**batch)
    watch.remove()
    (known,) = layers
    assert (known is not None) == name.startswith("llava")
    assert (len(calls) == 2) == (known is not None)  # the model's own and the one that checks
    monkeypatch.setattr(zooprune, "two_layers", lambda *args: None)
    with kr.mllm.ZOOPrune(keep=4)(model) as general:
        model(**batch)
    torch.testing.assert_close(trace.scores[0], general.scores[0], rtol=2e-3, atol=0, equal_nan=True)
    assert torch.equal(trace.kept[0], general.kept[0])


@torch.no_grad()
def test_zooprune_differences_stay_fp32_under_autocast():
    for project in (mlp(6, 16, 8), nn.Sequential(nn.LayerNorm(6), mlp(6, 16, 8))):
        t = visual(rand(2, 20, 8), features=rand(2, 20, 6), project=project)
        alone = kr.mllm.ZOOPrune().score(t)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(kr.mllm.ZOOPrune().score(t), alone)


def test_zooprune_on_a_linear_projector_is_distance_alone():
    project = nn.Linear(6, 8)
    features = rand(1, 20, 6)
    with torch.no_grad():
        x = project(features)
        t = visual(x, features=features, project=project)
        score = kr.mllm.ZOOPrune().score(t)
        assert (score.amax() - score.amin()) / score.mean() < 1e-3
        choice = kr.mllm.ZOOPrune(keep=5).choose(t, torch.ones(1, 20))
    order, _ = farthest_point(x, 5, start=0)
    assert kept(choice) == order[0].sort().values.tolist()


@torch.no_grad()
def test_zooprune_multiplies_sensitivity_and_distance():
    x, weight = F.normalize(rand(15, 8), dim=-1), rand(15, seed=4).sigmoid()
    stretched = (weight - weight.min()) / (weight.max() - weight.min())
    chosen = [int(stretched.argmax())]
    while len(chosen) < 6:
        gain = stretched * (1 - x @ x[chosen].T).amin(1)
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
    assert kept(kr.mllm.ZOOPrune(keep=6).choose(visual(x[None]), weight[None])) == sorted(chosen)


@torch.no_grad()
def test_zooprune_chooses_alike_in_bf16(llava):
    inputs = prompt()
    with kr.mllm.ZOOPrune(keep=8)(llava) as trace:
        llava(**inputs)
        llava(**inputs)
    assert torch.equal(trace.kept[0][0], trace.kept[0][1])  # the same image, the same directions
    half = LlavaForConditionalGeneration(llava.config).eval()
    half.load_state_dict(llava.state_dict())
    with kr.mllm.ZOOPrune(keep=8)(half.bfloat16()) as low:
        half(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"].bfloat16())
    common = set(trace.kept[0][0].tolist()) & set(low.kept[0][0].tolist())
    assert len(common) >= 6


# --- the question -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vlm():
    return kr.load("llava-digits")


@pytest.fixture(scope="module")
def asked(vlm):
    sample = scenes.sample(48, seed=3)
    inputs = vlm.processor(
        images=list(sample.pixels),
        text=[f"<image> {question}" for question in sample.questions],
        padding=True,
        return_tensors="pt",
    )
    return sample, inputs


@torch.no_grad()
def test_clip_similarity_points_at_what_the_question_needs(vlm, asked):
    sample, inputs = asked
    for method in (kr.mllm.TRIM, kr.mllm.Script, kr.mllm.RecoverableCompression):
        kept = []
        for words in (sample.questions, sample.questions[1:] + sample.questions[:1]):
            with method(keep=24, clip="clip-digits")(vlm.model, text=list(words)) as trace:
                vlm.model(**inputs)
            kept.append(trace.mask(len(trace.steps) - 1))
        # what is kept whatever is asked was vision's choice; of the rest of what is needed, the question finds more
        open_to_words = sample.truth & ~(kept[0] & kept[1])
        found = [(mask & open_to_words).sum() / open_to_words.sum() for mask in kept]
        assert found[0] > found[1] + 0.1, (method.__name__, found)


@torch.no_grad()
def test_clip_needs_questions_and_the_right_model(vlm, asked, llava):
    sample, inputs = asked
    with (
        pytest.raises(ValueError, match="pass it where the method is called"),
        kr.mllm.TRIM(clip="clip-digits")(vlm.model),
    ):
        vlm.model(**inputs)
    words = list(sample.questions)
    with (
        pytest.raises(ValueError, match="must name a CLIPModel"),
        kr.mllm.TRIM(clip="vit-digits")(vlm.model, text=words),
    ):
        vlm.model(**inputs)
    with (
        pytest.raises(ValueError, match=r"width 128.*have 32"),
        kr.mllm.Script(clip="clip-digits")(llava, text=["a 7"]),
    ):
        llava(**prompt())


@torch.no_grad()
@pytest.mark.parametrize("name", ["GreedyPrune", "MMTok", "TRIM", "RecoverableCompression", "Script"])
def test_a_prompt_without_words_is_an_error(llava, name):
    base = llava(**prompt()).logits
    with pytest.raises(ValueError, match="needs a question"), getattr(kr.mllm, name)()(llava):
        llava(**prompt(question=(), before=(1,)))
    assert torch.equal(llava(**prompt()).logits, base)


@pytest.mark.parametrize("name", ["DivPrune", "MMTok", "Script", "ToDRE", "TSC", "ZOOPrune"])
def test_a_budget_that_depends_on_scores_is_refused_where_there_are_none(name):
    method = getattr(kr.mllm, name)(keep=kr.Budget(coverage=0.8))
    with pytest.raises(ValueError, match="no count before scores are known"):
        method.before(visual(rand(1, 12, 6)))


def test_signs(monkeypatch):
    t = visual(rand(1, 6, 4))
    space = rand(1, 6, 3), rand(1, 3)
    card = {"task": "scenes"}
    monkeypatch.setattr(text, "clip_space", lambda t, name: space)
    monkeypatch.setattr(text, "_clip", lambda name, device: SimpleNamespace(card=card))
    plain = text.relevance(t, "some", 1, unit=False)
    torch.testing.assert_close(plain, (space[0] @ space[1][0])[None][0])
    assert torch.equal(text.relevance(t, "some", None, unit=False), plain)
    card.clear()  # not ours: as published
    assert torch.equal(text.relevance(t, "some", None, unit=False), -plain)
    assert torch.equal(text.relevance(t, "", None), text.relevance(t))


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("ToDRE", {"tau": 1.5}),
        ("ToDRE", {"objective": "min"}),
        ("GreedyPrune", {"tau": 2.0}),
        ("MMTok", {"alpha": -1.0}),
        ("MMTok", {"tv_temperature": 0.0}),
        ("TRIM", {"sign": 2}),
        ("TRIM", {"keep": 0.0}),
        ("TRIM", {"positions": "odd"}),
        ("GPrune", {"m": -1}),
        ("GPrune", {"t": 3.0}),
        ("TSC", {"aggregate": "sum"}),
        ("TSC", {"iterations": 0}),
        ("RecoverableCompression", {"neighbours": 0}),
        ("RecoverableCompression", {"merge": 0}),
        ("Script", {"redundant": 1.5}),
        ("Script", {"sign": 0}),
        ("ZOOPrune", {"h": 0.0}),
        ("ZOOPrune", {"m": 0}),
    ],
)
def test_bad_settings_say_what_is_allowed(name, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        getattr(kr.mllm, name)(**bad)
