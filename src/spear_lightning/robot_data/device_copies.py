"""Batches on their way to a GPU: each is copied while the trainer works on the one before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import torch

from spear_lightning.batches import TensorBatch

Batch = TypeVar("Batch", bound=TensorBatch)


class DeviceCopies(Generic[Batch]):
    """Gives a reader's batches in the memory of a GPU.

    The copy of a batch begins when the one before it is given away, in a stream of its own, and is done when it is
    asked for: the GPU never waits for it, and the trainer's process does nothing but give orders. For that the
    reader's batches must be page-locked; others are copied too, but while the process waits.

    A batch of the reader is held until its copy is done, and no longer, so memory that is used again
    (`batch_slots`) is not written over. The reader is one batch ahead of what is given, as workers are: who counts
    batches for a resume must count those that come out here.

    Args:
        reader: Gives batches in CPU memory, as often as it is iterated.
        device: The GPU; `None` gives the reader's batches as they are.
    """

    def __init__(self, reader: Iterable[Batch], device: torch.device | None) -> None:
        self._reader, self._device = reader, device

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches, in the reader's order, ready for the current stream."""
        if self._device is None:
            yield from self._reader
            return
        stream = torch.cuda.Stream(self._device)
        ahead: _Copy[Batch] | None = None
        try:
            for batch in self._reader:
                following = _Copy(batch, self._device, stream)
                if ahead is not None:
                    yield ahead.take()
                ahead = following
            if ahead is not None:
                yield ahead.take()
        finally:
            # If it is left early, a copy under way still reads the memory that is about to be let go.
            stream.synchronize()


class _Copy(Generic[Batch]):
    """The copy of one batch, under way.

    Args:
        batch: In CPU memory; held until the copy is done.
        device: Where to copy it.
        stream: Stream that copies.
    """

    def __init__(self, batch: Batch, device: torch.device, stream: torch.cuda.Stream) -> None:
        # Held until the copy is let go, after it was taken.
        self._source = batch
        self._device = device
        with torch.cuda.stream(stream):
            self._copy = batch.to(device, non_blocking=True)
            self._done = stream.record_event()

    def take(self) -> Batch:
        """Return the copy when it is done; it began a step ago, so hardly ever there is anything to wait for."""
        self._done.synchronize()
        # Its memory belongs to the stream that copied, which must not use it again before the work is done.
        self._copy.record_stream(torch.cuda.current_stream(self._device))
        return self._copy
