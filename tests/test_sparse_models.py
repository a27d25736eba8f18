"""Sparse and factorized models end to end: written, read back, run, resumed; and what other readers get of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_apply import Killed, contents, kill_at, quiet
from test_formats import EXACT, IDS, decoded_reference, logits
from test_sparse import is_24
from transformers import AutoModelForCausalLM

from compressor.compress.apply import Job, apply
from compressor.compress.events import Event, LayerDone, Solving
from compressor.compress.output.verify import verify
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load
from compressor.runtime.errors import RecipeError
from compressor.runtime.schemes import Armor, ArmorLinear, Sparse24
from compressor.runtime.stored import StoredModel

Pico = Callable[..., Path]
ARMOR = "{kind: armor, solver: als, objective: full, block_size: 4, iterations: 2, correction: 1%s}"
SPARSE = "{kind: sparse24, sweeps: 2}"
INT4 = "{kind: gptq, bits: 4, group_size: 32}"
EORA = "{kind: eora, rank: 2}"


def make(model: Path, text: Path, out: Path, *passes: str, extra: str = "") -> Job:
    data = f"data: {{source: {text}, samples: 8, sequence_length: 64}}\n"
    recipe = extra + data + "passes:\n" + "".join(f"  - {step}\n" for step in passes)
    return Job(parse_recipe(recipe), recipe, (), model, out, str(model))


@pytest.mark.parametrize(
    ("family", "passes"),
    [
        ("llama", (ARMOR % "", INT4)),
        ("qwen2", (ARMOR % ", share: true",)),
        ("mixtral", (ARMOR % ", share: true, wrapper_bits: 8", INT4)),
        ("qwen3_moe", (SPARSE, EORA)),
        ("deepseek_v3", (SPARSE, INT4)),
    ],
)
def test_what_is_written_is_what_runs(
    pico: Pico, calibration_text: Path, tmp_path: Path, family: str, passes: tuple[str, ...]
) -> None:
    job = make(pico(family, **EXACT), calibration_text, tmp_path / "out", *passes)
    plan = apply(job, quiet)
    stored = StoredModel(job.out)
    assert sum(path.stat().st_size for path in job.out.glob("*.safetensors")) >= plan.bytes_after == stored.nbytes
    model = load(job.out, dtype=torch.float32)
    torch.testing.assert_close(logits(model), decoded_reference(job.out), rtol=1e-3, atol=1e-4)
    assert verify(job.out) == []
    generated = model.generate(IDS[:, :5], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 9)
    for name in stored.schemes:
        operator = stored.operator(name)
        while not isinstance(operator, Sparse24):
            operator = operator.inner  # type: ignore[attr-defined]
        assert is_24(operator.dense())


def test_a_shared_b_is_one_tensor_on_disk(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    job = make(pico(**EXACT), calibration_text, tmp_path / "out", ARMOR % ", share: true")
    apply(job, quiet)
    stored = StoredModel(job.out)
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    assert f"{names[0]}_shared_b.weight" in stored.stored
    assert not any(f"{name}.b.weight" in stored.stored for name in names)
    assert isinstance(stored.operator("model.layers.0.mlp.down_proj"), Armor)
    modules = [load(job.out).get_submodule(name) for name in names]
    assert all(isinstance(module, ArmorLinear) for module in modules)


def test_a_killed_run_resumes_to_the_same_bytes(
    pico: Pico, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = (ARMOR % ", share: true, wrapper_bits: 8", INT4)
    whole = make(pico(), calibration_text, tmp_path / "whole", *passes)
    apply(whole, quiet)
    for count in (12, 18):
        job = make(pico(), calibration_text, tmp_path / f"out{count}", *passes)
        with monkeypatch.context() as patched:
            kill_at(count, patched)
            with pytest.raises(Killed):
                apply(job, quiet)
        apply(job, quiet, resume=True)
        left, right = (contents(folder) for folder in (job.out, whole.out))
        assert left == right


def test_two_runs_write_the_same_bytes_with_adam_too(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    step = "{kind: armor, block_size: 4, iterations: 30}"
    jobs = [make(pico(), calibration_text, tmp_path / name, step) for name in "ab"]
    for job in jobs:
        apply(job, quiet)
    assert contents(jobs[0].out) == contents(jobs[1].out)


def test_a_plain_pattern_can_be_written_for_every_reader(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    job = make(pico(), calibration_text, tmp_path / "out", SPARSE, extra="output: {format: dense}\n")
    plan = apply(job, quiet)
    config = json.loads((job.out / "config.json").read_text())
    assert config == json.loads((job.model / "config.json").read_text())
    assert plan.bytes_after == plan.bytes_before
    weights = load_file(job.out / "model.safetensors")
    assert all(is_24(weights[f"{name}.weight"]) for name in plan.rewritten)
    assert not any(torch.signbit(weight[weight == 0]).any() for weight in weights.values())
    native = make(pico(), calibration_text, tmp_path / "native", SPARSE)
    assert apply(native, quiet).bytes_after < plan.bytes_after
    stock = AutoModelForCausalLM.from_pretrained(job.out, dtype=torch.float32)
    torch.testing.assert_close(logits(stock), logits(load(native.out, dtype=torch.float32)), rtol=1e-4, atol=1e-4)
    assert verify(job.out) == []


def test_codes_of_a_pattern_can_be_written_with_their_zeros(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    extra = "output: {format: compressed-tensors}\n"
    job = make(pico(**EXACT), calibration_text, tmp_path / "out", SPARSE, INT4, extra=extra)
    apply(job, quiet)
    stored = StoredModel(job.out)
    assert all(is_24(stored.operator(name).dense()) for name in stored.schemes)
    stock = AutoModelForCausalLM.from_pretrained(job.out, dtype=torch.float32)
    native = make(pico(**EXACT), calibration_text, tmp_path / "native", SPARSE, INT4)
    apply(native, quiet)
    torch.testing.assert_close(logits(stock), logits(load(native.out)), rtol=1e-4, atol=1e-4)
    with pytest.raises(RecipeError, match=r"whose readers cannot take .*armor"):
        apply(make(pico(**EXACT), calibration_text, tmp_path / "no", ARMOR % "", extra=extra), quiet)


@pytest.mark.parametrize(
    "solver",
    [
        "solver: als, iterations: 12",
        "solver: als, iterations: 12, polish: 45",
        "solver: adam, objective: proxy, iterations: 45",
    ],
)
def test_a_long_solve_tells_how_far_it_is(solver: str, pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    job = make(pico(), calibration_text, tmp_path / "out", f"{{kind: armor, block_size: 8, {solver}}}")
    events: list[Event] = []
    apply(job, events.append)
    shares: dict[str, list[float]] = {}
    for event in events:
        if isinstance(event, Solving):
            shares.setdefault(event.name, []).append(event.share)
    done = [event.name for event in events if isinstance(event, LayerDone)]
    assert list(shares) == done
    for found in shares.values():
        assert found == sorted(found)
        assert len(found) > 1
        assert 0 <= found[0] < found[-1] <= 1
    assert "Solving" not in (job.out / "report" / "layers.jsonl").read_text()


def test_an_expert_without_tokens_is_factorized_all_the_same(
    pico: Pico, calibration_text: Path, tmp_path: Path
) -> None:
    """One window of few tokens leaves experts without any; a shared B is planned and made for them too."""
    model = pico("qwen3_moe", num_experts=16, num_experts_per_tok=1)
    for passes in ((ARMOR % ", share: true", INT4), (SPARSE, EORA)):
        job = make(model, calibration_text, tmp_path / passes[0][7:12], *passes)
        edits = ("data.samples=1", "data.sequence_length=4")
        job = Job(parse_recipe(job.recipe_text, "r", edits), job.recipe_text, edits, model, job.out, "x")
        events: list[str] = []
        apply(job, lambda event: events.append(str(event)))  # noqa: B023
        assert any("Starved" in event and "tokens=0" in event for event in events)
        assert verify(job.out) == []


@pytest.mark.parametrize(
    ("passes", "why"),
    [
        ((INT4, SPARSE), r"passes.1: sparse24 cannot take .*, which an earlier pass has compressed"),
        ((SPARSE, ARMOR % ""), "armor cannot take .*, which an earlier pass has compressed"),
        ((EORA, SPARSE), "eora cannot take .*, which nothing has compressed"),
        ((SPARSE, INT4, INT4), "gptq cannot take .*, which an earlier pass has compressed"),
        ((SPARSE, EORA, EORA), "eora cannot take .*, which has a residual already"),
    ],
)
def test_orders_without_sense_are_refused(
    pico: Pico, calibration_text: Path, tmp_path: Path, passes: tuple[str, ...], why: str
) -> None:
    with pytest.raises(RecipeError, match=why):
        apply(make(pico(), calibration_text, tmp_path / "out", *passes), quiet)
