"""A tiny policy and a world without physics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from spear_lightning.evaluation.harness import EvaluationPlan
from spear_lightning.policy import Policy, PolicyInterface, build_policy, describe_policy
from spear_lightning.robot_data.images import CameraSpec

HERE = Path(__file__).parent
TWIN = HERE.parents[0] / "conf" / "vla.yaml"


@pytest.fixture
def point_world(monkeypatch: pytest.MonkeyPatch) -> Callable[..., EvaluationPlan]:
    """Plans of evaluations in the world of `point_world.py`, which this and the shards' processes can import."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", str(HERE))

    def plan(**options: Any) -> EvaluationPlan:
        return EvaluationPlan(**{"benchmark": "point_world:PointBenchmark", "episodes": 4, **options})

    return plan


@pytest.fixture(scope="session")
def policy() -> Policy:
    """An untrained policy: it moves at random, but what it does depends on all it sees."""
    torch.manual_seed(0)
    config = yaml.safe_load(TWIN.read_text())["model"]["init_args"]["policy"]
    policy = build_policy(config).eval()
    cameras = {"primary": CameraSpec(42, 28), "wrist": CameraSpec(28, 28)}
    policy.interface = PolicyInterface(cameras, horizon=5, rate_hz=5.0, chunk_mode="cumulative")
    policy.normalizer.fit([-0.02] * 3, [0.02] * 3, [0.2, -0.3, 0.0], [0.5, 0.3, 0.4])
    return policy


@pytest.fixture(scope="session")
def checkpoint(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy in a file."""
    path = tmp_path_factory.mktemp("checkpoint") / "step_0000000.ckpt"
    weights = {f"policy.{name}": tensor for name, tensor in policy.state_dict().items()}
    torch.save({"state_dict": weights, "spear": describe_policy(policy)}, path)
    return path
