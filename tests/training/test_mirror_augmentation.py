"""A mirrored sample is what would be seen and done in the mirror image of the world."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from spear_lightning.batches import RobotBatch
from spear_lightning.errors import ConfigError
from spear_lightning.training import Augmentations, ImageAugmentation, MirrorAugmentation
from spear_lightning.training.mirror_augmentation import mirrored
from spear_lightning.worlds.tabletop.scene import CAMERAS, draw_camera

MIRROR = np.diag([1.0, -1.0, 1.0])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def poses(count: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    turns = Rotation.random(count, rng).as_quat(canonical=True)
    parts = [rng.uniform(-1, 1, (count, 3)), turns, rng.random((count, 1))]
    return torch.from_numpy(np.concatenate(parts, axis=1)).float()


def batch(size: int = 40) -> RobotBatch:
    pixels = torch.randint(0, 256, (size, 3, 14, 28), dtype=torch.uint8, generator=generator(1))
    return RobotBatch(
        images={"primary": pixels},
        image_mask={"primary": torch.ones(size, dtype=torch.bool)},
        instructions=["turn the red car to face left"] * size,
        state=poses(size, 2),
        actions=poses(3 * size, 3).view(size, 3, 8),
        action_mask=torch.ones(size, 3, dtype=torch.bool),
        dataset=torch.zeros(size, dtype=torch.int64),
        position=torch.arange(size),
    )


@given(seed=st.integers(0, 2**32 - 1))
def test_poses_are_reflected_as_matrices_are(seed: int) -> None:
    given_8 = poses(5, seed)
    found = mirrored(given_8).double().numpy()
    np.testing.assert_allclose(found[:, :3], given_8[:, :3].numpy() @ MIRROR, atol=1e-7)
    turns = Rotation.from_quat(given_8[:, 3:7].double().numpy()).as_matrix()
    np.testing.assert_allclose(Rotation.from_quat(found[:, 3:7]).as_matrix(), MIRROR @ turns @ MIRROR, atol=1e-5)
    assert (found[:, 6] >= 0).all()
    torch.testing.assert_close(mirrored(mirrored(given_8)), given_8, atol=0, rtol=0)


def test_targets_of_a_mirrored_chunk_are_the_mirror_images_of_its_targets() -> None:
    # Translation in the base frame, rotation in the tool frame, both from the current pose.
    def target(state_8: np.ndarray, action_8: np.ndarray) -> np.ndarray:
        matrix = np.eye(4)
        turn = Rotation.from_quat(state_8[3:7]) * Rotation.from_quat(action_8[3:7])
        matrix[:3, :3], matrix[:3, 3] = turn.as_matrix(), state_8[:3] + action_8[:3]
        return matrix

    reflection = np.diag([1.0, -1.0, 1.0, 1.0])
    for state_8, action_8 in zip(poses(20, 4), poses(20, 5), strict=True):
        true = reflection @ target(state_8.numpy(), action_8.numpy()) @ reflection
        found = target(mirrored(state_8).numpy(), mirrored(action_8).numpy())
        np.testing.assert_allclose(found, true, atol=1e-5)


def test_the_chosen_share_is_mirrored_in_all_its_parts_and_the_rest_left_alone() -> None:
    before = batch(400)
    after = MirrorAugmentation(0.25)(before, generator(0))
    chosen_B = torch.tensor(["right" in text for text in after.instructions])
    assert 70 <= int(chosen_B.sum()) <= 130
    assert set(after.instructions) == {"turn the red car to face left", "turn the red car to face right"}
    pixels = before.images["primary"]
    assert torch.equal(after.images["primary"][chosen_B], pixels[chosen_B].flip(-1))
    assert torch.equal(after.images["primary"][~chosen_B], pixels[~chosen_B])
    for name in ("state", "actions"):
        old, new = getattr(before, name), getattr(after, name)
        assert torch.equal(new[chosen_B], mirrored(old[chosen_B]))
        assert torch.equal(new[~chosen_B], old[~chosen_B])
    assert torch.equal(after.position, before.position)
    again = MirrorAugmentation(0.25)(before, generator(0))
    assert again.instructions == after.instructions
    assert MirrorAugmentation(0.25)(before, generator(1)).instructions != after.instructions


@pytest.mark.parametrize("name", ["primary", "wrist"])
def test_the_tabletop_cameras_see_the_mirror_image(name: str) -> None:
    place = CAMERAS[name]
    view = draw_camera(place, 28, 14, np.random.default_rng(0), jitter=0.0)
    # A point and its mirror image are seen in mirrored columns of the same row.
    points = np.random.default_rng(1).uniform(-0.1, 0.1, (50, 3)) + place.looks_at_m
    points[:, 1] += 0.03
    seen = [
        view.intrinsics.project(torch.from_numpy((part - view.position_m) @ view.rotation)).numpy()
        for part in (points, points @ MIRROR)
    ]
    np.testing.assert_allclose(seen[1], [28, 0] + seen[0] * [-1, 1], atol=1e-9)


def test_several_augmentations_act_one_after_the_other() -> None:
    mirror, colours = MirrorAugmentation(1.0), ImageAugmentation()
    both = Augmentations([mirror, colours])(batch(), generator(7))
    # The mirror draws in CPU memory from the generator's seed, and leaves the generator as it was.
    one_by_one = colours(mirror(batch(), generator(7)), generator(7))
    assert torch.equal(both.images["primary"], one_by_one.images["primary"])
    assert both.instructions == ["turn the red car to face right"] * 40


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_impossible_shares_are_refused(probability: float) -> None:
    with pytest.raises(ConfigError, match=r"model\.augmentation\.probability"):
        MirrorAugmentation(probability)
