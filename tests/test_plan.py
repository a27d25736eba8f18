"""Plans: from headers alone, refusing what makes no sense before any weight is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from compressor.compress.apply import Job, apply, open_source
from compressor.compress.plan import make_plan, rows
from compressor.compress.recipe import parse_recipe
from compressor.runtime.errors import RecipeError
from compressor.runtime.model.checkpoint import Checkpoint
from compressor.runtime.model.skeleton import Skeleton

Pico = Callable[..., Path]


def planned(model: Path, passes: str):  # type: ignore[no-untyped-def]
    return make_plan(parse_recipe("passes:\n" + passes), Skeleton(open_source(model)))


def test_no_weight_is_read(pico: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "stored_tensor", lambda *_: pytest.fail("read a weight"))
    plan = planned(pico(), "  - {kind: gptq, bits: 4, group_size: 32}\n")
    assert plan.needs == {"moment", "cross"}


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
    assert plan.bytes_before == open_source(pico()).nbytes
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


def test_a_missing_text_is_said_before_anything_else(pico: Pico) -> None:
    text = "data: {source: nowhere.txt}\npasses: [{kind: gptq}]"
    with pytest.raises(RecipeError, match=r"nowhere\.txt: no such text file"):
        make_plan(parse_recipe(text), Skeleton(open_source(pico())))
