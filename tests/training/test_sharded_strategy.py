"""Training whose weights are divided among two processes equals that of one process on the same batches."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from warm_start import WarmProcess, WarmServer

from spear_lightning import cli
from spear_lightning.errors import CheckpointError
from spear_lightning.models import MogeEncoder
from spear_lightning.models.moge import MogeV1
from spear_lightning.policy import load_policy, read_checkpoint
from spear_lightning.policy.sharded_files import FILE_LIST, META_FILE
from spear_lightning.robot_data.demo_episodes import write_demo_episodes
from spear_lightning.training.checkpoint_files import newest_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
TWIN = REPOSITORY / "tests" / "conf" / "vla.yaml"
OVERLAY = REPOSITORY / "experiments" / "parallel" / "sharded.yaml"
RECOMPUTE = REPOSITORY / "experiments" / "parallel" / "recompute.yaml"
SCRIPT = REPOSITORY / "tests" / "training" / "sharded_run.py"

pytestmark = pytest.mark.slow


class Run:
    """A run that has been started.

    Args:
        processes: Its processes; 0 means one without the overlay.
        result: File for its losses (see `sharded_run.py`).
        run: Its folder.
        data: Folder with data and configuration.
        options: More of the command line.
        launcher: What starts the processes; `None`: `torchrun`.
        variables: See `sharded_run.py`.
    """

    def __init__(
        self,
        processes: int,
        result: Path,
        run: Path,
        data: Path,
        *options: str,
        launcher: WarmServer | None,
        **variables: str,
    ) -> None:
        overlay = [f"--config={OVERLAY}", f"--trainer.devices={processes}"] if processes else []
        places = [f"--data.root={data}", f"--data.index_folder={data / 'indexes'}"]
        places += [f"--trainer.default_root_dir={run}", f"--trainer.logger.save_dir={run}"]
        command = [str(result), "fit", f"--config={data / 'vla.yaml'}", *overlay, *places, *options]
        self._result, self._logs = result, []
        self._processes: list[WarmProcess | subprocess.Popen[bytes]] = []
        if launcher is None:
            self._by_torchrun(processes, command, variables)
        for rank in range(max(processes, 1) if launcher is not None else 0):
            ours = variables | (by_hand(rank, processes, result) if processes else {})
            self._logs.append(result.with_suffix(f".{rank}.log"))
            self._processes.append(launcher.start("sharded_run:main", *command, log=self._logs[-1], **ours))

    def _by_torchrun(self, processes: int, command: list[str], variables: Mapping[str, str]) -> None:
        torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone", str(SCRIPT)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        self._logs.append(self._result.with_suffix(".log"))
        with self._logs[0].open("wb") as log:
            self._processes.append(
                subprocess.Popen([sys.executable, *torchrun, *command], stdout=log, stderr=log, env=environment)
            )

    def losses(self) -> dict[int, float]:
        """Wait for its end."""
        statuses = [process.wait() for process in self._processes]
        assert not any(statuses), "\n".join(log.read_text()[-3000:] for log in self._logs)
        return {int(step): loss for step, loss in json.loads(self._result.read_text()).items()}


def by_hand(rank: int, processes: int, result: Path) -> dict[str, str]:
    """Return the variables that `torchrun` gives a process, of which there must be this many in all."""
    port = result.with_suffix(".port")
    if not rank:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port.write_text(str(probe.getsockname()[1]))
    places = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": processes}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port.read_text(), "TORCHELASTIC_RUN_ID": "by_hand"}
    return {**address, **{name: str(value) for name, value in places.items()}, "LOCAL_WORLD_SIZE": str(processes)}


def write_twin(folder: Path) -> None:
    """Write the twin's configuration with a MoGe that reads the layers its weights name: not the last four."""
    shape = {"hidden_width": 16, "depth": 5, "heads": 2, "image_size": 28}
    # Some random MoGe round worse than others.
    torch.manual_seed(1)
    moge = MogeV1(MogeEncoder(**shape, layers=(0, 1, 2, 4)), projection=8, upsampled=(8, 8, 8), last=8)
    weights = moge.save(folder / "moge.safetensors")
    config = yaml.safe_load(TWIN.read_text())
    encoders = config["model"]["init_args"]["policy"]["init_args"]["vla"]["init_args"]["vlm"]["init_args"][
        "encoders"
    ]
    encoders["moge"]["init_args"] = {**shape, "layers": None, "weights": str(weights)}
    (folder / "vla.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, warm_server: WarmServer) -> Path:
    """One process, and two which divide the weights and recompute blocks: the same experiment twice."""
    folder = tmp_path_factory.mktemp("sharded")
    data = folder / "data"
    data.mkdir()
    write_demo_episodes(data, episodes=10, steps=8, height=32, width=48)
    write_twin(data)
    recompute = f"--config={RECOMPUTE}"
    two = Run(2, folder / "two.json", folder / "two", data, recompute, launcher=None, HOLD_AT="4")
    one = Run(0, folder / "one.json", folder / "one", data, launcher=warm_server)
    one.losses()
    two.losses()
    return folder


def losses(runs: Path, name: str) -> dict[int, float]:
    return {int(step): loss for step, loss in json.loads((runs / f"{name}.json").read_text()).items()}


def checkpoint(runs: Path, name: str, step: int) -> dict[str, Any]:
    return read_checkpoint(runs / name / "checkpoints" / f"step_{step:07d}.ckpt")


def test_losses_weights_and_averages_are_those_of_one_process(runs: Path) -> None:
    """Losses within 1e-6 relative; weights within 1e-4, a thirtieth of what Adam may change in one step."""
    one, two = losses(runs, "one"), losses(runs, "two")
    assert sorted(one) == sorted(two) == list(range(9))
    assert two == pytest.approx(one, rel=1e-6)
    alone, divided = checkpoint(runs, "one", 9), checkpoint(runs, "two", 9)
    for entry in ("state_dict", "ema"):
        assert alone[entry].keys() == divided[entry].keys()
        for name, tensor in alone[entry].items():
            torch.testing.assert_close(divided[entry][name], tensor, rtol=0, atol=1e-4, equal_nan=True)
    assert len(divided["ema"]) > 50


def test_frozen_parts_are_untouched_and_have_no_state(runs: Path) -> None:
    early, late = checkpoint(runs, "two", 2), checkpoint(runs, "two", 9)
    moge = [name for name in late["state_dict"] if ".encoders.moge." in name]
    siglip = [name for name in late["state_dict"] if name.endswith("mlp.fc1.weight") and "siglip" in name]
    assert len(moge) > 20
    assert all(torch.equal(early["state_dict"][name], late["state_dict"][name]) for name in moge)
    assert not any(torch.equal(early["state_dict"][name], late["state_dict"][name]) for name in siglip)
    folder = runs / "two" / "checkpoints" / "step_0000009.ckpt"
    saved = [name for path in folder.glob("*.safetensors") for name in load_file(path)]
    assert not [name for name in saved if ".encoders.moge." in name and name.startswith(("optimizer.", "ema."))]
    # Each of the two files has half of a matrix.
    assert saved.count(f"state_dict.{siglip[0]}") == saved.count(f"optimizer.exp_avg.{siglip[0]}") == 2


def test_what_is_written_while_training_goes_on_is_the_state_when_it_was_asked_for(runs: Path) -> None:
    """The writer of step 4 was held until step 5 was done; the same state had been written at once before."""
    late, whole = (runs / "two" / name / "step_0000004.ckpt" for name in ("checkpoints", "whole"))
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in late.iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) == 2
    assert sorted({*names} - {*shards}) == [FILE_LIST, META_FILE]
    for name in (FILE_LIST, META_FILE):
        assert (late / name).read_bytes() == (whole / name).read_bytes()
    for name in shards:
        saved, wanted = load_file(late / name), load_file(whole / name)
        assert saved.keys() == wanted.keys()
        assert {name.split(".")[0] for name in saved} == {"state_dict", "ema", "optimizer"}
        assert all(tensor.numpy().tobytes() == wanted[name].numpy().tobytes() for name, tensor in saved.items())
    assert not list((runs / "two" / "checkpoints").glob(".*"))


def test_all_processes_read_the_layers_that_the_weights_name(runs: Path) -> None:
    numbers = checkpoint(runs, "two", 2)["state_dict"]["policy.vla.vlm.encoders.moge.layer_numbers"]
    assert numbers.tolist() == [0, 1, 2, 4]


def test_two_processes_save_one_resumes_and_predicts(
    runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, warm_server: WarmServer
) -> None:
    """Also across a phase of the freeze schedule: step 4 is in the second, step 9 in the third."""
    starts = []
    for name, processes in {"again": 1, "plain": 0}.items():
        folder = runs / name / "checkpoints"
        shutil.copytree(runs / "two" / "checkpoints" / "step_0000004.ckpt", folder / "step_0000004.ckpt")
        places = runs / f"{name}.json", runs / name, runs / "data"
        starts.append(Run(processes, *places, "--ckpt_path=last", launcher=warm_server))
    whole = losses(runs, "one")
    for start in starts:
        resumed = start.losses()
        assert sorted(resumed) == [4, 5, 6, 7, 8]
        assert resumed == pytest.approx({step: whole[step] for step in resumed}, rel=1e-6)
    path = newest_checkpoint(runs / "again" / "checkpoints")
    assert path is not None
    assert path.is_dir()
    assert cli.main(["predict", f"--ckpt_path={path}", f"--trainer.default_root_dir={tmp_path}"]) == 0
    assert "100 %" in capsys.readouterr().out
    averaged, raw = load_policy(path).state_dict(), load_policy(path, "raw").state_dict()
    name = "vla.expert.action_out.weight"
    torch.testing.assert_close(
        averaged[name], checkpoint(runs, "one", 9)["ema"][f"policy.{name}"], rtol=0, atol=1e-4
    )
    assert not torch.equal(averaged[name], raw[name])


def test_bfloat16_products_of_float32_weights_until_a_signal_to_one_process(
    runs: Path, warm_server: WarmServer
) -> None:
    """SigLIP trains from step 6 on only; a unit that was frozen at first has float32 gradients as well.

    The signal comes in step 5 and is noticed after it; after step 6 both processes know.
    """
    places = runs / "rounded.json", runs / "rounded", runs / "data"
    options = ["--trainer.precision=bf16-mixed", "--trainer.callbacks+=spear_lightning.training.StopOnSignal"]
    rounded = Run(2, *places, *options, launcher=warm_server, SIGNAL_AT="5").losses()
    whole = losses(runs, "one")
    assert sorted(rounded) == list(range(7))
    assert rounded == pytest.approx({step: whole[step] for step in rounded}, rel=0.02)
    assert all(rounded[step] != whole[step] for step in rounded)
    saved = checkpoint(runs, "rounded", 7)
    assert saved["global_step"] == 7
    assert {tensor.dtype for name, tensor in saved["state_dict"].items() if "proj" in name} == {torch.float32}


def test_a_folder_that_was_not_finished_is_refused(runs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "step_0000009.ckpt"
    shutil.copytree(runs / "two" / "checkpoints" / copy.name, copy)
    (copy / META_FILE).unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        read_checkpoint(copy)
