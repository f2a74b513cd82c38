"""Puts the room together: a mixture of labels and a mixture of tasks become training and validation data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict

import numpy as np

from spear_lightning.batches import TrueAnswer
from spear_lightning.geometry.cameras import fit_window
from spear_lightning.robot_data.dataset import EvenSamples
from spear_lightning.robot_data.images import CameraSpec
from spear_lightning.vqa.augment import ViewRecipe, through_window
from spear_lightning.vqa.coordinate_tokens import CoordinateTokens
from spear_lightning.vqa.dataset import VqaDataset
from spear_lightning.vqa.labelled_images import AvailableObjects, LabelMixture
from spear_lightning.vqa.mixture import Example, TaskMixture
from spear_lightning.vqa.question_stream import QuestionStream
from spear_lightning.vqa.task import Scene
from spear_lightning.vqa.text_layout import TextLayout

MEASURED = 64
"""Labels on which the lengths of questions are measured."""


def training_dataset(
    labels: LabelMixture,
    tasks: TaskMixture,
    tokens: CoordinateTokens,
    layout: TextLayout,
    camera: CameraSpec,
    views: ViewRecipe,
    global_batch_size: int,
    window_batches: int = 32,
    camera_name: str = "primary",
) -> VqaDataset:
    """Return the endless training data, in batches of samples of like length.

    Args:
        labels: Where the images are from.
        tasks: What is asked.
        tokens: The 3D tokens.
        layout: Examples -> token ids.
        camera: Size at which the model sees images.
        views: How images are varied.
        global_batch_size: Samples of a step over all processes.
        window_batches: Batches whose samples are sorted by length together; 1 sorts nothing.
        camera_name: Name of the model's camera that sees them.
    """
    stream = labels.stream()
    questions = QuestionStream(
        tasks,
        global_batch_size,
        labels.seed,
        window_batches,
        measure_lengths(tasks, (Scene(label, tokens) for label in labels.labels(MEASURED)), layout),
        AvailableObjects(labels.training, stream),
    )
    return VqaDataset(
        labels.training, stream, questions, tasks, tokens, layout, camera, views, labels.seed, camera_name
    )


def validation_dataset(
    labels: LabelMixture,
    tasks: TaskMixture,
    tokens: CoordinateTokens,
    layout: TextLayout,
    camera: CameraSpec,
    samples: int,
    camera_name: str = "primary",
) -> tuple[VqaDataset, range]:
    """Return data of held-out images, without variation, and its places.

    Args:
        labels: Where the images are from.
        tasks: What is asked.
        tokens: The 3D tokens.
        layout: Examples -> token ids.
        camera: Size at which the model sees images.
        samples: Images wanted; fewer if there are fewer.
        camera_name: Name of the model's camera that sees them.
    """
    finder = EvenSamples([len(part) for part in labels.held_out], samples)
    questions = QuestionStream(tasks, 1, labels.seed, window_batches=1)
    dataset = VqaDataset(
        labels.held_out,
        finder,
        questions,
        tasks,
        tokens,
        layout,
        camera,
        ViewRecipe.plain(),
        labels.seed,
        camera_name,
    )
    return dataset, range(len(finder))


def training_answers(
    labels: LabelMixture, tasks: TaskMixture, tokens: CoordinateTokens, camera: CameraSpec, images: int
) -> Iterator[TrueAnswer]:
    """Yield what answers about training images say, as the model sees them; no image is read.

    Args:
        labels: Where the images are from.
        tasks: What is asked.
        tokens: The 3D tokens; their counts are left as they were.
        camera: Size at which the model sees images.
        images: Images asked about at most.
    """
    rng = np.random.default_rng([labels.seed, 4])
    before = tokens.encoded, tokens.clamped
    for label in labels.labels(images):
        window = fit_window(label.height, label.width, camera.height, camera.width, camera.fit)
        view = through_window(label, window, camera.height, camera.width, ViewRecipe.plain().keep)
        for pair in tasks.ask(Scene(view, tokens), tasks.plan(1, rng)[0].tolist(), rng).pairs:
            yield TrueAnswer(pair.task.path(), pair.truth.values, pair.truth.choice)
    tokens.encoded, tokens.clamped = before


def fingerprint(
    labels: LabelMixture,
    tasks: TaskMixture,
    tokens: CoordinateTokens,
    camera: CameraSpec,
    views: ViewRecipe,
    window_batches: int = 32,
) -> str:
    """Return a short hash of all that decides which samples come: a run may only be resumed with the same."""
    parts = [
        labels.fingerprint(),
        tasks.to_dict(),
        tokens.to_dict(),
        asdict(camera),
        asdict(views),
        window_batches,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def measure_lengths(tasks: TaskMixture, scenes: Iterable[Scene], layout: TextLayout) -> np.ndarray:
    """Return the mean number of tokens of one question and answer of each task, float64 (tasks,).

    Counts of numbers encoded and clamped are left as they were.
    """
    rng = np.random.default_rng(0)
    lengths: list[list[int]] = [[] for _ in tasks.tasks]
    for scene in scenes:
        before = scene.tokens.encoded, scene.tokens.clamped
        for number, task in enumerate(tasks.tasks):
            items = [item for item in scene.nameable() if task.suits(scene, item)][: task.objects]
            pair = task.ask(scene, items, rng) if len(items) == task.objects else None
            if pair is not None:
                lengths[number].append(len(layout.encode(Example((pair,)))))
        scene.tokens.encoded, scene.tokens.clamped = before
    return np.array([np.mean(found) if found else 0.0 for found in lengths])
