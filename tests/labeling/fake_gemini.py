"""A server on loopback that speaks as much of Gemini's REST interface as a detector needs, and counts."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "AIzaNotARealKey-0123456789"

GOOD = json.dumps(
    [
        {"box_2d": [100, 200, 500, 600], "label": "red mug"},
        {"box_2d": [50, 700, 400, 950], "label": "Banana."},
    ]
)


@dataclass
class Answer:
    """What the server says to one request."""

    text: str = GOOD
    status: int = 200
    finish: str = "STOP"
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] | None = None
    wait: threading.Event | None = None


def error_body(status: int, message: str, details: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"error": {"code": status, "message": message, "status": "SOME_STATUS", "details": details or []}}


@dataclass
class FakeGemini:
    """The server's address, what it was asked, and what it will say."""

    answer: Callable[[int, str], Answer]
    url: str = ""
    images: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)

    def respond(self, path: str, key: str, request: dict[str, Any]) -> Answer:
        data = request["contents"][0]["parts"][0]["inlineData"]["data"]
        image = hashlib.sha256(base64.urlsafe_b64decode(data)).hexdigest()
        self.images.append(image)
        self.requests.append({"path": path, **request})
        self.keys.add(key)
        return self.answer(len(self.images), image)


@contextmanager
def fake_gemini(answer: Callable[[int, str], Answer]) -> Iterator[FakeGemini]:
    """Serve on loopback; `answer` gets the number of the request, from 1, and the hash of its image."""
    fake = FakeGemini(answer)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            data = self.rfile.read(length)
            if len(data) < length:
                # The client was killed in the middle of its question.
                self.close_connection = True
                return
            request = json.loads(data)
            with lock:
                said = fake.respond(self.path, self.headers["x-goog-api-key"], request)
            if said.wait is not None:
                said.wait.wait()
            body = said.body or {
                "candidates": [{"content": {"parts": [{"text": said.text}]}, "finishReason": said.finish}],
                "usageMetadata": {"promptTokenCount": 1000, "candidatesTokenCount": 200, "thoughtsTokenCount": 10},
            }
            reply = json.dumps(body).encode()
            try:
                self.send_response(said.status)
                for name, value in {"content-type": "application/json", **said.headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)
            except OSError:
                # A client that was killed, or has given up, does not listen.
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
