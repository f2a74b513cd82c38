"""3D tokens are fitted to what is asked: whoever knows an answer can say it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from spear_lightning.labeling.demo_labels import write_demo_labels
from spear_lightning.labeling.records import ImageLabel
from spear_lightning.robot_data.images import CameraSpec
from spear_lightning.training import LabelledImageDataModule
from spear_lightning.vqa.coordinate_tokens import CoordinateTokens
from spear_lightning.vqa.mixture import TaskMixture, read_answers
from spear_lightning.vqa.task import Scene

HOME = "spear_lightning.vqa."
PIXELS = HOME + "object_tasks.RandomPixels"
VERTICES = HOME + "object_tasks.BoxVertices"
TASKS = [HOME + f"object_tasks.{name}" for name in ("KeyPoints", "BoxVertices", "Relation", "Distance", "Closer")]
TASKS += [PIXELS, HOME + "back_projection.BackProjection"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    write_demo_labels(root / "labels", 60)
    return root


def fitted(root: Path, tasks: dict[str, float]) -> tuple[CoordinateTokens, list[ImageLabel]]:
    data = LabelledImageDataModule(str(root), {"labels": 1.0}, {"primary": CameraSpec(140, 98)}, tasks, "metric")
    return data.fit_tokens(1024), list(data.open_mixture().labels(100))


def ask(path: str, labels: Iterable[ImageLabel], tokens: CoordinateTokens) -> float:
    """Ask about every label; return the share of numbers that have no token."""
    mixture, rng = TaskMixture({path: 1.0}), np.random.default_rng(0)
    tokens.encoded = tokens.clamped = 0
    for label in labels:
        example = mixture.ask(Scene(label, tokens), [0] * 4, rng)
        tasks = [pair.task for pair in example.pairs]
        found = read_answers(example.answer, tasks, tokens, label.height, label.width)
        for pair, answer in zip(example.pairs, found, strict=True):
            assert answer is not None
            if "<3d_" in pair.answer:
                bins = [tokens.quantizer.encode(values) for values in (answer.values, pair.truth.values)]
                assert np.array_equal(*bins)
                error = np.abs(answer.values - pair.truth.values)
                # A number outside the range is off by more than half a bin, but not by far.
                assert (error <= 5 * tokens.quantizer.half_width(bins[0])).all()
    assert tokens.encoded
    return tokens.clamped / tokens.encoded


@pytest.mark.parametrize("path", TASKS)
def test_a_task_alone_can_be_answered(root: Path, path: str) -> None:
    tokens, labels = fitted(root, {path: 1.0})
    assert ask(path, labels, tokens) < 1e-3


def test_of_several_tasks_each_can_be_answered(root: Path) -> None:
    tokens, labels = fitted(root, {VERTICES: 1.0, PIXELS: 1.0})
    assert ask(PIXELS, labels, tokens) < 1e-3
    assert ask(VERTICES, labels, tokens) < 1e-3


def test_bins_are_as_many_as_tasks_ask_for_them(root: Path) -> None:
    """Most of the table lies outside of what the boxes take up; how many tokens it gets follows the weights."""

    def finest(pixels: float) -> float:
        tokens, labels = fitted(root, {VERTICES: 1.0, PIXELS: pixels})
        vertices = np.concatenate([item.vertices for label in labels for item in label.objects])
        return float(np.median(tokens.quantizer.half_width(tokens.quantizer.encode(vertices))))

    alone, labels = fitted(root, {VERTICES: 1.0})
    vertices = np.concatenate([item.vertices for label in labels for item in label.objects])
    best = float(np.median(alone.quantizer.half_width(alone.quantizer.encode(vertices))))
    assert best < finest(0.1) < finest(10.0)


def test_tasks_about_objects_share_one_set_of_numbers(root: Path) -> None:
    one, _ = fitted(root, {VERTICES: 1.0})
    all_of_them, _ = fitted(root, dict.fromkeys((path for path in TASKS if path != PIXELS), 0.5))
    assert np.array_equal(one.quantizer.edges, all_of_them.quantizer.edges)
