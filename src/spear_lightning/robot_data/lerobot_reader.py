"""One data file of a LeRobot data set -> the arrays of its part of the index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from spear_lightning.errors import DataError
from spear_lightning.robot_data.dataset_entry import DatasetEntry
from spear_lightning.robot_data.episode_rows import SkippedEpisode, episode_rows
from spear_lightning.robot_data.images import BrokenImage, decode_image, image_format, is_blank
from spear_lightning.robot_data.lerobot_folder import LerobotEpisode, LerobotFolder, read_parquet
from spear_lightning.robot_data.parquet_pictures import encoded_pictures
from spear_lightning.robot_data.shard_reader import ShardPart, note
from spear_lightning.robot_data.storage import DataPath
from spear_lightning.robot_data.video_frames import VideoFrames

TASK = "task"
"""Name for an episode's task among the keys of instructions; others are columns."""


KINDS = ("video", "image")
"""Types of columns that hold pictures: in video files, or encoded one by one in the data files."""


@dataclass(frozen=True)
class LerobotPlan:
    """What to read from every data file; plain values, so that it travels to worker processes.

    Attributes:
        entry: Conventions of the data set.
        folder: The data set.
        rate_hz: Its rate.
        columns: Columns to read.
        cameras: Our cameras that are there -> column.
        pictures: Those of them whose pictures are in the data files, not in videos.
        videos: Its video files, below the folder.
        verify_images: Whether every frame is decoded.
    """

    entry: DatasetEntry
    folder: DataPath
    rate_hz: float
    columns: tuple[str, ...]
    cameras: dict[str, str]
    pictures: tuple[str, ...]
    videos: list[str]
    verify_images: bool = False

    def __getstate__(self) -> dict[str, Any]:
        # Workers get the names with the episodes: all of them would travel with every file that is read.
        return {**self.__dict__, "videos": []}

    def describe(self) -> dict[str, Any]:
        """Return what the index must know to find pictures again."""
        blue_first = [name for name in self.cameras if self.entry.cameras[name].bgr]
        columns = {name: self.cameras[name] for name in self.pictures}
        return {
            "format": "lerobot",
            "videos": self.videos,
            "picture_columns": columns,
            "blue_first": blue_first,
        }

    def read(self, path: DataPath, episodes: tuple[LerobotEpisode, ...]) -> ShardPart:
        """Read a data file once; an episode that cannot be used is skipped and counted.

        Raises:
            DataError: If the file is missing or damaged, or lacks an episode.
        """
        try:
            table = read_parquet(path, self.columns)
            number_N = table.column("episode_index").to_numpy()
        except (OSError, pa.ArrowException, KeyError) as error:
            raise DataError(
                "A data file of a LeRobot data set cannot be read",
                where=path,
                found=error,
                expected=f"Parquet with the columns {list(self.columns)}",
                remedy="download the data set again",
            ) from error
        part = ShardPart({}, [])
        rows: dict[str, list[np.ndarray]] = {}
        files = {number: file for episode in episodes for number, file, _ in episode.videos.values()}
        videos = VideoFrames(self.folder, files, self.rate_hz) if set(self.cameras) - set(self.pictures) else None
        for episode in episodes:
            where = f"{path.name}, episode {episode.number}"
            chosen_N = np.flatnonzero(number_N == episode.number)
            if len(chosen_N) != episode.length:
                raise DataError(
                    "A data file does not hold an episode that the table of episodes promises",
                    where=where,
                    found=f"{len(chosen_N)} frames",
                    expected=episode.length,
                    remedy="download this file again",
                )
            first = int(chosen_N[0]) if len(chosen_N) else 0
            steps = table.slice(first, len(chosen_N))
            try:
                found, instructions = self._episode(steps, first, episode, videos, part, where)
            except SkippedEpisode as reason:
                note(part, f"episodes skipped: {reason}", where)
                continue
            part.instructions.extend(instructions)
            for name, values in found.items():
                rows.setdefault(name, []).append(values)
        if videos is not None:
            videos.close()
        part.arrays = {name: np.concatenate(parts) for name, parts in rows.items()}
        return part

    def _episode(
        self,
        steps: pa.Table,
        first: int,
        episode: LerobotEpisode,
        videos: VideoFrames | None,
        part: ShardPart,
        where: str,
    ) -> tuple[dict[str, np.ndarray], list[str]]:
        """Return the rows of an episode's runs, and the instruction of each run; `first` is its first row."""
        entry = self.entry
        if entry.episodes is not None and not _chosen(steps.column(entry.episodes.key), entry.episodes.contains):
            raise SkippedEpisode(f"left out on purpose, by {entry.episodes.key}")
        streams = {key: _numbers(steps.column(key)) for key in entry.required_keys()}
        made = episode_rows(entry, streams)
        for problem, count in made.problems.items():
            note(part, problem, where, count)
        rows, runs = made.rows, len(made.lengths_R)
        for name, column in self.cameras.items():
            optional = entry.cameras[name].optional
            if name in self.pictures:
                kept_N = np.flatnonzero(made.kept_T)
                pictures = encoded_pictures(steps.column(column))
                offset_N = first + kept_N
                good_N, present = self._look_at([pictures[step] for step in kept_N], optional)
            else:
                assert videos is not None
                file, _, start_s = episode.videos[column]
                time_N = _numbers(steps.column("timestamp"))[made.kept_T, 0].astype(np.float64)
                offset_N = np.round((start_s + time_N) * self.rate_hz).astype(np.int64)
                good_N, present = self._look(videos, file, offset_N, optional)
                rows[f"camera/{name}/video"] = np.full(runs, file, np.int32)
            if not good_N.all():
                note(part, f"frames skipped: broken image of camera {name}", where, int((~good_N).sum()))
            if not optional:
                rows["usable"] &= good_N
            rows[f"camera/{name}/offset"] = offset_N
            rows[f"camera/{name}/length"] = good_N.astype(np.uint32)
            rows[f"camera/{name}/present"] = np.full(runs, present)
        rows["length"] = made.lengths_R
        instruction = self._instruction(steps, episode)
        if entry.instruction and not instruction:
            note(part, "episodes without an instruction (kept in the index)", where)
        return rows, [instruction] * runs

    def _look_at(self, shown: list[bytes], optional: bool) -> tuple[np.ndarray, bool]:
        """Return which encoded pictures are whole, and whether the first shows anything."""
        good_N = np.array([image_format(data) != "broken" for data in shown], bool)
        looked_at = np.flatnonzero(good_N)[: None if self.verify_images else 1]
        present = True
        for place in looked_at.tolist():
            try:
                pixels_HW3 = decode_image(shown[place], where="")
            except BrokenImage:
                good_N[place] = False
                continue
            if optional and place == looked_at[0]:
                present = not is_blank(pixels_HW3)
        return good_N, present

    def _look(
        self, videos: VideoFrames, file: int, frame_N: np.ndarray, optional: bool
    ) -> tuple[np.ndarray, bool]:
        """Return which frames are whole, and whether the first shows anything.

        Without verification only the last frame of a camera that must be there is decoded, and the first of one
        that may hold dummies.
        """
        looked_at = frame_N if self.verify_images else frame_N[[0 if optional else -1]]
        good_N, present = np.ones(len(frame_N), bool), True
        for frame in looked_at:
            try:
                pixels_HW3 = videos.read(file, int(frame))
            except BrokenImage:
                good_N[frame_N == frame] = False
                continue
            if optional and frame == frame_N[0]:
                present = not is_blank(pixels_HW3)
        return good_N, present

    def _instruction(self, steps: pa.Table, episode: LerobotEpisode) -> str:
        for key in self.entry.instruction:
            text = episode.task if key == TASK else ""
            if key in steps.column_names:
                text = str(steps.column(key)[0].as_py() or "").strip()
            if text:
                return text
        return ""


def plan_lerobot(folder: LerobotFolder, entry: DatasetEntry, verify_images: bool = False) -> LerobotPlan:
    """Decide what to read, and check that the data set has what its entry promises.

    Raises:
        DataError: If a column is missing, too narrow or of another kind, or the rate is another.
    """
    there = folder.columns
    wrong = [
        f"{key}: {there[key][1]} numbers instead of at least {width}" if key in there else f"{key}: missing"
        for key, width in entry.required_keys().items()
        if key not in there or there[key][1] < width
    ]
    for camera in entry.cameras.values():
        kind = there[camera.key][0] if camera.key in there else None
        if kind not in KINDS and not (camera.optional and kind is None):
            wrong.append(f"{camera.key}: " + ("missing" if kind is None else f"{kind}, no pictures"))
    if entry.instruction and not any(key == TASK or key in there for key in entry.instruction):
        wrong.append(f"{' or '.join(entry.instruction)}: missing")
    if entry.episodes is not None and entry.episodes.key not in there:
        wrong.append(f"{entry.episodes.key}: missing (says which episodes are used)")
    if not np.isclose(folder.rate_hz, entry.rate_hz):
        wrong.append(f"fps {folder.rate_hz:g} instead of {entry.rate_hz:g}")
    if wrong:
        raise DataError(
            f"The data set is not what the registry entry {entry.id!r} promises",
            where=folder.path / "meta" / "info.json",
            found="; ".join(wrong),
            expected=f"columns like those there: {sorted(there)}",
            remedy="check that it is the right copy of the data set, or describe it in a file for data.registry",
        )
    extra = {"episode_index", "timestamp", *(key for key in entry.instruction if key in there)}
    extra |= {entry.episodes.key} if entry.episodes is not None else set()
    cameras = {name: camera.key for name, camera in entry.cameras.items() if camera.key in there}
    pictures = tuple(name for name, key in cameras.items() if there[key][0] == "image")
    columns = tuple(sorted({*entry.required_keys(), *extra, *(cameras[name] for name in pictures)}))
    return LerobotPlan(
        entry, folder.path, folder.rate_hz, columns, cameras, pictures, folder.videos, verify_images
    )


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column as float32 (T, n)."""
    values = column.combine_chunks()
    count = len(values)
    while pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type):
        values = values.flatten()
    flat = values.to_numpy(zero_copy_only=False)
    if count == 0 or len(flat) % count:
        raise SkippedEpisode("values of different width")
    return flat.astype(np.float32).reshape(count, -1)


def _chosen(column: pa.ChunkedArray, contains: str | None) -> bool:
    value = column[0].as_py()
    value = value[0] if isinstance(value, list) else value
    return bool(value) if contains is None else contains in str(value)
