"""Exponential moving average of the weights, for one GPU and for sharded modules alike (spec section 11)."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from spear_lightning.errors import CheckpointError, ConfigError

EMA_KEY = "ema"
"""Entry of a checkpoint with the averages: name relative to the LightningModule -> float32 tensor."""


class ExponentialMovingAverage(Callback):
    """Averages the weights after optimizer steps, and validates, tests and predicts with the averages.

    `average += (1 - d) (weight - average)` with `d = min(decay, (1 + n) / (10 + n))`, n the updates the parameter
    has had before. An average begins as the value before the first step in which its parameter trains, so that
    parts which a freeze schedule trains later have a warm-up of their own. Parts that are frozen later go on
    being averaged and thereby converge to the frozen values, which is what the other parts train against.
    Buffers and parameters that never trained are used as they are.

    Averages are kept in float32, element by element, on local shards where the module is sharded. Outside of
    validation, test and prediction the module holds the raw weights, also at the end of training. Checkpoints
    hold raw weights in `state_dict` and averages in `ema`, whenever they are written; only those without
    optimizer state (`save_weights_only`) have no averages, since Lightning calls no callback for them.

    Args:
        decay: Upper limit of d, in [0, 1).
        start_step: Optimizer step from which weights are averaged.
        every_n_steps: Optimizer steps between updates.
        on_device: Whether averages live beside the weights; False keeps them in CPU memory, at the price of a
            copy of all weights at each update. Those of sharded modules always live beside the weights.
    """

    def __init__(
        self, decay: float = 0.999, start_step: int = 0, every_n_steps: int = 1, on_device: bool = True
    ) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(
                "The decay of the average is wrong", where="decay", found=decay, expected="in [0, 1)"
            )
        if start_step < 0 or every_n_steps < 1:
            raise ConfigError(
                "The steps of the average are wrong",
                where="start_step, every_n_steps",
                found=(start_step, every_n_steps),
                expected="at least 0, at least 1",
            )
        self.decay = decay
        self.start_step = start_step
        self.every_n_steps = every_n_steps
        self.on_device = on_device
        self._averages: dict[str, Tensor] = {}
        self._born: dict[str, int] = {}
        self._updates = 0
        self._stepped = False
        self._raw: dict[str, Tensor] = {}

    @property
    def swapped(self) -> bool:
        """Whether the module holds the averages at the moment."""
        return bool(self._raw)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates, in all and at the birth of each average."""
        return {"updates": self._updates, "born": dict(self._born)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counters; the averages come through `on_load_checkpoint`."""
        self._updates = state_dict["updates"]
        self._born = dict(state_dict["born"])

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the averages; put raw weights into `state_dict` if the module holds averages at the moment."""
        state = checkpoint["state_dict"]
        names = _aliases(pl_module)
        checkpoint[EMA_KEY] = {}
        in_shards = getattr(trainer.strategy, "saves_shards", False)
        for name, average in self._averages.items():
            whole = average if in_shards else _whole(average)
            # The process that writes the file keeps it; in the others it would only fill memory.
            if in_shards or trainer.is_global_zero:
                checkpoint[EMA_KEY].update(dict.fromkeys(names[name], whole))
            if self.swapped:
                raw = self._raw[name]
                saved = [alias for alias in names[name] if alias in state]
                kept_sharded = any(isinstance(state[alias], DTensor) for alias in saved)
                state.update(dict.fromkeys(saved, raw if kept_sharded else _whole(raw)))

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the averages of a checkpoint.

        Raises:
            CheckpointError: If it has averages of parameters that the module does not have.
        """
        saved = checkpoint.get(EMA_KEY) or {}
        parameters = dict(pl_module.named_parameters())
        aliases = {alias for names in _aliases(pl_module).values() for alias in names}
        wrong = sorted(
            name
            for name, average in saved.items()
            if name not in aliases or (name in parameters and parameters[name].shape != average.shape)
        )
        if wrong:
            raise CheckpointError(
                "The checkpoint has averages of parameters that the model does not have",
                where=EMA_KEY,
                found=f"{len(wrong)}: {wrong[:3]}",
                remedy="use the configuration the checkpoint was trained with",
            )
        self._averages = {
            name: self._placed(
                _sharded_as(parameters[name], average.to(torch.float32, copy=True)), parameters[name]
            )
            for name, average in saved.items()
            if name in parameters
        }

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Begin averages of what trains in this step and did not before."""
        self._stepped = True
        if trainer.global_step < self.start_step:
            return
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad and name not in self._averages:
                self._averages[name] = self._placed(parameter.detach().to(torch.float32, copy=True), parameter)
                self._born[name] = self._updates

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the averages if the batch ended with an optimizer step."""
        stepped, self._stepped = self._stepped, False
        taken = trainer.global_step - self.start_step
        if stepped and taken > 0 and taken % self.every_n_steps == 0:
            self._update(dict(pl_module.named_parameters()))

    @torch.no_grad()
    def _update(self, parameters: dict[str, nn.Parameter]) -> None:
        cohorts: dict[int, list[str]] = {}
        for name in self._averages:
            cohorts.setdefault(self._updates - self._born[name], []).append(name)
        for age, names in cohorts.items():
            decay = min(self.decay, (1 + age) / (10 + age))
            self._place_all(parameters, names)
            averages = [self._averages[name] for name in names]
            weights = [
                parameters[name].detach().to(device=average.device, dtype=torch.float32)
                for name, average in zip(names, averages, strict=True)
            ]
            torch._foreach_lerp_(
                [_local(item) for item in averages], [_local(item) for item in weights], 1 - decay
            )
        self._updates += 1

    def _placed(self, average: Tensor, parameter: Tensor) -> Tensor:
        if isinstance(average, DTensor):
            return average
        return average.to(parameter.device if self.on_device else "cpu")

    def _place_all(self, parameters: dict[str, nn.Parameter], names: list[str]) -> None:
        # A checkpoint is loaded before the trainer moves the module to its device.
        for name in names:
            self._averages[name] = self._placed(self._averages[name], parameters[name])

    @torch.inference_mode(False)
    @torch.no_grad()
    def swap_in(self, module: L.LightningModule) -> None:
        """Put the averages into the module and keep the raw weights aside; does nothing if they are in."""
        if self.swapped or not self._averages:
            return
        parameters = _resting_parameters(module)
        self._place_all(parameters, list(self._averages))
        for name, average in self._averages.items():
            raw = parameters[name].detach()
            self._raw[name] = raw.to(average.device, copy=True)
            raw.copy_(average)

    @torch.inference_mode(False)
    @torch.no_grad()
    def swap_out(self, module: L.LightningModule) -> None:
        """Put the raw weights back, bit by bit; does nothing if they are in."""
        if not self.swapped:
            return
        parameters = _resting_parameters(module)
        for name, raw in self._raw.items():
            parameters[name].detach().copy_(raw)
        self._raw = {}

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Swap the averages in."""
        self.swap_in(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the raw weights back; checkpoint callbacks come after."""
        self.swap_out(pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Swap the averages in."""
        self.swap_in(pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the raw weights back."""
        self.swap_out(pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Swap the averages in."""
        self.swap_in(pl_module)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the raw weights back."""
        self.swap_out(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put the raw weights back when something ends validation early."""
        self.swap_out(pl_module)


def _aliases(module: nn.Module) -> dict[str, list[str]]:
    """Return parameter name -> all its names in the module's `state_dict` (several where weights are tied)."""
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    names: dict[str, list[str]] = {name: [] for name in first.values()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[first[id(parameter)]].append(name)
    return names


def _resting_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the module's parameters, sharded ones as shards."""
    for part in module.modules():
        # FSDP2 leaves the outermost weights gathered after a forward without backward, and would not notice that
        # the shards behind them change.
        if isinstance(part, FSDPModule):
            part.reshard()
    return dict(module.named_parameters())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor, in CPU memory; all processes must call it."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def _sharded_as(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements)
