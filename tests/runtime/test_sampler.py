"""The sampler against the exact distribution and against a reference that sorts the whole row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_rows import assert_distribution, kept_probabilities

from graphserve.kernels.sampling import gumbel_noise
from graphserve.runtime.sampler import NUM_CANDIDATES, Sampler
from graphserve.runtime.step_input import (
    ALL_LOGPROBS,
    INVALID_TOKEN,
    NO_LOGPROBS,
    LogitsAdjustment,
    PromptLogprobsRows,
    SamplingInput,
    sampling_keys,
    splitmix64,
)


def sampling(num_rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds=None, positions=None, **more):
    def column(value, dtype):
        return np.broadcast_to(np.asarray(value, dtype), num_rows).copy()

    seeds = list(range(num_rows)) if seeds is None else seeds
    positions = [0] * num_rows if positions is None else positions
    return SamplingInput(
        num_rows,
        is_greedy=False,
        temperature=column(temperature, np.float32),
        top_k=column(top_k, np.int64),
        top_p=column(top_p, np.float32),
        min_p=column(min_p, np.float32),
        keys=sampling_keys(seeds, positions),
        **more,
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.3, "top_k": 30, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab", [50, 1000])
@pytest.mark.parametrize("varies", ["seed", "position"])
def test_draws_follow_the_exact_distribution(options, vocab, varies):
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    num = 20_000
    numbers = list(range(num))
    given_ = (
        {"seeds": numbers, "positions": [9] * num} if varies == "seed" else {"seeds": [7] * num, "positions": numbers}
    )
    tokens = Sampler()(logits.expand(num, vocab), sampling(num, **options, **given_)).token_ids
    assert_distribution(
        tokens, kept_probabilities(logits, **{"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, **options})
    )


def test_the_distribution_check_notices_a_wrong_one():
    probs = torch.softmax(torch.randn(50, generator=torch.Generator().manual_seed(1)), -1).double()
    wrong = torch.multinomial(probs**1.1, 20_000, replacement=True, generator=torch.Generator().manual_seed(2))
    with pytest.raises(AssertionError):
        assert_distribution(wrong.tolist(), probs)


def test_noise_of_neighbouring_keys_and_tokens_is_uncorrelated():
    keys = torch.from_numpy(sampling_keys(list(range(64)), [3] * 64).view("int32"))
    noise = gumbel_noise(torch.arange(20_000, dtype=torch.int32)[None], keys)
    assert torch.isfinite(noise).all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.01) and noise.var() == pytest.approx(1.6449, abs=0.02)
    rows = torch.corrcoef(noise) - torch.eye(64)
    assert rows.abs().max() < 5 / 20_000**0.5
    neighbours = torch.corrcoef(torch.stack([noise[:, :-1].flatten(), noise[:, 1:].flatten()]))[0, 1]
    assert abs(neighbours) < 5 / noise.numel() ** 0.5
    # Rows whose first key words differ by the token stride, the case that the second word is there for.
    stride = torch.tensor([[5, 1], [5 - 1640531535, 2]], dtype=torch.int32)
    shifted = gumbel_noise(torch.arange(1000, dtype=torch.int32)[None], stride)
    assert not torch.equal(shifted[0, :-1], shifted[1, 1:]) and not torch.equal(shifted[0, 1:], shifted[1, :-1])


rows_of_options = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        st.sampled_from([0, 1, 3, NUM_CANDIDATES, NUM_CANDIDATES + 1, 700]),
        st.sampled_from([1.0, 0.01, 0.5, 0.99]),
        st.sampled_from([0.0, 0.05, 1.0]),
        st.integers(-(2**63), 2**63 - 1),
        st.integers(0, 10_000),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(rows_of_options, st.randoms(use_true_random=False), st.sampled_from([3, 200, 900]), st.booleans())
def test_a_row_depends_on_nothing_but_itself(options, rng, vocab, has_ties):
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    logits = torch.randn(len(options), vocab, generator=generator) * 3
    if has_ties:
        logits = logits.round()

    def sample(order):
        columns = list(zip(*(options[i] for i in order), strict=True))
        temperature, top_k, top_p, min_p, seeds, positions = columns
        step = sampling(len(order), temperature, top_k, top_p, min_p, list(seeds), list(positions))
        return Sampler()(logits[list(order)], step).token_ids

    together = sample(range(len(options)))
    order = list(range(len(options)))
    rng.shuffle(order)
    assert sample(order) == [together[i] for i in order]
    for i, (temperature, top_k, top_p, min_p, _, _) in enumerate(options):
        assert sample([i]) == [together[i]]
        if temperature == 0.0:
            assert together[i] == int(logits[i].argmax())
        else:
            probs = kept_probabilities(logits[i], temperature, top_k, top_p, min_p)
            # At the edge of top-p, float32 and the float64 reference may disagree about one token.
            loose = kept_probabilities(logits[i], temperature, top_k, min(1.0, top_p + 1e-5), min_p)
            assert probs[together[i]] > 0 or loose[together[i]] > 0


def test_candidates_and_the_whole_row_give_the_same_tokens(monkeypatch):
    logits = torch.randn(400, 1200, generator=torch.Generator().manual_seed(3)) * 2
    step = sampling(400, top_k=[0, 5, 300, 0] * 100, top_p=[0.3, 0.9, 0.8, 0.99] * 100)
    tokens = Sampler()(logits, step).token_ids
    monkeypatch.setattr("graphserve.runtime.sampler.NUM_CANDIDATES", 1200)
    assert Sampler()(logits, step).token_ids == tokens


def test_positions_and_seeds_change_the_draw():
    logits = torch.zeros(200, 1000)
    by_position = Sampler()(logits, sampling(200, seeds=[1] * 200, positions=list(range(200)))).token_ids
    by_seed = Sampler()(logits, sampling(200, seeds=list(range(200)), positions=[1] * 200)).token_ids
    assert len(set(by_position)) > 150 and len(set(by_seed)) > 150


def test_greedy_leaves_the_logits_alone():
    logits = torch.randn(4, 30, dtype=torch.bfloat16)
    before = logits.clone()
    assert Sampler()(logits, SamplingInput(3)).token_ids == before[:3].float().argmax(-1).tolist()
    assert torch.equal(logits, before)


def test_rows_without_a_possible_token_are_marked():
    logits = torch.zeros(4, 5)
    logits[0, 2] = torch.nan
    logits[1] = -torch.inf
    logits[3, 1:] = -torch.inf
    for step in (SamplingInput(4), sampling(4), sampling(4, top_k=2)):
        tokens = Sampler()(logits.clone(), step).token_ids
        assert tokens[:2] == [INVALID_TOKEN] * 2 and 0 <= tokens[2] < 5 and tokens[3] == 0


def test_adjustments_follow_their_definitions():
    logits = torch.tensor([[1.0, 2.0, -1.0, 4.0, 0.5]])
    ids = np.array
    cases = [
        (LogitsAdjustment(0, allowed_ids=ids([0, 4])), [1.0, -np.inf, -np.inf, -np.inf, 0.5]),
        (LogitsAdjustment(0, banned_ids=ids([3, 3, 1])), [1.0, -np.inf, -1.0, -np.inf, 0.5]),
        (
            LogitsAdjustment(0, bias_ids=ids([2, 0]), bias_values=np.array([5.0, -1.0], np.float32)),
            [0.0, 2.0, 4.0, 4.0, 0.5],
        ),
        (LogitsAdjustment(0, repetition_penalty=2.0, seen_ids=ids([1, 2])), [1.0, 1.0, -2.0, 4.0, 0.5]),
        (
            LogitsAdjustment(
                0,
                frequency_penalty=0.5,
                presence_penalty=0.25,
                output_ids=ids([1, 3]),
                output_counts=np.array([1, 3], np.float32),
            ),
            [1.0, 1.25, -1.0, 2.25, 0.5],
        ),
    ]
    for adjustment, expected in cases:
        given_ = logits.clone()
        token = Sampler()(given_, SamplingInput(1, adjustments=[adjustment])).token_ids[0]
        assert given_[0].tolist() == pytest.approx(expected)
        assert token == int(np.argmax(expected))


def test_an_adjusted_row_leaves_its_neighbours_alone():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    best = logits.argmax(-1).tolist()
    step = SamplingInput(3, adjustments=[LogitsAdjustment(1, banned_ids=np.array([best[1]]))])
    tokens = Sampler()(logits.clone(), step).token_ids
    assert tokens[0] == best[0] and tokens[2] == best[2] and tokens[1] != best[1]


def test_logprobs_are_raw_and_ranked():
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(5))
    raw = logits.log_softmax(-1)
    counts = [3, NO_LOGPROBS, 0, ALL_LOGPROBS]
    adjustments = [LogitsAdjustment(0, banned_ids=np.array([int(raw[0].argmax())]))]
    output = Sampler()(logits.clone(), sampling(4, temperature=2.0, num_logprobs=counts, adjustments=adjustments))
    assert output.logprobs is not None and output.logprobs[1] is None
    for row, length in ((0, 4), (2, 1), (3, 31)):
        entry, token = output.logprobs[row], output.token_ids[row]
        assert entry is not None and len(entry.token_ids) == len(entry.logprobs) == length
        assert entry.token_ids[0] == token and entry.logprobs[0] == pytest.approx(float(raw[row, token]), abs=1e-5)
        assert entry.token_ids[1:] == raw[row].sort(descending=True).indices[: length - 1].tolist()
        assert entry.rank == int((raw[row] > raw[row, token]).sum()) + 1
    assert output.logprobs[0].rank > 1


def test_prompt_rows_report_their_targets():
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(6))
    rows = PromptLogprobsRows(sequence=3, first_row=2, target_ids=np.array([7, 0, 11]), num_logprobs=2)
    output = Sampler()(logits, SamplingInput(1, prompt_logprobs=[rows]))
    assert len(output.token_ids) == 1
    for i, (entry, target) in enumerate(zip(output.prompt_logprobs[3], [7, 0, 11], strict=True)):
        raw = logits[2 + i].log_softmax(-1)
        assert entry.token_ids == [target, *raw.topk(2).indices.tolist()]
        assert entry.logprobs[0] == pytest.approx(float(raw[target]), abs=1e-6)


def test_a_step_that_samples_nothing_gives_nothing():
    assert Sampler()(torch.zeros(1, 4), SamplingInput(0)).token_ids == []


def test_keys_are_those_of_splitmix64():
    # First outputs of the published generator for state 0 and 1234567.
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(1234567) == 6457827717110365317
    keys = sampling_keys([5, -1], [2, 2])
    assert int(keys[0, 0]) | int(keys[0, 1]) << 32 == splitmix64(splitmix64(5) ^ 2)
    assert int(keys[1, 0]) | int(keys[1, 1]) << 32 == splitmix64(splitmix64(2**64 - 1) ^ 2)
