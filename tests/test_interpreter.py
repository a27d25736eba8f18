"""The kernels without a GPU: in Triton's interpreter, in processes of their own, since a process either interprets or
compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pico import benchmark

from compressor.compress.apply import Job, apply
from compressor.compress.recipe import parse_recipe

HERE = Path(__file__).resolve().parent
pytest.importorskip("triton")


def interpreted(*command: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment = {key: value for key, value in environment.items() if not key.startswith("PYTEST_")}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    ("marks", "names"),
    [
        ("not long", ("group_linear",)),
        ("not long", ("latent_attention", "sparse24", "w8a8")),
        pytest.param("long", ("group_linear", "grouped"), marks=pytest.mark.long),
        pytest.param("long", ("latent_attention", "sparse24", "w8a8"), marks=pytest.mark.long),
    ],
)
def test_kernels_do_what_their_twins_do(marks: str, names: tuple[str, ...]) -> None:
    options = ["-q", "-p", "no:cacheprovider", "--confcutdir", "tests/kernels", "-m", marks]
    assert " passed" in interpreted("-m", "pytest", *options, *(f"tests/kernels/test_{name}.py" for name in names))


WIDE = {"head_dim": 32}
MODELS = {
    "int": (  # and some that no kernel takes
        "llama",
        {},
        "[{kind: sparse24, targets: ['*.down_proj']}, {kind: rtn, bits: 4, group_size: 16, targets: ['*.down_proj']}, "
        "{kind: rtn, bits: 4, group_size: 32, ignore: ['*.down_proj']}]",
    ),
    "int,latents": ("qwen2", WIDE, "[{kind: lorc, ratio: .5, rank_step: 16}, {kind: rtn, bits: 3, group_size: 32}]"),
    "latents": ("qwen3", WIDE, "[{kind: lorc, ratio: .5, rank_step: 16, latent_bits: 8}]"),
    "armor,sparse24": (
        "llama",
        {"hidden_size": 128, "intermediate_size": 192},
        "[{kind: armor, block_size: 16, iterations: 1, wrapper_bits: 8}, {kind: rtn, bits: 4, group_size: 64}]",
    ),
    "w8a8": ("qwen2", {}, "[{kind: rtn, scheme: int8}, {kind: eora, rank: 4}]"),
    "block_scaled": (
        "llama",
        {"hidden_size": 96, "intermediate_size": 192},
        "[{kind: rtn, scheme: nvfp4a16, targets: ['*.q_proj', '*.k_proj']}, "
        "{kind: rtn, scheme: mxfp4a16, targets: ['*.v_proj', '*.o_proj']}, "
        "{kind: rtn, scheme: fp8-block, targets: ['*.down_proj']}, "
        "{kind: rtn, scheme: mxint8a16, targets: ['*.up_proj']}, "
        "{kind: rtn, scheme: mxfp8, targets: ['*.gate_proj']}]",
    ),
    "experts,int": ("mixtral", {}, "[{kind: rtn, bits: 4, group_size: -1}]"),
}


def test_models_run_by_the_kernels(pico: Callable[..., Path], calibration_text: Path, tmp_path: Path) -> None:
    for kinds, (family, changes, passes) in MODELS.items():
        text = f"data: {{source: {calibration_text}, samples: 4, sequence_length: 32}}\npasses: {passes}\n"
        job = Job(parse_recipe(text), text, (), pico(family, **changes), tmp_path / kinds, "pico")
        apply(job, lambda event: None)
    lines = interpreted("tests/interpreted.py", *(str(tmp_path / kinds) for kinds in MODELS)).splitlines()
    assert len(lines) == len(MODELS)
    for line in lines:
        kinds, found, by_kernels, by_hand = line.split()
        assert found == kinds
        assert float(by_kernels) < max(2e-3, 2 * float(by_hand)), line


def test_experts_whose_inputs_are_scaled_are_run_one_by_one(tmp_path: Path) -> None:
    families = benchmark("families")
    model = families.build("llama4_text", tmp_path / "model")
    families.compress(model, tmp_path / "int", "{kind: rtn, bits: 4, group_size: 32}")
    kinds, found, by_kernels, by_hand = interpreted("tests/interpreted.py", str(tmp_path / "int")).split()
    assert found == kinds
    assert float(by_kernels) < max(2e-3, 2 * float(by_hand))


def test_the_gpu_benchmark_runs(tmp_path: Path) -> None:
    few = ["--shapes", "128x256", "--tokens", "4", "--schemes", "int4", "nvfp4", "--write", "--out", str(tmp_path)]
    lines = interpreted("benchmarks/gpu.py", *few, "--only", "linear", "w8a8")
    assert "int4, 128 x 256, 4.25 bits a weight" in lines
    assert "nvfp4, 128 x 256, 4.50 bits a weight" in lines
    assert "int8, inputs too, 128 x 256" in lines
    lines += interpreted("benchmarks/gpu.py", *few, "--only", "experts", "attention")
    assert "mixture of 4 experts" in lines
    kept = json.loads((tmp_path / "interpreter.json").read_text())["launches"]
    assert {key.split()[0] for key in kept} == {"group_linear", "experts", "attention"}  # of both runs
    assert (tmp_path / "interpreter.txt").read_text() == lines
