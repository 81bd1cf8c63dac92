"""Rotary position embeddings, put on and taken off: a rotation by known angles, so nothing is projected twice."""

import torch

from keeprate.anatomy import Decoder


def _angles(positions: torch.Tensor, body: Decoder, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for positions [b|1, m] or [b, heads, m], shaped to meet [b, heads, m, d]."""
    if positions.dim() == 2:
        cos, sin = body.rotary(positions, layer)
        return cos[:, None].float(), sin[:, None].float()
    b, g, m = positions.shape
    cos, sin = body.rotary(positions.reshape(b, g * m), layer)
    return cos.view(b, g, m, -1).float(), sin.view(b, g, m, -1).float()


def _half(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def rotate(x: torch.Tensor, positions: torch.Tensor, body: Decoder, layer: int) -> torch.Tensor:
    """Put positions on queries or keys.

    Args:
        x: [b, heads, m, d] without positions.
        positions: [b|1, m], or [b, heads, m] where heads hold different tokens.
        body: The model's anatomy.
        layer: Number of the layer in the model, from 0.

    Returns:
        [b, heads, m, d] in fp32.
    """
    cos, sin = _angles(positions, body, layer)
    return turn(x.float(), cos, sin)


def unrotate(x: torch.Tensor, positions: torch.Tensor, body: Decoder, layer: int) -> torch.Tensor:
    """Take positions off again: the inverse of `rotate`, same shapes."""
    cos, sin = _angles(positions, body, layer)
    return turn(x.float(), cos, -sin) / (cos.square() + sin.square())


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x cos + J x sin, with cosines and sines that meet x: a rotation, or a mean of rotations."""
    return x * cos + _half(x) * sin


def average_rotation(first: torch.Tensor, count: int, body: Decoder, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cosines and sines over the positions first, ..., first + count - 1: first [b] -> two tensors [b, 1, d]."""
    cos, sin = body.rotary(first[:, None] + torch.arange(count, device=first.device), layer)
    return cos.float().mean(1, keepdim=True), sin.float().mean(1, keepdim=True)
