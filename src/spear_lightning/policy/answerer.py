"""Pictures and questions -> answers: SPEAR-VLM with its tokenizer and the meaning of its 3D tokens in one object.

Training, validation, export and users all use this object, as they use `Policy` for actions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from spear_lightning.batches import VqaBatch
from spear_lightning.errors import ConfigError, ShapeError
from spear_lightning.models import PromptTokenizer, SpearVLM
from spear_lightning.models.answer_loss import NearBins, most_likely, token_losses
from spear_lightning.models.generation import generate
from spear_lightning.models.packing import RealTokens
from spear_lightning.robot_data.images import CameraSpec, fit_image
from spear_lightning.vqa import location_tokens
from spear_lightning.vqa.coordinate_tokens import CoordinateTokens, token_names


class Predictions(NamedTuple):
    """What the model says about the true answers' tokens, T in all, row by row.

    Attributes:
        losses: float32 (T,), cross entropy of each token, given the true ones before it.
        most_likely: int64 (T,), the ids it would have written.
        targets: int64 (T,), the true ids.
        is_coordinate: bool (T,), which of them are 3D tokens.
    """

    losses: Tensor
    most_likely: Tensor
    targets: Tensor
    is_coordinate: Tensor


class Answerer(nn.Module):
    """Answers questions about images in words, 3D tokens and location tokens.

    The tokenizer gets PaliGemma's location tokens, if it has none, and the 3D tokens, whose ids begin behind the
    rows of the base embedding.

    Args:
        vlm: The network; its `language.new_tokens` are the 3D tokens.
        prompt: The tokenizer.
        max_answer_tokens: Tokens of an answer at most; one that has no end by then is given up.
    """

    def __init__(self, vlm: SpearVLM, prompt: PromptTokenizer, max_answer_tokens: int = 192) -> None:
        super().__init__()
        shape = vlm.language
        prompt.add_tokens(location_tokens.token_names())
        names = token_names(shape.new_tokens)
        prompt.add_tokens(names, first_id=shape.vocab_size)
        if not names or len(prompt) != shape.rows or prompt.vocabulary.encode([names[0]]) != [[shape.vocab_size]]:
            raise ConfigError(
                "The tokenizer and the language model do not fit",
                where="vlm.language",
                found=f"{len(prompt)} tokens with {shape.new_tokens} 3D tokens among them",
                expected=f"vocab_size ({shape.vocab_size}) at least the tokenizer's and the location tokens' "
                "number, and new_tokens (1024 in SPEAR-1) at least 1",
            )
        if prompt.vocabulary.eos is None or max_answer_tokens < 1:
            raise ConfigError(
                "Answers cannot end",
                where="answerer.prompt.tokenizer, answerer.max_answer_tokens",
                found=f"end {prompt.vocabulary.eos}, at most {max_answer_tokens} tokens",
                expected="a tokenizer with an end-of-text token, and at least one token",
            )
        self.vlm = vlm
        self.prompt = prompt
        self.max_answer_tokens = max_answer_tokens
        self.tokens: CoordinateTokens | None = None
        self.cameras: dict[str, CameraSpec] | None = None
        self.config: dict[str, Any] | None = None

    def set_tokens(self, tokens: CoordinateTokens) -> None:
        """Say what the 3D tokens mean.

        Raises:
            ConfigError: If there are more or fewer bins than 3D tokens.
        """
        if len(tokens.quantizer) != self.vlm.language.new_tokens:
            raise ConfigError(
                "There are not as many bins as 3D tokens",
                where="vlm.language.new_tokens",
                found=self.vlm.language.new_tokens,
                expected=len(tokens.quantizer),
            )
        self.tokens = tokens

    def require_tokens(self) -> CoordinateTokens:
        """Return what the 3D tokens mean.

        Raises:
            ConfigError: If it was never said.
        """
        if self.tokens is None:
            raise ConfigError(
                "The 3D tokens have no meaning yet",
                where="answerer.tokens",
                remedy="load the model from a checkpoint, train it with a data module, or call `set_tokens`",
            )
        return self.tokens

    def hidden_of_answers(self, batch: VqaBatch) -> Tensor:
        """Return the hidden states (T, D) from which the answers' tokens are predicted, row by row."""
        text_mask, answer_mask = batch.token_mask, batch.answer_mask
        real = None
        if self.vlm.packed:
            counted = batch.counted()
            assert counted.present is not None
            assert counted.text_tokens is not None
            real = RealTokens(counted.present, counted.text_tokens, len(batch.answer_places))
        hidden_BPD = self.vlm(batch.images, batch.image_mask, batch.input_ids, text_mask, answer_mask, real)
        text, prefix = answer_mask.shape[1], hidden_BPD.shape[1]
        row_T, place_T = batch.answer_places // text, batch.answer_places % text
        # A text begins with bos, so no answer begins at place 0: the token before it is one of the text.
        before_T = row_T * prefix + (prefix - text) + place_T - 1
        return hidden_BPD.flatten(0, 1).index_select(0, before_T)

    def losses(self, batch: VqaBatch, spread: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return the cross entropy of the answers' tokens, float32 (T,), and which are 3D tokens, bool (T,).

        Args:
            batch: Questions and answers.
            spread: Bins by which 3D tokens may be off and count as partly right (see `NearBins`); 0: none.
        """
        targets = batch.at_answers(batch.input_ids)
        near = NearBins(self.vlm.language.vocab_size, spread) if spread else None
        losses = token_losses(self.vlm.language_head, self.hidden_of_answers(batch), targets, near=near)
        return losses, batch.at_answers(batch.coordinate_mask)

    @torch.no_grad()
    def predictions(self, batch: VqaBatch) -> Predictions:
        """Return what the model says about the true answers' tokens."""
        targets = batch.at_answers(batch.input_ids)
        hidden_TD, head = self.hidden_of_answers(batch), self.vlm.language_head
        losses = token_losses(head, hidden_TD, targets)
        found = most_likely(head, hidden_TD) if len(targets) else targets
        return Predictions(losses, found, targets, batch.at_answers(batch.coordinate_mask))

    def answer_batch(self, batch: VqaBatch) -> list[str]:
        """Write the most likely answer to the questions of every sample; "" where it came to no end."""
        input_ids, text_mask = batch.prompts()
        return self._write(batch.images, batch.image_mask, input_ids, text_mask)

    def answer(self, image: np.ndarray, questions: str | Sequence[str]) -> str:
        """Answer questions about one image.

        Args:
            image: uint8 RGB (height, width, 3) of any size; cut or padded to what the model was trained on.
            questions: One, or several that are answered together, one line each.

        Returns:
            The answer, "" if it came to no end. `vqa.mixture.read_answers` reads the numbers in it; lengths are
            in units of `require_tokens().scale`.

        Raises:
            ConfigError: If the model's camera is not known.
            ShapeError: If the image is of another shape or type.
        """
        if self.cameras is None:
            raise ConfigError(
                "The model does not know its camera",
                where="answerer.cameras",
                remedy="load it from a checkpoint, or set `answerer.cameras`",
            )
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ShapeError(
                "An image must be uint8 RGB (height, width, 3)",
                where="image",
                found=f"{image.dtype} {image.shape}",
            )
        ((name, camera),) = self.cameras.items()
        vocabulary = self.prompt.vocabulary
        text = questions if isinstance(questions, str) else "\n".join(questions)
        ids = [vocabulary.bos, *vocabulary.encode([text])[0], *vocabulary.newline]
        device = self.vlm.language_model.embed_tokens.weight.device
        pixels = fit_image(image, camera)[None].to(device)
        return self._write({name: pixels}, None, torch.tensor([ids], device=device), None)[0]

    def _write(
        self,
        images: Mapping[str, Tensor],
        image_mask: Mapping[str, Tensor] | None,
        input_ids: Tensor,
        text_mask: Tensor | None,
    ) -> list[str]:
        vocabulary = self.prompt.vocabulary
        assert vocabulary.eos is not None
        written = generate(
            self.vlm, images, image_mask, input_ids, text_mask, vocabulary.eos, self.max_answer_tokens
        )
        rows = zip(written.ids.tolist(), written.finished.tolist(), strict=True)
        return [vocabulary.decode(ids) if finished else "" for ids, finished in rows]

    def save_pretrained(self, folder: str | Path) -> None:
        """Export weights, configuration and tokenizer (see `answerer_files.save_answerer`)."""
        from spear_lightning.policy.answerer_files import save_answerer

        save_answerer(self, folder)

    @classmethod
    def from_pretrained(cls, path: str, weights: Literal["ema", "raw"] = "ema", device: str = "cpu") -> Answerer:
        """Load from a checkpoint, an exported folder or the hub (see `answerer_files.load_answerer`)."""
        from spear_lightning.policy.answerer_files import load_answerer

        return load_answerer(path, weights, device)
