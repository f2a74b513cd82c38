"""`spear label` as a person calls it: shipped configurations, real photographs, several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from cheap_parts import Quadrants, cheap_run, contents, write_images
from PIL import Image
from small_networks import small_grounding_dino, small_owlv2, small_sam2

from spear_lightning import cli
from spear_lightning.labeling.run_lengths import decode_mask
from spear_lightning.labeling.store import LabelStore
from spear_lightning.labeling.work_split import ALONE

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "labeling"
HERE = Path(__file__).parent


@pytest.mark.parametrize("experiment", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_the_command_line_accepts_what_ships(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["label", f"--config={experiment}", "--print_config"])
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)

    def survives(given: object, kept: object) -> None:
        if isinstance(given, dict):
            assert isinstance(kept, dict)
            for key, value in given.items():
                survives(value, kept[key])
        else:
            assert kept == given

    survives(yaml.safe_load(experiment.read_text()), printed)


def test_images_is_short_for_a_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        cli.main(["label", "--images", str(tmp_path), "--names", "red cup", "box", "--out=x", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["source"]["init_args"]["folder"] == str(tmp_path)
    assert printed["detector"]["init_args"]["names"] == ["red cup", "box"]
    assert printed["out"] == "x"
    assert printed["geometry"]["init_args"]["network"]["class_path"] == "spear_lightning.models.MogeV2"


def test_names_without_images_are_not_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    experiment = FOLDER / "egoexo4d.yaml"
    assert cli.main(["label", f"--config={experiment}", "--names", "red cup", "box", "--print_config"]) == 1
    message = capsys.readouterr().err
    assert "--images" in message
    assert """--detector.names='["red cup", "box"]'""" in message


@pytest.mark.parametrize(
    ("class_path", "make"),
    [
        ("spear_lightning.labeling.local_detectors.GroundingDino", small_grounding_dino),
        ("spear_lightning.labeling.local_detectors.Owlv2", small_owlv2),
    ],
)
def test_real_photographs_from_end_to_end(
    class_path: str, make: Callable[[Path], Path], shared_data: Path, tmp_path: Path
) -> None:
    """Random weights find nonsense, but it must come out as labels that readers accept."""
    photographs = shared_data / "photographs"
    (tmp_path / "images").mkdir()
    names = {path.name for path in photographs.iterdir()}
    for name in names:
        # A quarter as wide: fitting boxes to all their pixels takes minutes.
        image = Image.open(photographs / name).convert("RGB")
        image.reduce(4).save(tmp_path / "images" / name)
    config = {
        "out": str(tmp_path / "labels"),
        "source": {
            "class_path": "spear_lightning.labeling.sources.ImageFolder",
            "init_args": {"folder": str(tmp_path / "images")},
        },
        "detector": {
            "class_path": class_path,
            "init_args": {"names": ["red cup", "drawer"], "weights": str(make(tmp_path / "detector"))},
        },
        "segmenter": {
            "class_path": "spear_lightning.labeling.sam2.Sam2",
            "init_args": {"weights": str(small_sam2(tmp_path / "sam2")), "batch_size": 3},
        },
        "geometry": {"class_path": "cheap_parts.Relief"},
        "detections": {"max_objects": 2},
        "boxes": {"max_points": 500},
        "box_processes": 0,
    }
    path = tmp_path / "photographs.yaml"
    path.write_text(yaml.safe_dump(config))
    assert cli.main(["label", f"--config={path}", "--device=cpu"]) == 0
    store = LabelStore(tmp_path / "labels", masks=True)
    assert {label.image_id for label in store} == names
    objects = 0
    for index in range(len(store)):
        label, image_HW3 = store.read(index)
        assert image_HW3.shape[:2] == (label.height, label.width)
        for item in label.objects:
            assert item.name in ("red cup", "drawer")
            assert decode_mask(item.mask, label.height, label.width).any()
        objects += len(label.objects)
    assert objects > len(names)
    assert cli.main(["label", "report", str(tmp_path / "labels")]) == 0


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path: Path) -> None:
    """As a launcher starts them: two processes of the command, with RANK and WORLD_SIZE set."""
    names = [f"{number:02d}.jpg" for number in range(10)]
    write_images(tmp_path / "images", names)
    config = {
        "out": str(tmp_path / "labels"),
        "source": {
            "class_path": "spear_lightning.labeling.sources.ImageFolder",
            "init_args": {"folder": str(tmp_path / "images"), "name": "pictures"},
        },
        "detector": {"class_path": "cheap_parts.Quadrants"},
        "segmenter": {"class_path": "cheap_parts.Ellipses"},
        "geometry": {"class_path": "cheap_parts.Relief"},
        "boxes": {"min_points": 16, "max_points": 500},
        "box_processes": 0,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "spear_lightning.cli", "label", f"--config={tmp_path / 'run.yaml'}"]
    processes = []
    for rank in range(2):
        environment = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "PYTHONPATH": str(HERE)}
        processes.append(
            subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
        )
    printed = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    # The line may be broken anywhere: it begins with a path.
    assert "process1of2" in "".join(printed[1].split())
    cheap_run(tmp_path / "images", tmp_path / "alone", Quadrants()).run(ALONE)
    assert contents(tmp_path / "labels") == contents(tmp_path / "alone")
    shares = {path.name[:11]: None for path in (tmp_path / "labels").glob("*.parquet")}
    assert len(shares) == 2


def test_statistics_are_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "images", [f"{number}.jpg" for number in range(3)])
    (tmp_path / "images" / "broken.jpg").write_bytes(b"nothing")
    cheap_run(tmp_path / "images", tmp_path / "labels", Quadrants()).run(ALONE)
    assert cli.main(["label", "stats", str(tmp_path / "labels")]) == 0
    printed = capsys.readouterr().out
    assert "6, 2.0 an image, 2 names" in printed
    assert "80 x 60 100%" in printed
    assert "1 images without a label" in printed
    store = LabelStore(tmp_path / "labels")
    distances = [item.distance for label in store for item in label.objects]
    assert f"{np.median(distances):.3g}" in printed


def test_a_missing_scipy_is_said_before_any_image_is_labelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images", ["0.jpg"])
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert cli.main(["label", "--images", str(tmp_path / "images"), "--names", "cup", f"--out={tmp_path}"]) == 1
    assert "pip install 'spear-lightning[label]'" in capsys.readouterr().err


def test_errors_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["label", "stats", str(tmp_path)]) == 1
    assert "There are no labels" in capsys.readouterr().err
