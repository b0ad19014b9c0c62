"""Plan mode: real models' plans lowered for GPUs that are not there, each kernel compiled as a launch would call it.

No weights are read. The default run counts launches for every model and compiles one model for one target; the rest is
marked ``full``. ``GRAPHSERVE_UPDATE_GOLDEN=1 pytest -m '' tests/runtime/test_plan_mode.py -n 0`` widens the budgets in
``plan_budgets.json`` to what it measures, so that one file holds for several Triton versions (delete it to start anew).
A budget is a ceiling with a little room: registers are rounded up to 16, shared memory to a KiB.
"""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_kernel_cases import DEFAULT_TARGET, FULL_TARGETS, check_budget

from graphserve.compiler.build import BuildResult
from graphserve.kernels.triton import TritonKernel
from graphserve.kernels.triton.compile import CompiledKernel, compile_for
from graphserve.kernels.triton.matmul import SHARED_MEMORY
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.launch_specs import split_arguments, value_specs
from graphserve.runtime.triton_plan import TritonPlan, compile_kernels, lower_to_triton
from tests.compiler.compiled import compiled
from tests.compiler.published_configs import (
    GEMMA_3_4B_TEXT,
    GPT_OSS_20B,
    LLAMA_3_1_8B,
    MIXTRAL_8X7B,
    QWEN3_8B,
    QWEN3_30B_A3B,
    published,
)

DENSE = {"Llama-3.1-8B": LLAMA_3_1_8B, "Qwen3-8B": QWEN3_8B, "Gemma-3-4B": GEMMA_3_4B_TEXT}
MOE = {"Qwen3-30B-A3B": QWEN3_30B_A3B, "Mixtral-8x7B": MIXTRAL_8X7B, "gpt-oss-20b": GPT_OSS_20B}
CONFIGS: dict[str, dict[str, Any]] = DENSE | MOE
MOST_LAUNCHES = dict.fromkeys(DENSE, 9) | dict.fromkeys(MOE, 13)
BUDGETS = Path(__file__).parent / "plan_budgets.json"

# Families that multiply matrices, and those too small to read memory in whole vectors.
MATRIX_FAMILIES = {"linear", "paged_attention", "moe_gate_up", "moe_down"}
SCALAR_FAMILIES = {"route", "moe_align"}


def build(fields: dict[str, Any], **changes: Any) -> BuildResult:
    return compiled(published(fields | changes), max_model_len=4096, dtype=torch.bfloat16)


@functools.cache
def built(name: str) -> BuildResult:
    return build(CONFIGS[name])


def lowered(result: BuildResult, target: str = DEFAULT_TARGET) -> TritonPlan:
    """The plan for ``target`` with a cache of 16-token blocks; its number of blocks is no part of a kernel."""
    return lower_to_triton(result.plan, KVCache(result.plan, 2, 16, torch.device("meta")), target)


def family(kernel: TritonKernel) -> str:
    """``linear`` of ``gs_linear_0123456789abcdef``."""
    return kernel.symbol.removeprefix("gs_")[: -len("_0123456789abcdef")]


def names(plan: TritonPlan) -> dict[str, str]:
    """Key → name of each distinct kernel: its family and the shapes of its launch's first two arguments."""
    specs = value_specs(plan.plan, KVCache(plan.plan, 2, 16, torch.device("meta")))
    result: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for index, kernels in plan.kernels.items():
        args = split_arguments(plan.plan.launches[index], specs)[0][:2]
        shapes = ", ".join("x".join(map(str, spec.shape)) for spec in args if spec is not None)
        for kernel in kernels:
            if kernel.key in result:
                continue
            name = f"{family(kernel)} {shapes}"
            seen[name] += 1
            result[kernel.key] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return result


def check_kernel(name: str, kernel: TritonKernel, target: str) -> None:
    """What any kernel of its family must show on any target, then its own budget."""
    code = compile_for(kernel, target)
    assert code.num_spills == 0, f"{name} on {target}: {code.num_spills} spills"
    assert code.shared_bytes <= SHARED_MEMORY[target], f"{name} on {target}: {code.shared_bytes} bytes shared"
    assert (code.num_mma > 0) == (family(kernel) in MATRIX_FAMILIES), f"{name} on {target}: {code.num_mma} MMA"
    if family(kernel) not in SCALAR_FAMILIES:
        assert code.num_vector_loads_128 > 0, f"{name} on {target} reads memory without 128-bit loads"
    check_budget(name, kernel, target, BUDGETS)


def check_plan(model: str, target: str) -> None:
    """Every distinct kernel of the model's plan within budget; all that do not hold are named at once."""
    plan = lowered(built(model), target)
    kernel_names, failures = names(plan), []
    for key, kernel in plan.distinct_kernels().items():
        if key not in kernel_names:
            continue  # attention's forms for decode steps: tests/kernels/triton/test_attention_compile.py
        try:
            check_kernel(f"{model}: {kernel_names[key]}", kernel, target)
        except (AssertionError, KeyError) as error:
            failures.append(f"{type(error).__name__}: {error}".splitlines()[0])
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_takes_no_more_launches_than_promised(name: str) -> None:
    plan = lowered(built(name))
    counts = plan.launches_per_layer()
    assert len(counts) == CONFIGS[name]["num_hidden_layers"]
    assert max(counts.values()) <= MOST_LAUNCHES[name], counts


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layers_launches_are_the_kernels_that_it_starts(name: str) -> None:
    plan = lowered(built(name))
    started: Counter[int] = Counter()
    for index, launch in enumerate(plan.plan.launches):
        if launch.layer is not None and launch.kind != "view":
            kernels = plan.kernels.get(index)
            started[launch.layer] += 1 if kernels is None else sum("_reduce" not in family(k) for k in kernels)
    assert plan.launches_per_layer() == dict(started)


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_runs_eagerly_between_embedding_and_logits(name: str) -> None:
    plan = lowered(built(name))
    assert {plan.plan.launches[i].op: reason for i, reason in plan.refusals.items()} == {}
    assert {launch.kind for launch in plan.plan.launches} <= {"triton", "library", "view"}


def check_depth_is_free(name: str) -> None:
    """As much is traced, and the same kernels are compiled, for 4 layers as for 64."""
    changes: list[dict[str, Any]] = [{"num_hidden_layers": depth} for depth in (4, 64)]
    types = list(dict.fromkeys(getattr(published(CONFIGS[name]), "layer_types", None) or []))
    if len(types) > 1:
        # Types take turns, so that the shallow model has each of them as well and both end with the same one.
        changes = [c | {"layer_types": (types * 64)[: c["num_hidden_layers"]]} for c in changes]
    shallow, deep = (build(CONFIGS[name], **change) for change in changes)
    assert shallow.stack is not None and deep.stack is not None
    assert (shallow.stack.depth, deep.stack.depth) == (4, 64)
    assert len(deep.stack.traced) == len(shallow.stack.traced) <= 4
    few, many = lowered(shallow), lowered(deep)
    assert few.distinct_kernels().keys() == many.distinct_kernels().keys()
    assert len(many.kernels) > 10 * len(few.kernels)


def test_sixty_four_layers_are_no_more_to_compile_than_four() -> None:
    check_depth_is_free("Llama-3.1-8B")


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "Llama-3.1-8B"])
def test_depth_is_free_for_every_model(name: str) -> None:
    check_depth_is_free(name)


def test_the_plan_of_a_llama_stays_within_budget() -> None:
    check_plan("Llama-3.1-8B", DEFAULT_TARGET)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", [DEFAULT_TARGET, *FULL_TARGETS])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_plan_stays_within_budget_on_every_target(name: str, target: str) -> None:
    check_plan(name, target)


@pytest.mark.full
def test_each_distinct_kernel_of_a_plan_is_compiled_once_and_reported() -> None:
    plan = lowered(built("Llama-3.1-8B"))
    steps: list[tuple[int, int]] = []
    code = compile_kernels(plan, DEFAULT_TARGET, lambda done, total: steps.append((done, total)))
    assert code.keys() == plan.distinct_kernels().keys()
    assert steps == [(i, len(code)) for i in range(1, len(code) + 1)]
    assert all(isinstance(c, CompiledKernel) for c in code.values())


@pytest.mark.parametrize("scheme", ["int8_w8a8", "fp8_per_channel"])
def test_a_layer_on_8_bit_values_takes_no_more_launches_and_nothing_runs_eagerly(scheme: str) -> None:
    """Norm, gated product and attention quantize what they make. The last layer gathers rows before it quantizes."""
    layers = 4
    fields = published(LLAMA_3_1_8B | {"num_hidden_layers": layers})
    plan = lowered(compiled(fields, max_model_len=4096, dtype=torch.bfloat16, quantization=scheme))
    assert plan.refusals == {}
    assert [plan.launches_per_layer()[i] for i in range(layers)] == [9] * (layers - 1) + [10]
    fused = Counter(launch.op for launch in plan.plan.launches)
    assert fused["gs.paged_attention_quant_rows.default"] == layers - 1
    assert fused["gs.quantize_rows.default"] == 1
