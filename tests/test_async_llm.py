import asyncio

import pytest
from engine.fake_engine import EOS, fake_llm_engine
from engine.fake_model import FULL, FakeRunner, generate_alone

from graphserve import AsyncLLM, SamplingParams
from graphserve.errors import ConfigError, EngineDeadError, RequestError
from graphserve.sampling_params import RequestOutputKind

WAIT_S = 30


def params(max_tokens=6, **more):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **more)


def expected(ids, max_tokens=6):
    return generate_alone((FULL,), ids, params(max_tokens), eos=[EOS])


def run(scenario, **engine_options):
    """Run ``scenario(llm)`` on a fresh AsyncLLM."""

    async def main():
        async with AsyncLLM.from_engine(fake_llm_engine(**engine_options)) as llm:
            return await asyncio.wait_for(scenario(llm), WAIT_S)

    return asyncio.run(main())


async def last_tokens(llm, prompt, sampling_params):
    async for output in llm.generate(prompt, sampling_params):
        last = output
    assert last.finished
    return last.outputs[0].token_ids


async def idle(llm):
    while llm.stats().num_running or llm.stats().num_waiting:
        await asyncio.sleep(0.005)
    return llm.stats()


def test_many_callers_get_what_they_get_alone():
    prompts = [[2 + i % 40, 3, 4 + i % 7] for i in range(24)]

    async def scenario(llm):
        return await asyncio.gather(*(last_tokens(llm, p, params(4 + i % 5)) for i, p in enumerate(prompts)))

    assert run(scenario) == [expected(p, 4 + i % 5) for i, p in enumerate(prompts)]


def test_deltas_add_up_even_for_a_slow_reader():
    async def scenario(llm):
        tokens = []
        async for output in llm.generate("a b", params(20, output_kind=RequestOutputKind.DELTA)):
            tokens += output.outputs[0].token_ids
            await asyncio.sleep(0.002)
        return tokens

    assert run(scenario) == expected([0, 2, 3], 20)


@pytest.mark.parametrize("way", ["aclose", "cancel", "break"])
def test_leaving_early_aborts_the_request(way):
    async def scenario(llm):
        async def read_one():
            stream = llm.generate("a b", params(50, ignore_eos=True))
            async for _ in stream:
                if way == "cancel":
                    await asyncio.sleep(WAIT_S)
                await stream.aclose()
                return

        task = asyncio.create_task(read_one())
        if way == "cancel":
            while not llm.stats().num_steps_total:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await task
        return await idle(llm)

    assert run(scenario, max_model_len=60).num_blocks_in_use == 0


def test_many_disconnects_leave_no_block():
    async def scenario(llm):
        async def leave_after(count):
            stream = llm.generate([2, 3, 4], params(50, ignore_eos=True, output_kind=RequestOutputKind.DELTA))
            async for _ in stream:
                count -= 1
                if count <= 0:
                    break
            await stream.aclose()

        await asyncio.gather(*(leave_after(i % 5) for i in range(200)))
        return await idle(llm)

    stats = run(scenario)
    assert stats.num_blocks_in_use == 0 and stats.num_running == 0


def test_abort_from_outside_ends_the_stream():
    async def scenario(llm):
        with pytest.raises(RequestError, match="request mine was aborted"):
            async for _ in llm.generate("a b", params(50, ignore_eos=True), request_id="mine"):
                llm.abort("mine")
        llm.abort("mine")
        return await idle(llm)

    assert run(scenario).num_blocks_in_use == 0


def test_one_bad_request_fails_alone():
    async def scenario(llm):
        good = asyncio.create_task(last_tokens(llm, "a b", params(20)))
        with pytest.raises(RequestError, match="not in the vocabulary"):
            await last_tokens(llm, [99], params())
        with pytest.raises(RequestError, match="needs 9 KV blocks"):
            await last_tokens(llm, [2] * 35, params())
        with pytest.raises(RequestError, match="needs more KV blocks"):
            await last_tokens(llm, [2] * 20, params(30, ignore_eos=True))
        return await good

    assert run(scenario, num_gpu_blocks_override=9, max_model_len=60) == expected([0, 2, 3], 20)


def test_an_id_in_use_is_refused():
    async def scenario(llm):
        first = llm.generate("a", params(50, ignore_eos=True), request_id="r")
        await anext(first)
        with pytest.raises(RequestError, match="'r' is in use"):
            await anext(llm.generate("a", params(), request_id="r"))
        await first.aclose()

    run(scenario)


def test_a_dead_engine_is_told_to_every_caller_and_frees_its_memory():
    runner = FakeRunner(fail_at_step=4)

    async def scenario(llm):
        results = await asyncio.gather(
            *(last_tokens(llm, [2 + i], params(30, ignore_eos=True)) for i in range(3)), return_exceptions=True
        )
        with pytest.raises(EngineDeadError, match="told to fail here"):
            await last_tokens(llm, "a", params())
        assert not llm.is_running
        return results

    results = run(scenario, runner=runner)
    assert all(isinstance(result, EngineDeadError) for result in results)
    assert runner.is_closed


def test_close_ends_running_streams():
    runner = FakeRunner()

    async def main():
        llm = AsyncLLM.from_engine(fake_llm_engine(runner))
        stream = llm.generate("a", params(60, ignore_eos=True, output_kind=RequestOutputKind.DELTA))
        await anext(stream)
        llm.close()
        with pytest.raises(EngineDeadError, match="closed"):
            while True:
                await asyncio.wait_for(anext(stream), WAIT_S)
        with pytest.raises(EngineDeadError, match="closed"):
            await anext(llm.generate("a"))

    asyncio.run(main())
    assert runner.is_closed


def test_requests_without_a_seed_are_reproducible():
    async def scenario(llm):
        sampled = SamplingParams(max_tokens=10, ignore_eos=True)
        return await asyncio.gather(*(last_tokens(llm, "a b", sampled) for _ in range(4)))

    first = run(scenario)
    assert first == run(scenario) and len({tuple(tokens) for tokens in first}) == 4


class SleepyRunner(FakeRunner):
    """Counts its sleeps; ``sleep_error`` is raised by the next one."""

    def __init__(self, sleep_error=None):
        super().__init__()
        self.levels, self.sleep_error = [], sleep_error

    def sleep(self, level):
        error, self.sleep_error = self.sleep_error, None
        if error is not None:
            raise error
        self.levels.append(level)

    def wake_up(self):
        self.levels.append("awake")


def test_a_sleeping_model_refuses_requests_until_it_wakes_up():
    runner = SleepyRunner()

    async def scenario(llm):
        before = await last_tokens(llm, "a b", params())
        await llm.sleep(level=2)
        await llm.sleep(level=2)
        assert await llm.is_sleeping()
        with pytest.raises(RequestError, match="the engine sleeps"):
            await last_tokens(llm, "a b", params())
        await llm.wake_up()
        assert not await llm.is_sleeping()
        assert await last_tokens(llm, "a b", params()) == before

    run(scenario, runner=runner)
    assert runner.levels == [2, "awake"]


def test_sleep_is_refused_while_a_request_runs_and_the_request_goes_on():
    async def scenario(llm):
        stream = llm.generate("a b", params(40, ignore_eos=True))
        await anext(stream)
        with pytest.raises(RequestError, match="1 requests have not ended"):
            await llm.sleep()
        with pytest.raises(ConfigError, match="level=3"):
            await llm.sleep(level=3)
        async for output in stream:
            last = output
        return len(last.outputs[0].token_ids)

    assert run(scenario, runner=SleepyRunner()) == 40


def test_an_engine_that_cannot_sleep_as_asked_says_so_and_stays_awake():
    async def scenario(llm):
        with pytest.raises(ConfigError, match="cannot be read again"):
            await llm.sleep(level=2)
        assert not await llm.is_sleeping()
        await llm.sleep()

    run(scenario, runner=SleepyRunner(ConfigError("the weights cannot be read again")))


def test_a_sleep_that_breaks_the_engine_ends_it_for_everybody():
    async def scenario(llm):
        results = await asyncio.gather(llm.sleep(), llm.wake_up(), return_exceptions=True)
        with pytest.raises(EngineDeadError, match="out of order"):
            await llm.wake_up()
        return results

    results = run(scenario, runner=SleepyRunner(OSError("out of order")))
    assert all(isinstance(result, EngineDeadError) for result in results)


def test_a_caller_who_no_longer_waits_for_sleep_does_no_harm():
    async def scenario(llm):
        task = asyncio.create_task(llm.sleep())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await llm.wake_up()
        return await last_tokens(llm, "a b", params())

    assert run(scenario, runner=SleepyRunner()) == expected([0, 2, 3])
