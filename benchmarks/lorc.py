"""LoRC: perplexity and KL against the share of the KV cache that is kept.

    python benchmarks/lorc.py examples/tiny-llama --ratios .75 .6 .5 .4 .3
    python benchmarks/lorc.py MODEL --text calibration.txt evaluation.txt --length 256

Ranks move in steps of one here; the share that was reached is printed.
"""

from __future__ import annotations

from typing import Any

from quality import arguments, compare

from compressor.compress.plan import Plan


def methods(ratio: float) -> dict[str, list[dict[str, Any]]]:
    """Name → passes."""

    def lorc(**more: Any) -> list[dict[str, Any]]:
        return [{"kind": "lorc", "rank_step": 1, **more}]

    best = {"ratio": ratio, "calibrated": True}
    return {
        f"{ratio}, uniform": lorc(d_max=ratio, d_min=ratio),
        f"{ratio}, lorc": lorc(ratio=ratio),
        f"{ratio}, calibrated": lorc(**best),
        f"{ratio}, calibrated, outputs": lorc(**best, objective="outputs"),
        f"{ratio}, calibrated, uncorrected": lorc(**best, correction=0),
        f"{ratio}, calibrated, per head": lorc(**best, granularity="per_head"),
        f"{ratio}, calibrated, 8 bits": lorc(**best, latent_bits=8),
        f"{ratio}, calibrated, 4 bits": lorc(**best, latent_bits=4),
    }


def share(plan: Plan) -> dict[str, Any]:
    """Of the cache's bytes that is kept."""
    return {"kept": round(plan.kv_after / plan.kv_before, 4)}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.75, 0.6, 0.5, 0.4, 0.3])
    parser.add_argument("--lines", nargs="+", help="which, by what follows the ratio; default: all")
    options = parser.parse_args()
    every = {name: passes for ratio in options.ratios for name, passes in methods(ratio).items()}
    wanted = {n: p for n, p in every.items() if not options.lines or n.partition(", ")[2] in options.lines}
    compare(options, wanted, share)


if __name__ == "__main__":
    main()
