"""Detections are put in order: an independent overlap, examples of names, and properties that always hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear_lightning.errors import DataError
from spear_lightning.labeling.detections import DetectionFilter, Detections, box_overlaps, clean_name
from spear_lightning.labeling.detector import BoxFile, Picture
from spear_lightning.labeling.run_lengths import encode_mask
from spear_lightning.labeling.segmenter import MaskFile

NAN = float("nan")


def found(*rows: tuple[str, list[float], float]) -> Detections:
    names, boxes, scores = zip(*rows, strict=True)
    return Detections(np.array(boxes, np.float32), names, np.array(scores, np.float32))


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("  A Red   Mug. ", "red mug"),
        ("The banana", "banana"),
        ("theatre ticket", "theatre ticket"),
        ("remote_control", "remote control"),
        ('"can"', "can"),
        ("tea\nspoon", "tea spoon"),
        ("ﬁork", "fiork"),
        ("...", ""),
    ],
)
def test_names_are_cleaned(name: str, cleaned: str) -> None:
    assert clean_name(name) == cleaned
    assert clean_name(cleaned) == cleaned


@given(st.lists(st.tuples(*[st.integers(0, 12)] * 4), min_size=1, max_size=6))
def test_overlaps_count_pixels(corners: list[tuple[int, int, int, int]]) -> None:
    boxes = np.array([[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in corners], np.float32)
    grids = []
    for left, top, right, bottom in boxes.astype(int):
        grid = np.zeros((12, 12), bool)
        grid[top:bottom, left:right] = True
        grids.append(grid)
    overlaps = box_overlaps(boxes)
    for one, grid in enumerate(grids):
        for other, second in enumerate(grids):
            union = (grid | second).sum()
            expected = (grid & second).sum() / union if union else 0
            assert overlaps[one, other] == pytest.approx(expected)


def test_doubles_are_dropped_and_different_things_stay() -> None:
    kept = DetectionFilter(min_side=4)(
        found(
            ("cup", [10, 10, 50, 50], 0.5),
            ("Cup", [11, 10, 51, 50], 0.9),
            ("saucer", [13, 10, 53, 50], 0.6),
            ("mug", [11, 10, 51, 50], 0.4),
            ("cup", [60, 10, 95, 50], 0.3),
        ),
        100,
        80,
    )
    # The surer cup stays, and the saucer, which overlaps it by less than 0.95; the mug is the cup once more.
    assert kept.names == ("cup", "saucer", "cup")
    assert kept.scores_N.tolist() == pytest.approx([0.9, 0.6, 0.3])


def test_boxes_are_clipped_and_useless_ones_dropped() -> None:
    kept = DetectionFilter(min_side=4, max_image_share=0.9, min_score=0.2, max_objects=2)(
        found(
            ("cup", [-10, -5, 20, 30], 0.5),
            ("scene", [0, 0, 100, 79], 0.9),
            ("line", [10, 10, 50, 12], 0.9),
            ("", [10, 10, 50, 50], 0.9),
            ("doubtful", [10, 10, 50, 50], 0.1),
            ("outside", [120, 10, 150, 50], 0.9),
            ("broken", [NAN, 10, 50, 50], 0.9),
            ("unscored", [60, 40, 140, 90], NAN),
            ("third", [40, 40, 60, 60], 0.3),
        ),
        100,
        80,
    )
    # Two at most: boxes without a score come first.
    assert kept.names == ("cup", "unscored")
    np.testing.assert_array_equal(kept.boxes_N4, [[0, 0, 20, 30], [60, 40, 100, 80]])


@given(st.data())
def test_filtering_twice_changes_nothing(data: st.DataObject) -> None:
    coordinate = st.floats(-50, 150, width=32)
    rows = data.draw(
        st.lists(st.tuples(st.sampled_from("ab "), st.lists(coordinate, min_size=4, max_size=4), st.floats(0, 1)))
    )
    detections = found(*rows) if rows else Detections(np.zeros((0, 4), np.float32), (), np.zeros(0, np.float32))
    once = DetectionFilter()(detections, 100, 80)
    again = DetectionFilter()(once, 100, 80)
    np.testing.assert_array_equal(once.boxes_N4, again.boxes_N4)
    assert once.names == again.names
    assert (once.boxes_N4 >= 0).all()
    assert (once.boxes_N4 <= [100, 80, 100, 80]).all()


def test_boxes_and_masks_from_files(tmp_path: Path) -> None:
    mask = np.zeros((30, 40), bool)
    mask[5:15, 8:28] = True
    other = ~mask
    objects = [
        {
            "name": "a Cup",
            "box_2d": [20, 20, 40, 30],
            "mask": {"size": [30, 40], "counts": encode_mask(other).tolist()},
        },
        {
            "name": "cup",
            "box_2d": [8, 5, 28, 15],
            "mask": {"size": [30, 40], "counts": encode_mask(mask).tolist()},
        },
    ]
    path = tmp_path / "objects.jsonl"
    path.write_text(
        json.dumps({"image_id": "a.jpg", "objects": objects})
        + "\n\n"
        + json.dumps({"image_id": "b", "objects": []})
    )
    boxes, masks = BoxFile(str(path)), MaskFile(str(path))
    boxes.prepare()
    masks.prepare()
    pictures = [Picture(name, b"", np.zeros((30, 40, 3), np.uint8)) for name in ("a.jpg", "b", "c")]
    in_a, in_b, in_c = boxes.detect(pictures)
    assert isinstance(in_a, Detections)
    assert isinstance(in_b, Detections)
    assert (len(in_a), len(in_b)) == (2, 0)
    assert isinstance(in_c, DataError)
    cleaned = DetectionFilter()(in_a, 40, 30)
    segmented = masks.segment(pictures[:1], [cleaned.take(np.array([1]))])[0]
    assert not isinstance(segmented, Exception)
    np.testing.assert_array_equal(segmented.masks_NHW, mask[None])
    wrong_size = Picture("a.jpg", b"", np.zeros((31, 40, 3), np.uint8))
    assert "another image size" in str(masks.segment([wrong_size], [cleaned])[0])
    assert "lacks an object" in str(masks.segment(pictures[2:], [cleaned])[0])
    path.write_text('{"image_id": "a.jpg", "objects": [{"name": "cup"}]}')
    with pytest.raises(DataError, match=r"(?s)line 1.*box_2d"):
        BoxFile(str(path)).prepare()
