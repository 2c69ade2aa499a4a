"""The reference equals attention computed one query at a time, and an absent half changes nothing."""

from __future__ import annotations

import math

import pytest
import torch

from bd3_megatron.attention.dense import attend
from bd3_megatron.attention.streams import Stream
from bd3_megatron.attention.visibility import Visibility
from bd3_megatron.errors import ShapeError

B, L, N, G, H = 2, 12, 4, 2, 8
SCALE = 1 / math.sqrt(H)


def stream(seed: int, rows: int = L, dtype: torch.dtype = torch.float64) -> Stream:
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(B, rows, heads, H, generator=generator, dtype=torch.float64).to(dtype)

    return Stream(draw(N), draw(G), draw(G))


def one_query_at_a_time(noisy: Stream, clean: Stream, mask: torch.Tensor) -> torch.Tensor:
    q = torch.cat([noisy.q_BLNH, clean.q_BLNH], dim=1)
    k = torch.cat([noisy.k_BLGH, clean.k_BLGH], dim=1)
    v = torch.cat([noisy.v_BLGH, clean.v_BLGH], dim=1)
    out = torch.zeros_like(q)
    for b in range(B):
        for row in range(q.shape[1]):
            for head in range(N):
                seen = mask[b % mask.shape[0], row].nonzero().flatten()
                group = head // (N // G)
                weights = (SCALE * k[b, seen, group] @ q[b, row, head]).softmax(0)
                out[b, row, head] = weights @ v[b, seen, group]
    return out


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("block_size", [1, 3, L])
def test_dense_is_attention_over_what_is_seen(block_size: int, with_documents: bool) -> None:
    documents = torch.tensor([[0] * 5 + [1] * 7, [3] * 6 + [2] * 6]) if with_documents else None
    visibility = Visibility.pair(L, block_size, documents)
    noisy, clean = stream(1), stream(2)
    out_noisy, out_clean = attend(noisy, clean, visibility, scale=SCALE)
    assert out_noisy is not None and out_clean is not None
    expected = one_query_at_a_time(noisy, clean, visibility.pair_mask())
    assert torch.allclose(torch.cat([out_noisy, out_clean], dim=1), expected, rtol=0, atol=1e-13)


def test_one_half_alone() -> None:
    noisy, clean = stream(1), stream(2)
    _, out_clean = attend(noisy, clean, Visibility.pair(L, 3), scale=SCALE)
    nothing, alone = attend(None, clean, Visibility.clean_only(L, 3), scale=SCALE)
    assert nothing is None and alone is not None and out_clean is not None
    assert torch.allclose(alone, out_clean, rtol=0, atol=1e-13)
    full = torch.nn.functional.scaled_dot_product_attention(
        noisy.q_BLNH.transpose(1, 2), noisy.k_BLGH.transpose(1, 2), noisy.v_BLGH.transpose(1, 2), enable_gqa=True
    ).transpose(1, 2)
    mdlm, _ = attend(noisy, None, Visibility.noisy_only(L), scale=SCALE)
    assert mdlm is not None and torch.allclose(mdlm, full, rtol=0, atol=1e-13)


def test_a_last_layer_needs_no_clean_queries() -> None:
    noisy, clean = stream(1), stream(2)
    whole, _ = attend(noisy, clean, Visibility.pair(L, 3), scale=SCALE)
    keys_only = Stream(clean.q_BLNH[:, :0], clean.k_BLGH[:, : L - 3], clean.v_BLGH[:, : L - 3])
    visibility = Visibility(3, L, ((0, L),), (), ((0, L - 3),))
    part, empty = attend(noisy, keys_only, visibility, scale=SCALE)
    assert whole is not None and part is not None and empty is not None
    assert torch.allclose(part, whole, rtol=0, atol=1e-13) and empty.shape == (B, 0, N, H)


def test_low_precision_is_compared_in_fp32() -> None:
    low = [stream(s, dtype=torch.bfloat16) for s in (1, 2)]
    high = [Stream(s.q_BLNH.float(), s.k_BLGH.float(), s.v_BLGH.float()) for s in low]
    got, _ = attend(low[0], low[1], Visibility.pair(L, 3), scale=SCALE)
    wanted, _ = attend(high[0], high[1], Visibility.pair(L, 3), scale=SCALE)
    assert got is not None and wanted is not None
    assert got.dtype == torch.bfloat16 and torch.equal(got, wanted.to(torch.bfloat16))


def test_streams_that_do_not_fit_are_refused() -> None:
    pair = Visibility.pair(L, 3)
    with pytest.raises(ShapeError, match=r"The clean stream is absent, but the visibility has rows for it"):
        attend(stream(1), None, pair, scale=1.0)
    with pytest.raises(ShapeError, match=r"The noisy stream is given, but the visibility has no rows for it"):
        attend(stream(1), stream(2), Visibility.clean_only(L, 3), scale=1.0)
    with pytest.raises(ShapeError, match=r"Neither a noisy nor a clean stream was given; give at least one\."):
        attend(None, None, Visibility(1, L, (), (), ()), scale=1.0)
    with pytest.raises(ShapeError, match=r"noisy q_BLNH has shape \[2, 9, 4, 8\]; expected \[any, 12, any, any\]"):
        attend(stream(1, rows=9), stream(2), pair, scale=1.0)
    odd = stream(1)
    with pytest.raises(ShapeError, match=r"num_kv_heads=3 does not divide num_heads=4; use 1, 2 or 4\."):
        attend(Stream(odd.q_BLNH, odd.q_BLNH[:, :, :3], odd.q_BLNH[:, :, :3]), stream(2), pair, scale=1.0)
    with pytest.raises(ShapeError, match=r"document_id_BL has shape \[3, 12\]; expected \[2, 12\]"):
        attend(stream(1), stream(2), Visibility.pair(L, 3, torch.zeros(3, L, dtype=torch.int64)), scale=1.0)
