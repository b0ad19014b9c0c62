"""Whole steps on the device: captured graphs against eager launches, and both against the CPU, at bucket edges."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

    from graphserve.runtime.device_runner import DeviceRunner

VARIANTS = ("greedy", "sample", "logprobs", "bitmask", "split")
MAX_SEQS = 257  # one more than the largest bucket


def generate(
    device: torch.device, count: int, variant: str, captures: bool, overlap: bool = False
) -> tuple[list[list[int]], DeviceRunner]:
    """Twelve tokens of each of ``count`` requests that begin together, and the runner of their steps."""
    from graphserve.engine.scheduler import SchedulerLimits
    from tests.gpu import step_engines

    core, runner = step_engines.tiny_engine(device, SchedulerLimits(32, 128, 48, True), captures, overlap)
    tokens = step_engines.run_requests(core, [12] * count, [step_engines.VARIANTS[variant]] * count)
    core.close()
    return tokens, runner


def shrinking_batch(device: torch.device, variant: str, captures: bool) -> tuple[list[list[int]], DeviceRunner]:
    """``MAX_SEQS`` requests of which one ends with every step: each number of sequences has one decode step."""
    from graphserve.engine.scheduler import SchedulerLimits
    from tests.gpu import step_engines

    limits = SchedulerLimits(MAX_SEQS, 2048, MAX_SEQS, True)
    core, runner = step_engines.tiny_engine(device, limits, captures, max_model_len=512, num_blocks=3000)
    # The prompts' step gives every request its first token.
    lengths = range(2, MAX_SEQS + 2)
    # The host's part of a split step takes a millisecond a row: the request that lives longest splits all steps alone.
    others = step_engines.VARIANTS["sample" if variant == "split" else variant]
    options = [others] * (MAX_SEQS - 1) + [step_engines.VARIANTS[variant]]
    tokens = step_engines.run_requests(core, lengths, options)
    core.close()
    assert [len(one) for one in tokens] == list(lengths)
    return tokens, runner


@pytest.mark.parametrize("variant", VARIANTS)
def test_captured_steps_give_the_tokens_of_eager_ones_at_every_bucket_edge(variant: str, device: torch.device) -> None:
    captured, runner = shrinking_batch(device, variant, captures=True)
    # One step of all prompts, then one of 257 sequences, 256, ... and 1: all but the first two fit a bucket.
    assert runner.num_variant_steps[variant] == runner.num_variant_steps.total() == 1 + MAX_SEQS
    assert runner.num_eager_steps == 2
    eager, runner = shrinking_batch(device, variant, captures=False)
    assert runner.num_eager_steps == 1 + MAX_SEQS
    assert captured == eager


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [1, 9])
def test_captured_steps_with_prompts_give_the_tokens_of_eager_ones(
    variant: str, count: int, device: torch.device
) -> None:
    captured, runner = generate(device, count, variant, captures=True)
    assert runner.num_eager_steps == 0
    assert runner.num_variant_steps[variant] == runner.num_variant_steps.total()
    eager, runner = generate(device, count, variant, captures=False)
    assert runner.num_eager_steps == runner.num_variant_steps.total()
    assert captured == eager


@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_overlapping_launches_give_the_same_tokens(variant: str, captures: bool, device: torch.device) -> None:
    import torch

    if torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9.0")
    overlapping, _ = generate(device, 9, variant, captures, overlap=True)
    assert overlapping == generate(device, 9, variant, captures)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_steps_give_the_tokens_of_the_cpu(variant: str, device: torch.device) -> None:
    import torch

    captured, _ = generate(device, 8, variant, captures=True)
    assert captured == generate(torch.device("cpu"), 8, variant, captures=False)[0]
