"""A small data set of made-up episodes, and its index."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from spear_lightning.robot_data.demo_episodes import write_demo_episodes
from spear_lightning.robot_data.episode_index import EpisodeIndex
from spear_lightning.robot_data.index_build import ensure_index
from spear_lightning.robot_data.registry import entry_of

# `oxe_layouts.py`, which several tests here share, is no test itself.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo_data")
    write_demo_episodes(root, episodes=20, steps=9, height=48, width=64)
    return root


@pytest.fixture(scope="session")
def demo_folder(demo_root: Path) -> Path:
    return demo_root / "bridge_dataset" / "1.0.0"


@pytest.fixture(scope="session")
def demo_index(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> EpisodeIndex:
    return ensure_index(demo_root, entry_of("bridge"), index_root=tmp_path_factory.mktemp("index"))


@pytest.fixture(scope="session")
def oxe_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 24 OXE data sets in their own layouts, two short made-up episodes each."""
    from oxe_layouts import LAYOUTS, motion

    root = tmp_path_factory.mktemp("oxe")
    for layout in LAYOUTS.values():
        # At least two seconds, so that every rate has chunks; an odd length that differs from set to set.
        steps = int(3 * layout.hz) + 3
        layout.write(root, [layout.serialize(motion(layout.centre, steps + each, each)) for each in range(2)])
    return root
