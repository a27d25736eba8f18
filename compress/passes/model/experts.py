"""What the passes share that change the experts of a model: a look at the routing, new weights, what that takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....runtime.errors import RecipeError, ResourceError
from ...events import ExpertsChanged
from ..base import BUFFERS, Cost, Survey

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ....calibrate.curvature import BlockBack
    from ....calibrate.folders import RoutingFolder
    from ....calibrate.refit import Member, Routed
    from ....calibrate.routing import Routing
    from ....runtime.model.skeleton import Skeleton


def expert_counts(step: str, skeleton: Skeleton) -> dict[int, int]:
    """Block → how many routed experts it has, for blocks that have any.

    Raises:
        RecipeError: none has.
    """
    from ....calibrate.routing import experts_of

    found = {}
    for index, layer in enumerate(skeleton.layers):
        if (experts := experts_of(skeleton, layer)) is not None:
            if not experts[0].plain:
                raise RecipeError(f"{step}: experts of this model are no gated linears without biases, which it is for")
            found[index] = len(experts)
    if not found:
        raise RecipeError(f"{step}: this model has no experts")
    return found


@dataclass(frozen=True)
class Look:
    """What was seen of the original model's experts.

    Attributes:
        seen: block → sums over its tokens.
        protected: block → experts that are to stay.
        folder: of the samples.
    """

    skeleton: Skeleton
    seen: Mapping[int, Routing]
    protected: Mapping[int, tuple[int, ...]]
    folder: RoutingFolder | None

    @classmethod
    def at(cls, skeleton: Skeleton, survey: Survey, blocks: Iterable[int], *, protect: bool) -> Look:
        """At some blocks; the model is run unless another run left what is needed."""
        from ....calibrate.folders import RoutingFolder
        from ....calibrate.routing import observe_routing

        if not (wanted := list(blocks)):
            return cls(skeleton, {}, {}, None)
        folder = survey.routing or RoutingFolder(survey.folder / "routing", {})
        if not folder.complete:
            windows = survey.task if survey.task is not None else survey.windows
            assert windows is not None
            observe_routing(skeleton, windows, survey.folder / "walk", folder, survey.passed(skeleton.blocks))
        seen = {index: folder.load(index)[0] for index in wanted}
        return cls(skeleton, seen, super_experts(seen, skeleton.blocks) if protect else {}, folder)

    def sample(self, index: int) -> Tensor:
        """Tokens that entered the experts of a block, `[tokens, hidden_size]`."""
        assert self.folder is not None
        return self.folder.load(index)[1].to(self.skeleton.device)

    def experts(self, index: int) -> Sequence[Any]:
        """The experts of a block, with their weights."""
        from ....calibrate.routing import experts_of

        return list(experts_of(self.skeleton, self.skeleton.block(index)) or ())


def super_experts(seen: Mapping[int, Routing], blocks: int) -> dict[int, tuple[int, ...]]:
    """Block → experts whose peak is beyond the 99.5th percentile and a tenth of the model's, in the first three
    quarters of the blocks: few, and the model does not survive without them."""
    import torch

    if not seen:
        return {}
    peaks = torch.cat([routing.peak for routing in seen.values()])
    limit = max(float(torch.quantile(peaks, 0.995)), 0.1 * float(peaks.max()))
    early = {index: routing for index, routing in seen.items() if index < 0.75 * blocks}
    return {index: tuple(torch.where(routing.peak > limit)[0].tolist()) for index, routing in early.items()}


def save_made(view: Skeleton, index: int, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Leave new weights (names inside a block, in memory) in the dtype that the checkpoint has them in."""
    from ....runtime import processes
    from ....runtime.files import save_synced

    named = {view.disk_name(index, name): tensor for name, tensor in tensors.items()}
    stored = {name: tensor.to(view.checkpoint.tensors[name].dtype) for name, tensor in named.items()}
    if stored and processes.leads():
        save_synced(_made_file(folder, index), stored, {})


def _made_file(folder: Path, index: int) -> Path:
    return folder / f"block-{index:05d}.safetensors"


def walk_back(
    skeleton: Skeleton,
    survey: Survey,
    take: Callable[[BlockBack], None],
    taken: Callable[[int], bool],
    *,
    metrics: bool = False,
) -> None:
    """Take gradients back from the end of the model over every block, unless what they gave is all there; the arguments
    are those of `reverse_walk`."""
    from ....calibrate.curvature import reverse_walk
    from ....runtime import processes

    def known(index: int) -> bool:
        return processes.once(lambda: taken(index))

    windows = survey.task if survey.task is not None else survey.windows
    assert windows is not None
    blocks = skeleton.blocks
    if not all(map(known, range(blocks))):
        passed = survey.passed(2 * blocks)
        reverse_walk(skeleton, windows, survey.folder / "back", take, passed, taken=known, metrics=metrics)


def change_experts(
    original: Skeleton,
    changed: Skeleton,
    survey: Survey,
    folder: Path,
    change: Callable[[int, Routed, list[Member]], None],
    final: Skeleton,
    parts: Sequence[str],
) -> None:
    """Walk over a model and its changed form, let `change` rewrite the experts of each block by its number, and keep
    some parts of them in a folder as `final` has them.

    Raises:
        ResourceError: the folder lacks blocks that an interrupted walk had been over.
    """
    from ....calibrate.refit import members_of, refit_blocks

    assert survey.windows is not None

    def rewrite(index: int, layer: nn.Module, routed: Routed) -> None:
        members = members_of(changed, layer)
        change(index, routed, members)
        new = {f"{m.name}.{part}.weight": getattr(m.module, part).weight for m in members for part in parts}
        save_made(final, index, new, folder)

    def done(index: int, error: float | None) -> None:
        survey.passed(original.blocks)(index)
        if error is not None:
            survey.listener(ExpertsChanged(index, error))

    refit_blocks(original, changed, survey.windows, survey.folder / "refit", rewrite, done)
    blocks = (n for n in range(final.blocks) if any(final.family.expert(name) is not None for name in final.linears(n)))
    if gone := [index for index in blocks if not _made_file(folder, index).is_file()]:
        raise ResourceError(
            f"{folder}: what was made of block {gone[0]} is gone; the same command with --resume makes all of it anew"
        )


def back_cost(skeleton: Skeleton, samples: int, sequence_length: int, *, metrics: bool = False) -> Cost:
    """Of `walk_back`."""
    from ....calibrate.curvature import curvature_cost

    memory, disk, left, flops = curvature_cost(skeleton, samples, sequence_length, metrics=metrics)
    return Cost(BUFFERS + memory, disk - left, left, flops)


def walk_cost(skeleton: Skeleton, samples: int, sequence_length: int) -> Cost:
    """Of running the model once over calibration text, block by block."""
    from ....calibrate.chains import BATCH_TOKENS
    from ....calibrate.routing import SAMPLE_TOKENS
    from ....runtime.model.drafting import drafters

    tokens, hidden, item = samples * sequence_length, skeleton.width, skeleton.dtype.itemsize
    shapes = [[(w.out_features, w.in_features) for w in skeleton.linears(n).values()] for n in range(skeleton.blocks)]
    block = max(sum(rows * columns for rows, columns in block) for block in shapes)
    widest = max(max(shape) for block in shapes for shape in block)
    held = block * item if skeleton.copies else 0
    if drafters(skeleton):  # each beside the last block, with what joins its two inputs
        held += held + 8 * skeleton.config.hidden_size**2
    batch = max(1, BATCH_TOKENS // sequence_length) * sequence_length
    running = batch * ((3 * item + 8) * widest + 12 * hidden)
    parameters = sum(rows * columns for block in shapes for rows, columns in block)
    samples_kept = 4.0 * skeleton.blocks * min(tokens, SAMPLE_TOKENS) * hidden
    return Cost(BUFFERS + held + running, 8.0 * tokens * hidden, samples_kept, 2.0 * tokens * parameters)


def sample_cost(skeleton: Skeleton, *, corrected: bool) -> Cost:
    """Of giving a sample of tokens to every expert of a block; of a correction, to those that stay too."""
    from ....calibrate.routing import SAMPLE_TOKENS

    count, hidden, width = _sizes(skeleton)
    held = _converted(skeleton) + 12.0 * hidden * width + 8.0 * (1 + corrected) * count * SAMPLE_TOKENS * hidden
    left = skeleton.blocks * count * hidden * width * skeleton.checkpoint.dtype.itemsize if corrected else 0
    return Cost(BUFFERS + held, left=float(left))


def merge_cost(skeleton: Skeleton, keep: int, *, compared: bool) -> Cost:
    """Of merging: a block's experts in float32, before and after; neurons that are compared; new weights on disk."""
    count, hidden, width = _sizes(skeleton)
    held = _converted(skeleton) + 24.0 * count * hidden * width + 8.0 * compared * keep * width * (hidden + 1024)
    left = 3.0 * skeleton.blocks * keep * hidden * width * skeleton.checkpoint.dtype.itemsize
    return Cost(BUFFERS + held, left=left)


def _converted(skeleton: Skeleton) -> float:
    """Bytes of a block's weights where they are not those of the file."""
    if not skeleton.copies:
        return 0.0
    count, hidden, width = _sizes(skeleton)
    return 3.0 * count * hidden * width * skeleton.dtype.itemsize


def check_stream(step: str, skeleton: Skeleton) -> None:
    """Refuse to fit experts to what leaves a block, where that is more than they add to."""
    if skeleton.wide is not None:
        hint = "; set refit: false" if step == "expert_prune" else ""
        raise RecipeError(
            f"{step}: experts are fitted to the residual stream, and blocks of this model hand on more than that{hint}"
        )


def check_samples(step: str, samples: int) -> None:
    """Refuse to fit to a single sample, of which none could be held out."""
    if samples < 2:
        raise RecipeError(
            f"data.samples: {step} fits to some samples and tries the fit on others, so it takes two or more (or "
            "refit: false)"
        )


def check_tokens(step: str, skeleton: Skeleton, samples: int, sequence_length: int) -> None:
    """Refuse to weigh errors of outputs by so few tokens that nothing is known of them."""
    from ....calibrate.curvature import fewest

    if samples * sequence_length < (least := fewest(skeleton.config.hidden_size)):
        raise RecipeError(
            f"data.samples: {step} with objective: model takes {least:,} tokens or more of this model; "
            "objective: layer takes fewer"
        )


def metric_cost(skeleton: Skeleton) -> Cost:
    """Of choosing neurons in a metric of their block's outputs: that and its copies, and what columns of down cost."""
    count, hidden, width = _sizes(skeleton)
    flops = 2.0 * skeleton.blocks * count * hidden**2 * width
    return Cost(20.0 * hidden**2 + 16.0 * hidden * width, flops=flops)


def refit_cost(changed: Skeleton, samples: int, sequence_length: int, parts: int = 1) -> Cost:
    """Of `change_experts`: two blocks, five sets of down projections, a moment for each expert; `parts` of experts on
    disk."""
    from ....calibrate.chains import BATCH_TOKENS
    from ....calibrate.refit import ITERATIONS

    count, hidden, width = _sizes(changed)
    walk = walk_cost(changed, samples, sequence_length)
    tokens, top_k = samples * sequence_length, changed.experts_per_token
    solving = 20.0 * count * hidden * width + 8.0 * count * width**2 + 16.0 * width**2
    solving += 4.0 * BATCH_TOKENS * (top_k * width + 3 * hidden)
    spilled = tokens * (hidden * (4 + changed.dtype.itemsize) + 8 * top_k)
    left = parts * changed.blocks * count * hidden * width * changed.checkpoint.dtype.itemsize
    flops = 2.0 * tokens * hidden * width * top_k * changed.blocks * 4 * (ITERATIONS + 2)
    return Cost(2 * walk.memory + solving, 2 * walk.disk + spilled, float(left) + walk.left, 3 * walk.flops + flops)


def _sizes(skeleton: Skeleton) -> tuple[int, int, int]:
    """Experts of a block, their input width, their neurons."""
    from ....calibrate.routing import experts_of

    blocks = skeleton.layers
    experts = next(found for layer in blocks if (found := experts_of(skeleton, layer)) is not None)
    first: Any = next(iter(experts))
    rows, columns = first.gate_proj.weight.shape
    return len(experts), columns, rows
