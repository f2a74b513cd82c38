"""Where images to be labelled come from: folders, videos, robot episodes.

A source names its images without reading them, so that a run can be divided and resumed by name.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spear_lightning.errors import ConfigError, DataError
from spear_lightning.labeling.picture_bytes import red_first, upright
from spear_lightning.robot_data.episode_index import EpisodeIndex
from spear_lightning.robot_data.index_build import build_index, index_path
from spear_lightning.robot_data.index_store import DESCRIPTION
from spear_lightning.robot_data.registry import entry_for_folder, entry_of
from spear_lightning.robot_data.rlds_folder import open_rlds

PICTURES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class ImageRef:
    """An image by name.

    Attributes:
        image_id: Unique in the source and the same in every run.
        group: Images of one group are read by the same process, one after another; a name as stable as the id's.
    """

    image_id: str
    group: str


class ImageSource(ABC):
    """Names images and reads them; used by one thread."""

    name: str
    """What `ImageLabel.source` says."""

    @abstractmethod
    def refs(self) -> Iterator[ImageRef]:
        """Yield all images in an order that is the same in every run.

        Raises:
            DataError: If there are none.
        """

    @abstractmethod
    def read(self, ref: ImageRef) -> bytes:
        """Return an image as JPEG or PNG bytes.

        Raises:
            DataError: If it cannot be read.
        """


class ImageFolder(ImageSource):
    """The JPEG and PNG files of a folder and the folders in it.

    Image ids are paths relative to the folder. Pictures with an orientation tag, as phones write it, are turned
    upright, and labels hold for the upright ones; so must boxes, masks and depth from files.

    Args:
        folder: Where they are.
        name: What labels call the source; default: the folder's name.
    """

    def __init__(self, folder: str, name: str | None = None) -> None:
        self.folder = Path(folder).expanduser()
        self.name = name or self.folder.resolve().name

    def refs(self) -> Iterator[ImageRef]:
        """Yield the files, sorted by path."""
        for path in sorted_files(self.folder, PICTURES, "images"):
            yield ImageRef(path, path)

    def read(self, ref: ImageRef) -> bytes:
        """Return a file's bytes; encoded anew if the picture had to be turned."""
        path = self.folder / ref.image_id
        try:
            return upright(path.read_bytes())
        except OSError as error:
            raise DataError("An image cannot be read", where=path, found=error.strerror) from error


def sorted_files(folder: Path, endings: tuple[str, ...], what: str) -> list[str]:
    """Return the files below a folder that have one of the endings: relative paths, sorted.

    Raises:
        DataError: If the folder does not exist or there are none.
    """
    if not folder.is_dir():
        raise DataError(f"The folder of {what} does not exist", where=folder)
    found = [
        os.path.relpath(os.path.join(parent, file), folder).replace(os.sep, "/")
        for parent, _, files in os.walk(folder, followlinks=True)
        for file in files
        if file.lower().endswith(endings) and not file.startswith(".")
    ]
    if not found:
        raise DataError(f"The folder holds no {what}", where=folder, expected=f"files {' '.join(endings)}")
    return sorted(found)


class RobotFrames(ImageSource):
    """Camera frames of an RLDS data set, read by byte range through its index (which is made if there is none).

    Image ids are "DATASET/SPLIT/EPISODE/STEP/CAMERA".

    Args:
        folder: One version of one data set, for example bridge_dataset/1.0.0.
        camera: A camera of the data set's registry entry, such as "primary".
        seconds_apart: Time between the frames that are taken of an episode; 0 takes all.
        split: Its split.
        dataset: Registry id of its conventions; default: found by its name.
        index_folder: Where indexes are kept; default: see `spear data index`.
    """

    def __init__(
        self,
        folder: str,
        camera: str = "primary",
        seconds_apart: float = 1.0,
        split: str = "train",
        dataset: str | None = None,
        index_folder: str | None = None,
    ) -> None:
        rlds = open_rlds(folder)
        entry = entry_of(dataset) if dataset else entry_for_folder(rlds.path, rlds.name)
        root = Path(index_folder) if index_folder else None
        path = index_path(rlds, split, entry, root)
        if not (path / DESCRIPTION).is_file():
            build_index(rlds, split, entry, root)
        self._index = EpisodeIndex(path, rlds.path)
        if camera not in self._index.cameras:
            raise ConfigError(
                "The data set has no such camera",
                where="source.camera",
                found=camera,
                expected=f"one of {self._index.cameras}",
            )
        self._camera, self._split = camera, split
        self._stride = max(1, round(seconds_apart * self._index.rate_hz))
        self.name = self._index.dataset

    def refs(self) -> Iterator[ImageRef]:
        """Yield frames of all episodes in which the camera shows something."""
        starts = self._index.episode_starts
        for episode in np.flatnonzero(self._index.camera_present(self._camera)).tolist():
            for frame in range(int(starts[episode]), int(starts[episode + 1]), self._stride):
                if self._index.has_image(self._camera, frame, episode):
                    step = frame - int(starts[episode])
                    image_id = f"{self.name}/{self._split}/{episode:06d}/{step:05d}/{self._camera}"
                    yield ImageRef(image_id, image_id)

    def read(self, ref: ImageRef) -> bytes:
        """Return a frame's stored bytes; encoded anew if they have red and blue exchanged."""
        episode, step = (int(part) for part in ref.image_id.split("/")[-3:-1])
        frame = int(self._index.episode_starts[episode]) + step
        data = self._index.encoded_image(self._camera, frame, episode)
        return red_first(data, ref.image_id) if self._index.blue_first(self._camera) else data
