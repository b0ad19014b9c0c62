"""``POST /v1/chat/completions`` over the echo engine: template, shapes, chunk order, refusals."""

from __future__ import annotations

from typing import Any

import pytest

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]


def test_an_answer_has_openais_shape(server: Any) -> None:
    status, body, _ = server.request("POST", PATH, {"model": "echo", "messages": HELLO, "max_tokens": 5})
    assert status == 200 and body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "<user", "refusal": None}
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert body["usage"]["prompt_tokens"] == len("<user>hi\n<a>")


def test_the_template_gets_its_kwargs_and_the_generation_prompt_flag(server: Any) -> None:
    request = {
        "messages": [{"role": "system", "content": "s"}, *HELLO],
        "chat_template_kwargs": {"shout": True},
        "add_generation_prompt": False,
        "max_completion_tokens": len("<system>s\n<user>hi\n!"),
    }
    _, body, _ = server.request("POST", PATH, request)
    assert body["choices"][0]["message"]["content"] == "<system>s\n<user>hi\n!"


def test_text_parts_are_joined(server: Any) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    request = {"messages": [{"role": "user", "content": parts}], "max_tokens": len("<user>h\ni")}
    _, body, _ = server.request("POST", PATH, request)
    assert body["choices"][0]["message"]["content"] == "<user>h\ni"


def test_chunks_come_in_openais_order(server: Any) -> None:
    body = {"messages": HELLO, "max_tokens": 4, "n": 2, "stream_options": {"include_usage": True}}
    *chunks, usage, done = server.events(PATH, body)
    assert done == "[DONE]" and usage["choices"] == [] and usage["usage"]["completion_tokens"] == 8
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
    for index, text in enumerate(["<use", "user"]):
        mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in choice["delta"] for choice in mine[1:])
        assert "".join(choice["delta"].get("content", "") for choice in mine) == text
        assert mine[-1]["delta"] == {} and mine[-1]["finish_reason"] == "length"
        assert [choice["finish_reason"] for choice in mine[:-1]] == [None] * (len(mine) - 1)


def test_streamed_logprobs_join_to_those_of_the_whole_answer(server: Any) -> None:
    body = {"messages": HELLO, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    _, whole, _ = server.request("POST", PATH, body)
    *chunks, _ = server.events(PATH, body)
    joined = [
        entry
        for chunk in chunks
        for choice in chunk["choices"]
        for entry in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert joined == whole["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in joined] == list("<use")
    assert joined[0]["bytes"] == [ord("<")] and len(joined[0]["top_logprobs"]) == 2


def test_an_answer_fills_the_context_by_default(start_server: Any) -> None:
    with start_server(engine={"max_model_len": 40}) as small:
        _, body, _ = small.request("POST", PATH, {"messages": HELLO})
        assert body["usage"]["total_tokens"] == 40


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "a", "colour": 1}]}, "messages[0].colour"),
        ({"messages": [{"role": "alien", "content": "a"}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 5000}, "max_completion_tokens"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"a": {"nested": 1}}}, "chat_template_kwargs[...]"),
    ],
)
def test_a_bad_field_is_a_400_that_names_it(server: Any, change: dict[str, Any], param: str) -> None:
    status, body, _ = server.request("POST", PATH, {"messages": HELLO, **change})
    assert status == 400 and body["error"]["param"] == param, body


def test_messages_as_clients_send_answers_back_are_accepted(server: Any) -> None:
    answer = {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None, "annotations": []}
    status, _, _ = server.request("POST", PATH, {"messages": [*HELLO, answer, *HELLO], "tools": [], "max_tokens": 2})
    assert status == 200
