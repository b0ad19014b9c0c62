"""Request bodies: whatever bytes arrive, the answer is a typed request or a 400 that names a field."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphserve.engine.messages import EngineInfo
from graphserve.sampling_params import RequestOutputKind, SamplingParams
from graphserve.server.decoding import (
    UNSUPPORTED_FIELDS,
    UNSUPPORTED_MESSAGE_FIELDS,
    completion_prompts,
    decode_request,
    message_text,
)
from graphserve.server.errors import ApiError
from graphserve.server.protocol import ChatCompletionRequest, ChatMessage, CompletionRequest
from graphserve.server.sampling import sampling_params

INFO = EngineInfo(
    model="m",
    served_model_names=["m"],
    max_model_len=100,
    max_num_seqs=4,
    max_logprobs=5,
    vocab_size=50,
    num_blocks=10,
    block_size=16,
    default_sampling_params={"temperature": 0.7, "top_k": 20},
)
NAMES = [*CompletionRequest.__struct_fields__, *ChatCompletionRequest.__struct_fields__, *UNSUPPORTED_FIELDS]

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
bodies = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), json_values, max_size=6)


def decode(body: Any, kind: Any = CompletionRequest) -> Any:
    return decode_request(msgspec.json.encode(body), kind)


@given(bodies, st.sampled_from([CompletionRequest, ChatCompletionRequest]))
def test_any_json_object_is_decoded_or_refused_with_a_400(body: dict[str, Any], kind: Any) -> None:
    for valid_part in ({}, {"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}):
        try:
            request = decode({**valid_part, **body}, kind)
            if isinstance(request, CompletionRequest):
                completion_prompts(request)
            sampling_params(request, 10, INFO)
        except ApiError as error:
            assert error.status == 400 and error.message


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused_with_a_400(body: bytes) -> None:
    try:
        decode_request(body, CompletionRequest)
    except ApiError as error:
        assert error.status == 400


def test_no_field_is_both_known_and_unsupported() -> None:
    # what one endpoint does not know may still be a field of the other
    assert not set(UNSUPPORTED_FIELDS) & set(CompletionRequest.__struct_fields__)
    assert not set(UNSUPPORTED_FIELDS) & set(ChatCompletionRequest.__struct_fields__)
    assert not set(UNSUPPORTED_MESSAGE_FIELDS) & set(ChatMessage.__struct_fields__)


@pytest.mark.parametrize("name", sorted(UNSUPPORTED_FIELDS))
def test_an_unsupported_field_passes_at_its_neutral_values_only(name: str) -> None:
    for neutral in UNSUPPORTED_FIELDS[name]:
        decode({"prompt": "a", name: neutral})
    with pytest.raises(ApiError) as caught:
        decode({"prompt": "a", name: {"something": ["else"]}})
    assert caught.value.param == name and caught.value.code == "unsupported_field"


@pytest.mark.parametrize(
    ("body", "kind", "param"),
    [
        ({}, CompletionRequest, "prompt"),
        ({}, ChatCompletionRequest, "messages"),
        ({"prompt": "a", "temperature": "hot"}, CompletionRequest, "temperature"),
        ({"prompt": "a", "max_tokens": 1.5}, CompletionRequest, "max_tokens"),
        ({"prompt": "a", "max_tokens": True}, CompletionRequest, "max_tokens"),
        ({"prompt": "a", "logit_bias": {"1": "x"}}, CompletionRequest, "logit_bias[...]"),
        ({"prompt": "a", "stream_options": {"x": 1}}, CompletionRequest, "stream_options.x"),
        ({"prompt": [1, "a"]}, CompletionRequest, "prompt"),
        ({"messages": [{"role": 1}]}, ChatCompletionRequest, "messages[0].role"),
        ({"messages": [], "user": "u"}, ChatCompletionRequest, "messages"),
    ],
)
def test_a_refusal_names_the_field(body: dict[str, Any], kind: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        request = decode(body, kind)
        completion_prompts(request)
    assert caught.value.param == param


def test_the_clients_values_go_over_the_models_defaults() -> None:
    params = sampling_params(decode({"prompt": "a", "temperature": 0.3}), 10, INFO)
    assert params == SamplingParams(temperature=0.3, top_k=20, max_tokens=16, output_kind=RequestOutputKind.DELTA)


@pytest.mark.parametrize(
    ("given_value", "prompt_len", "wanted"), [(None, 10, 16), (None, 95, 5), (None, 99, 1), (90, 10, 90), (1, 99, 1)]
)
def test_max_tokens_of_a_completion_is_bounded_by_the_context(
    given_value: int | None, prompt_len: int, wanted: int
) -> None:
    assert sampling_params(decode({"prompt": "a", "max_tokens": given_value}), prompt_len, INFO).max_tokens == wanted


@pytest.mark.parametrize(("given_value", "prompt_len"), [(None, 100), (None, 101), (91, 10), (0, 10), (-1, 10)])
def test_max_tokens_that_cannot_be_are_refused(given_value: int | None, prompt_len: int) -> None:
    with pytest.raises(ApiError):
        sampling_params(decode({"prompt": "a", "max_tokens": given_value}), prompt_len, INFO)


def test_max_completion_tokens_wins_over_max_tokens_in_a_chat() -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "max_completion_tokens": 7}
    assert sampling_params(decode(body, ChatCompletionRequest), 10, INFO).max_tokens == 7


def test_an_engine_without_a_logprobs_limit_takes_any_number() -> None:
    unlimited = msgspec.structs.replace(INFO, max_logprobs=-1)
    assert sampling_params(decode({"prompt": "a", "logprobs": 40}), 10, unlimited).logprobs == 40
    with pytest.raises(ApiError):
        sampling_params(decode({"prompt": "a", "logprobs": 6}), 10, INFO)


@given(st.lists(st.text(), max_size=5))
def test_text_parts_are_joined_by_newlines(texts: list[str]) -> None:
    assert message_text([{"type": "text", "text": text} for text in texts], 0) == "\n".join(texts)


@pytest.mark.parametrize(
    "part", ["text", {}, {"type": "text"}, {"type": "text", "text": 1}, {"type": "text", "text": "", "x": 1}]
)
def test_a_part_that_is_not_text_is_refused_by_its_place(part: Any) -> None:
    with pytest.raises(ApiError) as caught:
        message_text([{"type": "text", "text": "a"}, part], 3)
    assert caught.value.param is not None and caught.value.param.startswith("messages[3].content[1]")
