"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# One thread per test process: the suite runs on as many processes as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


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
