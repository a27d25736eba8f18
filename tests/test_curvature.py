"""What errors of linears cost the model, against whole models and autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.calibrate import curvature
from compressor.calibrate.chains import Trail
from compressor.calibrate.curvature import BlockBack, Curvature, reverse_walk
from compressor.calibrate.folders import CurvatureFolder
from compressor.calibrate.foretell import foretold
from compressor.calibrate.routing import experts_of
from compressor.calibrate.statistics import Statistics
from compressor.runtime.errors import ResourceError
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.skeleton import Skeleton

WINDOWS = torch.randint(0, 128, (5, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def exact_trail(monkeypatch: pytest.MonkeyPatch) -> None:
    """What enters blocks is kept as it is, so that one can compare."""
    monkeypatch.setattr(curvature, "HalfTrail", Trail)


def walk(model: Path, windows: Tensor, scratch: Path, kept: CurvatureFolder, done: Callable[[int], None]) -> None:
    skeleton = Skeleton(Checkpoint(model))

    def take(back: BlockBack) -> None:
        assert back.tokens == windows.numel()
        kept.save(back.index, back.found())

    reverse_walk(skeleton, windows, scratch, take, done, taken=kept.holds, metrics=True)
    kept.finish(range(skeleton.blocks))


def walked(model: Path, folder: Path, windows: Tensor = WINDOWS) -> CurvatureFolder:
    """What a walk back finds."""
    kept = CurvatureFolder(folder / "kept", {"of": "a test"})
    walk(model, windows, folder / "scratch", kept, lambda step: None)
    assert kept.complete
    assert not (folder / "scratch").exists()
    return kept


def gradients(model: Path, windows: Tensor, names: list[str], seed: Callable[[int], int]) -> dict[str, Tensor]:
    """Gradients of `u · logits` at what modules of the whole model put out, `[windows, tokens, rows]`, by autograd."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for row, ids in enumerate(windows):
        outputs: dict[str, Tensor] = {}
        handles = [whole.get_submodule(name).register_forward_hook(_remember(outputs, name)) for name in names]
        embedded = whole.get_input_embeddings()(ids[None]).requires_grad_(True)
        logits = whole(inputs_embeds=embedded).logits
        p = logits.detach()[0].softmax(-1)
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed(row)))
        u = p.sqrt() * noise - p * (p.sqrt() * noise).sum(-1, keepdim=True)
        pulled = torch.autograd.grad(logits, [outputs[name] for name in names], u[None])
        for name, gradient in zip(names, pulled, strict=True):
            found[name].append(gradient[0])
        for handle in handles:
            handle.remove()
    return {name: torch.stack(rows) for name, rows in found.items()}


def _remember(outputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        outputs[name] = output

    return hook


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_the_walk_back_is_autograd_through_the_whole_model(
    family: str, pico: Callable[..., Path], tmp_path: Path
) -> None:
    model = pico(family)
    skeleton, kept = Skeleton(Checkpoint(model)), walked(model, tmp_path)
    for index in range(skeleton.blocks):
        found = kept.load(index)
        assert set(found) == set(skeleton.linears(index))
        expected = gradients(model, WINDOWS, list(found), lambda row: row)
        for name, own in found.items():
            rows = expected[name].flatten(0, 1).double()
            lengths = rows.norm(dim=1)
            clipped = rows * (2 * lengths[lengths > 1e-12].median() / lengths.clamp(min=1e-30)).clamp(max=1)[:, None]
            assert own.trace == pytest.approx(float(clipped.square().sum() / len(rows)), rel=1e-4)
            assert own.metric is not None
            assert own.tokens == WINDOWS.numel()
            torch.testing.assert_close(own.metric.double(), clipped.T @ clipped / len(rows), rtol=1e-3, atol=1e-8)
            assert own.places is not None
            torch.testing.assert_close(own.places, expected[name].square().sum(-1).mean(0), rtol=1e-3, atol=1e-8)


def test_it_foretells_what_a_small_change_costs(pico: Callable[..., Path], tmp_path: Path) -> None:
    model, name = pico("llama"), "model.layers.1.mlp.down_proj"
    windows = torch.randint(0, 128, (40, 64), generator=torch.Generator().manual_seed(2))
    own = walked(model, tmp_path, windows).load(1)[name]
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False)
    linear = whole.get_submodule(name)
    inputs: list[Tensor] = []
    linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
    before = whole(input_ids=windows).logits.log_softmax(-1)
    moment = inputs[0].T @ inputs[0] / windows.numel()
    change = 0.003 * torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(3))
    linear.weight += change
    after = whole(input_ids=windows).logits.log_softmax(-1)
    measured = float((before.exp() * (before - after)).sum(-1).mean())
    assert own.metric is not None
    found = 0.5 * float(torch.trace(own.metric @ change @ moment @ change.T))
    assert found == pytest.approx(measured, rel=0.15)


def test_draws_have_the_hessian_of_kl_as_their_covariance() -> None:
    logits = torch.randn(6, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(0).double()

    class Leaving:
        shape = (1, 40_000, 6)

        def __getitem__(self, rows: slice) -> Tensor:
            return logits.expand(1, 40_000, 6)

    class Bare:
        device = "cpu"
        config = type("Config", (), {"vocab_size": 6})

    drawn = curvature._drawn(Bare(), lambda hidden: hidden * 1.0, Leaving(), slice(0, 1))[0].double()  # type: ignore[arg-type]
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), p.diag() - torch.outer(p, p), rtol=0.1, atol=4e-3)


def test_it_goes_on_where_it_was_interrupted(pico: Callable[..., Path], tmp_path: Path) -> None:
    model = pico("llama")
    expected = walked(model, tmp_path / "whole")
    kept = CurvatureFolder(tmp_path / "parts", {"of": "a test"})
    steps: list[int] = []
    for _ in range(20):

        def stop(step: int) -> None:
            steps.append(step)
            raise KeyboardInterrupt

        try:
            walk(model, WINDOWS, tmp_path / "scratch", kept, stop)
        except KeyboardInterrupt:
            continue
        break
    assert steps == [0, 1, 2, 3]
    for index in range(2):
        found, whole = kept.load(index), expected.load(index)
        assert found.keys() == whole.keys()
        for name, own in found.items():
            assert own.trace == whole[name].trace
            torch.testing.assert_close(own.metric, whole[name].metric, rtol=0, atol=0)


def test_what_was_kept_on_the_way_is_not_trusted_when_damaged(pico: Callable[..., Path], tmp_path: Path) -> None:
    trail = Trail(tmp_path, ("entering",), (2, 3, 4))
    for generation in range(3):
        trail.create(generation, "entering")[slice(None)] = torch.full((2, 3, 4), float(generation))
        trail.advanced(generation)
    assert trail.reached == 2
    with open(tmp_path / "00001.entering.f32", "r+b") as file:
        file.write(b"\1")
    assert trail.reached == 0
    kept = walked(pico("llama"), tmp_path)
    with open(kept.folder / "curvature-00001.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    with pytest.raises(ResourceError, match="curvature-00001"):
        kept.load(1)


def test_last_linears_of_experts_share_what_the_mixture_puts_out(pico: Callable[..., Path], tmp_path: Path) -> None:
    model = pico("mixtral")
    skeleton = Skeleton(Checkpoint(model))
    found = walked(model, tmp_path).load(0)
    mixture = "model.layers.0.mlp"
    expected = gradients(model, WINDOWS, [mixture], lambda row: row)[mixture].flatten(0, 1)
    lengths = expected.norm(dim=1)
    clipped = expected * (2 * lengths[lengths > 1e-12].median() / lengths.clamp(min=1e-30)).clamp(max=1)[:, None]
    lasts: list[Curvature] = []
    for name, own in found.items():
        if ".experts." not in name:
            assert own.metric is not None
        elif name.endswith("w2"):
            lasts.append(own)
        else:
            assert own.metric is None
            assert own.trace > 0
    assert len(lasts) == skeleton.config.num_local_experts
    for own in lasts:
        assert own.metric is not None
        torch.testing.assert_close(own.metric, clipped.T @ clipped / len(clipped), rtol=1e-3, atol=1e-8)
        assert own.trace == pytest.approx(float(clipped.square().sum(1).mean()), rel=0.5)  # of the tokens that come by


def test_what_is_lost_without_an_expert(pico: Callable[..., Path], tmp_path: Path) -> None:
    model = pico("mixtral", dtype=torch.float32)
    skeleton, found = Skeleton(Checkpoint(model)), dict[int, dict[int, float]]()

    def take(back: BlockBack) -> None:
        found[back.index] = back.lost

    reverse_walk(skeleton, WINDOWS, tmp_path, take, lambda step: None)
    hidden = skeleton.embed(WINDOWS)
    for index in range(skeleton.blocks):
        name = f"model.layers.{index}.mlp"
        gradient = gradients(model, WINDOWS, [name], lambda row: row)[name].flatten(0, 1).double()
        layer = skeleton.block(index)
        experts, entered = experts_of(skeleton, layer), list[tuple[Tensor, ...]]()
        assert experts is not None
        experts.register_forward_pre_hook(lambda module, args, entered=entered: entered.append(args))
        hidden = skeleton.run(skeleton.runner(index, layer), hidden.bfloat16().float())
        [(x, places, weights)] = entered
        assert set(found[index]) == set(places.unique().tolist())
        for number, expert in enumerate(experts):
            tokens, slots = torch.where(places == number)
            adds = expert(x[tokens], weights[tokens, slots]).double()
            expected = (gradient[tokens] * adds).sum(1).square().sum() / WINDOWS.numel() / 2
            assert found[index].get(number, 0.0) == pytest.approx(float(expected), rel=2e-2)


def test_what_rounding_costs_is_foretold(pico: Callable[..., Path], tmp_path: Path) -> None:
    """Of each linear on its own: in the right order, and about as much as it is."""
    model = pico("llama")
    windows = torch.randint(0, 128, (24, 64), generator=torch.Generator().manual_seed(2))
    skeleton = Skeleton(Checkpoint(model))
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False)
    exact = {name: whole.get_submodule(name).weight.clone() for name in {**skeleton.linears(0), **skeleton.linears(1)}}
    rounded = {
        name: weight + 0.02 * weight.abs().amax(1, keepdim=True) * noise(weight) for name, weight in exact.items()
    }

    def changes(name: str, statistics: Statistics) -> list[Tensor]:
        assert statistics.tokens == windows.numel()
        return [(rounded[name] - exact[name]).T]

    found: dict[str, list[float]] = {}

    def take(back: curvature.BlockBack) -> None:
        found.update(foretold(skeleton, back, changes))

    curvature.reverse_walk(skeleton, windows, tmp_path / "scratch", take, lambda step: None, inputs=set(exact))
    assert found.keys() == exact.keys()
    before, measured = whole(input_ids=windows).logits.log_softmax(-1), dict[str, float]()
    for name, weight in rounded.items():
        whole.get_submodule(name).weight.copy_(weight)
        after = whole(input_ids=windows).logits.log_softmax(-1)
        measured[name] = float((before.exp() * (before - after)).sum(-1).mean())
        whole.get_submodule(name).weight.copy_(exact[name])
    logs = torch.tensor([[found[name][0], measured[name]] for name in exact]).log()
    assert float(torch.corrcoef(logs.T)[0, 1]) > 0.9
    off = dict(zip(exact, (logs[:, 0] - logs[:, 1]).abs().tolist(), strict=True))
    # Of values, the longest gradients, which are cut, have much of what errors cost.
    assert max(far for name, far in off.items() if not name.endswith("v_proj")) < 0.75
    assert max(off.values()) < 2.2
    assert sum(found[name][0] for name in exact) == pytest.approx(sum(measured.values()), rel=0.35)


def noise(like: Tensor) -> Tensor:
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(4)) - 0.5


def test_what_coupled_rows_cost_is_foretold(pico: Callable[..., Path], tmp_path: Path) -> None:
    """By a share of what rows on their own would, and solved with tokens as a run counts them."""
    model = pico("llama")
    skeleton = Skeleton(Checkpoint(model))
    names = {"model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"}
    change = {name: 0.01 * noise(skeleton.linears(1)[name].weight.T.float()) for name in names}
    met: dict[str, list[Tensor]] = {name: [] for name in names}
    plain, coupled, apart = dict[str, list[float]](), dict[str, list[float]](), dict[str, list[float]]()

    def changes(name: str, statistics: Statistics) -> list[Tensor]:
        met[name].append(statistics.moment)
        return [change[name]]

    def take(back: curvature.BlockBack) -> None:
        plain.update(foretold(skeleton, back, changes))
        coupled.update(foretold(skeleton, back, changes, lambda own: 0.25))
        apart.update(foretold(skeleton, back, changes, lambda own: 0.25, counted=False))

    curvature.reverse_walk(skeleton, WINDOWS, tmp_path / "scratch", take, lambda step: None, metrics=True, inputs=names)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    inputs: dict[str, Tensor] = {}
    for name in names:
        hook = partial(lambda name, module, args: inputs.__setitem__(name, args[0].detach().flatten(0, 1)), name)
        whole.get_submodule(name).register_forward_pre_hook(hook)
    whole(WINDOWS)
    for name, gradient in gradients(model, WINDOWS, list(names), lambda row: row).items():
        assert coupled[name][0] == pytest.approx(plain[name][0] / 4)
        x, lengths = inputs[name], gradient.flatten(0, 1).square().sum(1)
        expected = (x.T @ x + x.T @ (x * (lengths / lengths.mean())[:, None])) / 2
        assert apart[name] == coupled[name]
        for found, moment in zip(met[name], (x.T @ x, expected, x.T @ x), strict=True):
            torch.testing.assert_close(found, moment, rtol=1e-3, atol=1e-3)


def test_what_was_given_and_is_lost_is_found_again(pico: Callable[..., Path], tmp_path: Path) -> None:
    model, kept = pico("llama"), CurvatureFolder(tmp_path / "kept", {"of": "a test"})

    def stop(step: int) -> None:
        if step == 2:  # of four: the last block is behind
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walk(model, WINDOWS, tmp_path / "scratch", kept, stop)
    (kept.folder / "curvature-00001.safetensors").unlink()
    walk(model, WINDOWS, tmp_path / "scratch", kept, lambda step: None)
    assert kept.complete
    assert kept.load(1).keys() == set(Skeleton(Checkpoint(model)).linears(1))
