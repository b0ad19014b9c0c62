"""``POST /v1/completions`` over the echo engine: shapes, fields, and streamed = not streamed."""

from __future__ import annotations

import threading
from typing import Any

import openai
import pytest

PATH = "/v1/completions"


def test_a_text_prompt_is_completed_with_usage_and_finish_reason(server: Any) -> None:
    status, body, headers = server.request("POST", PATH, {"model": "echo", "prompt": "abc", "max_tokens": 5})
    assert status == 200
    assert body["choices"] == [
        {"index": 0, "text": "abcab", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert {key: body["usage"][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
    }
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-") and headers["X-Request-Id"]


def test_max_tokens_is_16_by_default(server: Any) -> None:
    _, body, _ = server.request("POST", PATH, {"prompt": "abc"})
    assert body["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["abab"]),
        ([97, 98], ["abab"]),
        (["ab", "xyz"], ["abab", "xyzx"]),
        ([[97, 98], [120]], ["abab", "xxxx"]),
    ],
)
def test_every_form_of_prompt_is_understood(server: Any, prompt: Any, texts: list[str]) -> None:
    _, body, _ = server.request("POST", PATH, {"prompt": prompt, "max_tokens": 4})
    assert [choice["text"] for choice in body["choices"]] == texts


def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(server: Any) -> None:
    _, body, _ = server.request("POST", PATH, {"prompt": ["ab", "xy"], "n": 2, "max_tokens": 2})
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "ab"),
        (1, "ba"),
        (2, "xy"),
        (3, "yx"),
    ]


def test_a_stream_has_text_then_one_finish_reason_a_choice_then_usage_then_done(server: Any) -> None:
    body = {"prompt": ["abc", "xy"], "max_tokens": 4, "stream_options": {"include_usage": True}}
    *chunks, last, done = server.events(PATH, body)
    assert done == "[DONE]"
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 8
    assert all(chunk["usage"] is None for chunk in chunks)
    for index, text in enumerate(["abca", "xyxy"]):
        mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in mine) == text
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["length"]
        assert mine[-1]["finish_reason"] == "length"


def test_a_stream_without_usage_has_no_usage_key(server: Any) -> None:
    *chunks, _ = server.events(PATH, {"prompt": "abc", "max_tokens": 2})
    assert all("usage" not in chunk for chunk in chunks)


def test_continuous_usage_counts_up_in_every_chunk(server: Any) -> None:
    options = {"continuous_usage_stats": True, "include_usage": True}
    *chunks, _ = server.events(PATH, {"prompt": "abc", "max_tokens": 6, "stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 6


def test_logprobs_have_one_entry_a_token_and_the_wanted_candidates(server: Any) -> None:
    _, body, _ = server.request("POST", PATH, {"prompt": "abc", "max_tokens": 3, "logprobs": 2})
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c"] and logprobs["token_logprobs"] == [-0.5] * 3
    assert logprobs["text_offset"] == [0, 1, 2]
    assert all(len(top) <= 2 for top in logprobs["top_logprobs"]) and logprobs["top_logprobs"][0]["a"] == -0.5


def test_streamed_logprobs_join_to_those_of_the_whole_answer(server: Any) -> None:
    body = {"prompt": "abc", "max_tokens": 5, "logprobs": 1}
    _, whole, _ = server.request("POST", PATH, body)
    *chunks, _ = server.events(PATH, body)
    joined: dict[str, list[Any]] = {}
    for chunk in chunks:
        for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
            joined.setdefault(name, []).extend(values)
    assert joined == whole["choices"][0]["logprobs"]


def test_echo_puts_the_prompt_before_the_completion_and_offsets_go_on(server: Any) -> None:
    _, body, _ = server.request("POST", PATH, {"prompt": "abc", "max_tokens": 2, "echo": True, "logprobs": 0})
    choice = body["choices"][0]
    assert choice["text"] == "abcab"
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -1.0, -0.5, -0.5]


def test_echo_with_no_tokens_scores_the_prompt_and_generates_nothing(server: Any) -> None:
    request = {"prompt": [97, 98, 99], "max_tokens": 0, "echo": True, "logprobs": 1}
    _, body, _ = server.request("POST", PATH, request)
    choice = body["choices"][0]
    assert choice["text"] == "abc" and choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -1.0]
    assert body["usage"]["completion_tokens"] == 0 and body["usage"]["total_tokens"] == 3


def test_a_streamed_echo_equals_the_whole_one(server: Any) -> None:
    body = {"prompt": "abc", "max_tokens": 3, "echo": True}
    _, whole, _ = server.request("POST", PATH, body)
    *chunks, _ = server.events(PATH, body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"] == "abcabc"


def test_a_request_that_the_engine_refuses_is_a_400(server: Any) -> None:
    status, body, _ = server.request("POST", PATH, {"prompt": "<invalid>", "stream": True})
    assert status == 400 and body["error"]["param"] == "prompt"


def test_a_request_that_fails_inside_the_engine_is_a_500_without_the_detail(server: Any) -> None:
    status, body, _ = server.request("POST", PATH, {"prompt": "<fail>", "max_tokens": 9})
    assert status == 500 and body["error"]["type"] == "server_error" and "passwd" not in str(body)


def test_a_stream_that_fails_midway_ends_with_an_error_event_and_done(server: Any) -> None:
    *chunks, error, done = server.events(PATH, {"prompt": "<fail>", "max_tokens": 9})
    assert done == "[DONE]" and error["error"]["code"] == "request_failed" and chunks
    status, _, _ = server.request("POST", PATH, {"prompt": "abc"})
    assert status == 200


def test_the_openai_client_raises_on_the_error_event_of_a_stream(server: Any) -> None:
    with openai.OpenAI(base_url=server.server.url + "/v1", api_key="any", max_retries=0) as client:
        stream = client.completions.create(model="echo", prompt="<fail>", max_tokens=9, stream=True)
        with pytest.raises(openai.APIError, match="engine failed"):
            list(stream)


def test_the_openai_client_retries_what_says_when_to(start_server: Any) -> None:
    with start_server() as draining, openai.OpenAI(base_url=draining.server.url + "/v1", api_key="any") as client:
        draining.server.state.is_draining = True
        timer = threading.Timer(0.5, lambda: setattr(draining.server.state, "is_draining", False))
        timer.start()
        assert client.completions.create(model="echo", prompt="abc", max_tokens=3).choices[0].text == "abc"
        timer.join()


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"prompt": ""}, "prompt", None),
        ({"prompt": []}, "prompt", None),
        ({"prompt": [[]]}, "prompt", None),
        ({"prompt": [1, "a"]}, "prompt", None),
        ({"prompt": [999]}, "prompt", None),
        ({"prompt": [-1]}, "prompt", None),
        ({"prompt": "a" * 5000}, "prompt", "context_length_exceeded"),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"max_tokens": 4096}, "max_tokens", "context_length_exceeded"),
        ({"max_tokens": "5"}, "max_tokens", None),
        ({"temperature": 3}, "temperature", None),
        ({"top_p": 0}, "top_p", None),
        ({"top_k": -2}, "top_k", None),
        ({"n": 0}, "n", None),
        ({"n": 129}, "n", None),
        ({"n": 2, "temperature": 0}, "n", None),
        ({"logprobs": 21}, "logprobs", None),
        ({"stop": [""]}, "stop", None),
        ({"stop": ["a"] * 17}, "stop", None),
        ({"logit_bias": {"x": 1}}, "logit_bias", None),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"no_such_field": 1}, "no_such_field", "unknown_field"),
        ({"best_of": 3}, "best_of", "unsupported_field"),
        ({"best_of": True}, "best_of", "unsupported_field"),
        ({"suffix": "x"}, "suffix", "unsupported_field"),
    ],
)
def test_a_bad_field_is_a_400_that_names_it(server: Any, change: dict[str, Any], param: str, code: str | None) -> None:
    status, body, _ = server.request("POST", PATH, {"prompt": "abc", **change})
    assert status == 400 and body["error"]["param"] == param and body["error"]["code"] == code, body
    assert body["error"]["type"] == "invalid_request_error" and param in body["error"]["message"]


def test_fields_at_their_neutral_value_are_accepted(server: Any) -> None:
    neutral = {"best_of": 1, "suffix": None, "user": "someone", "use_beam_search": False, "response_format": None}
    status, _, _ = server.request("POST", PATH, {"prompt": "abc", **neutral})
    assert status == 200
