"""Replay a small network's kernels as CUDA graphs: one forward, one backward.

A small network's kernels are shorter than it takes to order them one by one, so the GPU waits for the processor.
Recorded once, all of them are ordered at once. A large network gains nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from spear_lightning.errors import ConfigError
from spear_lightning.models import SpearVLA, SpearVLM
from spear_lightning.training.labelled_image_data_module import LabelledImageDataModule
from spear_lightning.training.vla_module import VLAModule
from spear_lightning.training.vlm_module import VLMModule

log = logging.getLogger(__name__)

_RECORDINGS = 4
"""Kinds of batches after which something is wrong: each recording keeps the memory of a whole step."""


class GraphedNetwork(Callback):
    """Records the network (SPEAR-1 or SPEAR-VLM) as CUDA graphs in the first step, and replays them in all others.

    For training on one GPU with batches of one size (SPEAR-VLM's: `data.one_length: true`); validation runs as it
    is. Parameters must stay where they are in memory. Without a GPU it does nothing. After `RegionalCompile` it
    replays the compiled kernels. Give the run the GPU for itself: beside another such run, replays have crashed in
    the driver (580.159).
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the run can be recorded.

        Raises:
            ConfigError: If it cannot.
        """
        if stage != "fit":
            return
        data = getattr(trainer, "datamodule", None)
        wrong = None
        if not isinstance(pl_module, VLAModule | VLMModule):
            wrong = type(pl_module).__name__
        elif _vlm_of(pl_module).packed:
            wrong = "vlm.packed: true, so that steps differ in size"
        elif isinstance(pl_module, VLAModule) and pl_module.policy.prompt.multiple is not None:
            wrong = f"prompt.multiple: {pl_module.policy.prompt.multiple}, so that steps differ in size"
        elif isinstance(data, LabelledImageDataModule) and not data.one_length:
            wrong = "data.one_length: false, so that steps differ in size"
        elif trainer.world_size > 1:
            wrong = f"{trainer.world_size} processes"
        elif trainer.accumulate_grad_batches > 1:
            # The second backward pass would overwrite the gradients that it should be added to.
            wrong = f"trainer.accumulate_grad_batches: {trainer.accumulate_grad_batches}"
        if wrong is not None:
            raise ConfigError(
                "The steps of this run cannot be recorded as a CUDA graph",
                where="GraphedNetwork",
                found=wrong,
                expected="a VLAModule or VLMModule that is not packed, batches of one size, one GPU, and no "
                "accumulated gradients",
                remedy="leave the callback out",
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the recorder in the place of the network's forward pass."""
        if trainer.strategy.root_device.type != "cuda":
            log.warning("There is no GPU: the network runs as it is")
            return
        network = _network_of(pl_module)
        network.forward = RecordedForward(network)  # type: ignore[method-assign, assignment]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the network its own forward pass back, and the recordings' memory."""
        if isinstance(pl_module, VLAModule | VLMModule):
            _network_of(pl_module).__dict__.pop("forward", None)


def _network_of(module: L.LightningModule) -> SpearVLA | SpearVLM:
    if isinstance(module, VLAModule):
        return module.policy.vla
    assert isinstance(module, VLMModule)
    return module.answerer.vlm


def _vlm_of(module: VLAModule | VLMModule) -> SpearVLM:
    return module.policy.vla.vlm if isinstance(module, VLAModule) else module.answerer.vlm


def _own_forward(network: nn.Module) -> Callable[..., Tensor]:
    """Return the forward pass of the network's class, whatever stands in its place in the object."""
    forward: Callable[..., Tensor] = type(network).forward.__get__(network)
    return forward


class RecordedForward:
    """A network's forward pass in training from a recording, made where there is none for such a batch.

    Args:
        network: The network.
    """

    def __init__(self, network: SpearVLA | SpearVLM) -> None:
        self.network = network
        self._recordings: dict[Any, Callable[..., Tensor]] = {}

    def __call__(
        self, images: Mapping[str, Tensor], image_mask: Mapping[str, Tensor] | None, *others: Any
    ) -> Tensor:
        """Return what the network's own `forward` does with these arguments."""
        network, names = self.network, tuple(images)
        plain = all(part is None or isinstance(part, Tensor) for part in others)
        if image_mask is None or not (plain and network.training and torch.is_grad_enabled()):
            return _own_forward(network)(images, image_mask, *others)
        given = tuple(part is not None for part in others)
        masks = [image_mask[name] for name in names]
        tensors = [*images.values(), *masks, *(part for part in others if part is not None)]
        # A freeze schedule's next phase needs other gradients.
        trained = tuple(parameter.requires_grad for parameter in network.parameters())
        kind = (names, given, tuple((tensor.shape, tensor.dtype) for tensor in tensors), trained)
        if kind not in self._recordings:
            self._record(kind, _FlatNetwork(network, names, given), tensors)
        return self._recordings[kind](*tensors)

    def _record(self, kind: Any, function: nn.Module, tensors: list[Tensor]) -> None:
        if len(self._recordings) == _RECORDINGS:
            raise ConfigError(
                "Batches of too many sizes are to be recorded as CUDA graphs",
                where="GraphedNetwork",
                found=[list(tensor.shape) for tensor in tensors],
                expected=f"at most {_RECORDINGS} sizes in a run",
                remedy="leave the callback out",
            )
        log.info("Recording the network's step as a CUDA graph")
        examples = tuple(tensor.clone() for tensor in tensors)
        recording: Any = torch.cuda.make_graphed_callables(function, examples, allow_unused_input=True)
        self._recordings[kind] = recording


class _FlatNetwork(nn.Module):
    """The network as a function of tensors alone, as recording wants it."""

    def __init__(self, network: SpearVLA | SpearVLM, names: tuple[str, ...], given: tuple[bool, ...]) -> None:
        super().__init__()
        self.network, self.names, self.given = network, names, given

    def forward(self, *tensors: Tensor) -> Tensor:
        left = iter(tensors)
        images = {name: next(left) for name in self.names}
        masks = {name: next(left) for name in self.names}
        others: list[Any] = [next(left) if there else None for there in self.given]
        # Not `self.network(...)`, which leads back to the recording.
        return _own_forward(self.network)(images, masks, *others)
