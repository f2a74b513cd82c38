"""Between the CPU and a GPU, without either waiting for the other more than it must.

Copies go through page-locked memory, so that they are fast and the thread that asks for them goes on. Each thread
has a stream of its own: waiting for its own results it does not wait for the others' work, and while it prepares a
batch or fetches results, the GPU does theirs. Without a GPU there is one stream, and nothing is fetched.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_of_thread = threading.local()


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Let a GPU's work that is begun within go to a stream that only this thread uses."""
    if device.type != "cuda":
        yield
        return
    streams: dict[torch.device, torch.cuda.Stream] = _of_thread.__dict__.setdefault("streams", {})
    if device not in streams:
        # Weights may still be on their way in another stream.
        torch.cuda.synchronize(device)
        streams[device] = torch.cuda.Stream(device)
    with torch.cuda.stream(streams[device]):
        yield


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Return arrays of one shape and type as one tensor (len(arrays), ...) on a device."""
    kind = torch.from_numpy(np.empty(0, arrays[0].dtype)).dtype
    batch = torch.empty((len(arrays), *arrays[0].shape), dtype=kind, pin_memory=device.type == "cuda")
    np.stack(arrays, out=batch.numpy())
    return batch.to(device, non_blocking=True)


def fetch(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Return tensors of one device as arrays, once all that makes them is done."""
    if tensors[0].device.type != "cuda":
        return [tensor.numpy() for tensor in tensors]
    copies = [
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        for tensor in tensors
    ]
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return [copy.numpy() for copy in copies]
