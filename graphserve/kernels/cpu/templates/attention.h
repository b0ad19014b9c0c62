// Attention over the paged cache with an online softmax (Milakov & Gimelshein 2018; Dao 2022, algorithm 1).
//
// One task is a tile: some query tokens of one sequence with all query heads of one KV head (of all KV heads, for
// single-token queries), over a range of keys.
// Keys are taken KEYS at a time; each block's K is transposed once ([dword of the head][key]) and serves every row of
// the tile, so scores have keys in lanes and need no horizontal sums. The context is never gathered.
constexpr int KEY_VECTORS = 4;
constexpr int KEYS = KEY_VECTORS * W;
constexpr int ROW_GROUP = GS_WIDTH == 16 ? 4 : 2;

#if GS_WIDTH == 16
// out[i][j] = dword i of row j, for 16 rows of 16 dwords
GS_INLINE void transpose_square(const char* const* rows, int64_t offset, uint32_t* out) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i] + offset);
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i + 0] = _mm512_unpacklo_epi64(t[4 * i + 0], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i + 0], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(out + (0 + i) * 16, _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88));
    _mm512_storeu_si512(out + (8 + i) * 16, _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd));
    _mm512_storeu_si512(out + (4 + i) * 16, _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88));
    _mm512_storeu_si512(out + (12 + i) * 16, _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd));
  }
}
#elif GS_WIDTH == 8
GS_INLINE void transpose_square(const char* const* rows, int64_t offset, uint32_t* out) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows[i] + offset));
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    r[4 * i + 0] = _mm256_shuffle_ps(t[4 * i + 0], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i + 0], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  float* to = reinterpret_cast<float*>(out);
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * 8, _mm256_permute2f128_ps(r[i], r[4 + i], 0x20));
    _mm256_storeu_ps(to + (4 + i) * 8, _mm256_permute2f128_ps(r[i], r[4 + i], 0x31));
  }
}
#else
GS_INLINE void transpose_square(const char* const* rows, int64_t offset, uint32_t* out) {
  for (int j = 0; j < W; ++j)
    for (int i = 0; i < W; ++i) memcpy(out + i * W + j, rows[j] + offset + 4 * i, 4);
}
#endif

template <int DWORDS>
GS_INLINE void transpose_keys(const char* const* rows, uint32_t* out) {
  for (int d = 0; d + W <= DWORDS; d += W) transpose_square(rows, 4 * d, out + d * W);
  for (int d = DWORDS / W * W; d < DWORDS; ++d)
    for (int j = 0; j < W; ++j) memcpy(out + d * W + j, rows[j] + 4 * d, 4);
}

GS_INLINE vf score_step(vf sum, vf keys, uint32_t query, float) { return sum + keys * bitcast<float>(query); }
GS_INLINE vf score_step(vf sum, vf keys, uint32_t query, bf16) {
  return dot_pairs(sum, bitcast<vu>(keys), bitcast<vu>(set1i(int32_t(query))));
}

// scores [MR, KEYS] of MR queries against KEYS transposed keys
template <class T, int DWORDS, int MR>
static __attribute__((noinline)) void score_rows(const T* const* queries, const uint32_t* keys, float* scores) {
  vf sum[MR][KEY_VECTORS] = {};
  for (int d = 0; d < DWORDS; ++d) {
    vf k[KEY_VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < KEY_VECTORS; ++v) k[v] = load(reinterpret_cast<const float*>(keys) + (v * DWORDS + d) * W);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      uint32_t q;
      memcpy(&q, reinterpret_cast<const char*>(queries[m]) + 4 * d, 4);
#pragma GCC unroll 8
      for (int v = 0; v < KEY_VECTORS; ++v) sum[m][v] = score_step(sum[m][v], k[v], q, T());
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < KEY_VECTORS; ++v) store(scores + m * KEYS + v * W, sum[m][v]);
}

// Rows whose memory is asked for while others are computed on: blocks lie anywhere in the pool, and no hardware
// prefetcher follows them.
struct RowsAhead {
  const char *const *keys, *const *values;
  int count;
};

// acc [MR, PITCH] = acc * correction[MR] + weights [MR, KEYS] @ values[0..count), for VECTORS vectors from column d on
template <class V, int PITCH, int MR, int VECTORS, int KEY_BYTES, int VALUE_BYTES>
GS_INLINE void weigh_columns(const V* const* values, int64_t d, int count, const float* weights,
                             const float* correction, float* acc, const RowsAhead& ahead) {
  vf sum[MR][VECTORS];
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sum[m][v] = load(acc + m * PITCH + d + v * W) * correction[m];
  for (int key = 0; key < count; ++key) {
    const V* row = values[key] + d;
    if (key < ahead.count) {
      for (int byte = 0; byte < KEY_BYTES; byte += 64) __builtin_prefetch(ahead.keys[key] + byte, 0, 3);
      for (int byte = 0; byte < VALUE_BYTES; byte += 64) __builtin_prefetch(ahead.values[key] + byte, 0, 3);
    }
    vf value[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) value[v] = load(row + v * W);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sum[m][v] = sum[m][v] + value[v] * weights[m * KEYS + key];
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) store(acc + m * PITCH + d + v * W, sum[m][v]);
}
template <class V, int PITCH, int MR, int KEY_BYTES, int VALUE_BYTES>
static __attribute__((noinline)) void weigh_rows(const V* const* values, int count, const float* weights,
                                                 const float* correction, float* acc, RowsAhead ahead) {
  constexpr int STEP = 4;
  int64_t d = 0;
  for (; d + STEP * W <= PITCH; d += STEP * W) {
    weigh_columns<V, PITCH, MR, STEP, KEY_BYTES, VALUE_BYTES>(values, d, count, weights, correction, acc, ahead);
    ahead.count = 0;
  }
  for (; d < PITCH; d += W) {
    weigh_columns<V, PITCH, MR, 1, KEY_BYTES, VALUE_BYTES>(values, d, count, weights, correction, acc, ahead);
    ahead.count = 0;
  }
}

struct AttentionTile {
  int32_t sequence, first_query, num_queries;  // first_query counts from the sequence's first query token
  int32_t kv_head, num_kv_heads;
  int64_t first_key, last_key;
  int64_t first_visible;  // key before which no query of the tile sees any; first_key may lie before it
  float* partial;  // rows x (acc, max, sum) when the keys of a tile are split, else null
};

template <class T, int HQ, int HKV, int DK, int DV, int BLOCK_SIZE, int64_t K_BLOCK, int64_t V_BLOCK, int64_t Q_TOKEN,
          int64_t Q_HEAD, bool CAUSAL, int WINDOW, int CHUNK, bool SOFTCAP, bool SINKS, bool ALIBI, bool INVARIANT>
struct PagedAttention {
  static_assert(DK * sizeof(T) % 4 == 0, "a head must be whole dwords");
  static constexpr int GROUP = HQ / HKV;
  static constexpr int QUERIES = GROUP >= 32 ? 1 : 32 / GROUP;  // query tokens of a prefill tile
  static constexpr int HEAD_ROWS = QUERIES * GROUP;  // rows of one KV head in a tile, at most
  static constexpr int ROWS = HEAD_ROWS > HQ ? HEAD_ROWS : HQ;  // rows of a tile, KV head by KV head
  static constexpr int DWORDS = DK * int(sizeof(T)) / 4;
  static constexpr int PITCH = (DV + W - 1) / W * W;
  static constexpr int PARTIAL = ROWS * (PITCH + 2);

  struct Scratch {
    alignas(64) uint32_t keys[KEY_VECTORS * DWORDS * W];
    alignas(64) float scores[HEAD_ROWS * KEYS];
    alignas(64) float acc[ROWS * PITCH];
    alignas(64) float sums[ROWS * W];
    alignas(64) float values[KEYS * PITCH];
    float tops[ROWS], corrections[ROWS];
    int32_t positions[ROWS];
    const T* queries[ROWS];
    const char* key_rows[2][KEYS];  // the rows at work and the rows after them
    const char* value_rows[2][KEYS];
    const float* wide_values[KEYS];
  };

  const T *q, *kv_k, *kv_v;
  const int32_t *block_table, *query_start, *seq_lens;
  const float *sinks, *alibi;
  T* out;
  int64_t table_row;
  float scale, softcap;

  // Keys some query of the tile may see.
  static void key_range(int64_t seq_len, int64_t first_position, int64_t last_position, int64_t* begin, int64_t* end) {
    *begin = 0;
    *end = CAUSAL ? last_position + 1 : seq_len;
    if (WINDOW > 0) {
      const int64_t low = first_position - WINDOW + 1, high = last_position + WINDOW;
      if (low > *begin) *begin = low;
      if (high < *end) *end = high;
    }
    if (CHUNK > 0) {
      const int64_t low = first_position / CHUNK * CHUNK, high = (last_position / CHUNK + 1) * CHUNK;
      if (low > *begin) *begin = low;
      if (high < *end) *end = high;
    }
  }

  // Whether every query of the tile sees every key in [begin, end).
  static bool all_visible(int64_t begin, int64_t end, int64_t first_position, int64_t last_position) {
    if (CAUSAL && end - 1 > first_position) return false;
    if (WINDOW > 0 && (last_position - begin >= WINDOW || end - 1 - first_position >= WINDOW)) return false;
    if (CHUNK > 0 && (begin < last_position / CHUNK * CHUNK || end > (first_position / CHUNK + 1) * CHUNK)) return false;
    return true;
  }

  // Addresses of the K and V rows of `count` keys of one head.
  void find_rows(const AttentionTile& tile, int kv_head, int64_t begin, int count, const char** key_rows,
                 const char** value_rows) const {
    const int32_t* table = block_table + tile.sequence * table_row;
    // Keys out of sight stand for the first one in sight: their blocks may have been given away.
    const int64_t before = INVARIANT ? tile.first_visible - begin : 0;
    const int hidden = before > 0 ? int(before) : 0;
    for (int j = hidden; j < count;) {
      const uint64_t key = uint64_t(begin + j);
      const int64_t block = table[key / BLOCK_SIZE], offset = int64_t(key % BLOCK_SIZE);
      const int run = int(BLOCK_SIZE - offset < count - j ? BLOCK_SIZE - offset : count - j);
      const T* key_row = kv_k + block * K_BLOCK + (kv_head * BLOCK_SIZE + offset) * DK;
      const T* value_row = kv_v + block * V_BLOCK + (kv_head * BLOCK_SIZE + offset) * DV;
      for (int i = 0; i < run; ++i, ++j) {
        key_rows[j] = reinterpret_cast<const char*>(key_row + i * DK);
        value_rows[j] = reinterpret_cast<const char*>(value_row + i * DV);
      }
    }
    for (int j = 0; j < hidden; ++j) {
      key_rows[j] = key_rows[hidden];
      value_rows[j] = value_rows[hidden];
    }
    for (int j = count; j % W != 0; ++j) key_rows[j] = key_rows[0];  // lanes past the end are masked later
  }

  // Turns the scores of one row into weights and updates its running maximum, sum and correction.
  void softmax_row(Scratch& a, float* scores, int row, int head, int64_t begin, int count, bool mask) const {
    vf s[KEY_VECTORS];
    vf top = set1(a.tops[row]);
    for (int v = 0; v < KEY_VECTORS; ++v) {
      s[v] = load(scores + v * W) * scale;
      if (SOFTCAP) s[v] = softcap * vtanh(s[v] * (1.0f / softcap));
      const vi key = lane_ids() + int32_t(begin + v * W);
      const int32_t position = a.positions[row];
      if (ALIBI) s[v] = s[v] + alibi[head] * __builtin_convertvector(key - position, vf);
      if (mask) {
        vi hidden = key >= int32_t(begin + count);
        if (CAUSAL) hidden = hidden | (key > position);
        if (WINDOW > 0) hidden = hidden | (key <= position - WINDOW) | (key >= position + WINDOW);
        if (CHUNK > 0) {
          const int32_t low = position / (CHUNK > 0 ? CHUNK : 1) * CHUNK;
          hidden = hidden | (key < low) | (key >= low + CHUNK);
        }
        s[v] = hidden != 0 ? set1(-INFINITY) : s[v];
      }
      top = vmax(top, s[v]);
    }
    const float new_top = max_lanes(top);
    float correction = 1.0f;
    if (new_top != a.tops[row]) correction = expf(a.tops[row] - new_top);
    a.tops[row] = new_top;
    a.corrections[row] = correction;
    vf sum = load(a.sums + row * W) * correction;
    for (int v = 0; v < KEY_VECTORS; ++v) {
      vf weight = vexp(s[v] - new_top);
      store(scores + v * W, weight);
      sum = sum + weight;
    }
    store(a.sums + row * W, sum);
  }

  template <class V>
  static void weigh(Scratch& a, const V* const* values, int first_row, int rows, int count, RowsAhead ahead) {
    constexpr int K_BYTES = DK * int(sizeof(T)), V_BYTES = DV * int(sizeof(T));
    for (int r = 0; r < rows; r += ROW_GROUP, ahead.count = 0) {
      const float* weights = a.scores + r * KEYS;
      const float* factors = a.corrections + first_row + r;
      float* acc = a.acc + (first_row + r) * PITCH;
      switch (rows - r < ROW_GROUP ? rows - r : ROW_GROUP) {
        case 1: weigh_rows<V, PITCH, 1, K_BYTES, V_BYTES>(values, count, weights, factors, acc, ahead); break;
        case 2: weigh_rows<V, PITCH, 2, K_BYTES, V_BYTES>(values, count, weights, factors, acc, ahead); break;
#if GS_WIDTH == 16
        case 3: weigh_rows<V, PITCH, 3, K_BYTES, V_BYTES>(values, count, weights, factors, acc, ahead); break;
        case 4: weigh_rows<V, PITCH, 4, K_BYTES, V_BYTES>(values, count, weights, factors, acc, ahead); break;
#endif
      }
    }
  }

  static void score(Scratch& a, int first_row, int rows) {
    for (int r = 0; r < rows; r += ROW_GROUP) {
      switch (rows - r < ROW_GROUP ? rows - r : ROW_GROUP) {
        case 1: score_rows<T, DWORDS, 1>(a.queries + first_row + r, a.keys, a.scores + r * KEYS); break;
        case 2: score_rows<T, DWORDS, 2>(a.queries + first_row + r, a.keys, a.scores + r * KEYS); break;
#if GS_WIDTH == 16
        case 3: score_rows<T, DWORDS, 3>(a.queries + first_row + r, a.keys, a.scores + r * KEYS); break;
        case 4: score_rows<T, DWORDS, 4>(a.queries + first_row + r, a.keys, a.scores + r * KEYS); break;
#endif
      }
    }
  }

  void run_tile(Scratch& a, const AttentionTile& tile) const {
    const int head_rows = tile.num_queries * GROUP, rows = head_rows * tile.num_kv_heads;
    const int64_t start = query_start[tile.sequence], seq_len = seq_lens[tile.sequence];
    const int64_t first_position = seq_len - (query_start[tile.sequence + 1] - start) + tile.first_query;
    const int64_t last_position = first_position + tile.num_queries - 1;
    const bool owns_sink = SINKS && (INVARIANT || tile.first_key == tile_begin(tile));
    for (int r = 0; r < rows; ++r) {
      const int head = query_head(tile, r), query = r % head_rows / GROUP;
      a.queries[r] = q + (start + tile.first_query + query) * Q_TOKEN + head * Q_HEAD;
      a.positions[r] = int32_t(first_position + query);
      a.tops[r] = owns_sink ? sinks[head] : -1e30f;  // finite, so that (hidden score - top) is -inf and not NaN
      for (int i = 0; i < W; ++i) a.sums[r * W + i] = owns_sink && i == 0 ? 1.0f : 0.0f;
    }
    memset(a.acc, 0, rows * PITCH * sizeof(float));
    int side = 0;
    find_rows(tile, tile.kv_head, tile.first_key, keys_from(tile, tile.first_key), a.key_rows[0], a.value_rows[0]);
    for (int64_t begin = tile.first_key; begin < tile.last_key; begin += KEYS) {
      const int count = keys_from(tile, begin);
      const bool mask = count < KEYS || !all_visible(begin, begin + count, first_position, last_position);
      for (int h = 0; h < tile.num_kv_heads; ++h, side ^= 1) {
        const bool same_keys = h + 1 < tile.num_kv_heads;
        const int64_t next_begin = same_keys ? begin : begin + KEYS;
        RowsAhead ahead{a.key_rows[side ^ 1], a.value_rows[side ^ 1], keys_from(tile, next_begin)};
        find_rows(tile, tile.kv_head + (same_keys ? h + 1 : 0), next_begin, ahead.count, a.key_rows[side ^ 1],
                  a.value_rows[side ^ 1]);
        for (int v = 0; v < KEY_VECTORS; ++v)
          if (v * W < count) transpose_keys<DWORDS>(a.key_rows[side] + v * W, a.keys + v * DWORDS * W);
        attend_block(a, tile, h * head_rows, head_rows, begin, count, mask, a.value_rows[side], ahead);
      }
    }
    for (int r = 0; r < rows; ++r) {
      const float sum = sum_lanes(load(a.sums + r * W));
      if (tile.partial) {
        float* p = tile.partial + r * (PITCH + 2);
        memcpy(p, a.acc + r * PITCH, PITCH * sizeof(float));
        p[PITCH] = a.tops[r];
        p[PITCH + 1] = sum;
      } else {
        write_row(tile, r, a.acc + r * PITCH, sum);
      }
    }
  }

  static int keys_from(const AttentionTile& tile, int64_t begin) {
    const int64_t rest = tile.last_key - begin;
    return int(rest < 0 ? 0 : rest < KEYS ? rest : KEYS);
  }

  // The transposed keys and their values into rows [first, first + rows).
  void attend_block(Scratch& a, const AttentionTile& tile, int first, int rows, int64_t begin, int count, bool mask,
                    const char* const* value_rows, const RowsAhead& ahead) const {
    score(a, first, rows);
    for (int r = 0; r < rows; ++r)
      softmax_row(a, a.scores + r * KEYS, first + r, query_head(tile, first + r), begin, count, mask);
    // Few rows read V where it lies; many rows share one conversion to fp32.
    const T* const* values = reinterpret_cast<const T* const*>(value_rows);
    if (DV % W == 0 && (rows <= ROW_GROUP || sizeof(T) == 4)) return weigh(a, values, first, rows, count, ahead);
    for (int j = 0; j < count; ++j) {
      float* wide = a.values + j * PITCH;
      for_lanes<DV>([&](int64_t i, int lanes) { store(wide + i, load_lanes(values[j] + i, lanes)); });
      a.wide_values[j] = wide;
    }
    weigh(a, a.wide_values, first, rows, count, ahead);
  }

  static int query_head(const AttentionTile& tile, int row) {
    const int head_rows = tile.num_queries * GROUP;
    return (tile.kv_head + row / head_rows) * GROUP + row % GROUP;
  }

  int64_t tile_begin(const AttentionTile& tile) const {
    const int64_t length = query_start[tile.sequence + 1] - query_start[tile.sequence];
    const int64_t first_position = seq_lens[tile.sequence] - length + tile.first_query;
    int64_t begin, end;
    key_range(seq_lens[tile.sequence], first_position, first_position + tile.num_queries - 1, &begin, &end);
    return begin;
  }

  void write_row(const AttentionTile& tile, int row, const float* acc, float sum) const {
    const int64_t token = query_start[tile.sequence] + tile.first_query + row % (tile.num_queries * GROUP) / GROUP;
    T* to = out + token * (HQ * DV) + query_head(tile, row) * DV;
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    for_lanes<DV>([&](int64_t i, int lanes) { store_lanes(to + i, load(acc + i) * inverse, lanes); });
  }

  // Joins the partial results of `count` tiles that split one range of keys.
  void combine(const AttentionTile* tiles, int count) const {
    alignas(64) float acc[PITCH];
    for (int r = 0; r < tiles->num_queries * GROUP * tiles->num_kv_heads; ++r) {
      float top = -1e30f, sum = 0.0f;
      for (int i = 0; i < count; ++i) {
        const float t = tiles[i].partial[r * (PITCH + 2) + PITCH];
        top = t > top ? t : top;
      }
      memset(acc, 0, sizeof(acc));
      for (int i = 0; i < count; ++i) {
        const float* p = tiles[i].partial + r * (PITCH + 2);
        const float factor = expf(p[PITCH] - top);
        sum += factor * p[PITCH + 1];
        for (int d = 0; d < PITCH; d += W) store(acc + d, load(acc + d) + load(p + d) * factor);
      }
      write_row(*tiles, r, acc, sum);
    }
  }

  // Calls f(tile) for every tile, its keys not split; tiles of one query token hold `decode_heads` KV heads.
  template <class F>
  void for_tiles(int64_t num_sequences, int decode_heads, const F& f) const {
    for (int64_t s = 0; s < num_sequences; ++s) {
      const int64_t length = query_start[s + 1] - query_start[s];
      for (int64_t j = 0; j < length; j += QUERIES) {
        const int64_t queries = length - j < QUERIES ? length - j : QUERIES;
        const int64_t first_position = seq_lens[s] - length + j;
        const int heads = queries == 1 ? decode_heads : 1;
        AttentionTile tile{int32_t(s), int32_t(j), int32_t(queries), 0, 0, 0, 0, 0, nullptr};
        key_range(seq_lens[s], first_position, first_position + queries - 1, &tile.first_key, &tile.last_key);
        tile.first_visible = tile.first_key;
        // A block of keys begins at the same key whatever queries share the tile.
        if (INVARIANT && tile.first_key < tile.last_key) tile.first_key = tile.first_key / KEYS * KEYS;
        for (int h = 0; h < HKV; h += heads) {
          tile.kv_head = h;
          tile.num_kv_heads = HKV - h < heads ? HKV - h : heads;
          f(tile);
        }
      }
    }
  }

  void run(int64_t num_tokens, int64_t num_sequences, int64_t threads) const {
    // With sequences enough for the team a decode tile takes all KV heads: a block's heads lie one after another, which
    // the hardware prefetcher follows.
    const int decode_heads = num_sequences >= 4 * threads || threads == 1 ? HKV : 1;
    int64_t num_tiles = 0, row_keys = 0, all_keys = 0;
    for_tiles(num_sequences, decode_heads, [&](const AttentionTile& tile) {
      num_tiles += 1;
      all_keys += tile.last_key - tile.first_key;
      row_keys += (tile.last_key - tile.first_key) * tile.num_queries * GROUP * tile.num_kv_heads;
    });
    const int64_t tokens = num_sequences > 0 ? query_start[num_sequences] : 0;
    if (tokens < num_tokens) memset(out + tokens * HQ * DV, 0, (num_tokens - tokens) * HQ * DV * sizeof(T));
    if (row_keys * (DK + DV) < 65536) threads = 1;  // below some 10 us the team costs more than it saves
    // Too few tiles for the team: split their keys, 4 shares a thread, none below 256 keys. The sums of a request then
    // depend on the others, which INVARIANT excludes.
    int64_t share = INT64_MAX;
    if (!INVARIANT && threads > 1 && num_tiles < 2 * threads) {
      share = all_keys / (4 * threads) + 1;
      share = (share < 256 ? 256 : share) / KEYS * KEYS;
    }
    int64_t num_parts = 0;
    for_tiles(num_sequences, decode_heads, [&](const AttentionTile& tile) { num_parts += parts(tile, share); });
    static thread_local Workspace plan_memory;
    const bool splits = num_parts > num_tiles;
    const size_t tile_bytes = (num_parts * sizeof(AttentionTile) + 63) & ~size_t(63);
    char* memory = plan_memory.reserve(tile_bytes + (splits ? num_parts * PARTIAL * sizeof(float) : 0));
    AttentionTile* tiles = reinterpret_cast<AttentionTile*>(memory);
    float* partials = reinterpret_cast<float*>(memory + tile_bytes);
    int64_t filled = 0;
    for_tiles(num_sequences, decode_heads, [&](const AttentionTile& tile) {
      const int64_t count = parts(tile, share);
      for (int64_t i = 0; i < count; ++i) {
        AttentionTile part = tile;
        if (count > 1) {
          part.first_key = tile.first_key + i * share;
          if (i + 1 < count) part.last_key = part.first_key + share;
          part.partial = partials + filled * PARTIAL;
        }
        tiles[filled++] = part;
      }
    });
    int64_t next = 0;
    parallel(num_parts < threads ? num_parts : threads, [&](int64_t, int64_t) {
      static thread_local Workspace scratch_memory;
      Scratch& scratch = *reinterpret_cast<Scratch*>(scratch_memory.reserve(sizeof(Scratch)));
      for (;;) {
        const int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (i >= num_parts) return;
        run_tile(scratch, tiles[i]);
      }
    });
    if (!splits) return;
    for (int64_t i = 0; i < num_parts;) {
      int64_t last = i + 1;
      while (last < num_parts && tiles[i].partial && same_rows(tiles[i], tiles[last])) ++last;
      if (tiles[i].partial) combine(tiles + i, int(last - i));
      i = last;
    }
  }

  static bool same_rows(const AttentionTile& a, const AttentionTile& b) {
    return a.sequence == b.sequence && a.first_query == b.first_query && a.kv_head == b.kv_head;
  }
  static int64_t parts(const AttentionTile& tile, int64_t share) {
    const int64_t keys = tile.last_key - tile.first_key;
    return keys <= share ? 1 : (keys + share - 1) / share;
  }
};
