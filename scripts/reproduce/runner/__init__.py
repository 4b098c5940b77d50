"""The common runner of the experiments in the folder above: tables of arms x seeds."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
"""The repository."""

# The experiments measure with the scripts that build and score the embedded model.
sys.path.append(str(ROOT / "scripts" / "build_assets"))
