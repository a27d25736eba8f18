"""The main job on the bundled model: compress, verify, measure, generate. `make demo` runs it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = "examples/tiny-llama"
OUT = "build/demo"
PROMPT = "def read_lines(path):"


def run(*command: str) -> None:
    print("\n$ compressor", shlex.join(command), flush=True)
    subprocess.run([sys.executable, "-m", "compressor.cli", *command], cwd=ROOT, check=True)


start = time.monotonic()
shutil.rmtree(ROOT / OUT, ignore_errors=True)
run("apply", "w4a16-gptq", MODEL, OUT)
run("verify", OUT)
run("eval", OUT, "--against", MODEL, "--max-ppl-ratio", "1.02")
run("run", OUT, "-p", PROMPT, "--max-tokens", "48")
print(f"\ndone in {time.monotonic() - start:.0f} s; the compressed model is in {OUT}")
