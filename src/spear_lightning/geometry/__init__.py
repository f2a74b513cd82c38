"""The geometry room: quaternions (xyzw), poses and chunks of poses, camera windows and intrinsics.

Plain torch functions without state; every other room may use them, and they use none.
"""

from spear_lightning.geometry import cameras, poses, quaternions

__all__ = ["cameras", "poses", "quaternions"]
