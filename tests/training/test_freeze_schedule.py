from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from torch import Tensor, nn

from spear_lightning.errors import CheckpointError, ConfigError
from spear_lightning.training.freeze_plan import FreezePlan, Phase
from spear_lightning.training.freeze_schedule import FreezeSchedule

FREEZE_ALL = ["vlm", "expert"]


def three_phases() -> list[Phase]:
    return [
        Phase("align", {"vlm.encoders.moge": 2e-2}, FREEZE_ALL),
        Phase("all", {"vlm": None, "expert": 1e-3, "vlm.encoders.moge": 5e-3}, [], start=4),
        Phase("act", {"expert": 3e-3, "vlm.encoders.siglip": None}, ["vlm", "vlm.encoders.moge"], start=8),
    ]


TRAINED = {
    "align": ("vlm.encoders.moge",),
    "all": ("vlm", "expert"),
    "act": ("expert", "vlm.encoders.siglip"),
}


def flat_optimizer(trainer: L.Trainer) -> dict[str, Any]:
    (optimizer,) = trainer.optimizers
    return optimizer.state_dict()


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Equality bit by bit of nested values with tensors."""
    assert type(found) is type(expected), where
    if isinstance(found, dict):
        assert list(found) == list(expected), where
        for key in found:
            assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(found, list):
        assert len(found) == len(expected), where
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{where}/{index}")
    elif isinstance(found, Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


@pytest.mark.parametrize(("accumulate", "precision"), [(1, "32-true"), (2, "32-true"), (2, "bf16-mixed")])
def test_frozen_parts_move_by_no_bit_and_trained_parts_move(
    fit: Any, tiny_module: Any, recorder: Any, accumulate: int, precision: str
) -> None:
    module = tiny_module(weight_decay=0.1)
    fit(
        module,
        [FreezeSchedule(three_phases()), recorder],
        accumulate_grad_batches=accumulate,
        precision=precision,
    )
    parameters = {name for name, _ in module.components.named_parameters()}
    for name, start, end in (("align", 0, 4), ("all", 4, 8), ("act", 8, 12)):
        before, after = recorder.after[start], recorder.after[end]
        for key in before:
            trains = key.startswith(TRAINED[name])
            if key in parameters or "running" in key:
                assert torch.equal(before[key], after[key]) != trains, (name, key)


class Watch(Callback):
    """Notes groups, state and modes in every training step."""

    def __init__(self) -> None:
        self.groups: dict[int, dict[str, tuple[float, float, int]]] = {}
        self.states: dict[int, int] = {}
        self.modes: dict[int, dict[str, bool]] = {}

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        step = trainer.global_step
        self.groups[step] = {
            group["name"]: (group["lr"], group["peak_lr"], group["start_step"]) for group in optimizer.param_groups
        }
        self.states[step] = len(optimizer.state)
        self.modes[step] = {name: part.training for name, part in pl_module.components.named_modules()}
        grouped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in pl_module.components.named_parameters():
            assert (id(parameter) in grouped) == parameter.requires_grad == (parameter.grad is not None), name


def test_groups_rates_and_state_at_phase_changes(fit: Any, tiny_module: Any) -> None:
    watch = Watch()
    fit(tiny_module(warmup_steps=1, final_lr_fraction=1.0), [FreezeSchedule(three_phases()), watch])
    # Constant after a warm-up of one step at half the peak.
    assert watch.groups[0] == {
        "vlm.encoders.moge": (1e-2, 2e-2, 0),
        "vlm.encoders.moge/no_decay": (1e-2, 2e-2, 0),
    }
    assert watch.groups[3]["vlm.encoders.moge"] == (2e-2, 2e-2, 0)
    # MoGe goes on at the new rate; what is new warms up on its own; no decay for the position table.
    assert watch.groups[4]["vlm.encoders.moge"] == (5e-3, 5e-3, 0)
    assert watch.groups[4]["vlm@4"] == (5e-3, 1e-2, 4)
    assert watch.groups[5]["vlm@4"] == (1e-2, 1e-2, 4)
    assert watch.groups[4]["expert@4"] == (5e-4, 1e-3, 4)
    assert watch.groups[8] == {
        "expert@4": (3e-3, 3e-3, 4),
        "expert@4/no_decay": (3e-3, 3e-3, 4),
        "vlm.encoders.siglip@4": (1e-2, 1e-2, 4),
        "vlm.encoders.siglip@4/no_decay": (1e-2, 1e-2, 4),
    }
    # State exists for what has stepped and still trains: at step 8 that of expert and siglip alone is left.
    assert [watch.states[step] for step in (0, 1, 4, 5, 8)] == [0, 4, 4, 13, 6]


def test_modes_follow_what_trains(fit: Any, tiny_module: Any) -> None:
    watch, module = Watch(), tiny_module()
    module.eval()  # As pretrained models arrive.
    validation = {"limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": 1}
    fit(module, [FreezeSchedule(three_phases()), watch], **validation)
    for step in (0, 3, 5, 9):
        modes = watch.modes[step]
        assert modes["vlm.encoders.siglip.2"] == modes["vlm.encoders.siglip"] == (step >= 4)
        assert modes["vlm.encoders.moge.2"] == modes["vlm.encoders.moge.1"] == (step < 8)
        assert modes["expert"] == (step >= 4)
        assert modes[""]
        assert not modes["spare"]


def test_frozen_modules_stay_in_eval_mode_though_the_module_calls_train(fit: Any, tiny_module: Any) -> None:
    class CallsTrain(Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pl_module.train()

    watch = Watch()
    fit(tiny_module(), [FreezeSchedule(three_phases()), CallsTrain(), watch], batches=2, max_steps=4)
    assert not any(watch.modes[step]["vlm.encoders.siglip.2"] for step in range(4))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("step", [2, 4, 6, 8, 10])
def test_resume_in_any_phase_is_exact(
    fit: Any, tiny_module: Any, tmp_path: Path, step: int, accumulate: int
) -> None:
    whole_module = tiny_module()
    whole = fit(whole_module, [FreezeSchedule(three_phases())], accumulate_grad_batches=accumulate)
    module, watch = tiny_module(), Watch()
    # Other weights than at the beginning: all must come from the checkpoint.
    torch.nn.init.constant_(module.components.expert.weight, 7.0)
    path = tmp_path / f"step={step}.ckpt"
    resumed = fit(
        module, [FreezeSchedule(three_phases()), watch], accumulate_grad_batches=accumulate, ckpt_path=str(path)
    )
    assert min(watch.groups) == step
    assert resumed.global_step == whole.global_step == 12
    assert_same(module.state_dict(), whole_module.state_dict())
    assert_same(flat_optimizer(resumed), flat_optimizer(whole))
    assert_same(
        resumed.lr_scheduler_configs[0].scheduler.state_dict(),
        whole.lr_scheduler_configs[0].scheduler.state_dict(),
    )


def test_resume_refuses_a_schedule_that_does_not_fit(fit: Any, tiny_module: Any, tmp_path: Path) -> None:
    fit(tiny_module(), [], max_steps=3)
    fit(tiny_module(), [FreezeSchedule(three_phases())], max_steps=6)
    path = str(tmp_path / "step=6.ckpt")
    other = [Phase("else", {"vlm": None, "expert": None})]
    with pytest.raises(CheckpointError, match=r"does not have[\s\S]*found: all"):
        fit(tiny_module(), [FreezeSchedule(other)], ckpt_path=path)
    with pytest.raises(CheckpointError, match="had no freeze schedule"):
        fit(tiny_module(), [FreezeSchedule(three_phases())], ckpt_path=str(tmp_path / "step=3.ckpt"))


def test_evaluation_needs_no_schedule_state(fit: Any, tiny_module: Any, tmp_path: Path) -> None:
    fit(tiny_module(), [], max_steps=2)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, callbacks=[FreezeSchedule(three_phases())], enable_progress_bar=False
    )
    data = torch.utils.data.DataLoader(torch.arange(1), batch_size=None)
    trainer.validate(tiny_module(), data, ckpt_path=str(tmp_path / "step=2.ckpt"), verbose=False)


class FakeClient:
    def __init__(self) -> None:
        self.artifacts: dict[str, str] = {}

    def log_text(self, run_id: str, text: str, path: str) -> None:
        self.artifacts[f"{run_id}:{path}"] = text


class FakeMLflow(MLFlowLogger):
    """MLflow without a store."""

    def __init__(self) -> None:
        super().__init__(tracking_uri="http://127.0.0.1:9")
        self.client = FakeClient()
        self.metrics: list[tuple[float, int | None]] = []

    experiment = property(lambda self: self.client)  # type: ignore[assignment]
    run_id = property(lambda self: "run")  # type: ignore[assignment]

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if "phase" in metrics:
            self.metrics.append((metrics["phase"], step))

    def finalize(self, status: str = "success") -> None:
        pass


def test_phase_reaches_screen_and_loggers(fit: Any, tiny_module: Any, tmp_path: Path, capsys: Any) -> None:
    mlflow, board = FakeMLflow(), TensorBoardLogger(tmp_path)
    fit(tiny_module(), [FreezeSchedule(three_phases()), LearningRateMonitor()], logger=[board, mlflow])
    assert mlflow.metrics == [(0.0, 0), (1.0, 4), (2.0, 8)]
    assert list(mlflow.client.artifacts) == [f"run:freeze_schedule/{name}.txt" for name in TRAINED]
    lines = mlflow.client.artifacts["run:freeze_schedule/act.txt"].splitlines()
    cells = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:5]]
        for line in lines
        if "│" in line
    }
    assert cells["vlm.encoders.moge"] == ["28", "0", "frozen"]
    assert cells["vlm.encoders.siglip"] == ["28", "28", "0.01"]
    assert cells["expert"] == ["5", "5", "0.003"]
    assert cells["total"] == ["133", "33", ""]
    screen = capsys.readouterr().out
    assert screen.index("`align`") < screen.index("`all`") < screen.index("`act`")
    events = b"".join(file.read_bytes() for file in Path(board.log_dir).glob("events*"))
    assert all(f"freeze_schedule/{name}".encode() in events for name in TRAINED)


def test_learning_rate_monitor_follows_changing_groups(fit: Any, tiny_module: Any, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(
        tiny_module(),
        [FreezeSchedule(three_phases()), LearningRateMonitor(logging_interval="step")],
        logger=logger,
        log_every_n_steps=1,
    )
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert "lr-AdamW/vlm.encoders.moge," in header
    assert "lr-AdamW/expert@4," in header


# Plans: patterns and their errors.


def network() -> nn.Module:
    root = nn.Module()
    root.vlm = nn.Module()
    root.vlm.encoders = nn.ModuleDict({"siglip": nn.Linear(2, 2), "moge": nn.Linear(2, 2)})
    root.vlm.language = nn.Linear(2, 2)
    root.expert = nn.Linear(2, 2)
    return root


def trained_by(train: dict[str, float | None], freeze: list[str]) -> dict[str, float | None]:
    plan, root = FreezePlan([Phase("only", train, freeze)], network()), network()
    return {name: part.peak_lr for part in plan.components(root, 0) for name in part.parameters}


def test_the_most_specific_pattern_wins() -> None:
    assert trained_by({"*": 1.0, "vlm.encoders.moge": 2.0, "*.bias": 3.0}, ["vlm", "vlm.encoders.moge.bias"]) == {
        "vlm.encoders.moge.weight": 2.0,
        "vlm.encoders.siglip.bias": 3.0,
        "vlm.language.bias": 3.0,
        "expert.weight": 1.0,
        "expert.bias": 3.0,
    }


def test_a_wildcard_covers_all_encoders() -> None:
    found = trained_by({"vlm.encoders.*": None}, ["vlm", "expert"])
    assert set(found) == {
        f"vlm.encoders.{name}.{kind}" for name in ("siglip", "moge") for kind in ("weight", "bias")
    }


def test_a_pattern_is_a_prefix_of_whole_names() -> None:
    root = network()
    root.expert_head = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"neither trained nor frozen[\s\S]*expert_head.weight"):
        FreezePlan([Phase("only", {"expert": None}, ["vlm"])], root)


def test_tied_weights_obey_either_name() -> None:
    root = network()
    root.head = nn.Linear(2, 2, bias=False)
    root.head.weight = root.vlm.language.weight
    plan = FreezePlan([Phase("only", {"head": None}, ["expert", "vlm"])], root)
    assert [list(part.parameters) for part in plan.components(root, 0)] == [["vlm.language.weight"]]


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "no phase"),
        ([Phase("a", {"vlm": None, "expert": None}, start=1)], "not in order"),
        (
            [Phase("a", {"vlm": None, "expert": None}), Phase("b", {"vlm": None, "expert": None})],
            "not in order",
        ),
        (
            [Phase("a", {"vlm": None, "expert": None}), Phase("a", {"vlm": None, "expert": None}, start=3)],
            "same name",
        ),
        ([Phase("a", {"vlm": None, "expert": None}, ["vlm"])], "both trained and frozen"),
        ([Phase("a", {"expert": None}, ["vlm", "vlm"])], "listed twice"),
        ([Phase("a", {"vlm": None})], r"neither trained nor frozen[\s\S]*2 parameters: expert.weight"),
        ([Phase("a", {}, ["vlm", "expert"])], "trains nothing"),
        ([Phase("a", {"vlm": 0.0, "expert": None})], "not positive"),
        ([Phase("a", {"expert": None}, ["vlm", "vlm.encoders.mogge"])], r"no parameter[\s\S]*vlm.encoders.moge"),
        ([Phase("a", {"expert": None}, ["vlm", "zzz"])], r"`zzz`[\s\S]*begin with expert, vlm"),
        ([Phase("a", {"expert*": None, "*expert": None}, ["vlm"])], "equally specific"),
        (
            [Phase("a", {"vlm": None, "expert": None}), Phase("b", {"exprt": None}, ["vlm", "expert"], start=5)],
            r"`exprt`[\s\S]*phase `b`[\s\S]*expert",
        ),
    ],
)
def test_wrong_schedules_are_refused(phases: list[Phase], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FreezePlan(phases, network())


def test_wrong_schedules_are_refused_before_training(fit: Any, tiny_module: Any, recorder: Any) -> None:
    late = [Phase("good", {"vlm": None, "expert": None}), Phase("bad", {"expert": None}, ["vml"], start=100)]
    with pytest.raises(ConfigError, match="`vml`"):
        fit(tiny_module(), [FreezeSchedule(late), recorder])
    assert not recorder.after


def test_unused_parameters_need_no_pattern_and_never_train() -> None:
    root = network()
    plan = FreezePlan([Phase("a", {"vlm": None})], root, ["expert.weight", "expert.bias"])
    plan.apply(root, 0)
    assert not any(parameter.requires_grad for parameter in root.expert.parameters())
    covered = FreezePlan([Phase("a", {"vlm": None, "expert": None})], root, ["expert.weight"])
    assert "expert.weight" not in {name for part in covered.components(root, 0) for name in part.parameters}
    with pytest.raises(ConfigError, match="trains nothing"):
        FreezePlan([Phase("a", {"expert": None}, ["vlm"])], root, ["expert.weight", "expert.bias"])
    with pytest.raises(ConfigError, match=r"do not exist[\s\S]*nowhere"):
        FreezePlan([Phase("a", {"vlm": None, "expert": None})], root, ["nowhere"])


def test_a_part_that_pauses_starts_again() -> None:
    phases = [
        Phase("a", {"vlm": None}, ["expert"]),
        Phase("b", {"expert": None}, ["vlm"], start=5),
        Phase("c", {"expert": None, "vlm": None}, start=9),
    ]
    plan, root = FreezePlan(phases, network()), network()
    # What has trained for longest comes first, whatever the order of the modules.
    starts = [[(part.name, part.start_step) for part in plan.components(root, index)] for index in range(3)]
    assert starts == [[("vlm", 0)], [("expert@5", 5)], [("expert@5", 5), ("vlm@9", 9)]]
    assert [plan.phase_at(step) for step in (0, 4, 5, 8, 9, 1000)] == [0, 0, 1, 1, 2, 2]


def test_the_schedule_is_configurable_in_yaml() -> None:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(FreezeSchedule, "schedule", required=True)
    values = [
        {"name": "one", "train": {"expert": "5e-5", "vlm.encoders.*": None}, "freeze": ["vlm"]},
        {"name": "two", "start": 7, "train": {"expert": None, "vlm": 1e-5}},
    ]
    parsed = parser.parse_object({"schedule": {"phases": values}})
    schedule = parser.instantiate_classes(parsed).schedule
    assert schedule.phases == [
        Phase("one", {"expert": 5e-5, "vlm.encoders.*": None}, ["vlm"], 0),
        Phase("two", {"expert": None, "vlm": 1e-5}, [], 7),
    ]


class SaveRank(Callback):
    """Saves the weights of every process at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.save(dict(pl_module.components.named_parameters()), self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.slow
def test_processes_agree_on_parts_that_begin_to_train_later(fit: Any, tiny_module: Any, tmp_path: Path) -> None:
    """Every process has other data; weights agree only if all gradients of all phases are averaged."""
    module = tiny_module()
    callbacks = [FreezeSchedule(three_phases()), SaveRank(tmp_path)]
    fit(
        module, callbacks, strategy="ddp_fork", devices=2, accumulate_grad_batches=2, use_distributed_sampler=False
    )
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    initial = dict(tiny_module().components.named_parameters())
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name]), name
        assert torch.equal(parameter, initial[name]) == name.startswith("spare."), name
