"""The `spear` command: verbs, each of whose code is imported only when that verb is called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from spear_lightning import __version__
from spear_lightning.errors import SpearError

VERBS = {
    "fit": ("train a model:  spear fit --config experiments/quickstart/vla.yaml", "training.command_line"),
    "validate": ("measure a checkpoint on validation data", "training.command_line"),
    "test": ("measure a checkpoint on test data", "training.command_line"),
    "predict": ("sample action chunks from a checkpoint", "training.command_line"),
    "data": ("index and inspect robot data sets:  spear data index PATH", "robot_data.commands"),
    "data tabletop": (
        "write demonstrations and labelled images of the tabletop world",
        "worlds.tabletop.commands",
    ),
    "eval": ("success rates in closed loop:  spear eval --checkpoint FILE", "evaluation.commands"),
    "label": ("make 3D labels of images:  spear label --images FOLDER", "labeling.commands"),
    "plan": ("memory and days of an experiment on some GPUs", "planning.commands"),
    "demo": ("show, train and try a small policy in the embedded world", "training.demo"),
}
"""Verb -> what it does, and the module whose `main(arguments) -> int` does it."""

EXTRAS = {"mujoco": "sim", "scipy": "label", "vla_eval": "sim"}
"""Module that only some verbs need -> the extra that brings it."""

TRAINER_VERBS = ("fit", "validate", "test", "predict")


def usage() -> str:
    """Return the text of `spear --help`."""
    rows = "\n".join(f"  {verb:<15}{about}" for verb, (about, _) in VERBS.items())
    return (
        f"spear-lightning {__version__}: SPEAR-1 on PyTorch Lightning\n\n"
        f"usage: spear VERB [OPTIONS]      (spear VERB --help explains a verb's options)\n\n{rows}\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb.

    Args:
        arguments: Command line without the program's name; default: that of the process.

    Returns:
        Exit status: 0 success, 1 an error that was explained, 2 wrong usage, 130 interrupted (Ctrl-C).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0 if given else 2
    if given[0] == "--version":
        sys.stdout.write(f"{__version__}\n")
        return 0
    verb = next((name for count in (2, 1) if (name := " ".join(given[:count])) in VERBS), given[0])
    if verb not in VERBS:
        import difflib

        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean `spear {close[0]}`?" if close else ""
        sys.stderr.write(f"spear: there is no verb {verb!r}.{hint}\n\n{usage()}")
        return 2
    try:
        run: Callable[[list[str]], int] = import_module(f"spear_lightning.{VERBS[verb][1]}").main
        return run(given if verb in TRAINER_VERBS else given[len(verb.split()) :])
    except SpearError as error:
        sys.stderr.write(f"spear {verb}: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"spear {verb}: interrupted\n")
        return 130
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        sys.stderr.write(
            f"spear {verb}: the package {error.name!r} is not installed\n"
            f"  remedy: pip install 'spear-lightning[{EXTRAS[error.name]}]'\n"
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
