"""Names of patches against counting pixels, and against where the masks themselves are shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_lightning.batches import IGNORED
from spear_lightning.errors import DataError
from spear_lightning.labeling.demo_labels import demo_label
from spear_lightning.labeling.records import ImageLabel
from spear_lightning.labeling.run_lengths import decode_mask, encode_mask
from spear_lightning.labeling.store import LabelStore
from spear_lightning.robot_data.dataset import EvenSamples
from spear_lightning.robot_data.images import CameraSpec, fit_image
from spear_lightning.vqa.labelled_images import split_labels
from spear_lightning.vqa.patch_names import COVER, NamedPatches, common_names, patch_names
from spear_lightning.vqa.task import clean_name

PATCH = 7


def masks_of(label: ImageLabel) -> np.ndarray:
    return np.stack([decode_mask(item.mask, label.height, label.width) for item in label.objects])


def numbers_of(label: ImageLabel) -> dict[str, int]:
    return {clean_name(item.name): 3 + index for index, item in enumerate(label.objects)}


def test_a_patch_has_the_name_of_what_covers_most_of_it() -> None:
    for seed in range(5):
        label, _ = demo_label(seed, 42, 56)
        numbers, masks = numbers_of(label), masks_of(label)
        found = patch_names(label, numbers, CameraSpec(width=56, height=42), PATCH).reshape(6, 8)
        for row in range(6):
            for column in range(8):
                inside = masks[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
                share = inside.mean((1, 2))
                expected = numbers[clean_name(label.objects[share.argmax()].name)] if share.max() >= COVER else 0
                assert found[row, column] == expected
        assert (found > 0).any()
        assert (found == 0).any()


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 50),
    size=st.sampled_from([(126, 168), (100, 180), (90, 60), (200, 210)]),
    fit=st.sampled_from(["crop", "pad"]),
)
def test_names_lie_where_the_objects_are_shown(seed: int, size: tuple[int, int], fit: str) -> None:
    label, _ = demo_label(seed, *size)
    camera = CameraSpec(width=56, height=42, fit=fit)  # type: ignore[arg-type]
    masks, numbers = masks_of(label), numbers_of(label)
    found = patch_names(label, numbers, camera, PATCH).reshape(6, 8)
    for mask, item in zip(masks, label.objects, strict=True):
        picture = np.repeat((255 * mask[..., None]).astype(np.uint8), 3, axis=2)
        shown = fit_image(picture, camera)[0].float() / 255
        share = shown.reshape(6, PATCH, 8, PATCH).mean((1, 3))
        named = found == numbers[clean_name(item.name)]
        assert (share[named] >= COVER - 0.01).all()
        # Whatever else a patch may be called, it is not nothing.
        assert (found[share >= COVER + 0.01] > 0).all()


def test_unknown_names_are_ignored_and_an_empty_image_shows_nothing() -> None:
    label, _ = demo_label(0, 42, 56)
    camera = CameraSpec(width=56, height=42)
    known = patch_names(label, numbers_of(label), camera, PATCH)
    unknown = patch_names(label, {}, camera, PATCH)
    assert (unknown[known > 0] == IGNORED).all()
    assert (unknown[known == 0] == 0).all()
    assert not patch_names(replace(label, objects=()), {}, camera, PATCH).any()


def test_the_most_common_names_are_known() -> None:
    rows = [["Red cube", "mug"], ["red cube", "can"], ["can"], ["red cube", ""], ["bowl"]]
    assert common_names(rows, 2) == ["can", "red cube"]
    assert common_names(rows, 9) == ["bowl", "can", "mug", "red cube"]


def test_batches_hold_the_pictures_at_their_places(demo_folder: Path) -> None:
    store = LabelStore(demo_folder, masks=True)
    images, _ = split_labels(store, 0.0, 0)
    names = common_names(store.object_names(), 1000)
    camera = CameraSpec(width=56, height=42)
    data = NamedPatches([images], EvenSamples([len(images)], len(images)), names, camera, 14)
    batch = data.read([3, 1])
    assert batch.position.tolist() == [3, 1]
    for row, place in enumerate([3, 1]):
        label, image = store.read(place)
        assert torch.equal(batch.images[row], fit_image(image, camera))
        numbers = {name: number for number, name in enumerate(names, start=1)}
        assert torch.equal(batch.names[row], patch_names(label, numbers, camera, 14))
    assert batch.names.shape == (2, 12)


def test_of_a_broken_picture_nothing_is_known(
    demo_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LabelStore(demo_folder, masks=True)
    images, _ = split_labels(store, 0.0, 0)
    monkeypatch.setattr(LabelStore, "_bytes", lambda self, place: b"no picture")
    finder = EvenSamples([len(images)], len(images))
    batch = NamedPatches([images], finder, ["mug"], CameraSpec(width=56, height=42), 14).read([0, 1])
    assert (batch.names == IGNORED).all()
    assert not batch.images.any()
    assert len(caplog.records) == 1


def test_labels_without_masks_are_not_taken_for_empty() -> None:
    label, _ = demo_label(0, 42, 56)
    bare = replace(label, objects=tuple(replace(item, mask=np.zeros(0, np.int64)) for item in label.objects))
    with pytest.raises(DataError, match="run lengths"):
        patch_names(bare, {}, CameraSpec(width=56, height=42), PATCH)
    whole = encode_mask(np.ones((42, 56), bool))
    full = replace(label, objects=(replace(label.objects[0], mask=whole),))
    assert (patch_names(full, numbers_of(full), CameraSpec(width=56, height=42), PATCH) == 3).all()
