"""What rtn and gptq share: the schemes that weights may be stored in, and the operator a grid and its codes make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from ....runtime.errors import RecipeError
from ..base import Need
from .calibrated import plain_floats
from .mixed import Mixed

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from typing_extensions import Self

    from ....calibrate.statistics import Statistics
    from ....kernels.numbers import Rounding
    from ....runtime.model.skeleton import Skeleton
    from ....runtime.schemes import Dense, Operator
    from ...solvers.grid import Grid, Steps


class Scheme(NamedTuple):
    """What weights and, when they run, their inputs are rounded to: names of `kernels.numbers.ROUNDINGS`; None stands
    for the pass's own integers, and for inputs as they come."""

    weights: str | None
    inputs: str | None


Name = Literal[
    "int", "int-a8", "int-afp8", "int8", "fp8", "fp8-block", "nvfp4a16", "nvfp4", "mxfp4a16", "mxfp4", "mxfp4-a8",
    "mxfp8a16", "mxfp8", "mxint8a16", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k",
]  # fmt: skip
K_QUANTS: tuple[Name, ...] = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
SCHEMES: dict[Name, Scheme] = {
    "int": Scheme(None, None),
    "int-a8": Scheme(None, "int8"),
    "int-afp8": Scheme(None, "fp8"),
    "int8": Scheme("int8", "int8"),
    "fp8": Scheme("fp8", "fp8"),
    "fp8-block": Scheme("fp8_block", "fp8_group"),
    "nvfp4a16": Scheme("nvfp4", None),
    "nvfp4": Scheme("nvfp4", "nvfp4"),
    "mxfp4a16": Scheme("mxfp4", None),
    "mxfp4": Scheme("mxfp4", "mxfp4"),
    "mxfp4-a8": Scheme("mxfp4", "mxfp8"),
    "mxfp8a16": Scheme("mxfp8", None),
    "mxfp8": Scheme("mxfp8", "mxfp8"),
    "mxint8a16": Scheme("mxint8", None),
    **{name: Scheme(name, None) for name in K_QUANTS},
}
_SIZES = (128, 64, 32)
_ROOM = 2.0  # above the largest input that calibration met, for scales of inputs that a number for all is part of


class Quantizer(Mixed):
    """Options of every quantizer."""

    blind = True

    scheme: Name = Field(
        "int",
        description="how weights are stored, and what their inputs are rounded to when the model runs. int: integers "
        "of `bits`, inputs as they come; int-a8, int-afp8: the same, inputs rounded to int8 or float8 token by token; "
        "int8: 8 bits, one scale a row, inputs alike (W8A8); fp8: the same in float8_e4m3, which bears outliers among "
        "the inputs; fp8-block: one scale for 128 x 128; nvfp4, mxfp4, mxfp8: floats of 4 or 8 bits in blocks of 16 "
        "or 32 with scales of 8 bits, inputs alike; those ending in a16: the same, inputs as they come; mxfp4-a8: "
        "mxfp4 that meets inputs in mxfp8; q2_k to q6_k: the types of llama.cpp that are called so, for export as GGUF",
    )
    group_size: int | Literal["auto"] = Field(
        "auto",
        description="columns of integers that share a scale: 16, 32, 64, 128 or 256; -1: one scale a row; auto: the "
        "largest of 128, 64 and 32 that divides the columns of a linear, as other engines want it, or 128 if none does",
    )
    symmetric: bool = Field(True, description="signed full-range scales; false: a zero point for each group")
    input_scales: Literal["token", "tensor"] = Field(
        "token",
        description="with scheme: int8 or fp8, what a scale of rounded inputs is of. token: one token, found when the "
        "model runs; tensor: all that enters a linear, from the largest input of the calibration text (static)",
    )

    @field_validator("group_size")
    @classmethod
    def _known_size(cls, value: int | str) -> int | str:
        if value not in ("auto", -1, 16, 32, 64, 128, 256):
            raise ValueError("group_size is 16, 32, 64, 128, 256, -1 (one scale a row) or auto")
        return value

    @model_validator(mode="after")
    def _own_integers(self) -> Self:
        if SCHEMES[self.scheme].weights is not None:
            self._refuse_idle(f"with scheme: {self.scheme}, which says it", "bits", "group_size", "symmetric")
        if self.scheme not in ("int8", "fp8"):
            self._refuse_idle(f"with scheme: {self.scheme}", "input_scales")
        return self

    def expected(self, skeleton: Skeleton, foretold: Mapping[str, float]) -> float | None:
        """Of weights: what rounding the inputs of a linear costs is not foretold."""
        return None if SCHEMES[self.scheme].inputs is not None else super().expected(skeleton, foretold)

    @property
    def _way_out(self) -> str:
        """What to set for inputs of which nothing has to be known before; empty where it is so."""
        if self.scheme == "nvfp4":
            return "scheme nvfp4a16, which leaves inputs as they come"
        return "input_scales: token, which finds scales when the model runs" if self.input_scales == "tensor" else ""

    @property
    def needs(self) -> frozenset[Need]:
        found = super().needs
        if not self._way_out:
            return found
        more: set[Need] = {"peak"} if found else {"reference", "peak"}
        return found | more

    def rounding(self, columns: int, name: str) -> Rounding:
        from ....kernels.numbers import ROUNDINGS

        scheme = SCHEMES[self.scheme].weights
        if scheme is not None:
            return ROUNDINGS[scheme]
        return self._offered((self.width(name), self.size(name)), columns)

    def _integers(self, bits: int, columns: int, group_size: int | None = None) -> Rounding:
        """A row shorter than a group is one group, -1."""
        from ....kernels.numbers import Rounding

        wanted, widest = group_size or self.group_size, _SIZES[0]
        fitting = (size for size in _SIZES if columns <= widest or columns % size == 0)
        size = next(fitting, widest) if wanted == "auto" else wanted
        return Rounding.integers(bits, size if size <= columns else -1, self.symmetric)

    def steps(self, weights: Sequence[Tensor], rounding: Rounding, dtype: torch.dtype) -> Steps:
        """How scales of weights are stored that read the same input.

        Args:
            dtype: of the model.
        """
        from ...solvers.grid import Steps

        largest = 1.0
        if rounding.scales == "e4m3":
            largest = max(float(weight.abs().max()) for weight in weights)
        return Steps.of(rounding, dtype, largest)

    def plan(self, name: str, operator: Operator, group: Mapping[str, Dense]) -> Operator:
        if operator.factors and self._way_out:
            raise RecipeError(
                f"{self.kind} does not know what enters the factors of {name}: ignore it, or take {self._way_out}"
            )
        return super().plan(name, operator, group)

    def planned(self, name: str, operator: Operator, group: Mapping[str, Dense]) -> Operator:
        """Codes, scales and zero points on `meta`, in the place of the plain floats of whatever holds them."""
        from ....runtime.schemes import Composite

        if isinstance(operator, Composite):
            return operator.with_inner(self.planned(name, operator.inner, group))
        dtype = plain_floats(self.kind, name, operator.numbers).weight.dtype
        columns = operator.shape[1]
        rounding = self.rounding(columns, name)
        if rounding.bits < 8 and SCHEMES[self.scheme].weights and columns % rounding.whole:
            raise RecipeError(
                f"{self.kind} cannot store {name} as {self.scheme}: its {columns} columns are not blocks of "
                f"{rounding.whole}; ignore it, or use integers"
            )
        try:
            return self._outline(operator, rounding, dtype)
        except NotImplementedError as error:
            raise RecipeError(
                f"{self.kind} cannot store {name} as {self.scheme}: {error}; ignore it, or leave scheme out"
            ) from None

    def _outline(self, operator: Operator, rounding: Rounding, dtype: torch.dtype | None = None) -> Operator:
        """What becomes of plain floats, on `meta`."""
        import torch

        from ....runtime.schemes import Dense
        from ...solvers.grid import Grid, Steps

        rows, columns = operator.shape
        dtype = operator.weight.dtype if isinstance(operator, Dense) else dtype
        assert dtype is not None
        scales = torch.empty(rows, -(-columns // rounding.span(columns)), dtype=dtype, device="meta")
        zeros, units = None if rounding.symmetric else scales, None
        if rounding.scales == "nested":
            units = torch.empty(rows, columns // rounding.whole, 2 - rounding.symmetric, device="meta")
        grid = Grid(scales, zeros, rounding, Steps.of(rounding, dtype), units)
        codes = torch.empty(rows, columns, dtype=_bytes_of(rounding), device="meta")
        return self.quantized(codes, grid, operator)

    def quantized(self, codes: Tensor, grid: Grid, leaf: Operator, statistics: Statistics | None = None) -> Operator:
        """An operator of plain numbers with codes on a grid in their place.

        Args:
            codes: a byte each, `[rows, columns]`.
            statistics: of its inputs, where what they are rounded to needs them.
        """
        import torch

        from ....runtime.schemes import W8A8, BlockScaled, IntQuantized, KQuantized

        rounding, steps, (name, inputs) = grid.rounding, grid.steps, SCHEMES[self.scheme]
        if name is None:
            zeros = None if grid.zeros is None else grid.zeros.to(torch.int8)
            scales = grid.scales.to(steps.dtype)
            return leaf.coded(IntQuantized(codes, scales, zeros, rounding.bits, rounding.columns, inputs))
        if grid.units is not None:
            scales, mins = grid.levels()
            return leaf.coded(KQuantized(codes, scales, mins, grid.units.half(), name))
        if rounding.columns < 0:
            codes = codes if codes.dtype == torch.int8 else codes.view(torch.float8_e4m3fn)
            met = None if self.input_scales == "token" else self._input_scale(rounding, statistics, codes.device)
            return leaf.coded(W8A8(codes, grid.scales.to(steps.dtype), None if met is None else met.to(steps.dtype)))
        scales = (grid.scales[:: rounding.rows] / steps.unit).to(steps.dtype)
        scales = scales.view(torch.uint8) if steps.coarse else scales
        whole = None if rounding.scales != "e4m3" else _over(steps, scales.device)
        met = None if inputs != "nvfp4" else _over(self._input_steps(rounding, statistics), scales.device)
        return leaf.coded(BlockScaled(codes, scales, whole, name, inputs, met))

    def _input_steps(self, rounding: Rounding, statistics: Statistics | None) -> Steps:
        """How scales of rounded inputs are stored."""
        import torch

        from ...solvers.grid import Steps

        return Steps.of(rounding, torch.float32, _ROOM * _largest(statistics))

    def _input_scale(self, rounding: Rounding, statistics: Statistics | None, device: torch.device) -> Tensor:
        """`[1]`, by which the largest input is the largest number."""
        import torch

        return torch.full((1,), _largest(statistics) / rounding.numbers.high, device=device)


def _largest(statistics: Statistics | None) -> float:
    """The largest of some inputs; 1 where there were none."""
    return float(statistics.sums["peak"].max()) or 1.0 if statistics is not None and statistics.met else 1.0


def _over(steps: Steps, device: torch.device) -> Tensor:
    """What scales are divided by, as stored."""
    import torch

    return torch.full((1,), 1 / steps.unit, device=device)


def _bytes_of(rounding: Rounding) -> torch.dtype:
    import torch

    from ....kernels.numbers import Integers

    return torch.int8 if isinstance(rounding.numbers, Integers) else torch.uint8
