// Matrix product with weights packed in panels of 16 columns: bf16 [N/16][K/2][16][2], fp32 [N/16][K][16].
// A block of MR rows and NP panels keeps its sums in registers, so each weight is loaded once for MR rows.
constexpr int PANEL = 16;
constexpr int PANEL_VECTORS = PANEL / W;
#if GS_WIDTH == 16
constexpr int MAX_ROWS = 6, MAX_PANELS = 4;  // 24 sums, 4 weights, 1 broadcast of 32 registers
#elif GS_WIDTH == 8
constexpr int MAX_ROWS = 4, MAX_PANELS = 1;
#else
constexpr int MAX_ROWS = 2, MAX_PANELS = 1;
#endif

GS_INLINE vf even_lanes(vu pairs) { return bitcast<vf>(pairs << 16); }
GS_INLINE vf odd_lanes(vu pairs) { return bitcast<vf>(pairs & 0xffff0000u); }
GS_INLINE vu load_pairs(const void* p) {
  vu v;
  memcpy(&v, p, sizeof(v));
  return v;
}
GS_INLINE uint32_t load_pair(const bf16* p) {
  uint32_t pair;
  memcpy(&pair, p, 4);
  return pair;
}
// sum + a.even * b.even + a.odd * b.odd
GS_INLINE vf dot_pairs(vf sum, vu a, vu b) {
#if GS_DPBF16
  return bitcast<vf>(_mm512_dpbf16_ps(bitcast<__m512>(sum), bitcast<__m512bh>(a), bitcast<__m512bh>(b)));
#else
  return sum + even_lanes(a) * even_lanes(b) + odd_lanes(a) * odd_lanes(b);
#endif
}

// Bytes of one packed panel.
template <class T>
constexpr int64_t panel_bytes(int64_t K) {
  return sizeof(T) == 2 ? (K + 1) / 2 * PANEL * 4 : K * PANEL * 4;
}

// tile [NP, MR, 16] = rows (MR pointers to K values) x NP panels; fetches up to `ahead_bytes` at `ahead` meanwhile.
template <int MR, int NP>
static __attribute__((noinline)) void gemm_block(const bf16* const* rows, const char* w, int64_t stride, int64_t K,
                                                 float* tile, const char* ahead, int64_t ahead_bytes) {
  constexpr int NV = NP * PANEL_VECTORS;
  const bf16* x[MR];
  for (int m = 0; m < MR; ++m) x[m] = rows[m];
  vf sum[MR][NV] = {};
  const int64_t pairs = K / 2;
  const int64_t fetch_every = ahead_bytes / 64 / (pairs > 0 ? pairs : 1) + 1;
  auto step = [&](int64_t k, const uint32_t* xs) __attribute__((always_inline)) {
    vu weight[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v)
      weight[v] = load_pairs(w + (v / PANEL_VECTORS) * stride + k * (PANEL * 4) + (v % PANEL_VECTORS) * sizeof(vu));
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      vu pair = bitcast<vu>(set1i(int32_t(xs[m])));
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) sum[m][v] = dot_pairs(sum[m][v], weight[v], pair);
    }
  };
  int64_t fetched = 0;
  for (int64_t k = 0; k < pairs; ++k) {
    uint32_t xs[MR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) xs[m] = load_pair(x[m] + 2 * k);
    for (int64_t i = 0; i < fetch_every && fetched < ahead_bytes; ++i, fetched += 64)
      __builtin_prefetch(ahead + fetched, 0, 2);
    step(k, xs);
  }
  if (K % 2) {
    uint32_t xs[MR];
    for (int m = 0; m < MR; ++m) xs[m] = x[m][K - 1].bits;
    step(pairs, xs);
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) store(tile + ((v / PANEL_VECTORS) * MR + m) * PANEL + (v % PANEL_VECTORS) * W, sum[m][v]);
}

template <int MR, int NP>
static __attribute__((noinline)) void gemm_block(const float* const* rows, const char* w, int64_t stride, int64_t K,
                                                 float* tile, const char* ahead, int64_t ahead_bytes) {
  constexpr int NV = NP * PANEL_VECTORS;
  const float* x[MR];
  for (int m = 0; m < MR; ++m) x[m] = rows[m];
  vf sum[MR][NV] = {};
  const int64_t fetch_every = ahead_bytes / 64 / (K > 0 ? K : 1) + 1;
  int64_t fetched = 0;
  for (int64_t k = 0; k < K; ++k) {
    vf weight[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v)
      weight[v] = load(reinterpret_cast<const float*>(w + (v / PANEL_VECTORS) * stride + k * (PANEL * 4)) +
                       (v % PANEL_VECTORS) * W);
    for (int64_t i = 0; i < fetch_every && fetched < ahead_bytes; ++i, fetched += 64)
      __builtin_prefetch(ahead + fetched, 0, 2);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) sum[m][v] = sum[m][v] + weight[v] * x[m][k];
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) store(tile + ((v / PANEL_VECTORS) * MR + m) * PANEL + (v % PANEL_VECTORS) * W, sum[m][v]);
}

template <class T, int NP>
static void gemm_rows(int mr, const T* const* rows, const char* w, int64_t stride, int64_t K, float* tile,
                      const char* ahead, int64_t ahead_bytes) {
  switch (mr) {
    case 1: return gemm_block<1, NP>(rows, w, stride, K, tile, ahead, ahead_bytes);
    case 2: return gemm_block<2, NP>(rows, w, stride, K, tile, ahead, ahead_bytes);
#if GS_WIDTH >= 8
    case 3: return gemm_block<3, NP>(rows, w, stride, K, tile, ahead, ahead_bytes);
    case 4: return gemm_block<4, NP>(rows, w, stride, K, tile, ahead, ahead_bytes);
#endif
#if GS_WIDTH == 16
    case 5: return gemm_block<5, NP>(rows, w, stride, K, tile, ahead, ahead_bytes);
    case 6: return gemm_block<6, NP>(rows, w, stride, K, tile, ahead, ahead_bytes);
#endif
  }
}

// Rows [0, M) times panels [begin, end), always UNIT panels together; `done(m, num_rows, panel, num_panels, tile)`
// gets each finished block as tile [num_panels, num_rows, 16].
template <int UNIT, class T, class Done>
GS_INLINE void gemm_panels(const T* const* rows, int64_t M, const char* w, int64_t K, int64_t begin, int64_t end,
                           const Done& done) {
  const int64_t stride = panel_bytes<T>(K);
  const int64_t blocks = (M + MAX_ROWS - 1) / MAX_ROWS;
  constexpr int TILE_PANELS = MAX_PANELS > UNIT ? MAX_PANELS : UNIT;
  alignas(64) float tile[MAX_ROWS * TILE_PANELS * PANEL];
  int64_t step = 0;
  for (int64_t p = begin; p < end; p += step) {
    const bool wide = MAX_PANELS > 1 && end - p >= MAX_PANELS;
    step = wide ? MAX_PANELS : UNIT;
    const char* here = w + p * stride;
    // While the later row blocks compute from cache, the next panels come from memory.
    const int64_t next_bytes = blocks > 1 && p + step < end ? step * stride : 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t m0 = M * b / blocks, m1 = M * (b + 1) / blocks;
      const int64_t ahead0 = (next_bytes * b / blocks) & ~int64_t(63), ahead1 = next_bytes * (b + 1) / blocks;
      const char* ahead = here + step * stride + ahead0;
      const int mr = int(m1 - m0);
      if (wide) {
        gemm_rows<T, MAX_PANELS>(mr, rows + m0, here, stride, K, tile, ahead, ahead1 - ahead0);
      } else {
        for (int u = 0; u < UNIT; ++u)
          gemm_rows<T, 1>(mr, rows + m0, here + u * stride, stride, K, tile + u * mr * PANEL, ahead,
                          u == 0 ? ahead1 - ahead0 : 0);
      }
      done(m0, m1 - m0, p, step, tile);
    }
  }
}

// out [M, N] = x [M, K] @ packed.T + bias
template <class T, class B, class Out, int64_t K, int64_t N, class XRows, class OutRows>
GS_INLINE void linear(const T* x, const void* packed, const B* bias, Out* out, int64_t M, int64_t threads) {
  if (M <= 0) return;
  static thread_local Workspace workspace;
  // Rows a multiple of 4 KiB apart fall into one set of an 8-way 32 KiB cache: such rows are copied further apart.
  constexpr bool COLLIDES = XRows::S0_ * int64_t(sizeof(T)) % 4096 == 0;
  constexpr int64_t PITCH = K + 64;
  const bool copies = COLLIDES && M > 1;
  char* memory = workspace.reserve(M * sizeof(T*) + (copies ? M * PITCH * sizeof(T) : 0));
  const T** rows = reinterpret_cast<const T**>(memory);
  T* spread = reinterpret_cast<T*>(memory + M * sizeof(T*));
  for (int64_t m = 0; m < M; ++m) {
    rows[m] = XRows().at(x, m);
    if (copies) rows[m] = static_cast<T*>(memcpy(spread + m * PITCH, rows[m], K * sizeof(T)));
  }
  constexpr int64_t PANELS = (N + PANEL - 1) / PANEL;
  // A second thread pays for itself from about 32 KiB of weights or 0.5 MFLOP each on.
  const int64_t grain = 1 + 32768 / (panel_bytes<T>(K) * ((M + 3) / 4));
  parallel_for(threads, PANELS, grain, [&](int64_t begin, int64_t end) {
    gemm_panels<1>(rows, M, static_cast<const char*>(packed), K, begin, end,
                   [&](int64_t m0, int64_t count, int64_t panel, int64_t panels, const float* tile) {
      for (int64_t i = 0; i < panels; ++i)
        for (int64_t m = 0; m < count; ++m)
          for (int64_t n = 0; n < PANEL; n += W) {
            const int64_t column = (panel + i) * PANEL + n;
            if (column >= N) break;
            vf v = load(tile + (i * count + m) * PANEL + n);
            if (bias) v = v + load_upto(bias + column, N - column);
            store_upto(OutRows().at(out, m0 + m) + column, v, N - column);
          }
    });
  });
}
