"""Numbers in 8 bits, and what `kernels` computes with them, written plainly: the reference, and for any device.

Two kinds: e4m3 for what goes forward (3 bits of mantissa, largest 448) and e5m2 for gradients (2 bits, largest
57,344). A matrix has one unit (float32 scalar), by which it is divided before it is rounded.

Legend: T tokens, F channels inside an MLP, M and N any sides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2

MULTIPLE = 16
"""Sides of matrices that the hardware multiplies in 8 bits are multiples of this."""

STEEPEST = 1.13
"""More than the largest slope of GELU (1.129)."""

ROUNDED_UP = 1.2
"""A product of a `GRADIENT` and a `FORWARD` grows by this at most if both are rounded: (1 + 1/8) (1 + 1/16)."""


class Largest(NamedTuple):
    """Largest absolute values, float32 scalars."""

    hidden: Tensor
    gate: Tensor
    up: Tensor


class HiddenGradients(NamedTuple):
    """What the backward pass through the activation gives; those that end in T are transposed."""

    hidden_FT: Tensor
    gate_TF: Tensor
    gate_FT: Tensor
    up_TF: Tensor | None
    up_FT: Tensor | None
    bias_F: Tensor | None


def unit_for(kind: torch.dtype, largest: Tensor) -> Tensor:
    """Return the unit with which the largest absolute value comes to the end of a kind's range."""
    return largest.float().clamp(min=1e-12) / torch.finfo(kind).max


def gradient_units(gradient_TD: Tensor, longest_column: Tensor, largest: Largest) -> tuple[Tensor, Tensor]:
    """Return units for the gradients of `gate` and `up`, with which none of them is beyond the end of the range.

    They come from bounds instead of the largest values, for which all would have to be read or computed once
    more: numbers with five bits of exponent lose nothing if their range is not used to the end. No product of two
    vectors is larger than that of their lengths.

    Args:
        gradient_TD: The gradient of the MLP's output, not rounded.
        longest_column: The length of the longest column of the last weight (D, F), float32 scalar.
        largest: What `hidden` is made of.
    """
    longest_row = torch.linalg.vector_norm(gradient_TD, dim=1, dtype=torch.float32).amax()
    bound = longest_row * longest_column * ROUNDED_UP
    return unit_for(GRADIENT, bound * largest.up * STEEPEST), unit_for(GRADIENT, bound * largest.gate)


def rounded(values: Tensor, unit: Tensor, kind: torch.dtype) -> Tensor:
    """Return values over their unit in 8 bits; what is beyond the range becomes the largest number."""
    end = torch.finfo(kind).max
    return (values.float() * (1 / unit)).clamp(-end, end).to(kind)


def round_both_ways(values_MN: Tensor, unit: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return values over their unit in 8 bits, (M, N) and transposed (N, M), each with contiguous rows."""
    small_MN = rounded(values_MN, unit, kind)
    return small_MN, small_MN.t().contiguous()


def hidden(gate_TF: Tensor, up_TF: Tensor | None, bias_F: Tensor | None) -> Tensor:
    """Return what is between an MLP's products in float32: GELU(gate + bias), times `up` if there is one."""
    gate_TF = gate_TF.float() if bias_F is None else gate_TF.float() + bias_F.float()
    activated_TF = F.gelu(gate_TF, approximate="tanh")
    return activated_TF if up_TF is None else activated_TF * up_TF.float()


def largest_of_hidden(gate_TF: Tensor, up_TF: Tensor | None, bias_F: Tensor | None) -> Largest:
    """Return the largest absolute values of `hidden` and of its factors; an absent `up` counts as 1."""
    gate = gate_TF.float() if bias_F is None else gate_TF.float() + bias_F.float()
    up = gate.new_ones(()) if up_TF is None else up_TF.float().abs().max()
    return Largest(hidden(gate_TF, up_TF, bias_F).abs().max(), gate.abs().max(), up)


def round_hidden(gate_TF: Tensor, up_TF: Tensor | None, bias_F: Tensor | None, unit: Tensor) -> Tensor:
    """Return `hidden` in 8 bits."""
    return rounded(hidden(gate_TF, up_TF, bias_F), unit, FORWARD)


def round_gradients(
    gradient_TF: Tensor,
    gate_TF: Tensor,
    up_TF: Tensor | None,
    bias_F: Tensor | None,
    unit: Tensor,
    gate_unit: Tensor,
    up_unit: Tensor,
) -> HiddenGradients:
    """Pass a gradient back through the activation, and round everything that products need.

    Args:
        gradient_TF: Gradient of `hidden`.
        gate_TF: As in `hidden`.
        up_TF: As in `hidden`.
        bias_F: As in `hidden`.
        unit: Unit of `hidden`.
        gate_unit: Unit of the gradient of `gate`.
        up_unit: Unit of the gradient of `up`.
    """
    with torch.enable_grad():
        gate_TF = gate_TF.detach().float().requires_grad_()
        up_TF = None if up_TF is None else up_TF.detach().float().requires_grad_()
        hidden_TF = hidden(gate_TF, up_TF, bias_F)
        wanted = [gate_TF] if up_TF is None else [gate_TF, up_TF]
        gradients = torch.autograd.grad(hidden_TF, wanted, gradient_TF.float())
    _, hidden_FT = round_both_ways(hidden_TF.detach(), unit, FORWARD)
    gate = round_both_ways(gradients[0], gate_unit, GRADIENT)
    up = (None, None) if up_TF is None else round_both_ways(gradients[1], up_unit, GRADIENT)
    bias_F = None if bias_F is None else gradients[0].sum(0)
    return HiddenGradients(hidden_FT, gate[0], gate[1], up[0], up[1], bias_F)


def product(
    a_MK: Tensor, b_NK: Tensor, a_unit: Tensor, b_unit: Tensor, kind: torch.dtype, fast: bool = False
) -> Tensor:
    """Return a b^T of rounded matrices, (M, N) of a given kind, computed in float32."""
    return ((a_MK.float() @ b_NK.float().t()) * (a_unit * b_unit)).to(kind)
