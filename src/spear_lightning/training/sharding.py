"""Divide a module's weights among processes, block by block (FSDP2).

Every block of every transformer is a unit: gathered before it runs, divided again after. So is the token
embedding. All that remains (norms, projections, the small layers around a network) is one unit of its own,
gathered once a step, whose weights stay in float32: autocast rounds what may be rounded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from spear_lightning.models.gemma import GemmaLanguageModel
from spear_lightning.training.network_blocks import list_entries


def is_sharded(module: nn.Module) -> bool:
    """Return whether a module's weights are divided already."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def shard_blocks(
    root: nn.Module,
    methods: Iterable[str],
    mesh: DeviceMesh,
    compute_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
) -> None:
    """Divide a module's weights; gradients are averaged over the mesh in float32.

    Frozen weights are divided as well: they are gathered to compute with, but have no gradient, hence none is
    communicated. A part that begins to train later needs no other treatment.

    Args:
        root: What steps call; its weights may be on the meta device.
        methods: Names of the root's methods that steps call, besides `forward`.
        mesh: Processes; of two dimensions the first holds copies, and the weights are divided along the last.
        compute_dtype: Type in which blocks are gathered and computed; `None` keeps that of the weights.
        reshard_after_forward: Whether the backward pass gathers blocks again. `False` keeps them: less
            communication, more memory.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # Keys and values are views of projections; nothing changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for block in list_entries(root).values():
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    for part in root.modules():
        if isinstance(part, GemmaLanguageModel):
            # The output head reads the same table after the embedding's own forward.
            fully_shard(part.embed_tokens, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(root, mesh=mesh, mp_policy=whole, reshard_after_forward=False)
    for name in methods:
        register_fsdp_forward_method(root, name)


@torch.no_grad()
def give_values(root: nn.Module, values: dict[str, Tensor] | None, device: torch.device) -> None:
    """Give a divided module on the meta device memory and the values of the first process.

    One tensor at a time is whole on the device; only the first process holds all of them, in CPU memory.

    Args:
        root: The module; all its tensors are replaced.
        values: Names of parameters and buffers -> tensors; `None` in all processes but the first.
        device: Where the processes compute.
    """
    root.to_empty(device=device)
    tensors = {**dict(root.named_parameters()), **dict(root.named_buffers())}
    for name, tensor in tensors.items():
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if values is not None:
            whole.copy_(values[name])
        if isinstance(tensor, DTensor):
            tensor.to_local().copy_(distribute_tensor(whole, tensor.device_mesh, tensor.placements).to_local())
        else:
            if dist.get_world_size() > 1:
                dist.broadcast(whole, src=0)
            tensor.copy_(whole)
    heed_new_values(root)


def heed_new_values(root: nn.Module) -> None:
    """Let parts read the values that they keep as plain numbers too, as they do when a state is loaded."""
    for part in root.modules():
        for hook in part._load_state_dict_post_hooks.values():
            hook(part, None)


def let_frozen_parts_train_later(root: nn.Module) -> None:
    """Let FSDP2 note the types of all gradients before its first use, also of parts that are frozen now.

    It notes them once, of what trains at that time. Without this, a part that is frozen at first would later get
    gradients in the type of the products.
    """
    trains = {parameter: parameter.requires_grad for parameter in root.parameters()}
    for parameter in trains:
        parameter.requires_grad_(parameter.is_floating_point())
    # torch 2.11 to 2.13 have no public name for it.
    root._get_fsdp_state()._lazy_init()  # type: ignore[operator]
    for parameter, trained in trains.items():
        parameter.requires_grad_(trained)


def values_of(root: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters and buffers by name."""
    return {name: tensor.detach() for name, tensor in [*root.named_parameters(), *root.named_buffers()]}
