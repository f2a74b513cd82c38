"""Processes that fit boxes: each uses one thread, whatever the environment says."""

from __future__ import annotations

import os

import pytest
import torch

from spear_lightning.labeling.assembly import ObjectFilter
from spear_lightning.labeling.box_pool import BoxPool
from spear_lightning.labeling.object_label import BoxRecipe


def threads() -> dict[str, int]:
    """Threads of all libraries of a process that have some: BLAS, OpenMP, torch."""
    import scipy.linalg  # noqa: F401
    from threadpoolctl import threadpool_info

    found = {str(library["filepath"]): int(library["num_threads"]) for library in threadpool_info()}
    return found | {"torch": torch.get_num_threads()}


def test_each_process_uses_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    with BoxPool(1, BoxRecipe(), ObjectFilter()) as pool:
        assert pool._pool is not None
        found = pool._pool.submit(threads).result()
    assert len(found) > 1
    assert set(found.values()) == {1}
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert "OPENBLAS_NUM_THREADS" not in os.environ
