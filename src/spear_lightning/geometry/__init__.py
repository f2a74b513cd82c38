"""The geometry room: quaternions (xyzw), poses and chunks of poses, camera windows, oriented boxes.

Plain torch functions without state; every other room may use them, and they use none.
"""

from spear_lightning.geometry import cameras, oriented_boxes, poses, quaternions

__all__ = ["cameras", "oriented_boxes", "poses", "quaternions"]
