"""The packed and the quantizing attention references against torch's own attention and the plain op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import graphserve.kernels
from graphserve.kernels import attention, attention_parts
from graphserve.kernels.attention_parts import AttentionShape
from tests.peak_memory import peak_bytes

graphserve.kernels.register_all()
gs = torch.ops.gs

RULE: dict[str, Any] = {"window": 0, "chunk": 0, "softcap": 0.0}


def paged_arguments(cache_dtype: torch.dtype) -> list[torch.Tensor | None]:
    """Two sequences of 5 and 1 query tokens over contexts of 7 and 6, one padding token."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(7, 4, 8, generator=generator)
    kv_k = torch.randn(5, 2, 4, 8, generator=generator).to(cache_dtype)
    kv_v = torch.randn(5, 2, 4, 8, generator=generator).to(cache_dtype)
    table, starts, lens = torch.tensor([[3, 1], [4, 2]]), torch.tensor([0, 5, 6]), torch.tensor([7, 6])
    return [q, kv_k, kv_v, table.int(), starts.int(), lens.int(), None, None]


@pytest.mark.parametrize("causal", [False, True])
def test_packed_attention_is_torchs_attention_of_each_sequence(causal: bool) -> None:
    q, k, v = torch.randn(11, 4, 16), torch.randn(11, 2, 16), torch.randn(11, 2, 24)
    starts = torch.tensor([0, 3, 3, 9]).int()
    out = gs.packed_attention(q, k, v, starts, None, None, 0.3, **RULE, causal=causal)
    for first, last in ((0, 3), (3, 9)):
        heads = (x[first:last].transpose(0, 1)[None] for x in (q, k, v))
        expected = F.scaled_dot_product_attention(*heads, is_causal=causal, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(out[first:last], expected[0].transpose(0, 1).flatten(1), rtol=1e-5, atol=1e-5)
    assert not out[9:].any()


@pytest.mark.parametrize(
    ("part_bytes", "parts"),
    [
        (1, [(1, 1)] * 12),
        (1800, [(2, 1), (2, 1), (1, 1)] * 2 + [(1, 1)] * 2),
        (3000, [(2, 2), (2, 2), (1, 2), (1, 2)]),
        (8000, [(5, 2), (1, 2)]),
    ],
)
def test_what_does_not_fit_is_computed_in_parts_of_heads_and_queries(
    part_bytes: int, parts: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*paged_arguments(torch.float32)[:6], torch.randn(4), torch.rand(4)]
    rule = {"window": 3, "chunk": 0, "softcap": 2.0, "causal": True}
    whole = gs.paged_attention(*args, 0.3, **rule)
    seen: list[tuple[int, int]] = []  # queries and key heads
    attend = attention.attend
    monkeypatch.setattr(
        attention, "attend", lambda q, k, *rest: (seen.append((len(q), k.shape[1])), attend(q, k, *rest))[1]
    )
    monkeypatch.setattr(attention_parts, "PART_BYTES", part_bytes)
    torch.testing.assert_close(gs.paged_attention(*args, 0.3, **rule), whole, rtol=1e-6, atol=1e-6)
    assert seen == parts


@pytest.mark.parametrize("part_mib", [1, 2, 64])
@pytest.mark.parametrize(
    "shape", [AttentionShape(8, 2, 32, 32), AttentionShape(4, 4, 16, 48), AttentionShape(2, 1, 64, 64)]
)
@pytest.mark.parametrize("num_queries", [1, 96])
def test_a_part_takes_the_memory_that_is_counted_for_it(
    part_mib: int, shape: AttentionShape, num_queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_keys, block_size = 1024, 16
    q = torch.randn(num_queries, shape.num_heads, shape.k_dim).bfloat16()
    keys, values = (
        torch.randn(num_keys // block_size, shape.num_kv_heads, block_size, dim).bfloat16()
        for dim in (shape.k_dim, shape.v_dim)
    )
    table = torch.arange(num_keys // block_size, dtype=torch.int32)[None]
    starts, lens = torch.tensor([0, num_queries]).int(), torch.tensor([num_keys]).int()
    lists = (torch.randn(shape.num_heads), torch.rand(shape.num_heads))
    monkeypatch.setattr(attention_parts, "PART_BYTES", part_mib << 20)
    counted = shape.most_bytes(num_queries, num_keys)
    for sinks, alibi in (lists, (None, None)):
        taken = peak_bytes(
            lambda sinks=sinks, alibi=alibi: gs.paged_attention(
                q, keys, values, table, starts, lens, sinks, alibi, 0.3, 9, 0, 2.0, True
            )
        )
        taken -= num_queries * shape.num_heads * shape.v_dim * q.element_size()  # the result
        assert taken <= counted + (1 << 15), "more is taken than is counted"
        assert counted < 3 * taken, "much more is counted than is taken"


def test_the_quantizing_op_without_scales_is_the_plain_one() -> None:
    args = paged_arguments(torch.float32)
    plain = gs.paged_attention(*args, 0.3, **RULE, causal=True)
    quant = gs.paged_attention_quant(*args, None, None, None, 0.3, **RULE, causal=True, out_dtype=torch.float32)
    assert torch.equal(quant, plain)


def test_a_scaled_cache_is_the_plain_op_on_the_scaled_values() -> None:
    args = paged_arguments(torch.float8_e4m3fn)
    k_scale, v_scale = torch.tensor([0.5]), torch.tensor([3.0])
    scaled = gs.paged_attention_quant(*args, k_scale, v_scale, None, 0.3, **RULE, causal=True, out_dtype=torch.float32)
    assert args[1] is not None and args[2] is not None
    args[1:3] = [args[1].float() * 0.5, args[2].float() * 3.0]
    torch.testing.assert_close(scaled, gs.paged_attention(*args, 0.3, **RULE, causal=True), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.int8, 127), (torch.float8_e4m3fn, 448)])
def test_a_quantized_result_saturates_and_is_the_plain_one_up_to_its_step(dtype: torch.dtype, largest: float) -> None:
    args = paged_arguments(torch.float32)
    plain = gs.paged_attention(*args, 0.3, **RULE, causal=True)

    def quantized(scale: float) -> torch.Tensor:
        scales = (None, None, torch.tensor([scale]))
        return gs.paged_attention_quant(*args, *scales, 0.3, **RULE, causal=True, out_dtype=dtype)

    fine = quantized(0.02)
    assert fine.dtype == dtype
    torch.testing.assert_close(fine.float() * 0.02, plain, rtol=1 / 16, atol=0.011)
    assert quantized(1e-6).float().max() == largest


def test_the_fakes_have_the_references_shapes_and_dtypes() -> None:
    args = paged_arguments(torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = gs.paged_attention_quant(*args, None, None, None, 0.3, **RULE, causal=True, out_dtype=torch.int8)
        assert (out.shape, out.dtype) == ((7, 32), torch.int8)
        q, v = torch.empty(7, 4, 8), torch.empty(7, 2, 12)
        starts = torch.empty(3, dtype=torch.int32)
        packed = gs.packed_attention(q, q[:, :2], v, starts, None, None, 0.3, **RULE, causal=False)
        assert (packed.shape, packed.dtype) == ((7, 48), torch.float32)
