"""Questions whose answers are 3D coordinates: key points, boxes, relations, distances, and random pixels.

All coordinates are in the OpenCV camera frame (x right, y down, z forward) in units of `Scene.unit`. The eight
vertices of a box are in the canonical order of `geometry.oriented_boxes`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch

from spear_lightning.geometry.box_iou import box_iou
from spear_lightning.geometry.oriented_boxes import OrientedBox, box_from_vertices
from spear_lightning.labeling.records import ImageLabel, ObjectLabel
from spear_lightning.vqa.coordinate_tokens import CoordinateTokens
from spear_lightning.vqa.location_tokens import location_text
from spear_lightning.vqa.task import Answer, QuestionAnswer, Scene, Task, clean_name

NUMBERS = r"((?:\s*<3d_\d{4}>)+)\s*"
"""One or more 3D tokens, as a group."""


class AnyObject(Task):
    """A task that can ask about every object."""

    def suits(self, scene: Scene, item: ObjectLabel) -> bool:
        """Return True."""
        return True


def read_numbers(
    pattern: re.Pattern[str], text: str, tokens: CoordinateTokens, counts: tuple[int, ...]
) -> np.ndarray | None:
    """Return the numbers in the groups of a pattern that fits a whole text; None if their counts differ."""
    match = pattern.fullmatch(text.strip())
    if match is None:
        return None
    groups = [tokens.values(group) for group in match.groups()[: len(counts)]]
    if any(group is None or len(group) != count for group, count in zip(groups, counts, strict=True)):
        return None
    return np.concatenate([group for group in groups if group is not None])


def lengths(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return distances between corresponding points of (..., 3) arrays."""
    return np.linalg.norm(found - truth, axis=-1)


class KeyPoints(AnyObject):
    """The closest, the furthest and the centre point of an object."""

    objects = 1
    templates = (
        "What are the closest, furthest and center point of the {name}?",
        "Give the 3D coordinates of the closest, the furthest and the center point of the {name}.",
        "Locate the key points of the {name} in 3D: closest, furthest and center.",
    )
    _pattern = re.compile(rf"closest{NUMBERS}furthest{NUMBERS}center{NUMBERS}")

    def ask(self, scene: Scene, items: Sequence[ObjectLabel], rng: np.random.Generator) -> QuestionAnswer:
        """Ask about one object (see `Task`)."""
        (item,) = items
        points = np.stack([item.closest, item.furthest, item.centre]) / scene.unit
        words = scene.tokens.words(points)
        parts = zip(("closest", "furthest", "center"), (words[:3], words[3:6], words[6:]), strict=True)
        answer = " ".join(f"{name} {''.join(point)}" for name, point in parts)
        question = self._template(rng).format(name=clean_name(item.name))
        return QuestionAnswer(self, question, answer, Answer(points))

    def parse(self, text: str, tokens: CoordinateTokens, height: int, width: int) -> Answer | None:
        """Read three points (3, 3) (see `Task`)."""
        values = read_numbers(self._pattern, text, tokens, (3, 3, 3))
        return None if values is None else Answer(values.reshape(3, 3))

    def errors(self, found: Answer, truth: Answer) -> dict[str, float]:
        """Return the errors of all points and of the centre (see `Task`)."""
        error = lengths(found.values, truth.values)
        return {"key_point_error": float(error.mean()), "centre_error": float(error[2])}


class BoxVertices(AnyObject):
    """The eight vertices of an object's oriented 3D box, in canonical order."""

    objects = 1
    templates = (
        "What are the eight vertices of the 3D bounding box of the {name}?",
        "Detect the {name} in 3D.",
        "Give the oriented 3D box of the {name} by its eight vertices.",
    )
    _pattern = re.compile(NUMBERS)

    def ask(self, scene: Scene, items: Sequence[ObjectLabel], rng: np.random.Generator) -> QuestionAnswer:
        """Ask about one object (see `Task`)."""
        (item,) = items
        vertices = item.vertices.astype(np.float64) / scene.unit
        question = self._template(rng).format(name=clean_name(item.name))
        return QuestionAnswer(self, question, scene.tokens.text(vertices), Answer(vertices))

    def parse(self, text: str, tokens: CoordinateTokens, height: int, width: int) -> Answer | None:
        """Read eight vertices (8, 3) (see `Task`)."""
        values = read_numbers(self._pattern, text, tokens, (24,))
        return None if values is None else Answer(values.reshape(8, 3))

    def errors(self, found: Answer, truth: Answer) -> dict[str, float]:
        """Return errors of vertices and centre, and the overlap of the boxes (see `Task`)."""
        boxes = [box_from_vertices(torch.from_numpy(part.values))[0] for part in (found, truth)]
        pair = [OrientedBox(*(t[None] for t in (box.centre, box.quaternion, box.extents))) for box in boxes]
        iou = float(box_iou(pair[0], pair[1]))
        return {
            "centre_error": float(np.linalg.norm(found.values.mean(0) - truth.values.mean(0))),
            "vertex_error": float(lengths(found.values, truth.values).mean()),
            "iou": iou,
            "iou_at_0.25": float(iou >= 0.25),
            "iou_at_0.5": float(iou >= 0.5),
        }


class Relation(AnyObject):
    """The x, y and z components of the way from one object's centre to another's."""

    objects = 2
    templates = (
        "How far is the {second} from the {first} along x, y and z?",
        "Give the x, y and z components of the distance from the {first} to the {second}.",
        "Where is the {second} relative to the {first}?",
    )
    _pattern = re.compile(rf"x{NUMBERS}y{NUMBERS}z{NUMBERS}")

    def ask(self, scene: Scene, items: Sequence[ObjectLabel], rng: np.random.Generator) -> QuestionAnswer:
        """Ask about two objects (see `Task`)."""
        first, second = items
        way = (second.centre.astype(np.float64) - first.centre) / scene.unit
        answer = " ".join(f"{axis} {word}" for axis, word in zip("xyz", scene.tokens.words(way), strict=True))
        names = {"first": clean_name(first.name), "second": clean_name(second.name)}
        return QuestionAnswer(self, self._template(rng).format(**names), answer, Answer(way))

    def parse(self, text: str, tokens: CoordinateTokens, height: int, width: int) -> Answer | None:
        """Read three components (3,) (see `Task`)."""
        values = read_numbers(self._pattern, text, tokens, (1, 1, 1))
        return None if values is None else Answer(values)

    def errors(self, found: Answer, truth: Answer) -> dict[str, float]:
        """Return the length of the difference (see `Task`)."""
        return {"relation_error": float(lengths(found.values, truth.values))}


class Distance(AnyObject):
    """The distance from the camera to the centre of an object."""

    objects = 1
    templates = (
        "How far is the {name} from the camera?",
        "What is the distance to the {name}?",
        "Give the distance from the camera to the {name}.",
    )
    _pattern = re.compile(NUMBERS)

    def ask(self, scene: Scene, items: Sequence[ObjectLabel], rng: np.random.Generator) -> QuestionAnswer | None:
        """Ask about one object (see `Task`)."""
        (item,) = items
        distance = np.array([item.distance / scene.unit])
        question = self._template(rng).format(name=clean_name(item.name))
        return QuestionAnswer(self, question, scene.tokens.text(distance), Answer(distance))

    def parse(self, text: str, tokens: CoordinateTokens, height: int, width: int) -> Answer | None:
        """Read one distance (1,) (see `Task`)."""
        values = read_numbers(self._pattern, text, tokens, (1,))
        return None if values is None else Answer(values)

    def errors(self, found: Answer, truth: Answer) -> dict[str, float]:
        """Return the error relative to the true distance (see `Task`)."""
        return {"relative_distance_error": float((np.abs(found.values - truth.values) / truth.values).mean())}


class Closer(Distance):
    """Which of two objects is closer, answered step by step: one distance, the other, the conclusion."""

    objects = 2
    templates = (
        "Which is closer to the camera, the {first} or the {second}?",
        "Is the {first} or the {second} closer? Think step by step.",
        "Compare the distances of the {first} and the {second} from the camera.",
    )
    _pattern = re.compile(
        rf"the (?P<first>[^.,<]+) is at{NUMBERS}, the (?P<second>[^.,<]+) is at{NUMBERS}, "
        r"so the (?P<choice>[^.,<]+) is closer"
    )

    def ask(self, scene: Scene, items: Sequence[ObjectLabel], rng: np.random.Generator) -> QuestionAnswer | None:
        """Ask about two objects; None if the tokens cannot tell which is closer (see `Task`)."""
        distances = np.array([item.distance for item in items]) / scene.unit
        first, second = (clean_name(item.name) for item in items)
        bins = scene.tokens.quantizer.encode(distances)
        if bins[0] == bins[1]:
            return None
        choice = first if distances[0] < distances[1] else second
        texts = scene.tokens.words(distances)
        answer = f"the {first} is at {texts[0]}, the {second} is at {texts[1]}, so the {choice} is closer"
        question = self._template(rng).format(first=first, second=second)
        return QuestionAnswer(self, question, answer, Answer(distances, choice))

    def parse(self, text: str, tokens: CoordinateTokens, height: int, width: int) -> Answer | None:
        """Read two distances (2,) and which object was said to be closer (see `Task`)."""
        match = self._pattern.fullmatch(text.strip())
        if match is None or match["choice"] not in (match["first"], match["second"]):
            return None
        values = [tokens.values(match[group]) for group in (2, 4)]
        if any(value is None or len(value) != 1 for value in values):
            return None
        return Answer(np.concatenate([value for value in values if value is not None]), match["choice"])

    def errors(self, found: Answer, truth: Answer) -> dict[str, float]:
        """Return the relative error of both distances, and whether the choice is right (see `Task`)."""
        return {**super().errors(found, truth), "choice_accuracy": float(found.choice == truth.choice)}


class RandomPixels(Task):
    """The 3D coordinates of random pixels, with no regard to objects: the ablation "no OBJ".

    Args:
        count: Pixels of a question.
    """

    objects = 0
    templates = (
        "What are the 3D coordinates of the pixels {pixels}?",
        "Give the 3D points seen at {pixels}.",
        "Where in 3D are the pixels {pixels}?",
    )
    _pattern = re.compile(NUMBERS)

    def __init__(self, count: int = 3) -> None:
        self._count = count

    @staticmethod
    def numbers(label: ImageLabel) -> np.ndarray:
        """Return the points seen at pixels (see `Task`)."""
        return label.pixel_points.ravel().astype(np.float64)

    def suits(self, scene: Scene, item: ObjectLabel) -> bool:
        """Return False: the task asks about no object."""
        return False

    def ask(self, scene: Scene, items: Sequence[ObjectLabel], rng: np.random.Generator) -> QuestionAnswer | None:
        """Ask about pixels with known points; None if the image has too few (see `Task`)."""
        label = scene.label
        if len(label.pixels) < self._count:
            return None
        chosen = rng.choice(len(label.pixels), self._count, replace=False)
        points = label.pixel_points[chosen].astype(np.float64) / scene.unit
        pixels = location_text(label.pixels[chosen], label.height, label.width)
        question = self._template(rng).format(pixels=pixels)
        return QuestionAnswer(self, question, scene.tokens.text(points), Answer(points))

    def parse(self, text: str, tokens: CoordinateTokens, height: int, width: int) -> Answer | None:
        """Read `count` points (count, 3) (see `Task`)."""
        values = read_numbers(self._pattern, text, tokens, (3 * self._count,))
        return None if values is None else Answer(values.reshape(-1, 3))

    def errors(self, found: Answer, truth: Answer) -> dict[str, float]:
        """Return the mean error of the points (see `Task`)."""
        return {"pixel_point_error": float(lengths(found.values, truth.values).mean())}
