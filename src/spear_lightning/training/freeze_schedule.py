"""Freeze schedules: which parts train when, and at which learning rate (spec section 10)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from spear_lightning.errors import CheckpointError, ConfigError
from spear_lightning.training.freeze_plan import Component, FreezePlan, Phase
from spear_lightning.training.optimizer import ComponentSource, WarmupCosine, regroup
from spear_lightning.training.phase_table import log_table, phase_table, table_text

if TYPE_CHECKING:
    from spear_lightning.training.base_module import SpearModule


class FreezeSchedule(BaseFinetuning, ComponentSource):
    """Trains and freezes parts of a `SpearModule` by phases.

    The whole schedule is checked before training begins. When a phase begins (before the first batch of its
    first optimizer step): parts that begin to train get a new parameter group with a warm-up of their own; parts
    that go on training keep their optimizer state and get the phase's learning rate; parts that are frozen
    lose gradient and optimizer state and leave the optimizer, so that nothing moves them. Modules whose
    parameters are all frozen are in eval mode (dropout, batch statistics), the others in train mode.

    Optimizer groups follow from schedule and phase alone. A resumed run takes the phase from its checkpoint
    before the optimizer is built, hence builds the groups of the uninterrupted run. Strategies that restore the
    optimizer together with the model after setup (`restore_checkpoint_after_setup`) must call `enter_phase`
    with the checkpoint's phase before they load it.

    On Lightning's `BaseFinetuning` this changes two things: phases are counted in optimizer steps instead of
    epochs, and groups are rebuilt from the schedule instead of from copies in the checkpoint.

    Args:
        phases: The phases in order; see `Phase` for patterns. Every parameter needs a pattern in every phase.
    """

    def __init__(self, phases: list[Phase]) -> None:
        super().__init__()
        self.phases = phases
        self._plan: FreezePlan | None = None
        self._phase = 0
        self._modes: list[tuple[nn.Module, bool]] = []

    @property
    def plan(self) -> FreezePlan:
        """The checked schedule; there from `setup` on."""
        if self._plan is None:
            raise ConfigError(
                "The freeze schedule was asked before it was set up", remedy="pass it to the trainer"
            )
        return self._plan

    @property
    def phase(self) -> Phase:
        """The phase in force."""
        return self.phases[self._phase]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check all phases and apply the first; does nothing outside of training.

        Raises:
            ConfigError: If the schedule contradicts itself or does not fit the module.
        """
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        """Apply the first phase, before the optimizer is built."""
        module = _spear(pl_module)
        self._plan = FreezePlan(self.phases, module.components, module.unused_parameters())
        self._phase = 0
        self._plan.apply(module.components, self._phase)

    def components(self, module: SpearModule) -> list[Component]:
        """Return what the phase in force trains."""
        return self.plan.components(module.components, self._phase)

    def state_dict(self) -> dict[str, Any]:
        """Return the phase that the optimizer's groups in the same checkpoint belong to."""
        return {"phase": self.phase.name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: `on_load_checkpoint`, which knows the module too, has taken the phase already."""

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Enter the checkpoint's phase, so that the optimizer is built as it was saved.

        Raises:
            CheckpointError: If the checkpoint has no phase, or one that this schedule does not have.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        state = checkpoint["callbacks"].get(self.state_key)
        if state is None:
            raise CheckpointError(
                "The run to resume had no freeze schedule",
                where="--ckpt_path",
                remedy="resume it without, or start a new run with --model.init_from",
            )
        if not trainer.strategy.restore_checkpoint_after_setup:
            self.enter_phase(trainer, pl_module, state["phase"])
        elif state["phase"] != self.phase.name:
            raise CheckpointError(
                "The strategy loaded the optimizer before the phase of the freeze schedule was entered",
                where=type(trainer.strategy).__name__,
                found=f"groups of `{self.phase.name}`",
                expected=f"groups of `{state['phase']}`",
                remedy="call FreezeSchedule.enter_phase before loading the optimizer",
            )

    def enter_phase(self, trainer: L.Trainer, pl_module: L.LightningModule, name: str) -> None:
        """Apply a phase to parameters and, where it exists already, to the optimizer.

        Raises:
            CheckpointError: If the schedule has no phase of this name.
        """
        index = self.plan.index_of(name)
        if index is None:
            raise CheckpointError(
                "The checkpoint was written in a phase that the freeze schedule does not have",
                where="FreezeSchedule.phases",
                found=name,
                expected=f"one of {[phase.name for phase in self.phases]}",
            )
        module = _spear(pl_module)
        self._phase = index
        self.plan.apply(module.components, index)
        for optimizer in trainer.optimizers:
            regroup(optimizer, module.recipe.groups(self.components(module)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Announce the phase in force and set the modules' modes."""
        self._after_change(trainer, _spear(pl_module))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do nothing: phases begin at optimizer steps, not at epochs."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin the next phase when its step has come; keep frozen modules in eval mode."""
        if self.plan.phase_at(trainer.global_step) != self._phase:
            (optimizer,) = trainer.optimizers
            self.finetune_function(pl_module, trainer.global_step, optimizer)
            for config in trainer.lr_scheduler_configs:
                if isinstance(config.scheduler, WarmupCosine):
                    config.scheduler.refresh()
            _renew_gradient_reducer(trainer, pl_module)
            self._after_change(trainer, _spear(pl_module))
        # Lightning, or a user's hook, may have called train() on the whole module.
        for module, training in self._modes:
            if module.training != training:
                module.training = training

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: Optimizer) -> None:
        """Apply the phase of a step to parameters and optimizer.

        Args:
            pl_module: The module.
            epoch: The optimizer step (`BaseFinetuning` counts epochs here).
            optimizer: Its groups are replaced.
        """
        module = _spear(pl_module)
        self._phase = self.plan.phase_at(epoch)
        self.plan.apply(module.components, self._phase)
        regroup(optimizer, module.recipe.groups(self.components(module)))

    def _after_change(self, trainer: L.Trainer, module: SpearModule) -> None:
        self._modes = list(module_modes(module.components, parent_training=True).items())
        step, peak = trainer.global_step, module.recipe.lr
        rates: Mapping[str, float] = {
            name: peak if component.peak_lr is None else component.peak_lr
            for component in self.components(module)
            for name in component.parameters
        }
        table = phase_table(f"Phase `{self.phase.name}` from step {self.phase.start}", module.components, rates)
        if trainer.is_global_zero:
            Console().print(table)
            log_table(trainer.loggers, self.phase.name, table_text(table), step)
        for logger in trainer.loggers:
            logger.log_metrics({"phase": float(self._phase)}, step=step)


def module_modes(module: nn.Module, parent_training: bool) -> dict[nn.Module, bool]:
    """Return for a module and all below it whether it shall be in train mode.

    A module with parameters is in train mode if one of them trains. A module without (dropout, activations)
    follows its parent.
    """
    parameters = list(module.parameters())
    training = any(parameter.requires_grad for parameter in parameters) if parameters else parent_training
    modes = {module: training}
    for child in module.children():
        modes.update(module_modes(child, training))
    return modes


def _renew_gradient_reducer(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Wrap the module again: DistributedDataParallel reduces only what trained when it was built."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
        # Without this the old reducer would go on reducing too, as long as it is alive.
        strategy.model._remove_autograd_hooks()
        strategy.model = pl_module
        strategy.configure_ddp()


def _spear(module: L.LightningModule) -> SpearModule:
    from spear_lightning.training.base_module import SpearModule

    if not isinstance(module, SpearModule):
        raise ConfigError(
            "A freeze schedule needs a SpearModule", where="FreezeSchedule", found=type(module).__name__
        )
    return module
