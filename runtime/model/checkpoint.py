"""A Hugging Face model folder, read lazily: headers first, tensors one at a time, memory mapped.

Folders come from strangers: file names may not leave the folder, headers are checked against file sizes before use
(by safetensors itself), index and shards must agree, and pickled weights are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ModelError, first_line
from ..files import PIECE
from ..memory import available_memory
from ..schemes import Dense, Operator
from .disk_experts import Slice, as_published, slices
from .families import APART, BLOCKS, FAMILIES, Family, block_index, blocks_of, family_of, text_config

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_FURTHER = f"{APART}{BLOCKS}."
_ADVISED = 1 << 17  # bytes that a system reads ahead at least of what it is told to: of more, it may read no more
_EXPERTS = 100_000  # or more are not looked for
_SIDE_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE",
)  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Checkpoint:
    """One model folder.

    Args:
        family: of the model, where that is known before it is looked for.

    Attributes:
        path: the folder.
        config: `config.json` as a dictionary.
        tensors: name → `TensorInfo`, in the order of the files.
        stored: the same for what lies on disk; differs from `tensors` in compressed folders, and where experts are
            fused (`runtime/model/disk_experts.py`).

    Raises (from the constructor):
        ModelError: anything wrong with the folder, in one line.
    """

    def __init__(self, path: Path, family: Family | None = None) -> None:
        self.path, self._given = Path(path), family
        if not self.path.is_dir():
            raise ModelError(f"{self.path}: no such model folder")
        self.config = self._config()
        self._open: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.stored: Mapping[str, TensorInfo] = self.tensors
        self._slices: dict[str, Slice] = {}
        self._read_files()
        if not any(info.dtype.is_floating_point for info in self.tensors.values()):
            raise ModelError(f"{self.path}: the weight files hold no tensor of floating-point numbers")
        self._unfuse()

    @cached_property
    def family(self) -> Family:
        if self._given is not None:
            return self._given
        try:
            return family_of(self.config, self.tensors, self._found)
        except ModelError as error:
            raise ModelError(f"{self.path}/config.json: {error}") from None

    def _found(self) -> Family:
        from .probe import probed  # runs models, and is rarely wanted
        from .skeleton import model_config

        check_counts(self.text_config, len(self.tensors), f"there are {len(self.tensors)} tensors")
        return probed(model_config(self).get_text_config())

    @property
    def text_config(self) -> Mapping[str, Any]:
        """What `config.json` says of the language model, which may be one part of several."""
        return text_config(self.config)

    @property
    def positions(self) -> int | None:
        """How many tokens config.json says that the model can read, if it does."""
        for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
            if isinstance(found := self.text_config.get(key), int) and found > 0:
                return found
        return None

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        family = self.family
        return self.tensors[family.disk_name(f"{family.decoder}.{family.embedding}.weight")].shape[0]

    def check_ids(self, ids: Tensor) -> None:
        """Refuse token ids that the model does not have."""
        if int(ids.max()) >= self.vocabulary:
            raise ModelError(f"{self.path}: the tokenizer has ids beyond the {self.vocabulary} rows of the embedding")

    @cached_property
    def _blocks(self) -> str:
        if self._given is not None:
            return self._given.blocks
        try:
            return self.family.blocks
        except ModelError:
            return blocks_of(self.tensors)

    @cached_property
    def _apart(self) -> bool:
        return any(name.startswith(_FURTHER) for name in self.tensors)

    def block_index(self, name: str) -> int | None:
        """The transformer block a tensor belongs to, or None for embeddings, the final norm and the head; layers that
        predict a token further ahead are behind the last one, wherever they lie."""
        return block_index(self.numbered(name), self._blocks)

    def numbered(self, name: str) -> str:
        """A tensor's name, of layers that lie apart as if they were behind the last block."""
        index = block_index(name, _FURTHER)
        if index is None or not isinstance(count := self.text_config.get("num_hidden_layers"), int):
            return name
        return f"{self._blocks}{count + index}.{name.split('.', 3)[3]}"

    def lying(self, name: str) -> str:
        """The inverse of `numbered`."""
        index, count = block_index(name, self._blocks), self.text_config.get("num_hidden_layers")
        if index is None or not isinstance(count, int) or index < count or not self._apart:
            return name
        return f"{_FURTHER}{index - count}.{name.removeprefix(self._blocks).split('.', 1)[1]}"

    @property
    def files(self) -> list[str]:
        """Weight files, in order."""
        return list(dict.fromkeys(info.file for info in self.stored.values()))

    @property
    def side_files(self) -> list[Path]:
        """Tokenizer and generation files that travel with the weights."""
        return [self.path / name for name in _SIDE_FILES if (self.path / name).is_file()]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def parameters(self) -> int:
        return sum(torch.Size(info.shape).numel() for info in self.tensors.values())

    @cached_property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype that most parameters have."""
        sizes: dict[torch.dtype, int] = {}
        for info in self.tensors.values():
            if info.dtype.is_floating_point:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    def tensor(self, name: str) -> Tensor:
        """One tensor, memory mapped: its pages are read when they are used."""
        part = self._slices.get(name)
        return self.stored_tensor(name) if part is None else part.of(self.stored_tensor(part.stored))

    def made(self, name: str) -> bool:
        """Whether a tensor is made when it is read, in memory of its own, not mapped from a file."""
        return False

    @cached_property
    def anew(self) -> bool:
        """Whether any is."""
        return any(map(self.made, self.tensors))

    @property
    def native(self) -> bool:
        """Whether it lies in compressor's own format, which no engine reads."""
        return False

    def outline(self, linear: str) -> Operator:
        """A linear, by its name without `.weight`, as it is stored: on `meta`, with shapes and bytes but no values."""
        info = self.tensors[linear + ".weight"]
        return Dense(torch.empty(info.shape, dtype=info.dtype, device="meta"))

    def form(self, linear: str) -> str:
        """In what form a linear is stored, for people."""
        return self.outline(linear).description

    def operator(self, linear: str) -> Operator:
        """The same with its values."""
        return Dense(self.tensor(linear + ".weight"))

    def stored_bytes(self, name: str) -> int:
        """Bytes of what a tensor lies on disk as."""
        return self.tensors[name].nbytes

    def by_rows(self, name: str) -> bool:
        """Whether rows of a matrix have to be decoded, and can be without the others."""
        return False

    def rows(self, name: str, which: Tensor) -> Tensor:
        """Some rows of a matrix, by its name, float32."""
        return self.tensor(name)[which].float()

    def stored_tensor(self, name: str) -> Tensor:
        """A tensor exactly as it lies on disk."""
        if name not in self.stored:
            raise ModelError(f"{self.path}: the checkpoint has no tensor {name!r}")
        file = self.stored[name].file
        if file not in self._open:
            self._open[file] = safe_open(self.path / file, framework="pt")
        return self._open[file].get_tensor(name)

    def block_names(self) -> list[list[str]]:
        """Tensor names of each transformer block, in order; what config.json does not count is left out (some models
        carry layers for predicting several tokens after their last block)."""
        blocks: dict[int, list[str]] = {}
        for name in self.tensors:
            if (index := self.block_index(name)) is not None:
                blocks.setdefault(index, []).append(name)
        count = self.text_config.get("num_hidden_layers", len(blocks))
        if not isinstance(count, int) or count < 1:
            raise ModelError(f"{self.path}/config.json: num_hidden_layers is {reprlib.repr(count)}, not their number")
        if count > len(blocks) or not set(range(count)) <= set(blocks):
            raise ModelError(f"{self.path}: config.json counts {count} blocks, the weights are of {sorted(blocks)}")
        return [blocks[index] for index in range(count)]

    def outside_names(self) -> list[str]:
        """Tensor names that belong to none of the blocks."""
        inside = {name for names in self.block_names() for name in names}
        return [name for name in self.tensors if name not in inside]

    def digests(self) -> dict[str, str]:
        """sha256 of every weight file, each read once and a few megabytes at a time.

        Raises:
            ModelError: a weight is NaN or infinite (the tensor is named), or a file was cut short since it was opened.
        """
        return {file: self._digest(file) for file in self.files}

    def _digest(self, file: str) -> str:
        path, digest, room = self.path / file, hashlib.sha256(), memoryview(bytearray(PIECE))
        with open(path, "rb") as opened:
            header, offsets = _offsets(opened)
            digest.update(header)
            for name, (start, end) in sorted(offsets.items(), key=lambda item: item[1]):  # there are no gaps
                dtype = self.stored[name].dtype
                for begin in range(start, end, PIECE):
                    piece = room[: min(PIECE, end - begin)]
                    if opened.readinto(piece) != len(piece):
                        raise ModelError(f"{path}: damaged or cut short; download or make the model again")
                    digest.update(piece)
                    if dtype.is_floating_point and not _finite(torch.frombuffer(piece, dtype=dtype)):
                        names = [linear for linear, part in self._slices.items() if part.stored == name]
                        bad = next(non_finite((linear, self.tensor(linear)) for linear in names), name)
                        raise ModelError(
                            f"{self.path}: {bad} holds NaN or infinite weights; get a sound copy of the model"
                        )
        return digest.hexdigest()

    def expect(self, *blocks: int) -> None:
        """Have the system read the weights of blocks, as far as there are such blocks, while something else is done:
        when they are used, they would be waited for page by page. Blocks that are much of the free memory are not."""
        if not hasattr(os, "posix_fadvise"):
            return
        parts = [part for block in blocks for part in self._extents.get(block, ())]
        if sum(end - start for _, start, end in parts) <= (available_memory() or 0) / 4:
            Thread(target=self._read_ahead, args=(parts,), daemon=True).start()

    def _read_ahead(self, parts: Sequence[tuple[str, int, int]]) -> None:
        with suppress(OSError):  # whoever needs them will say what is wrong
            for file, start, end in parts:
                with open(self.path / file, "rb") as opened:
                    for at in range(start, end, _ADVISED):
                        os.posix_fadvise(opened.fileno(), at, min(_ADVISED, end - at), os.POSIX_FADV_WILLNEED)

    @cached_property
    def _extents(self) -> dict[int, list[tuple[str, int, int]]]:
        """Block → where its weights lie: files, and in these first bytes and those behind the last."""
        found: dict[int, list[tuple[str, int, int]]] = {}
        latest = None
        for file, start, end, name in sorted(self._places()):
            block = self.block_index(name)
            if block is not None:
                own = found.setdefault(block, [])
                if (file, block) == latest:  # nothing of another block is between the two
                    start = own.pop()[1]
                own.append((file, start, end))
            latest = file, block
        return found

    def _places(self) -> Iterator[tuple[str, int, int, str]]:
        """Files, first bytes, those behind the last, and names of all that is stored."""
        for file in self.files:
            with open(self.path / file, "rb") as opened:
                header, offsets = _offsets(opened)
            for name, (start, end) in offsets.items():
                yield file, len(header) + start, len(header) + end, name

    def release(self) -> None:
        """Close the memory maps; the next `tensor` opens them again."""
        self._open.clear()

    def _read_files(self) -> None:
        """Fill `tensors`."""
        for file, names in self._weight_files().items():
            self._read_header(file, names)

    def _unfuse(self) -> None:
        """Name linears in place of the tensors that they lie in, in another way."""
        known = self._given or FAMILIES.get(str(self.text_config.get("model_type")))
        if known is None and any(len(info.shape) == 3 and "conv" not in name for name, info in self.tensors.items()):
            known = self.family
        if known is not None and known.transposed:
            known = replace(known, transposed=frozenset()) if "quantization_config" in self.config else self.family
        known = known and as_published(known, {name: info.shape for name, info in self.tensors.items()})
        if known is None or not (known.experts.fused or known.transposed):
            return
        self.stored, self.tensors = dict(self.tensors), {}
        for name, info in self.stored.items():
            found = dict(slices(known, name, info.shape))
            for linear, part in found.items():
                self.tensors[linear] = TensorInfo(info.file, info.dtype, part.shape)
            self._slices |= found
            if not found:
                self.tensors[name] = info

    def _config(self) -> dict[str, Any]:
        config = self._json("config.json")
        if (self.path / "hf_quant_config.json").is_file() and not config.get("quantization_config"):
            told = self._json("hf_quant_config.json").get("quantization")  # where ModelOpt's older folders say it
            config["quantization_config"] = {"quant_method": "modelopt", **(told if isinstance(told, dict) else {})}
        for key in ("quantization_config", "text_config"):
            if config.get(key) is None:
                config.pop(key, None)
            elif not isinstance(config[key], dict):
                raise ModelError(f"{self.path}/config.json: {key} is {reprlib.repr(config[key])}, not an object")
        for part in (config, text_config(config)):
            if not isinstance(kind := part.get("model_type", ""), str) or not kind.isprintable():
                raise ModelError(f"{self.path}/config.json: model_type is {reprlib.repr(kind)}, not a name")
        return config

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        if not path.is_file():  # nor a pipe, which would be read for ever
            raise ModelError(f"{self.path}: {name} is missing; is this a Hugging Face model folder?")
        return read_json(path)

    def _weight_files(self) -> dict[str, set[str] | None]:
        """File → the names the index promises for it (None without an index)."""
        if (self.path / "model.safetensors.index.json").is_file():
            weight_map = self._json("model.safetensors.index.json").get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ModelError(f"{self.path}/model.safetensors.index.json: no 'weight_map' object")
            files: dict[str, set[str] | None] = {}
            for name, file in weight_map.items():
                if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                    raise ModelError(f"{self.path}: the index puts {name!r} in {file!r}, which is not a file name here")
                promised = files.setdefault(file, set())
                assert promised is not None
                promised.add(name)
            if "model.safetensors" not in files and (self.path / "model.safetensors").is_file():
                raise ModelError(
                    f"{self.path}: has model.safetensors, and an index of other weight files beside it; readers differ "
                    "in which they take, so delete those that are not the model's"
                )
            return files
        if (self.path / "model.safetensors").is_file():
            return {"model.safetensors": None}
        for name in ("model.safetensors", "model.safetensors.index.json"):
            if (self.path / name).is_symlink():
                raise ModelError(f"{self.path}: {name} is a link to a file that is not there; download the model again")
        pickled = sorted(p.name for p in self.path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickled:
            raise ModelError(f"{self.path}: {pickled[0]} is a pickle, which can run code; convert it to safetensors")
        raise ModelError(f"{self.path}: no model.safetensors and no model.safetensors.index.json")

    def _read_header(self, file: str, promised: set[str] | None) -> None:
        path = self.path / file
        if not path.is_file():
            raise ModelError(f"{path}: named by the index but missing; download or make the model again")
        try:
            with safe_open(path, framework="pt") as opened:
                names = list(opened.keys())
                for name in names:
                    if not name.isprintable():
                        raise ModelError(f"{path}: {name!a} is no name that a tensor can have")
                    view = opened.get_slice(name)
                    if view.get_dtype() not in DTYPES:
                        raise ModelError(f"{path}: {name} has the unsupported dtype {view.get_dtype()}")
                    if name in self.tensors:
                        raise ModelError(f"{path}: {name} is also in {self.tensors[name].file}")
                    self.tensors[name] = TensorInfo(file, DTYPES[view.get_dtype()], tuple(view.get_shape()))
        except UnicodeEncodeError:
            raise ModelError(f"{str(path)!a}: safetensors needs paths that are UTF-8; rename the folder") from None
        except RuntimeError as error:  # of a file that is too large to be mapped here
            raise ModelError(f"{path}: {first_line(error)}") from None
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: damaged or cut short ({error}); download or make the model again") from None
        if promised is not None and promised != set(names):
            name = sorted(promised.symmetric_difference(names))[0]
            where = "promised by the index but not in the file" if name in promised else "not in the index"
            raise ModelError(f"{path}: {name} is {where}; the index and the shards are of different models")


def _offsets(opened: BinaryIO) -> tuple[bytes, dict[str, list[int]]]:
    """The header of a safetensors file, with its length in front, and where behind it each tensor lies."""
    size = opened.read(8)
    header = opened.read(int.from_bytes(size, "little"))
    offsets = {name: entry["data_offsets"] for name, entry in json.loads(header).items() if "dtype" in entry}
    return size + header, offsets


def check_counts(config: Mapping[str, Any], layers: int, why: str) -> None:
    """Refuse a language model's config before what it counts is built.

    Args:
        layers: that there may be, and why.
    """
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"):
        count = config.get(key, 1)
        if not isinstance(count, int) or not 1 <= count <= layers:
            raise ModelError(f"{key} is {reprlib.repr(count)}, and {why}")
    for key, value in config.items():
        if "expert" in key and isinstance(value, int) and value > _EXPERTS:
            raise ModelError(f"{key} is {value}, which no model has")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        ModelError: there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: a JSON object is expected")
    return content


def non_finite(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[str]:
    """Names of the floating-point tensors that hold a NaN or an infinity."""
    for name, tensor in tensors:
        # A piece at a time, for what is narrower than float32 is converted.
        pieces = tensor.reshape(-1).split(PIECE) if tensor.is_floating_point() else ()
        if not all(_finite(piece) for piece in pieces if piece.numel()):
            yield name


def _finite(numbers: Tensor) -> bool:
    # min and max propagate NaN and infinities.
    return bool(torch.stack(numbers.float().aminmax()).isfinite().all())
