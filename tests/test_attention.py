"""Attention on demand equals the eager attention of transformers; gates follow DynamicViT; models stay untouched."""

from dataclasses import dataclass

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from keeprate.attention import AttentionView, Listener, listen
from keeprate.reduce import drop
from keeprate.vit.base import GATE_EPS, ViTMethod


def widen(model):
    """Weights wide enough for peaked attention."""
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() > 1:
            p.data = 0.25 * torch.randn(p.shape, generator=g)
    return model.eval()


@pytest.fixture(scope="module")
def vit():
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
    )
    return widen(ViTForImageClassification(config))


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return widen(LlamaForCausalLM(config))


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def padded():
    """A left-padded batch: the first sample has five tokens less."""
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :5] = mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


class Watch(Listener):
    """Remembers the view of every layer."""

    def __init__(self):
        self.views = []

    def fold(self, module, view):
        self.views.append(view)


def modules(model):
    return [m for m in model.modules() if type(m).__name__ in ("ViTAttention", "LlamaAttention")]


@torch.no_grad()
def watched(model, **inputs):
    watch = Watch()
    with listen(model, watch, modules(model)):
        output = model(**inputs)
    return output, watch.views


@torch.no_grad()
def eager(model, **inputs):
    """Attention probabilities as transformers computes them itself."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return model(**inputs, output_attentions=True)
    finally:
        model.set_attn_implementation(before)


def check_view(view: AttentionView, want: torch.Tensor, seen: torch.Tensor | None = None) -> None:
    """All ways of asking for attention against the matrix want [b, h, n_q, n_k]; seen [b, n_q] = rows that count."""
    b, h, n, _ = want.shape
    seen = torch.ones(b, n, dtype=torch.bool) if seen is None else seen
    weight = seen.float()[:, None]
    real = want * weight[..., None]
    close = lambda a, c: torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-4)  # noqa: E731
    close(view.probs() * weight[..., None], real)
    close(view.received(weight), real.sum(2))
    close(view.received(weight, reduce="max"), real.amax(2))
    close(view.rows(n - 1), want[:, :, -1:])
    close(view.rows([n - 1, n - 2]), want[:, :, [n - 1, n - 2]])
    own = torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(i))[:3] for i in range(b)])
    picked = want.gather(2, own[:, None, :, None].expand(-1, h, -1, n))
    ok = seen.gather(1, own)[:, None, :, None]
    close(view.rows(own) * ok, picked * ok)


def test_a_vits_attention_equals_eager(vit, pixels):
    output, views = watched(vit, pixel_values=pixels)
    reference = eager(vit, pixel_values=pixels)
    assert len(views) == len(reference.attentions) == 2
    torch.testing.assert_close(output.logits, reference.logits, atol=1e-5, rtol=1e-5)
    for view, want in zip(views, reference.attentions, strict=True):
        check_view(view, want)
        torch.testing.assert_close(view.received().sum(-1), torch.full(want.shape[:2], float(want.shape[2])))


def test_a_causal_grouped_llamas_attention_equals_eager(llama):
    ids = torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(2))
    output, views = watched(llama, input_ids=ids)
    reference = eager(llama, input_ids=ids)
    torch.testing.assert_close(output.logits, reference.logits, atol=1e-4, rtol=1e-4)
    assert views[0].k.shape[1] == 2 and views[0].q.shape[1] == 4
    for view, want in zip(views, reference.attentions, strict=True):
        assert want.triu(1).abs().max() == 0
        check_view(view, want)


def test_a_left_padded_batch_equals_eager(llama, padded):
    output, views = watched(llama, **padded)
    reference = eager(llama, **padded)
    real = padded["attention_mask"].bool()
    torch.testing.assert_close(output.logits[real], reference.logits[real], atol=1e-4, rtol=1e-4)
    for view, want in zip(views, reference.attentions, strict=True):
        check_view(view, want, real)


@torch.no_grad()
def test_listening_changes_nothing(llama, vit, padded, pixels):
    plain = llama(**padded).logits
    # the mask must matter at all, else a lost mask would pass
    assert (plain[0, -1] - llama(input_ids=padded["input_ids"]).logits[0, -1]).abs().max() > 1e-2
    assert torch.equal(watched(llama, **padded)[0].logits, plain)
    assert torch.equal(watched(vit, pixel_values=pixels)[0].logits, vit(pixel_values=pixels).logits)
    assert torch.equal(llama(**padded).logits, plain)


@torch.no_grad()
def test_generation_is_heard_step_by_step(llama, padded):
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    plain = llama.generate(**padded, **options)
    watch = Watch()
    with listen(llama, watch, modules(llama)):
        heard = llama.generate(**padded, **options)
    assert torch.equal(heard, plain)
    first = watch.views[::3]
    assert [v.q.shape[2] for v in first] == [12, 1, 1, 1] and [v.k.shape[2] for v in first] == [12, 13, 14, 15]
    for view in first[1:]:
        got = view.rows(0)
        torch.testing.assert_close(got.sum(-1), torch.ones(2, 4, 1))
        assert got[0, :, :, :5].abs().max() < 1e-6, "padding is not attended to"


@torch.no_grad()
def test_only_the_chosen_modules_are_heard(llama, padded):
    watch = Watch()
    with listen(llama, watch, modules(llama)[1:2]):
        llama(**padded)
    assert len(watch.views) == 1


@torch.no_grad()
def test_listeners_stack_and_leave_one_by_one(vit, pixels):
    inner, outer = Watch(), Watch()
    before = vit.config._attn_implementation
    with listen(vit, outer, modules(vit)):
        with listen(vit, inner, modules(vit)):
            vit(pixel_values=pixels)
        vit(pixel_values=pixels)
    vit(pixel_values=pixels)
    assert (len(inner.views), len(outer.views)) == (2, 4)
    assert vit.config._attn_implementation == before


def test_the_implementation_is_restored_after_an_exception(vit):
    before = vit.config._attn_implementation
    with pytest.raises(KeyError), listen(vit, Watch(), modules(vit)):
        assert vit.config._attn_implementation != before
        raise KeyError
    assert vit.config._attn_implementation == before


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_added_bias_is_obeyed(vit, pixels, implementation):
    class Hide(Watch):
        def gather(self, module, view):
            bias = torch.zeros(len(view.k), 1, 1, view.k.shape[2])
            bias[..., 3] = float("-inf")
            return view.with_bias(None).with_bias(bias)

    hide = Hide()
    vit.set_attn_implementation(implementation)
    try:
        with listen(vit, hide, modules(vit)):
            logits = vit(pixel_values=pixels).logits
    finally:
        vit.set_attn_implementation("sdpa")
    other = pixels.clone()
    other[:, :, :8, 16:24] = 7.0  # patch 2, which is token 3 behind the class token
    hide_again = Hide()
    with listen(vit, hide_again, modules(vit)):
        torch.testing.assert_close(vit(pixel_values=other).logits, logits, atol=1e-5, rtol=1e-5)
    assert all(v.probs()[..., 3].max() == 0 for v in hide.views)


def test_take_restricts_queries_keys_and_mask():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 7, 4, generator=g) for heads in (4, 2, 2))
    index = torch.tensor([[0, 2, 5], [1, 2, 6]])
    for mask in (None, torch.randn(2, 1, 7, 7, generator=g), torch.randn(1, 1, 1, 7, generator=g)):
        view = AttentionView(q, k, v, mask, 0.5)
        small = view.take(index)
        for i, own in enumerate(index):
            full = None if mask is None else mask.expand(2, 1, 7, 7)[i : i + 1][:, :, own][..., own]
            want = AttentionView(q[i : i + 1, :, own], k[i : i + 1, :, own], v[i : i + 1, :, own], full, 0.5)
            torch.testing.assert_close(small.probs()[i : i + 1], want.probs())
            assert torch.equal(small.v[i : i + 1], want.v)


@pytest.mark.parametrize("first", ["bool", "additive"])
@pytest.mark.parametrize("second", ["bool", "additive"])
def test_masks_of_both_kinds_add_up(first, second):
    g = torch.Generator().manual_seed(0)
    q = k = v = torch.randn(1, 2, 5, 4, generator=g)
    a, b = torch.rand(2, 1, 1, 5, 5, generator=g) < 0.7
    a[..., 0] = b[..., 0] = True

    def kind(mask, name):
        return mask if name == "bool" else torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))

    view = AttentionView(q, k, v, kind(a, first), 0.5)
    both = AttentionView(q, k, v, a & b, 0.5).probs()
    if second == "additive":
        torch.testing.assert_close(view.with_bias(kind(b, second)).probs(), both)
    else:
        from keeprate.attention import _add_masks

        torch.testing.assert_close(AttentionView(q, k, v, _add_masks(view.mask, b), 0.5).probs(), both)


# --- gates ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gated(ViTMethod):
    """Closes chosen patches by straight-through gates after the first attention; nothing is registered."""

    gate: object = None  # [b, n] values in {0, 1} with a gradient
    only_open: bool = False  # list the open tokens as kept (counts must agree), instead of all
    layers: tuple[int, ...] = (1,)

    def reduce(self, t):
        kept = torch.arange(t.n).expand(len(t.x), -1)
        if self.only_open:
            kept = self.gate.detach().round().nonzero()[:, 1].view(len(t.x), -1)
        return drop(kept, gate=self.gate)


def dynamicvit(q, k, v, scaling, keep, own_token_open):
    """DynamicViT's masked softmax: exp(l_j) P_ij / sum_j exp(l_j) P_ij, with P_ii = 1 when `own_token_open`."""
    logits = (q @ k.transpose(-1, -2)) * scaling
    policy = keep[:, None, None, :].expand_as(logits)
    if own_token_open:
        policy = policy + (1 - policy) * torch.eye(logits.shape[-1])
    weight = (logits - logits.amax(-1, keepdim=True)).exp() * policy
    return weight / weight.sum(-1, keepdim=True) @ v


either = pytest.mark.parametrize("only_open", [False, True], ids=["all listed", "open listed"])


@either
def test_gates_are_dynamicvits_masked_softmax(vit, pixels, only_open):
    """Rows of open tokens equal the paper's formula. A closed token's own row differs: the paper lets it see itself
    (P_ii = 1), here it sees the open tokens only; nobody reads that row, so no open token changes."""
    n = 16
    gate = torch.rand(2, n, generator=torch.Generator().manual_seed(3)).argsort(1).lt(9).float()  # nine open in each
    keep = torch.nn.functional.pad(gate, (1, 0), value=1.0)
    seen = []

    class Catch(Watch):
        def fold(self, module, view):
            seen.append(view)

    outputs = []
    second = modules(vit)[1]
    handle = second.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    try:
        with Gated(gate, only_open)(vit, masked=True), listen(vit, Catch(), [second]), torch.no_grad():
            vit(pixel_values=pixels)
    finally:
        handle.remove()
    view = seen[0]
    got = outputs[0].view(2, n + 1, 4, 8).transpose(1, 2)
    plain = dynamicvit(view.q, view.k, view.v, view.scaling, keep, own_token_open=False)
    paper = dynamicvit(view.q, view.k, view.v, view.scaling, keep, own_token_open=True)
    tolerance = 200 * GATE_EPS * view.v.abs().max().item()
    assert (got - plain).abs().max() < tolerance
    is_open = keep.bool()[:, None, :, None].expand_as(got)
    assert (got - paper)[is_open].abs().max() < tolerance
    assert (got - paper)[~is_open].abs().max() > 100 * tolerance  # the stated difference is there


@either
def test_closed_gates_get_a_finite_gradient(vit, pixels, only_open):
    soft = torch.rand(2, 16, generator=torch.Generator().manual_seed(3)).argsort(1).div(16).requires_grad_()
    gate = (soft > 0.5).float() + soft - soft.detach()  # straight through
    with Gated(gate, only_open)(vit, masked=True):
        vit(pixel_values=pixels).logits.square().sum().backward()
    vit.zero_grad()
    closed = soft.detach() <= 0.5
    assert closed.any() and soft.grad.isfinite().all()
    assert (soft.grad[closed].abs() > 0).all() and (soft.grad[~closed].abs() > 0).all()


def test_open_gates_change_nothing_but_rounding(vit, pixels):
    with Gated(torch.ones(2, 16))(vit, masked=True), torch.no_grad():
        opened = vit(pixel_values=pixels).logits
    with torch.no_grad():
        torch.testing.assert_close(opened, vit(pixel_values=pixels).logits, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def siglip():
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = SiglipConfig(vision_config={**tower, "image_size": 32, "patch_size": 8}, text_config=tower)
    return widen(SiglipForImageClassification(config))


@either
@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_closing_by_gate_equals_dropping(request, name, pixels, only_open):
    """With hard gates the head, a class token or the mean over patches, reads what it reads after a physical drop."""
    model = request.getfixturevalue(name)
    gate = (torch.rand(1, 16, generator=torch.Generator().manual_seed(3)) < 0.6).float().expand(2, -1)

    @dataclass(frozen=True)
    class Drop(ViTMethod):
        layers: tuple[int, ...] = (1,)

        def reduce(self, t):
            return drop(gate.nonzero()[:, 1].view(2, -1))

    with torch.no_grad():
        with Drop()(model):
            dropped = model(pixel_values=pixels).logits
        with Gated(gate, only_open)(model, masked=True):
            closed = model(pixel_values=pixels).logits
    torch.testing.assert_close(closed, dropped, atol=1e-3, rtol=1e-3)


# --- the last rows ----------------------------------------------------------------------------------------------------


def last_rows_view(kind: str) -> AttentionView:
    """Five queries behind four cached tokens: causal, or with a mask of either kind, per sample or for all rows."""
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, heads, n, 8, generator=g) for heads, n in ((4, 5), (2, 9), (2, 9)))
    causal = torch.ones(5, 9, dtype=torch.bool).tril(4)[None, None]
    padding = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    padding[1, ..., :2] = False
    mask = {"causal": None, "padding": padding, "bool": causal & padding}.get(kind)
    if kind == "additive":
        mask = torch.zeros(2, 1, 5, 9).masked_fill(~(causal & padding), float("-inf"))
    return AttentionView(
        q, k, v, mask, 8**-0.5, causal=kind in ("causal", "padding"), position_ids=torch.arange(4, 9)[None]
    )


@pytest.mark.parametrize("kind", ["causal", "padding", "bool", "additive"])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 9])
def test_tail_is_the_last_rows(kind, count):
    view = last_rows_view(kind)
    part = view.tail(count)
    count = min(count, 5)
    assert torch.equal(part.q, view.q[:, :, -count:]) and part.k is view.k and part.v is view.v
    assert part.position_ids.tolist() == [list(range(9 - count, 9))]
    torch.testing.assert_close(part.probs(), view.probs()[:, :, -count:])
    torch.testing.assert_close(part.probs(), view.rows(list(range(5 - count, 5))))
    torch.testing.assert_close(part.received(), view.probs()[:, :, -count:].sum(2))


@pytest.mark.parametrize("kind", ["causal", "padding", "bool", "additive"])
def test_probs_are_softmax_over_what_a_row_may_see(kind):
    view = last_rows_view(kind)
    seen = torch.ones(2, 5, 9, dtype=torch.bool).tril(4)
    if kind != "causal":
        seen[1, :, :2] = False
    got = view.probs()
    assert got.dtype == torch.float32 and got.shape == (2, 4, 5, 9)
    for i in range(2):
        for h in range(4):
            for r in range(5):
                logits = (view.k[i, h // 2] @ view.q[i, h, r]) * view.scaling
                want = torch.zeros(9)
                want[seen[i, r]] = logits[seen[i, r]].softmax(-1)
                torch.testing.assert_close(got[i, h, r], want)
