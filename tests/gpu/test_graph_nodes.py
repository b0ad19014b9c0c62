"""What the device's driver says that a captured step consists of, beside the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch


@pytest.mark.parametrize("variant", ["greedy", "sample", "logprobs"])
@pytest.mark.parametrize("count", [1, 8])
def test_a_captured_step_has_the_plans_kernels_and_no_others(variant: str, count: int, device: torch.device) -> None:
    """Each library call may be several kernels, which are listed; nothing else may."""
    from benchmarks.graph_nodes import GraphReader, step_nodes
    from graphserve.engine.scheduler import SchedulerLimits
    from graphserve.plan.runner import StepSize
    from tests.gpu import step_engines

    core, runner = step_engines.tiny_engine(device, SchedulerLimits(8, 128, 48, True), captures=True)
    step_engines.run_requests(core, [4] * count, [step_engines.VARIANTS[variant]] * count)
    bound = runner.bound(variant, StepSize((count, count, count)))  # type: ignore[arg-type]
    stream = runner.stream
    assert stream is not None
    nodes = step_nodes(bound, stream, GraphReader())
    core.close()
    assert not nodes.missing
    assert nodes.num_unexplained == 0, nodes
