// Rows of a table by index.
template <class T, class Id, int64_t H, class TableRows, class OutRows>
GS_INLINE void gather_rows(const T* table, const Id* ids, T* out, int64_t n, int64_t threads) {
  parallel_for(threads, n, 16384 / H + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      memcpy(OutRows().at(out, i), TableRows().at(table, int64_t(ids[i])), H * sizeof(T));
  });
}

// The same from a weight packed for `linear` ([V/16][H/2][16][2] bf16 or [V/16][H][16] fp32).
template <class T, class Id, int64_t H, class OutRows>
GS_INLINE void gather_packed_rows(const char* packed, const Id* ids, T* out, int64_t n, int64_t threads) {
  constexpr int64_t GROUP = 4 / sizeof(T);
  parallel_for(threads, n, 2048 / H + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t id = int64_t(ids[i]);
      const T* panel = reinterpret_cast<const T*>(packed + id / 16 * ((H + GROUP - 1) / GROUP * 64));
      T* row = OutRows().at(out, i);
      for (int64_t h = 0; h < H; ++h) row[h] = panel[h / GROUP * (16 * GROUP) + id % 16 * GROUP + h % GROUP];
    }
  });
}
