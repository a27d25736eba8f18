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

    found = {}
    for name, refit in (("", False), (", refit", True)):
        for seed in range(5):
            found[f"{keep}, random {seed}{name}"] = prune(criterion="random", seed=seed, refit=refit)
        for criterion in ("frequency", "router_weight", "ean", "reap", "reconstruction"):
            found[f"{keep}, {criterion}{name}"] = prune(criterion=criterion, refit=refit)
        for similarity in (0.6, 0.2):
            found[f"{keep}, reap, dern {similarity}{name}"] = prune(merge="dern", similarity=similarity, refit=refit)
        found[f"{keep}, reap, hc{name}"] = prune(merge="hc", refit=refit)
        found[f"{keep}, reap, mass_correction{name}"] = prune(mass_correction=True, refit=refit)
        int4 = {"kind": "gptq", "bits": 4, "group_size": 128}
        found[f"{keep}, reap{name}, gptq int4 g128"] = [*prune(refit=refit), int4]
        for criterion in ("obs", "activation"):
            width = {"kind": "expert_width", "criterion": criterion, "ratio": 1 - keep / 8, "refit": refit}
            found[f"width {keep}/8, {criterion}{name}"] = [width]
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--keep", type=int, nargs="+", default=[6, 4])
    options = parser.parse_args()
    compare(options, {name: passes for keep in options.keep for name, passes in methods(keep).items()})


if __name__ == "__main__":
    main()
