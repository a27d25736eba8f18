"""Which kernel runs what, on devices that are not here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compressor.kernels import dispatch
from compressor.kernels.dispatch import GpuCapability, Launch, Tile

H200 = GpuCapability("NVIDIA H200", "cuda", 90, 132, 232448)
A100 = GpuCapability("NVIDIA A100-SXM4-80GB", "cuda", 80, 108, 166912)
ADA = GpuCapability("NVIDIA GeForce RTX 4090", "cuda", 89, 128, 101376)
MI300 = GpuCapability("AMD Instinct MI300X", "hip", 94, 304, 65536)


def launch(tokens: int, gpu: GpuCapability = H200, rows: int = 4096, columns: int = 4096) -> Launch:
    return dispatch.linear_launch("group_linear", tokens, rows, columns, "int4", 128, 128, torch.bfloat16, gpu)


@pytest.fixture(autouse=True)
def _no_tuned_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dispatch, "config_file", lambda gpu: tmp_path / f"{gpu.name}.json")
    dispatch.tuned.cache_clear()


def test_tiles_grow_with_the_tokens() -> None:
    for gpu in (H200, A100, ADA, MI300, dispatch.INTERPRETER):
        sizes = [launch(tokens, gpu).tile.tokens for tokens in (1, 8, 9, 16, 17, 64, 65, 192)]
        assert sizes == sorted(sizes)
        assert all(found >= min(tokens, 64) for found, tokens in zip(sizes, (1, 8, 9, 16, 17, 64), strict=False))


def test_many_tokens_share_a_decoded_weight() -> None:
    assert launch(192).kernel == "gemm"
    assert launch(193).kernel == "expand"


def test_small_layers_are_split_and_large_ones_are_not() -> None:
    assert launch(1).splits > 1
    assert launch(1, rows=1 << 17).splits == 1
    assert launch(1, columns=256).splits == 1  # two tiles: nothing to share
    assert launch(1, rows=896, columns=896).splits == 3
    assert launch(192, rows=28672, columns=8192).splits == 1  # parts would be as large as the weight
    assert launch(0).splits >= 1  # an empty batch
    for tokens in (1, 16, 64, 192):
        found = launch(tokens)
        assert 4096 // 128 // found.splits >= dispatch.TILES_PER_SPLIT or found.splits == 1


def test_assembly_is_for_nvidia_alone() -> None:
    assert H200.assembly
    assert not MI300.assembly
    assert not dispatch.INTERPRETER.assembly


def write(gpu: GpuCapability, launches: dict[str, Launch]) -> None:
    entries = {
        key: {"kernel": one.kernel, "tile": list(one.tile), "splits": one.splits} for key, one in launches.items()
    }
    device = {"device": gpu.name, "backend": gpu.backend, "arch": gpu.arch, "processors": gpu.processors}
    dispatch.config_file(gpu).write_text(json.dumps(device | {"launches": entries}), encoding="utf-8")


def test_a_tuned_configuration_wins_and_serves_its_neighbours() -> None:
    key = dispatch.config_key("group_linear", 4, 4096, 4096, "int4", 128, torch.bfloat16)
    large = dispatch.config_key("group_linear", 4, 28672, 8192, "int4", 128, torch.bfloat16)
    first, second = Launch("gemm", Tile(16, 32, 2, 5), 3), Launch("gemm", Tile(16, 128, 4, 3), 1)
    write(H200, {key: first, large: second})
    assert launch(4) == launch(3) == first  # 3 tokens run like 4
    assert launch(4, rows=4096, columns=5120) == first
    assert launch(4, rows=28672, columns=4096) == second
    assert launch(4, A100) not in (first, second)
    assert launch(1) not in (first, second)


def test_a_device_without_a_file_runs_as_the_nearest_of_its_architecture() -> None:
    key = dispatch.config_key("group_linear", 4, 4096, 4096, "int4", 128, torch.bfloat16)
    small = GpuCapability("NVIDIA H100 PCIe", "cuda", 90, 114, 232448)
    mine, other = Launch("gemm", Tile(16, 32, 2, 5), 3), Launch("gemm", Tile(16, 128, 4, 3), 1)
    write(H200, {key: mine})
    write(GpuCapability("NVIDIA H20", "cuda", 90, 78, 232448), {key: other})
    assert launch(4, small) == mine
    assert launch(4, A100) not in (mine, other)
    assert launch(4, GpuCapability("", "cuda", 90, 114, 232448)) not in (mine, other)
    dispatch.tuned.cache_clear()
    write(small, {key: other})
    assert launch(4, small) == other


def test_every_shipped_configuration_tells_whom_it_serves() -> None:
    for file in (Path(dispatch.__file__).parent / "configs").glob("*.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        assert record["device"].replace(" ", "_") == file.stem
        gpu = GpuCapability(record["device"], record["backend"], record["arch"], record["processors"], 0)
        assert (gpu.family, len(record["launches"]) > 200) == ("hopper", True)


def test_groups_that_the_kernels_take() -> None:
    taken = [size for size in (8, 16, 32, 48, 64, 96, 128, 160, 256, 384) if dispatch.has_group_linear(size, 1024)]
    assert taken == [16, 32, 64, 128, 256, 384]  # with 96, a plane of the tile after would have another scale
    assert dispatch.has_group_linear(96, 96)  # a scale for the whole row
    assert [size for size in (16, 32, 64, 96) if dispatch.has_sparse_linear(size, 512)] == [32, 64, 96]


def test_what_is_tuned_serves_every_number_of_tokens() -> None:
    assert {dispatch.bucket(tokens) for tokens in range(1, 513)} == {1, 4, 16, 32, 64, 128, 256, 512}


def test_experts_have_a_tile_for_any_number_of_tokens() -> None:
    for tokens in (0, 1, 100, 10**6):
        assert dispatch.experts_tile(tokens, 1408, 2048, "int4", 128, torch.bfloat16, H200).tokens >= 16


def test_gpus_that_are_trusted_with_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [gpu.family for gpu in (H200, A100, ADA, MI300)] == ["hopper", "ampere", "ada", "amd"]
    able = {arch: GpuCapability("x", "cuda", arch, 100, 101376).trusted for arch in (75, 80, 90, 100, 103, 110, 120)}
    assert able == {75: False, 80: True, 90: True, 100: False, 103: False, 110: False, 120: True}
    for gpu in (A100, GpuCapability("B200", "cuda", 100, 148, 232448)):
        monkeypatch.setattr(dispatch, "gpu_capability", lambda device, gpu=gpu: gpu)
        assert dispatch.has_kernels(torch.device("cuda"), torch.bfloat16) is (gpu is A100)
    assert not dispatch.has_kernels(torch.device("cuda"), torch.float32)
    assert [dispatch.has_attention(width, ADA) for width in (512, 1024)] == [True, False]


def test_tuned_attention_serves_its_own_shape_alone() -> None:
    shape = (128, 4, 64, 64, False, torch.bfloat16)
    mine = Launch("attention", Tile(128, 64, 8, 1), 4)
    write(H200, {dispatch.attention_key(*shape): mine})
    assert dispatch.attention_launch(*shape, H200) == mine
    assert dispatch.attention_launch(256, *shape[1:], H200) != mine
    assert dispatch.attention_launch(128, 4, 128, 128, False, torch.bfloat16, H200) != mine


@pytest.mark.parametrize("gpu", [H200, A100, ADA])
@pytest.mark.parametrize("width", [16, 48, 64, 512])
def test_spans_of_attention(gpu: GpuCapability, width: int) -> None:
    found = dispatch.attention_launch(128, 4, width, width, False, torch.bfloat16, gpu)
    assert width % found.tile.rows == 0
    assert dispatch.attention_splits(1, 100, found, gpu) <= 4
    assert 64 <= dispatch.attention_splits(2, 1 << 17, found, gpu) <= 128
    assert dispatch.attention_splits(512, 1 << 17, found, gpu) == 1


def test_importing_the_kernels_touches_no_driver() -> None:
    code = (
        "import torch\n"
        "def refuse(*args, **options): raise AssertionError('a driver was asked')\n"
        "torch.cuda.init = torch.cuda._lazy_init = torch.cuda.get_device_properties = refuse\n"
        "from compressor.kernels import cpu, dispatch, layouts, ops, reference\n"
        "import sys; assert 'triton' not in sys.modules\n"
        "from compressor.kernels.triton import grouped, latent_attention, group_linear, sparse24, w8a8\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
