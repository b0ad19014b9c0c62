// Per-head norm, rotation of the first C columns and the write into the paged cache
// ([block, kv_head, offset, dim]; blocks BLOCK elements apart).
enum Style { HALF, INTERLEAVED, INTERLEAVED_TO_HALF };

template <class T, int64_t D>
GS_INLINE void read_head(const T* from, float* head) {
  for_lanes<D>([&](int64_t i, int lanes) { store_lanes(head + i, load_lanes(from + i, lanes), lanes); });
}
template <class T, int64_t D>
GS_INLINE void write_head(const float* head, T* to) {
  for_lanes<D>([&](int64_t i, int lanes) { store_lanes(to + i, load_lanes(head + i, lanes), lanes); });
}

template <class T, class Wt, int64_t D, bool WEIGHT_FP32>
GS_INLINE void norm_head(float* head, const Wt* weight, float eps, float offset) {
  vf squares = {};
  for_lanes<D>([&](int64_t i, int lanes) {
    vf v = load_lanes(head + i, lanes);
    squares = squares + v * v;
  });
  const float scale = 1.0f / sqrtf(sum_lanes(squares) / D + eps);
  for_lanes<D>([&](int64_t i, int lanes) {
    vf v = load_lanes(head + i, lanes) * scale;
    vf w = load_lanes(weight + i, lanes) + offset;
    store_lanes(head + i, rounded<T>(WEIGHT_FP32 ? v * w : rounded<T>(v) * rounded<Wt>(w)), lanes);
  });
}

template <Style STYLE, int64_t C>
GS_INLINE void rotate_head(float* head, const float* cos, const float* sin) {
  float old[C > 0 ? C : 1];
  memcpy(old, head, C * sizeof(float));
  for (int64_t i = 0; i < C / 2; ++i) {
    const int64_t a = STYLE == HALF ? i : 2 * i, b = STYLE == HALF ? i + C / 2 : 2 * i + 1;
    const int64_t first = STYLE == INTERLEAVED ? 2 * i : i, second = STYLE == INTERLEAVED ? 2 * i + 1 : i + C / 2;
    const float x = old[a], y = old[b];
    head[first] = x * cos[first] - y * sin[first];
    head[second] = y * cos[second] + x * sin[second];
  }
}

template <class T, class Table, Style STYLE, int64_t D, int64_t C>
GS_INLINE void rope(const T* x, const Table* cos, const Table* sin, T* out, int64_t tokens, int64_t heads,
                    int64_t x_token, int64_t x_head, int64_t cos_token, int64_t sin_token, int64_t out_token,
                    int64_t out_head, int64_t threads) {
  parallel_for(threads, tokens, 8192 / (heads * D) + 1, [&](int64_t begin, int64_t end) {
    float c[C], s[C], head[D];
    for (int64_t t = begin; t < end; ++t) {
      read_head<Table, C>(cos + t * cos_token, c);
      read_head<Table, C>(sin + t * sin_token, s);
      for (int64_t h = 0; h < heads; ++h) {
        read_head<T, D>(x + t * x_token + h * x_head, head);
        rotate_head<STYLE, C>(head, c, s);
        write_head<T, D>(head, out + t * out_token + h * out_head);
      }
    }
  });
}

template <int64_t BLOCK_SIZE, int64_t BLOCK, int64_t D, class Cache>
GS_INLINE Cache* slot_address(Cache* cache, int64_t slot, int64_t head) {
  return cache + slot / BLOCK_SIZE * BLOCK + (head * BLOCK_SIZE + slot % BLOCK_SIZE) * D;
}

// C == 0: no rotation. HQ == 0: nothing but the write.
template <class T, class Cache, class Table, class Wt, Style STYLE, bool WEIGHT_FP32, int64_t HQ, int64_t HKV,
          int64_t D, int64_t DV, int64_t C, int64_t BLOCK_SIZE, int64_t K_BLOCK, int64_t V_BLOCK, int64_t Q_TOKEN,
          int64_t Q_HEAD, int64_t K_TOKEN, int64_t K_HEAD, int64_t V_TOKEN, int64_t V_HEAD, int64_t COS_ROW,
          int64_t SIN_ROW>
GS_INLINE void rope_kv_write(const T* q, const T* k, const T* v, const Table* cos_table, const Table* sin_table,
                             const int64_t* positions, const Wt* q_norm, const Wt* k_norm, Cache* kv_k, Cache* kv_v,
                             const int64_t* slots, T* q_out, int64_t tokens, int64_t threads, float eps, float offset) {
  parallel_for(threads, tokens, 8192 / ((HQ + 2 * HKV) * D) + 1, [&](int64_t begin, int64_t end) {
    float c[C > 0 ? C : 1], s[C > 0 ? C : 1], head[D];
    for (int64_t t = begin; t < end; ++t) {
      if constexpr (C > 0) {
        read_head<Table, C>(cos_table + positions[t] * COS_ROW, c);
        read_head<Table, C>(sin_table + positions[t] * SIN_ROW, s);
      }
      for (int64_t h = 0; h < HQ; ++h) {
        read_head<T, D>(q + t * Q_TOKEN + h * Q_HEAD, head);
        if (q_norm) norm_head<T, Wt, D, WEIGHT_FP32>(head, q_norm, eps, offset);
        rotate_head<STYLE, C>(head, c, s);
        write_head<T, D>(head, q_out + (t * HQ + h) * D);
      }
      for (int64_t h = 0; h < HKV; ++h) {
        read_head<T, D>(k + t * K_TOKEN + h * K_HEAD, head);
        if (k_norm) norm_head<T, Wt, D, WEIGHT_FP32>(head, k_norm, eps, offset);
        rotate_head<STYLE, C>(head, c, s);
        write_head<Cache, D>(head, slot_address<BLOCK_SIZE, K_BLOCK, D>(kv_k, slots[t], h));
        const T* value = v + t * V_TOKEN + h * V_HEAD;
        Cache* to = slot_address<BLOCK_SIZE, V_BLOCK, DV>(kv_v, slots[t], h);
        for_lanes<DV>([&](int64_t i, int lanes) { store_lanes(to + i, load_lanes(value + i, lanes), lanes); });
      }
    }
  });
}
