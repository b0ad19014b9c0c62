from hypothesis import given
from hypothesis import strategies as st

from graphserve.runtime.buckets import Buckets


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
