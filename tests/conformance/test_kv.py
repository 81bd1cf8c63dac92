"""What every registered KV-cache method must pass, on every architecture it lists. Nothing here is for one method.

Methods come from the registry; a new one is judged as soon as it is registered. The tables below say only what cannot
be read off a method: settings small enough for a tiny prompt, further settings worth running, and how precision may
change a choice.
"""

import ast
from dataclasses import dataclass, fields

import pytest
import torch
from transformers import BertConfig, BertModel, MistralConfig, MistralForCausalLM, StaticCache

import keeprate as kr
from keeprate import Budget
from keeprate.anatomy import decoder
from keeprate.kv import EvictMethod, KVLayer, KVMethod, Modifier, ReadMethod
from keeprate.kv.base import PACK
from keeprate.kv.session import KVSession

from .checkpoints import DECODERS, VOCABULARY, tokens

TABLE = kr.methods("kv").set_index("name")
METHODS = list(TABLE.index)
N, SHORT, NEW = 48, 35, 6  # tokens of the prompt, of the short one in a padded batch, and generated

# windows and the like that fit a prompt of 48 tokens
SMALL = {
    "SnapKV": {"window": 6},
    "PyramidKV": {"base": kr.kv.SnapKV(window=6), "beta": 4.0},
    "AdaKV": {"base": kr.kv.SnapKV(window=6)},
    "VATP": {"sinks": 3},
    "A2SF": {"recent": 5},
    "Scissorhands": {"history": 20, "recent": 5},
    "SepLLM": {"separators": tuple(range(2, VOCABULARY, 7))},
    "RCStat": {"window": 6},
    "Quest": {"page": 4, "skip": 1},
    "TidalDecode": {"start": 0},
    "TokenSelect": {"initial": 2, "local": 4},
    "FASA": {"initial": 2, "local": 4, "rows": 4, "top": 6},
    "ActQKV": {"block": 4, "initial": 2, "local": 4, "least": 1},
    "ZipCache": {"stream": 4},
    "PoD": {"stream": 3},
}
# settings that take another path through a method
VARIANTS = [
    ("AdaKV", {"rule": "blend", "base": kr.kv.SnapKV(window=6)}),
    ("AdaKV", {"base": kr.kv.TOVA(), "floor": 0.0}),
    ("PyramidKV", {"base": kr.kv.H2O(recent=3), "beta": 2.0}),
    ("CAOTE", {"base": kr.kv.TOVA()}),
    ("CAOTE", {"fast": True}),
    ("VATP", {"base": kr.kv.Scissorhands(history=20, recent=5, drop=0.0), "sinks": 2}),
    ("VATP", {"base": kr.kv.SnapKV(window=6, pooling="max"), "sinks": 2}),
    ("Scissorhands", {"history": 20, "recent": 5, "drop": 0.0}),
    ("KeyDiff", {"block": 3}),
    ("KNorm", {"skip": 1}),
    ("KVCompose", {"reread": False, "value_norm": True}),
    ("ExpectedAttention", {"covariance": False, "epsilon": 0.0}),
    ("H2O", {"keep": 20, "recent": 4}),
    ("StreamingLLM", {"keep": 20, "re_position": True}),
    ("SnapKV", {"window": 6, "re_position": True}),
    ("AdaKV", {"base": kr.kv.SnapKV(window=6), "re_position": True}),
    ("SnapKV", {"window": 6, "rest": 4}),
    ("AdaKV", {"base": kr.kv.SnapKV(window=6), "rest": 8}),
    ("TOVA", {"rest": 2}),
    ("SnapKV", {"window": 6, "keep": Budget(coverage=0.9)}),
    ("TidalDecode", {"start": 0, "correction": 1}),
    ("TokenSelect", {"initial": 2, "local": 4, "similarity": 0.1}),
    ("TokenSelect", {"initial": 2, "local": 4, "vote": "hard", "similarity": 1.1}),
    ("ActQKV", {"block": 4, "initial": 2, "local": 4, "least": 1, "adaptive": True}),
    ("ZipCache", {"stream": 4, "bits": (16, 2)}),
    ("ZipCache", {"stream": 4, "bits": (8, 4), "normalise": "causal"}),
    ("PoD", {"stream": 3, "leaders": (0,)}),
]
STOCHASTIC = {"RandomKV", "RandomRead"}  # drawn for the batch as a whole
BLIND = {"RandomKV", "StreamingLLM", "SepLLM"}  # never look at keys or queries
FUTURE = {"OracleKV"}  # made for one batch
PREFIX = {"StreamingLLM": 4, "SepLLM": 4, "ExpectedAttention": 4, "VATP": 3}  # first tokens that must survive
RECENT = {"SnapKV": 6, "PyramidKV": 6, "AdaKV": 6, "RCStat": 6, "A2SF": 5, "Scissorhands": 5, "TOVA": 1}


def build(name: str, **params) -> KVMethod:
    """A method at the suite's settings; `keep` decides how much stays."""
    settings = {"keep": 0.5, **SMALL.get(name, {}), **params}
    return kr.method(name, **settings)


def full(method: KVMethod) -> KVMethod:
    """The same method asked to lose nothing."""
    params = {**method.params(), "keep": 1.0}
    if isinstance(method, Modifier):
        params["base"] = full(method.base)
    if method.name == "ZipCache":
        params["bits"] = (16, 16)
    return type(method)(**params)


@dataclass(frozen=True)
class Case:
    """One method, in one setting, on one checkpoint."""

    method: KVMethod
    checkpoint: str

    @property
    def id(self) -> str:
        return f"{self.method!r}-{self.checkpoint}"


def cases(*, variants: bool = True, without: set[str] = frozenset(), kind: type = KVMethod, only: str = "") -> list:
    """Every method on every architecture it lists, and the further settings on the first checkpoint."""
    found = []
    for name in METHODS:
        if name in without | FUTURE or not issubclass(type(build(name)), kind):
            continue
        listed = TABLE.loc[name, "architectures"].split(", ")
        for checkpoint, (architecture, _, _) in DECODERS.items():
            if architecture in listed and (not only or checkpoint == only) and _fits(name, checkpoint):
                found.append(Case(build(name), checkpoint))
    if variants:
        extra = [build(name, **params) for name, params in VARIANTS if name not in without]
        found += [Case(method, "llama") for method in extra if isinstance(method, kind)]
    return [pytest.param(case, id=case.id) for case in found]


def _fits(name: str, checkpoint: str) -> bool:
    """A second reading of the prompt needs layers without a window (`test_reread_needs_full_attention`)."""
    return not (name == "KVCompose" and checkpoint == "gemma3")


def generate(model, ids, attention_mask=None, **more):
    """Greedy continuation: ids and logits [b, NEW, vocabulary]."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if attention_mask is None else attention_mask,
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        **more,
    )
    return out.sequences, torch.stack(out.logits, 1)


def kept_sets(trace) -> list:
    """For every layer, sample and head the arrival numbers it holds."""
    return [[[head[head >= 0].tolist() for head in sample] for sample in layer] for layer in trace.kept]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal to fp32 rounding, at logits of order 10."""
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("case", cases())
def test_asked_for_everything_it_changes_nothing(zoo, case):
    """keep=1 gives bit-identical logits, while generating and in a second turn."""
    model, ids, more = zoo(case.checkpoint), tokens(2, N), tokens(2, 5, seed=1)
    plain_ids, plain = generate(model, ids)
    with full(case.method)(model) as trace:
        _, ours = generate(model, ids)
        cache = trace.cache
        turn = model(more, past_key_values=cache).logits
    assert torch.equal(plain, ours)
    expected = model(torch.cat([plain_ids[:, :-1], more], 1)).logits[:, -5:]
    close(turn, expected)
    # what the block left behind is an ordinary cache
    assert cache.get_seq_length() == N + NEW - 1 + 5


@pytest.mark.parametrize("case", cases(without=STOCHASTIC))
def test_padding_and_neighbours_change_nothing(zoo, case):
    """A left-padded batch of two gives what each sample gives alone."""
    model, long, short = zoo(case.checkpoint), tokens(1, N), tokens(1, SHORT, seed=2)
    pad = N - SHORT
    batch = torch.cat([long, torch.nn.functional.pad(short, (pad, 0))])
    mask = torch.ones_like(batch)
    mask[1, :pad] = 0
    with case.method(model) as trace:
        _, both = generate(model, batch, mask)
        held = kept_sets(trace)
    for i, ids in enumerate((long, short)):
        with case.method(model) as trace:
            _, alone = generate(model, ids)
            own = kept_sets(trace)
        close(both[i], alone[0])
        if not isinstance(case.method, ReadMethod):
            shifted = [[[t - i * pad for t in head] for head in layer[i]] for layer in held]
            assert shifted == [layer[0] for layer in own]


@pytest.mark.parametrize("case", cases())
def test_masked_equals_removed(zoo, case):
    """Hiding what a method drops, or does not read, gives what removing, or not reading, it gives."""
    if case.method.packs:
        with pytest.raises(ValueError, match="masked=True has no meaning"):
            case.method(zoo(case.checkpoint), masked=True)
        return
    model, ids = zoo(case.checkpoint), tokens(2, N)
    results = []
    for masked in (False, True):
        with case.method(model, masked=masked) as trace:
            _, logits = generate(model, ids)
            results.append((logits, kept_sets(trace)))
    close(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("case", cases())
def test_one_call_equals_many(zoo, case):
    """Tokens behind the prompt, one by one or at once: a prefill method gives the same logits."""
    if isinstance(case.method, ReadMethod) or getattr(case.method, "when", "decode") == "decode":
        pytest.skip("decides at every step")
    model, ids, more = zoo(case.checkpoint), tokens(2, N), tokens(2, NEW, seed=3)
    with case.method(model):
        at_once = model(more, past_key_values=model(ids).past_key_values).logits
    with case.method(model):
        cache = model(ids).past_key_values
        steps = [model(token, past_key_values=cache).logits for token in more.split(1, 1)]
    close(at_once, torch.cat(steps, 1))


@pytest.mark.parametrize("case", cases(kind=EvictMethod))
def test_the_number_kept_is_the_budget(zoo, case):
    """Exactly the budget after the prompt and while decoding, in total where heads or layers share one."""
    method = case.method
    model, ids = zoo(case.checkpoint), tokens(2, N)
    if method.budget.ragged:
        pytest.skip("the budget depends on the scores")
    held = []
    with method(model) as trace, torch.no_grad():
        cache = model(ids).past_key_values
        held.append((N, [cache.layers[i].hot_counts.clone() for i in trace.layers]))
        for seen in range(N + 1, N + 4):
            model(tokens(2, 1, seed=seen), past_key_values=cache)
            held.append((seen, [cache.layers[i].hot_counts.clone() for i in trace.layers]))
        arrival = [cache.layers[i].kept() for i in trace.layers]
    for seen, counts in held:
        prompt = seen if method.when == "decode" else N
        each = int(method.budget.each(torch.tensor([prompt]))[0])
        late = 0 if method.when == "decode" else seen - N
        treated = counts[getattr(method, "skip", 0) :]
        total = sum(int(c[0].sum()) for c in treated)
        groups = treated[0].shape[1]
        if method.name == "Scissorhands" or (isinstance(method, Modifier) and method.base.name == "Scissorhands"):
            assert all(bool((c <= each).all()) for c in treated)
        elif method.name == "KeyDiff" and method.block:
            assert all(bool((c < each + method.block).all()) for c in treated)
        elif method.packs and method.when == "decode":
            assert all(bool(((c >= each) & (c < each + PACK)).all()) for c in treated)
        elif method.name == "KVCompose":
            assert sum(int(c[0, 0]) for c in treated) == int(0.5 * N * len(treated)) + late * len(treated)
            assert all(bool((c == c[:, :1]).all()) for c in treated)
        elif method.name == "PyramidKV":
            assert abs(total / groups - (each + late) * len(treated)) <= 1
            assert bool((treated[0] > treated[-1]).all())
        else:
            assert total == (each + late) * groups * len(treated)
            if method.name not in ("AdaKV", "RCStat"):
                assert all(bool((c == each + late).all()) for c in treated)
    for layer in arrival:
        real = layer >= 0
        assert bool(((layer[..., 1:] > layer[..., :-1]) | ~real[..., 1:]).all())  # sorted and unique
        assert int(layer.max()) < N + 3
    if method == build(method.name):
        end = N + 3 if method.when == "decode" else N
        must = {*range(PREFIX.get(method.name, 0)), *range(end - RECENT.get(method.name, 0), end)}
        assert all(must <= set(head.tolist()) for layer in arrival for sample in layer for head in sample)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in FUTURE])
def test_the_seed_decides(zoo, name):
    """Same seed, same result, whatever torch's own generator does; only a stochastic method follows the seed."""
    model, ids = zoo("llama"), tokens(2, N)
    logits = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(logits))
        with build(name)(model, seed=seed):
            logits.append(generate(model, ids)[1])
    assert torch.equal(logits[0], logits[1])
    if name in STOCHASTIC:
        assert not torch.equal(logits[0], logits[2])
    elif name != "ZipCache":  # its probe rows are drawn, which may or may not change a choice
        assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("name", [name for name in METHODS if name not in FUTURE])
def test_the_model_is_as_before(zoo, name):
    """After the block, and after an exception in it."""
    model, ids = zoo("qwen2"), tokens(1, N)
    before = generate(model, ids)[1]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(RuntimeError, match="mine"), build(name)(model):
        generate(model, ids)
        raise RuntimeError("mine")
    assert torch.equal(before, generate(model, ids)[1])
    assert model.config._attn_implementation == "sdpa"
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


@pytest.mark.parametrize("name", [name for name in METHODS if name not in FUTURE | BLIND])
def test_bf16_keeps_what_fp32_keeps(zoo, name):
    """In the first layer, where both precisions see the same inputs, away from ties."""
    method, ids = build(name), tokens(2, N)
    if not isinstance(method, EvictMethod):
        pytest.skip("keeps everything")
    model = zoo.exact("llama")
    sets = []
    for dtype in (torch.float32, torch.bfloat16):
        with method(model.to(dtype)) as trace, torch.no_grad():
            model(ids)
            sets.append([[set(head[head >= 0].tolist()) for head in sample] for sample in trace.kept[0]])
            assert all(s.dtype == torch.float32 for s in trace.scores.values())
    agree = [len(a & b) / len(a | b) for x, y in zip(*sets, strict=True) for a, b in zip(x, y, strict=True)]
    assert sum(agree) / len(agree) >= 0.85


@pytest.mark.parametrize("name", [name for name in METHODS if name not in FUTURE])
def test_repr_rebuilds(name):
    method = build(name)
    names = {"Budget": Budget} | {m: getattr(kr.kv, m) for m in METHODS}
    assert eval(repr(method), {"__builtins__": {}}, names) == method
    ast.parse(repr(method))
    assert all(hasattr(method, f.name) for f in fields(method))


def test_oracle_knows_the_future(zoo):
    """The oracle keeps the tokens the given future attends to, and the plain model is as before."""
    model, ids, future = zoo("llama"), tokens(2, N), tokens(2, 5, seed=4)
    expected = kr.kv.future_attention(model, ids, future)
    with kr.kv.OracleKV.of(model, ids, future, keep=0.25)(model) as trace:
        model(ids)
    for layer, kept in zip(expected, trace.kept, strict=True):
        assert torch.equal(layer.topk(N // 4, dim=-1).indices.sort(-1).values, kept)
    with pytest.raises(ValueError, match="needs the future"), kr.kv.OracleKV(keep=0.5)(model):
        model(ids)
    with pytest.raises(ValueError, match="made for scores"), kr.kv.OracleKV.of(model, ids, future, keep=0.5)(model):
        model(ids[:1])


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in METHODS if name not in FUTURE])
@pytest.mark.parametrize("keep", [0.0, -0.1, 1.5, float("nan"), "half", True])
def test_keep_out_of_range(name, keep):
    with pytest.raises(ValueError, match=r"keep|tokens"):
        build(name, keep=keep)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in FUTURE])
def test_bad_input_is_refused_before_anything_runs(zoo, name):
    model, ids = zoo("llama"), tokens(2, N)
    method = build(name)
    with pytest.raises(ValueError, match="exactly one decoder"):
        method(BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)))
    with method(model), pytest.raises(ValueError, match="active on this model"), method(model):
        pass
    with method(model), pytest.raises(ValueError, match="batch is empty"):
        model(ids[:0])
    with method(model), pytest.raises(ValueError, match="NaN"):
        model(inputs_embeds=torch.full((1, N, 48), float("nan")))
    with method(model), pytest.raises(ValueError, match="use_cache=True"):
        model(ids, use_cache=False)
    static = StaticCache(config=model.config, max_cache_len=80)
    with method(model), pytest.raises(ValueError, match="DynamicCache"):
        model(ids, past_key_values=static)
    with pytest.raises(ValueError, match="turns must be"):
        method(model, turns="never")


@pytest.mark.parametrize("name", ["SnapKV", "StreamingLLM", "TOVA", "VATP", "AdaKV"])
def test_budget_below_what_is_protected(zoo, name):
    model, method = zoo("llama"), build(name, keep=0.01)
    if method.protected() > 1:
        with method(model), pytest.raises(ValueError, match="always keeps"):
            model(tokens(1, N))
        with pytest.raises(ValueError, match="always keeps"):
            build(name, keep=2)


def test_a_window_on_every_layer_cannot_be_shortened():
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
    model = MistralForCausalLM(MistralConfig(vocab_size=9, num_hidden_layers=1, sliding_window=8, **small))
    with pytest.raises(ValueError, match="sliding window of 8"):
        kr.kv.TOVA()(model)


def test_reread_needs_full_attention(zoo):
    with kr.kv.KVCompose()(zoo("gemma3")), pytest.raises(ValueError, match="sliding window"):
        zoo("gemma3")(tokens(1, N))


def test_a_shortened_cache_needs_its_block(zoo):
    model, ids = zoo("llama"), tokens(1, N)
    with kr.kv.SnapKV(keep=0.5, window=6)(model):
        cache = model(ids).past_key_values
    assert isinstance(cache.layers[0], KVLayer)
    with pytest.raises(ValueError, match="inside a method's `with` block"):
        model(tokens(1, 1), past_key_values=cache)
    with kr.kv.SnapKV(keep=0.5, window=6)(model):
        assert model(tokens(1, 1), past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("name", ["H2O", "AdaKV", "Quest", "ZipCache", "KVCompose"])
def test_beams_and_eager_and_embeddings(zoo, name):
    """Beam search reorders the cache; eager attention and given embeddings work like the rest."""
    model, ids = zoo("llama"), tokens(2, N)
    with build(name)(model):
        beams = model.generate(ids, max_new_tokens=4, num_beams=3, do_sample=False, pad_token_id=0)
    assert beams.shape == (2, N + 4)
    eager = zoo("llama", attention="eager")
    with build(name)(model):
        expected = generate(model, ids)[1]
    with build(name)(eager):
        close(generate(eager, ids)[1], expected)
    with build(name)(model) as trace:
        logits = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        embedded = kept_sets(trace)
    with build(name)(model) as trace:
        close(model(ids).logits, logits)
        assert kept_sets(trace) == embedded


def test_flat_storage_is_read_as_it_lies(zoo, monkeypatch):
    """What a GPU does at a decode step, attend to unpadded heads, equals the padded copy that a CPU makes."""
    for method in (build("AdaKV"), build("AdaKV", rest=8), build("RCStat")):
        model, ids = zoo("llama"), tokens(2, N)
        with method(model):
            expected = generate(model, ids)[1]
        with monkeypatch.context() as patch:
            patch.setattr(KVSession, "flat_anywhere", True)
            with method(model):
                close(generate(model, ids)[1], expected)


def test_one_sample_becomes_several(zoo):
    """A shortened cache of one sample can be repeated, as generate does for several answers to one prompt."""
    model = zoo("llama")
    for name in ("TOVA", "AdaKV", "ZipCache", "Quest"):
        with build(name)(model):
            cache = model(tokens(1, N)).past_key_values
            one = model(tokens(1, 1), past_key_values=cache).logits
            cache.batch_repeat_interleave(3)
            three = model(tokens(1, 1, seed=9).expand(3, -1), past_key_values=cache).logits
            assert one.shape == three[:1].shape
            close(three[0], three[2])


def test_several_turns(zoo):
    """turns="each" compresses after every prompt; a method may be taken off and another put on the same cache."""
    model, method = zoo("llama"), kr.kv.SnapKV(keep=0.5, window=6)
    with method(model, turns="each") as trace:
        cache = model(tokens(1, N)).past_key_values
        model(tokens(1, 20, seed=5), past_key_values=cache)
        assert all(layer.shape[-1] == (N + 20) // 2 for layer in trace.kept)
    with kr.kv.TOVA(keep=10)(model) as trace:
        model(tokens(1, 3, seed=6), past_key_values=cache)
        assert all(layer.shape[-1] == 10 for layer in trace.kept)


def test_an_ordinary_cache_is_taken_over(zoo):
    """A prefix read without a method can be shortened later."""
    model, ids = zoo("llama"), tokens(1, N)
    cache = model(ids).past_key_values
    with kr.kv.TOVA(keep=12)(model) as trace:
        model(tokens(1, 1), past_key_values=cache)
        assert all(layer.shape[-1] == 12 for layer in trace.kept)


def test_the_anatomy_of_mixed_layers(zoo):
    assert decoder(zoo("gemma3")).treated == (0, 2)
