"""The easy world: what varies with the seed in the full one stays the same, and results are kept apart."""

from __future__ import annotations

import numpy as np

from spear_lightning.worlds.tabletop.benchmark import PlainTabletopBenchmark, TabletopBenchmark
from spear_lightning.worlds.tabletop.world import Tabletop

SIZES = {"primary": (56, 42), "wrist": (28, 28)}


def worlds(plain: bool) -> list[Tabletop]:
    made = [Tabletop(SIZES, distractors=(0, 0), plain=plain) for _ in range(2)]
    for seed, world in enumerate(made):
        world.reset("touch", seed)
    return made


def test_table_light_and_cameras_do_not_depend_on_the_seed() -> None:
    for plain in (True, False):
        first, second = (world.scene for world in worlds(plain))
        same = [
            np.array_equal(first.cameras["primary"].position_m, second.cameras["primary"].position_m),
            np.array_equal(first.look.light_position_m, second.look.light_position_m),
            np.array_equal(first.look.base_rgb[0], second.look.base_rgb[0]),
        ]
        assert same == [plain] * 3


def test_objects_still_vary_and_stand_alone() -> None:
    first, second = worlds(plain=True)
    assert len(first.scene.objects) == len(second.scene.objects) == 1
    assert not np.allclose(first.object_pose(0)[:2], second.object_pose(0)[:2])


def test_results_of_the_two_worlds_have_different_names() -> None:
    assert PlainTabletopBenchmark().world_facts()["world"] == "tabletop-plain"
    assert TabletopBenchmark().world_facts()["world"] == "tabletop"
    world = PlainTabletopBenchmark(cameras=SIZES).make_world()
    world.reset("pick_up", 3)
    assert len(world.scene.objects) == 1
