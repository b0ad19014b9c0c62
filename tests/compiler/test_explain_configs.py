"""Five published configs, no weights: every pass matches in every layer as often as the architecture says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from graphserve.compiler.build import BuildResult
from tests.compiler.compiled import compiled
from tests.compiler.published_configs import (
    DEEPSEEK_V3,
    GEMMA_3_4B_TEXT,
    LLAMA_3_1_8B,
    MIXTRAL_8X7B,
    QWEN3_8B,
    published,
)

CONFIGS = {
    "Llama-3.1-8B": LLAMA_3_1_8B,
    "Qwen3-8B": QWEN3_8B,
    "Mixtral-8x7B": MIXTRAL_8X7B,
    "Gemma-3-4B": GEMMA_3_4B_TEXT,
    "DeepSeek-V3": DEEPSEEK_V3,
}

# Matches of each pass in one layer. What only rewrites spellings is left out; a pass not named must not match.
DENSE = {"rms_norm": 2, "linear": 7, "activation": 1, "glu": 1, "rope": 2, "merge_linears": 2, "attention": 1}
MOE = {"functionalize": 1, "rms_norm": 2, "linear": 5, "rope": 2, "row_reshape": 2, "merge_linears": 1, "attention": 1}
MOE |= {"route": 1, "pointwise_groups": 1}  # the router's logits become fp32
# q and kv have a down and an up projection
LATENT = DENSE | {"functionalize": 1, "rms_norm": 4, "linear": 8}
LATENT_MOE = LATENT | {"functionalize": 3, "linear": 9, "row_reshape": 2, "route": 1, "weight_constants": 1}
LATENT_MOE |= {"pointwise_groups": 2}  # the router's input, and the sum with the shared expert
EXPECTED: dict[str, dict[int, dict[str, int]]] = {  # by layer type, in order of first appearance
    "Llama-3.1-8B": {0: DENSE},
    "Qwen3-8B": {0: DENSE | {"rms_norm": 4}},
    "Mixtral-8x7B": {0: MOE},
    "Gemma-3-4B": {0: DENSE | {"rms_norm": 6}, 1: DENSE | {"rms_norm": 6}},
    "DeepSeek-V3": {0: LATENT, 1: LATENT_MOE},
}
SPELLINGS = {"canonical_forms", "no_ops", "common_subexpressions"}
# These join what two layers or the model's end make, so the first and last layer differ from the rest.
ACROSS_LAYERS = {"add_norm", "norm_sandwich", "position_tables", "last_rows"}

LLAMA_LAYER = [
    "gs.add_rms_norm",
    "gs.linear",  # q, k and v
    "gs.rope_kv_write",
    "gs.paged_attention",
    "gs.linear",
    "gs.add_rms_norm",
    "gs.linear",  # gate and up
    "gs.act_mul",
    "gs.linear",
]

_built: dict[str, BuildResult] = {}


def build(name: str) -> BuildResult:
    if name not in _built:
        _built[name] = compiled(published(CONFIGS[name]), max_model_len=4096, dtype=torch.bfloat16)
    return _built[name]


def matches(built: BuildResult, layer: int | None) -> dict[str, int]:
    sites = ((report.name, site) for report in built.reports for site in report.sites)
    found = Counter(name for name, site in sites if site.layer == layer)
    return {name: n for name, n in found.items() if name not in SPELLINGS}


def layer_ops(built: BuildResult, layer: int) -> list[str]:
    launches = [launch for launch in built.plan.launches if launch.layer == layer and launch.kind != "view"]
    return [launch.op.removesuffix(".default") for launch in launches]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_expected_pass_matches_in_every_layer(name: str) -> None:
    built = build(name)
    assert built.notes == [] and built.stack is not None
    assert built.stack.depth == CONFIGS[name]["num_hidden_layers"]
    for layer, layer_type in enumerate(built.stack.types):
        found = {k: n for k, n in matches(built, layer).items() if k not in ACROSS_LAYERS}
        assert (layer, found) == (layer, EXPECTED[name][layer_type])
    refusals = [refusal for report in built.reports for refusal in report.refusals]
    assert refusals == []


@pytest.mark.parametrize("name", CONFIGS)
def test_every_norm_before_a_block_takes_the_residual_along(name: str) -> None:
    built = build(name)
    assert built.stack is not None
    for layer in range(1, built.stack.depth - 1):
        assert matches(built, layer)["add_norm"] == 2
    totals = sum(report.matches for report in built.reports if report.name == "add_norm")
    assert totals == 2 * built.stack.depth  # the first norm has nothing to add, the final norm has


@pytest.mark.parametrize("name", CONFIGS)
def test_one_embedding_one_head_and_one_table_pair_for_each_rotation(name: str) -> None:
    built = build(name)
    reports = Counter[str]()
    for report in built.reports:
        reports[report.name] += report.matches
    rotations = 2 if name == "Gemma-3-4B" else 1
    assert (reports["embedding"], reports["last_rows"], reports["position_tables"]) == (1, 1, 2 * rotations)
    tables = [weight for key, weight in built.plan.weights.items() if key.startswith("table.")]
    assert len(tables) == 2 * rotations and {table.spec.shape[0] for table in tables} == {4096}


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Qwen3-8B"])
def test_a_dense_layer_takes_nine_launches(name: str) -> None:
    built = build(name)
    assert built.stack is not None
    assert layer_ops(built, 0) == ["gs.rms_norm", *LLAMA_LAYER[1:]]
    for layer in range(1, built.stack.depth):
        assert layer_ops(built, layer) == LLAMA_LAYER
    # Embedding, the rows whose logits are wanted (of the last attention and of the residual), final norm, head.
    outside = [x.op.removesuffix(".default") for x in built.plan.launches if x.layer is None and x.kind != "view"]
    rows = ["aten.index_select"] * 2
    assert outside == ["gs.embedding", *rows, "gs.add_rms_norm", "gs.linear"]


def test_a_layer_with_norms_before_and_after_its_blocks_takes_nine_launches_too() -> None:
    built = build("Gemma-3-4B")
    sandwich = ["gs.norm_add_rms_norm" if op == "gs.add_rms_norm" else op for op in LLAMA_LAYER]
    assert layer_ops(built, 0) == ["gs.rms_norm", *sandwich[1:]]
    for layer in range(1, 34):
        assert layer_ops(built, layer) == sandwich
    (report,) = [report for report in built.reports if report.name == "norm_sandwich"]
    assert report.matches == 2 * 34  # the first norm follows no block, the final norm does


def test_attention_keeps_what_each_model_says() -> None:
    def arguments(name: str) -> list[tuple[Any, ...]]:
        launches = build(name).plan.launches
        return [x.args[6:13] for x in launches if x.op == "gs.paged_attention.default"]

    assert set(arguments("Llama-3.1-8B")) == {(None, None, 128**-0.5, 0, 0, 0.0, True)}
    assert set(arguments("Mixtral-8x7B")) == {(None, None, 128**-0.5, 0, 0, 0.0, True)}
    gemma = [(None, None, 256**-0.5, 0 if layer % 6 == 5 else 1024, 0, 0.0, True) for layer in range(34)]
    assert arguments("Gemma-3-4B") == gemma
    groups = build("Gemma-3-4B").plan.cache_groups
    assert [(group.window, len(group.layers)) for group in groups] == [(1024, 29), (None, 5)]
    mscale = 0.1 * 1.0 * torch.log(torch.tensor(40.0)).item() + 1.0  # YaRN's, squared into the scale
    (scale,) = {args[2] for args in arguments("DeepSeek-V3")}
    assert scale == pytest.approx(192**-0.5 * mscale * mscale)
    spec = build("DeepSeek-V3").plan.cache_layers[0]
    assert (spec.kv_heads, spec.k_dim, spec.v_dim) == (128, 192, 128)


def test_mixtral_runs_router_and_experts_as_one_launch_each() -> None:
    built = build("Mixtral-8x7B")
    for layer in range(1, 32):
        # The router's product, its logits widened to fp32, the choice of experts, the experts.
        assert layer_ops(built, layer) == [*LLAMA_LAYER[:6], "gs.linear", "gs.pointwise", "gs.route", "gs.moe"]
