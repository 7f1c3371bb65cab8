"""The benchmarks are run from a checkout, not installed: make them importable, behind what is installed."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
