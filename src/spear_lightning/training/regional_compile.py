"""Compile the repeated blocks of a network, one graph for all of a kind.

A transformer is one block, many times. Compiled whole, it takes minutes; compiled block by block, the first one's
machine code serves all others of its kind and shape, at nearly the same speed.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from spear_lightning.training.base_module import SpearModule
from spear_lightning.training.network_blocks import list_entries, matching

log = logging.getLogger(__name__)


class RegionalCompile(Callback):
    """Compiles blocks with `torch.compile` before a run's first step; names of parameters stay as they are.

    Args:
        blocks: Dotted names of modules relative to the network, as `vlm.encoders.*.stem`, where `*` stands for
            anything between two dots. `null` takes the entries of every `ModuleList` of the network.
        dynamic: `False`: shapes are fixed, each new one (the last batch of a validation, say) costs a compilation.
            `null`: a size that changed once may change from then on at no further cost, as a packed model's number
            of tokens does.
        mode: Passed to `torch.compile`.
        backend: Passed to `torch.compile`.
    """

    def __init__(
        self,
        blocks: list[str] | None = None,
        dynamic: bool | None = False,
        mode: Literal["default", "max-autotune-no-cudagraphs"] = "default",
        backend: str = "inductor",
    ) -> None:
        self.blocks = blocks
        self.options: dict[str, Any] = {"mode": mode, "backend": backend, "dynamic": dynamic}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compile at the start of `fit`; other stages see few batches, and run as they are."""
        if stage != "fit" or not isinstance(pl_module, SpearModule):
            return
        network = pl_module.components
        chosen = list_entries(network) if self.blocks is None else matching(network, self.blocks)
        for block in chosen.values():
            block.compile(**self.options)
        # Frozen and training parts, training and validation shapes, with and without gradient.
        torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 32)
        log.info("%d blocks will be compiled at their first use", len(chosen))
