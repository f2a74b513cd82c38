"""Frames of video files, sampled at a rate; needs PyAV (the extra `video`)."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from spear_lightning.errors import ConfigError, DataError
from spear_lightning.labeling.sources import ImageRef, ImageSource, sorted_files

VIDEOS = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v")
READ_ON_S = 10.0
"""Frames up to this far ahead are reached by decoding on, those farther by a jump."""


class VideoFrames(ImageSource):
    """Frames of the video files of a folder and the folders in it.

    Image ids are "PATH@MILLISECONDSms", so that a frame has the same id at whatever rate it was sampled: it is the
    one that is shown at that time. Frames are turned upright if the video says how it was taken, and kept as JPEG;
    labels hold for these.

    Args:
        folder: Where the videos are.
        rate_hz: Frames that are taken per second of video.
        chunk_s: Seconds of video that one process reads in one go; processes share a video by chunks.
        quality: Of the JPEGs, 1 to 100.
        name: What labels call the source; default: the folder's name.
    """

    def __init__(
        self,
        folder: str,
        rate_hz: float = 0.5,
        chunk_s: float = 60.0,
        quality: int = 95,
        name: str | None = None,
    ) -> None:
        if rate_hz <= 0 or chunk_s <= 0:
            raise ConfigError("A rate and a chunk are positive", where="source", found=(rate_hz, chunk_s))
        self.folder = Path(folder).expanduser()
        self.name = name or self.folder.resolve().name
        self._period, self._chunk, self._quality = 1 / Fraction(str(rate_hz)), chunk_s, quality
        self._video: _OpenVideo | None = None

    def refs(self) -> Iterator[ImageRef]:
        """Yield the sampled frames, video by video; opens each to learn how long it is."""
        for path in sorted_files(self.folder, VIDEOS, "videos"):
            with _OpenVideo(self.folder / path) as video:
                length = video.length_s
            number = 0
            while (time := number * self._period) < length:
                yield ImageRef(f"{path}@{round(time * 1000):09d}ms", f"{path}#{int(time / self._chunk)}")
                number += 1

    def read(self, ref: ImageRef) -> bytes:
        """Decode a frame and return it as JPEG."""
        name, _, stamp = ref.image_id.rpartition("@")
        path = self.folder / name
        if self._video is None or self._video.path != path:
            if self._video is not None:
                self._video.close()
            self._video = _OpenVideo(path)
        image_HW3 = self._video.frame_at(int(stamp.removesuffix("ms")) / 1000)
        return simplejpeg.encode_jpeg(image_HW3, quality=self._quality)


class _OpenVideo:
    """A video that is read forward; use as a context manager, or close it."""

    def __init__(self, path: Path) -> None:
        av = require_av()
        self.path, self._error = path, av.FFmpegError
        try:
            self._container = av.open(str(path))
            self._stream = self._container.streams.video[0]
        except (av.FFmpegError, IndexError) as error:
            raise DataError("A video cannot be opened", where=path, found=error) from error
        self._stream.thread_type = "AUTO"
        start = self._stream.start_time or 0
        self._start_s = float(start * self._stream.time_base)
        self._frames: Iterator[Any] | None = None
        self._shown: Any = None
        self._next: Any = None

    def __enter__(self) -> _OpenVideo:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def length_s(self) -> float:
        """Seconds, as the file says."""
        if self._stream.duration is not None:
            return float(self._stream.duration * self._stream.time_base)
        if self._container.duration is not None:
            return float(self._container.duration / 1_000_000)
        raise DataError(
            "A video does not say how long it is",
            where=self.path,
            remedy="remux it, for example: ffmpeg -i IN -c copy OUT.mp4",
        )

    def frame_at(self, time_s: float) -> np.ndarray:
        """Return the frame that is shown at a time, uint8 RGB (H, W, 3).

        Raises:
            DataError: If it cannot be decoded.
        """
        try:
            self._go_to(time_s)
        except self._error as error:
            self._frames = None
            raise DataError(
                "A video cannot be decoded", where=f"{self.path}, {time_s:.3f} s", found=error
            ) from error
        if self._shown is None:
            raise DataError("A video has no frame at this time", where=f"{self.path}, {time_s:.3f} s")
        image_HW3 = self._shown.to_ndarray(format="rgb24")
        # Degrees counterclockwise, as numpy turns.
        return np.ascontiguousarray(np.rot90(image_HW3, round(self._shown.rotation / 90)))

    def _go_to(self, time_s: float) -> None:
        shown_s = self._time(self._shown)
        if self._frames is None or shown_s is None or not shown_s <= time_s <= shown_s + READ_ON_S:
            offset = round((time_s + self._start_s) / self._stream.time_base)
            self._container.seek(offset, stream=self._stream, backward=True)
            self._frames = self._container.decode(self._stream)
            self._shown, self._next = next(self._frames, None), None
        # Half a millisecond: image ids hold whole ones.
        while self._shown is not None:
            if self._next is None:
                self._next = next(self._frames, None)
            upcoming_s = self._time(self._next)
            if upcoming_s is None or upcoming_s > time_s + 0.0005:
                return
            self._shown, self._next = self._next, None

    def _time(self, frame: Any) -> float | None:
        return None if frame is None or frame.time is None else float(frame.time) - self._start_s

    def close(self) -> None:
        """Close the file."""
        self._container.close()


def require_av() -> Any:
    """Return PyAV.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ConfigError(
            "Reading videos needs PyAV",
            where="source",
            found=error,
            remedy="pip install 'spear-lightning[video]'",
        ) from error
    return av
