"""From logits to tokens and log-probabilities.

A row's result depends on that row's logits, parameters and key only: not on other rows, on their number, or on its own
place among them. What is kept and drawn is defined in :mod:`graphserve.kernels.sampling`, whose sums of integers give
the same answer in any order; here it is found by looking at the most likely tokens first.
"""

from __future__ import annotations

import torch

from graphserve.kernels.sampling import (
    adjust_row,
    distances,
    greedy_tokens,
    gumbel_noise,
    token_mass,
    top_p_target,
)
from graphserve.runtime.step_input import (
    ALL_LOGPROBS,
    INVALID_TOKEN,
    NO_LOGPROBS,
    Float32Array,
    Int64Array,
    LogitsAdjustment,
    PromptLogprobsRows,
    SamplingInput,
    StepOutput,
    TokenLogprobs,
)

# Rows with top-k or top-p look at this many most likely tokens first, and at all of them only if these do not decide.
NUM_CANDIDATES = 256
NOISE_CHUNK_ELEMENTS = 1 << 20  # noise is made for this many logits at a time, to bound the temporaries
_NUM_BINS = 2048  # in which the tokens of a whole row are counted
_FARTHEST_MASS = 28.0  # a token at a larger distance has no mass


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
        token_ids = greedy_tokens(logits)
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
    """Apply one row's restrictions, bias and penalties; see :func:`graphserve.kernels.sampling.adjust_row`.

    Args:
        logits: [vocab] float32, changed in place.
    """

    def tensor(values: Int64Array | Float32Array | None) -> torch.Tensor | None:
        return None if values is None else torch.from_numpy(values).to(logits.device)

    bias_ids, bias_values = tensor(adjustment.bias_ids), tensor(adjustment.bias_values)
    output_ids, output_counts = tensor(adjustment.output_ids), tensor(adjustment.output_counts)
    adjust_row(
        logits,
        allowed_ids=tensor(adjustment.allowed_ids),
        banned_ids=tensor(adjustment.banned_ids),
        bias=None if bias_ids is None or bias_values is None else (bias_ids, bias_values),
        seen_ids=tensor(adjustment.seen_ids),
        repetition_penalty=adjustment.repetition_penalty,
        output=None if output_ids is None or output_counts is None else (output_ids, output_counts),
        frequency_penalty=adjustment.frequency_penalty,
        presence_penalty=adjustment.presence_penalty,
    )


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
    limit = -torch.from_numpy(sampling.min_p).to(device)[rows].log()  # min_p 0 gives infinity: all are kept
    distance = distances(logits[rows] / temperature[rows, None])[1]
    is_cut = ((top_k > 0) & (top_k < logits.shape[-1])) | (top_p < 1.0)
    drawn = torch.empty_like(rows)
    whole = torch.nonzero(~is_cut).flatten()
    if len(whole):
        drawn[whole] = _draw(distance[whole], limit[whole], keys[whole])
    cut = torch.nonzero(is_cut).flatten()
    if len(cut):
        drawn[cut] = _draw_cut(distance[cut], limit[cut], keys[cut], top_k[cut], top_p[cut])
    return token_ids.index_put((rows,), drawn)


def _draw(distance: torch.Tensor, limit: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Draw from the softmax of each row restricted to distances up to a limit.

    Args:
        distance: [rows, vocab] float32.
        limit: [rows] float32.
        keys: [rows, 2] int32.

    Returns:
        int64 [rows].
    """
    vocab = torch.arange(distance.shape[-1], dtype=torch.int32, device=distance.device)
    step = max(1, NOISE_CHUNK_ELEMENTS // distance.shape[-1])
    has_limit = bool((limit < torch.inf).any())
    drawn = []
    for i in range(0, distance.shape[0], step):
        scores = gumbel_noise(vocab[None], keys[i : i + step]) - distance[i : i + step]
        if has_limit:
            scores.masked_fill_(distance[i : i + step] > limit[i : i + step, None], -torch.inf)
        drawn.append(scores.argmax(-1))
    return torch.cat(drawn)


def _draw_cut(
    distance: torch.Tensor, limit: torch.Tensor, keys: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """Draw from the softmax of each row restricted by a limit of the distance, top-k, then top-p."""
    near, ids = distance.topk(min(NUM_CANDIDATES, distance.shape[-1]), largest=False)
    cut, is_decided = cut_among(near, distance, limit, top_k, top_p)
    scores = gumbel_noise(ids.to(torch.int32), keys) - near
    best = scores.masked_fill_(near > cut[:, None], -torch.inf).argmax(-1, keepdim=True)
    drawn = ids.gather(1, best).flatten()
    for row in torch.nonzero(~is_decided).flatten().tolist():
        row_cut = cut_of_row(distance[row], limit[row], int(top_k[row]), top_p[row])
        kept = torch.nonzero(distance[row] <= row_cut).flatten()
        noise = gumbel_noise(kept.to(torch.int32)[None], keys[row : row + 1])[0]
        drawn[row] = kept[(noise - distance[row][kept]).argmax()]
    return drawn


def cut_among(
    near: torch.Tensor, distance: torch.Tensor, limit: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest distance that each row keeps, judged by its most likely tokens.

    Args:
        near: [rows, width] float32, the smallest distances of each row, ascending.
        distance: [rows, vocab] float32.
        limit: float32 [rows], the largest distance that min-p keeps.
        top_k: int64 [rows], 0 for off.
        top_p: float32 [rows], 1 for off.

    Returns:
        float32 [rows], the distance; and bool [rows], whether every token that is kept is in ``near`` (the distance
        means nothing where not).
    """
    width, vocab = near.shape[-1], distance.shape[-1]
    has_top_k = (top_k > 0) & (top_k < vocab)
    kth = near.gather(1, (top_k - 1).clamp(0, width - 1)[:, None]).flatten()
    kept = torch.minimum(limit, torch.where(has_top_k & (top_k <= width), kth, torch.inf))
    cumulative = token_mass(near).masked_fill_(near > kept[:, None], 0).cumsum(-1)
    total = cumulative[:, -1]
    if width < vocab and not bool(has_top_k.all()):
        total = torch.where(has_top_k, total, token_mass(distance).masked_fill_(distance > limit[:, None], 0).sum(-1))
    # A token stays while the mass nearer than it is below the target: one more stays than do not reach it.
    num_below = (cumulative < top_p_target(top_p, total)[:, None]).sum(-1, keepdim=True)
    last = near.gather(1, num_below.clamp(max=width - 1)).flatten()
    cut = torch.where(top_p < 1.0, torch.minimum(kept, last), kept)
    # A last distance beyond the cut shows that none after it is within. Top-k needs this for its own cut, because the
    # mass that top-p looks at is that of all tokens which top-k keeps.
    farthest = near[:, -1]
    is_decided = (farthest > torch.where(has_top_k, kept, cut)) | (farthest == torch.inf) | (width == vocab)
    return cut, is_decided


def cut_of_row(distance: torch.Tensor, limit: torch.Tensor, top_k: int, top_p: torch.Tensor) -> torch.Tensor:
    """The largest distance that one row keeps, from all its tokens and without sorting them.

    Args:
        distance: [vocab] float32.
        limit: float32 [], the largest distance that min-p keeps.
        top_k: 0 for off.
        top_p: float32 [], 1 for off.

    Returns:
        float32 [].
    """
    cut = limit
    if 0 < top_k < distance.shape[-1]:
        farthest = float(distance.masked_fill(distance == torch.inf, 0).amax())
        ones = torch.ones_like(distance, dtype=torch.int64)
        cut = torch.minimum(cut, _distance_reaching(distance, ones, top_k, farthest))
    if top_p < 1.0:
        mass = token_mass(distance).masked_fill_(distance > cut, 0)
        target = int(top_p_target(top_p, mass.sum()))
        cut = torch.minimum(cut, _distance_reaching(distance, mass, target, _FARTHEST_MASS))
    return cut


def _distance_reaching(distance: torch.Tensor, amounts: torch.Tensor, target: int, farthest: float) -> torch.Tensor:
    """The smallest distance within which the amounts (int64) sum up to the target, which all of them reach.

    A histogram of distances up to ``farthest`` finds the bin in which that happens; only its tokens are sorted.
    """
    bins = (distance * (_NUM_BINS / max(farthest, 1.0))).clamp_(max=_NUM_BINS - 1).to(torch.int64)
    histogram = amounts.new_zeros(_NUM_BINS).scatter_add_(0, bins, amounts)
    within = histogram.cumsum(0)
    place = int((within < target).sum())
    members = torch.nonzero(bins == place).flatten()
    ordered, order = distance[members].sort()
    reached = within[place] - histogram[place] + amounts[members][order].cumsum(0)
    return ordered[int((reached < target).sum())]
