"""What one step carries to the device and back: numpy arrays and plain structs, no torch.

Row order: the sequences of a step keep one order everywhere. Logits rows come first for the sequences that sample a
token in this step (in that order), then for prompt positions whose log-probabilities are asked for, then padding.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]

ALL_LOGPROBS = -1
NO_LOGPROBS = -2
CARRIED = -1  # input id of a token that the host does not know yet: the one sampled last for the token's lane
INVALID_TOKEN = -1  # sampled "token" of a row whose logits allow none: NaN, or every token suppressed


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Log-probabilities at one position.

    Attributes:
        token_ids: the sampled (or given) token, then the most likely ones, best first.
        logprobs: natural logarithms, one a token id.
        rank: 1 + number of tokens more likely than the first one.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


class LogitsAdjustment(msgspec.Struct):
    """What changes the logits of one sampled row before temperature. Applied in the order of the fields.

    Attributes:
        row: index among the sampled rows.
        allowed_ids: all other ids are suppressed; None for no restriction.
        banned_ids: suppressed ids (bad words that would be completed, end ids before ``min_tokens``).
        bias_ids, bias_values: added to the logits.
        seen_ids: distinct ids of prompt and output, for ``repetition_penalty``.
        output_ids, output_counts: distinct generated ids and how often, for the other two penalties.
    """

    row: int
    allowed_ids: Int64Array | None = None
    banned_ids: Int64Array | None = None
    bias_ids: Int64Array | None = None
    bias_values: Float32Array | None = None
    repetition_penalty: float = 1.0
    seen_ids: Int64Array | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    output_ids: Int64Array | None = None
    output_counts: Float32Array | None = None


class PromptLogprobsRows(msgspec.Struct):
    """Logits rows ``first_row ..`` predict the prompt tokens ``target_ids`` of sequence ``sequence``."""

    sequence: int
    first_row: int
    target_ids: Int64Array
    num_logprobs: int


class SamplingInput(msgspec.Struct):
    """How the first ``num_rows`` logits rows are sampled.

    Attributes:
        is_greedy: every row takes its argmax; the arrays below are then None.
        temperature, top_p, min_p: float32 [num_rows]; temperature 0 marks a greedy row.
        top_k: int64 [num_rows], 0 for off.
        keys: uint32 [num_rows, 2], the hash of (seed, position) that drives the row's random choice.
        num_logprobs: per row, ``NO_LOGPROBS``, ``ALL_LOGPROBS`` or a count; None if no row wants any.
        stop_ids: int32 [num_rows, K], tokens that end a row's request, padded with -1; None if nobody looked them up.
        tokens_left: int32 [num_rows], how many tokens the row's request may still get, this step's included; or None.
            Both only let the device end a lane before the host knows; the host decides what a request gets.
    """

    num_rows: int
    is_greedy: bool = True
    temperature: Float32Array | None = None
    top_k: Int64Array | None = None
    top_p: Float32Array | None = None
    min_p: Float32Array | None = None
    keys: npt.NDArray[np.uint32] | None = None
    num_logprobs: list[int] | None = None
    adjustments: list[LogitsAdjustment] = []
    prompt_logprobs: list[PromptLogprobsRows] = []
    stop_ids: Int32Array | None = None
    tokens_left: Int32Array | None = None


class StepInput(msgspec.Struct):
    """One step of the model: T tokens of S sequences, R rows of logits; all three may include padding at the end.

    Padding tokens have position 0, a slot in the null block, and lie beyond ``query_start_loc[-1]``. Padding sequences
    have query length 0 and ``seq_lens`` 0. Padding logits rows point at token 0. ``R >= 1`` always.
    Where T equals S, no sequence has more than one token and those with none come last: kernels for decode steps run.

    Each running request owns a lane, ``0 .. max_num_seqs - 1``; lane ``max_num_seqs`` is dead: nobody reads what is
    written there. A step made outside an engine has no lanes, so that its dead lane is 0.

    Attributes:
        input_ids: int64 [T]; ``CARRIED`` where the token is the last one sampled for lane ``token_lanes[t]``. A row
            whose logits allowed no token carries id 0: its request ends before anything of it is used.
        positions: int64 [T].
        query_start_loc: int32 [S + 1], where each sequence's tokens begin.
        seq_lens: int32 [S], context length after this step.
        block_tables: per cache group, int32 [S, B]; unused places hold the null block.
        slot_mappings: per cache group, int64 [T], ``block * block_size + offset``.
        logits_indices: int64 [R], token indices whose logits are computed.
        token_lanes: int32 [T], dead where the id is given.
        row_lanes: int32 [R], lane of a row's sample; dead for rows of prompt log-probabilities and padding.
        num_tokens, num_sequences, num_logits_rows: counts without padding.
    """

    input_ids: Int64Array
    positions: Int64Array
    query_start_loc: Int32Array
    seq_lens: Int32Array
    block_tables: list[Int32Array]
    slot_mappings: list[Int64Array]
    logits_indices: Int64Array
    token_lanes: Int32Array
    row_lanes: Int32Array
    sampling: SamplingInput
    num_tokens: int
    num_sequences: int
    num_logits_rows: int


class StepOutput(msgspec.Struct):
    """What a step gives back.

    Attributes:
        token_ids: one a sampled row; ``INVALID_TOKEN`` if the row's logits allow none.
        logprobs: one a sampled row (None for rows that want none), or None if no row wants any.
        prompt_logprobs: sequence index → one entry a prompt row.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None = None
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}


def splitmix64(value: int) -> int:
    """One round of the SplitMix64 generator (Steele, Lea, Flood 2014): a well mixed 64-bit function of ``value``."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


def sampling_keys(seeds: list[int], positions: list[int]) -> npt.NDArray[np.uint32]:
    """Random keys of rows: a hash of each row's own (seed, position) and of nothing else.

    Args:
        seeds: 64-bit seeds (negative ones are taken modulo 2**64).
        positions: position that the sampled token will have in its sequence.

    Returns:
        uint32 [rows, 2].
    """
    mixed = [splitmix64(splitmix64(s & 0xFFFFFFFFFFFFFFFF) ^ p) for s, p in zip(seeds, positions, strict=True)]
    words: npt.NDArray[Any] = np.array(mixed, dtype="<u8").view("<u4").reshape(-1, 2)
    return words.astype(np.uint32)
