"""A model in llama.cpp's file format, GGUF, as something to compress: read one tensor at a time, in the types of ggml.

transformers says what such a file's metadata and names mean, the package gguf what its numbers are. `config.json` and
the tokenizer's files are made once for each file, in a folder of the cache that links to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ModelError, ResourceError, first_line
from .files import file_sha256
from .model.checkpoint import Checkpoint, TensorInfo, non_finite
from .model.families import FAMILIES

SUFFIX = ".gguf"
_WIDE = {"F32": torch.float32, "F16": torch.float16}  # all other types are held as bfloat16
_NUMBERS = {"F32": np.float32, "F16": np.float16}
_TABLE = "gguf.json"  # of a folder: what its tensors are in the model, and where in the file; to find out takes seconds
_TABLES = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")  # which lie row by row as in the model
# Keys of a file's metadata → of config.json, of which transformers 5.23 leaves some out for some models.
_TOLD = {
    "attention.key_length": ("head_dim",),
    "expert_count": ("num_experts", "num_local_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}


@dataclass(frozen=True)
class _Lying:
    """Where a tensor is in a file.

    Attributes:
        kind: its type, as ggml counts them.
        shape: `[rows, columns]`, or with experts in front.
        offset, nbytes: in the file.
    """

    file: Path
    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def type(self) -> str:
        """The name of its type."""
        found: str = _gguf().GGMLQuantizationType(self.kind).name
        return found

    @property
    def expected(self) -> int:
        """The bytes that so many numbers of its type take."""
        gguf = _gguf()
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(self.kind)]
        return int(np.prod(self.shape)) // block * size

    def numbers(self, number: int | None = None, rows: Tensor | None = None) -> Tensor:
        """Float32 numbers, of one expert where there are several; or some rows."""
        gguf = _gguf()
        kind, shape = gguf.GGMLQuantizationType(self.kind), self.shape
        start, size = self.offset, self.nbytes
        if number is not None:
            size //= shape[0]
            start, shape = start + number * size, shape[1:]
        lying: Any = np.memmap(self.file, dtype=np.uint8, mode="r", offset=start, shape=(size,))
        if self.type in _NUMBERS:
            lying = lying.view(_NUMBERS[self.type]).reshape(shape)
        else:
            lying = lying.reshape(gguf.quant_shape_to_byte_shape(shape, kind))
        if rows is not None:
            lying = lying[rows.numpy()]
        found = gguf.dequantize(lying, kind)
        mapped = np.shares_memory(found, lying)
        return torch.from_numpy(np.array(found, dtype=np.float32) if mapped else found.astype(np.float32, copy=False))


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ModelError("GGUF files need the package gguf: pip install 'compressor[gguf]'") from None
    return gguf


def folder_of(file: Path) -> Path:
    """A model folder for a GGUF file: its config and tokenizer, and a link to it.

    Raises:
        ModelError: transformers cannot read it.
        ResourceError: the cache cannot be written.
    """
    from huggingface_hub.constants import HF_HOME

    _gguf()
    file, state = file.resolve(), file.stat()
    told = json.dumps([str(file), state.st_size, state.st_mtime_ns, version("transformers"), version("gguf")])
    folder = Path(HF_HOME) / "compressor" / f"{file.stem[:80]}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as room:
                _describe(file, Path(room) / "made")
                _put(Path(room) / "made", folder)
    except OSError as error:
        told = f"{folder.parent}: cannot be written ({error.strerror})"
        raise ResourceError(f"{told}; make room there, or name another place as HF_HOME") from None
    return folder


def _put(made: Path, folder: Path) -> None:
    try:
        os.rename(made, folder)
    except OSError:  # another process was first
        if not folder.is_dir():
            raise


def _describe(file: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers import modeling_gguf_pytorch_utils as theirs
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from .model.parts import quiet

    folder.mkdir()
    try:
        with quiet():
            reader = _gguf().GGUFReader(file)
            architecture = theirs.read_field(reader, "general.architecture")[0]
            blocks = (theirs.read_field(reader, f"{architecture}.block_count") or [0])[0]
            if not 0 < int(blocks) <= len(reader.tensors):  # before so many are built
                raise ValueError(f"block_count is {blocks}, and there are {len(reader.tensors)} tensors")
            config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
            for key, ours in _TOLD.items():
                told = theirs.read_field(reader, f"{architecture}.{key}")
                for name in ours if told else ():
                    if hasattr(config, name):
                        setattr(config, name, int(told[0]))
            processor = theirs.TENSOR_PROCESSORS.get(architecture, theirs.TensorProcessor)(config=config.to_dict())
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            names = theirs.get_gguf_hf_weights_map(model, processor)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except BaseException as error:  # transformers raises whatever it finds, tokenizers more than that
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        shutil.rmtree(folder)
        raise ModelError(f"{file}: transformers cannot read it ({first_line(error)})") from None
    _save(tokenizer, folder)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    config.architectures = [causal] if causal else None
    sizes: dict[str, int] = {}
    for one in reader.tensors:
        kind = _gguf().GGMLQuantizationType(one.tensor_type).name
        sizes[kind] = sizes.get(kind, 0) + int(np.prod(one.shape))
    most = max(sizes, key=lambda kind: sizes[kind])
    config.dtype = str(_WIDE.get(most, torch.bfloat16)).removeprefix("torch.")
    config.save_pretrained(folder)
    tensors = [
        [one.name, int(one.tensor_type), [int(n) for n in reversed(one.shape)], int(one.data_offset), int(one.n_bytes)]
        for one in reader.tensors
    ]
    (folder / _TABLE).write_text(json.dumps({"architecture": architecture, "names": names, "tensors": tensors}))
    os.symlink(file, folder / f"model{SUFFIX}")


def _save(tokenizer: Any, folder: Path) -> None:
    """
    Raises:
        OSError: the disk is full, or the like, which tokenizers says in an error of its own.
    """
    from .model.parts import quiet

    try:
        with quiet():
            tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:
        raise OSError(0, first_line(error)) from None


def is_gguf(folder: Path) -> bool:
    """Whether a folder's weights are in a GGUF file, one that `folder_of` links to."""
    beside = any((folder / f"model.safetensors{more}").exists() for more in ("", ".index.json"))
    return (folder / f"model{SUFFIX}").is_file() and (folder / _TABLE).is_file() and not beside


class GgufModel(Checkpoint):
    """A folder of `folder_of`."""

    def _read_files(self) -> None:
        from transformers import modeling_gguf_pytorch_utils as theirs

        file = f"model{SUFFIX}"
        path, size = (self.path / file).resolve(), (self.path / file).stat().st_size
        told = self._json(_TABLE)
        try:
            lying = [_Lying(path, name, kind, tuple(shape), *place) for name, kind, shape, *place in told["tensors"]]
            if any(one.offset < 0 or one.nbytes != one.expected for one in lying):
                raise ValueError("sizes do not go together")
            names, architecture = dict(told["names"]), told["architecture"]
        except (KeyError, TypeError, ValueError) as error:
            place = self.path / _TABLE
            raise ModelError(f"{place}: damaged ({first_line(error)}); delete {self.path}, and name {path}") from None
        if any(one.offset + one.nbytes > size for one in lying):
            raise ModelError(f"{path}: cut short; get a whole copy")
        try:
            processor = theirs.TENSOR_PROCESSORS.get(architecture, theirs.TensorProcessor)(config=self.config)
            process = partial(processor.process, tensor_key_mapping=names, parsed_parameters={"tensors": {}})
            parts = [part for one in lying for part in self._parts(one, names, process)]
        except Exception as error:  # transformers raises whatever it finds
            raise ModelError(f"{path}: transformers does not read such a model ({first_line(error)})") from None
        self._made: dict[str, tuple[_Lying, Callable[[], Tensor]]] = {}
        for ours, shape, one, made in parts:
            self.tensors[ours] = TensorInfo(file, _WIDE.get(one.type, torch.bfloat16), shape)
            self._made[ours] = (one, made)
        if self._given is None:  # until here, names are those in memory
            family = self.family
            for table in (self.tensors, self._made):
                renamed = {family.disk_name(name): value for name, value in table.items()}  # type: ignore[attr-defined]
                table.clear()
                table.update(renamed)  # type: ignore[arg-type]

    def _parts(
        self, one: _Lying, names: dict[str, str], process: Any
    ) -> list[tuple[str, tuple[int, ...], _Lying, Callable[[], Tensor]]]:
        """What of the model a tensor of the file is: names in memory, shapes, and how they are made."""
        block, _, kind = one.name.removeprefix("blk.").partition(".")
        expert = _EXPERTS.get(kind.removesuffix(".weight"))
        if expert is not None and len(one.shape) == 3:
            family = FAMILIES.get(self.config["model_type"])
            if family is None:
                raise ValueError(f"experts of {self.config['model_type']} are not read from GGUF files")
            place = f"{family.decoder}.{family.layers}.{block}.{family.experts.where}"
            numbers = range(one.shape[0])
            return [(f"{place}.{n}.{expert}.weight", one.shape[1:], one, partial(one.numbers, n)) for n in numbers]
        if one.name not in names:
            return []
        like = process(weights=np.zeros(one.shape, dtype=np.float32), name=one.name).weights
        return [(names[one.name], tuple(like.shape), one, partial(_processed, one, process))]

    def stored_tensor(self, name: str) -> Tensor:
        """A tensor as it is decoded: to bfloat16, but of what lies there in 16 or 32 bits."""
        if name not in self._made:
            raise ModelError(f"{self.path}: the checkpoint has no tensor {name!r}")
        return self._made[name][1]().to(self.tensors[name].dtype)

    def _places(self) -> Iterator[tuple[str, int, int, str]]:
        for name, (one, _) in self._made.items():
            yield self.tensors[name].file, one.offset, one.offset + one.nbytes, name

    def made(self, name: str) -> bool:
        return True

    def by_rows(self, name: str) -> bool:
        return self._made[name][0].name in _TABLES

    def rows(self, name: str, which: Tensor) -> Tensor:
        if not self.by_rows(name):
            return super().rows(name, which)
        return self._made[name][0].numbers(rows=which).to(self.tensors[name].dtype).float()

    def stored_bytes(self, name: str) -> int:
        one = self._made[name][0]
        return one.nbytes * torch.Size(self.tensors[name].shape).numel() // torch.Size(one.shape).numel()

    @property
    def nbytes(self) -> int:
        return sum(map(self.stored_bytes, self.tensors))

    def form(self, linear: str) -> str:
        kind = self._made[linear + ".weight"][0].type
        return super().form(linear) if kind in (*_WIDE, "BF16") else f"GGUF {kind}"

    def digests(self) -> dict[str, str]:
        for name in non_finite((name, self.tensor(name)) for name in self.tensors):
            raise ModelError(f"{self.path}: {name} holds NaN or infinite weights; get a sound copy of the model")
        return {file: file_sha256(self.path / file) for file in self.files}


def _processed(one: _Lying, process: Any) -> Tensor:
    """Its numbers as transformers has them."""
    made = process(weights=one.numbers().numpy(), name=one.name).weights
    return torch.from_numpy(np.ascontiguousarray(made))
