// Mixture of experts over packed weights: routed rows are sorted by expert, each expert with rows runs two small
// products. Panels of the first weight alternate gate and up, so that the gate is applied as a block is finished.
template <class Act>
struct PlainGate {
  static inline vf apply(vf gate, vf up, float, float) { return Act()(gate) * up; }
};
struct ClampedSwiglu {
  static inline vf apply(vf gate, vf up, float, float alpha) { return (up + 1.0f) * (gate * vsigmoid(gate * alpha)); }
};

template <class T, class RouterT, class Term, class Gate, class Act, int64_t E, int64_t H, int64_t I, int64_t K, bool HAS_GATE,
          bool BIAS_INTERLEAVED, bool CLAMPS, bool WEIGHTS_ON_INPUT, class XRows, class OutRows>
struct MixtureOfExperts {
  static constexpr int UNIT = HAS_GATE ? 2 : 1;
  static constexpr int64_t I_PANELS = (I + PANEL - 1) / PANEL, H_PANELS = (H + PANEL - 1) / PANEL;
  static constexpr int64_t CHUNK = 8;  // panels of a task

  const T* x;
  const int64_t* ids;
  const RouterT* router;
  const char* gate_up;
  const T* gate_up_bias;
  const char* down;
  const T* down_bias;
  T* out;
  float limit, alpha;

  static float bias_at(const T* bias, int64_t expert, int64_t column, bool up) {
    if (!HAS_GATE) return to_float(bias[expert * I + column]);
    const int64_t at = BIAS_INTERLEAVED ? 2 * column + up : column + (up ? I : 0);
    return to_float(bias[expert * 2 * I + at]);
  }

  // hidden[columns of the panel] of one row from the sums of its gate and up panels
  void gate_row(const float* gate, const float* up, int64_t expert, int64_t column, T* hidden) const {
    for (int64_t n = 0; n < PANEL && column + n < I; n += W) {
      vf g = load(gate + n), u = HAS_GATE ? load(up + n) : vf{};
      if (gate_up_bias)
        for (int i = 0; i < W && column + n + i < I; ++i) {
          g[i] += bias_at(gate_up_bias, expert, column + n + i, false);
          if (HAS_GATE) u[i] += bias_at(gate_up_bias, expert, column + n + i, true);
        }
      g = rounded<T>(g);
      vf h;
      if constexpr (HAS_GATE) {
        u = rounded<T>(u);
        if (CLAMPS) {
          g = vmin(g, set1(limit));
          u = vmax(vmin(u, set1(limit)), set1(-limit));
        }
        h = Gate::apply(g, u, limit, alpha);
      } else {
        h = Act()(g);
      }
      store_upto(hidden + column + n, h, I - column - n);
    }
  }

  void run(int64_t N, int64_t threads) const {
    const int64_t pairs = N * K;
    if (pairs == 0) return;
    // order[i]: routed pair (row * K + k) number i in expert order; starts[e]: where expert e begins
    static thread_local Workspace memory;
    const size_t order_bytes = pairs * 8, rows_bytes = 2 * pairs * sizeof(T*), starts_bytes = (2 * E + 2) * 8;
    const size_t hidden_bytes = (pairs * I * sizeof(T) + 63) & ~size_t(63), term_bytes = pairs * H * 4;
    const size_t input_bytes = WEIGHTS_ON_INPUT ? pairs * H * sizeof(T) : 0;
    char* at = memory.reserve(hidden_bytes + term_bytes + input_bytes + order_bytes + rows_bytes + starts_bytes + 512);
    auto take = [&](size_t bytes) { char* here = at; at += (bytes + 63) & ~size_t(63); return here; };
    T* hidden = reinterpret_cast<T*>(take(hidden_bytes));
    float* terms = reinterpret_cast<float*>(take(term_bytes));
    T* inputs = reinterpret_cast<T*>(take(input_bytes));
    int64_t* order = reinterpret_cast<int64_t*>(take(order_bytes));
    const T** rows = reinterpret_cast<const T**>(take(rows_bytes));
    const T** hidden_rows = rows + pairs;
    int64_t* starts = reinterpret_cast<int64_t*>(at);
    int64_t* active = starts + E + 1;

    memset(starts, 0, (E + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < pairs; ++i)
      if (ids[i] >= 0 && ids[i] < E) starts[ids[i] + 1] += 1;
    int64_t num_active = 0;
    for (int64_t e = 0; e < E; ++e) {
      if (starts[e + 1] > 0) active[num_active++] = e;
      starts[e + 1] += starts[e];
    }
    for (int64_t i = 0; i < pairs; ++i)
      if (ids[i] >= 0 && ids[i] < E) order[starts[ids[i]]++] = i;
    for (int64_t e = E; e > 0; --e) starts[e] = starts[e - 1];
    starts[0] = 0;
    for (int64_t i = 0; i < starts[E]; ++i) {
      rows[i] = XRows().at(x, order[i] / K);
      hidden_rows[i] = hidden + i * I;
      if (WEIGHTS_ON_INPUT) {
        T* scaled = inputs + i * H;
        const float weight = to_float(router[order[i]]);
        for_lanes<H>([&](int64_t d, int lanes) { store_lanes(scaled + d, load_lanes(rows[i] + d, lanes) * weight, lanes); });
        rows[i] = scaled;
      }
    }

    const int64_t weights = (UNIT * I_PANELS * panel_bytes<T>(H) + H_PANELS * panel_bytes<T>(I)) * num_active;
    if (weights < 65536) threads = 1;
    run_tasks(threads, num_active, UNIT * I_PANELS, [&](int64_t task, int64_t begin, int64_t end) {
      const int64_t e = active[task], first = starts[e], count = starts[e + 1] - first;
      gemm_panels<UNIT>(rows + first, count, gate_up + e * UNIT * I_PANELS * panel_bytes<T>(H), H, begin, end,
                        [&](int64_t m0, int64_t m, int64_t panel, int64_t panels, const float* tile) {
        for (int64_t p = 0; p < panels; p += UNIT)
          for (int64_t r = 0; r < m; ++r)
            gate_row(tile + (p * m + r) * PANEL, tile + ((p + UNIT - 1) * m + r) * PANEL, e, (panel + p) / UNIT * PANEL,
                     hidden + (first + m0 + r) * I);
      });
    });
    run_tasks(threads, num_active, H_PANELS, [&](int64_t task, int64_t begin, int64_t end) {
      const int64_t e = active[task], first = starts[e], count = starts[e + 1] - first;
      gemm_panels<1>(hidden_rows + first, count, down + e * H_PANELS * panel_bytes<T>(I), I, begin, end,
                     [&](int64_t m0, int64_t m, int64_t panel, int64_t panels, const float* tile) {
        for (int64_t p = 0; p < panels; ++p)
          for (int64_t r = 0; r < m; ++r) {
            const int64_t pair = order[first + m0 + r];
            for (int64_t n = 0; n < PANEL; n += W) {
              const int64_t column = (panel + p) * PANEL + n;
              if (column >= H) break;
              vf v = load(tile + (p * m + r) * PANEL + n);
              if (down_bias) v = v + load_upto(down_bias + e * H + column, H - column);
              v = rounded<T>(v);
              if (!WEIGHTS_ON_INPUT) v = rounded<Term>(v * to_float(router[pair]));
              store_upto(terms + pair * H + column, v, H - column);
            }
          }
      });
    });
    parallel_for(threads, N, 16384 / (K * H) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        T* row = OutRows().at(out, n);
        for_lanes<H>([&](int64_t d, int lanes) {
          vf sum = {};
          for (int64_t k = 0; k < K; ++k)
            if (ids[n * K + k] >= 0 && ids[n * K + k] < E) sum = sum + load_lanes(terms + (n * K + k) * H + d, lanes);
          store_lanes(row + d, sum, lanes);
        });
      }
    });
  }

  // f(expert number, first panel, last panel) for chunks of panels, taken by threads as they become free
  template <class F>
  static void run_tasks(int64_t threads, int64_t num_experts, int64_t panels, const F& f) {
    const int64_t chunks = (panels + CHUNK - 1) / CHUNK;
    int64_t next = 0;
    parallel(threads, [&](int64_t, int64_t) {
      for (;;) {
        const int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (i >= num_experts * chunks) return;
        const int64_t begin = i % chunks * CHUNK;
        f(i / chunks, begin, begin + CHUNK < panels ? begin + CHUNK : panels);
      }
    });
  }
};
