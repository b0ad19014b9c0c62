"""Plan → GPU launches: a generated Triton kernel, a library call, or the reason why neither.

Plan mode: everything here works without a GPU. :func:`compile_kernels` builds each distinct kernel for a target exactly
as the launcher will call it, so that registers, spills and vector loads can be checked on a CPU box.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from graphserve.artifacts import open_store
from graphserve.kernels import register_all
from graphserve.kernels.arg_spec import ArgSpec, Refusal
from graphserve.kernels.triton.compiled import CompiledKernel, find_or_compile_kernels
from graphserve.kernels.triton.generate import generate
from graphserve.kernels.triton.kernel import TritonKernel
from graphserve.kernels.triton.overlap import overlapping, require_overlap
from graphserve.plan.schema import Launch, Plan
from graphserve.runtime.batch_invariance import invariant_choices, require_kernels
from graphserve.runtime.choices import DEFAULT, StepChoice, product_name
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.launch_specs import (
    op_name,
    split_arguments,
    unknown_arguments,
    value_name,
    value_specs,
)

# Ops that cuBLAS serves through torch.mm when there are many rows; a Triton kernel may replace it for few.
LIBRARY_OPS = {"linear": "torch.mm"}
# One row is a matrix times a vector, which our kernel reads faster; from two rows on cuBLAS is within 7 % of the best
# tile of ours, above or below it (benchmarks/gpu_tune.py, H200).
MAX_GEMV_ROWS = 1
# Ops whose second kernel, where there is one, only adds up what the first one computed per part of the keys.
_SPLITS_KEYS = ("paged_attention", "paged_attention_quant", "paged_attention_quant_rows")


# Programs that share the keys of a query in a decode step: few where sequences and heads fill the device by themselves.
# A step has tokens times key heads of them without; the numbers are those that benchmarks/gpu_tune.py found best.
DECODE_SEGMENTS = ((512, 1), (32, 4), (0, 64))


def decode_segments(num_programs: int) -> int:
    """Programs a query for a decode step of so many tokens times key heads."""
    return next(segments for least, segments in DECODE_SEGMENTS if num_programs >= least)


class TritonPlan(msgspec.Struct):
    """The GPU side of a plan.

    Attributes:
        plan: the plan with ``kind`` and ``kernel`` of every launch filled in.
        kernels: launch index → the kernels that it starts, in order (a reduce after split keys, say).
        refusals: launch index → why it has neither kernel nor library call; such a launch runs eagerly.
        deterministic: a row's bits must not depend on the other rows of its step.
        overlap: kernels are launched while the one in front still runs, and wait for it themselves.
        decode_kernels: launch index → segments → what takes the place of its kernels in decode steps (attention).
    """

    plan: Plan
    kernels: dict[int, list[TritonKernel]]
    refusals: dict[int, str]
    deterministic: bool = False
    overlap: bool = False
    decode_kernels: dict[int, dict[int, list[TritonKernel]]] = {}

    def is_library_product(self, launch: Launch, num_rows: int, choice: StepChoice = DEFAULT) -> bool:
        """Whether a launch is a product that the library computes in a step with so many rows of it."""
        if op_name(launch) not in LIBRARY_OPS or self.deterministic:
            return False
        if launch.kind == "library":
            return True
        product = self.product_of(launch)
        if choice.vector_products is None or product is None:
            return num_rows > MAX_GEMV_ROWS
        return product not in choice.vector_products

    def product_of(self, launch: Launch) -> str | None:
        """What a table of choices calls a launch; None unless it is a weight's product that both can compute."""
        if op_name(launch) not in LIBRARY_OPS or launch.kind != "triton" or self.deterministic:
            return None
        weight = self.plan.weights.get(value_name(launch.args[1]))
        return None if weight is None else product_name(weight.spec.shape)

    def distinct_kernels(self) -> dict[str, TritonKernel]:
        """All kernels by key; layers share them."""
        every = list(self.kernels.values())
        every += [kernels for choices in self.decode_kernels.values() for kernels in choices.values()]
        return {k.key: k for kernels in every for k in kernels}

    def launches_per_layer(self) -> dict[int, int]:
        """Kernels that each layer starts, library calls and eager ops included; not the reduce after split keys."""
        counts: dict[int, int] = {}
        for index, launch in enumerate(self.plan.launches):
            if launch.kind != "view" and launch.layer is not None:
                num_kernels = len(self.kernels[index]) if index in self.kernels else 1
                if op_name(launch) in _SPLITS_KEYS:
                    num_kernels = 1
                counts[launch.layer] = counts.get(launch.layer, 0) + num_kernels
        return counts


def lower_to_triton(
    plan: Plan, kv_cache: KVCache, target: str, deterministic: bool = False, overlap: bool = False
) -> TritonPlan:
    """Find the GPU form of every launch. Generates source only; compiles nothing.

    Args:
        kv_cache: its block size and strides are constants of the kernels (may be on meta).
        target: one of ``graphserve.kernels.triton.kernel.TARGETS``.
        deterministic: a row's bits must not depend on the other rows of its step.
        overlap: launch kernels while the one in front still runs (:mod:`graphserve.kernels.triton.overlap`).

    Raises:
        ConfigError: ``deterministic``, and a launch has no kernel that keeps this; ``overlap`` on a target without it.
    """
    if overlap:
        require_overlap(target)
    register_all()
    specs = value_specs(plan, kv_cache)
    kernels: dict[int, list[TritonKernel]] = {}
    decode_kernels: dict[int, dict[int, list[TritonKernel]]] = {}
    refusals: dict[int, str] = {}
    launches: list[Launch] = []
    for index, launch in enumerate(plan.launches):
        if launch.kind == "view":
            launches.append(launch)
            continue
        result = _generate(launch, specs, target, deterministic)
        if isinstance(result, list):
            result = [overlapping(kernel) for kernel in result] if overlap else result
            kernels[index] = result
            if op_name(launch) in _SPLITS_KEYS and not deterministic:
                decode_kernels[index] = _decode_kernels(launch, specs, target, overlap)
            launches.append(msgspec.structs.replace(launch, kind="triton", kernel=result[0].symbol))
        elif op_name(launch) in LIBRARY_OPS and not deterministic:
            launches.append(msgspec.structs.replace(launch, kind="library", kernel=LIBRARY_OPS[op_name(launch)]))
        else:
            refusals[index] = result.reason
            launches.append(launch)
    if deterministic:
        require_kernels(plan, refusals)
    lowered = msgspec.structs.replace(plan, launches=launches)
    return TritonPlan(lowered, kernels, refusals, deterministic, overlap, decode_kernels)


def _decode_kernels(
    launch: Launch, specs: dict[str, ArgSpec], target: str, overlap: bool
) -> dict[int, list[TritonKernel]]:
    """Kernels of an attention launch for steps in which no sequence has more than one token, by segments."""
    found: dict[int, list[TritonKernel]] = {}
    for _, segments in DECODE_SEGMENTS:
        result = _generate(launch, specs, target, False, {"max_query_len": 1, "segments": segments})
        assert isinstance(result, list), f"{launch.op} has a kernel for mixed steps, but none for decode: {result}"
        found[segments] = [overlapping(kernel) for kernel in result] if overlap else result
    return found


def _generate(
    launch: Launch, specs: dict[str, ArgSpec], target: str, deterministic: bool, choices: dict[str, Any] | None = None
) -> list[TritonKernel] | Refusal:
    op = op_name(launch)
    if not op:
        return Refusal(f"{launch.op} has no Triton generator")
    if unknown := unknown_arguments(launch, specs):
        return Refusal(f"{launch.op}: {', '.join(unknown)} has no affine shape")
    if op == "gather_rows":
        args: list[ArgSpec | None] = [specs.get(value_name(launch.args[0])), specs.get(value_name(launch.args[2]))]
        attrs: dict[str, Any] = {}
    else:
        args, attrs = split_arguments(launch, specs)
    attrs = {**attrs, **({"product": "gemv"} if op in LIBRARY_OPS else {}), **(choices or {})}
    if deterministic:
        attrs = {**attrs, **invariant_choices(op)}
    outputs = [specs.get(name) for name in launch.outputs if name is not None]
    if any(spec is None for spec in outputs) or len(outputs) != len(launch.outputs):
        return Refusal(f"{launch.op}: a result has no affine shape, or nobody reads one of them")
    result = generate(op, attrs, args, [s for s in outputs if s is not None], target)
    if isinstance(result, Refusal):
        return result
    return list(result) if isinstance(result, (list, tuple)) else [result]


def compile_kernels(
    plan: TritonPlan, target: str, progress: Callable[[int, int], None] | None = None
) -> dict[str, CompiledKernel]:
    """Compile each distinct kernel of a plan for ``target``, by key. Needs triton unless all are stored, and no GPU."""
    return find_or_compile_kernels(plan.distinct_kernels(), target, open_store(), progress)
