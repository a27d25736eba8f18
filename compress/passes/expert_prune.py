"""Drop whole experts, and their rows of the router; the checkpoint is as if it had been trained with fewer.

- `reap`: the mean over an expert's tokens of `g ‖f‖`, g being the coefficient that really multiplies its output f
  (router-weighted expert activation pruning, arXiv:2510.13999).
- `reconstruction`: those that together come nearest to what all of them put out, on a sample of tokens: of all subsets
  where these are few, else found by leaving out one after the other (NAEE, arXiv:2402.14800).
- `frequency`: how many tokens; `router_weight`: `Σ g`; `ean`: `Σ ‖f‖`; `random`: for comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor

from ...calibrate.routing import Routing, Sample, observe_routing
from ...calibrate.walk import StageWork
from ...runtime.errors import RecipeError
from ...runtime.pruned import PrunedCheckpoint
from ...runtime.skeleton import Skeleton
from ..events import Event, ExpertsKept, Surveyed
from ..solvers.subsets import best_subset, few_enough, subset_losses
from .base import Need, Pass

Criterion = Literal["reap", "frequency", "router_weight", "ean", "reconstruction", "random"]

Choice = tuple[tuple[int, ...], list[float]]  # what stays of a block, and every expert's score


class ExpertPrune(Pass):
    """Drop the experts of each block that matter least."""

    step: ClassVar[str] = "expert_prune"
    reshapes: ClassVar[bool] = True
    kind: Literal["expert_prune"]
    criterion: Criterion = Field("reap", description="which experts matter; random: for comparison")
    ratio: float | None = Field(None, ge=0, lt=1, description="of the experts of each block that go; this, or keep")
    keep: int | None = Field(None, ge=1, description="how many experts of each block stay")
    min_tokens: int = Field(
        32, ge=0, description="experts that fewer calibration tokens were routed to are the first to go"
    )
    protect_super_experts: bool = Field(
        True,
        description="keep experts whose largest activation is beyond both the 99.5th percentile and a tenth of the "
        "model's largest, in the first three quarters of the blocks",
    )
    seed: int = Field(0, ge=0, description="of random")
    kept: dict[int, tuple[int, ...]] | None = Field(
        None, description="block → numbers of the experts that stay; default: by the survey, which fills this in"
    )
    _blocks: dict[int, int] = PrivateAttr(default_factory=dict)
    _groups: int = PrivateAttr(default=1)
    _nominal: bool = PrivateAttr(default=False)  # whether `kept` is there to be replaced

    @model_validator(mode="after")
    def _one_of_two(self) -> ExpertPrune:
        if (self.ratio is None) == (self.keep is None):
            raise ValueError("give either ratio or keep")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"routing"}) if self.criterion != "random" and self._nominal else frozenset()

    def wants(self, name: str) -> bool:
        return False  # no single linear: the survey, and then the view of the checkpoint

    @property
    def to_survey(self) -> bool:
        return self._nominal

    def prepare(self, skeleton: Skeleton) -> ExpertPrune:
        """With the first experts of each block, in place of which the survey puts those that matter.

        Raises:
            RecipeError: the model has no experts, or so many cannot go.
        """
        blocks = expert_counts(skeleton)
        config = skeleton.config
        if not blocks:
            raise RecipeError(f"{self.step}: this model has no experts")
        [count] = set(blocks.values())
        groups = getattr(config, "n_group", None) or 1
        keep = self.keep if self.keep is not None else count - round(count * (self.ratio or 0))
        _check(self.step, keep, count, config.num_experts_per_tok, groups, getattr(config, "topk_group", None) or 1)
        if self.criterion == "reconstruction" and groups > 1 and not few_enough(count, keep, groups):
            raise RecipeError(f"{self.step}: reconstruction cannot search {groups} groups of so many; use reap")
        result = self.model_copy()
        result._blocks, result._groups = blocks, groups
        if self.kept is None:
            result = result._with_kept({index: _first(count, keep, groups) for index in blocks}, nominal=True)
        elif set(self.kept) != set(blocks) or not all(
            _can_stay(numbers, keep, count, groups) for numbers in self.kept.values()
        ):
            equal = f", as many of each of {groups} groups" if groups > 1 else ""
            raise RecipeError(
                f"{self.step}: kept has to name {keep} rising numbers below {count} for each block{equal}"
            )
        return result

    def _with_kept(self, kept: dict[int, tuple[int, ...]], *, nominal: bool = False) -> ExpertPrune:
        result = self.model_copy(update={"kept": kept})
        result._nominal = nominal
        return result

    def view(self, skeleton: Skeleton) -> Skeleton:
        assert self.kept is not None
        return Skeleton(PrunedCheckpoint(skeleton.checkpoint, self.kept), skeleton.dtype, skeleton.device)

    def survey(
        self, skeleton: Skeleton, windows: Tensor | None, scratch: Path, listener: Callable[[Event], None]
    ) -> ExpertPrune:
        """With the experts that matter in `kept`, each block's told as `ExpertsKept`."""
        if not self._nominal:
            return self
        chosen: dict[int, Choice] = {}
        seen: Mapping[int, Routing] = {}
        if self.criterion == "random":
            generator = torch.Generator().manual_seed(self.seed)
            for index, count in self._blocks.items():
                chosen[index] = self._highest(torch.rand(count, generator=generator, dtype=torch.float64), ())
        else:
            assert windows is not None
            inspect = partial(self._search, skeleton, chosen) if self.criterion == "reconstruction" else None
            done = partial(_tell, listener, skeleton.blocks)
            seen = observe_routing(skeleton, windows, scratch, done, inspect)
            protected = super_experts(seen, skeleton.blocks) if self.protect_super_experts else {}
            for index in seen.keys() - chosen.keys():
                scores, tokens = saliency(seen[index], self.criterion), seen[index].tokens
                scores = torch.where(tokens < self.min_tokens, scores - scores.max() - 1, scores)
                chosen[index] = self._highest(scores, protected.get(index, ()))
        for index in self._blocks:
            tokens = seen[index].tokens if index in seen else torch.empty(0)
            kept, found = chosen[index]
            listener(ExpertsKept(index, self.criterion, list(kept), found, tokens.int().tolist()))
        return self._with_kept({index: chosen[index][0] for index in self._blocks})

    @property
    def _keep(self) -> int:
        assert self.kept is not None
        return len(next(iter(self.kept.values())))

    def _highest(self, scores: Tensor, protected: tuple[int, ...]) -> Choice:
        return highest(scores, self._keep, self._groups, protected), scores.tolist()

    def _search(self, skeleton: Skeleton, chosen: dict[int, Choice], index: int, sample: Sample) -> None:
        """Find a block's best subset on a sample of its tokens."""

        def route(numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
            _, weights, places = skeleton.router(index, numbers)(sample.hidden)
            return weights, places

        every = range(self._blocks[index])
        without = [tuple(n for n in every if n != gone) for gone in every] if self._groups == 1 else []
        losses = subset_losses(route, sample.outputs, without if len(every) > self._keep else [])
        chosen[index] = best_subset(route, sample.outputs, self._keep, self._groups), losses

    @property
    def note(self) -> str:
        return f"{max(self._blocks.values())} → {self._keep} experts in {len(self._blocks)} blocks"

    def apply(self, work: StageWork) -> Iterator[Event]:
        yield from ()


def _tell(listener: Callable[[Event], None], blocks: int, index: int) -> None:
    listener(Surveyed(index, blocks))


def expert_counts(skeleton: Skeleton) -> dict[int, int]:
    """Block → how many routed experts it has, for blocks that have any."""
    found: dict[int, int] = {}
    where = skeleton.architecture.experts
    for index, layer in enumerate(skeleton.model.model.layers):
        names = {name for name, _ in layer.named_modules()}
        if where in names:
            found[index] = len(layer.get_submodule(where))
    return found


def saliency(seen: Routing, criterion: str) -> Tensor:
    """How much each expert matters, `[experts]`."""
    scores: dict[str, Tensor] = {
        "reap": seen.weighted / seen.tokens.clamp(min=1),
        "frequency": seen.tokens,
        "router_weight": seen.weights,
        "ean": seen.norms,
    }
    return scores[criterion]


def super_experts(seen: Mapping[int, Routing], blocks: int) -> dict[int, tuple[int, ...]]:
    """Block → experts whose peak is beyond the 99.5th percentile and a tenth of the model's, in the first three
    quarters of the blocks: few, and the model does not survive without them."""
    if not seen:
        return {}
    peaks = torch.cat([routing.peak for routing in seen.values()])
    limit = max(float(torch.quantile(peaks, 0.995)), 0.1 * float(peaks.max()))
    early = {index: routing for index, routing in seen.items() if index < 0.75 * blocks}
    return {index: tuple(torch.where(routing.peak > limit)[0].tolist()) for index, routing in early.items()}


def highest(scores: Tensor, keep: int, groups: int, protected: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The numbers of the highest scores, the same number in each group, rising; protected ones among them first."""
    raised = scores.clone()
    if protected:
        raised[list(protected)] += float(scores.max() - scores.min()) + 1
    size = len(scores) // groups
    chosen = raised.view(groups, size).topk(keep // groups, dim=1).indices + size * torch.arange(groups)[:, None]
    return tuple(sorted(chosen.flatten().tolist()))


def _first(count: int, keep: int, groups: int) -> tuple[int, ...]:
    return highest(-torch.arange(count, dtype=torch.float64), keep, groups)


def _can_stay(numbers: Sequence[int], keep: int, count: int, groups: int) -> bool:
    """Whether these are experts of a block, rising, and as many of each group."""
    size = count // groups
    own = [sum(number // size == group for number in numbers) for group in range(groups)]
    return sorted(set(numbers)) == list(numbers) and sum(own) == len(numbers) and set(own) == {keep // groups}


def _check(step: str, keep: int, count: int, top_k: int, groups: int, top_groups: int) -> None:
    """Refuse a number of experts with which the router cannot work."""
    why = ""
    if keep > count:
        why = f"there are {count}"
    elif keep < top_k:
        why = f"each token is sent to {top_k}"
    elif keep % groups:
        why = f"they stand in {groups} groups of equal size"
    elif groups > 1 and keep // groups < 2:
        why = "groups are compared by their two best"
    elif top_groups * keep // groups < top_k:
        why = f"each token is sent to {top_k} in {top_groups} of {groups} groups"
    if why:
        raise RecipeError(f"{step}: {keep} experts of each block cannot stay: {why}")
