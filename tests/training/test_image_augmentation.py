"""Augmentation keeps images whole: closed forms, and nothing drawn from elsewhere."""

from __future__ import annotations

import pytest
import torch

from spear_lightning.errors import ConfigError
from spear_lightning.training.image_augmentation import ImageAugmentation


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_nothing_asked_for_changes_nothing() -> None:
    pixels = torch.randint(0, 256, (5, 3, 14, 28), dtype=torch.uint8)
    same = ImageAugmentation(crop=1.0, brightness=0.0, contrast=0.0, saturation=0.0)
    assert torch.equal(same.images(pixels, generator(0)), pixels)


def test_crop_shows_a_part_of_a_ramp_at_its_own_aspect() -> None:
    # On the ramp u + 2 v the crop's scale is the change of slope, and its corner the change of offset.
    v, u = torch.meshgrid(torch.arange(40.0), torch.arange(60.0), indexing="ij")
    ramp = (u + 2 * v).to(torch.uint8).expand(200, 3, 40, 60)
    crop = ImageAugmentation(crop=0.8, brightness=0.0, contrast=0.0, saturation=0.0)
    out = crop.images(ramp, generator(1))[:, 0].float()
    slope_u = (out[:, 20, 50] - out[:, 20, 10]) / 40
    slope_v = (out[:, 35, 30] - out[:, 5, 30]) / 30 / 2
    torch.testing.assert_close(slope_u, slope_v, atol=0.04, rtol=0)
    assert slope_u.min() > 0.77
    assert slope_u.max() < 1.03
    assert slope_u.std() > 0.03, "the size of the crop varies"
    # The crop lies inside the image: its first pixel is not left of or above the image's.
    assert out[:, 0, 0].min() >= 0
    assert out[:, -1, -1].max() <= 59 + 78
    assert out[:, 0, 0].std() > 1, "its place varies"


def test_colours_change_as_their_formulas_say() -> None:
    grey = torch.full((300, 3, 14, 14), 100, dtype=torch.uint8)
    brighter = ImageAugmentation(crop=1.0, brightness=0.2, contrast=0.5, saturation=0.5).images(grey, generator(2))
    # Grey is its own mean and has no saturation: only the brightness shift is left, uniform in +-51.
    shift = brighter[:, 0, 0, 0].float() - 100
    assert (brighter.float() - brighter[:, :1, :1, :1].float()).abs().max() <= 1
    assert shift.abs().max() <= 52
    assert abs(shift.mean()) < 6
    assert abs(shift.std() - 51 / 3**0.5) < 4
    red = torch.tensor([200, 20, 20], dtype=torch.uint8).view(1, 3, 1, 1).expand(300, 3, 14, 14)
    saturation = ImageAugmentation(crop=1.0, brightness=0.0, contrast=0.0, saturation=0.4)
    out = saturation.images(red, generator(3)).float()
    spread = (out[:, 0] - out[:, 1])[:, 0, 0] / 180
    assert spread.min() > 0.58
    assert spread.max() < 1.42
    luma = (out * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1)
    # Where no channel reaches the end of its range, brightness stays.
    inside = (out.amax((1, 2, 3)) < 255) & (out.amin((1, 2, 3)) > 0)
    assert inside.sum() > 100
    torch.testing.assert_close(luma[inside], torch.full_like(luma[inside], 73.82), atol=1.0, rtol=0)


def test_samples_differ_and_a_seed_repeats() -> None:
    pixels = torch.randint(0, 256, (1, 3, 28, 28), dtype=torch.uint8).expand(4, -1, -1, -1)
    augment = ImageAugmentation()
    first = augment.images(pixels, generator(4))
    assert torch.equal(first, augment.images(pixels, generator(4)))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("options", [{"crop": 0.0}, {"crop": 1.1}, {"contrast": 1.0}, {"brightness": -0.1}])
def test_impossible_ranges_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"model\.augmentation"):
        ImageAugmentation(**options)
