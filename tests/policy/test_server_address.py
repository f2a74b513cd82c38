"""The program that serves a policy: on the loopback interface unless a host is told, with plain errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from vla_eval.model_servers import serve

from spear_lightning.policy import vla_eval_server


class Silent(serve.ModelServer):
    """A server that loads nothing."""

    def __init__(self, checkpoint: str = "") -> None:
        super().__init__()

    async def on_observation(self, *_: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize(
    ("options", "place"),
    [
        (["--port", "8001"], ("127.0.0.1", 8001)),
        (["--address", ":8001"], ("127.0.0.1", 8001)),
        (["--address=:8001"], ("127.0.0.1", 8001)),
        (["--address", "10.0.0.5:8001"], ("10.0.0.5", 8001)),
        (["--host", "0.0.0.0", "--port", "8001"], ("0.0.0.0", 8001)),
        (["--config", "place.yaml"], ("10.0.0.6", 9000)),
    ],
)
def test_only_a_host_that_is_told_opens_the_server_to_others(
    options: list[str], place: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "place.yaml").write_text("host: 10.0.0.6\nport: 9000\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["server", *options])
    monkeypatch.setattr(vla_eval_server, "CheckpointServer", Silent)
    served: list[tuple[str, int]] = []
    monkeypatch.setattr(serve, "serve", lambda server, host, port, **_: served.append((host, port)))
    assert vla_eval_server.main() == 0
    assert served == [place]


def test_help_names_the_host_that_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["server", "--help"])
    with pytest.raises(SystemExit):
        vla_eval_server.main()
    assert "(default: 127.0.0.1)" in " ".join(capsys.readouterr().out.split())


def test_a_wrong_checkpoint_is_said_in_plain_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["server", "--args.checkpoint", "nowhere.ckpt"])
    assert vla_eval_server.main() == 1
    assert capsys.readouterr().err.startswith("There is no such checkpoint\n  where: nowhere.ckpt")
