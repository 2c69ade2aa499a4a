"""FlexAttention's tile table equals brute force, its in-kernel rule is the visibility rule, and its eager form the reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from bd3_megatron.attention import dense, flex, machine
from bd3_megatron.attention.request import AttentionRequest
from bd3_megatron.attention.tiles import executed_tiles, tile_table
from bd3_megatron.attention.visibility import Visibility
from bd3_megatron.errors import BackendError
from tests.tolerances import FAST_PATH_FP64
from tests.unit.attention.problems import outputs, problem, random_documents, visibilities, worst_difference, zigzag

CPU = torch.device("cpu")


def brute_force(visibility: Visibility, tile: int) -> tuple[Tensor, Tensor]:
    """Partial and full tiles from the dense mask; rows that fill up the last tile see nobody."""
    mask_BQK = visibility.pair_mask()
    q_pad, k_pad = -mask_BQK.shape[1] % tile, -mask_BQK.shape[2] % tile
    padded = torch.nn.functional.pad(mask_BQK, (0, k_pad, 0, q_pad))
    tiles = padded.unflatten(2, (-1, tile)).unflatten(1, (-1, tile))
    seen = tiles.sum((2, 4))
    full = seen == tile * tile
    return (seen > 0) & ~full, full


@pytest.mark.parametrize("tile", [8, 32, 128])
@pytest.mark.parametrize(("length", "block_size"), [(24, 3), (96, 1), (96, 16), (384, 4), (400, 400), (384, 128)])
def test_tile_table_is_what_the_mask_says(length: int, block_size: int, tile: int) -> None:
    for visibility in visibilities(length, block_size):
        partial, full = tile_table(visibility, tile=tile)
        expected_partial, expected_full = brute_force(visibility, tile)
        assert torch.equal(partial, expected_partial) and torch.equal(full, expected_full)


def test_tile_table_takes_documents_in_any_order() -> None:
    scattered = torch.randint(0, 3, (2, 96), generator=torch.Generator().manual_seed(1))
    visibility = Visibility.pair(96, 4, scattered)
    assert all(
        torch.equal(a, b) for a, b in zip(tile_table(visibility, tile=8), brute_force(visibility, 8), strict=True)
    )


def test_executed_pairs_of_the_pair_have_a_closed_form() -> None:
    for block_size in (4, 16, 64):
        assert flex.executed_pairs(Visibility.pair(1024, block_size), batch=3) == 3 * (1024**2 + 256 * 1024)
    assert flex.executed_pairs(Visibility.pair(1024, 128)) == 1024 * (1024 + 128)
    documents = random_documents(512, 3, aligned_to=128)
    visibility = Visibility.pair(512, 16, documents)
    assert executed_tiles(visibility, batch=2) == int(
        (brute_force(visibility, 128)[0] | brute_force(visibility, 128)[1]).sum()
    )


@pytest.mark.parametrize("packed", [False, True])
def test_eager_flex_equals_the_reference(packed: bool) -> None:
    visibility = Visibility.pair(150, 6, random_documents(150, 5) if packed else None)
    p = problem(visibility, heads=(4, 2), head_dim=16)
    with torch.no_grad():
        assert worst_difference(outputs(flex.attend, p), outputs(dense.attend, p)) < FAST_PATH_FP64


def test_eager_flex_equals_the_reference_on_context_parallel_rows() -> None:
    p = problem(zigzag(64, 4, 1, 2), heads=(2, 2), head_dim=16)
    with torch.no_grad():
        assert worst_difference(outputs(flex.attend, p), outputs(dense.attend, p)) < FAST_PATH_FP64


@pytest.mark.parametrize(("length", "block_size"), [(24, 3), (60, 4)])
def test_the_rule_inside_the_kernel_is_the_visibility_rule(length: int, block_size: int) -> None:
    for visibility in visibilities(length, block_size):
        mask_BQK = visibility.pair_mask()
        batch, q_row, k_row = torch.meshgrid(*(torch.arange(n) for n in mask_BQK.shape), indexing="ij")
        allowed = flex.block_mask(visibility, CPU).mask_mod(batch, torch.zeros_like(batch), q_row, k_row)
        assert torch.equal(allowed, mask_BQK)


def test_a_visibility_keeps_its_table() -> None:
    for documents in (None, random_documents(256, 1)):
        visibility = Visibility.pair(256, 16, documents)
        assert flex.block_mask(visibility, CPU) is flex.block_mask(visibility, CPU)
        assert flex.block_mask(Visibility.pair(256, 16, documents), CPU) is not flex.block_mask(visibility, CPU)


class Graphs:
    """A compiler for torch.compile that counts graphs and their fused calls, and computes nothing."""

    def __init__(self) -> None:
        self.fused_calls: list[int] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., list[Tensor]]:
        nodes = list(module.graph.nodes)
        self.fused_calls.append(sum("FlexAttentionHOP" in type(node.target).__name__ for node in nodes))
        outputs = nodes[-1].args[0]
        return lambda *_: [
            output.meta["example_value"].new_zeros(output.meta["example_value"].shape) for output in outputs
        ]


def test_new_documents_need_no_new_graph_and_a_new_block_size_needs_one() -> None:
    graphs = Graphs()
    for block_size in (4, 8):
        for documents in (None, random_documents(32, 1), random_documents(32, 2)):
            p = problem(Visibility.pair(32, block_size, documents), head_dim=16)
            with torch.no_grad():
                outputs(partial(flex.attend, call=flex.compiled(graphs)), p)
    assert graphs.fused_calls == [1, 1, 1, 1]


def test_beyond_the_limit_of_graphs_is_an_error_and_never_unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "MAX_GRAPHS", 2)
    call = flex.compiled(graphs := Graphs())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for block_size in (1, 2, 4):
            p = problem(Visibility.pair(32, block_size), head_dim=16)
            if block_size < 4:
                outputs(partial(flex.attend, call=call), p)
                continue
            with pytest.raises(
                BackendError,
                match=r"more than 2 compiled graphs \(this call: length=32, block_size=4\).*unfused; use fewer",
            ):
                outputs(partial(flex.attend, call=call), p)
    assert graphs.fused_calls == [1, 1]


def test_training_on_cpu_is_refused() -> None:
    p = problem(Visibility.pair(8, 4), head_dim=16)
    with pytest.raises(BackendError, match="no backward on CPU"):
        flex.attend(p.noisy, p.clean, p.visibility, scale=0.3)


def request(device_type: str, dtype: torch.dtype = torch.float32, *, needs_grad: bool = True) -> AttentionRequest:
    return AttentionRequest(
        device_type=device_type,
        dtype=dtype,
        batch=1,
        rows=Visibility.pair(64, 4),
        num_heads=2,
        num_kv_heads=2,
        head_dim=64,
        needs_grad=needs_grad,
    )


def test_refusals_say_why() -> None:
    assert flex.refuse(request("cpu", needs_grad=False)) is None
    assert "no backward on CPU" in str(flex.refuse(request("cpu")))
    assert "no kernel for device 'mps'" in str(flex.refuse(request("mps")))
    assert "no backward on CPU" in str(flex.refuse_flash(request("cpu")))
    assert "FLASH kernels need a Hopper" in str(flex.refuse_flash(request("cpu", needs_grad=False)))


def test_without_triton_flex_is_refused_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has", lambda package: False)
    assert "Triton, which is not installed" in str(flex.refuse(request("cuda")))


def test_flash_kernels_need_their_package_their_gpu_and_their_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    missing: set[str] = {"flash_attn"}
    monkeypatch.setattr(machine, "has", lambda package: package not in missing)
    monkeypatch.setattr(machine, "capability", lambda: (9, 0))
    assert "fp64" in str(flex.refuse(request("cuda", torch.float64)))
    assert "flash-attn-4, which is not installed" in str(flex.refuse_flash(request("cuda", torch.bfloat16)))
    missing.clear()
    assert flex.refuse_flash(request("cuda", torch.bfloat16)) is None
    assert "take bfloat16 or float16" in str(flex.refuse_flash(request("cuda", torch.float32)))
    deterministic = AttentionRequest(**{**vars(request("cuda", torch.bfloat16)), "deterministic": True})
    assert "not deterministic before Blackwell" in str(flex.refuse_flash(deterministic))
    monkeypatch.setattr(machine, "capability", lambda: (8, 0))
    assert "need a Hopper" in str(flex.refuse_flash(request("cuda", torch.bfloat16)))
