"""Labelling as a whole, with cheap steps: nothing is lost or doubled, whatever fails, stops or starts again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cheap_parts import Quadrants, cheap_run, contents, write_images

from spear_lightning.errors import ConfigError, DataError
from spear_lightning.labeling.assembly import DROPPED, ObjectFilter
from spear_lightning.labeling.label_folder import LabelFolder
from spear_lightning.labeling.pipeline import Tally
from spear_lightning.labeling.schema import arrow_schema
from spear_lightning.labeling.store import LabelStore
from spear_lightning.labeling.work_split import ALONE, WorkSplit

NAMES = [f"{number:02d}.jpg" for number in range(14)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, NAMES)
    return folder


@pytest.fixture(scope="module")
def labels(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that nothing went wrong in."""
    folder = tmp_path_factory.mktemp("labels")
    cheap_run(images, folder, Quadrants()).run(ALONE)
    return folder


def test_every_image_has_a_label_that_is_right(images: Path, labels: Path) -> None:
    store = LabelStore(labels, masks=True)
    assert {label.image_id for label in store} == set(NAMES)
    for index in range(len(store)):
        label, _ = store.read(index)
        assert store.encoded_image(index) == (images / label.image_id).read_bytes()
        assert [item.name for item in label.objects] == ["cup", "plate"]
        assert label.provenance["detector"] == "quadrants"
        assert (label.source, label.unit) == ("pictures", "scale_free")
        assert len(label.pixels) == 64
        # The stored points are those of the stored pixels: seen through the stored camera, they are there.
        assert label.intrinsics is not None
        assert np.isfinite(label.pixel_points).all()
        u = label.intrinsics.fx * label.pixel_points[:, 0] / label.pixel_points[:, 2] + label.intrinsics.cx
        np.testing.assert_allclose(u, label.pixels[:, 0], atol=1e-3)
    # Shards of four, and one of what was left.
    tables = [pq.read_table(path) for path in sorted(labels.glob("*.parquet"))]
    assert [len(table) for table in tables] == [4, 4, 4, 2]
    assert all(table.schema.equals(arrow_schema()) for table in tables)


def test_an_image_without_objects_has_a_label_too(tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["empty.jpg", "full.jpg"])
    tally = cheap_run(tmp_path / "images", tmp_path / "labels", Quadrants()).run(ALONE)
    assert (tally.labelled, tally.objects) == (2, 2)
    found = {label.image_id: label for label in LabelStore(tmp_path / "labels")}
    assert found["empty.jpg"].objects == ()
    assert len(found["empty.jpg"].pixels) == 64
    assert len(found["full.jpg"].objects) == 2


def test_a_name_that_is_no_text_costs_its_own_image_alone(tmp_path: Path) -> None:
    latin = os.fsdecode("caf\u00e9.jpg".encode("latin-1"))
    write_images(tmp_path / "images", ["a.jpg", latin, "z.jpg"])
    detector = Quadrants()
    tally = cheap_run(tmp_path / "images", tmp_path / "labels", detector).run(ALONE)
    assert (tally.labelled, tally.failed) == (2, 1)
    assert {label.image_id for label in LabelStore(tmp_path / "labels")} == {"a.jpg", "z.jpg"}
    assert sorted(detector.seen) == ["a.jpg", "z.jpg"]
    (failure,) = LabelFolder(tmp_path / "labels").failures().values()
    assert (failure.image_id, failure.step) == (latin, "read")
    assert cheap_run(tmp_path / "images", tmp_path / "labels", Quadrants()).run(ALONE).images == 0


def test_detections_that_become_no_object_are_kept_in_mind(images: Path, tmp_path: Path) -> None:
    """The second box is larger; the filter lets only its mask pass."""
    first, second = (np.pi / 4 * 80 * 60 * share for share in (0.4 * 0.4, 0.5 * 0.45))
    keep = ObjectFilter(min_mask_pixels=round((first + second) / 2), keep_masks=False)
    tally = cheap_run(images, tmp_path, Quadrants(), objects=keep, limit=2).run(ALONE)
    assert (tally.objects, tally.dropped) == (2, 2)
    for label in LabelStore(tmp_path, masks=True):
        assert [item.name for item in label.objects] == ["plate"]
        assert label.objects[0].mask.size == 0
        assert label.provenance[DROPPED].startswith("cup: Its mask has fewer than")
    assert (
        cheap_run(images, tmp_path / "strict", Quadrants(), objects=ObjectFilter(min_mask_score=0.95), limit=2)
        .run(ALONE)
        .dropped
        == 4
    )


def test_a_second_run_does_only_what_is_new(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    write_images(folder, NAMES[:5])
    cheap_run(folder, tmp_path / "labels", Quadrants()).run(ALONE)
    write_images(folder, NAMES[:8])
    detector = Quadrants()
    tally = cheap_run(folder, tmp_path / "labels", detector).run(ALONE)
    assert (tally.images, tally.labelled) == (3, 3)
    assert sorted(detector.seen) == NAMES[5:8]
    assert contents(tmp_path / "labels").keys() == set(NAMES[:8])
    detector = Quadrants()
    assert cheap_run(folder, tmp_path / "labels", detector).run(ALONE).images == 0
    assert detector.seen == []


def test_other_images_of_the_same_names_are_not_taken_as_labelled(tmp_path: Path) -> None:
    write_images(tmp_path / "monday", NAMES[:4])
    write_images(tmp_path / "tuesday", ["another.jpg", *NAMES[:4]])
    cheap_run(tmp_path / "monday", tmp_path / "labels", Quadrants()).run(ALONE)
    detector = Quadrants()
    with pytest.raises(DataError, match=r"(?s)same names.*4 of the 4.*another folder"):
        cheap_run(tmp_path / "tuesday", tmp_path / "labels", detector).run(ALONE)
    assert detector.seen == []
    # One that was changed, or encoded anew by another version of a library, is no other folder.
    (tmp_path / "monday" / NAMES[0]).write_bytes((tmp_path / "tuesday" / NAMES[0]).read_bytes())
    assert cheap_run(tmp_path / "monday", tmp_path / "labels", Quadrants()).run(ALONE).images == 0


def test_a_run_without_images_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)limit.*at least 1"):
        cheap_run(images, tmp_path, Quadrants(), limit=0)


def test_a_limited_run_does_the_first_images(images: Path, tmp_path: Path) -> None:
    for _ in range(2):
        cheap_run(images, tmp_path, Quadrants(), limit=3).run(ALONE)
        assert contents(tmp_path).keys() == set(NAMES[:3])


def test_what_fails_is_recorded_and_tried_again_on_request(tmp_path: Path, labels: Path) -> None:
    folder = tmp_path / "images"
    write_images(folder, [*NAMES[:4], "no masks.jpg", "no points.jpg", "silent.jpg", "surprise.jpg"])
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    trouble = {"silent": DataError("nobody answers"), "surprise": ValueError("out of range")}
    detector = Quadrants(trouble)
    tally = cheap_run(folder, tmp_path / "labels", detector).run(ALONE)
    assert (tally.labelled, tally.failed) == (4, 5)
    failures = LabelFolder(tmp_path / "labels").failures()
    assert {name: failure.step for name, failure in failures.items()} == {
        "broken.jpg": "read",
        "silent.jpg": "detect",
        "surprise.jpg": "detect",
        "no masks.jpg": "segment",
        "no points.jpg": "geometry",
    }
    assert failures["surprise.jpg"].reason == "ValueError: out of range"
    assert "spoils its batch" in failures["no masks.jpg"].reason
    # The others of their batches have the labels that they have without them.
    expected = contents(labels)
    assert contents(tmp_path / "labels") == {name: expected[name] for name in NAMES[:4]}

    tally = cheap_run(folder, tmp_path / "labels", Quadrants()).run(ALONE)
    assert (tally.images, tally.skipped) == (0, 5)
    detector = Quadrants()
    tally = cheap_run(folder, tmp_path / "labels", detector).run(ALONE, retry_failed=True)
    assert (tally.labelled, tally.failed, tally.skipped) == (2, 3, 0)
    # A detector with a memory is told which of its answers were no use.
    assert sorted(detector.forgotten) == ["no masks.jpg", "no points.jpg", "silent.jpg", "surprise.jpg"]
    assert LabelFolder(tmp_path / "labels").failures().keys() == {"broken.jpg", "no masks.jpg", "no points.jpg"}
    assert {"silent.jpg", "surprise.jpg"} < contents(tmp_path / "labels").keys()


def test_what_no_image_would_escape_ends_the_run_and_keeps_what_is_done(images: Path, tmp_path: Path) -> None:
    run = cheap_run(images, tmp_path, Quadrants({"07": ConfigError("the key is not accepted")}))
    with pytest.raises(ConfigError, match="key is not accepted"):
        run.run(ALONE)
    done = contents(tmp_path)
    assert LabelFolder(tmp_path).failures() == {}
    assert "07.jpg" not in done
    cheap_run(images, tmp_path, Quadrants()).run(ALONE)
    assert contents(tmp_path).keys() == set(NAMES)


def test_our_own_mistakes_are_not_called_failures(images: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="oops"):
        cheap_run(images, tmp_path, Quadrants({"07": TypeError("oops")})).run(ALONE)
    assert LabelFolder(tmp_path).failures() == {}


def test_a_run_ends_when_everything_fails(images: Path, tmp_path: Path) -> None:
    run = cheap_run(images, tmp_path, Quadrants({"": DataError("nobody answers")}), max_failures_in_a_row=6)
    with pytest.raises(DataError, match=r"(?s)6 images failed one after another.*nobody answers.*--retry_failed"):
        run.run(ALONE)
    assert 6 <= len(LabelFolder(tmp_path).failures()) < len(NAMES)


def test_labels_made_in_another_way_are_not_mixed_in(images: Path, tmp_path: Path) -> None:
    cheap_run(images, tmp_path, Quadrants(), limit=2).run(ALONE)

    class Others(Quadrants):
        version = "others"

    with pytest.raises(DataError, match=r"(?s)another way.*quadrants.*others"):
        cheap_run(images, tmp_path, Others()).run(ALONE)


def test_a_run_on_eight_is_finished_on_three(images: Path, labels: Path, tmp_path: Path) -> None:
    shares = []
    for rank in range(5):
        detector = Quadrants()
        cheap_run(images, tmp_path, detector).run(WorkSplit(rank, 8))
        shares.append(set(detector.seen))
    for rank in range(3):
        detector = Quadrants()
        cheap_run(images, tmp_path, detector).run(WorkSplit(rank, 3))
        shares.append(set(detector.seen))
    # No image was done twice, and all were; `contents` refuses doubles on disk.
    assert sum(map(len, shares)) == len(NAMES)
    assert set.union(*shares) == set(NAMES)
    assert sum(map(bool, shares)) >= 4
    assert contents(tmp_path) == contents(labels)


def test_unfinished_lines_and_files_of_killed_processes_do_no_harm(images: Path, tmp_path: Path) -> None:
    failure = {"image_id": "03.jpg", "step": "detect", "reason": "nobody answers"}
    (tmp_path / "failures-0000.jsonl").write_text(json.dumps(failure) + '\n{"image_id": "04.j')
    for name in (".labels-0000-00000.images.123.tmp", ".labels-0005-00000.parquet.9.tmp"):
        (tmp_path / name).write_bytes(b"half")
    # An image file whose shard was never named: as if killed between the two.
    (tmp_path / "labels-0000-00000.images").write_bytes(b"half")
    tally = cheap_run(images, tmp_path, Quadrants({"05": DataError("again")})).run(ALONE)
    assert tally.labelled == len(NAMES) - 2
    assert LabelFolder(tmp_path).failures().keys() == {"03.jpg", "05.jpg"}
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))
    store = LabelStore(tmp_path)
    assert all(store.read(index)[1].shape == (60, 80, 3) for index in range(len(store)))


def test_a_broken_shard_and_a_broken_failure_are_named(images: Path, tmp_path: Path) -> None:
    (tmp_path / "failures-0000.jsonl").write_text("nonsense\n")
    with pytest.raises(DataError, match=r"failures-0000.jsonl, line 1"):
        LabelFolder(tmp_path).failures()
    (tmp_path / "labels-0000-00000.parquet").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"(?s)labels-0000-00000.parquet.*delete it"):
        LabelFolder(tmp_path).done()


def test_progress_is_told(images: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    def note(tally: Tally) -> None:
        told.append((tally.labelled, tally.images))

    cheap_run(images, tmp_path, Quadrants()).run(ALONE, progress=note)
    assert told == [(done, len(NAMES)) for done in range(len(NAMES) + 1)]
