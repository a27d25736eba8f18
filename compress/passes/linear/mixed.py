"""Bits where they matter: how many each weight gets, and in what groups, by what that does to the answers of the model.

Every linear is rounded to each of the widths (`gptq`: by one sweep), on inputs of the original model, and what that
will cost the answers is foretold (`calibrate/foretell.py`): errors of different linears hardly interact, so that costs
add up. The embedding and the head, where targets name them, are rounded to `PROBED` bits on their own while the rest of
the model stays as it is, and KL(original ‖ so rounded) is measured; otherwise rounded it is taken to be as the squares
of the errors. Sets of linears that read the same input, and all experts of a block, then get bits so that the sum of
KLs is least for so many bytes (`compress/solvers/bits.py`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from ....runtime.errors import RecipeError
from ...events import Allocated
from ..base import BUFFERS, Cost, LinearPass, Need
from .calibrated import ROWS

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from ....calibrate.curvature import BlockBack, Curvature
    from ....calibrate.statistics import Statistics
    from ....kernels.numbers import Rounding
    from ....runtime.model.skeleton import Skeleton
    from ....runtime.schemes import Operator
    from ..base import Survey

PROBED = 3
_DEFINED = 1  # how often what the embedding and the head lose was defined anew, for figures that are kept
CURVE = 12  # parts of what lies between the fewest bits everywhere and the most, of which is told what they would cost
Width = Literal[2, 3, 4, 5, 6, 8]
_WIDTHS: tuple[Width, ...] = (2, 3, 4, 5, 6, 8)
_OF_MIXED = ("average_bits", "choices", "group_sizes", "experts_alike", "widths", "sizes")
_EXPERT, _EXPERTS = re.compile(r"\.experts\.\d+\."), ".experts.*."

Sets = Mapping[str, tuple[str, ...]]  # the first of some linears, an expert's number aside → their disk names
Size = Literal[-1, 16, 32, 64, 128, 256]
Option = tuple[int, int | None]  # bits, and columns that share a scale; None: as for other bits
RoundingOf = Callable[[Option, int], "Rounding"]  # of a choice, for so many columns


class Mixed(LinearPass):
    """Options of a pass that stores integers: how many bits, or how they are found."""

    bits: Literal[2, 3, 4, 5, 6, 8, "mixed"] = Field(
        4,
        description="bits of an integer, scales not counted; mixed: as many for each linear as serve the model best, "
        "average_bits in all, found on calibration text; linears that read the same input get the same",
    )
    average_bits: float | None = Field(
        None, gt=0, le=16, description="with bits: mixed, bits per weight of what targets name, scales counted"
    )
    choices: tuple[Width, ...] = Field(
        _WIDTHS, description="with bits: mixed, the bits among which each linear's are chosen"
    )
    group_sizes: tuple[Size, ...] = Field(
        (),
        description="with bits: mixed, the sizes of groups (-1: one scale a row) among which each linear's is chosen, "
        "too; one that does not divide the columns of a linear stands for group_size there; default: group_size",
    )
    experts_alike: bool = Field(
        False,
        description="with bits: mixed, all experts of the model get the same bits and groups, and so do all other "
        "linears, for engines that take models with experts in no more forms",
    )
    widths: dict[str, Width] | None = Field(
        None,
        description="with bits: mixed, the bits of each linear by its name; default: what the survey finds and fills "
        "in here",
    )
    sizes: dict[str, Size] | None = Field(
        None, description="with bits: mixed and group_sizes, those of each linear, as widths are its bits"
    )
    _sets: list[Sets] = PrivateAttr(default_factory=list)
    _nominal: bool = PrivateAttr(default=False)  # whether the widths are there to be replaced
    _budget: float = PrivateAttr(default=0.0)  # bytes

    @field_validator("choices")
    @classmethod
    def _rising(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _average_is_of_mixed(self) -> Self:
        if self.bits != "mixed":
            self._refuse_idle("without bits: mixed", *_OF_MIXED)
        elif self.average_bits is None and self.widths is None:
            raise ValueError("bits: mixed needs average_bits")
        elif len(self._options) < 2:
            raise ValueError("bits: mixed needs two choices at least, or two group_sizes")
        elif self.sizes is not None and self.sizes.keys() != (self.widths or {}).keys():
            raise ValueError("sizes are of the linears that widths names, all of them")
        return self

    def rounding(self, columns: int, name: str) -> Rounding:
        """What a row of a linear, of `columns`, is rounded to.

        Args:
            name: on disk; of a factor, with its part behind it.
        """
        raise NotImplementedError

    def _integers(self, bits: int, columns: int, group_size: int | None = None) -> Rounding:
        """What rows of so many columns are rounded to in so many bits, by default in groups of `group_size`."""
        raise NotImplementedError

    def _offered(self, option: Option, columns: int) -> Rounding:
        """What rows of so many columns are rounded to by a choice, groups of a size that does not divide them aside."""
        bits, size = option
        return self._integers(bits, columns, size if size and columns % size == 0 else None)

    def _outline(self, operator: Operator, rounding: Rounding) -> Operator:
        """What becomes of plain floats, on `meta`."""
        raise NotImplementedError

    def width(self, name: str) -> int:
        """The bits of a linear, or of a factor of one."""
        if self.bits != "mixed":
            return self.bits
        assert self.widths is not None
        return self.widths.get(name) or self.widths[name.rpartition(".")[0]]

    def size(self, name: str) -> int | None:
        """The columns that share a scale in a linear, or in a factor of one, where that is its own."""
        sizes = self.sizes or {}
        return sizes.get(name) or sizes.get(name.rpartition(".")[0])

    @property
    def _options(self) -> list[Option]:
        """What is chosen among."""
        return [(bits, size) for bits in self.choices for size in self.group_sizes or (None,)]

    @property
    def needs(self) -> frozenset[Need]:
        open_yet = self.bits == "mixed" and (self.widths is None or self._nominal)
        return super().needs | frozenset({"text", "divergences", "foretold"} if open_yet else ())

    def wants(self, name: str) -> bool:
        if self.widths is not None:
            return name in self.widths
        return super().wants(name)

    def prepare(self, skeleton: Skeleton) -> Self:
        """With the same bits everywhere, which the survey distributes.

        Raises:
            RecipeError: not even the fewest bits are so few, or widths name what is not there.
        """
        if self.bits != "mixed":
            return self
        if self.widths is not None:
            known = {name for index in range(skeleton.blocks) for name in skeleton.linears(index)}
            if unknown := set(self.widths) - known - {name for name in skeleton.outer() if name in self.targets}:
                raise RecipeError(f"{self.kind}: widths names {min(unknown)}, which is no linear that targets name")
            return self
        result = self.model_copy()
        result._sets = [
            *sets_of(skeleton, self.wants),
            {name: (name,) for name in skeleton.outer() if self.names(name)},
        ]
        if not any(result._sets):
            raise RecipeError(f"{self.kind} finds no linear to work on: targets and ignore leave none")
        nbytes = result._nbytes(skeleton)
        weights, least, _ = result.sizes_of(skeleton, nbytes)
        assert self.average_bits is not None
        result._budget = self.average_bits * weights / 8
        if least > result._budget:
            raise RecipeError(
                f"{self.kind}: {min(self.choices)} bits everywhere are {8 * least / weights:.2f} bits per weight, "
                f"scales counted; ask for more than average_bits: {self.average_bits:g}"
            )
        return result._with_widths(skeleton, even_widths(nbytes, result._budget), nominal=True)

    def _tied(self, table: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
        """Sums over labels that get the same choice, by the first of them."""
        found: dict[str, list[float]] = {}
        for label, values in table.items():
            before = found.get(self._leader(label, table), [0.0] * len(values))
            found[self._leader(label, table)] = [a + b for a, b in zip(before, values, strict=True)]
        return found

    def _leader(self, label: str, labels: Iterable[str]) -> str:
        """The first of the labels that get the choice of this one."""
        if not self.experts_alike:
            return label
        return next(other for other in labels if (_EXPERTS in other) == (_EXPERTS in label))

    def sizes_of(
        self, skeleton: Skeleton, nbytes: Mapping[str, Sequence[float]] | None = None
    ) -> tuple[int, float, float]:
        """Of a prepared pass that shares bits out: how many weights its targets name, and what bytes they take at least
        and at most.

        Args:
            nbytes: of each set of linears at each choice, if that is known.
        """
        every = (name for sets in self._sets for names in sets.values() for name in names)
        costs = self._tied(nbytes or self._nbytes(skeleton)).values()
        return sum(math.prod(shape_of(skeleton, name)) for name in every), sum(map(min, costs)), sum(map(max, costs))

    def _nbytes(self, skeleton: Skeleton) -> dict[str, list[float]]:
        """Bytes of each set of linears at each choice."""
        import torch

        from ....runtime.schemes import Dense

        found: dict[str, list[float]] = {}
        for label, names in (item for sets in self._sets for item in sets.items()):
            found[label] = [0.0] * len(self._options)
            for name in names:
                shape = shape_of(skeleton, name)
                plain = Dense(torch.empty(shape, dtype=skeleton.checkpoint.dtype, device="meta"))
                for number, option in enumerate(self._options):
                    found[label][number] += self._outline(plain, self._offered(option, shape[1])).nbytes
        return found

    def _with_widths(self, skeleton: Skeleton, numbers: Mapping[str, int], *, nominal: bool = False) -> Self:
        """This pass with a choice for each label."""
        widths, sizes = dict[str, int](), dict[str, int]()
        for label, names in (item for sets in self._sets for item in sets.items()):
            option = self._options[numbers[label]]
            for name in names:
                widths[name] = option[0]
                sizes[name] = self._offered(option, shape_of(skeleton, name)[1]).columns
        result = self.model_copy(update={"widths": widths, "sizes": sizes if self.group_sizes else None})
        result._nominal = nominal
        return result

    @property
    def to_survey(self) -> bool:
        return self._nominal

    def survey(self, skeleton: Skeleton, survey: Survey) -> Self:
        """With the bits that rounding each set of linears on its own calls for."""
        if not self._nominal:
            return self
        found = dict(survey.foretold)
        if self._sets[-1]:
            asked = {**self._asked, "as": _DEFINED}
            found |= survey.recalled(asked, lambda: self._outer_costs(skeleton, survey))
        shared, (_, least, most) = self._shared(skeleton, found), self.sizes_of(skeleton)
        numbers, spent, lost = shared(self._budget)
        curve = [shared(least + part / CURVE * (most - least))[1:] for part in range(CURVE + 1)]
        survey.listener(Allocated(self.kind, spent, lost, [list(point) for point in curve]))
        return self._with_widths(skeleton, numbers)

    @property
    def _asked(self) -> dict[str, Any]:
        """What the figures depend on: all but how they are chosen among."""
        return self.model_dump(mode="json", exclude={*_OF_MIXED} - {"group_sizes"})

    @property
    def foretells(self) -> Mapping[str, Any] | None:
        return self._asked if self._nominal and any(self._sets[:-1]) else None

    def foretell(self, skeleton: Skeleton, back: BlockBack) -> dict[str, float]:
        """KL per token in nats for each label and option (`_place`)."""
        from ....calibrate.foretell import foretold

        every = self.model_copy(update={"choices": _WIDTHS})._options

        def offered(name: str) -> dict[Option, Rounding]:
            return {option: self._offered(option, shape_of(skeleton, name)[1]) for option in every}

        def changes(name: str, statistics: Statistics) -> Iterable[Tensor]:
            if not self.wants(name):
                return ()
            weight = skeleton.checkpoint.tensor(f"{name}.weight").to(skeleton.device)
            roundings = offered(name).values() if self._nominal else (self.rounding(weight.shape[1], name),)
            return self._errors(weight, list(dict.fromkeys(roundings)), statistics)

        alone = foretold(skeleton, back, changes, self._coupled, counted=self._counted)
        if not self._nominal:
            return {name: costs[0] for name, costs in alone.items()}
        sets, found = self._sets[back.index], dict[str, float]()
        for label, names in sets.items():
            found |= dict.fromkeys((_place(label, option) for option in every), 0.0)
            for name in names:
                if name not in alone:
                    continue  # an expert that no token came by costs nothing
                by_option = offered(name)
                costs = dict(zip(dict.fromkeys(by_option.values()), alone[name], strict=True))
                for option, rounding in by_option.items():
                    found[_place(label, option)] += costs[rounding]
        return found

    @property
    def _coupled(self) -> Callable[[Curvature], float] | None:
        """What is left of a linear's cost where the curvature couples its rows; None for a pass without it."""
        return None

    @property
    def _counted(self) -> bool:
        """Whether tokens count by place in the statistics that it asks for, where there is a curvature."""
        return False

    def expected(self, skeleton: Skeleton, foretold: Mapping[str, float]) -> float | None:
        if not self._nominal:
            return sum(foretold.values())
        if self._sets[-1]:
            return None  # what the embedding and the head lose is measured, in a run
        return self._shared(skeleton, foretold)(self._budget)[2]

    def _shared(
        self, skeleton: Skeleton, foretold: Mapping[str, float]
    ) -> Callable[[float], tuple[dict[str, int], float, float]]:
        """Budget → what each label gets, its bytes, and what that is expected to cost."""
        from ...solvers.bits import allocated

        labels, nbytes = [label for sets in self._sets for label in sets], self._nbytes(skeleton)
        losses = self._tied({label: [foretold[_place(label, option)] for option in self._options] for label in labels})
        nbytes = self._tied(nbytes)

        def shared(budget: float) -> tuple[dict[str, int], float, float]:
            numbers = allocated(losses, nbytes, budget)
            spent, lost = (sum(table[label][n] for label, n in numbers.items()) for table in (nbytes, losses))
            return {label: numbers[self._leader(label, labels)] for label in labels}, spent, lost

        return shared

    def foretelling(self, rows: int, columns: int) -> tuple[float, float]:
        every = self.model_copy(update={"choices": _WIDTHS})._options
        options = len({self._offered(option, columns) for option in every})
        solving = 2.0 * columns**3 + options * rows * columns * (4.0 * columns + 600.0)
        return 32.0 * columns**2 + 32.0 * rows * columns, solving

    def _outer_costs(self, skeleton: Skeleton, survey: Survey) -> dict[str, float]:
        """The same of the embedding and the head."""
        outer, options = self._sets[-1], self.model_copy(update={"choices": _WIDTHS})._options
        lost = probed(skeleton, survey, outer, self._offered)
        costs = scaled(skeleton, lost, outer, options, self._offered)
        return {
            _place(label, option): cost
            for label, measured in costs.items()
            for option, cost in zip(options, measured, strict=True)
        }

    def _errors(self, weight: Tensor, roundings: Sequence[Rounding], statistics: Statistics) -> Iterator[Tensor]:
        """What each of some roundings changes of a weight `[rows, columns]`, columns first."""
        exact = weight.float()
        for rounding in roundings:
            yield (_nearest(exact, rounding) - exact).T.contiguous()

    def survey_cost(self, skeleton: Skeleton, samples: int, sequence_length: int) -> Cost:
        from ....calibrate.divergences import divergences_cost

        outer = self._sets[-1] if self._nominal else {}
        if not outer:
            return Cost()
        tables = max(math.prod(shape_of(skeleton, name)) for name in outer)
        memory, disk, flops = divergences_cost(skeleton, samples, sequence_length, len(outer), 0, tables)
        return Cost(BUFFERS + memory, disk, 0.0, flops)

    @property
    def note(self) -> str:
        if self.widths is None:
            return ""
        counts = Counter((bits, self.size(name)) for name, bits in self.widths.items())
        found = ", ".join(
            f"{count} of {bits}" + (f" in groups of {size}" if size and size > 0 else " in one a row" if size else "")
            for (bits, size), count in sorted(counts.items(), key=lambda item: (item[0][0], item[0][1] or 0))
        )
        return f"linears by bits: {found}" + ("; the survey will share them out anew" if self._nominal else "")


def _place(label: str, option: Option) -> str:
    """By which figures of surveys are known."""
    bits, size = option
    return f"{label} {bits}" if size is None else f"{label} {bits} g{size}"


def shape_of(skeleton: Skeleton, name: str) -> tuple[int, ...]:
    """Of a matrix, by its disk name."""
    return tuple(skeleton.checkpoint.tensors[name + ".weight"].shape)


def sets_of(skeleton: Skeleton, wants: Callable[[str], bool]) -> list[Sets]:
    """For each block, the linears that get the same bits: those that engines fuse, and experts."""
    found: list[Sets] = []
    for index in range(skeleton.blocks):
        own: dict[str, list[str]] = {}
        for group in (group for stage in skeleton.stages(index) for group in stage):
            names = [name for name in (skeleton.disk_name(index, name) for name in group.linears) if wants(name)]
            if names:
                own.setdefault(_EXPERT.sub(_EXPERTS, names[0]), []).extend(names)
        found.append({label: tuple(names) for label, names in own.items()})
    return found


def even_widths(nbytes: Mapping[str, Sequence[float]], budget: float) -> dict[str, int]:
    """One number of a choice for all labels, the largest within a budget; the cheapest at least.

    Args:
        nbytes: label → of each choice.
    """
    sums = [sum(costs) for costs in zip(*nbytes.values(), strict=True)]
    fitting = [number for number, total in enumerate(sums) if total <= budget]
    most = max(fitting, key=lambda number: sums[number], default=min(range(len(sums)), key=sums.__getitem__))
    return dict.fromkeys(nbytes, most)


def probed(skeleton: Skeleton, survey: Survey, outer: Iterable[str], rounding: RoundingOf) -> dict[str, float]:
    """KL per token in nats of rounding the embedding or the head, and nothing else, to `PROBED` bits."""
    import torch

    from ....calibrate.divergences import divergences
    from ....runtime.model.skeleton import Skeleton

    def probe(name: str) -> Tensor:
        weight = _weight(skeleton, name)
        return _nearest(weight, rounding((PROBED, None), weight.shape[1]))

    assert survey.windows is not None
    exact = Skeleton(skeleton.checkpoint, torch.float32, skeleton.device)
    passed, tables = survey.passed(skeleton.blocks), {name: partial(probe, name) for name in outer}
    return divergences(exact, survey.windows, survey.folder, None, lambda index, seen: {}, passed, tables)


def scaled(
    skeleton: Skeleton,
    lost: Mapping[str, float],
    outer: Iterable[str],
    options: Sequence[Option],
    rounding: RoundingOf,
) -> dict[str, list[float]]:
    """The same for each of the options.

    Args:
        lost: for `PROBED` bits.
    """
    import torch

    tiny, found = torch.finfo(torch.float32).tiny, dict[str, list[float]]()
    for name in outer:
        weight, errors = _weight(skeleton, name), list[float]()
        for option in (*options, (PROBED, None)):
            rounded = _nearest(weight, rounding(option, weight.shape[1]))
            errors.append(float((rounded - weight).square().sum()))
        *of_choices, of_probe = errors
        found[name] = [max(lost[name], 0.0) * error / max(of_probe, tiny) for error in of_choices]
        skeleton.checkpoint.release()
    return found


def _weight(skeleton: Skeleton, name: str) -> Tensor:
    return skeleton.checkpoint.tensor(name + ".weight").to(skeleton.device).float()


def _nearest(weight: Tensor, rounding: Rounding) -> Tensor:
    import torch

    from ...solvers.grid import Steps, range_grid

    parts = []
    for rows in weight.split(ROWS):
        grid = range_grid(rows, rounding, Steps(torch.float32))
        parts.append(grid.values(grid.codes(rows)))
    return torch.cat(parts)
