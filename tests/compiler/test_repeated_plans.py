"""A plan made from one or two layers of each type is the plan that tracing every layer gives."""

from math import prod

import pytest
from transformers import PretrainedConfig

from graphserve.plan.arena import launch_inputs
from graphserve.plan.runner import resolve_op
from graphserve.plan.symbols import parse
from tests.compiler.compiled import comparable, compiled, compiled_tiny
from tests.tiny_models import tiny_config

DEFAULT_RUN = ("llama", "gpt_oss", "deepseek_v3")
OTHERS = ("qwen3", "gemma3_text", "phi3", "cohere2", "mixtral", "olmo2", "opt", "llama4_text", "gpt_neox", "qwen2")


def deep_config(name: str) -> PretrainedConfig:
    """The tiny config with every layer twice, so that each type has a layer which is not traced."""
    config = tiny_config(name)
    text = config.get_text_config()
    depth = text.num_hidden_layers
    for field, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(text, field, value * 2)
    text.num_hidden_layers = 2 * depth
    return config


def check_equal(name: str) -> None:
    repeated, full = compiled(deep_config(name)), compiled(deep_config(name), full_depth=True)
    assert repeated.stack is not None and full.stack is not None
    assert (repeated.notes, full.notes) == ([], [])
    assert repeated.stack.is_reduced and not full.stack.is_reduced
    ours, truth = comparable(repeated.plan), comparable(full.plan)
    assert len(ours["launches"]) == len(truth["launches"])
    for a, b in zip(ours["launches"], truth["launches"], strict=True):
        assert a == b
    assert ours == truth


@pytest.mark.parametrize("name", DEFAULT_RUN)
def test_repeated_layers_give_the_plan_of_the_full_trace(name: str) -> None:
    check_equal(name)


@pytest.mark.full
@pytest.mark.parametrize("name", OTHERS)
def test_repeated_layers_give_the_plan_of_the_full_trace_for_other_architectures(name: str) -> None:
    check_equal(name)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gemma4_text"])
def test_a_cache_is_read_and_written_in_place_by_attention_ops_alone(name: str) -> None:
    plan = compiled_tiny(name).plan
    touching = {launch.op for launch in plan.launches if any(v.startswith("kv_") for v in launch_inputs(launch))}
    assert touching <= {"gs.paged_attention.default", "gs.rope_kv_write.default", "gs.kv_write.default"}
    schemas = {op: resolve_op(op)._schema for op in {launch.op for launch in plan.launches}}
    assert {op for op, schema in schemas.items() if schema.is_mutable} == touching - {"gs.paged_attention.default"}
    # What a launch makes has the step's size: numbers of blocks and context lengths stand in no shape, and no launch
    # makes more for one token than the widest weight gives (a gathered context would be max_model_len times that).
    widest = max(max(weight.spec.shape, default=0) for weight in plan.weights.values())
    widths = {name: prod(parse(d).t or parse(d).r or parse(d).c for d in s.shape) for name, s in plan.buffers.items()}
    assert max(widths.values()) <= 8 * widest


def test_layers_that_differ_in_the_middle_are_traced_apart() -> None:
    built = compiled_tiny("qwen3_moe")  # layer 1 is dense, the others have experts
    assert built.stack is not None
    assert built.stack.types[1] not in {built.stack.types[i] for i in (0, 2, 3)}
    moe = [launch.layer for launch in built.plan.launches if launch.op == "gs.moe.default"]
    assert moe == [0, 2, 3]
