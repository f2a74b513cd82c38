"""Muon for the matrices of blocks, AdamW for all else: fewer steps for networks that start from random weights.

Muon (K. Jordan et al. 2024) takes the momentum of a matrix's gradients and makes all of its singular values about
one, so that rare directions learn as fast as common ones. Scaled to AdamW's usual step (Liu et al. 2025, "Muon is
scalable for LLM training"), it takes AdamW's learning rates and weight decay.

Legend: N matrices of one size, R rows, C columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from spear_lightning.errors import ConfigError
from spear_lightning.training.freeze_plan import Component
from spear_lightning.training.optimizer import OptimizerRecipe

_IN_A_BLOCK = re.compile(r"(^|\.)\d+\.")
"""Parameters of list entries: the blocks. Embeddings, projections and heads are not in a list."""

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the polynomial that is applied again and again; Jordan's, as in `torch.optim.Muon`."""


class MuonRecipe(OptimizerRecipe):
    """`OptimizerRecipe` whose blocks' matrices are trained by Muon; for parameters that are not sharded.

    Args:
        momentum: Decay of the mean of the gradients that Muon orthogonalises.
        **options: See `OptimizerRecipe`.
    """

    def __init__(self, momentum: float = 0.95, **options: Any) -> None:
        super().__init__(**options)
        if not 0 <= momentum < 1:
            raise ConfigError(
                "The optimizer recipe is wrong", where="recipe.momentum", found=momentum, expected="in [0, 1)"
            )
        self.momentum = momentum

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the optimizer of parameter groups.

        Raises:
            ConfigError: If parameters are sharded: Muon needs whole matrices.
        """
        if any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"]):
            raise ConfigError(
                "Muon cannot train sharded parameters",
                where="model.recipe, trainer.strategy",
                expected="OptimizerRecipe, or a strategy that leaves parameters whole",
            )
        return MuonAdamW(groups, self.momentum, **self.adamw_options())

    def groups(self, components: list[Component]) -> list[dict[str, Any]]:
        """Return parameter groups: those of AdamW, and before them, for each component, Muon's matrices."""
        groups = []
        for component in components:
            matrices: dict[str, nn.Parameter] = {}
            others: dict[str, nn.Parameter] = {}
            for name, parameter in component.parameters.items():
                is_hidden = parameter.ndim == 2 and _IN_A_BLOCK.search(name) is not None
                (matrices if is_hidden else others)[name] = parameter
            for group in super().groups([replace(component, parameters=matrices)]):
                groups.append({**group, "name": f"{component.name}/muon", "muon": True})
            groups += super().groups([replace(component, parameters=others)])
        return groups


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but for groups with `muon: True`, whose parameters are matrices.

    Args:
        params: Parameter groups.
        momentum: See `MuonRecipe`.
        **options: See `torch.optim.AdamW`.
    """

    def __init__(self, params: Any, momentum: float = 0.95, **options: Any) -> None:
        super().__init__(params, **options)
        self.momentum = momentum

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        for group in groups:
            if group.get("muon"):
                self._muon_step(group)
        try:
            self.param_groups = [group for group in groups if not group.get("muon")]
            super().step()
        finally:
            self.param_groups = groups
        return loss

    @torch.no_grad()
    def _muon_step(self, group: dict[str, Any]) -> None:
        sizes: dict[torch.Size, list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                sizes.setdefault(parameter.shape, []).append(parameter)
        lr, decay = group["lr"], group["weight_decay"]
        for size, parameters in sizes.items():
            for parameter in parameters:
                if "momentum" not in self.state[parameter]:
                    # AdamW, whose reader of checkpoints this is, wants a step with every state.
                    self.state[parameter] = {"step": torch.tensor(0.0), "momentum": torch.zeros_like(parameter)}
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            means = [self.state[parameter]["momentum"] for parameter in parameters]
            torch._foreach_lerp_(means, gradients, 1 - self.momentum)
            ahead_NRC = torch.stack(torch._foreach_lerp(gradients, means, self.momentum))
            updates = orthogonalized(ahead_NRC).to(ahead_NRC.dtype).unbind()
            torch._foreach_mul_(parameters, 1 - lr * decay)
            # The root mean square of AdamW's updates is about 0.2 times the learning rate.
            torch._foreach_add_(parameters, list(updates), alpha=-lr * 0.2 * max(size) ** 0.5)


def orthogonalized(matrices_NRC: Tensor, iterations: int = 5) -> Tensor:
    """Return matrices with the same singular vectors whose singular values are about one (0.7 to 1.2), bfloat16.

    Args:
        matrices_NRC: Matrices.
        iterations: Newton-Schulz iterations.
    """
    a, b, c = COEFFICIENTS
    tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x_NRC = matrices_NRC.bfloat16()
    x_NRC = x_NRC.mT if tall else x_NRC
    x_NRC = x_NRC / x_NRC.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram_NRR = x_NRC @ x_NRC.mT
        polynomial_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, polynomial_NRR, x_NRC, beta=a)
    return x_NRC.mT if tall else x_NRC
