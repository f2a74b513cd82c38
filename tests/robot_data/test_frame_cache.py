"""Caches of frames: the same pixels, made once, whole or not there at all."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from spear_lightning.errors import DataError
from spear_lightning.robot_data import frame_cache_build
from spear_lightning.robot_data.chunks import ChunkSpec
from spear_lightning.robot_data.dataset import EvenSamples, RobotDataset
from spear_lightning.robot_data.frame_cache import DESCRIPTION, CacheKind, FrameCache
from spear_lightning.robot_data.images import CameraSpec, decode_image, fit_image, reduction
from spear_lightning.robot_data.loader import ResumableLoader
from spear_lightning.robot_data.robot_mixture import RobotMixture

CAMERAS = {"primary": CameraSpec(56, 42), "wrist": CameraSpec(28, 28, fit="pad", source="secondary")}


@pytest.fixture
def mixture(demo_root: Path, tmp_path: Path) -> RobotMixture:
    return RobotMixture(demo_root, {"bridge": 1.0}, ChunkSpec(), holdout=0.2, index_folder=tmp_path)


def dataset_of(mixture: RobotMixture, kind: CacheKind | None, held_out: bool = False) -> RobotDataset:
    sources = mixture.held_out if held_out else mixture.training
    cached = mixture.frame_caches(CAMERAS, kind) if kind else None
    return RobotDataset(sources, EvenSamples([len(s) for s in sources], 999), CAMERAS, ChunkSpec(), cached=cached)


@pytest.mark.parametrize("held_out", [False, True])
def test_an_exact_cache_changes_no_bit(
    mixture: RobotMixture, held_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_cache_build, "PART_BYTES", 1 << 17)
    plain, cached = (dataset_of(mixture, kind, held_out) for kind in (None, "exact"))
    places = range(min(60, len(mixture.held_out[0])))
    expected, found = plain.__getitems__(places), cached.__getitems__(places)
    for name in CAMERAS:
        assert torch.equal(found.images[name], expected.images[name])
        assert torch.equal(found.image_mask[name], expected.image_mask[name])
    cache = mixture.frame_caches(CAMERAS, "exact")[0]["primary"]
    assert len(cache.description["part_starts"]) > 2
    assert cache.description["bytes"] == cache.description["pictures"] * 56 * 42 * 3


def test_threads_read_from_a_cache(mixture: RobotMixture) -> None:
    plain = RobotDataset(mixture.training, mixture.stream(), CAMERAS, ChunkSpec())
    caches = mixture.frame_caches(CAMERAS, "exact")
    cached = RobotDataset(mixture.training, mixture.stream(), CAMERAS, ChunkSpec(), cached=caches)
    for batch in ResumableLoader(cached, 4, 8, num_threads=2):
        expected = plain.__getitems__(batch.position.tolist())
        assert all(torch.equal(batch.images[name], expected.images[name]) for name in CAMERAS)


def test_a_jpeg_cache_holds_the_pictures_encoded_once(mixture: RobotMixture) -> None:
    found = dataset_of(mixture, "jpeg").__getitems__(range(20)).images["primary"]
    plain = dataset_of(mixture, None).__getitems__(range(20)).images["primary"]
    for ours, pixels in zip(found.permute(0, 2, 3, 1).numpy(), plain.permute(0, 2, 3, 1).numpy(), strict=True):
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "jpeg", quality=95, subsampling="4:2:0")
        theirs = np.asarray(Image.open(encoded)).astype(int)
        assert np.abs(ours.astype(int) - theirs).mean() < 0.5
    assert (found.float() - plain.float()).abs().mean() < 3


def test_a_cache_is_made_once_for_each_size(mixture: RobotMixture, monkeypatch: pytest.MonkeyPatch) -> None:
    first = mixture.frame_caches(CAMERAS, "jpeg")[0]
    monkeypatch.setattr(frame_cache_build, "_build", None)
    again = mixture.frame_caches(CAMERAS, "jpeg")[0]
    assert again["primary"].folder == first["primary"].folder
    # The name a model gives a camera does not matter, what it sees does.
    renamed = {"front": CameraSpec(56, 42, source="primary")}
    assert mixture.frame_caches(renamed, "jpeg")[0]["front"].folder == first["primary"].folder
    for other in (CameraSpec(42, 42), CameraSpec(56, 42, fit="pad"), CameraSpec(56, 42, source="secondary")):
        with pytest.raises(TypeError, match="NoneType"):
            mixture.frame_caches({"primary": other}, "jpeg")


def test_a_killed_cache_is_not_taken_for_one_and_goes_on(
    mixture: RobotMixture, demo_root: Path, tmp_path: Path
) -> None:
    code = f"""
import os, signal
from spear_lightning.robot_data import frame_cache_build
from spear_lightning.robot_data.chunks import ChunkSpec
from spear_lightning.robot_data.images import CameraSpec
from spear_lightning.robot_data.robot_mixture import RobotMixture
frame_cache_build.PART_BYTES = 1 << 17
make = frame_cache_build._PartJob.__call__
def make_or_die(self, number, frames):
    return make(self, number, frames) if number == 0 else os.kill(os.getpid(), signal.SIGKILL)
frame_cache_build._PartJob.__call__ = make_or_die
frame_cache_build.os.cpu_count = lambda: 1
options = {{"holdout": 0.2, "index_folder": {str(tmp_path)!r}}}
mixture = RobotMixture({str(demo_root)!r}, {{"bridge": 1.0}}, ChunkSpec(), **options)
mixture.frame_caches({{"primary": CameraSpec(56, 42)}}, "exact")
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (part,) = tmp_path.glob("frames/*/*/*.pictures")
    assert not list(tmp_path.rglob(DESCRIPTION))
    written = part.stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frame_cache_build, "PART_BYTES", 1 << 17)
        cache = mixture.frame_caches({"primary": CameraSpec(56, 42)}, "exact")[0]["primary"]
    assert part.stat().st_mtime_ns == written
    assert len(list(cache.folder.glob("*.pictures"))) == len(cache.description["part_starts"]) > 1
    assert not list(cache.folder.glob(".*.tmp"))


@pytest.mark.parametrize("kind", ["exact", "jpeg"])
def test_a_damaged_cache_is_an_error(mixture: RobotMixture, kind: CacheKind) -> None:
    folder = mixture.frame_caches(CAMERAS, kind)[0]["primary"].folder
    part = next(folder.glob("*.pictures"))
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cache of frames is damaged[\s\S]*delete the folder"):
        dataset_of(mixture, kind).__getitems__(range(60))
    (folder / DESCRIPTION).write_text("{")
    with pytest.raises(DataError, match="damaged"):
        FrameCache(folder)


def test_a_disk_that_is_too_small_is_said_before(mixture: RobotMixture, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = frame_cache_build.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(frame_cache_build.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match=r"too small[\s\S]*frame_cache to jpeg"):
        mixture.frame_caches(CAMERAS, "exact")


@pytest.mark.parametrize(
    ("height", "width", "camera", "factor"),
    [
        (256, 256, CameraSpec(112, 112), 2),
        (256, 256, CameraSpec(280, 210), 1),
        (480, 640, CameraSpec(280, 210), 2),
        (480, 640, CameraSpec(56, 42), 8),
        (224, 224, CameraSpec(112, 112), 2),
        (223, 223, CameraSpec(112, 112), 1),
        (360, 640, CameraSpec(112, 112, "pad"), 4),
        (64, 64, CameraSpec(280, 210), 1),
    ],
)
def test_reduction_keeps_the_pixels_that_are_shown(
    height: int, width: int, camera: CameraSpec, factor: int
) -> None:
    assert reduction(height, width, camera) == factor
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 255 / height, columns * 255 / width, 0 * rows + 99], axis=-1).astype(np.uint8)
    data = simplejpeg.encode_jpeg(pixels, 95, colorspace="RGB", colorsubsampling="420")
    small = decode_image(data, "x", camera)
    assert small.shape[:2] == (-(-height // factor), -(-width // factor))
    full = fit_image(decode_image(data, "x"), camera).int()
    assert (fit_image(small, camera).int() - full).abs().float().mean() < 2
