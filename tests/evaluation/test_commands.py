"""`spear eval` on the real world."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from spear_lightning import cli
from spear_lightning.evaluation.report import read_result

SMALL = ["--tasks", "touch", "--episodes", "2", "--recorded", "1"]


@pytest.mark.slow
def test_a_checkpoint_the_expert_and_chance(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also: in two processes the same episodes as in one."""
    ours = ["eval", "--checkpoint", str(checkpoint), *SMALL, "--device", "cpu"]
    assert cli.main([*ours, "--out", str(tmp_path / "one")]) == 0
    assert cli.main([*ours, "--out", str(tmp_path / "two"), "--processes", "2"]) == 0
    for name in ("expert", "random"):
        assert cli.main(["eval", "--policy", name, *SMALL, "--out", str(tmp_path / name)]) == 0
    results = {name: read_result(tmp_path / name) for name in ("one", "two", "expert", "random")}
    assert results["one"].episodes == results["two"].episodes
    assert results["one"].contestant == results["two"].contestant
    assert results["one"].contestant.weights == "raw"
    assert results["one"].contestant.cameras == {"primary": [42, 28], "wrist": [28, 28]}
    assert all(episode.success for episode in results["expert"].episodes)
    assert {episode.seed for result in results.values() for episode in result.episodes} == {2**40, 2**40 + 1}
    with Image.open(tmp_path / "one" / "episodes.png") as sheet:
        assert sheet.width > 8 * (42 + 28)
    capsys.readouterr()
    assert cli.main(["eval", "--compare", *(str(tmp_path / name) for name in ("random", "one", "expert"))]) == 0
    assert "step_0000000.ckpt" in capsys.readouterr().out
    # A folder with a result is not written over.
    assert cli.main([*ours, "--out", str(tmp_path / "one")]) == 1
    assert "already holds a result" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Say what to evaluate"),
        (["--policy", "expert", "--checkpoint", "a.ckpt"], "Say what to evaluate"),
        (["--policy", "expert", "--tasks", "juggle"], "no such tasks"),
        (["--policy", "expert", "--cameras", "elbow=56x42"], "no such cameras"),
        (["--policy", "expert", "--cameras", "primary=0x42"], "at least 1 pixel"),
        (["--checkpoint", "nowhere.ckpt"], "no such checkpoint"),
        (["--policy", "expert", "--episodes", "0"], "needs episodes"),
        (["--policy", "expert", "--cameras", "primary=56x42", "primary=84x56"], "each camera once"),
        (["--policy", "random", "--flow_steps", "5"], "predicts no chunks"),
        (["--policy", "expert", "--execute_steps", "2"], "predicts no chunks"),
        (["--policy", "expert", "--weights", "raw"], "has no weights"),
        (["--policy", "random", "--noise_seed", "0", "--device", "cpu"], r"--noise_seed --device"),
    ],
)
def test_what_cannot_be_evaluated_is_said(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", *arguments, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_that_are_in_the_folder_already_stay(tmp_path: Path) -> None:
    mine = tmp_path / "frames" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("of another program")
    small = ["--tasks", "touch", "--episodes", "1", "--recorded", "1", "--cameras", "primary=56x42"]
    assert cli.main(["eval", "--policy", "expert", *small, "--out", str(tmp_path)]) == 0
    assert mine.read_text() == "of another program"
    assert [path.name for path in mine.parent.iterdir()] == ["mine.txt"]
    assert (tmp_path / "episodes.png").is_file()


def test_camera_sizes_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["eval", "--policy", "expert", "--cameras", "primary=160"])
    assert "primary=160x120" in capsys.readouterr().err


def test_without_the_extra_packages_the_remedy_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vla_eval", None)
    assert cli.main(["eval", "--policy", "expert"]) == 1
    assert "pip install 'spear-lightning[sim]'" in capsys.readouterr().err


def test_help_needs_neither_torch_nor_the_world(run_python: Callable[[str], str]) -> None:
    heavy = run_python(
        "import sys; from spear_lightning import cli\n"
        "try: cli.main(['eval', '--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'lightning', 'mujoco', 'vla_eval') if name in sys.modules])"
    )
    assert heavy.splitlines()[-1] == "[]"


@pytest.fixture
def run_python() -> Callable[[str], str]:
    def run(code: str) -> str:
        return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout

    return run
