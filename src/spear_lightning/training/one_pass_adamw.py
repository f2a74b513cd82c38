"""AdamW that reads and writes every number once a step, clipping included."""

from __future__ import annotations

import math
from collections.abc import Callable
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
    `clip` keeps that factor for the next step. Its state is that of torch's, so that each goes on where the other
    stopped. Where a parameter is not float32 on CUDA, or Triton is missing, torch's own kernels do the same.

    Args:
        params: Parameters, or groups of them.
        emulate: Run the Triton program on any device; needs Triton's interpreter.
        **options: See `torch.optim.AdamW`.
    """

    def __init__(self, params: Any, emulate: bool = False, **options: Any) -> None:
        super().__init__(params, **{**options, "fused": True})
        # A scaler of float16's losses is to divide gradients itself, before they are clipped.
        self._step_supports_amp_scaling = False
        self.emulate = emulate
        self._factor: Tensor | None = None
        self._layouts: dict[tuple[int, ...], _Layout] = {}

    @torch.no_grad()
    def clip(self, largest_norm: float) -> Tensor:
        """Bring the gradients' norm down to a largest one where the next step reads them.

        Returns:
            The norm of the gradients as they are (float32 scalar).
        """
        norm = torch.nn.utils.get_total_norm([gradient for _, gradient in self._with_gradients()])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._factor = (largest_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    def _with_gradients(self) -> list[tuple[Tensor, Tensor]]:
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        return [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        factor, self._factor = self._factor, None
        pairs = self._with_gradients()
        if all(self._suits(parameter) for parameter, _ in pairs):
            for group in self.param_groups:
                self._one_pass(group, factor)
            return loss
        if factor is not None:
            torch._foreach_mul_([_own_part(gradient) for _, gradient in pairs], factor)
        super().step()
        return loss

    def _suits(self, parameter: Tensor) -> bool:
        own, state = _own_part(parameter), self.state[parameter]
        somewhere = self.emulate or (own.is_cuda and _HAS_TRITON)
        parts = [own, *(_own_part(state[name]) for name in _MOMENTS if name in state)]
        return somewhere and own.dtype == torch.float32 and all(part.is_contiguous() for part in parts)

    @torch.no_grad()
    def _one_pass(self, group: dict[str, Any], factor: Tensor | None) -> None:
        rows: list[list[Tensor]] = []
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state.update({name: torch.zeros_like(parameter) for name in _MOMENTS})
            # A state that torch has saved without `fused` counts steps on the processor.
            state["step"] = state["step"].to(parameter.device)
            moments = [_own_part(state[name]) for name in _MOMENTS]
            rows.append([_own_part(parameter), _own_part(parameter.grad).contiguous(), *moments, state["step"]])
        if rows:
            torch._foreach_add_([step for *_, step in rows], 1)
            self._launch(rows, group, factor)

    def _launch(self, rows: list[list[Tensor]], group: dict[str, Any], factor: Tensor | None) -> None:
        from spear_lightning.training.adamw_program import adamw

        pointers = [[part.data_ptr() for part in row] for row in rows]
        device = rows[0][0].device
        layout = self._layout(tuple(row[0].numel() for row in rows), device)
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        adamw[(len(layout.tensor_of_block),)](
            _to_device(torch.tensor(pointers, dtype=torch.int64), device),
            *(*layout, factor, lr, 1 - lr * group["weight_decay"]),
            *(beta1, beta2, _log(beta1), _log(beta2), group["eps"]),
            ALIGNED=all(pointer % _ALIGNMENT == 0 for row in pointers for pointer in row[:-1]),
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
