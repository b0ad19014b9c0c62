"""From logits to tokens: adjustments, what top-k, top-p and min-p keep, the draw, and log-probabilities.

Everything after the adjustments works on *distances*: how far a token's scaled logit lies below the largest of its row.
What is kept is then one number a row, the largest distance at which a token stays. Tokens at equal distance are equally
likely and stay or go together.

Top-p compares sums of probabilities. They are sums of integers (:func:`token_mass`), so that neither the order of
summation nor how a row is split over programs changes what is kept: a search over distances, a histogram and a sort
agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from graphserve.kernels.registry import register
from graphserve.kernels.sampling_rules import GROUP, INVALID_TOKEN, UNIT_MASS, hash_bits

# Logits that a reference sorts or draws from at a time. Its temporaries are some 40 bytes each, so that they fit beside
# a KV pool where no kernel was built.
_MAX_LOGITS = 1 << 23

Reference = TypeVar("Reference", bound=Callable[..., Any])


def _by_parts(reference: Reference) -> Reference:
    """The reference of an op whose tensors all have a row each for every row of the first one, some rows at a time."""

    @wraps(reference)
    def by_parts(rows: Tensor, *others: Any) -> Any:
        size = max(1, _MAX_LOGITS // rows.shape[1])
        if rows.shape[0] <= size:
            return reference(rows, *others)
        parts = [
            reference(
                rows[start : start + size],
                *(other[start : start + size] if isinstance(other, Tensor) else other for other in others),
            )
            for start in range(0, rows.shape[0], size)
        ]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)
        return tuple(torch.cat(results) for results in zip(*parts, strict=True))

    return cast(Reference, by_parts)


def gumbel_noise(ids: Tensor, keys: Tensor) -> Tensor:
    """Standard Gumbel noise, a function of each (key, token id) alone.

    The argmax of ``logit + g`` with independent noise ``g`` is a draw from the softmax (Gumbel 1954; Maddison et al.
    2014). Noise that is a hash needs no generator state, so a row's draw cannot depend on the rows beside it.

    Args:
        ids: int32 ``[rows or 1, n]`` token ids.
        keys: int32 ``[rows, 2]``.

    Returns:
        float32 ``[rows, n]``.
    """
    bits = hash_bits(ids, keys[:, :1], keys[:, 1:])
    # u in (0, 1) with full relative precision near 0, where -log1p(-u) is small and the winners of a race lie. The
    # upper bound keeps u below 1 in float32.
    u = ((bits.to(torch.float32) + 0.5) * 2.0**-31).clamp_(max=1.0 - 2.0**-24)
    return -(-torch.log1p(-u)).log()


def distances(scores: Tensor) -> tuple[Tensor, Tensor]:
    """How far each token lies below the most likely one.

    Args:
        scores: ``[R, V]`` float32.

    Returns:
        ``[R]`` the largest score of each row (NaN where the row holds one), and ``[R, V]`` distances from it: 0 for the
        most likely tokens, infinity for suppressed ones, meaningless where the largest is NaN or minus infinity.
    """
    row_max = scores.amax(-1)
    top = row_max[:, None]
    distance = top - scores
    if bool((row_max == torch.inf).any()):
        distance = torch.where(scores == top, 0.0, distance)  # an infinite largest score is at distance 0 from itself
    return row_max, distance


def token_mass(distance: Tensor) -> Tensor:
    """``exp(-distance)`` in units of ``1 / UNIT_MASS``, rounded down: int64, any shape."""
    return (torch.exp(-distance) * float(UNIT_MASS)).to(torch.int64)


def top_p_target(top_p: Tensor, total: Tensor) -> Tensor:
    """Mass that must lie nearer than a token for top-p to cut it.

    Args:
        top_p: ``[R]`` float32 below 1.
        total: ``[R]`` int64, mass of all tokens that top-p chooses from.

    Returns:
        int64 ``[R]``, 1 at least, so that the most likely token always stays.
    """
    return torch.ceil(top_p.double() * total.double()).to(torch.int64).clamp(min=1)


def adjust_row(
    logits: Tensor,
    allowed_ids: Tensor | None = None,
    banned_ids: Tensor | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
    seen_ids: Tensor | None = None,
    repetition_penalty: float = 1.0,
    output: tuple[Tensor, Tensor] | None = None,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
) -> None:
    """Apply one row's restrictions, bias and penalties, in the order of the arguments, in place.

    Args:
        logits: ``[V]`` float32.
        allowed_ids: int64; all other tokens are suppressed.
        banned_ids: int64, suppressed.
        bias: distinct int64 ids, and what is added to their logits.
        seen_ids: distinct int64 ids of prompt and output.
        repetition_penalty: divides positive and multiplies negative logits of the seen ids.
        output: distinct int64 generated ids, and float32 how often each was generated.
        frequency_penalty: subtracted for each time.
        presence_penalty: subtracted once.
    """
    if allowed_ids is not None:
        allowed = logits[allowed_ids]
        logits.fill_(-torch.inf)
        logits[allowed_ids] = allowed
    if banned_ids is not None:
        logits[banned_ids] = -torch.inf
    if bias is not None:
        logits[bias[0]] += bias[1]
    if seen_ids is not None:
        seen = logits[seen_ids]
        logits[seen_ids] = torch.where(seen > 0, seen / repetition_penalty, seen * repetition_penalty)
    if output is not None:
        logits[output[0]] -= frequency_penalty * output[1] + presence_penalty


def process_logits(
    logits: Tensor,
    temperature: Tensor | None,
    bitmask: Tensor | None,
    allowed_starts: Tensor | None,
    allowed_ids: Tensor | None,
    banned_starts: Tensor | None,
    banned_ids: Tensor | None,
    bias_starts: Tensor | None,
    bias_ids: Tensor | None,
    bias_values: Tensor | None,
    seen_starts: Tensor | None,
    seen_ids: Tensor | None,
    repetition_penalty: Tensor | None,
    output_starts: Tensor | None,
    output_ids: Tensor | None,
    output_counts: Tensor | None,
    frequency_penalty: Tensor | None,
    presence_penalty: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Adjust logits and divide them by the temperature.

    Lists of token ids are sparse: row ``r`` of a list is ``ids[starts[r]:starts[r + 1]]``. The ids of a row are
    distinct, except banned ones. Meaning and order are those of :func:`adjust_row`; the bitmask comes first.

    Args:
        logits: ``[R, V]``, any float dtype.
        temperature: ``[R]`` float32; 0 (greedy) and None leave the scale alone.
        bitmask: ``[R, ceil(V / 32)]`` int32; token ``v`` is suppressed unless bit ``v % 32`` of word
            ``v // 32`` is set.
        allowed_starts: ``[R + 1]`` int32, as all starts. A row without allowed ids is not restricted.
        allowed_ids: ``[N]`` int32, as all ids.
        banned_starts, banned_ids: a list.
        bias_starts, bias_ids, bias_values: a list with float32 values.
        seen_starts, seen_ids: a list for ``repetition_penalty [R]`` float32.
        output_starts, output_ids, output_counts: a list with float32 counts for ``frequency_penalty [R]`` and
            ``presence_penalty [R]``, both float32.

    Returns:
        Scores ``[R, V]`` float32, and the largest of each :data:`GROUP` of neighbouring tokens,
        ``[R, ceil(V / GROUP)]`` float32 (NaN where the group holds one).
    """
    scores = logits.float() if logits.dtype != torch.float32 else logits.clone()
    num_rows, vocab = scores.shape
    if bitmask is not None:
        bits = torch.arange(32, dtype=torch.int32, device=scores.device)
        is_set = ((bitmask[:, :, None] >> bits) & 1).bool().reshape(num_rows, -1)[:, :vocab]
        scores.masked_fill_(~is_set, -torch.inf)

    def entries(starts: Tensor | None, values: Tensor | None, row: int) -> Tensor | None:
        if starts is None or values is None or starts[row] == starts[row + 1]:
            return None
        return values[int(starts[row]) : int(starts[row + 1])]

    def ids(starts: Tensor | None, values: Tensor | None, row: int) -> Tensor | None:
        found = entries(starts, values, row)
        return None if found is None else found.long()

    def scalar(values: Tensor | None, row: int, default: float) -> float:
        return default if values is None else float(values[row])

    for row in range(num_rows):
        bias, added = ids(bias_starts, bias_ids, row), entries(bias_starts, bias_values, row)
        output, counts = ids(output_starts, output_ids, row), entries(output_starts, output_counts, row)
        adjust_row(
            scores[row],
            allowed_ids=ids(allowed_starts, allowed_ids, row),
            banned_ids=ids(banned_starts, banned_ids, row),
            bias=None if bias is None or added is None else (bias, added),
            seen_ids=ids(seen_starts, seen_ids, row),
            repetition_penalty=scalar(repetition_penalty, row, 1.0),
            output=None if output is None or counts is None else (output, counts),
            frequency_penalty=scalar(frequency_penalty, row, 0.0),
            presence_penalty=scalar(presence_penalty, row, 0.0),
        )
    if temperature is not None:
        scores /= torch.where(temperature > 0, temperature, 1.0)[:, None]
    padded = torch.nn.functional.pad(scores, (0, -vocab % GROUP), value=-torch.inf)
    return scores, padded.view(num_rows, -1, GROUP).amax(-1)


@_by_parts
def sampling_cut(
    scores: Tensor, group_max: Tensor, top_k: Tensor, top_p: Tensor, log_min_p: Tensor
) -> tuple[Tensor, Tensor]:
    """The largest distance at which each row keeps tokens, by sorting.

    min-p keeps distances up to ``-log_min_p``. Top-k keeps those up to the k-th smallest. Top-p keeps a token while the
    mass of nearer tokens is below :func:`top_p_target` of the mass of all that min-p and top-k keep.

    Args:
        scores: ``[R, V]`` float32.
        group_max: ``[R, ceil(V / GROUP)]`` float32, not read here: kernels bound their search by it.
        top_k: ``[R]`` int32, 0 for off.
        top_p: ``[R]`` float32, 1 for off.
        log_min_p: ``[R]`` float32, minus infinity for off.

    Returns:
        ``[R]`` the largest score (NaN if the row holds one), ``[R]`` the distance, infinity if all are kept.
    """
    vocab = scores.shape[-1]
    row_max, distance = distances(scores)
    ordered = distance.sort(-1).values
    kth = ordered.gather(1, (top_k.long() - 1).clamp(0, vocab - 1)[:, None]).flatten()
    kth = torch.where((top_k > 0) & (top_k < vocab), kth, torch.inf)
    cut = torch.minimum(kth, -log_min_p)
    mass = token_mass(ordered).masked_fill(ordered > cut[:, None], 0)
    before = mass.cumsum(-1) - mass
    stays = before < top_p_target(top_p, mass.sum(-1))[:, None]
    last = ordered.gather(1, stays.sum(-1, keepdim=True).clamp(min=1) - 1).flatten()
    return row_max, torch.where(top_p < 1.0, torch.minimum(cut, last), cut)


@_by_parts
def sample_tokens(
    scores: Tensor, group_max: Tensor, row_max: Tensor, cut: Tensor, temperature: Tensor, keys: Tensor
) -> Tensor:
    """Draw a token from the softmax of each row's kept scores, or take the most likely one.

    Args:
        scores: ``[R, V]`` float32, already divided by the temperature.
        group_max: ``[R, ceil(V / GROUP)]`` float32, not read here: kernels skip groups of which nothing is kept.
        row_max: ``[R]`` float32, the largest score.
        cut: ``[R]`` float32, the largest distance from it that is kept.
        temperature: ``[R]`` float32, 0 for a greedy row.
        keys: ``[R, 2]`` int32, the hash of (seed, position).

    Returns:
        int64 ``[R]``: the smallest id among equally good ones, ``INVALID_TOKEN`` where ``row_max`` is NaN or minus
        infinity.
    """
    distance = distances(scores)[1]
    ids = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
    noise = gumbel_noise(ids[None], keys) * (temperature > 0)[:, None]
    drawn = (noise - distance).masked_fill(distance > cut[:, None], -torch.inf).argmax(-1)
    return torch.where(row_max > -torch.inf, drawn, INVALID_TOKEN)


def greedy_tokens(logits: Tensor) -> Tensor:
    """The most likely token of each row of ``logits [R, V]``: int64 ``[R]``.

    Equal to :func:`sample_tokens` of greedy rows, without scores in memory.
    """
    values, ids = logits.max(dim=-1)
    return torch.where(values > -torch.inf, ids, INVALID_TOKEN)  # a comparison with NaN is False


@_by_parts
def top_logprobs(logits: Tensor, token_ids: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of one given token a row and of the most likely ones.

    Args:
        logits: ``[R, V]``, any float dtype, as the model gave them.
        token_ids: ``[R]`` int64; the results of a row with ``INVALID_TOKEN`` mean nothing.
        count: how many of the most likely tokens, at most V.

    Returns:
        int64 ``[R, 1 + count]`` the given token, then the most likely ones, best first (equal ones by id); float32
        ``[R, 1 + count]`` their natural log-probabilities; int64 ``[R]`` 1 + number of tokens above the given one.
    """
    wide = logits.float()
    given = token_ids.clamp(min=0)[:, None]
    ordered = torch.sort(wide, dim=-1, descending=True, stable=True)
    ids = torch.cat([given, ordered.indices[:, :count]], 1)
    logprobs = wide.log_softmax(-1).gather(1, ids)
    return ids, logprobs, (wide > wide.gather(1, given)).sum(-1) + 1


def _fake_process_logits(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    groups = (vocab + GROUP - 1) // GROUP
    return logits.new_empty((rows, vocab), dtype=torch.float32), logits.new_empty((rows, groups), dtype=torch.float32)


def _fake_sampling_cut(scores: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape[0]), scores.new_empty(scores.shape[0])


def _fake_tokens(scores: Tensor, *_: object) -> Tensor:
    return scores.new_empty(scores.shape[0], dtype=torch.int64)


def _fake_top_logprobs(logits: Tensor, token_ids: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (logits.shape[0], 1 + count)
    ids = logits.new_empty(shape, dtype=torch.int64)
    return ids, logits.new_empty(shape, dtype=torch.float32), token_ids.new_empty(shape[0], dtype=torch.int64)


register(
    "process_logits(Tensor logits, Tensor? temperature, Tensor? bitmask, Tensor? allowed_starts, Tensor? allowed_ids,"
    " Tensor? banned_starts, Tensor? banned_ids, Tensor? bias_starts, Tensor? bias_ids, Tensor? bias_values,"
    " Tensor? seen_starts, Tensor? seen_ids, Tensor? repetition_penalty, Tensor? output_starts, Tensor? output_ids,"
    " Tensor? output_counts, Tensor? frequency_penalty, Tensor? presence_penalty) -> (Tensor, Tensor)",
    process_logits,
    _fake_process_logits,
)
register(
    "sampling_cut(Tensor scores, Tensor group_max, Tensor top_k, Tensor top_p, Tensor log_min_p) -> (Tensor, Tensor)",
    sampling_cut,
    _fake_sampling_cut,
)
register(
    "sample_tokens(Tensor scores, Tensor group_max, Tensor row_max, Tensor cut, Tensor temperature, Tensor keys)"
    " -> Tensor",
    sample_tokens,
    _fake_tokens,
)
register("greedy_tokens(Tensor logits) -> Tensor", greedy_tokens, _fake_tokens)
register(
    "top_logprobs(Tensor logits, Tensor token_ids, int count) -> (Tensor, Tensor, Tensor)",
    top_logprobs,
    _fake_top_logprobs,
)
