"""A model runner whose GPU kernels run in Triton's interpreter, one launch after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphserve.kernels.triton.compile import interpret
from graphserve.plan.runner import Action, PlanRunner, StepSize
from graphserve.plan.schema import Launch, Plan
from graphserve.runtime.launch_specs import op_name, tensor_names, value_name
from graphserve.runtime.model_runner import ModelRunner
from graphserve.runtime.triton_plan import TritonPlan, lower_to_triton

TARGET = "cuda:90"


class InterpretedRunner(ModelRunner):
    """Products that the GPU's library would compute are plain torch launches.

    Args:
        on_gpu: as ``deterministic`` of :class:`ModelRunner`, for the GPU form of the plan.

    Attributes:
        num_library_launches: products left to the library so far.
    """

    def __init__(
        self, plan: Plan, parameters: dict[str, torch.Tensor], constants: dict[str, torch.Tensor], on_gpu: bool
    ) -> None:
        super().__init__(plan, parameters, constants, backend="reference")
        self.num_library_launches = 0
        self._on_gpu_deterministic = on_gpu

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> None:
        super().allocate_kv_cache(num_blocks, block_size)
        assert self.kv_cache is not None
        self.lowered = lower_to_triton(self.plan, self.kv_cache, TARGET, self._on_gpu_deterministic)
        assert not self.lowered.refusals
        binder = _Interpreter(self.lowered, self, self._block_table_len)
        self._runner.set_plan(self.lowered.plan, {"triton": binder, "library": binder})


class _Interpreter:
    def __init__(self, plan: TritonPlan, runner: InterpretedRunner, table_len: int) -> None:
        self._plan = plan
        self._kernels = {kernels[0].symbol: kernels for kernels in plan.kernels.values()}
        self._runner = runner
        self._table_lens = {f"B_{group}": table_len for group in range(len(plan.plan.cache_groups))}

    def bind(self, launch: Launch, runner: PlanRunner, tensors: Mapping[str, Any], size: StepSize) -> Action | None:
        if op_name(launch) == "linear":
            x = tensors[value_name(launch.args[0])]
            if self._plan.is_library_product(launch, x.numel() // x.shape[-1]):
                self._runner.num_library_launches += 1
                return None
        assert launch.kernel is not None
        kernels = self._kernels[launch.kernel]
        values = [tensors[name] if name else None for name in tensor_names(launch)]
        scalars = {"T": size.num_tokens, "R": size.num_rows, "S": size.num_seqs, **self._table_lens}
        return lambda: interpret(kernels, values, scalars)

    def finish(self, actions: list[Action], size: StepSize) -> list[Action]:
        return actions
