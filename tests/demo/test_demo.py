"""The demo checkpoint is a complete Hugging Face folder that transformers reads, and its golden record is its own."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from graphserve.demo import corpus, demo_path, questions, stories

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Who?"},
]


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads((demo_path() / "golden.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_path())


def test_finding_the_demo_folder_imports_nothing_heavy() -> None:
    code = "import sys, graphserve.demo as d; d.demo_path(); print('torch' in sys.modules, 'jinja2' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_the_folder_has_every_file_of_a_checkpoint() -> None:
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names | {"chat_template.jinja", "golden.json", "training.json"} <= {p.name for p in demo_path().iterdir()}


def test_the_model_has_the_promised_shape() -> None:
    config = json.loads((demo_path() / "config.json").read_text())
    assert config["head_dim"] == 64
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["tie_word_embeddings"] is True
    with safe_open(demo_path() / "model.safetensors", framework="pt") as weights:
        names = list(weights.keys())
        assert "lm_head.weight" not in names
        assert {str(weights.get_tensor(name).dtype) for name in names} == {"torch.bfloat16"}
        assert 2_000_000 <= sum(weights.get_tensor(name).numel() for name in names) <= 3_000_000


def test_generation_ends_at_both_end_tokens(tokenizer) -> None:
    ends = json.loads((demo_path() / "generation_config.json").read_text())["eos_token_id"]
    assert ends == tokenizer.convert_tokens_to_ids([corpus.END_OF_TEXT, corpus.TURN_END])


def test_the_tokenizer_returns_every_text_unchanged(tokenizer) -> None:
    for text in ["Once upon a time", " naïve 你好 😀\t x  y\n\n", "12 + 7 = 19", '"Hi," said Tim.\n\nThen he left.']:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_writes_what_the_model_was_trained_on(tokenizer) -> None:
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert rendered == corpus.chat_text([("Hi", "Hello!")]) + corpus.chat_prompt("Who?")


def test_golden_prompts_are_this_tokenizers(golden, tokenizer) -> None:
    for case in golden["cases"]:
        assert tokenizer(case["prompt"])["input_ids"] == case["prompt_token_ids"]
        whole = case["prompt_token_ids"] + case["token_ids"]
        assert tokenizer.decode(whole, skip_special_tokens=True) == case["full_text"]
    for case in golden["chat"]:
        ids = tokenizer(corpus.chat_prompt(case["user"]))["input_ids"]
        assert ids == case["prompt_token_ids"]
        assert tokenizer.decode(case["token_ids"], skip_special_tokens=True) == case["text"]


def test_golden_tokens_are_what_transformers_computes_from_these_weights(golden) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32).eval()
    for case in golden["cases"] + golden["chat"]:
        ids = case["prompt_token_ids"] + case["token_ids"]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        start = len(case["prompt_token_ids"]) - 1
        best = logprobs[start:-1].max(-1)
        assert best.indices.tolist() == case["token_ids"]
        torch.testing.assert_close(best.values, torch.tensor(case["logprobs"]), atol=2e-4, rtol=0)


def test_no_golden_case_hangs_on_rounding(golden) -> None:
    assert min(case["min_margin"] for case in golden["cases"] + golden["chat"]) > 1e-3


def test_every_golden_chat_ends_by_itself(golden) -> None:
    assert {case["finish_reason"] for case in golden["chat"]} == {"stop"}
    assert all(case["token_ids"][-1] in golden["eos"] for case in golden["chat"])


def test_held_out_wordings_and_requests_are_never_trained_on() -> None:
    def bare(text: str) -> str:
        return text.lower().rstrip("?.!")

    rng = random.Random(1)
    held_out = {bare(question) for question, _ in questions.held_out_questions()}
    assert held_out.isdisjoint({bare(questions.draw_question(rng)[0]) for _ in range(4000)})
    assert set(stories.HELD_OUT_REQUESTS).isdisjoint({stories.write_story(rng)[0] for _ in range(4000)})


def test_written_stories_leave_no_slot_or_choice_open() -> None:
    rng = random.Random(2)
    for _ in range(500):
        request, story = stories.write_story(rng)
        assert not set("<>{}|") & set(request + story)


def test_the_same_seed_writes_the_same_documents() -> None:
    def draw(seed: int) -> list[str]:
        source = corpus.documents(["A real story.", "Another one."], random.Random(seed))
        return [next(source) for _ in range(50)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_a_template_with_an_unknown_slot_is_refused() -> None:
    with pytest.raises(KeyError, match="hero"):
        stories.expand(random.Random(0), "{A|The} <hero>", {"name": "Lily"})


def test_the_demo_folder_fits_in_six_megabytes() -> None:
    sizes = {path.name: path.stat().st_size for path in Path(demo_path()).rglob("*") if "__pycache__" not in path.parts}
    assert sum(sizes.values()) <= 6_000_000, sizes
