"""The strategy that divides weights, gradients, optimizer state and averages among processes (spec section 11)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from spear_lightning.errors import CheckpointError, ConfigError
from spear_lightning.policy.sharded_files import AVERAGES, OPTIMIZER, STATE, SavedTensors, read_meta
from spear_lightning.training.checkpoint_writing import (
    IN_BACKGROUND,
    SaveUnderWay,
    begin_folder,
    partial_path,
    remove,
)
from spear_lightning.training.freeze_schedule import FreezeSchedule
from spear_lightning.training.sharding import heed_new_values


class ShardedStrategy(ModelParallelStrategy):
    """Divides the training among processes with FSDP2, and writes checkpoints that any number of them can resume.

    Every process holds an equal share of weights, gradients, optimizer state and averages, all in float32, and
    gathers the weights of a block when it computes it. Only the first process builds the network with values;
    they are handed out tensor by tensor. A checkpoint is a folder: each process writes its share as safetensors,
    the first one all plain values. It is complete when it has its name.

    Args:
        shard_size: Processes among which one copy of the weights is divided: `null` for all; the number of GPUs
            of a node keeps the gathering within nodes, at the price of memory. Gradients are always averaged
            over all processes.
        reshard_after_forward: Whether the backward pass gathers blocks again; `False` takes more memory and less
            communication.
        process_group_backend: Backend of torch.distributed; `null`: NCCL on GPUs, gloo on CPUs.
    """

    saves_shards = True
    """Whether checkpoints take tensors divided as they are."""

    def __init__(
        self,
        shard_size: int | None = None,
        reshard_after_forward: bool = True,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend)
        self.shard_size = shard_size
        self.reshard_after_forward = reshard_after_forward
        self.save_under_way = SaveUnderWay()
        self._writers: dist.ProcessGroup | None = None
        self._path: Path | None = None

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Return how data is divided: every process has its own."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether the trainer asks for the optimizer's state: after it has checked the checkpoint."""
        return True

    def setup_environment(self) -> None:
        """Start the processes' communication.

        Raises:
            ConfigError: If the processes cannot be divided as `shard_size` says.
        """
        world_size = self.num_nodes * self.num_processes
        shard_size = self.shard_size or world_size
        if shard_size < 1 or world_size % shard_size:
            raise ConfigError(
                "The processes cannot be divided into groups of this size",
                where="trainer.strategy.shard_size",
                found=shard_size,
                expected=f"a divisor of {world_size}, or null",
            )
        self._data_parallel_size, self._tensor_parallel_size = world_size, 1
        super().setup_environment()
        sizes = {"replicate": world_size // shard_size, "shard": shard_size}
        if shard_size == world_size:
            del sizes["replicate"]
        self._device_mesh = init_device_mesh(
            self.root_device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)
        )
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return this process's share of the weights."""
        return get_model_state_dict(self._network, options=StateDictOptions(cpu_offload=False))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return this process's share of an optimizer's state, by names of parameters."""
        names = self._parameter_names()
        tensors, scalars = {}, {}
        for parameter, entries in optimizer.state.items():
            name = names[parameter]
            tensors.update({f"{key}.{name}": value for key, value in entries.items() if value.ndim > 0})
            scalars[name] = {key: value.item() for key, value in entries.items() if value.ndim == 0}
        groups = [
            {**group, "params": [names[parameter] for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        return {"tensors": tensors, "scalars": scalars, "param_groups": groups}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, whole or not at all; all processes must call it.

        Args:
            checkpoint: Lightning's entries.
            filepath: The folder; that of the first process counts.
            storage_options: `IN_BACKGROUND` to return when all is copied to CPU memory; else it is on disk.

        Raises:
            CheckpointError: If it, or one that was begun earlier, could not be written by all processes.
        """
        self.save_under_way.wait()
        path = Path(self.broadcast(filepath))
        if self._writers is None:
            # Its own, since training goes on communicating in the others; CPUs need no GPU to talk.
            self._writers = dist.new_group(backend="gloo")
        if self.global_rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial_path(path), ignore_errors=True)
        self.barrier()
        plain = dict(checkpoint)
        optimizers = plain.pop("optimizer_states", [])
        tensors = _named(STATE, plain.pop("state_dict")) | _named(AVERAGES, plain.pop("ema", {}))
        for state in optimizers:
            tensors |= _named(OPTIMIZER, state["tensors"])
        plain["optimizer_states"] = [
            {key: state[key] for key in ("scalars", "param_groups")} for state in optimizers
        ]
        self.save_under_way.begin(
            begin_folder(tensors, plain, path, self.save_under_way.stager, self._writers), path
        )
        if storage_options != IN_BACKGROUND:
            self.save_under_way.wait()

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint, once the one that is being written is complete."""
        if self.global_rank == 0:
            self.save_under_way.afterwards(lambda: remove(Path(filepath)))

    def teardown(self) -> None:
        """Wait for what is being written, and end."""
        self.save_under_way.close()
        super().teardown()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint's plain values and averages; weights and optimizer follow when these are checked.

        Raises:
            CheckpointError: If it is incomplete or in one file.
        """
        path = Path(self.broadcast(checkpoint_path))
        if not path.is_dir():
            raise CheckpointError(
                "The run to resume was not trained with this strategy",
                where="--ckpt_path",
                found=f"{path}, a file",
                expected="a folder",
                remedy="resume it with its own strategy, or start a new run with --model.init_from",
            )
        self._path = path
        checkpoint = read_meta(path)
        saved = SavedTensors(path, STATE)
        checkpoint["state_dict"] = {name: torch.empty(saved.shape(name), device="meta") for name in saved}
        checkpoint["ema"] = self._read_averages(path)
        trainer = self.lightning_module.trainer if self.lightning_module else None
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, FreezeSchedule) and callback.state_key in checkpoint["callbacks"]:
                    phase = checkpoint["callbacks"][callback.state_key]["phase"]
                    callback.enter_phase(trainer, self.lightning_module, phase)  # type: ignore[arg-type]
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Read this process's share of the weights of the checkpoint that was loaded last."""
        self._read(_named(STATE, self.lightning_module_state_dict()))
        heed_new_values(self._network)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Read this process's share of the optimizers' state of the checkpoint that was loaded last."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            _check_groups(optimizer, saved["param_groups"], self._parameter_names())
            self._read_optimizer(optimizer, saved)

    def _read_optimizer(self, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
        assert self._path is not None
        parameters = {name: parameter for parameter, name in self._parameter_names().items()}
        tensors: dict[str, Tensor] = {}
        for full_name in SavedTensors(self._path, OPTIMIZER):
            key, name = full_name.split(".", 1)
            tensors[full_name] = torch.zeros_like(parameters[name].detach())
            optimizer.state[parameters[name]][key] = tensors[full_name]
        for name, scalars in saved["scalars"].items():
            on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
            device = parameters[name].device if on_device else "cpu"
            for key, value in scalars.items():
                optimizer.state[parameters[name]][key] = torch.tensor(value, dtype=torch.float32, device=device)
        for group, values in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            group.update({key: value for key, value in values.items() if key != "params"})
        self._read(_named(OPTIMIZER, tensors))

    def _read_averages(self, path: Path) -> dict[str, Tensor]:
        own = dict(self._network.named_parameters(remove_duplicate=False))
        saved = SavedTensors(path, AVERAGES)
        # Averages of unknown parameters are left for the callback to refuse.
        averages = {
            name: torch.empty_like(own[name], dtype=torch.float32, requires_grad=False)
            if name in own and own[name].shape == saved.shape(name)
            else torch.empty(saved.shape(name), device="meta")
            for name in saved
        }
        self._read(_named(AVERAGES, {name: value for name, value in averages.items() if not value.is_meta}))
        return averages

    def _read(self, tensors: dict[str, Tensor]) -> None:
        assert self._path is not None
        if tensors:
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(self._path)))

    @property
    def _network(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def _parameter_names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self._network.named_parameters()}


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _check_groups(optimizer: Optimizer, saved: list[dict[str, Any]], names: dict[Tensor, str]) -> None:
    own = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    if own != [group["params"] for group in saved]:
        raise CheckpointError(
            "The optimizer of the run to resume has other parameters",
            where="--ckpt_path",
            found=f"groups of {[len(group['params']) for group in saved]} parameters",
            expected=f"groups of {[len(group) for group in own]} parameters",
            remedy="use the configuration and the freeze schedule that the run was started with",
        )
