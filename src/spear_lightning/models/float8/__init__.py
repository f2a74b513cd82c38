"""MLPs with matrix products in 8 bits."""

from spear_lightning.models.float8.mlp import Float8GatedMlp, Float8Mlp, replace_mlps

__all__ = ["Float8GatedMlp", "Float8Mlp", "replace_mlps"]
