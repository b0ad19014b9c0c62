"""Which executor drives a model, and what a recorded one does before the first request."""

from engine.fake_model import FakeRunner, core_request, make_core
from engine.recorded_model import FakeKernel, recorded_fake_models

from graphserve.config import EngineConfig
from graphserve.engine.device_executor import DeviceExecutor
from graphserve.engine.engine_core import EngineCore
from graphserve.engine.executor import StepSizes
from graphserve.engine.make_executor import make_executor
from graphserve.engine.model_executor import ModelExecutor
from graphserve.engine.scheduler import SchedulerLimits
from graphserve.runtime.device_runner import DeviceRunner
from graphserve.runtime.recorder import Recorder
from graphserve.sampling_params import SamplingParams


def test_a_cpu_samples_on_the_host_one_step_at_a_time():
    executor = make_executor(EngineConfig(), FakeRunner())
    assert isinstance(executor, ModelExecutor) and executor.max_in_flight == 1


def test_decode_steps_are_recorded_before_the_first_request():
    recorders = []

    def graphs(scalars):
        recorders.append(Recorder(scalars))
        return recorders[-1]

    model = FakeRunner()
    kernel = FakeKernel(model)
    executor = DeviceExecutor(
        DeviceRunner(kernel.plan, {}, model.device, lowering=kernel, graphs=graphs), [1, 4], ("greedy", "sample")
    )
    executor.allocate(8, 4, StepSizes(num_tokens=16, num_rows=8, num_seqs=8, num_lanes=8))
    assert len(recorders[0]) == 4 and model.num_steps == 0
    executor.close()
    assert model.is_closed


def test_a_recorded_engine_replays_what_fits_a_bucket():
    with recorded_fake_models() as runners:
        core, _ = make_core()
        core.add_request(core_request("a", [5, 6, 7], SamplingParams(temperature=0, max_tokens=5)))
        while core.has_unfinished_requests():
            core.step()
    (runner,) = runners
    assert runner.num_variant_steps["greedy"] >= 5 and runner.num_eager_steps == 0
    stats = core.stats()
    assert stats.num_variant_steps_total == dict(runner.num_variant_steps)
    assert stats.num_eager_steps_total == 0 and stats.num_graphs == runner.num_graphs > 0
    core.close()


def test_steps_that_fit_no_bucket_are_counted_as_eager():
    model = FakeRunner()
    kernel = FakeKernel(model)
    runner = DeviceRunner(kernel.plan, {}, model.device, lowering=kernel, graphs=Recorder, record_after=0)
    limits = SchedulerLimits(
        max_num_seqs=4, max_num_batched_tokens=1024, max_logits_rows=4, enable_chunked_prefill=True
    )
    core = EngineCore(DeviceExecutor(runner, [1, 2]), limits, num_blocks=128, block_size=16)
    # 600 tokens of prompts in one step are more than any bucket; then three sequences, more than the largest, decode.
    for name in "abc":
        core.add_request(core_request(name, [i % 40 for i in range(200)], SamplingParams(temperature=0, max_tokens=4)))
    while core.has_unfinished_requests():
        core.step()
    assert core.stats().num_eager_steps_total == core.stats().num_variant_steps_total["greedy"] == 4
    core.close()
    assert core.stats().num_eager_steps_total == 4
