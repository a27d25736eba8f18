"""`compressor run` and `chat`: text that a model goes on with, as it is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import render
from .arguments import ModelArgument, model_folder
from .session import session

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

TemperatureOption = Annotated[float, typer.Option(min=0, help="0: the likeliest token each time")]
SeedOption = Annotated[int, typer.Option(help="number that decides what is sampled")]


def run(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="text to go on from")],
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens to generate")] = 64,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
) -> None:
    """Generate text."""
    folder, _ = model_folder(model, None)
    writer = _Writer(folder, temperature, seed)
    ids = writer.tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not ids.numel():
        from ..runtime.errors import RecipeError

        raise RecipeError("--prompt holds no token: give some text to go on from")
    writer.write(ids, max_tokens, show_prompt=True)


def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(help="what the model is told before the conversation")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens of an answer at most")] = 512,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
) -> None:
    """Talk to MODEL by its own chat template.

    /reset starts anew, /exit or Ctrl-D ends, Ctrl-C cuts an answer short.
    """
    folder, _ = model_folder(model, None)
    writer = _Writer(folder, temperature, seed)
    if not writer.tokenizer.chat_template:
        from ..runtime.errors import ModelError

        raise ModelError(
            f"{model}: has no chat template, as models have that were trained to answer; use compressor run"
        )
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    render.err.print("/reset starts anew, /exit or Ctrl-D ends, Ctrl-C stops an answer")
    while (said := _asked()) is not None:
        if said == "/reset":
            messages, writer.cache = list(start), None
            render.err.print("anew: what was said before is forgotten")
            continue
        if said.startswith("/"):
            render.err.print("/reset starts anew, /exit ends; all else is said to the model")
            continue
        messages.append({"role": "user", "content": said})
        ids = writer.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        try:
            writer.write(ids, max_tokens, show_prompt=False)
        except KeyboardInterrupt:
            session.interrupted = False
            print()
        messages.append({"role": "assistant", "content": writer.text})


def _asked() -> str | None:
    """The next line that is not empty; None at the end."""
    while True:
        try:
            said = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            session.interrupted = False
            print()
            return None
        if said == "/exit":
            return None
        if said:
            return said


class _Writer:
    """A model that writes on the screen, token by token; what it has read is kept in its cache."""

    def __init__(self, folder: Path, temperature: float, seed: int) -> None:
        import torch

        from ..calibrate.corpus import load_tokenizer
        from ..runtime.loader import load
        from ..runtime.stored import open_model

        self.positions = open_model(folder).positions
        self.folder, self.tokenizer = folder, load_tokenizer(folder)
        self.model: Any = load(folder)
        self.sampling: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            self.sampling["temperature"] = temperature
        self.cache: Any = None
        self.seen: Tensor | None = None
        self.text = ""
        torch.manual_seed(seed)

    def write(self, ids: Tensor, max_tokens: int, *, show_prompt: bool) -> None:
        """Print what follows tokens `[1, tokens]` as it comes; it is `text` afterwards, also where it was interrupted.

        Raises:
            RecipeError: the model has not so many positions.
            ModelError: the tokenizer is another model's, or what says how to generate is damaged.
        """
        import torch
        from transformers import DynamicCache, TextStreamer

        from ..runtime.errors import ModelError, RecipeError, first_line

        if int(ids.max()) >= (rows := self.model.config.get_text_config().vocab_size):
            raise ModelError(f"{self.folder}: the tokenizer has ids beyond the {rows} rows of the embedding")
        limit = self.positions
        if limit and ids.shape[1] >= limit:
            raise RecipeError(f"{ids.shape[1]:,} tokens are beyond the {limit:,} positions of {self.folder}")
        if self.cache is None or not self._kept(ids):
            self.cache = DynamicCache(config=self.model.config)
        ids = ids.to(self.model.device)
        heard = _Heard(ids.shape[1])
        screen = TextStreamer(self.tokenizer, skip_prompt=not show_prompt, skip_special_tokens=True)
        end = self.tokenizer.eos_token_id
        try:
            self.model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=self.cache, streamer=_Both(screen, heard),
                max_new_tokens=min(max_tokens, limit - ids.shape[1]) if limit else max_tokens,
                pad_token_id=end, tokenizer=self.tokenizer, **self.sampling,
            )  # fmt: skip
        except (TypeError, ValueError, AttributeError) as error:
            if not (self.folder / "generation_config.json").is_file():
                raise
            told = f"transformers cannot generate by it ({first_line(error)}); mend it or delete it"
            raise ModelError(f"{self.folder}/generation_config.json: {told}") from None
        finally:
            self.seen = torch.cat([ids[0].cpu(), torch.tensor(heard.tokens, dtype=ids.dtype)])
            self.text = self.tokenizer.decode(heard.tokens, skip_special_tokens=True)

    def _kept(self, ids: Tensor) -> bool:
        """Whether the cache holds nothing but what tokens begin with; a template may leave out what it put there, and
        the cache of a sliding window cannot go back."""
        assert self.seen is not None
        length = self.cache.get_seq_length()
        shared = min(len(self.seen), ids.shape[1] - 1, length)
        differs = (self.seen[:shared] != ids[0, :shared]).nonzero()
        try:
            if beyond := length - (int(differs[0]) if len(differs) else shared):
                self.cache.crop(-beyond)
        except (RuntimeError, ValueError):  # NotImplementedError is of the former
            return False
        return True


class _Heard:
    """Tokens as they are written, without those of the prompt."""

    def __init__(self, prompt: int) -> None:
        self.tokens: list[int] = []
        self._left = prompt

    def put(self, tokens: Tensor) -> None:
        """What transformers hands to a streamer: the prompt first."""
        found = tokens.flatten().tolist()
        cut = min(self._left, len(found))
        self._left -= cut
        self.tokens += found[cut:]

    def end(self) -> None:
        """Nothing is left to do."""


class _Both:
    """Two streamers that are told the same."""

    def __init__(self, *streamers: Any) -> None:
        self._streamers = streamers

    def put(self, tokens: Tensor) -> None:
        for streamer in self._streamers:
            streamer.put(tokens)

    def end(self) -> None:
        for streamer in self._streamers:
            streamer.end()
