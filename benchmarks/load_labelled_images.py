"""Samples/s of one core that makes questions about labelled images, against decoding and resizing the same JPEGs.

Makes a data set of the tabletop world, repeats its shards until it has the size of a real one, and measures the
training data of `experiments/tabletop/vlm.yaml` and the limit in turns: once in all, once by stage.

    .venv/bin/python benchmarks/load_labelled_images.py
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from contender import markdown
from measure import time_batches

from spear_lightning.labeling import store
from spear_lightning.models import PromptTokenizer
from spear_lightning.robot_data.images import CameraSpec, decode_image, fit_image
from spear_lightning.vqa import augment, dataset, location_tokens
from spear_lightning.vqa.coordinate_tokens import CoordinateTokens, token_names
from spear_lightning.vqa.labelled_images import LabelMixture
from spear_lightning.vqa.loader import ResumableVqaLoader
from spear_lightning.vqa.mixture import TaskMixture
from spear_lightning.vqa.question_data import training_dataset
from spear_lightning.vqa.text_layout import TextLayout

EXPERIMENT = Path(__file__).resolve().parents[1] / "experiments" / "tabletop" / "vlm.yaml"

STAGES: dict[str, tuple[tuple[Any, str], ...]] = {
    "reading labels": ((store.LabelStore, "_read"),),
    "decoding": ((store, "decode_image"),),
    "resizing": ((augment, "fit_image"),),
    "colour": ((augment, "recolour"),),
    "views of labels": ((dataset, "make_view"),),
    "questions and answers": ((TaskMixture, "ask"),),
    "token ids": ((TextLayout, "shortened"), (TextLayout, "lay_out")),
    "images of a batch": ((torch, "stack"),),
}
"""Stage -> functions that are its work, but for what other stages do inside them."""


class Stopwatch:
    """Adds up the time of each stage, without the stages inside it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside = [0.0]

    def watched(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time added to a stage."""

        def timed(*args: Any, **options: Any) -> Any:
            self._inside.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                passed = time.perf_counter() - start
                self.seconds[stage] += passed - self._inside.pop()
                self._inside[-1] += passed

        return timed


def make_data(folder: Path, options: argparse.Namespace) -> Path:
    """Render labelled images, and name their shards again and again."""
    size = f"primary={options.width}x{options.height}"
    command = [sys.executable, "-m", "spear_lightning.cli", "data", "tabletop", "--cameras", size]
    command += ["--labelled_images", str(options.images), "--out", str(folder), "--processes", str(options.cores)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    labels = folder / "labels"
    for shard, copy in itertools.product(sorted(labels.glob("*.parquet")), range(1, options.copies)):
        # The images stay: rows name the file that holds theirs.
        shutil.copyfile(shard, labels / f"copy-{copy:03d}-{shard.name}")
    return labels


def open_training(labels: Path) -> dataset.VqaDataset:
    """Return the training data of the experiment."""
    experiment = yaml.safe_load(EXPERIMENT.read_text())
    data, model = experiment["data"]["init_args"], experiment["model"]["init_args"]["answerer"]["init_args"]
    prompt = PromptTokenizer(**model["prompt"]["init_args"])
    bins = model["vlm"]["init_args"]["language"]["new_tokens"]
    prompt.add_tokens([*location_tokens.token_names(), *token_names(bins)])
    mixture = LabelMixture({str(labels): 1.0}, holdout=data["holdout"])
    return training_dataset(
        mixture,
        TaskMixture(data["tasks"], data["max_pairs"]),
        CoordinateTokens.fit(mixture.labels(1000), data["scale"], bins),
        TextLayout(prompt.vocabulary, bins, data["max_length"], data["one_length"]),
        CameraSpec(**data["cameras"]["primary"]),
        augment.ViewRecipe(**data["views"]),
        data["batch_size"],
        data["window_batches"],
    )


def open_limit(labels: Path, camera: CameraSpec, batch: int) -> Iterator[int]:
    """Decode and resize pictures from memory, without end."""
    opened = store.LabelStore(labels)
    chosen = np.linspace(0, len(opened) - 1, 512).astype(int).tolist()
    pictures = [opened.encoded_image(index) for index in chosen]
    for number in itertools.count():
        for place in range(number * batch, (number + 1) * batch):
            fit_image(decode_image(pictures[place % len(pictures)], "the limit"), camera)
        yield batch


def by_stage(training: dataset.VqaDataset, batches: range, batch: int) -> dict[str, float]:
    """Return the milliseconds a sample of each stage."""
    watch = Stopwatch()
    functions = [(stage, *place) for stage, places in STAGES.items() for place in places]
    patches = [
        mock.patch.object(owner, name, watch.watched(stage, getattr(owner, name)))
        for stage, owner, name in functions
    ]
    read = watch.watched("the rest", training.__getitems__)
    for patch in patches:
        patch.start()
    for number in batches:
        read(range(number * batch, (number + 1) * batch))
    for patch in patches:
        patch.stop()
    return {stage: 1000 * watch.seconds[stage] / (len(batches) * batch) for stage in (*STAGES, "the rest")}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=600, help="images that are rendered")
    parser.add_argument("--copies", type=int, default=32, help="times their labels are in the data set")
    parser.add_argument("--width", type=int, default=168)
    parser.add_argument("--height", type=int, default=126)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=5, help="measured time of either in every round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2, help="processes that render")
    parser.add_argument("--workers", type=int, default=0, help="also measure the loader with so many workers")
    parser.add_argument("--labels", type=Path, help="a folder of labels that is there, instead of making one")
    parser.add_argument("--output", type=Path, help="a Markdown file to write")
    return parser.parse_args()


def main() -> int:
    """Run the benchmark."""
    options = parse_arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        labels = options.labels or make_data(Path(folder), options)
        lines = measure(labels, options)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)
    return 0


def measure(labels: Path, options: argparse.Namespace) -> list[str]:
    """Measure in turns; return the lines of the result."""
    start = time.perf_counter()
    training = open_training(labels)
    opened_s = time.perf_counter() - start
    numbers = itertools.count()

    def ours() -> Iterator[int]:
        for number in numbers:
            yield len(training.__getitems__(range(number * options.batch, (number + 1) * options.batch)))

    def limit() -> Iterator[int]:
        return open_limit(labels, CameraSpec(options.width, options.height), options.batch)

    # Until most row groups have been decoded once, as they are in a run after its first minute.
    groups = len(store.LabelStore(labels)) / store.GROUP
    for _ in zip(ours(), range(1 + int(3 * groups) // options.batch), strict=False):
        pass
    rounds = [[time_batches(side, options.seconds, 1, 0) for side in (ours, limit)] for _ in range(options.rounds)]
    stages = by_stage(training, range(1000, 1008), options.batch)
    rows = []
    for name, measured in zip(("ours", "decode + resize alone"), zip(*rounds, strict=True), strict=True):
        rates = [part["windows"][0] for part in measured]
        cpu = statistics.median(part["cpu_ms"] for part in measured)
        rows.append(
            [name, f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f}-{max(rates):,.0f}", f"{cpu:.2f}"]
        )
    ratios = [one["cpu_ms"] / other["cpu_ms"] for one, other in rounds]
    images = len(store.LabelStore(labels))
    lines = [
        f"{images:,} images of {options.width}x{options.height}, batches of {options.batch}, one core of "
        f"{os.cpu_count()}; opened in {opened_s:.1f} s; load average {os.getloadavg()[0]:.1f}",
        "",
        *markdown(["one core", "samples/s", "rounds", "CPU ms/sample"], rows),
        "",
        f"A sample costs {statistics.median(ratios):.1f} times the CPU time of its picture alone.",
        "",
        *markdown(["stage", "ms/sample"], [[stage, f"{ms:.3f}"] for stage, ms in stages.items()]),
    ]
    if options.workers:
        loader = ResumableVqaLoader(training, options.batch, 1 << 40, num_workers=options.workers)
        found = time_batches(lambda: map(len, loader), options.seconds, 1, 2 * options.seconds)
        rate, cpu_ms, first_s = found["windows"][0], found["cpu_ms"], found["first_batch_s"]
        lines += [
            "",
            f"{options.workers} workers: {rate:,.0f} samples/s, {cpu_ms:.2f} CPU ms/sample in all processes; "
            f"first batch after {first_s:.1f} s",
        ]
    return lines


if __name__ == "__main__":
    sys.exit(main())
