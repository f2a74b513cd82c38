"""Simulations that are interrupted, that fail, or that follow one which was killed."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import vla_eval.api

from spear_lightning.evaluation.shards import EvaluationError, HarnessRun, run_here, run_shards


def test_an_interruption_does_not_wait_for_the_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released, finished = threading.Event(), threading.Event()

    def simulate(*_: object, **__: object) -> None:
        released.wait(20)
        finished.set()

    monkeypatch.setattr(vla_eval.api, "run", simulate)

    def interrupt(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_here(HarnessRun({}, tmp_path, "name", 1), interrupt)
    assert not finished.is_set()
    released.set()


def test_what_breaks_off_the_simulation_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fall_over(*_: object, **__: object) -> None:
        raise RuntimeError("the table fell over")

    monkeypatch.setattr(vla_eval.api, "run", fall_over)
    with pytest.raises(RuntimeError, match="the table fell over"):
        run_here(HarnessRun({}, tmp_path, "name", 1), lambda done, of: None)


def test_a_failing_process_is_reported_while_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process would go on for a while; the second fails at once."""
    program = tmp_path / "simulate"
    program.write_text(
        "#!/bin/sh\n"
        'case "$*" in *"--shard-id 1"*) echo the table fell over; exit 3;; esac\n'
        f"for i in $(seq 100); do sleep 0.1; done; touch {tmp_path}/whole\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(EvaluationError, match=r"exit status 3[^$]*the table fell over"):
        run_shards(HarnessRun({}, tmp_path, "name", 1), 2, lambda done, of: None)
    assert not (tmp_path / "whole").exists()
