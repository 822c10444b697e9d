"""Lets the tests of this folder share their cast: `from story import Story`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
