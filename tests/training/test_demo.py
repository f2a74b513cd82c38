"""The demo: the main job from nothing to a predicted chunk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spear_lightning import cli


@pytest.mark.slow
def test_demo_ends_with_predictions(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", f"--out={tmp_path}", "--steps=2"]) == 0
    (folder,) = tmp_path.iterdir()
    predictions = np.load(folder / "runs" / "quickstart_vla" / "predictions.npz")
    assert predictions["predicted"].shape[1:] == (5, 8)
    text = capfd.readouterr().out
    assert "val/translation_error_mm" in text
    assert "trained, saved, reloaded and predicted" in text


def test_a_missing_data_root_ends_the_demo_with_the_reason(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", f"--out={tmp_path}", "--data=/nowhere", "--steps=2"]) == 1
    assert "data root does not exist" in capfd.readouterr().err
