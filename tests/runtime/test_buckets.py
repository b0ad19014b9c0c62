import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphserve.errors import ConfigError
from graphserve.runtime.buckets import Buckets, CaptureBuckets


def test_row_buckets_are_small_powers_then_steps_of_eight():
    assert Buckets(64).row_buckets == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert Buckets(20).row_buckets == (1, 2, 4, 8, 16, 20)
    assert Buckets(3).row_buckets == (1, 2, 3)
    assert Buckets(1).row_buckets == (1,)


def test_edges_of_the_buckets():
    buckets = Buckets(64)
    assert [buckets.rows(n) for n in (0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 63, 64, 65)] == [
        *(1, 1, 2, 4, 4, 8, 8, 16, 16, 24, 64, 64, 72)
    ]
    assert [buckets.tokens(n) for n in (1, 7, 8, 9, 511, 512, 513)] == [8, 8, 8, 16, 512, 512, 513]


def test_disabled_buckets_pad_nothing():
    buckets = Buckets(64, is_enabled=False)
    assert [buckets.rows(n) for n in (0, 3, 65)] == [1, 3, 65] and buckets.tokens(9) == 9


@given(st.integers(1, 300), st.integers(1, 600), st.integers(0, 700))
def test_padding_never_shrinks_and_never_exceeds_a_step(max_rows, max_padded, count):
    buckets = Buckets(max_rows, max_padded_tokens=max_padded)
    assert max(count, 1) <= buckets.rows(count) <= max(max_rows, count + 7, 2 * count)
    assert count <= buckets.tokens(count) < count + 8


def test_capture_buckets_are_few_and_fit_the_largest_step():
    buckets = CaptureBuckets(300)
    assert buckets.decode_sizes[:6] == (1, 2, 4, 8, 16, 24) and buckets.decode_sizes[-1] == 256
    assert CaptureBuckets(20).decode_sizes == (1, 2, 4, 8, 16, 20)
    assert CaptureBuckets(64, [1, 32, 16, 128]).decode_sizes == (1, 16, 32)
    assert [CaptureBuckets(64).mixed_rows(n) for n in (0, 8, 9, 33, 64, 65)] == [8, 8, 32, 64, 64, 72]
    assert [CaptureBuckets(4).mixed_rows(n) for n in (1, 4)] == [4, 4]
    assert [buckets.tokens(n) for n in (1, 8, 9, 257, 512, 513)] == [8, 8, 16, 320, 512, 513]


def test_which_sizes_are_captured():
    buckets = CaptureBuckets(64, [1, 8])
    assert buckets.is_captured(8, 8, 8) and buckets.is_captured(1, 1, 1)
    assert not buckets.is_captured(16, 16, 16), "not in the list"
    assert buckets.is_captured(512, 8, 8) and buckets.is_captured(96, 64, 32)
    assert not buckets.is_captured(513, 8, 8) and not buckets.is_captured(96, 64, 5)
    assert not CaptureBuckets(300).is_captured(264, 264, 264)


def test_a_decode_size_below_one_is_refused():
    with pytest.raises(ConfigError, match=r"decode sizes \[0, 8\] are not allowed: each must be at least 1"):
        CaptureBuckets(8, [0, 8])


@given(st.integers(1, 300), st.lists(st.integers(1, 400), max_size=5) | st.none(), st.integers(0, 700))
def test_capture_padding_never_shrinks_a_step(max_rows, sizes, count):
    buckets = CaptureBuckets(max_rows, sizes)
    assert buckets.tokens(count) >= count
    for pad in (buckets.rows, buckets.mixed_rows):
        assert pad(count) >= max(count, 1)
    if count in buckets.decode_sizes:
        assert buckets.rows(count) == count and buckets.is_captured(count, count, count)
