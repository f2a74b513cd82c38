"""Every experiment that ships is understood by the real command line, and says what the paper says."""

from __future__ import annotations

import contextlib
import functools
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from spear_lightning import cli
from spear_lightning.policy import Answerer, build_policy
from spear_lightning.policy.checkpoint import build
from spear_lightning.training.float8_products import fitting_layers
from spear_lightning.training.freeze_plan import FreezePlan, Phase
from spear_lightning.training.patch_naming_module import WEIGHTS_FILE

FOLDER = Path(__file__).resolve().parents[1] / "experiments"
# Those of `spear label` are tested with it.
CHANGES = {
    "tabletop/vlm_no_objects.yaml": ["tabletop/vlm.yaml"],
    "tabletop/vlm_float8.yaml": ["tabletop/vlm.yaml"],
    "tabletop/vlm_moge_trained.yaml": ["tabletop/vlm.yaml"],
    "tabletop/vlm_moge_frozen.yaml": ["tabletop/vlm.yaml"],
    "tabletop/vla_from_vlm.yaml": ["tabletop/vla.yaml"],
    "ablations/no_obj_vlm.yaml": ["vlm_3dvqa.yaml", "vlm_3dvqa_encoders_frozen.yaml"],
    "ablations/no_moge_vlm.yaml": ["vlm_3dvqa.yaml"],
    "ablations/no_moge_vla.yaml": ["vla_oxe.yaml"],
    "ablations/no_vla_mf_vla.yaml": ["vla_oxe.yaml"],
    "parallel/sharded.yaml": ["vla_oxe.yaml", "vlm_3dvqa.yaml"],
    "parallel/sharded_in_node.yaml": ["vla_oxe.yaml", "vlm_3dvqa.yaml"],
    "parallel/recompute.yaml": ["vla_oxe.yaml", "vlm_3dvqa.yaml"],
    "parallel/float8.yaml": ["vla_oxe.yaml", "vlm_3dvqa.yaml"],
    "parallel/slurm.yaml": ["vla_oxe.yaml", "vlm_3dvqa.yaml"],
    "parallel/h200_141.yaml": ["vla_oxe.yaml"],
    "parallel/h100_80.yaml": ["vla_oxe.yaml"],
}
"""File that changes others -> those others."""

OTHER_VERBS = ("labeling/",)
"""Folders of configurations that other verbs than `spear fit` read."""

EXPERIMENTS = sorted(
    path.relative_to(FOLDER)
    for path in FOLDER.rglob("*.yaml")
    if str(path.relative_to(FOLDER)) not in CHANGES and not str(path.relative_to(FOLDER)).startswith(OTHER_VERBS)
)


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


@functools.cache
def resolved(*names: str) -> dict[str, Any]:
    """Return the configuration that the command line makes of some files; it is for reading only."""
    with pytest.raises(SystemExit) as stopped, contextlib.redirect_stdout(io.StringIO()) as printed:
        cli.main(["fit", *(f"--config={FOLDER / name}" for name in names), "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(printed.getvalue())


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=str)
def test_the_command_line_accepts_it(experiment: Path) -> None:
    printed = resolved(str(experiment))["data"]["init_args"]
    written = read(str(experiment))["data"]["init_args"]
    # What the file says survives; nothing is dropped or renamed.
    assert written.keys() <= printed.keys()
    assert printed.get("cameras", {}).keys() == written.get("cameras", {}).keys()


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


def test_products_in_8_bits_are_those_of_gemmas_and_siglips_blocks() -> None:
    config = read("vla_oxe.yaml")["model"]["init_args"]["policy"]
    config["init_args"]["prompt"]["init_args"]["tokenizer"] = "byte"
    with torch.device("meta"):
        vla = build_policy(config).vla
    (callback,) = read("parallel/float8.yaml")["trainer"]["callbacks+"]
    names = fitting_layers(vla, callback["init_args"]["layers"])
    # Three layers of an MLP and an output projection in 18 blocks, two layers of an MLP in 27.
    assert len(names) == 18 * 4 + 27 * 2
    assert all("expert" not in name and "moge" not in name for name in names)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_change_what_they_name_and_nothing_else(change: str) -> None:
    def differences(first: Any, second: Any, where: str = "") -> set[str]:
        if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
            return set().union(*(differences(first[key], second[key], f"{where}.{key}") for key in first))
        return set() if first == second else {where}

    def leaves(node: Any, where: str = "") -> set[str]:
        if isinstance(node, dict):
            return set().union(*(leaves(value, f"{where}.{key}") for key, value in node.items()))
        return {where}

    for base in CHANGES[change]:
        before, after = resolved(base), resolved(base, change)
        changed = differences(before, after)
        assert changed
        named = [leaf.replace("+", "") for leaf in leaves(read(change))]
        assert all(any(leaf.startswith(where) for leaf in named) for where in changed), changed


def test_ablations_mean_what_their_names_say() -> None:
    def schedule(printed: dict[str, Any]) -> list[dict[str, Any]]:
        return printed["trainer"]["callbacks"][0]["init_args"]["phases"]

    random_pixels = resolved("vlm_3dvqa_encoders_frozen.yaml", "ablations/no_obj_vlm.yaml")
    assert list(random_pixels["data"]["init_args"]["tasks"]) == ["spear_lightning.vqa.object_tasks.RandomPixels"]
    unfrozen = resolved("vla_oxe.yaml", "ablations/no_vla_mf_vla.yaml")
    assert [phase["freeze"] for phase in schedule(unfrozen)] == [[]]
    vlm = resolved("vlm_3dvqa.yaml", "ablations/no_moge_vlm.yaml")
    vla = resolved("vla_oxe.yaml", "ablations/no_moge_vla.yaml")
    networks = [
        vlm["model"]["init_args"]["answerer"]["init_args"]["vlm"],
        vla["model"]["init_args"]["policy"]["init_args"]["vla"]["init_args"]["vlm"],
    ]
    # YAML replaces lists whole: of the callbacks, only what trains may differ.
    plain = {"vlm": resolved("vlm_3dvqa.yaml"), "vla": resolved("vla_oxe.yaml")}
    for printed, kind in ((unfrozen, "vla"), (vlm, "vlm"), (vla, "vla")):
        assert printed["trainer"]["callbacks"][1:] == plain[kind]["trainer"]["callbacks"][1:]
    for network, printed in zip(networks, (vlm, vla), strict=True):
        assert list(network["init_args"]["encoders"]) == ["siglip"]
        assert not [phase for phase in schedule(printed) if "moge" in str(phase)]


def test_the_small_moge_is_that_of_its_experiment_and_differs_in_freezing_alone() -> None:
    geometry = read("tabletop/geometry.yaml")["model"]["init_args"]["moge"]["init_args"]["encoder"]["init_args"]
    files = ("tabletop/vlm.yaml", "tabletop/vlm_moge_trained.yaml", "tabletop/vlm_moge_frozen.yaml")
    plain, trained, frozen = (resolved(*files[: count + 1]) for count in range(3))
    networks = [one["model"]["init_args"]["answerer"]["init_args"]["vlm"]["init_args"] for one in (plain, frozen)]
    pixels, moge = (networks[1]["encoders"][name] for name in ("pixels", "moge"))
    assert pixels == networks[0]["encoders"]["pixels"]
    sizes = {name: moge["init_args"][name] for name in ("hidden_width", "depth", "heads", "image_size")}
    assert sizes == {name: geometry[name] for name in sizes}
    # `null` takes the blocks that the weights' own configuration names.
    assert moge["init_args"]["layers"] is None
    assert trained["model"] == frozen["model"]
    callbacks = [one["trainer"]["callbacks"] for one in (trained, frozen)]
    assert callbacks[0][1:] == callbacks[1][1:]
    phases = [one[0]["init_args"]["phases"] for one in callbacks]
    assert [phase["freeze"] for phase in (phases[0][0], phases[1][0])] == [[], ["vlm.encoders.moge"]]


def test_the_encoder_that_learns_names_is_that_of_the_vlm_and_sees_none_of_its_held_out_pictures() -> None:
    names, vlm = resolved("tabletop/names.yaml"), resolved("tabletop/vlm.yaml")
    own = names["model"]["init_args"]["namer"]["init_args"]["encoder"]
    network = vlm["model"]["init_args"]["answerer"]["init_args"]["vlm"]["init_args"]
    other = network["encoders"]["pixels"]
    assert own["class_path"] == other["class_path"]
    assert {**own["init_args"], "weights": None} == {**other["init_args"], "weights": None}
    assert other["init_args"]["weights"] == str(Path(names["trainer"]["default_root_dir"]) / WEIGHTS_FILE)
    data = [one["data"]["init_args"] for one in (names, vlm)]
    for key in ("labels", "holdout", "seed"):
        assert data[0][key] == data[1][key]
    assert data[0]["camera"] == data[1]["cameras"]["primary"]


def test_the_8_bit_tabletop_vlm_differs_in_its_products_alone() -> None:
    plain, small = (resolved("tabletop/vlm.yaml", *more) for more in ([], ["tabletop/vlm_float8.yaml"]))
    assert plain["model"] == small["model"]
    callbacks = small["trainer"]["callbacks"]
    kinds = [callback["class_path"].rsplit(".")[-1] for callback in callbacks]
    assert kinds.index("Float8Products") < kinds.index("RegionalCompile")
    assert plain["trainer"]["callbacks"] == [part for part in callbacks if "Float8" not in part["class_path"]]
    assert small["data"]["init_args"]["validation_batch_size"] % 16 == 0


def test_the_tabletop_policy_starts_from_the_tabletop_vlm_and_differs_in_little_else() -> None:
    plain, started = resolved("tabletop/vla.yaml"), resolved("tabletop/vla.yaml", "tabletop/vla_from_vlm.yaml")
    vlm = resolved("tabletop/vlm.yaml")
    model, own = started["model"]["init_args"], plain["model"]["init_args"]
    trainer = vlm["trainer"]
    last = f"{trainer['default_root_dir']}/checkpoints/step_{trainer['max_steps']:07d}.ckpt"
    assert model["vlm"] == last
    assert {key for key in model if model[key] != own[key]} == {"vlm", "augmentation"}
    assert model["augmentation"]["init_args"]["parts"][1] == own["augmentation"]
    assert started["data"] == plain["data"]
    parts, others = (one["trainer"]["callbacks"] for one in (started, plain))
    assert parts[1:] == others[1:]
    (phase,) = parts[0]["init_args"]["phases"]
    assert phase["train"] == {"vlm": 3.0e-4, "expert": None}
    # The network and the words of both, but for the tokens that a policy has no use for.
    networks = [
        model["policy"]["init_args"]["vla"]["init_args"]["vlm"]["init_args"],
        vlm["model"]["init_args"]["answerer"]["init_args"]["vlm"]["init_args"],
    ]
    rows = {"vocab_size", "new_tokens"}
    shapes = [{key: value for key, value in one["language"].items() if key not in rows} for one in networks]
    assert shapes[0] == shapes[1]
    pixels = [{**one["encoders"]["pixels"]["init_args"], "weights": None} for one in networks]
    assert pixels[0] == pixels[1]


def test_vlm_paper_scale_numbers() -> None:
    both = read("vlm_3dvqa.yaml"), read("vlm_3dvqa_encoders_frozen.yaml")
    frozen = []
    for experiment in both:
        data, trainer = experiment["data"]["init_args"], experiment["trainer"]
        assert (data["batch_size"], trainer["max_steps"]) == (512, 12_000)
        assert trainer["devices"] * trainer["num_nodes"] == 16
        assert data["cameras"]["primary"] == {"width": 280, "height": 210, "fit": "crop"}
        assert experiment["model"]["init_args"]["coordinate_weights"] == {0: 1.0, 2000: 2.0}
        align, rest = trainer["callbacks"][0]["init_args"]["phases"]
        assert set(align["train"]) == {
            "vlm.projections.moge",
            "vlm.projections.siglip",
            "vlm.language_model.new_embeddings",
        }
        assert (align["freeze"], rest["start"]) == (["vlm"], 2000)
        frozen.append(rest["freeze"])
    assert frozen == [[], ["vlm.encoders.siglip", "vlm.encoders.moge"]]
    assert class_paths(both[0]) == class_paths(both[1])


def test_stage_1a_trains_the_paper_s_three_parts() -> None:
    experiment = read("vlm_3dvqa.yaml")
    phases = [Phase(**phase) for phase in experiment["trainer"]["callbacks"][0]["init_args"]["phases"]]
    with torch.device("meta"):
        network = build_answerer(experiment)
        plan = FreezePlan(phases, network)
    counts = {
        part.name: sum(parameter.numel() for parameter in part.parameters.values())
        for part in plan.components(network, 0)
    }
    assert counts == {
        "vlm.projections.moge": 4096 * 2048 + 2048,
        "vlm.projections.siglip": 1152 * 2048 + 2048,
        "vlm.language_model.new_embeddings": 1024 * 2048,
    }


def test_tabletop_vlm_is_small_and_the_policy_s_own() -> None:
    vlm = build_answerer(read("tabletop/vlm.yaml")).vlm
    assert sum(parameter.numel() for parameter in vlm.parameters()) < 60e6
    policy = build_policy(read("tabletop/vla.yaml")["model"]["init_args"]["policy"]).vla.vlm
    tables = ("language_model.embed_tokens.weight", "language_model.new_embeddings.weight")
    shapes = [
        {name: value.shape for name, value in part.state_dict().items() if name not in tables}
        for part in (vlm, policy)
    ]
    assert shapes[0] == shapes[1]


def build_answerer(experiment: dict[str, Any]) -> Answerer:
    config = experiment["model"]["init_args"]["answerer"]
    config["init_args"]["prompt"]["init_args"]["tokenizer"] = "byte"
    return build(Answerer, config, "answerer")


@pytest.mark.parametrize(
    ("small", "large"), [("quickstart/vla.yaml", "vla_oxe.yaml"), ("quickstart/vlm.yaml", "vlm_3dvqa.yaml")]
)
def test_quickstart_has_the_same_parts_as_the_paper_scale(small: str, large: str) -> None:
    assert class_paths(read(small)) == class_paths(read(large))


def class_paths(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["class_path"]} if "class_path" in node else set()
        return own.union(*(class_paths(value) for value in node.values()))
    if isinstance(node, list):
        return set().union(*(class_paths(value) for value in node))
    return set()
