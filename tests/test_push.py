"""`compressor push`, and the front matter of the card that it shows on the hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml

from compressor.cli.folders import push
from compressor.compress.apply import apply
from compressor.compress.job import Job
from compressor.compress.recipe import parse_recipe
from compressor.runtime.errors import ModelError, VerifyError

Pico = Callable[..., Path]


@pytest.fixture(scope="module")
def output(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = "version: 1\npasses: [{kind: rtn, group_size: 32}]\n"
    out = tmp_path_factory.mktemp("push") / "out"
    apply(Job(parse_recipe(recipe, "r"), recipe, (), pico(), out, "some/model: x", "abc"), lambda event: None)
    return out


def test_the_card_says_what_the_hub_reads(output: Path) -> None:
    card = huggingface_hub.ModelCard.load(output / "README.md")
    front = yaml.safe_load((output / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert front["base_model"] == "some/model: x"
    assert front["library_name"] == card.data.library_name == "transformers"
    assert front["tags"] == ["compressor", "compressed-tensors", "rtn"]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results or []}
    assert set(results) == {
        "perplexity", "perplexity ratio to the original", "KL from the original, nats per token",
    }  # fmt: skip
    assert 0 < results["KL from the original, nats per token"] < 1


def test_only_whole_outputs_are_pushed(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[Any] = []

    class Hub:
        def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
            told.append((name, private, exist_ok))

        def create_commit(self, name: str, files: list[Any], *, commit_message: str) -> Any:
            if name.startswith("nobody/"):
                raise PermissionError("401 who are you?\nmore")
            told.append((name, {file.path_in_repo for file in files}, commit_message))
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    (output / "notes.md").write_text("mine alone")
    push(output, "me/small", private=True)
    assert capsys.readouterr().out.strip() == "https://hub/commit/1"
    listed = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()} - {"notes.md"}
    assert told == [("me/small", True, True), ("me/small", listed, "Upload a compressed model")]
    with pytest.raises(ModelError, match=r"nobody/x: not uploaded \(401 who are you\?\)"):
        push(output, "nobody/x")
    with pytest.raises(ModelError, match="owner/name"):
        push(output, "small")
    told.clear()
    with pytest.raises(VerifyError, match=r"no compressor\.json"):
        push(output.parent, "me/small")
    (output / "config.json").write_text("{}")
    with pytest.raises(VerifyError):
        push(output, "me/small")
    assert told == []
