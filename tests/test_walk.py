"""The walk: every family's blocks add up to its model, statistics are those of the real inputs, memory is a block."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pico import FAMILIES, stock_logits
from transformers import AutoModelForCausalLM

from compressor.calibrate.chains import Chains
from compressor.calibrate.curvature import Curvature
from compressor.calibrate.drive import start_chains
from compressor.calibrate.folders import CurvatureFolder
from compressor.calibrate.walk import walk
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.skeleton import Skeleton
from compressor.runtime.schemes import Dense

Pico = Callable[..., Path]
BOTH = ("compressed", "reference")


def windows(samples: int = 4, tokens: int = 24) -> torch.Tensor:
    return torch.randint(0, 128, (samples, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_in_a_row_are_the_model(pico: Pico, tmp_path: Path, family: str) -> None:
    skeleton = Skeleton(Checkpoint(pico(family)))
    chains = start_chains(skeleton, windows(), tmp_path, BOTH)
    for block in walk(skeleton, chains, {}):
        for _ in block.stages():
            pass
        block.advance()
    expected = stock_logits(pico(family), windows())
    for name in BOTH:
        found = skeleton.logits(chains.read(skeleton.blocks, name)[:])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_a_block_is_in_one_stage_and_has_its_disk_name(pico: Pico, family: str) -> None:
    skeleton = Skeleton(Checkpoint(pico(family)))
    for index in range(skeleton.blocks):
        matrices = {
            name.removesuffix(".weight")
            for name in skeleton.checkpoint.block_names()[index]
            if len(skeleton.checkpoint.tensors[name].shape) == 2
            and not name.endswith(("gate.weight", "router.layer.weight"))
        }
        named = [name for stage in skeleton.stages(index) for group in stage for name in group.linears]
        assert len(named) == len(set(named))
        assert set(skeleton.linears(index)) == matrices
        assert not skeleton.unnamed(index)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_statistics_are_those_of_the_real_inputs(pico: Pico, tmp_path: Path, family: str) -> None:
    """Second block, first block changed: both chains against hooks on whole transformers models."""
    skeleton = Skeleton(Checkpoint(pico(family)))
    ids = windows()
    chains = start_chains(skeleton, ids, tmp_path, BOTH)
    wanted = {name: ("moment", "cross") for index in range(2) for name in skeleton.linears(index)}
    changed = {}
    found = {}
    for block in walk(skeleton, chains, wanted):
        for work in block.stages():
            found.update(work.statistics)
            if block.index == 0:
                for name, operator in work.linears.items():
                    work.linears[name] = Dense(operator.dense() * 0.9)
                    changed[name] = work.linears[name].dense()
        block.advance()
    original = AutoModelForCausalLM.from_pretrained(pico(family), dtype=torch.float32)
    altered = AutoModelForCausalLM.from_pretrained(pico(family), dtype=torch.float32)
    for name, parameter in altered.model.layers[0].named_parameters():
        if parameter.dim() == 3 or any(f"model.layers.0.{name}" == f"{n}.weight" for n in changed):
            parameter.data *= 0.9
    inputs = {}
    for key, model in (("reference", original), ("compressed", altered)):
        attention = model.model.layers[1].self_attn
        for linear in ("q_proj", "o_proj"):
            attention.get_submodule(linear).register_forward_pre_hook(
                lambda _, args, at=(key, linear): inputs.__setitem__(at, args[0].reshape(-1, args[0].shape[-1]))
            )
        with torch.no_grad():
            model(ids)
    for linear in ("q_proj", "o_proj"):
        x, moved = inputs["reference", linear], inputs["compressed", linear]
        statistics = found[f"model.layers.1.self_attn.{linear}"]
        assert statistics.tokens == ids.numel()
        torch.testing.assert_close(statistics.moment, moved.T @ moved, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(statistics.cross, (x - moved).T @ moved, rtol=1e-3, atol=1e-2)
    shared = [found[f"model.layers.1.self_attn.{name}"] for name in ("q_proj", "k_proj", "v_proj")]
    assert shared[0] is shared[1] is shared[2]


def test_tokens_count_by_what_errors_at_their_places_cost(pico: Pico, tmp_path: Path) -> None:
    skeleton, ids = Skeleton(Checkpoint(pico("llama"))), windows()
    costs = {name: torch.rand(ids.shape[1]).square() for name in skeleton.linears(0) if "attn" in name}
    kept = CurvatureFolder(tmp_path / "kept", {"of": "a test"})
    kept.save(0, {name: Curvature(1.0, None, 0, places) for name, places in costs.items()})
    chains = start_chains(skeleton, ids, tmp_path, BOTH)
    wanted = dict.fromkeys(skeleton.linears(0), ("moment", "sample"))
    counted = {}
    for work in next(walk(skeleton, chains, wanted, curvature=kept, aimed=costs)).stages():
        counted.update(work.statistics)
    plain = {}
    chains = start_chains(skeleton, ids, tmp_path / "again", BOTH)
    for work in next(walk(skeleton, chains, wanted)).stages():
        plain.update(work.statistics)
    own = {name: torch.ones(ids.shape[1]) for name in ("mlp.gate_proj", "mlp.down_proj")}
    shared = torch.stack([costs[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv"]).sum(0)
    own |= {"self_attn.k_proj": shared, "self_attn.o_proj": costs["model.layers.0.self_attn.o_proj"]}
    inputs = {}
    model = AutoModelForCausalLM.from_pretrained(pico("llama"), dtype=torch.float32)
    for name in own:
        model.model.layers[0].get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, args[0])
        )
    with torch.no_grad():
        model(ids)
    for name, places in own.items():
        x, found = inputs[name].double(), counted[f"model.layers.0.{name}"]
        half = (1 + places / places.mean()) / 2
        expected = torch.einsum("wti,wtj,t->ij", x, x, half.double())
        torch.testing.assert_close(found.moment.double(), expected, rtol=1e-4, atol=1e-3)
        assert found.tokens == ids.numel()
        assert torch.equal(found.sums["sample"], plain[f"model.layers.0.{name}"].sums["sample"])
        if "mlp" in name:
            assert torch.equal(found.moment, plain[f"model.layers.0.{name}"].moment)
    chains = start_chains(skeleton, ids, tmp_path / "alone", ("reference",))  # what serves other recipes, too
    for work in next(walk(skeleton, chains, wanted, curvature=kept, aimed=costs)).stages():
        for name, found in work.statistics.items():
            torch.testing.assert_close(found.moment, plain[name].moment, rtol=1e-4, atol=1e-3)


def leaning(own: torch.Tensor, everything: torch.Tensor) -> torch.Tensor:
    """The moment of an expert's rows, and of other tokens for as many as are missing to one per eight inputs."""
    moment, width = own.T @ own, own.shape[1] / 8
    if len(own) >= width:
        return moment
    scale = own.square().sum(1).mean() / everything.square().sum(1).mean() if len(own) else width / len(everything)
    other = everything.T @ everything / len(everything)
    return moment + (width - len(own)) * scale * other if len(own) else everything.T @ everything


def test_an_experts_statistics_use_the_tokens_and_weights_of_the_compressed_chain(pico: Pico, tmp_path: Path) -> None:
    skeleton = Skeleton(Checkpoint(pico("qwen3_moe")))
    chains = start_chains(skeleton, windows(), tmp_path, BOTH)
    block = next(walk(skeleton, chains, dict.fromkeys(skeleton.linears(0), ("moment", "cross"))))
    found = {}
    for work in block.stages():
        found.update(work.statistics)
    model = AutoModelForCausalLM.from_pretrained(pico("qwen3_moe"), dtype=torch.float32)
    seen = {}
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, args: seen.update(args=args))
    with torch.no_grad():
        model(windows())
    hidden, index, weights = seen["args"]
    for expert in range(4):
        token, slot = torch.where(index == expert)
        rows = hidden[token] * weights[token, slot, None]
        statistics = found[f"model.layers.0.mlp.experts.{expert}.up_proj"]
        assert statistics.tokens == len(token)
        torch.testing.assert_close(statistics.moment, leaning(rows, hidden), rtol=1e-4, atol=1e-4)
        assert statistics.lent == (len(hidden) if len(token) < 8 else 0)
        assert not statistics.cross.any()  # nothing was changed before: both chains are the same
        down = found[f"model.layers.0.mlp.experts.{expert}.down_proj"]
        fused = model.model.layers[0].mlp.experts
        gate, up = torch.nn.functional.linear(hidden, fused.gate_up_proj[expert]).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        own = inner[token] * weights[token, slot, None]
        torch.testing.assert_close(down.moment, leaning(own, inner), rtol=1e-3, atol=1e-4)
        assert down.lent == (len(hidden) if len(token) < 4 else 0)


def test_generations_are_complete_or_absent(tmp_path: Path) -> None:
    chains = Chains(tmp_path, BOTH, (2, 3, 4))
    for name in BOTH:
        chains.create(0, name)[:] = 1.5
    assert chains.exists(0)
    (tmp_path / "00000.reference.f32").write_bytes(b"short")
    assert not chains.exists(0)
    chains.drop(0)
    assert not list(tmp_path.iterdir())


MEMORY = """
import sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from compressor.compress.apply import Job, apply
from compressor.compress.recipe import parse_recipe

def anonymous():
    fields = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(fields["RssAnon"].split()[0]) * 1024

recipe, model, out = sys.argv[1:]
text = Path(recipe).read_text()
base = peak = anonymous()
stop = threading.Event()

def watch():
    global peak
    while not stop.wait(0.01):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
apply(Job(parse_recipe(text), text, (), Path(model), Path(out), model), lambda event: None)
stop.set()
thread.join()
print(peak - base)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.long
def test_depth_does_not_cost_memory(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    """The same model with 4 and with 16 blocks: the peaks differ by less than a block."""
    recipe = tmp_path / "recipe.yaml"
    data = f"data: {{source: '{calibration_text}', samples: 8, sequence_length: 64}}\n"
    recipe.write_text(data + "passes:\n  - {kind: gptq, bits: 4, group_size: 32, refinements: 1}\n")
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "head_dim": 64}
    # With a fixed threshold malloc gives large blocks back at once, so that resident means in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    peaks = {}
    for blocks in (4, 16):
        model = pico("llama", num_hidden_layers=blocks, **sizes)
        command = [sys.executable, "-c", MEMORY, recipe, model, tmp_path / f"out{blocks}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        peaks[blocks] = int(done.stdout)
    block = 4 * (256 * 256 * 3 + 3 * 256 * 1024)  # float32
    assert abs(peaks[16] - peaks[4]) < block, peaks
