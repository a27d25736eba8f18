"""A model of which there is a `config.json` alone: a folder with the headers of its weights, and no numbers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from ..errors import ModelError, first_line
from .checkpoint import DTYPES, check_counts, read_json
from .families import text_config
from .skeleton import config_of, stock_model

_SHARD = 5e9  # bytes of a file at most, or one tensor
_LAYERS = 10_000
_WORDS = {dtype: word for word, dtype in DTYPES.items()}


def imagine(config: Path, folder: Path) -> None:
    """Write a folder as the model of a config would be published, unquantized; files are of full size and take next to
    no room on disk, for they are holes.

    Raises:
        ModelError: transformers makes no model of the config.
    """
    content = read_json(config)
    content.pop("quantization_config", None)
    try:
        check_counts(text_config(content), _LAYERS, f"no model has more than {_LAYERS:,}")
    except ModelError as error:
        raise ModelError(f"{config}: {error}") from None
    model = stock_model(config_of(content, config), config, _dtype(content))
    try:
        shared = model.all_tied_weights_keys if model.config.tie_word_embeddings else ()
        own = {name: tensor for name, tensor in model.state_dict().items() if name not in shared}
        tensors = revert_weight_conversion(model, own)
    except Exception as error:  # transformers raises whatever its conversions do
        raise ModelError(f"{config}: transformers does not say how the model is stored ({first_line(error)})") from None
    shards = list(_shards(tensors))
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_header(folder / file, shard)
        places |= dict.fromkeys(shard, file)
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), encoding="utf-8")


def _dtype(content: Mapping[str, Any]) -> torch.dtype:
    """What the config says that weights are stored as; bfloat16 where it says nothing that they can be."""
    named = getattr(torch, str(content.get("dtype") or content.get("torch_dtype")), None)
    return named if named in (torch.float16, torch.float32) else torch.bfloat16


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    shard, size = dict[str, Tensor](), 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > _SHARD:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _write_header(path: Path, shard: Mapping[str, Tensor]) -> None:
    entries, at = dict[str, Any](), 0
    for name, tensor in shard.items():
        end = at + tensor.nbytes
        entries[name] = {"dtype": _WORDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + at)
