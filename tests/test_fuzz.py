"""A few broken inputs of each kind; `benchmarks/fuzz.py` makes as many as one likes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "fuzz.py"


def test_broken_input_is_refused_and_changes_nothing() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--cases", "4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("–") == 7, "a row without problems for each class"
