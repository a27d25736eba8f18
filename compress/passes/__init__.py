"""Every pass by its name in recipes: the parser, the schema and the docs follow this list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Union, get_args

from pydantic import Field

from .base import Pass
from .linear.armor import ArmorPass
from .linear.awq import Awq
from .linear.eora import Eora
from .linear.from_stored import FromStored
from .linear.gptq import Gptq
from .linear.lorc import Lorc
from .linear.outlier_columns import OutlierColumns
from .linear.rtn import Rtn
from .linear.smoothquant import SmoothQuant
from .linear.sparse24 import SparsePass
from .model.expert_prune import ExpertPrune
from .model.expert_width import ExpertWidth
from .model.rotate import Rotate

_ALL: tuple[type[Pass], ...] = (
    Rtn,
    Gptq,
    Awq,
    SmoothQuant,
    OutlierColumns,
    SparsePass,
    ArmorPass,
    Eora,
    FromStored,
    Lorc,
    ExpertPrune,
    ExpertWidth,
    Rotate,
)


def kind_of(kind: type[Pass]) -> str:
    """The name of a pass in recipes, which its only `kind` is."""
    [name] = get_args(kind.model_fields["kind"].annotation)
    return str(name)


PASSES: dict[str, type[Pass]] = {kind_of(kind): kind for kind in _ALL}
if TYPE_CHECKING:
    AnyPass = Any
else:
    AnyPass = Annotated[Union[_ALL], Field(discriminator="kind")]  # noqa: UP007 (of a tuple)
