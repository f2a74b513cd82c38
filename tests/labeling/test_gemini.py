"""Gemini against a server on loopback: the right labels or failure, in bounded time, nothing paid twice."""

from __future__ import annotations

import errno
import json
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gemini import GOOD, KEY, Answer, FakeGemini, error_body, fake_gemini

from spear_lightning.errors import ConfigError, DataError, SpearError
from spear_lightning.labeling.detections import Detections
from spear_lightning.labeling.detector import Picture
from spear_lightning.labeling.gemini import Gemini
from spear_lightning.labeling.gemini_api import GeminiApi, Pacer, Patience
from spear_lightning.labeling.reply_cache import ReplyCache

pytest.importorskip("google.genai")

MODEL = "gemini-2.5-flash"
PATIENCE = Patience(timeout_s=300.0, attempts=4, first_wait_s=2.0, longest_wait_s=60.0)
IMPATIENT = replace(PATIENCE, timeout_s=1.5)
"""For a server that never answers; any other might take longer on a machine with much to do."""


def picture(number: int = 0) -> Picture:
    return Picture(f"{number}.jpg", b"\xff\xd8\xff" + bytes([number]), np.zeros((200, 400, 3), np.uint8))


class Service:
    """The fake server and one connection to it, which takes longest to make; waits are noted and not waited."""

    def __init__(self, fake: FakeGemini, patience: Patience = PATIENCE) -> None:
        self.fake, self.sleeps = fake, list[float]()
        environment = {"GEMINI_API_KEY": KEY}
        self.api = GeminiApi(MODEL, Pacer(1e9), patience, fake.url, self.sleeps.append, environment)

    def detector(self, cache: Path, answer: Callable[[int, str], Answer]) -> Gemini:
        self.fake.answer = answer
        for seen in (self.fake.images, self.fake.requests, self.sleeps):
            seen.clear()
        made = Gemini(str(cache), MODEL, patience=PATIENCE, base_url=self.fake.url)
        made.api = self.api
        return made

    def ask(self, cache: Path, answer: Callable[[int, str], Answer]) -> Detections | SpearError:
        return self.detector(cache, answer).detect([picture()])[0]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with fake_gemini(always()) as fake:
        yield Service(fake)


def always(**said: Any) -> Callable[[int, str], Answer]:
    return lambda number, image: Answer(**said)


def boxes(rows: list[list[float]]) -> str:
    return json.dumps([{"box_2d": row, "label": f"thing {index}"} for index, row in enumerate(rows)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # y first: [100, 200, 500, 600] of 1000 in 400 x 200 pixels.
        (GOOD, [[80, 20, 240, 100], [280, 10, 380, 80]]),
        (f"```json\n{GOOD}\n```", [[80, 20, 240, 100], [280, 10, 380, 80]]),
        (f"```\n{GOOD}```", [[80, 20, 240, 100], [280, 10, 380, 80]]),
        # Corners the wrong way round.
        (boxes([[500, 600, 100, 200]]), [[80, 20, 240, 100]]),
        (boxes([[500, 200, 100, 600]]), [[80, 20, 240, 100]]),
        # A little outside is clipped; without area is left out.
        (boxes([[-8, 0, 500, 1010], [100, 100, 100, 300]]), [[0, 0, 400, 100]]),
        ("[]", []),
    ],
)
def test_usable_replies(text: str, expected: list[list[float]], tmp_path: Path, service: Service) -> None:
    found = service.ask(tmp_path, always(text=text))
    assert isinstance(found, Detections)
    np.testing.assert_allclose(found.boxes_N4, np.array(expected).reshape(-1, 4), atol=1e-3)
    assert len(service.fake.images) == 1


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"text": GOOD[:60], "finish": "MAX_TOKENS"}, "stopped early: MAX_TOKENS"),
        ({"text": GOOD[:60]}, "no JSON"),
        ({"text": "", "finish": "SAFETY"}, "stopped early: SAFETY"),
        ({"text": '{"box_2d": [1, 2, 3, 4]}'}, "no list but a dict"),
        ({"text": '[{"box_2d": [1, 2, 3], "label": "cup"}]'}, "no named box"),
        ({"text": '[{"box_2d": [1, 2, 3, 4]}]'}, "no named box"),
        ({"text": '[{"box_2d": [1, 2, 3, "4"], "label": "cup"}]'}, "no number"),
        # Pixels instead of thousandths.
        ({"text": boxes([[100, 200, 1400, 1900]])}, "not within 0 to 1000"),
        ({"body": {"promptFeedback": {"blockReason": "SAFETY"}}}, "blocked"),
        (
            {"status": 400, "body": error_body(400, "Unable to process input image")},
            "Unable to process input image",
        ),
    ],
)
def test_useless_replies_are_failures_and_not_asked_for_again(
    said: dict[str, Any], reason: str, tmp_path: Path, service: Service
) -> None:
    found = service.ask(tmp_path, always(**said))
    assert isinstance(found, DataError)
    assert reason in str(found)
    assert len(service.fake.images) == 1
    assert service.sleeps == []


def test_the_question_is_as_documented(tmp_path: Path, service: Service) -> None:
    service.ask(tmp_path, always())
    (request,) = service.fake.requests
    assert request["path"] == f"/v1beta/models/{MODEL}:generateContent"
    image = request["contents"][0]["parts"][0]["inlineData"]
    # The interface takes names in both spellings, and the SDK mixes them.
    assert (image.get("mimeType") or image["mime_type"]) == "image/jpeg"
    assert "[ymin, xmin, ymax, xmax]" in request["contents"][0]["parts"][1]["text"]
    config = request["generationConfig"]
    assert config["responseMimeType"] == "application/json"
    assert config["responseSchema"]["items"]["required"] == ["box_2d", "label"]
    assert list(config["thinkingConfig"].values()) == [0]
    assert service.fake.keys == {KEY}


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_passing_trouble_is_waited_out(status: int, tmp_path: Path, service: Service) -> None:
    def answer(number: int, image: str) -> Answer:
        return Answer() if number == 3 else Answer(status=status, body=error_body(status, "later"))

    found = service.ask(tmp_path, answer)
    assert isinstance(found, Detections)
    assert len(service.fake.images) == 3
    # Two seconds, doubled, with at most a quarter on top.
    assert len(service.sleeps) == 2
    assert 2 <= service.sleeps[0] <= 2.5
    assert 4 <= service.sleeps[1] <= 5


RETRY_INFO = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "23s"}]


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ({"headers": {"retry-after": "17"}}, 17),
        ({"body": error_body(429, "slow down", RETRY_INFO)}, 23),
        # Nobody waits for an hour.
        ({"headers": {"retry-after": "3600"}}, 60),
        ({"headers": {"retry-after": "soon"}}, None),
    ],
)
def test_the_server_says_when_to_come_back(
    said: dict[str, Any], seconds: float | None, tmp_path: Path, service: Service
) -> None:
    refusal = Answer(status=429, **{"body": error_body(429, "slow down"), **said})
    found = service.ask(tmp_path, lambda number, image: refusal if number == 1 else Answer())
    assert isinstance(found, Detections)
    assert len(service.fake.images) == 2
    if seconds is None:
        assert 2 <= service.sleeps[0] <= 2.5
    else:
        assert service.sleeps == [pytest.approx(seconds)]


def test_trouble_that_does_not_pass_is_a_failure_after_the_last_attempt(tmp_path: Path, service: Service) -> None:
    found = service.ask(tmp_path, always(status=500, body=error_body(500, "broken")))
    assert isinstance(found, DataError)
    assert "500" in str(found)
    assert len(service.fake.images) == PATIENCE.attempts
    assert len(service.sleeps) == PATIENCE.attempts - 1
    assert not list(tmp_path.rglob("*.json"))


def test_a_server_that_hangs_is_given_up_and_not_asked_again(tmp_path: Path) -> None:
    release = threading.Event()
    with fake_gemini(always()) as fake:
        service = Service(fake, IMPATIENT)
        try:
            found = service.ask(tmp_path, always(wait=release))
        finally:
            release.set()
    assert isinstance(found, DataError)
    assert "Timeout" in str(found)
    assert len(service.fake.images) == 1
    assert service.sleeps == []


def test_a_connection_that_cannot_be_made_is_tried_again(tmp_path: Path) -> None:
    with fake_gemini(always()) as fake:
        gone = Service(fake)
    found = gone.ask(tmp_path, always())
    assert isinstance(found, DataError)
    assert len(gone.sleeps) == PATIENCE.attempts - 1


@pytest.mark.parametrize(
    ("status", "message", "details"),
    [
        (403, "Permission denied", []),
        (404, "models/x is not found", []),
        (400, "API key not valid", [{"reason": "API_KEY_INVALID"}]),
    ],
)
def test_what_no_other_image_would_escape_ends_the_run(
    status: int, message: str, details: list[dict[str, Any]], tmp_path: Path, service: Service
) -> None:
    said = error_body(status, f"{message} {KEY}", details)
    with pytest.raises(ConfigError, match=r"(?s)Gemini refuses.*\*\*\*") as refused:
        service.ask(tmp_path, always(status=status, body=said))
    assert KEY not in str(refused.value)
    assert refused.value.__cause__ is None


def test_no_key_is_an_error_before_anything_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, service: Service
) -> None:
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="GEMINI_API_KEY or GOOGLE_API_KEY"):
        Gemini(str(tmp_path)).prepare()


@pytest.mark.parametrize("key", ["AIzaFIRST\nAIzaSECOND", "AIza\0SECRET", "AIza SECRET", "“AIzaSECRET”"])
def test_what_can_be_no_key_is_refused_unsaid(key: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s)no key.*GEMINI_API_KEY") as error:
        GeminiApi(MODEL, Pacer(1e9), PATIENCE, environment={"GEMINI_API_KEY": key})
    assert "AIza" not in str(error.value)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("said", ["rate limited", None, [1]])
def test_errors_of_another_form_cost_one_image(
    said: object, status: int, tmp_path: Path, service: Service
) -> None:
    assert isinstance(service.ask(tmp_path, always(status=status, body={"error": said})), DataError)


def full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_nothing_is_asked_whose_reply_could_not_be_kept(
    tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"(?s)Paid replies cannot be kept.*file"):
        Gemini(str(tmp_path / "file" / "replies")).prepare()
    # Where the disk fills up later, the first reply that is lost ends the run.
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConfigError, match="Paid replies cannot be kept"):
        service.ask(tmp_path / "full", always())
    assert len(service.fake.images) == 1


def test_a_reply_is_paid_once_by_any_number_of_threads(tmp_path: Path, service: Service) -> None:
    made = service.detector(tmp_path, always())
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: made.detect([picture(number % 4)])[0], range(32)))
    assert len(service.fake.images) == len(set(service.fake.images)) == 4
    # 4 x (1000 tokens sent at $0.3, 210 back at $2.5 a million) is 0.33 cents; 28 were there already.
    assert made.costs() == "4 requests, $0.00 ($0.02 paid before)"
    another = service.detector(tmp_path, always())
    again = another.detect([picture(2)])[0]
    assert service.fake.images == []
    # Another question, or another model, is another matter.
    assert Gemini(str(tmp_path), "other").version != another.version
    assert Gemini(str(tmp_path), MODEL, max_objects=7).version != another.version
    assert all(isinstance(item, Detections) and item.names == ("red mug", "Banana.") for item in [*found, again])


def test_only_useless_replies_are_forgotten(tmp_path: Path, service: Service) -> None:
    made = service.detector(tmp_path, lambda number, image: Answer(text="[{" if number == 1 else GOOD))
    assert isinstance(made.detect([picture()])[0], DataError)
    assert isinstance(made.detect([picture()])[0], DataError)
    assert len(service.fake.images) == 1
    assert made.forget(picture())
    assert isinstance(made.detect([picture()])[0], Detections)
    assert len(service.fake.images) == 2
    assert not made.forget(picture())
    assert not made.forget(picture(1))
    assert isinstance(made.detect([picture()])[0], Detections)
    assert len(service.fake.images) == 2


def test_the_key_is_written_nowhere(tmp_path: Path, service: Service, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    said = [
        Answer(status=500, body=error_body(500, f"{KEY} is not our day")),
        Answer(status=400, body=error_body(400, f"bad image of {KEY}")),
    ]
    found = service.ask(tmp_path, lambda number, image: said[min(number, 2) - 1])
    good = service.ask(tmp_path, always())
    assert isinstance(found, DataError)
    assert isinstance(good, Detections)
    assert "***" in str(found)
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    for text in [str(found), caplog.text, *written]:
        assert KEY not in text


def test_requests_are_spaced() -> None:
    now, turns = 100.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    pacer = Pacer(30, lambda: now, sleep)
    for _ in range(4):
        pacer.wait()
        turns.append(now)
    now += 60
    pacer.wait()
    turns.append(now)
    # One in two seconds; time that passed unused does not allow a burst.
    assert turns == pytest.approx([100, 102, 104, 106, 166])


def test_a_broken_cache_file_is_named(tmp_path: Path) -> None:
    cache = ReplyCache(tmp_path)
    key = cache.key(b"image", "model", "question")
    assert cache.get(key) is None
    # Parts are told apart: "ab" + "c" is not "a" + "bc".
    assert cache.key(b"", "ab", "c") != cache.key(b"", "a", "bc")
    (tmp_path / key[:2]).mkdir()
    (tmp_path / key[:2] / f"{key}.json").write_text("{")
    with pytest.raises(DataError, match=key):
        cache.get(key)
