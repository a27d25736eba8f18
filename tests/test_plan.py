"""Plans: from headers alone, refusing what makes no sense before any weight is read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compressor import compress
from compressor.calibrate.drive import start_chains
from compressor.calibrate.statistics import KINDS
from compressor.calibrate.walk import walk
from compressor.compress.apply import Job, apply
from compressor.compress.parallel import unsplittable
from compressor.compress.passes.linear.rtn import Rtn
from compressor.compress.plan import Plan, make_plan, rows
from compressor.compress.recipe import parse_recipe
from compressor.compress.resources import chain_names
from compressor.runtime.errors import RecipeError
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.families import FAMILIES
from compressor.runtime.model.skeleton import Skeleton
from compressor.runtime.stored import open_model

Pico = Callable[..., Path]


def planned(model: Path, passes: str):  # type: ignore[no-untyped-def]
    return make_plan(parse_recipe("passes:\n" + passes), Skeleton(open_model(model)))


def test_no_weight_is_read(pico: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "stored_tensor", lambda *_: pytest.fail("read a weight"))
    plan = planned(pico(), "  - {kind: gptq, bits: 4, group_size: 32}\n")
    assert plan.needs == {"compressed", "moment", "cross", "held_moment", "held_cross"}


def test_the_plan_is_what_is_written(pico: Pico, tmp_path: Path) -> None:
    text = (
        "passes:\n  - {kind: rtn, bits: 3, group_size: 32, targets: ['*.mlp.*'], ignore: ['re:.*\\.0\\..*down_proj']}\n"
    )
    plan = apply(Job(parse_recipe(text), text, (), pico(), tmp_path / "out", "pico"), lambda event: None)
    found = {}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            found[name] = (file.get_tensor(name).dtype, tuple(file.get_tensor(name).shape))
    assert found == plan.tensors
    assert plan.bytes_before == open_model(pico()).nbytes
    folded = {row.name: row for row in rows(plan)}
    assert folded["model.layers.*.mlp.gate_proj"].steps == ("rtn",)
    assert folded["model.layers.*.mlp.gate_proj"].count == 2
    assert folded["model.layers.*.self_attn.q_proj"].steps == ()
    assert folded["model.layers.0.mlp.down_proj"].becomes == "dense"
    assert folded["model.layers.1.mlp.down_proj"].becomes == "int3 g32"


@pytest.mark.parametrize(
    ("passes", "match"),
    [
        (
            "  - {kind: rtn, targets: ['*.qproj']}\n",
            r"passes\.0 \(rtn\) matches no linear.*names look like model\.layers",
        ),
        (
            "  - {kind: rtn}\n  - {kind: gptq}\n",
            "passes.1: gptq cannot take .*, which an earlier pass has compressed",
        ),
    ],
)
def test_senseless_recipes_are_refused(pico: Pico, passes: str, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        planned(pico(), passes)


def test_a_pass_may_not_make_a_tensor_larger(pico: Pico) -> None:
    tiny = {
        "hidden_size": 16,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 1,
        "intermediate_size": 16,
    }
    with pytest.raises(RecipeError, match=r"would make .*q_proj larger: 32 → 34 bytes; ignore it"):
        planned(pico("llama", **tiny), "  - {kind: rtn, bits: 8, group_size: 16}\n")


def lines_run(work: Callable[[], object]) -> int:
    """How many lines of this package `work` goes through, a comprehension's as often as it goes around."""
    count, here = 0, str(Path(compress.__file__).parent.parent)

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(here):
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_a_block_takes_no_more_work_in_a_larger_model(pico: Pico, tmp_path: Path) -> None:
    """A mixture of experts has a hundred thousand tensors: none may be looked up by going through all others."""
    text = "passes: [{kind: rtn, bits: 4, group_size: 32}]"

    def run(blocks: int) -> int:
        model, out = pico("qwen3_moe", num_hidden_layers=blocks), tmp_path / f"{blocks}"
        job = Job(parse_recipe(text), text, (), model, out, "pico")
        return lines_run(lambda: apply(job, lambda event: None))

    run(1)
    few, some, many = run(2), run(8), run(14)
    assert many - some == pytest.approx(some - few, rel=0.005)


def test_work_that_is_done_on_the_way_is_in_the_plan(pico: Pico) -> None:
    skeleton = Skeleton(Checkpoint(pico()))

    def planned(passes: str) -> Plan:
        return make_plan(parse_recipe(f"data: {{samples: 8, sequence_length: 64}}\npasses: [{passes}]"), skeleton)

    weights = sum(w.in_features * w.out_features for n in range(2) for w in skeleton.linears(n).values())
    assert planned("{kind: rtn, bits: 4, group_size: 32}").work["comparing"] > 2 * 2 * 1024 * weights  # two models
    options = "kind: gptq, bits: 4, group_size: 32, correction:"
    none, whole, auto = (sum(planned(f"{{{options} {how}}}").work.values()) for how in ("0", "1", "auto"))
    assert none < whole
    shapes = [(w.out_features, w.in_features) for n in range(2) for w in skeleton.linears(n).values()]
    second = sum(
        2 * columns**3 + 4 * rows * columns**2 for rows, columns in shapes
    )  # a system, and what it is tried on
    own = [
        w
        for n in range(2)
        for name, w in skeleton.linears(n).items()
        if not name.endswith(("k_proj", "v_proj", "up_proj"))
    ]
    held = sum(
        2 * 8 * 64 * w.in_features**2 * (1 / 2 + 1) / 4 for w in own
    )  # a quarter of moment and cross, of a group
    assert auto - whole == pytest.approx(second + held)


def test_work_of_experts_is_that_of_the_tokens_they_see(pico: Pico) -> None:
    def planned(experts: int) -> dict[str, float]:
        skeleton = Skeleton(Checkpoint(pico("qwen3_moe", num_experts=experts)))
        recipe = "data: {samples: 8, sequence_length: 64}\npasses: [{kind: gptq, objective: model, group_size: 32}]"
        return dict(make_plan(parse_recipe(recipe), skeleton).work)

    few, many = planned(4), planned(8)
    assert many["passes"] > 1.5 * few["passes"]
    assert {name: many[name] for name in ("surveys", "blocks", "comparing")} == pytest.approx(
        {name: few[name] for name in ("surveys", "blocks", "comparing")}
    )


@pytest.mark.parametrize(
    ("passes", "kinds"),
    [("{kind: sparse24, correction: 1}", ("moment", "cross")), ("{kind: sparse24, sequential: false}", ("moment",))],
)
def test_work_of_blocks_is_that_of_their_products(
    passes: str, kinds: tuple[str, ...], pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = Skeleton(Checkpoint(pico(num_hidden_layers=2)))
    plan = make_plan(parse_recipe(f"data: {{samples: 8, sequence_length: 64}}\npasses: [{passes}]"), skeleton)
    linears = {name: w for index in range(2) for name, w in skeleton.linears(index).items()}
    run = 0

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        nonlocal run
        run += x.shape[:-1].numel() * weight.numel()
        return linear(x, weight, bias)

    linear = torch.nn.functional.linear
    monkeypatch.setattr("torch.nn.functional.linear", counted)
    windows = torch.randint(0, 128, (8, 64), generator=torch.Generator().manual_seed(0))
    chains = start_chains(skeleton, windows, tmp_path, chain_names(plan.needs))
    for block in walk(skeleton, chains, dict.fromkeys(linears, kinds)):
        list(block.stages())
        block.advance()
    each = [
        w.in_features**2 for name, w in linears.items() if name.endswith(("q_proj", "o_proj", "up_proj", "down_proj"))
    ]
    summed = 512 * sum(each) * sum(KINDS[kind].work for kind in kinds)
    assert plan.work["blocks"] == pytest.approx(2 * (run + summed))


def test_a_plan_that_no_survey_changes_is_made_once(
    pico: Pico, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for module in ("apply", "plan"):
        monkeypatch.setattr(
            f"compressor.compress.{module}.make_plan", lambda *a, **o: made.append(make_plan(*a, **o)) or made[-1]
        )
    data = f"data: {{source: {calibration_text}, samples: 4, sequence_length: 32}}\n"
    for number, (passes, count) in enumerate([("{kind: gptq, bits: 4}", 1), ("{kind: lorc, ratio: .5}", 2)]):
        text = f"{data}passes: [{passes}]"
        job = Job(parse_recipe(text), text, (), pico(), tmp_path / f"{number}", "pico")
        assert apply(job, lambda event: None) is made[-1]
        assert len(made) == count
        made.clear()


def test_groups_are_the_largest_that_others_take(pico: Pico) -> None:
    [step] = parse_recipe("passes: [{kind: rtn}]").passes
    assert isinstance(step, Rtn)
    found = [step.rounding(columns, "x").columns for columns in (576, 1536, 4096, 96, 128, 100, 1000, 11008, 160)]
    assert found == [64, 128, 128, -1, 128, -1, 128, 128, 32]  # of 1000 columns they take nothing but a scale a row
    ragged = pico(hidden_size=192, head_dim=32, num_attention_heads=6, num_key_value_heads=2)
    plan = make_plan(parse_recipe("passes: [{kind: rtn}]"), Skeleton(open_model(ragged)))
    assert plan.format.name == "compressed-tensors"
    plan = make_plan(parse_recipe("passes: [{kind: rtn, group_size: 128}]"), Skeleton(open_model(ragged)))
    assert plan.format.name == "compressor"
    assert plan.obstacle.endswith("(int4 g128, 192 columns, which group_size: auto would divide)")


def test_a_missing_text_is_said_before_anything_else(pico: Pico) -> None:
    text = "data: {source: nowhere.txt}\npasses: [{kind: gptq}]"
    with pytest.raises(RecipeError, match=r"nowhere\.txt: no such text file"):
        make_plan(parse_recipe(text), Skeleton(open_model(pico())))


def test_what_engines_cannot_share_out(pico: Pico) -> None:
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 6}
    model = pico("llama", **sizes, num_key_value_heads=6)
    assert unsplittable(planned(model, "  - {kind: rtn, bits: 4, group_size: 32}\n"), 3) == []
    plan = planned(
        model,
        "  - {kind: rtn, bits: 4, group_size: 64, targets: '*.down_proj'}\n"
        "  - {kind: rtn, scheme: mxfp4a16, targets: '*.o_proj'}\n"
        "  - {kind: rtn, bits: 4, group_size: -1, targets: '*.q_proj'}\n",
    )
    place, parts = "model.layers.*", "columns in 2 parts are"
    assert unsplittable(plan, 2) == [
        "format compressor is read by compressor alone, which shares nothing out",
        f"{place}.self_attn.o_proj: 96 {parts} 48 each, into which groups of 32 do not fit (2 of them)",
        f"{place}.mlp.down_proj: 192 {parts} 96 each, into which groups of 64 do not fit; groups of 32 do (2 of them)",
    ]
    found = unsplittable(plan, 5)
    assert found[1] == "6 attention heads are no multiple of 5"
    assert "model.layers.*.self_attn.q_proj: 96 rows are no multiple of 5 (2 of them)" in found
    assert "model.layers.*.mlp.up_proj: 192 rows are no multiple of 5 (2 of them)" in found  # as it is


def test_heads_of_keys_are_repeated_but_not_cut(pico: Pico) -> None:
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 6}
    plan = planned(pico("llama", **sizes, num_key_value_heads=3), "  - {kind: rtn, bits: 4, group_size: 16}\n")
    assert unsplittable(plan, 2) == ["3 heads of keys and values neither divide 2 nor are a multiple of it"]
    assert unsplittable(plan, 6) == []  # each head of keys on two
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 128}
    plan = planned(pico("llama", **sizes, num_key_value_heads=2), "  - {kind: rtn, scheme: fp8-block}\n")
    assert unsplittable(plan, 4) == []  # a whole block of keys each, though they are two in all


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_shared_out_is_what_transformers_shares_out(name: str) -> None:
    said = getattr(CONFIG_MAPPING[name], "base_model_tp_plan", None) or {}
    family = FAMILIES[name]
    linears = [one for stage in family.stages for group in stage for one in group.linears]
    for linear in linears:
        how = said.get(f"layers.*.{linear}", "").split("_")[0]
        if how in ("colwise", "rowwise") and "experts" not in linear:
            assert family.split(linear) == (how == "rowwise"), linear
    if "self_attn.q_a_proj" in linears:  # a norm reads all of it
        assert family.split("self_attn.q_a_proj") is None
        assert family.split("self_attn.q_b_proj") == 0
    if "mlp.experts.*.down_proj" in linears:
        assert (family.split("mlp.experts.3.up_proj"), family.split("mlp.experts.3.down_proj")) == (0, 1)
