"""Images per second of the labelling pipeline on one GPU, with SAM 2 large and MoGe ViT-L at their full sizes.

Weights are random: speed does not depend on them. What they find does, so that masks and points, once computed and
brought to the CPU, are replaced by plausible ones (ellipses in the boxes, a table with bumps) before boxes are
fitted. 2D boxes come from a file: Gemini's replies are waited for beside the GPU's work. Two references are in the
same run: the two networks on one batch in memory, one after the other, with their results fetched; and what the
GPU's own working time would allow, if it never waited.

    python benchmarks/label_images.py --images 400
    python benchmarks/label_images.py --small --device cpu --images 12 --size 160x90     # does it work at all?
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from label_clock import SETTLED, Clock
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.autograd import DeviceType

from spear_lightning.errors import SpearError
from spear_lightning.geometry.cameras import PixelIntrinsics
from spear_lightning.labeling.assembly import ObjectFilter, gather
from spear_lightning.labeling.box_pool import BoxPool
from spear_lightning.labeling.demo_labels import demo_label
from spear_lightning.labeling.detections import Detections
from spear_lightning.labeling.detector import BoxFile, Picture
from spear_lightning.labeling.geometry import NetworkGeometry, PointMap
from spear_lightning.labeling.object_label import BoxRecipe
from spear_lightning.labeling.pipeline import LabelingRun, default_processes
from spear_lightning.labeling.sam2 import Sam2
from spear_lightning.labeling.segmenter import Masks
from spear_lightning.labeling.sources import ImageFolder
from spear_lightning.labeling.work_split import ALONE
from spear_lightning.models import MogeEncoder, MogeV1

CORPUS = 230_000
"""Images of the paper's data set."""

console = Console(width=120)


def sam2_network(small: bool) -> torch.nn.Module:
    """Return SAM 2.1 Hiera-L, or a small one, with random weights."""
    from transformers import Sam2Config, Sam2Model, Sam2VisionConfig

    side, width = (128, 16) if small else (1024, 144)
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": width,
        "num_attention_heads": 1 if small else 2,
        "image_size": [side, side],
        "blocks_per_stage": [1, 1, 2, 1] if small else [2, 6, 36, 4],
        "embed_dim_per_stage": [width, 2 * width, 4 * width, 8 * width],
        "num_attention_heads_per_stage": [1, 1, 2, 4] if small else [2, 4, 8, 16],
        "window_size_per_stage": [4, 4, 4, 4] if small else [8, 4, 16, 8],
        "global_attention_blocks": [3] if small else [23, 33, 43],
        "window_positional_embedding_background_size": [4, 4] if small else [7, 7],
    }
    vision = Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[8 * width, 4 * width, 2 * width, width],
        backbone_feature_sizes=[[side // 4] * 2, [side // 8] * 2, [side // 16] * 2],
    )
    return Sam2Model(Sam2Config(vision_config=vision, prompt_encoder_config={"image_size": side}))


def moge_network(small: bool) -> MogeV1:
    """Return MoGe v1 with ViT-L, or a small one, with random weights."""
    if not small:
        return MogeV1()
    encoder = MogeEncoder(hidden_width=48, depth=4, heads=3, layers=(0, 1, 2, 3))
    return MogeV1(encoder, projection=32, upsampled=(32, 32, 32), blocks=1, num_tokens_range=(60, 120))


class TimedSam2(Sam2):
    """SAM 2 whose masks, once they are there, are exchanged for ellipses."""

    def __init__(self, small: bool, batch_size: int) -> None:
        super().__init__("random weights", batch_size)
        self.small = small

    def prepare(self, device: torch.device | str = "cpu") -> None:
        """Make the network, the first time."""
        if self._network is None:
            self.use(sam2_network(self.small), device)

    def segment(self, pictures: Sequence[Picture], boxes: Sequence[Detections]) -> list[Masks | SpearError]:
        """Do all the work, and return ellipses."""
        found: list[Masks | SpearError] = []
        for masks, detections in zip(super().segment(pictures, boxes), boxes, strict=True):
            assert isinstance(masks, Masks)
            found.append(Masks(ellipses(detections, masks.masks_NHW), np.ones_like(masks.scores_N)))
        return found


def ellipses(detections: Detections, masks_NHW: np.ndarray) -> np.ndarray:
    """Draw the ellipses that 2D boxes touch into masks, and nothing else."""
    masks_NHW[:] = False
    for mask_HW, box_4 in zip(masks_NHW, detections.boxes_N4, strict=True):
        left, top, right, bottom = box_4.round().astype(int)
        v, u = np.ogrid[-1 : 1 : (bottom - top) * 1j, -1 : 1 : (right - left) * 1j]
        mask_HW[top:bottom, left:right] = u**2 + v**2 < 1
    return masks_NHW


class TimedMoge(NetworkGeometry):
    """MoGe whose points, once they are there, are exchanged for a table with bumps."""

    def __init__(self, network: MogeV1, batch_size: int, width: int, height: int) -> None:
        super().__init__(network, batch_size)
        camera = PixelIntrinsics(width, width, width / 2, height / 2, width=width, height=height)
        v, u = np.mgrid[0:height, 0:width] + 0.5
        depth = 1.5 - 0.5 * v / height + 0.02 * np.sin(u / width * 40) * np.sin(v / height * 30)
        rays = np.stack([(u - camera.cx) / camera.fx, (v - camera.cy) / camera.fy, np.ones_like(u)], -1)
        points = (rays * depth[..., None]).astype(np.float32)
        self.plausible = PointMap(points, np.ones((height, width), bool), camera, "scale_free")

    def point_maps(
        self,
        images: Sequence[np.ndarray],
        image_ids: Sequence[str],
        intrinsics: Sequence[PixelIntrinsics | None] | None = None,
    ) -> list[PointMap | SpearError]:
        """Do all the work, and return the table."""
        return [self.plausible for _ in super().point_maps(images, image_ids, intrinsics)]


def write_data(folder: Path, images: int, objects: int, width: int, height: int) -> None:
    """Write JPEGs of a photograph's size in bytes, and boxes for them."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    scenes = [demo_label(seed, height, width)[1].astype(np.int16) for seed in range(8)]
    with (folder / "boxes.jsonl").open("w") as lines:
        for number in track(range(images), "images", console=console):
            grain = rng.integers(-12, 13, (height // 2, width // 2, 3), np.int16).repeat(2, 0).repeat(2, 1)
            scene = scenes[number % len(scenes)].copy()
            scene[: grain.shape[0], : grain.shape[1]] += grain
            data = simplejpeg.encode_jpeg(scene.clip(0, 255).astype(np.uint8), quality=90)
            (folder / "images" / f"{number:05d}.jpg").write_bytes(data)
            size = rng.uniform(0.08, 0.25, (objects, 2))
            corner = rng.uniform(0, 1 - size)
            boxes = np.concatenate([corner, corner + size], 1) * [width, height, width, height]
            found = [{"name": f"thing {index}", "box_2d": box.tolist()} for index, box in enumerate(boxes)]
            lines.write(json.dumps({"image_id": f"{number:05d}.jpg", "objects": found}) + "\n")


def gpu_work(profile: torch.profiler.profile) -> tuple[float, float]:
    """Return the share of a run, without its ends, in which the GPU did any work; and all its seconds of work."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == DeviceType.CUDA
    )
    begin, finish = spans[0][0], max(stop for _, stop in spans)
    first, last = (begin + share * (finish - begin) for share in (SETTLED, 1 - SETTLED))
    total, settled, end = 0.0, 0.0, begin
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        settled += max(0.0, min(stop, last) - max(start, end, first))
        end = max(end, stop)
    return settled / (last - first), total / 1e6


def box_milliseconds(folder: Path, boxes: BoxFile, geometry: TimedMoge, images: int = 20) -> float:
    """Return milliseconds of one process for the box of an object, the way to it and back included."""
    plausible = geometry.plausible
    paths = sorted((folder / "images").iterdir())[:images]
    nothing = np.zeros((1, 1, 3), np.uint8)
    found = boxes.detect([Picture(path.name, b"", nothing) for path in paths])
    evidence = []
    for path, detections in zip(paths, found, strict=True):
        assert isinstance(detections, Detections)
        masks_NHW = ellipses(detections, np.zeros((len(detections), *plausible.valid_HW.shape), bool))
        masks = Masks(masks_NHW, np.ones(len(detections), np.float32))
        evidence.append(gather(path.name, "benchmark", detections, masks, plausible, {}))
    with BoxPool(1, BoxRecipe(), ObjectFilter()) as pool:
        pool(evidence[0])
        start = time.perf_counter()
        objects = sum(len(pool(item).objects) for item in evidence)
        return 1000 * (time.perf_counter() - start) / objects


def networks_alone(segmenter: TimedSam2, geometry: TimedMoge, folder: Path, boxes: BoxFile, batch: int) -> float:
    """Return images per second of both networks on one batch, one after the other, results fetched."""
    paths = sorted((folder / "images").iterdir())[:batch]
    images = [np.asarray(simplejpeg.decode_jpeg(path.read_bytes())) for path in paths]
    pictures = [Picture(path.name, b"", image) for path, image in zip(paths, images, strict=True)]
    found = [item for item in boxes.detect(pictures) if isinstance(item, Detections)]

    def once() -> None:
        Sam2.segment(segmenter, pictures, found)
        NetworkGeometry.point_maps(geometry, images, [path.name for path in paths])

    once()
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < 5 or rounds < 3:
        once()
        rounds += 1
    return rounds * len(paths) / (time.perf_counter() - start)


def main() -> None:
    options = _options()
    width, height = (int(part) for part in options.size.split("x"))
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, options.images, options.objects, width, height)
        segmenter = TimedSam2(options.small, options.batch)
        geometry = TimedMoge(moge_network(options.small), options.batch, width, height)
        boxes = BoxFile(str(folder / "boxes.jsonl"))
        for part in (boxes, segmenter, geometry):
            part.prepare(device)
        millions = [
            sum(p.numel() for p in net.parameters()) / 1e6 for net in (segmenter._network, geometry.network)
        ]
        alone = networks_alone(segmenter, geometry, folder, boxes, options.batch)
        a_box = box_milliseconds(folder, boxes, geometry)

        def label(out: str, limit: int | None, watched: bool = False) -> Clock:
            clock, stop = Clock(), threading.Event()
            watcher = threading.Thread(target=clock.watch, args=(stop,), daemon=True)
            if watched:
                watcher.start()
            run = LabelingRun(
                str(folder / out),
                ImageFolder(str(folder / "images")),
                boxes,
                segmenter,
                geometry,
                geometry_batch=options.batch,
                box_processes=options.box_processes,
                decode_threads=options.decode_threads,
                limit=limit,
            )
            try:
                run.run(ALONE, progress=clock, device=device)
            finally:
                stop.set()
            return clock

        clock = label("labels", None, watched=device.startswith("cuda"))
        busy = None
        if device.startswith("cuda"):
            options.profiled = min(options.images, options.profiled)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                label("profiled", options.profiled)
            busy = gpu_work(profile)
    _report(options, clock, alone, busy, a_box, millions, device)


def _report(
    options: argparse.Namespace,
    clock: Clock,
    alone: float,
    busy: tuple[float, float] | None,
    a_box: float,
    millions: Sequence[float],
    device: str,
) -> None:
    rate, tally = clock.rate(), clock.tally
    assert tally is not None
    rows = {"both networks in turn, one batch in memory": alone, "spear label": rate}
    if busy is not None:
        rows = {"the GPU's working time, if it never waited": options.profiled / busy[1]} | rows
    table = Table("", "images/s", "spear label", title=f"{options.images} images of {options.size}, one process")
    for name, value in rows.items():
        table.add_row(name, f"{value:.2f}", f"{rate / value:.2f}")
    console.print(table)
    told = clock.busy_share()
    if told is not None:
        console.print(
            f"GPU at work: {told:.1%} of the time, without the run's ends (the driver's counter of kernels)"
        )
    if busy is not None:
        console.print(
            f"GPU at work under a profiler, which slows it: {busy[0]:.1%} (kernels and copies; {options.profiled} "
            "images of a second run, without its ends)"
        )
    console.print(
        f"Boxes: {a_box:.1f} ms of one process an object; at this rate "
        f"{a_box * rate * options.objects / 1000:.1f} cores"
    )
    console.print(f"{CORPUS:,} images: {CORPUS / rate / 3600:.1f} hours on one device")
    spent = ", ".join(f"{step} {seconds / tally.seconds:.2f}" for step, seconds in tally.busy_s.items())
    console.print(f"Threads at work on average: {spent}")
    console.print(
        f"{tally.labelled} labelled, {tally.failed} failed, {tally.objects} objects, {tally.dropped} dropped"
    )
    where = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "CPU"
    console.print(
        f"SAM 2 {millions[0]:.1f} M parameters (bf16), MoGe {millions[1]:.1f} M (fp16) on GPU; batches of "
        f"{options.batch}, {options.objects} objects an image, {options.box_processes} processes for boxes."
    )
    console.print(
        f"{where}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--objects", type=int, default=8, help="2D boxes of an image")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--box_processes", type=int, default=default_processes())
    parser.add_argument("--decode_threads", type=int, default=2)
    parser.add_argument("--profiled", type=int, default=120, help="images under the profiler")
    parser.add_argument("--device")
    parser.add_argument("--small", action="store_true", help="small networks: does it work at all?")
    return parser.parse_args()


if __name__ == "__main__":
    main()
