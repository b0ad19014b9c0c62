"""Measured choices on the device: they change how a step runs, not what it answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

COUNTS = (1, 2, 5)


def test_every_choice_gives_the_tokens_of_the_default(device: torch.device) -> None:
    from graphserve.engine.measure_choices import moves
    from graphserve.engine.scheduler import SchedulerLimits
    from graphserve.runtime.choices import DEFAULT, MeasuredChoices
    from tests.gpu import step_engines

    core, runner = step_engines.tiny_engine(device, SchedulerLimits(8, 128, 16, True), captures=True)
    expected = {n: step_engines.run_requests(core, [12] * n, [{"temperature": 0.0}] * n) for n in COUNTS}
    num_graphs = runner.num_graphs
    assert num_graphs > 0
    choices = [move(DEFAULT) for move in moves(runner.plan, device, num_seqs=2)]
    assert len(choices) > 4
    for choice in choices:
        runner.use_choices(MeasuredChoices(dict.fromkeys((1, 2, 4, 8), choice)))
        assert runner.num_graphs == 0
        for n in COUNTS:
            tokens = step_engines.run_requests(core, [12] * n, [{"temperature": 0.0}] * n)
            assert tokens == expected[n], choice
        assert runner.num_graphs == num_graphs
    core.close()


def test_warmup_measures_the_device_and_a_start_takes_what_it_found(
    device: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from graphserve.cli.main import main
    from graphserve.llm import LLM
    from graphserve.sampling_params import SamplingParams

    options = ["--target", "cuda:{}{}".format(*torch.cuda.get_device_capability(device)), "--max-num-seqs", "4"]
    assert main(["warmup", "demo", "--measure", *options, "--output", str(tmp_path)]) == 0
    assert f"measured choices for {torch.cuda.get_device_name(device)}" in str(
        [p.read_text() for p in tmp_path.glob("choices/*/manifest.json")]
    )
    capsys.readouterr()
    params = SamplingParams(temperature=0, max_tokens=8)
    with LLM(compile_cache=str(tmp_path), strict_compile_cache=True, max_num_seqs=4) as llm:
        warm = llm.generate(["Once upon a time"], params, use_tqdm=False)
    assert len(warm[0].outputs[0].token_ids) == 8
