from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import failing_writer
import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from warm_start import WarmServer

from spear_lightning.errors import CheckpointError
from spear_lightning.policy.sharded_files import read_folder, write_file_list
from spear_lightning.training import checkpoint_files, checkpoint_writing
from spear_lightning.training.checkpoint_files import RunCheckpoint, WholeFileCheckpointIO
from spear_lightning.training.checkpoint_writing import CopyOnCpu, SaveUnderWay, begin_folder
from spear_lightning.training.ema import ExponentialMovingAverage

Fit = Callable[..., L.Trainer]


@pytest.fixture
def fit(tiny_module: Any, tmp_path: Path) -> Fit:
    """Trains ten steps, with a checkpoint every three in a folder of the given name."""

    def run(name: str, *callbacks: Callback, **options: Any) -> L.Trainer:
        checkpoints = RunCheckpoint(every_steps=3, **options)
        checkpoints.dirpath = str(tmp_path / name)
        trainer = L.Trainer(
            callbacks=[ExponentialMovingAverage(decay=0.5), *callbacks, checkpoints],
            plugins=[WholeFileCheckpointIO()],
            max_steps=10,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(tiny_module(), DataLoader(torch.arange(20), batch_size=None))
        return trainer

    return run


class Releases(Callback):
    """Lets held writers go on when a step is done, and notes what lies in a folder just before."""

    def __init__(self, step: int, folder: Path) -> None:
        self.step, self.folder, self.released, self.seen = step, folder, threading.Event(), [""]

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.seen = sorted(path.name for path in self.folder.glob("*.ckpt"))
            self.released.set()


def held(monkeypatch: pytest.MonkeyPatch, releases: Releases, name: str) -> None:
    """Hold the writer of one file until it is released."""
    plain = checkpoint_writing.write_file

    def write_file(checkpoint: Any, path: Path) -> None:
        if path.name == name:
            assert releases.released.wait(timeout=60)
        plain(checkpoint, path)

    monkeypatch.setattr(checkpoint_writing, "write_file", write_file)


def assert_same(saved: Any, wanted: Any) -> None:
    if isinstance(wanted, Mapping):
        assert saved.keys() == wanted.keys()
        for key in wanted:
            assert_same(saved[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert len(saved) == len(wanted)
        for item, other in zip(saved, wanted, strict=True):
            assert_same(item, other)
    elif isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(saved, wanted, rtol=0, atol=0)
    else:
        assert saved == wanted


def test_what_is_written_while_training_goes_on_is_the_state_when_it_was_asked_for(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit("at once", asynchronous=False)
    releases = Releases(5, tmp_path / "late")
    held(monkeypatch, releases, "step_0000003.ckpt")
    fit("late", releases)
    assert releases.seen == []
    names = [f"step_{step:07d}.ckpt" for step in (3, 6, 9, 10)]
    assert sorted(path.name for path in (tmp_path / "late").iterdir()) == names
    for name in names:
        saved, wanted = (torch.load(tmp_path / run / name, weights_only=True) for run in ("late", "at once"))
        assert saved.keys() == wanted.keys()
        for entry in saved.keys() - {"callbacks"}:
            assert_same(saved[entry], wanted[entry])


def test_the_copy_takes_its_memory_once() -> None:
    state = {"weights": {"a": torch.arange(3.0)}, "step": 1, "names": ["a"]}
    copy = CopyOnCpu()
    first = copy.stage(state)
    state["weights"]["a"] += 1  # type: ignore[index]
    second = copy.stage({**state, "step": 2})
    assert second["weights"]["a"].tolist() == [1.0, 2.0, 3.0]
    assert (second["step"], second["names"]) == (2, ["a"])
    assert second["weights"]["a"].data_ptr() == first["weights"]["a"].data_ptr()
    assert second["weights"]["a"].data_ptr() != state["weights"]["a"].data_ptr()  # type: ignore[index]
    copy.close()


def test_an_older_checkpoint_goes_when_the_newer_one_is_complete(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    releases = Releases(8, tmp_path / "late")
    held(monkeypatch, releases, "step_0000006.ckpt")
    fit("late", releases, keep=1)
    assert releases.seen == ["step_0000003.ckpt"]
    # The end of training is the newest.
    assert [path.name for path in (tmp_path / "late").iterdir()] == ["step_0000010.ckpt"]


def test_a_write_that_fails_ends_the_training_in_a_later_step(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 6 waits for what was begun after step 3."""

    def full(checkpoint: Any, path: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint_writing, "write_file", full)
    releases = Releases(7, tmp_path / "late")
    with pytest.raises(CheckpointError, match=r"(?s)step_0000003.*No space left"):
        fit("late", releases)
    assert not releases.released.is_set()


def test_without_room_for_a_copy_training_waits(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(checkpoint_files, "psutil", memory)
    monkeypatch.setattr(checkpoint_files, "begin_file", None)
    fit("late")
    assert "training waits" in caplog.text
    assert len(list((tmp_path / "late").glob("step_*.ckpt"))) == 4


def test_a_folder_of_several_files_replaces_one_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writing, "FILE_BYTES", 1000)
    tensors = {f"state_dict.{number}": torch.rand(100) for number in range(5)}
    path = tmp_path / "step_1.ckpt"
    path.mkdir()
    (path / "old").touch()
    begin_folder(tensors, {"global_step": 1}, path, CopyOnCpu()).result()
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    assert len(list(path.glob("*.safetensors"))) == 3
    assert not (path / "old").exists()
    assert_same(
        dict(read_folder(path)["state_dict"]), {name.split(".")[1]: value for name, value in tensors.items()}
    )


@pytest.mark.parametrize("listed", [True, False])
def test_a_copy_that_lacks_a_file_is_no_checkpoint(listed: bool, tmp_path: Path) -> None:
    # What four processes leave: a piece of every tensor in each file.
    whole = torch.arange(8.0)
    for rank, piece in enumerate(whole.split(2)):
        places = {"DCP_SHARDING_INFO": json.dumps({"state_dict.w": {"saved_offsets": [2 * rank]}})}
        save_file({"state_dict.w": piece.clone()}, tmp_path / f"shard-{rank}.safetensors", metadata=places)
    if listed:
        write_file_list(tmp_path)
    torch.save({}, tmp_path / "meta.pt")
    assert torch.equal(read_folder(tmp_path)["state_dict"]["w"], whole)
    (tmp_path / "shard-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint" if listed else "not whole"):
        read_folder(tmp_path)["state_dict"]["w"]


def named(folder: Path) -> list[str]:
    """Return the names of checkpoints; others may be under way."""
    return sorted(path.name for path in folder.glob("step*"))


@pytest.mark.slow
def test_when_another_process_fails_or_dies_this_one_is_told_and_no_folder_gets_a_name(
    tmp_path: Path, warm_server: WarmServer
) -> None:
    other = warm_server.start("failing_writer:write_until_killed", str(tmp_path))
    save, removed = SaveUnderWay(), []
    failing_writer.join(tmp_path, rank=0)
    try:
        failing_writer.begin(tmp_path, 1, save)
        save.wait()
        assert named(tmp_path) == ["step_1.ckpt"]
        failing_writer.begin(tmp_path, 2, save)
        save.afterwards(lambda: removed.append("step_1.ckpt"))
        with pytest.raises(CheckpointError, match=r"(?s)step_2.*No space left on device"):
            save.wait()
        assert named(tmp_path) == ["step_1.ckpt"]
        failing_writer.begin(tmp_path, 3, save)
        with pytest.raises(CheckpointError, match="step_3"):
            save.wait()
    finally:
        dist.destroy_process_group()
    assert other.wait() == -signal.SIGKILL
    assert named(tmp_path) == ["step_1.ckpt"]
    assert {path.suffix for path in tmp_path.glob(".*")} == {".partial"}
    assert not removed
    saved = read_folder(tmp_path / "step_1.ckpt")
    assert_same(dict(saved["state_dict"]), {"0": torch.ones(3), "1": torch.ones(3)})
