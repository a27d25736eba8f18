"""The down projections of a block's experts, fitted again once something else of the experts was taken away.

With h the activations of an expert's neurons, g the router's coefficient and D its down projection, a block puts out
`r + Σ_e g_e D_e h_e`, which is linear in all D together. They are fitted to what the original block puts out, on the
inputs that the changed model gives it: ridge regression toward the D there is, by conjugate gradients. The moments
`Σ g² h hᵀ` of single experts are the preconditioner, and rows of D are independent systems that share their products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime import processes
from ..runtime.errors import ModelError
from ..runtime.model.skeleton import Skeleton
from .chains import Chains, Spill
from .drive import BlockRun, drive
from .routing import experts_of
from .statistics import exact_products

ITERATIONS = 10  # of conjugate gradients: the error is then within a hundredth of the least there is


@dataclass
class Member:
    """A gated MLP of a block: a routed expert by its number, or the shared ones (None).

    Attributes:
        name: in the block, in memory.
    """

    name: str
    module: Any
    number: int | None


def members_of(skeleton: Skeleton, layer: nn.Module) -> list[Member]:
    """The experts of a block whose down projections can be fitted together."""
    where, beside = skeleton.family.experts.where, skeleton.family.experts.shared
    routed = [Member(f"{where}.{n}", expert, n) for n, expert in enumerate(experts_of(skeleton, layer) or ())]
    shared = dict(layer.named_modules()).get(beside) if beside else None
    return routed if shared is None or not routed else [*routed, Member(beside, shared, None)]


class Routed:
    """What entered a block's experts, on disk, and what they were to put out.

    Attributes:
        target: `[samples, tokens, hidden_size]`.
        device: where what is read is worked on.
        scaled: whether coefficients multiply what enters an expert, not what leaves it.
    """

    def __init__(
        self,
        chains: Chains,
        dtype: torch.dtype,
        top_k: int,
        device: torch.device | str = "cpu",
        *,
        scaled: bool = False,
    ) -> None:
        self.chains, self.dtype, self.device, self.scaled = chains, dtype, device, scaled
        hidden = chains.shape[2]
        self.hidden, self.target = chains.scratch(hidden, self.dtype), chains.scratch(hidden, torch.float32)
        self.places, self.weights = chains.scratch(top_k, torch.int32), chains.scratch(top_k, torch.float32)

    def store(self, rows: slice, hidden: Tensor, places: Tensor, weights: Tensor) -> None:
        """Some samples; each `[tokens of all samples, ...]`."""
        for spill, tensor in ((self.hidden, hidden), (self.places, places), (self.weights, weights)):
            part = spill[rows]
            part.copy_(tensor.reshape(part.shape))

    @property
    def fitted(self) -> list[slice]:
        """This process's micro-batches of samples to fit on; the others are `held_out`, to see how far a fit holds."""
        own, fitted = self.chains.own, self.chains.shape[0] - self._aside
        return _slices(own.start, min(own.stop, fitted), self.chains.batch)

    @property
    def held_out(self) -> list[slice]:
        """Micro-batches of samples that are not fitted; none where there is a single sample."""
        own, fitted = self.chains.own, self.chains.shape[0] - self._aside
        return _slices(max(own.start, fitted), own.stop, self.chains.batch)

    @property
    def _aside(self) -> int:
        samples = self.chains.shape[0]
        return -(-samples // 8) if samples > 1 else 0

    def activations(self, rows: slice, members: Sequence[Member]) -> Iterator[tuple[Member, Tensor, Tensor]]:
        """For each member: the tokens of some samples that it sees, and `g h`, float32 `[tokens, width]`."""
        x, places, weights = (
            part[rows].flatten(0, 1).to(self.device) for part in (self.hidden, self.places, self.weights)
        )
        everyone = torch.arange(len(x), device=self.device)
        for member in members:
            tokens, coefficients = everyone, None
            if member.number is not None:
                tokens, slots = torch.where(places == member.number)
                coefficients = weights[tokens, slots][:, None]
            entering = x[tokens]
            if self.scaled and coefficients is not None:
                entering, coefficients = (entering * coefficients).to(entering.dtype), None
            h = neurons(member.module, entering).float()
            yield member, tokens, h if coefficients is None else h * coefficients


def _slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


_ACTIVATIONS = ("activation", "act_fn", "activation_fn")  # attributes, ours and those of transformers


def neurons(module: Any, x: Tensor) -> Tensor:
    """What enters the down projection of a gated MLP."""
    activation = next(getattr(module, name) for name in _ACTIVATIONS if hasattr(module, name))
    gate, up = (nn.functional.linear(x, part.weight.to(x.dtype)) for part in (module.gate_proj, module.up_proj))
    hidden: Tensor = activation(gate) * up
    return hidden


def put_out(found: Sequence[tuple[Member, Tensor, Tensor]], weights: Sequence[Tensor], count: int) -> Tensor:
    """`Σ g D h` of all members, `[count, hidden_size]`, for down projections given."""
    result = torch.zeros(count, weights[0].shape[0], device=weights[0].device)
    for (_, tokens, h), weight in zip(found, weights, strict=True):
        result.index_add_(0, tokens, h @ weight.T)
    return result


@dataclass(frozen=True)
class Normal:
    """The normal equations of a fit: for each member `Σ g² h hᵀ` `[width, width]` and `Σ residual (g h)ᵀ`
    `[hidden_size, width]`; what the members put out now is taken off the target."""

    moments: list[Tensor]
    right: list[Tensor]

    @property
    def mean(self) -> float:
        """Of the diagonals of all moments, as far as anything came by."""
        diagonals = torch.cat([moment.diagonal() for moment in self.moments])
        return float(diagonals[diagonals > 0].mean()) if bool((diagonals > 0).any()) else 1.0


def normal_equations(routed: Routed, members: Sequence[Member]) -> Normal:
    """Those of the samples that are fitted."""
    downs = [member.module.down_proj.weight.float() for member in members]
    moments = [torch.zeros(d.shape[1], d.shape[1], device=d.device) for d in downs]
    normal = Normal(moments, [torch.zeros_like(d) for d in downs])
    for rows in routed.fitted:
        found = list(routed.activations(rows, members))
        target = routed.target[rows].flatten(0, 1).to(routed.device)
        residual = target - put_out(found, downs, len(target))
        with exact_products(routed.dtype):
            for number, (_, tokens, h) in enumerate(found):
                normal.moments[number].addmm_(h.T, h)
                normal.right[number].addmm_(residual[tokens].T, h)
    for sums in (*normal.moments, *normal.right):
        processes.summed(sums)
    return normal


def fit(routed: Routed, members: Sequence[Member], damping: float) -> None:
    """Change the members' down projections, as far as that serves an eighth of the samples, too, which are not fitted.

    Args:
        damping: share of the mean diagonal of all moments that is added.
    """
    normal = normal_equations(routed, members)
    ridge = damping * normal.mean
    inverses = [damped_inverse(moment, ridge).float() for moment in normal.moments]
    left = normal.right
    steep = [part @ inverse for part, inverse in zip(left, inverses, strict=True)]
    change, direction = [torch.zeros_like(part) for part in left], steep
    size = _dot(left, steep)
    for _ in range(ITERATIONS):
        applied = [ridge * part if processes.leads() else torch.zeros_like(part) for part in direction]
        for rows in routed.fitted:
            found = list(routed.activations(rows, members))
            with exact_products(routed.dtype):
                moved = put_out(found, direction, routed.hidden[rows][..., 0].numel())
                for (_, tokens, h), part in zip(found, applied, strict=True):
                    part.addmm_(moved[tokens].T, h)
        for part in applied:
            processes.summed(part)
        step = (size / _dot(direction, applied).clamp(min=1e-30))[:, None]
        for number in range(len(members)):
            change[number] += step * direction[number]
            left[number] -= step * applied[number]
        steep = [part @ inverse for part, inverse in zip(left, inverses, strict=True)]
        size, before = _dot(left, steep), size
        grown = (size / before.clamp(min=1e-30))[:, None]
        direction = [new + grown * old for new, old in zip(steep, direction, strict=True)]
    share = _held(routed, members, change)
    for member, part in zip(members, change, strict=True):
        weight = member.module.down_proj.weight
        new = torch.add(weight.float(), part, alpha=share).to(weight.dtype)
        member.module.down_proj.weight = nn.Parameter(new, requires_grad=False)


def _held(routed: Routed, members: Sequence[Member], change: Sequence[Tensor]) -> float:
    """How much of a change serves tokens that were not fitted best, from none to all of it."""
    downs = [member.module.down_proj.weight.float() for member in members]
    along = size = 0.0
    for rows in routed.held_out:
        found = list(routed.activations(rows, members))
        target = routed.target[rows].flatten(0, 1).to(routed.device)
        moved = put_out(found, change, len(target))
        along += float(((target - put_out(found, downs, len(target))) * moved).sum(dtype=torch.float64))
        size += float(moved.square().sum(dtype=torch.float64))
    along, size = processes.summed(torch.tensor([along, size], dtype=torch.float64)).tolist()
    return min(1.0, max(0.0, along / size)) if size > 0 else 0.0


def damped_inverse(moment: Tensor, ridge: float) -> Tensor:
    """`(moment + ridge I)⁻¹`, float64; the ridge is made ten times as large until that can be computed.

    Raises:
        ModelError: the moment is not finite.
    """
    if not bool(torch.isfinite(moment).all()):
        raise ModelError("what experts put out is not finite on this text; is the model sound?")
    while True:
        damped = moment.double()
        damped.diagonal().add_(ridge)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            return torch.cholesky_inverse(factor)
        ridge *= 10


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Of each row of all members together, `[hidden_size]`."""
    return torch.stack([(x * y).sum(1) for x, y in zip(a, b, strict=True)]).sum(0)


Change = Callable[[int, Any, Routed], None]


@torch.no_grad()
def refit_blocks(
    original: Skeleton,
    changed: Skeleton,
    windows: Tensor,
    scratch: Path,
    change: Change,
    done: Callable[[int, float | None], None],
) -> None:
    """Walk over a model and its changed form side by side, and let each block of experts make up for what is lost.

    Args:
        windows: token ids `[samples, tokens]`.
        scratch: a folder for activations; the walk goes on where an earlier one was interrupted. Deleted at the end.
        change: given a block's index, the changed block and what its experts saw, changes the block's experts in place,
            and keeps what is new.
        done: told of each block that is behind, and the share of its output that is in error if it has experts.
    """
    for index, blocks, chains in drive({"reference": original, "changed": changed}, windows, scratch):
        block = blocks["changed"]
        experts, follow = experts_of(changed, block.layer), blocks["reference"].carry()
        if experts is not None:
            members = members_of(changed, block.layer)
            scaled = changed.family.experts.scaled
            routed = Routed(chains, changed.dtype, changed.experts_per_token, changed.device, scaled=scaled)
            _watch(block, routed, members, follow)
            try:
                change(index, block.layer, routed)
            except ModelError as error:
                raise ModelError(f"block {index}: {error}") from None
        target, lost, whole = block.carry(), 0.0, 0.0
        for rows in chains.batches():
            lost += float((target[rows] - follow[rows]).square().sum(dtype=torch.float64))
            whole += float(follow[rows].square().sum(dtype=torch.float64))
        lost, whole = processes.summed(torch.tensor([lost, whole], dtype=torch.float64)).tolist()
        done(index, lost / max(whole, 1e-30) if experts is not None else None)


def _watch(block: BlockRun, routed: Routed, members: Sequence[Member], wanted: Spill) -> None:
    """Fill `routed` with what enters the experts, and with what they were to put out."""
    experts = experts_of(block.skeleton, block.layer)
    assert experts is not None
    entered: list[Any] = []
    handle = experts.register_forward_pre_hook(lambda module, args: entered.append(args))
    downs = [member.module.down_proj.weight.float() for member in members]
    share = block.skeleton.residual_scale  # of what is put out that is added
    for rows in block.chains.batches():
        output = block.run(rows)
        hidden, places, weights = entered.pop()
        routed.store(rows, hidden.to(routed.dtype), places, weights)
        missing = wanted[rows].to(output.device) - output
        found = list(routed.activations(rows, members))
        routed.target[rows] = missing / share + put_out(found, downs, missing[..., 0].numel()).view(missing.shape)
    handle.remove()
