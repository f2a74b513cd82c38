"""One training step of one sample on the meta device: its FLOPs, and the bytes that wait for the backward pass.

Nothing is computed and nothing needs memory. Products are counted by torch's own FLOP counter, forward and
backward, so that frozen parts cost what they cost. Bytes are those of the tensors that autograd keeps, each
storage once, with all floating-point tensors in the type of the products. Attention is counted as flash attention
does it: 4 B H L K d FLOPs forward, 2.5 times as many backward, and no matrix of weights is kept
(Dao et al. 2022, arXiv 2205.14135, section 3; arXiv 2307.08691, section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from spear_lightning.errors import ConfigError
from spear_lightning.models import SpearVLA
from spear_lightning.policy import Answerer
from spear_lightning.robot_data.images import CameraSpec
from spear_lightning.training.freeze_plan import named_parameters
from spear_lightning.training.network_blocks import list_entries

_ATTENTION_BACKWARD = 2.5


@dataclass
class BlockTrace:
    """What all calls of one block take in a step of one sample.

    Attributes:
        calls: How many there are.
        flops: Forward.
        kept_bytes: Kept from forward to backward.
        boundary_bytes: What enters it, and leaves it besides the tokens.
    """

    calls: int = 0
    flops: float = 0.0
    kept_bytes: float = 0.0
    boundary_bytes: float = 0.0


@dataclass(frozen=True)
class Trace:
    """What a step of one sample takes.

    Attributes:
        flops: Forward and backward.
        kept_bytes: Kept from forward to backward.
        blocks: Block name -> its part; names relative to the traced network.
        tokens: Tokens of the prefix.
    """

    flops: float
    kept_bytes: float
    blocks: dict[str, BlockTrace]
    tokens: int

    def recomputing(self, names: Collection[str]) -> Trace:
        """Return the trace of a step that computes some blocks again in the backward pass."""
        chosen = [block for name, block in self.blocks.items() if name in names and block.kept_bytes > 0]
        # One call at a time has everything again.
        largest = max((block.kept_bytes / block.calls for block in chosen), default=0.0)
        saved = sum(block.kept_bytes - block.boundary_bytes for block in chosen)
        again = sum(block.flops for block in chosen)
        return Trace(self.flops + again, self.kept_bytes - saved + largest, self.blocks, self.tokens)


def trace_step(
    network: nn.Module,
    trained: frozenset[str],
    cameras: Mapping[str, CameraSpec],
    text_tokens: int,
    horizon: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Trace:
    """Follow one sample through a network on the meta device.

    Args:
        network: `SpearVLA` or `Answerer`; its parameters get `requires_grad` and type set.
        trained: Names of the parameters that train.
        cameras: Camera name -> size of its images.
        text_tokens: Tokens of the instruction, or of questions and answers, half of them answers.
        horizon: Actions in a chunk.
        dtype: Type of the products.

    Raises:
        ConfigError: If there is no rule for such a network.
    """
    network.to(dtype)
    for name, parameter in named_parameters(network):
        parameter.requires_grad_(name in trained)
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in kept:
            kept[storage._cdata] = storage.nbytes()
            # The address of a storage that is gone may come again.
            alive.append(tensor)
        return tensor

    # Forward and backward; forward alone.
    attention = [0.0, 0.0]
    with _flash_attention(attention), FlopCounterMode(display=False) as counter:

        def totals() -> tuple[float, float]:
            return counter.get_total_flops() + attention[1], float(sum(kept.values()))

        with (
            _observed(list_entries(network), totals) as blocks,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            output, tokens = _forward(network, cameras, text_tokens, horizon, dtype)
        output.float().sum().backward()
    for parameter in network.parameters():
        parameter.grad = None
    return Trace(counter.get_total_flops() + attention[0], sum(kept.values()), blocks, tokens)


def _forward(
    network: nn.Module, cameras: Mapping[str, CameraSpec], text_tokens: int, horizon: int, dtype: torch.dtype
) -> tuple[Tensor, int]:
    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    images = {
        name: empty(1, 3, camera.height, camera.width, dtype=torch.uint8) for name, camera in cameras.items()
    }
    present = {name: empty(1, dtype=torch.bool) for name in images}
    ids, real = empty(1, text_tokens, dtype=torch.int64), empty(1, text_tokens, dtype=torch.bool)
    if isinstance(network, SpearVLA):
        prefix = network.encode_prefix(images, present, ids, real)
        expert = network.expert
        state = empty(1, expert.state_width, dtype=dtype)
        noisy = empty(1, horizon, expert.action_width, dtype=dtype)
        velocity = network.velocity(prefix, state, noisy, empty(1, dtype=torch.float32))
        return velocity, prefix.positions.shape[-1]
    if isinstance(network, Answerer):
        hidden = network.vlm(images, present, ids, real, real)
        # Logits are float32 in the loss, whose gradient is kept.
        logits = network.vlm.language_head(hidden[:, -(text_tokens // 2) :])
        return F.log_softmax(logits.float(), dim=-1), hidden.shape[1]
    raise ConfigError(
        "There is no plan for such a network", where="model", found=type(network).__name__, expected="a VLA or VLM"
    )


@contextmanager
def _observed(
    blocks: Mapping[str, nn.Module], totals: Callable[[], tuple[float, float]]
) -> Iterator[dict[str, BlockTrace]]:
    """Book FLOPs and bytes on the blocks in which they arise."""
    found = {name: BlockTrace() for name in blocks}
    before: dict[str, tuple[float, float]] = {}

    def enter(name: str, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        before[name] = totals()
        found[name].boundary_bytes += arguments[0].untyped_storage().nbytes()

    def leave(name: str, _: nn.Module, __: Any, output: Any) -> None:
        flops, kept = totals()
        block = found[name]
        block.calls += 1
        block.flops += flops - before[name][0]
        block.kept_bytes += kept - before[name][1]
        if isinstance(output, tuple):
            block.boundary_bytes += sum(part.untyped_storage().nbytes() for part in output[1])

    hooks = []
    for name, block in blocks.items():
        hooks.append(block.register_forward_pre_hook(partial(enter, name)))
        hooks.append(block.register_forward_hook(partial(leave, name)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class _Attention(torch.autograd.Function):
    """Keeps what flash attention keeps, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextmanager
def _flash_attention(flops: list[float]) -> Iterator[None]:
    plain, autocast = F.scaled_dot_product_attention, torch.autocast

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        batch, heads, length, width = query.shape
        forward = 4.0 * batch * heads * length * key.shape[2] * width
        trains = query.requires_grad or key.requires_grad or value.requires_grad
        flops[0] += forward * (1 + _ATTENTION_BACKWARD * trains)
        flops[1] += forward
        return _Attention.apply(query, key, value)

    F.scaled_dot_product_attention = attention
    # The meta device knows no autocast; all is in the type of the products already.
    torch.autocast = lambda *_, **__: nullcontext()  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        F.scaled_dot_product_attention, torch.autocast = plain, autocast  # type: ignore[misc]
