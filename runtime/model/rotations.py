"""Rotations of the residual stream and of values, folded into the weights around them: the function stays the same.

`R1` and `R2` of SpinQuant (arXiv:2405.16406), with the orthogonal matrices of QuaRot (arXiv:2404.00456) for any width.
All that writes to the residual stream puts out `R1ᵀ` of what it did, all that reads it multiplies by R1, and norms,
whose gains move to their readers, see vectors of the same length. Where norms subtract the mean, R1 leaves the vector
of ones where it is, so that they subtract the same as before. R2 turns the values of each head, and what the output
projection reads of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .folds import multiplied, seams
from .skeleton import Skeleton
from .view import Derived, View, further_tensors, without_further_layers

Step = Callable[[Tensor], Tensor]

_FACTOR = 64  # rows of the largest power of two that one product multiplies by
ROWS = 4096  # of a matrix, in float32 at a time


def spread(size: int) -> list[Tensor]:
    """Symmetric orthogonal matrices, float32, whose Kronecker product is of `size` rows, has entries of like magnitude
    and a constant first row: Hadamard's for powers of two, Hartley's (`cos + sin`) for what is odd."""
    odd = size // (size & -size)
    exponent, most = (size // odd).bit_length() - 1, _FACTOR.bit_length() - 1
    count = -(-exponent // most)
    factors = [_hadamard((exponent + part) // count) for part in range(count)]
    if odd > 1 or not factors:
        angle = torch.arange(odd, dtype=torch.float64).outer(torch.arange(odd, dtype=torch.float64)).remainder(odd)
        angle *= 2 * math.pi / odd
        factors.append(((angle.cos() + angle.sin()) / odd**0.5).float())
    return factors


def _hadamard(exponent: int) -> Tensor:
    """Sylvester's, of `2 ** exponent` rows."""
    made = torch.ones(1, 1)
    for _ in range(exponent):
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made / len(made) ** 0.5


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix: `D H` with random signs D, or `H D H`, which keeps the vector of ones; H is `spread`.

    Attributes:
        size: numbers that it turns.
        seed: of the signs; None: all are 1.
        keeps_mean: whether the vector of ones stays as it is; then signs there have to be.
    """

    size: int
    seed: int | None = 0
    keeps_mean: bool = False

    @cached_property
    def _factors(self) -> list[Tensor]:
        return spread(self.size)

    @cached_property
    def _signs(self) -> Tensor:
        if self.seed is None:
            return torch.ones(self.size)
        generator = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(2, (self.size,), generator=generator).float() * 2 - 1
        signs[0] = 1
        return signs

    def __call__(self, rows: Tensor) -> Tensor:
        """`[..., size]` → its product with the matrix, float32, on the same device."""
        found = rows.float().reshape(-1, self.size)
        if self.keeps_mean:
            found = self._mixed(found)
        return self._mixed(found * self._signs.to(rows.device)).view(rows.shape)

    def _mixed(self, rows: Tensor) -> Tensor:
        """Rows times the Kronecker product, one factor after the other."""
        for factor in self._factors:  # each takes the foremost axis and leaves its own behind the others
            parts = rows.reshape(len(rows), len(factor), -1).transpose(1, 2)
            rows = (parts @ factor.to(rows.device)).reshape(len(rows), -1)
        return rows

    def each(self, rows: Tensor) -> Tensor:
        """`[..., n · size]` → every `size` numbers turned."""
        return self(rows.unflatten(-1, (-1, self.size))).flatten(-2)


def stream_width(skeleton: Skeleton) -> int:
    """Numbers of the residual stream, once it is known that it can be turned.

    Raises:
        ModelError: something of this family reads or writes it that no rotation can be folded into.
    """
    if skeleton.beside():
        raise ModelError("what the model sees or hears enters its residual stream, too, which nothing here turns")
    for name in skeleton.family.entrance:
        if not isinstance(skeleton.decoder.get_submodule(name), nn.Embedding):
            raise ModelError(f"{name} is in front of the first block, and cannot be turned")
    for index in range(skeleton.blocks):
        layer, read = skeleton.layers[index], {name for name, seam in seams(skeleton, index).items() if seam.norm}
        bare = [group.linears[0] for stage in skeleton.stages(index) for group in stage if not group.reads]
        bare = [name for name in bare if name not in skeleton.family.ends.values()]
        if bare:
            raise ModelError(f"{bare[0]} reads the residual stream with no norm before it")
        gains = [name.removesuffix(".weight") for name, found in layer.state_dict().items() if found.dim() == 1]
        behind = [name for name in gains if hasattr(layer, name) and name not in read]
        if behind:
            raise ModelError(f"{behind[0]} weighs channels of what is added to the residual stream")
        if unnamed := skeleton.unnamed(index):
            raise ModelError(f"nothing is known of what {unnamed[0]} reads and writes")
    return int(skeleton.config.hidden_size)


def value_width(skeleton: Skeleton) -> int:
    """Numbers of the values of a head that the output projection reads as they are; 0 where there are none."""
    found = set()
    for index in range(skeleton.blocks):
        for feeder, seam in seams(skeleton, index).items():
            if not seam.norm and feeder.startswith(skeleton.family.attention + "."):
                found.add(seam.channels // seam.heads[1])
    return found.pop() if len(found) == 1 else 0


@dataclass
class _Turned:
    """What becomes of a tensor, in order, in float32.

    Attributes:
        source: its name.
        gain: name of a norm's weight that multiplies its columns first.
        columns, rows: what each of its rows, and then each of its columns (or a bias) goes through.
    """

    source: str
    gain: str = ""
    columns: list[Step] = field(default_factory=list)
    rows: list[Step] = field(default_factory=list)

    def derived(self, offset: float) -> Derived:
        """The same for a view.

        Args:
            offset: what is added to a gain.
        """
        if not self.columns and not self.rows:
            return Derived((self.source,))
        make = partial(_made, columns=tuple(self.columns), rows=tuple(self.rows), offset=offset)
        return Derived(
            (self.source, self.gain) if self.gain else (self.source,), make, by_rows=not self.rows, anew=True
        )


def rotated(skeleton: Skeleton, stream: Rotation | None, values: Rotation | None) -> View:
    """The checkpoint of the same function whose residual stream and values are turned.

    Heads that are tied to the embedding are tied no more, and layers beyond the last block, which some models carry to
    predict several tokens, are left out where the stream is turned.

    Args:
        stream: R1, of `stream_width` numbers; None: the stream stays as it is.
        values: R2, of the numbers of a head; None: they stay.
    """
    source = skeleton.checkpoint
    config, names = source.config, list(source.tensors)
    if stream is not None:
        config = without_further_layers(source, {"tie_word_embeddings": False} if skeleton.tied else {})
        if "tie_word_embeddings" in config:
            config["tie_word_embeddings"] = config["tie_word_embeddings"] and not skeleton.tied
        gone = further_tensors(source)
        names = [name for name in names if name not in gone]
    table = {name: _Turned(name) for name in names}
    norms: dict[str, Derived] = {}
    if stream is not None:
        norms |= _turn_ends(skeleton, stream, table)
    for index in range(skeleton.blocks):
        if stream is not None:
            norms |= _turn_block(skeleton, index, stream, table)
        if values is not None:
            _turn_values(skeleton, index, values, table)
    offset = float(skeleton.family.offset_norms)
    return View(source, config, {name: turned.derived(offset) for name, turned in table.items()} | norms)


def _turn_ends(skeleton: Skeleton, turn: Rotation, table: dict[str, _Turned]) -> dict[str, Derived]:
    """The embedding, the head and the norm before it."""
    family = skeleton.family
    embedding, norm = (
        family.disk_name(f"{family.decoder}.{name}") for name in (f"{family.embedding}.weight", family.norm)
    )
    head = family.disk_name(f"{family.head}.weight")
    if skeleton.tied:
        table[head] = _Turned(embedding)
    table[head].gain = f"{norm}.weight"
    table[head].columns.append(turn)
    for place in family.entrance:
        table[family.disk_name(f"{family.decoder}.{place}.weight")].columns.append(turn)
    table[embedding].columns.append(turn)
    return _plain_norm(skeleton, norm, turn)


def _turn_block(skeleton: Skeleton, index: int, turn: Rotation, table: dict[str, _Turned]) -> dict[str, Derived]:
    """What reads the stream in a block, what writes to it, and the norms before that."""
    norms: dict[str, Derived] = {}
    for feeder, seam in seams(skeleton, index).items():
        if not seam.norm or "." in feeder:  # norms inside attention see something else
            continue
        norm = skeleton.disk_name(index, feeder)
        for name in seam.readers:
            reader = table[skeleton.disk_name(index, f"{name}.weight")]
            reader.gain = f"{norm}.weight"
            reader.columns.append(turn)
        norms |= _plain_norm(skeleton, norm, turn)
    for name in writers(skeleton, index):
        table[skeleton.disk_name(index, f"{name}.weight")].rows.append(turn)
        bias = skeleton.disk_name(index, f"{name}.bias")
        if bias in table:
            table[bias].rows.append(turn)
    return norms


def writers(skeleton: Skeleton, index: int) -> list[str]:
    """Linears of a block that add to the residual stream, by their names in memory."""
    modules, ends = dict(skeleton.layers[index].named_modules()), skeleton.family.ends.values()
    return [
        name
        for stage in skeleton.stages(index)
        for group in stage
        for name in group.linears
        if name in ends or hasattr(modules.get(group.reads), "in_features")
    ]


def _turn_values(skeleton: Skeleton, index: int, turn: Rotation, table: dict[str, _Turned]) -> None:
    """Values of a block and what its output projection reads of them, head by head."""
    for feeder, seam in seams(skeleton, index).items():
        if seam.norm or not feeder.startswith(skeleton.family.attention + "."):
            continue
        last = partial(_last_turned, turn=turn, count=seam.channels)
        table[skeleton.disk_name(index, f"{feeder}.weight")].rows.append(last)
        bias = skeleton.disk_name(index, f"{feeder}.bias")
        if bias in table:
            table[bias].rows.append(last)
        for name in seam.readers:
            table[skeleton.disk_name(index, f"{name}.weight")].columns.append(turn.each)


def _plain_norm(skeleton: Skeleton, norm: str, turn: Rotation) -> dict[str, Derived]:
    """A norm whose gains its readers have taken."""
    checkpoint, weight, bias = skeleton.checkpoint, f"{norm}.weight", f"{norm}.bias"
    plain = 1.0 - float(skeleton.family.offset_norms)
    found = {weight: Derived((weight,), lambda gain: torch.full_like(gain, plain))}
    if bias in checkpoint.tensors:
        if bool((checkpoint.tensor(weight) == 0).logical_and(checkpoint.tensor(bias) != 0).any()):
            raise ModelError(f"{weight} has a gain of 0 where {bias} is not, which its readers cannot take over")
        found[bias] = Derived((bias, weight), partial(_bias, turn=turn))
    return found


def _bias(bias: Tensor, gain: Tensor, *, turn: Rotation) -> Tensor:
    """A norm's bias behind readers that multiply by its gains."""
    return turn(torch.where(gain == 0, 0.0, bias.float() / gain.float())).to(bias.dtype)


def _last_turned(rows: Tensor, *, turn: Rotation, count: int) -> Tensor:
    """The last `count` numbers of each row turned, head by head."""
    return torch.cat([rows[..., :-count], turn.each(rows[..., -count:])], -1)


def _made(
    tensor: Tensor, gain: Tensor | None = None, *, columns: Sequence[Step], rows: Sequence[Step], offset: float
) -> Tensor:
    """A tensor turned, in its own dtype, some rows at a time where each is made of one."""
    if len(tensor) > ROWS and not rows:
        result = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for part, out in zip(tensor.split(ROWS), result.split(ROWS), strict=True):
            out.copy_(_made(part, gain, columns=columns, rows=rows, offset=offset))
        return result
    found = tensor.float()
    if gain is not None:
        found = multiplied(found, columns=gain.float() + offset)
    for step in columns:
        found = step(found)
    for step in rows:
        found = step(found.t()).t()
    return found.to(tensor.dtype).contiguous()
