"""The published ``openai`` package against a running server with a real model."""

from __future__ import annotations

import asyncio
import urllib.request
from typing import Any

import openai
import pytest
from waiting import wait_until

PROMPT = "Once upon a time"
MESSAGES: list[Any] = [{"role": "user", "content": "Tell me a story about Tom."}]


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "graphserve"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_streamed_completion_equals_the_whole_one(client: openai.OpenAI, temperature: float) -> None:
    request: dict[str, Any] = {"model": "demo", "prompt": PROMPT, "max_tokens": 40, "seed": 11}
    request["temperature"] = temperature
    whole = client.completions.create(**request)
    stream = client.completions.create(**request, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text != ""
    assert last.usage == whole.usage and last.choices == []
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason]
    assert reasons == [whole.choices[0].finish_reason]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_streamed_chat_equals_the_whole_one(client: openai.OpenAI, temperature: float) -> None:
    request: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "max_completion_tokens": 40, "seed": 5}
    request["temperature"] = temperature
    whole = client.chat.completions.create(**request)
    stream = client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content != ""
    assert last.usage == whole.usage
    assert whole.usage is not None and whole.usage.total_tokens == (
        whole.usage.prompt_tokens + whole.usage.completion_tokens
    )


def test_the_clients_own_stream_helper_assembles_the_answer(client: openai.OpenAI) -> None:
    # the helper raises unless an answer has ended by itself or by a stop string
    request: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "stop": ["."], "temperature": 0}
    with client.chat.completions.stream(**request) as stream:
        final = stream.get_final_completion()
    whole = client.chat.completions.create(**request)
    assert final.choices[0].message.content == whole.choices[0].message.content


def test_a_seed_repeats_an_answer_and_choices_of_one_request_differ(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "demo", "prompt": PROMPT, "max_tokens": 24, "n": 3, "temperature": 1.0}
    first = [choice.text for choice in client.completions.create(**request, seed=3).choices]
    again = [choice.text for choice in client.completions.create(**request, seed=3).choices]
    assert first == again and len(set(first)) > 1


def test_a_stop_string_ends_the_text_before_it_and_never_leaks_into_a_stream(client: openai.OpenAI) -> None:
    free: dict[str, Any] = {"model": "demo", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**free).choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 4]
    request = {**free, "stop": [stop]}
    whole = client.completions.create(**request).choices[0]
    assert whole.text == text[: text.index(stop)] and whole.finish_reason == "stop"
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)) == whole.text
    kept = client.completions.create(**request, extra_body={"include_stop_str_in_output": True}).choices[0].text
    assert kept == text[: text.index(stop) + len(stop)]


def test_logprobs_of_a_chat_are_those_of_its_tokens(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    choice = client.chat.completions.create(**request, logprobs=True, top_logprobs=3).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    for entry in choice.logprobs.content:
        # greedy: the chosen token is the best of its candidates
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs) <= 0 and len(entry.top_logprobs) == 3
        assert bytes(entry.bytes or []).decode() == entry.token
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content


def test_echo_scores_a_prompt_given_as_token_ids(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "demo", "max_tokens": 0, "echo": True, "logprobs": 1}
    by_text = client.completions.create(prompt=PROMPT, **request)
    (choice,) = by_text.choices
    assert choice.text == PROMPT and choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
    assert by_text.usage is not None and by_text.usage.completion_tokens == 0
    generated = client.completions.create(model="demo", prompt=PROMPT, max_tokens=4, temperature=0, logprobs=0)
    scored = client.completions.create(prompt=PROMPT + generated.choices[0].text, **request).choices[0].logprobs
    assert scored is not None and scored.token_logprobs is not None and generated.choices[0].logprobs is not None
    wanted = generated.choices[0].logprobs.token_logprobs
    assert scored.token_logprobs[-4:] == pytest.approx(wanted, abs=1e-3)


def test_a_batch_of_prompts_gives_each_the_answer_it_has_alone(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "The dog", "Lily and Tom"]
    request: dict[str, Any] = {"model": "demo", "max_tokens": 16, "temperature": 0}
    together = client.completions.create(prompt=prompts, **request)
    alone = [client.completions.create(prompt=prompt, **request).choices[0].text for prompt in prompts]
    assert [choice.text for choice in together.choices] == alone


def test_logit_bias_and_token_limits_are_obeyed(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "demo", "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    usual = client.completions.create(**request, logprobs=0).choices[0]
    forced = client.completions.create(**request, logit_bias={"40": 100}, logprobs=0).choices[0]
    assert forced.logprobs is not None and usual.logprobs is not None
    assert len(set(forced.logprobs.tokens or [])) == 1 and forced.text != usual.text
    long = client.completions.create(**{**request, "max_tokens": 500}, extra_body={"ignore_eos": True})
    assert long.usage is not None and long.usage.completion_tokens == 500


@pytest.mark.parametrize(
    ("change", "error", "code"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "model_not_found"),
        ({"temperature": 9}, openai.BadRequestError, None),
        ({"max_tokens": 10_000}, openai.BadRequestError, "context_length_exceeded"),
        ({"extra_body": {"wrong_field": 1}}, openai.BadRequestError, "unknown_field"),
        ({"suffix": "end"}, openai.BadRequestError, "unsupported_field"),
    ],
)
def test_errors_arrive_as_the_clients_typed_exceptions(
    client: openai.OpenAI, change: dict[str, Any], error: type[openai.APIStatusError], code: str | None
) -> None:
    with pytest.raises(error) as caught:
        client.completions.create(**{"model": "demo", "prompt": PROMPT, **change})
    assert caught.value.code == code and caught.value.type is not None


def test_a_wrong_key_is_an_authentication_error(client: openai.OpenAI) -> None:
    with client.with_options(api_key="wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_many_concurrent_streams_each_get_their_own_answer(served: Any) -> None:
    async def answers(prompts: list[str]) -> list[str]:
        async with openai.AsyncOpenAI(base_url=served[0] + "/v1", api_key="test-key", max_retries=0) as client:

            async def one(prompt: str) -> str:
                stream = await client.completions.create(
                    model="demo", prompt=prompt, max_tokens=12, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))

    prompts = [f"{name} went to the" for name in ("Tom", "Lily", "The dog", "A girl")]
    alone = [asyncio.run(answers([prompt]))[0] for prompt in prompts]
    assert asyncio.run(answers(prompts * 6)) == alone * 6


def test_200_disconnects_leave_no_block_in_use(served: Any) -> None:
    async def storm() -> None:
        async with openai.AsyncOpenAI(base_url=served[0] + "/v1", api_key="test-key", max_retries=0) as client:

            async def leave(index: int) -> None:
                await asyncio.sleep(0.01 * index)
                stream = await client.completions.create(
                    model="demo", prompt=PROMPT, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
                )
                if index % 3:
                    await anext(aiter(stream))
                await stream.close()

            await asyncio.gather(*(asyncio.wait_for(leave(index), 60) for index in range(200)))

    asyncio.run(storm())
    wait_until(lambda: _metric(served[0], "graphserve:kv_cache_blocks_in_use") == 0, 30)
    assert _metric(served[0], "graphserve:num_requests_running") == 0
    assert _metric(served[0], "graphserve:request_aborts_total") > 0


def _metric(url: str, name: str) -> float:
    request = urllib.request.Request(url + "/metrics", headers={"Authorization": "Bearer test-key"})
    with urllib.request.urlopen(request) as response:
        lines = [line for line in response.read().decode().splitlines() if line.startswith((name + "{", name + " "))]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)
