"""SPEAR-VLM through the real command line: both stages, kill and resume, export, the VLA that starts from it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import yaml
from finished_runs import checkpoint, logged, run_until_killed, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer
from warm_start import WarmServer

from spear_lightning import cli
from spear_lightning.errors import CheckpointError
from spear_lightning.labeling.demo_labels import demo_label, write_demo_labels
from spear_lightning.policy import Answerer, load_answerer
from spear_lightning.policy.checkpoint import read_checkpoint
from spear_lightning.robot_data.demo_episodes import write_demo_episodes
from spear_lightning.training.command_line import SpearCLI
from spear_lightning.vqa.mixture import read_answers
from spear_lightning.vqa.object_tasks import Distance

TWIN = Path(__file__).resolve().parents[1] / "conf" / "vlm.yaml"
VLA_TWIN = TWIN.with_name("vla.yaml")
SIGLIP, MOGE = "answerer.vlm.encoders.siglip.", "answerer.vlm.encoders.moge."
BASE, NEW = "answerer.vlm.language_model.embed_tokens.weight", "answerer.vlm.language_model.new_embeddings.weight"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_demo_labels(root / "labels", 40)
    return root


def fit(run: Path, data: Path, *options: str, config: Path = TWIN) -> int:
    where = [f"--trainer.default_root_dir={run}", f"--trainer.logger.save_dir={run}"]
    return cli.main(["fit", f"--config={config}", f"--data.root={data}", *where, *options])


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    run = tmp_path_factory.mktemp("whole")
    assert fit(run, data) == 0
    return run


def test_every_part_of_the_loss_and_every_task_is_logged(whole_run: Path) -> None:
    for name in ("loss", "words", "coordinates", "tokens", "clamped"):
        assert sorted(logged(whole_run, f"train/{name}")) == list(range(7))
    for name in ("loss", "words", "coordinates", "parse_rate", "coordinate_accuracy", "loss_Distance"):
        assert len(logged(whole_run, f"val/{name}")) == 2
    words, coordinates = (logged(whole_run, f"train/{name}") for name in ("words", "coordinates"))
    for step, loss in logged(whole_run, "train/loss").items():
        # Lambda is 1 until step 3, then 2: the loss lies between the parts, then beyond their mean.
        low, high = sorted((float(words[step]), float(coordinates[step])))
        assert (low <= float(loss) <= high + 1e-4) == (step < 3)


def test_numbers_that_have_no_token_are_told_of(whole_run: Path, tmp_path: Path, data: Path) -> None:
    one_step = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    assert fit(tmp_path, data, "--data.value_range=[-0.001, 0.001]", *one_step) == 0
    assert float(logged(tmp_path, "train/clamped")[0]) > 0.9
    assert float(logged(whole_run, "train/clamped")[0]) < 0.05


def test_pictures_reach_tensorboard(tmp_path: Path, data: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    logger = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": str(tmp_path), "name": "tensorboard", "version": ""},
    }
    overlay.write_text(yaml.safe_dump({"trainer": {"logger": logger, "max_steps": 1, "val_check_interval": 1}}))
    assert fit(tmp_path, data, f"--config={overlay}") == 0
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [picture.step for picture in events.Images("val/boxes")] == [1]


def test_stage_1a_has_state_for_the_three_groups_of_the_paper_alone(whole_run: Path) -> None:
    saved = torch.load(checkpoint(whole_run, 2), weights_only=True)
    (optimizer,) = saved["optimizer_states"]
    names = {group["name"].removesuffix("/no_decay") for group in optimizer["param_groups"]}
    assert names == {"vlm.projections", "vlm.language_model.new_embeddings"}
    shapes = sorted(tuple(state["exp_avg"].shape) for state in optimizer["state"].values())
    # Weight and bias of MoGe's (32 channels) and SigLIP's (16) projections to 32, and 64 3D tokens: nothing else.
    assert shapes == sorted([(32, 32), (32,), (32, 16), (32,), (64, 32)])


def test_what_is_frozen_keeps_its_bits(whole_run: Path) -> None:
    states = [weights(whole_run, step) for step in (2, 4, 7)]
    for name in states[0]:
        aligned = ".projections." in name or name == NEW
        assert torch.equal(states[0][name], states[1][name]) == (name.startswith(SIGLIP)), name
        assert torch.equal(states[1][name], states[2][name]) == (name.startswith(SIGLIP)), name
        assert aligned or "encoders" in name or "language_model" in name


@pytest.mark.slow
def test_killed_and_resumed_training_is_bit_equal(
    tmp_path: Path, whole_run: Path, data: Path, warm_server: WarmServer
) -> None:
    options = [f"--trainer.default_root_dir={tmp_path}", f"--trainer.logger.save_dir={tmp_path}"]
    options.append("--data.num_workers=1")
    command = ["fit", f"--config={TWIN}", f"--data.root={data}", *options]
    run_until_killed(warm_server, "spear_lightning.training.vlm_module.VLMModule", (5, command))
    assert fit(tmp_path, data, "--ckpt_path=last") == 0
    resumed, whole = logged(tmp_path, "train/loss"), logged(whole_run, "train/loss")
    assert {s: resumed[s] for s in range(4, 7)} == {s: whole[s] for s in range(4, 7)}
    for name, tensor in weights(whole_run, 7).items():
        assert torch.equal(tensor, weights(tmp_path, 7)[name]), name


def test_frozen_in_stage_1a_and_untouched_by_a_resume(tmp_path: Path, whole_run: Path, data: Path) -> None:
    options = ["--trainer.max_steps=3", "--resume_allow=[trainer.max_steps]"]
    assert fit(tmp_path, data, f"--ckpt_path={checkpoint(whole_run, 2)}", *options) == 0
    before, after = weights(whole_run, 2), weights(tmp_path, 3)
    for name, tensor in before.items():
        trains = ".projections." in name or name == NEW
        assert torch.equal(tensor, after[name]) != trains, name


def test_answers_are_the_same_from_training_export_and_from_pretrained(tmp_path: Path, data: Path) -> None:
    # Long enough for answers that parse: one 3D token and the end.
    where = [f"--trainer.default_root_dir={tmp_path}", f"--trainer.logger.save_dir={tmp_path}"]
    steps = ["--trainer.max_steps=60", "--trainer.limit_val_batches=0", "--model.recipe.lr=1e-2"]
    tasks = "--data.tasks={spear_lightning.vqa.object_tasks.Distance: 1.0}"
    command = ["fit", f"--config={TWIN}", f"--data.root={data}", *where, *steps, tasks, "--data.max_pairs=1"]
    trained: Answerer = SpearCLI(
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=command,
    ).model.answerer.eval()
    loaded = load_answerer(checkpoint(tmp_path, 60), "raw")
    loaded.save_pretrained(tmp_path / "export")
    exported = Answerer.from_pretrained(str(tmp_path / "export"))
    question = "How far is the red box from the camera?"
    texts = [[answerer.answer(demo_label(7)[1], question)] for answerer in (trained, loaded, exported)]
    assert texts[0] == texts[1] == texts[2]
    (answer,) = read_answers(texts[0][0], [Distance()], loaded.require_tokens(), 28, 42)
    assert answer is not None
    assert loaded.require_tokens().to_dict() == exported.require_tokens().to_dict()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer.convert_tokens_to_ids(["<3d_0000>", "<3d_0063>", "<loc0000>"]) == [1300, 1363, 259]
    assert [tokenizer(question, add_special_tokens=False).input_ids] == loaded.prompt.vocabulary.encode([question])
    with pytest.raises(CheckpointError, match="not empty"):
        loaded.save_pretrained(tmp_path / "export")
    (tmp_path / "export" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no exported SPEAR-VLM"):
        load_answerer(tmp_path / "export")


def test_predict_writes_questions_and_answers(tmp_path: Path, whole_run: Path) -> None:
    source = checkpoint(whole_run, 7)
    assert cli.main(["predict", f"--ckpt_path={source}", f"--trainer.default_root_dir={tmp_path}"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["position"] for row in rows] == list(range(6))
    for row in rows:
        assert row["question"].count("\n") == row["true_answer"].count("\n")


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_a_policy_starts_from_spear_vlm_by_one_key(
    kind: str,
    tmp_path: Path,
    whole_run: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    source = checkpoint(whole_run, 7)
    if kind == "export":
        load_answerer(source).save_pretrained(tmp_path / "export")
    path = source if kind == "checkpoint" else tmp_path / "export"
    write_demo_episodes(tmp_path, episodes=4, steps=6, height=32, width=48)
    options = [f"--model.vlm={path}", "--trainer.max_steps=1", f"--data.index_folder={tmp_path / 'indexes'}"]
    assert fit(tmp_path / "vla", tmp_path, *options, config=VLA_TWIN) == 0
    assert "left out: 64 embeddings of 3D tokens, 1040 embeddings beyond" in caplog.text
    averages = read_checkpoint(source)["ema"]
    found = weights(tmp_path / "vla", 1)
    prefix = "policy.vla.vlm."
    # The first phase freezes all but the projections.
    for part in ("language_model.layers.0.mlp.up_proj.weight", "encoders.siglip.model.post_layernorm.weight"):
        expected = averages.get(f"answerer.vlm.{part}", weights(whole_run, 7)[f"answerer.vlm.{part}"])
        assert torch.equal(found[prefix + part], expected)
    assert torch.equal(found[prefix + "language_model.embed_tokens.weight"], averages[BASE][:260])
    assert prefix + "language_model.new_embeddings.weight" not in found
    other = "--model.policy.vla.vlm.language.mlp_width=64"
    assert fit(tmp_path / "other", tmp_path, *options, other, config=VLA_TWIN) == 1
    assert "of another shape" in capsys.readouterr().err


def test_validation_of_a_checkpoint_prints_the_baseline(
    tmp_path: Path, whole_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--trainer.default_root_dir={tmp_path}", f"--trainer.logger.save_dir={tmp_path}"]
    assert cli.main(["validate", f"--ckpt_path={checkpoint(whole_run, 6)}", *options]) == 0
    for name in ("val/loss", "val/loss_BoxVertices", "val/coordinates"):
        first, last = (float(value) for value in logged(whole_run, name).values())
        (alone,) = (float(value) for value in logged(tmp_path, name).values())
        assert alone == pytest.approx(last, rel=1e-5) != first
    printed = capsys.readouterr().out
    assert "constant mean" in printed
    assert "iou_at_0.25" in printed
    assert [float(value) for value in logged(tmp_path, "baseline/parse_rate").values()] == [1.0]
    assert 0 < float(next(iter(logged(tmp_path, "baseline/centre_error").values()))) < 1


def test_warm_start_keeps_the_meaning_of_the_3d_tokens(tmp_path: Path, whole_run: Path, data: Path) -> None:
    write_demo_labels(tmp_path / "labels", 20, seed=500)
    source = checkpoint(whole_run, 7)
    assert fit(tmp_path / "run", tmp_path, f"--model.init_from={source}", "--trainer.max_steps=1") == 0
    old, new = (read_checkpoint(path)["spear"] for path in (source, checkpoint(tmp_path / "run", 1)))
    assert new["tokens"] == old["tokens"]
    assert torch.equal(weights(tmp_path / "run", 1)[BASE], read_checkpoint(source)["ema"][BASE])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data.root=/nowhere"], "data root does not exist"),
        (["--data.labels={nothing: 1.0}"], "There are no labels"),
        (["--data.tasks={spear_lightning.vqa.task.Task2: 1.0}"], "no such task"),
        (["--data.batch_size=0"], "data.batch_size"),
        (["--data.cameras={a: {width: 28, height: 28}, b: {width: 28, height: 28}}"], "one camera"),
        (["--model.answerer.vlm.language.new_tokens=0"], "do not fit"),
        (["--model.answerer.vlm.language.vocab_size=1000"], "do not fit"),
        (["--model.coordinate_weights={5: 1.0}"], "beginning at step 0"),
        (["--model.init_from=/nowhere"], "no such SPEAR-VLM"),
    ],
)
def test_bad_input_is_one_clear_error(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    try:
        status = fit(tmp_path, data, *options)
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    assert status in (1, 2)
    assert expected in capsys.readouterr().err


def test_other_labels_than_the_run_s_are_refused(
    tmp_path: Path, whole_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_demo_labels(tmp_path / "labels", 30, seed=900)
    assert fit(tmp_path / "run", tmp_path, f"--ckpt_path={checkpoint(whole_run, 4)}") == 1
    assert "trained on other questions" in capsys.readouterr().err


def test_the_resolved_configuration_is_kept(whole_run: Path) -> None:
    kept = yaml.safe_load((whole_run / "config.yaml").read_text())
    assert kept["model"]["init_args"]["coordinate_weights"] == {"0": 1.0, "3": 2.0}
    assert kept["data"]["init_args"]["value_range"] is None
