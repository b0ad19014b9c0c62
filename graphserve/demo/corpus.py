"""The demo model's training text as documents, and the tokenizer trained on it."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from graphserve.demo import questions, stories

END_OF_TEXT, TURN_START, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
VOCAB_SIZE = 2048

# What share of the documents each source gives; the rest are questions and answers.
REAL_STORY, WRITTEN_STORY, WRITTEN_CHAT = 0.06, 0.34, 0.32


def tidy(story: str) -> str:
    """Replace the typographic quotes and dashes of a story by plain ones and trim its lines."""
    plain = story.translate(str.maketrans("“”’‘–—", "\"\"''--"))
    return re.sub(r"\n+", "\n\n", "\n".join(line.strip() for line in plain.strip().splitlines()))


def chat_text(turns: list[tuple[str, str]], system: str | None = None) -> str:
    """Write (question, answer) turns as ``chat_template.jinja`` does."""
    head = f"{TURN_START}system\n{system}{TURN_END}\n" if system else ""
    return head + "".join(
        f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n{answer}{TURN_END}\n"
        for question, answer in turns
    )


def chat_prompt(question: str) -> str:
    """Write one user turn and the start of the assistant's, as ``chat_template.jinja`` does."""
    return chat_text([(question, "")]).removesuffix(f"{TURN_END}\n")


def documents(real: list[str], rng: random.Random) -> Iterator[str]:
    """Yield training documents without end; the real stories come in a new random order each time around."""
    queue: list[str] = []

    def next_real() -> str:
        if not queue:
            queue.extend(rng.sample(real, len(real)))
        return queue.pop()

    while True:
        draw = rng.random()
        if draw < REAL_STORY:
            yield next_real() + END_OF_TEXT
            continue
        if draw < REAL_STORY + WRITTEN_STORY:
            yield stories.write_story(rng)[1] + END_OF_TEXT
            continue
        turns: list[tuple[str, str]] = []
        if draw < REAL_STORY + WRITTEN_STORY + WRITTEN_CHAT:
            turns.append(stories.write_story(rng))
        else:
            turns.extend(questions.draw_question(rng) for _ in range(rng.choice([1, 1, 2, 3])))
        if rng.random() < 0.15:
            turns.insert(rng.randint(0, 1), questions.draw_question(rng))
        yield chat_text(turns, rng.choice(questions.SYSTEM_PROMPTS) if rng.random() < 0.1 else None) + END_OF_TEXT


def train_tokenizer(real: list[str], rng: random.Random) -> Tokenizer:
    """Train a byte-level BPE tokenizer; digits stay single and no text is out of vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+\n*|\s*\n+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    source = documents(real, rng)
    tokenizer.train_from_iterator(
        (next(source) for _ in range(6000)),
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[AddedToken(text, special=True) for text in (END_OF_TEXT, TURN_START, TURN_END, PAD)],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer
