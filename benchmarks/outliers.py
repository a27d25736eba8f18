"""A model that computes the same with outliers: what enters its linears has a few channels 16 or 32 times as large.

    python benchmarks/outliers.py examples/tiny-llama build/outliers/tiny-llama

Large models have such channels, the bundled ones have none, and methods that are made for them (AWQ, SmoothQuant,
rotations, 8-bit inputs) can show nothing without. Scales move between norms or linears and their readers, as
`runtime/model/folds.py` has it: norms put out more in some channels and their readers' columns shrink, the same for
values and output projections, upper and lower projections. Powers of two are exact in every float, so that logits
are those of the original up to the order of sums.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.folds import Seam, folded, seams
from compressor.runtime.model.skeleton import Skeleton

SHARE, SIZES = 0.01, (16.0, 32.0)  # of the channels, at least one; how many times as large


def some_larger(seam: Seam, share: float, generator: torch.Generator) -> Tensor:
    """What to divide a feeder's channels by."""
    scale = torch.ones(seam.channels)
    chosen = torch.randperm(seam.channels, generator=generator)[: max(1, round(share * seam.channels))]
    scale[chosen] = 1 / torch.tensor(SIZES)[torch.randint(len(SIZES), chosen.shape, generator=generator)]
    return scale


def with_outliers(source: Checkpoint, share: float = SHARE, seed: int = 0) -> dict[str, Tensor]:
    """All tensors of the model that computes the same, by their disk names."""
    skeleton, generator = Skeleton(source), torch.Generator().manual_seed(seed)
    steps: dict[str, list[Callable[..., Tensor]]] = {}
    for index in range(skeleton.blocks):
        for seam in seams(skeleton, index).values():
            for name, part in folded(skeleton, index, seam, some_larger(seam, share, generator)).items():
                assert part.make is not None
                steps.setdefault(name, []).append(part.make)
    return {
        name: reduce(lambda tensor, step: step(tensor), steps.get(name, []), source.tensor(name).clone())
        for name in source.tensors
    }


def write(model: Path, out: Path, share: float = SHARE, seed: int = 0) -> None:
    """The rewritten model's folder."""
    tensors = with_outliers(Checkpoint(model), share, seed)
    out.mkdir(parents=True)
    for path in model.iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            shutil.copy(path, out)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=float, default=SHARE, help="of the channels that become larger")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.model, options.out, options.share, options.seed)


if __name__ == "__main__":
    main()
