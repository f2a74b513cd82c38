"""Episodes to be loaded: RLDS in Bridge V2's layout, two cameras of 256x256 JPEG with the detail of photographs.

The gripper wanders smoothly; each camera pans over a picture. Written with the package's own RLDS writer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from spear_lightning.robot_data.demo_episodes import bridge_layout
from spear_lightning.robot_data.rlds_writer import write_description, write_shard

SIDE = 256
QUALITY, SUBSAMPLING = 95, "420"
"""What tf.io.encode_jpeg, and so tensorflow-datasets, writes; Bridge V2 itself is 4:2:0."""

SHARD_EPISODES = 20

Pictures = list[list[bytes]]
"""Of one camera and each episode: an encoded picture per step."""


def scenes(photographs: Path) -> tuple[list[Image.Image], str]:
    """Return pictures to pan over, and what they are: photographs if there are any, else smooth textures."""
    files = sorted(path for path in photographs.glob("*") if path.suffix in (".jpg", ".png"))
    if files:
        return [Image.open(path).convert("RGB") for path in files], f"{len(files)} photographs"
    return [_texture(seed) for seed in range(8)], "8 synthetic textures"


def _texture(seed: int, side: int = 640) -> Image.Image:
    """Return noise whose amplitude is proportional to its wavelength, as in photographs."""
    rng = np.random.default_rng(seed)
    total = np.zeros((side, side, 3), np.float32)
    for cells in (4, 8, 16, 32, 64, 128, 256):
        coarse = rng.integers(0, 256, (cells, cells, 3), np.uint8)
        total += np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)) / cells
    low, high = np.percentile(total, [1, 99])
    return Image.fromarray((np.clip((total - low) / (high - low), 0, 1) * 255).astype(np.uint8))


def film(scene: Sequence[Image.Image], episodes: int, steps: int, seed: int) -> Pictures:
    """Return the pictures of one camera: a window that wanders over a scene, in light that flickers."""
    rng = np.random.default_rng(seed)
    return [_pan(scene[int(rng.integers(len(scene)))], steps, rng) for _ in range(episodes)]


def _pan(scene: Image.Image, steps: int, rng: np.random.Generator) -> list[bytes]:
    window = min(scene.width, scene.height) * rng.uniform(0.6, 0.95)
    room = np.array([scene.width, scene.height]) - window
    corner_T2 = np.linspace(rng.uniform(0, room), rng.uniform(0, room), steps)
    encoded = []
    for left, top in corner_T2:
        box = (left, top, left + window, top + window)
        view = scene.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
        light = rng.uniform(0.9, 1.1)
        pixels = np.clip(np.asarray(view, np.float32) * light, 0, 255).astype(np.uint8)
        encoded.append(simplejpeg.encode_jpeg(pixels, QUALITY, colorspace="RGB", colorsubsampling=SUBSAMPLING))
    return encoded


def write_episodes(root: Path, external: Pictures, second: Pictures, copies: int) -> None:
    """Write `root/bridge_dataset/1.0.0`; with copies, the pictures recur, the motions do not."""
    layout = bridge_layout(SIDE, SIDE)
    folder = root / layout.name / layout.version
    folder.mkdir(parents=True)
    episodes = len(external) * copies
    shards = [range(start, min(start + SHARD_EPISODES, episodes)) for start in range(0, episodes, SHARD_EPISODES)]
    lengths = []
    for number, shard in enumerate(shards):
        payloads = (
            layout.serialize(_episode(external[e % len(external)], second[e % len(second)], e)) for e in shard
        )
        lengths.append(write_shard(folder, layout, "train", number, len(shards), payloads))
    write_description(folder, layout, {"train": lengths}, "Made-up episodes for the loading benchmark.")


def _episode(
    external: list[bytes], second: list[bytes], number: int
) -> dict[str, np.ndarray | list[bytes] | list[str]]:
    steps = len(external)
    rng = np.random.default_rng([1, number])
    change_T6 = rng.normal(0, [0.01, 0.01, 0.01, 0.05, 0.05, 0.05], (steps, 6))
    motion_T6 = np.cumsum(change_T6, axis=0) + np.array([0.3, 0, 0.1, 0, 0, 0])
    # Commands between open and closed occur in Bridge, and take the next decided value.
    command_T = rng.choice([0.0, 0.3, 0.7, 1.0], steps, p=[0.4, 0.1, 0.1, 0.4])
    openness_T = rng.uniform(0.1, 1.05, steps)
    place_T = np.arange(steps)
    return {
        "observation/image_0": external,
        "observation/image_1": second,
        "observation/state": np.column_stack([motion_T6, openness_T]).astype(np.float32),
        "action": np.column_stack([np.diff(motion_T6, axis=0, append=motion_T6[-1:]), command_T]),
        "language_instruction": [f"reach for block {number % 50}"] * steps,
        "discount": np.ones(steps),
        "reward": (place_T == steps - 1).astype(np.float32),
        "is_first": place_T == 0,
        "is_last": place_T == steps - 1,
        "is_terminal": place_T == steps - 1,
        "episode_metadata/episode_id": np.array([number]),
    }
