"""Evaluation while training: what it logs, that it is what `spear eval` gives, and that training feels nothing."""

from __future__ import annotations

import contextlib
import copy
import csv
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from spear_lightning import cli
from spear_lightning.errors import ConfigError
from spear_lightning.evaluation.harness import EvaluationPlan, describe_server, evaluate_policy
from spear_lightning.evaluation.report import read_result
from spear_lightning.policy import load_policy
from spear_lightning.policy.vla_eval_server import PolicyServer
from spear_lightning.robot_data.demo_episodes import write_demo_episodes
from spear_lightning.training import ClosedLoopEvaluation, ExponentialMovingAverage
from spear_lightning.training.closed_loop import averages_in_eval_mode
from spear_lightning.training.preemption import StopOnSignal

TESTS = Path(__file__).resolve().parents[1]
BENCHMARK = "point_world:PointBenchmark"
STEPS = 5


@pytest.fixture(scope="module", autouse=True)
def point_world() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TESTS / "evaluation"))
        yield


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("data")
    write_demo_episodes(folder, episodes=8, steps=8, height=32, width=48)
    values: dict[str, Any] = yaml.safe_load((TESTS / "conf" / "vla.yaml").read_text())
    values["data"]["init_args"].update(root=str(folder), index_folder=str(folder / "indexes"))
    values["trainer"].update(max_steps=STEPS, limit_val_batches=0)
    return values


def fit(experiment: dict[str, Any], run: Path, *options: str, tracked: bool = False, **evaluation: Any) -> None:
    values = copy.deepcopy(experiment)
    values["trainer"]["default_root_dir"] = str(run)
    values["trainer"]["logger"] = [
        {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(run), "name": "csv"}},
    ]
    if tracked:
        values["trainer"]["logger"] += [
            {"class_path": "spear_lightning.training.MLflowRunLogger", "init_args": {"folder": str(run)}},
            {"class_path": "spear_lightning.training.RunTensorBoardLogger"},
        ]
    if evaluation:
        entry = {"class_path": "spear_lightning.training.ClosedLoopEvaluation", "init_args": evaluation}
        # Wherever it stands among the callbacks, averages must have been updated before.
        values["trainer"]["callbacks"].insert(0, entry)
    # MLflow remembers the store of an earlier run of this process there.
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    assert cli.main(["fit", f"--config={path}", *options]) == 0


@pytest.fixture(scope="module")
def plain(experiment: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("plain") / "run"
    fit(experiment, run)
    return run


@pytest.fixture(scope="module")
def evaluated(experiment: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("evaluated") / "run"
    fit(experiment, run, tracked=True, benchmark=BENCHMARK, every_steps=2, episodes=3, recorded=2)
    return run


def rows(run: Path, name: str) -> dict[int, str]:
    lines = csv.DictReader((run / "csv" / "version_0" / "metrics.csv").open())
    return {int(line["step"]): line[name] for line in lines if line.get(name)}


def test_training_is_bit_equal_with_and_without(plain: Path, evaluated: Path) -> None:
    assert len(rows(plain, "train/loss")) == STEPS
    assert rows(plain, "train/loss") == rows(evaluated, "train/loss")
    name = f"checkpoints/step_{STEPS:07d}.ckpt"
    ours, theirs = (torch.load(run / name, weights_only=True) for run in (plain, evaluated))
    for part in ("state_dict", "ema"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(tensor, theirs[part][key]) for key, tensor in ours[part].items())


def test_every_second_step_and_the_last_are_evaluated(evaluated: Path) -> None:
    folders = sorted(path.name for path in (evaluated / "closed_loop").iterdir())
    assert folders == ["step_0000002", "step_0000004", "step_0000005"]
    assert sorted(rows(evaluated, "closed_loop/shift/success")) == [2, 4, 5]
    for name in folders:
        result = read_result(evaluated / "closed_loop" / name)
        step = int(name[5:])
        assert result.contestant.weights == "ema"
        assert result.contestant.source == f"step {step}"
        for task in ("shift", "nudge"):
            share = sum(episode.success for episode in result.of_task(task)) / 3
            assert float(rows(evaluated, f"closed_loop/{task}/success")[step]) == pytest.approx(share)
            low, high = (
                float(rows(evaluated, f"closed_loop/{task}/success_{end}")[step]) for end in ("low", "high")
            )
            assert low <= share <= high
            assert high - low > 0.4


@pytest.mark.parametrize("step", [4, 5])
def test_a_checkpoint_gives_the_episodes_that_the_callback_gave(
    evaluated: Path, tmp_path: Path, step: int
) -> None:
    checkpoint = evaluated / "checkpoints" / f"step_{step:07d}.ckpt"
    server = PolicyServer(load_policy(checkpoint))
    plan = EvaluationPlan(benchmark=BENCHMARK, episodes=3)
    again = evaluate_policy(server, describe_server(server, str(checkpoint), "ema"), plan, tmp_path)
    then = read_result(evaluated / "closed_loop" / f"step_{step:07d}")
    assert again.episodes == then.episodes
    assert again.protocol == then.protocol
    assert again.contestant.weights_sha256 == then.contestant.weights_sha256
    raw = PolicyServer(load_policy(checkpoint, weights="raw"))
    assert describe_server(raw, "", "raw").weights_sha256 != then.contestant.weights_sha256


def test_pictures_reach_mlflow_and_tensorboard(evaluated: Path) -> None:
    client = MlflowClient(f"sqlite:///{evaluated / 'mlflow.db'}")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    stored = {entry.path for entry in client.list_artifacts(run.info.run_id, "closed_loop/step_0000004")}
    assert stored == {f"closed_loop/step_0000004/episodes.{kind}" for kind in ("png", "gif")}
    assert run.data.metrics["closed_loop/success"] == float(rows(evaluated, "closed_loop/success")[STEPS])
    events = EventAccumulator(str(evaluated / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Images("closed_loop/episodes")] == [2, 4, 5]
    assert not list((evaluated / "closed_loop").glob("*/frames"))


def test_an_interrupted_run_does_not_repeat_an_evaluation(
    experiment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = {"benchmark": BENCHMARK, "every_steps": 2, "episodes": 1, "tasks": ["shift"], "recorded": 0}
    run = tmp_path / "run"
    fit(experiment, run, "--trainer.max_steps=2", **evaluation)
    result = run / "closed_loop" / "step_0000002" / "result.json"
    first = result.read_text()
    fit(
        experiment,
        run,
        "--trainer.max_steps=3",
        "--ckpt_path=last",
        "--resume_allow=[trainer.max_steps]",
        **evaluation,
    )
    assert result.read_text() == first
    assert (run / "closed_loop" / "step_0000003").is_dir()
    # One of other weights is no reason to be idle.
    other = json.loads(first)
    other["contestant"]["weights_sha256"] = "0"
    result.write_text(json.dumps(other))
    (run / "checkpoints" / "step_0000003.ckpt").unlink()
    fit(
        experiment,
        run,
        "--trainer.max_steps=3",
        "--ckpt_path=last",
        "--resume_allow=[trainer.max_steps]",
        **evaluation,
    )
    assert (
        json.loads(result.read_text())["contestant"]["weights_sha256"]
        == json.loads(first)["contestant"]["weights_sha256"]
    )


def test_an_evaluation_that_breaks_off_does_not_end_the_training(
    experiment: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    fit(experiment, run, benchmark="point_world:BrokenBenchmark", every_steps=4, episodes=2, at_end=False)
    assert len(rows(run, "train/loss")) == STEPS
    assert "No success rate at step 4" in caplog.text
    assert "the table fell over" in caplog.text
    assert not (run / "closed_loop" / "step_0000004" / "result.json").exists()


def test_what_cannot_work_is_said_before_the_first_step(experiment: dict[str, Any], tmp_path: Path) -> None:
    values = copy.deepcopy(experiment)
    values["data"]["init_args"]["chunks"] = {"rate_hz": 2.5}
    for number, (base, options) in enumerate(((values, {}), (experiment, {"tasks": ["juggle"]}))):
        run = tmp_path / str(number)
        with pytest.raises(AssertionError):
            fit(base, run, benchmark=BENCHMARK, every_steps=1, episodes=1, **options)
        assert not (run / "closed_loop").exists()
        assert not list((run / "checkpoints").glob("*.ckpt"))
    with pytest.raises(ConfigError, match="steps between"):
        ClosedLoopEvaluation(every_steps=0)


def test_a_machine_that_is_taken_away_is_not_kept_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated: list[bool] = []
    monkeypatch.setattr(
        ClosedLoopEvaluation, "_evaluate_if_due", lambda self, trainer, module, due: evaluated.append(due)
    )
    callback, signals = ClosedLoopEvaluation(every_steps=1000), StopOnSignal()
    trainer: Any = SimpleNamespace(callbacks=[signals, callback])
    module: Any = None
    callback.on_train_end(trainer, module)
    signals.stopped = True
    callback.on_train_end(trainer, module)
    assert evaluated == [True]


class Trained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moving, self.still = nn.Linear(2, 2), nn.Dropout()


def test_modes_and_weights_are_put_back() -> None:
    module = Trained()
    module.still.eval()
    averages = ExponentialMovingAverage()
    trainer = type("Trainer", (), {"callbacks": [averages]})()
    with averages_in_eval_mode(trainer, module) as weights:
        assert weights == "raw"
        assert not module.moving.training
    raw = module.moving.weight.detach().clone()
    averages._averages = {"moving.weight": torch.zeros(2, 2)}
    with contextlib.suppress(RuntimeError), averages_in_eval_mode(trainer, module) as weights:
        assert weights == "ema"
        assert not module.moving.weight.any()
        raise RuntimeError("stop")
    assert torch.equal(module.moving.weight, raw)
    assert module.training
    assert module.moving.training
    assert not module.still.training
