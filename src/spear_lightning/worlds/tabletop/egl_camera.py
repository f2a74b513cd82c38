"""Pictures by MuJoCo's own OpenGL renderer, off-screen through EGL: an option where there is EGL.

It has the interface of `RayRenderer`. Patterns are left out: geoms have the first colour of their material, and
the background has one colour. Shadows are MuJoCo's shadow maps, edges are smooth, and pictures may differ from one
graphics driver to another.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import mujoco
import numpy as np

from spear_lightning.errors import SpearError
from spear_lightning.geometry.cameras import PixelIntrinsics
from spear_lightning.worlds.tabletop.ray_camera import CameraPose
from spear_lightning.worlds.tabletop.shading import Look, SensorNoise

NEAR_M, FAR_M = 0.01, 10.0
"""Nothing nearer or further than this is seen."""

LIGHT_CUTOFF_DEGREES = 80.0
"""Half the angle of the light's cone, which points straight down."""

SPARE_GEOMS = 16
"""Room in the scene besides the model's own geoms."""


class EglRenderer:
    """Renders the cameras of a scene with OpenGL.

    Args:
        model: The scene.
        look: Materials and lights.
        cameras: Intrinsics of each camera.
        hidden_groups: Geom groups that cameras do not see.
        noise: Standard deviation of the sensor noise, of 255 levels.

    Raises:
        SpearError: If there is no EGL.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        look: Look,
        cameras: Mapping[str, PixelIntrinsics],
        hidden_groups: Collection[int] = (),
        noise: float = 2.0,
    ) -> None:
        self._model, self._look, self._cameras = model, look, dict(cameras)
        self._noise = SensorNoise(noise)
        width = max(camera.width for camera in cameras.values())
        height = max(camera.height for camera in cameras.values())
        self._context = _open_egl(width, height)
        self._drawing = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_resizeOffscreen(width, height, self._drawing)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._drawing)
        self._scene = mujoco.MjvScene(model, maxgeom=model.ngeom + SPARE_GEOMS)
        self._options = mujoco.MjvOption()
        for group in range(mujoco.mjNGROUP):
            self._options.geomgroup[group] = group not in hidden_groups

    def render(
        self, data: mujoco.MjData, poses: Mapping[str, CameraPose], rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        """Take a picture with each camera.

        Args:
            data: The state; its positions must have been computed.
            poses: Where each camera is; cameras without a pose take no picture.
            rng: Draws the sensor noise; None: no noise.

        Returns:
            uint8 RGB (H, W, 3) for each pose.
        """
        self._context.make_current()
        everything = mujoco.mjtCatBit.mjCAT_ALL
        free = mujoco.MjvCamera()
        mujoco.mjv_updateScene(self._model, data, self._options, None, free, everything, self._scene)
        self._paint()
        pictures = {name: self._picture(self._cameras[name], pose) for name, pose in poses.items()}
        return pictures if rng is None else {name: self._noise.add(p, rng) for name, p in pictures.items()}

    def _paint(self) -> None:
        scene, look = self._scene, self._look
        for geom in scene.geoms[: scene.ngeom]:
            if geom.objtype == mujoco.mjtObj.mjOBJ_GEOM:
                geom.rgba[:3] = look.base_rgb[geom.objid]
                geom.specular = look.specular[geom.objid]
        scene.nlight = 2
        ambient, light = scene.lights[0], scene.lights[1]
        # Where MuJoCo draws a shadow it leaves out all of that light: the ambient part must be another's.
        ambient.headlight, ambient.castshadow, ambient.type = 1, 0, mujoco.mjtLightType.mjLIGHT_DIRECTIONAL
        ambient.ambient[:], ambient.diffuse[:], ambient.specular[:] = look.ambient_rgb, (0, 0, 0), (0, 0, 0)
        light.pos[:], light.dir[:], light.attenuation[:] = look.light_position_m, (0, 0, -1), (1, 0, 0)
        light.type, light.headlight, light.castshadow = mujoco.mjtLightType.mjLIGHT_SPOT, 0, 1
        light.cutoff, light.exponent = LIGHT_CUTOFF_DEGREES, 0.0
        light.ambient[:], light.diffuse[:], light.specular[:] = (0, 0, 0), look.light_rgb, look.light_rgb

    def _picture(self, camera: PixelIntrinsics, pose: CameraPose) -> np.ndarray:
        # The scene has a camera for each eye; without stereo OpenGL draws the average of both.
        for eye in self._scene.camera:
            eye.pos[:], eye.forward[:], eye.up[:] = pose.position_m, pose.rotation[:, 2], -pose.rotation[:, 1]
            eye.frustum_near, eye.frustum_far, eye.orthographic = NEAR_M, FAR_M, 0
            eye.frustum_center = NEAR_M * (camera.width / 2 - camera.cx) / camera.fx
            eye.frustum_width = NEAR_M * camera.width / 2 / camera.fx
            eye.frustum_top = NEAR_M * camera.cy / camera.fy
            eye.frustum_bottom = NEAR_M * (camera.cy - camera.height) / camera.fy
        view = mujoco.MjrRect(0, 0, camera.width, camera.height)
        mujoco.mjr_render(view, self._scene, self._drawing)
        picture_HW3 = np.empty((camera.height, camera.width, 3), np.uint8)
        depth_HW = np.empty((camera.height, camera.width), np.float32)
        mujoco.mjr_readPixels(picture_HW3, depth_HW, view, self._drawing)
        picture_HW3[depth_HW == 1] = np.rint(255 * np.asarray(self._look.horizon_rgb)).astype(np.uint8)
        # OpenGL's first row is the lowest.
        return np.ascontiguousarray(picture_HW3[::-1])

    def close(self) -> None:
        """Give the graphics memory back."""
        self._context.make_current()
        self._drawing.free()
        self._context.free()


def _open_egl(width: int, height: int) -> mujoco.egl.GLContext:
    # Asked for by name: `mujoco.Renderer` would take what the environment variable MUJOCO_GL says.
    try:
        from mujoco.egl import GLContext

        context = GLContext(width, height)
        context.make_current()
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        raise SpearError(
            "MuJoCo's OpenGL renderer cannot be used",
            where="EglRenderer",
            found=f"{type(error).__name__}: {error}",
            expected="EGL: a graphics driver, or Mesa's software renderer, and the package pyopengl",
            remedy="use RayRenderer, which needs neither a display nor a driver",
        ) from error
    return context
