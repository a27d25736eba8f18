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

from ...kernels.layouts import pack_codes, unpack_codes
from ..errors import ModelError
from ..schemes import Dense, IntQuantized, Operator, rewritten
from .base import HINT, Around, Schemes
from .integers import IntegerFormat, check_parts

BITS = (2, 3, 4, 8)


class Gptq(IntegerFormat):
    """Integers of 2, 3, 4 and 8 bits; those with zero points in the newer form, as the older cannot hold the least."""

    name: ClassVar[str] = "gptq"
    parts: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales", "g_idx"})
    reads: ClassVar[str] = "GPTQ's"

    def unheld(self, operator: IntQuantized) -> str:
        rows, columns = operator.shape
        if operator.bits not in BITS:
            return "it has no such width"
        whole = rows % 32 == columns % 32 == columns % operator.span == 0
        return "" if whole else f"{rows} x {columns} is not of whole groups and words"

    def at_odds(self, operators: list[IntQuantized]) -> str:
        kinds = {operator.zeros is None for operator in operators}
        return "linears with zero points beside others without" if len(kinds) > 1 else ""

    def vllm_takes(self, linears: Mapping[str, Operator], around: Around) -> bool:
        main = next(iter(rewritten(linears).values())).scheme()
        # vLLM looks for the rules of a matrix that it fuses under a name that none has.
        plain = all(linears[name].scheme() == main for group in around.fused for name in group)
        return plain and main["symmetric"] and main["bits"] in (4, 8)  # all that its configuration has

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
        if "qweight" not in tensors:  # what it leaves as it was
            return dict(tensors)
        bits, (words, rows) = scheme["bits"], tensors["qweight"].shape
        columns = words * 32 // bits
        span = scheme["group_size"] if scheme["group_size"] > 0 else columns
        groups = -(-columns // span)
        check_parts(tensors, {"scales": (groups, rows), "qzeros": (groups, rows * bits // 32), "g_idx": (columns,)})
        if scheme["kind"] == Dense.kind:
            return {"weight": _decoded(tensors, bits, older=scheme["checkpoint_format"] == "gptq")}
        if not tensors["g_idx"].is_meta:
            middle = 0 if scheme.get("checkpoint_format") == "gptq_v2" else -1
            _check_values(tensors, bits, span, middle if scheme["symmetric"] else None)
        found = {
            "weight_packed": tensors["qweight"].T.contiguous(),
            "weight_scale": tensors["scales"].T.contiguous(),
            "weight_shape": torch.tensor([rows, columns], dtype=torch.int64, device="cpu"),
        }
        return found if scheme["symmetric"] else {**found, "weight_zero_point": tensors["qzeros"].T.contiguous()}

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

    def schemes(self, path: Path, config: Mapping[str, Any], stored: Mapping[str, Any]) -> Schemes:
        quantization = config["quantization_config"]
        form = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
        symmetric = quantization.get("sym", True)
        if form not in ("gptq", "gptq_v2"):
            raise ModelError(f"{path}: GPTQ's form {form!r} {HINT}")
        found = {}
        for name in (key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")):
            said = {"bits": quantization["bits"], "group_size": quantization["group_size"]}
            for pattern, changes in (quantization.get("dynamic") or {}).items():
                if re.match(pattern.removeprefix("+:").removeprefix("-:"), name):
                    if pattern.startswith("-:"):
                        raise ModelError(f"{path}: {name} is quantized, though config.json says that it is not")
                    said |= {key: changes[key] for key in said if key in changes}
                    break
            whole = isinstance(said["group_size"], int) and (said["group_size"] > 0 or said["group_size"] == -1)
            if said["bits"] not in BITS or not whole or quantization.get("pack_dtype", "int32") != "int32":
                raise ModelError(f"{path}: {name} is of {said}, in a way that {HINT}")
            plain = quantization.get("desc_act", False) or (form == "gptq" and not symmetric)
            kind = Dense.kind if plain else IntQuantized.kind
            found[name] = {"kind": kind, **said, "symmetric": symmetric, "checkpoint_format": form}
        return found


def _exactly(sign: str, name: str, around: Around, what: dict[str, Any]) -> dict[str, Any]:
    """A rule for one linear, by its name on disk and in memory."""
    names = {name, around.names.get(name, name)}
    return {f"{sign}:^{re.escape(one)}$": what for one in sorted(names)}


def _decoded(tensors: Mapping[str, Tensor], bits: int, *, older: bool) -> Tensor:
    """The weight, of which columns are in any order, or zero points in the older form, where they may reach beyond the
    codes."""
    rows, order = tensors["scales"].shape[1], tensors["g_idx"].long()
    codes = unpack_codes(tensors["qweight"].T.contiguous(), bits, len(order))
    zeros = unpack_codes(tensors["qzeros"], bits, rows).T.to(torch.int16) + older
    if codes.is_meta:
        return codes.float()
    if int(order.min()) < 0 or int(order.max()) >= zeros.shape[1]:
        raise ValueError("g_idx names groups that it does not have")
    return (codes - zeros[:, order]).float() * tensors["scales"].T.float()[:, order]


def _check_values(tensors: Mapping[str, Tensor], bits: int, span: int, middle: int | None) -> None:
    """Refuse what would decode to other weights.

    Args:
        middle: the zero points that all have, as they are stored, less `2**(bits - 1)`; None where they differ.
    """
    order, zeros = tensors["g_idx"], tensors["qzeros"]
    if not torch.equal(order.long(), torch.arange(len(order), device=order.device) // span):
        raise ValueError(f"its columns are in an order of their own (desc_act), which {HINT}")
    if middle is not None:
        all_alike = torch.full((1, tensors["scales"].shape[1]), middle, dtype=torch.int8)
        if not bool((zeros == pack_codes(all_alike, bits).to(zeros.device)).all()):
            raise ValueError("it has zero points, though config.json says that it is symmetric")
