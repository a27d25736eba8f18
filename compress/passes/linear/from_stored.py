"""Linears as another folder has them: what some tool has compressed already, for passes behind to go on from.

EoRA was made for this (arXiv:2410.21271): the model as it was says what a checkpoint in few bits has lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PrivateAttr

from ....runtime.errors import RecipeError
from ...events import Event, LayerDone
from ..base import LinearPass, Pass, Survey

if TYPE_CHECKING:
    from ....calibrate.stage import StageWork
    from ....runtime.model.checkpoint import Checkpoint
    from ....runtime.model.skeleton import Skeleton
    from ....runtime.schemes import Dense, Operator


class FromStored(LinearPass):
    """Take linears as they are stored in a compressed version of the same model, such as GPTQ or AWQ left."""

    kind: Literal["stored"]
    model: str = Field(description="the compressed version: a folder, or a hub id")
    _compared: bool = PrivateAttr(default=False)

    @property
    def inputs(self) -> tuple[Path, ...]:
        return (self._stored.path,)

    @cached_property
    def _stored(self) -> Checkpoint:
        from ....runtime.hub import resolve_model
        from ....runtime.stored import open_model

        return open_model(resolve_model(self.model)[0])

    @property
    def to_survey(self) -> bool:
        return not self._compared

    def prepare(self, skeleton: Skeleton) -> Pass:
        """
        Raises:
            RecipeError: the folder is of another model.
        """
        from ....runtime.model.view import View

        if isinstance(skeleton.checkpoint, View):
            raise RecipeError(f"{self.kind} takes linears of the model as it was, which a pass before changes")
        ours, theirs = skeleton.checkpoint.tensors, self._stored.tensors
        for index in range(skeleton.blocks):
            for name in (f"{linear}.weight" for linear in skeleton.linears(index) if self.wants(linear)):
                if name not in theirs or theirs[name].shape != ours[name].shape:
                    has = f"has {name} as {list(theirs[name].shape)}" if name in theirs else f"has no {name}"
                    raise RecipeError(f"{self.kind}: {self.model} {has}; it is of another model")
        return self

    def survey(self, skeleton: Skeleton, survey: Survey) -> Pass:
        """
        Raises:
            RecipeError: what is beside the linears differs, so that these are of another basis.
        """
        import torch

        ours, theirs = skeleton.checkpoint, self._stored
        linears = {f"{name}.weight" for index in range(skeleton.blocks) for name in skeleton.linears(index)}
        beside = [name for names in ours.block_names() for name in names if name not in linears]
        stored = {f"{name}.weight" for name in getattr(theirs, "schemes", ())}  # such as an embedding in few bits
        for name in (name for name in [*beside, *ours.outside_names()] if name not in stored):
            exact = ours.tensor(name)
            if name not in theirs.tensors or not torch.equal(theirs.tensor(name).to(exact.dtype), exact):
                raise RecipeError(
                    f"{self.kind}: {name} is another in {self.model}, so that its linears go with other inputs (scales "
                    "were moved, or the model turned); nothing can go on from them against the model as it was"
                )
        for name in (f"{linear}.weight" for linear in skeleton.linears(0) if self.wants(linear)):
            exact = ours.tensor(name).float()
            if (theirs.tensor(name).float() - exact).norm() > exact.norm():
                raise RecipeError(f"{self.kind}: {name} in {self.model} is of another model")
        result = self.model_copy()
        result._compared = True
        return result

    def plan(self, name: str, operator: Operator, group: Mapping[str, Dense]) -> Operator:
        if operator.kind != "dense":
            raise RecipeError(f"{self.kind} cannot take {name}, which is compressed already: put it first")
        return self._stored.outline(name)

    def apply(self, work: StageWork) -> Iterator[Event]:
        from ....runtime.schemes import from_tensors

        for name in (name for names in work.groups for name in names if self.wants(name)):
            exact, operator = work.originals[name].float(), self._stored.operator(name)
            if exact.device.type != "cpu":
                tensors = {suffix: tensor.to(exact.device) for suffix, tensor in operator.to_tensors().items()}
                operator = from_tensors(tensors, operator.scheme())
            lost = (operator.dense() - exact).square().sum() / exact.square().sum().clamp(min=1e-30)
            work.linears[name] = operator
            yield LayerDone.of(name, self.kind, float(lost), operator, 0)
