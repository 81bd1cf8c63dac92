"""The output head with its logits and without: the same numbers, the same gradients."""

import pytest
import torch

from keeprate.sft import head as heads
from keeprate.sft.head import LinearHead, LogitsHead


@pytest.mark.parametrize(("rows", "cap", "bias"), [(7, None, False), (40, 5.0, True), (3, None, True)])
def test_top_logits_come_with_the_loss_in_one_pass(monkeypatch, rows, cap, bias):
    t, v, c = 40, 97, 8
    monkeypatch.setattr(heads, "ROWS", rows * v)
    g = torch.Generator().manual_seed(0)
    hidden, weight, shift = (torch.randn(s, generator=g, requires_grad=True) for s in ((t, c), (v, c), (v,)))
    label = torch.randint(0, v, (t,), generator=g)
    lean = LinearHead(hidden, weight, shift if bias else None, cap)
    logits = hidden @ weight.T + (shift if bias else 0)
    full = LogitsHead(logits if cap is None else cap * (logits / cap).tanh())
    (found, top), (want, wanted) = (head.stats_and_top(label, 5) for head in (lean, full))
    torch.testing.assert_close(top, wanted)
    torch.testing.assert_close(found.nll, want.nll)
    assert torch.equal(found.correct, want.correct) and not top.requires_grad
    coefficient = torch.rand(t, generator=g) * (torch.arange(t) % 3 > 0)
    leaves = (hidden, weight, shift) if bias else (hidden, weight)
    ours, theirs = (torch.autograd.grad((x.nll * coefficient).sum(), leaves, retain_graph=True) for x in (found, want))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_top_logits_in_bf16_leave_the_gradient_exact():
    """Log-sum-exp and the probabilities of the backward pass must come from the same logits, large ones too."""
    t, v, c = 64, 97, 32
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(s, generator=g).bfloat16().requires_grad_() for s in ((t, c), (v, c)))
    with torch.no_grad():
        hidden *= 2.5
    label = torch.randint(0, v, (t,), generator=g)
    head = LinearHead(hidden, weight)
    assert float((hidden @ weight.T).detach().abs().max()) > 32
    (found, top), plain = head.stats_and_top(label, 5), head.stats(label)
    torch.testing.assert_close(found.nll, plain.nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(top, (hidden.float() @ weight.float().T).topk(5).values.detach(), rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(x.nll.sum(), hidden)[0].float() for x in (found, plain))
    assert float((ours - theirs).norm()) < 1e-3 * float(theirs.norm())


def test_no_token_is_no_problem():
    found, top = LinearHead(torch.zeros(0, 4), torch.zeros(9, 4)).stats_and_top(torch.zeros(0, dtype=torch.long), 3)
    assert found.nll.shape == (0,) and top.shape == (0, 3)
