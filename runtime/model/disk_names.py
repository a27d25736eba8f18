"""How the tensors of a model that was found are named on disk: by the values of a copy, which are random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .disk_experts import BIAS
from .experts import Form
from .families import Family, renamed, starred


class Unfit(Exception):
    """Why a model is not run exactly, in a few words."""


def named(family: Family, model: Any, folder: Path, experts: Mapping[str, Any]) -> Family:
    """A family with the names that its tensors have on disk.

    Args:
        model: with separate experts; `experts` are modules that were in their place.
        folder: where it was saved before.

    Raises:
        Unfit: a tensor is not on disk as it is in memory.
    """
    from .checkpoint import Checkpoint  # which asks here for families that are not described

    checkpoint = Checkpoint(folder, family)
    lying = {_key(checkpoint.stored_tensor(name)): name for name in checkpoint.stored}
    fused: dict[str, tuple[str, ...]] = {}
    forms = [form for module in experts.values() if (form := Form.of(module)) is not None]
    for module in experts.values():
        for part, tensor in module.named_parameters():
            if (name := lying.get(_key(tensor))) is not None:
                linear = part.removesuffix(BIAS)
                linears = ("gate_proj", "up_proj") if linear == "gate_up_proj" else (linear,)
                if part.endswith(BIAS) != name.endswith(BIAS):
                    raise Unfit(f"{name} on disk is {part}")
                fused[name.removeprefix(family.blocks).split(".", 1)[1]] = linears
    tied = f"{family.head}.weight" if model.config.tie_word_embeddings else ""
    pairs = {
        name: lying.get(_key(tensor), "")
        for name, tensor in model.state_dict().items()
        if name != tied and not (fused and any(name.startswith(where + ".") for where in experts))
    }
    turned = {
        name: lying.get(_key(tensor.T.contiguous()), "")
        for name, tensor in model.state_dict().items()
        if tensor.dim() == 2 and not pairs.get(name, name)
    }
    pairs |= turned
    others = {name: checkpoint.stored_tensor(name) for name in checkpoint.stored if name not in pairs.values()}
    made = {name: _below(model.get_parameter(name), others) for name, found in pairs.items() if not found}
    products = {f"{name}.weight" for stage in family.stages for group in stage for name in group.linears}
    whole = {name for name in made if starred(name).endswith(tuple(products))}  # which have to lie in one piece
    if lost := next((name for name, parts in made.items() if not parts or name in whole), ""):
        raise Unfit(f"{lost} is not on disk as it is in memory")
    pairs = {name: found for name, found in pairs.items() if found}
    family = replace(family, places=_place_on_disk(family, pairs))
    flat = {starred(family.inside(name)).removesuffix(".weight") for ours in turned if (name := pairs.get(ours))}
    pairs = {family.placed(ours): theirs for ours, theirs in pairs.items()}
    mixture = replace(family.experts, fused=fused)
    if forms:
        mixture = replace(
            mixture, transposed=forms[0].transposed, interleaved=forms[0].interleaved, scaled=forms[0].scaled
        )
    family = replace(family, segments=_segments(pairs), experts=mixture)
    return replace(family, joined=_joined(family, made), transposed=frozenset(flat))


def _below(tensor: Tensor, others: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Which of the tensors on disk lie below one another in one in memory; empty for none."""
    parts, start = list[str](), 0
    while start < len(tensor):
        fits = (
            name
            for name, other in others.items()
            if other.dim() and other.shape[1:] == tensor.shape[1:] and torch.equal(other, tensor[start:][: len(other)])
        )
        if not (part := next(fits, "")):
            return ()
        parts.append(part)
        start += len(others[part])
    return tuple(parts)


def _joined(family: Family, made: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Ends of names of tensors in memory, which are those of blocks, → ends of what lies in them."""
    found = {}
    for name, parts in made.items():
        ours = family.disk_name(name)
        start = f"{family.blocks}{ours.removeprefix(family.blocks).partition('.')[0]}."
        if all(part.startswith(start) for part in (ours, *parts)):
            found[ours.removeprefix(start)] = tuple(part.removeprefix(start) for part in parts)
    return found


def _place_on_disk(family: Family, pairs: Mapping[str, str]) -> Mapping[str, str]:
    """Where the decoder lies, by the first tensor of a block."""
    first = f"{family.layers}.0."
    lying = next(theirs for ours, theirs in pairs.items() if ours.startswith(f"{family.decoder}.{first}"))
    place, found, _ = lying.partition(f".{first}")
    return {**family.places, family.decoder: place} if found else family.places


def _key(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor of random numbers, as few of them as tell it from others."""
    return tuple(tensor.shape), *tensor.flatten()[:8].tolist()


def _segments(pairs: Mapping[str, str]) -> dict[str, str]:
    """Names in memory → on disk, as the shortest segments that make the ones of the others.

    Raises:
        Unfit: there are none.
    """
    alike: dict[str, str] = {}
    for ours, theirs in pairs.items():
        if alike.setdefault(starred(ours), starred(theirs)) != starred(theirs):
            raise Unfit(f"{ours} is {theirs} on disk")
    rules: dict[str, str] = {}
    for right in range(3):  # segments that are of modules, too, do not reach to the end
        for left in range(5):
            for ours, theirs in alike.items():
                if not _fits(ours, theirs, rules):
                    rules |= _differences(ours.split("."), theirs.split("."), left, right)
            rules = {memory: disk for memory, disk in rules.items() if not _harms(memory, rules, alike)}
    for ours, theirs in alike.items():
        if not _fits(ours, theirs, rules):
            raise Unfit(f"{ours} is {theirs} on disk")
    return rules


def _fits(ours: str, theirs: str, rules: Mapping[str, str]) -> bool:
    """Whether rules make each name of the other."""
    back = {disk: memory for memory, disk in rules.items()}
    return renamed(ours, rules) == theirs and renamed(theirs, back) == ours


def _differences(memory: Sequence[str], disk: Sequence[str], left: int, right: int) -> dict[str, str]:
    """The segments in which two names differ, and so many around them; one by one where there are as many."""
    if len(memory) == len(disk):
        places = [i for i, (a, b) in enumerate(zip(memory, disk, strict=True)) if a != b]
        ranges = [(max(0, i - left), i + right + 1) for i in places]
        found = {".".join(memory[a:b]): ".".join(disk[a:b]) for a, b in ranges}
    else:
        found = _difference(memory, disk, left, right)
    return {ours: theirs for ours, theirs in found.items() if set(ours) - {"*", "."}}


def _difference(memory: Sequence[str], disk: Sequence[str], left: int, right: int) -> dict[str, str]:
    """The same, of all together: one of each at least."""
    start = next((i for i, (a, b) in enumerate(zip(memory, disk, strict=False)) if a != b), 0)
    end = next((i for i, (a, b) in enumerate(zip(memory[::-1], disk[::-1], strict=False)) if a != b), 0)
    start = min(start, len(memory) - 1, len(disk) - 1)
    end = min(end, len(memory) - start - 1, len(disk) - start - 1)
    first, last = max(0, start - left), max(0, end - right)
    return {".".join(memory[first : len(memory) - last]): ".".join(disk[first : len(disk) - last])}


def _harms(memory: str, rules: Mapping[str, str], pairs: Mapping[str, str]) -> bool:
    """Whether a rule is why some name comes out wrong, or cannot be told from a shorter one on the way back."""
    if any(other != memory and disk == rules[memory] and len(other) < len(memory) for other, disk in rules.items()):
        return True
    touched = [ours for ours in pairs if f".{memory}." in f".{ours}."]
    if any(renamed(ours, rules) != pairs[ours] for ours in touched):
        return True
    # On the way back it counts for names that come out right on the way there.
    again = [ours for ours, theirs in pairs.items() if f".{rules[memory]}." in f".{theirs}."]
    return any(renamed(ours, rules) == pairs[ours] and not _fits(ours, pairs[ours], rules) for ours in again)
