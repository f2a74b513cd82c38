"""Processes that begin with everything imported: importing Lightning takes longer than most of what they run.

One process imports it all and does nothing else; the others are forked from it, as clean as new ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

IMPORTED = (
    "lightning",
    "roma",
    "tensorboard",
    "torch.distributed.checkpoint",
    "torchmetrics",
    "transformers",
    "spear_lightning.policy",
    "spear_lightning.training.command_line",
    "spear_lightning.training.robot_data_module",
    "spear_lightning.training.vla_module",
    "spear_lightning.training.vlm_module",
)


class WarmProcess:
    """A process that was forked for one call."""

    def __init__(self, server: WarmServer, pid: int) -> None:
        self._server, self.pid = server, pid

    def wait(self) -> int:
        """Return its exit status; that of a process which a signal ended is negative."""
        return int(self._server.ask({"wait": self.pid}))


class WarmServer:
    """The process that has everything imported."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, request: Mapping[str, Any]) -> Any:
        """Send a request and return its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, function: str, *arguments: Any, log: Path | None = None, **variables: str) -> WarmProcess:
        """Call a function in a new process.

        Args:
            function: "module:name"; the module may lie beside this file.
            arguments: What it is called with; what JSON can say. The exit status is what it returns.
            log: File for what it prints; default: with this process's.
            variables: Environment variables that the process has beside this one's.
        """
        request = {"function": function, "arguments": arguments, "log": None if log is None else str(log)}
        return WarmProcess(self, self.ask({**request, "environment": {**os.environ, **variables}}))

    def stop(self) -> None:
        """End the server; processes that it started must have been waited for."""
        self._process.communicate()


def serve() -> None:
    for module in IMPORTED:
        import_module(module)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                answers.close()
                call(request)
        answers.write(f"{answer}\n")
        answers.flush()


def call(request: dict[str, Any]) -> None:
    """Call a function and end this process with what it returns."""
    status = 1
    try:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        if request["log"] is not None:
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
        os.environ.clear()
        os.environ.update(request["environment"])
        module, _, name = request["function"].partition(":")
        status = getattr(import_module(module), name)(*request["arguments"]) or 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    finally:
        # What it raised would go on to the server's own code in this copy of it, and is printed instead.
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
