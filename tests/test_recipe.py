"""Recipes: mistakes are found all at once and point at the line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from compressor.compress.guide import passes_guide
from compressor.compress.passes import PASSES
from compressor.compress.recipe import (
    RENAMED,
    Data,
    Output,
    Recipe,
    json_schema,
    options_table,
    parse_recipe,
    read_recipe,
    resolved_yaml,
    shipped,
)
from compressor.runtime.errors import RecipeError

ROOT = Path(__file__).resolve().parent.parent
GOOD = "passes:\n  - kind: gptq\n    bits: 4\n"


def mistakes(text: str, *edits: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml", edits)
    return [line for line in str(caught.value).splitlines() if line.startswith(("r.yaml", "--set"))]


@pytest.mark.parametrize("name", list(shipped()))
def test_shipped_recipes_are_valid_and_survive_resolution(name: str) -> None:
    text = shipped()[name]
    assert "schema.json" not in text, "a copy lies elsewhere"
    recipe = parse_recipe(text, name)
    assert recipe.description
    assert parse_recipe(resolved_yaml(recipe)) == recipe
    jsonschema.validate(yaml.safe_load(text), json_schema())


def test_recipes_are_found_by_their_old_names() -> None:
    for old, new in RENAMED.items():
        assert old not in shipped()
        assert read_recipe(old) == (f"{new}.yaml", shipped()[new])


def test_what_options_do_is_understood_without_their_neighbours() -> None:
    for kind in (Recipe, Data, Output, *PASSES.values()):
        for key, field in kind.model_fields.items():
            if key != "kind" and key not in ("data", "output"):
                text = field.description or ""
                assert len(text.split()) > 3, (kind, key)
                assert not text.startswith(("of ", "in the order", "this")), (kind, key)


def test_committed_schema_is_current() -> None:
    assert json.loads((ROOT / "recipes" / "schema.json").read_text(encoding="utf-8")) == json_schema()


def test_all_mistakes_at_once_each_with_its_place() -> None:
    text = (
        "data:\n  samples: many\npasses:\n  - kind: gptq\n    bits: 7\n    group_sise: 64\n"
        "  - kind: gtpq\n  - bits: 4\n"
    )
    assert mistakes(text) == [
        "r.yaml:2:12: data.samples: Input should be a valid integer, unable to parse string as an integer",
        "r.yaml:5:11: passes.0.bits: Input should be 2, 3, 4, 5, 6, 8 or 'mixed'",
        "r.yaml:6:5: passes.0.group_sise: unknown key (did you mean 'group_size'?)",
        "r.yaml:7:11: passes.1.kind: unknown pass 'gtpq' (did you mean 'gptq'?)",
        "r.yaml:8:5: passes.2: a pass needs a 'kind'; known: rtn, gptq, awq, smoothquant, outlier_columns, sparse24, "
        "armor, eora, stored, lorc, expert_prune, expert_width, rotate",
    ]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("passes: []\n", "r.yaml:1:9: passes: "),
        ("version: 1\n", "r.yaml:1:1: the key 'passes' is missing"),
        ("version: 2\n" + GOOD, "r.yaml:1:10: version: "),
        ("- a\n", "r.yaml:1:1: a recipe is a mapping"),
        ("", "r.yaml:1:1: a recipe is a mapping"),
        ("passes: [\n", "r.yaml:2:1: "),
        ("passes:\n  - {kind: rtn}\npasses:\n  - {kind: rtn}\n", "r.yaml:3:1: duplicate key 'passes', first on line 1"),
        (
            "passes:\n  - kind: rtn\n    targets: ['re:(']\n",
            "r.yaml:3:15: passes.0.targets.0: not a regular expression",
        ),
        ("passes:\n  - kind: rtn\n    group_size: 100\n", "r.yaml:3:17: passes.0.group_size: group_size is 16"),
        ("outputs: {}\n" + GOOD, "r.yaml:1:1: outputs: unknown key (did you mean 'output'?)"),
    ],
)
def test_each_mistake_has_its_line(text: str, place: str) -> None:
    found = mistakes(text)
    assert len(found) == 1
    assert found[0].startswith(place)


def test_edits_change_the_recipe_and_are_named_when_wrong() -> None:
    recipe = parse_recipe(GOOD, "r", ("passes.0.bits=3", "data.seed=5", "output.format=compressor"))
    assert (recipe.passes[0].bits, recipe.data.seed, recipe.output.format) == (3, 5, "compressor")
    assert mistakes(GOOD, "data.seed=-1") == ["--set data.seed: Input should be greater than or equal to 0"]
    assert mistakes(GOOD, "passes.0.bit=3")[0].startswith("--set passes.0.bit: unknown key (did you mean 'bits'?)")
    for value in ("*.mlp.*", "re:.*[.]mlp[.].*", "['*.mlp.*']"):  # a single pattern need not be a list
        assert (
            parse_recipe(GOOD, "r", (f"passes.0.targets={value}",))
            .passes[0]
            .targets[0]
            .endswith("mlp.*" if value[0] != "r" else "[.].*")
        )
    for edit in ("bits", "passes.4.bits=3", "version.x=1", "passes.²=1", "passes.０.bits=3", "x=!!timestamp x"):
        with pytest.raises(RecipeError, match="--set"):
            parse_recipe(GOOD, "r", (edit,))


@pytest.mark.parametrize(
    "text", ["description: 2020-13-45\n", "? [a, b]\n: 1\n", "passes: &a [*a]\n", "a: !!timestamp x\n"]
)
def test_odd_yaml_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    assert str(caught.value).startswith("r.yaml:")


def test_the_page_of_options_is_current() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert page.endswith(options_table()), "write it anew: compressor recipes options"


def test_the_page_on_passes_is_current() -> None:
    page = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")
    assert page == passes_guide(), "write it anew: compressor recipes passes > docs/passes.md"
    for kind, made in PASSES.items():
        assert f"\n## {kind}\n" in page
        assert len((sys.modules[made.__module__].__doc__ or "").split()) > 10


def test_a_wrong_edit_is_named_and_not_the_line_it_replaced() -> None:
    assert mistakes(GOOD, "passes.0.bits=7")[0].startswith("--set passes.0.bits: ")


def test_unknown_recipe_names_offer_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'w4a16-gptq'"):
        read_recipe("w4a16-gptk")


@pytest.mark.parametrize(
    ("entry", "key", "condition"),
    [
        ("kind: lorc, ratio: 0.5, correction: 0.5", "correction", "without calibrated: true"),
        ("kind: lorc, ratio: 0.5, damping: 0.1", "damping", "without calibrated: true"),
        ("kind: lorc, ratio: 0.5, sequential: false", "sequential", "without calibrated: true"),
        ("kind: lorc, ratio: 0.5, objective: outputs", "objective", "without calibrated: true"),
        ("kind: armor, solver: adam, polish: 10", "polish", "with solver: adam"),
        ("kind: armor, objective: proxy, shrinkage: 0.3", "shrinkage", "with objective: proxy"),
        ("kind: gptq, sequential: false, correction: 0.5", "correction", "with sequential: false"),
        ("kind: sparse24, method: wanda, sweeps: 3", "sweeps", "with method: wanda"),
        ("kind: sparse24, method: magnitude, damping: 0.1", "damping", "with method: magnitude"),
        ("kind: expert_prune, ratio: 0.5, similarity: 0.2", "similarity", "without merge: dern"),
        ("kind: expert_prune, ratio: 0.5, refit: false, damping: 0.1", "damping", "with refit: false"),
        ("kind: expert_prune, ratio: 0.5, seed: 3", "seed", "without criterion: random"),
        ("kind: expert_prune, ratio: 0.5, criterion: reconstruction, min_tokens: 3", "min_tokens", "reconstruction"),
        ("kind: expert_width, ratio: 0.5, criterion: activation, refit: false, damping: 0.1", "damping", "activation"),
        ("kind: expert_width, ratio: 0.5, criterion: activation, objective: model", "objective", "activation"),
    ],
)
def test_a_key_that_does_nothing_is_a_mistake(entry: str, key: str, condition: str) -> None:
    with pytest.raises(RecipeError, match=rf"{key} does nothing .*{condition}.*: leave it out"):
        parse_recipe(f"passes: [{{{entry}}}]")


@pytest.mark.parametrize("name", list(shipped()))
def test_a_recipe_with_every_default_written_out_is_the_same(name: str) -> None:
    recipe = parse_recipe(shipped()[name])
    assert parse_recipe(resolved_yaml(recipe)) == recipe


def test_aliases_of_aliases_are_no_endless_work() -> None:
    """Nine levels of nine are 387 million entries, of 400 bytes."""
    lines = ["a: &a [x]"]
    for one, other in zip("abcdefghi", "bcdefghij", strict=True):
        lines.append(f"{other}: &{other} [{', '.join([f'*{one}'] * 9)}]")
    with pytest.raises(RecipeError, match="more than 10,000 entries, aliases followed"):
        parse_recipe("\n".join([*lines, "passes: [{kind: rtn}]"]))
    with pytest.raises(RecipeError, match="not a recipe"):
        parse_recipe("a: &a [*a]\npasses: [{kind: rtn}]")
    many = ", ".join(f"l{number}: 4" for number in range(12_000))  # as a survey of a large mixture leaves
    assert len(parse_recipe(f"passes: [{{kind: rtn, bits: mixed, widths: {{{many}}}}}]").passes[0].widths) == 12_000
    targets = "&t ['*.mlp.*']"
    steps = parse_recipe(f"passes: [{{kind: rtn, targets: {targets}}}, {{kind: gptq, ignore: *t}}]").passes
    assert steps[0].targets == steps[1].ignore
