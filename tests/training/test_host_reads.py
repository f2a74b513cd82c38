"""No training step makes its process wait for the GPU: found on the CPU by what is called.

Steps are then told to the GPU ahead of time, and what passes between two of them costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from host_reads import HostReads, StepWatch

from spear_lightning import cli
from spear_lightning.labeling.demo_labels import write_demo_labels
from spear_lightning.robot_data.demo_episodes import write_demo_episodes
from spear_lightning.worlds.tabletop.depth_pictures import write_depth_pictures

CONFIGURATIONS = Path(__file__).resolve().parents[1] / "conf"
AUGMENTATION = """{"class_path": "spear_lightning.training.Augmentations", "init_args": {"parts": [
    {"class_path": "spear_lightning.training.MirrorAugmentation"},
    {"class_path": "spear_lightning.training.ImageAugmentation"}]}}"""


def write_episodes(root: Path) -> list[str]:
    write_demo_episodes(root, episodes=10, steps=8, height=32, width=48)
    return [
        f"--data.index_folder={root / 'indexes'}",
        f"--model.augmentation={AUGMENTATION}",
        "--model.flow_samples=2",
    ]


def write_packed(root: Path) -> list[str]:
    return [*write_episodes(root), "--model.policy.vla.vlm.packed=true"]


def write_labels(root: Path) -> list[str]:
    write_demo_labels(root / "labels", 40)
    return []


def write_pictures(root: Path) -> list[str]:
    write_depth_pictures(root / "depth", 40, size=(56, 42), processes=1, shard_size=40)
    return []


@pytest.mark.parametrize(
    ("name", "write", "on_the_host"),
    [
        pytest.param("vla", write_episodes, 0, id="vla"),
        # The tokens of the prompts, counted in CPU memory.
        pytest.param("vla", write_packed, 1, id="packed vla"),
        pytest.param("vlm", write_labels, 0, id="vlm"),
        # The number of tokens, drawn in CPU memory.
        pytest.param("geometry", write_pictures, 1, id="geometry"),
    ],
)
def test_a_step_reads_nothing_back(
    tmp_path: Path, name: str, write: Callable[[Path], list[str]], on_the_host: int
) -> None:
    options = write(tmp_path / "data")
    StepWatch.found = ["the step was not reached"]
    arguments = [
        f"--config={CONFIGURATIONS / name}.yaml",
        f"--data.root={tmp_path / 'data'}",
        *options,
        f"--trainer.default_root_dir={tmp_path / 'run'}",
        f"--trainer.logger.save_dir={tmp_path / 'run'}",
        # The phase of the freeze schedule in which everything trains.
        "--trainer.max_steps=10",
        "--trainer.limit_val_batches=0",
        # What is logged is read: all in all once in so many steps.
        "--trainer.log_every_n_steps=50",
        "--trainer.enable_progress_bar=true",
        "--model.recipe.fused=true",
        '--trainer.callbacks+={"class_path": "host_reads.StepWatch", "init_args": {"step": 8}}',
    ]
    assert cli.main(["fit", *arguments]) == 0
    assert len(StepWatch.found) == on_the_host, "\n".join(StepWatch.found)


def test_what_would_be_waited_for_is_found() -> None:
    values = torch.arange(3.0)
    for act in (
        lambda: values.sum().item(),
        lambda: values[values > 1],
        lambda: values.nonzero(),
        lambda: values.new_tensor([1.0, 2.0]),
        lambda: bool(values.any()),
    ):
        with HostReads() as mode:
            act()
        assert len(mode.found) == 1
    with HostReads() as mode:
        _ = values.index_select(0, values.long().flip(0)).sum() / values.new_full((), 3)
    assert not mode.found
