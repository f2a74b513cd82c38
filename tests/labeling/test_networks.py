"""SAM 2, Grounding DINO and OWLv2 against transformers' own way of using them, with the same random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_networks import small_grounding_dino, small_owlv2, small_sam2

from spear_lightning.errors import CheckpointError, ConfigError
from spear_lightning.labeling.detections import Detections
from spear_lightning.labeling.detector import Picture
from spear_lightning.labeling.local_detectors import GroundingDino, LocalDetector, Owlv2
from spear_lightning.labeling.sam2 import Sam2
from spear_lightning.labeling.segmenter import Masks

NAMES = ["red cup", "drawer", "Bread"]


@pytest.fixture(scope="module")
def pictures(shared_data: Path) -> list[Picture]:
    """Three photographs of three sizes."""
    names = ("02_Office.jpg", "bridge_sink.png", "open_drawer_a1.png")
    images = [Image.open(shared_data / "photographs" / name).convert("RGB") for name in names]
    return [Picture(name, b"", np.asarray(image)) for name, image in zip(names, images, strict=True)]


@pytest.fixture(scope="module")
def sam2(tmp_path_factory: pytest.TempPathFactory) -> Sam2:
    made = Sam2(str(small_sam2(tmp_path_factory.mktemp("sam2"))))
    made.prepare()
    return made


def boxes(*rows: list[float]) -> Detections:
    return Detections(np.array(rows, np.float32), ("thing",) * len(rows), np.ones(len(rows), np.float32))


def masks_of(sam2: Sam2, pictures: list[Picture], found: list[Detections]) -> list[Masks]:
    results = sam2.segment(pictures, found)
    assert all(isinstance(result, Masks) for result in results)
    return [result for result in results if isinstance(result, Masks)]


def test_sam2_is_transformers_sam2(sam2: Sam2) -> None:
    """A picture of the network's own size needs no resizing, so that the masks must be the same to the bit."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (128, 128, 3), np.uint8)
    found = boxes([10, 20, 90, 100], [40, 5, 60, 120])
    (ours,) = masks_of(sam2, [Picture("a", b"", image)], [found])
    mean, spread = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((torch.from_numpy(image) / 255 - mean) / spread).permute(2, 0, 1)[None]
    with torch.no_grad():
        outputs = sam2._network(pixels, input_boxes=torch.from_numpy(found.boxes_N4)[None], multimask_output=False)
    logits = torch.nn.functional.interpolate(outputs.pred_masks[0], (128, 128), mode="bilinear")
    np.testing.assert_array_equal(ours.masks_NHW, logits[:, 0].numpy() > 0)
    np.testing.assert_allclose(ours.scores_N, outputs.iou_scores[0, :, 0].numpy().clip(0, 1), atol=1e-6)
    # The weights are random, but not so that any picture and box have the same mask.
    assert 0.05 < ours.masks_NHW.mean() < 0.95
    assert (ours.masks_NHW[0] != ours.masks_NHW[1]).any()


def test_sam2_stretches_pictures_and_boxes_alike(sam2: Sam2) -> None:
    """Twice as wide and half as high, pixel for pixel: the network sees nearly the same picture and box."""
    # Smooth, or halving would lose something.
    v, u = np.mgrid[0:128, 0:128] / 128
    smooth = np.stack([np.sin(5 * u), np.cos(4 * v), u * v], -1) * 100 + 120
    image = smooth.astype(np.uint8)
    wide = np.repeat(image, 2, axis=1)[::2]
    (square,) = masks_of(sam2, [Picture("a", b"", image)], [boxes([32, 40, 96, 100])])
    (stretched,) = masks_of(sam2, [Picture("b", b"", wide)], [boxes([64, 20, 192, 50])])
    assert stretched.masks_NHW.shape == (1, 64, 256)
    assert (stretched.masks_NHW[:, :, ::2] == square.masks_NHW[:, ::2]).mean() > 0.97


def test_sam2_prepares_as_pillow_resizes(sam2: Sam2, pictures: list[Picture]) -> None:
    for picture in pictures:
        resized = Image.fromarray(picture.pixels_HW3).resize((128, 128), Image.Resampling.BILINEAR)
        expected = (np.asarray(resized) / 255 - Sam2.MEAN) / Sam2.SPREAD
        found = sam2._prepared(picture.pixels_HW3)[0].permute(1, 2, 0).numpy()
        # Pillow rounds to whole levels in between.
        np.testing.assert_allclose(found, expected, atol=2.5 / 255 / 0.224)


def test_sam2_batches_change_nothing(sam2: Sam2, pictures: list[Picture]) -> None:
    found = [
        boxes([50, 60, 300, 400]),
        boxes([100, 100, 300, 300], [5, 5, 60, 60], [0, 0, 639, 470]),
        boxes([20, 20, 90, 90], [200, 100, 300, 250]),
    ]
    together = masks_of(sam2, pictures, found)
    for picture, detections, masks in zip(pictures, found, together, strict=True):
        (alone,) = masks_of(sam2, [picture], [detections])
        assert masks.masks_NHW.shape == (len(detections), *picture.pixels_HW3.shape[:2])
        assert (alone.masks_NHW == masks.masks_NHW).mean() > 0.999
        np.testing.assert_allclose(alone.scores_N, masks.scores_N, atol=1e-4)


def detect(detector: LocalDetector, pictures: list[Picture]) -> list[Detections]:
    results = detector.detect(pictures)
    assert all(isinstance(result, Detections) for result in results)
    return [result for result in results if isinstance(result, Detections)]


def test_grounding_dino_is_transformers_grounding_dino(
    pictures: list[Picture], tmp_path_factory: pytest.TempPathFactory
) -> None:
    weights = small_grounding_dino(tmp_path_factory.mktemp("grounding_dino"))
    detector = GroundingDino(NAMES, str(weights), min_score=0.5)
    detector.prepare()
    found = detect(detector, pictures)
    processor, network = detector._processor, detector._network
    for picture, ours in zip(pictures, found, strict=True):
        inputs = processor(images=picture.pixels_HW3, text=[["red cup", "drawer", "bread"]], return_tensors="pt")
        with torch.no_grad():
            outputs = network(**inputs)
        size = picture.pixels_HW3.shape[:2]
        (theirs,) = processor.post_process_grounded_object_detection(
            outputs, threshold=0.5, text_threshold=0.5, target_sizes=[size]
        )
        assert len(ours) > 3
        np.testing.assert_allclose(ours.scores_N, theirs["scores"], atol=1e-4)
        np.testing.assert_allclose(ours.boxes_N4, theirs["boxes"], atol=0.05)
        # Each word is one token here; a name fits as well as its best word.
        words = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
        kept = outputs.logits[0].sigmoid()
        kept = kept[kept.amax(-1) > 0.5][:, : len(words)].numpy()
        fit = {word: kept[:, words.index(word)] for word in ("red", "cup", "drawer", "bread")}
        by_name = np.stack([np.maximum(fit["red"], fit["cup"]), fit["drawer"], fit["bread"]])
        assert list(ours.names) == [["red cup", "drawer", "bread"][row] for row in by_name.argmax(0)]
    assert len({name for ours in found for name in ours.names}) > 1
    with pytest.raises(ConfigError, match=r"(?s)too many names.*OWLv2"):
        GroundingDino([f"drawer {letter}" for letter in "abcdefghijklmnop"], str(weights)).prepare()
    with pytest.raises(ConfigError, match=r"(?s)reads nothing.*u0301"):
        GroundingDino(["cup", "\u0301"], str(weights)).prepare()


def test_owlv2_is_transformers_owlv2(pictures: list[Picture], tmp_path_factory: pytest.TempPathFactory) -> None:
    detector = Owlv2(NAMES, str(small_owlv2(tmp_path_factory.mktemp("owlv2"))), min_score=0.3)
    detector.prepare()
    found = detect(detector, pictures[1:])
    processor = detector._processor
    for picture, ours in zip(pictures[1:], found, strict=True):
        text = ["a photo of a red cup", "a photo of a drawer", "a photo of a bread"]
        inputs = processor(images=picture.pixels_HW3, text=[text], return_tensors="pt")
        with torch.no_grad():
            outputs = detector._network(**inputs)
        (theirs,) = processor.post_process_grounded_object_detection(
            outputs, threshold=0.3, target_sizes=[picture.pixels_HW3.shape[:2]], text_labels=[NAMES]
        )
        assert len(ours) > 3
        np.testing.assert_allclose(ours.scores_N, theirs["scores"], atol=1e-4)
        np.testing.assert_allclose(ours.boxes_N4, theirs["boxes"], atol=0.05)
        assert list(ours.names) == [name.lower() for name in theirs["text_labels"]]


def test_names_that_owlv2_has_no_room_for_are_refused(tmp_path: Path) -> None:
    weights = str(small_owlv2(tmp_path))
    with pytest.raises(ConfigError, match=r"(?s)too long.*nobody.*at most \d+ tokens"):
        Owlv2(["cup", "a very long name of some thing that nobody calls so"], weights).prepare()


def test_missing_weights_and_names_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to look for"):
        Owlv2([" ", "the "])
    for part in (Owlv2(["cup"], str(tmp_path)), GroundingDino(["cup"], str(tmp_path)), Sam2(str(tmp_path))):
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            part.prepare()
