"""`spear data ...` through the real command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from spear_lightning import cli
from spear_lightning.robot_data.episode_index import EpisodeIndex

EXPERIMENT = Path(__file__).resolve().parents[2] / "experiments" / "quickstart" / "vla.yaml"


def test_index_reports_and_is_reused(
    demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "index", str(demo_folder), f"--index_folder={tmp_path}", "--workers=1"]
    assert cli.main(command) == 0
    first = capsys.readouterr().out
    assert "20" in first
    assert "problems" in first
    (folder,) = tmp_path.iterdir()
    written = (folder / "index.json").stat().st_mtime_ns
    assert cli.main(command) == 0
    assert "up to date" in capsys.readouterr().out
    assert (folder / "index.json").stat().st_mtime_ns == written
    assert cli.main([*command, "--verify_images"]) == 0
    assert EpisodeIndex(folder).description["images_verified"]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_index_beside_the_data(demo_folder: Path) -> None:
    assert cli.main(["data", "index", str(demo_folder), "--beside", "--workers=1"]) == 0
    (folder,) = (demo_folder / "spear_index").iterdir()
    assert EpisodeIndex(folder).num_episodes == 20


def test_show_lists_episodes(demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "show", str(demo_folder), f"--index_folder={tmp_path}", "--episodes=3"]) == 0
    assert "reach for the" in " ".join(capsys.readouterr().out.split())


def test_statistics_of_an_experiment(demo_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = yaml.safe_load(EXPERIMENT.read_text())
    experiment["data"]["init_args"]["index_folder"] = str(tmp_path)
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment))
    assert cli.main(["data", "statistics", f"--config={path}", f"--root={demo_root}"]) == 0
    assert "translation" in capsys.readouterr().out
    assert len(list(tmp_path.glob("statistics-*.json"))) == 1


def test_errors_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "index", str(tmp_path / "none")]) == 1
    assert "not an RLDS folder" in capsys.readouterr().err
    (tmp_path / "e.yaml").write_text("model: {}")
    assert cli.main(["data", "statistics", f"--config={tmp_path / 'e.yaml'}"]) == 1
    assert "names no robot data" in capsys.readouterr().err
