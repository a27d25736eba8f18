"""2:4 sparsity and ARMOR: quality, bytes and seconds of every method.

    python benchmarks/sparse.py examples/tiny-llama --seeds 0 1 2
    python benchmarks/sparse.py MODEL --text calibration.txt evaluation.txt --length 256

KL(original ‖ result) per token and perplexity, float32 forward passes over the same windows. Wrappers have blocks of
`--block`, and low-rank residuals that rank: where the block divides the layer, both take the same bytes.
"""

from __future__ import annotations

from typing import Any

from quality import arguments, compare


def methods(block: int) -> dict[str, list[dict[str, Any]]]:
    """Name → passes."""

    def sparse(method: str, **more: Any) -> dict[str, Any]:
        return {"kind": "sparse24", "method": method, **more}

    def armor(**more: Any) -> dict[str, Any]:
        return {"kind": "armor", "block_size": block, **more}

    plain = {"correction": 0}
    eora = {"kind": "eora", "rank": block}
    als = {"solver": "als", "iterations": 60}
    full = {**als, "objective": "full"}
    int4 = {"kind": "gptq", "bits": 4, "group_size": 128}
    return {
        "magnitude": [sparse("magnitude")],
        "wanda": [sparse("wanda")],
        "nowag": [sparse("nowag")],
        "sparsegpt": [sparse("sparsegpt", **plain)],
        "sparsegpt, corrected": [sparse("sparsegpt")],
        "sparsegpt_sweep": [sparse("sparsegpt_sweep", **plain)],
        "sparsegpt_sweep, corrected": [sparse("sparsegpt_sweep")],
        "sparsegpt + eora": [sparse("sparsegpt", **plain), {**eora, **plain}],
        "sparsegpt_sweep + eora": [sparse("sparsegpt_sweep", **plain), {**eora, **plain}],
        "sparsegpt_sweep + eora, corrected": [sparse("sparsegpt_sweep"), eora],
        "armor, adam 4000": [armor(iterations=4000)],
        "armor, als": [armor(**als)],
        "armor, als + full": [armor(**full)],
        "armor, als + full, corrected": [armor(**full, correction=1)],
        "armor, als + full, shared B": [armor(**full, share=True)],
        "armor, als + full, int8 wrappers": [armor(**full, wrapper_bits=8)],
        "sparsegpt_sweep, int4 g128": [sparse("sparsegpt_sweep"), int4],
        "armor, als + full, int4 g128, int8 wrappers": [armor(**full, wrapper_bits=8), int4],
        "gptq int4 g128": [int4],
        "gptq int3 g128": [{**int4, "bits": 3}],
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--block", type=int, default=16)
    options = parser.parse_args()
    compare(options, methods(options.block))


if __name__ == "__main__":
    main()
