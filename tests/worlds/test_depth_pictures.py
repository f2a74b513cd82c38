"""Pictures with depth: against MuJoCo's own single rays, and repeated by their seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest

from spear_lightning.errors import ConfigError
from spear_lightning.labeling.depth_pictures import DepthPictures
from spear_lightning.worlds.tabletop.commands import main
from spear_lightning.worlds.tabletop.depth_pictures import (
    CLOSEST_M,
    FIELD_OF_VIEW,
    VIEWS,
    draw_view,
    scene_pictures,
    write_depth_pictures,
)
from spear_lightning.worlds.tabletop.ray_camera import RayCamera
from spear_lightning.worlds.tabletop.world import Tabletop


def test_depth_is_that_of_single_rays() -> None:
    world = Tabletop({}, (1, 2))
    world.reset("stack", 1)
    intrinsics, pose = draw_view(np.random.default_rng(0), 28, 21)
    depth = RayCamera(world.model, intrinsics).see(world.data, pose).depth_HW
    geom = np.zeros(1, np.int32)
    for row, column in ((0, 0), (10, 14), (20, 27), (15, 3)):
        x, y = (column + 0.5 - 14) / intrinsics.fx, (row + 0.5 - 10.5) / intrinsics.fx
        ray = pose.rotation @ np.array([x, y, 1.0])
        distance = mujoco.mj_ray(world.model, world.data, pose.position_m, ray, None, 1, -1, geom, None)
        assert depth[row, column] == pytest.approx(distance if distance >= 0 else np.inf, rel=1e-4)


def test_cameras_differ_in_field_of_view_and_never_sit_in_the_gripper() -> None:
    images, depth, focal = scene_pictures(0, 0, (56, 42))
    assert images.shape == (VIEWS, 3, 42, 56)
    assert images.dtype == np.uint8
    assert depth.shape == (VIEWS, 42, 56)
    assert depth.min() > CLOSEST_M
    fields = 2 * np.arctan(42 / 56 / 2 / focal)
    assert ((fields >= FIELD_OF_VIEW[0] - 1e-6) & (fields <= FIELD_OF_VIEW[1] + 1e-6)).all()
    assert np.ptp(fields) > 0.1
    # Nearer pixels move and colours change from view to view.
    assert len({picture.tobytes() for picture in images}) == VIEWS


def test_one_seed_gives_one_store_and_whole_shards_stay(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        write_depth_pictures(folder, 10, seed=2, size=(28, 14), processes=1, shard_size=5)
    names = sorted(path.name for path in folders[0].iterdir())
    assert len(names) == 7
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    (folders[0] / "00001.focal.npy").unlink()
    kept = (folders[0] / "00000.focal.npy").stat().st_mtime_ns
    write_depth_pictures(folders[0], 10, seed=2, size=(28, 14), processes=1, shard_size=5)
    assert (folders[0] / "00000.focal.npy").stat().st_mtime_ns == kept
    assert DepthPictures(folders[0]).fingerprint == DepthPictures(folders[1]).fingerprint
    with pytest.raises(ConfigError, match="whole scenes"):
        write_depth_pictures(folders[0], 7)
    # Shards that are there are of no use to another store.
    for other in ({"seed": 3}, {"size": (42, 14)}, {"pictures": 15}):
        asked: dict[str, Any] = {"pictures": 10, "seed": 2, "size": (28, 14), "shard_size": 5, **other}
        with pytest.raises(ConfigError, match=r"(?s)other pictures.*another folder"):
            write_depth_pictures(folders[0], processes=1, **asked)
    (folders[0] / "plan.json").unlink()
    with pytest.raises(ConfigError, match="not known how they were made"):
        write_depth_pictures(folders[0], 10, seed=2, size=(28, 14), processes=1, shard_size=5)


def test_the_command_writes_them(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path), "--processes", "1"]
    assert main([*out, "--depth_pictures", "5", "--cameras", "primary=28x14"]) == 0
    assert DepthPictures(tmp_path / "depth").size == (14, 28)
    with pytest.raises(ConfigError, match="nothing to write"):
        main(out)
    with pytest.raises(ConfigError, match="primary"):
        main([*out, "--depth_pictures", "5", "--cameras", "wrist=28x14"])
    for option in (["--plain"], ["--distractors", "0", "0"], ["--tasks", "touch"]):
        for kind in ("--depth_pictures", "--labelled_images"):
            with pytest.raises(ConfigError, match=rf"(?s)all of the world.*{option[0]}"):
                main([*out, kind, "5", "--cameras", "primary=28x14", *option])


@pytest.mark.parametrize(
    ("option", "number", "message"),
    [("--depth_pictures", "7", "whole scenes"), ("--labelled_images", "-1", "no images to write")],
)
def test_a_part_that_cannot_be_written_is_refused_before_the_others_are(
    tmp_path: Path, option: str, number: str, message: str
) -> None:
    others = {"--episodes": "1", "--labelled_images": "1", option: number}
    arguments = [part for pair in others.items() for part in pair]
    with pytest.raises(ConfigError, match=message):
        main(["--out", str(tmp_path / "out"), *arguments, "--cameras", "primary=28x14", "--processes", "1"])
    assert not (tmp_path / "out").exists()
