"""Drop whole experts, and their rows of the router; the checkpoint is as if it had been trained with fewer.

- `reap`: the mean over an expert's tokens of `g ‖f‖`, g being the coefficient that really multiplies its output f
  (router-weighted expert activation pruning, arXiv:2510.13999).
- `reconstruction`: those that together come nearest to what all of them put out, on a sample of tokens: of all subsets
  where these are few, else found by leaving out one after the other (NAEE, arXiv:2402.14800).
- `model`: what the answers of the model lose without it, to second order: `½ E[(gᵀ f)²]`, g being the gradient of KL at
  what the experts put out together, by one walk back from the model's end (`calibrate/curvature.py`).
- `frequency`: how many tokens; `router_weight`: `Σ g`; `ean`: `Σ ‖f‖`; `random`: for comparison.

What the dropped ones knew need not all be lost: `merge` puts their weights into others (`solvers/expert_merge.py`), and
`refit` fits the down projections that stay to what the original block put out (`calibrate/refit.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from ....runtime.errors import RecipeError
from ...events import ExpertsKept
from ..base import Cost, ModelPass, Need, Survey
from .experts import (
    Look,
    back_cost,
    change_experts,
    check_samples,
    check_stream,
    expert_counts,
    merge_cost,
    refit_cost,
    sample_cost,
    save_made,
    walk_back,
    walk_cost,
)  # fmt: skip

if TYPE_CHECKING:
    from torch import Tensor

    from ....calibrate.refit import Member, Routed
    from ....calibrate.routing import Routing
    from ....runtime.model.checkpoint import Checkpoint
    from ....runtime.model.families import ExpertGroups
    from ....runtime.model.skeleton import Skeleton
    from ...solvers.expert_merge import Neurons

Criterion = Literal["reap", "model", "frequency", "router_weight", "ean", "reconstruction", "random"]

Choice = tuple[tuple[int, ...], list[float]]  # what stays of a block, and every expert's score


class ExpertPrune(ModelPass):
    """Drop the experts of each block that matter least."""

    joint: ClassVar[bool] = True
    kind: Literal["expert_prune"]
    criterion: Criterion = Field(
        "reap",
        description="what makes an expert matter: the size of its outputs as they are weighted (reap) or as they are "
        "(ean), how often it is chosen (frequency), its summed coefficients (router_weight), that it belongs to those "
        "which together come nearest to all (reconstruction), what the model's answers lose without it (model), by a "
        "walk back from its end; random: nothing, for comparison",
    )
    merge: Literal["none", "dern", "hc"] = Field(
        "none",
        description="where the weights of dropped experts go: dern: similar neurons to other experts; hc: experts that "
        "put out the same on the mean are averaged",
    )
    refit: bool = Field(
        True,
        description="fit the down projections of the experts that stay to what the original model's blocks put out",
    )
    ratio: float | None = Field(
        None, ge=0, lt=1, description="share of the experts of each block that go; give this or keep"
    )
    keep: int | None = Field(None, ge=1, description="how many experts of each block stay; give this or ratio")
    min_tokens: int = Field(
        32,
        ge=0,
        description="experts that fewer calibration tokens were routed to are the first to go; but for model and "
        "reconstruction",
    )
    protect_super_experts: bool = Field(
        True,
        description="keep experts whose largest activation is beyond both the 99.5th percentile and a tenth of the "
        "model's largest, in the first three quarters of the blocks; but for reconstruction",
    )
    mass_correction: bool = Field(
        False,
        description="multiply what the experts of a block put out by the number that brings it nearest to what all of "
        "them did; of use where routers do not normalize the weights of those they choose, and without refit",
    )
    similarity: float = Field(
        0.6, ge=-1, description="cosine beyond which merge: dern moves a neuron; above 1, none is"
    )
    damping: float = Field(
        0.01,
        gt=0,
        le=1,
        description="share of the mean diagonal that refit adds to the second moments that it solves with",
    )
    task: str | None = Field(
        None, description="text that says which experts matter, as data.source; default: data.source itself"
    )
    seed: int = Field(0, ge=0, description="number that decides which experts criterion: random keeps")
    kept: dict[int, tuple[int, ...]] | None = Field(
        None,
        description="the numbers of the experts that stay, by block; default: what the survey finds and fills in here",
    )
    _blocks: dict[int, int] = PrivateAttr(default_factory=dict)
    _groups: int = PrivateAttr(default=1)
    _nominal: bool = PrivateAttr(default=False)  # whether `kept` is there to be replaced

    @model_validator(mode="after")
    def _one_of_two(self) -> ExpertPrune:
        if (self.ratio is None) == (self.keep is None):
            raise ValueError("give either ratio or keep")
        if self.criterion == "reconstruction" and self.merge == "hc":
            raise ValueError("reconstruction chooses experts that are to stand alone; hc merges: use reap with it")
        if self.merge != "dern":
            self._refuse_idle("without merge: dern", "similarity")
        if not self.refit:
            self._refuse_idle("with refit: false", "damping")
        if self.criterion != "random":
            self._refuse_idle("without criterion: random", "seed")
        if self.criterion in ("model", "reconstruction", "random"):
            self._refuse_idle(f"with criterion: {self.criterion}", "min_tokens")
        if self.criterion == "reconstruction":
            self._refuse_idle("with criterion: reconstruction", "protect_super_experts")
        return self

    @property
    def text(self) -> str | None:
        return self.task

    @property
    def _drops(self) -> bool:
        return self._keep < max(self._blocks.values())

    @property
    def _makes(self) -> bool:
        """Whether weights are changed, too."""
        return self._drops and (self.merge != "none" or self.refit or self.mass_correction)

    @property
    def _observes(self) -> bool:
        """Whether the routing of the original model is looked at."""
        chooses = self._nominal and self.criterion != "random"
        return chooses or (self._drops and (self.merge != "none" or self.mass_correction))

    @property
    def needs(self) -> frozenset[Need]:
        if not self.to_survey:
            return frozenset()
        return frozenset({"routing"} if self._observes else {"text"} if self._makes else ())

    @property
    def to_survey(self) -> bool:
        return self._nominal or (self._makes and not self.made)

    def prepare(self, skeleton: Skeleton) -> ExpertPrune:
        """With the first experts of each block, in place of which the survey puts those that matter.

        Raises:
            RecipeError: the model has no experts, or so many cannot go.
        """
        from ....runtime.model.drafting import drafters
        from ...solvers.expert_subsets import few_enough

        blocks = expert_counts(self.kind, skeleton)
        [count] = set(blocks.values())
        grouped = skeleton.family.experts.groups(skeleton.config)
        groups = grouped.count
        keep = self.keep if self.keep is not None else count - round(count * (self.ratio or 0))
        _check(self.kind, keep, count, skeleton.experts_per_token, grouped)
        if self.criterion == "reconstruction" and groups > 1 and not few_enough(count, keep, groups):
            raise RecipeError(f"{self.kind}: reconstruction cannot search {groups} groups of so many; use reap")
        if self.criterion == "reconstruction" and skeleton.family.experts.scaled:
            raise RecipeError(
                f"{self.kind}: reconstruction weighs what experts put out, and here the router's coefficients multiply "
                "what enters them; use reap"
            )
        if self.criterion == "reconstruction" and (more := skeleton.family.experts.rows):
            raise RecipeError(f"{self.kind}: reconstruction runs the router alone, which here goes by {more[0]} too")
        result = self.model_copy()
        result._blocks, result._groups = blocks, groups
        further = drafters(skeleton)
        if self.kept is None:
            result = result._with_kept({n: _first(count, keep, groups) for n in [*blocks, *further]}, nominal=True)
        elif set(self.kept) not in (set(blocks), {*blocks, *further}) or not all(
            _can_stay(numbers, keep, count, groups) for numbers in self.kept.values()
        ):
            equal = f", as many of each of {groups} groups" if groups > 1 else ""
            raise RecipeError(
                f"{self.kind}: kept has to name {keep} rising numbers below {count} for each block{equal}"
            )
        return result

    def _with_kept(self, kept: dict[int, tuple[int, ...]], *, nominal: bool = False) -> ExpertPrune:
        result = self.model_copy(update={"kept": kept})
        result._nominal = nominal
        return result

    def rewritten(self, checkpoint: Checkpoint, skeleton: Skeleton) -> Checkpoint:
        from ....runtime.model.view import fewer_experts

        assert self.kept is not None
        return fewer_experts(checkpoint, self.kept, self.made) if self._drops else checkpoint

    def survey(self, skeleton: Skeleton, survey: Survey) -> ExpertPrune:
        """With the experts that matter in `kept`, each block's told as `ExpertsKept`; and with new weights."""
        from ....runtime import processes

        if not self.to_survey:
            return self
        assert self.kept is not None
        further = [index for index in self.kept if index not in self._blocks]
        watched = [*self._blocks, *further] if self._observes else []
        look = Look.at(skeleton, survey, watched, protect=self.protect_super_experts)
        result = self
        if self._nominal:
            chosen, costs = {}, self._costs(skeleton, survey) if self.criterion == "model" else {}
            for index in self.kept:
                chosen[index] = processes.once(partial(self._choice, look, index, costs.get(index)))
                kept, found = chosen[index]
                tokens = look.seen[index].tokens.int().tolist() if index in look.seen else []
                survey.listener(ExpertsKept(index, self.criterion, list(kept), found, tokens))
            result = self._with_kept({index: kept for index, (kept, _) in chosen.items()})
        if self._makes:
            steps = {"merged": self.merge != "none", "corrected": self.mass_correction, "refitted": self.refit}
            for name, wanted in steps.items():
                if wanted:
                    folder = survey.folder / name
                    folder.mkdir(exist_ok=True)
                    result._make(name, look, survey, folder)
                    result = result.with_made([*result.made, folder])
        return result

    def _make(self, name: str, look: Look, survey: Survey, folder: Path) -> None:
        from ....calibrate.refit import fit
        from ....runtime import processes

        if name == "merged":
            processes.once(partial(self._merge, look, folder))
        elif name == "corrected":
            processes.once(partial(self._correct, look, folder))
        else:
            view = self.view(look.skeleton)

            def change(index: int, routed: Routed, members: list[Member]) -> None:
                fit(routed, members, self.damping)

            change_experts(look.skeleton, view, survey, folder, change, view, ["down_proj"])

    @property
    def _keep(self) -> int:
        assert self.kept is not None
        return len(next(iter(self.kept.values())))

    def _costs(self, skeleton: Skeleton, survey: Survey) -> dict[int, Tensor]:
        """Block → what the answers lose without each of its experts, `[experts]`; the model is run back from its end
        unless another run left that."""
        import torch

        from ....calibrate.curvature import BlockBack
        from ....calibrate.folders import BlockFigures

        kept = BlockFigures(survey.folder / "costs")

        def take(back: BlockBack) -> None:
            kept.save(back.index, {"lost": {str(number): lost for number, lost in back.lost.items()}})

        def find() -> dict[str, float]:
            walk_back(skeleton, survey, take, lambda index: kept.load(index) is not None)
            found = {index: (kept.load(index) or {}).get("lost", {}) for index in range(skeleton.blocks)}
            return {f"{index} {number}": lost for index, own in found.items() for number, lost in own.items()}

        found = find() if survey.task is not None else survey.recalled({"lost without": "each expert"}, find)
        counts = self._blocks.items()
        return {n: torch.tensor([found.get(f"{n} {e}", 0.0) for e in range(count)]).double() for n, count in counts}

    def _choice(self, look: Look, index: int, costs: Tensor | None = None) -> Choice:
        """The experts of a block that stay, and every expert's score; of a layer that drafts tokens, each by what it
        does alone.

        Args:
            costs: `[experts]`, what the model loses without each, where that is what decides.
        """
        import torch

        drafts = index not in self._blocks
        if self.criterion == "random":
            generator = torch.Generator().manual_seed(1000 * self.seed + index)
            scores = torch.rand(max(self._blocks.values()), generator=generator, dtype=torch.float64)
        elif self.criterion == "reconstruction" and not drafts:
            return self._search(look, index)
        elif costs is not None:
            scores = costs
        else:
            criterion = "reap" if self.criterion in ("model", "reconstruction") else self.criterion
            scores, tokens = saliency(look.seen[index], criterion), look.seen[index].tokens
            scores = torch.where(tokens < self.min_tokens, scores - scores.max() - 1, scores)
        if self.merge != "hc" or drafts:
            return highest(scores, self._keep, self._groups, look.protected.get(index, ())), scores.tolist()
        best = (max(cluster, key=lambda number: float(scores[number])) for cluster in self._clusters(look, index))
        return tuple(sorted(best)), scores.tolist()

    def _clusters(self, look: Look, index: int) -> list[list[int]]:
        """As many clusters of a block's experts as are kept, in each group; protected ones stay alone."""
        import torch

        from ....calibrate.routing import expert_output
        from ...solvers.expert_merge import clusters

        sample = look.sample(index)
        outputs = torch.stack([expert_output(expert, sample).mean(0) for expert in look.experts(index)])
        size, keep, found = len(outputs) // self._groups, self._keep // self._groups, list[list[int]]()
        for start in range(0, len(outputs), size):
            group = range(start, start + size)
            alone = [number for number in group if number in look.protected.get(index, ())][: keep - 1]
            rest = [number for number in group if number not in alone]
            found += [[number] for number in alone]
            found += [[rest[n] for n in cluster] for cluster in clusters(outputs[rest], keep - len(alone))]
        return found

    def _search(self, look: Look, index: int) -> Choice:
        """A block's best subset on a sample of its tokens, and the loss without each expert alone."""
        from ....calibrate.routing import chosen, expert_outputs
        from ...solvers.expert_subsets import best_subset, subset_losses

        sample = look.sample(index)
        outputs = expert_outputs(look.experts(index), sample)

        def route(numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
            return chosen(look.skeleton.router(index, numbers), sample)

        every = range(self._blocks[index])
        without = [tuple(n for n in every if n != gone) for gone in every] if self._groups == 1 else []
        losses = subset_losses(route, outputs, without if len(every) > self._keep else [])
        return best_subset(route, outputs, self._keep, self._groups), losses

    def _merge(self, look: Look, folder: Path) -> None:
        """Put what is dropped into what is kept."""
        from ...solvers.expert_merge import averaged, redistributed

        assert self.kept is not None
        view = self.view(look.skeleton)
        for index, kept in ((index, self.kept[index]) for index in self._blocks):
            experts = [_neurons(expert) for expert in look.experts(index)]
            found: dict[int, Neurons] = {}
            if self.merge == "dern":
                found = redistributed(experts, kept, look.seen[index].weights, self.similarity)
            for cluster in self._clusters(look, index) if self.merge == "hc" else ():
                staying = [number for number in cluster if number in kept][:1]
                members = [*staying, *(number for number in cluster if number not in kept)]
                if staying and len(members) > 1:
                    tokens = look.seen[index].tokens[members].tolist()
                    found[members[0]] = averaged([experts[number] for number in members], tokens)
            tensors: dict[str, Tensor] = {}
            for number, merged in found.items():
                name = f"{look.skeleton.family.experts.where}.{kept.index(number)}."
                parts = {"gate_proj": merged.gate, "up_proj": merged.up, "down_proj": merged.down.T}
                tensors |= {name + part + ".weight": tensor for part, tensor in parts.items()}
            save_made(view, index, tensors, folder)

    def _correct(self, look: Look, folder: Path) -> None:
        """Multiply down projections by `<F, F'> / <F', F'>`, F and F' being what all experts of a block put out on a
        sample, and what the kept ones do."""
        view = self.view(look.skeleton)
        for index in self._blocks:
            sample, layer = look.sample(index), view.block(index)
            before = _routed(look.skeleton, look.skeleton.block(index), sample)
            after = _routed(view, layer, sample)
            factor = float((before * after).sum() / after.square().sum().clamp(min=1e-30))
            names = [f"{view.family.experts.where}.{n}.down_proj.weight" for n in range(self._keep)]
            save_made(view, index, {name: factor * layer.get_parameter(name).float() for name in names}, folder)

    def survey_cost(self, skeleton: Skeleton, samples: int, sequence_length: int) -> Cost:
        if not self.needs:
            return Cost()
        costs = [walk_cost(skeleton, samples, sequence_length)] if self._observes else []
        if self.criterion == "model" and self._nominal:
            costs.append(back_cost(skeleton, samples, sequence_length))
        if self.criterion == "reconstruction" or self.mass_correction:
            costs.append(sample_cost(skeleton, corrected=self.mass_correction))
        if self.merge != "none" and self._drops:
            costs.append(merge_cost(skeleton, self._keep, compared=self.merge == "dern"))
        if self.refit and self._drops:
            check_stream(self.kind, skeleton)
            check_samples(self.kind, samples)
            costs.append(refit_cost(self.view(skeleton), samples, sequence_length))
        return Cost.of(costs)

    @property
    def note(self) -> str:
        return f"{max(self._blocks.values())} → {self._keep} experts in {len(self._blocks)} blocks"


def saliency(seen: Routing, criterion: str) -> Tensor:
    """How much each expert matters, `[experts]`."""
    scores: dict[str, Tensor] = {
        "reap": seen.weighted / seen.tokens.clamp(min=1),
        "frequency": seen.tokens,
        "router_weight": seen.weights,
        "ean": seen.norms,
    }
    return scores[criterion]


def _neurons(expert: Any) -> Neurons:
    from ...solvers.expert_merge import Neurons

    return Neurons(expert.gate_proj.weight.float(), expert.up_proj.weight.float(), expert.down_proj.weight.float().T)


def _routed(skeleton: Skeleton, layer: Any, sample: Tensor) -> Tensor:
    """What the routed experts of a block put out for tokens `[tokens, hidden_size]`, float64."""
    from ....calibrate.routing import chosen, expert_outputs, experts_of
    from ...solvers.expert_subsets import mixed

    routed = chosen(layer.get_submodule(skeleton.family.experts.router), sample)
    outputs = expert_outputs(experts_of(skeleton, layer) or (), sample)
    return mixed(lambda _: routed, outputs, range(len(outputs))).double()


def highest(scores: Tensor, keep: int, groups: int, protected: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The numbers of the highest scores, the same number in each group, rising; protected ones among them first."""
    import torch

    raised = scores.clone()
    if protected:
        raised[list(protected)] += float(scores.max() - scores.min()) + 1
    size = len(scores) // groups
    chosen = raised.view(groups, size).topk(keep // groups, dim=1).indices + size * torch.arange(groups)[:, None]
    return tuple(sorted(chosen.flatten().tolist()))


def _first(count: int, keep: int, groups: int) -> tuple[int, ...]:
    import torch

    return highest(-torch.arange(count, dtype=torch.float64), keep, groups)


def _can_stay(numbers: Sequence[int], keep: int, count: int, groups: int) -> bool:
    """Whether these are experts of a block, rising, and as many of each group."""
    size = count // groups
    own = [sum(number // size == group for number in numbers) for group in range(groups)]
    return sorted(set(numbers)) == list(numbers) and sum(own) == len(numbers) and set(own) == {keep // groups}


def _check(step: str, keep: int, count: int, top_k: int, grouped: ExpertGroups) -> None:
    """Refuse a number of experts with which the router cannot work."""
    why, groups, top_groups = "", grouped.count, grouped.chosen
    if keep > count:
        why = f"there are {count}"
    elif keep < top_k:
        why = f"each token is sent to {top_k}"
    elif keep % groups:
        why = f"they stand in {groups} groups of equal size"
    elif groups > 1 and keep // groups < grouped.compared:
        why = "groups are compared by their two best"
    elif top_groups * keep // groups < top_k:
        why = f"each token is sent to {top_k} in {top_groups} of {groups} groups"
    if why:
        raise RecipeError(f"{step}: {keep} experts of each block cannot stay: {why}")
