"""The flow room: flow matching on action chunks in R3 x S3 x R (spec section 8)."""

from spear_lightning.flow.action_flow import ActionFlow, FlowSample
from spear_lightning.flow.euclidean import EuclideanQuaternionRotation, EulerAngleRotation
from spear_lightning.flow.rotation import RotationFlow
from spear_lightning.flow.sphere import SphereRotation
from spear_lightning.flow.times import BetaTime, FlowTime, UniformTime

__all__ = [
    "ActionFlow",
    "BetaTime",
    "EuclideanQuaternionRotation",
    "EulerAngleRotation",
    "FlowSample",
    "FlowTime",
    "RotationFlow",
    "SphereRotation",
    "UniformTime",
]
