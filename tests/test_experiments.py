"""Every experiment that ships is understood by the real command line, and says what the paper says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from spear_lightning import cli
from spear_lightning.policy import build_policy

FOLDER = Path(__file__).resolve().parents[1] / "experiments"
EXPERIMENTS = sorted(path.relative_to(FOLDER) for path in FOLDER.rglob("*.yaml"))


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=str)
def test_the_command_line_accepts_it(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fit", f"--config={FOLDER / experiment}", "--print_config"])
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    # What the file says survives; nothing is dropped or renamed.
    assert (
        printed["data"]["init_args"]["cameras"].keys()
        == read(str(experiment))["data"]["init_args"]["cameras"].keys()
    )


def test_paper_scale_numbers() -> None:
    experiment = read("vla_oxe.yaml")
    data, trainer = experiment["data"]["init_args"], experiment["trainer"]
    assert (data["batch_size"], trainer["max_steps"]) == (2048, 300_000)
    assert trainer["devices"] * trainer["num_nodes"] == 32
    assert (data["chunks"]["horizon"], data["chunks"]["rate_hz"]) == (5, 5.0)
    sizes = {name: (camera["width"], camera["height"]) for name, camera in data["cameras"].items()}
    assert sizes == {"primary": (280, 210), "secondary": (280, 210), "wrist": (112, 112)}
    assert trainer["gradient_clip_val"] == 1.0
    phases = trainer["callbacks"][0]["init_args"]["phases"]
    assert [phase["freeze"] for phase in phases] == [["vlm.encoders.moge"]]


def test_paper_scale_model_has_the_paper_s_size() -> None:
    config = read("vla_oxe.yaml")["model"]["init_args"]["policy"]
    # The tokenizer needs a network; the network's sizes do not depend on it.
    config["init_args"]["prompt"]["init_args"]["tokenizer"] = "byte"
    with torch.device("meta"):
        vla = build_policy(config).vla
    millions = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in vla.named_children()}
    # PaliGemma 3B has 2,923 M parameters, MoGe's backbone 304 M; its projection 4096 -> 2048 has 8.4 M.
    assert millions["vlm"] == pytest.approx(2923.5 + 304.4 + 8.4, abs=1)
    assert millions["expert"] == pytest.approx(311.5 + 3.2, abs=3)


def test_quickstart_has_the_same_parts_as_the_paper_scale() -> None:
    def class_paths(node: Any) -> set[str]:
        if isinstance(node, dict):
            own = {node["class_path"]} if "class_path" in node else set()
            return own.union(*(class_paths(value) for value in node.values()))
        if isinstance(node, list):
            return set().union(*(class_paths(value) for value in node))
        return set()

    assert class_paths(read("quickstart/vla.yaml")) == class_paths(read("vla_oxe.yaml"))
