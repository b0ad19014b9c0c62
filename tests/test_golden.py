"""Tokens, log-probabilities and text that transformers gave in float32, from the compiled engine under every load.

The golden files lie beside the reference checkpoints. Greedy decoding must give the same ids, whatever else is in the
batch, however prompts are chunked, and however often a small pool makes requests start again.
"""

import json
import random

import pytest

from graphserve.config import EngineConfig
from graphserve.engine.llm_engine import LLMEngine
from graphserve.engine.model_executor import ModelExecutor
from graphserve.llm import LLM
from graphserve.runtime.load import load_model
from graphserve.sampling_params import RequestOutputKind, SamplingParams

BASE = ("stories260K", "stories260K-hd64", "stories260K-mistral-swa64", "stories260K-mixtral-exact")
CHAT = ("stories-qwen3-chat", "stories-qwen3-moe")
BATCH = 48
SHORT = 96  # tokens of the default runs, the length of the base models' goldens; the full runs go to the end


@pytest.fixture(scope="module", params=BASE + CHAT)
def golden(request, shared_models):
    """(loaded model, cases, options) of one checkpoint; engines are made over the one loaded model."""
    folder = shared_models / request.param
    options = {"model": str(folder), "dtype": "float32"}
    loaded = load_model(EngineConfig.from_kwargs(**options))
    name = "golden.json" if request.param in BASE else "golden_chat.json"
    content = json.loads((folder / name).read_text())
    yield loaded, content["cases" if request.param in BASE else "base"], options
    loaded.model_runner.close()


def make_engine(golden, **options):
    loaded, _, model_options = golden
    return LLMEngine.from_loaded(EngineConfig.from_kwargs(**model_options, **options), loaded)


def params_for(case, most=None, **more):
    max_tokens = len(case["token_ids"]) if case["finish_reason"] == "length" else len(case["token_ids"]) + 50
    max_tokens = max_tokens if most is None else min(most, max_tokens)
    return SamplingParams(temperature=0, max_tokens=max_tokens, **more)


def run_with_random_arrival(engine, cases, most, seed=0):
    """``BATCH`` requests, the cases in random order and at random steps; finished outputs in the order of requests."""
    rng = random.Random(seed)
    chosen = [cases[i % len(cases)] for i in range(BATCH)]
    rng.shuffle(chosen)
    arrivals = sorted((rng.randrange(24), i) for i in range(BATCH))
    done = {}
    step = 0
    while len(done) < BATCH:
        while arrivals and arrivals[0][0] <= step:
            index = arrivals.pop(0)[1]
            params = params_for(chosen[index], most, output_kind=RequestOutputKind.FINAL_ONLY)
            engine.add_request(str(index), {"prompt_token_ids": chosen[index]["prompt_token_ids"]}, params)
        for output in engine.step():
            done[int(output.request_id)] = output
        step += 1
    assert engine.stats().num_blocks_in_use == 0
    return [(chosen[i], done[i]) for i in range(BATCH)]


def assert_tokens(case, output, most=None):
    got = output.outputs[0]
    assert output.error is None
    assert got.token_ids == case["token_ids"][:most]
    is_cut = most is not None and len(case["token_ids"]) > most
    assert got.finish_reason == ("length" if is_cut else case["finish_reason"])


def test_alone(golden):
    loaded, cases, _ = golden
    engine = make_engine(golden, max_num_seqs=1)
    llm = LLM.from_engine(engine)
    for case in cases:
        params = params_for(case, SHORT, logprobs=5, prompt_logprobs=0)
        (output,) = llm.generate([case["prompt_token_ids"]], params, use_tqdm=False)
        assert_tokens(case, output, SHORT)
        got = output.outputs[0]
        own = [entry[token].logprob for entry, token in zip(got.logprobs, got.token_ids, strict=True)]
        assert own == pytest.approx(case["logprobs"][:SHORT], abs=1e-3)
        for entry, expected in zip(got.logprobs, case.get("top5", []), strict=False):
            assert list(entry)[:5] == [token for token, _ in expected]
            assert [entry[token].logprob for token, _ in expected] == pytest.approx([x for _, x in expected], abs=1e-3)
        if "prompt_logprobs" in case:
            assert output.prompt_logprobs[0] is None
            prompt = [
                e[t].logprob for e, t in zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
            ]
            assert prompt == pytest.approx(case["prompt_logprobs"][1:], abs=1e-3)
        if "full_text" in case:
            assert loaded.tokenizer.decode(case["prompt_token_ids"]) + got.text == case["full_text"]


@pytest.mark.full
def test_alone_to_the_end(golden):
    llm = LLM.from_engine(make_engine(golden, max_num_seqs=1))
    for case in golden[1]:
        (output,) = llm.generate([case["prompt_token_ids"]], params_for(case), use_tqdm=False)
        assert_tokens(case, output)


def test_prompts_as_text_and_chats_as_messages(golden):
    loaded, cases, _ = golden
    llm = LLM.from_engine(make_engine(golden))
    params = [params_for(case, SHORT) for case in cases]
    if "user" in cases[0]:
        outputs = llm.chat([[{"role": "user", "content": c["user"]}] for c in cases], params, use_tqdm=False)
    else:
        outputs = llm.generate([c["prompt"] for c in cases], params, use_tqdm=False)
    for case, output in zip(cases, outputs, strict=True):
        assert output.prompt_token_ids == case["prompt_token_ids"]
        assert_tokens(case, output, SHORT)
        text = output.outputs[0].text
        whole = loaded.tokenizer.decode(case["prompt_token_ids"] + output.outputs[0].token_ids)
        assert loaded.tokenizer.decode(case["prompt_token_ids"]) + text == whole
        if "text" in case:  # decoded without its prompt, so without a leading space
            assert case["text"].startswith(text.removeprefix(" ")) and len(text) > 40


def test_in_a_mixed_batch_with_random_arrival(golden):
    engine = make_engine(golden)
    for case, output in run_with_random_arrival(engine, golden[1], SHORT):
        assert_tokens(case, output, SHORT)


def test_with_prefill_in_chunks_of_sixteen_tokens(golden):
    engine = make_engine(golden, max_num_batched_tokens=16, max_num_seqs=12)
    for case, output in run_with_random_arrival(engine, golden[1], SHORT, seed=1):
        assert_tokens(case, output, SHORT)


def test_with_a_pool_so_small_that_requests_are_preempted(golden):
    loaded, cases, _ = golden
    longest = max(len(c["prompt_token_ids"]) for c in cases) + SHORT
    engine = make_engine(golden, num_gpu_blocks_override=3 * -(-longest // 16), max_num_seqs=16)
    for case, output in run_with_random_arrival(engine, cases, SHORT, seed=2):
        assert_tokens(case, output, SHORT)
    assert engine.stats().num_preemptions_total > 0


# Where a submitted step has run at once there is nothing to gain from a second one; the tokens must be the same.
@pytest.mark.parametrize("golden", BASE[:1], indirect=True)
def test_one_step_behind(golden, monkeypatch):
    monkeypatch.setattr(ModelExecutor, "max_in_flight", 2)
    longest = max(len(c["prompt_token_ids"]) for c in golden[1]) + SHORT
    engine = make_engine(golden, num_gpu_blocks_override=3 * -(-longest // 16), max_num_seqs=16)
    for case, output in run_with_random_arrival(engine, golden[1], SHORT, seed=3):
        assert_tokens(case, output, SHORT)
    assert engine.stats().num_preemptions_total > 0


@pytest.mark.full
def test_one_step_behind_to_the_end_of_every_golden(golden, monkeypatch):
    monkeypatch.setattr(ModelExecutor, "max_in_flight", 2)
    for seed, options in enumerate(({}, {"max_num_batched_tokens": 16, "max_num_seqs": 12})):
        engine = make_engine(golden, **options)
        for case, output in run_with_random_arrival(engine, golden[1], None, seed):
            assert_tokens(case, output)


@pytest.mark.full
def test_to_the_end_of_every_golden_under_every_load(golden):
    loaded, cases, _ = golden
    longest = max(len(c["prompt_token_ids"]) + len(c["token_ids"]) for c in cases) + 50
    loads = (
        {},
        {"enforce_eager": True},
        {"max_num_batched_tokens": 16, "max_num_seqs": 12},
        {"num_gpu_blocks_override": 3 * -(-longest // 16), "max_num_seqs": 16},
    )
    for seed, options in enumerate(loads):
        engine = make_engine(golden, **options)
        for case, output in run_with_random_arrival(engine, cases, None, seed):
            assert_tokens(case, output)
        assert (engine.stats().num_preemptions_total > 0) == ("num_gpu_blocks_override" in options)
