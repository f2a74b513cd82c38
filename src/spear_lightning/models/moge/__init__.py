"""MoGe: images to point maps; our own modules for the published weights and for small ones of our own.

`v1` and `v2` are the two networks on what `base` holds in common, `blocks` their convolutions, `camera` recovers
focal length and shift.
"""

from spear_lightning.models.moge.base import Moge, MogeOutput
from spear_lightning.models.moge.v1 import MogeV1
from spear_lightning.models.moge.v2 import MogeV2

__all__ = ["Moge", "MogeOutput", "MogeV1", "MogeV2"]
