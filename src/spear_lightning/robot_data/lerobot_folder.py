"""What a LeRobot data set says about itself (formats v2.0, v2.1 and v3.0): columns, episodes, files and videos.

Source: LeRobot's documentation of its data set format. Read with pyarrow; `lerobot` itself is not needed.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spear_lightning.errors import DataError, SpearError
from spear_lightning.robot_data.storage import DataPath, data_path

if TYPE_CHECKING:
    import pyarrow as pa

INFO = "info.json"


@dataclass(frozen=True)
class LerobotEpisode:
    """An episode in the table of episodes.

    Attributes:
        number: Its `episode_index`.
        length: Frames.
        task: Its first instruction, "" if there is none.
        videos: Camera column -> (place in `LerobotFolder.videos`, the file there, second at which it begins).
    """

    number: int
    length: int
    task: str
    videos: dict[str, tuple[int, str, float]]


@dataclass(frozen=True)
class LerobotFolder:
    """A LeRobot data set on disk.

    Attributes:
        path: Folder with meta/, data/ and videos/.
        name: The folder's name.
        version: Version of the format, e.g. "v3.0".
        rate_hz: Frames per second.
        columns: Column -> (type, numbers in one value).
        videos: Video files, below the folder.
        files: Split -> (data file, its episodes).
    """

    path: DataPath
    name: str
    version: str
    rate_hz: float
    columns: dict[str, tuple[str, int]]
    videos: list[str]
    files: dict[str, list[tuple[DataPath, tuple[LerobotEpisode, ...]]]]

    def require_split(self, split: str) -> list[tuple[DataPath, tuple[LerobotEpisode, ...]]]:
        """Return the data files of a split, and the episodes of it in each.

        Raises:
            DataError: If there is no such split.
        """
        if split not in self.files:
            raise DataError(
                "The data set has no such split",
                where=self.path / "meta" / INFO,
                found=split,
                expected=f"one of {sorted(self.files)}",
            )
        return self.files[split]


def is_lerobot(folder: str | DataPath) -> bool:
    """Return whether a folder holds a LeRobot data set."""
    return (data_path(folder) / "meta" / INFO).is_file()


def open_lerobot(folder: str | DataPath) -> LerobotFolder:
    """Read the description of a LeRobot data set.

    Raises:
        DataError: If it is none, of an unknown version, or a file of it cannot be understood.
    """
    folder = data_path(folder)
    path = folder / "meta" / INFO
    try:
        info = json.loads(path.read_text())
        version = str(info["codebase_version"])
        if version.split(".")[0] not in ("v2", "v3"):
            raise DataError(
                "This version of LeRobot's format cannot be read",
                where=path,
                found=version,
                expected="v2.0, v2.1 or v3.0",
                remedy="convert it with LeRobot's own tools",
            )
        columns = {
            name: (str(feature["dtype"]), _count(feature.get("shape") or [1]))
            for name, feature in info["features"].items()
        }
        rows = _episodes_v3(folder) if version.startswith("v3") else _episodes_v2(folder)
        videos: dict[str, int] = {}
        placed = [_place(info, row, columns, videos) for row in rows]
        splits = {name: _range(text) for name, text in (info.get("splits") or {"train": "0:"}).items()}
        files = {name: _in_range(folder, placed, episodes) for name, episodes in splits.items()}
        return LerobotFolder(folder, folder.name, version, float(info["fps"]), columns, list(videos), files)
    except SpearError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            "The description of a LeRobot data set cannot be read",
            where=folder,
            found=f"{type(error).__name__}: {error}",
            expected="meta/info.json and the table of episodes, as LeRobot v2.0 to v3.0 writes them",
        ) from error


def read_parquet(path: DataPath, columns: Iterable[str] | None = None) -> pa.Table:
    """Read columns of a Parquet file on this machine or in a bucket."""
    import pyarrow.parquet as pq

    wanted = None if columns is None else list(columns)
    if isinstance(path, Path):
        return pq.ParquetFile(path, memory_map=True).read(wanted)
    with path.open() as file:
        return pq.ParquetFile(file).read(wanted)


def _episodes_v3(folder: DataPath) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for chunk in _inside(folder / "meta" / "episodes"):
        for file in _inside(chunk):
            if file.name.endswith(".parquet"):
                rows += _without_statistics(file)
    return sorted(rows, key=lambda row: int(row["episode_index"]))


def _inside(folder: DataPath) -> list[DataPath]:
    found: list[DataPath] = [*folder.iterdir()]
    return sorted(found, key=str)


def _without_statistics(file: DataPath) -> list[dict[str, Any]]:
    table = read_parquet(file)
    found: list[dict[str, Any]] = table.select(
        [n for n in table.column_names if not n.startswith("stats/")]
    ).to_pylist()
    return found


def _episodes_v2(folder: DataPath) -> list[dict[str, Any]]:
    lines = (folder / "meta" / "episodes.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def _place(
    info: dict[str, Any], row: dict[str, Any], columns: dict[str, tuple[str, int]], videos: dict[str, int]
) -> tuple[str, LerobotEpisode]:
    """Return the data file of an episode, and the episode; adds its video files."""
    number = int(row["episode_index"])
    # v2 names files by episode, v3 by chunk and file.
    names = {"episode_index": number, "episode_chunk": number // int(info.get("chunks_size", 1000))}
    packed = "data/file_index" in row
    if packed:
        names |= {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
    found = {}
    for key, (dtype, _) in columns.items():
        if dtype != "video":
            continue
        start_s = 0.0
        if packed:
            names |= {
                "chunk_index": row[f"videos/{key}/chunk_index"],
                "file_index": row[f"videos/{key}/file_index"],
            }
            start_s = float(row[f"videos/{key}/from_timestamp"])
        file = info["video_path"].format(video_key=key, **names)
        found[key] = (videos.setdefault(file, len(videos)), file, start_s)
    if packed:
        names |= {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
    task = next((text.strip() for text in row.get("tasks") or [] if text.strip()), "")
    return info["data_path"].format(**names), LerobotEpisode(number, int(row["length"]), task, found)


def _in_range(
    folder: DataPath, placed: list[tuple[str, LerobotEpisode]], episodes: range
) -> list[tuple[DataPath, tuple[LerobotEpisode, ...]]]:
    files: dict[str, list[LerobotEpisode]] = defaultdict(list)
    for file, episode in placed:
        if episode.number in episodes:
            files[file].append(episode)
    return [(_below(folder, file), tuple(each)) for file, each in files.items()]


def _below(folder: DataPath, file: str) -> DataPath:
    for part in file.split("/"):
        folder = folder / part
    return folder


def _range(text: str) -> range:
    """Return the episodes of a split such as "0:100"; without an end it goes on to the last one."""
    start, _, stop = text.partition(":")
    return range(int(start or 0), int(stop or sys.maxsize))


def _count(shape: Iterable[int]) -> int:
    count = 1
    for size in shape:
        count *= int(size)
    return count
