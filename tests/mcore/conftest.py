"""Makes the repository root importable, here and (by inheriting sys.path) in the worker processes."""

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

# megatron-core is an optional part: pip install -e '.[megatron]'
collect_ignore_glob = [] if find_spec("megatron") is not None else ["test_*.py"]
