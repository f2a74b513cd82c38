"""Recompute blocks in the backward pass instead of keeping what they computed: less memory, more time."""

from __future__ import annotations

import logging
from functools import partial

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.checkpoint import checkpoint

from spear_lightning.training.base_module import SpearModule
from spear_lightning.training.network_blocks import list_entries, matching

log = logging.getLogger(__name__)


class ActivationCheckpointing(Callback):
    """Keeps only what enters and leaves blocks, and computes the rest again in the backward pass.

    What leaves a block of the language model are its tokens, keys and values; so the action expert reads keys and
    values as it always does, and their gradients arrive. Names of parameters stay as they are.

    Args:
        blocks: Dotted names of modules relative to the network, as `vlm.language_model.layers.*`, where `*` stands
            for anything between two dots. `null` takes the entries of every `ModuleList` of the network.
    """

    def __init__(self, blocks: list[str] | None = None) -> None:
        self.blocks = blocks

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Change the blocks at the start of `fit`; without gradient nothing is kept anyway."""
        if stage == "fit" and isinstance(pl_module, SpearModule):
            chosen = chosen_blocks(pl_module.components, self.blocks)
            for block in chosen.values():
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            log.info("%d blocks will be computed again in the backward pass", len(chosen))


def chosen_blocks(network: nn.Module, patterns: list[str] | None) -> dict[str, nn.Module]:
    """Return the modules that are named by patterns, or all repeated blocks; see `ActivationCheckpointing`.

    Raises:
        ConfigError: If a pattern fits none.
    """
    return list_entries(network) if patterns is None else matching(network, patterns)
