"""The reference ops against eager Hugging Face modules and plain formulas, and their fakes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import graphserve.kernels
from graphserve.kernels.activation import ACTIVATIONS
from graphserve.kernels.attention import visible_keys

graphserve.kernels.register_all()
gs = torch.ops.gs

DTYPES = (torch.float32, torch.bfloat16)


def equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """bf16 to the bit (the same roundings in the same order), fp32 to 1e-6."""
    assert actual.dtype == expected.dtype
    tolerance = 0.0 if expected.dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("module", "offset", "weight_fp32"), [(LlamaRMSNorm, 0.0, False), (GemmaRMSNorm, 1.0, True)])
def test_rms_norm_rounds_as_the_model_does(module: type, offset: float, weight_fp32: bool, dtype: torch.dtype) -> None:
    norm = module(48, eps=1e-5)
    norm.weight.data = torch.randn(48)
    norm = norm.to(dtype)
    x, residual = torch.randn(2, 1, 7, 48).to(dtype)
    equal(gs.rms_norm(x, norm.weight, 1e-5, offset, weight_fp32), norm(x))
    normed, total = gs.add_rms_norm(x, residual, norm.weight, 1e-5, offset, weight_fp32)
    equal(total, residual + x)
    equal(normed, norm(residual + x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_rotates_as_llama_and_deepseek_do(dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 1, 3, 7, 16).to(dtype)
    angles = torch.randn(1, 7, 8).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    for apply, style in ((apply_rotary_pos_emb, "half"), (apply_rotary_pos_emb_interleave, "interleaved_to_half")):
        rotated_q, rotated_k = apply(q, k, cos, sin)
        equal(gs.rope(q, cos, sin, style, True), rotated_q)
        equal(gs.rope(k, cos, sin, style, True), rotated_k)


def test_interleaved_rope_turns_each_pair_as_a_complex_number() -> None:
    x, angles = torch.randn(1, 5, 2, 12), torch.randn(1, 5, 4)
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(2)
    expected = torch.view_as_real(torch.view_as_complex(x[..., :8].unflatten(-1, (4, 2))) * turn).flatten(-2)
    table = angles.repeat_interleave(2, dim=-1)
    actual = gs.rope(x, table.cos(), table.sin(), "interleaved", False)
    torch.testing.assert_close(actual[..., :8], expected)
    assert torch.equal(actual[..., 8:], x[..., 8:])


def test_rope_kv_write_is_norm_then_rope_then_write() -> None:
    tokens, dim, block_size = 5, 8, 4
    q, k, v = torch.randn(tokens, 4, dim), torch.randn(tokens, 2, dim), torch.randn(tokens, 2, 6)
    q_norm, k_norm = torch.rand(2, dim)
    cos, sin = torch.randn(2, 20, dim)
    positions, slots = torch.tensor([3, 4, 0, 1, 2]), torch.tensor([7, 8, 12, 13, 14])
    kv_k, kv_v = torch.zeros(4, 2, block_size, dim), torch.zeros(4, 2, block_size, 6)
    q_out = gs.rope_kv_write(
        q, k, v, cos, sin, positions, q_norm, k_norm, kv_k, kv_v, slots, 1e-6, 0.0, False, "half"
    )  # fmt: skip
    table = (cos[positions].unsqueeze(0), sin[positions].unsqueeze(0), "half", False)
    normed_q, normed_k = (F.rms_norm(x, (dim,), w, 1e-6).unsqueeze(0) for x, w in ((q, q_norm), (k, k_norm)))
    torch.testing.assert_close(q_out, gs.rope(normed_q, *table)[0])
    rotated = gs.rope(normed_k, *table)[0]
    for token, slot in enumerate(slots.tolist()):
        torch.testing.assert_close(kv_k[slot // block_size, :, slot % block_size], rotated[token])
        assert torch.equal(kv_v[slot // block_size, :, slot % block_size], v[token])
    assert int((kv_v != 0).any(-1).sum()) == 2 * tokens, "a slot outside the mapping was written"


def test_paged_attention_equals_sdpa_over_the_gathered_context() -> None:
    heads, kv_heads, dim, block_size = 4, 2, 16, 4
    queries, contexts = [3, 1, 6], [11, 9, 6]
    table = torch.tensor([[5, 1, 3], [2, 7, 4], [8, 6, 0]], dtype=torch.int32)
    kv_k, kv_v = torch.randn(2, 9, kv_heads, block_size, dim)
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    q = torch.randn(sum(queries) + 2, heads, dim)
    out = gs.paged_attention(
        q, kv_k, kv_v, table, starts, torch.tensor(contexts).int(), None, None, 0.3, 5, 0, 0.0, True
    )  # fmt: skip
    for s, (num_queries, context) in enumerate(zip(queries, contexts, strict=True)):
        k, v = (c[table[s].long()].transpose(1, 2).flatten(0, 1)[:context].transpose(0, 1) for c in (kv_k, kv_v))
        mask = visible_keys(torch.arange(context - num_queries, context), torch.arange(context), 5, 0, True)
        rows = slice(int(starts[s]), int(starts[s + 1]))
        expected = F.scaled_dot_product_attention(
            q[rows].transpose(0, 1)[None], k[None], v[None], attn_mask=mask, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(out[rows], expected[0].transpose(0, 1).flatten(1))
    assert out[-2:].abs().max() == 0, "padding tokens must get zeros"


def test_a_sink_takes_its_share_of_the_softmax() -> None:
    q, kv_k, kv_v = torch.zeros(1, 1, 2), torch.zeros(2, 1, 4, 2), torch.ones(2, 1, 4, 2)
    one = torch.tensor([1], dtype=torch.int32)
    out = gs.paged_attention(
        q, kv_k, kv_v, one[None], torch.tensor([0, 1]).int(), 3 * one, torch.zeros(1), None, 1.0, 0, 0, 0.0, True
    )  # fmt: skip
    torch.testing.assert_close(out, torch.full((1, 2), 0.75))  # three keys and the sink, all of logit 0


@pytest.mark.parametrize(
    ("window", "chunk", "causal", "seen"),
    [(0, 0, True, "1111100"), (2, 0, True, "0001100"), (0, 3, True, "0001100"), (2, 0, False, "0001110"),
     (0, 3, False, "0001110")],
)  # fmt: skip
def test_a_query_at_position_4_sees_the_keys_its_rule_names(window: int, chunk: int, causal: bool, seen: str) -> None:
    visible = visible_keys(torch.tensor([4]), torch.arange(7), window, chunk, causal)
    assert "".join("1" if v else "0" for v in visible[0].tolist()) == seen


def test_moe_equals_the_experts_of_mixtral() -> None:
    config = MixtralConfig(hidden_size=24, intermediate_size=20, num_local_experts=5, num_experts_per_tok=2)
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, ids, weights = torch.randn(9, 24), torch.rand(9, 5).argsort(1)[:, :2], torch.rand(9, 2)
    actual = gs.moe(
        x, ids, weights, experts.gate_up_proj, None, experts.down_proj, None, "silu", False, False, 0.0, 0.0
    )
    torch.testing.assert_close(actual, experts(x, ids, weights), rtol=1e-5, atol=1e-5)


def test_moe_equals_the_experts_of_gpt_oss() -> None:
    config = GptOssConfig(hidden_size=24, intermediate_size=20, num_local_experts=4)
    experts = GptOssExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    x, ids, weights = 3 * torch.randn(9, 24), torch.rand(9, 4).argsort(1)[:, :2], torch.rand(9, 2)
    actual = gs.moe(
        x, ids, weights, experts.gate_up_proj, experts.gate_up_proj_bias, experts.down_proj, experts.down_proj_bias,
        "swiglu_clamp", True, True, experts.limit, experts.alpha,
    )  # fmt: skip
    torch.testing.assert_close(actual, experts(x, ids, weights), rtol=1e-4, atol=1e-4)


def test_moe_sums_every_expert_of_a_dense_formula() -> None:
    x, gate_up, down = torch.randn(4, 6), torch.randn(3, 10, 6), torch.randn(3, 6, 5)
    ids, weights = torch.tensor([[0, 2], [1, 0], [2, 9], [9, 9]]), torch.rand(4, 2)
    expected = torch.zeros(4, 6)
    for row in range(4):
        for k in range(2):
            if ids[row, k] < 3:
                gate, up = (gate_up[ids[row, k]] @ x[row]).chunk(2)
                expected[row] += weights[row, k] * (down[ids[row, k]] @ (F.silu(gate) * up))
    actual = gs.moe(x, ids, weights, gate_up, None, down, None, "silu", False, False, 0.0, 0.0)
    torch.testing.assert_close(actual, expected)


def test_act_mul_rounds_the_activation_before_the_product() -> None:
    gate, up = torch.randn(2, 5, 32).bfloat16()
    assert torch.equal(gs.act_mul(gate, up, "silu"), F.silu(gate) * up)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'swish2' is unknown: use one of silu"):
        gs.activation(torch.zeros(2), "swish2")
    with pytest.raises(ValueError, match="'spiral' is unknown: use one of half"):
        gs.rope(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), "spiral", True)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_no_reference_returns_its_argument_itself(act: str) -> None:
    x = torch.randn(3, 4)
    assert gs.activation(x, act).data_ptr() != x.data_ptr()


def test_fakes_give_the_shapes_of_the_references_with_symbolic_tokens() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(torch.randn(1, 5, 8), static_shapes=False)
    with mode:
        weight, table = torch.empty(12, 8), torch.empty(30, 8)
        tokens = x.shape[1]
        assert gs.linear(x, weight, None).shape == (x.shape[0], tokens, 12)
        assert all(t.shape == x.shape for t in gs.add_rms_norm(x, x, None, 1e-5, 0.0, False))
        assert gs.embedding(x[..., 0].long(), table).shape == (x.shape[0], tokens, 8)
        q = torch.empty(tokens, 4, 8)
        kv_k, kv_v = torch.empty(3, 2, 4, 8), torch.empty(3, 2, 4, 6)
        lens = torch.empty(2, dtype=torch.int32)
        out = gs.paged_attention(q, kv_k, kv_v, lens[None], lens, lens, None, None, 1.0, 0, 0, 0.0, True)
        assert out.shape == (tokens, 24)


def test_registering_twice_is_harmless() -> None:
    graphserve.kernels.register_all()
    assert graphserve.kernels.FAMILIES
