"""Small LeRobot data sets, written by hand as LeRobot's documentation lays them out."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CAMERAS = {"observation.images.image_0": (48, 64), "observation.images.image_1": (32, 32)}
"""Camera column -> height and width."""


def picture(camera: str, episode: int, step: int) -> np.ndarray:
    """A picture whose colour says which it is."""
    height, width = CAMERAS[camera]
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 20 + 40 * episode, 20 + 10 * step
    pixels[..., 2] = 60 if camera.endswith("0") else 180
    pixels[: height // 2, : width // 2] //= 2
    return pixels


def write_video(path: Path, pictures: Sequence[np.ndarray], fps: int, key_every: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12", "g": str(key_every)})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, fps)
        for shown in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        container.mux(stream.encode())


def info(version: str, fps: int, episodes: int, frames: int) -> dict[str, Any]:
    one = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    paths = {
        "v3.0": (f"data/{one}.parquet", f"videos/{{video_key}}/{one}.mp4"),
        "v2.1": (
            "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
            "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        ),
    }
    features = {
        key: {"dtype": "video", "shape": [*size, 3], "names": ["height", "width", "channels"]}
        for key, size in CAMERAS.items()
    }
    features |= {name: {"dtype": "float32", "shape": [width]} for name, width in widths().items()}
    features |= {
        name: {"dtype": "int64", "shape": [1]} for name in ("frame_index", "episode_index", "index", "task_index")
    }
    features["timestamp"] = {"dtype": "float32", "shape": [1]}
    return {
        "codebase_version": version,
        "robot_type": "widowx",
        "total_episodes": episodes,
        "total_frames": frames,
        "chunks_size": 2 if version == "v2.1" else 1000,
        "fps": fps,
        "splits": {"train": f"0:{episodes - 1}", "val": f"{episodes - 1}:{episodes}"},
        "data_path": paths[version][0],
        "video_path": paths[version][1],
        "features": features,
    }


def widths() -> dict[str, int]:
    return {"observation.state": 8, "action": 7}


def frame_table(episode: int, first: int, state: np.ndarray, action: np.ndarray, fps: int) -> pa.Table:
    steps = len(state)
    return pa.table(
        {
            "observation.state": pa.array([row.tolist() for row in state], pa.list_(pa.float32(), 8)),
            "action": pa.array([row.tolist() for row in action], pa.list_(pa.float32())),
            "timestamp": pa.array(np.arange(steps, dtype=np.float32) / np.float32(fps)),
            "frame_index": pa.array(np.arange(steps)),
            "episode_index": pa.array(np.full(steps, episode)),
            "index": pa.array(first + np.arange(steps)),
            "task_index": pa.array(np.full(steps, episode % 2)),
        }
    )


Motions = Sequence[tuple[np.ndarray, np.ndarray]]
"""State and action of every episode."""


def write_v3(folder: Path, motions: Motions, tasks: Sequence[str], fps: int, key_every: int) -> None:
    """Write v3.0: episodes 0 and 1 in the first data file, the rest in another; videos are divided elsewhere."""
    starts = np.concatenate([[0], np.cumsum([len(state) for state, _ in motions])])
    rows = []
    for number, (state, _) in enumerate(motions):
        row: dict[str, Any] = {"episode_index": number, "length": len(state), "tasks": [tasks[number]]}
        row |= {"data/chunk_index": 0, "data/file_index": int(number > 1)}
        row |= {"dataset_from_index": int(starts[number]), "dataset_to_index": int(starts[number + 1])}
        row |= {"stats/action/count": [len(state)]}
        for key in CAMERAS:
            file = int(number > 0)
            begin = float(starts[number] - (starts[1] if file else 0)) / fps
            row |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": file}
            row |= {f"videos/{key}/from_timestamp": begin, f"videos/{key}/to_timestamp": begin + len(state) / fps}
        rows.append(row)
    (folder / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    (folder / "data" / "chunk-000").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info("v3.0", fps, len(motions), int(starts[-1]))))
    # Not in order: readers must sort.
    pq.write_table(
        pa.Table.from_pylist(rows[::-1]), folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    )
    for file, members in enumerate(([0, 1], range(2, len(motions)))):
        tables = [frame_table(number, int(starts[number]), *motions[number], fps) for number in members]
        pq.write_table(pa.concat_tables(tables), folder / "data" / "chunk-000" / f"file-{file:03d}.parquet")
    for key in CAMERAS:
        for file, members in enumerate(([0], range(1, len(motions)))):
            shown = [picture(key, number, step) for number in members for step in range(len(motions[number][0]))]
            write_video(folder / "videos" / key / "chunk-000" / f"file-{file:03d}.mp4", shown, fps, key_every)


def with_pictures(folder: Path, episodes: int) -> None:
    """Move the pictures of a v2.1 data set from videos into the data files, as columns of type `image`."""
    path = folder / "meta" / "info.json"
    about = json.loads(path.read_text())
    for key in CAMERAS:
        about["features"][key]["dtype"] = "image"
    path.write_text(json.dumps(about | {"video_path": None}))
    for number in range(episodes):
        file = folder / "data" / f"chunk-{number // 2:03d}" / f"episode_{number:06d}.parquet"
        table = pq.read_table(file)
        for key in CAMERAS:
            shown = []
            for step in range(len(table)):
                buffer = io.BytesIO()
                Image.fromarray(picture(key, number, step)).save(buffer, "png")
                shown.append({"bytes": buffer.getvalue(), "path": f"frame_{step:06d}.png"})
            table = table.append_column(key, pa.array(shown))
        # Row groups end inside of episodes.
        pq.write_table(table, file, row_group_size=5)
    shutil.rmtree(folder / "videos")


def write_v21(folder: Path, motions: Motions, tasks: Sequence[str], fps: int, key_every: int) -> None:
    """Write v2.1: one data file and one video of each camera per episode; two episodes in a chunk."""
    (folder / "meta").mkdir(parents=True)
    starts = np.concatenate([[0], np.cumsum([len(state) for state, _ in motions])])
    (folder / "meta" / "info.json").write_text(json.dumps(info("v2.1", fps, len(motions), int(starts[-1]))))
    lines = []
    for number, (state, action) in enumerate(motions):
        lines.append(json.dumps({"episode_index": number, "tasks": [tasks[number]], "length": len(state)}))
        chunk = f"chunk-{number // 2:03d}"
        (folder / "data" / chunk).mkdir(parents=True, exist_ok=True)
        table = frame_table(number, int(starts[number]), state, action, fps)
        pq.write_table(table, folder / "data" / chunk / f"episode_{number:06d}.parquet")
        for key in CAMERAS:
            shown = [picture(key, number, step) for step in range(len(state))]
            write_video(folder / "videos" / chunk / key / f"episode_{number:06d}.mp4", shown, fps, key_every)
    (folder / "meta" / "episodes.jsonl").write_text("\n".join(lines) + "\n")
