"""Kill a real run at random moments, resume it, and compare every byte with an undisturbed one.

python benchmarks/crash.py --rounds 50
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def command(model: Path, out: Path) -> list[str]:
    edits = ["--set", "data.samples=8", "--set", "data.sequence_length=128", "--set", "output.shard_size=1MB"]
    return [sys.executable, "-m", "compressor.cli", "apply", "w4a16-gptq", str(model), str(out), *edits]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("timings.jsonl", "report.html"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def main(rounds: int, model: Path, seed: int) -> int:
    """Run the rounds; return how many differed."""
    generator = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="crash-"))
    subprocess.run(command(model, folder / "quiet"), check=True, capture_output=True)
    start = time.monotonic()
    subprocess.run(command(model, folder / "quiet2"), check=True, capture_output=True)
    length = time.monotonic() - start
    expected = contents(folder / "quiet")
    different = kills = 0
    for number in range(rounds):
        out = folder / "out"
        while True:
            resume = ["--resume"] if out.with_name("out.work").exists() or out.exists() else []
            process = subprocess.Popen(
                [*command(model, out), *resume], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            try:
                _, message = process.communicate(timeout=generator.uniform(0.2, 1.1) * length)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
                if out.is_dir():
                    break
                continue
            if process.returncode:
                raise SystemExit(f"round {number}: exit {process.returncode}: {message.decode()}")
            break
        same = contents(out) == expected
        different += not same
        print(f"round {number + 1}: {kills} kills so far, {'same bytes' if same else 'DIFFERENT'}", flush=True)
        shutil.rmtree(out)
        shutil.rmtree(out.with_name("out.work"), ignore_errors=True)
    shutil.rmtree(folder)
    print(f"{rounds} rounds, {kills} kills, {different} different")
    return different


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny-llama")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(bool(main(options.rounds, options.model, options.seed)))
