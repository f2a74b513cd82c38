"""The demo: the whole method from nothing to success rates."""

from __future__ import annotations

from pathlib import Path

import pytest

from spear_lightning import cli
from spear_lightning.evaluation.report import read_result
from spear_lightning.training import demo


@pytest.mark.slow
def test_demo_ends_with_success_rates(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    few = ["--demonstrations=8", "--steps=2", "--episodes=2"]
    assert cli.main(["demo", f"--out={tmp_path}", *few]) == 0
    (folder,) = tmp_path.iterdir()
    for name in ("policy", "random", "expert"):
        result = read_result(folder / name)
        assert [episode.task for episode in result.episodes] == ["touch", "touch"]
    assert all(episode.success for episode in read_result(folder / "expert").episodes)
    assert (folder / "policy" / "episodes.gif").stat().st_size > 0
    text = capfd.readouterr().out
    assert "val/translation_error_mm" in text
    assert "demonstrated, trained, reloaded and acted" in text


def test_what_fails_ends_the_demo_with_the_reason(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "TASK", "juggle")
    assert cli.main(["demo", f"--out={tmp_path}"]) == 1
    text = capfd.readouterr().err
    assert "`spear data` failed" in text
    assert "These demonstrations cannot be made" in text


@pytest.mark.parametrize("option", ["--demonstrations=0", "--steps=0", "--episodes=-1"])
def test_nothing_begins_that_could_not_end(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["demo", f"--out={tmp_path}", option])
    assert "is not a number from 1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
