"""One small tree of errors, each saying what is wrong, where, what was expected and what to do."""

from __future__ import annotations


class SpearError(Exception):
    """Base of all errors that a user can cause and mend.

    Args:
        what: One sentence that says what is wrong.
        where: The file, configuration key, option or tensor it is about.
        found: What was found there.
        expected: What would have been right.
        remedy: What the user can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        details = {"where": where, "found": found, "expected": expected, "remedy": remedy}
        lines = [what] + [f"  {name}: {value}" for name, value in details.items() if value is not None]
        # The whole message is the single argument, so that the error survives pickling between processes.
        super().__init__("\n".join(lines))


class ConfigError(SpearError, ValueError):
    """A configuration value is wrong, or two of them contradict each other."""


class DataError(SpearError, ValueError):
    """Data on disk is missing, broken, or not what its description promises."""


class CheckpointError(SpearError, ValueError):
    """A checkpoint or weight file does not fit the model or the run it is loaded into."""


class ShapeError(SpearError, ValueError):
    """A tensor has a shape, type or range that the called function cannot accept."""
