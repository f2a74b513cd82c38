"""Weight files: single, sharded, on the hub; exact loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from spear_lightning.errors import CheckpointError
from spear_lightning.models.encoders.siglip import vision_tower
from spear_lightning.models.encoders.weight_files import TRANSFORMERS_FILES, load_exactly, read_state_dict


def test_shards_are_joined(tmp_path: Path) -> None:
    config = SiglipVisionConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, vision_use_head=False
    )
    model = SiglipVisionModel(config)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    state, where = read_state_dict(str(tmp_path), TRANSFORMERS_FILES)
    assert where.endswith("model.safetensors.index.json")
    found, expected = vision_tower(state, where), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_files_and_folders(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0)}
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    for weights in (tmp_path / "x.safetensors", tmp_path / "pytorch_model.bin", tmp_path):
        state, where = read_state_dict(str(weights), TRANSFORMERS_FILES)
        assert torch.equal(state["a"], tensors["a"])
        assert where.startswith(str(weights))


def test_what_is_missing_or_broken_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such weights"):
        read_state_dict("./not/there", TRANSFORMERS_FILES)
    with pytest.raises(CheckpointError, match=r"folder holds no weights"):
        read_state_dict(str(tmp_path), TRANSFORMERS_FILES)
    for name in ("model.safetensors", "model.pt"):
        (tmp_path / name).write_bytes(b"not a weight file")
        with pytest.raises(CheckpointError, match=r"cannot be read"):
            read_state_dict(str(tmp_path / name), ())
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"index of shards"):
        read_state_dict(str(tmp_path), TRANSFORMERS_FILES)
    torch.save(torch.zeros(1), tmp_path / "tensor.pt")
    with pytest.raises(CheckpointError, match=r"no named tensors"):
        read_state_dict(str(tmp_path / "tensor.pt"), ())


class Code:
    """Would be run by an unsafe reader."""


def test_pickled_code_is_refused(tmp_path: Path) -> None:
    torch.save({"a": Code()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"UnpicklingError"):
        read_state_dict(str(tmp_path), ["model.pt"])


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    class RemoteEntryNotFoundError(EntryNotFoundError, OSError):
        """As the hub's own, which wants a response to be built."""

    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    asked = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        if name != "model.safetensors":
            raise RemoteEntryNotFoundError("404")
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    state, _ = read_state_dict("owner/name", TRANSFORMERS_FILES)
    assert state["a"].sum() == 2
    assert asked == [("owner/name", "model.safetensors.index.json"), ("owner/name", "model.safetensors")]

    def offline(repository: str, name: str) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(
        CheckpointError, match=r"(?s)cannot be fetched.*owner/name/model.safetensors.index.json.*folder"
    ):
        read_state_dict("owner/name", TRANSFORMERS_FILES)


def test_loading_is_exact_or_not_at_all() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    good = {name: torch.ones_like(tensor) for name, tensor in before.items()}
    bad = {**good, "0.weight": torch.zeros(9, 2), "2.weight": torch.zeros(1), "extra": "text"}
    del bad["1.bias"]
    with pytest.raises(CheckpointError) as error:
        load_exactly(module, bad, "somewhere")
    for expected in (
        "where: somewhere",
        "1 missing ['1.bias']",
        "2 unexpected ['2.weight', 'extra']",
        "1 of another shape ['0.weight: (9, 2) in the file, (3, 2) in the model']",
    ):
        assert expected in str(error.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    del good["1.bias"]
    load_exactly(module, good, "somewhere", allow_missing=["1.*"])
    assert torch.equal(module.state_dict()["1.bias"], before["1.bias"])
    assert bool((module.state_dict()["1.weight"] == 1).all())
