"""Labelled images -> typed batches of questions and answers; deterministic, and resumable at any place."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from spear_lightning.batches import TrueAnswer, VqaBatch
from spear_lightning.labeling.records import ImageLabel
from spear_lightning.robot_data.dataset import FindsSamples
from spear_lightning.robot_data.images import BrokenImage, BrokenImages, CameraSpec
from spear_lightning.vqa.augment import ViewRecipe, make_view
from spear_lightning.vqa.coordinate_tokens import CoordinateTokens
from spear_lightning.vqa.labelled_images import LabelledImages
from spear_lightning.vqa.mixture import Example, TaskMixture
from spear_lightning.vqa.question_stream import QuestionStream
from spear_lightning.vqa.task import Scene
from spear_lightning.vqa.text_layout import Text, TextLayout

log = logging.getLogger(__name__)

PLAIN = ViewRecipe.plain()


class _Sample(NamedTuple):
    label: ImageLabel
    pixels: torch.Tensor
    text: Text
    seen: bool
    clamped: int


class VqaDataset(torch.utils.data.Dataset[VqaBatch]):
    """Reads whole batches of questions about images.

    Args:
        sources: Labelled images of each data set.
        finder: Place -> (data set, image): `SampleStream`, or `EvenSamples` for validation.
        questions: Place -> (place for the finder, planned tasks).
        mixture: Asks the planned tasks.
        tokens: The 3D tokens.
        layout: Examples -> token ids.
        camera: Size at which the model sees images, and how other aspect ratios are met.
        views: How images are varied.
        seed: Of the views, objects and wordings.
        camera_name: Name of the model's camera that sees them.

    Attributes:
        without_questions: Samples so far in this process about which nothing could be asked.
    """

    def __init__(
        self,
        sources: Sequence[LabelledImages],
        finder: FindsSamples,
        questions: QuestionStream,
        mixture: TaskMixture,
        tokens: CoordinateTokens,
        layout: TextLayout,
        camera: CameraSpec,
        views: ViewRecipe,
        seed: int,
        camera_name: str = "primary",
    ) -> None:
        self._sources, self._finder, self._questions = list(sources), finder, questions
        self._mixture, self._tokens, self._layout = mixture, tokens, layout
        self._camera, self._views, self._seed, self._camera_name = camera, views, seed, camera_name
        self.without_questions = 0
        self._broken = BrokenImages(log, "The sample is masked")

    @property
    def broken_images(self) -> int:
        """Images so far in this process that could not be decoded; they are masked."""
        return self._broken.count

    def __getitem__(self, place: int) -> VqaBatch:
        """Return a batch of one."""
        return self.__getitems__([place])

    def __getitems__(self, places: Sequence[int]) -> VqaBatch:
        """Return the batch of some places; `DataLoader` calls this once per batch.

        Raises:
            DataError: If a label is wrong or its file cannot be read. An image that cannot be decoded is
                masked and reported instead.
        """
        position_B, plans = self._questions[np.asarray(places, np.int64)]
        dataset_B, image_B = self._finder[position_B]
        rows = zip(position_B.tolist(), dataset_B.tolist(), image_B.tolist(), plans, strict=True)
        samples = [self._sample(*row) for row in rows]
        examples = [sample.text.example for sample in samples]
        text = self._layout.lay_out([sample.text for sample in samples])
        labels = [sample.label for sample in samples]
        return VqaBatch(
            images={self._camera_name: torch.stack([sample.pixels for sample in samples])},
            image_mask={self._camera_name: torch.tensor([sample.seen for sample in samples])},
            input_ids=text.input_ids,
            token_mask=text.token_mask,
            answer_mask=text.answer_mask,
            answer_places=text.answer_mask.flatten().nonzero()[:, 0],
            coordinate_mask=text.coordinate_mask,
            questions=[example.question for example in examples],
            answers=[example.answer for example in examples],
            asked=[
                [TrueAnswer(pair.task.path(), pair.truth.values, pair.truth.choice) for pair in example.pairs]
                for example in examples
            ],
            clamped=torch.tensor([sample.clamped for sample in samples]),
            unit=torch.tensor([self._tokens.unit(label) for label in labels]),
            metric=torch.tensor([label.unit == "metric" for label in labels]),
            intrinsics=torch.tensor([_camera_numbers(label) for label in labels]),
            dataset=torch.from_numpy(dataset_B),
            position=torch.from_numpy(position_B),
        )

    def _sample(self, position: int, dataset: int, image: int, plan: np.ndarray) -> _Sample:
        rng = np.random.default_rng([self._seed, 3, position])
        try:
            label, image_HW3 = self._sources[dataset].read(image)
        except BrokenImage as error:
            return self._masked(error, self._sources[dataset].label(image))
        before = self._tokens.clamped
        # A cut may leave nothing to ask about; then the image is shown as it is.
        for views in (self._views, PLAIN):
            view, pixels = make_view(label, image_HW3, self._camera, views, rng)
            text = self._layout.shortened(self._mixture.ask(Scene(view, self._tokens), plan.tolist(), rng))
            if text.example.pairs:
                break
        self.without_questions += not text.example.pairs
        return _Sample(view, pixels, text, True, self._tokens.clamped - before)

    def _masked(self, error: BrokenImage, label: ImageLabel) -> _Sample:
        self._broken.note(error)
        pixels = torch.zeros((3, self._camera.height, self._camera.width), dtype=torch.uint8)
        return _Sample(label, pixels, self._layout.encode(Example(())), False, 0)


def _camera_numbers(label: ImageLabel) -> tuple[float, float, float, float]:
    camera = label.intrinsics
    if camera is None:
        return (float("nan"),) * 4
    return camera.fx, camera.fy, camera.cx, camera.cy
