"""How plain torch cuts attention into parts that fit into memory, and what a part takes. Without torch."""

from __future__ import annotations

from typing import NamedTuple

# What a part may take, so that a long prompt can run where no kernel was built. It takes more only where the keys of
# one head and one query need more.
PART_BYTES = 256 << 20


class Part(NamedTuple):
    """What of a sequence's attention is computed at a time."""

    num_kv_heads: int
    num_queries: int


class AttentionShape(NamedTuple):
    """Heads of an attention layer."""

    num_heads: int
    num_kv_heads: int
    k_dim: int
    v_dim: int

    def part(self, num_queries: int, num_keys: int) -> Part:
        """As much of a sequence as fits: keys and values may take half of it, scores get the rest."""
        heads = PART_BYTES // 2 // self._key_bytes(1, num_keys)
        heads = min(max(heads, 1), self.num_kv_heads)
        queries = (PART_BYTES - self._key_bytes(heads, num_keys)) // self._query_bytes(heads, num_keys)
        return Part(heads, min(max(queries, 1), num_queries))

    def most_bytes(self, num_queries: int, num_keys: int) -> int:
        """What the largest part of sequences with up to so many queries and keys takes beside the result."""
        heads = self.num_kv_heads
        whole = self._key_bytes(heads, num_keys) + num_queries * self._query_bytes(heads, num_keys)
        least = self._key_bytes(1, num_keys) + self._query_bytes(1, num_keys)
        return min(whole, max(PART_BYTES, least))

    def _key_bytes(self, num_kv_heads: int, num_keys: int) -> int:
        """Keys and values in fp32, and one of them once more while it is made."""
        return 4 * num_kv_heads * num_keys * (self.k_dim + self.v_dim + max(self.k_dim, self.v_dim))

    def _query_bytes(self, num_kv_heads: int, num_keys: int) -> int:
        """Of one query: its scores, with the result of the softmax or with the mask; itself and its result, twice."""
        heads = num_kv_heads * self.num_heads // self.num_kv_heads
        return num_keys * (4 * heads + max(4 * heads, 24)) + 8 * heads * (self.k_dim + self.v_dim)
