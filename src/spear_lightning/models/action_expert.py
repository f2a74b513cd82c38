"""The action expert: a narrow Gemma beside the VLM (spec section 7, the pi0 architecture).

Legend: B batch, H horizon, S suffix tokens (1 state + H actions), W the expert's width, A action numbers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spear_lightning.errors import ConfigError
from spear_lightning.models.gemma import GemmaTransformer
from spear_lightning.models.gemma_shape import GemmaShape


class ActionExpert(nn.Module):
    """Embeds state, noisy actions and flow time, and reads velocities off the transformer's outputs.

    The defaults are SPEAR-1's (about 300 M parameters). `depth`, `kv_heads` and `head_dim` must be the VLM's.
    Embedding and readout run in the parameters' own type even under autocast: they are tiny, and bfloat16
    would round noisy actions to three digits.

    Args:
        width: Channels of the residual stream; even.
        mlp_width: Channels inside the MLP.
        depth: Blocks.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Channels of a head.
        action_width: Numbers in an action as the flow sees it.
        state_width: Numbers in a state.
        time_min_period: Shortest period of the sinusoidal features of flow time.
        time_max_period: Longest period of them.
    """

    def __init__(
        self,
        width: int = 1024,
        mlp_width: int = 4096,
        depth: int = 18,
        heads: int = 8,
        kv_heads: int = 1,
        head_dim: int = 256,
        action_width: int = 8,
        state_width: int = 8,
        time_min_period: float = 4e-3,
        time_max_period: float = 4.0,
    ) -> None:
        super().__init__()
        if width % 2 or not 0 < time_min_period < time_max_period:
            raise ConfigError(
                "The action expert cannot form features of flow time",
                where="expert",
                found=f"width {width}, periods {time_min_period} to {time_max_period}",
                expected="an even width and 0 < time_min_period < time_max_period",
            )
        self.shape = GemmaShape(width, mlp_width, depth, heads, kv_heads, head_dim, vocab_size=1)
        self.action_width = action_width
        self.state_width = state_width
        self.time_min_period = time_min_period
        self.time_max_period = time_max_period
        self.state_in = nn.Linear(state_width, width)
        self.action_in = nn.Linear(action_width, width)
        self.action_time_in = nn.Linear(2 * width, width)
        self.action_time_out = nn.Linear(width, width)
        self.transformer = GemmaTransformer(self.shape)
        self.action_out = nn.Linear(width, action_width)

    def time_features(self, tau_B: Tensor) -> Tensor:
        """Return sines and cosines of flow time, float32 (B, W), of geometrically spaced periods.

        Args:
            tau_B: (B,) in [0, 1].
        """
        share = torch.linspace(0.0, 1.0, self.shape.width // 2, device=tau_B.device)
        period = self.time_min_period * (self.time_max_period / self.time_min_period) ** share
        phase_Bw = tau_B.float()[:, None] * (2 * math.pi / period)
        return torch.cat([phase_Bw.sin(), phase_Bw.cos()], dim=-1)

    def embed(self, state: Tensor, noisy: Tensor, tau: Tensor) -> Tensor:
        """Embed the suffix.

        Args:
            state: (B, state_width) in network units.
            noisy: (B, H, A) point of the flow's path in network units.
            tau: (B,) flow time, 0 noise, 1 data.

        Returns:
            Suffix tokens (B, 1 + H, W): the state, then the actions.
        """
        dtype = self.action_in.weight.dtype
        with torch.autocast(state.device.type, enabled=False):
            actions_BHW = self.action_in(noisy.to(dtype))
            time_BHW = self.time_features(tau).to(dtype)[:, None].expand_as(actions_BHW)
            merged_BHW = F.silu(self.action_time_in(torch.cat([actions_BHW, time_BHW], dim=-1)))
            state_B1W = self.state_in(state.to(dtype))[:, None]
            return torch.cat([state_B1W, self.action_time_out(merged_BHW)], dim=1)

    def read_velocity(self, hidden_BSW: Tensor) -> Tensor:
        """Return velocities, float32 (B, H, A), of the suffix's hidden states (B, 1 + H, W)."""
        with torch.autocast(hidden_BSW.device.type, enabled=False):
            return self.action_out(hidden_BSW[:, 1:].to(self.action_out.weight.dtype)).float()
