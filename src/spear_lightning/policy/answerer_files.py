"""SPEAR-VLM in files: Lightning checkpoints, and folders of safetensors, configuration and tokenizer.

A folder (also on the hub) holds `model.safetensors`, `config.json` (class paths and arguments, camera, meaning of
the 3D tokens), and `tokenizer.json` with `tokenizer_config.json`, which transformers' `AutoTokenizer` reads too.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from spear_lightning.errors import CheckpointError
from spear_lightning.models import PromptTokenizer, SpearVLM
from spear_lightning.models.encoders.weight_files import HUB_ID, load_exactly, read_state_dict
from spear_lightning.models.tokenizer_files import save_tokenizer
from spear_lightning.policy.answerer import Answerer
from spear_lightning.policy.checkpoint import (
    EXPORT_CONFIG,
    SCHEMA,
    build,
    load_policy_weights,
    read_checkpoint,
    weights_under,
    without_network,
)
from spear_lightning.policy.sharded_files import META_FILE
from spear_lightning.robot_data.images import CameraSpec
from spear_lightning.vqa.coordinate_tokens import CoordinateTokens

PREFIX = "answerer."
"""Where a LightningModule keeps its answerer, hence the prefix of its weights."""

VLM_PREFIX = "vlm."
"""Where the answerer keeps the network."""

BASE_ROWS, NEW_ROWS = "language_model.embed_tokens.weight", "language_model.new_embeddings.weight"
"""The network's two tables of embeddings."""

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", EXPORT_CONFIG, "tokenizer.json"

WeightKind = Literal["ema", "raw"]


@dataclass(frozen=True)
class StoredAnswerer:
    """What a checkpoint or a folder holds.

    Attributes:
        description: See `describe_answerer`.
        weights: Names relative to the answerer.
        where: The file or folder, for errors.
    """

    description: dict[str, Any]
    weights: dict[str, Tensor]
    where: str


def describe_answerer(answerer: Answerer) -> dict[str, Any]:
    """Return plain values that, with the weights, suffice to rebuild an answerer."""
    cameras = answerer.cameras
    return {
        "schema": SCHEMA,
        "answerer": answerer.config,
        "cameras": None if cameras is None else {name: asdict(camera) for name, camera in cameras.items()},
        "tokens": None if answerer.tokens is None else answerer.tokens.to_dict(),
        "tokenizer": answerer.prompt.to_json(),
    }


def load_answerer(path: str | Path, weights: WeightKind = "ema", device: str = "cpu") -> Answerer:
    """Load an answerer that is ready to answer.

    Args:
        path: A checkpoint written by training, an exported folder, or a hub id.
        weights: "ema" for averaged weights (where a checkpoint has any), "raw" for the training weights.
        device: Where to put it.

    Returns:
        The answerer in eval mode.

    Raises:
        CheckpointError: If it is none of them, incomplete, or of another architecture.
    """
    stored = read_answerer(path, weights)
    description = stored.description
    answerer = build(Answerer, without_network(description["answerer"]), "answerer")
    answerer.config = description["answerer"]
    take_description(answerer, description)
    load_policy_weights(answerer, stored.weights, where=stored.where)
    return answerer.to(device).eval()


def take_description(answerer: Answerer, description: Mapping[str, Any]) -> None:
    """Take tokenizer, camera and meaning of the 3D tokens from a description."""
    answerer.prompt = PromptTokenizer.from_json(description["tokenizer"])
    answerer.set_tokens(CoordinateTokens.from_dict(description["tokens"]))
    answerer.cameras = {name: CameraSpec(**camera) for name, camera in description["cameras"].items()}


def save_answerer(answerer: Answerer, folder: str | Path) -> None:
    """Write an answerer as a folder, at once or not at all.

    Args:
        answerer: Trained or loaded: it knows its configuration, camera and 3D tokens.
        folder: Must not exist, or be empty.

    Raises:
        CheckpointError: If the folder holds something, or the answerer does not know what it is.
    """
    from safetensors.torch import save_file

    final = Path(folder).absolute()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise CheckpointError("The folder to export to is not empty", where=final, remedy="name another one")
    description = describe_answerer(answerer)
    _check_complete(description, "the model in memory")
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        weights = {name: tensor.detach().contiguous() for name, tensor in answerer.state_dict().items()}
        save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
        save_tokenizer(answerer.prompt.vocabulary, partial)
        # The tokenizer's own part is in its file.
        tokenizer = json.loads(description["tokenizer"])
        tokenizer["backend"] = None if tokenizer.get("backend") is None else TOKENIZER
        (partial / CONFIG).write_text(json.dumps({**description, "tokenizer": tokenizer}, indent=1))
        if final.exists():
            final.rmdir()
        os.replace(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_answerer(path: str | Path, weights: WeightKind = "ema") -> StoredAnswerer:
    """Read what a checkpoint, a folder or a hub repository holds (see `load_answerer`)."""
    given = Path(path)
    if given.is_file() or (given / META_FILE).is_file():
        checkpoint = read_checkpoint(given)
        _check_complete(checkpoint["spear"], given)
        return StoredAnswerer(checkpoint["spear"], weights_under(checkpoint, PREFIX, weights), str(given))
    # Of two parts like a hub id, but here is the folder of the file that is missing.
    is_path = given.suffix == ".ckpt" or given.parent.exists()
    if not given.is_dir() and (is_path or not HUB_ID.fullmatch(str(path))):
        raise CheckpointError(
            "There is no such SPEAR-VLM",
            where=path,
            expected="a .ckpt file, an exported folder, or a hub id of the form owner/name",
            remedy="check the path",
        )
    folder = given if given.is_dir() else _download(str(path))
    state, where = read_state_dict(str(folder), [WEIGHTS])
    return StoredAnswerer(_read_description(folder), state, where)


def _read_description(folder: Path) -> dict[str, Any]:
    try:
        description = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tokenizer = description["tokenizer"]
        if tokenizer.pop("backend", None) is not None:
            tokenizer["backend"] = (folder / TOKENIZER).read_text(encoding="utf-8")
        schema = description["schema"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "The folder holds no exported SPEAR-VLM",
            where=folder,
            found=f"{type(error).__name__}: {error}",
            expected=f"{WEIGHTS}, {CONFIG} and {TOKENIZER}, as `save_pretrained` writes them",
        ) from error
    if schema != SCHEMA:
        raise CheckpointError("The export is of another version", where=folder, found=schema, expected=SCHEMA)
    _check_complete(description, folder)
    return {**description, "tokenizer": json.dumps(tokenizer)}


def _check_complete(description: Mapping[str, Any], where: object) -> None:
    missing = [name for name in ("answerer", "cameras", "tokens", "tokenizer") if description.get(name) is None]
    if missing:
        raise CheckpointError(
            "This is no complete SPEAR-VLM",
            where=where,
            found=f"no {', '.join(missing)}",
            expected="a model trained with VLMModule through `spear fit`",
        )


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(repository, allow_patterns=[WEIGHTS, CONFIG, "tokenizer*"]))
    except (HFValidationError, OSError) as error:  # the hub's network and access errors are all OSError
        raise CheckpointError(
            "SPEAR-VLM cannot be fetched from the hub",
            where=repository,
            found=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
            remedy="check the name and the network; or download it elsewhere and give the folder",
        ) from error


def load_vlm(vlm: SpearVLM, prompt: PromptTokenizer, path: str | Path) -> list[str]:
    """Load the network of a trained SPEAR-VLM into that of a policy.

    Instructions and actions use no 3D tokens: their embeddings are left out where the policy's network has none,
    and so are rows of the base embedding beyond those of the policy.

    Args:
        vlm: What to load into.
        prompt: The policy's tokenizer; must give the ids that the SPEAR-VLM was trained with.
        path: See `load_answerer`; of a checkpoint the averaged weights are taken, where it has them.

    Returns:
        What was left out.

    Raises:
        CheckpointError: If architecture or tokenizer differ.
    """
    stored = read_answerer(path)
    prompt.require_ids_of(PromptTokenizer.from_json(stored.description["tokenizer"]), "SPEAR-VLM")
    weights = {
        name[len(VLM_PREFIX) :]: tensor for name, tensor in stored.weights.items() if name.startswith(VLM_PREFIX)
    }
    left_out = []
    own = vlm.state_dict()
    if NEW_ROWS in weights and NEW_ROWS not in own:
        left_out.append(f"{len(weights.pop(NEW_ROWS))} embeddings of 3D tokens")
    spare = len(weights[BASE_ROWS]) - len(own[BASE_ROWS]) if BASE_ROWS in weights else 0
    if spare > 0:
        weights[BASE_ROWS] = weights[BASE_ROWS][: len(own[BASE_ROWS])]
        left_out.append(f"{spare} embeddings beyond the policy's vocabulary")
    load_exactly(vlm, weights, stored.where)
    return left_out
