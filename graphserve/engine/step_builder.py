"""From the scheduler's choice to the arrays of a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphserve.engine.executor import StepSizes
from graphserve.engine.request import Request
from graphserve.engine.scheduler import ScheduledRequest, SchedulerLimits
from graphserve.runtime.buckets import Buckets
from graphserve.runtime.step_input import (
    CARRIED,
    NO_LOGPROBS,
    Int32Array,
    Int64Array,
    LogitsAdjustment,
    PromptLogprobsRows,
    SamplingInput,
    StepInput,
    sampling_keys,
)


class StepBuilder:
    """Builds :class:`StepInput` from scheduled requests.

    Args:
        num_groups: cache groups of the plan.
        block_size: tokens a block.
        buckets: sizes to pad to.
        num_lanes: lanes of running requests; the dead lane is the one after them.
        runs_ahead: steps say what ends a row's request, because the next one is submitted before the host knows.
    """

    def __init__(
        self, num_groups: int, block_size: int, buckets: Buckets, num_lanes: int, runs_ahead: bool = False
    ) -> None:
        self._num_groups = num_groups
        self._block_size = block_size
        self._buckets = buckets
        self._dead_lane = num_lanes
        self._runs_ahead = runs_ahead

    def largest_step(self, limits: SchedulerLimits) -> StepSizes:
        """Bounds of the arrays that :meth:`build` makes within ``limits``."""
        tokens, rows, seqs = self._buckets.largest_step(
            limits.max_num_seqs, limits.max_num_batched_tokens, limits.max_logits_rows
        )
        return StepSizes(tokens, rows, seqs, num_lanes=self._dead_lane)

    def build(self, scheduled: Sequence[ScheduledRequest]) -> StepInput:
        """Arrays of one step; ``scheduled`` is not empty and its order becomes the order of the sequences."""
        num_tokens = sum(item.num_tokens for item in scheduled)
        num_sequences = len(scheduled)
        is_decode = num_tokens == num_sequences
        pad_rows = self._buckets.rows if is_decode else self._buckets.mixed_rows
        padded_sequences = pad_rows(num_sequences)
        padded_tokens = padded_sequences if is_decode else self._buckets.tokens(num_tokens)
        if not is_decode and padded_tokens == padded_sequences:
            padded_tokens = self._buckets.tokens(
                padded_tokens + 1
            )  # only decode steps have as many tokens as sequences

        input_ids = np.zeros(padded_tokens, np.int64)
        positions = np.zeros(padded_tokens, np.int64)
        query_start_loc = np.full(padded_sequences + 1, num_tokens, np.int32)
        seq_lens = np.zeros(padded_sequences, np.int32)
        token_lanes = np.full(padded_tokens, self._dead_lane, np.int32)
        token = 0
        for index, item in enumerate(scheduled):
            query_start_loc[index] = token
            seq_lens[index] = item.end
            token_ids = item.request.token_ids
            if item.end > len(token_ids):  # a decode whose token is still being sampled
                assert item.num_tokens == 1, "a chunk ends with the last token, and only that can be unknown"
                input_ids[token] = CARRIED
                token_lanes[token] = _lane(item.request)
                positions[token] = item.start
            elif item.num_tokens == 1:
                input_ids[token] = token_ids[item.start]
                positions[token] = item.start
            else:
                input_ids[token : token + item.num_tokens] = token_ids[item.start : item.end]
                positions[token : token + item.num_tokens] = np.arange(item.start, item.end)
            token += item.num_tokens

        block_tables = [self._block_table(scheduled, g, padded_sequences) for g in range(self._num_groups)]
        sequence_of_token = np.repeat(np.arange(num_sequences), [item.num_tokens for item in scheduled])
        slot_mappings = [self._slots(table, sequence_of_token, positions) for table in block_tables]
        sampling, logits_rows, lanes = self._sampling(scheduled, query_start_loc)
        # Steps without prompt log-probabilities have one row a sequence, so that the shape depends on one count only.
        padded_rows = max(padded_sequences, pad_rows(len(logits_rows)))
        if not self._buckets.is_enabled:
            padded_rows = max(1, len(logits_rows))
        logits_indices = np.zeros(padded_rows, np.int64)
        logits_indices[: len(logits_rows)] = logits_rows
        row_lanes = np.full(padded_rows, self._dead_lane, np.int32)
        row_lanes[: len(lanes)] = lanes
        return StepInput(
            input_ids=input_ids,
            positions=positions,
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            block_tables=block_tables,
            slot_mappings=slot_mappings,
            logits_indices=logits_indices,
            token_lanes=token_lanes,
            row_lanes=row_lanes,
            sampling=sampling,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            num_logits_rows=len(logits_rows),
        )

    def _block_table(self, scheduled: Sequence[ScheduledRequest], group: int, num_rows: int) -> Int32Array:
        """int32 [num_rows, B], null where a request has no block."""
        tables = [item.request.block_tables[group] for item in scheduled]
        block_table = np.zeros((num_rows, max(len(table) for table in tables)), np.int32)
        for row, table in enumerate(tables):
            block_table[row, : len(table)] = table
        return block_table

    def _slots(self, block_table: Int32Array, sequence_of_token: Int64Array, positions: Int64Array) -> Int64Array:
        """int64 [T]: where each token's key and value go; padding tokens go to the null block."""
        slots = np.zeros(len(positions), np.int64)
        real = positions[: len(sequence_of_token)]
        blocks = block_table[sequence_of_token, real // self._block_size].astype(np.int64)
        slots[: len(real)] = blocks * self._block_size + real % self._block_size
        return slots

    def _sampling(
        self, scheduled: Sequence[ScheduledRequest], query_start_loc: Int32Array
    ) -> tuple[SamplingInput, list[int], list[int]]:
        """Sampling arrays, token indices of the logits rows (without padding), lanes of the sampled ones."""
        rows = [int(query_start_loc[index + 1]) - 1 for index, item in enumerate(scheduled) if item.samples]
        sampled = [item for item in scheduled if item.samples]
        lanes = [_lane(item.request) for item in sampled]
        sampling = _sampling_input(sampled)
        if self._runs_ahead:
            _add_stops(sampling, sampled)
        for index, item in enumerate(scheduled):
            request = item.request
            if not request.wants_prompt_logprobs or request.params.prompt_logprobs is None:
                continue
            # Row p predicts the token at p + 1. Rows already known come up again when a preempted prompt is recomputed.
            first = max(item.start, request.num_known_prompt_logprobs)
            last = min(item.end, request.num_prompt_tokens - 1)
            if first < last:
                targets = np.array(request.token_ids[first + 1 : last + 1], np.int64)
                sampling.prompt_logprobs.append(
                    PromptLogprobsRows(index, len(rows), targets, request.params.prompt_logprobs)
                )
                offset = int(query_start_loc[index]) - item.start
                rows.extend(range(offset + first, offset + last))
        return sampling, rows, lanes


def _lane(request: Request) -> int:
    assert request.lane is not None, "a request in a step owns a lane"
    return request.lane


def _sampling_input(sampled: Sequence[ScheduledRequest]) -> SamplingInput:
    """Sampling of one row each. Arrays that no row needs stay None."""
    params = [item.request.params for item in sampled]
    sampling = SamplingInput(num_rows=len(sampled))
    adjustments = (_adjustment(row, item) for row, item in enumerate(sampled))
    sampling.adjustments = [adjustment for adjustment in adjustments if adjustment is not None]
    if any(p.logprobs is not None for p in params):
        sampling.num_logprobs = [NO_LOGPROBS if p.logprobs is None else p.logprobs for p in params]
    if all(p.is_greedy for p in params):
        return sampling
    sampling.is_greedy = False
    sampling.temperature = np.array([0.0 if p.is_greedy else p.temperature for p in params], np.float32)
    sampling.top_k = np.array([p.top_k for p in params], np.int64)
    sampling.top_p = np.array([p.top_p for p in params], np.float32)
    sampling.min_p = np.array([p.min_p for p in params], np.float32)
    # The position that the sampled token will have: the one behind the step's tokens.
    sampling.keys = sampling_keys([item.request.core_request.seed for item in sampled], [item.end for item in sampled])
    return sampling


def _add_stops(sampling: SamplingInput, sampled: Sequence[ScheduledRequest]) -> None:
    """What ends a row's request, so that its lane ends before the next step reads it."""
    stops = [[*item.request.core_request.eos_token_ids, *item.request.stop_token_ids] for item in sampled]
    width = max((len(ids) for ids in stops), default=0)
    sampling.stop_ids = np.array([ids + [-1] * (width - len(ids)) for ids in stops], np.int32).reshape(
        len(stops), width
    )
    # The step's tokens end the sequence so far, and one more is sampled.
    left = [item.request.core_request.max_tokens + item.request.num_prompt_tokens - item.end for item in sampled]
    sampling.tokens_left = np.array(left, np.int32)


def _adjustment(row: int, item: ScheduledRequest) -> LogitsAdjustment | None:
    """The row's :class:`LogitsAdjustment`, None if its logits stay as they are."""
    request = item.request
    params = request.params
    banned = _banned_ids(item)
    if not (banned or params.logit_bias or params.allowed_token_ids or params.has_penalties):
        return None
    adjustment = LogitsAdjustment(row)
    if params.allowed_token_ids:
        adjustment.allowed_ids = np.array(params.allowed_token_ids, np.int64)
    if banned:
        adjustment.banned_ids = np.array(banned, np.int64)
    if params.logit_bias:
        adjustment.bias_ids = np.array(list(params.logit_bias), np.int64)
        adjustment.bias_values = np.array(list(params.logit_bias.values()), np.float32)
    if params.repetition_penalty != 1.0:
        adjustment.repetition_penalty = params.repetition_penalty
        adjustment.seen_ids = np.unique(np.array(request.token_ids, np.int64))
    if params.frequency_penalty or params.presence_penalty:
        adjustment.frequency_penalty = params.frequency_penalty
        adjustment.presence_penalty = params.presence_penalty
        output_ids = np.array(request.token_ids[request.num_prompt_tokens :], np.int64)
        adjustment.output_ids, counts = np.unique(output_ids, return_counts=True)
        adjustment.output_counts = counts.astype(np.float32)
    return adjustment


def _banned_ids(item: ScheduledRequest) -> list[int]:
    """Ids that must not come next: ends before ``min_tokens``, and last tokens of bad words under way."""
    request = item.request
    banned: list[int] = []
    # The step's tokens end the sequence so far, and the output may end with number min_tokens at the earliest.
    if item.end - request.num_prompt_tokens + 1 < request.params.min_tokens:
        banned.extend(request.core_request.eos_token_ids)
        banned.extend(request.stop_token_ids)
    if request.core_request.bad_words_token_ids:
        output = request.token_ids[request.num_prompt_tokens :].tolist()
        for word in request.core_request.bad_words_token_ids:
            before = word[:-1]
            if len(before) <= len(output) and output[len(output) - len(before) :] == before:
                banned.append(word[-1])
    return banned
