import math

import msgspec
import pytest

from graphserve.errors import RequestError
from graphserve.sampling_params import MAX_BAD_WORDS, RequestOutputKind, SamplingParams

DEFAULTS = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": None,
    "stop_token_ids": None,
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "output_kind": RequestOutputKind.CUMULATIVE,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": None,
}


def test_names_and_defaults_are_those_of_vllm():
    assert msgspec.structs.asdict(SamplingParams()) == DEFAULTS


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("n", 0, "integer in [1, 16384]"),
        ("n", 16385, "integer in [1, 16384]"),
        ("n", 1.5, "integer in [1, 16384]"),
        ("n", True, "integer in [1, 16384]"),
        ("temperature", -0.1, "finite number >= 0 and <= 2"),
        ("temperature", 2.1, "finite number >= 0 and <= 2"),
        ("temperature", math.nan, "finite number >= 0 and <= 2"),
        ("temperature", "1", "finite number >= 0 and <= 2"),
        ("top_p", 0.0, "finite number > 0 and <= 1"),
        ("top_p", 1.1, "finite number > 0 and <= 1"),
        ("top_k", -2, "integer >= -1"),
        ("min_p", -0.1, "finite number >= 0 and <= 1"),
        ("presence_penalty", 2.5, "finite number >= -2 and <= 2"),
        ("frequency_penalty", -2.5, "finite number >= -2 and <= 2"),
        ("repetition_penalty", 0.0, "finite number > 0"),
        ("repetition_penalty", math.inf, "finite number > 0"),
        ("seed", 2**63, "integer in [-9223372036854775808, 9223372036854775807]"),
        ("max_tokens", 0, "integer >= 1"),
        ("min_tokens", 17, "integer in [0, 16]"),
        ("logprobs", -2, "integer >= -1"),
        ("prompt_logprobs", "5", "integer >= -1"),
        ("stop", "", "strings that are not empty"),
        ("stop", ["a", ""], "strings that are not empty"),
        ("stop", [1], "a string or a list of strings"),
        ("stop_token_ids", [-1], "list of token ids"),
        ("allowed_token_ids", [], "1 to 1024"),
        ("allowed_token_ids", list(range(1025)), "1 to 1024"),
        ("logit_bias", [1], "mapping from token id"),
        ("logit_bias", {"x": 1.0}, "mapping from token id"),
        ("logit_bias", {1: math.inf}, "finite number"),
        ("bad_words", [""], "strings that are not empty"),
        ("bad_words", ["a"] * (MAX_BAD_WORDS + 1), "at most 128"),
        ("ignore_eos", 1, "True or False"),
        ("output_kind", 7, "RequestOutputKind"),
    ],
)
def test_a_value_out_of_range_is_refused_with_name_and_what_is_allowed(name, value, allowed):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert name in str(caught.value) and allowed in str(caught.value)
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("temprature", "did you mean temperature?"),
        ("zzz", "allowed are n, presence_penalty"),
        ("structured_outputs", "not supported by graphserve yet: leave it out"),
        ("best_of", "set n and choose among the outputs"),
    ],
)
def test_an_unknown_name_is_refused_with_a_remedy(name, message):
    with pytest.raises(RequestError, match="=3") as caught:
        SamplingParams(**{name: 3})
    assert name in str(caught.value) and message in str(caught.value)
    assert caught.value.param == name


def test_a_tiny_temperature_means_greedy_and_switches_the_filters_off():
    params = SamplingParams(temperature=1e-6, top_p=0.5, top_k=3, min_p=0.1)
    assert params.is_greedy and (params.top_p, params.top_k, params.min_p) == (1.0, 0, 0.0)


def test_a_temperature_too_small_to_divide_by_is_raised(caplog):
    assert SamplingParams(temperature=0.001).temperature == 0.01
    assert "raised to 0.01" in caplog.text


def test_greedy_refuses_several_completions():
    with pytest.raises(RequestError, match="n=2 with temperature=0"):
        SamplingParams(temperature=0, n=2)


def test_stop_needs_the_text():
    with pytest.raises(RequestError, match="set detokenize=True or use stop_token_ids"):
        SamplingParams(stop="x", detokenize=False)


def test_special_values_have_one_form():
    params = SamplingParams(top_k=-1, seed=-1, stop="end", logit_bias={"5": 200})
    assert (params.top_k, params.seed, params.stop_strings) == (0, None, ["end"])
    assert params.logit_bias == {5: 100.0}


def test_it_crosses_a_process_boundary_and_is_checked_there():
    params = SamplingParams(stop=["a", "b"], logit_bias={3: -1.0}, output_kind=RequestOutputKind.DELTA, seed=5)
    data = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(data, type=SamplingParams) == params
    with pytest.raises(msgspec.ValidationError, match=r"top_p=3\.0 is not allowed"):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"top_p": 3.0}), type=SamplingParams)
    with pytest.raises(msgspec.ValidationError, match="unknown field `zzz`"):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"zzz": 3}), type=SamplingParams)


def test_clone_checks_the_changes():
    assert SamplingParams(seed=1).clone(seed=2).seed == 2
    with pytest.raises(RequestError, match="top_p=3"):
        SamplingParams().clone(top_p=3)
