"""Matrix products in 8-bit floating point: twice the arithmetic of bfloat16 on GPUs since Ada and Hopper."""

from __future__ import annotations

import logging
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from spear_lightning.errors import ConfigError
from spear_lightning.models.float8 import replace_mlps
from spear_lightning.models.float8.rounding import MULTIPLE
from spear_lightning.training.base_module import SpearModule

log = logging.getLogger(__name__)

_FIRST_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs that multiply in 8 bits."""


class Float8Products(Callback):
    """Lets linear layers multiply in 8 bits, by torchao (extra `float8`).

    Inputs, weights and gradients are scaled and rounded just before each product; weights, their gradients and
    the optimizer's state stay what they are, and so do the names in checkpoints. Scaling costs memory traffic,
    which only a compiler makes cheap: place `RegionalCompile` after this callback.

    MLPs of Gemma and SigLIP all of whose layers are chosen become one step each (`models.float8`) if the recipe is
    `tensorwise`: what lies between their products is rounded where it is computed. Of other layers the number of
    tokens in a batch must be a multiple of 16, as Gemma's is in packed models.

    Args:
        layers: Dotted names relative to the network, with `*` for anything: linear layers, or modules all of whose
            linear layers are meant. Layers with a side that is no multiple of 16 are left as they are.
        recipe: How numbers are scaled: one factor a tensor (`tensorwise`, fastest), one a row (`rowwise`, more
            exact), or rows with the weights' gradients in bfloat16 (`rowwise_with_gw_hp`).
        emulate: Compute the same in float32, to look at the rounding where no such GPU is.
        whole_mlps: Whether MLPs become one step each.
    """

    def __init__(
        self,
        layers: list[str],
        recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise",
        emulate: bool = False,
        whole_mlps: bool = True,
    ) -> None:
        self.layers = layers
        self.recipe = recipe
        self.emulate = emulate
        self.whole_mlps = whole_mlps

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Replace the layers at the start of `fit`; other stages compute as exactly as they can.

        Raises:
            ConfigError: If a name fits no layer, or the GPU cannot multiply in 8 bits.
        """
        if stage != "fit" or not isinstance(pl_module, SpearModule):
            return
        device = trainer.strategy.root_device
        if not self.emulate and (
            device.type != "cuda" or torch.cuda.get_device_capability(device) < _FIRST_CAPABILITY
        ):
            raise ConfigError(
                "This device does not multiply in 8 bits",
                where="Float8Products",
                found=str(device),
                expected="a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell)",
                remedy="leave the callback out, or set its `emulate` to look at the rounding",
            )
        count = self.convert(pl_module.components)
        log.info("%d linear layers multiply in 8 bits (%s)", count, self.recipe)

    def convert(self, network: nn.Module) -> int:
        """Replace the layers of a network in place, and return their number.

        Raises:
            ConfigError: If a name fits no layer.
        """
        chosen = fitting_layers(network, self.layers)
        count = len(chosen)
        if self.whole_mlps and self.recipe == "tensorwise":
            chosen = chosen - replace_mlps(network, chosen, self.emulate)
        if not chosen:
            return count
        try:
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        except ModuleNotFoundError as error:
            raise ConfigError(
                "Products in 8 bits need a library that is not installed",
                where="Float8Products",
                found=f"no module {error.name}",
                remedy="pip install 'spear-lightning[float8]'",
            ) from error
        config = replace(Float8LinearConfig.from_recipe_name(self.recipe), emulate=self.emulate)
        convert_to_float8_training(network, config=config, module_filter_fn=lambda _, name: name in chosen)
        return count


def fitting_layers(network: nn.Module, patterns: list[str]) -> set[str]:
    """Return the names of the linear layers that patterns choose, of those that can multiply in 8 bits.

    Raises:
        ConfigError: If a pattern fits none.
    """
    linear = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    able = {name for name, module in linear.items() if not any(side % MULTIPLE for side in module.weight.shape)}
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in able if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not found:
            raise ConfigError(
                "No linear layer of the network has this name and sides that are multiples of 16",
                where="Float8Products.layers",
                found=pattern,
                expected=f"one like {sorted(able)[:3]}",
            )
        chosen |= found
    return chosen
