"""SPEAR-1 on PyTorch Lightning: 3D-aware vision-language-action models.

The package follows the data's way: ``robot_data`` reads episodes, ``geometry`` and ``flow`` hold the
mathematics, ``models`` the networks, ``policy`` what turns an observation into an action chunk, and
``training`` the Lightning glue. Importing this package imports none of them.
"""

__version__ = "0.1.0"
