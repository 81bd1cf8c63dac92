"""What single papers promise, beyond what every method must pass."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import keeprate as kr
from keeprate.attention import AttentionView
from keeprate.sft import groups
from keeprate.sft.data import Collator
from keeprate.sft.head import LogitsHead
from keeprate.sft.rft import shuffled
from keeprate.sft.scores import Probe
from keeprate.sft.tokens import Tokens


@pytest.fixture
def batch():
    """Logits [2, 9, 30] with a graph, and labels with a prompt of two."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 30, (2, 9), generator=g)
    labels[:, :2] = -100
    return (3 * torch.randn(2, 9, 30, generator=g)).requires_grad_(), labels


def grad(loss, logits):
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def probability(logits, labels):
    """p of every target, [t] with a graph, written out."""
    p = logits[:, :-1].softmax(-1).gather(2, labels[:, 1:].clamp_min(0)[..., None])[..., 0]
    return p[labels[:, 1:] != -100]


def test_dft_has_the_gradient_of_the_probability(batch):
    logits, labels = batch
    p = probability(logits, labels)
    assert torch.allclose(grad(kr.sft.DFT()(logits, labels), logits), grad((1 - p).mean(), logits), atol=1e-7)


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0, 5.0])
def test_focal_differentiates_its_weight(batch, gamma):
    logits, labels = batch
    p = probability(logits, labels)
    plain = -((1 - p) ** gamma * p.log()).mean()
    loss = kr.sft.Focal(gamma=gamma)(logits, labels)
    assert torch.allclose(loss, plain, rtol=1e-5)
    assert torch.allclose(grad(loss, logits), grad(plain, logits), atol=1e-6)
    # on the target's logit: -(1 - p)^g ((1 - p) + g p l), over the number of tokens
    row, place = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    at = grad(loss, logits)[row, place, labels[row, place + 1]]
    nll = -p.log()
    assert torch.allclose(at, -((1 - p) ** gamma) * ((1 - p) + gamma * p * nll) / len(p), atol=1e-6)


def test_focal_is_finite_where_the_model_is_certain():
    logits = torch.zeros(1, 3, 5)
    labels = torch.tensor([[-100, 2, 3]])
    logits[0, 0, 2] = 200.0  # p is exactly 1
    logits.requires_grad_()
    for gamma in (0.5, 1.0, 2.0):
        loss = kr.sft.Focal(gamma=gamma)(logits, labels)
        assert torch.isfinite(loss) and torch.isfinite(grad(loss, logits)).all()


def test_entropy_is_that_of_the_distribution(batch):
    logits, labels = batch
    rows = logits[:, :-1][labels[:, 1:] != -100].detach()
    whole = torch.distributions.Categorical(logits=rows).entropy()
    seen = F.cross_entropy(rows, labels[:, 1:][labels[:, 1:] != -100], reduction="none")
    for top, entropy in (
        (None, whole),
        (30, whole),
        (4, torch.distributions.Categorical(logits=rows.topk(4).values).entropy()),
    ):
        loss = kr.sft.EntropyWeight(top=top, alpha=1.5)(logits, labels)
        assert torch.allclose(loss, (entropy**1.5 * seen).mean(), rtol=1e-4), top
    certain = torch.zeros(1, 3, 5)
    certain[0, :, 1] = 300.0
    assert float(kr.sft.EntropyWeight()(certain, torch.tensor([[0, 1, 2]]))) == 0


def test_entropy_keeps_the_unsure_share_of_the_batch(batch):
    logits, labels = batch
    kept = kr.sft.EntropyWeight(keep=0.2, alpha=0.0, denominator="kept", top=None)
    rows = logits[:, :-1][labels[:, 1:] != -100].detach()
    entropy = torch.distributions.Categorical(logits=rows).entropy()
    nll = F.cross_entropy(rows, labels[:, 1:][labels[:, 1:] != -100], reduction="none")
    best = entropy.topk(int(0.2 * len(entropy))).indices
    assert torch.allclose(kept(logits, labels), nll[best].mean(), rtol=1e-5)


def test_rho1_with_the_model_as_its_own_reference_breaks_ties_by_place(llama, rows):
    rows = kr.sft.score(llama, rows).join(rows, "reference")
    rows = [{**row, "reference": [0.0] * len(row["reference"])} for row in rows]
    method = kr.sft.Rho1(keep=0.5, scope="sequence")
    made = Collator(pad=0)(rows)
    with Probe(method, llama) as probe:
        t = probe(made)
        t.columns["reference"] = torch.zeros(t.labels.shape).index_put((t.row, t.place), t.nll)
        kept = method.weigh(t)
    assert torch.equal(kept, (t.order < (t.sizes // 2).clamp_min(1)[t.sequence]).float())


def test_rho1_ranks_the_batch_or_each_sequence():
    logits = torch.zeros(2, 5, 4)  # every loss is log 4
    labels = torch.ones(2, 5).long()
    reference = torch.tensor([[0, 1.0, 1, 1, 1], [0, 0.0, 0, 0, 0]])  # the second sequence has the larger excess

    def kept(scope):
        from keeprate.sft.base import logits_head

        method = kr.sft.Rho1(keep=0.5, scope=scope)
        return method.weigh(Tokens(logits_head(logits, labels), labels, {"reference": reference})).view(2, 4).tolist()

    assert kept("batch") == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert kept("sequence") == [[1, 1, 0, 0], [1, 1, 0, 0]]


def test_token_cleaning_ranks_the_whole_data_set(rows):
    g = torch.Generator().manual_seed(0)
    data = [
        {**r, "base": torch.rand(len(r["labels"]), generator=g).tolist(), "reference": [0.5] * len(r["labels"])}
        for r in rows
    ]
    for keep in (0.1, 0.6, 1.0):
        method = kr.sft.TokenCleaning(keep=keep)
        done = method.prepare(data)
        target = [np.asarray(r["labels"]) != -100 for r in done]
        gain = np.concatenate([np.asarray(r["base"])[m] for r, m in zip(done, target, strict=True)])
        kept = np.concatenate([np.asarray(r["kept"])[m] for r, m in zip(done, target, strict=True)])
        assert kept.sum() == int(keep * len(gain)) == sum(sum(r["kept"]) for r in done)
        assert keep == 1 or gain[kept == 1].min() >= gain[kept == 0].max()
        assert "kept" not in data[0]


def test_evolving_trains_every_part_against_the_model_so_far(llama, rows):
    start = kr.sft.score(llama, rows)
    seen = []

    def train(model, part, method):
        seen.append((len(part), method.name, [dict(row) for row in part]))
        kr.sft.train(model, part, method, steps=3, batch_size=4, lr=1e-2)

    cleaned = kr.sft.evolve(llama, rows, train, kr.sft.TokenCleaning(keep=0.5), parts=4)
    assert [(n, name) for n, name, _ in seen] == [(6, "SFT")] + [(6, "TokenCleaning")] * 3
    assert [row["input_ids"] for row in cleaned] == [row["input_ids"] for row in rows[6:]]
    for row, loss in zip(cleaned, start.nll[6:], strict=True):
        assert np.allclose(row["base"], loss, atol=1e-6), "the base is the model of the beginning"
        assert not np.allclose(row["reference"], loss, atol=1e-3), "the reference is the model as it stood"
    for _, _, part in seen[1:]:
        assert sum(sum(row["kept"]) for row in part) == int(
            0.5 * sum(sum(i != -100 for i in r["labels"]) for r in part)
        )
    with pytest.raises(ValueError, match="parts must be at most the number of rows, 2"):
        kr.sft.evolve(llama, rows[:2], train)


def test_sstoken_scores_are_the_attention_given_to_the_prompt(llama, rows):
    """Against the attention matrix of an eager run: last layer, mean over heads, the row that predicts the target."""
    made = Collator(pad=0)(rows[:5])
    for reader, back in (("predicting", 1), ("own", 0)):
        seen = kr.sft.weigh(kr.sft.SsToken(gamma=0.0, reader=reader), llama, made)
        eager = llama.set_attn_implementation("eager") or llama
        matrix = eager(made["input_ids"], made["attention_mask"], output_attentions=True).attentions[-1].mean(1)
        llama.set_attn_implementation("sdpa")
        prompt = (made["labels"].as_subclass(torch.Tensor) == -100) & (made["attention_mask"] == 1)
        mass = (matrix * prompt[:, None].float()).sum(-1)
        row, place = seen.target.nonzero(as_tuple=True)
        assert torch.allclose(seen.score[row, place], mass[row, place - back], atol=1e-5)
        assert float(seen.score[row, place].min()) > 0 and float(seen.score[row, place].max()) <= 1


def test_sstoken_with_gamma_one_is_the_loss_difference_alone(llama, rows):
    g = torch.Generator().manual_seed(0)
    data = [{**row, "history": (4 * torch.rand(len(row["labels"]), generator=g)).tolist()} for row in rows[:4]]
    made = Collator(pad=0)(data)
    seen = kr.sft.weigh(kr.sft.SsToken(gamma=1.0), llama, made)
    gain = made["labels"].columns["history"] - seen.nll
    for i in range(4):
        own, scores = gain[i][seen.target[i]], seen.score[i][seen.target[i]]
        assert torch.allclose(scores, (own - own.min()) / (own.max() - own.min()), atol=1e-5)
        assert int(seen.weight[i].sum()) == math.ceil(0.6 * len(own) - 1e-9)


def test_sstoken_before_the_first_update_is_attention_alone(llama, rows):
    rows = kr.sft.score(llama, rows).join(rows, "history")
    both, attention = (kr.sft.weigh(kr.sft.SsToken(gamma=x), llama, Collator(pad=0)(rows)) for x in (0.5, 0.0))
    assert torch.equal(both.weight, attention.weight)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 6, dtype=torch.bool), "blocks"])
def test_sstoken_refuses_attention_that_it_cannot_read(mask):
    """Flash attention is told of padding by a mask of two dimensions, of packing by positions alone."""
    g = torch.Generator().manual_seed(0)
    labels = torch.tensor([[-100, -100, 3, 4, 5, 6]] * 2)
    q, k = torch.randn(2, 4, 6, 8, generator=g), torch.randn(2, 2, 6, 8, generator=g)
    view = AttentionView(q, k, k, mask, 8**-0.5, causal=mask is None)
    head = LogitsHead(torch.zeros(8, 9))
    packed = torch.tensor([[0, 0, 0, 1, 1, 1], [2, 2, 2, 2, -1, -1]])
    t = Tokens(head, labels, {"sequence": packed}, view=view)
    with pytest.raises(ValueError, match=r"attn_implementation must be 'sdpa' or 'eager'"):
        t.prompt_attention()
    if mask is None:
        alone = torch.tensor([[0] * 6, [1] * 6])
        mass = Tokens(head, labels, {"sequence": alone}, view=view).prompt_attention()
        rows = view.rows([1, 2, 3, 4])[..., :2].sum(-1).mean(1).flatten()
        assert torch.allclose(mass, rows, atol=1e-5)


def test_sstoken_refuses_a_window_that_no_mask_tells_of(llama):
    last = llama.model.layers[-1].self_attn
    q, k = torch.zeros(1, 4, 6, 8), torch.zeros(1, 2, 6, 8)
    with kr.sft.SsToken()(llama) as trace:
        trace.active = True
        trace.fold(last, AttentionView(q, k, k, None, 1.0, causal=True))
        last.sliding_window = 6
        trace.fold(last, AttentionView(q, k, k, None, 1.0, causal=True))
        last.sliding_window = 4
        with pytest.raises(ValueError, match=r"attn_implementation must be 'sdpa' or 'eager'"):
            trace.fold(last, AttentionView(q, k, k, None, 1.0, causal=True))


def test_profit_is_a_threshold(batch):
    logits, labels = batch
    p = probability(logits, labels).detach()
    nll, tau = -p.log(), float(p.sort().values[len(p) // 2 :][:2].mean())  # between two of them
    for mode, kept in (("higher", p >= tau), ("lower", p <= tau), ("middle", (p >= tau) & (p <= 0.5))):
        loss = kr.sft.ProFit(tau=tau, mode=mode, upper=0.5)(logits, labels)
        assert torch.allclose(loss, (nll * kept).sum() / len(p), rtol=1e-5)
    with pytest.raises(ValueError, match="upper must be a number in"):
        kr.sft.ProFit(tau=0.5, upper=0.4)


def test_rft_weighs_the_means_of_two_groups(batch):
    logits, labels = batch
    nll = -probability(logits, labels).log()
    change = torch.zeros(2, 9)
    change[0, 4:] = 1.0  # reasoning; LD of exactly 0 is boilerplate
    reasoning = change[:, 1:][labels[:, 1:] != -100] > 0
    for tau in (0.5, 1.0, 3.0):
        means = torch.stack((nll[~reasoning].mean(), nll[reasoning].mean()))
        weight = (means.detach() / tau).softmax(0)
        method = kr.sft.RFT(tau=tau)
        loss = method(logits, labels, shuffled=change, original=torch.zeros(2, 9))
        assert torch.allclose(loss, (weight * means).sum(), rtol=1e-5)
        assert torch.allclose(grad(loss, logits), grad((weight * means).sum(), logits), atol=1e-7)
    one = kr.sft.RFT()(logits, labels, shuffled=-change, original=change)  # nothing but boilerplate
    assert torch.allclose(one, nll.mean(), rtol=1e-5)


def test_shuffling_gives_every_prompt_another_output(rows):
    data = [{**row, "input_ids": [100 + i] * 3 + row["input_ids"][3:]} for i, row in enumerate(rows)]
    found = shuffled(data, share=0.5, seed=3)
    assert len(found) == 12 and found == shuffled(data, share=0.5, seed=3) != shuffled(data, share=0.5, seed=4)
    outputs = {i: row["input_ids"][3:] for i, row in enumerate(data)}
    for row in found:
        i = row["input_ids"][0] - 100
        assert row["input_ids"][:3] == [100 + i] * 3 and row["labels"][:3] == [-100] * 3
        assert row["input_ids"][3:] != outputs[i] and row["input_ids"][3:] in outputs.values()
        assert row["labels"][3:] == row["input_ids"][3:]
    assert len(shuffled(data)) == 2
    with pytest.raises(ValueError, match="at least two rows; got 1"):
        shuffled(data[:1])
    with pytest.raises(ValueError, match="has no target"):
        shuffled([{"input_ids": [1, 2], "labels": [-100, -100]}] * 2)


def test_pdl_weighs_by_frequency_to_a_negative_power(batch):
    logits, labels = batch
    nll = -probability(logits, labels).log()
    share = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.01
    w = share[:, 1:][labels[:, 1:] != -100] ** -0.7
    loss = kr.sft.PDL(alpha=0.7, eps=0.0)(logits, labels, frequency=share)
    assert torch.allclose(loss, (w * nll).sum() / w.sum(), rtol=1e-5)
    counts = kr.sft.PDL(alpha=0.7, eps=0.0)(logits, labels, frequency=share / 4)
    assert torch.allclose(counts, loss, rtol=1e-5), "a factor on all frequencies goes out"
    with pytest.raises(ValueError, match=r"frequency must be a share in \(0, 1\]; got 0"):
        kr.sft.PDL()(logits, labels, frequency=torch.zeros(2, 9))


def test_frequency_is_the_share_of_all_targets(rows):
    data = kr.sft.frequency(rows)
    targets = [i for row in rows for i in row["labels"][3:]]
    for row in data:
        assert row["frequency"][:3] == [0, 0, 0]
        expected = [targets.count(i) / len(targets) for i in row["labels"][3:]]
        assert np.allclose(row["frequency"][3:], expected)


def test_prior_has_a_mean_of_one_in_every_caption(batch):
    logits, labels = batch
    reference = torch.tensor([[0.0, 0, 1e-9, 5, 1, 0.2, 3, 1e-9, 2], [0, 0, 1, 1, 1, 1, 1, 1, 1.0]])
    from keeprate.sft.base import logits_head

    t = Tokens(logits_head(logits, labels), labels, {"reference": reference})
    own, factor = kr.sft.PRIOR(alpha=2.0).weights(t)
    assert torch.allclose(t.sums(own * factor), t.sizes.float())
    assert float((own * factor)[0]) < 1e-6, "what the text alone gives away"
    assert torch.allclose(own[1], torch.tensor((1 - math.exp(-5)) ** 2))
    assert torch.allclose((own * factor)[7:], torch.ones(7))


def test_token_filter_masks_or_removes():
    row = {"input_ids": [4, 5, 6, 7], "forget": [0.1, 0.9, 0.2, 0.6], "labels": [-100, 5, 6, 7]}
    method = kr.sft.TokenFilter(threshold=0.5)
    removed = {**row, "input_ids": [4, 3, 6, 3], "labels": [-100, -100, 6, -100]}
    assert method.remove(row, 3) == removed
    arrays = {name: np.asarray(x) for name, x in row.items()}  # as a data set with numpy's format gives them
    assert {name: list(x) for name, x in method.remove(arrays, 3).items()} == removed
    logits = torch.randn(1, 4, 9, requires_grad=True)
    labels = torch.tensor([row["labels"]])
    loss = method(logits, labels, forget=torch.tensor([row["forget"]]))
    reached = grad(loss, logits)[0].abs().sum(-1) > 0
    assert reached.tolist() == [False, True, False, False]  # the row that predicts token 2, and no other


def test_tl_training_weighs_key_tokens_by_their_rarity():
    logits, labels = torch.zeros(3, 9, 5), torch.ones(3, 9).long()
    key = torch.tensor([[0, 1, 0, 0, 0, 2, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0, 0, 2], [0, 0, 0, 0, 0, 0, 0, 0, 1]])
    from keeprate.sft.base import logits_head

    t = Tokens(logits_head(logits, labels), labels, {"key": key})
    weight = kr.sft.TLTraining(cap=6.5).weigh(t).view(3, 8)
    assert weight[0].tolist() == [6, 1, 1, 1, 1, 1, 1, 1], "6 others, 1 key token; the parameter's end is neither"
    assert weight[1].tolist() == [1] * 8, "as many key tokens as others or more"
    assert weight[2].tolist() == [1] * 7 + [6.5], "capped"
    with pytest.raises(ValueError, match="key must be 0, 1 or 2"):
        kr.sft.TLTraining()(logits, labels, key=key + 1)


def test_key_places_are_where_tool_names_part():
    assert kr.sft.key_places([5, 6, 7], []) == [0]
    assert kr.sft.key_places([5, 6, 7], [[5, 6, 8], [5, 9]]) == [0, 1, 2]
    assert kr.sft.key_places([5, 6, 7], [[5, 6, 7], [1, 2]]) == [0], "the same name again is no other tool"
    assert kr.sft.key_places([5, 6], [[5, 6, 7]]) == [0, 2], "told apart by what follows the name"
    assert kr.sft.key_places([5, 6, 7], [[5, 6]]) == [0, 2]


def numbers(loss: str, targets: list[int], q: list[dict[int, float]]) -> torch.Tensor:
    """NTL alone, digits 0..9 being tokens 10..19, with the given probabilities of each digit."""
    method = kr.sft.NTL(loss=loss, weight=1.0, digits=tuple(range(10, 20)), values=tuple(map(float, range(10))))
    logits = torch.full((1, len(targets) + 1, 25), -50.0)
    for i, given in enumerate(q):
        for digit, p in given.items():
            logits[0, i, 10 + digit] = math.log(p)
    labels = torch.tensor([[-100, *targets]])
    return method(logits, labels) - kr.sft.SFT()(logits, labels)


@pytest.mark.parametrize(("loss", "near"), [("was", 1.0), ("mse", 0.0)])
def test_ntl_measures_the_distance_to_the_digit(loss, near):
    assert abs(float(numbers(loss, [15], [{5: 1.0}]))) < 1e-4
    assert float(numbers(loss, [15], [{8: 1.0}])) == pytest.approx(3 if loss == "was" else 9, abs=1e-3)
    # 4 and 6 in equal parts: the mean is right, the distribution is not
    assert float(numbers(loss, [15], [{4: 0.5, 6: 0.5}])) == pytest.approx(near, abs=1e-3)
    # only digits count, and the mean is over them
    assert float(numbers(loss, [15, 3, 12], [{7: 1.0}, {0: 1.0}, {2: 1.0}])) == pytest.approx(
        1.0 if loss == "was" else 2.0, abs=1e-3
    )
    assert float(numbers(loss, [3, 4], [{7: 1.0}, {0: 1.0}])) == 0, "no digit, no loss, no NaN"


def test_ntl_looks_at_digit_logits_alone():
    method = kr.sft.NTL(digits=tuple(range(10, 20)), values=tuple(map(float, range(10))))
    logits = torch.randn(1, 3, 25, requires_grad=True)
    labels = torch.tensor([[-100, 15, 3]])
    extra = grad(method(logits, labels) - kr.sft.SFT()(logits, labels), logits)
    reached = extra.abs() > 1e-7
    assert bool(reached[0, 0, 10:20].all()) and int(reached.sum()) == 10


def test_ntl_takes_double_precision():
    method = kr.sft.NTL(loss="mse", digits=tuple(range(10, 20)), values=tuple(map(float, range(10))))
    logits, labels = torch.randn(1, 3, 25), torch.tensor([[-100, 15, 3]])
    assert float(method(logits.double(), labels)) == pytest.approx(float(method(logits, labels)), rel=1e-5)


def test_ntl_finds_the_digits_of_a_tokenizer():
    tokenizer = kr.load("llama-docs").processor
    method = kr.sft.NTL.of(tokenizer, loss="mse", weight=0.5)
    assert method.loss == "mse" and method.weight == 0.5
    assert {tokenizer.decode([i]).strip(): v for i, v in zip(method.digits, method.values, strict=True)} == {
        str(v): float(v) for v in range(10)
    }
    with pytest.raises(ValueError, match=r"make it with kr.sft.NTL.of"):
        kr.sft.NTL()(torch.zeros(1, 3, 5), torch.ones(1, 3).long())
    with pytest.raises(ValueError, match="a value for every digit; got 1 and 0"):
        kr.sft.NTL(digits=(3,))


def slow_ct(logits: torch.Tensor, labels: torch.Tensor, length: float, window: float) -> torch.Tensor:
    """The contrastive loss, one token after the other."""
    found = []
    for row, line in zip(logits, labels, strict=True):
        places = [i for i in range(1, len(line)) if line[i] != -100]
        first = places[: max(1, int(length * len(places)))]
        back = max(1, int(window * len(first)))
        for j, i in enumerate(first):
            before = [line[k] for k in first[max(0, j - back) : j] if line[k] != line[i]]
            z = row[i - 1]
            found.append(torch.log1p(sum((torch.exp(z[b] - z[line[i]]) for b in before), torch.tensor(0.0))))
    return torch.stack(found).mean()


@pytest.mark.parametrize(("length", "window"), [(0.25, 0.5), (1.0, 0.5), (0.6, 1.0), (0.2, 0.1)])
def test_ct_is_its_definition(length, window):
    g = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 6, (3, 20), generator=g)  # few tokens, so that negatives repeat and equal the target
    labels[0, :4] = labels[1, 10:] = -100
    logits = torch.randn(3, 20, 6, generator=g).requires_grad_()
    method = kr.sft.CT(length=length, window=window)
    extra = method(logits, labels) - kr.sft.SFT()(logits, labels)
    plain = slow_ct(logits, labels, length, window)
    assert torch.allclose(extra, plain, atol=1e-5)
    assert torch.allclose(grad(extra, logits), grad(plain, logits), atol=1e-6)


@pytest.mark.parametrize("denominator", ["valid", "kept", "weight_sum"])
def test_auxiliary_losses_keep_their_share_in_accumulated_gradients(llama, rows, denominator):
    """The second loss of each micro-batch, times its share of the denominator; taken from autograd."""
    digits = tuple(range(3, 13))
    given = {"digits": digits, "values": tuple(map(float, range(10))), "denominator": denominator, "weight": 4.0}
    method, plain = kr.sft.NTL(**given), kr.sft.SFT(denominator=denominator)
    parts = (rows[:1], rows[1:5], rows[5:7])
    items = torch.tensor(sum(len(row["labels"]) - 3 for part in parts for row in part))

    def gradient(method, parts, items):
        llama.zero_grad()
        with method(llama):
            for part in parts:
                made = Collator(pad=0)(part)
                labels = made.pop("labels")
                method(llama(**made), labels, items).backward()
        return torch.cat([p.grad.flatten() for p in llama.parameters()])

    extra = gradient(method, parts, items) - gradient(plain, parts, items)
    alone = [gradient(method, [part], None) - gradient(plain, [part], None) for part in parts]
    shares = [sum(len(row["labels"]) - 3 for row in part) / int(items) for part in parts]
    expected = sum(share * part for share, part in zip(shares, alone, strict=True))
    assert float((extra - expected).norm()) < 1e-4 * float(expected.norm())


def test_ct_without_negatives_is_nothing():
    labels = torch.full((1, 8), 3)
    logits = torch.randn(1, 8, 6)
    assert float(kr.sft.CT(length=1.0)(logits, labels) - kr.sft.SFT()(logits, labels)) == 0


def test_random_mask_draws_anew_in_every_epoch(llama, rows):
    method, made = kr.sft.RandomMask(keep=0.5), Collator(pad=0)(rows)
    kept = []
    with Probe(method, llama) as probe:
        for epoch in (0, 1, 0):
            probe.session.epoch = epoch
            t = probe(made)
            kept.append(method.weigh(t))
    assert torch.equal(kept[0], kept[2]) and not torch.equal(kept[0], kept[1])
    assert torch.equal(t.sums(kept[0]), (t.sizes // 2).clamp_min(1).float())


@pytest.mark.parametrize("seed", range(3))
def test_groups_agree_with_loops(seed):
    g = torch.Generator().manual_seed(seed)
    group = torch.randint(0, 5, (60,), generator=g)
    score = torch.randint(0, 8, (60,), generator=g).float()  # with ties
    rank, unit = groups.rank(score, group, 6), groups.min_max(score, group, 6)
    for i in range(60):
        ahead = [(score[j] > score[i]) or (score[j] == score[i] and j < i) for j in range(60) if group[j] == group[i]]
        assert int(rank[i]) == sum(map(bool, ahead))
        same = score[group == group[i]]
        assert float(unit[i]) == pytest.approx(float((score[i] - same.min()) / (same.max() - same.min())))
    assert groups.sizes(group, 6).tolist() == [int((group == k).sum()) for k in range(6)]
    with pytest.raises(ValueError, match="scores hold NaN for 1 of 3"):
        groups.rank(torch.tensor([1.0, torch.nan, 2.0]), torch.zeros(3).long(), 1)
    assert groups.min_max(torch.ones(3), torch.zeros(3).long(), 1).tolist() == [0, 0, 0]
