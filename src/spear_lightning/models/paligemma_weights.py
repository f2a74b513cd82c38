"""PaliGemma's published weights in SPEAR-VLM: which tensor goes where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spear_lightning.errors import CheckpointError, ConfigError
from spear_lightning.models.encoders.siglip import SiglipEncoder
from spear_lightning.models.encoders.weight_files import TRANSFORMERS_FILES, load_exactly, read_state_dict

if TYPE_CHECKING:
    from spear_lightning.models.spear_vlm import SpearVLM

SIGLIP = "siglip"
"""Name of the encoder that PaliGemma's vision tower and projector belong to."""

LANGUAGE_PREFIXES = ("model.language_model.", "language_model.model.")
"""Where transformers 5 modules and the files on the hub keep Gemma."""

NEW_EMBEDDINGS = "new_embeddings.weight"
"""What SPEAR-VLM adds to the language model: PaliGemma has none, so it is drawn like PaliGemma's rows."""

PROJECTOR_PREFIXES = ("model.multi_modal_projector.linear.", "multi_modal_projector.linear.")

TIED_HEADS = ("lm_head.weight", "language_model.lm_head.weight")
"""The output head: the same tensor as the token embedding, where a file has it at all."""


def load_paligemma(vlm: SpearVLM, weights: str) -> None:
    """Load PaliGemma's language model, and its vision tower and projector into the encoder named `siglip`.

    Without an encoder of that name the latter two are left out; other encoders keep their weights.

    Args:
        vlm: What to load into.
        weights: Hub id, folder or file.

    Raises:
        CheckpointError: If the weights cannot be read or belong to another architecture.
        ConfigError: If the encoder named `siglip` is not a `SiglipEncoder`.
    """
    state, where = read_state_dict(weights, TRANSFORMERS_FILES)
    load_exactly(vlm.language_model, part(state, LANGUAGE_PREFIXES, where), where, [NEW_EMBEDDINGS])
    vlm.language_model.draw_new_embeddings()
    if SIGLIP not in vlm.encoders:
        return
    encoder = vlm.encoders[SIGLIP]
    if not isinstance(encoder, SiglipEncoder):
        raise ConfigError(
            "PaliGemma's vision tower belongs to the encoder named `siglip`",
            where=f"vlm.encoders.{SIGLIP}",
            found=type(encoder).__name__,
            expected="SiglipEncoder",
            remedy="give the encoder another name, or set the VLM's `weights` to null",
        )
    encoder.load_tower(state, where)
    load_exactly(vlm.projections[SIGLIP], part(state, PROJECTOR_PREFIXES, where), where)


def part(state: Mapping[str, Any], prefixes: tuple[str, ...], where: object) -> dict[str, Any]:
    """Return the tensors under the first of several prefixes that occurs, with names relative to it.

    Args:
        state: All of the checkpoint's tensors.
        prefixes: Alternative prefixes.
        where: The tensors' origin, for errors.

    Raises:
        CheckpointError: If none of the prefixes occurs.
    """
    for prefix in prefixes:
        found = {
            name[len(prefix) :]: value
            for name, value in state.items()
            if name.startswith(prefix) and name not in TIED_HEADS
        }
        if found:
            return found
    raise CheckpointError(
        "The weights are not laid out as PaliGemma's",
        where=where,
        found=sorted(state)[:3],
        expected=f"tensors under one of {list(prefixes)}",
    )
