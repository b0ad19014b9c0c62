import random

import pytest
from engine.fake_model import FULL, GROUP_SETS, VOCAB, WINDOWED, core_request, generate_alone, logits_of, make_core
from hypothesis import given, settings
from hypothesis import strategies as st

from graphserve.errors import RequestError
from graphserve.runtime.kv_pool_size import max_blocks_in_group
from graphserve.sampling_params import SamplingParams

pytestmark = pytest.mark.usefixtures("depth")

EOS = (3,)


@st.composite
def workloads(draw):
    """Requests with arrival and abort times, over a pool that is just large enough for the largest of them."""
    groups = draw(st.sampled_from(GROUP_SETS))
    block_size = draw(st.sampled_from([1, 3, 4, 16]))
    budget = draw(st.integers(4, 40))
    rng = random.Random(draw(st.integers(0, 2**32)))
    requests = []
    for _ in range(draw(st.integers(1, 12))):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, rng.randint(1, 40)]))]
        greedy = rng.random() < 0.5
        params = SamplingParams(
            temperature=0.0 if greedy else 0.9,
            top_k=rng.choice([0, 5]),
            top_p=rng.choice([1.0, 0.8]),
            max_tokens=rng.randint(1, 20),
            prompt_logprobs=rng.choice([None, None, 0]),
        )
        abort_at = rng.randint(0, 25) if rng.random() < 0.2 else None
        requests.append((rng.randint(0, 15), prompt, params, rng.randint(0, 99), abort_at))
    longest = max(len(prompt) + params.max_tokens for _, prompt, params, _, _ in requests)
    per_request = sum(max_blocks_in_group(g, longest, budget, block_size) for g in groups)
    extra = draw(st.integers(0, 2 * per_request))
    return groups, block_size, budget, requests, per_request + extra + 1


@settings(max_examples=80, deadline=None)
@given(workloads(), st.booleans(), st.integers(1, 4))
def test_every_request_gets_the_tokens_it_gets_alone_and_leaves_no_block(workload, pad_steps, max_num_seqs):
    groups, block_size, budget, requests, num_blocks = workload
    core, _ = make_core(groups, num_blocks, block_size, max_num_seqs, budget, prompt_rows=3, pad_steps=pad_steps)
    got: dict[int, list[int]] = {}
    num_prompt_logprobs = [0] * len(requests)
    finished: dict[int, str] = {}
    for step in range(5000):
        for index, (arrival, prompt, params, seed, abort_at) in enumerate(requests):
            if arrival == step:
                core.add_request(core_request(str(index), prompt, params, seed, EOS))
                got[index] = []
            if abort_at == step:
                core.abort([str(index)])
        for output in core.step():
            got[int(output.request_id)].extend(output.new_token_ids)
            num_prompt_logprobs[int(output.request_id)] += len(output.prompt_logprobs or ())
            if output.finish_reason is not None:
                finished[int(output.request_id)] = output.finish_reason
        core.scheduler.check()
        if step > 30 and not core.has_unfinished_requests():
            break
    assert not core.has_unfinished_requests(), "the engine does not come to an end"
    assert core.stats().num_blocks_in_use == 0
    for index, (_, prompt, params, seed, abort_at) in enumerate(requests):
        expected = generate_alone(groups, prompt, params, seed, EOS)
        if index in finished:
            assert got[index] == expected
            assert num_prompt_logprobs[index] == (0 if params.prompt_logprobs is None else len(prompt) - 1)
            assert finished[index] == ("stop" if expected[-1] in EOS else "length")
        else:
            assert abort_at is not None
            assert got[index] == expected[: len(got[index])]


def run(core, requests):
    """Add all, run to the end; tokens and outputs by request id."""
    for request in requests:
        core.add_request(request)
    outputs: dict[str, list] = {request.request_id: [] for request in requests}
    while core.has_unfinished_requests():
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
        core.scheduler.check()
    return outputs


def tokens_of(outputs):
    return [token for output in outputs for token in output.new_token_ids]


def greedy(max_tokens=12, **more):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **more)


def test_a_small_pool_preempts_the_latest_and_still_gives_the_right_tokens():
    core, _ = make_core(num_blocks=12, block_size=2, max_num_seqs=4)
    prompts = [[i, i + 1, i + 2] for i in range(4)]
    outputs = run(core, [core_request(str(i), p, greedy()) for i, p in enumerate(prompts)])
    assert core.stats().num_preemptions_total > 0
    for i, prompt in enumerate(prompts):
        assert tokens_of(outputs[str(i)]) == generate_alone((FULL,), prompt, greedy())
    assert outputs["0"][-1].num_preemptions == 0, "the one that came first is never preempted"


def test_windowed_groups_hold_only_the_blocks_that_can_be_seen():
    core, _ = make_core((WINDOWED,), num_blocks=6, block_size=4, max_num_batched_tokens=8)
    prompt = list(range(40))
    outputs = run(core, [core_request("long", prompt, greedy(20))])
    assert tokens_of(outputs["long"]) == generate_alone((WINDOWED,), prompt, greedy(20))


def test_a_prompt_that_can_never_fit_is_refused_and_others_go_on():
    core, _ = make_core(num_blocks=5, block_size=4)
    core.add_request(core_request("fits", [1, 2], greedy(4)))
    with pytest.raises(RequestError, match=r"17 tokens needs 5 KV blocks .* the pool has 4"):
        core.add_request(core_request("long", list(range(17)), greedy(4)))
    collected = []
    while core.has_unfinished_requests():
        collected += core.step()
    assert tokens_of(collected) == generate_alone((FULL,), [1, 2], greedy(4))


def test_a_request_that_outgrows_the_pool_fails_alone():
    core, _ = make_core(num_blocks=5, block_size=4)
    outputs = run(core, [core_request("grows", list(range(10)), greedy(30)), core_request("small", [7], greedy(5))])
    last = outputs["grows"][-1]
    assert last.finish_reason == "error" and "17 tokens" in last.error and "16" not in last.request_id
    assert tokens_of(outputs["grows"]) == generate_alone((FULL,), list(range(10)), greedy(7))
    assert tokens_of(outputs["small"]) == generate_alone((FULL,), [7], greedy(5))
    assert core.stats().num_blocks_in_use == 0


def test_a_row_of_nan_ends_its_request_only():
    prompts = {"a": [1, 2], "b": [9, 9], "c": [4]}
    free_of_nan = [generate_alone((FULL,), p, greedy(8)) for p in prompts.values()]
    spoiler = next(t for t in range(VOCAB) if t not in free_of_nan[0] + free_of_nan[2] + [1, 2, 4])
    prompts["b"] = [5, spoiler]
    core, _ = make_core(nan_after=spoiler)
    outputs = run(core, [core_request(k, p, greedy(8)) for k, p in prompts.items()])
    assert outputs["b"][-1].finish_reason == "error" and "NaN" in outputs["b"][-1].error
    assert tokens_of(outputs["a"]) == free_of_nan[0]
    assert tokens_of(outputs["c"]) == free_of_nan[2]


def test_decode_steps_are_padded_to_the_row_buckets():
    core, runner = make_core(max_num_seqs=8)
    run(core, [core_request(str(i), [i], greedy(4)) for i in range(3)])
    assert runner.steps[1:] == [(4, 4, 4)] * 3
    eager, runner = make_core(max_num_seqs=8, pad_steps=False)
    run(eager, [core_request(str(i), [i], greedy(4)) for i in range(3)])
    assert runner.steps[1:] == [(3, 3, 3)] * 3


def test_prefills_share_the_token_budget_with_decodes_first():
    core, runner = make_core(max_num_batched_tokens=8, max_num_seqs=4, pad_steps=False)
    core.add_request(core_request("first", [1], greedy(10)))
    core.step()
    core.add_request(core_request("long", list(range(20)), greedy(2)))
    core.add_request(core_request("last", [2, 3], greedy(2)))
    core.step()
    schedule = {r.request_id: r.num_scheduled_tokens for r in core.scheduler.running}
    assert schedule == {"first": 2, "long": 7}
    run(core, [])
    assert runner.steps[1] == (8, 1, 2)


def test_without_chunked_prefill_a_prompt_runs_in_one_step():
    core, runner = make_core(max_num_batched_tokens=16, enable_chunked_prefill=False, pad_steps=False)
    outputs = run(core, [core_request("a", list(range(10)), greedy(3)), core_request("b", list(range(9)), greedy(3))])
    assert [sizes[0] for sizes in runner.steps][:2] == [10, 10]
    assert tokens_of(outputs["b"]) == generate_alone((FULL,), list(range(9)), greedy(3))


@pytest.mark.parametrize("budget", [3, 8, 64])
@pytest.mark.parametrize("num_blocks", [14, 64])
def test_prompt_logprobs_do_not_depend_on_chunks_or_preemption(budget, num_blocks):
    prompts = {"a": list(range(5, 25)), "b": [4, 4, 4, 8, 1, 2, 3, 4]}
    core, _ = make_core(
        num_blocks=num_blocks, block_size=4, max_num_batched_tokens=budget, max_num_seqs=2, prompt_rows=5
    )
    params = greedy(20, prompt_logprobs=2, logprobs=1)
    outputs = run(core, [core_request(k, p, params) for k, p in prompts.items()])
    assert (core.stats().num_preemptions_total > 0) == (num_blocks == 14)
    for key, prompt in prompts.items():
        entries = [e for output in outputs[key] for e in output.prompt_logprobs or ()]
        assert len(entries) == len(prompt) - 1
        for position, entry in enumerate(entries, 1):
            expected = logits_of((FULL,), prompt[:position]).log_softmax(-1)
            assert entry.token_ids[0] == prompt[position]
            assert entry.logprobs[0] == pytest.approx(float(expected[prompt[position]]), abs=1e-6)
            assert entry.token_ids[1:] == expected.topk(2).indices.tolist()
            assert entry.rank == int((expected > expected[prompt[position]]).sum()) + 1
        sampled = [e for output in outputs[key] for e in output.logprobs or ()]
        assert [e.token_ids[0] for e in sampled] == tokens_of(outputs[key])
        assert all(e.rank == 1 and e.token_ids[1] == e.token_ids[0] for e in sampled), "greedy takes the most likely"


def test_stop_ids_end_with_their_reason_and_end_ids_without():
    expected = generate_alone((FULL,), [1, 2], greedy(30))
    stop_at = next(i for i, t in enumerate(expected) if expected.index(t) == i and i > 2)
    core, _ = make_core(num_blocks=200)
    outputs = run(
        core,
        [
            core_request("stop", [1, 2], greedy(30, stop_token_ids=[expected[stop_at]])),
            core_request("eos", [1, 2], greedy(30), eos=[expected[stop_at]]),
        ],
    )
    for name, reason in (("stop", expected[stop_at]), ("eos", None)):
        assert tokens_of(outputs[name]) == expected[: stop_at + 1]
        assert outputs[name][-1].finish_reason == "stop" and outputs[name][-1].stop_reason == reason


def test_min_tokens_suppresses_every_end():
    alone = generate_alone((FULL,), [1, 2], greedy(1))
    core, _ = make_core(num_blocks=200)
    params = greedy(30, min_tokens=6, stop_token_ids=[alone[0]])
    outputs = tokens_of(run(core, [core_request("a", [1, 2], params)])["a"])
    assert alone[0] not in outputs[:5] and len(outputs) >= 6


def test_an_id_in_use_is_refused():
    core, _ = make_core()
    core.add_request(core_request("a", [1], greedy()))
    with pytest.raises(RequestError, match="'a' is in use"):
        core.add_request(core_request("a", [1], greedy()))


def test_close_gives_back_blocks_and_the_runner():
    core, runner = make_core()
    core.add_request(core_request("a", [1, 2, 3], greedy()))
    core.step()
    core.close()
    assert runner.is_closed and core.stats().num_blocks_in_use == 0 and not core.has_unfinished_requests()


def test_prompt_logprobs_already_given_are_not_given_again_after_a_preemption():
    core, _ = make_core(num_blocks=13, block_size=2, max_num_seqs=2, prompt_rows=3)
    prompt = list(range(20))
    requests = [core_request("early", [1, 2], greedy(14)), core_request("late", prompt, greedy(2, prompt_logprobs=0))]
    outputs = run(core, requests)
    assert outputs["late"][-1].num_preemptions == 1
    assert outputs["late"][0].prompt_logprobs is not None and not outputs["late"][0].new_token_ids
    entries = [e.token_ids for output in outputs["late"] for e in output.prompt_logprobs or ()]
    assert entries == [[token] for token in prompt[1:]]
    assert tokens_of(outputs["late"]) == generate_alone((FULL,), prompt, greedy(2))


def test_a_decode_chosen_for_a_step_leaves_it_when_an_earlier_prefill_takes_its_blocks():
    core, _ = make_core(num_blocks=13, block_size=2, max_num_seqs=2, prompt_rows=3)
    prompt = list(range(20))
    requests = [core_request("early", prompt, greedy(4, prompt_logprobs=0)), core_request("late", [1, 2], greedy(14))]
    outputs = run(core, requests)
    assert outputs["late"][-1].num_preemptions == 1 and outputs["early"][-1].num_preemptions == 0
    assert tokens_of(outputs["early"]) == generate_alone((FULL,), prompt, greedy(4))
    assert tokens_of(outputs["late"]) == generate_alone((FULL,), [1, 2], greedy(14))
