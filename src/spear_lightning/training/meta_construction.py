"""Build networks without memory for their weights: names, shapes and types alone (torch's meta device)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_only
from torch import nn


def build_networks_on_meta(parser: ArgumentParser) -> None:
    """Let a parser build every `nn.Module` of a configuration on the meta device; all else as usual."""

    def on_meta(class_type: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        with torch.device("meta"):
            return class_type(*args, **kwargs)

    with warnings.catch_warnings():
        # jsonargparse has another way from 4.49 on, which Lightning's command line cannot pass on.
        warnings.simplefilter("ignore")
        parser.add_instantiator(on_meta, nn.Module, subclasses=True)


def is_first_process() -> bool:
    """Return whether this is the first process of all, also before they have begun to communicate."""
    return getattr(rank_zero_only, "rank", 0) in (0, None)


@contextmanager
def loading_into_nothing() -> Iterator[None]:
    """Silence torch's remark, one for each tensor, that loading into the meta device has no effect."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*which is a no-op")
        yield
