"""A family that nobody described, found by running a small copy of the model: what its blocks do, how their tensors are
named on disk, and whether blocks that are run one at a time do what the whole model does.

What is found is held against stock transformers before it is used: a model that is not run exactly is refused.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import ModelError, first_line
from .disk_experts import BIAS
from .disk_names import Unfit, named
from .experts import Experts, Form, plain_linears, unfuse_experts
from .families import Family, Group, Mixture, starred
from .parts import quiet
from .small import FEW, HIDDEN, TOP_K, VOCABULARY, outline, small_config, small_model
from .trace import Trace, groups_of, is_norm, traced
from .wide import is_wide

_LEFT = {"router", "indexer", "compressor"}  # parts of blocks whose few weights choose what the others do
_WIDTHS = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
_LARGEST = 20_000_000  # weights of a small copy
_CLOSE = 1e-5  # of logits in float32, relative


def probed(config: Any) -> Family:
    """The family of a transformers config of a language model.

    Raises:
        ModelError: it cannot be found, or what is found does not do what the model does.
    """
    found = _probed(json.dumps(config.to_dict(), default=str))
    if isinstance(found, Family):
        return found
    raise ModelError(f"model_type {config.model_type!r} is not described here, nor found by running it: {found}")


@lru_cache(maxsize=8)
def _probed(told: str) -> Family | str:
    """The family, or why there is none."""
    config = json.loads(told)
    try:
        with quiet():
            return find(CONFIG_MAPPING[config["model_type"]].from_dict(config))
    except Unfit as error:
        return str(error)
    except Exception as error:  # transformers raises whatever its models do
        return f"a small copy of it cannot be built and run ({first_line(error)})"


def find(config: Any) -> Family:
    """The family of a config, held against the model.

    Raises:
        Unfit: they do not agree.
    """
    small, kinds = small_config(config)
    size, has = outline(small)
    if size > _LARGEST:
        raise Unfit(f"a small copy of it has {size:,} weights, for config.json says more than is known of")
    if lost := sorted(set(kinds) - set(has)):
        raise Unfit(f"a small copy of it has no block like block {kinds[lost[0]]}")
    model = small_model(small)
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected: Tensor = model(input_ids=ids, use_cache=False).logits
    with tempfile.TemporaryDirectory() as room:
        try:
            return _found(model, Path(room), ids, expected)
        except ModelError as error:  # of a folder that is gone
            raise Unfit(str(error).replace(room, "").lstrip("/: ")) from None


def _found(model: Any, folder: Path, ids: Tensor, expected: Tensor) -> Family:
    model.save_pretrained(folder)
    family = _around(model)
    experts = _unfused(model)
    family = _inside(family, model, _traces(model, family, ids), experts)
    family = named(family, model, folder, experts)
    family = _entering(family, folder)
    _check(family, folder, ids, expected)
    _check_linears(family, model, ids)
    family = replace(_folding(family, folder, ids, expected), rebuilt=not family.joined and _rebuilt(family, model))
    family = replace(family, turns=_turns(family, folder, ids, expected))
    return _caching(family, model.config, ids, expected)


def _around(model: Any) -> Family:
    """A family of which nothing is known but where its blocks are, and what is around them."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    lists = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    if len(lists) != 1:
        raise Unfit("its blocks are not in a list of their own")
    place, _, layers = lists[0].rpartition(".")
    parts = dict(model.get_submodule(place).named_children())
    embeddings = [name for name, part in parts.items() if part is model.get_input_embeddings()]
    norms = [name for name, part in parts.items() if "norm" in type(part).__name__.lower() and _streams(part)]
    norms = [name for name in norms if list(parts).index(name) > list(parts).index(layers)] or norms
    heads = [name for name, part in model.named_children() if part is model.get_output_embeddings()]
    if len(embeddings) != 1 or len(norms) != 1 or len(heads) != 1:
        raise Unfit(f"{type(model).__name__} has not one embedding, one norm and one head around its blocks")
    beside = [name for name, part in parts.items() if name not in {layers, *embeddings, *norms} and part.state_dict()]
    wide = is_wide(model.config.get_text_config())
    others = [name for name in beside if not (isinstance(parts[name], nn.Embedding) or is_norm(parts[name]))]
    if others and not wide:
        raise Unfit(f"{place} has other weights than those of an embedding, blocks and a norm: {others[0]}")
    return Family(
        (),
        keys="",
        values="",
        places={place: place, heads[0]: heads[0]},
        layers=layers,
        embedding=embeddings[0],
        norm=norms[0],
        centered=_centered(parts[norms[0]]),
        entrance=() if wide else tuple(beside),
        wide=wide,
        found=True,
    )


def _streams(norm: Any) -> bool:
    """Whether a norm is as wide as the residual stream, or says nothing of its width."""
    weight = getattr(norm, "weight", None)
    return weight is None or weight.numel() == HIDDEN


def _centered(norm: nn.Module) -> bool:
    """Whether a norm takes no notice of the mean."""
    hidden = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(4))
    return bool(torch.allclose(norm(hidden + 1), norm(hidden), atol=1e-4))


def _unfused(model: Any) -> dict[str, Any]:
    """Let experts be linears, as they are where models are run here; modules that were in their place."""
    plain_linears(model)
    forms = {name: form for name, module in model.named_modules() if (form := Form.of(module)) is not None}
    fused = {name: model.get_submodule(name) for name in forms}
    for name, module in model.named_modules():
        many = [part for part, tensor in module.named_parameters(recurse=False) if tensor.dim() == 3]
        if many and name not in fused and not isinstance(module, nn.Conv1d):
            raise Unfit(f"{name}.{many[0]} has three dimensions, and is not of experts that are known")
    unfuse_experts(model)
    for name, module in fused.items():
        _fill(model.get_submodule(name), module, forms[name])
    return fused


def _fill(experts: Experts, fused: Any, form: Form) -> None:
    """
    Raises:
        Unfit: what becomes of them does something else.
    """
    named = dict(fused.named_parameters())
    known = {"gate_up_proj", "up_proj", "down_proj"} | {"gate_up_proj_bias", "up_proj_bias", "down_proj_bias"}
    if more := sorted(set(named) - known):
        raise Unfit(f"its experts have {more[0]}")
    for number, expert in enumerate(list[Any](experts)):
        for whole, tensor in named.items():
            kind = "bias" if whole.endswith(BIAS) else "weight"
            own, part = tensor[number], whole.removesuffix(BIAS)
            if part == "gate_up_proj":
                pairs = zip(("gate_proj", "up_proj"), form.parts(own), strict=True)
            else:
                pairs = zip((part,), (own.T if form.transposed and kind == "weight" else own,), strict=True)
            for linear, values in pairs:
                setattr(getattr(expert, linear), kind, nn.Parameter(values.clone(), requires_grad=False))
    hidden = torch.randn(6, form.sizes(fused)[1], generator=torch.Generator().manual_seed(2)) * 3
    index, weights = torch.tensor([[0, 1]]).expand(6, 2), torch.tensor([[0.3, 0.9]]).expand(6, 2)
    expected = _scaled(fused, hidden, index, weights) if form.scaled else fused(hidden, index, weights)
    if not torch.allclose(experts(hidden, index, weights), expected, rtol=1e-4, atol=1e-5):
        raise Unfit("its experts do something else than gated linears with an activation")


def _scaled(fused: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """What experts put out that get all tokens, times their coefficients."""
    scores = torch.zeros(len(hidden), len(fused.down_proj)).scatter_(1, index, weights)
    entering = (hidden * scores.T[..., None]).flatten(0, 1)
    found: Tensor = fused(entering).view(len(fused.down_proj), *hidden.shape).sum(0)
    return found


def _blocks(model: Any, family: Family) -> Any:
    return model.get_submodule(f"{family.decoder}.{family.layers}")


def _traces(model: Any, family: Family, ids: Tensor) -> list[Trace]:
    """Of every block, in the run of the whole model."""
    return [traced(block, lambda: model(input_ids=ids, use_cache=False)) for block in _blocks(model, family)]


def _inside(family: Family, model: Any, traces: Sequence[Trace], experts: Mapping[str, Any]) -> Family:
    """With what is in its blocks."""
    inside = sorted({family.inside(name) for name in experts})
    if len(inside) > 1:
        raise Unfit(f"experts lie in {' and '.join(inside)}")
    mixture = _mixture(model, family, inside[0]) if inside else Mixture()
    stages = groups_of(traces, left=[mixture.router, *mixture.gates] if inside else [])
    few = {
        starred(name)
        for block in _blocks(model, family)
        for name, part in block.named_modules()
        if isinstance(part, nn.Linear) and (min(part.out_features, part.in_features) <= FEW or not _mere(part))
    }
    stages = [[_without(group, few) for group in stage] for stage in stages]
    stages = [[group for group in stage if group.linears] for stage in stages]
    mixing = {part for trace in traces for part in trace.mixing}
    kept = {name for stage in stages for group in stage for name in group.linears}
    found: dict[str, set[tuple[str, bool]]] = {}
    for trace in traces:
        for part, end in trace.ends.items():
            found.setdefault(part, set()).add((end, part in trace.mixing))
    # A part that ends otherwise in other blocks has no one stand-in.
    ends = {part: end for part, ways in found.items() for end, _ in ways if len(ways) == 1 and end in kept}
    if len(mixing) > 1:
        raise Unfit(f"{' and '.join(sorted(mixing))} return several things each")
    return replace(
        family,
        stages=tuple(tuple(stage) for stage in stages if stage),
        experts=mixture,
        attention=next(iter(mixing), "self_attn"),
        ends=ends,
    )


def _without(group: Group, few: set[str]) -> Group:
    """A group without linears that choose, or weigh heads, for the others: few weights, on which much depends."""
    left = tuple(name for name in group.linears if name in few or _LEFT.intersection(name.split(".")))
    return replace(group, linears=tuple(name for name in group.linears if name not in left), beside=left)


def _inside_of(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def _mixture(model: Any, family: Family, where: str) -> Mixture:
    """Where experts, their router and what weighs shared ones are."""
    blocks, config = _blocks(model, family), model.config.get_text_config()
    parent, _, _ = where.rpartition(".")
    block = next(block for block in blocks if where in dict(block.named_modules()))
    experts, inside = block.get_submodule(where), block.get_submodule(parent)
    routers, gates = [], []
    for name, module in inside.named_children():
        rows = {len(tensor) for tensor in module.parameters() if tensor.dim() == 2}
        if len(experts) in rows and ("gate" in name or "router" in name):
            routers.append(_inside_of(parent, name))
        elif rows == {1}:
            gates.append(_inside_of(parent, name))
    if len(routers) != 1:
        raise Unfit(f"the router beside {where} is not found")
    width, told = experts[0].up_proj.out_features, config.to_dict()
    widths = [key for key in _WIDTHS if told.get(key) == width]
    dense = any(where not in dict(block.named_modules()) for block in blocks)
    if widths and widths[0] == "intermediate_size" and dense:
        widths = []  # it may widen other blocks too
    counts = [key for key, value in told.items() if value == len(experts) and re.fullmatch(r"(\w+_)?experts", key)]
    own = any("shared" in key and "intermediate" in key and isinstance(value, int) for key, value in told.items())
    parts = [name for name, _ in inside.named_children() if name.startswith("shared_exp") and not gates and not own]
    per_expert = [name for name, tensor in inside.state_dict().items() if tensor.dim() and len(tensor) == len(experts)]
    return Mixture(
        where=where,
        router=routers[0],
        gates=tuple(gates),
        shared=_inside_of(parent, parts[0]) if parts else "",
        rows=tuple(_inside_of(parent, name) for name in per_expert if "." not in name),
        counts=tuple(counts),
        width=next(iter(widths), ""),
        top_k=next((key for key in TOP_K if hasattr(config, key)), ""),
    )


def _skeleton(family: Family, folder: Path) -> Any:
    from .checkpoint import Checkpoint
    from .skeleton import Skeleton

    return Skeleton(Checkpoint(folder, family))


@torch.no_grad()
def walked(skeleton: Any, ids: Tensor) -> Tensor:
    """Logits of a model that is run block by block."""
    hidden = skeleton.embed(ids)
    for index in range(skeleton.blocks):
        hidden = skeleton.run(skeleton.runner(index, skeleton.block(index)), hidden)
    logits: Tensor = skeleton.logits(hidden)
    return logits


def _entering(family: Family, folder: Path) -> Family:
    """With what the decoder does to what enters its first block, which no other block may go through: found by what
    has to be left out until a decoder without blocks puts out what it was given."""
    if family.wide:
        return family
    hidden = torch.randn(1, 4, HIDDEN, generator=torch.Generator().manual_seed(5))

    def same(found: Family) -> bool:
        left = _skeleton(found, folder).run(_skeleton(found, folder).runner_of([]), hidden)
        return bool(torch.equal(left, hidden))

    decoder = _skeleton(family, folder).decoder
    places = [name for name, part in decoder.named_children() if not part.state_dict()]
    factors = [name for name, value in vars(decoder).items() if type(value) is float and value != 1]
    tries = [family, *(replace(family, entrance=(*family.entrance, name)) for name in places)]
    tries += [replace(one, entry=name) for one in tries for name in factors]
    for one in tries:
        try:
            if same(one):
                return one
        except (AttributeError, RuntimeError, TypeError, KeyError, ValueError):  # of a part that cannot be left out
            continue
    raise Unfit("what enters its first block is changed by more than a factor, positions or a norm")


def _check(family: Family, folder: Path, ids: Tensor, expected: Tensor) -> None:
    skeleton = _skeleton(family, folder)
    if not any(skeleton.linears(index) for index in range(skeleton.blocks)):
        raise Unfit("no linear runs in its blocks")
    off = float((walked(skeleton, ids) - expected).norm() / expected.norm())
    if not off < _CLOSE:
        raise Unfit(f"run block by block, its answers are {off:.2g} off")


class _Weightless(nn.Module):
    """A linear as stored ones are: without a weight that could be asked for."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = [linear]

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear[0](x)
        return found


def _mere(linear: nn.Linear) -> bool:
    """Whether a linear, which may be of a class of its own, is a product and no more."""
    hidden = torch.randn(4, linear.in_features, generator=torch.Generator().manual_seed(6))
    try:
        found = linear(hidden)
    except RuntimeError:  # it takes something else
        return False
    return isinstance(found, Tensor) and torch.allclose(
        found, nn.functional.linear(hidden, linear.weight, linear.bias), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def _check_linears(family: Family, model: Any, ids: Tensor) -> None:
    """
    Raises:
        Unfit: linears are used without being called.
    """
    names = {name for stage in family.stages for group in stage for name in group.linears}
    for block in _blocks(model, family):
        for name, part in list(block.named_modules()):
            if isinstance(part, nn.Linear) and starred(name) in names:
                block.set_submodule(name, _Weightless(part))
    try:
        model(input_ids=ids, use_cache=False)
    except AttributeError as error:
        raise Unfit(f"it uses linears without calling them ({first_line(error)})") from None


def _rebuilt(family: Family, model: Any) -> bool:
    """Whether what gives values to new weights leaves linears alone that have none: transformers calls it on models
    whose linears lie in another form. They lose their weights by this. Names of such forms, too, have to be found."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    known = model.state_dict()
    for name in known:
        if name.endswith(".weight") and family.expert(disk := family.disk_name(name)) is None:
            found, _ = rename_source_key(f"{disk}_packed", renamings, [], model.base_model_prefix, known)
            if found != f"{name}_packed":
                return False
    for block in _blocks(model, family):
        for name, part in list(block.named_modules()):
            if isinstance(part, _Weightless):
                del part.linear[0].weight
                block.set_submodule(name, part.linear[0])
    try:
        with torch.no_grad():
            for module in model.modules():
                model._init_weights(module)
    except AttributeError:
        return False
    return True


def _folding(family: Family, folder: Path, ids: Tensor, expected: Tensor) -> Family:
    """With those seams alone across which scales really can be moved."""
    from .folds import folded, seams
    from .skeleton import Skeleton
    from .view import changed

    def fits(found: Family, feeders: set[str]) -> bool:
        skeleton, parts = _skeleton(found, folder), dict[str, Any]()
        try:
            for index in range(skeleton.blocks):
                for name, seam in seams(skeleton, index).items():
                    if starred(name) in feeders:
                        scale = torch.rand(seam.channels, generator=torch.Generator().manual_seed(3)) + 0.5
                        parts |= folded(skeleton, index, seam, scale)
            answers = walked(Skeleton(changed(skeleton.checkpoint, parts)), ids)
        except (RuntimeError, IndexError, KeyError):  # of shapes that do not go together
            return False
        return float((answers - expected).norm() / expected.norm()) < 10 * _CLOSE

    best, held = family, set[str]()
    for offset in (False, True):  # one rule serves all norms of a family
        other = replace(family, offset_norms=offset)
        feeders = {group.reads for stage in family.stages for group in stage if group.reads}
        found = {feeder for feeder in sorted(feeders) if fits(other, {feeder})}
        if len(found) > len(held):
            best, held = other, found
    stages = tuple(
        tuple(replace(group, reads=group.reads if group.reads in held else "") for group in stage)
        for stage in best.stages
    )
    return replace(best, stages=stages)


def _turns(family: Family, folder: Path, ids: Tensor, expected: Tensor) -> bool:
    """Whether rotations change nothing, where the family does not refuse them anyway."""
    from .rotations import Rotation, rotated, stream_width, value_width
    from .skeleton import Skeleton

    skeleton = _skeleton(family, folder)
    try:
        stream = Rotation(stream_width(skeleton), 0, family.centered)
    except ModelError:
        stream = None
    width = value_width(skeleton)
    if stream is None and not width:
        return True
    turned = rotated(skeleton, stream, Rotation(width, 0) if width else None)
    return float((walked(Skeleton(turned), ids) - expected).norm() / expected.norm()) < 100 * _CLOSE


def _caching(family: Family, config: Any, ids: Tensor, expected: Tensor) -> Family:
    """With the projections whose outputs are cached, where attention that may cache latents instead does what the
    family's own does, for all tokens at once and for one after the other."""
    from ..attention import LatentAttention, RotaryTable, rope_obstacle, sliding

    keys, values = (f"{family.attention}.{name}_proj" for name in "kv")
    if family.wide or rope_obstacle(config):
        return family
    model, found = small_model(config), 0
    try:
        table = RotaryTable(model.get_submodule(family.decoder).rotary_emb)
        for index, block in enumerate(_blocks(model, family)):
            if not sliding(config, index) and {keys, values} <= dict(block.named_modules()).keys():
                block.set_submodule(family.attention, LatentAttention(block.get_submodule(family.attention), table))
                found += 1
        with torch.no_grad():
            whole = model(input_ids=ids, use_cache=False).logits
            last = model(input_ids=ids[:, :1])
            for place in range(1, ids.shape[1]):
                last = model(input_ids=ids[:, place : place + 1], past_key_values=last.past_key_values)
    except Exception:  # whatever attention of another kind lacks
        return family
    near = [float((one - other).norm() / other.norm()) for one, other in
            ((whole, expected), (last.logits[:, -1], expected[:, -1]))]  # fmt: skip
    return replace(family, keys=keys, values=values) if found and max(near) < 10 * _CLOSE else family
