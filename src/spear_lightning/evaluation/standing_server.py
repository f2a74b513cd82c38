"""A model server for scripted controllers, which act inside the benchmark: it answers, and nobody listens."""

from __future__ import annotations

from typing import Any

import numpy as np
from vla_eval.model_servers.base import ModelServer, SessionContext
from vla_eval.specs import DimSpec


class StandingServer(ModelServer):
    """Answers every observation with its own state, so that scripted rows run through the same harness."""

    async def on_observation(self, obs: dict[str, Any], ctx: SessionContext) -> None:
        """Send the state back as the target."""
        await ctx.send_action({"actions": np.asarray(obs["states"])})

    def get_action_spec(self) -> dict[str, DimSpec]:
        """Declare nothing: no action is executed."""
        return {}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        """Declare nothing: no observation is needed."""
        return {}
