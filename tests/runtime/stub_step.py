"""A plan lowered for a GPU, bound against the stand-in for the CUDA driver: what a step launches can be read off it."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from graphserve.compiler.build import BuildResult
from graphserve.kernels.triton.compile import compile_for
from graphserve.plan.runner import PlanRunner, StepSize
from graphserve.runtime.cuda_driver import CudaDriver
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.model_runner import _view_input
from graphserve.runtime.triton_backend import TritonBackend
from graphserve.runtime.triton_plan import TritonPlan, lower_to_triton
from graphserve.runtime.weights import materialize_weights
from tests.runtime.stub_cuda import StubCuda
from tests.tiny_models import checkpoint_tensors, tiny_model

TARGET, CPU = "cuda:90", torch.device("cpu")
MAX_SEQS = 16


class StubStep:
    """Decode steps of a tiny model on a GPU that is not there; library calls run on the CPU.

    Attributes:
        lowered: the plan as it is launched.
        backend: binds its launches.
        launches: of all steps so far, as the driver saw them.
    """

    def __init__(self, built: BuildResult, config: PretrainedConfig, overlap: bool = False) -> None:
        cache = KVCache(built.plan, 8, 16, CPU)
        self.lowered: TritonPlan = lower_to_triton(built.plan, cache, TARGET, overlap=overlap)
        compiled = {key: compile_for(kernel, TARGET) for key, kernel in self.lowered.distinct_kernels().items()}
        self._stub = StubCuda({c.name: c.binary for c in compiled.values()})
        self.backend = backend = TritonBackend(self.lowered, compiled, CudaDriver(self._stub), CPU)
        backend.table_lens = [4] * len(built.plan.cache_groups)
        inputs = {
            "input_ids": torch.zeros(1, MAX_SEQS, dtype=torch.int64),
            "positions": torch.zeros(1, MAX_SEQS, dtype=torch.int64),
            "logits_indices": torch.zeros(MAX_SEQS, dtype=torch.int64),
            "query_start_loc": torch.arange(MAX_SEQS + 1, dtype=torch.int32),
            "seq_lens": torch.ones(MAX_SEQS, dtype=torch.int32),
        }
        for group in range(len(built.plan.cache_groups)):
            inputs[f"slot_mapping.{group}"] = torch.zeros(MAX_SEQS, dtype=torch.int64)
            inputs[f"block_table.{group}"] = torch.zeros(MAX_SEQS, 4, dtype=torch.int32)
        for layer, (keys, values) in enumerate(cache.layers):
            inputs |= {f"kv_k.{layer}": keys, f"kv_v.{layer}": values}
        parameters = checkpoint_tensors(tiny_model(config))
        weights = materialize_weights(built.plan, parameters.items(), built.constants, CPU)
        binders = {"triton": backend, "library": backend}
        self._runner = PlanRunner(self.lowered.plan, weights, inputs, _view_input, CPU, binders)

    @property
    def launches(self) -> list[dict[str, object]]:
        return self._stub.launches

    def run(self, num_seqs: int) -> None:
        """One decode step."""
        self._runner.run(StepSize((num_seqs, num_seqs, num_seqs)))
