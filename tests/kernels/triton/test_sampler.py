"""The sampler's kernels in Triton's interpreter against the reference ops, and compiled against budgets."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampling_rows import assert_distribution, kept_probabilities, keys_of, random_limits, random_scores
from triton_kernel_cases import DEFAULT_TARGET, FULL_TARGETS, Case, check_budget, check_golden_source

from graphserve.kernels import sampling
from graphserve.kernels.arg_spec import ArgSpec, Call, Refusal
from graphserve.kernels.sampling_rules import GROUP, hash_bits
from graphserve.kernels.triton import TritonKernel, generate, sampler_cut, sampler_draw, sampler_logits, sampler_text
from graphserve.kernels.triton.kernel import KernelText

# The interpreter casts without checking; a NaN that a mask drops later is cast like any other value.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

NOTHING = [None] * 16
QWEN_VOCAB = 151_936


@pytest.fixture
def small_blocks(monkeypatch):
    """Splits a vocabulary of a few hundred tokens over several programs, chunks and steps."""
    monkeypatch.setattr(sampler_text, "BLOCK_TOKENS", GROUP)
    monkeypatch.setattr(sampler_cut, "_FEW", 64)
    monkeypatch.setattr(sampler_cut, "_MANY", 128)
    monkeypatch.setattr(sampler_cut, "_PASS", 128)
    monkeypatch.setattr(sampler_cut, "_GROUPS_AT_ONCE", 2)
    monkeypatch.setattr(sampler_logits, "_LIST_TOKENS", 16)


@pytest.fixture
def blocks_of_four_groups(small_blocks, monkeypatch):
    """A block has more groups than are drawn from in one step."""
    monkeypatch.setattr(sampler_text, "BLOCK_TOKENS", 4 * GROUP)
    monkeypatch.setattr(sampler_draw, "_GROUPS_AT_ONCE", 2)


def case(op, args, attrs=None):
    """A launch whose tensors have the step's rows in front; lists of token ids keep their length."""
    rows = args[0].shape[0]
    dynamic = {("out", 0): "R"}
    for index, arg in enumerate(args):
        if arg is not None and arg.shape[0] == rows:
            dynamic[index, 0] = "R"
        elif arg is not None and arg.shape[0] == rows + 1:
            dynamic[index, 0] = "R+1"
    return Case(op, op, attrs or {}, args, dynamic, {"R": rows, "T": 1, "S": 1})


def lists(rows, vocab, longest, generator):
    """(starts, ids) of distinct random ids for each row, the first row's list empty."""
    counts = torch.randint(0, longest, (rows,), generator=generator)
    counts[0] = 0
    ids = [torch.randperm(vocab, generator=generator)[:count] for count in counts]
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return starts.to(torch.int32), torch.cat([*ids, torch.zeros(40, dtype=torch.int64)]).to(torch.int32)


def all_adjustments(rows, vocab, generator):
    """Every argument of ``process_logits`` after the temperature."""

    def values(like=None):
        return torch.randn(rows if like is None else like.shape, generator=generator)

    bitmask = torch.randint(-(2**31), 2**31, (rows, -(-vocab // 32)), generator=generator).to(torch.int32)
    allowed = lists(rows, vocab, vocab, generator)
    banned = lists(rows, vocab, 20, generator)
    bias = lists(rows, vocab, 30, generator)
    seen = lists(rows, vocab, vocab, generator)
    output = lists(rows, vocab, 50, generator)
    counts = torch.randint(1, 9, output[1].shape, generator=generator).float()
    penalty = values().exp()
    return [bitmask, *allowed, *banned, *bias, values(bias[1]), *seen, penalty, *output, counts, values(), values()]


@pytest.mark.parametrize(
    "which", ["none", "temperature", "bitmask", "allowed", "banned", "bias", "seen", "output", "all"]
)
@pytest.mark.parametrize("vocab", [100, 300])
def test_logits_are_processed_as_the_reference_does(small_blocks, which, vocab):
    rows = 3
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    arguments = [torch.tensor([0.0, 0.7, 1.3]), *all_adjustments(rows, vocab, generator)]
    places = {"temperature": [0], "bitmask": [1], "allowed": [2, 3], "banned": [4, 5], "bias": [6, 7, 8]}
    places |= {"seen": [9, 10, 11], "output": [12, 13, 14, 15, 16], "all": list(range(17)), "none": []}
    chosen = [a if i in places[which] else None for i, a in enumerate(arguments)]
    # Penalties are a multiply and a subtraction, which a compiler may fuse: the last bit is not fixed.
    case("process_logits", [logits, *chosen]).check(relative=1e-6, absolute=1e-7)


def test_half_logits_and_their_nan_become_float_scores(small_blocks):
    logits = torch.randn(2, 260, generator=torch.Generator().manual_seed(1)).half()
    logits[0, 130], logits[1, 259] = torch.nan, -torch.inf
    scores, group_max = case("process_logits", [logits, None, *NOTHING]).run()
    assert torch.equal(scores.nan_to_num(nan=9.0), logits.float().nan_to_num(nan=9.0))
    assert group_max.isnan().tolist() == [[False, True, False], [False, False, False]]


def cut_case(seed, rows, vocab):
    generator = torch.Generator().manual_seed(seed)
    scores = random_scores(generator, rows, vocab)
    group_max = sampling.process_logits(scores, *[None] * 17)[1]
    return case("sampling_cut", [scores, group_max, *random_limits(generator, rows, vocab)])


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31 - 1), vocab=st.sampled_from([1, 90, 128, 300]))
def test_the_search_keeps_what_the_sort_keeps(small_blocks, seed, vocab):
    launch = cut_case(seed, 3, vocab)
    row_max, cut = launch.run()
    expected_max, expected = launch.expected()
    distance = sampling.distances(launch.args[0])[1]
    assert torch.equal(row_max, expected_max)
    assert torch.equal(distance <= cut[:, None], distance <= expected[:, None])


def test_each_limit_alone_and_with_the_others(small_blocks):
    limits = [(9, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.1), (9, 0.8, 0.0), (0, 0.8, 0.1), (9, 1.0, 0.7), (40, 0.8, 0.02)]
    top_k, top_p, min_p = (torch.tensor(column) for column in zip(*limits, strict=True))
    scores = torch.randn(1, 300, generator=torch.Generator().manual_seed(3)).expand(len(limits), 300).contiguous()
    group_max = sampling.process_logits(scores, *[None] * 17)[1]
    launch = case("sampling_cut", [scores, group_max, top_k, top_p, min_p.log()])
    cut, expected = launch.run()[1], launch.expected()[1]
    distance = sampling.distances(scores)[1]
    kept = (distance <= cut[:, None]).sum(-1).tolist()
    assert kept == (distance <= expected[:, None]).sum(-1).tolist()
    assert kept[0] == 9 and len(set(kept)) == len(kept), "each combination keeps another number of tokens"


@pytest.mark.full
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), vocab=st.integers(1, 2500))
def test_the_search_keeps_what_the_sort_keeps_at_its_own_sizes(seed, vocab):
    launch = cut_case(seed, 4, vocab)
    cut, expected = launch.run()[1], launch.expected()[1]
    distance = sampling.distances(launch.args[0])[1]
    assert torch.equal(distance <= cut[:, None], distance <= expected[:, None])


def test_flat_rows_overflow_the_registers_of_the_search(small_blocks):
    """More tokens are near than a search holds: the rest is read from memory, and ties go together."""
    generator = torch.Generator().manual_seed(8)
    flat = torch.randn(3, 400, generator=generator) * 0.01
    flat[1] = (flat[1] * 100).round()
    flat[2] = 5.0
    limits = [torch.tensor([0, 300, 0]), torch.tensor([0.9, 0.8, 0.5]), torch.full((3,), -torch.inf)]
    launch = case("sampling_cut", [flat, sampling.process_logits(flat, *[None] * 17)[1], *limits])
    cut, expected = launch.run()[1], launch.expected()[1]
    distance = sampling.distances(flat)[1]
    kept = distance <= expected[:, None]
    assert (kept.sum(-1) > 200).all() and kept[2].all()
    assert torch.equal(distance <= cut[:, None], kept)


def edge_rows(vocab):
    """Scores of rows that reach each way through the search."""
    generator = torch.Generator().manual_seed(vocab)
    scores = torch.randn(8, vocab, generator=generator) * 3
    scores[1] = 2.5  # every token ties, so every group is near
    scores[2, 130:150] += 40  # one group holds all that is near
    scores[3] = torch.where(torch.arange(vocab) % 100 == 7, 20.0, scores[3])  # ties in several groups
    scores[4, : vocab - 1] = -torch.inf  # only the last token, of a group that is not full
    scores[5, vocab // 2] = torch.nan
    scores[6] = -torch.inf
    scores[7, vocab - 1] = torch.inf
    return scores


@pytest.mark.parametrize("vocab", [897, pytest.param(1000, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "limits",
    [(1, 1.0), (2, 1.0), (-1, 1.0), (-1, 0.7), (0, 1e-9), (0, 0.5), (0, 1 - 2**-24), (30, 0.9), (30, 1e-9)],
    ids=str,
)
def test_the_cut_and_the_draw_at_their_edges(blocks_of_four_groups, vocab, limits):
    """Top-k of -1 stands for all tokens but one."""
    scores = edge_rows(vocab)
    rows = len(scores)
    group_max = sampling.process_logits(scores, *[None] * 17)[1]
    top_k = torch.full((rows,), limits[0] % vocab)
    launch = case("sampling_cut", [scores, group_max, top_k, torch.full((rows,), limits[1]), torch.zeros(rows).log()])
    (row_max, cut), (expected_max, expected) = launch.run(), launch.expected()
    assert torch.equal(row_max.nan_to_num(nan=99.0), expected_max.nan_to_num(nan=99.0))
    distance = sampling.distances(scores)[1]
    possible = row_max > -torch.inf
    assert torch.equal((distance <= cut[:, None])[possible], (distance <= expected[:, None])[possible])
    draw = case("sample_tokens", [scores, group_max, row_max, cut, torch.ones(rows), keys_of(rows, vocab)])
    draw.check()
    assert draw.run()[0][5:].tolist() == [-1, -1, vocab - 1]


def test_noise_is_drawn_for_every_group_when_nothing_is_cut(blocks_of_four_groups):
    scores = torch.randn(6, 1100, generator=torch.Generator().manual_seed(4)) * 0.1
    group_max = sampling.process_logits(scores, *[None] * 17)[1]
    limits = [scores.amax(-1), torch.full((6,), torch.inf)]
    launch = case("sample_tokens", [scores, group_max, *limits, torch.tensor([0.0, *[1.0] * 5]), keys_of(6, 11)])
    launch.check()
    assert len(set((launch.run()[0] // GROUP).tolist())) > 3, "tokens of several groups are drawn"


def interpreted_noise(ids, key):
    """Bits and noise of the kernel's own functions."""
    from graphserve.kernels.triton.compile import interpret

    spec = ArgSpec("int32", (len(ids),))
    text = KernelText(Call("noise", {}, [spec], [spec, ArgSpec("float32", (len(ids),))]))
    text.pointer("ids_ptr", 0)
    text.output("bits_ptr", 0)
    text.output("noise_ptr", 1)
    text.constants(N=len(ids), FIRST=key[0], SECOND=key[1])
    text.helper(sampler_text.hash_function())
    text.helper(sampler_text.GUMBEL_NOISE)
    kernel = text.build(
        """
        place = tl.arange(0, N)
        ids = tl.load(ids_ptr + place)
        first = tl.full([], FIRST, tl.int32)
        second = tl.full([], SECOND, tl.int32)
        tl.store(bits_ptr + place, hash_bits(ids, first, second))
        tl.store(noise_ptr + place, gumbel_noise(ids, first, second))
        """,
        (1, 1, 1),
        4,
    )
    bits, noise = torch.empty(len(ids), dtype=torch.int32), torch.empty(len(ids))
    interpret(kernel, [ids, bits, noise], {})
    return bits, noise


def test_the_hash_is_bit_equal_and_the_noise_equal_to_rounding():
    ids = torch.arange(1 << 16, dtype=torch.int32)
    key = keys_of(3, 9)[2].tolist()
    bits, noise = interpreted_noise(ids, key)
    keys = torch.tensor([key], dtype=torch.int32)
    assert torch.equal(bits, hash_bits(ids, keys[0, 0], keys[0, 1]))
    assert (noise - sampling.gumbel_noise(ids[None], keys)[0]).abs().max() < 3e-6
    u = (bits.double() + 0.5) * 2.0**-31
    exact = -torch.log(-torch.log1p(-u))
    # Where u is near 1 its float32 value is coarse, in torch too; such tokens have the smallest noise and lose.
    assert (noise - exact)[u < 0.99].abs().max() < 3e-6


def test_the_kernel_has_the_text_of_the_hash():
    lines = [line.split("#")[0].strip() for line in inspect.getsource(hash_bits).splitlines()]
    assert [line.strip() for line in sampler_text.hash_function().splitlines()[2:]] == lines[-8:]


def draw_case(rows, vocab, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = random_scores(generator, rows, vocab)
    temperature = torch.tensor([0.0, 1.0, 0.5, 2.0]).repeat(rows)[:rows]
    scores, group_max = sampling.process_logits(logits, temperature, *NOTHING)
    row_max, cut = sampling.sampling_cut(scores, group_max, *random_limits(generator, rows, vocab))
    return case("sample_tokens", [scores, group_max, row_max, cut, temperature, keys_of(rows, 2)])


@pytest.mark.parametrize("vocab", [1, 100, 300])
def test_tokens_are_those_of_the_reference(small_blocks, vocab):
    draw_case(12, vocab, seed=vocab).check()


def test_impossible_rows_and_infinite_logits(small_blocks):
    scores = torch.zeros(5, 200)
    scores[0, 150], scores[1], scores[3, 130], scores[4, :129] = torch.nan, -torch.inf, torch.inf, -torch.inf
    group_max = sampling.process_logits(scores, *[None] * 17)[1]
    limits = [torch.tensor([3, 3, 3, 3, 3]), torch.full((5,), 0.5), torch.full((5,), -torch.inf)]
    row_max, cut = case("sampling_cut", [scores, group_max, *limits]).run()
    [tokens] = case("sample_tokens", [scores, group_max, row_max, cut, torch.ones(5), keys_of(5)]).run()
    assert (
        tokens.tolist() == sampling.sample_tokens(scores, group_max, row_max, cut, torch.ones(5), keys_of(5)).tolist()
    )
    assert tokens.tolist()[:2] == [-1, -1] and tokens[3] == 130 and tokens[4] >= 129
    [greedy] = case("greedy_tokens", [scores]).run()
    assert greedy.tolist() == [-1, -1, 0, 130, 129]


def test_greedy_takes_the_first_of_equal_logits(small_blocks):
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(2)).round().half()
    case("greedy_tokens", [logits]).check()
    [tokens] = case("greedy_tokens", [logits]).run()
    assert tokens.tolist() == [int((row == row.max()).nonzero()[0]) for row in logits]


@pytest.mark.parametrize(("vocab", "count"), [(300, 5), (100, 0), (5, 5), (300, 20)])
def test_logprobs_are_those_of_the_reference(small_blocks, vocab, count):
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(count)) * 3
    logits[1] = logits[1].round()  # ties are reported by id
    case("top_logprobs", [logits, torch.tensor([vocab - 1, 0, vocab // 2])], {"count": count}).check()


def test_suppressed_tokens_are_reported_once_each(small_blocks):
    logits = torch.full((1, 150), -torch.inf)
    logits[0, 140] = 1.0
    ids, logprobs, ranks = case("top_logprobs", [logits, torch.tensor([140])], {"count": 4}).run()
    assert ids.tolist() == [[140, 140, 0, 1, 2]] and ranks.tolist() == [1]
    assert logprobs.tolist() == [[0.0, 0.0] + [-np.inf] * 3]


def pipeline(logits, temperature, limits, keys):
    """Tokens from logits, every kernel in the interpreter."""
    scores, group_max = case("process_logits", [logits, temperature, *NOTHING]).run()
    row_max, cut = case("sampling_cut", [scores, group_max, *limits]).run()
    return case("sample_tokens", [scores, group_max, row_max, cut, temperature, keys]).run()[0]


def test_fixed_logits_in_permuted_batches_give_identical_tokens(small_blocks):
    rows = 5
    generator = torch.Generator().manual_seed(5)
    logits = random_scores(generator, rows, 200)
    temperature = torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0])
    limits, keys = random_limits(generator, rows, 200), keys_of(rows, 4)
    together = pipeline(logits, temperature, limits, keys)
    order = torch.randperm(rows, generator=generator)
    permuted = pipeline(logits[order], temperature[order], [x[order] for x in limits], keys[order])
    assert permuted.tolist() == together[order].tolist()
    for row in (1, 4):
        alone = pipeline(*(x[row : row + 1] for x in (logits, temperature)), [x[[row]] for x in limits], keys[[row]])
        assert alone.tolist() == [int(together[row])]


@pytest.mark.full
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"temperature": 1.4, "top_p": 0.8, "min_p": 0.05}], ids=str)
def test_kernels_draw_from_the_exact_distribution(options):
    rows = 1000
    wanted = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}
    logits = torch.randn(24, generator=torch.Generator().manual_seed(6)) * 1.5
    one_row = (logits[None], torch.full((1,), wanted["temperature"]))
    scores, group_max = case("process_logits", [*one_row, *NOTHING]).run()
    limits = [torch.tensor([wanted["top_k"]]), torch.tensor([wanted["top_p"]]), torch.tensor([wanted["min_p"]]).log()]
    row_max, cut = case("sampling_cut", [scores, group_max, *limits]).run()
    repeated = [x.repeat(rows, *[1] * (x.dim() - 1)) for x in (scores, group_max, row_max, cut, one_row[1])]
    [tokens] = case("sample_tokens", [*repeated, keys_of(rows, 7)]).run()
    assert_distribution(tokens.tolist(), kept_probabilities(logits, **wanted))


F32, I32, I64 = (lambda *shape, dtype=dtype: ArgSpec(dtype, shape) for dtype in ("float32", "int32", "int64"))


def serving_kernels(name, target=DEFAULT_TARGET, vocab=QWEN_VOCAB):
    """The kernels of one op as a server launches them."""
    groups, starts, tokens = -(-vocab // GROUP), I32("R+1"), 1 << 16
    logits, scores, rows = ArgSpec("bfloat16", ("R", vocab)), F32("R", vocab), F32("R")
    sparse = [starts, I32(tokens)]
    penalties = [*sparse, *sparse, *sparse, F32(tokens), *sparse, rows, *sparse, F32(tokens), rows, rows]
    calls = {
        "process_logits": ([logits, rows, *NOTHING], [scores, F32("R", groups)]),
        "process_logits-adjusted": (
            [logits, rows, I32("R", -(-vocab // 32)), *penalties],
            [scores, F32("R", groups)],
        ),
        "sampling_cut": ([scores, F32("R", groups), I64("R"), rows, rows], [rows, rows]),
        "sample_tokens": ([scores, F32("R", groups), rows, rows, rows, I32("R", 2)], [I64("R")]),
        "greedy_tokens": ([logits], [I64("R")]),
        "top_logprobs": ([logits, I64("R")], [I64("R", 21), F32("R", 21), I64("R")]),
    }
    args, outputs = calls[name]
    attrs = {"count": 20} if name == "top_logprobs" else {}
    kernels = generate(name.partition("-")[0], attrs, args, outputs, target)
    assert not isinstance(kernels, Refusal), kernels
    return [kernels] if isinstance(kernels, TritonKernel) else kernels


OPS = ["process_logits", "process_logits-adjusted", "sampling_cut", "sample_tokens", "greedy_tokens", "top_logprobs"]


@pytest.mark.parametrize(
    "target", [DEFAULT_TARGET, *(pytest.param(target, marks=pytest.mark.full) for target in FULL_TARGETS)]
)
@pytest.mark.parametrize("name", OPS)
def test_compiled_kernels_stay_within_budget(name, target):
    for number, kernel in enumerate(serving_kernels(name, target)):
        check_budget(f"{name}.{number}", kernel, target, "budgets_sampler")


@pytest.mark.full
@pytest.mark.parametrize("vocab", [50_257, 262_208])
@pytest.mark.parametrize("name", OPS)
def test_other_vocabularies_compile_without_spills(name, vocab):
    from graphserve.kernels.triton.compile import compile_for

    for kernel in serving_kernels(name, vocab=vocab):
        assert compile_for(kernel, DEFAULT_TARGET).num_spills == 0


def test_the_text_is_that_of_the_golden_files():
    for name in OPS:
        for number, kernel in enumerate(serving_kernels(name)):
            check_golden_source(f"{name.replace('-', '_')}_{number}", kernel)


def test_grids_and_scratch_depend_on_the_bucket_alone():
    block, reduce = serving_kernels("sample_tokens")
    assert block.grid == ("R", 38, 1) and reduce.grid == ("R", 1, 1) and block.scratch == reduce.scratch
    for name in OPS:
        for kernel in serving_kernels(name):
            assert kernel.scalars == ()  # rows are told apart by the grid


@pytest.mark.parametrize(
    ("op", "change", "reason"),
    [
        ("sampling_cut", (2, I32("R")), "top_k is int32 .*: contiguous int64"),
        ("sampling_cut", (1, F32("R", 3)), r"group_max is float32 \['R', 3\]"),
        ("sample_tokens", (5, ArgSpec("int32", ("R", 2), (4, 1))), "keys is .* with strides"),
        ("greedy_tokens", (0, I64("R", 100)), "logits is int64: this kernel takes"),
        ("greedy_tokens", (0, F32("R", 2**21)), "at most 1048576 tokens"),
        ("greedy_tokens", (0, F32("R", "T")), "must be a constant"),
        ("greedy_tokens", (0, ArgSpec("float32", ("R", 100), (1, 100))), "contiguous in its last dimension"),
    ],
)
def test_launches_that_are_not_covered_are_refused(op, change, reason):
    specs = {
        "sampling_cut": ([F32("R", 500), F32("R", 4), I64("R"), F32("R"), F32("R")], [F32("R"), F32("R")]),
        "sample_tokens": ([F32("R", 500), F32("R", 4), *[F32("R")] * 3, I32("R", 2)], [I64("R")]),
        "greedy_tokens": ([F32("R", 500)], [I64("R")]),
    }
    args, outputs = specs[op]
    assert not isinstance(generate(op, {}, args, outputs, DEFAULT_TARGET), Refusal)
    changed = [change[1] if i == change[0] else arg for i, arg in enumerate(args)]
    refusal = generate(op, {}, changed, outputs, DEFAULT_TARGET)
    assert isinstance(refusal, Refusal)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(refusal.reason)


def test_more_logprobs_than_are_taken_one_by_one_are_refused():
    outputs = [I64("R", 101), F32("R", 101), I64("R")]
    refusal = generate("top_logprobs", {"count": 100}, [F32("R", 500), I64("R")], outputs, DEFAULT_TARGET)
    assert isinstance(refusal, Refusal) and "count is 100: 0 to 64 of 500 tokens are served" in refusal.reason


def test_generating_imports_neither_triton_nor_torch():
    code = (
        "import sys; from graphserve.kernels.triton import generate;"
        "from graphserve.kernels.arg_spec import ArgSpec as A;"
        "row = A('float32', ('R',)); scores = A('float32', ('R', 300)); keys = A('int32', ('R', 2));"
        "groups = A('float32', ('R', 3));"
        "k = generate('sample_tokens', {}, [scores, groups, row, row, row, keys], [A('int64', ('R',))], 'cuda:90');"
        "assert len(k) == 2, k; bad = {'triton', 'torch'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
