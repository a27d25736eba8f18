"""GPTQ's checkpoints: integers in groups, as AutoGPTQ laid them out and GPTQModel and vLLM read them.

`qweight` `[columns * bits / 32, rows]` and `qzeros` `[groups, rows * bits / 32]` are dense streams of unsigned codes,
along columns and along rows; `scales` `[groups, rows]`; `g_idx` `[columns]` says each column's group. In the older of
the two forms (`gptq`, the newer is `gptq_v2`) zero points are stored one too small.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...kernels.layouts import pack_codes
from ..errors import ModelError
from ..schemes import IntQuantized, Operator, rewritten
from .base import OURS, VLLM_GPU, Around, Format, Schemes

GPTQMODEL = "GPTQModel"
_PARTS = frozenset({"qweight", "qzeros", "scales", "g_idx"})


class Gptq(Format):
    """Integers of 2, 3, 4 and 8 bits; those with zero points in the newer form, as the older cannot hold the least."""

    name: ClassVar[str] = "gptq"
    automatic: ClassVar[bool] = False
    reads: ClassVar[str] = "GPTQ's, without an order of columns,"

    def obstacle(self, linears: Mapping[str, Operator], around: Around) -> str:
        stored = rewritten(linears)
        if any(name in around.outer for name in stored):
            return "an embedding or a head that is stored otherwise"
        if any(name in around.experts for name in stored):
            return "experts that are stored otherwise"
        if len({operator.scheme().get("symmetric") for operator in stored.values()}) > 1:
            return "linears with zero points beside others without"
        for name, operator in stored.items():
            if not isinstance(operator, IntQuantized) or operator.inputs or operator.bits not in (2, 3, 4, 8):
                return f"{name} ({operator.description})"
            rows, columns = operator.shape
            if rows % 32 or columns % 32 or columns % operator.span:
                return f"{name} ({operator.description}), for {rows} x {columns} is not of whole groups and words"
        return ""

    def readers(self, linears: Mapping[str, Operator], around: Around) -> tuple[str, ...]:
        return tuple(sorted((*OURS, GPTQMODEL, VLLM_GPU)))

    def tensors(self, operator: Operator) -> dict[str, Tensor]:
        if not isinstance(operator, IntQuantized):
            return super().tensors(operator)
        bits, zeros = operator.bits, operator.zeros
        if zeros is None:  # in the middle, which the older form stores one too small
            zeros = torch.full_like(operator.scales, -1, dtype=torch.int8)
        order = torch.arange(operator.shape[1], dtype=torch.int32, device=zeros.device) // operator.span
        return {
            "qweight": pack_codes(operator.codes, bits).T.contiguous(),
            "qzeros": pack_codes(zeros.T.contiguous(), bits),
            "scales": operator.scales.T.contiguous(),
            "g_idx": order,
        }

    def operator_tensors(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> dict[str, Tensor]:
        if scheme["kind"] != IntQuantized.kind:
            return dict(tensors)
        (words, rows), groups = tensors["qweight"].shape, len(tensors["scales"])
        columns = words * 32 // scheme["bits"]
        shape = torch.tensor([rows, columns], dtype=torch.int64, device="cpu")
        found = {
            "weight_packed": tensors["qweight"].T.contiguous(),
            "weight_scale": tensors["scales"].T.contiguous(),
            "weight_shape": shape,
        }
        if not tensors["g_idx"].is_meta:
            order = torch.arange(columns, device=tensors["g_idx"].device) // -(-columns // groups)
            if not torch.equal(tensors["g_idx"].long(), order):
                raise ValueError("its columns are in an order of their own (desc_act)")
        if not scheme["symmetric"]:
            found["weight_zero_point"] = tensors["qzeros"].T.contiguous()
        elif not tensors["qzeros"].is_meta:
            middles = (pack_codes(torch.full((1, rows), zero, dtype=torch.int8), scheme["bits"]) for zero in (-1, 0))
            if not any(bool((tensors["qzeros"] == middle.to(tensors["qzeros"].device)).all()) for middle in middles):
                raise ValueError("it has zero points, though its config says that it is symmetric")
        return found

    def config(
        self, source: Mapping[str, Any], linears: Mapping[str, Operator], dense: Iterable[str], around: Around
    ) -> dict[str, Any]:
        stored = {name: operator.scheme() for name, operator in rewritten(linears).items()}
        main = next(iter(stored.values()))
        others: dict[str, Any] = {}
        for name, scheme in stored.items():
            if (scheme["bits"], scheme["group_size"]) != (main["bits"], main["group_size"]):
                others |= _exactly("+", name, around, {"bits": scheme["bits"], "group_size": scheme["group_size"]})
        for name in dense:
            if name not in around.outer:
                others |= _exactly("-", name, around, {})
        quantization = {
            "quant_method": self.name,
            "checkpoint_format": "gptq" if main["symmetric"] else "gptq_v2",
            "bits": main["bits"],
            "group_size": main["group_size"],
            "sym": main["symmetric"],
            "desc_act": False,
            "pack_dtype": "int32",
            "lm_head": False,
            **({"dynamic": others} if others else {}),
        }
        return {**source, "quantization_config": quantization}

    def claims(self, config: Mapping[str, Any]) -> bool:
        return bool((config.get("quantization_config") or {}).get("quant_method") == self.name)

    def schemes(self, path: Path, config: Mapping[str, Any], stored: Iterable[str]) -> Schemes:
        quantization = config["quantization_config"]
        form = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
        symmetric = quantization.get("sym", True)
        if form not in ("gptq", "gptq_v2") or (form == "gptq" and not symmetric):
            raise ModelError(
                f"{path}: GPTQ's form {form!r}{'' if symmetric else ' with zero points'} is not read here; decode the "
                "folder with the tool that wrote it"
            )
        found = {}
        for name in (key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")):
            said = {"bits": quantization["bits"], "group_size": quantization["group_size"]}
            for pattern, changes in (quantization.get("dynamic") or {}).items():
                if pattern.startswith("+:") and re.match(pattern[2:], name):
                    said |= {key: changes[key] for key in said if key in changes}
                    break
            found[name] = {"kind": IntQuantized.kind, **said, "symmetric": symmetric}
        return found

    def check(self, path: Path, schemes: Schemes, suffixes: Mapping[str, Iterable[str]], stored: Iterable[str]) -> None:
        for name, found in suffixes.items():
            if set(found) != _PARTS:
                raise ModelError(f"{path}: {name} is not whole: it has {', '.join(sorted(found))}")

    def original(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key != "quantization_config"}


def _exactly(sign: str, name: str, around: Around, what: dict[str, Any]) -> dict[str, Any]:
    """A rule for one linear, by its name on disk and in memory."""
    names = {name, around.names.get(name, name)}
    return {f"{sign}:^{re.escape(one)}$": what for one in sorted(names)}
