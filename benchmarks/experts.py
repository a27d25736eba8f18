"""Expert pruning: perplexity and KL of every criterion beside random choices.

python benchmarks/experts.py examples/tiny-moe --keep 6 4
python benchmarks/experts.py MODEL --text calibration.txt builtin        # calibrated on another kind of text
"""

from __future__ import annotations

from typing import Any

from quality import arguments, compare


def methods(keep: int) -> dict[str, list[dict[str, Any]]]:
    """Name → passes."""

    def prune(**more: Any) -> list[dict[str, Any]]:
        return [{"kind": "expert_prune", "keep": keep, **more}]

    found = {f"{keep}, random {seed}": prune(criterion="random", seed=seed) for seed in range(5)}
    for criterion in ("frequency", "router_weight", "ean", "reap", "reconstruction"):
        found[f"{keep}, {criterion}"] = prune(criterion=criterion)
    int4 = {"kind": "gptq", "bits": 4, "group_size": 128}
    return {**found, f"{keep}, reap, gptq int4 g128": [*prune(), int4]}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--keep", type=int, nargs="+", default=[6, 4])
    options = parser.parse_args()
    compare(options, {name: passes for keep in options.keep for name, passes in methods(keep).items()})


if __name__ == "__main__":
    main()
