import msgspec
import pytest
from engine.fake_engine import EOS, WORDS, fake_llm_engine
from engine.fake_model import FULL, FakeRunner, generate_alone, logits_of

from graphserve.errors import ConfigError, EngineDeadError, RequestError
from graphserve.outputs import RequestOutput
from graphserve.sampling_params import RequestOutputKind, SamplingParams

PROMPT = [0, 5, 6, 7]

pytestmark = pytest.mark.usefixtures("depth")


def greedy(max_tokens=8, **more):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **more)


def run(engine):
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return outputs


def text_of(token_ids):
    return "".join(WORDS[token] for token in token_ids if token > 1)


def never_ending(length, prompt=PROMPT):
    """The first greedy tokens; the test's prompt must not meet the end token among them."""
    tokens = generate_alone((FULL,), prompt, greedy(length))
    assert EOS not in tokens
    return tokens


def test_cumulative_delta_and_final_outputs_tell_the_same():
    expected = never_ending(8)
    by_kind = {}
    for kind in RequestOutputKind:
        engine = fake_llm_engine()
        engine.add_request("r", {"prompt_token_ids": PROMPT}, greedy(output_kind=kind, logprobs=1))
        by_kind[kind] = run(engine)
    cumulative, delta, final = (by_kind[kind] for kind in sorted(RequestOutputKind))
    assert [len(o.outputs[0].token_ids) for o in cumulative] == list(range(1, 9))
    assert [o.outputs[0].token_ids for o in delta] == [[token] for token in expected]
    assert len(final) == 1
    assert cumulative[-1].outputs == final[0].outputs
    assert "".join(o.outputs[0].text for o in delta) == final[0].outputs[0].text == text_of(expected)
    assert [o.outputs[0].logprobs[0] for o in delta] == final[0].outputs[0].logprobs
    assert [o.finished for o in delta] == [False] * 7 + [True]
    assert final[0].outputs[0].finish_reason == "length" and final[0].outputs[0].stop_reason is None


def test_prompts_come_as_text_ids_or_a_dict_of_either():
    engine = fake_llm_engine()
    for name, prompt in {
        "text": "d e f",
        "ids": PROMPT,
        "tuple": tuple(PROMPT),
        "dict of text": {"prompt": "d e f"},
        "dict of ids": {"prompt_token_ids": PROMPT},
        "both": {"prompt": "shown", "prompt_token_ids": PROMPT},
    }.items():
        engine.add_request(name, prompt, greedy(output_kind=RequestOutputKind.FINAL_ONLY))
    outputs = {o.request_id: o for o in run(engine)}
    assert {tuple(o.outputs[0].token_ids) for o in outputs.values()} == {tuple(never_ending(8))}
    assert all(o.prompt_token_ids == PROMPT for o in outputs.values())
    assert outputs["text"].prompt == "d e f" and outputs["ids"].prompt is None and outputs["both"].prompt == "shown"


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "no tokens"),
        ([48], {}, "48 is not in the vocabulary, 0 to 47"),
        ([-1], {}, "-1 is not in the vocabulary"),
        ([1.5], {}, "type list is not allowed"),
        (7, {}, "type int is not allowed"),
        ({"text": "a"}, {}, "unknown prompt field text='a'"),
        ({}, {}, "neither prompt nor prompt_token_ids"),
        ([2] * 64, {}, "64 tokens, max_model_len is 64"),
        ([2], {"logprobs": 21}, r"logprobs=21 is not allowed: it must be in 0\.\.20"),
        ([2], {"prompt_logprobs": -1}, "prompt_logprobs=-1 is not allowed"),
        ([2], {"stop_token_ids": [48]}, "stop_token_ids holds token id 48"),
        ([2], {"allowed_token_ids": [99]}, "allowed_token_ids holds token id 99"),
        ([2], {"logit_bias": {77: 1.0}}, "logit_bias holds token id 77"),
        ([2], {"bad_words": ["a b c d e f g h i j"] * 128}, None),
        ([2], {"bad_words": [" ".join("a" * (i + 2)) for i in range(50)]}, "at most 1024"),
    ],
)
def test_what_this_model_cannot_serve_is_refused_before_anything_runs(prompt, params, message):
    engine = fake_llm_engine()
    if message is None:
        engine.add_request("r", prompt, greedy(**params))
        return
    with pytest.raises(RequestError, match=message):
        engine.add_request("r", prompt, greedy(**params))
    assert not engine.has_unfinished_requests() and engine.stats().num_waiting == 0


def test_without_a_tokenizer_only_ids_go_in_and_only_ids_come_out():
    engine = fake_llm_engine(skip_tokenizer_init=True)
    for prompt, params in (("d e f", {}), (PROMPT, {"stop": "a"}), (PROMPT, {"bad_words": ["a"]})):
        with pytest.raises(RequestError, match="skip_tokenizer_init=True"):
            engine.add_request("r", prompt, greedy(**params))
    engine.add_request("r", PROMPT, greedy(logprobs=0))
    output = run(engine)[-1].outputs[0]
    assert output.token_ids == never_ending(8) and output.text == ""
    assert output.logprobs[0][output.token_ids[0]].decoded_token is None


def test_a_stop_string_ends_the_request_and_frees_its_blocks():
    expected = never_ending(8)
    text = text_of(expected)
    stop = text[2:4]
    assert text.index(stop) == 2
    for includes in (False, True):
        engine = fake_llm_engine()
        engine.add_request("r", PROMPT, greedy(stop=[stop], include_stop_str_in_output=includes))
        output = run(engine)[-1]
        assert output.finished and output.outputs[0].finish_reason == "stop" and output.outputs[0].stop_reason == stop
        assert output.outputs[0].text == text[: 4 if includes else 2]
        assert output.outputs[0].token_ids == expected[:4]
        assert engine.stats().num_blocks_in_use == 0 and engine.stats().num_running == 0


def test_the_end_token_stops_unless_it_is_ignored():
    tokens = never_ending(8)
    end = tokens[3]
    assert tokens.index(end) == 3
    engine = fake_llm_engine(eos=[end])
    engine.add_request("stops", PROMPT, greedy())
    engine.add_request("goes on", PROMPT, greedy(ignore_eos=True))
    outputs = {o.request_id: o.outputs[0] for o in run(engine) if o.finished}
    assert outputs["stops"].token_ids == tokens[:4] and outputs["stops"].finish_reason == "stop"
    assert outputs["stops"].text == text_of(tokens[:3]), "the end token leaves no text"
    assert outputs["goes on"].token_ids == tokens


def test_bad_words_and_allowed_ids_hold():
    tokens = never_ending(8)
    engine = fake_llm_engine()
    pair = f"{WORDS[tokens[1]]} {WORDS[tokens[2]]}"
    engine.add_request("pair", PROMPT, greedy(bad_words=[pair]))
    engine.add_request("word", PROMPT, greedy(bad_words=[WORDS[tokens[0]]]))
    engine.add_request("allowed", PROMPT, greedy(allowed_token_ids=[9, 10]))
    outputs = {o.request_id: o.outputs[0].token_ids for o in run(engine) if o.finished}
    assert outputs["pair"][:2] == tokens[:2] and outputs["pair"][2] != tokens[2]
    assert tokens[0] not in outputs["word"]
    assert set(outputs["allowed"]) <= {9, 10}


def test_penalties_follow_their_definitions_through_the_engine():
    params = greedy(10, repetition_penalty=1.7, presence_penalty=0.6, frequency_penalty=0.4)
    engine = fake_llm_engine()
    engine.add_request("r", PROMPT, params)
    tokens = list(PROMPT)
    for _ in range(10):
        logits = logits_of((FULL,), tokens)
        for token in set(tokens):
            logits[token] = logits[token] / 1.7 if logits[token] > 0 else logits[token] * 1.7
        output = tokens[len(PROMPT) :]
        for token in set(output):
            logits[token] -= 0.4 * output.count(token) + 0.6
        tokens.append(int(logits.argmax()))
        if tokens[-1] == EOS:
            break
    assert run(engine)[-1].outputs[0].token_ids == tokens[len(PROMPT) :]


def test_several_completions_are_joined_and_each_is_what_its_seed_gives():
    params = SamplingParams(n=3, seed=11, max_tokens=6, logprobs=1, prompt_logprobs=1)
    engine = fake_llm_engine()
    engine.add_request("r", PROMPT, params.clone(output_kind=RequestOutputKind.FINAL_ONLY))
    (output,) = run(engine)
    expected = [generate_alone((FULL,), PROMPT, params, seed=11 + i, eos=[EOS]) for i in range(3)]
    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert [c.token_ids for c in output.outputs] == expected and len({tuple(e) for e in expected}) == 3
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(PROMPT)
    for completion in output.outputs:
        own = [entry[token].logprob for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)]
        assert completion.cumulative_logprob == pytest.approx(sum(own))
    assert engine.stats().num_blocks_in_use == 0 and not engine.has_unfinished_requests()


def test_deltas_of_several_completions_carry_only_what_changed():
    engine = fake_llm_engine()
    params = SamplingParams(n=2, seed=3, max_tokens=5, output_kind=RequestOutputKind.DELTA, ignore_eos=True)
    engine.add_request("r", PROMPT, params)
    tokens = {0: [], 1: []}
    outputs = run(engine)
    for output in outputs:
        for completion in output.outputs:
            assert len(completion.token_ids) == 1
            tokens[completion.index] += completion.token_ids
    assert [o.finished for o in outputs] == [False] * 4 + [True]
    assert list(tokens.values()) == [generate_alone((FULL,), PROMPT, params, seed=3 + i) for i in range(2)]


def test_requests_without_a_seed_are_reproducible_by_the_engines_seed():
    def sample(**options):
        engine = fake_llm_engine(**options)
        for i in range(3):
            engine.add_request(str(i), PROMPT, SamplingParams(max_tokens=8, ignore_eos=True))
        return [o.outputs[0].token_ids for o in run(engine) if o.finished]

    first = sample()
    assert first == sample() and first != sample(seed=1)
    assert len({tuple(tokens) for tokens in first}) == 3


def test_logprobs_name_their_tokens_and_ranks():
    engine = fake_llm_engine()
    engine.add_request(
        "r", PROMPT, SamplingParams(max_tokens=4, seed=5, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    )
    output = run(engine)[-1]
    tokens = PROMPT + output.outputs[0].token_ids
    for position, entry in enumerate(output.prompt_logprobs[1:] + output.outputs[0].logprobs, 1):
        raw = logits_of((FULL,), tokens[:position]).log_softmax(-1)
        best = raw.topk(2 if position < len(PROMPT) else 3).indices.tolist()
        assert list(entry) == [tokens[position], *(t for t in best if t != tokens[position])]
        for token, logprob in entry.items():
            assert logprob.logprob == pytest.approx(float(raw[token]), abs=1e-5)
            assert logprob.rank == int((raw > raw[token]).sum()) + 1
            assert logprob.decoded_token == WORDS[token]


def test_the_context_ends_at_max_model_len():
    engine = fake_llm_engine(eos=[], max_model_len=20)
    engine.add_request("r", PROMPT, greedy(None))
    output = run(engine)[-1].outputs[0]
    assert len(output.token_ids) == 16 and output.finish_reason == "length"


def test_defaults_come_from_the_generation_config_and_can_be_overridden():
    engine = fake_llm_engine(
        sampling={"temperature": 0.7, "top_k": 5}, override_generation_config={"top_k": 9, "max_new_tokens": 3}
    )
    params = engine.default_sampling_params()
    assert (params.temperature, params.top_k, params.max_tokens) == (0.7, 9, 3)
    engine.add_request("r", PROMPT)
    assert len(run(engine)[-1].outputs[0].token_ids) == 3
    ended = fake_llm_engine(override_generation_config={"eos_token_id": never_ending(8)[2]})
    ended.add_request("r", PROMPT, greedy())
    assert len(run(ended)[-1].outputs[0].token_ids) == 3
    with pytest.raises(ConfigError, match=r"num_beams=3: allowed are eos_token_id, temperature"):
        fake_llm_engine(override_generation_config={"num_beams": 3})


def test_abort_frees_at_once_and_leaves_the_others():
    engine = fake_llm_engine()
    engine.add_request("gone", PROMPT, SamplingParams(n=2, max_tokens=30, seed=1))
    engine.add_request("stays", PROMPT, greedy())
    engine.step()
    engine.abort("gone", "never there")
    engine.abort_request("gone")
    assert engine.get_num_unfinished_requests() == 1
    assert engine.stats().num_running == 1
    outputs = run(engine)
    assert {o.request_id for o in outputs} == {"stays"}
    assert outputs[-1].outputs[0].token_ids == never_ending(8)
    assert engine.stats().num_blocks_in_use == 0
    engine.add_request("gone", PROMPT, greedy(1))
    assert run(engine)[-1].finished, "the id can be used again"


def test_an_id_in_use_is_refused():
    engine = fake_llm_engine()
    engine.add_request("r", PROMPT, SamplingParams(n=2, seed=1))
    with pytest.raises(RequestError, match="'r' is in use"):
        engine.add_request("r", PROMPT, greedy())
    assert engine.get_num_unfinished_requests() == 1


def test_a_fault_in_one_requests_text_ends_that_request_only(monkeypatch):
    engine = fake_llm_engine()
    engine.add_request("bad", "d e f", greedy())
    engine.add_request("good", "d e f", greedy())
    completion = engine._output_processor._completions["bad"][1]

    def panic(*args):
        raise BaseException("the tokenizer panicked")

    monkeypatch.setattr(completion._detokenizer, "update", panic)
    outputs = {o.request_id: o for o in run(engine) if o.finished}
    assert outputs["bad"].outputs[0].finish_reason == "error" and "panicked" in outputs["bad"].error
    assert outputs["good"].outputs[0].token_ids == never_ending(8) and outputs["good"].error is None
    assert engine.stats().num_blocks_in_use == 0


def test_a_failed_step_kills_the_engine_and_gives_its_memory_back():
    runner = FakeRunner(fail_at_step=3)
    engine = fake_llm_engine(runner)
    engine.add_request("r", PROMPT, greedy())
    with pytest.raises(EngineDeadError, match="told to fail here"):
        run(engine)
    assert runner.is_closed
    for call in (engine.step, engine.stats, lambda: engine.add_request("s", PROMPT, greedy())):
        with pytest.raises(EngineDeadError, match="the engine has stopped"):
            call()
    engine.close()


def test_close_gives_the_runner_back_and_may_be_repeated():
    runner = FakeRunner()
    engine = fake_llm_engine(runner)
    engine.add_request("r", PROMPT, greedy())
    engine.step()
    engine.close()
    engine.close()
    assert runner.is_closed
    with pytest.raises(EngineDeadError, match="the engine is closed"):
        engine.step()


def test_times_and_preemptions_are_reported():
    engine = fake_llm_engine(num_gpu_blocks_override=10)
    for i in range(4):
        engine.add_request(str(i), [i + 2] * 6, greedy(12, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY))
    outputs = run(engine)
    metrics = [o.metrics for o in outputs]
    assert all(m.arrival_time <= m.first_token_time <= m.last_token_time <= m.finished_time for m in metrics)
    assert sum(m.num_preemptions for m in metrics) > 0
    stats = engine.stats()
    assert stats.num_preemptions_total >= 1 and stats.generation_tokens_total == 48 and stats.prompt_tokens_total >= 24


def test_outputs_cross_a_process_boundary():
    engine = fake_llm_engine()
    engine.add_request("r", "d e f", greedy(logprobs=2, prompt_logprobs=1))
    output = run(engine)[-1]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(output), type=RequestOutput) == output
