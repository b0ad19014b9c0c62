"""Which executor drives a loaded model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphserve.config import EngineConfig
from graphserve.engine.executor import Executor

if TYPE_CHECKING:
    from graphserve.runtime.model_runner import ModelRunner
    from graphserve.runtime.step_plan import Variant


def make_executor(config: EngineConfig, model: ModelRunner) -> Executor:
    """The executor for a model's device; it takes over the model's weights.

    On CUDA whole steps run on the device, as captured graphs unless ``enforce_eager``, and the host runs a step behind.
    A CPU has no launches to save, so there the model runs and then the sampler, one step at a time.
    """
    # Looked up when it is called: tests put other executors in its place.
    from graphserve.engine import model_executor

    if model.device.type == "cuda":
        return _device_executor(config, model)
    return model_executor.ModelExecutor(model)


def _device_executor(config: EngineConfig, model: ModelRunner) -> Executor:
    import torch

    from graphserve.artifacts import open_store
    from graphserve.engine.device_executor import DeviceExecutor
    from graphserve.runtime.cuda_graphs import CudaGraphs
    from graphserve.runtime.device_runner import DeviceRunner
    from graphserve.runtime.step_lowering import TritonLowering

    stream = torch.cuda.Stream(model.device)
    store = open_store(config.compile_cache, config.strict_compile_cache)

    def graphs(scalars: object) -> CudaGraphs:
        return CudaGraphs()

    runner = DeviceRunner(
        model.plan,
        model.weights,
        model.device,
        lowering=TritonLowering(
            model.device,
            stream,
            store,
            config.deterministic,
            choices=model.choices,
            is_tiered=config.start == "tiered",
        ),
        graphs=None if config.enforce_eager else graphs,
        stream=stream,
    )
    record_ahead: tuple[Variant, ...] = () if config.enforce_eager else ("greedy", "sample")
    return DeviceExecutor(runner, config.cudagraph_capture_sizes, record_ahead, model.weight_memory)
