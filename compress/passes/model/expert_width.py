"""Drop neurons inside experts, the same number in each, so that what every token costs falls too.

A neuron of an expert is a row of gate and up and a column of down. `obs` leaves out those whose part the others of the
expert can play best, by the second moment of what enters its down projection (optimal brain surgeon, as ZipLM,
arXiv:2302.04089, uses it for whole neurons); what they cannot play is measured by its size, or with `objective: model`
by what it costs the answers of the model, which a walk back from its end tells (`calibrate/curvature.py`). `activation`
leaves out those with the least `E[g² h²] ‖d‖²`, g being the router's coefficient, h the activation and d the column of
down (HEAPr's score, arXiv:2509.22299, with the identity for the covariance of gradients). All down projections are then
fitted to what the original block put out (`calibrate/refit.py`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from ....runtime.errors import RecipeError
from ..base import Cost, ModelPass, Need, Survey
from .experts import (
    back_cost,
    change_experts,
    check_samples,
    check_stream,
    check_tokens,
    expert_counts,
    metric_cost,
    refit_cost,
    walk_back,
)

if TYPE_CHECKING:
    from ....calibrate.folders import CurvatureFolder
    from ....calibrate.refit import Member, Routed
    from ....runtime.model.checkpoint import Checkpoint
    from ....runtime.model.skeleton import Skeleton

_PARTS = ("gate_proj", "up_proj", "down_proj")


class ExpertWidth(ModelPass):
    """Narrow the experts of all blocks to the neurons that matter most."""

    joint: ClassVar[bool] = True
    kind: Literal["expert_width"]
    criterion: Literal["obs", "activation"] = Field(
        "obs",
        description="what makes a neuron matter: that the others of its expert cannot make up for it (obs), or the "
        "size of what it adds to the output (activation)",
    )
    objective: Literal["layer", "model"] = Field(
        "layer",
        description="with criterion: obs, by what is measured that an expert misses without a neuron. layer: its size; "
        "model: what it does to the answers of the model, found by a walk back from its end",
    )
    refit: bool = Field(
        True,
        description="fit the down projections of the experts that stay to what the original model's blocks put out",
    )
    ratio: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of an expert's neurons that go, rounded up to a width that kernels take; give this or width",
    )
    width: int | None = Field(
        None,
        ge=16,
        description="how many neurons of an expert stay: a multiple of 64, of 16 below 512; give this or ratio",
    )
    damping: float = Field(
        0.01,
        gt=0,
        le=1,
        description="share of the mean diagonal that is added to second moments before they are solved with",
    )
    _before: int = PrivateAttr(default=0)
    _after: int = PrivateAttr(default=0)

    @model_validator(mode="after")
    def _one_of_two(self) -> ExpertWidth:
        if (self.ratio is None) == (self.width is None):
            raise ValueError("give either ratio or width")
        if self.criterion == "activation" and not self.refit:
            self._refuse_idle("with criterion: activation and refit: false", "damping")
        if self.criterion == "activation":
            self._refuse_idle("with criterion: activation", "objective")
        return self

    @property
    def _narrows(self) -> bool:
        return self._after < self._before

    @property
    def to_survey(self) -> bool:
        return self._narrows and not self.made

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"text"}) if self.to_survey else frozenset()

    def prepare(self, skeleton: Skeleton) -> ExpertWidth:
        """With the width that is left.

        Raises:
            RecipeError: the model has no experts, or kernels cannot work with so many neurons.
        """
        expert_counts(self.kind, skeleton)
        if not skeleton.family.experts.width:
            raise RecipeError(f"{self.kind}: nothing in config.json gives the width of this model's experts alone")
        before = int(skeleton.checkpoint.text_config[skeleton.family.experts.width])
        step = 64 if before >= 512 else 16
        after = self.width or (max(step, int(before * (1 - self.ratio) / step) * step) if self.ratio else before)
        if after > before or (after % step and after != before):
            raise RecipeError(
                f"{self.kind}: {after} of {before} neurons cannot stay: kernels need a multiple of {step}, at most that"
            )
        result = self.model_copy()
        result._before, result._after = before, min(after, before)
        return result

    def rewritten(self, checkpoint: Checkpoint, skeleton: Skeleton) -> Checkpoint:
        from ....runtime.model.view import narrower_experts

        return narrower_experts(checkpoint, self._after, self.made) if self._narrows else checkpoint

    def survey(self, skeleton: Skeleton, survey: Survey) -> ExpertWidth:
        """With the neurons that stay, and their weights."""
        if not self.to_survey:
            return self
        folder = survey.folder / "refitted"
        folder.mkdir(exist_ok=True)
        change = partial(self._change, self._metrics(skeleton, survey))
        change_experts(skeleton, skeleton, survey, folder, change, self.view(skeleton), _PARTS)
        return self.with_made([folder])

    def _metrics(self, skeleton: Skeleton, survey: Survey) -> CurvatureFolder | None:
        """What errors of each block's mixture cost the model, where that is the objective."""
        from ....calibrate.curvature import BlockBack
        from ....calibrate.folders import CurvatureFolder

        if self.objective == "layer":
            return None
        kept = CurvatureFolder(survey.folder / "curvature", {"of": "mixtures"})

        def take(back: BlockBack) -> None:
            known = back.found().items()
            kept.save(back.index, {name: own for name, own in known if skeleton.family.expert(name) is not None})

        walk_back(skeleton, survey, take, kept.holds, metrics=True)
        kept.finish(range(skeleton.blocks))
        return kept

    def _change(self, metrics: CurvatureFolder | None, index: int, routed: Routed, members: list[Member]) -> None:
        """Narrow the experts of a block, and fit what is left."""
        from torch import nn

        from ....calibrate.refit import fit, normal_equations
        from ...solvers.coupled import metric_of
        from ...solvers.expert_neurons import eliminated, strongest

        normal = normal_equations(routed, members)
        ridge, metric = self.damping * normal.mean, None
        if metrics is not None:  # one for all experts, whose last linears have it
            known = metrics.load(index, routed.device)
            metric = metric_of(next((own for own in known.values() if own.metric is not None), None))
            del known
            metric = None if metric is None else metric.double()
        for member, moment in zip(members, normal.moments, strict=True):
            module = member.module
            weight = module.down_proj.weight
            keep = len(moment) // self._before * self._after
            if self.criterion == "obs":
                numbers, narrow = eliminated(weight.float(), moment, keep, ridge, metric)
            else:
                numbers, narrow = strongest(weight.float(), moment, keep)
            module.down_proj.weight = nn.Parameter(narrow.to(weight.dtype), requires_grad=False)
            for part in (module.gate_proj, module.up_proj):
                part.weight = nn.Parameter(part.weight[numbers], requires_grad=False)
        del normal, metric
        if self.refit:
            fit(routed, members, self.damping)

    def survey_cost(self, skeleton: Skeleton, samples: int, sequence_length: int) -> Cost:
        if not self.needs:
            return Cost()
        check_stream(self.kind, skeleton)
        if self.refit:
            check_samples(self.kind, samples)
        fitting = refit_cost(skeleton, samples, sequence_length, parts=len(_PARTS))
        if self.objective == "layer":
            return fitting
        check_tokens(self.kind, skeleton, samples, sequence_length)
        more = metric_cost(skeleton)
        fitting = replace(fitting, memory=fitting.memory + more.memory, flops=fitting.flops + more.flops)
        return Cost.of([back_cost(skeleton, samples, sequence_length, metrics=True), fitting])

    @property
    def note(self) -> str:
        return f"experts of {self._before} → {self._after} neurons"
