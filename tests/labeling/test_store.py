"""Label shards: what is written is read, by us and by plain pyarrow; unfinished and foreign files are refused."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg

from spear_lightning.errors import DataError
from spear_lightning.labeling.demo_labels import demo_label, write_demo_labels
from spear_lightning.labeling.records import ImageLabel, ObjectLabel
from spear_lightning.labeling.store import LabelStore, LabelWriter

IMAGES = 70


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    write_demo_labels(folder, IMAGES, shard_size=66)
    return folder


def assert_same(
    found: ObjectLabel | ImageLabel, expected: ObjectLabel | ImageLabel, but: tuple[str, ...] = ()
) -> None:
    for field in fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "objects":
            assert len(one) == len(other)
            for pair in zip(one, other, strict=True):
                assert_same(*pair, but)
        elif field.name not in but and isinstance(other, np.ndarray):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype
        elif field.name not in but and isinstance(other, float):
            assert one == pytest.approx(other, rel=1e-6, nan_ok=True)
        elif field.name not in but:
            assert one == other


def test_labels_and_images_come_back(folder: Path) -> None:
    store = LabelStore(folder, masks=True, cached_groups=1)
    assert len(store) == IMAGES
    for index in (69, 0, 65, 66, 64, 3):
        expected, image_HW3 = demo_label(index)
        label, pixels = store.read(index)
        assert_same(label, expected)
        # What was encoded, byte for byte, and so the same pixels up to JPEG.
        encoded = store.encoded_image(index)
        np.testing.assert_array_equal(pixels, simplejpeg.decode_jpeg(encoded))
        assert np.abs(pixels.astype(int) - image_HW3).mean() < 3
    assert [label.image_id for label in store] == [f"demo-{number:06d}" for number in range(IMAGES)]
    with pytest.raises(IndexError):
        store[IMAGES]


def test_without_masks_only_masks_are_missing(folder: Path) -> None:
    label = LabelStore(folder)[5]
    assert_same(label, demo_label(5)[0], but=("mask",))
    assert all(item.mask.size == 0 for item in label.objects)


def test_labels_of_every_kind_come_back_side_by_side(tmp_path: Path) -> None:
    first, second = demo_label(0)[0], demo_label(1)[0]
    written = [
        replace(first, intrinsics=None, provenance={}),
        replace(second, objects=(), pixels=second.pixels[:0], pixel_points=second.pixel_points[:0]),
        replace(second, unit="scale_free", provenance={"box": "a", "detector": "b"}),
        replace(first, objects=first.objects[1:], pixels=first.pixels[:3], pixel_points=first.pixel_points[:3]),
    ]
    image = simplejpeg.encode_jpeg(demo_label(0)[1])
    with LabelWriter(tmp_path) as writer:
        for label in written:
            writer.add(label, image)
    store = LabelStore(tmp_path, masks=True)
    for index in (3, 1, 0, 2, 0):
        assert_same(store[index], written[index])


def test_lists_of_a_wrong_length_and_wrong_labels_are_refused_again_and_again(tmp_path: Path) -> None:
    write_demo_labels(tmp_path, 2)
    path = tmp_path / "labels-00000.parquet"
    table = pq.read_table(path)
    for field, values, message in (
        ("vertices", [0.0, 0.0, 1.0], r"(?s)cannot be read.*3 numbers instead of 24"),
        ("extents", [1.0, -1.0, 1.0], r"(?s)extent is negative.*demo-000001"),
    ):
        rows = table.to_pylist()
        rows[1]["objects"][0][field] = values
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
        store = LabelStore(tmp_path)
        for _ in range(2):
            with pytest.raises(DataError, match=message):
                store[1]


def test_the_store_travels_to_workers(folder: Path) -> None:
    store = LabelStore(folder)
    store.read(3)
    copy = pickle.loads(pickle.dumps(store))
    assert_same(copy[3], store[3])
    assert copy.fingerprint() == store.fingerprint()
    assert len(pickle.dumps(store)) < 10_000


def test_the_file_is_plain_parquet_as_documented(folder: Path) -> None:
    file = pq.ParquetFile(folder / "labels-00000.parquet")
    assert file.schema_arrow.metadata[b"spear_labels_schema"] == b"1"
    row = file.read_row_group(0).to_pylist()[2]
    expected, _ = demo_label(2)
    assert row["unit"] == "metric"
    assert [item["name"] for item in row["objects"]] == [item.name for item in expected.objects]
    np.testing.assert_array_equal(np.reshape(row["objects"][0]["vertices"], (8, 3)), expected.objects[0].vertices)
    data = (folder / row["image_file"]).read_bytes()[row["image_offset"] :][: row["image_bytes"]]
    assert hashlib.sha256(data).hexdigest() == row["image_sha256"]


def test_images_in_place(folder: Path, tmp_path: Path) -> None:
    label, image_HW3 = demo_label(7)
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    (photographs / "a.jpg").write_bytes(simplejpeg.encode_jpeg(image_HW3))
    with LabelWriter(tmp_path / "labels") as writer:
        writer.add_in_place(label, photographs / "a.jpg")
        with pytest.raises(DataError, match="cannot be read"):
            writer.add_in_place(label, photographs / "b.jpg")
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == ["labels-00000.parquet"]
    found, pixels = LabelStore(tmp_path / "labels").read(0)
    assert found.image_id == "demo-000007"
    assert pixels.shape == image_HW3.shape
    with pytest.raises(DataError, match="exists already"), LabelWriter(tmp_path / "labels") as writer:
        writer.add_in_place(label, photographs / "a.jpg")
    (photographs / "a.jpg").unlink()
    with pytest.raises(DataError, match="images of labels cannot be read"):
        LabelStore(tmp_path / "labels").read(0)


def test_an_interrupted_shard_leaves_nothing_and_a_written_one_stays(tmp_path: Path) -> None:
    image = simplejpeg.encode_jpeg(demo_label(0)[1])
    label = demo_label(4)[0]
    nameless = replace(label, objects=(replace(label.objects[0], name=""),))

    def write() -> None:
        with LabelWriter(tmp_path, shard_size=2) as writer:
            for label in (*(demo_label(seed)[0] for seed in range(3)), nameless):
                writer.add(label, image)

    with pytest.raises(DataError, match="no name"):
        write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels-00000.images", "labels-00000.parquet"]
    assert len(LabelStore(tmp_path)) == 2
    with pytest.raises(DataError, match="exists already"), LabelWriter(tmp_path) as writer:
        writer.add(demo_label(0)[0], image)
    with LabelWriter(tmp_path, prefix="second") as writer:
        writer.add(demo_label(9)[0], image)
    assert [label.image_id for label in LabelStore(tmp_path)][-1] == "demo-000009"


def test_two_writings_are_byte_identical(folder: Path, tmp_path: Path) -> None:
    write_demo_labels(tmp_path, IMAGES, shard_size=66)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_foreign_broken_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There are no labels"):
        LabelStore(tmp_path)
    write_demo_labels(tmp_path, 3)
    path = tmp_path / "labels-00000.parquet"
    whole = path.read_bytes()
    table = pq.read_table(path)
    for metadata, message in (({b"spear_labels_schema": b"99"}, "found: 99"), (None, "no version")):
        pq.write_table(table.replace_schema_metadata(metadata), path)
        with pytest.raises(DataError, match=rf"(?s)unknown schema version.*{message}"):
            LabelStore(tmp_path)
    pq.write_table(table.drop_columns(["unit"]), path)
    with pytest.raises(DataError, match="no unit"):
        LabelStore(tmp_path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        LabelStore(tmp_path)
    path.write_bytes(whole)
    images = tmp_path / "labels-00000.images"
    images.write_bytes(images.read_bytes()[:-100])
    store = LabelStore(tmp_path)
    store.read(0)
    with pytest.raises(DataError, match="too short"):
        store.read(2)


def test_an_image_of_another_size_is_refused(tmp_path: Path) -> None:
    label, _ = demo_label(0)
    with LabelWriter(tmp_path) as writer:
        writer.add(label, simplejpeg.encode_jpeg(demo_label(0, 210, 280)[1]))
    with pytest.raises(DataError, match=r"(?s)another size.*demo-000000.*280 x 210.*140 x 105"):
        LabelStore(tmp_path).read(0)
