"""`spear data check`: right figures of right data, and the mistakes it is there to find."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from oxe_layouts import LAYOUTS, Motion, motion
from scipy.spatial.transform import Rotation

from spear_lightning import cli
from spear_lightning.policy.normalizer import ActionNormalizer
from spear_lightning.robot_data.chunks import ChunkSpec, read_chunks
from spear_lightning.robot_data.data_check import DatasetFindings, check_mixture
from spear_lightning.robot_data.images import CameraSpec
from spear_lightning.robot_data.robot_mixture import RobotMixture

EXPERIMENT = Path(__file__).resolve().parents[2] / "experiments" / "vla_oxe.yaml"
CAMERAS = {"primary": CameraSpec(56, 42), "wrist": CameraSpec(28, 28)}
Change = Callable[[Motion], Motion]


def check(root: Path, weights: dict[str, float], **more: object) -> list[DatasetFindings]:
    options = {"root": root, "weights": weights, "chunks": ChunkSpec(), "index_folder": root / "index", **more}
    return check_mixture(options, CAMERAS, clamp=1.5).datasets


def changed(root: Path, dataset: str, change: Change, steps: int = 40) -> DatasetFindings:
    layout = LAYOUTS[dataset]
    moved = [change(motion(layout.centre, steps, seed)) for seed in range(3)]
    layout.write(root, [layout.serialize(each) for each in moved])
    (found,) = check(root, {dataset: 1.0})
    return found


def follow(moved: Motion) -> Motion:
    """The gripper does as it is told, one step later."""
    return replace(moved, openness=np.r_[moved.opens[:1], moved.opens[:-1]])


def test_the_24_data_sets_through_the_command_line(
    oxe_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report" / "check.html"
    options = [f"--root={oxe_root}", f"--index_folder={tmp_path}", f"--report={report}", "--examples=2"]
    assert cli.main(["data", "check", f"--config={EXPERIMENT}", *options]) == 0
    printed = capsys.readouterr().out
    overview = printed[: printed.index("1 % to 99 %, metres")]
    shares = {}
    for dataset, layout in LAYOUTS.items():
        (row,) = (line for line in overview.splitlines() if re.search(rf"│ {dataset} +│", line))
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        # Two episodes each, of lengths that follow from the rate.
        assert cells[1:4] == ["2", str(2 * (int(3 * layout.hz) + 3) + 1), f"{layout.hz:g}"]
        shares[dataset] = float(cells[4].removesuffix(" %"))
    assert (shares["droid"], shares["bridge"], shares["fractal"], shares["kuka"]) == (35, 18, 12, 4)
    assert sum(shares.values()) == pytest.approx(100, abs=0.2)
    page = report.read_text()
    assert all(f"<h2>{dataset}</h2>" in page for dataset in LAYOUTS)
    # Two frames of every data set: pictures of those cameras that the experiment shows.
    shown = sum(len({"primary", "secondary", "wrist"} & set(layout.cameras)) for layout in LAYOUTS.values())
    assert len(re.findall(r'<img [^>]*src="data:image/jpeg;base64,', page)) == 2 * shown
    assert not re.findall(r'(?:src|href)="(?!data:)', page)


def test_the_real_bridge_sample(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = yaml.safe_load(EXPERIMENT.read_text())
    experiment["data"]["init_args"] |= {"mixture": {"bridge": 1.0}, "shares": None}
    config = tmp_path / "bridge.yaml"
    config.write_text(yaml.safe_dump(experiment))
    options = [f"--root={shared_data / 'bridge_rlds_sample'}", f"--index_folder={tmp_path}"]
    assert cli.main(["data", "check", f"--config={config}", *options, f"--report={tmp_path / 'r.html'}"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if re.search(r"│ bridge +│ +25 ", line))
    # 25 episodes of 10 steps at 5 Hz, and nothing else in the mixture.
    assert re.search(r"25\D+250\D+5\D+100", row)
    (found,) = check(shared_data / "bridge_rlds_sample", {"bridge": 1.0}, index_folder=tmp_path)
    assert found.cameras["primary"] == 1.0
    # Its black pictures are no camera; its positions are those of Bridge.
    assert found.cameras["wrist"] == 0.0
    assert found.problems == ["camera wrist shows nothing in any episode"]


def test_what_lies_outside_and_what_is_clipped_is_what_the_normaliser_does(oxe_root: Path, tmp_path: Path) -> None:
    weights = {"bridge": 1.0, "taco_play": 1.0, "viola": 1.0}
    found = check(oxe_root, weights, index_folder=tmp_path, holdout=0)
    mixture = RobotMixture(oxe_root, weights, ChunkSpec(), index_folder=tmp_path, holdout=0)
    statistics = mixture.statistics()
    normalizer = ActionNormalizer(clamp=None)
    normalizer.fit(
        statistics.translation_low,
        statistics.translation_high,
        statistics.position_low,
        statistics.position_high,
    )
    for each, source in zip(found, mixture.training, strict=True):
        chunks = read_chunks(source.index, source.frames(np.arange(len(source))), ChunkSpec())
        size = normalizer.normalize_actions(chunks.actions)[chunks.mask][:, :3].abs().amax(-1)
        assert each.outside == pytest.approx(float((size > 1).float().mean()), abs=2e-3)
        assert each.clipped == pytest.approx(float((size > 1.5).float().mean()), abs=2e-3)
        assert each.samples == len(source)
        assert each.examples is not None
        assert torch.equal(each.examples.state[0], chunks.state[0])


def test_right_data_raise_no_suspicion(tmp_path: Path) -> None:
    for dataset in ("ur5", "jaco_play", "utokyo_pr2", "bc_z"):
        assert changed(tmp_path / dataset, dataset, follow).problems == []


def millimetres(moved: Motion) -> Motion:
    return replace(follow(moved), position=1000 * moved.position)


def inverted(moved: Motion) -> Motion:
    return replace(moved, openness=1 - follow(moved).openness)


def unwound(moved: Motion) -> Motion:
    turned = moved.rotation * Rotation.from_rotvec(np.arange(len(moved))[:, None] % 2 * [2.0, 0, 0])
    return replace(follow(moved), rotation=turned)


def stuck(moved: Motion) -> Motion:
    return replace(moved, openness=np.full(len(moved), 0.5))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (millimetres, r"100 % of the positions lie outside of what is known"),
        (inverted, r"the opposite of what it is told \(correlation -"),
        (unwound, r"frames jump .* wrong rotation convention"),
        (stuck, r"the gripper never moves"),
    ],
)
def test_mistakes_are_noticed(tmp_path: Path, change: Change, sentence: str) -> None:
    problems = changed(tmp_path, "ur5", change).problems
    assert any(re.search(sentence, problem) for problem in problems), problems


@pytest.mark.parametrize(
    ("dataset", "key", "columns", "factor"),
    [
        ("ur5", "observation/robot_state", slice(9, 13), 1.3),
        ("viola", "observation/ee_states", slice(0, 3), -1),
        ("taco_play", "observation/robot_obs", slice(3, 6), 180 / np.pi),
    ],
    ids=["no unit quaternion", "reflection", "degrees"],
)
def test_what_is_no_rotation_is_noticed(
    tmp_path: Path, dataset: str, key: str, columns: slice, factor: float
) -> None:
    layout = LAYOUTS[dataset]
    moved = follow(motion(layout.centre, 40, 0))
    values = dict(layout.store(moved))
    values[key] = np.array(values[key])
    values[key][:, columns] *= factor
    layout.write(tmp_path, [replace(layout, store=lambda _: values).serialize(moved)] * 2)
    (found,) = check(tmp_path, {dataset: 1.0})
    assert any("of the stored rotations are none" in problem for problem in found.problems), found.problems


def test_a_missing_data_set_does_not_hide_the_others(
    oxe_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = {
        "data": {
            "root": str(oxe_root),
            "mixture": {"bridge": 1.0, "tabletop": 1.0, "viola": 1.0, "brigde": 1.0},
            "shares": {"bridge": 0.4, "tabletop": 0.2},
            "cameras": {"primary": {"width": 28, "height": 28}},
        }
    }
    config = tmp_path / "e.yaml"
    config.write_text(yaml.safe_dump(experiment))
    options = [f"--config={config}", f"--index_folder={tmp_path}", f"--report={tmp_path / 'r.html'}"]
    assert cli.main(["data", "check", *options]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "cannot be used" in printed
    assert "did you mean bridge" in (tmp_path / "r.html").read_text()
    found = check(
        oxe_root, experiment["data"]["mixture"], shares=experiment["data"]["shares"], index_folder=tmp_path
    )
    assert [each.usable for each in found] == [True, False, True, False]
    # What the missing ones would have had is divided among those that are there.
    assert [each.share for each in found if each.usable] == pytest.approx([0.5, 0.5])
