"""GGUF: an output's numbers in a file that llama.cpp runs.

What a model is called there, in what order its rows are, how its tokenizer is told: llama.cpp's own converter knows
that for every family. It is taken from a file of the same model in 16 bits, whose matrices are replaced.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...runtime.errors import ModelError, RecipeError, ResourceError
from ...runtime.files import sync_folder
from ...runtime.schemes import BlockScaled, Operator
from ...runtime.stored import StoredModel, open_model
from .ggml import fitting, packed, rounded_scales
from .verify import check_files

_NEAR = 0.02  # by how much tensors that are not compressed may differ from those of the file
_LIKE = 0.7  # and matrices from what they were rounded from; rows in another order differ by 1.4
_ONE_EXPERT = re.compile(r"(\.experts)\.(\d+)\.")
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Written:
    """What an export wrote.

    Attributes:
        size: bytes of the file.
        kinds: ggml type → how many tensors.
        rounded: the largest share by which half precision was off of a scale.
    """

    size: int
    kinds: dict[str, int]
    rounded: float


def export_gguf(folder: Path, out: Path, like: Path, *, overwrite: bool = False) -> Written:
    """Write an output as a GGUF file, a tensor at a time.

    Args:
        like: a GGUF file of the same model in 16 or 32 bits.

    Raises:
        RecipeError: the file is of another model, or of one that passes have changed elsewhere than in matrices.
        VerifyError: the folder is not what its manifest says.
        ResourceError: the output is in the way, or cannot be written.
    """
    model, reader = open_model(folder), _reader(like)
    if not isinstance(model, StoredModel):
        raise ModelError(f"{folder}: nothing in it is compressed; llama.cpp's converter makes a GGUF file of it")
    if out.exists() and not overwrite:
        raise ResourceError(f"{out}: exists; --overwrite replaces it")
    if out.exists() and out.samefile(like):
        raise ResourceError(f"{out}: is the file that --like names; write another")
    check_files(folder)
    export = _Export(model, reader, like)
    part = out.with_name(out.name + ".part")
    try:
        kinds = export.write(part)
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        part.replace(out)
        sync_folder(out.parent)
    except OSError as error:
        reason = error.strerror or "no room for all of it"  # which numpy tells without a number
        raise ResourceError(f"{out}: cannot be written ({reason}); free some space or write elsewhere") from None
    finally:
        part.unlink(missing_ok=True)
    return Written(out.stat().st_size, kinds, export.rounded)


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise RecipeError("GGUF files need the package gguf: pip install 'compressor[gguf]'") from None
    try:
        return GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ModelError(f"{path}: not readable as a GGUF file ({error})") from None


class _Export:
    """One export: which of our tensors are which of the file's, and what becomes of them.

    Attributes:
        rounded: as of `Written`.
    """

    def __init__(self, model: StoredModel, reader: Any, like: Path) -> None:
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

        self.model, self.reader, self.like, self.rounded = model, reader, like, 0.0
        self.architecture = self._said("general.architecture")
        known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
        if self.architecture not in known:
            raise RecipeError(f"{like}: the package gguf does not know {self.architecture!r} models; a newer one may")
        arch: MODEL_ARCH = known[self.architecture]
        names = get_tensor_name_map(arch, int(self._said(f"{self.architecture}.block_count")))
        self.ours: dict[str, list[str]] = {}
        for name in sorted(model.tensors, key=_by_expert):
            there = names.get_name(_ONE_EXPERT.sub(r"\1.", name), try_suffixes=(".weight", ".bias"))
            if there is None:
                raise RecipeError(f"{like}: there is no place for {name} in a {self.architecture} model")
            self.ours.setdefault(there, []).append(name)
        missing = set(self.ours) - {tensor.name for tensor in reader.tensors}
        if model.config.get("tie_word_embeddings"):
            missing -= {"output.weight"}
        if missing:
            raise RecipeError(f"{like}: has no {min(missing)}, which {self.ours[min(missing)][0]} would be")

    def _said(self, key: str) -> Any:
        field = self.reader.get_field(key)
        if field is None:
            raise ModelError(f"{self.like}: says nothing of {key}")
        return field.contents()

    def write(self, path: Path) -> dict[str, int]:
        """The file; how many tensors there are of each ggml type."""
        from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

        writer, kinds = GGUFWriter(path, self.architecture), dict[str, int]()
        for tensor in self.reader.tensors:
            kind = self._kind(tensor)
            kinds[kind] = kinds.get(kind, 0) + 1
        main = max((kind for kind in kinds if kind not in _FLOATS), key=lambda kind: kinds[kind], default="BF16")
        for key, field in self.reader.fields.items():
            if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
                writer.add_key_value(key, field.contents(), field.types[0], *field.types[1:][-1:])
        told = [f"MOSTLY_{main}", f"MOSTLY_{main}_M"]
        known = (getattr(LlamaFileType, name) for name in told if hasattr(LlamaFileType, name))
        writer.add_file_type(next(known, LlamaFileType.MOSTLY_BF16))
        if "general.quantization_version" not in self.reader.fields:
            writer.add_quantization_version(2)
        for tensor in self.reader.tensors:
            for name, (shape, raw) in self._outlines(tensor).items():
                nbytes = _product(shape) * (4 if raw == "F32" else 1)
                dtype = "float32" if raw == "F32" else "uint8"
                writer.add_tensor_info(name, shape, _numpy(dtype), nbytes, GGMLQuantizationType[raw])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in self.reader.tensors:
            for piece in self._pieces(tensor):
                writer.write_tensor_data(piece.numpy())
        writer.close()
        return kinds

    def _operators(self, tensor: Any) -> list[Operator]:
        """What stands for a tensor of the file, on `meta`; nothing where it is not a compressed matrix."""
        linears = [name.removesuffix(".weight") for name in self.ours.get(tensor.name, ())]
        if not linears or any(name not in self.model.schemes for name in linears):
            return []
        return [self.model.outline(name) for name in linears]

    def _kind(self, tensor: Any) -> str:
        found = {fitting(operator) for operator in self._operators(tensor)}
        own: str = tensor.tensor_type.name
        return (found.pop() or own) if len(found) == 1 else own

    def _outlines(self, tensor: Any) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name → shape (in bytes for what is not F32) and type of what is written for a tensor of the file."""
        kind, shape = self._kind(tensor), tuple(int(n) for n in reversed(tensor.shape))
        if kind == "F32":
            return {tensor.name: (shape, kind)}
        found = {tensor.name: ((*shape[:-1], _row_bytes(kind, shape[-1])), kind)}
        if kind == "NVFP4":
            found[tensor.name.removesuffix(".weight") + ".scale"] = ((max(1, _product(shape[:-2])),), "F32")
        return found

    def _pieces(self, tensor: Any) -> Iterator[Tensor]:
        """What is written for a tensor of the file, in the order of `_outlines`.

        Raises:
            RecipeError: it is not what the output has in its place.
        """
        from gguf import GGMLQuantizationType, dequantize, quantize

        own, kind, names = tensor.tensor_type.name, self._kind(tensor), self.ours.get(tensor.name, [])
        if names and own not in _FLOATS:
            raise RecipeError(f"{self.like}: {tensor.name} is {own}; --like wants a file of 16 or 32 bits")
        compressed = bool(self._operators(tensor))
        rows, scales = [], []
        theirs = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()) if names else torch.empty(0)
        pieces = list(theirs) if len(names) > 1 else [theirs][: len(names)]
        if len(pieces) != len(names):
            raise RecipeError(f"{self.like}: {tensor.name} has {len(pieces)} experts, {self.model.path} {len(names)}")
        for name, one in zip(names, pieces, strict=True):
            operator = self.model.operator(name.removesuffix(".weight")) if compressed else None
            ours = self.model.tensor(name).float() if operator is None else operator.dense()
            order = self._order(name, one, ours, _NEAR if operator is None else _LIKE)
            if operator is not None and kind == own:
                rows.append(torch.from_numpy(quantize(ours[order].numpy(), GGMLQuantizationType[own])))
            elif operator is not None:
                rows.append(packed(operator)[order])
                self.rounded = max(self.rounded, rounded_scales(operator))
            if isinstance(operator, BlockScaled) and operator.global_scale is not None:
                scales.append(1 / operator.global_scale)
        if not compressed:
            yield torch.from_numpy(tensor.data.copy())
            return
        yield torch.stack(rows) if len(names) > 1 else rows[0]
        if kind == "NVFP4":
            yield torch.cat(scales)

    def _order(self, name: str, theirs: Tensor, ours: Tensor, near: float) -> Tensor:
        """In which order the file has the rows of a tensor: as they are, or with pairs that a rotary embedding turns
        side by side.

        Args:
            near: by how much it may differ, as a share of it.
        """
        if theirs.shape == ours.shape:
            for order in self._orders(len(ours)):
                off = float((theirs - ours[order]).norm())
                if ours.dim() == 1:  # weights of some norms are stored there with one added
                    off = min(off, float((theirs - ours - 1).norm()))
                if off <= near * float(theirs.norm()):
                    return order
        raise RecipeError(
            f"{self.like}: {name} is not what it is in {self.model.path}; if the two are of one model, a pass has "
            "changed more than matrices: give --like what llama.cpp's converter makes of `compressor export OUT DENSE`"
        )

    def _orders(self, rows: int) -> Iterator[Tensor]:
        yield torch.arange(rows)
        for key in ("attention.head_count", "attention.head_count_kv"):
            field = self.reader.get_field(f"{self.architecture}.{key}")
            heads = field.contents() if field is not None else 1
            if isinstance(heads, int) and rows % (2 * heads) == 0:
                yield torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def _by_expert(name: str) -> tuple[str, int]:
    found = _ONE_EXPERT.search(name)
    return _ONE_EXPERT.sub(r"\1.", name), int(found[2]) if found else 0


def _row_bytes(kind: str, columns: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return columns // block * size


def _product(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _numpy(name: str) -> Any:
    import numpy

    return numpy.dtype(name)
