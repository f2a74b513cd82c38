"""MLflow and TensorBoard at once: what a run leaves behind, and a resume that continues it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spear_lightning import cli
from spear_lightning.batches import RobotBatch
from spear_lightning.robot_data.demo_episodes import write_demo_episodes
from spear_lightning.training.chunk_errors import chunk_errors
from spear_lightning.training.first_batch_picture import render
from spear_lightning.training.tracking import RunTensorBoardLogger
from spear_lightning.training.validation_pictures import draw_chunks
from spear_lightning.training.vla_module import ValidationOutput

TWIN = Path(__file__).resolve().parents[1] / "conf" / "vla.yaml"


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Train two steps with both loggers and pictures, then resume for two more."""
    folder = tmp_path_factory.mktemp("tracked")
    write_demo_episodes(folder / "data", episodes=8, steps=8, height=32, width=48)
    experiment: dict[str, Any] = yaml.safe_load(TWIN.read_text())
    experiment["data"]["init_args"].update(root=str(folder / "data"), index_folder=str(folder / "indexes"))
    trainer = experiment["trainer"]
    trainer.update(
        default_root_dir=str(folder / "run"), max_steps=4, val_check_interval=2, num_sanity_val_steps=-1
    )
    trainer["callbacks"] += [
        {"class_path": "spear_lightning.training.FirstValidation"},
        {"class_path": "spear_lightning.training.ValidationPictures", "init_args": {"samples": 2}},
    ]
    trainer["logger"] = [
        {"class_path": "spear_lightning.training.MLflowRunLogger", "init_args": {"folder": str(folder / "runs")}},
        {"class_path": "spear_lightning.training.RunTensorBoardLogger"},
    ]
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment))
    command = ["fit", f"--config={path}"]
    assert cli.main([*command, "--trainer.max_steps=2"]) == 0
    assert cli.main([*command, "--ckpt_path=last", "--resume_allow=[trainer.max_steps]"]) == 0
    return folder, command


def test_mlflow_holds_one_run_with_everything(tracked: tuple[Path, list[str]]) -> None:
    folder, _ = tracked
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    runs = [
        run for experiment in client.search_experiments() for run in client.search_runs([experiment.experiment_id])
    ]
    assert len(runs) == 1
    (run,) = runs
    assert run.info.run_id == (folder / "run" / "mlflow_run_id").read_text()
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == [0, 1, 2, 3]
    # Before training, after two steps, after four.
    validations = client.get_metric_history(run.info.run_id, "val/loss")
    assert sorted({metric.step for metric in validations}) == [0, 1, 3]
    assert run.data.params["data.batch_size"] == "4"
    assert run.data.params["model.policy.vla.expert.width"] == "16"
    assert "mlflow.source.git.commit" in run.data.tags
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "validation", "freeze_schedule"} <= artifacts
    pictures = client.list_artifacts(run.info.run_id, "validation")
    assert len(pictures) == 2


def test_tensorboard_holds_the_same_curves_and_pictures(tracked: tuple[Path, list[str]]) -> None:
    folder, _ = tracked
    events = EventAccumulator(str(folder / "run" / "tensorboard"))
    events.Reload()
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    run_id = (folder / "run" / "mlflow_run_id").read_text()
    for name in ("train/loss", "train/rotation_geodesic", "val/translation_error_mm"):
        scalars = {event.step: event.value for event in events.Scalars(name)}
        tracked_too = {metric.step: metric.value for metric in client.get_metric_history(run_id, name)}
        assert scalars == pytest.approx(tracked_too)
    assert len(events.Images("val/chunks")) == 2


@pytest.mark.parametrize("asked", [True, False])
def test_tensorboard_s_files_lie_in_the_run_s_folder_or_where_they_are_wanted(tmp_path: Path, asked: bool) -> None:
    wanted = tmp_path / "elsewhere" if asked else tmp_path / "run" / "tensorboard"
    logger = RunTensorBoardLogger(str(wanted)) if asked else RunTensorBoardLogger()
    logger.begin_in(tmp_path / "run")
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("success")
    assert [path.parent for path in tmp_path.rglob("events.*")] == [wanted]


def quarter_turn_chunk() -> RobotBatch:
    chunk = torch.zeros(2, 3, 8)
    chunk[..., 6] = 1
    chunk[0, :, 0] = torch.tensor([0.01, 0.02, 0.03])
    chunk[0, 2, 3:7] = torch.tensor([0, 0, 2**-0.5, 2**-0.5])
    state = torch.tensor([[0.3, 0, 0.1, 0, 0, 0, 1, 1.0]]).repeat(2, 1)
    return RobotBatch(
        images={"primary": torch.full((2, 3, 28, 42), 128, dtype=torch.uint8)},
        image_mask={"primary": torch.ones(2, dtype=torch.bool)},
        instructions=["go", ""],
        state=state,
        actions=chunk,
        action_mask=torch.tensor([[True, True, True], [True, False, False]]),
        dataset=torch.zeros(2, dtype=torch.int64),
        position=torch.arange(2),
    )


def test_pictures_show_the_paths() -> None:
    batch = quarter_turn_chunk()
    figure = draw_chunks(ValidationOutput(batch=batch, predicted=batch.actions * 1.0), "cumulative", samples=4)
    above, _, turned, _ = figure.axes[1:5]
    true_x, _ = above.lines[0].get_data()
    np.testing.assert_allclose(true_x, [0, 1, 2, 3], atol=1e-5)
    np.testing.assert_allclose(turned.lines[0].get_ydata(), [0, 0, 0, 90], atol=1e-3)
    pixels = render(figure)
    assert pixels.dtype == np.uint8
    assert pixels.std() > 10
    assert Image.fromarray(pixels).size[0] > 300


def test_chunk_errors_are_in_millimetres_and_degrees() -> None:
    batch = quarter_turn_chunk()
    still = torch.zeros_like(batch.actions)
    still[..., 6] = -1  # The same rotation as +1.
    errors = chunk_errors(still, batch.actions, batch.action_mask)
    assert float(errors["translation_error_mm"]) == pytest.approx((10 + 20 + 30 + 0) / 4)
    assert float(errors["rotation_error_deg"]) == pytest.approx(90 / 4, abs=1e-3)
    assert float(errors["gripper_accuracy"]) == 1.0
