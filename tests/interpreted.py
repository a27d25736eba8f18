"""Whole models by the kernels in Triton's interpreter, beside the CPU's own paths; run by `test_interpreter.py`.

TRITON_INTERPRET=1 python tests/interpreted.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from pretend import pretended

from compressor.kernels import dispatch
from compressor.runtime import load
from compressor.runtime.attention import LatentAttention
from compressor.runtime.model.experts import PackedExperts
from compressor.runtime.schemes import ArmorLinear, BlockScaledLinear, IntLinear, RowsLinear, Sparse24Linear, W8A8Linear

KINDS: dict[type, str] = {
    IntLinear: "int", BlockScaledLinear: "block_scaled", Sparse24Linear: "sparse24", W8A8Linear: "w8a8"
}  # fmt: skip


def executed(model: Any) -> set[str]:
    """What of a model the kernels run."""
    found = set()
    for module in model.modules():
        if isinstance(module, RowsLinear) and module.device_layout:
            found.add(KINDS[type(module)])
        if isinstance(module, ArmorLinear) and module._blocks is not None:
            found.add("armor")
        if isinstance(module, LatentAttention) and module._kernel is not None:
            found.add("latents")
        if isinstance(module, PackedExperts):
            found.add("experts")
    return found


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of a prompt, and of a token after it."""
    first = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
    last = model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=first.past_key_values)
    return torch.cat([first.logits, last.logits], 1).double()[mask.bool()]


def check_dtypes(packed: PackedExperts, hidden_size: int) -> None:
    """Activations in another dtype than that of the layout, as after `model.float()`."""
    x = torch.randn(5, hidden_size, device="cuda").half()
    choice, weights = torch.arange(5, device="cuda")[:, None] % 2, torch.ones(5, 1, device="cuda")
    assert torch.equal(packed(x.float(), choice, weights), packed(x, choice, weights).float())


def run(folder: Path) -> None:
    """Prints what of a model the kernels ran, and its and the CPU's own error."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 60, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # padded on the left
    dtype = torch.bfloat16 if folder.name == "block_scaled" else torch.float16  # floats are decoded to bfloat16 alone
    dispatch.cpu_capability()  # which asks the processor itself
    with pretended():  # as on a GPU: nothing of the CPU may get into it
        model = load(folder, "cuda", dtype)
        kinds = executed(model)
        blocks = {name: one for name, one in model.named_modules() if isinstance(one, BlockScaledLinear)}
        weights = {name: one.whole(dtype).cpu() for name, one in blocks.items()}
        by_kernels = logits(model, ids.to("cuda"), mask.to("cuda")).cpu()
        for packed in (module for module in model.modules() if isinstance(module, PackedExperts)):
            check_dtypes(packed, model.config.hidden_size)
    with mock.patch.object(dispatch, "has_kernels", return_value=False):
        plain = load(folder, "cpu", dtype)
        assert not executed(plain)
        for name, weight in weights.items():  # before inputs are rounded; the interpreter cuts bfloat16 off
            torch.testing.assert_close(weight, plain.get_submodule(name).whole(dtype), rtol=2.0**-7, atol=0.0, msg=name)
        exact, by_hand = logits(load(folder, "cpu", torch.float32), ids, mask), logits(plain, ids, mask)
    errors = [float((one - exact).norm() / exact.norm()) for one in (by_kernels, by_hand)]
    print(folder.name, ",".join(sorted(kinds)), *errors)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(Path(name))
