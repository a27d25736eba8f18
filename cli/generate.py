"""`compressor run`: text that a model goes on with."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .arguments import ModelArgument, model_folder


def run(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="text to go on from")],
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens to generate")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token each time")] = 0.0,
    seed: Annotated[int, typer.Option(help="number that decides what is sampled")] = 0,
) -> None:
    """Generate text."""
    folder, _ = model_folder(model, None)

    import torch

    from ..calibrate.corpus import load_tokenizer
    from ..runtime.errors import RecipeError
    from ..runtime.loader import load

    tokenizer = load_tokenizer(folder)
    loaded: Any = load(folder)
    torch.manual_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(loaded.device)
    if not ids.numel():
        raise RecipeError("--prompt holds no token: give some text to go on from")
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    generated = loaded.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )  # fmt: skip
    print(tokenizer.decode(generated[0], skip_special_tokens=True))
