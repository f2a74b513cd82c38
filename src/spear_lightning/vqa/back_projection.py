"""The question that leads from 3D back to the image: where the vertices of an object's box are seen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from spear_lightning.labeling.records import ObjectLabel
from spear_lightning.vqa.coordinate_tokens import CoordinateTokens
from spear_lightning.vqa.location_tokens import location_text, locations
from spear_lightning.vqa.task import Answer, QuestionAnswer, Scene, Task, clean_name


class BackProjection(Task):
    """The image positions of the eight vertices of a box, in PaliGemma's location tokens (y before x).

    Half of the wordings give the vertices as 3D tokens, so that the model also reads what it otherwise writes.
    Asked only where the camera is known and all vertices are in the image: other positions have no tokens.
    """

    objects = 1
    templates = (
        "Where in the image are the vertices of the 3D box of the {name}?",
        "Project the 3D box of the {name} into the image.",
        "The {name} has the 3D box {box}. Where in the image are its vertices?",
        "Project the 3D box {box} of the {name} into the image.",
    )

    def suits(self, scene: Scene, item: ObjectLabel) -> bool:
        """Return whether all vertices are seen."""
        pixels = self._project(scene, item)
        return pixels is not None and bool(
            ((pixels >= 0) & (pixels <= [scene.label.width, scene.label.height])).all()
        )

    def ask(self, scene: Scene, items: Sequence[ObjectLabel], rng: np.random.Generator) -> QuestionAnswer | None:
        """Ask about one object (see `Task`)."""
        (item,) = items
        pixels = self._project(scene, item)
        if pixels is None:
            return None
        answer = location_text(pixels, scene.label.height, scene.label.width)
        template = self._template(rng)
        # The box is made into tokens only where it is needed: encoding counts.
        box = scene.tokens.text(item.vertices / scene.unit) if "{box}" in template else ""
        return QuestionAnswer(self, template.format(name=clean_name(item.name), box=box), answer, Answer(pixels))

    def parse(self, text: str, tokens: CoordinateTokens, height: int, width: int) -> Answer | None:
        """Read eight positions (8, 2), (u, v) in pixels (see `Task`)."""
        pixels = locations(text, height, width)
        return None if pixels is None or len(pixels) != 8 else Answer(pixels)

    def errors(self, found: Answer, truth: Answer) -> dict[str, float]:
        """Return the mean distance in pixels (see `Task`)."""
        return {"projection_error_pixels": float(np.linalg.norm(found.values - truth.values, axis=-1).mean())}

    @staticmethod
    def _project(scene: Scene, item: ObjectLabel) -> np.ndarray | None:
        camera = scene.label.intrinsics
        return None if camera is None else camera.project(torch.from_numpy(item.vertices).double()).numpy()
