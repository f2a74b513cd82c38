"""What a task is: it asks about a scene, writes the answer, reads answers back, and says how far off they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from spear_lightning.labeling.records import ImageLabel, ObjectLabel
from spear_lightning.vqa.coordinate_tokens import CoordinateTokens, object_numbers

NOT_IN_NAMES = str.maketrans(".,<>", "    ")
"""Characters that end a name in an answer, or begin a token."""


@dataclass(frozen=True)
class Scene:
    """A labelled image as the model sees it.

    Attributes:
        label: Its label, after all augmentation; width, height and intrinsics are those of the model's image.
        tokens: The 3D tokens.
    """

    label: ImageLabel
    tokens: CoordinateTokens

    @property
    def unit(self) -> float:
        """The length in the unit of the label that counts as one in tokens and in `Answer`."""
        return self.tokens.unit(self.label)

    def nameable(self) -> list[ObjectLabel]:
        """Return the objects whose name occurs once: of several instances, none can be asked for."""
        names = [clean_name(item.name) for item in self.label.objects]
        return [
            item for item, name in zip(self.label.objects, names, strict=True) if name and names.count(name) == 1
        ]


@lru_cache(maxsize=4096)
def clean_name(name: str) -> str:
    """Return a name as it stands in questions and answers: lower case, single spaces, none of . , < >."""
    return " ".join(name.lower().translate(NOT_IN_NAMES).split())


@dataclass(frozen=True)
class Answer:
    """What an answer says.

    Attributes:
        values: Numbers: lengths in units of `Scene.unit`, or pixels (back-projection).
        choice: The name that was chosen; "" where there is nothing to choose.
    """

    values: np.ndarray
    choice: str = ""


@dataclass(frozen=True)
class QuestionAnswer:
    """One question about a scene with its answer.

    Attributes:
        task: The task that asked.
        question: Text without line breaks.
        answer: Text without line breaks.
        truth: What the answer should say, before quantisation.
    """

    task: Task
    question: str
    answer: str
    truth: Answer


class Task(ABC):
    """A family of questions.

    Attributes:
        objects: How many objects a question is about.
        templates: Wordings of the question, with places for what `ask` fills in.
    """

    objects: ClassVar[int]
    templates: ClassVar[tuple[str, ...]]

    @abstractmethod
    def suits(self, scene: Scene, item: ObjectLabel) -> bool:
        """Return whether the task can ask about an object."""

    @abstractmethod
    def ask(self, scene: Scene, items: Sequence[ObjectLabel], rng: np.random.Generator) -> QuestionAnswer | None:
        """Ask about `objects` objects that suit; None if there is no clear answer."""

    @abstractmethod
    def parse(self, text: str, tokens: CoordinateTokens, height: int, width: int) -> Answer | None:
        """Read an answer about an image of a size; None if it is not exactly one of this task, never a guess."""

    @abstractmethod
    def errors(self, found: Answer, truth: Answer) -> dict[str, float]:
        """Return how far an answer is off, by the names of `metrics.MEASURES`."""

    @staticmethod
    def numbers(label: ImageLabel) -> np.ndarray:
        """Return the lengths that 3D tokens may have to say of a label, float64 (n,) in its unit."""
        return object_numbers(label)

    @classmethod
    def path(cls) -> str:
        """Return the class path by which a recipe names the task."""
        return f"{cls.__module__}.{cls.__qualname__}"

    def _template(self, rng: np.random.Generator) -> str:
        return self.templates[int(rng.integers(len(self.templates)))]
