"""What the command line says before any verb has run."""

from __future__ import annotations

import subprocess
import sys

import pytest

from spear_lightning import cli
from spear_lightning.robot_data import commands

BLOCKED = """
import sys
sys.modules["mujoco"] = None  # as if it were not installed
from spear_lightning.cli import main
sys.exit(main(["data", "tabletop", "--episodes", "1", "--out", "nowhere"]))
"""


def test_a_missing_extra_is_named_with_how_to_install_it() -> None:
    run = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "'mujoco' is not installed" in run.stderr
    assert "pip install 'spear-lightning[sim]'" in run.stderr
    assert "Traceback" not in run.stderr


def test_ctrl_c_ends_a_verb_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "main", interrupted)
    assert cli.main(["data", "index", "somewhere"]) == 130
    assert capsys.readouterr().err == "spear data: interrupted\n"
