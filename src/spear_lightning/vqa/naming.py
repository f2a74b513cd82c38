"""Questions for names: of all objects in the order in which they are seen, and of the one at a place.

They are not among the paper's tasks, whose VLM knows from its pretraining what things are called. A model that
starts from random weights has to learn names, and every word of these answers teaches one, while a coordinate
teaches none until the object that it belongs to is found.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from spear_lightning.labeling.records import ObjectLabel
from spear_lightning.vqa.coordinate_tokens import CoordinateTokens
from spear_lightning.vqa.task import Answer, QuestionAnswer, Scene, Task, clean_name

MOST = 8
"""More objects are not listed."""

APART = 0.01
"""Least step between neighbours in the order, relative to the distance or to the image's width."""


class ObjectOrder(Task):
    """The names of all objects, from the closest to the furthest or from left to right."""

    objects = 0
    templates: ClassVar[tuple[str, ...]] = (
        "What are the objects, from the closest to the furthest?",
        "Name all objects from the closest to the furthest.",
        "What are the objects, from left to right?",
        "Name all objects from left to right.",
    )
    _pattern = re.compile(r"the [^.,<>]+(, the [^.,<>]+)*")

    def suits(self, scene: Scene, item: ObjectLabel) -> bool:
        """Return False: the task asks about all objects together."""
        return False

    def ask(self, scene: Scene, items: Sequence[ObjectLabel], rng: np.random.Generator) -> QuestionAnswer | None:
        """Ask for all names; None if there are none or too many, or the order is not clear (see `Task`)."""
        shown = [item for item in scene.label.objects if clean_name(item.name)]
        if not 1 <= len(shown) <= MOST:
            return None
        question = self._template(rng)
        if "left" in question:
            places = np.array([item.box_2d[[0, 2]].mean() / scene.label.width for item in shown])
            steps = np.diff(np.sort(places))
        else:
            places = np.array([item.distance for item in shown])
            steps = np.diff(np.log(np.sort(places)))
        if (steps < APART).any():
            return None
        names = ", ".join(f"the {clean_name(shown[index].name)}" for index in np.argsort(places))
        return QuestionAnswer(self, question, names, Answer(np.zeros(0), names))

    def parse(self, text: str, tokens: CoordinateTokens, height: int, width: int) -> Answer | None:
        """Read the names, as the answer's `choice` (see `Task`)."""
        names = text.strip()
        return Answer(np.zeros(0), names) if self._pattern.fullmatch(names) else None

    def errors(self, found: Answer, truth: Answer) -> dict[str, float]:
        """Return the share of places with the right name; a list of another length has none beyond its end."""
        said, true = found.choice.split(", "), truth.choice.split(", ")
        right = sum(one == other for one, other in zip(said, true, strict=False))
        return {"naming_accuracy": right / max(len(said), len(true))}


class ObjectAtPoint(ObjectOrder):
    """The name of the object whose centre is at a point, which is given as 3D tokens: a list of one."""

    objects = 1
    templates = ("What is at the point {point}?", "Name the object at {point}.", "Which object is at {point}?")
    _pattern = re.compile(r"the [^.,<>]+")

    def suits(self, scene: Scene, item: ObjectLabel) -> bool:
        """Return True."""
        return True

    def ask(self, scene: Scene, items: Sequence[ObjectLabel], rng: np.random.Generator) -> QuestionAnswer | None:
        """Ask about one object (see `Task`)."""
        (item,) = items
        name = f"the {clean_name(item.name)}"
        point = scene.tokens.text(item.centre.astype(np.float64) / scene.unit)
        return QuestionAnswer(self, self._template(rng).format(point=point), name, Answer(np.zeros(0), name))
