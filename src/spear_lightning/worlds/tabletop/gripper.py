"""A floating parallel gripper: its pose follows a commanded one through a stiff spring, so contacts push back.

The tool frame has its origin between the fingertips. At the identity orientation the fingers point straight down:
-z is the approach direction and the fingers close along y (as in Bridge V2's data). Poses are [x m, q xyzw] in the
world frame, which is the robot's base frame.
"""

from __future__ import annotations

import mujoco
import numpy as np

HAND, TARGET, FINGERS = "hand", "target", ("finger_left", "finger_right")
MAX_OPENING_M = 0.08
"""Gap between the fingers at openness 1."""

CLOSED_BELOW = 0.5
"""Commanded openness under which the gripper is meant to close."""

_METAL, _DARK = (0.55, 0.57, 0.60), (0.12, 0.12, 0.14)
_MASS_KG = 1.0
_WXYZ = [6, 3, 4, 5]
"""Where MuJoCo's quaternion is in a pose; `np.roll` takes ten times as long, and a second has 50 of them."""
_XYZ_FIRST = [1, 2, 3, 0]
_SIDEWAYS = 0.7


def add_gripper(spec: mujoco.MjSpec, position_m: np.ndarray, yaw: float) -> None:
    """Add the gripper to a model under construction.

    Args:
        spec: The model.
        position_m: (3,) where the tool frame starts.
        yaw: How the tool starts turned about the vertical.
    """
    quat_wxyz = [np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)]
    spec.worldbody.add_body(name=TARGET, mocap=True, pos=position_m, quat=quat_wxyz)
    hand = spec.worldbody.add_body(name=HAND, pos=position_m, quat=quat_wxyz, gravcomp=1)
    hand.add_freejoint()
    box, capsule = mujoco.mjtGeom.mjGEOM_BOX, mujoco.mjtGeom.mjGEOM_CAPSULE
    hand.add_geom(
        name="palm", type=box, size=[0.018, 0.055, 0.018], pos=[0, 0, 0.072], mass=_MASS_KG, rgba=[*_METAL, 1]
    )
    # The arm is there to be seen: cameras find the gripper by it. It touches nothing.
    hand.add_geom(
        name="arm",
        type=capsule,
        size=[0.022, 0, 0],
        fromto=[0, 0, 0.10, 0, 0, 0.55],
        mass=0.001,
        contype=0,
        conaffinity=0,
        rgba=[*_DARK, 1],
    )
    for name, side in zip(FINGERS, (1, -1), strict=True):
        finger = hand.add_body(name=name, gravcomp=1)
        finger.add_joint(
            name=name,
            type=mujoco.mjtJoint.mjJNT_SLIDE,
            axis=[0, side, 0],
            range=[0, MAX_OPENING_M / 2],
            limited=True,
            damping=8.0,
            armature=0.05,
        )
        finger.add_geom(
            name=name,
            type=box,
            size=[0.009, 0.005, 0.031],
            pos=[0, side * 0.005, 0.023],
            mass=0.05,
            friction=[1.5, 0.05, 0.001],
            condim=4,
            rgba=[*_DARK, 1],
        )
        actuator = spec.add_actuator(
            name=name,
            target=name,
            trntype=mujoco.mjtTrn.mjTRN_JOINT,
            ctrlrange=[0, MAX_OPENING_M / 2],
            ctrllimited=True,
            forcerange=[-12, 12],
            forcelimited=True,
        )
        actuator.set_to_position(kp=900.0, kv=20.0)
    spec.add_equality(
        name=HAND,
        type=mujoco.mjtEq.mjEQ_WELD,
        objtype=mujoco.mjtObj.mjOBJ_BODY,
        name1=TARGET,
        name2=HAND,
        solref=[0.02, 1.0],
        data=_weld_data(np.zeros(3), np.array([1.0, 0, 0, 0])),
    )


def add_grip(spec: mujoco.MjSpec, body: str) -> None:
    """Add the bond that holds an object once both fingers press on it; it starts open."""
    spec.add_equality(
        name=body,
        type=mujoco.mjtEq.mjEQ_WELD,
        objtype=mujoco.mjtObj.mjOBJ_BODY,
        name1=HAND,
        name2=body,
        active=False,
        solref=[0.015, 1.0],
        data=_weld_data(np.zeros(3), np.array([1.0, 0, 0, 0])),
    )


def _weld_data(position: np.ndarray, quat_wxyz: np.ndarray) -> np.ndarray:
    # Anchor in the second body, pose of the second body in the first, weight of rotation against translation.
    data = np.zeros(mujoco.mjNEQDATA)
    data[3:6], data[6:10], data[10] = position, quat_wxyz, 1.0
    return data


class Gripper:
    """The gripper of one running simulation.

    A grasp closes by contact: while the gripper is commanded to close and both fingers press on one and the
    same object, a bond to that object holds it; opening breaks the bond. Nothing else makes a grasp.

    Args:
        model: Compiled model with `add_gripper` and, for every object, `add_grip`.
        data: Its state.
        bodies: Names of the objects' bodies.
    """

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData, bodies: list[str]) -> None:
        self._model, self._data = model, data
        self._hand = model.body(HAND).id
        self._mocap = int(model.body(TARGET).mocapid[0])
        self._sliders = [int(model.joint(name).qposadr[0]) for name in FINGERS]
        self._motors = [model.actuator(name).id for name in FINGERS]
        self._bonds = {model.body(body).id: model.equality(body).id for body in bodies}
        sides = {model.geom(name).id: 1 << side for side, name in enumerate(FINGERS)}
        # Bit of the finger each geom belongs to, and the object's body each geom belongs to.
        self._finger_bit = np.array([sides.get(geom, 0) for geom in range(model.ngeom)])
        self._body_of = np.array(model.geom_bodyid)
        self._parts = {self._hand, *(model.body(name).id for name in FINGERS)}
        self.closing = False

    @property
    def pose(self) -> np.ndarray:
        """Measured pose of the tool frame, float64 (7,): x metres, q xyzw with w >= 0, in the base frame."""
        return to_pose(self._data.xpos[self._hand], self._data.xquat[self._hand])

    @property
    def openness(self) -> float:
        """Measured gap between the fingers relative to the largest, in [0, 1]."""
        gap = float(sum(self._data.qpos[slider] for slider in self._sliders))
        return min(max(gap / MAX_OPENING_M, 0.0), 1.0)

    @property
    def target(self) -> np.ndarray:
        """Pose that the spring pulls towards, float64 (7,)."""
        return to_pose(self._data.mocap_pos[self._mocap], self._data.mocap_quat[self._mocap])

    @target.setter
    def target(self, pose: np.ndarray) -> None:
        self._data.mocap_pos[self._mocap] = pose[:3]
        self._data.mocap_quat[self._mocap] = pose[_WXYZ]

    def command_opening(self, openness: float) -> None:
        """Command the fingers; opening lets go of whatever is held."""
        self._data.ctrl[self._motors] = np.clip(openness, 0, 1) * MAX_OPENING_M / 2
        self.closing = openness < CLOSED_BELOW
        if not self.closing:
            self._data.eq_active[list(self._bonds.values())] = 0

    @property
    def held(self) -> int | None:
        """Body id of the object in the bond, or `None`."""
        for body, bond in self._bonds.items():
            if self._data.eq_active[bond]:
                return body
        return None

    def close_grasp(self) -> None:
        """Make the bond if the gripper is closing and both fingers press on one object."""
        if not self.closing or self.held is not None:
            return
        contact = self._data.contact
        # Pressing with the fingertips from above is no grasp: the force must be along the closing direction.
        sideways = np.abs(contact.frame[:, :3] @ self._data.xmat[self._hand].reshape(3, 3)[:, 1]) > _SIDEWAYS
        touched: dict[int, int] = {}
        for first, second in contact.geom[sideways]:
            for finger, other in ((first, second), (second, first)):
                bit = int(self._finger_bit[finger])
                body = int(self._body_of[other])
                if bit and body in self._bonds:
                    touched[body] = touched.get(body, 0) | bit
        for body, bits in touched.items():
            if bits == 0b11:
                self._bond(body)
                return

    def _bond(self, body: int) -> None:
        data, bond = self._data, self._bonds[body]
        inverse, position, quat = np.empty(4), np.empty(3), np.empty(4)
        mujoco.mju_negQuat(inverse, data.xquat[self._hand])
        mujoco.mju_rotVecQuat(position, data.xpos[body] - data.xpos[self._hand], inverse)
        mujoco.mju_mulQuat(quat, inverse, data.xquat[body])
        self._model.eq_data[bond] = _weld_data(position, quat)
        data.eq_active[bond] = 1

    def touches(self, body: int) -> bool:
        """Whether any part of the gripper is in contact with an object."""
        pairs = self._body_of[self._data.contact.geom]
        return any(
            (first == body and second in self._parts) or (second == body and first in self._parts)
            for first, second in pairs
        )


def to_pose(position_m: np.ndarray, quat_wxyz: np.ndarray) -> np.ndarray:
    """Turn MuJoCo's position and wxyz quaternion into our pose, float64 (7,): xyzw with w >= 0."""
    pose = np.empty(7)
    pose[:3] = position_m
    pose[3:] = quat_wxyz[_XYZ_FIRST]
    if pose[6] < 0:
        pose[3:] *= -1
    return pose
