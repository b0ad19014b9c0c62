"""From logits to tokens and log-probabilities.

A row's result depends on that row's logits, parameters and key only: not on other rows, on their number, or on its own
place among them. Randomness is Gumbel-max (Gumbel 1954; Maddison et al. 2014): the argmax of ``logit + g`` with
independent Gumbel noise ``g`` is a draw from the softmax. The noise of token ``v`` is a stateless hash of (seed,
position, v), so there is no generator whose state could be shared. Reductions whose order of summation may depend on
the number of rows (sum, logsumexp) are avoided; ``log_softmax`` and ``cumsum`` go along one row.
"""

from __future__ import annotations

import torch

from graphserve.runtime.step_input import (
    ALL_LOGPROBS,
    INVALID_TOKEN,
    NO_LOGPROBS,
    LogitsAdjustment,
    PromptLogprobsRows,
    SamplingInput,
    StepOutput,
    TokenLogprobs,
)

# Rows with top-k or top-p look at this many most likely tokens first, and at all of them only if these do not decide.
NUM_CANDIDATES = 256
NOISE_CHUNK_ELEMENTS = 1 << 20  # noise is made for this many logits at a time, to bound the temporaries


class Sampler:
    """Samples the rows of a step. Stateless; works on any device.

    Cost when every row is greedy and nothing else is asked for: one argmax over the logits, no copy.
    """

    def __call__(self, logits: torch.Tensor, sampling: SamplingInput) -> StepOutput:
        """Sample the first ``sampling.num_rows`` rows.

        Args:
            logits: [R, vocab], float32 or a half type; may be changed in place.

        Returns:
            One token a sampled row. Log-probabilities are those of ``logits`` as they came, in float32.
        """
        num_rows = sampling.num_rows
        output = StepOutput(token_ids=[])
        for rows in sampling.prompt_logprobs:
            output.prompt_logprobs[rows.sequence] = _prompt_logprobs(logits, rows)
        if num_rows == 0:
            return output
        logits = logits[:num_rows]
        raw = {
            row: logits[row].float().log_softmax(-1)
            for row, count in enumerate(sampling.num_logprobs or ())
            if count != NO_LOGPROBS
        }
        if sampling.adjustments or not sampling.is_greedy:
            logits = logits.float()
            for adjustment in sampling.adjustments:
                adjust_logits(logits[adjustment.row], adjustment)
        token_ids = _argmax(logits)
        if not sampling.is_greedy:
            token_ids = _replace_sampled(token_ids, logits, sampling)
        output.token_ids = token_ids.tolist()
        if sampling.num_logprobs is not None:
            output.logprobs = [None] * num_rows
            for row, logprobs in raw.items():
                token_id = output.token_ids[row]
                if token_id != INVALID_TOKEN:
                    output.logprobs[row] = top_logprobs(logprobs, token_id, sampling.num_logprobs[row])
        return output


def adjust_logits(logits: torch.Tensor, adjustment: LogitsAdjustment) -> None:
    """Apply one row's restrictions, bias and penalties, in the order of the fields of :class:`LogitsAdjustment`.

    Args:
        logits: [vocab] float32, changed in place.
    """
    device = logits.device
    if adjustment.allowed_ids is not None:
        ids = torch.from_numpy(adjustment.allowed_ids).to(device)
        allowed = logits[ids]
        logits.fill_(-torch.inf)
        logits[ids] = allowed
    if adjustment.banned_ids is not None:
        logits[torch.from_numpy(adjustment.banned_ids).to(device)] = -torch.inf
    if adjustment.bias_ids is not None:
        assert adjustment.bias_values is not None
        logits[torch.from_numpy(adjustment.bias_ids).to(device)] += torch.from_numpy(adjustment.bias_values).to(device)
    if adjustment.seen_ids is not None:
        ids = torch.from_numpy(adjustment.seen_ids).to(device)
        seen = logits[ids]
        penalty = adjustment.repetition_penalty
        logits[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
    if adjustment.output_ids is not None:
        assert adjustment.output_counts is not None
        ids = torch.from_numpy(adjustment.output_ids).to(device)
        counts = torch.from_numpy(adjustment.output_counts).to(device)
        logits[ids] -= adjustment.frequency_penalty * counts + adjustment.presence_penalty


def top_logprobs(logprobs: torch.Tensor, token_id: int, count: int) -> TokenLogprobs:
    """Report ``token_id`` and the ``count`` most likely tokens of one row.

    Args:
        logprobs: [vocab] float32.
        count: number of tokens, ``ALL_LOGPROBS`` for the whole vocabulary.
    """
    count = logprobs.shape[-1] if count == ALL_LOGPROBS else min(count, logprobs.shape[-1])
    values, ids = logprobs.topk(count)
    own = logprobs[token_id]
    rank = int((logprobs > own).sum()) + 1
    return TokenLogprobs([token_id, *ids.tolist()], [float(own), *values.tolist()], rank)


def _prompt_logprobs(logits: torch.Tensor, rows: PromptLogprobsRows) -> list[TokenLogprobs]:
    """Entries for consecutive prompt positions: row ``i`` predicts ``target_ids[i]``."""
    targets = rows.target_ids.tolist()
    return [
        top_logprobs(logits[rows.first_row + i].float().log_softmax(-1), target, rows.num_logprobs)
        for i, target in enumerate(targets)
    ]


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """int64 [rows]: the most likely token, ``INVALID_TOKEN`` where NaN or minus infinity is the largest logit."""
    values, ids = logits.max(dim=-1)
    return torch.where(values > -torch.inf, ids, INVALID_TOKEN)  # a comparison with NaN is False


def _replace_sampled(token_ids: torch.Tensor, logits: torch.Tensor, sampling: SamplingInput) -> torch.Tensor:
    """Replace the argmax by a draw in the valid rows whose temperature is not 0."""
    assert sampling.temperature is not None and sampling.keys is not None
    assert sampling.top_k is not None and sampling.top_p is not None and sampling.min_p is not None
    device = logits.device
    temperature = torch.from_numpy(sampling.temperature).to(device)
    rows = torch.nonzero((temperature > 0) & (token_ids != INVALID_TOKEN)).flatten()
    if len(rows) == 0:
        return token_ids
    keys = torch.from_numpy(sampling.keys.view("int32")).to(device)[rows]
    top_k = torch.from_numpy(sampling.top_k).to(device)[rows]
    top_p = torch.from_numpy(sampling.top_p).to(device)[rows]
    min_p = torch.from_numpy(sampling.min_p).to(device)[rows]
    scaled = logits[rows] / temperature[rows, None]
    if bool((min_p > 0).any()):
        # log(0) is minus infinity: rows without min_p keep all
        scaled.masked_fill_(scaled < scaled.amax(-1, keepdim=True) + min_p.log()[:, None], -torch.inf)
    is_cut = ((top_k > 0) & (top_k < logits.shape[-1])) | (top_p < 1.0)
    drawn = torch.empty_like(rows)
    whole = torch.nonzero(~is_cut).flatten()
    if len(whole):
        drawn[whole] = _draw(scaled[whole], keys[whole])
    cut = torch.nonzero(is_cut).flatten()
    if len(cut):
        drawn[cut] = _draw_cut(scaled[cut], keys[cut], top_k[cut], top_p[cut])
    return token_ids.index_put((rows,), drawn)


def _draw(scores: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Draw from the softmax of each row.

    Args:
        scores: [rows, vocab] float32.
        keys: [rows, 2] int32.

    Returns:
        int64 [rows].
    """
    vocab = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
    step = max(1, NOISE_CHUNK_ELEMENTS // scores.shape[-1])
    drawn = [
        (scores[i : i + step] + gumbel_noise(vocab[None], keys[i : i + step])).argmax(-1)
        for i in range(0, scores.shape[0], step)
    ]
    return torch.cat(drawn)


def _draw_cut(scaled: torch.Tensor, keys: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Draw from the softmax of each row restricted by top-k, then top-p.

    Tokens as likely as the last one kept are kept too, so the restriction is a threshold on the log-probability and
    does not depend on how a sort orders equal values.
    """
    logprobs = scaled.log_softmax(-1)
    vocab_size = logprobs.shape[-1]
    if vocab_size <= NUM_CANDIDATES:
        return _draw_among(logprobs, vocab_size, keys, top_k, top_p)[0]
    drawn, is_decided = _draw_among(logprobs, NUM_CANDIDATES, keys, top_k, top_p)
    rest = torch.nonzero(~is_decided).flatten()
    if len(rest):
        drawn[rest] = _draw_among(logprobs[rest], vocab_size, keys[rest], top_k[rest], top_p[rest])[0]
    return drawn


def _draw_among(
    logprobs: torch.Tensor, width: int, keys: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw among the ``width`` most likely tokens of each row.

    Returns:
        int64 [rows] tokens, and bool [rows]: whether every token that top-k and top-p keep was among them (the token
        is meaningless where not).
    """
    values, ids = logprobs.topk(width)
    threshold, is_decided = cut_threshold(values, top_k, top_p)
    noise = gumbel_noise(ids.to(torch.int32), keys)
    scores = (values + noise).masked_fill(values < threshold[:, None], -torch.inf)
    return ids.gather(1, scores.argmax(-1, keepdim=True)).flatten(), is_decided


def cut_threshold(values: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability down to which top-k, then top-p on what top-k left, keep tokens.

    Args:
        values: [rows, width] float32 log-probabilities, descending.
        top_k: int64 [rows], 0 for off.
        top_p: float32 [rows], 1 for off.

    Returns:
        float32 [rows] threshold, minus infinity keeps all; and bool [rows], whether no token beyond ``values`` has a
        part in it (where one may have, the threshold holds only if ``values`` is the whole vocabulary).
    """
    width = values.shape[-1]
    has_top_k = top_k > 0
    kth = (top_k - 1).clamp(0, width - 1)
    k_threshold = values.gather(1, kth[:, None]).flatten()
    k_threshold = torch.where(has_top_k & (top_k <= width), k_threshold, -torch.inf)
    probs = values.exp().masked_fill(values < k_threshold[:, None], 0.0)
    cumulative = probs.cumsum(-1)
    # With top-k, the mass is that of what top-k keeps; without, the values are normalised over the vocabulary.
    mass = torch.where(has_top_k, cumulative[:, -1], 1.0)
    # A token stays while the mass before it is below top_p; the first one always does.
    stays = (cumulative - probs) < (top_p * mass)[:, None]
    last = stays.sum(-1).clamp(min=1) - 1
    p_threshold = values.gather(1, last[:, None]).flatten()
    p_threshold = torch.where(top_p < 1.0, p_threshold, -torch.inf)
    # A last value below the threshold shows that no token beyond is at or above it. Top-k needs this for its own one,
    # because the mass that top-p looks at is that of all tokens which top-k keeps.
    is_decided = (values[:, -1] < torch.where(has_top_k, k_threshold, p_threshold)) | (values[:, -1] == -torch.inf)
    return torch.maximum(k_threshold, p_threshold), is_decided


def gumbel_noise(ids: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, a function of each (key, token id) alone.

    The hash is murmur3's 32-bit finalizer with the second key word mixed in between, so that rows whose first words
    differ by a multiple of the token stride still share no noise.

    Args:
        ids: int32 [rows or 1, n] token ids.
        keys: int32 [rows, 2].

    Returns:
        float32 [rows, n].
    """
    h = ids * -1640531535 + keys[:, :1]  # 0x9E3779B1, the golden ratio; products wrap around
    h = h ^ ((h >> 16) & 0xFFFF)
    h = h * -2048144789  # 0x85EBCA6B
    h ^= keys[:, 1:]
    h ^= (h >> 13) & 0x7FFFF
    h *= -1028477387  # 0xC2B2AE35
    h ^= (h >> 16) & 0xFFFF
    h = (h >> 1) & 0x7FFFFFFF
    # u in (0, 1) with full relative precision near 0, where -log1p(-u) is small and the winners of a race lie. The
    # upper bound keeps u below 1 in float32.
    u = ((h.to(torch.float32) + 0.5) * 2.0**-31).clamp_(max=1.0 - 2.0**-24)
    return -(-torch.log1p(-u)).log()
