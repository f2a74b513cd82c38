"""The plan's numbers against torch's own: sharding over 32 fake processes, FLOPs by hand, measured figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from spear_lightning import cli
from spear_lightning.errors import ConfigError
from spear_lightning.planning.commands import _days, main
from spear_lightning.planning.experiment import Experiment, merged, read_experiment
from spear_lightning.planning.memory import memory_of, share
from spear_lightning.planning.throughput import GPUS, speed_of
from spear_lightning.planning.trace import Trace, trace_step
from spear_lightning.training.sharding import shard_blocks

FOLDER = Path(__file__).resolve().parents[2] / "experiments"
pytestmark = pytest.mark.slow

TINY = FOLDER.parent / "tests" / "conf"
FULL, SHARDED = FOLDER / "vla_oxe.yaml", FOLDER / "parallel" / "sharded.yaml"
GIB = 2**30


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return read_experiment([FULL, SHARDED])


@pytest.fixture(scope="module")
def trace(experiment: Experiment) -> Trace:
    """The work of the measured table: one external and one wrist camera, 20 tokens of text."""
    cameras = {name: camera for name, camera in experiment.cameras.items() if name != "secondary"}
    return trace_step(experiment.module.components, experiment.phases["vla"], cameras, 20, experiment.horizon)


def test_shares_are_those_of_fsdp_over_32_processes(experiment: Experiment, trace: Trace) -> None:
    """The whole network at full size, on the meta device, really divided among 32 processes that are not there."""
    plan = memory_of(experiment, "vla", 32, trace)
    module = read_experiment([FULL, SHARDED]).module
    root, methods = module.entry()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=32)
    try:
        shard_blocks(root, methods, init_device_mesh("cpu", (32,)), torch.bfloat16)
        shares = dict(module.components.named_parameters())
        assert all(isinstance(parameter, DTensor) for parameter in shares.values())
        own = {name: parameter.to_local().numel() for name, parameter in shares.items()}
    finally:
        dist.destroy_process_group()
    trained = sum(own[name] for name in experiment.phases["vla"])
    assert plan.weights == 4 * sum(own.values())
    assert (plan.optimizer, plan.averages, plan.gradients) == (8 * trained, 4 * trained, 4 * trained)
    whole = sum(parameter.numel() for parameter in shares.values())
    assert plan.weights == pytest.approx(4 * whole / 32, rel=0.02)


def test_flops_are_six_per_parameter_and_token(experiment: Experiment, trace: Trace) -> None:
    """6 a trained parameter and token, 2 a frozen one, and attention: counted from sizes alone."""
    tokens = {"siglip": 300 + 64, "moge": 300 + 64 + 2, "gemma": 384, "expert": 6}
    gemma_block = 2048 * (8 * 256 + 2 * 256) + 8 * 256 * 2048 + 3 * 2048 * 16384
    expert_block = 1024 * (8 * 256 + 2 * 256) + 8 * 256 * 1024 + 3 * 1024 * 4096
    siglip = 27 * (4 * 1152**2 + 2 * 1152 * 4304) + 588 * 1152 + 1152 * 2048
    moge = 24 * 12 * 1024**2
    linear = 6 * (siglip * tokens["siglip"] + 18 * expert_block * tokens["expert"])
    # Of the last block keys and values alone are computed.
    linear += 6 * (17 * gemma_block + 2048 * 512) * tokens["gemma"]
    linear += 2 * moge * tokens["moge"] + 4 * 4096 * 2048 * 364
    attention = 3.5 * 4 * (17 * 2048 * 384**2 + 27 * 1152 * (300**2 + 64**2) + 18 * 2048 * 6 * 390)
    attention += 4 * 24 * 1024 * (301**2 + 65**2)
    assert trace.flops == pytest.approx(linear + attention, rel=0.01)
    assert trace.tokens == 384


def test_predictions_lie_near_what_was_measured(experiment: Experiment, trace: Trace) -> None:
    """One H200, batch 64, no averages: 72 samples/s eager with 137 GiB, 86.5 compiled with 115 GiB."""
    base = replace(experiment, sharded=False, averaged=False, fused=True, batch_size=64)
    for compiled, speed, peak in ((False, 72, 137), (True, 86.5, 115)):
        case = replace(base, compiled=compiled)
        found = speed_of(case, "vla", 1, trace, GPUS["h200-141"])
        assert found.samples_per_second == pytest.approx(speed, rel=0.02)
        # That program had no token embedding: 257,216 rows with weight, moments and copy of theirs.
        table = 257216 * 2048 * (4 + 8 + 2)
        memory = memory_of(case, "vla", 1, trace)
        assert (memory.peak - table) / GIB == pytest.approx(peak, rel=0.06)


def test_settings_name_the_memory_that_they_need() -> None:
    trace = None
    for name, gpu in (("h200_141", "h200-141"), ("h100_80", "h100-80")):
        overlay = FOLDER / "parallel" / f"{name}.yaml"
        case = read_experiment([FULL, overlay])
        if trace is None:
            assert case.text_tokens is not None
            names = case.phases["vla"]
            trace = trace_step(case.module.components, names, case.cameras, case.text_tokens, case.horizon)
        peak = memory_of(case, "vla", 32, trace.recomputing(case.recomputed)).peak
        assert f"`spear plan`: {peak / GIB:.0f} of {GPUS[gpu].memory / GIB:.0f} GiB" in overlay.read_text()


def test_recomputed_blocks_keep_little_and_cost_a_forward_pass(experiment: Experiment, trace: Trace) -> None:
    again = trace.recomputing(trace.blocks)
    assert again.kept_bytes < 0.2 * trace.kept_bytes
    # A forward pass is a third of a step; that of MoGe, which is frozen, is not done again.
    assert 1.25 < again.flops / trace.flops < 4 / 3
    language = [name for name in trace.blocks if "language_model" in name]
    assert again.kept_bytes < trace.recomputing(language).kept_bytes < trace.kept_bytes


def test_a_division_within_nodes_needs_more_memory_and_fewer_messages(
    experiment: Experiment, trace: Trace
) -> None:
    in_node = replace(experiment, shard_size=8)
    everywhere, divided = (memory_of(case, "vla", 32, trace) for case in (experiment, in_node))
    assert divided.optimizer == pytest.approx(4 * everywhere.optimizer, rel=0.01)
    messages = [speed_of(case, "vla", 32, trace, GPUS["h200-141"]).communication for case in (experiment, in_node)]
    assert messages[1] < messages[0] / 2


def test_configurations_are_merged_as_the_command_line_does() -> None:
    base = {"a": {"class_path": "A", "init_args": {"x": 1, "y": 2}}, "callbacks": [1]}
    assert merged(base, {"a": {"init_args": {"x": 3}}})["a"]["init_args"] == {"x": 3, "y": 2}
    assert merged(base, {"a": {"class_path": "B"}})["a"] == {"class_path": "B"}
    assert merged(base, {"callbacks+": [2]})["callbacks"] == [1, 2]
    assert merged(base, {"callbacks": [2]})["callbacks"] == [2]


def test_arguments_that_are_mappings_are_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlay = tmp_path / "one_camera.yaml"
    camera = {"front": {"width": 56, "height": 42, "fit": "pad"}}
    change = {"data": {"init_args": {"cameras": camera, "chunks": {"horizon": 7}, "mixture": {"bridge": 2.0}}}}
    overlay.write_text(yaml.safe_dump(change))
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", str(FULL), "--config", str(overlay), "--print_config"])
    line = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    found = merged(yaml.safe_load(FULL.read_text()), change)["data"]["init_args"]
    assert found["mixture"] == line["mixture"] == {"bridge": 2.0}
    assert found["cameras"].keys() == line["cameras"].keys() == {"front"}
    assert found["chunks"] == line["chunks"] == {"horizon": 7, "rate_hz": 5.0, "mode": "cumulative"}
    assert found["shares"] == line["shares"]


@pytest.mark.parametrize(("name", "horizon"), [("vla", 5), ("vlm", 0)])
def test_what_is_not_given_is_as_training_has_it(tmp_path: Path, name: str, horizon: int) -> None:
    values = yaml.safe_load((TINY / f"{name}.yaml").read_text())
    for argument in ("batch_size", "chunks"):
        values["data"]["init_args"].pop(argument, None)
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(values))
    found = read_experiment([path])
    assert (found.batch_size, found.horizon) == (32, horizon)
    values["data"]["class_path"] = "spear_lightning.training.NoDataModule"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="no such data module"):
        read_experiment([path])


def test_prompts_are_as_long_as_they_are_padded(tmp_path: Path) -> None:
    values = yaml.safe_load((TINY / "vla.yaml").read_text())
    policy = values["model"]["init_args"]["policy"]["init_args"]
    prompt, vlm = (part["init_args"] for part in (policy["prompt"], policy["vla"]["init_args"]["vlm"]))
    path = tmp_path / "experiment.yaml"
    for part, changes, expected in (
        (prompt, {"max_length": 37, "multiple": None}, 37),
        (vlm, {"packed": True}, None),
        (vlm, {"packed": False}, 37),
        (prompt, {"multiple": 8}, None),
    ):
        part.update(changes)
        path.write_text(yaml.safe_dump(values))
        assert read_experiment([path]).text_tokens == expected


def test_days_count_all_batches_of_a_step(experiment: Experiment) -> None:
    phases = replace(experiment, starts={"align": 0, "all": 10_000}, max_steps=30_000)
    assert phases.batches == 1
    assert _days(phases, [8.64, 4.32]) == pytest.approx([1.0, 1.0])
    assert _days(replace(phases, batches=4), [8.64, 4.32]) == pytest.approx([4.0, 4.0])


def test_the_command_prints_a_plan_and_says_if_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = str(TINY / "vla.yaml")
    assert cli.main(["plan", f"--config={tiny}", f"--config={SHARDED}", "--gpus=2", "--gpu=h100-80"]) == 0
    printed = capsys.readouterr().out
    assert "It fits: 2 GiB of 78." in printed
    assert all(phase in printed for phase in ("align", "language", "all"))
    with pytest.raises(ConfigError, match="cannot be divided"):
        main([f"--config={tiny}", "--gpus=3"])


def test_share_of_uneven_rows() -> None:
    assert share((10, 3), 4) == 9
    assert share((2, 3), 4) == 3
    assert share((), 4) == 1
