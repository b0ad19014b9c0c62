"""The attention kernels in Triton's interpreter against the reference: every rule, ragged batches, padding, splits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton_attention_cases import AttentionCase, packed_case, paged_case
from triton_kernel_cases import assert_close

from graphserve.kernels.arg_spec import ArgSpec, Refusal
from graphserve.kernels.triton import TritonKernel, generate
from graphserve.kernels.triton.attention_form import Part, head_parts
from graphserve.kernels.triton.compile import interpret

# A padding sequence in the middle, a decode token, whole prompts, a later chunk of a prompt.
MIXED = [(1, 1), (1, 37), (5, 5), (0, 0), (17, 40), (1, 130), (66, 66)]
SHORT = [(1, 19), (9, 30), (1, 1)]
DECODE = [(1, 1), (1, 150), (1, 65), (0, 0)]
EVERY_RULE: dict[str, Any] = {"softcap": 5.0, "sinks": True, "alibi": True, "window": 9, "chunk": 24}

CASES = [
    paged_case("prefill, decode and padding in one step", MIXED, padding=3),
    paged_case("every rule at once", MIXED, padding=1, **EVERY_RULE),
    paged_case("queries sliced from a merged projection", SHORT, sliced_queries=True),
    paged_case("one query head a key head", SHORT, heads=2, kv_heads=2),
    paged_case("eight query heads a key head", SHORT, heads=8, kv_heads=1),
    paged_case("a group that is no power of two", SHORT, heads=10, kv_heads=2),
    paged_case("a group larger than a tile", SHORT, heads=130, kv_heads=1, k_dim=8),
    paged_case("window", MIXED, window=16),
    paged_case("window of one", SHORT, window=1),
    paged_case("chunk", MIXED, chunk=16),
    paged_case("soft cap", SHORT, softcap=2.0),
    paged_case("ALiBi", SHORT, alibi=True),
    paged_case("sinks", SHORT, sinks=True),
    paged_case("both directions", MIXED, causal=False, padding=2),
    paged_case("both directions in a window", MIXED, causal=False, window=7),
    paged_case("both directions in a chunk", MIXED, causal=False, chunk=24),
    paged_case("blocks of another size than a power of two", SHORT, block_size=5),
    paged_case("blocks larger than a tile", MIXED, block_size=256),
    paged_case("value heads of another size", SHORT, k_dim=24, v_dim=40),
    paged_case("a latent cache read once", SHORT, heads=3, kv_heads=1, k_dim=48, v_dim=32, latent=True,
               value_is_key_prefix=True),
    paged_case("a latent cache read twice", SHORT, heads=3, kv_heads=1, k_dim=48, v_dim=32, latent=True),
    paged_case("decode", DECODE, max_query_len=1, padding=2),
    paged_case("decode under every rule", DECODE, max_query_len=1, **EVERY_RULE),
    paged_case("decode with a group larger than a tile", DECODE, max_query_len=1, heads=65, kv_heads=1),
    paged_case("decode, split", DECODE, max_query_len=1, segments=3, padding=2),
    paged_case("decode, split, every rule", DECODE, max_query_len=1, segments=2, **EVERY_RULE),
    paged_case("decode, split, sinks", [(1, 600), (1, 3)], max_query_len=1, segments=4, sinks=True),
    paged_case("mixed, split", SHORT, segments=2, padding=3),
    packed_case("packed sequences", [3, 17, 70, 1], padding=2),
    packed_case("packed sequences in a window", [3, 66], window=5),
    packed_case("packed causal sequences", [20, 5], causal=True, softcap=3.0),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention_equals_the_reference(case: AttentionCase) -> None:
    case.check()


@pytest.mark.parametrize("dims", [(8, 8), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (576, 512)])
@pytest.mark.parametrize("decode", [{}, {"max_query_len": 1, "segments": 2}], ids=["mixed", "split"])
def test_every_head_size_equals_the_reference(dims: tuple[int, int], decode: dict[str, int]) -> None:
    lengths = [(1, 17), (1, 33)] if decode else [(1, 17), (3, 3)]
    shape = {"k_dim": dims[0], "v_dim": dims[1], "heads": 2, "kv_heads": 1}
    paged_case(f"head of {dims}", lengths, **shape, **decode).check()


@pytest.mark.parametrize("edge", [16, 64, 128])
def test_lengths_at_the_edges_of_blocks_and_tiles_equal_the_reference(edge: int) -> None:
    lengths = [(1, edge - 1), (1, edge), (1, edge + 1), (2, edge), (2, edge + 1)]
    paged_case("context edges", lengths, heads=1, kv_heads=1).check()
    paged_case("decode edges", lengths[:3], heads=1, kv_heads=1, max_query_len=1, segments=2).check()
    # One head a group: a program holds 128 query tokens.
    prompts = [(edge - 1, edge - 1), (edge, edge), (edge + 1, edge + 1)]
    paged_case("query edges", prompts, heads=1, kv_heads=1, padding=1).check()


@pytest.mark.parametrize("window", [15, 16, 17, 63, 64, 65])
def test_windows_and_chunks_at_the_edges_of_tiles_equal_the_reference(window: int) -> None:
    lengths = [(1, 130), (3, 66), (1, window), (1, window + 1)]
    for rule in ({"window": window}, {"chunk": window}):
        paged_case(f"edges of {rule}", lengths, heads=2, kv_heads=1, **rule).check()
    split = {"max_query_len": 1, "segments": 3, "window": window}
    paged_case("split window edges", [(1, 130), (1, window + 1)], heads=2, kv_heads=1, **split).check()


@pytest.mark.parametrize("decode", [{}, {"max_query_len": 1, "segments": 2}], ids=["mixed", "split"])
def test_half_precision_equals_the_reference_up_to_its_rounding(decode: dict[str, int]) -> None:
    lengths = DECODE if decode else MIXED
    paged_case("half precision", lengths, dtype=torch.float16, sinks=True, **decode).check(2e-3, 4e-3)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"], ids=["widened in integers", "widened by the processor"])
@pytest.mark.parametrize("decode", [{}, {"max_query_len": 1, "segments": 2}], ids=["mixed", "split"])
def test_a_scaled_8_bit_cache_equals_the_reference(target: str, decode: dict[str, int]) -> None:
    lengths = DECODE if decode else SHORT
    paged_case("8-bit cache", lengths, cache_dtype=torch.float8_e4m3fn, padding=1, **decode).check(target=target)


@pytest.mark.parametrize("out_dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("decode", [{}, {"max_query_len": 1, "segments": 2}], ids=["mixed", "split"])
def test_a_quantized_result_is_within_one_step_of_the_reference(out_dtype: torch.dtype, decode: dict[str, int]) -> None:
    case = paged_case("quantized", DECODE if decode else SHORT, out_dtype=out_dtype, padding=1, **decode)
    actual, expected = case.run()[0], case.expected()[0]
    assert actual.dtype == expected.dtype == out_dtype
    difference = (actual.float() - expected.float()).abs()
    step = torch.ones(())
    if out_dtype == torch.float8_e4m3fn:
        # An e4m3 number has 3 bits behind the point: neighbours are at most an eighth apart. The interpreter halves a
        # number that it rounds up to a power of two.
        step = expected.float().abs() / 8 + 2**-9
        difference = torch.where(2 * actual.float() == expected.float(), 0.0, difference)
    assert bool((difference <= step).all())
    assert (difference > 0).float().mean() < 0.05
    assert expected.float().abs().max() > 30, "the case must use the range it is meant to test"


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("decode", [{}, {"max_query_len": 1, "segments": 3}], ids=["mixed", "split"])
def test_rows_are_quantized_with_one_scale_over_all_heads(dtype: str, decode: dict[str, int]) -> None:
    lengths = DECODE if decode else SHORT
    case = paged_case("rows", lengths, rows_dtype=dtype, padding=1, heads=6, kv_heads=2, sinks=True, **decode)
    target = "cuda:80" if dtype == "float8_e4m3fn" else "cuda:90"  # its bits, which the interpreter rounds right
    kernels = case.kernels(target)
    assert [k.symbol.split("_")[-2] for k in kernels] == ["segment", "reduce"]
    (actual, scale), (expected, expected_scale) = case.run(target), case.expected()
    assert_close(scale, expected_scale, 1e-5, 1e-8)
    difference = (actual.float() * scale - expected.float() * expected_scale).abs()
    step = expected_scale if dtype == "int8" else expected.float().abs() * expected_scale / 8 + expected_scale * 2**-9
    assert bool((difference <= step * 1.001).all())
    assert (difference > step / 100).float().mean() < 0.05
    assert expected.float().abs().amax(-1)[:-1].min() > 126, "each row but the padding must use its whole range"


def test_splitting_the_keys_changes_the_result_by_rounding_only() -> None:
    whole = paged_case("split or whole", [(1, 700), (1, 1)], heads=2, kv_heads=1, max_query_len=1, sinks=True)
    expected = whole.run()[0]
    for segments in (2, 7, 16):
        split = replace(whole, attrs={**whole.attrs, "segments": segments})
        assert len(split.kernels()) == 2
        assert_close(split.run()[0], expected, 1e-5, 1e-6)


@pytest.mark.parametrize("attrs", [{}, {"segments": 4}, {"segments": 4, "max_query_len": 1}])
def test_a_sequence_gets_the_same_bits_alone_and_in_any_batch(attrs: dict[str, int]) -> None:
    batch = paged_case("invariance", [(1, 90), (1, 300), (1, 7)], heads=2, kv_heads=1, **attrs)
    together = batch.run()[0]
    for s in (0, 2):
        q, kv_k, kv_v, table, _, seq_lens = batch.args[:6]
        assert q is not None and table is not None and seq_lens is not None
        args = [q[s : s + 1], kv_k, kv_v, table[s : s + 1], torch.tensor([0, 1]).int(), seq_lens[s : s + 1], None, None]
        alone = replace(batch, args=args, scalars={**batch.scalars, "T": 1, "S": 1})
        assert torch.equal(alone.run()[0], together[s : s + 1])


@pytest.mark.parametrize("rule", [{"window": 20}, {"chunk": 48}, {"window": 20, "segments": 2, "max_query_len": 1}])
def test_blocks_out_of_sight_are_never_read(rule: dict[str, int]) -> None:
    query = 1 if "segments" in rule else 3
    case = paged_case("given away", [(query, 150), (query, 61)], heads=2, kv_heads=1, **rule)
    expected, table, seq_lens = case.expected()[0], case.args[3], case.args[5]
    assert table is not None and seq_lens is not None
    given_away = table.clone()
    for s, context in enumerate(seq_lens.tolist()):
        first = context - query - 20 + 1 if "window" in rule else (context - query) // 48 * 48
        assert first >= 16
        given_away[s, : first // 16] = 0  # the null block, which holds NaN here
    args = [*case.args[:3], given_away, *case.args[4:]]
    assert_close(replace(case, args=args).run()[0], expected)


def test_a_step_of_padding_alone_gets_zeros() -> None:
    assert not paged_case("nothing", [(0, 0), (0, 0)], padding=5).run()[0].any()
    assert not paged_case("nothing", [(0, 0)], padding=5, max_query_len=1, segments=2).run()[0].any()


def test_prefill_in_chunks_equals_prefill_at_once() -> None:
    whole = paged_case("chunked prefill", [(100, 100)], heads=2, kv_heads=1)
    q, kv_k, kv_v, table = whole.args[:4]
    assert q is not None
    expected = whole.run()[0]
    for first, last in ((0, 33), (33, 97), (97, 100)):
        starts, lens = torch.tensor([0, last - first]).int(), torch.tensor([last]).int()
        args = [q[first:last], kv_k, kv_v, table, starts, lens, None, None]
        part = replace(whole, args=args, scalars={**whole.scalars, "T": last - first})
        assert_close(part.run()[0], expected[first:last], 1e-5, 1e-6)


@pytest.mark.parametrize(
    ("rule", "right", "wrong"),
    [
        ({}, "key[None, :] <= last_key", "key[None, :] < last_key"),
        ({}, "key[None, :] <= last_key", "key[None, :] <= 1 + last_key"),
        ({"window": 16}, "WINDOW + 1", "WINDOW"),
        ({"chunk": 16}, "// CHUNK * CHUNK", "// CHUNK * CHUNK + 1"),
        ({"causal": False}, "is_key[None, :]", "(key >= 0)[None, :]"),
        ({"sinks": True}, "tl.full([BLOCK_M], 1.0", "tl.full([BLOCK_M], 0.0"),
        ({"segments": 2, "max_query_len": 1}, "segment * segment_tiles", "segment * segment_tiles + 1"),
    ],
)
def test_a_wrong_mask_is_caught_by_the_comparison(rule: dict[str, Any], right: str, wrong: str) -> None:
    lengths = [(1, 300), (1, 40)] if "segments" in rule else [(3, 40), (1, 61)]
    case = paged_case("wrong", lengths, **rule)
    kernels = case.kernels()
    assert right in kernels[0].source
    symbol = f"wrong_{abs(hash((right, wrong)))}"
    source = kernels[0].source.replace(right, wrong).replace(kernels[0].symbol, symbol)
    kernels[0] = msgspec.structs.replace(kernels[0], source=source, symbol=symbol)
    expected = case.expected()
    out = torch.full_like(expected[0], float("nan"))
    interpret(kernels, [*case.args, out], case.scalars)
    with pytest.raises(AssertionError):
        assert_close(out, expected[0])


@st.composite
def _batches(draw: st.DrawFn) -> AttentionCase:
    sequence = st.integers(1, 140).flatmap(
        lambda context: st.tuples(st.integers(0, min(context, 40)), st.just(context))
    )
    lengths = [(query, context if query else 0) for query, context in draw(st.lists(sequence, min_size=1, max_size=4))]
    group = draw(st.sampled_from([1, 2, 3]))
    rule = {
        "window": draw(st.sampled_from([0, 0, 1, 30, 64])),
        "chunk": draw(st.sampled_from([0, 0, 16, 50])),
        "softcap": draw(st.sampled_from([0.0, 3.0])),
        "causal": draw(st.booleans()),
        "segments": draw(st.sampled_from([1, 1, 3])),
        "sinks": draw(st.booleans()),
        "alibi": draw(st.booleans()),
    }
    block_size, padding = draw(st.sampled_from([3, 16, 32])), draw(st.integers(0, 3))
    return paged_case("any", lengths, heads=2 * group, block_size=block_size, padding=padding, **rule)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(_batches())
def test_any_batch_under_any_rule_equals_the_reference(case: AttentionCase) -> None:
    case.check()


@pytest.mark.full
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_batches())
def test_many_batches_under_any_rule_equal_the_reference(case: AttentionCase) -> None:
    case.check()


@pytest.mark.parametrize(
    ("dim", "widths"),
    [(8, [16]), (16, [16]), (40, [32, 16]), (64, [64]), (80, [64, 16]), (96, [64, 32]), (112, [128]), (576, [512, 64])],
)
def test_a_head_takes_few_columns_more_than_it_has(dim: int, widths: list[int]) -> None:
    parts = head_parts(dim, 16)
    assert [part.width for part in parts] == widths
    assert sum(part.size for part in parts) == dim and all(part.size <= part.width for part in parts)


def test_an_8_bit_head_is_padded_to_32_columns() -> None:
    assert head_parts(8, 32) == (Part(0, 8, 32),)


def _refusal(target: str = "cuda:90", **changes: Any) -> str:
    case = paged_case("refused", [(1, 4)], **changes)
    args = [None if a is None else case._spec(a, i) for i, a in enumerate(case.args)]
    result = generate(f"gs.{case.op}", case.attrs, args, [case._spec(case.expected()[0], "out")], target)
    assert isinstance(result, Refusal), result
    return result.reason


def test_what_the_kernel_does_not_cover_is_refused_by_name() -> None:
    assert "above 576" in _refusal(k_dim=600)
    assert "segments is 200" in _refusal(segments=200)
    assert "scale -1.0 must be positive" in _refusal(scale=-1.0)
    assert "cuda:80 has no float8_e4m3fn" in _refusal("cuda:80", out_dtype=torch.float8_e4m3fn)
    assert "no view of keys" in _refusal(k_dim=32, v_dim=16, value_is_key_prefix=True)
    assert "no whole part" in _refusal(heads=1, kv_heads=1, k_dim=48, v_dim=24, latent=True, value_is_key_prefix=True)


def test_an_8_bit_cache_without_scales_is_refused() -> None:
    cache = ArgSpec("float8_e4m3fn", ("num_blocks", 2, 16, 64))
    args = [ArgSpec("bfloat16", ("T", 4, 64)), cache, cache, ArgSpec("int32", ("S", "B_0")), ArgSpec("int32", ("S+1",))]
    attrs = {"scale": 0.1, "window": 0, "chunk": 0, "softcap": 0.0, "causal": True}
    out = [ArgSpec("bfloat16", ("T", 256))]
    result = generate("gs.paged_attention", attrs, [*args, ArgSpec("int32", ("S",)), None, None], out, "cuda:90")
    assert isinstance(result, Refusal) and "k_scale is absent" in result.reason


def test_the_grid_depends_on_bucket_limits_alone() -> None:
    (mixed,) = paged_case("grid", SHORT, heads=4, kv_heads=2).kernels()
    assert isinstance(mixed, TritonKernel) and mixed.grid == ("T // 64 + S + 1", 2, 1)
    assert mixed.scalars == ("T", "S", "B_0")
    segments, reduce = paged_case("grid", DECODE, max_query_len=1, segments=5).kernels()
    assert segments.grid == ("T", 2, 5) and reduce.grid == ("T", 4, 1)
    assert segments.scratch == reduce.scratch == f"T * {4 * 4 * 5 * 17}"
