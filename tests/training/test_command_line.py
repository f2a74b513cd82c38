"""The real command line on a tiny experiment: train, kill, resume, predict, and everything one can get wrong."""

from __future__ import annotations

import inspect
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from finished_runs import logged, run_until_killed, weights
from warm_start import WarmServer

from spear_lightning import cli, flow, models, training
from spear_lightning.policy import load_policy
from spear_lightning.robot_data.demo_episodes import write_demo_episodes
from spear_lightning.training.checkpoint_files import newest_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
TWIN = REPOSITORY / "tests" / "conf" / "vla.yaml"
LOSS = "train/loss"


@pytest.fixture(scope="module")
def data_options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("data")
    write_demo_episodes(root, episodes=10, steps=8, height=32, width=48)
    return [f"--data.root={root}", f"--data.index_folder={root / 'indexes'}"]


def fit(run: Path, data_options: list[str], *options: str) -> int:
    where = [f"--trainer.default_root_dir={run}", f"--trainer.logger.save_dir={run}"]
    return cli.main(["fit", f"--config={TWIN}", *data_options, *where, *options])


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, data_options: list[str]) -> Path:
    run = tmp_path_factory.mktemp("whole")
    assert fit(run, data_options) == 0
    return run


def test_training_logs_every_part_of_the_loss(whole_run: Path) -> None:
    assert sorted(logged(whole_run, LOSS)) == list(range(9))
    parts = ("translation", "rotation", "rotation_velocity", "rotation_geodesic", "gripper")
    for part in parts:
        assert len(logged(whole_run, f"train/{part}")) == 9
    for name in (*parts, "loss", "translation_error_mm", "rotation_error_deg", "gripper_accuracy"):
        values = [float(value) for value in logged(whole_run, f"val/{name}").values()]
        assert len(values) == 3
        assert all(math.isfinite(value) for value in values)


def test_what_is_frozen_does_not_move_by_a_bit_and_what_trains_does(whole_run: Path) -> None:
    steps = [2, 4, 6, 8, 9]
    states = [weights(whole_run, step) for step in steps]
    expert = "policy.vla.expert.action_out.weight"
    projection, language = (
        "policy.vla.vlm.projections.moge.weight",
        "policy.vla.vlm.language_model.layers.0.mlp.up_proj.weight",
    )
    assert all(not torch.equal(a[expert], b[expert]) for a, b in pairwise(states))
    # Phases: align 0-3, language 3-6, all 6-9; MoGe is frozen throughout.
    assert torch.equal(states[1][projection], states[2][projection])
    assert not torch.equal(states[2][projection], states[3][projection])
    assert not torch.equal(states[0][projection], states[1][projection])
    assert not torch.equal(states[1][language], states[2][language])
    moge = [name for name in states[0] if ".encoders.moge." in name]
    siglip = "policy.vla.vlm.encoders.siglip.model.post_layernorm.weight"
    assert moge
    assert all(torch.equal(states[0][name], state[name]) for name in moge for state in states)
    assert torch.equal(states[0][siglip], states[2][siglip])
    assert not torch.equal(states[2][siglip], states[3][siglip])


@pytest.fixture(scope="module")
def killed_runs(
    tmp_path_factory: pytest.TempPathFactory, data_options: list[str], warm_server: WarmServer
) -> dict[int, Path]:
    """Step at which a run was killed -> its folder."""
    runs = {step: tmp_path_factory.mktemp(f"killed_{step}") for step in (5, 8)}
    commands = []
    for step, run in runs.items():
        where = [f"--trainer.default_root_dir={run}", f"--trainer.logger.save_dir={run}"]
        commands.append((step, ["fit", f"--config={TWIN}", *data_options, *where]))
    run_until_killed(warm_server, "spear_lightning.training.vla_module.VLAModule", *commands)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, 8])
def test_killed_and_resumed_training_is_bit_equal(
    killed_runs: dict[int, Path], whole_run: Path, data_options: list[str], step: int
) -> None:
    run = killed_runs[step]
    assert fit(run, data_options, "--ckpt_path=last") == 0
    resumed, whole = logged(run, LOSS), logged(whole_run, LOSS)
    last_saved = step // 2 * 2
    assert {s: resumed[s] for s in range(last_saved, 9)} == {s: whole[s] for s in range(last_saved, 9)}
    for name, tensor in weights(whole_run, 9).items():
        assert torch.equal(tensor, weights(run, 9)[name]), name


def test_resume_refuses_another_configuration(
    tmp_path: Path, whole_run: Path, data_options: list[str], capsys
) -> None:
    checkpoint = f"--ckpt_path={whole_run / 'checkpoints' / 'step_0000004.ckpt'}"
    assert fit(tmp_path, data_options, checkpoint, "--data.batch_size=8") == 1
    message = capsys.readouterr().err
    assert "data.batch_size: 4 -> 8" in message
    assert "--resume_allow" in message
    assert "--model.init_from" in message


def test_resume_with_an_allowed_change_goes_on(tmp_path: Path, whole_run: Path, data_options: list[str]) -> None:
    checkpoint = f"--ckpt_path={whole_run / 'checkpoints' / 'step_0000009.ckpt'}"
    options = ["--trainer.max_steps=11", "--resume_allow=[trainer.max_steps]"]
    assert fit(tmp_path, data_options, checkpoint, *options) == 0
    assert sorted(logged(tmp_path, LOSS)) == [9, 10]


def test_an_allowed_change_of_the_recipe_reaches_the_optimizer(
    tmp_path: Path, whole_run: Path, data_options: list[str]
) -> None:
    checkpoint = f"--ckpt_path={whole_run / 'checkpoints' / 'step_0000009.ckpt'}"
    changes = {"lr": 1e-4, "weight_decay": 0.5, "eps": 1e-6}
    allowed = ["trainer.max_steps", *(f"model.recipe.{name}" for name in changes)]
    options = [f"--model.recipe.{name}={value}" for name, value in changes.items()]
    options += ["--trainer.max_steps=10", f"--resume_allow=[{', '.join(allowed)}]"]
    assert fit(tmp_path, data_options, checkpoint, *options) == 0
    saved = torch.load(tmp_path / "checkpoints" / "step_0000010.ckpt", weights_only=True)
    (optimizer,) = saved["optimizer_states"]
    before = torch.load(whole_run / "checkpoints" / "step_0000009.ckpt", weights_only=True)["optimizer_states"][0]
    assert [group["name"] for group in optimizer["param_groups"]] == [
        group["name"] for group in before["param_groups"]
    ]
    for group in optimizer["param_groups"]:
        assert group["eps"] == 1e-6
        assert group["weight_decay"] == (0.0 if group["name"].endswith("no_decay") else 0.5)
        # A phase may name rates of its own; the others have the recipe's.
        assert group["lr"] <= group["peak_lr"]
    rates = {group["name"]: group["peak_lr"] for group in optimizer["param_groups"]}
    old = {group["name"]: group["peak_lr"] for group in before["param_groups"]}
    assert 1e-4 in {rate for name, rate in rates.items() if rate != old[name]}


def test_a_policy_starts_from_no_checkpoint_that_reads_other_words(
    tmp_path: Path, data_options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    size, steps = "--model.policy.vla.vlm.language.vocab_size=264", "--trainer.max_steps=1"
    words = "--model.policy.prompt.words="
    assert fit(tmp_path / "first", data_options, size, steps, f"{words}[red, green]") == 0
    source = f"--model.init_from={tmp_path / 'first' / 'checkpoints' / 'step_0000001.ckpt'}"
    assert fit(tmp_path / "second", data_options, size, steps, source, f"{words}[green, red]") == 1
    assert "tokenizer is not the checkpoint's" in capsys.readouterr().err


def test_addresses_and_files_of_the_data_are_kept_as_what_they_are(
    tmp_path: Path, data_options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("registry.yaml").write_text("schema: 1\ndatasets: {}\n")
    root = data_options[0].removeprefix("--data.root=")
    options = [f"--data.root=local://{root}", data_options[1], "--data.registry=registry.yaml"]
    assert fit(tmp_path / "run", options, "--trainer.max_steps=1") == 0
    monkeypatch.chdir(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_0000001.ckpt"
    kept = torch.load(checkpoint, weights_only=True)["spear"]["run"]["data"]["init_args"]
    assert kept["root"] == f"local://{root}"
    assert kept["registry"] == str(tmp_path / "registry.yaml")
    assert cli.main(["validate", f"--ckpt_path={checkpoint}"]) == 0


def test_warm_start_takes_averaged_weights_and_nothing_else(
    tmp_path: Path, whole_run: Path, data_options: list[str]
) -> None:
    source = whole_run / "checkpoints" / "step_0000009.ckpt"
    assert fit(tmp_path, data_options, f"--model.init_from={source}", "--trainer.max_steps=1") == 0
    assert sorted(logged(tmp_path, LOSS)) == [0]
    saved = torch.load(source, weights_only=True)
    name = "policy.vla.vlm.encoders.siglip.model.post_layernorm.weight"
    # Frozen in the first phase, so it still is what it was started from.
    assert torch.equal(weights(tmp_path, 1)[name], saved["ema"][name])
    assert not torch.equal(saved["state_dict"][name], saved["ema"][name])


def test_a_checkpoint_alone_predicts_in_a_fresh_process(tmp_path: Path, whole_run: Path) -> None:
    checkpoint = whole_run / "checkpoints" / "step_0000009.ckpt"
    code = f"""
import numpy as np
from spear_lightning.policy import load_policy
policy = load_policy({str(checkpoint)!r})
images = {{"primary": np.full((48, 64, 3), 90, np.uint8)}}
np.save({str(tmp_path / "chunk.npy")!r}, policy.act(images, "reach", np.array([.3, 0, .1, 0, 0, 0, 1, 1]), seed=3))
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    chunk = np.load(tmp_path / "chunk.npy")
    assert chunk.shape == (5, 8)
    np.testing.assert_allclose(np.linalg.norm(chunk[:, 3:7], axis=1), 1, atol=1e-5)
    assert np.isfinite(chunk).all()
    assert ((chunk[:, 7] >= 0) & (chunk[:, 7] <= 1)).all()
    policy = load_policy(checkpoint)
    images = {"primary": np.full((48, 64, 3), 90, np.uint8)}
    again = policy.act(images, "reach", np.array([0.3, 0, 0.1, 0, 0, 0, 1, 1]), seed=3)
    np.testing.assert_allclose(again, chunk, atol=1e-6)


def test_validate_and_predict_take_configuration_and_averages_from_the_checkpoint(
    tmp_path: Path, whole_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = f"--ckpt_path={whole_run / 'checkpoints' / 'step_0000009.ckpt'}"
    options = [f"--trainer.default_root_dir={tmp_path}", f"--trainer.logger.save_dir={tmp_path}"]
    assert cli.main(["validate", checkpoint, *options]) == 0
    during_training = logged(whole_run, "val/loss")
    (alone,) = logged(tmp_path, "val/loss").values()
    assert float(alone) == pytest.approx(float(during_training[max(during_training)]), rel=1e-6)
    assert cli.main(["predict", checkpoint, f"--trainer.default_root_dir={tmp_path}"]) == 0
    saved = np.load(tmp_path / "predictions.npz")
    assert saved["predicted"].shape == saved["true"].shape == (6, 5, 8)
    # The path may be broken over lines.
    assert "predictions.npz" in "".join(capsys.readouterr().out.split())


def test_the_resolved_configuration_is_kept_and_can_be_run_again(whole_run: Path) -> None:
    kept = yaml.safe_load((whole_run / "config.yaml").read_text())
    assert kept["trainer"]["max_steps"] == 9
    assert kept["data"]["init_args"]["batch_size"] == 4
    saved = torch.load(whole_run / "checkpoints" / "step_0000009.ckpt", weights_only=True)["spear"]["run"]
    assert saved["model"] == kept["model"]


def test_a_later_config_wins_and_options_win_over_all(tmp_path: Path, data_options: list[str]) -> None:
    change = tmp_path / "change.yaml"
    change.write_text("data: {init_args: {batch_size: 2}}\ntrainer: {max_steps: 1, val_check_interval: 1}\n")
    options = [f"--config={change}", "--model.recipe.lr=0.5", f"--trainer.default_root_dir={tmp_path}"]
    assert (
        cli.main(["fit", f"--config={TWIN}", *data_options, f"--trainer.logger.save_dir={tmp_path}", *options])
        == 0
    )
    kept = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert kept["data"]["init_args"]["batch_size"] == 2
    assert kept["data"]["init_args"]["holdout"] == 0.2
    assert kept["model"]["init_args"]["recipe"]["init_args"]["lr"] == 0.5


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--data.batchsize=3", "batchsize"),
        ("--trainer.max_stepz=3", "max_stepz"),
        ("--model.policy.flow.num_stepz=3", "num_stepz"),
    ],
)
def test_unknown_keys_are_named(
    tmp_path: Path, data_options: list[str], capsys: pytest.CaptureFixture[str], option: str, named: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path, data_options, option)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data.root=/nowhere"], "data root does not exist"),
        (["--data.mixture={brigde: 1.0}"], "did you mean bridge"),
        (["--data.cameras={primary: {width: 43, height: 28}}"], "43"),
        (["--ckpt_path=/nowhere.ckpt"], "no such checkpoint"),
        (["--model.policy.vla.expert.depth=3"], "cannot read the VLM's keys and values"),
        (["--data.batch_size=0"], "data.batch_size"),
        (["--trainer.accelerator=gpu"], "cannot be set up"),
    ],
)
def test_bad_input_is_one_clear_error(
    tmp_path: Path, data_options: list[str], capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    try:
        status = fit(tmp_path, data_options, *options)
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    assert status in (1, 2)
    assert expected in capsys.readouterr().err


def test_a_folder_with_a_run_is_not_written_over(
    whole_run: Path, data_options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(whole_run, data_options) == 1
    message = capsys.readouterr().err
    assert "already holds a run" in message
    assert "--ckpt_path last" in message


def test_other_data_than_the_run_s_are_refused(
    tmp_path: Path, whole_run: Path, data_options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_demo_episodes(tmp_path / "other", episodes=12, steps=8, height=32, width=48, seed=1)
    checkpoint = f"--ckpt_path={whole_run / 'checkpoints' / 'step_0000004.ckpt'}"
    options = [*data_options, f"--data.root={tmp_path / 'other'}"]
    assert fit(tmp_path / "run", options, checkpoint) == 1
    assert "trained on other data" in capsys.readouterr().err


def test_other_chunks_than_the_policy_s_are_refused(
    tmp_path: Path, whole_run: Path, data_options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = f"--ckpt_path={whole_run / 'checkpoints' / 'step_0000009.ckpt'}"
    where = [f"--trainer.default_root_dir={tmp_path}", f"--trainer.logger.save_dir={tmp_path}"]
    change = "--data.chunks={mode: per_step, rate_hz: 2.5}"
    assert cli.main(["validate", f"--config={TWIN}", checkpoint, *data_options, *where, change]) == 1
    assert "what the policy was trained on" in capsys.readouterr().err


def test_newest_checkpoint_is_that_of_the_largest_step(tmp_path: Path) -> None:
    for age, name in enumerate(("step_0000100.ckpt", "step_0000020.ckpt", "other.ckpt")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, ns=(age, age))
    assert newest_checkpoint(tmp_path) == tmp_path / "step_0000100.ckpt"
    assert newest_checkpoint(tmp_path / "none") is None


def test_a_checkpoint_of_another_architecture(
    tmp_path: Path, whole_run: Path, data_options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = whole_run / "checkpoints" / "step_0000009.ckpt"
    status = fit(tmp_path, data_options, f"--model.init_from={source}", "--model.policy.vla.expert.width=32")
    assert status == 1
    message = capsys.readouterr().err
    assert "another architecture" in message
    assert "of another shape" in message


def test_a_pattern_that_matches_nothing(
    tmp_path: Path, data_options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = yaml.safe_load(TWIN.read_text())
    wrong["trainer"]["callbacks"][0]["init_args"]["phases"][2]["freeze"] = ["vlm.encoders.mogee"]
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(wrong))
    where = [f"--trainer.default_root_dir={tmp_path}", f"--trainer.logger.save_dir={tmp_path}"]
    assert cli.main(["fit", f"--config={path}", *data_options, *where]) == 1
    message = capsys.readouterr().err
    assert "vlm.encoders.mogee" in message
    assert "vlm.encoders.moge" in message.replace("vlm.encoders.mogee", "")


def test_help_needs_no_heavy_import() -> None:
    code = """
import sys
from spear_lightning import cli
cli.main(["--help"])
print(sorted(name.split(".")[0] for name in sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: spear VERB" in result.stdout
    for heavy in ("torch", "lightning", "numpy", "mlflow", "transformers", "yaml"):
        assert f"'{heavy}'" not in result.stdout


def test_fit_help_explains_our_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["fit", "--help"])
    text = capsys.readouterr().out
    for room in (flow, models, training):
        for name in room.__all__:
            own = getattr(room, name)
            abstract = inspect.isabstract(own) or name in ("Prefix", "FlowSample")
            # Its own section: Lightning lists bare names of whatever happens to be imported.
            assert abstract or f": {room.__name__}.{name}\n" in text, name
    for option, explanation in {
        "holdout": "Share of each data set's episodes kept out of training",
        "geodesic_horizon": "How far the predicted velocity is integrated",
        "phases": "The phases in order",
        "--resume_allow": "Configuration keys",
    }.items():
        assert option in text
        assert explanation in text


def test_unknown_verbs_name_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fti"]) == 2
    assert "Did you mean `spear fit`?" in capsys.readouterr().err
