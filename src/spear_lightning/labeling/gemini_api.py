"""Questions to Gemini about an image, over google-genai (the extra `gemini`): paced, timed out, retried with care.

The SDK's own retries are off: they ignore what the server says about when to come back. Its transport is httpx or
httpx2, whichever it was released with.
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib import import_module
from typing import Any

from spear_lightning.errors import ConfigError, DataError
from spear_lightning.labeling.reply_cache import Reply
from spear_lightning.robot_data.images import PNG_START

log = logging.getLogger(__name__)

KEY_VARIABLES = ("GEMINI_API_KEY", "GOOGLE_API_KEY")
"""Where the key is looked for; it is kept in memory alone."""

REFUSED = {401: "the key is not accepted", 403: "the key may not use this model", 404: "there is no such model"}
"""What no repetition and no other image will change."""


@dataclass(frozen=True)
class Patience:
    """How long and how often a question is asked.

    Attributes:
        timeout_s: Seconds without an answer after which a request is given up. It is not repeated: it may be paid.
        attempts: Requests for one question at most. Only 408, 429, 5xx and a connection that could not be made
            are tried again.
        first_wait_s: Seconds before the second attempt; doubled for each that follows, with up to a quarter of
            random variation.
        longest_wait_s: Seconds between two attempts at most, whatever the server asks for.
    """

    timeout_s: float = 120.0
    attempts: int = 6
    first_wait_s: float = 2.0
    longest_wait_s: float = 120.0


DEFAULT_PATIENCE = Patience()


class Pacer:
    """Spaces requests evenly; threads share it.

    Args:
        per_minute: Requests per minute at most.
        clock: Seconds.
        sleep: Waits for so many seconds.
    """

    def __init__(
        self,
        per_minute: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._spacing_s = 60 / per_minute
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._next = float("-inf")

    def wait(self) -> None:
        """Wait for this thread's turn."""
        with self._lock:
            now = self._clock()
            turn = max(now, self._next)
            self._next = turn + self._spacing_s
        if turn > now:
            self._sleep(turn - now)


class GeminiApi:
    """Asks a Gemini model; threads share it.

    Args:
        model: Its name.
        pacer: Limits the rate of requests.
        patience: Timeout and repetitions.
        base_url: Another server than Google's.
        sleep: Waits for so many seconds.
        environment: Where the key is looked for; default: that of the process.

    Raises:
        ConfigError: If google-genai is not installed or there is no key.
    """

    def __init__(
        self,
        model: str,
        pacer: Pacer,
        patience: Patience,
        base_url: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        genai, self._types, self._api_error = _sdk()
        self.model = model
        self._pacer, self._patience, self._sleep = pacer, patience, sleep
        self._key = _key(os.environ if environment is None else environment)
        self._no_connection, self._transport_error = _transport_errors()
        options = self._types.HttpOptions(
            base_url=base_url, api_version="v1beta", timeout=round(patience.timeout_s * 1000)
        )
        self._client = genai.Client(api_key=self._key, vertexai=False, http_options=options)

    def ask(self, image: bytes, prompt: str, settings: Mapping[str, Any]) -> Reply:
        """Ask a question about an image.

        Args:
            image: JPEG or PNG bytes.
            prompt: The question.
            settings: Fields of `types.GenerateContentConfig`.

        Raises:
            DataError: If there was no answer to this question.
            ConfigError: If there will be none to any question.
        """
        kind = "image/png" if image.startswith(PNG_START) else "image/jpeg"
        contents = [self._types.Part.from_bytes(data=image, mime_type=kind), prompt]
        config = self._types.GenerateContentConfig(**settings)
        for attempt in range(1, self._patience.attempts + 1):
            self._pacer.wait()
            try:
                response = self._client.models.generate_content(model=self.model, contents=contents, config=config)
                return _reply(response)
            except self._api_error as error:
                self._raise_if_final(error)
                wait, reason = _asked_wait(error), f"{error.code} {error.status}"
            except self._no_connection as error:
                wait, reason = None, self._clean(error)
            except self._transport_error as error:
                raise DataError("Gemini did not answer", where=self.model, found=self._clean(error)) from None
            except (AttributeError, TypeError) as error:
                # The SDK expects objects in some places of a body. Not asked again: it may have been paid for.
                raise DataError(
                    "A reply has another form than Gemini's", where=self.model, found=self._clean(error)
                ) from None
            if attempt < self._patience.attempts:
                backoff = self._patience.first_wait_s * 2 ** (attempt - 1) * random.uniform(1, 1.25)
                seconds = min(max(backoff, wait or 0), self._patience.longest_wait_s)
                log.warning("Gemini: %s; attempt %d follows in %.1f s", reason, attempt + 1, seconds)
                self._sleep(seconds)
        raise DataError("Gemini did not answer", where=self.model, found=f"{reason}, {attempt} times")

    def _raise_if_final(self, error: Any) -> None:
        """Raise unless the request may be repeated; without the SDK's error, which holds the request."""
        code, said = error.code, self._clean(error.message or error.status or error.code)
        if code in (408, 429) or 500 <= code < 600:
            return
        if code in REFUSED or "API_KEY" in json.dumps(error.details, default=str).upper():
            what = f"Gemini refuses: {REFUSED.get(code, 'the key is not accepted')}"
            raise ConfigError(
                what, where=self.model, found=f"{code}: {said}", remedy=f"see {' or '.join(KEY_VARIABLES)}"
            ) from None
        raise DataError("Gemini refuses the image", where=self.model, found=f"{code}: {said}") from None

    def _clean(self, text: object) -> str:
        """Return a text without the key, should a server or library repeat it."""
        plain = f"{type(text).__name__}: {text}" if isinstance(text, Exception) else str(text)
        return plain.replace(self._key, "***")


def _sdk() -> tuple[Any, Any, type[Any]]:
    try:
        from google import genai
        from google.genai import errors, types
    except ImportError as error:
        raise ConfigError(
            "Asking Gemini needs google-genai",
            where="detector",
            found=error,
            remedy="pip install 'spear-lightning[gemini]'",
        ) from error
    # At INFO it logs every request.
    for name in ("google_genai", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return genai, types, errors.APIError


def _transport_errors() -> tuple[tuple[type[Exception], ...], tuple[type[Exception], ...]]:
    """Return the errors of a connection that could not be made, and all errors of the way there and back."""
    made, all_of_them = [], []
    for name in ("httpx", "httpx2"):
        try:
            module = import_module(name)
        except ImportError:
            continue
        made += [module.ConnectError, module.ConnectTimeout]
        all_of_them.append(module.HTTPError)
    return tuple(made), tuple(all_of_them)


def _key(environment: Mapping[str, str]) -> str:
    for name in KEY_VARIABLES:
        key = environment.get(name, "").strip()
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            # No header can hold it; what complains of that quotes it, in a form that `_clean` would not know.
            raise ConfigError(
                "This is no key for Gemini",
                where=f"environment variable {name}",
                found="line breaks, spaces or letters beyond ASCII",
                expected="one word, as Google gives it",
            )
        if key:
            return key
    raise ConfigError(
        "There is no key for Gemini",
        where="environment",
        expected=" or ".join(KEY_VARIABLES),
        remedy="set it in the environment; it is not written anywhere",
    )


def _asked_wait(error: Any) -> float | None:
    """Return the seconds that the server asks to wait, from the header or Google's RetryInfo."""
    header = getattr(error.response, "headers", {}).get("retry-after")
    if header:
        try:
            return float(header)
        except ValueError:
            pass
        try:
            return parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    said = error.details.get("error") if isinstance(error.details, dict) else None
    details = said.get("details") if isinstance(said, dict) else None
    for detail in details if isinstance(details, list) else []:
        delay = detail.get("retryDelay") if isinstance(detail, dict) else None
        if isinstance(delay, str) and delay.endswith("s"):
            try:
                return float(delay[:-1])
            except ValueError:
                return None
    return None


def _reply(response: Any) -> Reply:
    candidate = response.candidates[0] if response.candidates else None
    if candidate is None:
        feedback = response.prompt_feedback
        finish = f"blocked: {feedback.block_reason}" if feedback else "nothing came back"
    else:
        finish = getattr(candidate.finish_reason, "name", None) or str(candidate.finish_reason)
    parts = (candidate.content.parts or []) if candidate is not None and candidate.content else []
    text = "".join(part.text for part in parts if part.text and not part.thought)
    usage = response.usage_metadata
    spent = [getattr(usage, name, None) or 0 for name in ("candidates_token_count", "thoughts_token_count")]
    return Reply(text, finish, getattr(usage, "prompt_token_count", None) or 0, sum(spent))
