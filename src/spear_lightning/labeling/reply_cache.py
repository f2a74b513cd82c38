"""Replies of a paid service on disk, one file each, so that no question is paid for twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from spear_lightning.errors import ConfigError, DataError

_LOCKS = 1024


@dataclass(frozen=True)
class Reply:
    """What the service said.

    Attributes:
        text: Its answer.
        finish: Why it stopped: "STOP" when it was done.
        input_tokens: What was sent, in the tokens that are paid for.
        output_tokens: What came back, including thoughts.
    """

    text: str
    finish: str
    input_tokens: int
    output_tokens: int


class ReplyCache:
    """A folder of replies; threads and processes may share it.

    A reply is named by a hash of the question. It is written under a temporary name and renamed when it is whole.
    Threads do not ask the same at the same time; two processes whose pictures are equal to the last byte might.

    Args:
        folder: Where they are; made if need be.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self._locks = [threading.Lock() for _ in range(_LOCKS)]

    def require_writable(self) -> None:
        """Write a file and remove it again, before anything is paid for that could not be kept.

        Raises:
            ConfigError: If that fails.
        """
        probe = self.folder / f".{os.getpid()}.probe"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"1")
            probe.unlink()
        except OSError as error:
            raise _not_writable(self.folder, error) from error

    @staticmethod
    def key(image: bytes, *question: str) -> str:
        """Return the name of the reply to a question about an image."""
        digest = hashlib.sha256(hashlib.sha256(image).digest())
        for part in question:
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
        return digest.hexdigest()

    def lock(self, key: str) -> threading.Lock:
        """Return the lock of a question: while one thread asks it, another waits and then finds the reply."""
        return self._locks[int(key[:8], 16) % _LOCKS]

    def get(self, key: str) -> Reply | None:
        """Return a reply, or None if there is none.

        Raises:
            DataError: If its file cannot be read.
        """
        path = self._path(key)
        try:
            return Reply(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                "A cached reply cannot be read", where=path, found=error, remedy="delete the file"
            ) from error

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply; it is safely on disk when this returns.

        Raises:
            ConfigError: If it cannot be written: other replies could not either.
        """
        path = self._path(key)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(asdict(reply), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            raise _not_writable(path, error) from error

    def drop(self, key: str) -> None:
        """Forget a reply."""
        with contextlib.suppress(FileNotFoundError):
            self._path(key).unlink()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


def _not_writable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        "Paid replies cannot be kept",
        where=path,
        found=error,
        expected="a folder that can be written to",
        remedy="mend it, or name another: `detector.cache`",
    )
