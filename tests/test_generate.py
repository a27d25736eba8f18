"""`compressor run`, `chat` and `bench`: what models write, and how fast."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import run

from compressor.cli import generate
from compressor.cli.generate import _Writer
from compressor.compress.apply import apply
from compressor.compress.evaluate.speed import Speed, Work
from compressor.compress.job import Job
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load
from compressor.runtime.errors import RecipeError

Pico = Callable[..., Path]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


@pytest.fixture(scope="module")
def latents(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = "version: 1\npasses: [{kind: lorc, ratio: 1, latent_bits: 8}, {kind: rtn, group_size: 32}]\n"
    out = tmp_path_factory.mktemp("latents") / "out"
    apply(Job(parse_recipe(recipe, "r"), recipe, (), pico(), out, "x"), lambda event: None)
    return out


def greedy(folder: Path, ids: torch.Tensor, count: int) -> list[int]:
    model = load(folder)
    found = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return [int(token) for token in found[0, ids.shape[1] :]]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "latents"])
def test_what_is_kept_of_a_conversation_changes_no_answer(
    kind: str, pico: Pico, latents: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = latents if kind == "latents" else pico(kind)
    draw = torch.Generator().manual_seed(0)
    first = torch.randint(5, 90, (1, 12), generator=draw)
    writer = _Writer(folder, 0.0, 0)
    for turn in range(4):  # goes on; goes on; the past is changed at its beginning; the same once more
        writer.write(first, 6, show_prompt=False)
        exact = greedy(folder, first, 6)
        assert writer.seen is not None
        assert writer.seen.tolist() == first[0].tolist() + exact
        assert capsys.readouterr().out.strip() == writer.text.strip()
        if turn == 2:
            continue
        first = torch.cat([writer.seen[None], torch.randint(5, 90, (1, 7), generator=draw)], 1)
        if turn == 1:
            first[0, 3] = 91


def test_an_answer_can_be_cut_short(pico: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, put = _Writer(pico(), 0.0, 0), generate._Heard.put
    ids = torch.arange(5, 15)[None]
    whole = greedy(pico(), ids, 8)

    def stop(self: generate._Heard, tokens: torch.Tensor) -> None:
        put(self, tokens)
        if len(self.tokens) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(generate._Heard, "put", stop)
        with pytest.raises(KeyboardInterrupt):
            writer.write(ids, 8, show_prompt=False)
    assert writer.seen is not None
    assert writer.seen[10:].tolist() == whole[:3]
    longer = torch.cat([writer.seen[None], torch.tensor([[7]])], 1)
    writer.write(longer, 4, show_prompt=False)
    assert writer.seen[14:].tolist() == greedy(pico(), longer, 4)


def test_a_conversation(pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pico(), folder)
    run("chat", folder, cwd=tmp_path, code=2)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    said, prompts = iter(["one", "", "/what", "two", "/reset", "three", "/exit"]), []
    monkeypatch.setattr("builtins.input", lambda _: next(said))

    def write(self: _Writer, ids: torch.Tensor, max_tokens: int, *, show_prompt: bool) -> None:
        prompts.append(self.tokenizer.decode(ids[0]))
        self.text = "answer"

    monkeypatch.setattr(_Writer, "write", write)
    generate.chat(str(folder), "be brief")
    start = "system: be brief user: one assistant:"
    assert [" ".join(prompt.replace("<end>", " ").split()) for prompt in prompts] == [
        start, f"{start} answer user: two assistant:", "system: be brief user: three assistant:",
    ]  # fmt: skip


def test_a_prompt_beyond_the_positions_is_refused(pico: Pico) -> None:
    with pytest.raises(RecipeError, match="beyond the 256 positions"):
        _Writer(pico(), 0.0, 0).write(torch.ones(1, 256, dtype=torch.int64), 4, show_prompt=False)


def test_bench_times_models_in_turns_and_says_by_what(pico: Pico, latents: Path, tmp_path: Path) -> None:
    words = ("--prompt", 16, "--tokens", 3, "--rounds", 2, "--batch", 2)
    done = run("bench", latents, "--against", pico(), *words, "--json", cwd=tmp_path)
    own, base = json.loads(done.stdout)
    for each in (own, base):
        assert len(each["first"]) == len(each["each"]) == 2
        assert min(*each["first"], *each["each"]) > 0
        assert each["tokens_per_second"]["prompt"] == [2 * 16 / seconds for seconds in each["first"]]
    linears = sum(isinstance(module, torch.nn.Linear) for module in load(pico()).modules())
    assert base["paths"]["a token"] == {"plain weights": linears}
    assert sum(own["paths"]["a prompt"].values()) > linears, "a latent's two factors are two"
    assert "ratio" in run("bench", latents, "--against", pico(), *words, cwd=tmp_path).stdout
    refused = run("bench", latents, "--prompt", 256, cwd=tmp_path, code=2)
    assert "beyond the 256 positions" in refused.stderr


def test_rates_are_of_all_prompts_together() -> None:
    speed = Speed("bfloat16", "cpu", {}, first=[0.5], each=[0.25])
    assert speed.rates(Work(4, 100, 8)) == {"prompt": [800.0], "decode": [16.0]}
