"""AdamW in one pass over memory, in which gradients are clipped as well."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

BLOCK, WARPS = 512, 4
"""Numbers that a program updates, and its groups of 32 threads."""

_ALIGNMENT = 16
"""Bytes at which one instruction can read a group of numbers."""

_HAS_TRITON = find_spec("triton") is not None

_MOMENTS = ("exp_avg", "exp_avg_sq")


class _Layout(NamedTuple):
    """Which blocks of which tensors the programs update, on the device.

    Attributes:
        sizes: int64 (N,), how many numbers each tensor has.
        first_blocks: int32 (N,), the first block of each.
        tensor_of_block: int32 (blocks,).
    """

    sizes: Tensor
    first_blocks: Tensor
    tensor_of_block: Tensor


class OnePassAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with `fused: True` that clips gradients where it reads them.

    Clipping by the norm multiplies all gradients by one factor: a pass over memory, a quarter of AdamW's own. Here
    `clip` keeps that factor for the next step; the gradients themselves stay as they are. The state is that of
    torch's, so that each goes on where the other stopped. If parameters are not all contiguous float32 on one GPU,
    or Triton is missing, torch's own kernels do the work.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        emulate: Run the Triton program on any device; needs Triton's interpreter.
    """

    emulate = False
    _factor: Tensor | None = None

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        emulate: bool = False,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        # A scaler of float16's losses is to divide gradients itself, before they are clipped.
        self._step_supports_amp_scaling = False
        self.emulate = emulate
        self._layouts: dict[tuple[int, ...], _Layout] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a pickle's state, which holds nothing but what torch's optimizers have."""
        super().__setstate__(state)
        self._step_supports_amp_scaling = False
        self._layouts = {}

    @torch.no_grad()
    def clip(self, largest_norm: float) -> Tensor:
        """Bring the gradients' norm down to a largest one where the next step reads them.

        Args:
            largest_norm: Above 0.

        Returns:
            The norm of the gradients as they are (scalar of their type).
        """
        norm = torch.nn.utils.get_total_norm([gradient for _, gradient in self._with_gradients()])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._factor = (largest_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and with them their factor."""
        super().zero_grad(set_to_none)
        self._factor = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        factor, self._factor = self._factor, None
        pairs = self._with_gradients()
        if self._suit(pairs):
            for group in self.param_groups:
                self._one_pass(group, factor)
            return loss
        if factor is not None:
            torch._foreach_mul_([_own_part(gradient) for _, gradient in pairs], factor)
        super().step()
        return loss

    def _with_gradients(self) -> list[tuple[Tensor, Tensor]]:
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        return [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]

    def _suit(self, pairs: list[tuple[Tensor, Tensor]]) -> bool:
        """Return whether the program can update these parameters with these gradients."""
        if not (self.emulate or _HAS_TRITON) or len({parameter.device for parameter, _ in pairs}) > 1:
            return False
        for parameter, gradient in pairs:
            state = self.state[parameter]
            moments = [state[name] for name in _MOMENTS if name in state]
            contiguous = all(_own_part(part).is_contiguous() for part in (parameter, *moments))
            float32 = all(part.dtype == torch.float32 for part in (parameter, gradient, *moments))
            if not (contiguous and float32 and (self.emulate or parameter.is_cuda)):
                return False
        return True

    @torch.no_grad()
    def _one_pass(self, group: dict[str, Any], factor: Tensor | None) -> None:
        rows: list[list[Tensor]] = []
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device, dtype=torch.float32)
                state.update({name: torch.zeros_like(parameter) for name in _MOMENTS})
            # A state that torch has saved without `fused` counts steps on the processor.
            state["step"] = state["step"].to(parameter.device, torch.float32)
            moments = [_own_part(state[name]) for name in _MOMENTS]
            rows.append([_own_part(parameter), _own_part(parameter.grad).contiguous(), *moments, state["step"]])
        if not rows:
            return
        torch._foreach_add_([step for *_, step in rows], 1)
        device = rows[0][0].device
        # Parts of a bucket of gradients may begin anywhere.
        alignments = [all(part.data_ptr() % _ALIGNMENT == 0 for part in row[:-1]) for row in rows]
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for aligned in set(alignments):
                chosen = [row for row, found in zip(rows, alignments, strict=True) if found == aligned]
                self._launch(chosen, group, factor, device, aligned)

    def _launch(
        self,
        rows: list[list[Tensor]],
        group: dict[str, Any],
        factor: Tensor | None,
        device: torch.device,
        aligned: bool,
    ) -> None:
        from spear_lightning.training.adamw_program import adamw

        pointers = torch.tensor([[part.data_ptr() for part in row] for row in rows], dtype=torch.int64)
        layout = self._layout(tuple(row[0].numel() for row in rows), device)
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        adamw[(len(layout.tensor_of_block),)](
            *(_to_device(pointers, device), *layout, factor, lr, lr * group["weight_decay"]),
            *(beta1, beta2, _log(beta1), _log(beta2), group["eps"]),
            ALIGNED=aligned,
            CLIPPED=factor is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )

    def _layout(self, sizes: tuple[int, ...], device: torch.device) -> _Layout:
        """Return the blocks of tensors of some sizes, which are kept: a run has few of them."""
        if sizes not in self._layouts:
            blocks = torch.tensor([-(-size // BLOCK) for size in sizes])
            first_blocks = blocks.cumsum(0) - blocks
            tensor_of_block = torch.arange(len(sizes)).repeat_interleave(blocks)
            parts = torch.tensor(sizes), first_blocks.int(), tensor_of_block.int()
            self._layouts[sizes] = _Layout(*(_to_device(part, device) for part in parts))
        return self._layouts[sizes]


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


def _own_part(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy on a device, for which the processor does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
