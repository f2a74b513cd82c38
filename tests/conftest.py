"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# One thread per test process: the suite runs on as many processes as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without a GPU Triton's programs run in its interpreter, which must be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Nothing that is tested depends on how fast the machine is, or on what a first call imports.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

LONG = (
    "worlds/test_experts.py",
    "training/test_demo.py",
    "training/test_sharded_strategy.py",
    "training/test_command_line.py",
    "test_notebooks.py",
    "labeling/test_kills.py",
    "test_experiments.py",
)
"""Files that take longest. They come first: the last one would keep one core at work and let the others wait."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first; all else keeps its order."""
    folder = Path(__file__).parent
    places = {folder / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real robot episodes and photographs, beside the checkout; not part of the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real sample data is not there: {folder}")
    return folder


@pytest.fixture(scope="session")
def bridge_folder(shared_data: Path) -> Path:
    """RLDS folder of 25 real Bridge V2 episodes (10 steps each, 64x64 JPEG)."""
    return shared_data / "bridge_rlds_sample" / "bridge_dataset" / "1.0.0"
