"""The report is a page of its own: it parses, asks for nothing from elsewhere, and shows what the labels say."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from spear_lightning.labeling.assembly import DROPPED
from spear_lightning.labeling.demo_labels import demo_label
from spear_lightning.labeling.label_folder import ImageFailure, LabelFolder
from spear_lightning.labeling.report import histogram, write_report
from spear_lightning.labeling.report_pictures import EDGES, draw_from_above, draw_label
from spear_lightning.labeling.run_lengths import decode_mask

VOID = {"meta", "img", "line", "rect", "path", "polygon", "br"}


class Page(HTMLParser):
    """Collects what a page is made of, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.count: dict[str, int] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def write_labels(folder: Path) -> None:
    with LabelFolder(folder) as labels:
        for seed in range(6):
            label, image_HW3 = demo_label(seed)
            objects = (replace(label.objects[0], name="<b>sly</b> box"), *label.objects[1:])
            made = {"geometry": "exact"} | ({DROPPED: "lid: An object has too few points"} if seed == 2 else {})
            label = replace(label, objects=objects if seed == 0 else label.objects, provenance=made)
            labels.add(label, simplejpeg.encode_jpeg(np.ascontiguousarray(image_HW3)))
        labels.add_failure(ImageFailure("gone.jpg", "read", "An image cannot be read\n  where: there"))


def test_the_page_holds_what_it_must(tmp_path: Path) -> None:
    write_labels(tmp_path)
    path = write_report(tmp_path, tmp_path / "pages" / "report.html", images=4, width=280)
    text = path.read_text()
    page = Page(text)
    assert page.open == []
    # Nothing from elsewhere, and nothing that runs.
    assert page.count.keys().isdisjoint({"script", "link", "iframe", "object"})
    sources = [value for _, name, value in page.attributes if name in ("src", "href")]
    assert all(value.startswith("data:image/jpeg;base64,") for value in sources)
    assert len(sources) == page.count["img"] == 4
    for source in sources:
        assert Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).size == (280, 210)
    words = " ".join(page.text)
    for expected in ("4 of 6 labels", "Depth / median depth", "Longest edge / distance", "red box", "from above"):
        assert expected in words
    assert "An image cannot be read" in words
    assert "An object has too few points" in words
    # Histograms count every object once.
    objects = sum(len(demo_label(seed)[0].objects) for seed in range(6))
    titles = [data for data in page.text if ": " in data and " to " in data]
    assert sum(int(title.rpartition(": ")[2]) for title in titles) % objects in (0, 6)
    write_report(tmp_path, tmp_path / "all.html", images=100)
    words = " ".join(Page((tmp_path / "all.html").read_text()).text)
    assert "6 of 6 labels" in words
    assert "<b>sly</b> box" in words
    assert "<b>sly" not in (tmp_path / "all.html").read_text()


def test_lengths_of_unknown_scale_keep_their_digits(tmp_path: Path) -> None:
    label, image_HW3 = demo_label(0)
    extents = np.array([0.0051234, 0.002, 0.0098765], np.float32)
    small = replace(label.objects[0], distance=0.021749, extents=extents)
    for unit in ("scale_free", "metric"):
        with LabelFolder(tmp_path / unit) as labels:
            one = replace(label, unit=unit, objects=(small,))
            labels.add(one, simplejpeg.encode_jpeg(np.ascontiguousarray(image_HW3)))
        words = " ".join(Page(write_report(tmp_path / unit, tmp_path / f"{unit}.html").read_text()).text)
        expected = {
            "scale_free": ("0.0217", "0.00512 \u00d7 0.00200 \u00d7 0.00988"),
            "metric": ("0.022", "0.005 \u00d7 0.002 \u00d7 0.010"),
        }
        assert all(part in words for part in expected[unit])


def test_what_there_is_none_of_and_one_of_is_said(tmp_path: Path) -> None:
    label, image_HW3 = demo_label(0)
    with LabelFolder(tmp_path) as labels:
        labels.add(replace(label, objects=()), simplejpeg.encode_jpeg(np.ascontiguousarray(image_HW3)))
        labels.add_failure(ImageFailure("gone.jpg", "read", "An image cannot be read"))
    page = Page(write_report(tmp_path, tmp_path / "report.html").read_text())
    words = " ".join(page.text)
    for expected in ("There are no objects.", "No objects.", "1 image without a label"):
        assert expected in words
    assert page.open == []
    assert page.count.keys().isdisjoint({"svg"})


def test_boxes_from_above_lie_as_they_do_on_the_ground() -> None:
    label, _ = demo_label(3)
    figure = Page(draw_from_above(label, 200))
    corners = [
        np.array([pair.split(",") for pair in value.split()], float)
        for _, name, value in figure.attributes
        if name == "points"
    ]
    assert len(corners) == len(label.objects)
    drawn = np.concatenate(corners)
    assert drawn.min() > 0
    assert drawn.max() < 200
    # One scale for both directions, z upwards.
    true = np.array([item.vertices[:, [0, 2]].max(0) for item in label.objects])
    seen = np.array([[points[:, 0].max(), -points[:, 1].min()] for points in corners])
    scale = np.ptp(seen, axis=0) / np.ptp(true, axis=0)
    np.testing.assert_allclose(scale[0], scale[1], rtol=0.02)
    np.testing.assert_allclose(np.diff(seen, axis=0), scale[0] * np.diff(true, axis=0), atol=0.5)


def test_boxes_and_masks_are_drawn_where_they_are() -> None:
    label, image_HW3 = demo_label(3, 210, 280)
    drawn = np.asarray(Image.open(io.BytesIO(draw_label(label, image_HW3, 280)))).astype(int)
    changed = np.abs(drawn - image_HW3.astype(int)).max(-1) > 25
    masks = np.stack([decode_mask(item.mask, 210, 280) for item in label.objects])
    assert changed[masks.any(0)].mean() > 0.95
    # Of the rest, only lines and numbers: and those lie at the boxes.
    assert changed[~masks.any(0)].mean() < 0.1
    with_camera = changed.sum()
    without = draw_label(replace(label, intrinsics=None), image_HW3, 280)
    other = np.abs(np.asarray(Image.open(io.BytesIO(without))).astype(int) - image_HW3.astype(int)).max(-1) > 25
    assert other.sum() != with_camera


def test_a_box_has_twelve_edges() -> None:
    assert len(set(EDGES)) == 12
    assert {bin(a ^ b).count("1") for a, b in EDGES} == {1}


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [0.0], [1e-9, 5.0, np.nan, np.inf]])
def test_histograms_of_odd_values(values: list[float]) -> None:
    figure = histogram("Odd", np.array(values))
    Page(figure)
    counts = [int(text.rpartition(": ")[2]) for text in Page(figure).text if " to " in text]
    assert sum(counts) == np.isfinite(values).sum()
    assert histogram("Empty", np.array([np.nan])) == ""
