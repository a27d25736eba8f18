"""How much the model loses by an error of any linear's outputs, by one walk back over all blocks.

With `g` the gradient of `u · logits` at what a linear puts out for a token, and u a draw of `√p ∘ ξ − p (√p · ξ)`, ξ
standard normal and p the probabilities that the model answers with, `E[u uᵀ] = diag(p) − p pᵀ` is the Hessian of
KL(original ‖ changed). An error Δ of a linear's weight so costs, for each token and up to second order,

    KL ≈ ½ E[(gᵀ Δ x)²] ≈ ½ tr(M Δ H Δᵀ),    M = E[g gᵀ],  H = E[x xᵀ]

(a Fisher matrix in two factors, as in YAQA, arXiv:2505.22988). One backward pass has a draw for every token: what
enters each block is kept on the way to the end, then blocks are run once more, from the last to the first, and the
gradient is handed from one to the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..runtime import processes
from ..runtime.model.experts import Expert
from ..runtime.model.skeleton import HEAD_ROWS, Skeleton
from .chains import Chains, HalfTrail, Spill, Trail, delete
from .divergences import LOGITS
from .drive import carry
from .routing import experts_of, routed_share
from .statistics import Statistics

Key = TypeVar("Key")
Sum = TypeVar("Sum", float, Tensor)
_GRAPH_TOKENS = 1024  # that are run with gradients at a time, where windows are no longer
_TOKENS, _EACH = 16_384, 8  # that are run back, and for each number of a hidden state, at most
_ENOUGH = 2  # tokens for each row of a metric, at least
# Rows of a metric, in hidden sizes, at most: of gate and up it would be the most by far, and is worth a hundredth of
# the KL that is left (SmolLM2-135M in 3 bits: .1977 with it, .1999 without).
WIDEST = 2
_CLIP = 2.0  # times the median length of gradients
_MIXTURE = "experts"  # in the place of a linear's name: what all experts together put out


@dataclass(frozen=True)
class Curvature:
    """What errors of a linear's outputs cost.

    Attributes:
        trace: `E[‖g‖²]` over tokens, gradients longer than twice their median made as short as that; of an expert, over
            tokens that come by, each as often as its squared coefficient says. First tokens, which attention leans on
            whatever they say, would be half of it, and more of values'.
        metric: `E[g gᵀ]` of the same gradients, float32 `[rows, rows]`; None where it was not asked for, or rows are
            many.
        tokens: that the metric is of.
        places: `E[‖g‖²]` of the gradients as they are, for each place in a window, float32 `[tokens of a window]`; None
            for experts.
    """

    trace: float
    metric: Tensor | None
    tokens: int
    places: Tensor | None = None


def reverse_walk(
    skeleton: Skeleton,
    windows: Tensor,
    scratch: Path,
    take: Callable[[BlockBack], None],
    done: Callable[[int], None],
    *,
    taken: Callable[[int], bool] = lambda index: False,
    metrics: bool = False,
    inputs: Container[str] = (),
) -> None:
    """Take gradients of KL back over every block; goes on where it was interrupted.

    Args:
        windows: token ids `[samples, tokens]`, of which the first are run: 16,384 tokens, or 8 for each number of a
            hidden state, if there are as many.
        scratch: a folder to be made and deleted again, for what enters every block.
        take: gets each block once gradients went through it, the last block first.
        done: told how many steps are behind, of two for each block.
        taken: whether what an interrupted walk gave of a block is still there.
        metrics: whether these are wanted beside traces; inputs: disk names of linears whose inputs are.
    """
    windows = windows[: walked_samples(skeleton, *windows.shape)]
    most = _most(skeleton, windows.numel()) if metrics else 0
    trail = _forth(skeleton, windows, scratch / "forth", done)
    blocks = skeleton.blocks
    chains = Chains(scratch / "back", ("gradient",), trail.shape, _GRAPH_TOKENS)
    step = chains.reached
    if step < 0 or not all(taken(index) for index in range(blocks - step, blocks)):
        answer, leaving = skeleton.answers(graph=True), trail.read(blocks, "entering")
        carry(chains, "gradient", 0, partial(_drawn, skeleton, answer, leaving))
        chains.advanced(step := 0)
    for number in range(step, blocks):
        index = blocks - 1 - number
        skeleton.checkpoint.expect(index, index - 1)
        back = BlockBack(skeleton, index, most, windows.numel(), inputs)
        carry(
            chains,
            "gradient",
            number + 1,
            partial(_pulled, back, trail.read(index, "entering"), chains.read(number, "gradient")),
        )
        back.across()
        take(back)
        chains.advanced(number + 1)
        skeleton.checkpoint.release()
        done(blocks + number)
    delete(scratch)


def walked_samples(skeleton: Skeleton, samples: int, tokens: int) -> int:
    """How many of some windows are run."""
    return min(samples, -(-max(_TOKENS, _EACH * skeleton.config.hidden_size) // tokens))


def fewest(rows: int) -> int:
    """How many tokens a metric of so many rows takes."""
    return _ENOUGH * rows


def _most(skeleton: Skeleton, tokens: int) -> int:
    """Rows of a linear up to which its metric is found."""
    return min(tokens // _ENOUGH, WIDEST * skeleton.config.hidden_size)


def _forth(skeleton: Skeleton, windows: Tensor, folder: Path, done: Callable[[int], None]) -> Trail:
    """What enters each block, and leaves the last; in bfloat16, of which each block starts, so that it is run alike on
    the way back."""
    kind = HalfTrail if skeleton.wide is None else Trail  # whose rows have token ids
    trail = kind(folder, ("entering",), (*windows.shape, skeleton.width), _GRAPH_TOKENS)
    if (start := trail.reached) < 0:
        carry(trail, "entering", 0, partial(_embedded, skeleton, windows))
        trail.advanced(start := 0)
    for index in range(start, skeleton.blocks):
        skeleton.checkpoint.expect(index, index + 1)
        runner = skeleton.runner(index, skeleton.block(index))
        carry(trail, "entering", index + 1, partial(_through, skeleton, runner, trail.read(index, "entering")))
        trail.advanced(index + 1)
        skeleton.checkpoint.release()
        done(index)
    return trail


def _embedded(skeleton: Skeleton, windows: Tensor, rows: slice) -> Tensor:
    return skeleton.embed(windows[rows])


def _through(skeleton: Skeleton, runner: Any, entering: Spill, rows: slice) -> Tensor:
    return skeleton.run(runner, entering[rows].float())


def _pulled(back: BlockBack, entering: Spill, gradient: Spill, rows: slice) -> Tensor:
    return back.pull(entering[rows], gradient[rows])


def _drawn(skeleton: Skeleton, answer: Callable[[Tensor], Tensor], leaving: Spill, rows: slice) -> Tensor:
    """Gradients of `u · logits` at what left the last block, `[samples, tokens, width]`, for a draw of u; that of a
    window depends on its number alone."""
    found = []
    piece = max(32, LOGITS // int(skeleton.config.vocab_size))
    for row in range(rows.start, min(rows.stop, leaving.shape[0])):
        generator = torch.Generator().manual_seed(row)
        for part in leaving[row : row + 1][0].float().to(skeleton.device).split(piece):
            hidden = part.detach().requires_grad_(True)
            logits = answer(hidden)
            roots = logits.detach().log_softmax(-1).mul_(0.5).exp_()  # in place, for logits are many
            drawn = torch.randn(roots.shape, generator=generator).to(roots.device).mul_(roots)
            drawn -= roots.square_().mul_(drawn.sum(-1, keepdim=True))
            found.append(torch.autograd.grad(logits, hidden, drawn)[0])
    return torch.cat(found).view(-1, *leaving.shape[1:])


def counts(places: Sequence[Tensor]) -> Tensor | None:
    """What tokens at each place in a window count for in statistics, one in the mean; None where nothing is known.

    Half of it is what errors there cost the model, for linears that read the same input together: attention leans on
    first tokens, whose values all others get, though they are few.
    """
    if not places:
        return None
    total = torch.stack(tuple(places)).sum(0)
    mean = float(total.mean())
    return (1 + total / mean) / 2 if 0 < mean < float("inf") else None


class BlockBack:
    """A block through which gradients are pulled back, and what is summed up of those at its linears' outputs.

    Of experts, the metric of what they put out together is found, which is that of their last linears.

    Attributes:
        index: of the block.
        tokens: of the whole walk.
        lost: number of a routed expert → `½ E[(gᵀ f)²]` over all tokens, f being what it adds to the mixture: KL per
            token that it costs to do without it, up to second order.
        met: name in memory of each linear that ran → second moment of its inputs, and the same with each token as often
            as the squared length of its gradient says; without experts' coefficients.
    """

    def __init__(self, skeleton: Skeleton, index: int, most: int, tokens: int, inputs: Container[str] = ()) -> None:
        """
        Args:
            most: rows of a linear up to which its metric is found.
            inputs: disk names of linears that are wanted in `met`.
        """
        self._skeleton, self.index, self.tokens = skeleton, index, tokens
        self.met: dict[str, tuple[Statistics, Statistics]] = {}
        self.lost: dict[int, float] = {}
        self._inputs: dict[str, Tensor] = {}
        layer = skeleton.block(index).requires_grad_(False)
        self._runner = skeleton.runner(index, layer)
        self._names = {
            name: skeleton.disk_name(index, name)
            for stage in skeleton.stages(index)
            for group in stage
            for name in group.linears
        }
        self._met = {name for name, disk in self._names.items() if disk in inputs}
        self._last = {name for name in self._names if self._number(name) is not None and name.endswith("down_proj")}
        measured = {name: name for name in self._names if self._number(name) is None}
        if self._last:
            measured[_MIXTURE] = min(self._last)
        rows = {place: layer.get_submodule(name).out_features for place, name in measured.items()}
        self._sums = {
            name: Statistics.empty(count, ("moment",), skeleton.device) for name, count in rows.items() if count <= most
        }
        mixture = experts_of(skeleton, layer)
        self._lengths, self._weights = dict.fromkeys(self._names, 0.0), dict.fromkeys(self._names, 0.0)
        self._places: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._coefficients: dict[str, Tensor] = {}
        for name in self._names:
            layer.get_submodule(name).register_forward_hook(self._remember(name))
        if mixture is not None:
            mixture.register_forward_hook(self._remember(_MIXTURE))
        for name, module in layer.named_modules():
            if isinstance(module, Expert):
                module.register_forward_pre_hook(self._weigh(name))

    def _number(self, name: str) -> int | None:
        return self._skeleton.family.experts.number(name)

    def _remember(self, name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self._outputs[name] = output
            if name in self._met:
                self._inputs[name] = args[0].detach()

        return hook

    def _weigh(self, name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[Tensor, Tensor]) -> None:
            self._coefficients[name] = args[1].detach()

        return hook

    def pull(self, entering: Tensor, gradient: Tensor) -> Tensor:
        """Some samples `[samples, tokens, width]`: the gradient at what leaves the block → at what enters it."""
        skeleton = self._skeleton
        hidden = entering.float().to(skeleton.device).requires_grad_(True)
        self._outputs, self._coefficients = {}, {}
        with torch.enable_grad():
            output = skeleton.forward(self._runner, hidden)
        names = [name for name, found in self._outputs.items() if found.requires_grad]
        places = [self._outputs[name] for name in names]
        pulled, *found = torch.autograd.grad(output, [hidden, *places], gradient.to(skeleton.device), allow_unused=True)
        for name, own in zip(names, found, strict=True):
            if own is not None and name in self._last:
                self._lose(name, (own * self._outputs[name].detach()).sum(-1))
            if own is not None:
                self._add(name, own.reshape(-1, own.shape[-1]), entering.shape[1])
        return pulled.detach()

    def _add(self, name: str, gradients: Tensor, length: int) -> None:
        """Take in gradients `[tokens, rows]` of windows of so many tokens."""
        if not len(gradients):
            return
        lengths = gradients.float().norm(dim=1)
        some = lengths[lengths > 0]
        longest = _CLIP * some.median() if len(some) else lengths.new_zeros(())
        if name in self._lengths:
            met = self._coefficients.get(name.rpartition(".")[0])
            if name in self._met:
                self._meet(name, self._inputs[name], lengths)
            self._lengths[name] += float(lengths.clamp(max=longest).square().sum())
            self._weights[name] += len(lengths) if met is None else float(met.float().square().sum())
            if self._number(name) is None:
                more = lengths.double().square().view(-1, length).sum(0).cpu()
                self._places[name] = self._places.get(name, 0.0) + more
        if name in self._sums:
            shares = (longest / lengths.clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1)
            self._sums[name].add((gradients.float() * shares[:, None]).to(self._skeleton.dtype))

    def _lose(self, name: str, products: Tensor) -> None:
        """Take in gradients times outputs `[tokens]` of an expert's last linear: its coefficients are in the former."""
        number = self._number(name)
        assert number is not None
        more = float(products.double().square().sum()) / 2 / self.tokens
        self.lost[number] = self.lost.get(number, 0.0) + more

    def _meet(self, name: str, entering: Tensor, lengths: Tensor) -> None:
        rows = entering.reshape(len(lengths), -1).to(self._skeleton.dtype)
        if name not in self.met:
            self.met[name] = _pair(rows.shape[1], rows.device)
        moment, weighed = self.met[name]
        moment.add(rows)
        weighed.add(rows.float() * lengths[:, None])

    def across(self) -> None:
        """Take in what other processes found of their tokens."""
        if processes.size() == 1:
            return
        everyone = processes.gathered((self._lengths, self._weights, self.lost, self._places, set(self.met)))
        lengths, weights, lost, places, met = zip(*everyone, strict=True)
        self._lengths, self._weights, self.lost = _added(lengths), _added(weights), _added(lost)
        self._places = _added(places)
        for sums in self._sums.values():
            sums.across()
        layer = self._runner.layers[0]
        for name in sorted(set().union(*met)):
            width = layer.get_submodule(name).in_features
            if name not in self.met:
                self.met[name] = _pair(width, self._skeleton.device)
            for statistics in self.met[name]:
                statistics.across()

    def found(self) -> dict[str, Curvature]:
        """Disk name → curvature."""
        metrics = {name: sums.moment / max(sums.tokens, 1) for name, sums in self._sums.items()}
        result = {}
        for name, disk in self._names.items():
            source = _MIXTURE if name in self._last else name
            trace = self._lengths[name] / max(self._weights[name], torch.finfo(torch.float32).tiny)
            tokens = self._sums[source].tokens if source in metrics else 0
            places = self._places.get(name)
            if places is not None:
                places = (places / (self.tokens / len(places))).float()
            result[disk] = Curvature(trace, metrics.get(source), tokens, places)
        return result


def _pair(columns: int, device: torch.device) -> tuple[Statistics, Statistics]:
    """Two second moments of nothing yet."""
    return Statistics.empty(columns, ("moment",), device), Statistics.empty(columns, ("moment",), device)


def _added(parts: Sequence[Mapping[Key, Sum]]) -> dict[Key, Sum]:
    """Sums by name."""
    found: dict[Key, Sum] = {}
    for part in parts:
        for name, value in part.items():
            found[name] = found[name] + value if name in found else value
    return found


def curvature_cost(
    skeleton: Skeleton, samples: int, tokens: int, *, metrics: bool
) -> tuple[float, float, float, float]:
    """Bytes of memory, of disk, and of what is left on disk until the run is done, and floating-point operations, of
    `reverse_walk`.

    Args:
        samples, tokens: the windows.
        metrics: as of `reverse_walk`.
    """
    seen = walked_samples(skeleton, samples, tokens) * tokens
    graph, blocks, found, reached = max(_GRAPH_TOKENS, tokens), list[float](), list[float](), 0.0
    most = _most(skeleton, seen) if metrics else 0
    for index in range(skeleton.blocks):
        inside = skeleton.linears(index)
        own = {name: linear for name, linear in inside.items() if skeleton.family.expert(name) is None}
        rows = [linear.out_features for linear in own.values()]
        rows += [skeleton.config.hidden_size] * (len(own) < len(inside))
        found.append(4.0 * sum(count**2 for count in rows if count <= most))
        blocks.append(float(sum(linear.weight.numel() for linear in inside.values())))
        share = routed_share(skeleton, inside)
        reached += sum(linear.weight.numel() * (1.0 if name in own else share) for name, linear in inside.items())
    every = (linear for index in range(skeleton.blocks) for linear in skeleton.linears(index).values())
    widest = max((max(linear.weight.shape) for linear in every), default=0)
    vocabulary, hidden = skeleton.config.vocab_size, skeleton.config.hidden_size
    # What a block keeps to be run back: inputs of linears, norms and products, and the gradients of their outputs.
    running = max(blocks) * skeleton.dtype.itemsize * skeleton.copies + graph * 4.0 * (8 * widest + 24 * skeleton.width)
    drawing = 4 * 4.0 * max(LOGITS, 32 * vocabulary) + 4.0 * hidden * min(vocabulary, HEAD_ROWS)
    carried = seen * skeleton.width * ((skeleton.blocks + 1) * (2 if skeleton.wide is None else 4) + 2 * 4)
    # Of a weight, six in products (forth, and forward and back again); norms and attention take about a third of that.
    flops = seen * (8.0 * reached + sum(found) / 4 + 4.0 * vocabulary * hidden)
    return max(running + max(found), drawing), carried + sum(found), sum(found), flops
