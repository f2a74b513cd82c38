"""The policy room: an observation becomes an action chunk, or questions get answers; with their checkpoints."""

from spear_lightning.policy.answerer import Answerer
from spear_lightning.policy.answerer_files import load_answerer
from spear_lightning.policy.checkpoint import build_policy, describe_policy, load_policy, read_checkpoint
from spear_lightning.policy.normalizer import ActionNormalizer
from spear_lightning.policy.policy import Policy, PolicyInputs, PolicyInterface

__all__ = [
    "ActionNormalizer",
    "Answerer",
    "Policy",
    "PolicyInputs",
    "PolicyInterface",
    "build_policy",
    "describe_policy",
    "load_answerer",
    "load_policy",
    "read_checkpoint",
]
