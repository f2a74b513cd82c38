"""MLPs whose products are in 8 bits, forward and backward.

A library's layer in 8 bits knows nothing of the next one: between two of them numbers are written in 16 bits, read
for their largest, and read again to be rounded. Here an MLP is one step of autograd, so what lies between its
products is computed twice rather than stored, and rounded where it is computed.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import GELUTanh
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.siglip.modeling_siglip import SiglipMLP

from spear_lightning.models.float8 import rounding
from spear_lightning.models.float8.rounding import FORWARD, GRADIENT, MULTIPLE, gradient_units, unit_for


def _means(emulate: bool) -> ModuleType:
    """Return the module that does the work: kernels, or their reference."""
    if emulate:
        return rounding
    from spear_lightning.models.float8 import kernels

    return kernels


class _Float8Mlp(torch.autograd.Function):
    """GELU(x W^T + bias), times `x up^T` if there is one, times `down^T`.

    Legend: T tokens, D width, F channels inside.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gate_FD: Tensor,
        up_FD: Tensor | None,
        bias_F: Tensor | None,
        down_DF: Tensor,
        kind: torch.dtype,
        training: bool,
        emulate: bool,
    ) -> Tensor:
        means = _means(emulate)

        def small(values: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
            unit = unit_for(FORWARD, values.abs().amax())
            if not training:
                return rounding.rounded(values, unit, FORWARD), None, unit
            return *means.round_both_ways(values, unit, FORWARD), unit

        x, x_turned, x_unit = small(x_TD)
        gate, gate_turned, gate_unit = small(gate_FD)
        gate_TF = means.product(x, gate, x_unit, gate_unit, kind, fast=True)
        up_TF = up_turned = up_unit = None
        if up_FD is not None:
            up, up_turned, up_unit = small(up_FD)
            up_TF = means.product(x, up, x_unit, up_unit, kind, fast=True)
        largest = means.largest_of_hidden(gate_TF, up_TF, bias_F)
        hidden_unit = unit_for(FORWARD, largest.hidden)
        hidden = means.round_hidden(gate_TF, up_TF, bias_F, hidden_unit)
        down, down_turned, down_unit = small(down_DF)
        if training:
            ctx.longest_column = torch.linalg.vector_norm(down_DF, dim=0, dtype=torch.float32).amax()
        ctx.save_for_backward(gate_TF, up_TF, bias_F, x_turned, gate_turned, up_turned, down_turned)
        ctx.units = x_unit, gate_unit, up_unit, down_unit, hidden_unit
        ctx.largest = largest
        ctx.kinds = x_TD.dtype, gate_FD.dtype, kind
        ctx.emulate = emulate
        return means.product(hidden, down, hidden_unit, down_unit, kind, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor | None, ...]:
        means = _means(ctx.emulate)
        gate_TF, up_TF, bias_F, x_DT, gate_DF, up_DF, down_FD = ctx.saved_tensors
        x_unit, gate_unit, up_unit, down_unit, hidden_unit = ctx.units
        x_kind, weight_kind, kind = ctx.kinds
        unit = unit_for(GRADIENT, gradient_TD.abs().amax())
        gradient, turned = means.round_both_ways(gradient_TD, unit, GRADIENT)
        hidden_gradient = means.product(gradient, down_FD, unit, down_unit, kind)
        to_gate, to_up = gradient_units(gradient_TD, ctx.longest_column, ctx.largest)
        found = means.round_gradients(hidden_gradient, gate_TF, up_TF, bias_F, hidden_unit, to_gate, to_up)

        wanted = ctx.needs_input_grad
        x = up = gate = down = None
        if wanted[0]:
            x = means.product(found.gate_TF, gate_DF, to_gate, gate_unit, x_kind)
            if up_TF is not None:
                x = x + means.product(found.up_TF, up_DF, to_up, up_unit, x_kind)
        if wanted[1]:
            gate = means.product(found.gate_FT, x_DT, to_gate, x_unit, weight_kind)
        if wanted[2]:
            up = means.product(found.up_FT, x_DT, to_up, x_unit, weight_kind)
        if wanted[4]:
            down = means.product(turned, found.hidden_FT, unit, hidden_unit, weight_kind)
        bias = found.bias_F if wanted[3] else None
        return x, gate, up, bias, down, None, None, None


def _multiply(
    x: Tensor, gate: Tensor, up: Tensor | None, bias: Tensor | None, down: Tensor, emulate: bool
) -> Tensor:
    kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    differentiated = any(part is not None and part.requires_grad for part in (x, gate, up, bias, down))
    training = torch.is_grad_enabled() and differentiated
    x_TD = x.flatten(0, -2)
    count = x_TD.shape[0]
    # Rows of zeros: their outputs are cut off, so nothing that they multiply has a gradient.
    missing = -count % MULTIPLE if training else 0
    padded_TD = F.pad(x_TD, (0, 0, 0, missing)) if missing else x_TD
    out_TD = _Float8Mlp.apply(padded_TD, gate, up, bias, down, kind, training, emulate)
    return (out_TD[:count] if missing else out_TD).unflatten(0, x.shape[:-1])


class Float8GatedMlp(nn.Module):
    """Gemma's MLP with products in 8 bits; parameters and their names are those of the MLP it is made from.

    Args:
        mlp: The MLP.
        emulate: Compute the same in float32, on any device.
    """

    def __init__(self, mlp: GemmaMLP, emulate: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.emulate = emulate

    def forward(self, x: Tensor) -> Tensor:
        """Return what the MLP does with tokens (..., D)."""
        gate, up, down = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        return _multiply(x, gate, up, None, down, self.emulate)


class Float8Mlp(nn.Module):
    """SigLIP's MLP with products in 8 bits; parameters and their names are those of the MLP it is made from.

    Args:
        mlp: The MLP.
        emulate: Compute the same in float32, on any device.
    """

    def __init__(self, mlp: SiglipMLP, emulate: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2
        self.emulate = emulate

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return what the MLP does with tokens (..., D)."""
        out = _multiply(hidden_states, self.fc1.weight, None, self.fc1.bias, self.fc2.weight, self.emulate)
        return out + self.fc2.bias.to(out.dtype)


def replace_mlps(network: nn.Module, layers: set[str], emulate: bool = False) -> set[str]:
    """Replace the MLPs of a network all of whose linear layers are named, and return the names of these layers.

    Args:
        network: Changed in place.
        layers: Dotted names of linear layers.
        emulate: Compute the same in float32, on any device.
    """
    done: set[str] = set()
    for name, module in list(network.named_modules()):
        made: nn.Module
        parts: tuple[str, ...]
        if isinstance(module, GemmaMLP) and isinstance(module.act_fn, GELUTanh):
            parts, made = ("gate_proj", "up_proj", "down_proj"), Float8GatedMlp(module, emulate)
        elif isinstance(module, SiglipMLP) and isinstance(module.activation_fn, GELUTanh):
            parts, made = ("fc1", "fc2"), Float8Mlp(module, emulate)
        else:
            continue
        # An adapter in the place of a layer is no linear layer itself, so it is not among the names.
        within = {f"{name}.{part}" for part in parts}
        if within <= layers:
            network.set_submodule(name, made)
            done |= within
    return done
