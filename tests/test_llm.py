import gc
import weakref

import numpy as np
import pytest
from engine.fake_engine import EOS, fake_llm_engine, fake_loaded
from engine.fake_model import FULL, FakeRunner, generate_alone

from graphserve import LLM, SamplingParams
from graphserve.errors import ConfigError, EngineDeadError, RequestError

PROMPTS = ["a b c", "d", "e f"]
IDS = [[0, 2, 3, 4], [0, 5], [0, 6, 7]]


def greedy(max_tokens=6, **more):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **more)


def expected(ids, max_tokens=6):
    return generate_alone((FULL,), ids, greedy(max_tokens), eos=[EOS])


@pytest.fixture
def llm():
    with LLM.from_engine(fake_llm_engine()) as llm:
        yield llm


def tokens_of(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(
    "prompts",
    [PROMPTS, IDS, [np.array(ids) for ids in IDS], [{"prompt": p} for p in PROMPTS], tuple(PROMPTS)],
    ids=["texts", "ids", "arrays", "dicts", "tuple"],
)
def test_outputs_come_in_the_order_of_the_prompts(llm, prompts):
    outputs = llm.generate(prompts, [greedy(9), greedy(2), greedy(5)], use_tqdm=False)
    assert tokens_of(outputs) == [expected(ids, n) for ids, n in zip(IDS, (9, 2, 5), strict=True)]
    assert all(output.finished for output in outputs)


@pytest.mark.parametrize("prompt", ["a b c", [0, 2, 3, 4], np.array([0, 2, 3, 4]), {"prompt_token_ids": [0, 2, 3, 4]}])
def test_one_prompt_needs_no_list(llm, prompt):
    assert tokens_of(llm.generate(prompt, greedy(), use_tqdm=False)) == [expected([0, 2, 3, 4])]


def test_no_prompts_no_outputs(llm):
    assert llm.generate([], use_tqdm=False) == []


def test_default_parameters_are_the_models():
    with LLM.from_engine(fake_llm_engine(sampling={"temperature": 0.0, "max_tokens": 3})) as llm:
        assert llm.get_default_sampling_params().max_tokens == 3
        assert tokens_of(llm.generate(PROMPTS, use_tqdm=False)) == [expected(ids, 3) for ids in IDS]


def test_chat_renders_the_template_and_adds_no_second_beginning(llm):
    conversation = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    (output,) = llm.chat(conversation, greedy(), use_tqdm=False)
    assert output.prompt == "u a b a c z"
    assert output.prompt_token_ids == [2 + "abcdefghijklmnopqrstuvwxyz".index(c) for c in "uabacz"]
    assert output.outputs[0].token_ids == expected(output.prompt_token_ids)
    both = llm.chat([conversation, conversation[:1]], greedy(), use_tqdm=False, add_generation_prompt=False)
    assert [o.prompt.split() for o in both] == [list("uabac"), list("uab")]
    (other,) = llm.chat(conversation, greedy(), False, chat_template="{{ x }}", chat_template_kwargs={"x": "q"})
    assert other.prompt == "q"
    with pytest.raises(RequestError, match="messages is empty"):
        llm.chat([], greedy())


def test_a_refused_prompt_leaves_nothing_behind(llm):
    with pytest.raises(RequestError, match="99 is not in the vocabulary"):
        llm.generate(["a", [99]], greedy(), use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()
    with pytest.raises(RequestError, match="2 sampling_params for 1 prompts"):
        llm.generate(["a"], [greedy(), greedy()], use_tqdm=False)


def test_a_request_that_fails_while_it_runs_has_an_error_and_spares_the_others(caplog):
    with LLM.from_engine(fake_llm_engine(eos=[], num_gpu_blocks_override=5)) as llm:
        outputs = llm.generate([[2] * 10, [3]], [greedy(20), greedy(5)], use_tqdm=False)
    assert outputs[0].outputs[0].finish_reason == "error" and "KV blocks" in outputs[0].error
    assert outputs[1].error is None
    assert outputs[1].outputs[0].token_ids == generate_alone((FULL,), [3], greedy(5))
    assert "needs more KV blocks" in caplog.text


def test_an_interrupted_call_leaves_a_usable_llm(llm, monkeypatch):
    step = llm.llm_engine.step

    def interrupted():
        step()
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.llm_engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, greedy(), use_tqdm=False)
    monkeypatch.undo()
    assert llm.llm_engine.stats().num_blocks_in_use == 0
    assert tokens_of(llm.generate(PROMPTS, greedy(), use_tqdm=False)) == [expected(ids) for ids in IDS]


def test_foreign_requests_in_the_engine_are_not_swallowed(llm):
    llm.llm_engine.add_request("mine", [2], greedy())
    with pytest.raises(RequestError, match="from add_request"):
        llm.generate("a", greedy())


def test_close_drops_every_reference_to_the_runner():
    runner = FakeRunner()
    reference = weakref.ref(runner)
    llm = LLM.from_engine(fake_llm_engine(runner))
    llm.generate("a b", greedy(), use_tqdm=False)
    llm.close()
    llm.close()
    assert runner.is_closed
    del runner
    gc.collect()
    assert reference() is None
    with pytest.raises(EngineDeadError, match="this LLM is closed"):
        llm.generate("a")


def test_the_constructor_checks_options_then_loads(monkeypatch):
    seen = []

    def load(config):
        seen.append(config)
        return fake_loaded(FakeRunner())

    monkeypatch.setattr("graphserve.runtime.load.load_model", load)
    with LLM("somewhere", max_num_seqs=4, block_size=4) as llm:
        assert tokens_of(llm.generate("a b c", greedy(), use_tqdm=False)) == [expected([0, 2, 3, 4])]
    assert (seen[0].model, seen[0].max_num_seqs) == ("somewhere", 4)
    with pytest.raises(ConfigError, match="did you mean max_num_seqs"):
        LLM("somewhere", max_num_sequences=4)
    assert len(seen) == 1


def test_without_a_tokenizer_chat_is_refused():
    with (
        LLM.from_engine(fake_llm_engine(skip_tokenizer_init=True)) as llm,
        pytest.raises(ConfigError, match="without skip_tokenizer_init"),
    ):
        llm.chat([{"role": "user", "content": "a"}])
