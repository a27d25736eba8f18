"""Rotations that leave the function as it is and spread outliers over all channels, for passes behind to round better.

R1 turns the residual stream and R2 the values of each head, both folded into weights (`runtime/model/rotations.py`):
the output is a model like any other, and no engine has anything to do. Where the head is tied to the embedding, R1
unties it, for its rows take the gains of the last norm: the output has a matrix more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from ....runtime.errors import ModelError, RecipeError
from ..base import ModelPass

if TYPE_CHECKING:
    from torch import Tensor

    from ....runtime.model.checkpoint import Checkpoint
    from ....runtime.model.rotations import Rotation
    from ....runtime.model.skeleton import Skeleton


class Rotate(ModelPass):
    """Turn the residual stream (R1) and the values of each head (R2) into bases without outliers."""

    exact: ClassVar[bool] = True
    kind: Literal["rotate"]
    residual: bool = Field(
        True,
        description="turn the residual stream (R1): the embedding, the head, and every linear that reads or writes it; "
        "a head that is tied to the embedding becomes a matrix of its own",
    )
    values: bool = Field(
        True, description="turn the values of each head (R2), in the value and output projections; not with MLA"
    )
    seed: int | None = Field(
        0, ge=0, description="decides on the random signs of the rotations; null: no signs (plain Hadamard matrices)"
    )
    _width: int = PrivateAttr(default=0)
    _head: int = PrivateAttr(default=0)
    _centered: bool = PrivateAttr(default=False)
    _untied: bool = PrivateAttr(default=False)

    @model_validator(mode="after")
    def _one_at_least(self) -> Rotate:
        if not (self.residual or self.values):
            raise ValueError("with residual: false and values: false there is nothing to turn")
        return self

    def prepare(self, skeleton: Skeleton) -> Rotate:
        """With the widths of what is turned.

        Raises:
            RecipeError: the family's residual stream, or its values, cannot be turned.
        """
        from ....runtime.model.rotations import stream_width, value_width

        family, result = skeleton.family, self.model_copy()
        if not family.turns:
            raise RecipeError(f"{self.kind}: this family does something that no rotation can be folded into")
        if self.residual:
            if family.centered and self.seed is None:
                raise RecipeError(
                    f"{self.kind}: norms of this family subtract the mean, for which signs are needed: give a seed"
                )
            try:
                result._width = stream_width(skeleton)
            except ModelError as error:
                raise RecipeError(f"{self.kind}: {error}: set residual: false to turn values alone") from None
        if self.values:
            result._head = value_width(skeleton)
        if not (result._width or result._head):
            raise RecipeError(f"{self.kind}: values of this family are not there to be turned: set residual: true")
        result._centered, result._untied = family.centered, bool(result._width) and skeleton.tied
        return result

    @property
    def _stream(self) -> Rotation | None:
        from ....runtime.model.rotations import Rotation

        return Rotation(self._width, self.seed, self._centered) if self._width else None

    def rewritten(self, checkpoint: Checkpoint, skeleton: Skeleton) -> Checkpoint:
        from ....runtime.model.rotations import Rotation, rotated

        return rotated(skeleton, self._stream, Rotation(self._head, self.seed) if self._head else None)

    def stream(self, hidden: Tensor) -> Tensor:
        turn = self._stream
        return hidden if turn is None else turn(hidden)

    @property
    def note(self) -> str:
        what = [f"residual stream of {self._width}"] * bool(self._width) + [f"values of {self._head}"] * bool(
            self._head
        )
        return f"turns the {' and '.join(what)}" + ", head no more tied to the embedding" * self._untied
