"""Kill runs at random moments, resume them, and compare every byte with an undisturbed one.

    python benchmarks/crash.py --rounds 50
    python benchmarks/crash.py --processes 2 --rounds 20

Of several processes that work together, one is killed, and the others have to end by themselves.

Runs are forked children of a process that has all imports, so that every kill meets a run at work. A round is a run
that is killed and resumed until it comes to its end; each recipe has as many.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads do not outlive a fork

import torch  # noqa: E402
from pico import build_model  # noqa: E402

from compressor.cli import main as cli  # noqa: E402

DATA = ["data.samples=8", "data.sequence_length=128", "output.shard_size=0.1MB"]
PATIENCE = 60.0  # seconds in which processes end once one of them was killed
MEETING = 0.5  # seconds in which they come together; until then each waits for all others for minutes
RECIPES = {  # name → family of the model, a recipe's passes
    "lorc, gptq": ("llama", "[{kind: lorc, ratio: .5, rank_step: 4, calibrated: true}, {kind: gptq, group_size: 32}]"),
    "expert_prune, gptq": ("qwen3_moe", "[{kind: expert_prune, ratio: .25}, {kind: gptq, group_size: 32}]"),
    "armor": ("llama", "[{kind: armor, block_size: 8, solver: als, objective: full, iterations: 6}]"),
    "smoothquant, w8a8": ("llama", "[{kind: smoothquant}, {kind: rtn, scheme: int8}]"),
}


def start(recipe: Path, model: Path, out: Path, resume: bool, processes: int) -> list[int]:
    """The process ids of forked children that apply a recipe together."""
    out.with_name("stderr").unlink(missing_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [
        apply(recipe, model, out, resume, {**together, "RANK": number, "LOCAL_RANK": number})
        for number in range(processes)
    ]


def apply(recipe: Path, model: Path, out: Path, resume: bool, environment: dict[str, object]) -> int:
    """The process id of one of them."""
    child = os.fork()
    if child:
        return child
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        faulthandler.register(signal.SIGUSR1, open(out.with_name(f"stack-{environment['RANK']}"), "w"))  # noqa: SIM115
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(os.open(out.with_name("stderr"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        edits = [word for edit in DATA for word in ("--set", edit)]
        sys.argv = ["compressor", "apply", str(recipe), str(model), str(out), *edits, *["--resume"] * resume]
        cli.main()
    except SystemExit as end:
        os._exit(int(end.code or 0))
    finally:
        os._exit(3)
    return 0


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("timings.jsonl", "report.html"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def finished(children: list[int], seconds: float, message: Path, generator: random.Random) -> bool:
    """Whether a run came to its end within a time; else one of its processes is killed."""
    until, running = time.monotonic() + seconds, list(children)
    while time.monotonic() < until:
        done, status = os.waitpid(running[0], os.WNOHANG)
        if done:
            # 1: beyond the limits, as a random model may be, which only the first says
            if os.waitstatus_to_exitcode(status) not in (0, 1) and running[0] == children[0]:
                raise SystemExit(f"a run failed: {message.read_text()}")
            running.pop(0)
            if not running:
                return True
        time.sleep(0.002)
    os.kill(generator.choice(running), signal.SIGKILL)
    until = time.monotonic() + PATIENCE
    while running:
        if os.waitpid(running[0], os.WNOHANG)[0]:
            running.pop(0)
        elif time.monotonic() > until:
            number = children.index(running[0])
            os.kill(running[0], signal.SIGUSR1)
            time.sleep(1)
            stack = message.with_name(f"stack-{number}").read_text()
            print(f"process {number} went on without one that was killed:\n{stack}", flush=True)
            os.kill(running[0], signal.SIGKILL)
            until = time.monotonic() + PATIENCE
        time.sleep(0.002)
    return False


def rounds_of(name: str, rounds: int, generator: random.Random, room: Path, processes: int) -> tuple[int, int]:
    """Kills, and rounds whose bytes differed, of one recipe."""
    family, passes = RECIPES[name]
    recipe, out, quiet = room / "recipe.yaml", room / "out", room / "quiet"
    model = build_model(family, room / "model", num_hidden_layers=4)
    recipe.write_text(f"version: 1\nlimits: {{kl: null, perplexity_ratio: null}}\npasses: {passes}\n")
    finished(start(recipe, model, quiet, False, processes), 600, room / "stderr", generator)  # warms caches of files
    shutil.rmtree(quiet)
    begun = time.monotonic()
    finished(start(recipe, model, quiet, False, processes), 600, room / "stderr", generator)
    length, expected = time.monotonic() - begun, contents(quiet)
    kills = different = 0
    for _ in range(rounds):
        while True:
            work = out.with_name("out.work")
            resume = (work / "journal.jsonl").exists()
            run = start(recipe, model, out, resume, processes)
            wait = (MEETING if processes > 1 else 0.0) + generator.uniform(0, 1.1) * length
            if finished(run, wait, room / "stderr", generator):
                break
            kills += 1
            if out.is_dir() and not work.exists():
                break
        if (found := contents(out)) != expected:
            different += 1
            names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            print(f"{name}: {', '.join(names)}", flush=True)
        shutil.rmtree(out)
        shutil.rmtree(out.with_name("out.work"), ignore_errors=True)
    return kills, different


def main(recipes: list[str], rounds: int, seed: int, processes: int) -> int:
    """Run the rounds; return how many differed."""
    torch.set_num_threads(1)
    generator, total = random.Random(seed), 0
    for name in recipes:
        with tempfile.TemporaryDirectory(prefix="crash-") as room:
            kills, different = rounds_of(name, rounds, generator, Path(room), processes)
        print(f"{name}: {rounds} rounds, {kills} kills, {different} different", flush=True)
        total += different
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--rounds", type=int, default=50, help="of each recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="that work on a run together")
    options = parser.parse_args()
    sys.exit(bool(main(options.recipes, options.rounds, options.seed, options.processes)))
