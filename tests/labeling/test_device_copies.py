"""Copies to and from a device; here it is the CPU, where they must not share memory with what came in."""

from __future__ import annotations

import numpy as np
import torch

from spear_lightning.labeling.device_copies import fetch, own_stream, to_device


def test_arrays_go_to_a_device_and_come_back() -> None:
    device = torch.device("cpu")
    pictures = list(np.arange(48, dtype=np.uint8).reshape(2, 2, 4, 3))
    # Decoded PNGs are read-only.
    pictures[0].setflags(write=False)
    with own_stream(device):
        batch = to_device(pictures, device)
        doubled = batch * 2
        (found, whole) = fetch([doubled, batch.sum(dtype=torch.int64)])
    assert batch.dtype == torch.uint8
    assert batch.shape == (2, 2, 4, 3)
    np.testing.assert_array_equal(found, np.stack(pictures) * 2)
    assert whole == 47 * 24
    batch.zero_()
    assert pictures[1].max() == 47
