"""Which process does which images: a stable hash divides them, and the launcher's environment says who we are.

Any launcher that sets RANK and WORLD_SIZE will do (torchrun, `fabric run` of Lightning), and so does SLURM's srun.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass

from spear_lightning.errors import ConfigError

_RANK = ("RANK", "SLURM_PROCID")
_WORLD_SIZE = ("WORLD_SIZE", "SLURM_NTASKS")
_LOCAL_RANK = ("LOCAL_RANK", "SLURM_LOCALID")


@dataclass(frozen=True)
class WorkSplit:
    """This process among all that share a run.

    Attributes:
        rank: Its number, from 0.
        world_size: How many there are.
        local_rank: Its number among those of the same machine: the GPU it uses.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size or self.local_rank < 0:
            raise ConfigError(
                "The launcher's environment contradicts itself",
                where="RANK, WORLD_SIZE, LOCAL_RANK",
                found=self,
                expected="0 <= rank < world size",
            )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> WorkSplit:
        """Read what the launcher set; without a launcher, one process does everything.

        Args:
            environment: Default: that of the process.

        Raises:
            ConfigError: If a variable is no number, or they contradict each other.
        """
        given = os.environ if environment is None else environment
        # An allocation of SLURM alone sets its variables too, for the batch script: it counts if srun started us.
        started = given if "RANK" in given or "SLURM_STEP_ID" in given else {}
        return cls(_number(started, _RANK, 0), _number(started, _WORLD_SIZE, 1), _number(started, _LOCAL_RANK, 0))

    def owns(self, group: str) -> bool:
        """Return whether this process does the images of a group: depends on nothing but its name."""
        digest = hashlib.sha256(group.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") % self.world_size == self.rank

    @property
    def device(self) -> str:
        """The accelerator of this process, or "cpu"."""
        import torch

        count = torch.cuda.device_count()
        return f"cuda:{self.local_rank % count}" if count else "cpu"


ALONE = WorkSplit()
"""One process that does everything."""


def _number(environment: Mapping[str, str], names: tuple[str, ...], default: int) -> int:
    for name in names:
        if name in environment:
            try:
                return int(environment[name])
            except ValueError as error:
                raise ConfigError(
                    "A variable of the launcher is no number", where=name, found=environment[name]
                ) from error
    return default
