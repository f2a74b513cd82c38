"""What the patches of labelled images show, by name: what an encoder learns from that starts from random weights.

The paper's SigLIP knows names from its pretraining on images and their captions. Where there are no weights to
start from, names are far harder to learn from coordinates: no coordinate teaches a name until the object that it
belongs to is found. Masks with names teach both at once, in every patch of an image.

Shape letters: O objects, H and W the image, R and C rows and columns of patches.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from spear_lightning.batches import IGNORED, NamedPatchBatch
from spear_lightning.geometry.cameras import fit_window
from spear_lightning.labeling.records import ImageLabel
from spear_lightning.labeling.run_lengths import decode_mask
from spear_lightning.robot_data.dataset import FindsSamples
from spear_lightning.robot_data.images import BrokenImage, BrokenImages, CameraSpec, fit_image
from spear_lightning.vqa.labelled_images import LabelledImages
from spear_lightning.vqa.task import clean_name

log = logging.getLogger(__name__)

COVER = 0.25
"""A patch shows the object that covers most of it, if that is at least this share of its pixels."""


def common_names(names: Iterable[Sequence[str]], most: int) -> list[str]:
    """Return the names that objects have most often, in alphabetical order.

    Args:
        names: Of the objects of each image.
        most: How many at most.
    """
    counts = Counter(clean for row in names for clean in map(clean_name, row) if clean)
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    return sorted(ranked[:most])


def patch_names(label: ImageLabel, numbers: dict[str, int], camera: CameraSpec, patch: int) -> Tensor:
    """Return what the patches of an image show, int64 (R * C,) (see `NamedPatchBatch`).

    Args:
        label: Of the image, with masks.
        numbers: Name -> its number, from 1 on; an object of another name is ignored where it is.
        camera: How the image is shown.
        patch: Side of a patch in pixels.
    """
    rows, columns = camera.height // patch, camera.width // patch
    if not label.objects:
        return torch.zeros(rows * columns, dtype=torch.int64)
    masks_OHW = np.stack([decode_mask(item.mask, label.height, label.width) for item in label.objects])
    cover_OP = _covers(torch.from_numpy(masks_OHW).float(), camera, patch).flatten(1)
    most_P, object_P = cover_OP.max(0)
    number_O = torch.tensor([numbers.get(clean_name(item.name), IGNORED) for item in label.objects])
    return torch.where(most_P >= COVER, number_O[object_P], 0)


def _covers(masks_OHW: Tensor, camera: CameraSpec, patch: int) -> Tensor:
    """Return which share of each patch each object covers, (O, R, C)."""
    _, height, width = masks_OHW.shape
    window = fit_window(height, width, camera.height, camera.width, camera.fit)
    source, target = window.source, window.destination
    cut_OHW = masks_OHW[:, source.top : source.top + source.height, source.left : source.left + source.width]
    size = (target.height, target.width)
    if cut_OHW.shape[1:] != size:
        cut_OHW = F.interpolate(cut_OHW[None], size, mode="bilinear", antialias=True)[0]
    right = camera.width - target.left - target.width
    bottom = camera.height - target.top - target.height
    shown_OHW = F.pad(cut_OHW, (target.left, right, target.top, bottom))
    return F.avg_pool2d(shown_OHW[None], patch)[0]


class NamedPatches(Dataset[NamedPatchBatch]):
    """Reads whole batches of images with the names of their patches.

    Args:
        sources: Labelled images of each data set, with masks.
        finder: Place -> (data set, image): `SampleStream`, or `EvenSamples` for validation.
        names: All names that are known; the first has number 1.
        camera: Size at which the model sees images, and how other aspect ratios are met.
        patch: Side of a patch in pixels.
    """

    def __init__(
        self,
        sources: Sequence[LabelledImages],
        finder: FindsSamples,
        names: Sequence[str],
        camera: CameraSpec,
        patch: int,
    ) -> None:
        self._sources, self._finder = list(sources), finder
        self._numbers = {name: number for number, name in enumerate(names, start=1)}
        self._camera, self._patch = camera, patch
        self._broken = BrokenImages(log, "Nothing is known of its patches")

    def read(self, indices: Sequence[int]) -> NamedPatchBatch:
        """Return the batch of some places. Of an image that cannot be decoded, nothing is known.

        Raises:
            DataError: If a label is wrong or its file cannot be read.
        """
        places = np.asarray(indices, np.int64)
        found = zip(*(part.tolist() for part in self._finder[places]), strict=True)
        pictures, names = zip(*(self._sample(dataset, image) for dataset, image in found), strict=True)
        return NamedPatchBatch(torch.stack(pictures), torch.stack(names), torch.from_numpy(places))

    def __getitem__(self, places: list[int]) -> NamedPatchBatch:
        """Return the batch of some places."""
        return self.read(places)

    def __getitems__(self, places: list[int]) -> NamedPatchBatch:
        """Do the same: torch's loader asks so for batches."""
        return self.read(places)

    def _sample(self, dataset: int, image: int) -> tuple[Tensor, Tensor]:
        try:
            label, image_HW3 = self._sources[dataset].read(image)
        except BrokenImage as error:
            self._broken.note(error)
            rows, columns = self._camera.height // self._patch, self._camera.width // self._patch
            pixels = torch.zeros((3, self._camera.height, self._camera.width), dtype=torch.uint8)
            return pixels, torch.full((rows * columns,), IGNORED)
        names = patch_names(label, self._numbers, self._camera, self._patch)
        return fit_image(image_HW3, self._camera), names
