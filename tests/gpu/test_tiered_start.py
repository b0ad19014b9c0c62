"""A tiered start on the device: plain torch answers while kernels are compiled, and no token changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "logprobs": {"temperature": 0.0, "logprobs": 2},
    "sample": {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_take_over_in_the_middle_of_a_text_and_change_no_token(
    variant: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    from graphserve.config import EngineConfig
    from graphserve.engine.llm_engine import LLMEngine
    from graphserve.runtime import step_lowering
    from graphserve.sampling_params import SamplingParams

    may_build = threading.Event()
    compile_in_processes = step_lowering.compile_in_processes

    def held_up(*args: Any, **options: Any) -> None:
        assert may_build.wait(120)
        compile_in_processes(*args, **options)

    monkeypatch.setattr(step_lowering, "compile_in_processes", held_up)
    (tmp_path / "store").mkdir()
    options = {"dtype": "float32", "max_num_seqs": 4, "num_gpu_blocks_override": 64, "device": "cuda"}

    def generate(start: str) -> dict[str, list[int]]:
        engine = LLMEngine.from_config(
            EngineConfig.from_kwargs(compile_cache=str(tmp_path / "store"), start=start, **options)
        )
        params = SamplingParams(max_tokens=48, ignore_eos=True, **VARIANTS[variant])
        for number, prompt in enumerate(["Once upon a time", "One day, a small bird", "The"]):
            engine.add_request(str(number), prompt, params)
        tokens: dict[str, list[int]] = {}
        steps = 0
        runner = engine._core._executor._runner
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens[output.request_id] = list(output.outputs[0].token_ids)
            steps += 1
            if start == "tiered" and steps == 12:
                assert not runner.can_record and runner.num_graphs == 0
                background = runner._programs._lowering._background
                may_build.set()
                background.wait()
                assert background.error is None
        assert runner.can_record and runner.num_graphs > 0
        engine.close()
        return tokens

    tiered = generate("tiered")
    assert all(len(tokens) == 48 for tokens in tiered.values())
    assert generate("full") == tiered
