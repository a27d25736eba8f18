"""Does a change of the code change what is written? One hash of all output tensors for each shipped recipe and bundled
model, by the settings that the tests of the recipes use.

    python benchmarks/recipe_hashes.py --write build/before.json      # on the code as it was
    python benchmarks/recipe_hashes.py --against build/before.json    # on the code as it is; exits with 1 if not

Hashes are of one machine, one number of threads and one set of versions. The calibration windows are drawn here and not
by the product, so that a change of how it draws them does not count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from test_recipes import CASES, EDITS, SMALL  # noqa: E402

from compressor.calibrate.corpus import Corpus, builtin_corpus, token_windows  # noqa: E402
from compressor.compress import surveys  # noqa: E402
from compressor.compress.apply import Job, apply  # noqa: E402
from compressor.compress.recipe import parse_recipe, shipped  # noqa: E402
from compressor.runtime.model.checkpoint import Checkpoint  # noqa: E402


@cache
def _windows(name: str, length: int) -> torch.Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / name)
    texts = [part.text for part in builtin_corpus("calibration").parts]
    stream = [token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]]
    count = len(stream) // length
    return torch.tensor(stream[: count * length]).view(count, length)


def pinned(corpus: Corpus, tokenizer: Any, *, samples: int, sequence_length: int, seed: int = 0) -> torch.Tensor:
    """Windows in place of those that `corpus.token_windows` draws."""
    windows = _windows(Path(tokenizer.name_or_path).name, sequence_length)
    drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:samples]
    return windows[drawn].contiguous()


def tensors_hash(folder: Path) -> str:
    """sha256 of names, dtypes, shapes and bytes of all stored tensors, whatever files they lie in."""
    digest, checkpoint = hashlib.sha256(), Checkpoint(folder)
    for name, info in sorted(checkpoint.stored.items()):
        digest.update(f"{name} {info.dtype} {info.shape}".encode())
        digest.update(checkpoint.stored_tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def measure(recipe: str, name: str) -> str:
    text, edits = shipped()[recipe], (*EDITS, *SMALL.get(recipe, ()))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        apply(Job(parse_recipe(text, recipe, edits), text, edits, ROOT / "examples" / name, out, name), lambda e: None)
        return tensors_hash(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="a JSON file for the hashes")
    parser.add_argument("--against", type=Path, help="hashes that an earlier run wrote")
    parser.add_argument("--only", help="recipes whose names hold this text")
    options = parser.parse_args()
    assert surveys.token_windows is token_windows  # where the product draws them
    surveys.token_windows = pinned
    before = json.loads(options.against.read_text()) if options.against else {}
    found: dict[str, str] = {}
    for recipe, name in CASES:
        if options.only and options.only not in recipe:
            continue
        start, key = time.monotonic(), f"{recipe} {name}"
        found[key] = measure(recipe, name)
        same = "" if key not in before else "same" if before[key] == found[key] else "DIFFERS"
        print(f"{key:<40} {found[key][:16]} {time.monotonic() - start:6.1f} s  {same}", flush=True)
    if options.write:
        options.write.write_text(json.dumps(found, indent=2) + "\n")
    if before and any(before.get(key) != value for key, value in found.items()):
        sys.exit(1)


if __name__ == "__main__":
    main()
