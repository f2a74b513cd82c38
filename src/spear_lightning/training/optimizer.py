"""Optimizer recipe: AdamW with linear warm-up and cosine decay, in groups that freeze schedules can change."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from spear_lightning.errors import ConfigError
from spear_lightning.training.freeze_plan import Component, check_unused, named_parameters
from spear_lightning.training.one_pass_adamw import OnePassAdamW

if TYPE_CHECKING:
    from spear_lightning.training.base_module import SpearModule

_POSITION_TABLE = re.compile(r"(^|[._])pos(ition)?_embed(ding)?s?($|\.)")
"""Learned position tables: `position_embedding.weight`, `position_embeddings`, `pos_embed`, ..."""


class ComponentSource(ABC):
    """A callback that decides what trains, with which learning rate, since when."""

    @abstractmethod
    def components(self, module: SpearModule) -> list[Component]:
        """Return what trains now; its parameters have `requires_grad` set."""


class WarmupCosine(LRScheduler):
    """Linear warm-up, then cosine decay, for each parameter group from the group's own start.

    With n = step - start_step, W warm-up steps, T total steps, fraction f, the learning rate of a group is
    `peak_lr (n + 1) / (W + 1)` while n < W, afterwards
    `peak_lr (f + (1 - f) (1 + cos(pi p)) / 2)` with `p = (n - W) / (T - start_step - W)`, at most 1.
    `peak_lr` and `start_step` are read from the groups at every step, so groups may be changed at any time.

    Args:
        optimizer: Its groups need `peak_lr` and `start_step`.
        warmup_steps: W, in optimizer steps; 0 for none.
        total_steps: T, the step at which the learning rate reaches its end.
        final_lr_fraction: f, the end as a fraction of the peak.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int, final_lr_fraction: float
    ) -> None:
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.final_lr_fraction = final_lr_fraction
        super().__init__(optimizer)

    def factor(self, step: int, start_step: int) -> float:
        """Return the learning rate as a fraction of its peak, of a group that began at `start_step`."""
        # A group built for a resume may begin after step 0, at which every scheduler is born.
        since = max(0, step - start_step)
        if since < self.warmup_steps:
            return (since + 1) / (self.warmup_steps + 1)
        decay_steps = self.total_steps - start_step - self.warmup_steps
        progress = min(1.0, (since - self.warmup_steps) / decay_steps) if decay_steps > 0 else 1.0
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_lr_fraction + (1 - self.final_lr_fraction) * cosine

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the learning rate of each group at the current step."""
        return [
            group["peak_lr"] * self.factor(self.last_epoch, group["start_step"])
            for group in self.optimizer.param_groups
        ]

    def refresh(self) -> None:
        """Set the learning rates of the current step again, after groups were changed."""
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the step: all else comes from the configuration and the optimizer's groups."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the saved step, whatever the number of groups; the optimizer must be restored already."""
        super().load_state_dict(state_dict)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


class OptimizerRecipe:
    """AdamW with weight decay on matrices only, linear warm-up and cosine decay (spec section 11).

    Args:
        lr: Peak learning rate, where a freeze schedule gives no other.
        warmup_steps: Optimizer steps of linear warm-up.
        total_steps: Optimizer step at which the cosine ends; default: the trainer's `max_steps`.
        final_lr_fraction: Learning rate at the end as a fraction of the peak, in [0, 1].
        weight_decay: Decoupled weight decay; not on biases, norms (all 1-D parameters) and position tables.
        betas: Decay of AdamW's two moments.
        eps: AdamW's epsilon.
        fused: Whether clipping and AdamW are one pass over memory (`OnePassAdamW`); default: torch's choice.
    """

    def __init__(
        self,
        lr: float = 5e-5,
        warmup_steps: int = 1000,
        total_steps: int | None = None,
        final_lr_fraction: float = 0.1,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool | None = None,
    ) -> None:
        checks = {
            "lr": (lr, lr > 0, "> 0"),
            "warmup_steps": (warmup_steps, warmup_steps >= 0, ">= 0"),
            "total_steps": (total_steps, total_steps is None or total_steps > 0, "> 0, or null"),
            "final_lr_fraction": (final_lr_fraction, 0 <= final_lr_fraction <= 1, "in [0, 1]"),
            "weight_decay": (weight_decay, weight_decay >= 0, ">= 0"),
        }
        for name, (value, good, expected) in checks.items():
            if not good:
                raise ConfigError(
                    "The optimizer recipe is wrong", where=f"recipe.{name}", found=value, expected=expected
                )
        self.lr = lr
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.final_lr_fraction = final_lr_fraction
        self.weight_decay = weight_decay
        self.betas = (betas[0], betas[1])
        self.eps = eps
        self.fused = fused

    def configure(self, module: SpearModule) -> dict[str, Any]:
        """Build optimizer and scheduler for what trains now; what `configure_optimizers` returns.

        Args:
            module: The module; attached to a trainer. A freeze schedule among the trainer's callbacks decides
                what trains; without one, all parameters with `requires_grad` that the loss reaches do.

        Raises:
            ConfigError: If nothing trains, or the number of steps is not known.
        """
        optimizer = self.optimizer(self.groups(_components(module)))
        total = self.total_steps or module.trainer.max_steps
        if total <= 0:
            raise ConfigError(
                "The learning-rate schedule does not know its length",
                where="recipe.total_steps",
                found="null, and trainer.max_steps is not set",
                remedy="set one of them",
            )
        scheduler = WarmupCosine(optimizer, self.warmup_steps, total, self.final_lr_fraction)
        # The name of the curves: what Lightning makes of the optimizer's class, but one for both kinds of AdamW.
        name = f"lr-{type(optimizer).__name__}".replace("OnePass", "")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": name}}

    def renew(self, module: SpearModule) -> None:
        """Give the groups of a resumed optimizer what this recipe says: the same, unless a change was allowed."""
        named = {group["name"]: group for group in self.groups(_components(module))}
        for optimizer in module.trainer.optimizers:
            for group in optimizer.param_groups:
                own = named[group["name"]]
                group.update({key: own[key] for key in ("peak_lr", "initial_lr", "weight_decay")})
                group.update(betas=self.betas, eps=self.eps)
        for config in module.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, WarmupCosine):
                config.scheduler.refresh()

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the optimizer of parameter groups."""
        options = self.adamw_options()
        if options.pop("fused"):
            return OnePassAdamW(groups, **options)
        return torch.optim.AdamW(groups, fused=self.fused, **options)

    def adamw_options(self) -> dict[str, Any]:
        """Return the arguments of `torch.optim.AdamW` besides the groups."""
        return {
            "lr": self.lr,
            "betas": self.betas,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "fused": self.fused,
        }

    def groups(self, components: list[Component]) -> list[dict[str, Any]]:
        """Return AdamW's parameter groups: for each component, with and without weight decay."""
        groups = []
        for component in components:
            peak = self.lr if component.peak_lr is None else component.peak_lr
            shared = {"peak_lr": peak, "start_step": component.start_step, "lr": peak, "initial_lr": peak}
            decayed: list[nn.Parameter] = []
            spared: list[nn.Parameter] = []
            for name, parameter in component.parameters.items():
                (decayed if has_weight_decay(name, parameter) else spared).append(parameter)
            if decayed:
                groups.append(
                    {"params": decayed, "name": component.name, "weight_decay": self.weight_decay, **shared}
                )
            if spared:
                groups.append(
                    {"params": spared, "name": f"{component.name}/no_decay", "weight_decay": 0.0, **shared}
                )
        return groups


def _components(module: SpearModule) -> list[Component]:
    """Return what trains now: what a freeze schedule says, or everything."""
    source = next((item for item in module.trainer.callbacks if isinstance(item, ComponentSource)), None)  # type: ignore[attr-defined]
    return source.components(module) if source else [everything(module)]


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter gets weight decay: matrices do; biases, norms and position tables do not."""
    return parameter.ndim > 1 and _POSITION_TABLE.search(name) is None


def freeze_unused(module: SpearModule) -> None:
    """Take `requires_grad` from the parameters that the module's loss never reaches.

    DistributedDataParallel then needs no search for unused parameters. It must happen before the trainer wraps
    the module, hence in `setup`; a freeze schedule does it too.
    """
    unused = check_unused(module.components, module.unused_parameters())
    for name, parameter in named_parameters(module.components):
        if name in unused:
            parameter.requires_grad_(False)


def everything(module: SpearModule) -> Component:
    """Return all parameters with `requires_grad` that the module's loss reaches, as one component.

    Raises:
        ConfigError: If there are none.
    """
    freeze_unused(module)
    parameters = {
        name: parameter for name, parameter in named_parameters(module.components) if parameter.requires_grad
    }
    if not parameters:
        raise ConfigError(
            "No parameter trains", where=type(module).__name__, remedy="use a FreezeSchedule to choose"
        )
    return Component("all", None, 0, parameters)


def regroup(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Give an optimizer other groups in place: parameters that stay keep their state, others lose it.

    Args:
        optimizer: The optimizer; `param_groups` and `state` remain the same objects.
        groups: Its new groups; settings that they lack are the optimizer's defaults.
    """
    kept = {id(parameter) for group in groups for parameter in group["params"]}
    optimizer.param_groups.clear()
    for group in groups:
        optimizer.add_param_group(group)
    for parameter in list(optimizer.state):
        if id(parameter) not in kept:
            del optimizer.state[parameter]
