"""What the tests of labelling share, `fake_gemini.py` and `small_networks.py`, and the layouts of robot data."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "robot_data"))
