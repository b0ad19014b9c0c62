"""Token ids to text, one token at a time.

The text that is shown never ends in half a character, nor (while the request runs) in the beginning of a stop string.
``tokenizers.decoders.DecodeStream`` does a similar job but raises on token sequences whose decoding is not monotonic,
echoes the prompt if it ends inside a character, and cannot be flushed; the two short decodes a token here cost 0.8 us
more (1.5 us in all on a 151k vocabulary, one core of a Xeon).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from graphserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from graphserve.models.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no character (yet)
MIN_CONTEXT_TOKENS = 4
MAX_CONTEXT_TOKENS = 24
MAX_CHARACTER_BYTES = 4
MAX_PENDING_TOKENS = 16  # far more than a character's bytes: these will never be one


class IncrementalDecoder:
    """Decodes a sequence as it grows.

    Invariant: the texts returned by :meth:`push` and :meth:`flush`, joined, equal the decoding of the whole sequence
    (after the context), if decoding is monotonic at complete characters. Byte-fallback vocabularies break that when
    bytes that formed a character are followed by bytes that form none: then the character, already shown, stays.

    Args:
        decode: full decoding of a list of ids.
        context_ids: ids before the first one pushed; they decide, for example, whether its leading space is kept.
    """

    def __init__(self, decode: Callable[[list[int]], str], context_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        # The window: ids shown last (they give the next ones their context), then ids not shown yet.
        self._window = list(context_ids[-MAX_CONTEXT_TOKENS:])
        self._num_shown = len(self._window)
        self._shown_text = decode(self._window)
        self._begin(context_ids)

    def push(self, token_id: int) -> str:
        """Add one id; the text that has become certain, often empty or more than one character."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT):
            return self._give_up_on_old_bytes() if len(self._window) - self._num_shown >= MAX_PENDING_TOKENS else ""
        return self._show(text)

    def flush(self) -> str:
        """The text still held back, at the end of the sequence; bytes that form no character appear as U+FFFD."""
        return self._show(self._decode(self._window))

    def _show(self, text: str) -> str:
        new_ids = self._window[self._num_shown :]
        if not new_ids:
            return ""
        if text.startswith(self._shown_text):
            new_text = text[len(self._shown_text) :]
        else:  # earlier bytes changed their meaning; what is shown cannot be taken back
            new_text = self._decode(new_ids)
        if not new_text:
            return ""
        self._window = new_ids
        self._num_shown = len(new_ids)
        self._shown_text = self._decode(new_ids)
        return new_text

    def _begin(self, context_ids: Sequence[int]) -> None:
        """Shorten the window to the fewest ids that leave visible text and begin and end with whole characters.

        A character that the context begins and the output completes counts as output. The ids that begin it stay
        together in the window; what else they show (a space before it) is the context's.
        """
        most = min(MAX_CONTEXT_TOKENS, len(context_ids))
        for count in range(min(MIN_CONTEXT_TOKENS, most), most + 1):
            window = list(context_ids[len(context_ids) - count :])
            for num_shown in range(count, max(-1, count - MAX_CHARACTER_BYTES), -1):
                text = self._decode(window[:num_shown])
                is_whole = not text.startswith(REPLACEMENT) and not text.endswith(REPLACEMENT)
                if is_whole and (text or count == most):
                    visible = self._decode(window).rstrip(REPLACEMENT)
                    self._window, self._num_shown = window, num_shown
                    self._shown_text = visible if visible.startswith(text) else text
                    return

    def _give_up_on_old_bytes(self) -> str:
        """Show the older part of a long run of broken bytes, cut where the cut does not change the decoding."""
        text = self._decode(self._window)
        for num_kept in range(MAX_CHARACTER_BYTES, len(self._window) - self._num_shown):
            old, kept = self._window[:-num_kept], self._window[-num_kept:]
            old_text = self._decode(old)
            if old_text + self._decode(kept) == text and old_text.startswith(self._shown_text):
                new_text = old_text[len(self._shown_text) :]
                self._window, self._num_shown, self._shown_text = kept, 0, ""
                return new_text
        return ""


class Detokenizer:
    """Text of one completion, with stop strings.

    Args:
        tokenizer: decodes ids.
        prompt_token_ids: the prompt, for context.
        params: ``stop``, ``include_stop_str_in_output``, ``skip_special_tokens``, ``spaces_between_special_tokens`` and
            ``min_tokens`` are read.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        skips = params.skip_special_tokens
        self._skipped_ids = frozenset(tokenizer.all_special_ids if skips else ())
        self._joined_tokens: dict[int, str] = {}
        if not skips and not params.spaces_between_special_tokens:
            added = tokenizer.backend.get_added_tokens_decoder()
            self._joined_tokens = {token_id: token.content for token_id, token in added.items()}
        self._was_joined_token = False
        context = prompt_token_ids[-MAX_CONTEXT_TOKENS:]
        self._decoder = IncrementalDecoder(lambda ids: tokenizer.decode(ids, skip_special_tokens=skips), context)
        self._stops = params.stop_strings
        self._includes_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._text = ""
        self._num_given = 0  # characters handed out as deltas
        self._num_searched = 0  # characters in which no stop string can begin any more

    def update(self, token_ids: Iterable[int], is_stop_token: bool) -> str | None:
        """Add generated ids.

        Args:
            is_stop_token: the last id ended the output by its value; it leaves no text, unless stop strings are
                included in the output.

        Returns:
            The stop string that ends the text here (which is then cut accordingly), or None.
        """
        ids = list(token_ids)
        for index, token_id in enumerate(ids):
            self._num_tokens += 1
            if not (is_stop_token and index == len(ids) - 1 and not self._includes_stop):
                self._text += self._push(token_id)
            if self._num_tokens <= self._min_tokens:
                self._num_searched = len(self._text)
            elif (stop := self._find_stop()) is not None:
                return stop
        return None

    def finish(self) -> None:
        """Add the text that waited for more bytes. Not to be called when a stop string has cut the text."""
        self._text += self._decoder.flush()

    def text(self, is_finished: bool) -> str:
        """All text that may be shown."""
        return self._text if is_finished else self._text[: len(self._text) - self._num_held_back()]

    def next_delta(self, is_finished: bool) -> str:
        """The text that may be shown and was not yet returned here."""
        shown = self.text(is_finished)
        delta = shown[self._num_given :]
        self._num_given = len(shown)
        return delta

    def _push(self, token_id: int) -> str:
        if token_id in self._skipped_ids:
            return ""
        token = self._joined_tokens.get(token_id)
        was_joined, self._was_joined_token = self._was_joined_token, token is not None
        if token is not None and was_joined:
            self._decoder.push(token_id)
            return token
        return self._decoder.push(token_id)

    def _find_stop(self) -> str | None:
        """Cut the text at the stop string that begins first; None if there is none."""
        if not self._stops:
            return None
        found: tuple[int, str] | None = None
        for stop in self._stops:
            start = self._text.find(stop, self._num_searched)
            if start >= 0 and (found is None or start < found[0]):
                found = start, stop
        if found is None:
            longest = max(map(len, self._stops))
            self._num_searched = max(self._num_searched, len(self._text) - longest + 1)
            return None
        start, stop = found
        self._text = self._text[: start + len(stop) if self._includes_stop else start]
        return stop

    def _num_held_back(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        if self._includes_stop or not self._stops:
            return 0
        longest = max(map(len, self._stops)) - 1
        for count in range(min(longest, len(self._text) - self._num_searched), 0, -1):
            if any(stop.startswith(self._text[-count:]) for stop in self._stops):
                return count
        return 0


class TokenTexts:
    """Text of single tokens, for log-probabilities: with the leading space that a token has inside a sentence."""

    def __init__(self, tokenizer: Tokenizer, anchor_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._anchor_ids = anchor_ids
        self._anchor_text = tokenizer.decode(anchor_ids, skip_special_tokens=False)
        self._texts: dict[int, str] = {}

    def __getitem__(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            joined = self._tokenizer.decode([*self._anchor_ids, token_id], skip_special_tokens=False)
            if joined.startswith(self._anchor_text):
                text = joined[len(self._anchor_text) :]
            else:
                text = self._tokenizer.decode([token_id], skip_special_tokens=False)
            self._texts[token_id] = text
        return text
