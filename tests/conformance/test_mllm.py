"""What every registered visual-token method must pass, on every architecture it lists. Nothing here is for one method.

Methods come from the registry; a new one is judged as soon as it is registered. The tables below say only what cannot
be read off a method: settings small enough for a tiny prompt, further settings worth running, counts that a paper
states differently, and how precision may change a choice.

The measure of a run is `replay`: the model's own decoder layers, called one after the other on the whole sequence with
what is gone hidden column by column. It shares no line with the session.
"""

import ast
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel, StaticCache

import keeprate as kr
from keeprate import Budget
from keeprate.kv import KVLayer
from keeprate.mllm import MLLMMethod

from .multimodal import BOS, FIRST, IMAGE, LAYERS, MULTIMODAL, Models, image_token, inputs, pictures

TABLE = kr.methods("mllm").set_index("name")
METHODS = list(TABLE.index)
IMAGES = (((2, 1.5),), ((1, 1),), ((1, 1.5), (1, 1)))  # sizes of every sample's pictures
LENGTHS = (12, 19, 14)  # text tokens
NEW, TURN = 5, 4  # tokens of an answer, and of a second question
SEQUENCE = [name for name, row in MULTIMODAL.items() if row[0] != "mllama"]

# settings that fit six layers and a few dozen visual tokens
SMALL: dict[str, dict] = {}
# settings that take another path through a method
VARIANTS: list[tuple[str, dict]] = [
    ("PyramidDrop", {"keep": (0.75, 10, 1), "layers": (1, 2, 5)}),
    ("FastV", {"keep": 9, "layer": 3}),
    ("FastV", {"keep": Budget(coverage=0.8)}),
    ("FasterVLM", {"keep": Budget(coverage=0.8)}),
    ("Pooling", {"mode": "max"}),
    ("DivPrune", {"keep": Budget(tokens=1)}),
    ("SparseVLM", {"tau": 0.0}),
    ("SparseVLM", {"rank": 1.0}),
    ("MustDrop", {"similarity": -1.0}),
    ("MustDrop", {"keep": Budget(threshold=0.03)}),
    ("FiCoCo", {"epsilon": 0.8}),
    ("BTP", {"leave": False}),
    ("CoreMatching", {"keep": kr.mllm.Knee()}),
    ("DART", {"keep": 3}),
    ("TransPrune", {"guidance": 0.0}),
    ("TRIM", {"keep": None}),
    ("RecoverableCompression", {"keep": None}),
    ("PruMerge", {"keep": kr.mllm.PruMerge().keep}),
    ("TSC", {"aggregate": "nearest"}),
    ("ToDRE", {"objective": "max_min", "tau": 1.0}),
    ("GreedyPrune", {"tau": 0.3, "layer": 0}),
    ("Script", {"redundant": 0.0}),
    ("GAP", {"base": kr.mllm.FastV()}),
    ("AttentionDebiasing", {"slope": 0.01, "base": kr.mllm.PyramidDrop()}),
]
POLICY = {"GAP": ("keep",)}  # position policies, where a method is about one of them
STOCHASTIC = {"RandomVisual", "RandomInside"}  # drawn for the batch as a whole
BLIND = {"RandomVisual", "RandomInside", "UniformGrid", "Pooling"}  # never look at the pictures
SEEDED = {"ZOOPrune"}  # draws numbers, the same ones for every picture
REWRITES = {"Pooling", "TRIM", "FlowCut"}  # not called merging, but what is left is not what was there
FUTURE = {"OracleVisual"}  # made for one batch
WORDS: set[str] = set()  # read the question as text
AGREEMENT: dict[str, float] = {}  # share of kept tokens on which bf16 must agree with fp32; 0.85 for the others


def build(name: str, **params) -> MLLMMethod:
    """A method at the suite's settings."""
    names = {f.name for f in fields(kr.method(name))}
    settings = {**({"keep": 0.5} if "keep" in names else {}), **SMALL.get(name, {}), **params}
    return kr.method(name, **settings)


@dataclass(frozen=True)
class Case:
    """One method, in one setting, on one checkpoint."""

    method: MLLMMethod
    checkpoint: str

    @property
    def id(self) -> str:
        return f"{self.method!r}-{self.checkpoint}"

    def __call__(self, model, samples: int = len(IMAGES), **options) -> AbstractContextManager:
        """The method on a model, with questions for those that read them."""
        if self.method.name in WORDS:
            options["text"] = QUESTIONS[:samples]
        return self.method(model, **options)


QUESTIONS = ["what is in the upper left corner", "is there a seven", "how many birds"]


def listed(name: str) -> list[str]:
    """Checkpoints of the architectures a method lists."""
    architectures = TABLE.loc[name, "architectures"].split(", ")
    return [checkpoint for checkpoint, row in MULTIMODAL.items() if row[0] in architectures]


def cases(*, variants: bool = True, without: set[str] = frozenset(), only: Sequence[str] = tuple(MULTIMODAL)) -> list:
    """Every method on every checkpoint it supports, and the further settings on two of them."""
    found = [
        Case(build(name), checkpoint)
        for name in METHODS
        if name not in without | FUTURE
        for checkpoint in listed(name)
        if checkpoint in only
    ]
    if variants:
        found += [
            Case(build(name, **params), checkpoint)
            for name, params in VARIANTS
            if name not in without
            for checkpoint in ("llava_next", "qwen2_5_vl")
            if checkpoint in listed(name) and checkpoint in only
        ]
    return [pytest.param(case, id=case.id) for case in found]


every_method = pytest.mark.parametrize("name", [name for name in METHODS if name not in FUTURE])
POLICIES = pytest.mark.parametrize("positions", ["keep", "compact"])


# --- the measure ------------------------------------------------------------------------------------------------------


def visual_tokens(batch: dict, checkpoint: str) -> torch.Tensor:
    """[b, n] where the placeholders are."""
    return batch["input_ids"] == image_token(checkpoint)


def gone(trace, visual: torch.Tensor, middle: bool = False) -> list[torch.Tensor]:
    """For every layer [b, n]: visual tokens that are no longer there when its attention runs."""
    rank = (visual.cumsum(1) - 1).clamp_min(0)
    hidden = []
    for layer in range(trace.depth):
        past = [step for step in trace.steps if step.layer + (middle and step.layer > 0) <= layer]
        alive = torch.ones(len(visual), int(visual.sum(1).max()) + 1, dtype=torch.bool)
        if past:
            alive = torch.zeros_like(alive).scatter(1, past[-1].kept + 1, True)[:, 1:]
        hidden.append(visual & ~alive.gather(1, rank))
    return hidden


@torch.no_grad()
def replay(
    model,
    batch: dict,
    hidden: list[torch.Tensor],
    compact: bool,
    given: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None,
    middle: bool = False,
    late: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits [b, n, vocabulary] of the plain decoder layers, with some columns hidden from each.

    Args:
        model: In-sequence multimodal model.
        batch: Keyword arguments of its forward pass; answers may be appended to the ids.
        hidden: For every layer [b, n'] what is not there, n' <= n.
        compact: Whether positions are numbered without gaps in every layer, where a sample has lost something.
        given: Layer -> (hidden states [b, n', d] that enter it, which of them to take [b, n']): merged tokens.
        middle: Whether `given` comes between attention and MLP of its layer instead.
        late: [b, n'] also hidden, in every layer, from tokens behind the n' of the prompt.
    """
    body, seen = model.model.language_model, {}
    handle = body.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    try:
        model(**batch)
    finally:
        handle.remove()
    x, real = seen["inputs_embeds"], batch["attention_mask"].bool()
    b, n = real.shape
    prompt = hidden[0].shape[1]
    own = seen.get("position_ids")
    own = torch.arange(n).expand(b, n) if own is None else own
    causal, eye = torch.ones(n, n, dtype=torch.bool).tril(), torch.eye(n, dtype=torch.bool)
    new = (torch.arange(n) >= prompt)[:, None]
    for number, (layer, out) in enumerate(zip(body.layers, hidden, strict=True)):
        there = real & ~torch.nn.functional.pad(out, (0, n - prompt))
        mask = causal & there[:, None]
        if late is not None:
            mask = mask & ~(torch.nn.functional.pad(late, (0, n - prompt))[:, None] & new)
        anew = (there.cumsum(1) - 1).clamp_min(0)
        position = torch.where(out.any(1, keepdim=True), anew, own) if compact else own
        around = {"attention_mask": (mask | eye)[:, None], "position_embeddings": body.rotary_emb(x, position)}
        if not given or number not in given:
            x = layer(x, **around)
            continue
        values, which = (torch.nn.functional.pad(y, (0, 0) * (y.dim() - 2) + (0, n - prompt)) for y in given[number])
        if middle:
            x = x + layer.self_attn(layer.input_layernorm(x), **around)[0]
            x = torch.where(which[..., None], values, x)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        else:
            x = layer(torch.where(which[..., None], values, x), **around)
    return model.lm_head(body.norm(x))


def longer(batch: dict, ids: torch.Tensor) -> dict:
    """The batch with more text behind it."""
    more = ids.shape[1] - batch["input_ids"].shape[1]
    made = {**batch, "input_ids": ids}
    made["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, more), value=1)
    if "mm_token_type_ids" in batch:
        made["mm_token_type_ids"] = torch.nn.functional.pad(batch["mm_token_type_ids"], (0, more))
    if "cross_attention_mask" in batch:
        seen = batch["cross_attention_mask"]
        made["cross_attention_mask"] = torch.cat([seen, seen[:, -1:].expand(-1, more, -1, -1)], 1)
    return made


def generate(model, batch: dict, new: int = NEW, **more) -> SimpleNamespace:
    """Greedy answer: sequences, logits [b, new, vocabulary], past_key_values."""
    out = model.generate(
        **batch,
        max_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        **more,
    )
    return SimpleNamespace(sequences=out.sequences, logits=torch.stack(out.logits, 1), cache=out.past_key_values)


def follow(model, first: SimpleNamespace, batch: dict, new: int = 3) -> SimpleNamespace:
    """A second question behind the first answer, on the same cache."""
    g = torch.Generator().manual_seed(7)
    question = torch.randint(FIRST, 90, (len(first.sequences), TURN), generator=g)
    ids = torch.cat([first.sequences, question], 1)
    keys = ("input_ids", "attention_mask", "cross_attention_mask")
    text = {key: value for key, value in longer(batch, ids).items() if key in keys}
    return generate(model, text, new, past_key_values=first.cache)


def close(found: torch.Tensor, want: torch.Tensor, tolerance: float = 2e-4) -> None:
    """Equal up to the rounding of fp32, at logits of order 5."""
    torch.testing.assert_close(found, want, rtol=1e-4, atol=tolerance)


def state(model) -> dict:
    """Everything that a method could leave behind in a model."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return {
        "attention": [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "hooks": [len(getattr(m, h)) for m in model.modules() for h in hooks],
        "training": [m.training for m in model.modules()],
        "gradients": [p.requires_grad for p in model.parameters()],
        "weights": [p._version for p in model.parameters()],  # counts every write in place
        "storage": [p.data_ptr() for p in model.parameters()],
    }


class Bench:
    """Results that several tests look at, computed once."""

    def __init__(self, models: Models):
        self.models, self.held = models, {}

    def once(self, key: tuple, compute: Callable):
        if key not in self.held:
            self.held[key] = compute()
        return self.held[key]

    def batch(self, checkpoint: str) -> dict:
        """Three samples of different lengths, with one or two pictures of different sizes."""
        return self.once(("batch", checkpoint), lambda: inputs(checkpoint, IMAGES, LENGTHS))

    def alone(self, checkpoint: str, i: int) -> dict:
        """One of its samples."""
        return inputs(checkpoint, IMAGES[i : i + 1], LENGTHS[i : i + 1], seed=i)

    @torch.no_grad()
    def _dense(self, checkpoint: str) -> SimpleNamespace:
        model, batch = self.models(checkpoint), self.batch(checkpoint)
        answer = generate(model, batch)
        before = state(model)
        turn = follow(model, answer, batch)
        return SimpleNamespace(logits=model(**batch).logits, answer=answer, turn=turn, state=before)

    def dense(self, checkpoint: str) -> SimpleNamespace:
        """What the plain model gives: logits, answer, second answer; and its state."""
        return self.once(("dense", checkpoint), lambda: self._dense(checkpoint))

    @torch.no_grad()
    def _run(self, case: Case) -> SimpleNamespace:
        model, batch = self.models(case.checkpoint), self.batch(case.checkpoint)
        with case(model) as trace:
            out = model(**batch)
            held = [layer.kept() for layer in out.past_key_values.layers if isinstance(layer, KVLayer)]
        return SimpleNamespace(logits=out.logits, trace=trace, held=held)

    def run(self, case: Case) -> SimpleNamespace:
        """One forward pass: logits, trace, and what every layer's cache holds."""
        return self.once(("run", case), lambda: self._run(case))

    @torch.no_grad()
    def _masked(self, case: Case) -> SimpleNamespace:
        model, batch = self.models(case.checkpoint), self.batch(case.checkpoint)
        entered, handles = {}, []
        with case(model, masked=True) as trace:
            for number, layer in enumerate(model.model.language_model.layers):

                def note(module, args, kwargs, number=number):
                    entered[number] = (args[0] if args else kwargs["hidden_states"]).clone()

                where = layer.post_attention_layernorm if case.method.middle else layer
                handles.append(where.register_forward_pre_hook(note, with_kwargs=True))
            try:
                logits = model(**batch).logits
            finally:
                for handle in handles:
                    handle.remove()
        with case(model, masked=True):
            answer = generate(model, batch)
        return SimpleNamespace(logits=logits, trace=trace, entered=entered, answer=answer)

    def masked(self, case: Case) -> SimpleNamespace:
        """The same with a mask in place of removal, and what entered every layer."""
        return self.once(("masked", case), lambda: self._masked(case))

    @torch.no_grad()
    def _talk(self, case: Case) -> SimpleNamespace:
        model, batch = self.models(case.checkpoint), self.batch(case.checkpoint)
        with case(model) as trace:
            answer = generate(model, batch)
            turn = follow(model, answer, batch)
        return SimpleNamespace(answer=answer, turn=turn, trace=trace)

    def talk(self, case: Case) -> SimpleNamespace:
        """An answer and a second one."""
        return self.once(("talk", case), lambda: self._talk(case))

    def assert_untouched(self, checkpoint: str) -> None:
        """The model is as before, and gives what it gave."""
        model, dense = self.models(checkpoint), self.dense(checkpoint)
        assert state(model) == dense.state
        with torch.no_grad():
            assert torch.equal(model(**self.batch(checkpoint)).logits, dense.logits)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(Models(tmp_path_factory.mktemp("multimodal")))


def merges(case: Case) -> bool:
    """Whether tokens that are left hold more than themselves."""
    kind = TABLE.loc[case.method.name, "kind"]
    return kind == "merging" or case.method.name in REWRITES


def given(bench: Bench, case: Case) -> dict | None:
    """What enters a layer in which tokens were merged, for `replay`."""
    if not merges(case):
        return None
    masked, visual = bench.masked(case), visual_tokens(bench.batch(case.checkpoint), case.checkpoint)
    lost = gone(masked.trace, visual)  # a layer that merges holds what is left of it
    return {layer: (masked.entered[layer], visual & ~lost[layer]) for layer in masked.trace.layers}


# --- the checkpoints are what the suite needs -------------------------------------------------------------------------


def test_every_listed_architecture_has_a_checkpoint():
    architectures = {a for row in TABLE["architectures"] for a in row.split(", ")}
    assert architectures <= {row[0] for row in MULTIMODAL.values()}


@pytest.mark.parametrize("checkpoint", MULTIMODAL)
def test_checkpoints_are_what_they_claim(bench, checkpoint):
    """Padding and neighbours change nothing in the plain model, pictures change everything, in either padding."""
    model, dense, batch = bench.models(checkpoint), bench.dense(checkpoint), bench.batch(checkpoint)
    right = inputs(checkpoint, IMAGES, LENGTHS, padding="right")
    other = {**batch, "pixel_values": batch["pixel_values"].flip(-1, -2)}
    with torch.no_grad():
        padded, changed = model(**right).logits, model(**other).logits
        for i in range(len(IMAGES)):
            sample = bench.alone(checkpoint, i)
            logits = model(**sample).logits[0]
            close(dense.logits[i, -len(logits) :], logits)
            close(padded[i, : len(logits)], logits)
            close(dense.answer.logits[i], generate(model, sample).logits[0])
    assert (changed - dense.logits)[:, -1].abs().amax(1).min() > 0.1
    assert not (dense.answer.sequences[:, batch["input_ids"].shape[1] :] < FIRST).any()  # no placeholder, no end


@pytest.mark.parametrize("checkpoint", SEQUENCE)
def test_replay_is_the_model(bench, checkpoint):
    """With nothing hidden it gives the model's logits; one hidden token of dozens is more than the tolerance."""
    batch, dense, model = bench.batch(checkpoint), bench.dense(checkpoint), bench.models(checkpoint)
    visual = visual_tokens(batch, checkpoint)
    none = [torch.zeros_like(visual)] * LAYERS
    real = batch["attention_mask"].bool()
    assert torch.equal(replay(model, batch, none, False)[real], dense.logits[real])
    turns = longer(batch, dense.turn.sequences)
    logits = replay(model, turns, none, False)
    n = visual.shape[1]
    close(logits[:, n - 1 : n - 1 + NEW], dense.answer.logits)
    close(logits[:, -dense.turn.logits.shape[1] - 1 : -1], dense.turn.logits)
    one = visual & (visual.cumsum(1) == 9)
    for hidden in ([one] * LAYERS, [*none[:-2], one, one]):
        assert (replay(model, batch, hidden, False) - dense.logits)[:, -1].abs().amax(1).min() > 4e-3


# --- 1: everything kept is bit-identical ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases(variants=False))
def test_asked_for_everything_it_changes_nothing(bench, case):
    """keep=1 gives bit-identical logits, while generating and in a second turn; masked or not."""
    case = Case(build(case.method.name, keep=1.0), case.checkpoint)
    model, batch, dense = bench.models(case.checkpoint), bench.batch(case.checkpoint), bench.dense(case.checkpoint)
    with torch.no_grad(), case(model) as trace:
        assert torch.equal(model(**batch).logits, dense.logits)
        answer = generate(model, batch)
        assert torch.equal(answer.logits, dense.answer.logits)
        assert torch.equal(follow(model, answer, batch).logits, dense.turn.logits)
    assert (trace.counts() == trace.total[:, None].cpu()).all()
    with torch.no_grad(), case(model, masked=True):
        assert torch.equal(model(**batch).logits, dense.logits)


# --- 2: the model is as before ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases(variants=False))
def test_the_model_is_as_before(bench, case):
    """After the block, after an exception in it or in a layer; on, off and on again gives the same."""
    model, batch = bench.models(case.checkpoint), bench.batch(case.checkpoint)
    bench.assert_untouched(case.checkpoint)
    with pytest.raises(KeyError, match="mine"), torch.no_grad(), case(model):
        model(**batch)
        raise KeyError("mine")
    bench.assert_untouched(case.checkpoint)
    blown = {**batch, "pixel_values": batch["pixel_values"].clone()}
    blown["pixel_values"].view(-1)[7] = float("nan")
    with pytest.raises(ValueError, match="NaN"), torch.no_grad(), case(model):
        model(**blown)
    bench.assert_untouched(case.checkpoint)
    first = bench.run(case).logits
    with torch.no_grad(), case(model):
        assert torch.equal(model(**batch).logits, first)


def test_an_exception_inside_a_layer_leaves_the_model_as_before(bench):
    model, batch = bench.models("qwen2_5_vl"), bench.batch("qwen2_5_vl")
    bench.dense("qwen2_5_vl")

    def fail(*_):
        raise KeyError("inside the fourth layer")

    for method in (kr.mllm.DivPrune(keep=0.5), kr.mllm.FastV(keep=0.5)):
        handle = model.model.language_model.layers[3].mlp.register_forward_hook(fail)
        with pytest.raises(KeyError, match="fourth layer"), torch.no_grad(), method(model):
            model(**batch)
        handle.remove()
        bench.assert_untouched("qwen2_5_vl")


@pytest.mark.parametrize("checkpoint", SEQUENCE)
def test_after_the_block_it_is_a_fresh_model(bench, checkpoint):
    """Answers and second turns, on the block's own model and on one that never saw a method."""
    used, fresh = bench.models.fresh(checkpoint), bench.models.fresh(checkpoint)
    batch, other = bench.batch(checkpoint), inputs(checkpoint, IMAGES[2:], (17,), seed=40)
    for method in (kr.mllm.FasterVLM(keep=0.4), kr.mllm.PyramidDrop(keep=0.4)):
        with torch.no_grad(), method(used):
            answer = generate(used, other)
            follow(used, answer, other)
        want, found = generate(fresh, batch), generate(used, batch)
        assert torch.equal(found.logits, want.logits)
        assert torch.equal(follow(used, found, batch).logits, follow(fresh, want, batch).logits)


# --- 3, 4: what is kept -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases(only=SEQUENCE))
def test_kept_tokens_are_sorted_unique_nested_and_counted(bench, case):
    run, dense = bench.run(case), bench.dense(case.checkpoint)
    assert run.logits.isfinite().all()
    assert not torch.equal(run.logits[:, -1], dense.logits[:, -1]), "nothing was reduced"
    trace, drawn = run.trace, pictures(case.checkpoint, IMAGES)
    total = [sum(p.tokens for p in sample) for sample in drawn]
    assert trace.total.tolist() == total and trace.batches == [len(IMAGES)]
    assert trace.layers == sorted(trace.layers) and trace.layers
    present, alive = [set(range(n)) for n in total], total
    for step in trace.steps:
        count = (step.size > 0).sum(1).tolist()
        for i, row in enumerate(step.kept.tolist()):
            own = [token for token in row if token >= 0]
            assert own == sorted(set(own)), "sorted and unique"
            assert set(own) <= present[i], "a token that was gone came back"
            least, most = bounds(case.method, step, drawn[i], alive[i])
            assert least <= count[i] <= most, (step.layer, i, count[i], least, most)
            assert len(own) == count[i]
            present[i] = set(own)
            members = step.assignment[i, : total[i]]
            assert torch.bincount(members[members >= 0], minlength=len(row)).tolist() == step.size[i].tolist()
            assert (step.assignment[i, total[i] :] == -1).all()
        if step.score is not None:
            assert not step.score[: len(total), : min(total)].isnan().all()
        alive = count
    assert trace.counts()[:, -1].tolist() == alive
    assert trace.mean_tokens == pytest.approx(trace.counts().float().mean().item())


def bounds(method: MLLMMethod, step, sample: list, before: int) -> tuple[int, int]:
    """(least, most) visual tokens a sample may have left after a reduction, as each paper states it.

    Before the language model a budget is each picture's own, line ends apart; inside it is the sample's.
    """
    method = getattr(method, "base", method)
    total = sum(p.tokens for p in sample)
    views = [(p.tokens - p.ends) // p.views for p in sample for _ in range(p.views)]
    if method.keep is None or (isinstance(method.keep, Budget) and method.keep.tokens is None):
        return 0, before
    if method.name in COUNTS:
        stage = 0 if step.layer == 0 else method.layers_at(LAYERS).index(step.layer) + 1
        return COUNTS[method.name](method, stage, views, total, before)
    inside = step.layer in method.layers_at(LAYERS)
    exact = share(method.keep, total) if inside else sum(share(method.keep, n) for n in views)
    return exact, exact


def share(entry: float | int | Budget, n: int) -> int:
    """A share or a number of n tokens, at least one."""
    entry = entry.tokens if isinstance(entry, Budget) else entry
    return min(n, entry) if type(entry) is int else max(1, int(n * entry + 1e-6))


def _power(method, stage, views, total, before):
    """keep^stage, or a schedule."""
    exact = share(method.keep[stage - 1] if isinstance(method.keep, tuple) else method.keep**stage, total)
    return exact, exact


def _ratios(method, stage, views, total, before):
    """Stages that approach the last count with equal ratios; BTP lets all leave after them."""
    stages, end = len(method.layers_at(LAYERS)), share(method.keep, total)
    if method.name == "BTP" and method.leave:
        stages -= 1
        if stage > stages:
            return 0, 0
    exact = max(1, int(total * (end / total) ** (stage / stages) + 1e-6))
    return exact, exact


def _recycled(method, stage, views, total, before):
    """SparseVLM: some of what was cut is clustered into a few more tokens; or the rank of attention says how many."""
    if method.rank is not None:
        return 1, before
    exact = _ratios(method, stage, views, total, before)[0]
    if method.tau:
        recycled = min(int((before - exact) * method.tau) + 1, before - exact)
        exact += min(int(recycled * method.theta) + 1, recycled)
    return exact, exact


def _with_key_set(method, stage, views, total, before):
    """MustDrop: windows may merge before; inside, a key set comes on top."""
    if stage == 0:
        return total // method.window**2, total
    exact = min(_ratios(method, stage, views, total, before)[0], before)
    return exact, min(before, exact + math.ceil(method.key * total))


def _evenly(method, stage, views, total, before):
    """FiCoCo: as many a layer."""
    exact = total - (total - share(method.keep, total)) * stage // len(method.layers_at(LAYERS))
    return exact, exact


def _two(method, stage, views, total, before):
    """A mean of 1/2 over the layers: 3/4 before the middle and 1/4 behind it; the second a third of the first."""
    if stage == 0:
        exact = sum(int(n * 0.75 + 1e-6) for n in views)
        return exact, exact
    return before // 3, before // 3 + 1


def _parting(method, stage, views, total, before):
    """ToDRE: a share before; inside, all of them or none leave."""
    exact = sum(share(method.keep, n) for n in views)
    return (exact, exact) if stage == 0 else (0, 0)


def _blocks(method, stage, views, total, before):
    """Pooling: whole blocks, the largest product of two numbers below the share."""
    most = sum(share(method.keep, n) for n in views)
    return most // 2, most


COUNTS: dict[str, Callable] = {
    "PyramidDrop": _power,
    "BTP": _ratios,
    "TransPrune": _ratios,
    "SparseVLM": _recycled,
    "MustDrop": _with_key_set,
    "FiCoCo": _evenly,
    "STAR": _two,
    "VScan": _two,
    "ToDRE": _parting,
    "Pooling": _blocks,
}


@pytest.mark.parametrize("case", cases(only=SEQUENCE))
def test_text_stays_and_caches_hold_what_the_trace_says(bench, case):
    """The arrival numbers in every layer's cache are the text and what the trace calls kept; padding aside."""
    run, batch = bench.run(case), bench.batch(case.checkpoint)
    visual, real = visual_tokens(batch, case.checkpoint), batch["attention_mask"].bool()
    lost = gone(run.trace, visual, case.method.middle)
    if case.method.output_aware:
        lost = [gone(run.trace, visual)[-1]] * LAYERS
    for held, out in zip(run.held, lost, strict=True):
        there = torch.zeros(*real.shape[:1], real.shape[1] + 1, dtype=torch.bool)
        there = there.scatter(1, held[:, 0] + 1, True)[:, 1:]
        assert (held == held[:, :1]).all(), "heads differ"
        assert torch.equal(there & real, real & ~out)
    # what was dropped has no hidden state in the last layer: its logits are exactly zero
    last = gone(run.trace, visual)[-1]
    assert (run.logits[last] == 0).all()
    assert run.logits[real & ~visual].abs().amax(-1).min() > 0.5


# --- 7: masked = removed = the plain layers with columns hidden -------------------------------------------------------


@pytest.mark.parametrize("case", cases(only=SEQUENCE))
def test_masked_equals_removed(bench, case):
    """Hiding what a method drops gives what removing it gives, while generating too."""
    run, masked = bench.run(case), bench.masked(case)
    visual = visual_tokens(bench.batch(case.checkpoint), case.checkpoint)
    text = bench.batch(case.checkpoint)["attention_mask"].bool() & ~visual
    close(masked.logits[text], run.logits[text])
    close(masked.answer.logits, bench.talk(case).answer.logits)
    for a, b in zip(masked.trace.steps, run.trace.steps, strict=True):
        assert a.layer == b.layer
        for x, y in ((a.kept, b.kept), (a.size, b.size), (a.assignment, b.assignment)):
            assert torch.equal(x[: len(IMAGES)], y)


@POLICIES
@pytest.mark.parametrize("case", cases(only=SEQUENCE))
def test_removal_is_the_plain_layers_with_columns_hidden(bench, case, positions):
    """Prompt, answer and second question, under both position policies, equal the measure that knows no session."""
    if positions not in POLICY.get(case.method.name, ("keep", "compact")):
        with pytest.raises(ValueError, match="positions must be one of"):
            type(case.method)(**{**case.method.params(), "positions": positions})
        return
    case = Case(type(case.method)(**{**case.method.params(), "positions": positions}), case.checkpoint)
    model, batch = bench.models(case.checkpoint), bench.batch(case.checkpoint)
    visual, talk, run = visual_tokens(batch, case.checkpoint), bench.talk(case), bench.run(case)
    lost = gone(run.trace, visual, case.method.middle)
    late = gone(run.trace, visual)[-1] if case.method.output_aware else None
    n, new = visual.shape[1], talk.turn.logits.shape[1]
    logits = replay(
        model,
        longer(batch, talk.turn.sequences),
        lost,
        positions == "compact",
        given(bench, case),
        case.method.middle,
        late,
    )
    left = batch["attention_mask"].bool() & ~gone(run.trace, visual)[-1]
    close(run.logits[left], logits[:, :n][left])
    close(talk.answer.logits, logits[:, n - 1 : n - 1 + NEW])
    close(talk.turn.logits, logits[:, -new - 1 : -1])


@torch.no_grad()
def replay_cross(model, batch: dict, hidden: torch.Tensor, prompt: int) -> torch.Tensor:
    """`replay` for images read through cross-attention: the first such layer decides, the later ones see less.

    Args:
        model, batch: As in `replay`.
        hidden: [b, m] image features that are not there any more.
        prompt: Tokens behind which the first layer sees less, too.
    """
    layers = [layer for layer in model.model.language_model.layers if hasattr(layer, "cross_attn")]
    handles = []
    for number, layer in enumerate(layers):

        def hide(module, args, kwargs, number=number):
            mask = kwargs["cross_attention_mask"]
            rows = torch.arange(mask.shape[2]) >= (0 if number else prompt)
            lost = hidden[:, None, None] & rows[:, None]
            return args, {**kwargs, "cross_attention_mask": mask.masked_fill(lost, torch.finfo(mask.dtype).min)}

        handles.append(layer.register_forward_pre_hook(hide, with_kwargs=True))
    try:
        return model(**batch).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("case", cases(only=["mllama"]))
def test_image_features_of_cross_attention(bench, case):
    """Counts, caches, removal and masking where images are no part of the sequence."""
    model, batch, dense = bench.models("mllama"), bench.batch("mllama"), bench.dense("mllama")
    run, talk = bench.run(case), bench.talk(case)
    config = model.config.text_config
    tiles = torch.tensor([sum(p.views for p in sample) for sample in pictures("mllama", IMAGES)])
    total = tiles * model.model.vision_model.num_patches
    assert run.trace.total.tolist() == total.tolist()
    (kept,), n = run.trace.kept, batch["input_ids"].shape[1]
    seen = batch["cross_attention_mask"].amax(1).repeat_interleave(model.model.vision_model.num_patches, 2).flatten(1)
    alive = torch.zeros(len(kept), seen.shape[1] + 1, dtype=torch.bool).scatter(1, kept + 1, True)[:, 1:]
    least = (total * 0.5 + 1e-6).long()
    counts = alive.sum(1)
    assert (alive <= seen.bool()).all() and (counts >= least).all() and (counts <= 4 * least).all()
    assert (counts < total).all(), "nothing was dropped"
    assert torch.equal(run.trace.counts(), torch.stack([total, counts], 1)[:, : len(config.cross_attention_layers)])
    for row in kept.tolist():
        assert row == sorted(row, key=lambda t: (t < 0, t)) and len({t for t in row if t >= 0}) == sum(
            t >= 0 for t in row
        )
    logits = replay_cross(model, longer(batch, talk.turn.sequences), seen.bool() & ~alive, n)
    real = batch["attention_mask"].bool()
    assert not torch.allclose(run.logits[:, -1], dense.logits[:, -1], atol=1e-2)
    close(run.logits[real], logits[:, :n][real])
    close(talk.answer.logits, logits[:, n - 1 : n - 1 + NEW])
    close(talk.turn.logits, logits[:, -talk.turn.logits.shape[1] - 1 : -1])
    with torch.no_grad(), case(model, masked=True) as trace:
        close(model(**batch).logits[real], run.logits[real])
        close(generate(model, batch).logits, talk.answer.logits)
    assert torch.equal(trace.kept[0][: len(kept)], kept)
    with torch.no_grad(), case(model):
        cache = model(**batch).past_key_values
        held = [cache.layers[i].keys.shape[2] for i in config.cross_attention_layers]
        assert held == [int(counts.max())] * len(held), "features that were dropped are in the cache"


# --- 6: neighbours and padding change nothing -------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases(without=STOCHASTIC))
def test_padding_and_neighbours_change_nothing(bench, case):
    """A left-padded batch of prompts with different pictures gives what each prompt gives alone."""
    model, talk, run = bench.models(case.checkpoint), bench.talk(case), bench.run(case)
    for i in range(len(IMAGES)):
        sample = bench.alone(case.checkpoint, i)
        options = {"text": QUESTIONS[i : i + 1]} if case.method.name in WORDS else {}
        with torch.no_grad(), case.method(model, **options) as trace:
            logits = model(**sample).logits[0]
            answer = generate(model, sample)
        close(run.logits[i, -len(logits) :], logits)
        close(talk.answer.logits[i], answer.logits[0])
        own = dict(zip(trace.layers, trace.kept, strict=True))
        whole = torch.arange(int(trace.total[0]))[None]  # what a reduction is to a sample that loses nothing in it
        for layer, together in zip(run.trace.layers, run.trace.kept, strict=True):
            assert [t for t in together[i].tolist() if t >= 0] == [
                t for t in own.get(layer, whole)[0].tolist() if t >= 0
            ]


# --- 5: chance --------------------------------------------------------------------------------------------------------


@every_method
def test_the_seed_decides(bench, name):
    """Same seed, same result, whatever torch's own generator does; only a stochastic method follows the seed."""
    case = Case(build(name), listed(name)[0])
    model, batch, logits = bench.models(case.checkpoint), bench.batch(case.checkpoint), []
    for seed in (0, 0, 1):
        torch.manual_seed(len(logits))
        with torch.no_grad(), case(model, seed=seed):
            logits.append(model(**batch).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2]) != (name in STOCHASTIC | SEEDED)


# --- 9: precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in METHODS if name not in FUTURE | BLIND])
def test_bf16_keeps_what_fp32_keeps(bench, name):
    """At the first reduction, away from ties; scores are fp32 either way."""
    case = Case(build(name), listed(name)[0])
    batch, sets = bench.batch(case.checkpoint), []
    model = bench.models.fresh(case.checkpoint, torch.bfloat16).float()  # weights that both precisions hold exactly
    pixels = batch["pixel_values"].bfloat16().float()
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad(), case(model.to(dtype)) as trace:
            model(**{**batch, "pixel_values": pixels.to(dtype)})
        sets.append([{t for t in row if t >= 0} for row in trace.kept[0].tolist()])
        assert all(score is None or score.dtype == torch.float32 for score in trace.scores)
    agree = [len(a & b) / len(a | b) for a, b in zip(*sets, strict=True)]
    assert sum(agree) / len(agree) >= AGREEMENT.get(name, 0.85), agree


# --- generate in all its ways -----------------------------------------------------------------------------------------


@every_method
def test_beams_and_no_cache(bench, name):
    """Beam search reorders shortened caches; without a cache every step reads the prompt anew."""
    for checkpoint in [c for c in ("llava_next", "qwen2_5_vl") if c in listed(name)]:
        case = Case(build(name, positions="keep"), checkpoint)
        model, batch = bench.models(checkpoint), bench.batch(checkpoint)
        n = batch["input_ids"].shape[1]
        with torch.no_grad(), case(model):
            beams = model.generate(
                **batch,
                max_new_tokens=4,
                num_beams=3,
                num_return_sequences=2,
                do_sample=False,
                pad_token_id=0,
                output_scores=True,
                return_dict_in_generate=True,
            )
        # the score of a beam is the mean log-likelihood of its tokens, here by the measure that knows no cache
        visual, trace = visual_tokens(batch, checkpoint), bench.run(case).trace
        lost = gone(trace, visual, case.method.middle)
        late = gone(trace, visual)[-1] if case.method.output_aware else None
        for k in range(0 if name in STOCHASTIC else 2):
            ids = beams.sequences[k::2]
            logits = replay(model, longer(batch, ids), lost, False, given(bench, case), case.method.middle, late)
            found = logits[:, n - 1 : -1].log_softmax(-1).gather(2, ids[:, n:, None])[..., 0].mean(1)
            close(beams.sequences_scores[k::2], found)
        with torch.no_grad(), case(model):
            logits = model(**batch, use_cache=False).logits
        close(logits[:, -1], bench.run(case).logits[:, -1])


@every_method
def test_eager_attention_keeps_the_same(bench, name):
    case = Case(build(name), listed(name)[min(2, len(listed(name)) - 1)])
    model, batch = bench.models(case.checkpoint, attention="eager"), bench.batch(case.checkpoint)
    with torch.no_grad(), case(model) as trace:
        logits = model(**batch).logits
    run = bench.run(case)
    close(logits[:, -1], run.logits[:, -1])
    assert all(torch.equal(a, b) for a, b in zip(trace.kept, run.trace.kept, strict=True))


@every_method
def test_repr_rebuilds(name):
    method = build(name)
    names = {"Budget": Budget, **{m: getattr(kr.mllm, m) for m in dir(kr.mllm) if not m.startswith("_")}}
    assert eval(repr(method), {"__builtins__": {}}, names) == method
    ast.parse(repr(method))


# --- conversations and batches that are easily got wrong --------------------------------------------------------------


@POLICIES
@pytest.mark.parametrize("checkpoint", ["llava", "llava-siglip"])
@pytest.mark.parametrize("name", ["DivPrune", "FasterVLM", "FastV", "PyramidDrop"])
def test_a_second_picture_in_a_second_turn(bench, name, checkpoint, positions):
    """It is reduced like the first, behind a cache that was shortened already."""
    model, case = bench.models(checkpoint), Case(build(name, positions=positions), checkpoint)
    first = inputs(checkpoint, IMAGES[:2], LENGTHS[:2])
    second = inputs(checkpoint, (((1, 1),), ((1, 1),)), (9, 9), seed=60)
    ids = torch.cat([first["input_ids"], second["input_ids"]], 1)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
    with torch.no_grad(), case(model) as trace:
        cache = generate(model, first, 1).cache  # the one new token is not in it yet
        both = {"input_ids": ids, "attention_mask": mask, "pixel_values": second["pixel_values"]}
        answer = generate(model, both, past_key_values=cache)
    n, lost = first["input_ids"].shape[1], []
    parts = [(run, visual_tokens(b, checkpoint)) for run, b in zip(trace.runs, (first, second), strict=True)]
    halves = [gone(SimpleNamespace(steps=run, depth=LAYERS), visual, case.method.middle) for run, visual in parts]
    lost = [torch.cat(both, 1) for both in zip(*halves, strict=True)]
    order = torch.tensor([0, 2, 1, 3])  # pictures sample by sample
    pixels = torch.cat([first["pixel_values"], second["pixel_values"]])[order]
    whole = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    logits = replay(model, longer(whole, answer.sequences), lost, positions == "compact")
    close(answer.logits, logits[:, ids.shape[1] - 1 : -1])
    assert n < ids.shape[1] and len(trace.batches) == 2


@POLICIES
@pytest.mark.parametrize("checkpoint", ["llava_next", "llava_onevision", "qwen2_5_vl"])  # pictures of several sizes
def test_a_sample_that_loses_nothing_beside_one_that_does(bench, checkpoint, positions):
    """A number of tokens that one sample has and the other exceeds: neither knows of the other."""
    images, lengths = (((1, 1),), ((2, 1.5),)), (14, 12)
    (small,), (large,) = pictures(checkpoint, images)
    least = (small.tokens - small.ends) // small.views
    assert least < large.tokens - large.ends
    model = bench.models(checkpoint)
    for name, keep in (("UniformGrid", least), ("FastV", small.tokens)):
        method = build(name, keep=keep, positions=positions)
        with torch.no_grad(), method(model) as trace:
            together = generate(model, inputs(checkpoint, images, lengths))
        counts = trace.counts()[:, -1].tolist()
        assert counts[0] == small.tokens and counts[1] == keep
        for i in range(2):
            sample = inputs(checkpoint, images[i : i + 1], lengths[i : i + 1], seed=i)
            with torch.no_grad(), method(model):
                close(together.logits[i], generate(model, sample).logits[0])


def test_pictures_encoded_before_the_block(bench):
    """Features handed in: methods inside the language model work, those that read the encoder say what is missing."""
    model, batch = bench.models("llava"), dict(bench.batch("llava"))
    with torch.no_grad():
        features = model.get_image_features(batch.pop("pixel_values"), return_dict=True)
    for name in ("FastV", "PyramidDrop"):
        case = Case(build(name), "llava")
        expected = bench.run(case).logits
        with torch.no_grad(), case(model):
            assert torch.equal(model(**batch, mm_encoder_outputs={"image": features}).logits, expected)
    outside = pytest.raises(ValueError, match=r"encoded outside the `with` block")
    with outside, torch.no_grad(), build("FasterVLM")(model):
        model(**batch, mm_encoder_outputs={"image": features})


def test_the_oracle_keeps_what_is_needed(bench):
    """The tokens it is told come first; a truth of another batch is refused."""
    model, batch = bench.models("llava"), bench.batch("llava")
    needed = torch.zeros(4, 36, dtype=torch.bool)
    needed[:, 5:9] = True
    with torch.no_grad(), kr.mllm.OracleVisual(keep=0.25, needed=needed)(model) as trace:
        model(**batch)
    kept = [{t for t in row if t >= 0} for row in trace.kept[0].tolist()]
    assert [len(row) for row in kept] == [9, 9, 18]
    assert all({5, 6, 7, 8} <= row for row in kept) and {41, 42, 43, 44} <= kept[2]
    stranger = kr.mllm.OracleVisual(keep=0.25, needed=needed[:3])
    with pytest.raises(ValueError, match=r"\(4, 36\); got \(3, 36\)"), torch.no_grad(), stranger(model):
        model(**batch)
    bench.dense("llava")
    bench.assert_untouched("llava")


def test_places_tell_where_a_token_lies(bench):
    """Image, view, row and column of every visual token; several pictures of a sample are counted on."""
    for checkpoint in SEQUENCE:
        case = Case(build("UniformGrid"), checkpoint)
        drawn, trace = pictures(checkpoint, IMAGES), bench.run(case).trace
        for i, sample in enumerate(drawn):
            places = trace.places[i, : sum(p.tokens for p in sample)]
            shown = places[places[:, 0] >= 0].tolist()
            assert len(shown) == sum(p.tokens - p.ends for p in sample)
            assert len({tuple(place) for place in shown}) == len(shown), "two tokens at one place"
            assert shown == sorted(shown) or checkpoint in ("llava_next", "llava_onevision")
            assert (trace.places[i, len(places) :] == -1).all()
    assert bench.run(Case(build("UniformGrid"), "llava")).trace.grid == (6, 6)
    assert bench.run(Case(build("UniformGrid"), "qwen2_5_vl")).trace.grid == (8, 6)


# --- bad input --------------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("keep", [0.0, -0.1, 1.5, float("nan"), "half", True, 0, Budget(schedule=(0.5,))])
def test_keep_out_of_range(name, keep):
    if isinstance(keep, Budget) and build(name).staged:
        keep = (0.5, 2.0)
    with pytest.raises(ValueError, match=r"keep|tokens|schedule|fraction"):
        build(name, keep=keep)


@every_method
def test_bad_input_is_refused_and_the_model_as_before(bench, name):
    case = Case(build(name), listed(name)[0])
    checkpoint = case.checkpoint
    model, batch, dense = bench.models(checkpoint), bench.batch(checkpoint), bench.dense(checkpoint)
    n = batch["input_ids"].shape[1]

    def refused(match: str, method: MLLMMethod = case.method, samples: int = len(IMAGES), **given) -> None:
        with pytest.raises(ValueError, match=match), torch.no_grad(), Case(method, checkpoint)(model, samples):
            model(**given)
        bench.assert_untouched(checkpoint)

    refused("no image", samples=1, **inputs(checkpoint, ((),), (12,)))
    if checkpoint != "mllama":  # there, a sample without a picture sees those of the others
        refused(r"samples \[1\] of the batch hold no image", samples=2, **inputs(checkpoint, (((1, 1),), ()), (12, 14)))
    refused("batch is empty", samples=0, input_ids=batch["input_ids"][:0])
    if checkpoint != "mllama":  # which has one placeholder a picture
        wrong = batch["input_ids"].clone()
        wrong[2, (wrong[2] == IMAGE).nonzero()[3]] = FIRST
        refused("do not match", **{**batch, "input_ids": wrong})
        refused("2-D attention_mask", **{**batch, "attention_mask": torch.ones(len(IMAGES), 1, n, n).tril().bool()})
    refused("cannot", build(name, keep=Budget(tokens=1000)), **batch)
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=200)
    refused("DynamicCache|StaticLayer", **batch, past_key_values=static)
    with case(model), pytest.raises(ValueError, match="active on this model"), case(model):
        pass
    bench.assert_untouched(checkpoint)
    if case.method.text_guided:
        picture = torch.full((1, 36), IMAGE)
        ids = torch.cat([torch.tensor([[BOS]]), picture], 1)
        refused("question|text", samples=1, input_ids=ids, pixel_values=batch["pixel_values"][:1])
    assert torch.equal(generate(model, batch).logits, dense.answer.logits)


@every_method
def test_models_it_does_not_work_on(bench, name):
    method = build(name)
    for checkpoint in MULTIMODAL:
        if checkpoint not in listed(name):
            with pytest.raises(ValueError, match=f"{name} does not support {MULTIMODAL[checkpoint][0]}"):
                method(bench.models(checkpoint))
    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    for stranger in (bert, bench.models("llava").model.language_model, bench.models("llava").model.vision_tower):
        with pytest.raises(ValueError, match="exactly one multimodal model of a supported class"):
            method(stranger)


LAYERED = [(name, f.name) for name in METHODS for f in fields(build(name)) if f.name in ("layer", "layers")]


@pytest.mark.parametrize(("name", "field"), LAYERED)
def test_layers_the_model_does_not_have(bench, name, field):
    """A decoder layer beyond the last is refused when the method meets the model."""
    for layer in (LAYERS, LAYERS + 3):
        value = layer if field == "layer" else (1, layer)
        with pytest.raises(ValueError, match=r"layer"):
            build(name, **{field: value})(bench.models("llava"))
