"""Build networks without memory for their weights: names, shapes and types alone (torch's meta device)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import lightning as L
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_only
from torch import nn


@contextmanager
def networks_on_meta(parser: ArgumentParser) -> Iterator[None]:
    """Let a parser build every `nn.Module` of a configuration on the meta device; all else as usual.

    Lightning's modules hold networks; what they hold besides (metrics) is built as usual too.
    """

    def on_meta(class_type: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        usual = issubclass(class_type, L.LightningModule)
        with nullcontext() if usual else torch.device("meta"):
            return class_type(*args, **kwargs)

    # Lightning's command line passes no instantiators on.
    parser.instantiate = partial(parser.instantiate, instantiators=[(on_meta, nn.Module, True)])
    try:
        yield
    finally:
        del parser.instantiate


def is_first_process() -> bool:
    """Return whether this is the first process of all, also before they have begun to communicate."""
    return getattr(rank_zero_only, "rank", 0) in (0, None)


@contextmanager
def loading_into_nothing() -> Iterator[None]:
    """Silence torch's remark, one for each tensor, that loading into the meta device has no effect."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*which is a no-op")
        yield
