"""Gemini as a detector: it names what it sees, and says where."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spear_lightning.errors import ConfigError, DataError, SpearError
from spear_lightning.labeling.detections import Detections
from spear_lightning.labeling.detector import Detector, Picture
from spear_lightning.labeling.gemini_api import DEFAULT_PATIENCE, GeminiApi, Pacer, Patience
from spear_lightning.labeling.reply_cache import Reply, ReplyCache
from spear_lightning.labeling.work_split import WorkSplit

PROMPT = (
    "Detect the prominent objects in the image, at most {most}. Leave out people, body parts, walls, floors, "
    "ceilings and other parts of the scene that are not single objects. The box_2d is [ymin, xmin, ymax, xmax] "
    "normalized to 0-1000. The label is a short noun phrase that tells the object apart from the others in the "
    "image, such as 'red mug' or 'left drawer handle'."
)
"""Gemini's documented wording of boxes; what to leave out is ours."""

SYSTEM = "Return a JSON array of objects with box_2d and label. Never return masks or code fences."

SCHEMA = {
    "type": "ARRAY",
    "items": {
        "type": "OBJECT",
        "properties": {
            "box_2d": {"type": "ARRAY", "items": {"type": "INTEGER"}, "minItems": 4, "maxItems": 4},
            "label": {"type": "STRING"},
        },
        "required": ["box_2d", "label"],
    },
}

SCALE = 1000
LEEWAY = 20
"""Coordinates are 0 to SCALE; models overshoot a little, which is clipped, but pixels are another thing."""


class Gemini(Detector):
    """Asks Gemini for named boxes, y first, 0 to 1000; every reply is paid once and kept on disk.

    The key is read from GEMINI_API_KEY or GOOGLE_API_KEY.

    Args:
        cache: Folder of replies, named by the image's bytes, the question and the model.
        model: Name of the model.
        max_objects: Objects it is asked for at most.
        prompt: The question; "{most}" stands for `max_objects`.
        temperature: Of the model.
        thinking_budget: Tokens of thought; 0: none, which finds boxes better; None: the model's default.
        max_output_tokens: Longer replies are cut off, and then useless.
        parallel: Requests that are under way at the same time, in each process.
        requests_per_minute: Of all processes together.
        patience: Timeout and repetitions.
        input_price: US dollars for a million tokens that are sent; for the estimate of costs.
        output_price: The same for tokens that come back.
        base_url: Another server than Google's.
    """

    def __init__(
        self,
        cache: str,
        model: str = "gemini-2.5-flash",
        max_objects: int = 25,
        prompt: str = PROMPT,
        temperature: float = 0.5,
        thinking_budget: int | None = 0,
        max_output_tokens: int = 8192,
        parallel: int = 16,
        requests_per_minute: float = 600.0,
        patience: Patience = DEFAULT_PATIENCE,
        input_price: float = 0.3,
        output_price: float = 2.5,
        base_url: str | None = None,
    ) -> None:
        if parallel < 1 or requests_per_minute <= 0 or patience.attempts < 1:
            raise ConfigError(
                "Gemini needs at least one request",
                where="detector",
                found=(parallel, requests_per_minute, patience.attempts),
            )
        self.parallel = parallel
        self.cache = ReplyCache(Path(cache))
        self._model, self._prompt = model, prompt.replace("{most}", str(max_objects))
        self._settings: dict[str, Any] = {
            "system_instruction": SYSTEM,
            "response_mime_type": "application/json",
            "response_schema": SCHEMA,
            "temperature": temperature,
            "max_output_tokens": max_output_tokens,
        }
        if thinking_budget is not None:
            self._settings["thinking_config"] = {"thinking_budget": thinking_budget}
        self._rate, self._patience, self._base_url = requests_per_minute, patience, base_url
        self._prices = (input_price / 1e6, output_price / 1e6)
        self._bill = threading.Lock()
        self._paid_now = self._paid_before = 0.0
        self._requests = 0
        self.api: GeminiApi | None = None

    @property
    def version(self) -> str:
        """The model, and a hash of the question."""
        return f"{self._model}, question {ReplyCache.key(b'', *self._question())[:12]}"

    def prepare(self, device: torch.device | str = "cpu") -> None:
        """Open the connection; the processes of a run share the requests per minute.

        Raises:
            ConfigError: If google-genai is not installed, there is no key, or replies cannot be kept.
        """
        self.cache.require_writable()
        pacer = Pacer(self._rate / WorkSplit.from_environment().world_size)
        self.api = GeminiApi(self._model, pacer, self._patience, self._base_url)

    def detect(self, pictures: Sequence[Picture]) -> list[Detections | SpearError]:
        """Ask, or remember."""
        return [self._detect(picture) for picture in pictures]

    def _detect(self, picture: Picture) -> Detections | SpearError:
        height, width = picture.pixels_HW3.shape[:2]
        try:
            return parse(self._reply(picture.data), width, height)
        except DataError as error:
            return error

    def _reply(self, image: bytes) -> Reply:
        if self.api is None:
            raise ConfigError("The detector was not prepared", where="Gemini")
        key = self.cache.key(image, *self._question())
        with self.cache.lock(key):
            known = self.cache.get(key)
            reply = known or self.api.ask(image, self._prompt, self._settings)
            if known is None:
                self.cache.put(key, reply)
        price = self._prices[0] * reply.input_tokens + self._prices[1] * reply.output_tokens
        with self._bill:
            if known is None:
                self._paid_now += price
                self._requests += 1
            else:
                self._paid_before += price
        return reply

    def forget(self, picture: Picture) -> bool:
        """Drop a reply that could not be used; one that could is kept."""
        key = self.cache.key(picture.data, *self._question())
        known = self.cache.get(key)
        if known is None or not isinstance(self._usable(known), DataError):
            return False
        self.cache.drop(key)
        return True

    def _usable(self, reply: Reply) -> Detections | DataError:
        try:
            return parse(reply, SCALE, SCALE)
        except DataError as error:
            return error

    def costs(self) -> str:
        """Return the estimated costs so far: of this run, and of what it could take from the cache."""
        with self._bill:
            return f"{self._requests} requests, ${self._paid_now:.2f} (${self._paid_before:.2f} paid before)"

    def _question(self) -> tuple[str, str, str]:
        return self._model, self._prompt, json.dumps(self._settings, sort_keys=True)


_FENCE = re.compile(r"^\s*```[a-zA-Z]*\s*\n(.*?)\n?\s*```\s*$", re.DOTALL)


def parse(reply: Reply, width: int, height: int) -> Detections:
    """Return the boxes of a reply in pixels.

    Swapped corners are put right, coordinates just outside 0 to 1000 are clipped, and boxes without area are left
    out. Anything else that is wrong makes the whole reply useless: a model that lost count of one box did so for
    others.

    Args:
        reply: What Gemini said.
        width: Of the image, pixels.
        height: Of the image, pixels.

    Raises:
        DataError: If the reply is cut off, is no JSON, or has something in it that is no named box.
    """
    if reply.finish not in ("STOP", "FINISH_REASON_UNSPECIFIED", "None"):
        raise _useless(f"it stopped early: {reply.finish}", reply)
    fenced = _FENCE.match(reply.text)
    try:
        rows = json.loads(fenced[1] if fenced else reply.text)
    except ValueError as error:
        raise _useless(f"it is no JSON: {error}", reply) from None
    if not isinstance(rows, list):
        raise _useless(f"it is no list but a {type(rows).__name__}", reply)
    names, boxes = [], []
    for row in rows:
        label, box = (row.get("label"), row.get("box_2d")) if isinstance(row, dict) else (None, None)
        if not isinstance(label, str) or not isinstance(box, list) or len(box) != 4:
            raise _useless(f"an entry is no named box: {row}", reply)
        if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in box):
            raise _useless(f"a coordinate is no number: {row}", reply)
        if min(box) < -LEEWAY or max(box) > SCALE + LEEWAY:
            raise _useless(f"a coordinate is not within 0 to {SCALE}: {row}", reply)
        top, bottom = sorted((box[0], box[2]))
        left, right = sorted((box[1], box[3]))
        names.append(label)
        boxes.append([left, top, right, bottom])
    boxes_N4 = np.array(boxes, np.float64).reshape(-1, 4).clip(0, SCALE) / SCALE
    boxes_N4 *= [width, height, width, height]
    found = Detections(boxes_N4.astype(np.float32), tuple(names), np.full(len(names), np.nan, np.float32))
    return found.take(np.flatnonzero((boxes_N4[:, 2:] > boxes_N4[:, :2]).all(-1)))


def _useless(why: str, reply: Reply) -> DataError:
    return DataError("A reply of Gemini cannot be used", found=f"{why}; it begins {reply.text[:80]!r}")
