"""Generated C++ for a plan: which launches have a kernel, their packed weights, and one C call for a run of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
import torch

from graphserve.artifacts import ArtifactStore
from graphserve.kernels import register_all
from graphserve.kernels.cpu import (
    ArgSpec,
    CompiledSequence,
    CppKernel,
    Library,
    Refusal,
    build,
    generate,
    isa_level,
    pack_linear_weight,
    pack_moe_weights,
)
from graphserve.plan.arena import launch_inputs
from graphserve.plan.runner import Action, PlanRunner, StepSize
from graphserve.plan.schema import Launch, Plan
from graphserve.processors import usable_threads
from graphserve.progress import phase
from graphserve.runtime.batch_invariance import require_kernels
from graphserve.runtime.choices import MeasuredChoices
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.launch_specs import (
    op_name,
    split_arguments,
    tensor_names,
    unknown_arguments,
    value_name,
    value_specs,
)

logger = logging.getLogger(__name__)


class KernelPlan(msgspec.Struct):
    """The C++ side of a plan.

    Attributes:
        plan: the plan with ``kind`` and ``kernel`` of every launch filled in.
        kernels: launch index → kernel.
        refusals: launch index → why it has none.
        packed: weights that linears and experts read in packed form only.
    """

    plan: Plan
    kernels: dict[int, CppKernel]
    refusals: dict[int, str]
    packed: set[str]

    def distinct_kernels(self) -> list[CppKernel]:
        """Each kernel once, however many launches share it."""
        return list({kernel.key: kernel for kernel in self.kernels.values()}.values())


def lower_to_cpp(plan: Plan, kv_cache: KVCache, isa: str | None = None, deterministic: bool = False) -> KernelPlan:
    """Find a C++ kernel for every launch that has one. Generates source only; compiles nothing.

    Args:
        kv_cache: its block size and strides are constants of the kernels (its data is not read; it may be on meta).
        isa: a level of ``graphserve.kernels.cpu.ISA_LEVELS``; the processor's best by default.
        deterministic: a row's bits must not depend on the other rows of its step.

    Raises:
        ConfigError: ``deterministic``, and a launch has no kernel that keeps this.
    """
    register_all()
    isa = isa or isa_level()
    specs = value_specs(plan, kv_cache)
    packed = _packable_weights(plan)
    kernels: dict[int, CppKernel] = {}
    refusals: dict[int, str] = {}
    for index, launch in enumerate(plan.launches):
        if launch.kind == "view":
            continue
        result = _generate(launch, specs, packed, isa, deterministic)
        if isinstance(result, Refusal):
            refusals[index] = result.reason
        else:
            kernels[index] = result
    # A weight with any reader that wants it unpacked stays unpacked for the others too: one copy of each.
    packed &= _read_only_packed(plan, kernels, packed)
    for index, launch in enumerate(plan.launches):
        if index in kernels and op_name(launch) in ("linear", "moe", "embedding"):
            again = _generate(launch, specs, packed, isa, deterministic)
            if isinstance(again, Refusal):
                refusals[index] = again.reason
                del kernels[index]
            else:
                kernels[index] = again
    if deterministic:
        require_kernels(plan, refusals)
    launches = [
        msgspec.structs.replace(launch, kind="cpp", kernel=kernels[i].symbol) if i in kernels else launch
        for i, launch in enumerate(plan.launches)
    ]
    return KernelPlan(msgspec.structs.replace(plan, launches=launches), kernels, refusals, packed)


def _packable_weights(plan: Plan) -> set[str]:
    names: set[str] = set()
    for launch in plan.launches:
        op = op_name(launch)
        positions = (1,) if op == "linear" else (3, 5) if op == "moe" else ()
        for position in positions:
            name = value_name(launch.args[position])
            if name in plan.weights:
                names.add(name)
    return names


def _read_only_packed(plan: Plan, kernels: dict[int, CppKernel], packed: set[str]) -> set[str]:
    """Those of ``packed`` that no launch reads as a plain matrix."""
    plain: set[str] = set()
    for index, launch in enumerate(plan.launches):
        op = op_name(launch)
        allowed = {"linear": (1,), "moe": (3, 5), "embedding": (1,)}.get(op, ()) if index in kernels else ()
        for name in packed.intersection(launch_inputs(launch)):
            places = [i for i, a in enumerate(launch.args) if value_name(a) == name]
            if not all(i in allowed for i in places):
                plain.add(name)
    for launch in plan.init:
        plain.update(packed.intersection(launch_inputs(launch)))
    # The packed experts' layout serves no embedding, and a matrix read by both kinds would need both layouts.
    for index, launch in enumerate(plan.launches):
        if index in kernels and op_name(launch) == "moe":
            plain.update(n for n in (value_name(launch.args[3]), value_name(launch.args[5])) if n not in packed)
    return packed - plain


def _generate(
    launch: Launch, specs: dict[str, ArgSpec], packed: set[str], isa: str, deterministic: bool
) -> CppKernel | Refusal:
    op = op_name(launch)
    if not op:
        return Refusal(f"{launch.op} has no C++ generator")
    if unknown := unknown_arguments(launch, specs):
        return Refusal(f"{launch.op}: {', '.join(unknown)} has no affine shape")
    if op == "gather_rows":
        args: list[ArgSpec | None] = [specs.get(value_name(launch.args[0])), specs.get(value_name(launch.args[2]))]
        attrs: dict[str, Any] = {}
    else:
        args, attrs = split_arguments(launch, specs)
    if deterministic and op == "paged_attention":
        attrs = {**attrs, "batch_invariant": True}
    if op == "linear" and value_name(launch.args[1]) not in packed:
        return Refusal("gs.linear: the weight is also read as a plain matrix or is not a weight of the plan")
    if op == "moe" and not {value_name(launch.args[3]), value_name(launch.args[5])} <= packed:
        return Refusal("gs.moe: the expert weights are also read as plain tensors")
    if op == "embedding" and value_name(launch.args[1]) in packed:
        attrs = {**attrs, "packed": True}
    outputs = [specs.get(name) for name in launch.outputs if name is not None]
    if any(spec is None for spec in outputs) or len(outputs) != len(launch.outputs):
        return Refusal(f"{launch.op}: a result has no affine shape, or nobody reads one of them")
    return generate(op, attrs, args, [s for s in outputs if s is not None], isa)


def build_library(kernel_plan: KernelPlan, store: ArtifactStore) -> Library:
    """The compiled kernels of a plan: those that the store lacks are built now.

    Raises:
        CompileError: a kernel is not in the store and cannot be compiled.
    """
    with phase("compile C++ kernels", unit="libraries") as work:
        kernels = kernel_plan.distinct_kernels()
        library = build(kernels, store, lambda done, total, name: work.advance())
        work.note = f"{len(kernels)} kernels for {len(kernel_plan.kernels)} launches"
        if library.misses:
            work.note += f"; {library.reasons}; built {len(library.misses)} libraries"
    return library


class _Call:
    """A bound kernel, waiting to be merged with its neighbours."""

    def __init__(self, function: int, pointers: list[int | None]) -> None:
        self.function, self.pointers = function, pointers

    def __call__(self) -> None:
        raise AssertionError("bound kernels are merged by CppBackend.finish before they run")


class CppBackend:
    """Binds ``cpp`` launches: packed weights by pointer, runs of kernels as one C call.

    Args:
        kernel_plan: from :func:`lower_to_cpp`.
        weights: the runner's weights; packed ones are replaced by shapes without data.
        library: the plan's kernels, compiled.

    Attributes:
        table_lens: row length of each cache group's block table.
        choices: how decode steps that are bound from now on run.
    """

    def __init__(self, kernel_plan: KernelPlan, weights: dict[str, torch.Tensor], library: Library) -> None:
        self.replace_kernels(kernel_plan, library)
        with phase("pack weights"):
            self._packed = self._pack(weights)
        self.table_lens: list[int] = []
        self.choices = MeasuredChoices()

    def replace_kernels(self, kernel_plan: KernelPlan, library: Library) -> None:
        """Use other kernels for the same weights (another block size)."""
        self._kernel_plan = kernel_plan
        self._library = library
        self._functions = {k.symbol: library.function_pointer(k.symbol) for k in kernel_plan.distinct_kernels()}

    def _pack(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        packed: dict[str, torch.Tensor] = {}
        for index in self._kernel_plan.kernels:
            launch = self._kernel_plan.plan.launches[index]
            op = op_name(launch)
            if op == "linear":
                name = value_name(launch.args[1])
                if name not in packed:
                    packed[name] = pack_linear_weight(weights[name])
                    weights[name] = weights[name].to("meta")
            elif op == "moe":
                up, down = value_name(launch.args[3]), value_name(launch.args[5])
                if up not in packed:
                    attrs = split_arguments(launch, {})[1]
                    packed[up], packed[down] = pack_moe_weights(
                        weights[up], weights[down], attrs["transposed"], attrs["interleaved"], attrs["has_gate"]
                    )
                    weights[up], weights[down] = weights[up].to("meta"), weights[down].to("meta")
        return packed

    def bind(
        self, launch: Launch, runner: PlanRunner, tensors: Mapping[str, torch.Tensor], size: StepSize
    ) -> Action | None:
        assert launch.kernel is not None
        names = tensor_names(launch)
        pointers = [self._pointer(name, tensors) for name in names]
        return _Call(self._functions[launch.kernel], pointers)

    def _pointer(self, name: str, tensors: Mapping[str, torch.Tensor]) -> int | None:
        if not name:
            return None
        return self._packed[name].data_ptr() if name in self._packed else tensors[name].data_ptr()

    def finish(self, actions: list[Action], size: StepSize) -> list[Action]:
        merged: list[Action] = []
        run: list[_Call] = []
        for action in actions:
            if isinstance(action, _Call):
                run.append(action)
                continue
            if run:
                merged.append(self._sequence(run, size))
                run = []
            merged.append(action)
        if run:
            merged.append(self._sequence(run, size))
        return merged

    def _sequence(self, calls: list[_Call], size: StepSize) -> Action:
        sequence = CompiledSequence(self._library, [(c.function, c.pointers) for c in calls])
        tokens, rows, seqs = size
        table_lens = tuple(self.table_lens)
        chosen = self.choices.of(size).num_threads

        def run() -> None:
            most = usable_threads()
            sequence.run(tokens, rows, seqs, most if chosen is None else min(chosen, most), table_lens)

        return run
