"""Whole models on the device: logits of packed requests against eager transformers on the CPU.

fp32: the plan's kernels and its library products compute in fp32 (TF32 is off, see ``conftest.device``), so only the
order of sums and the GPU's approximate exponentials differ. bf16: the truth is fp32 from bf16 weights, and our mean
error may be at most twice that of transformers' own bf16 run, since both round at the same places.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

ARCHITECTURES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "olmo2", "gpt_neox", "mixtral", "qwen3_moe", "gpt_oss",
)  # fmt: skip
FP32_TOLERANCE = 1e-3  # max |ours - truth| / max |truth| of one request
DEMO_MARGIN = 0.25  # two bf16 logits this near are a tie: of size 16 to 32 they are 0.125 apart at least


def packed_logits(name: str, dtype: torch.dtype, device: torch.device, model: Any) -> Any:
    """Runs three requests of a tiny model; returns the run and the logits of every position."""
    from benchmarks.coverage_check import PROMPT_LENS, PackedRun
    from graphserve.runtime.model_runner import ModelRunner
    from tests.compiler.compiled import compiled
    from tests.tiny_models import checkpoint_tensors, text_tokens, tiny_config

    built = compiled(tiny_config(name), dtype=dtype)
    runner = ModelRunner(built.plan, checkpoint_tensors(model), built.constants, device=device)
    run = PackedRun(runner, [text_tokens(length, seed=i) for i, length in enumerate(PROMPT_LENS)])
    logits = run.run()
    runner.close()
    return run, logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fp32_logits_equal_those_of_transformers(name: str, device: torch.device) -> None:
    import torch

    from benchmarks.coverage_check import relative_error
    from tests.tiny_models import hf_logits, tiny_config, tiny_model

    model = tiny_model(tiny_config(name))
    run, ours = packed_logits(name, torch.float32, device, model)
    errors = [relative_error(a, hf_logits(model, tokens)) for a, tokens in zip(ours, run.tokens, strict=True)]
    assert max(errors) <= FP32_TOLERANCE, f"logits differ by {errors} of the largest one"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bf16_logits_are_as_near_the_truth_as_those_of_transformers(name: str, device: torch.device) -> None:
    import copy

    import torch

    from tests.tiny_models import hf_logits, tiny_config, tiny_model

    rounded = tiny_model(tiny_config(name)).bfloat16()
    truth_model = copy.deepcopy(rounded).float()
    run, ours = packed_logits(name, torch.bfloat16, device, rounded)
    our_error = their_error = size = 0.0
    for logits, tokens in zip(ours, run.tokens, strict=True):
        truth = hf_logits(truth_model, tokens)
        our_error += float((logits - truth).abs().sum())
        their_error += float((hf_logits(rounded, tokens) - truth).abs().sum())
        size += float(truth.abs().sum())
    assert our_error <= 2 * their_error + 1e-3 * size, (
        f"mean error {our_error / size:.4f} of the mean logit; transformers in bf16 has {their_error / size:.4f}"
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_launch_of_the_plan_runs_eagerly(name: str, dtype: str, device: torch.device) -> None:
    import torch

    from graphserve.runtime.kv_cache import KVCache
    from graphserve.runtime.triton_backend import target_of
    from graphserve.runtime.triton_plan import lower_to_triton
    from tests.compiler.compiled import compiled
    from tests.tiny_models import tiny_config

    plan = compiled(tiny_config(name), dtype=getattr(torch, dtype)).plan
    cache = KVCache(plan, 8, 16, torch.device("meta"))
    lowered = lower_to_triton(plan, cache, target_of(torch.cuda.get_device_capability(device)))
    assert not lowered.refusals
    assert {launch.kind for launch in lowered.plan.launches} <= {"triton", "library", "view"}


def test_the_demo_model_decodes_the_cpus_tokens_up_to_a_tie(device: torch.device) -> None:
    """Greedy bf16 tokens of the device against the CPU's; the first departure, if any, is between near-equal logits."""
    from transformers import AutoTokenizer

    from benchmarks.coverage_check import PackedRun
    from graphserve.config import EngineConfig
    from graphserve.demo import demo_path
    from graphserve.runtime.load import load_model

    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    prompts = [tokenizer(text)["input_ids"] for text in ("Once upon a time", "The little dog", "Tom and Sue went to")]

    def decode(where: str) -> tuple[list[list[int]], list[torch.Tensor]]:
        config = EngineConfig.from_kwargs(
            model=str(demo_path()), device=where, dtype="bfloat16", max_model_len=128, skip_tokenizer_init=True,
            gpu_memory_utilization=0.1,  # others test on the GPU meanwhile
        )  # fmt: skip
        runner = load_model(config).model_runner
        run = PackedRun(runner, prompts)
        logits = run.run()
        runner.close()
        return run.decoded(), logits

    (on_gpu, _), (on_cpu, cpu_logits) = decode("cuda"), decode("cpu")
    for prompt, a, b, logits in zip(prompts, on_gpu, on_cpu, cpu_logits, strict=True):
        departure = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        if departure is None:
            continue
        row = logits[len(prompt) - 1 + departure]
        margin = float(row[b[departure]] - row[a[departure]])
        assert margin <= DEMO_MARGIN, f"token {departure} is {a[departure]}, the CPU's {b[departure]} leads by {margin}"


def test_the_engine_generates_on_the_device_what_it_generates_on_the_cpu(device: torch.device) -> None:
    """Scheduler, sampler and kernels together, in fp32: the first greedy tokens are equal."""
    from graphserve import LLM, SamplingParams
    from graphserve.demo import demo_path

    def tokens(where: str) -> list[int]:
        llm = LLM(model=str(demo_path()), device=where, dtype="float32", max_model_len=128, num_gpu_blocks_override=64)
        params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
        return list(llm.generate(["Once upon a time"], params, use_tqdm=False)[0].outputs[0].token_ids)

    assert tokens("cuda") == tokens("cpu")
