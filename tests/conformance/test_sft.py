"""What every fine-tuning method must pass, on every architecture it lists. Nothing here is for one method.

Methods come from the registry; a new one is judged as soon as it is registered. The tables below say only what cannot
be read off a method: settings for a tiny vocabulary, settings at which a method is plain fine-tuning, and which ones
look at a batch as a whole.
"""

from dataclasses import dataclass, fields

import pytest
import torch
import torch.nn.functional as F

import keeprate as kr
from keeprate.sft import Selector, SFTMethod
from keeprate.sft import head as heads

from .checkpoints import DECODERS, VOCABULARY

TABLE = kr.methods("sft").set_index("name")
METHODS = list(TABLE.index)
LENGTHS, PROMPTS = (24, 17, 21, 9), (5, 1, 8, 3)  # tokens of each sequence, and how many of them are no targets

SMALL = {
    "ProFit": {"tau": 0.005},
    "NTL": {"digits": tuple(range(20, 40)), "values": tuple(float(i % 10) for i in range(20))},
}
# settings that take another path through a method
VARIANTS = [
    ("RandomMask", {"keep": 0.3, "seed": 5}),
    ("Focal", {"gamma": 0.5}),
    ("EntropyWeight", {"top": None, "alpha": 0.7}),
    ("EntropyWeight", {"keep": 0.2}),
    ("Rho1", {"scope": "sequence"}),
    ("TokenCleaning", {"scope": "sequence", "keep": 0.4}),
    ("SsToken", {"gamma": 1.0}),
    ("SsToken", {"gamma": 0.0, "reader": "own"}),
    ("ProFit", {"mode": "lower", "tau": 0.1}),
    ("ProFit", {"mode": "middle", "tau": 0.01, "upper": 0.5}),
    ("NTL", {"loss": "mse"}),
    ("CT", {"length": 1.0, "window": 0.3}),
    ("DFT", {"denominator": "mean_one"}),
    ("ProFit", {"denominator": "kept", "tau": 0.01}),
    ("PRIOR", {"denominator": "weight_sum", "alpha": 2.0}),
]
# settings at which nothing is left of a method but plain fine-tuning
PLAIN = {
    "SFT": {},
    "RandomMask": {"keep": 1.0},
    "Focal": {"gamma": 0.0},
    "EntropyWeight": {"alpha": 0.0},
    "Rho1": {"keep": 1.0},
    "TokenCleaning": {"keep": 1.0},
    "SsToken": {"keep": 1.0},
    "ProFit": {"tau": 0.0},
    "PDL": {"alpha": 0.0},
    "NTL": {"weight": 0.0},
    "TLTraining": {"cap": 1.0},
    "TokenFilter": {"threshold": 1.0},
    "CT": {"weight": 0.0},
    "PRIOR": {"alpha": 0.0},
}
NEVER_PLAIN = {"DFT", "RFT"}  # their weights depend on the model whatever the setting
OWN_GRADIENT = {"Focal"}  # the weight is differentiated
AUXILIARY = {"NTL", "CT"}  # a second loss, whose mean is over the tokens of a micro-batch


def build(name: str, **params) -> SFTMethod:
    """A method at the suite's settings."""
    return kr.method(name, **{**SMALL.get(name, {}), **params})


def batch_level(method: SFTMethod) -> bool:
    """Whether weights depend on which sequences share a micro-batch."""
    return method.name == "RFT" or getattr(method, "scope", "") == "batch" or getattr(method, "keep", 1) == 0.2


@dataclass(frozen=True)
class Case:
    """One method, in one setting, on one checkpoint."""

    method: SFTMethod
    checkpoint: str

    @property
    def id(self) -> str:
        given = [f.name for f in fields(self.method) if getattr(self.method, f.name) != f.default]
        settings = ",".join(
            f"{name}={getattr(self.method, name)}" for name in given if name not in ("digits", "values")
        )
        return f"{self.method.name}({settings})-{self.checkpoint}"


def cases(*checkpoints: str, without=lambda method: False) -> list:
    """Every method and further setting on these checkpoints, or on all that it lists."""
    settings = [(name, {}) for name in METHODS] + VARIANTS
    found = []
    for name, params in settings:
        method = build(name, **params)
        listed = TABLE.loc[name, "architectures"].split(", ")
        for checkpoint, (architecture, _, _) in DECODERS.items():
            if architecture in listed and (not checkpoints or checkpoint in checkpoints) and not without(method):
                found.append(Case(method, checkpoint))
    return [pytest.param(case, id=case.id) for case in found]


def rows() -> list[dict]:
    """Sequences with every column that a method may ask for."""
    g = torch.Generator().manual_seed(3)
    found = []
    for length, prompt in zip(LENGTHS, PROMPTS, strict=True):
        ids = torch.randint(2, VOCABULARY, (length,), generator=g)
        labels = ids.clone()
        labels[:prompt] = -100
        labels[-2] = -100  # a gap among the targets
        row = {"input_ids": ids.tolist(), "labels": labels.tolist()}
        for name in ("reference", "base", "history", "shuffled", "original"):
            row[name] = (3 * torch.rand(length, generator=g)).tolist()
        row["forget"] = torch.rand(length, generator=g).tolist()
        row["key"] = torch.randint(0, 3, (length,), generator=g).tolist()
        row["group"] = torch.randint(0, 2, (length,), generator=g).tolist()
        found.append(row)
    return kr.sft.frequency(found)


def batch(method: SFTMethod, which=(0, 1, 2, 3), left: bool = False, **changed) -> tuple[dict, torch.Tensor, dict]:
    """Inputs of the model, labels and columns of some rows; `changed` replaces columns by functions of them."""
    data = rows()
    if isinstance(method, kr.sft.TokenCleaning) and method.scope == "dataset":
        data = method.prepare(data)
    made = kr.sft.Collator(pad=0)([data[i] for i in which])
    labels = made.pop("labels")
    columns = dict(labels.columns)
    for name, change in changed.items():
        columns[name] = change(columns.get(name, torch.ones(labels.shape)))
    labels = labels.as_subclass(torch.Tensor)
    if left:  # the same tokens, padding first
        shift = [int(made["attention_mask"].shape[1] - m.sum()) for m in made["attention_mask"]]

        def roll(x):
            return torch.stack([row.roll(s) for row, s in zip(x, shift, strict=True)])

        made, labels = {k: roll(x) for k, x in made.items()}, roll(labels)
        columns = {k: roll(x) for k, x in columns.items()}
    return made, labels, columns


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, found, strict=True))


def watched(method, model, inputs, labels, columns, items=None) -> torch.Tensor:
    """The loss inside `with method(model)`."""
    with method(model):
        return method(model(**inputs), labels, items, **columns)


def close(a, b, tolerance=1e-6):
    """Two losses, or two gradients as one long vector, equal to a share of their size."""
    if isinstance(a, dict):
        a, b = (torch.cat([x[name].flatten() for name in sorted(x)]) for x in (a, b))
        assert torch.isfinite(a).all() and float((a - b).norm()) <= tolerance * float(b.norm())
    else:
        a, b = float(a.detach()), float(b.detach())
        assert abs(a - b) <= tolerance * max(1.0, abs(b)), (a, b)


@pytest.fixture
def tiles(monkeypatch):
    """The few logits of these batches are made tile by tile, as for a large vocabulary, and not held."""
    monkeypatch.setattr(heads, "HELD", 0)


def test_the_tables_know_every_method():
    assert set(PLAIN) | NEVER_PLAIN == set(METHODS)
    assert not set(PLAIN) & NEVER_PLAIN


@pytest.mark.parametrize("checkpoint", DECODERS)
@pytest.mark.parametrize("name", PLAIN)
def test_without_its_idea_a_method_is_plain_fine_tuning(zoo, name, checkpoint):
    """Loss and gradients are transformers' own, whatever the denominator; so they are for weights of one."""
    model = zoo(checkpoint)
    for denominator in ("valid", "kept", "weight_sum", "mean_one") if checkpoint == "llama" else ("kept",):
        method = build(name, **PLAIN[name], denominator=denominator)
        inputs, labels, columns = batch(method, weights=torch.ones_like)
        plain = model(**inputs, labels=labels).loss
        loss = watched(method, model, inputs, labels, columns)
        close(loss, plain)
        close(gradients(model, loss), gradients(model, plain))


@pytest.mark.parametrize("case", cases())
def test_hidden_states_and_logits_give_the_same(zoo, case):
    model = zoo(case.checkpoint)
    inputs, labels, columns = batch(case.method)
    loss = watched(case.method, model, inputs, labels, columns)
    outputs = model(**inputs)
    if case.method.reads_attention:
        with pytest.raises(ValueError, match="attention is read from the model"):
            case.method(outputs, labels, **columns)
        with case.method(model, logits=True):
            plain = case.method(model(**inputs), labels, **columns)
    else:
        plain = case.method(outputs, labels, **columns)
        assert torch.equal(case.method(outputs.logits, labels, **columns), plain)
    close(loss, plain)
    close(gradients(model, loss), gradients(model, plain), 2e-6)


@pytest.mark.parametrize("case", cases("llama", "gemma"))
def test_tiles_and_logits_give_the_same(zoo, case, tiles):
    test_hidden_states_and_logits_give_the_same(zoo, case)


@pytest.mark.parametrize("name", PLAIN)
def test_tiles_give_plain_fine_tuning(zoo, name, tiles):
    test_without_its_idea_a_method_is_plain_fine_tuning(zoo, name, "qwen2")


@pytest.mark.parametrize("case", cases("llama", "qwen2", without=lambda m: m.name in OWN_GRADIENT | AUXILIARY))
def test_the_loss_is_the_weighted_sum(zoo, case):
    """sum w l / D with the weights that `weigh` shows, as constants; written out with torch's cross-entropy."""
    method, model = case.method, zoo(case.checkpoint)
    inputs, labels, columns = batch(method, weights=lambda w: w * torch.linspace(0.5, 2, w.shape[1]))
    made = {**inputs, "labels": kr.sft.Labels.of(labels, columns)}
    weight = kr.sft.weigh(method, model, made).weight
    assert bool((weight[labels == -100] == 0).all()) and bool((weight >= 0).all()) and float(weight.sum()) > 0
    logits = model(**inputs).logits
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    mask = labels[:, 1:] != -100
    divisor = {"kept": (weight > 0).sum(), "weight_sum": weight.sum()}.get(method.denominator, mask.sum())
    plain = (losses * weight[:, 1:]).sum() / divisor
    loss = watched(method, model, inputs, labels, columns)
    close(loss, plain)
    close(gradients(model, loss), gradients(model, plain), 2e-6)
    if method.denominator == "mean_one":
        assert torch.allclose(weight.sum(1), mask.sum(1).float(), rtol=1e-5)


@pytest.mark.parametrize("case", cases("llama"))
def test_what_is_no_target_has_no_say(zoo, case):
    method, model = case.method, zoo(case.checkpoint)
    inputs, labels, columns = batch(method, weights=torch.ones_like)
    ignored = labels == -100
    ignored[:, 0] = True

    def noisy(x):
        return torch.where(ignored, x.max() if x.is_floating_point() else x, x)

    changed = {
        k: x if k in ("salt", "key", "group", "kept") else noisy(x) * (1 + ignored.float()) for k, x in columns.items()
    }
    assert not torch.equal(changed["reference"], columns["reference"])
    loss = watched(method, model, inputs, labels, columns)
    close(loss, watched(method, model, inputs, labels, changed), 0)
    logits = model(**inputs).logits.detach().requires_grad_()
    if not method.reads_attention:
        (grad,) = torch.autograd.grad(method(logits, labels, **columns), logits)
        predicts = F.pad(labels[:, 1:] != -100, (0, 1))
        assert bool((grad[~predicts] == 0).all()) and bool((grad[predicts] != 0).any())


@pytest.mark.parametrize("case", cases("llama"))
@pytest.mark.parametrize("denominator", ["weight_sum", "mean_one"])
def test_scaling_the_weights_changes_nothing(zoo, case, denominator):
    params = {**case.method.params(), "denominator": denominator}
    method, model = type(case.method)(**params), zoo(case.checkpoint)
    inputs, labels, columns = batch(method, weights=lambda w: w + torch.rand(w.shape, generator=torch.Generator()))
    once = watched(method, model, inputs, labels, columns)
    close(watched(method, model, inputs, labels, {**columns, "weights": 37 * columns["weights"]}), once, 2e-6)
    other = {**columns, "weights": columns["weights"] ** 3}
    assert abs(float(watched(method, model, inputs, labels, other)) - float(once)) > 1e-6, "weights have no effect"


@pytest.mark.parametrize("denominator", ["valid", "kept", "weight_sum", "mean_one"])
@pytest.mark.parametrize("case", cases("llama", without=lambda m: batch_level(m) or m.name in AUXILIARY))
def test_accumulated_micro_batches_equal_one_batch(zoo, case, denominator):
    """Gradients and the sum of the returned losses; micro-batches of one and three sequences, one without weight."""
    method = type(case.method)(**{**case.method.params(), "denominator": denominator})
    model = zoo(case.checkpoint)
    for cut in ([(0,), (1, 2, 3)], [(2, 0), (3,), (1,)]):
        inputs, labels, columns = batch(method)
        items = (labels[:, 1:] != -100).sum()
        whole = watched(method, model, inputs, labels, columns, items)
        expected = gradients(model, whole)
        total = 0.0
        try:
            with method(model):
                for which in cut:
                    inputs, labels, columns = batch(method, which)
                    loss = method(model(**inputs), labels, items, **columns)
                    loss.backward()
                    total += loss.detach()
            found = {name: p.grad.clone() for name, p in model.named_parameters()}
        finally:
            model.zero_grad()
        close(total, whole, 2e-6)
        close(found, expected, 3e-6)


@pytest.mark.parametrize("case", cases("llama", "gemma3"))
def test_a_sequence_does_not_depend_on_the_batch(zoo, case):
    """Weights follow their sequence through another order, left padding and other company."""
    method, model = case.method, zoo(case.checkpoint)
    inputs, labels, columns = batch(method)
    seen = kr.sft.weigh(method, model, {**inputs, "labels": kr.sft.Labels.of(labels, columns)})
    inputs, labels, columns = batch(method, (2, 0, 3, 1), left=True)
    other = kr.sft.weigh(method, model, {**inputs, "labels": kr.sft.Labels.of(labels, columns)})
    for i, j in enumerate((2, 0, 3, 1)):
        assert torch.allclose(other.nll[i][other.target[i]], seen.nll[j][seen.target[j]], atol=2e-4)
        assert torch.allclose(other.score[i][other.target[i]], seen.score[j][seen.target[j]], atol=1e-3, rtol=1e-3)
        assert torch.allclose(other.weight[i][other.target[i]], seen.weight[j][seen.target[j]], atol=1e-3, rtol=1e-3)
    if not batch_level(method):
        inputs, labels, columns = batch(method, (1,))
        alone = kr.sft.weigh(method, model, {**inputs, "labels": kr.sft.Labels.of(labels, columns)})
        assert torch.allclose(alone.weight[0][alone.target[0]], seen.weight[1][seen.target[1]], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("case", cases("llama", without=lambda m: not hasattr(m, "scope")))
def test_a_selector_keeps_the_number_it_promises(zoo, case, keep):
    method = type(case.method)(**{**case.method.params(), "keep": keep})
    inputs, labels, columns = batch(method)
    seen = kr.sft.weigh(method, zoo(case.checkpoint), {**inputs, "labels": kr.sft.Labels.of(labels, columns)})
    assert set(seen.weight.unique().tolist()) <= {0.0, 1.0}
    targets, kept = seen.target.sum(1), seen.weight.sum(1)
    if method.scope != "sequence":
        targets, kept = targets.sum(), kept.sum()
    up = method.name == "SsToken"
    least = 0 if method.scope == "dataset" else 1
    exact = [-int(-n * keep // 1) if up else int(n * keep + 1e-9) for n in targets.flatten().tolist()]
    assert kept.flatten().tolist() == [max(least, n) for n in exact]


@pytest.mark.parametrize("case", cases("llama"))
def test_a_batch_without_targets_is_a_zero(zoo, case):
    model = zoo(case.checkpoint)
    inputs, labels, columns = batch(case.method)
    nothing = torch.full_like(labels, -100)
    for items in (None, torch.tensor(11)):
        loss = watched(case.method, model, inputs, nothing, columns, items)
        assert float(loss) == 0
        assert all(bool((g == 0).all()) for g in gradients(model, loss).values())
    assert float(case.method(model(**inputs), nothing, **columns)) == 0
    with torch.no_grad():
        assert float(case.method(model(**inputs), nothing, torch.tensor(0))) == 0


@pytest.mark.parametrize("case", cases("qwen2"))
def test_a_column_that_is_missing_or_broken_is_named(zoo, case):
    model = zoo(case.checkpoint)
    inputs, labels, columns = batch(case.method)
    for name in case.method.needed:
        with pytest.raises(ValueError, match=f"'{name}'|data = method.prepare"):
            watched(case.method, model, inputs, labels, {k: x for k, x in columns.items() if k != name})
    for name in (*case.method.needed, "weights"):
        value = columns.get(name, torch.ones(labels.shape)).float()
        with pytest.raises(ValueError, match=f"{name} holds NaN|scores hold NaN"):
            watched(case.method, model, inputs, labels, {**columns, name: torch.where(labels > 40, torch.nan, value)})
        with pytest.raises(ValueError, match=rf"{name} must be a tensor \(4, 24\).*got \(4, 23\)"):
            watched(case.method, model, inputs, labels, {**columns, name: value[:, 1:]})
    for wrong in (-1.0, torch.inf):
        with pytest.raises(ValueError, match="weights must be finite and not negative"):
            weights = torch.full(labels.shape, wrong)
            watched(case.method, model, inputs, labels, {**columns, "weights": weights})


@pytest.mark.parametrize("case", cases("llama", "gemma3"))
def test_the_model_is_as_before(zoo, case):
    model = zoo(case.checkpoint)
    inputs, labels, columns = batch(case.method)
    before = model(**inputs).logits
    watched(case.method, model, inputs, labels, columns)
    with pytest.raises(RuntimeError, match="stop"), case.method(model):
        model(**inputs)
        raise RuntimeError("stop")
    with case.method(model):
        assert model(**inputs).logits.shape[1] == 1, "logits were made all the same"
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, before)
            plain = case.method(model(**inputs), labels)  # evaluation: no column is needed
        close(plain, model(**inputs, labels=labels).loss)
    assert torch.equal(model(**inputs).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("case", cases("llama", "qwen2"))
def test_repr_rebuilds_and_repeats(zoo, case):
    rebuilt = eval(repr(case.method), vars(kr.sft))
    assert rebuilt == case.method and hash(rebuilt) == hash(case.method)
    model = zoo(case.checkpoint)
    inputs, labels, columns = batch(case.method)
    first = watched(case.method, model, inputs, labels, columns)
    assert torch.equal(watched(rebuilt, model, inputs, labels, columns), first)


@pytest.mark.parametrize("case", cases("llama", "qwen2"))
def test_in_bf16_the_weights_agree(zoo, case):
    exact, low = zoo.exact(case.checkpoint), zoo(case.checkpoint, torch.bfloat16)
    inputs, labels, columns = batch(case.method)
    made = {**inputs, "labels": kr.sft.Labels.of(labels, columns)}
    a, b = (kr.sft.weigh(case.method, model, made) for model in (exact, low))
    assert torch.isfinite(watched(case.method, low, inputs, labels, columns))
    close_by = (a.weight[a.target] - b.weight[b.target]).abs() <= 0.1 * (1 + a.weight[a.target])
    # a choice may turn on a difference that bf16 cannot see; weights of a wide model move with its logits
    assert float(close_by.float().mean()) >= 0.75


@pytest.mark.parametrize("name", METHODS)
def test_bad_settings_are_refused(name):
    with pytest.raises(ValueError, match="denominator must be one of"):
        build(name, denominator="mean")
    method = build(name)
    if hasattr(method, "keep"):
        for keep in (0, -0.1, 1.2, float("nan"), True, "half"):
            with pytest.raises(ValueError, match=r"keep must lie in \(0, 1\]"):
                build(name, keep=keep)
    if isinstance(method, Selector):
        with pytest.raises(ValueError, match="scope must be one of"):
            build(name, scope="everywhere")
    for field in fields(method):
        if isinstance(field.default, float) and field.name != "keep":
            with pytest.raises(ValueError, match=field.name):
                build(name, **{field.name: float("nan")})


@pytest.mark.parametrize("name", METHODS)
def test_labels_and_logits_must_fit(name):
    method = build(name)
    logits = torch.zeros(2, 5, VOCABULARY, requires_grad=True)
    for labels, told in (
        (None, "labels must be a tensor"),
        (torch.zeros(5).long(), "labels must be a tensor"),
        (torch.zeros(2, 4).long(), "must share batch and length"),
        (torch.full((2, 5), VOCABULARY), "labels must lie in"),
    ):
        with pytest.raises(ValueError, match=told):
            method(logits, labels)
    with pytest.raises(ValueError, match="outputs must hold logits"):
        method({"loss": 1}, torch.zeros(2, 5).long())
