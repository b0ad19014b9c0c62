// RMSNorm and LayerNorm over rows of D, optionally of x + residual (stored first, rounded to T).
template <class T, class Wt, int64_t D, bool ADD, bool WEIGHT_FP32, class XRows, class ResRows, class OutRows>
GS_INLINE void rms_norm(const T* x, const T* residual, const Wt* weight, T* out, T* sum_out, int64_t n, int64_t threads,
                        float eps, float offset) {
  parallel_for(threads, n, 16384 / D + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* in = XRows().at(x, row);
      vf squares = {};
      if constexpr (ADD) {
        const T* other = ResRows().at(residual, row);
        T* total = OutRows().at(sum_out, row);
        for_lanes<D>([&](int64_t i, int lanes) {
          vf v = rounded<T>(load_lanes(in + i, lanes) + load_lanes(other + i, lanes));
          store_lanes(total + i, v, lanes);
          squares = squares + v * v;
        });
        in = total;
      } else {
        for_lanes<D>([&](int64_t i, int lanes) {
          vf v = load_lanes(in + i, lanes);
          squares = squares + v * v;
        });
      }
      const float scale = 1.0f / sqrtf(sum_lanes(squares) / D + eps);
      T* to = OutRows().at(out, row);
      for_lanes<D>([&](int64_t i, int lanes) {
        vf v = load_lanes(in + i, lanes) * scale;
        if (weight) {
          vf w = load_lanes(weight + i, lanes) + offset;
          v = WEIGHT_FP32 ? v * w : rounded<T>(v) * rounded<Wt>(w);
        }
        store_lanes(to + i, v, lanes);
      });
    }
  });
}

template <class T, class Wt, int64_t D, bool ADD, class XRows, class ResRows, class OutRows>
GS_INLINE void layer_norm(const T* x, const T* residual, const Wt* weight, const Wt* bias, T* out, T* sum_out,
                          int64_t n, int64_t threads, float eps) {
  parallel_for(threads, n, 16384 / D + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* in = XRows().at(x, row);
      vf total = {}, squares = {};
      if constexpr (ADD) {
        const T* other = ResRows().at(residual, row);
        T* sum = OutRows().at(sum_out, row);
        for_lanes<D>([&](int64_t i, int lanes) {
          store_lanes(sum + i, load_lanes(in + i, lanes) + load_lanes(other + i, lanes), lanes);
        });
        in = sum;
      }
      for_lanes<D>([&](int64_t i, int lanes) { total = total + load_lanes(in + i, lanes); });
      const float mean = sum_lanes(total) / D;
      for_lanes<D>([&](int64_t i, int lanes) {
        vf v = load_lanes(in + i, lanes) - mean;
        if (lanes < W) {  // the lanes past the end would each add mean^2
          float kept[W];
          store(kept, v);
          v = load_n(kept, lanes);
        }
        squares = squares + v * v;
      });
      const float scale = 1.0f / sqrtf(sum_lanes(squares) / D + eps);
      T* to = OutRows().at(out, row);
      for_lanes<D>([&](int64_t i, int lanes) {
        vf v = (load_lanes(in + i, lanes) - mean) * scale;
        if (weight) v = v * load_lanes(weight + i, lanes);
        if (bias) v = v + load_lanes(bias + i, lanes);
        store_lanes(to + i, v, lanes);
      });
    }
  });
}

// The norm after a sublayer and the residual add behind it; with NEXT also the norm of the sum (Gemma's sandwich).
// Every step rounds to T as the separate kernels do.
template <class T, class Wt, int64_t D, bool WEIGHT_FP32, bool NEXT, class XRows, class ResRows, class OutRows>
GS_INLINE void norm_add(const T* x, const Wt* post_weight, const T* residual, const Wt* weight, T* out, T* total,
                        int64_t n, int64_t threads, float post_eps, float eps, float offset) {
  auto weighted = [&](vf v, const Wt* w_row, int64_t i, int lanes) {
    if (!w_row) return v;
    vf w = load_lanes(w_row + i, lanes) + offset;
    return WEIGHT_FP32 ? v * w : rounded<T>(v) * rounded<Wt>(w);
  };
  parallel_for(threads, n, 16384 / D + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* in = XRows().at(x, row);
      const T* other = ResRows().at(residual, row);
      T* sum = OutRows().at(total, row);
      vf squares = {};
      for_lanes<D>([&](int64_t i, int lanes) {
        vf v = load_lanes(in + i, lanes);
        squares = squares + v * v;
      });
      const float post_scale = 1.0f / sqrtf(sum_lanes(squares) / D + post_eps);
      vf sum_squares = {};
      for_lanes<D>([&](int64_t i, int lanes) {
        vf normed = rounded<T>(weighted(load_lanes(in + i, lanes) * post_scale, post_weight, i, lanes));
        vf v = rounded<T>(normed + load_lanes(other + i, lanes));
        store_lanes(sum + i, v, lanes);
        if (lanes < W) {  // the lanes past the end hold nothing that belongs to the row
          float kept[W];
          store(kept, v);
          v = load_n(kept, lanes);
        }
        sum_squares = sum_squares + v * v;
      });
      if constexpr (NEXT) {
        const float scale = 1.0f / sqrtf(sum_lanes(sum_squares) / D + eps);
        T* to = OutRows().at(out, row);
        for_lanes<D>([&](int64_t i, int lanes) {
          store_lanes(to + i, weighted(load_lanes(sum + i, lanes) * scale, weight, i, lanes), lanes);
        });
      }
    }
  });
}
