"""The sampling ops: exact sets, exact distributions, and one answer whatever the method."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_rows import assert_distribution, kept_probabilities, keys_of, random_limits, random_scores

from graphserve import kernels
from graphserve.kernels import sampling
from graphserve.kernels.sampling import distances, sampling_cut, token_mass, top_p_target
from graphserve.kernels.sampling_rules import GROUP, INVALID_TOKEN, hash_bits
from graphserve.runtime import sampler, step_input

kernels.register_all()
NOTHING = [None] * 16


def cut_by_search(scores, top_k, top_p, log_min_p):
    """The search of the GPU kernel for all rows at once: bits of the distance from the highest to the lowest."""
    codes = distances(scores)[1].abs().view(torch.int32).long()
    cut = (-log_min_p).abs().view(torch.int32).long()

    def search(amounts, target):
        found = torch.zeros_like(target)
        for bit in reversed(range(31)):
            tried = found | (1 << bit)
            before = torch.where(codes < tried[:, None], amounts, 0).sum(-1)
            found = torch.where(before < target, tried, found)
        return found

    mass = token_mass(codes.to(torch.int32).view(torch.float32))
    has_top_k = (top_k > 0) & (top_k < scores.shape[-1])
    cut = torch.where(has_top_k, torch.minimum(cut, search(torch.ones_like(codes), top_k)), cut)
    total = torch.where(codes <= cut[:, None], mass, 0).sum(-1)
    cut = torch.where(top_p < 1, torch.minimum(cut, search(mass, top_p_target(top_p, total))), cut)
    return cut.clamp(max=0x7F800000).to(torch.int32).view(torch.float32)


def check_rows(seed, rows, vocab):
    """One batch of random rows: all methods keep what the sort keeps."""
    generator = torch.Generator().manual_seed(seed)
    scores = random_scores(generator, rows, vocab)
    top_k, top_p, log_min_p = random_limits(generator, rows, vocab)
    cut = sampling_cut(scores, None, top_k, top_p, log_min_p)[1]
    distance = distances(scores)[1]
    kept = distance <= cut[:, None]
    assert torch.equal(distance <= cut_by_search(scores, top_k, top_p, log_min_p)[:, None], kept)
    near = distance.topk(min(20, vocab), largest=False).values
    among, is_decided = sampler.cut_among(near, distance, -log_min_p, top_k, top_p)
    assert torch.equal((distance <= among[:, None])[is_decided], kept[is_decided])
    for row in torch.nonzero(~is_decided).flatten().tolist():
        row_cut = sampler.cut_of_row(distance[row], -log_min_p[row], int(top_k[row]), top_p[row])
        assert torch.equal(distance[row] <= row_cut, kept[row])
    return scores, (top_k, top_p, log_min_p), kept


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from([1, 2, 20, 21, 130, 300]))
def test_search_histogram_and_candidates_keep_what_the_sort_keeps(seed, vocab):
    check_rows(seed, 16, vocab)


@pytest.mark.full
@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 400))
def test_a_hundred_thousand_rows_are_cut_alike(seed, vocab):
    check_rows(seed, 256, vocab)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from([3, 40, 300]))
def test_what_is_kept_is_the_textbook_definition(seed, vocab):
    """Against float64 softmax and sort. At the very edge of top-p and min-p, float32 may decide otherwise."""
    scores, (top_k, top_p, log_min_p), kept = check_rows(seed, 8, vocab)
    for row in range(8):
        k, p, m = int(top_k[row]), float(top_p[row]), float(log_min_p[row].exp())
        tight = kept_probabilities(scores[row], 1.0, k, max(p - 1e-5, 1e-9), min(m * (1 + 1e-5), 1.0)) > 0
        loose = kept_probabilities(scores[row], 1.0, k, p + 1e-5, m * (1 - 1e-5)) > 0
        nearly_none = distances(scores[row : row + 1])[1][0] > 26  # their probabilities vanish in a sum
        assert not (tight & ~kept[row] & ~nearly_none).any()
        assert not (kept[row] & ~loose & ~nearly_none).any()


def test_equally_likely_tokens_stay_or_go_together():
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    off = torch.tensor([-torch.inf])

    def kept(top_k, top_p):
        cut = sampling_cut(scores, None, torch.tensor([top_k]), torch.tensor([top_p]), off)[1]
        return (distances(scores)[1] <= cut)[0].tolist()

    assert kept(2, 1.0) == kept(3, 1.0) == kept(4, 1.0) == [True, False, True, True, True, False]
    assert kept(1, 1.0) == kept(0, 1e-9) == [True] + [False] * 5
    first = 1 / torch.exp(scores[0] - 3).sum()
    assert kept(0, float(first) - 1e-4) == [True] + [False] * 5
    assert kept(0, float(first) + 1e-4) == [True, False, True, True, True, False]


def test_the_hash_is_the_same_in_torch_numpy_and_plain_integers():
    ids = np.array([0, 1, 2, 31, 151_935, 262_207, 2**31 - 1], np.int32)
    for first, second in ((0, 0), (-1, 5), (2**31 - 1, -(2**31)), (123456789, -987654321)):
        with np.errstate(over="ignore"):
            by_numpy = hash_bits(ids, np.int32(first), np.int32(second))
        by_torch = hash_bits(torch.from_numpy(ids), torch.tensor(first, dtype=torch.int32), second)
        assert by_torch.tolist() == by_numpy.tolist()
        for token, bits in zip(ids.tolist(), by_numpy.tolist(), strict=True):
            h = (token * 0x9E3779B1 + first) % 2**32
            h ^= h >> 16
            h = h * 0x85EBCA6B % 2**32
            h ^= second % 2**32
            h ^= h >> 13
            h = h * 0xC2B2AE35 % 2**32
            h ^= h >> 16
            assert bits == h >> 1


SETTINGS = [
    {},
    {"temperature": 0.6},
    {"top_k": 7},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 1.3, "top_k": 30, "top_p": 0.8, "min_p": 0.02},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_draws_follow_the_exact_distribution(options):
    rows, vocab = 20_000, 60
    wanted = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(4)) * 2
    temperature = torch.full((rows,), wanted["temperature"])
    scores, group_max = torch.ops.gs.process_logits(logits.expand(rows, vocab), temperature, *NOTHING)
    top_k, top_p = torch.full((rows,), wanted["top_k"]), torch.full((rows,), wanted["top_p"])
    log_min_p = torch.full((rows,), wanted["min_p"]).log()
    row_max, cut = torch.ops.gs.sampling_cut(scores, group_max, top_k, top_p, log_min_p)
    tokens = torch.ops.gs.sample_tokens(scores, group_max, row_max, cut, temperature, keys_of(rows, 3))
    assert_distribution(tokens.tolist(), kept_probabilities(logits, **wanted))


def test_the_ops_sample_what_the_sampler_samples():
    rows, vocab = 48, 500
    generator = torch.Generator().manual_seed(11)
    logits = random_scores(generator, rows, vocab)
    top_k, top_p, log_min_p = random_limits(generator, rows, vocab)
    temperature = torch.tensor([0.0, 0.4, 1.0, 2.0]).repeat(rows // 4)
    keys = keys_of(rows, 5)
    scores, group_max = torch.ops.gs.process_logits(logits, temperature, *NOTHING)
    row_max, cut = torch.ops.gs.sampling_cut(scores, group_max, top_k, top_p, log_min_p)
    tokens = torch.ops.gs.sample_tokens(scores, group_max, row_max, cut, temperature, keys)
    step = step_input.SamplingInput(
        rows,
        is_greedy=False,
        temperature=temperature.numpy(),
        top_k=top_k.numpy(),
        top_p=top_p.numpy(),
        min_p=log_min_p.exp().numpy(),
        keys=keys.numpy().view(np.uint32),
    )
    assert sampler.Sampler()(logits.clone(), step).token_ids == tokens.tolist()
    assert INVALID_TOKEN == step_input.INVALID_TOKEN


def test_rows_without_a_possible_token_are_marked():
    scores = torch.zeros(4, 5)
    scores[0, 2] = torch.nan
    scores[1] = -torch.inf
    scores[3, 3] = torch.inf
    temperature = torch.ones(4)
    keep_all = (torch.zeros(4, dtype=torch.int64), torch.ones(4), torch.full((4,), -torch.inf))
    for limits in (keep_all, (torch.full((4,), 2), torch.full((4,), 0.5), keep_all[2])):
        row_max, cut = sampling_cut(scores, None, *limits)
        tokens = sampling.sample_tokens(scores, None, row_max, cut, temperature, keys_of(4)).tolist()
        assert tokens[:2] == [INVALID_TOKEN] * 2 and 0 <= tokens[2] < 5 and tokens[3] == 3
    assert sampling.greedy_tokens(scores).tolist() == [INVALID_TOKEN, INVALID_TOKEN, 0, 3]


def test_processed_logits_are_adjusted_as_the_sampler_adjusts():
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(1)) * 4
    ids = np.array
    adjustments = [
        step_input.LogitsAdjustment(0, allowed_ids=ids([4, 7, 299]), bias_ids=ids([7]), bias_values=ids([2.5], "f4")),
        step_input.LogitsAdjustment(1, banned_ids=ids([1, 2, 1]), repetition_penalty=1.7, seen_ids=ids([0, 9, 130])),
        step_input.LogitsAdjustment(
            2, frequency_penalty=0.3, presence_penalty=-0.2, output_ids=ids([5, 6]), output_counts=ids([1, 4], "f4")
        ),
    ]
    expected = logits.clone()
    for adjustment in adjustments:
        sampler.adjust_logits(expected[adjustment.row], adjustment)

    def starts(*counts):
        return torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)

    def tokens(*values):
        return torch.tensor(values, dtype=torch.int32)

    scores, group_max = torch.ops.gs.process_logits(
        logits,
        torch.tensor([1.0, 0.0, 0.5]),
        None,
        *(starts(3, 0, 0), tokens(4, 7, 299)),
        *(starts(0, 3, 0), tokens(1, 2, 1)),
        *(starts(1, 0, 0), tokens(7), torch.tensor([2.5])),
        *(starts(0, 3, 0), tokens(0, 9, 130), torch.tensor([1.0, 1.7, 1.0])),
        *(starts(0, 0, 2), tokens(5, 6), torch.tensor([1.0, 4.0])),
        *(torch.tensor([0.0, 0.0, 0.3]), torch.tensor([0.0, 0.0, -0.2])),
    )
    torch.testing.assert_close(scores, expected / torch.tensor([[1.0], [1.0], [0.5]]))
    assert group_max.shape == (3, 3)
    for group in range(3):
        assert torch.equal(group_max[:, group], scores[:, group * GROUP : (group + 1) * GROUP].amax(-1))


def test_the_bitmask_suppresses_the_tokens_whose_bit_is_clear():
    allowed = torch.rand(2, 70, generator=torch.Generator().manual_seed(2)) < 0.5
    words = torch.zeros(2, 3, dtype=torch.int64)
    for token in range(70):
        words[:, token // 32] |= allowed[:, token].long() << (token % 32)
    scores, _ = torch.ops.gs.process_logits(torch.zeros(2, 70), None, words.to(torch.int32), *NOTHING[1:])
    assert torch.equal(scores > -torch.inf, allowed)


def test_top_logprobs_are_those_of_the_sampler():
    logits = torch.randn(4, 90, generator=torch.Generator().manual_seed(3)) * 3
    given_ids = torch.tensor([5, 0, 89, 17])
    ids, logprobs, ranks = torch.ops.gs.top_logprobs(logits, given_ids, 6)
    for row in range(4):
        entry = sampler.top_logprobs(logits[row].log_softmax(-1), int(given_ids[row]), 6)
        assert entry.token_ids == ids[row].tolist() and entry.rank == int(ranks[row])
        assert entry.logprobs == pytest.approx(logprobs[row].tolist(), abs=1e-6)


@pytest.mark.parametrize("rows_at_a_time", [1, 3])
def test_references_that_take_some_rows_at_a_time_give_the_same(rows_at_a_time, monkeypatch):
    rows, vocab = 7, 200
    generator = torch.Generator().manual_seed(0)
    scores = random_scores(generator, rows, vocab)
    groups = torch.nn.functional.pad(scores, (0, -vocab % GROUP), value=-torch.inf).view(rows, -1, GROUP).amax(-1)
    top_k, *limits = random_limits(generator, rows, vocab)
    keys, temperature = keys_of(rows), torch.ones(rows)

    def run():
        row_max, cut = sampling_cut(scores, groups, top_k.int(), *limits)
        tokens = sampling.sample_tokens(scores, groups, row_max, cut, temperature, keys)
        return [row_max, cut, tokens, *sampling.top_logprobs(scores, tokens, 4)]

    whole = run()
    monkeypatch.setattr(sampling, "_MAX_LOGITS", rows_at_a_time * vocab + 1)
    assert all(torch.equal(a, b) for a, b in zip(run(), whole, strict=True))
    assert all(len(result) == rows for result in whole)


def test_shapes_are_known_without_computing():
    """Each op's shape function agrees with what it returns."""
    scores = torch.randn(3, 300)
    rows = torch.ones(3)
    calls = [
        (torch.ops.gs.process_logits, (scores.to(torch.bfloat16), rows, *NOTHING)),
        (torch.ops.gs.sampling_cut, (scores, torch.randn(3, 3), torch.ones(3, dtype=torch.int64), rows, rows)),
        (
            torch.ops.gs.sample_tokens,
            (scores, torch.randn(3, 3), rows, rows, rows, torch.ones(3, 2, dtype=torch.int32)),
        ),
        (torch.ops.gs.greedy_tokens, (scores,)),
        (torch.ops.gs.top_logprobs, (scores, torch.zeros(3, dtype=torch.int64), 4)),
    ]
    for op, args in calls:
        results = op(*args)
        fakes = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
        for result, fake in zip(*(r if isinstance(r, tuple) else (r,) for r in (results, fakes)), strict=True):
            assert (result.shape, result.dtype) == (fake.shape, fake.dtype), op
