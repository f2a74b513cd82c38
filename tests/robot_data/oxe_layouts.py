"""The 24 OXE data sets as they lie on disk, small and made up: their features and their own conventions.

Written from the data sets' documentation and independent of the registry: every `store` turns a known motion into
what that data set would hold, with scipy. Numbers that are none of the registry's business are noise.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image
from scipy.spatial.transform import Rotation

from spear_lightning.robot_data.rlds_folder import Feature
from spear_lightning.robot_data.rlds_writer import (
    STEP_FLAGS,
    RldsLayout,
    jpeg,
    png,
    scalar,
    text,
    vector,
    write_description,
    write_shard,
)

COLOUR = (200, 120, 40)
"""What every camera sees: red, green, blue."""


@dataclass(frozen=True)
class Motion:
    """A known motion of T steps.

    Attributes:
        position: (T, 3) metres, in the frame the data set records in.
        rotation: T rotations, tool -> that frame.
        openness: (T,) measured, in [0, 1].
        opens: (T,) commands, 1 or 0.
    """

    position: np.ndarray
    rotation: Rotation
    openness: np.ndarray
    opens: np.ndarray

    def __len__(self) -> int:
        return len(self.position)

    @property
    def quat(self) -> np.ndarray:
        """Quaternions xyzw, of changing sign as recordings have it."""
        return self.rotation.as_quat() * np.where(np.arange(len(self)) % 3, 1, -1)[:, None]

    @property
    def columns(self) -> np.ndarray:
        """4x4 transforms, column by column (T, 16)."""
        matrices = np.tile(np.eye(4), (len(self), 1, 1))
        matrices[:, :3, :3], matrices[:, :3, 3] = self.rotation.as_matrix(), self.position
        return matrices.transpose(0, 2, 1).reshape(-1, 16)

    @property
    def events(self) -> np.ndarray:
        """Relative commands (T, 1): 1 closes, -1 opens, 0 holds."""
        return -np.diff(self.opens, prepend=self.opens[:1])[:, None]


def motion(centre: tuple[float, float, float], steps: int, seed: int) -> Motion:
    """Make a smooth motion around a place; the gripper starts open, closes, and opens again."""
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2, steps)[:, None]
    position = np.array(centre) + 0.02 * np.sin(angle + rng.uniform(0, 6, 3))
    start = Rotation.random(random_state=seed)
    rotation = start * Rotation.from_rotvec(0.4 * angle * rng.normal(size=3))
    opens = np.where((np.arange(steps) >= steps // 3) & (np.arange(steps) < steps - 2), 0.0, 1.0)
    return Motion(position, rotation, rng.uniform(0, 1, steps), opens)


def wide(width: int, seed: int, **parts: np.ndarray) -> np.ndarray:
    """Return noise (T, width) with columns from `at<n>` on replaced."""
    steps = len(next(iter(parts.values())))
    values = np.random.default_rng(seed).uniform(-5, 5, (steps, width))
    for name, part in parts.items():
        columns = part.reshape(steps, -1)
        start = int(name.removeprefix("at"))
        values[:, start : start + columns.shape[1]] = columns
    return values


Values = dict[str, np.ndarray | list[bytes]]
Store = Callable[[Motion], Values]


@dataclass(frozen=True)
class OxeLayout:
    """A data set on disk.

    Attributes:
        folder: NAME/VERSION.
        hz: Rate.
        centre: Where its robot works, as recorded.
        cameras: Our name -> feature.
        numbers: Features that hold numbers.
        store: Motion -> their values.
        language: Key of the instruction.
        blue_first: Cameras whose original copy stores blue first.
        prefix: Name in dataset_info.json, where it is not the folder's.
        own_gripper: Whether it measures its gripper.
        own_command: Whether it records absolute or relative commands.
        episode: Features of the episode, and their values for a good and a bad one.
    """

    folder: str
    hz: float
    centre: tuple[float, float, float]
    cameras: dict[str, Feature]
    numbers: tuple[Feature, ...]
    store: Store
    language: str = "language_instruction"
    blue_first: tuple[str, ...] = ()
    prefix: str = ""
    own_gripper: bool = True
    own_command: bool = True
    episode: tuple[tuple[Feature, object, object], ...] = ()

    @property
    def rlds(self) -> RldsLayout:
        name, version = self.folder.split("/")
        languages = [text(self.language)]
        if self.language == "language_instruction_2":
            languages = [
                text("language_instruction"),
                text("language_instruction_2"),
                text("language_instruction_3"),
            ]
        features = (*self.cameras.values(), *self.numbers, *languages, *STEP_FLAGS)
        return RldsLayout(self.prefix or name, version, (*features, *(each for each, _, _ in self.episode)))

    def serialize(self, moved: Motion, good: bool = True, instruction: str = "push the button") -> bytes:
        steps = len(moved)
        values: Values = dict(self.store(moved))
        for feature in self.numbers:
            values.setdefault(feature.key, wide(feature.size, 3, at0=np.zeros((steps, 0))))
        for name, feature in self.cameras.items():
            values[feature.key] = [picture(feature, name in self.blue_first)] * steps
        for feature in self.rlds.features:
            if feature.kind == "text" and feature.per_step:
                shown = instruction if feature.key == self.language else ""
                values[feature.key] = [shown.encode()] * steps
        for flag, step in (("is_first", 0), ("is_last", steps - 1), ("is_terminal", steps - 1)):
            values[flag] = np.arange(steps) == step
        for feature, right, wrong in self.episode:
            value = right if good else wrong
            values[feature.key] = [value.encode()] if isinstance(value, str) else np.array([value])
        return self.rlds.serialize(values)

    def write(self, root: Path, episodes: list[bytes]) -> Path:
        folder = root / self.folder
        folder.mkdir(parents=True)
        lengths = write_shard(folder, self.rlds, "train", 0, 1, episodes)
        write_description(folder, self.rlds, {"train": [lengths]}, "made up")
        return folder


def picture(feature: Feature, blue_first: bool) -> bytes:
    height, width, _ = feature.shape
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = COLOUR[::-1] if blue_first else COLOUR
    # A corner of another colour: a picture of one colour would be taken for a dummy.
    pixels[: height // 4, : width // 4] = 255
    if feature.encoding == "jpeg":
        return simplejpeg.encode_jpeg(pixels, quality=95, colorspace="RGB", colorsubsampling="444")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def zlib_vector(key: str, width: int) -> Feature:
    return Feature(key, True, "tensor", (width,), "float32", "zlib")


def zipped(values: np.ndarray) -> list[bytes]:
    return [zlib.compress(row.astype("<f4").tobytes()) for row in values]


def col(values: np.ndarray) -> np.ndarray:
    return values[:, None]


def converted(name: str) -> str:
    return f"{name}_converted_externally_to_rlds/0.1.0"


OBS_LANGUAGE = "observation/natural_language_instruction"
GRIPPER_ACTION = "action/gripper_closedness_action"
WORLD_VECTOR, ROTATION_DELTA = vector("action/world_vector", 3), vector("action/rotation_delta", 3)


def both(key: str, wrist: str, height: int, width: int, kind: Callable[..., Feature] = png) -> dict[str, Feature]:
    return {
        "primary": kind(f"observation/{key}", height, width),
        "wrist": kind(f"observation/{wrist}", height, width),
    }


LAYOUTS: dict[str, OxeLayout] = {
    "fractal": OxeLayout(
        "fractal20220817_data/0.1.0",
        3,
        (0.558, -0.083, 0.771),
        {"primary": jpeg("observation/image", 256, 320)},
        (
            vector("observation/base_pose_tool_reached", 7),
            vector("observation/gripper_closed", 1),
            vector("observation/orientation_box", 6),
            vector(GRIPPER_ACTION, 1),
            WORLD_VECTOR,
            ROTATION_DELTA,
        ),
        lambda m: {
            "observation/base_pose_tool_reached": np.hstack([m.position, m.quat]),
            "observation/gripper_closed": 1 - m.openness,
            "observation/orientation_box": np.full((len(m), 6), np.nan),
            GRIPPER_ACTION: m.events,
        },
        OBS_LANGUAGE,
    ),
    "kuka": OxeLayout(
        "kuka/0.1.0",
        10,
        (0.551, 0.048, 0.14),
        {"primary": jpeg("observation/image", 512, 640)},
        (
            zlib_vector("observation/clip_function_input/base_pose_tool_reached", 7),
            zlib_vector("observation/gripper_closed", 1),
            vector(GRIPPER_ACTION, 1),
            WORLD_VECTOR,
            ROTATION_DELTA,
        ),
        lambda m: {
            "observation/clip_function_input/base_pose_tool_reached": zipped(np.hstack([m.position, m.quat])),
            "observation/gripper_closed": zipped(col(1 - m.openness)),
            GRIPPER_ACTION: m.events,
        },
        OBS_LANGUAGE,
        episode=((scalar("success", "bool", per_step=False), True, False),),
    ),
    "bridge": OxeLayout(
        "bridge_dataset/1.0.0",
        5,
        (0.308, 0.031, 0.065),
        {
            name: jpeg(f"observation/image_{number}", 256, 256)
            for number, name in enumerate(("primary", "secondary", "tertiary", "wrist"))
        },
        (vector("observation/state", 7), vector("action", 7)),
        lambda m: {
            "observation/state": np.hstack([m.position, m.rotation.as_euler("xyz"), col(m.openness)]),
            "action": wide(7, 2, at6=m.opens),
        },
        episode=((text("episode_metadata/file_path", per_step=False), "a", "b"),),
    ),
    "taco_play": OxeLayout(
        "taco_play/0.1.0",
        15,
        (0.373, 0.133, 0.383),
        {"primary": png("observation/rgb_static", 150, 200), "wrist": png("observation/rgb_gripper", 84, 84)},
        (vector("observation/robot_obs", 15), vector("action/rel_actions_world", 7), vector("action/actions", 7)),
        lambda m: {
            "observation/robot_obs": wide(
                15, 1, at0=m.position, at3=m.rotation.as_euler("xyz"), at6=0.0807 * m.openness
            ),
            "action/rel_actions_world": wide(7, 2, at6=2 * m.opens - 1),
        },
        OBS_LANGUAGE,
    ),
    "jaco_play": OxeLayout(
        "jaco_play/0.1.0",
        10,
        (-0.076, -0.431, 0.275),
        both("image", "image_wrist", 224, 224),
        (
            vector("observation/end_effector_cartesian_pos", 7),
            vector("observation/joint_pos", 8),
            vector(GRIPPER_ACTION, 1),
            WORLD_VECTOR,
        ),
        lambda m: {
            "observation/end_effector_cartesian_pos": np.hstack([m.position, m.quat]),
            # Two fingers that close unevenly, by 1.4 rad on average.
            "observation/joint_pos": wide(
                8, 1, at6=1.4 * (1 - m.openness) - 0.1, at7=1.4 * (1 - m.openness) + 0.1
            ),
            GRIPPER_ACTION: m.events,
        },
        OBS_LANGUAGE,
    ),
    "viola": OxeLayout(
        "viola/0.1.0",
        20,
        (0.546, 0.006, 0.231),
        both("agentview_rgb", "eye_in_hand_rgb", 224, 224),
        (
            vector("observation/ee_states", 16),
            vector("observation/gripper_states", 1),
            scalar(GRIPPER_ACTION, "float32"),
            WORLD_VECTOR,
            ROTATION_DELTA,
        ),
        lambda m: {
            "observation/ee_states": m.columns,
            "observation/gripper_states": 0.079 * m.openness,
            GRIPPER_ACTION: 1 - 2 * m.opens,
        },
        OBS_LANGUAGE,
    ),
    "ur5": OxeLayout(
        "berkeley_autolab_ur5/0.1.0",
        5,
        (0.453, 0.057, -0.035),
        both("image", "hand_image", 480, 640, jpeg),
        (
            vector("observation/robot_state", 15),
            scalar(GRIPPER_ACTION, "float32"),
            WORLD_VECTOR,
            ROTATION_DELTA,
        ),
        lambda m: {
            "observation/robot_state": wide(15, 1, at6=m.position, at9=m.quat, at13=1 - m.openness),
            GRIPPER_ACTION: m.events[:, 0],
        },
        OBS_LANGUAGE,
        ("wrist",),
    ),
    "hydra": OxeLayout(
        converted("stanford_hydra_dataset"),
        10,
        (0.424, -0.014, 0.377),
        both("image", "wrist_image", 240, 320),
        (vector("observation/state", 27), vector("action", 7)),
        lambda m: {
            "observation/state": wide(
                27, 1, at0=m.position, at3=m.quat, at7=m.rotation.as_euler("xyz"), at24=0.0811 * m.openness
            ),
            "action": wide(7, 2, at6=1 - m.opens),
        },
        blue_first=("primary", "wrist"),
    ),
    "buds": OxeLayout(
        converted("austin_buds_dataset"),
        20,
        (0.559, -0.002, 0.126),
        both("image", "wrist_image", 128, 128),
        (vector("observation/state", 24), vector("action", 7)),
        lambda m: {
            "observation/state": wide(24, 1, at7=0.079 * m.openness, at8=m.columns),
            "action": wide(7, 2, at6=1 - 2 * m.opens),
        },
    ),
    "nyu_franka_play": OxeLayout(
        converted("nyu_franka_play_dataset"),
        3,
        (0.303, 0.416, 0.464),
        {
            "primary": png("observation/image", 128, 128),
            "secondary": png("observation/image_additional_view", 128, 128),
        },
        (vector("observation/state", 13), vector("action", 15)),
        lambda m: {
            "observation/state": wide(13, 1, at7=m.position, at10=m.rotation.as_euler("xyz")),
            "action": wide(15, 2, at13=2 * m.opens - 1),
        },
        own_gripper=False,
    ),
    "furniture_bench": OxeLayout(
        converted("furniture_bench_dataset"),
        10,
        (0.563, 0.05, 0.081),
        both("image", "wrist_image", 224, 224, jpeg),
        (vector("observation/state", 35), vector("action", 8)),
        lambda m: {
            "observation/state": wide(35, 1, at0=m.position, at3=m.quat, at34=0.079 * m.openness),
            "action": wide(8, 2, at7=1 - 2 * m.opens),
        },
    ),
    "sailor": OxeLayout(
        converted("austin_sailor_dataset"),
        20,
        (0.537, -0.086, 0.111),
        both("image", "wrist_image", 128, 128),
        (
            vector("observation/state", 8),
            vector("observation/state_ee", 16),
            vector("observation/state_gripper", 1),
            vector("observation/state_joint", 7),
            vector("action", 7),
        ),
        lambda m: {
            "observation/state": wide(8, 1, at0=m.position, at3=m.quat),
            "observation/state_ee": m.columns,
            "observation/state_gripper": 0.077 * m.openness,
            "action": wide(7, 2, at6=1 - 2 * m.opens),
        },
    ),
    "sirius": OxeLayout(
        converted("austin_sirius_dataset"),
        20,
        (0.448, 0.094, 0.171),
        both("image", "wrist_image", 84, 84),
        (
            vector("observation/state", 8),
            vector("observation/state_ee", 16),
            vector("observation/state_gripper", 1),
            vector("action", 7),
        ),
        lambda m: {
            "observation/state_ee": m.columns,
            "observation/state_gripper": 0.079 * m.openness,
            "action": wide(7, 2, at6=1 - 2 * m.opens),
        },
    ),
    "bc_z": OxeLayout(
        "bc_z/0.1.0",
        10,
        (0.017, 0.11, 0.784),
        {"primary": jpeg("observation/image", 171, 213)},
        (
            vector("observation/present/xyz", 3),
            vector("observation/present/axis_angle", 3),
            vector("observation/present/sensed_close", 1),
            vector("action/future/target_close", 10, "int64"),
            vector("action/future/xyz_residual", 30),
        ),
        lambda m: {
            "observation/present/xyz": m.position,
            "observation/present/axis_angle": m.rotation.as_rotvec(),
            "observation/present/sensed_close": 1 - 0.8 * m.openness,
            "action/future/target_close": np.tile(col(1 - m.opens).astype(np.int64), (1, 10)),
        },
        OBS_LANGUAGE,
    ),
    "dlr_edan": OxeLayout(
        converted("dlr_edan_shared_control"),
        5,
        (-0.565, 0.492, 0.111),
        {"primary": png("observation/image", 360, 640)},
        (vector("observation/state", 7), vector("action", 7)),
        lambda m: {
            "observation/state": np.hstack([m.position, m.rotation.as_euler("zxy"), col(1 - m.openness)]),
            "action": wide(7, 2, at6=1 - m.opens),
        },
    ),
    "mutex": OxeLayout(
        "utaustin_mutex/0.1.0",
        20,
        (0.433, -0.101, 0.22),
        both("image", "wrist_image", 128, 128),
        (vector("observation/state", 24), vector("action", 7)),
        lambda m: {
            "observation/state": wide(24, 1, at7=0.079 * m.openness, at8=m.columns),
            "action": wide(7, 2, at6=1 - 2 * m.opens),
        },
        blue_first=("primary", "wrist"),
    ),
    "fanuc": OxeLayout(
        "berkeley_fanuc_manipulation/0.1.0",
        10,
        (0.545, 0.003, 0.244),
        both("image", "wrist_image", 224, 224),
        (vector("observation/end_effector_state", 7), vector("observation/state", 13), vector("action", 6)),
        lambda m: {
            "observation/end_effector_state": np.hstack([m.position, m.quat]),
            "observation/state": wide(13, 1, at6=1 - m.openness),
        },
        blue_first=("primary", "wrist"),
        own_command=False,
    ),
    "fmb": OxeLayout(
        "fmb_dataset/1.0.0",
        10,
        (0.523, -0.043, 0.156),
        {
            "primary": jpeg("observation/image_side_1", 256, 256),
            "secondary": jpeg("observation/image_side_2", 256, 256),
            "wrist": jpeg("observation/image_wrist_1", 256, 256),
            "wrist_2": jpeg("observation/image_wrist_2", 256, 256),
        },
        (
            vector("observation/eef_pose", 7),
            scalar("observation/state_gripper_pose", "float32"),
            vector("action", 7),
        ),
        lambda m: {
            "observation/eef_pose": np.hstack([m.position, m.quat]),
            "observation/state_gripper_pose": 1 - m.openness,
            "action": wide(7, 2, at6=1 - m.opens),
        },
        blue_first=("primary", "secondary", "wrist", "wrist_2"),
    ),
    "droid": OxeLayout(
        "droid/1.0.1",
        15,
        (0.521, 0.002, 0.317),
        {
            "primary": jpeg("observation/exterior_image_1_left", 180, 320),
            "secondary": jpeg("observation/exterior_image_2_left", 180, 320),
            "wrist": jpeg("observation/wrist_image_left", 180, 320),
        },
        (
            vector("observation/cartesian_position", 6, "float64"),
            vector("observation/gripper_position", 1, "float64"),
            vector("action_dict/gripper_position", 1, "float64"),
            vector("action_dict/cartesian_velocity", 6, "float64"),
            vector("action", 7, "float64"),
        ),
        lambda m: {
            "observation/cartesian_position": np.hstack([m.position, m.rotation.as_euler("xyz")]),
            "observation/gripper_position": 1 - m.openness,
            "action_dict/gripper_position": 1 - m.opens,
        },
        "language_instruction_2",
        prefix="r2d2_faceblur",
        episode=(
            (
                text("episode_metadata/file_path", per_step=False),
                "/nfs/data/AUTOLab/success/2023-07-07/Fri/trajectory.h5",
                "/nfs/data/AUTOLab/failure/2023-07-07/Fri/trajectory.h5",
            ),
        ),
    ),
    "dobbe": OxeLayout(
        "dobbe/0.0.1",
        30,
        (-0.003, 0.261, 0.015),
        {"wrist": jpeg("observation/wrist_image", 256, 256)},
        (vector("observation/state", 7), vector("observation/quat", 4), vector("action", 7)),
        lambda m: {
            "observation/state": np.hstack([m.position, m.rotation.as_euler("xyz"), col(m.openness)]),
            "observation/quat": m.quat,
            "action": wide(7, 2, at6=m.opens),
        },
    ),
    "robocook": OxeLayout(
        converted("stanford_robocook"),
        5,
        (0.395, -0.092, 0.231),
        {
            name: jpeg(f"observation/image_{number}", 256, 256)
            for number, name in enumerate(("primary", "secondary", "tertiary", "quaternary"), start=1)
        },
        (vector("observation/state", 7), vector("action", 7)),
        lambda m: {
            "observation/state": np.hstack([m.position, m.rotation.as_euler("xyz"), col(m.openness / 13.03)]),
        },
        own_command=False,
    ),
    "ucsd_pick_place": OxeLayout(
        converted("ucsd_pick_and_place_dataset"),
        3,
        (0.387, -0.134, 0.095),
        {"primary": png("observation/image", 224, 224)},
        (vector("observation/state", 7), vector("action", 4)),
        lambda m: {
            "observation/state": np.hstack([10 * m.position, m.rotation.as_euler("xyz"), col(6.03 * m.openness)]),
        },
        own_command=False,
        episode=((scalar("episode_metadata/success", "bool", per_step=False), True, False),),
    ),
    "utokyo_xarm": OxeLayout(
        converted("utokyo_xarm_pick_and_place"),
        10,
        (0.373, -0.003, 0.304),
        {
            "primary": png("observation/image", 224, 224),
            "secondary": png("observation/image2", 224, 224),
            "wrist": png("observation/hand_image", 224, 224),
        },
        (vector("observation/end_effector_pose", 6), vector("action", 7)),
        lambda m: {
            # Yaw, pitch, roll: the angles of as_euler("xyz") from last to first.
            "observation/end_effector_pose": np.hstack([m.position, m.rotation.as_euler("xyz")[:, ::-1]]),
            "action": wide(7, 2, at6=1 - m.opens),
        },
        own_gripper=False,
    ),
    "utokyo_pr2": OxeLayout(
        converted("utokyo_pr2_tabletop_manipulation"),
        10,
        (0.474, -0.063, 0.816),
        {"primary": png("observation/image", 128, 128)},
        (vector("observation/state", 7), vector("action", 8)),
        lambda m: {
            "observation/state": np.hstack(
                [1000 * m.position, m.rotation.as_euler("xyz"), col(86.12 * m.openness)]
            ),
        },
        own_command=False,
    ),
}
