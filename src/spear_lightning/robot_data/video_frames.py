"""Single frames of video files, decoded with PyAV: any frame by its number, neighbours without seeking again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from spear_lightning.errors import ConfigError, DataError
from spear_lightning.robot_data.images import BrokenImage
from spear_lightning.robot_data.storage import DataPath

OPEN_VIDEOS = 16
"""Files kept open per process: each holds a decoder."""

NEAR = 12
"""A frame at most this far ahead of the last one is reached by decoding on; others by seeking to a key frame."""


@dataclass
class _OpenVideo:
    container: Any
    stream: Any
    frames: Iterator[Any]
    last: int | None = None


class VideoFrames:
    """Frames of some video files of a constant rate; used by one thread.

    Args:
        folder: Where the files are.
        files: Their names, below the folder, by number.
        rate_hz: Frames per second: frame k is shown at k / rate_hz.

    Raises:
        ConfigError: If PyAV is not installed.
    """

    def __init__(self, folder: DataPath, files: Sequence[str] | Mapping[int, str], rate_hz: float) -> None:
        self._av = _pyav()
        self._folder, self._files, self._rate_hz = folder, files, rate_hz
        self._opened: OrderedDict[int, _OpenVideo] = OrderedDict()

    def read(self, file: int, frame: int) -> np.ndarray:
        """Return a frame, uint8 RGB (height, width, 3).

        Args:
            file: Which of the files.
            frame: Number of the frame in the file, from 0.

        Raises:
            DataError: If the file cannot be opened.
            BrokenImage: If the frame is not in it or cannot be decoded.
        """
        video = self._open(file)
        near = video.last is not None and 0 < frame - video.last <= NEAR
        # A key frame may be marked where none is: then decoding starts at the beginning of the file.
        starts = [None, frame, 0] if near else [frame, 0]
        found: object = "no such frame"
        for start in starts:
            try:
                if start is not None:
                    video.frames = self._from(video, start)
                picture = self._reach(video, frame)
            except (self._av.FFmpegError, EOFError) as error:
                found = error
                continue
            if picture is not None:
                return picture
        video.last = None
        raise BrokenImage(
            "A frame of a video cannot be decoded",
            where=f"{self._folder / self._files[file]}, frame {frame} at {self._rate_hz:g} Hz",
            found=found,
            remedy="download the file again",
        )

    def _from(self, video: _OpenVideo, frame: int) -> Iterator[Any]:
        seconds = max(frame - 0.5, 0) / self._rate_hz
        video.container.seek(int(seconds / video.stream.time_base), stream=video.stream, backward=True)
        return iter(video.container.decode(video.stream))

    def _reach(self, video: _OpenVideo, frame: int) -> np.ndarray | None:
        """Decode on until a frame; None if it does not come."""
        for decoded in video.frames:
            number = round(decoded.time * self._rate_hz)
            if number >= frame:
                video.last = number
                pixels: np.ndarray = decoded.to_ndarray(format="rgb24")
                return pixels if number == frame else None
        return None

    def _open(self, file: int) -> _OpenVideo:
        video = self._opened.pop(file, None)
        if video is None:
            path = self._folder / self._files[file]
            try:
                container = self._av.open(str(path) if isinstance(path, Path) else path.open())
                stream = container.streams.video[0]
            except (self._av.FFmpegError, OSError, IndexError) as error:
                raise DataError(
                    "A video of a data set cannot be opened",
                    where=path,
                    found=error,
                    remedy="download the file again, or index the data set where it is now",
                ) from error
            # Loaders already run as many threads as there are cores.
            stream.codec_context.thread_count = 1
            video = _OpenVideo(container, stream, iter(()))
            if len(self._opened) >= OPEN_VIDEOS:
                self._opened.popitem(last=False)[1].container.close()
        self._opened[file] = video
        return video

    def close(self) -> None:
        """Close all files."""
        while self._opened:
            self._opened.popitem()[1].container.close()


def _pyav() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ConfigError(
            "Reading videos needs PyAV", where="data.mixture", remedy="pip install 'spear-lightning[video]'"
        ) from error
    module: ModuleType = av
    return module
