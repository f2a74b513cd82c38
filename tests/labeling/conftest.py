"""What the tests of labelling share; see `fake_gemini.py` and `small_networks.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
