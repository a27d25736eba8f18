"""LoRC: keys and values go through a few numbers, and the KV cache holds these (arXiv:2410.03111).

- Plain: truncated SVD of the weights, ranks that fall with depth by the cumulative condition numbers, no data.
- `calibrated`: the principal components of what the projections put out, `W H Wᵀ`, in the metric of what errors there
  cost the model's answers (`calibrate/curvature.py`), or of how they move the block's output (`calibrate/probes.py`);
  ranks by what the components that are left out cost in that metric, or by how much the answers suffer when each
  projection is cut; factors found on the compressed model, for targets that make up for the errors of earlier layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from ....runtime.errors import ModelError, RecipeError
from ...events import Event, Fallback, LayerDone
from ..base import BUFFERS, Cost, Need, Survey
from .calibrated import Calibrated, plain_floats

if TYPE_CHECKING:
    from torch import Tensor

    from ....calibrate.curvature import BlockBack
    from ....calibrate.divergences import Seen
    from ....calibrate.stage import StageWork
    from ....runtime.model.skeleton import Skeleton
    from ....runtime.schemes import Dense, Latent, Operator

_SPREAD = 1.25  # of the highest share over the mean, where only the mean is given


@dataclass(frozen=True)
class Shape:
    """A projection whose latents are to be cached.

    Attributes:
        rows: outputs, `kv_heads * head_dim`.
        width: the largest rank that makes sense.
        groups: of heads that have latents of their own.
        step: channels that are given at a time.
        block: of the model.
    """

    rows: int
    width: int
    groups: int
    step: int
    block: int


class Lorc(Calibrated):
    """Let the KV cache hold low-rank latents of keys and values."""

    may_grow: ClassVar[bool] = True
    kind: Literal["lorc"]
    ratio: float | None = Field(
        None,
        gt=0,
        le=1,
        description="bytes of the KV cache, as a share of what they were; give this, or d_max and d_min, or ranks",
    )
    allocation: Literal["progressive", "uniform"] = Field(
        "progressive",
        description="how a ratio is shared out without calibrated: progressive: less from layer to layer by the "
        "cumulative condition numbers, as published, from at most 1.25 times the ratio; uniform: alike",
    )
    whole_layers: int = Field(
        0, ge=0, description="first layers whose keys and values stay as they are; the others make up for their bytes"
    )
    d_max: float | None = Field(
        None,
        gt=0,
        le=1,
        description="rank in the first layer, as a share of a projection's width; with d_min, in place of ratio",
    )
    d_min: float | None = Field(
        None,
        gt=0,
        le=1,
        description="rank in the last layer, as a share of a projection's width; with d_max, in place of ratio",
    )
    granularity: Annotated[int, Field(ge=1, strict=True)] | Literal["joint", "per_head"] = Field(
        "joint", description="how many key-value heads share latents: joint for all, per_head for one, or a number"
    )
    rank_step: int | None = Field(
        None, ge=1, description="ranks are multiples of this; default: 16, or 8 where heads are narrower than 64"
    )
    calibrated: bool = Field(
        False,
        description="find latents on calibration data (principal components of what the projections put out), and "
        "ranks by what cutting each projection does to the model; false: from the weights alone",
    )
    objective: Literal["auto", "outputs", "block", "model"] = Field(
        "auto",
        description="what calibrated: true minimises: outputs: errors of keys and values as they are; block: as they "
        "move the block's output; model: as they cost the answers, which shares out the ranks without cutting each "
        "projection on its own; auto: model, but block where tokens choose experts: gradients do not see how errors "
        "change that choice",
    )
    latent_bits: Literal[4, 8, 16] = Field(
        16,
        description="bits of a number in the cache; 16: floats as the model's; 8, 4: codes, 32 of which share a scale",
    )
    ranks: dict[str, Annotated[int, Field(ge=1, strict=True)]] | None = Field(
        None, description="the rank of each projection by its name; default: what the survey finds and fills in here"
    )
    _shapes: dict[str, Shape] = PrivateAttr(default_factory=dict)
    _checkpoint: Any = PrivateAttr(default=None)
    _nominal: bool = PrivateAttr(default=False)  # whether the ranks are there to be replaced
    _blind: bool = PrivateAttr(default=False)  # whether gradients at the model's end do not tell what errors cost
    _share: float = PrivateAttr(default=0.0)  # of the bytes of what is cut, what is to stay

    @model_validator(mode="after")
    def _one_of_two(self) -> Lorc:
        if (self.ratio is not None) + (self.d_max is not None) != 1 and not (self.ranks and self.d_max is None):
            raise ValueError("give either ratio, or d_max and d_min, or ranks")
        if (self.d_max is None) != (self.d_min is None) or (self.d_max or 1) < (self.d_min or 0):
            raise ValueError("give d_max and d_min, the larger first")
        if self.calibrated:
            self._refuse_idle("with calibrated: true, which shares a ratio out by what the model loses", "allocation")
        if self.d_max is not None:
            self._refuse_idle("with d_max and d_min, which say what each layer gets", "allocation")
        if self.calibrated and self.d_max is not None:
            raise ValueError("calibrated distributes a ratio; d_max and d_min are of the plain method")
        if not self.calibrated:
            self._refuse_idle(
                "without calibrated: true", "correction", "damping", "shrinkage", "sequential", "objective"
            )
        return self

    @property
    def needs(self) -> frozenset[Need]:
        if not self.calibrated:
            return frozenset()
        if self._aim == "model":
            return super().needs | {"curvature", "foretold"}
        return super().needs | ({"metric"} if self._aim == "block" else set())

    @property
    def _aim(self) -> str:
        """The objective, once it is known of the model."""
        return self.objective if self.objective != "auto" else "block" if self._blind else "model"

    def wants(self, name: str) -> bool:
        """Before `prepare`, by the patterns; then exactly the projections that have a rank."""
        if self.ranks is not None:
            return name in self.ranks
        return super().wants(name)

    def prepare(self, skeleton: Skeleton) -> Lorc:
        """With equal ranks everywhere, which the survey distributes.

        Raises:
            RecipeError: no projection is to be cached, or keys could not be rotated again from the cache.
        """
        from ....calibrate.curvature import WIDEST
        from ....runtime.attention import rope_obstacle, sliding

        if why := rope_obstacle(skeleton.config):
            raise RecipeError(f"{self.kind}: latents cannot be cached for this model: {why}")
        config, shapes = skeleton.config, dict[str, Shape]()
        cached = (skeleton.family.keys, skeleton.family.values)
        head_dim = 0
        if any(cached):  # else it may be another one in each layer
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for index in range(skeleton.blocks):
            for name, linear in skeleton.linears(index).items():
                if self.wants(name) and skeleton.family.inside(name) in cached and not sliding(config, index):
                    shapes[name] = self._shape(name, linear, head_dim, index)
        whole = sorted({shape.block for shape in shapes.values()})[: self.whole_layers]
        kept = sum(shape.rows for shape in shapes.values() if shape.block in whole)
        every = sum(shape.rows for shape in shapes.values())
        if self.ranks is None:
            shapes = {name: shape for name, shape in shapes.items() if shape.block not in whole}
        if unknown := set(self.ranks or ()).difference(shapes):
            raise RecipeError(f"{self.kind}: ranks names {min(unknown)}, which is no projection that can be cached")
        if not shapes:
            raise RecipeError(
                f"{self.kind} finds no key or value projection to work on: targets and ignore leave none, or the model "
                "has them under sliding windows only, or latents of its own"
            )
        result = self.model_copy()
        result._shapes, result._checkpoint = shapes, skeleton.checkpoint
        linears = (name for index in range(skeleton.blocks) for name in skeleton.linears(index))
        result._blind = any(skeleton.family.expert(name) is not None for name in linears) or any(
            shape.rows > WIDEST * config.hidden_size for shape in shapes.values()
        )
        if self.ranks is None:
            share = self.ratio if self.d_max is None or self.d_min is None else (self.d_max + self.d_min) / 2
            assert share is not None
            if self.ratio is not None:
                share = (share * every - kept) / (every - kept)
            least = sum(result._cost(shape.step) for shape in shapes.values()) / result._budget(1)
            if share < least:
                percent = 100 * (least * (every - kept) + kept) / every
                raise RecipeError(
                    f"{self.kind}: one step of ranks for each projection is {percent:.1f} % of the cache already; "
                    f"ask for more, or give a smaller {'whole_layers or ' if kept else ''}rank_step"
                )
            result._share = share
            result = result._with_ranks(result._rounded(dict.fromkeys(shapes, share), share), nominal=True)
        return result

    def _shape(self, name: str, linear: Any, head_dim: int, index: int) -> Shape:
        rows = linear.out_features
        heads = rows // head_dim
        together = {"joint": heads, "per_head": 1}.get(str(self.granularity)) or int(self.granularity)
        if heads % together:
            raise RecipeError(f"{self.kind}: granularity {together} does not divide the {heads} heads of {name}")
        groups = heads // together
        width = min(rows, groups * linear.in_features)
        step = self.rank_step or (16 if head_dim >= 64 else 8)
        return Shape(rows, width, groups, min(groups * step, width), index)

    def _with_ranks(self, ranks: dict[str, int], *, nominal: bool = False) -> Lorc:
        result = self.model_copy(update={"ranks": ranks})
        result._nominal = nominal
        return result

    def _cost(self, rank: int) -> int:
        """Bytes of a token's latent in the cache."""
        from ....runtime.schemes import cached_bytes

        return cached_bytes(rank, self.latent_bits, self._checkpoint.dtype.itemsize)

    def _budget(self, share: float) -> float:
        """Bytes of a token in the cache."""
        return share * sum(shape.rows for shape in self._shapes.values()) * self._checkpoint.dtype.itemsize

    def _rounded(self, shares: Mapping[str, float], mean: float) -> dict[str, int]:
        """Ranks from shares of the bytes."""
        from ....kernels.layouts import LATENT_SPLIT
        from ....runtime.schemes import cached_bytes
        from ...solvers.ranks import rounded

        full = self._checkpoint.dtype.itemsize
        channels = LATENT_SPLIT * full / cached_bytes(LATENT_SPLIT, self.latent_bits, full)  # that fit in one's bytes
        widths = {name: shape.width for name, shape in self._shapes.items()}
        wanted = {name: share * channels * self._shapes[name].rows for name, share in shares.items()}
        return rounded(wanted, self._steps, widths, self._cost, self._budget(mean))

    @property
    def _steps(self) -> dict[str, int]:
        return {name: shape.step for name, shape in self._shapes.items()}

    @property
    def to_survey(self) -> bool:
        return self._nominal

    def survey(self, skeleton: Skeleton, survey: Survey) -> Lorc:
        """With the ranks that the weights, or cutting each projection on its own, call for."""
        import torch

        from ....calibrate.divergences import divergences
        from ....calibrate.probes import output_metrics
        from ....runtime.model.skeleton import Skeleton
        from ....runtime.schemes import Dense, LowRank
        from ...solvers.lowrank import Components
        from ...solvers.ranks import greedy

        if not self._nominal:
            return self
        if not self.calibrated:
            uniform = self.allocation == "uniform"
            return self._with_ranks(self._ranks if uniform else self._progressive(skeleton))
        if self._aim == "model":
            losses = {name: self._curve(name, survey.foretold) for name in self._shapes}
            return self._with_ranks(greedy(losses, self._steps, self._cost, self._budget(self._share)))
        assert survey.windows is not None
        curves: dict[str, Tensor] = {}
        probed: dict[str, int] = {}

        def changes(index: int, seen: Seen) -> dict[str, dict[str, Tensor]]:
            """Each projection of a block cut on its own; fills in the curves on the way."""
            names = [name for name, shape in self._shapes.items() if shape.block == index]
            inner = {name: skeleton.family.inside(name) for name in names}
            metrics: Sequence[Tensor | None] = [None] * len(names)
            if names and self._aim == "block":
                metrics = output_metrics(skeleton, seen.runner, seen.hidden, list(inner.values()))
            found = {}
            for name, metric in zip(names, metrics, strict=True):
                weight, shape = skeleton.checkpoint.tensor(name + ".weight").to(skeleton.device), self._shapes[name]
                assert seen.moment is not None
                components = Components.of(weight.float(), seen.moment, metric, shape.groups)
                curves[name] = components.tail()[: shape.width + 1]
                probed[name] = _probed(curves[name], self._ranks[name], shape.groups)
                up, down = (Dense(part) for part in components.truncated(probed[name]))
                found[name] = {inner[name]: LowRank(up, down, shape.groups).dense()}
            return found

        # What one projection does to the answers is far below the rounding of bfloat16.
        exact = Skeleton(skeleton.checkpoint, torch.float32, skeleton.device)
        observed, passed = skeleton.family.keys, survey.passed(skeleton.blocks)
        lost = divergences(exact, survey.windows, survey.folder, observed, changes, passed)
        losses = {
            name: curve * max(lost[name], 0.0) / curve[probed[name]].clamp(min=torch.finfo(torch.float64).tiny)
            for name, curve in curves.items()
        }
        return self._with_ranks(greedy(losses, self._steps, self._cost, self._budget(self._share)))

    @property
    def foretells(self) -> Mapping[str, Any] | None:
        chosen = {"ratio", "ranks", "whole_layers", "latent_bits", "correction", "damping", "shrinkage"}
        wanted = self._nominal and self.calibrated and self._aim == "model"
        return {**self.model_dump(mode="json", exclude=chosen), "of": sorted(self._shapes)} if wanted else None

    def foretell(self, skeleton: Skeleton, back: BlockBack) -> dict[str, float]:
        """KL per token in nats for each projection and rank, at multiples of its step."""
        import torch

        from ....calibrate.foretell import by_place
        from ...solvers.lowrank import Components

        found, curvatures = dict[str, float](), back.found() if self.calibrated else {}
        for inside, (moment, weighed) in back.met.items():
            name = skeleton.disk_name(back.index, inside)
            if name not in self._shapes or name not in curvatures:
                continue
            weight, shape, own = skeleton.checkpoint.tensor(name + ".weight"), self._shapes[name], curvatures[name]
            metric = own.metric
            if metric is None:
                metric = own.trace / shape.rows * torch.eye(shape.rows, device=moment.moment.device)
            weight = weight.to(skeleton.device).float()
            moment = by_place(own, moment, weighed) if self.sequential else moment
            tail = Components.of(weight, moment.moment / moment.tokens, metric, shape.groups).tail()
            for rank in {*_cuts(shape), self._ranks[name]}:
                found[f"{name} {rank}"] = float(tail[rank]) / 2
        return found

    def expected(self, skeleton: Skeleton, foretold: Mapping[str, float]) -> float | None:
        ranks = self._ranks
        if self._nominal:
            from ...solvers.ranks import greedy

            losses = {name: self._curve(name, foretold) for name in self._shapes}
            ranks = greedy(losses, self._steps, self._cost, self._budget(self._share))
        return sum(foretold[f"{name} {rank}"] for name, rank in ranks.items())

    def foretelling(self, rows: int, columns: int) -> tuple[float, float]:
        return 16.0 * columns**2 + 32.0 * rows * columns + 40.0 * rows**2, 2.0 * rows * columns**2 + 60.0 * rows**3

    def _curve(self, name: str, foretold: Mapping[str, float]) -> Tensor:
        """What is lost of a projection at each rank, where it is known: at multiples of its step."""
        import torch

        shape = self._shapes[name]
        curve = torch.zeros(shape.width + 1, dtype=torch.float64)
        for rank in _cuts(shape):
            curve[rank] = foretold[f"{name} {rank}"]
        return curve

    @property
    def warning(self) -> str:
        if self.calibrated or all(self._ranks[name] >= shape.width for name, shape in self._shapes.items()):
            return ""
        return (
            "ranks are cut by the weights alone, which do not say which inputs are large: on SmolLM2-135M, half of the "
            "ranks of values has KL 6.8, and .2 with calibrated: true; latent_bits: 8 at full rank has .0001 at 53 % "
            "of the bytes (recipe latents-8bit)"
        )

    def survey_cost(self, skeleton: Skeleton, samples: int, sequence_length: int) -> Cost:
        """Of cutting every projection once, where ranks are found on data."""
        from ....calibrate.divergences import divergences_cost

        if not (self._nominal and self.calibrated) or self._aim == "model":
            return Cost()
        memory, disk, flops = divergences_cost(skeleton, samples, sequence_length, len(self._shapes), 0)
        return Cost(BUFFERS + memory, disk, 0.0, flops)

    @property
    def _ranks(self) -> dict[str, int]:
        assert self.ranks is not None
        return self.ranks

    def _progressive(self, skeleton: Skeleton) -> dict[str, int]:
        """Ranks by LoRC's rule, one weight in memory at a time."""
        import torch

        from ...solvers.ranks import bisected, log_condition, progressive

        blocks = sorted({shape.block for shape in self._shapes.values()})
        conditions = dict.fromkeys(blocks, 0.0)
        for name, shape in self._shapes.items():
            weight = skeleton.checkpoint.tensor(name + ".weight").double()
            if not bool(weight.isfinite().all()):
                raise ModelError(f"{skeleton.checkpoint.path}: {name}.weight holds NaN or infinite weights")
            conditions[shape.block] += log_condition(torch.linalg.eigvalsh(weight @ weight.T).clamp(min=0).sqrt())
        logs = list(conditions.values())
        if self.d_max is not None and self.d_min is not None:
            shares = progressive(logs, self.d_max, self.d_min)
        else:
            shares = bisected(logs, min(1.0, _SPREAD * self._share), self._share)
        by_block = dict(zip(blocks, shares, strict=True))
        mean = self._share if self.ratio is not None else sum(shares) / len(shares)
        return self._rounded({name: by_block[shape.block] for name, shape in self._shapes.items()}, mean)

    def flops(self, rows: int, columns: int) -> float:
        return self.correcting(rows, columns) + 60.0 * rows**3

    def memory(self, operators: Sequence[Operator]) -> float:
        (rows, _), columns = max(operator.shape for operator in operators), operators[0].shape[1]
        return max(self.factoring(columns), 16.0 * columns**2 + 32.0 * rows * columns + 40.0 * rows**2)

    def plan(self, name: str, operator: Operator, group: Mapping[str, Dense]) -> Operator:
        return self.planned(name, operator, group)  # factors of another lorc are no place for latents

    def planned(self, name: str, operator: Operator, group: Mapping[str, Dense]) -> Latent:
        import torch

        from ....runtime.schemes import Dense, Latent

        dense = plain_floats(self.kind, name, operator)
        rows, columns = dense.shape
        rank, groups = self._ranks[name], self._shapes[name].groups
        width = self._shapes[name].width
        if rank % groups or not 0 < rank <= width:
            raise RecipeError(f"{self.kind}: {name} cannot have rank {rank}: at most {width}, in {groups} equal groups")
        up, down = (
            torch.empty(shape, dtype=dense.weight.dtype, device="meta")
            for shape in ((rows, rank // groups), (rank, columns))
        )
        return Latent(Dense(up), Dense(down), groups, self.latent_bits)

    def apply(self, work: StageWork) -> Iterator[Event]:
        import torch

        from .groups import groups_of

        if not self.calibrated:
            for name in (name for name in work.linears if self.wants(name)):
                yield from self._rewrite(work, name, work.originals[name].float(), None, 0)
            return
        for group in groups_of(self, work, products=torch.float32):
            moment = None if group.system is None else group.system.moment
            for name, target in zip(group.names, group.targets(), strict=True):
                if group.reason:
                    yield Fallback(name, self.kind, f"factored without data, for {group.reason}")
                yield from self._rewrite(work, name, target, moment, group.tokens)

    def _rewrite(
        self, work: StageWork, name: str, target: Tensor, moment: Tensor | None, tokens: int
    ) -> Iterator[Event]:
        from ....kernels.layouts import LATENT_SPLIT
        from ....runtime.schemes import Dense, Latent
        from ...solvers.lowrank import Components, rotation

        rank, groups = self._ranks[name], self._shapes[name].groups
        metric = None
        if self.calibrated and self._aim == "model":
            curvature = work.curvatures.get(name)
            metric = None if curvature is None else curvature.metric
        elif self.calibrated and self._aim == "block":
            metric = work.metrics.get(name)
        components = Components.of(target, moment, metric, groups)
        up, down = components.truncated(rank)
        if self.latent_bits < 16:
            turn = rotation(rank, LATENT_SPLIT, groups).to(up.device)
            own = turn.unflatten(0, (groups, -1)).unflatten(2, (groups, -1)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            up, down = (up.unflatten(0, (groups, -1)) @ own.mT).flatten(0, 1), turn @ down
        dtype = work.originals[name].dtype
        result = Latent(Dense(up.to(dtype)), Dense(down.to(dtype)), groups, self.latent_bits)
        work.linears[name] = result
        tail = components.tail()
        yield LayerDone.of(name, self.kind, float(tail[rank] / tail[0].clamp(min=1e-30)), result, tokens)


def _cuts(shape: Shape) -> list[int]:
    """Ranks that are chosen among."""
    return [*range(min(shape.step, shape.width), shape.width, shape.step), shape.width]


def _probed(curve: Tensor, rank: int, groups: int) -> int:
    """Where to cut to see what cutting does: at the rank, but where enough is lost to be measured."""
    enough = int((curve >= 1e-3 * curve[0]).sum()) - 1
    width = len(curve) - 1
    return max(groups, min(rank, enough, 3 * width // 4) // groups * groups)
