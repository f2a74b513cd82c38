"""Our loader as the benchmark runs it, and the limit it is held against. Prints one line of JSON.

`--task load` times RobotMixture -> RobotDataset -> ResumableLoader; `index` builds the index; `limit` decodes and
resizes the same pictures from memory in one process per core, with no index, no shuffling and no batch; `check`
writes the first samples, unshuffled.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from measure import time_batches

from spear_lightning.robot_data.chunks import ChunkSpec
from spear_lightning.robot_data.dataset import RobotDataset
from spear_lightning.robot_data.images import CameraSpec, decode_image, fit_image
from spear_lightning.robot_data.loader import ResumableLoader
from spear_lightning.robot_data.robot_mixture import RobotMixture

CAMERAS = {
    "external": CameraSpec(width=280, height=210, source="primary"),
    "second": CameraSpec(width=112, height=112, source="secondary"),
}
LIMIT_SAMPLES = 512


class InOrder:
    """Places are the samples of the first data set, unshuffled."""

    def __getitem__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (data set, sample) of places."""
        return np.zeros_like(places), places


def main() -> int:
    options = parse_arguments()
    start = time.perf_counter()
    mixture = RobotMixture(options.data, {"bridge": 1.0}, ChunkSpec(), holdout=0.0, index_folder=options.index)
    opened_s = time.perf_counter() - start
    result: dict[str, Any] = {"opened_s": opened_s, "samples": mixture.num_samples}
    if options.task == "load":
        result |= load(mixture, options)
    elif options.task == "limit":
        result |= limit(mixture, options)
    elif options.task == "check":
        batch = RobotDataset(mixture.training, InOrder(), CAMERAS, ChunkSpec()).__getitems__(range(options.batch))
        arrays: dict[str, Any] = {name: image.permute(0, 2, 3, 1) for name, image in batch.images.items()}
        np.savez(options.check, state=batch.state, actions=batch.actions, mask=batch.action_mask, **arrays)
    result["versions"] = {
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "torch": torch.__version__,
        "simplejpeg": simplejpeg.__version__,
    }
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


def load(mixture: RobotMixture, options: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    cached = mixture.frame_caches(CAMERAS, options.cache) if options.cache else None
    made = {"cache_s": time.perf_counter() - start}
    if cached:
        made["cache_mb"] = sum(cache.description["bytes"] for cache in cached[0].values()) / 1e6

    def open_loader() -> Iterator[int]:
        dataset = RobotDataset(
            mixture.training, mixture.stream(), CAMERAS, ChunkSpec(), options.scaled_decode, cached
        )
        loader = ResumableLoader(
            dataset,
            options.batch,
            epoch_batches=1 << 40,
            num_workers=options.workers,
            num_threads=options.threads,
        )
        return (len(batch) for batch in loader)

    return time_batches(open_loader, options.seconds, options.windows, options.warm_up) | made


def limit(mixture: RobotMixture, options: argparse.Namespace) -> dict[str, Any]:
    """Add up what one process per core reaches, all at once."""
    source = mixture.training[0]
    frames = source.frames(np.linspace(0, len(source) - 1, LIMIT_SAMPLES).astype(np.int64))
    pictures = [
        {
            name: source.index.encoded_image(camera.source or name, frame, episode)
            for name, camera in CAMERAS.items()
        }
        for frame, episode in zip(frames.tolist(), source.index.episode_of(frames).tolist(), strict=True)
    ]
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(options.cores), context.SimpleQueue()
    timing = (options.seconds, options.windows, options.warm_up)
    processes = [
        context.Process(target=decode_endlessly, args=(pictures, barrier, timing, results))
        for _ in range(options.cores)
    ]
    for process in processes:
        process.start()
    parts = [results.get() for _ in processes]
    for process in processes:
        process.join()
    windows = np.sum([part["windows"] for part in parts], axis=0).tolist()
    return {
        "windows": windows,
        "cpu_ms": float(np.mean([part["cpu_ms"] for part in parts])),
        "first_batch_s": None,
    }


def decode_endlessly(pictures: list[dict[str, bytes]], barrier: Any, timing: Any, results: Any) -> None:
    torch.set_num_threads(1)

    def samples() -> Iterator[int]:
        for sample in itertools.cycle(pictures):
            for name, camera in CAMERAS.items():
                fit_image(decode_image(sample[name], where=name), camera)
            yield 1

    barrier.wait()
    results.put(time_batches(samples, *timing))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=["index", "load", "limit", "check"], required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cache", choices=["exact", "jpeg"], help="read pictures from a frame cache")
    parser.add_argument("--scaled-decode", action="store_true", help="decode at 1/2 where that is enough")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--warm-up", type=float, default=2)
    parser.add_argument("--check", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
