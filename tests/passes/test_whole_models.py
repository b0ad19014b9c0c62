"""The whole pipeline on tiny models: what matches how often, what is left, and logits equal to eager."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import fx

from graphserve.compiler.pipeline import PIPELINE, PassReport, run_pipeline
from graphserve.passes.context import PassContext
from tests.passes.graphs import MAX_LEN, eager, model_graph, ops, packed_logits
from tests.tiny_models import hf_logits, text_tokens

LAYERS = 4
LINEAR = {"rope": 8, "last_rows": 1, "position_tables": 2, "attention": 4, "embedding": 1}
LLAMA = LINEAR | {"rms_norm": 9, "linear": 29, "activation": 4, "glu": 4, "merge_linears": 8, "add_norm": 8}

# Matches of each pass that carries meaning; a pass that is not named must not match at all.
EXPECTED: dict[str, dict[str, int]] = {
    "llama": LLAMA,
    "llama:yarn": LLAMA,
    "llama:llama3": LLAMA,
    "qwen3": LLAMA | {"rms_norm": 17},
    "gemma2": LLAMA | {"rms_norm": 17, "norm_sandwich": 8, "pointwise_groups": 2},
    # local and global rotation
    "gemma3_text": LLAMA | {"rms_norm": 25, "position_tables": 4, "norm_sandwich": 8, "pointwise_groups": 1},
    "granite": LLAMA,
    "phi3": LINEAR | {"rms_norm": 9, "linear": 17, "activation": 4, "glu": 4, "add_norm": 8},
    "gpt2": {"layer_norm": 9, "linear": 17, "embedding": 2, "activation": 4, "row_reshape": 12, "last_rows": 1,
             "add_norm": 9, "attention": 4},
    "opt": {"layer_norm": 9, "linear": 25, "embedding": 2, "activation": 4, "row_reshape": 20, "last_rows": 1,
            "merge_linears": 4, "add_norm": 9, "attention": 4, "pointwise_groups": 5},
    # each rotation matches twice: the rotated part, then the partial rotary around it
    "gpt_neox": LINEAR | {"layer_norm": 9, "linear": 17, "activation": 4, "rope": 16, "add_norm": 4,
                          "pointwise_groups": 4},
    "phi": LINEAR | {"layer_norm": 5, "linear": 25, "activation": 4, "rope": 16, "merge_linears": 4, "add_norm": 4,
                     "pointwise_groups": 4},
    "glm4": LLAMA | {"rms_norm": 17, "linear": 25, "rope": 16, "merge_linears": 4, "norm_sandwich": 8},
    # norms come before the adds, but for the last one
    "olmo2": LLAMA | {"rms_norm": 17, "add_norm": 1, "norm_sandwich": 8},
    # in the last layer the MLP's linears run on fewer rows than q, k and v: two products there, one in the others
    "cohere": LINEAR | {"layer_norm": 5, "linear": 29, "activation": 4, "glu": 4, "merge_linears": 5, "add_norm": 4,
                        "pointwise_groups": 5},
    "nemotron": LINEAR | {"layer_norm": 9, "linear": 25, "activation": 8, "rope": 16, "merge_linears": 4,
                          "weight_constants": 9, "add_norm": 8},
    "gpt_oss": LINEAR | {"rms_norm": 9, "linear": 21, "row_reshape": 4, "merge_linears": 4, "add_norm": 8,
                          "route": 4},
    "mixtral": LINEAR | {"functionalize": 4, "rms_norm": 9, "linear": 21, "row_reshape": 4, "merge_linears": 4,
                         "add_norm": 8, "route": 4},
    "deepseek_v3": LINEAR | {"functionalize": 10, "rms_norm": 17, "linear": 36, "activation": 4, "glu": 4,
                             "row_reshape": 3, "merge_linears": 8, "add_norm": 8, "route": 3, "pointwise_groups": 3},
}  # fmt: skip
# The router works in fp32: in bf16 its input and its weight are cast.
BF16_ONLY = {
    "deepseek_v3": {"row_reshape": 6, "weight_constants": 3, "pointwise_groups": 6},
    "mixtral": {"row_reshape": 8, "pointwise_groups": 4},
}
# One of each kind of graph by default; the others differ from these in what EXPECTED shows and in little else.
DEFAULT = ("llama", "gemma3_text", "phi3", "gpt2", "opt", "cohere", "glm4", "gpt_oss", "deepseek_v3")
UNCOUNTED = {"canonical_forms", "no_ops", "common_subexpressions"}
# Models whose norm, rotation and cache write become one op in every layer.
FUSED = {"llama", "llama:yarn", "llama:llama3", "qwen3", "gemma2", "gemma3_text", "granite", "phi3", "phi", "glm4",
         "olmo2", "cohere", "nemotron", "gpt_oss", "mixtral", "gpt_neox"}  # fmt: skip
# Ops that the passes replace altogether in these models.
GONE = {"aten.linear", "aten.addmm", "aten.rsqrt", "aten.layer_norm", "aten.silu", "aten.gelu", "aten.relu", "aten.neg",
        "aten.embedding", "aten.cos", "aten.sin", "aten.index", "aten.dropout", "aten.view", "aten.view_as_complex",
        "gs.attention_trace", "aten.copy_", "aten.split", "aten.chunk", "aten.split_with_sizes"}  # fmt: skip


def _rewritten(name: str, dtype: torch.dtype = torch.float32) -> tuple[fx.GraphModule, PassContext, list[PassReport]]:
    gm = model_graph(name, dtype)
    ctx = PassContext(gm, MAX_LEN)
    return gm, ctx, run_pipeline(gm, ctx)


def _counts(reports: list[PassReport]) -> dict[str, int]:
    return {r.name: r.matches for r in reports if r.matches and r.name not in UNCOUNTED}


def _marked(names: Iterable[str], default: tuple[str, ...]) -> list[Any]:
    return [name if name in default else pytest.param(name, marks=pytest.mark.full) for name in names]


@pytest.mark.parametrize("name", _marked(EXPECTED, DEFAULT))
def test_every_pass_matches_as_often_as_the_architecture_says_and_logits_stay_those_of_eager(name: str) -> None:
    gm, ctx, reports = _rewritten(name)
    assert _counts(reports) == EXPECTED[name]
    left = ops(gm)
    assert not GONE & set(left)
    assert left.count("gs.rope_kv_write") == (LAYERS if name in FUSED else 0)
    assert len(ctx.cache_layers) == LAYERS
    requests = [text_tokens(11, seed=1), text_tokens(5, seed=2)]
    model = eager(name)
    expected = torch.cat([hf_logits(model, r) for r in requests])
    actual = packed_logits(gm, ctx, model, requests)
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"relative error {error}"


@pytest.mark.parametrize("name", _marked(EXPECTED, ("llama", "cohere")))
def test_bf16_graphs_with_casts_match_as_often_as_fp32_graphs(name: str) -> None:
    gm, _, reports = _rewritten(name, torch.bfloat16)
    assert _counts(reports) == EXPECTED[name] | BF16_ONLY.get(name, {})
    assert "aten.rsqrt" not in ops(gm)


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3"])
def test_each_pass_applied_a_second_time_matches_nothing(name: str) -> None:
    gm = model_graph(name)
    ctx = PassContext(gm, MAX_LEN)
    for number, item in enumerate(PIPELINE):
        run_pipeline(gm, ctx, (item,))
        again = run_pipeline(gm, ctx, (item,))[0]
        assert again.matches == 0, f"pass {number} ({item.name}) matched {again.matches} times again"


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_the_token_dimension_stays_one_symbol_and_gets_no_guard(name: str) -> None:
    gm = model_graph(name)
    tokens = next(n for n in gm.graph.nodes if n.meta.get("gs_input") == "input_ids").meta["val"].shape[1]
    guards = list(tokens.node.shape_env.guards)
    run_pipeline(gm, PassContext(gm, MAX_LEN))
    vals = [n.meta["val"] for n in gm.graph.nodes if "gs_sources" in n.meta]
    sizes = {str(s) for v in vals if isinstance(v, torch.Tensor) for s in v.shape if not isinstance(s, int)}
    assert str(tokens) in sizes
    assert len(sizes) == 2, sizes  # tokens, and rows of logits
    assert tokens.node.shape_env.guards == guards


def test_layers_of_one_window_share_a_cache_group() -> None:
    _, ctx, _ = _rewritten("gemma3_text")
    windows = [spec.window for spec in ctx.cache_layers]
    assert set(windows) == {8, None}
    for (window, _), layers in ctx.cache_groups.items():
        assert [windows[i] for i in layers] == [window] * len(layers)


def test_launches_of_a_dense_layer_stay_at_the_goal() -> None:
    gm, _, _ = _rewritten("llama")
    views = {"aten.slice", "aten.reshape"}
    work = [op for op in ops(gm) if op not in views]
    # norm, qkv, rope + write, attention, o, add + norm, gate/up, GLU, down; then embedding, add, gather, norm, head
    assert len(work) == 9 * LAYERS + 5
