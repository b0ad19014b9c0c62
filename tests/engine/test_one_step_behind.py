"""The engine with two steps in flight must tell callers what the engine with one tells them."""

import random

import pytest
from engine.fake_engine import EOS, WORDS, fake_llm_engine
from engine.fake_model import FULL, VOCAB, FakeRunner, core_request, generate_alone, make_core
from engine.fake_stream import one_step_behind
from hypothesis import given, settings
from hypothesis import strategies as st

from graphserve.engine import model_executor
from graphserve.engine.model_executor import ModelExecutor
from graphserve.errors import EngineDeadError
from graphserve.sampling_params import SamplingParams

PROMPT = [0, 5, 6, 7]


@pytest.fixture
def streams():
    with one_step_behind() as streams:
        yield streams


def greedy(max_tokens=12, **more):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **more)


def random_params(rng):
    """Everything that ends a request early, or makes a token depend on those before it."""

    def some(*choices):
        return rng.choice([None, None, *choices])

    n, max_tokens = rng.choice([1, 1, 1, 2, 3]), rng.randint(1, 24)
    return SamplingParams(
        n=n,
        temperature=rng.choice([0.0, 0.9]) if n == 1 else 0.9,
        top_k=rng.choice([0, 5]),
        seed=rng.randint(0, 99),
        max_tokens=max_tokens,
        min_tokens=rng.choice([0, 0, rng.randint(0, max_tokens)]),
        stop=some(rng.choice(WORDS[2:]), "ab"),
        stop_token_ids=some([rng.randrange(VOCAB), rng.randrange(VOCAB)]),
        ignore_eos=rng.random() < 0.3,
        bad_words=rng.choice([None] * 8 + [[rng.choice(WORDS[2:])], [" ".join(rng.sample(WORDS[2:], 2))]]),
        repetition_penalty=1.3 if rng.random() < 0.1 else 1.0,
        frequency_penalty=0.4 if rng.random() < 0.1 else 0.0,
        logprobs=some(0, 2),
        prompt_logprobs=some(1),
    )


@st.composite
def workloads(draw):
    """Requests by arrival and time of abort, and the options of an engine whose pool holds few of them."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    requests = []
    for _ in range(rng.randint(1, 9)):
        prompt = [rng.randrange(2, VOCAB) for _ in range(rng.choice([1, 3, rng.randint(1, 30)]))]
        requests.append((rng.randint(0, 12), prompt, random_params(rng), some_step(rng)))
    longest = max(len(prompt) for _, prompt, _, _ in requests)
    block_size = rng.choice([1, 4])
    options = {
        "block_size": block_size,
        "max_num_seqs": rng.randint(1, 5),
        "max_num_batched_tokens": rng.choice([5, 11, 64]),
        "num_gpu_blocks_override": -(-(longest + 1) // block_size) + rng.randint(1, 16),
    }
    return requests, options, rng.randint(0, 2**32)


def some_step(rng):
    return rng.randint(0, 25) if rng.random() < 0.25 else None


def serve(requests, options, streams=None):
    """The last cumulative output of each request, and the numbers of those that were aborted before their end."""
    engine = fake_llm_engine(**options)
    if streams is not None:
        streams[-1].watch(engine._core.scheduler)
    last, aborted = {}, set()
    for step in range(3000):
        for index, (arrival, prompt, params, abort_at) in enumerate(requests):
            if arrival == step:
                engine.add_request(str(index), prompt, params)
                last[index] = None
            if abort_at == step and index in last and not (last[index] and last[index].finished):
                engine.abort(str(index))
                aborted.add(index)
        for output in engine.step():
            assert int(output.request_id) not in aborted, "an output after the abort"
            last[int(output.request_id)] = output
        engine._core.scheduler.check()
        if step > 30 and not engine.has_unfinished_requests():
            break
    assert not engine.has_unfinished_requests(), "the engine does not come to an end"
    stats = engine.stats()
    assert stats.num_blocks_in_use == 0 and stats.num_running == stats.num_waiting == 0
    assert not engine._core.scheduler.in_flight
    return last, aborted


@settings(max_examples=60, deadline=None)
@given(workloads())
def test_callers_cannot_tell_one_step_behind_from_step_by_step(workload):
    requests, options, seed = workload
    expected, aborted_then = serve(requests, options)
    with one_step_behind(seed) as streams:
        got, aborted_now = serve(requests, options, streams)
    assert got.keys() == expected.keys()
    for index, output in got.items():
        if index in aborted_now | aborted_then:
            if output is not None and expected[index] is not None:
                for mine, other in zip(output.outputs, expected[index].outputs, strict=True):
                    length = min(len(mine.token_ids), len(other.token_ids))
                    assert mine.token_ids[:length] == other.token_ids[:length]
            continue
        assert output.finished and output.outputs == expected[index].outputs
        assert output.prompt_logprobs == expected[index].prompt_logprobs
        assert output.error == expected[index].error


def run(core, requests=()):
    """Add all and run to the end; tokens by request id."""
    tokens = {request.request_id: [] for request in requests}
    for request in requests:
        core.add_request(request)
    while core.has_unfinished_requests():
        for output in core.step():
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
        core.scheduler.check()
    return tokens


def test_every_step_of_a_steady_decode_is_submitted_before_the_last_one_retires(streams):
    core, _ = make_core()
    tokens = run(core, [core_request(str(i), [i, 9], greedy(10)) for i in range(3)])
    assert tokens == {str(i): generate_alone((FULL,), [i, 9], greedy(10)) for i in range(3)}
    stats = core.stats()
    assert stats.num_steps_total == 10 and streams[0].num_ahead == 9 and stats.num_sync_steps_total == 0


@pytest.mark.parametrize(
    ("more", "bad_words", "waits"),
    [
        ({"repetition_penalty": 1.2}, [], True),
        ({"presence_penalty": 0.5}, [], True),
        ({"frequency_penalty": 0.5}, [], True),
        ({}, [[4, 5]], True),
        ({}, [[4]], False),
        ({"min_tokens": 8, "stop_token_ids": [4]}, [], False),
        ({"logit_bias": {4: 1.0}, "allowed_token_ids": [3, 4, 5]}, [], False),
    ],
)
def test_only_a_row_that_reads_its_own_output_makes_its_step_wait(streams, more, bad_words, waits):
    request = core_request("a", PROMPT, greedy(8, **more))
    request.bad_words_token_ids = bad_words
    core, _ = make_core()
    assert len(run(core, [request])["a"]) == 8
    # The first sample reads the prompt alone; every later one waits for the one before.
    assert core.stats().num_sync_steps_total == (7 if waits else 0)
    assert (streams[0].num_ahead > 0) != waits


def test_what_comes_after_a_late_stop_is_seen_by_nobody(streams):
    expected = generate_alone((FULL,), PROMPT, greedy(20))
    stop = next(t for i, t in enumerate(expected) if expected.index(t) == i and i > 2)
    length = expected.index(stop) + 1
    core, runner = make_core()
    core.add_request(core_request("a", PROMPT, greedy(20, stop_token_ids=[stop], logprobs=0)))
    outputs = []
    while core.has_unfinished_requests():
        outputs += core.step()
    assert [t for o in outputs for t in o.new_token_ids] == expected[:length]
    assert [o.finish_reason for o in outputs] == [None] * (length - 1) + ["stop"]
    stats = core.stats()
    assert stats.generation_tokens_total == length and stats.num_blocks_in_use == 0
    assert stats.num_steps_total == runner.num_steps == length + 1, "the step after the stop had been submitted"


def test_tokens_on_their_way_count_towards_min_tokens(streams):
    expected = generate_alone((FULL,), PROMPT, greedy(20))
    stop = next(t for i, t in enumerate(expected) if expected.index(t) == i and i > 2)
    length = expected.index(stop) + 1
    core, _ = make_core()
    params = greedy(20, stop_token_ids=[stop], min_tokens=length)
    assert run(core, [core_request("a", PROMPT, params)])["a"] == expected[:length]


def test_blocks_on_their_way_back_are_waited_for_before_a_request_is_said_not_to_fit(streams):
    core, _ = make_core(num_blocks=3, block_size=4)
    core.add_request(core_request("gone", [1, 2, 3, 4, 5], greedy(3)))
    core.add_request(core_request("next", [5, 4, 3, 2, 1], greedy(3)))
    core.step()
    core.abort(["gone"])
    assert core.stats().num_blocks_in_use == 2 and core.stats().num_waiting == 1
    assert run(core)["next"] == generate_alone((FULL,), [5, 4, 3, 2, 1], greedy(3))


def test_a_length_limit_is_known_ahead_so_no_step_goes_beyond_it(streams):
    # 4 prompt tokens and 4 of the 5 output tokens enter the cache: exactly the two blocks that there are.
    core, runner = make_core(num_blocks=3, block_size=4)
    assert run(core, [core_request("a", PROMPT, greedy(5))])["a"] == generate_alone((FULL,), PROMPT, greedy(5))
    stats = core.stats()
    assert stats.num_steps_total == runner.num_steps == 5 and stats.num_sync_steps_total == 0


def test_an_aborted_request_keeps_blocks_and_lane_until_its_last_step_retires(streams):
    core, _ = make_core(max_num_seqs=2)
    core.add_request(core_request("gone", PROMPT, greedy(30)))
    core.add_request(core_request("stays", PROMPT, greedy(30)))
    for _ in range(3):
        core.step()
    in_use = core.stats().num_blocks_in_use
    core.abort(["gone"])
    core.add_request(core_request("new", [9, 8], greedy(3)))
    core.scheduler.check()
    assert core.stats().num_blocks_in_use == in_use and core.stats().num_running == 1
    outputs = core.step()  # the new request finds no lane yet: this retires the last step of the aborted one
    assert [o.request_id for o in outputs] == ["stays"]
    assert core.stats().num_running == 1 and core.stats().num_blocks_in_use < in_use
    core.step()
    assert core.stats().num_running == 2
    assert run(core)["new"] == generate_alone((FULL,), [9, 8], greedy(3))


def test_an_id_may_be_used_again_while_the_aborted_request_is_in_flight(streams):
    core, _ = make_core()
    core.add_request(core_request("other", [3], greedy(12)))
    core.add_request(core_request("a", PROMPT, greedy(30)))
    for _ in range(3):
        core.step()
    core.abort(["a"])
    tokens = run(core, [core_request("a", [9, 8], greedy(6))])
    assert tokens["a"] == generate_alone((FULL,), [9, 8], greedy(6))


def test_the_abort_of_the_last_request_waits_for_the_flight_and_leaves_nothing(streams):
    core, runner = make_core()
    core.add_request(core_request("a", PROMPT, greedy(30)))
    core.step()
    assert len(core.scheduler.in_flight) == 1
    core.abort(["a"])
    assert not core.scheduler.in_flight and core.stats().num_blocks_in_use == 0 and runner.num_steps == 1


def test_blocks_are_taken_from_a_request_only_when_nothing_is_in_flight(streams):
    core, _ = make_core(num_blocks=12, block_size=2, max_num_seqs=4)
    prompts = {str(i): [i, i + 1, i + 2] for i in range(4)}
    tokens = run(core, [core_request(key, prompt, greedy(12)) for key, prompt in prompts.items()])
    assert tokens == {key: generate_alone((FULL,), prompt, greedy(12)) for key, prompt in prompts.items()}
    stats = core.stats()
    assert stats.num_sync_steps_total >= stats.num_preemptions_total > 0


def test_close_while_a_step_is_in_flight_gives_everything_back(streams):
    core, runner = make_core()
    core.add_request(core_request("a", PROMPT, greedy()))
    core.step()
    assert core.scheduler.in_flight
    core.close()
    assert runner.is_closed and not core.scheduler.in_flight and core.stats().num_blocks_in_use == 0
    core.scheduler.check()


@pytest.mark.parametrize("seed", range(4))
def test_a_step_that_fails_in_flight_ends_the_engine_and_gives_its_memory_back(seed):
    with one_step_behind(seed):
        runner = FakeRunner(fail_at_step=4)
        engine = fake_llm_engine(runner)
        engine.add_request("r", PROMPT, greedy(20, ignore_eos=True))
        scheduler = engine._core.scheduler
        with pytest.raises(EngineDeadError, match="told to fail here"):
            while engine.has_unfinished_requests():
                engine.step()
    assert runner.is_closed and not scheduler.in_flight and scheduler.kv.pool.num_in_use == 0
    with pytest.raises(EngineDeadError, match="the engine has stopped"):
        engine.step()


def test_an_abort_that_waits_for_a_step_that_fails_says_so(streams):
    engine = fake_llm_engine(FakeRunner(fail_at_step=2))
    engine.add_request("r", PROMPT, greedy(20, ignore_eos=True))
    engine.step()
    engine.step()
    with pytest.raises(EngineDeadError, match="told to fail here"):
        engine.abort("r")
    assert not engine.has_unfinished_requests()
    with pytest.raises(EngineDeadError, match="the engine has stopped"):
        engine.step()


def test_the_models_own_executor_looks_carried_tokens_up(monkeypatch):
    monkeypatch.setattr(ModelExecutor, "max_in_flight", 2)
    core, runner = make_core(max_num_seqs=4)
    assert isinstance(core._executor, model_executor.ModelExecutor)
    prompts = {str(i): [i, i + 1] for i in range(6)}
    tokens = run(core, [core_request(key, prompt, greedy(7), eos=[EOS]) for key, prompt in prompts.items()])
    assert tokens == {key: generate_alone((FULL,), prompt, greedy(7), eos=[EOS]) for key, prompt in prompts.items()}


def test_more_steps_ahead_change_no_token_either(monkeypatch):
    monkeypatch.setattr(ModelExecutor, "max_in_flight", 4)
    core, _ = make_core(num_blocks=14, block_size=2, max_num_seqs=4)
    prompts = {str(i): [i, i + 1, i + 2] for i in range(5)}
    tokens = run(core, [core_request(key, prompt, greedy(12), eos=[EOS]) for key, prompt in prompts.items()])
    assert tokens == {key: generate_alone((FULL,), prompt, greedy(12), eos=[EOS]) for key, prompt in prompts.items()}
