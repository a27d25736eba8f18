"""Compressing on a GPU: on one that is pretended, where no tensor may meet those of the CPU; and on a real one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from pretend import pretended
from safetensors.torch import load_file, save_file

from compressor.calibrate.walk import Block
from compressor.cli.apply import apply as apply_command
from compressor.cli.apply import plan as plan_command
from compressor.compress.apply import Job, apply
from compressor.compress.guards import source_skeleton
from compressor.compress.plan import make_plan
from compressor.compress.recipe import parse_recipe
from compressor.kernels import dispatch
from compressor.runtime import load
from compressor.runtime.errors import ResourceError

RECIPES = {
    "plain": (
        "llama",
        "[{kind: rtn, bits: 4, group_size: 32, search: true, targets: '*.mlp.*'}, "
        "{kind: rtn, scheme: fp8, ignore: '*.mlp.*'}]",
    ),
    "blocks": (
        "llama",
        "[{kind: gptq, scheme: nvfp4a16, targets: '*.mlp.*'}, {kind: rtn, scheme: fp8-block, targets: '*.q_proj'}, "
        "{kind: gptq, scheme: mxfp4a16, targets: ['*.k_proj', '*.v_proj', '*.o_proj']}]",
    ),
    "coupled": ("mixtral", "[{kind: gptq, bits: 3, group_size: 32, objective: model}]"),
    "scaled": ("qwen3_moe", "[{kind: awq}, {kind: gptq, bits: 4, group_size: 32}]"),
    "sparse": (
        "llama",
        "[{kind: sparse24}, {kind: gptq, bits: 4, group_size: 32}, {kind: eora, rank: 4}]",
    ),
    "armor": ("llama", "[{kind: armor, block_size: 8, iterations: 1, wrapper_bits: 8}]"),
    "latents": ("llama", "[{kind: lorc, ratio: .5, calibrated: true, latent_bits: 8}, {kind: gptq, bits: 4}]"),
    "merged": ("mixtral", "[{kind: expert_prune, ratio: .5, criterion: reconstruction, merge: dern}]"),
    "clusters": ("granitemoe", "[{kind: expert_prune, ratio: .5, merge: hc, mass_correction: true}]"),
    "narrow": ("deepseek_v3", "[{kind: expert_width, ratio: .5}, {kind: gptq, bits: 4, group_size: -1}]"),
}


def run(text: str, source: Path, out: Path, device: str) -> None:
    apply(Job(parse_recipe(text), text, (), source, out, "pico"), lambda event: None, device=device)


def recipe(passes: str, calibration_text: Path) -> str:
    return f"data: {{source: {calibration_text}, samples: 4, sequence_length: 32}}\npasses: {passes}\n"


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks compute in bfloat16 on the CPU as on a GPU, whether the processor is fast at it or not."""
    monkeypatch.setattr("compressor.runtime.model.skeleton.products_dtype", lambda capability: torch.bfloat16)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Solvers leave their loops to torch on the CPU as on a GPU, for compiled ones round sums otherwise."""
    for module in ("sweep", "refine", "beam"):
        monkeypatch.setattr(f"compressor.compress.solvers.{module}.compiles", lambda tensor: False)


@pytest.mark.usefixtures("rounded", "uncompiled")
@pytest.mark.parametrize("name", RECIPES)
def test_a_pretended_gpu_writes_the_same_bytes(
    name: str, pico: Callable[..., Path], calibration_text: Path, tmp_path: Path
) -> None:
    family, passes = RECIPES[name]
    source, text = pico(family), recipe(passes, calibration_text)
    run(text, source, tmp_path / "cpu", "cpu")
    with pretended() as device:
        run(text, source, tmp_path / "gpu", "cuda")
        assert device.met  # something was there
    for file in (tmp_path / "cpu").glob("*.safetensors"):
        assert (tmp_path / "gpu" / file.name).read_bytes() == file.read_bytes(), name


@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize(
    "passes",
    [
        "[{kind: gptq, bits: 4, group_size: 32}]",
        "[{kind: rtn, bits: 4, group_size: 32, search: true}, {kind: eora, rank: 4}]",
        "[{kind: sparse24}]",
        "[{kind: armor, block_size: 8, iterations: 1}, {kind: gptq, bits: 4, group_size: 32}]",
        "[{kind: lorc, ratio: .5, calibrated: true}, {kind: gptq, bits: 4, group_size: -1}]",
    ],
)
def test_inputs_that_are_all_zero_say_nothing_on_a_gpu_either(
    passes: str, pico: Callable[..., Path], calibration_text: Path, tmp_path: Path
) -> None:
    source, text = tmp_path / "dead", recipe(passes, calibration_text)
    shutil.copytree(pico("llama"), source)
    tensors = load_file(source / "model.safetensors")
    for norm in ("input_layernorm", "post_attention_layernorm"):  # whatever the first block's linears read
        tensors[f"model.layers.0.{norm}.weight"].zero_()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    run(text, source, tmp_path / "cpu", "cpu")
    with pretended():
        run(text, source, tmp_path / "gpu", "cuda")
    found, expected = (tmp_path / device / "model.safetensors" for device in ("gpu", "cpu"))
    assert found.read_bytes() == expected.read_bytes()


def test_the_pretended_gpu_is_one() -> None:
    with pretended():
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert (there * 2).device == there.to(torch.float16).device == here.to("cuda").device == there.device
        assert there.cpu().device == here.device != there.device
        for meeting in (lambda: here + there, lambda: torch.cat([here, there]), lambda: there.numpy()):
            with pytest.raises(RuntimeError, match="device"):
                meeting()


@pytest.mark.usefixtures("rounded")
def test_moments_come_in_as_many_parts_as_the_memory_of_the_gpu_asks_for(
    pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"num_experts": 16, "moe_intermediate_size": 512, "hidden_size": 64}
    made = parse_recipe("data: {samples: 2, sequence_length: 16}\npasses: [{kind: gptq, group_size: 32}]")
    model = pico("qwen3_moe", **sizes)
    host = make_plan(made, source_skeleton(model, "cpu"), memory=1e12)
    with pretended():
        there = source_skeleton(model, "cuda")
        whole = make_plan(made, there)
        assert whole.room is None
        assert host.memory < whole.memory
        assert whole.host < whole.memory  # no moments, nothing is solved there
        rounded = parse_recipe("passes: [{kind: rtn, group_size: 32}]")
        blocks = [sum(w.in_features * w.out_features for w in there.linears(n).values()) for n in range(there.blocks)]
        assert make_plan(rounded, there).memory > 2 * there.dtype.itemsize * max(
            blocks
        )  # both are there when they are compared
        free = whole.memory - 20_000_000
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
        less = make_plan(made, there)
        assert less.room is not None
        assert less.memory <= free
        job = Job(made, "", (), model, tmp_path / "out", "pico")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**6, 10**12))
        with pytest.raises(ResourceError, match=r"MB of memory of cuda are needed and 1\.00 MB are available"):
            apply(job, lambda event: None, device="cuda")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 10**12))
        monkeypatch.setattr(
            "compressor.compress.resources.available_memory", lambda device: 1000 if device.type == "cpu" else 10**12
        )
        with pytest.raises(ResourceError, match=r"MB of memory are needed and 1\.00 kB are available"):
            apply(job, lambda event: None, device="cuda")


@pytest.mark.parametrize("dry", [False, True])
def test_a_plan_is_of_the_device(dry: bool, pico: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 128, "max_position_embeddings": 512}
    words, options = ("w4a16-awq", str(pico("llama", **sizes))), {"as_json": True}
    ask = (
        partial(apply_command, *words, Path("out"), dry_run=True, **options)
        if dry
        else partial(plan_command, *words, **options)
    )
    ask()
    host = json.loads(capsys.readouterr().out)
    with pretended() as device:
        ask(device="cuda")
        assert device.met
    assert json.loads(capsys.readouterr().out)["memory"] != host["memory"]
    with pytest.raises(ResourceError, match="finds no GPU here"):
        ask(device="cuda")


def test_a_full_gpu_is_said_and_resumable(
    pico: Callable[..., Path], calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = recipe("[{kind: gptq, bits: 4, group_size: 32}]", calibration_text)
    run(text, pico("llama"), tmp_path / "whole", "cpu")
    job, calls, real = Job(parse_recipe(text), text, (), pico("llama"), tmp_path / "out", "pico"), [], Block.advance

    def full(block: Block) -> None:
        calls.append(block.index)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total of 24 GiB")
        real(block)

    monkeypatch.setattr(Block, "advance", full)
    with pytest.raises(
        ResourceError, match=r"is full \(CUDA out of memory. Tried to allocate 20.00 GiB\); .*--memory"
    ) as e:
        apply(job, lambda event: None)
    assert "\n" not in str(e.value)
    apply(job, lambda event: None, resume=True, memory=1e9)
    found, expected = (tmp_path / name / "model.safetensors" for name in ("out", "whole"))
    assert found.read_bytes() == expected.read_bytes()


def test_what_no_kernel_takes_runs_on_its_device(
    pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paths that the CPU has too, in its own bf16: none of their tables and layouts may get in."""
    monkeypatch.setattr(dispatch, "has_kernels", lambda device, dtype: False)
    text = (
        "passes: [{kind: sparse24, method: magnitude, targets: '*.o_proj'}, "
        "{kind: rtn, group_size: 16, targets: ['*.down_proj', '*.o_proj']}, "
        "{kind: rtn, scheme: int8, targets: '*.up_proj'}, {kind: rtn, scheme: fp8, targets: '*.gate_proj'}, "
        "{kind: rtn, bits: 3, group_size: 32, symmetric: false, targets: ['*.q_proj', '*.v_proj']}]"
    )
    run(text, pico("llama"), tmp_path / "out", "cpu")
    ids = torch.arange(1, 12)[None]
    with torch.no_grad():
        here = load(tmp_path / "out", "cpu")
        expected, mlp, x = here(ids).logits, here.model.layers[0].mlp, torch.randn(3, 64).bfloat16()
        product = mlp.up_proj(x)
        with pretended():
            found = load(tmp_path / "out", "cuda")(ids.to("cuda")).logits.cpu()
            for name, buffer in mlp.up_proj.named_buffers():  # as Module.to, which pays the pretended device no heed
                setattr(mlp.up_proj, name, buffer.to("cuda"))
            moved = mlp.up_proj(x.to("cuda")).cpu()
    assert (found - expected).norm() / expected.norm() < 0.05
    assert (moved - product).norm() / product.norm() < 0.01


@pytest.mark.parametrize(
    ("device", "what"), [("cuda", "finds no GPU"), ("gpu", "is not cpu or cuda"), ("meta", "is not"),
                         ("cuda:7", "there are 1 GPUs here")]
)  # fmt: skip
def test_a_device_that_is_not_there_is_refused(
    device: str, what: str, pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: ":" in device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ResourceError, match=what):
        run("passes: [{kind: rtn, bits: 4}]", pico("llama"), tmp_path / "out", device)
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", RECIPES)
def test_a_gpu_compresses_and_runs(
    name: str, pico: Callable[..., Path], calibration_text: Path, tmp_path: Path
) -> None:
    family, passes = RECIPES[name]
    run(recipe(passes, calibration_text), pico(family), tmp_path / "gpu", "cuda")
    ids = torch.arange(1, 12)[None]
    with torch.no_grad():
        found = load(tmp_path / "gpu", "cuda")(ids.cuda()).logits.cpu()
        expected, rounded = (
            load(tmp_path / "gpu", "cpu", dtype)(ids).logits for dtype in (torch.float32, torch.bfloat16)
        )
    assert (found - expected).norm() < 1.5 * (rounded - expected).norm()  # no further off than the CPU in that dtype
