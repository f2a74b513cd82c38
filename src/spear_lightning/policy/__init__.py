"""The policy room: one object that turns an observation into an action chunk, and its checkpoints."""

from spear_lightning.policy.checkpoint import build_policy, describe_policy, load_policy, read_checkpoint
from spear_lightning.policy.normalizer import ActionNormalizer
from spear_lightning.policy.policy import Policy, PolicyInputs, PolicyInterface

__all__ = [
    "ActionNormalizer",
    "Policy",
    "PolicyInputs",
    "PolicyInterface",
    "build_policy",
    "describe_policy",
    "load_policy",
    "read_checkpoint",
]
