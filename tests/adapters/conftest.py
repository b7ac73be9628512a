"""Makes the repository root importable, here and (by inheriting sys.path) in the worker processes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
