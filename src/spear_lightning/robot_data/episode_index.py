"""Reading an index: memory-mapped low-dimensional streams, and single frames fetched by byte range."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spear_lightning.errors import ConfigError, DataError
from spear_lightning.robot_data.images import CameraSpec, decode_image
from spear_lightning.robot_data.index_store import read_array_folder
from spear_lightning.robot_data.storage import DataPath, data_path

if TYPE_CHECKING:
    from spear_lightning.robot_data.parquet_pictures import ParquetPictures
    from spear_lightning.robot_data.video_frames import VideoFrames

OPEN_SHARDS = 128
"""Shard files kept open per process: far below the usual limit of 1024."""


class EpisodeIndex:
    """An indexed split of a robot data set: N frames in E episodes, S of them allowed to start a chunk.

    Nothing is read before it is asked for; memory does not grow with the data set. Instances can be sent to
    worker processes and used there from several threads.

    Attributes:
        folder: Where the index is.
        description: Its `index.json`.
        dataset: Registry id.
        rate_hz: Rate of the frames.
        episode_starts: int64 (E + 1,), first frame of each episode, and N.
        samples: int64 (S,), frames that may start a chunk, ascending.
        episode_sample_starts: int64 (E + 1,), first sample of each episode, and S.
        pose: float32 (N, 7), measured pose [x m, q xyzw, w >= 0], tool -> base.
        gripper_state: float32 (N,), measured openness in [0, 1].
        gripper_command: float32 (N,), commanded openness in [0, 1]; that of frame t leads to frame t + 1.
        instruction_ids: int32 (E,), place of each episode's instruction in `instructions`.
        instructions: The distinct instructions; "" where there is none.
        cameras: Names of the cameras.
    """

    def __init__(self, folder: str | Path, data_folder: str | DataPath | None = None) -> None:
        """Open an index.

        Args:
            folder: The index.
            data_folder: Where its data set is now; default: where it was indexed.

        Raises:
            DataError: If it is no index or not whole.
        """
        self.folder = Path(folder)
        self.description, self._arrays = read_array_folder(self.folder)
        self.dataset: str = self.description["dataset"]
        self.rate_hz: float = self.description["rate_hz"]
        self.instructions: list[str] = self.description["instructions"]
        self.pose = self._arrays["pose"]
        self.gripper_state = self._arrays["gripper_state"]
        self.gripper_command = self._arrays["gripper_command"]
        self.instruction_ids = self._arrays["instruction_id"]
        self.samples = self._arrays["sample"]
        self.episode_starts = np.append(self._arrays["episode_start"], len(self.pose))
        self.episode_sample_starts = np.concatenate([[0], np.cumsum(self._arrays["episode_samples"])])
        self._data_folder = data_path(data_folder or self.description["data_folder"])
        self._shards: list[str] = self.description["shards"]
        prefix, suffix = "camera/", "/offset"
        self.cameras = [
            name[len(prefix) : -len(suffix)]
            for name in self._arrays
            if name.startswith(prefix) and name.endswith(suffix)
        ]
        self._blue_first = frozenset(self.description.get("blue_first", ()))
        self._picture_columns: dict[str, str] = self.description.get("picture_columns", {})
        self._tables: ParquetPictures | None = None
        self._videos: VideoFrames | None = None
        self._files: OrderedDict[int, int] = OrderedDict()
        self._fetched: dict[tuple[str, int], bytes] = {}

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self.pose)

    @property
    def num_episodes(self) -> int:
        """Number of episodes."""
        return len(self.episode_starts) - 1

    def raw(self, key: str) -> np.ndarray:
        """Return a step feature as stored, (N, n); e.g. "observation/state" or "action".

        Raises:
            ConfigError: If the index has no such stream.
        """
        name = f"stream/{key}"
        if name not in self._arrays:
            streams = sorted(array[7:] for array in self._arrays if array.startswith("stream/"))
            raise ConfigError("The index has no such stream", where=self.folder, found=key, expected=streams)
        return self._arrays[name]

    def episode_of(self, frames: np.ndarray) -> np.ndarray:
        """Return the episode of each frame, int64."""
        return np.searchsorted(self.episode_starts, frames, side="right") - 1

    def camera_present(self, camera: str) -> np.ndarray:
        """Return bool (E,): whether the camera shows anything in each episode."""
        return self._arrays[f"camera/{camera}/present"]

    def has_image(self, camera: str, frame: int, episode: int) -> bool:
        """Return whether a frame has a real picture of a camera."""
        if not self._arrays[f"camera/{camera}/present"][episode]:
            return False
        return bool(self._arrays[f"camera/{camera}/length"][frame])

    def encoded_image(self, camera: str, frame: int, episode: int) -> bytes:
        """Return the stored bytes of a picture, read from its shard by byte range.

        Raises:
            ConfigError: If the data set keeps its pictures in videos.
            DataError: If the shard cannot be read.
        """
        if self._in_video(camera):
            raise ConfigError("Pictures in videos are not stored one by one", where=self.folder, found=camera)
        if camera in self._picture_columns:
            row = int(self._arrays[f"camera/{camera}/offset"][frame])
            shard = int(self._arrays["episode_shard"][episode])
            return self._open_tables().read(shard, self._picture_columns[camera], row)
        if not isinstance(self._data_folder, Path):
            if (camera, frame) not in self._fetched:
                self.fetch(camera, np.array([frame]), np.array([episode]))
            return self._fetched[camera, frame]
        shard = int(self._arrays["episode_shard"][episode])
        offset = int(self._arrays[f"camera/{camera}/offset"][frame])
        length = int(self._arrays[f"camera/{camera}/length"][frame])
        data = os.pread(self._open_shard(shard), length, offset)
        if len(data) != length:
            raise DataError(
                "A shard is shorter than when it was indexed",
                where=self._data_folder / self._shards[shard],
                remedy="restore the file, or index the data set again",
            )
        return data

    def fetch(self, camera: str, frames: np.ndarray, episodes: np.ndarray) -> None:
        """Fetch pictures together, to be read next: from a bucket one after another would take long.

        Does nothing for a data set on this machine.

        Args:
            camera: Which camera.
            frames: int64 (n,).
            episodes: int64 (n,), their episodes.

        Raises:
            DataError: If the bucket cannot be read.
        """
        if isinstance(self._data_folder, Path) or camera in self._picture_columns or self._in_video(camera):
            return
        wanted = {int(frame): int(episode) for frame, episode in zip(frames, episodes, strict=True)}
        there = [frame for frame, episode in wanted.items() if self.has_image(camera, frame, episode)]
        starts = self._arrays[f"camera/{camera}/offset"][there].tolist()
        lengths = self._arrays[f"camera/{camera}/length"][there].tolist()
        names = [self._shards[self._arrays["episode_shard"][wanted[frame]]] for frame in there]
        spans = [(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        parts = self._data_folder.read_ranges(names, spans)
        self._fetched = {key: part for key, part in self._fetched.items() if key[0] != camera}
        self._fetched |= {(camera, frame): part for frame, part in zip(there, parts, strict=True)}

    def read_image(self, camera: str, frame: int, episode: int, shown_as: CameraSpec | None = None) -> np.ndarray:
        """Return a picture as stored: uint8 RGB (height, width, 3).

        Args:
            camera: Which camera.
            frame: Which frame.
            episode: Its episode.
            shown_as: If given, JPEGs are decoded at a fraction of their size where that is enough for it.

        Raises:
            DataError: If it cannot be read or decoded.
        """
        if self._in_video(camera):
            file = int(self._arrays[f"camera/{camera}/video"][episode])
            picture_HW3 = self._open_videos().read(file, int(self._arrays[f"camera/{camera}/offset"][frame]))
            return np.ascontiguousarray(picture_HW3[..., ::-1]) if self.blue_first(camera) else picture_HW3
        data = self.encoded_image(camera, frame, episode)
        return decode_image(data, Place(self, camera, frame, episode), shown_as, self.blue_first(camera))

    def blue_first(self, camera: str) -> bool:
        """Return whether a camera's pictures are stored with red and blue exchanged; `read_image` mends it."""
        return camera in self._blue_first

    def place(self, camera: str, frame: int, episode: int) -> str:
        """Say where a picture is, for messages."""
        shard = self._data_folder / self._shards[int(self._arrays["episode_shard"][episode])]
        offset = int(self._arrays[f"camera/{camera}/offset"][frame])
        step = frame - int(self.episode_starts[episode])
        if self._in_video(camera):
            video = self.description["videos"][int(self._arrays[f"camera/{camera}/video"][episode])]
            return f"{self._data_folder / video}, frame {offset}: camera {camera}, episode {episode}, step {step}"
        unit = "row" if camera in self._picture_columns else "byte"
        return f"{shard}, {unit} {offset}: camera {camera}, episode {episode}, step {step}"

    def _open_shard(self, shard: int) -> int:
        descriptor = self._files.pop(shard, None)
        if descriptor is None:
            path = self._data_folder / self._shards[shard]
            assert isinstance(path, Path)
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise DataError(
                    "A shard of an indexed data set is gone",
                    where=path,
                    found=error.strerror,
                    remedy="restore it, or index the data set where it is now",
                ) from error
            if len(self._files) >= OPEN_SHARDS:
                _, oldest = self._files.popitem(last=False)
                os.close(oldest)
        self._files[shard] = descriptor
        return descriptor

    def _in_video(self, camera: str) -> bool:
        return f"camera/{camera}/video" in self._arrays

    def _open_tables(self) -> ParquetPictures:
        if self._tables is None:
            from spear_lightning.robot_data.parquet_pictures import ParquetPictures

            self._tables = ParquetPictures(self._data_folder, self._shards)
        return self._tables

    def _open_videos(self) -> VideoFrames:
        if self._videos is None:
            from spear_lightning.robot_data.video_frames import VideoFrames

            self._videos = VideoFrames(self._data_folder, self.description["videos"], self.rate_hz)
        return self._videos

    def close(self) -> None:
        """Close the shard files that are open in this process."""
        while self._files:
            os.close(self._files.popitem()[1])
        if self._videos is not None:
            self._videos.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "data_folder": self._data_folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class Place:
    """Says where a picture is, only when somebody reads it: building the text costs more than decoding."""

    def __init__(self, index: EpisodeIndex, camera: str, frame: int, episode: int) -> None:
        self._index, self._picture = index, (camera, frame, episode)

    def __str__(self) -> str:
        return self._index.place(*self._picture)
