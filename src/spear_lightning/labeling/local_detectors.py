"""Open-vocabulary detectors that run here: Grounding DINO and OWLv2 of transformers. They find what they are told.

Neither needs torchvision: transformers falls back to PIL for resizing.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spear_lightning.errors import CheckpointError, ConfigError, SpearError
from spear_lightning.labeling.detections import Detections, clean_name
from spear_lightning.labeling.detector import Detector, Picture


class LocalDetector(Detector):
    """What Grounding DINO and OWLv2 have in common: names to look for, a processor, a network.

    Args:
        weights: Hub id or folder of the network and its processor.
        names: What to look for.
        min_score: Boxes of less confidence are not reported.
        batch_size: Images that go through the network together.
        parallel: Threads that prepare images; the network itself is used by one at a time.
    """

    def __init__(
        self, weights: str, names: Sequence[str], min_score: float, batch_size: int = 4, parallel: int = 2
    ) -> None:
        self._names = tuple(dict.fromkeys(filter(None, map(clean_name, names))))
        if not self._names:
            raise ConfigError("There is nothing to look for", where="detector.names", found=list(names))
        self._weights, self._min_score = weights, min_score
        self.batch_size, self.parallel = batch_size, parallel
        self._device = torch.device("cpu")
        self._one_at_a_time = threading.Lock()
        self._processor: Any = None
        self._network: Any = None

    @property
    def version(self) -> str:
        """Class, weights, and the names that it looks for."""
        return f"{type(self).__name__} {self._weights}, {self._min_score:g}: {', '.join(self._names)}"

    def prepare(self, device: torch.device | str = "cpu") -> None:
        """Load processor and network (see `Detector.prepare`).

        Raises:
            CheckpointError: If they cannot be loaded.
        """
        self._device = torch.device(device)
        try:
            self._processor, network = self._load(self._weights)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                "The detector's weights cannot be loaded", where="detector.weights", found=error
            ) from error
        self._network = network.eval().requires_grad_(False).to(self._device)

    def detect(self, pictures: Sequence[Picture]) -> list[Detections | SpearError]:
        """Look for the names in a batch of images.

        Images of one size go through the network together. Grounding DINO would pad smaller ones, and find other
        things in them than when they are alone.
        """
        same_size: dict[tuple[int, ...], list[int]] = {}
        for index, picture in enumerate(pictures):
            same_size.setdefault(picture.pixels_HW3.shape, []).append(index)
        found: dict[int, Detections] = {}
        for indices in same_size.values():
            results = self._batch([pictures[index].pixels_HW3 for index in indices])
            found.update(zip(indices, results, strict=True))
        return [found[index] for index in range(len(pictures))]

    def _batch(self, images: list[np.ndarray]) -> list[Detections]:
        inputs = self._inputs(images).to(self._device)
        with self._one_at_a_time, torch.inference_mode():
            outputs = self._network(**inputs)
            sizes = torch.tensor([image.shape[:2] for image in images], device=self._device)
            found = self._found(outputs, sizes)
            return [self._detections(*(part.float().cpu().numpy() for part in parts)) for parts in found]

    def _detections(self, boxes_N4: np.ndarray, scores_N: np.ndarray, numbers_N: np.ndarray) -> Detections:
        names = tuple(self._names[number] for number in numbers_N.astype(int).tolist())
        return Detections(boxes_N4.astype(np.float32), names, scores_N.astype(np.float32))

    @abstractmethod
    def _load(self, weights: str) -> tuple[Any, Any]:
        """Return processor and network."""

    @abstractmethod
    def _inputs(self, images: list[np.ndarray]) -> Any:
        """Return the network's inputs for a batch of images."""

    @abstractmethod
    def _found(self, outputs: Any, sizes_B2: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return for each image boxes (N, 4) in pixels, scores (N,) and numbers of names (N,)."""


class GroundingDino(LocalDetector):
    """Grounding DINO, which reads all names as one text (Liu et al., arXiv:2303.05499).

    A box gets the name whose words fit it best: the processor's own phrases may merge neighbouring names.

    Args:
        names: What to look for, for example ["red cup", "banana"].
        weights: Hub id or folder.
        min_score: Boxes of less confidence are not reported.
        batch_size: Images that go through the network together.
        parallel: Threads that prepare images.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: str = "IDEA-Research/grounding-dino-base",
        min_score: float = 0.3,
        batch_size: int = 4,
        parallel: int = 2,
    ) -> None:
        super().__init__(weights, names, min_score, batch_size, parallel)
        self._text = ". ".join(self._names) + "."
        self._tokens_of_name: list[Tensor] = []

    def _load(self, weights: str) -> tuple[Any, Any]:
        from transformers import GroundingDinoForObjectDetection, GroundingDinoProcessor

        processor = GroundingDinoProcessor.from_pretrained(weights)
        return processor, GroundingDinoForObjectDetection.from_pretrained(weights)

    def prepare(self, device: torch.device | str = "cpu") -> None:
        """Load processor and network, and find which tokens of the text are whose.

        Raises:
            CheckpointError: If they cannot be loaded.
            ConfigError: If the names are too many for the network, or it cannot read one.
        """
        super().prepare(device)
        limit = self._network.config.max_text_len
        encoded = self._processor.tokenizer(self._text, return_offsets_mapping=True)
        if len(encoded.input_ids) > limit:
            raise ConfigError(
                "There are too many names for one text",
                where="detector.names",
                found=f"{len(encoded.input_ids)} tokens",
                expected=f"at most {limit}",
                remedy="look for fewer, or use OWLv2, which reads each name on its own",
            )
        start = 0
        for name in self._names:
            end = start + len(name)
            inside = [start <= first and first < last <= end for first, last in encoded.offset_mapping]
            self._tokens_of_name.append(torch.tensor(inside).nonzero()[:, 0])
            start = end + 2
        unread = [
            name for name, tokens in zip(self._names, self._tokens_of_name, strict=True) if not tokens.numel()
        ]
        if unread:
            raise ConfigError(
                "The network reads nothing in these names", where="detector.names", found=list(map(ascii, unread))
            )

    def _inputs(self, images: list[np.ndarray]) -> Any:
        return self._processor(images=images, text=[self._text] * len(images), return_tensors="pt")

    def _found(self, outputs: Any, sizes_B2: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        results = self._processor.image_processor.post_process_object_detection(outputs, self._min_score, sizes_B2)
        found = []
        for result, logits_QT in zip(results, outputs.logits, strict=True):
            probabilities_QT = logits_QT.sigmoid()
            kept_NT = probabilities_QT[probabilities_QT.amax(-1) > self._min_score]
            fit_NK = torch.stack([kept_NT[:, tokens].amax(-1) for tokens in self._tokens_of_name], -1)
            found.append((result["boxes"], result["scores"], fit_NK.argmax(-1)))
        return found


class Owlv2(LocalDetector):
    """OWLv2, which compares every name with every patch (Minderer et al., arXiv:2306.09683).

    Args:
        names: What to look for, for example ["red cup", "banana"].
        weights: Hub id or folder.
        min_score: Boxes of less confidence are not reported.
        batch_size: Images that go through the network together.
        parallel: Threads that prepare images.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: str = "google/owlv2-base-patch16-ensemble",
        min_score: float = 0.2,
        batch_size: int = 4,
        parallel: int = 2,
    ) -> None:
        super().__init__(weights, names, min_score, batch_size, parallel)

    def _load(self, weights: str) -> tuple[Any, Any]:
        from transformers import Owlv2ForObjectDetection, Owlv2Processor

        return Owlv2Processor.from_pretrained(weights), Owlv2ForObjectDetection.from_pretrained(weights)

    def prepare(self, device: torch.device | str = "cpu") -> None:
        """Load processor and network.

        Raises:
            CheckpointError: If they cannot be loaded.
            ConfigError: If a name is too long for the network.
        """
        super().prepare(device)
        limit = self._network.config.text_config.max_position_embeddings
        lengths = map(len, self._processor.tokenizer(self._texts(), padding=False).input_ids)
        long = {name: length for name, length in zip(self._names, lengths, strict=True) if length > limit}
        if long:
            raise ConfigError(
                "Names are too long for the network",
                where="detector.names",
                found=long,
                expected=f"at most {limit} tokens, `a photo of a` and both ends among them",
                remedy="say them shorter",
            )

    def _texts(self) -> list[str]:
        return [f"a photo of a {name}" for name in self._names]

    def _inputs(self, images: list[np.ndarray]) -> Any:
        return self._processor(images=images, text=[self._texts()] * len(images), return_tensors="pt")

    def _found(self, outputs: Any, sizes_B2: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        results = self._processor.image_processor.post_process_object_detection(outputs, self._min_score, sizes_B2)
        return [(result["boxes"], result["scores"], result["labels"]) for result in results]
