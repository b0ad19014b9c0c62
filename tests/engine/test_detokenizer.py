"""Incremental text against the decoding of the whole sequence, on published tokenizers."""

from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream

from graphserve.engine.detokenizer import REPLACEMENT, Detokenizer, IncrementalDecoder, TokenTexts
from graphserve.models.tokenizer import load_tokenizer
from graphserve.sampling_params import SamplingParams

BYTE_LEVEL = ("tokenizers/qwen2.5", "tokenizers/gpt2", "tokenizers/gpt-neox-20b")
BYTE_FALLBACK = ("models/stories260K", "models/stories-qwen3-chat")
TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    "naïve café — “quotes” … 日本語のテキスト, 한국어, العربية, हिन्दी",
    "emoji 👩‍👩‍👧‍👦🏳️‍🌈 and 🙂🙃",
    "  leading\n\n\ttabs   and spaces  ",
    "def f(x):\n    return {'a': [1, 2.5e-3]}\n",
)


@pytest.fixture(scope="module")
def load(shared_tokenizers, shared_models):
    loaded = {}

    def _load(name):
        if name not in loaded:
            loaded[name] = load_tokenizer(shared_models.parent / name)
        return loaded[name]

    return _load


def detokenize(tokenizer, ids, prompt_ids=(), **options):
    """Deltas one by one, and the whole text at the end."""
    detokenizer = Detokenizer(tokenizer, list(prompt_ids), SamplingParams(**options))
    deltas = []
    for token_id in ids:
        assert detokenizer.update([token_id], False) is None
        deltas.append(detokenizer.next_delta(False))
        assert not deltas[-1].endswith(REPLACEMENT) or deltas[-1].count(REPLACEMENT) > 3, "half a character is shown"
    detokenizer.finish()
    deltas.append(detokenizer.next_delta(True))
    assert "".join(deltas) == detokenizer.text(True)
    return deltas


@pytest.mark.parametrize("name", BYTE_LEVEL + BYTE_FALLBACK)
@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_piece_by_piece(load, name, text):
    tokenizer = load(name)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(detokenize(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", BYTE_LEVEL)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_ids_of_a_byte_level_vocabulary_give_the_full_decoding(load, name, data):
    tokenizer = load(name)
    # Single bytes are among the first ids; they make most of the broken sequences.
    ids = data.draw(
        st.lists(st.one_of(st.integers(0, 255), st.integers(0, tokenizer.vocab_size - 1)), min_size=1, max_size=60)
    )
    skips = data.draw(st.booleans())
    deltas = detokenize(tokenizer, ids, skip_special_tokens=skips)
    assert "".join(deltas) == tokenizer.decode(ids, skip_special_tokens=skips)


@pytest.mark.parametrize("name", BYTE_FALLBACK)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_ids_of_a_byte_fallback_vocabulary_give_the_full_decoding_where_bytes_form_text(load, name, data):
    tokenizer = load(name)
    pieces = data.draw(st.lists(st.one_of(st.integers(0, tokenizer.vocab_size - 1), st.text(max_size=4)), max_size=30))
    ids = []
    for piece in pieces:
        if isinstance(piece, int):
            # <0x00>.. are ids 3..258: alone they are broken, and a broken run takes whole characters with it
            ids += [] if 3 <= piece <= 258 else [piece]
        else:
            ids += [3 + byte for byte in piece.encode("utf-8")]
    assert "".join(detokenize(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_broken_bytes_of_a_fallback_vocabulary_leave_every_other_character(load, data):
    tokenizer = load("models/stories260K")
    ids = data.draw(st.lists(st.one_of(st.integers(3, 258), st.integers(259, 511)), max_size=60))
    text = "".join(detokenize(tokenizer, ids))
    # The library blanks a run of bytes as a whole, once one of them is broken; here what was shown before stays.
    assert Counter(c for c in text if c.isascii()) >= Counter(c for c in tokenizer.decode(ids) if c.isascii())


@pytest.mark.parametrize("name", BYTE_LEVEL + BYTE_FALLBACK)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_text_after_a_prompt_is_what_the_prompt_does_not_show(load, name, data):
    tokenizer = load(name)
    text = data.draw(st.sampled_from(TEXTS))
    ids = tokenizer.encode(text, add_special_tokens=False)
    cut = data.draw(st.integers(1, len(ids)))
    # Whole characters of the prompt. A fallback vocabulary blanks the whole run of bytes when its end is missing, so
    # shorter prompts are looked at too.
    shown = max((tokenizer.decode(ids[:n]).rstrip(REPLACEMENT) for n in range(max(0, cut - 3), cut + 1)), key=len)
    assert shown + "".join(detokenize(tokenizer, ids[cut:], ids[:cut])) == tokenizer.decode(ids)


def test_a_prompt_that_ends_inside_a_character_is_not_echoed(load):
    tokenizer = load("tokenizers/gpt2")
    ids = tokenizer.encode("some words 🧿", add_special_tokens=False)
    assert REPLACEMENT in tokenizer.decode(ids[:-1])
    assert detokenize(tokenizer, ids[-1:], ids[:-1]) == ["🧿", ""]


def test_a_long_run_of_broken_bytes_is_shown_before_its_end_and_exactly(load):
    tokenizer = load("tokenizers/gpt2")
    byte = tokenizer.backend.token_to_id("â")  # the byte E2, first of three
    ids = [byte] * 200 + tokenizer.encode(" fine", add_special_tokens=False)
    decoder = IncrementalDecoder(tokenizer.decode)
    pieces = [decoder.push(token_id) for token_id in ids]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)
    assert sum(bool(piece) for piece in pieces) > 10


def test_it_agrees_with_the_stream_decoder_of_the_library_on_text(load):
    for name in BYTE_LEVEL + BYTE_FALLBACK:
        tokenizer = load(name)
        ids = tokenizer.encode(" ".join(TEXTS), add_special_tokens=False)
        stream, decoder = DecodeStream(skip_special_tokens=True), IncrementalDecoder(tokenizer.decode)
        for token_id in ids:
            assert decoder.push(token_id) == (stream.step(tokenizer.backend, token_id) or "")


@settings(max_examples=200, deadline=None)
@given(
    st.text("abc", min_size=1, max_size=40),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 5),
    st.data(),
)
def test_stop_strings_cut_the_text_wherever_the_tokens_end(load, text, stops, includes, min_tokens, data):
    tokenizer = load("tokenizers/gpt2")
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text)), max_size=8)) | {len(text)})
    pieces = [text[a:b] for a, b in zip([0, *cuts], cuts, strict=False)]
    tokens = [tokenizer.encode(piece, add_special_tokens=False) for piece in pieces]
    ids = [token_id for piece in tokens for token_id in piece]
    assume(tokenizer.decode(ids) == text)
    params = SamplingParams(stop=stops, include_stop_str_in_output=includes, min_tokens=min_tokens, max_tokens=99)
    detokenizer = Detokenizer(tokenizer, [], params)
    seen, stop = "", None
    for index, token_id in enumerate(ids):
        stop = detokenizer.update([token_id], False)
        seen += detokenizer.next_delta(stop is not None)
        if stop is not None:
            break
        known = tokenizer.decode(ids[: index + 1])
        can_begin = min(len(known), len(tokenizer.decode(ids[:min_tokens])))
        begun = [n for s in stops for n in range(1, len(s)) if known[can_begin:].endswith(s[:n])]
        assert seen == known[: len(known) - (0 if includes else max(begun, default=0))], (
            "too much or too little is shown"
        )
    if stop is None:
        detokenizer.finish()
        seen += detokenizer.next_delta(True)

    def first_stop(visible):
        """The text up to the first stop string that begins after the first ``min_tokens`` tokens."""
        begin = len(tokenizer.decode(ids[:min_tokens]))
        found = [(visible.find(s, begin), s) for s in stops if visible.find(s, begin) >= 0]
        return min(found, key=lambda f: (f[0], stops.index(f[1])), default=None)

    for count in range(min_tokens + 1, len(ids) + 1):
        found = first_stop(tokenizer.decode(ids[:count]))
        if found is not None:
            assert stop == found[1]
            assert seen == text[: found[0] + (len(found[1]) if includes else 0)]
            return
    assert stop is None and seen == text


def test_a_stop_token_leaves_no_text_unless_stops_are_included(load):
    tokenizer = load("tokenizers/qwen2.5")
    ids = tokenizer.encode("to be or not", add_special_tokens=False)
    for includes, expected in ((False, "to be or"), (True, "to be or not")):
        detokenizer = Detokenizer(tokenizer, [], SamplingParams(include_stop_str_in_output=includes))
        for token_id in ids[:-1]:
            detokenizer.update([token_id], False)
        detokenizer.update(ids[-1:], True)
        detokenizer.finish()
        assert detokenizer.text(True) == expected


def test_special_tokens_are_shown_on_request(load):
    tokenizer = load("models/stories-qwen3-chat")
    end = tokenizer.backend.token_to_id("<|im_end|>")
    ids = [end, end, *tokenizer.encode("Tim", add_special_tokens=False), end]
    assert "".join(detokenize(tokenizer, ids)) == tokenizer.decode(ids)
    shown = "".join(detokenize(tokenizer, ids, skip_special_tokens=False))
    assert shown == tokenizer.decode(ids, skip_special_tokens=False)
    joined = "".join(detokenize(tokenizer, ids, skip_special_tokens=False, spaces_between_special_tokens=False))
    assert joined.startswith("<|im_end|><|im_end|>") and joined.endswith("Tim<|im_end|>")


def test_single_tokens_keep_their_leading_space(load):
    for name in BYTE_LEVEL + BYTE_FALLBACK:
        tokenizer = load(name)
        texts = TokenTexts(tokenizer, tokenizer.encode("a", add_special_tokens=False))
        ids = tokenizer.encode("a the", add_special_tokens=False)
        assert "".join(texts[token_id] for token_id in ids[1:]) == " the"
    assert texts[tokenizer.eos_token_id] == "<|im_end|>"
