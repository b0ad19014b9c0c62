"""The packed and the quantizing attention references against torch's own attention and the plain op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import graphserve.kernels
from graphserve.kernels import attention

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


@pytest.mark.parametrize("max_scores", [1, 2 * 4 * 7])
def test_queries_of_which_not_all_scores_fit_are_taken_in_parts(
    max_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = paged_arguments(torch.float32)
    rule = {"window": 3, "chunk": 0, "softcap": 0.0, "causal": True}
    whole = gs.paged_attention(*args, 0.3, **rule)
    parts: list[int] = []
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda q, *rest: (parts.append(len(q)), attend(q, *rest))[1])
    monkeypatch.setattr(attention, "_MAX_SCORES", max_scores)
    torch.testing.assert_close(gs.paged_attention(*args, 0.3, **rule), whole, rtol=1e-6, atol=1e-6)
    assert parts == {1: [1] * 6, 56: [2, 2, 1, 1]}[max_scores]


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
