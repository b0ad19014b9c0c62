// Elementwise activations in fp32 and the gated product act(gate) * up; act(gate) is rounded to T first, as eager does.
struct Silu {
  inline vf operator()(vf x) const { return x * vsigmoid(x); }
};
// x * Phi(x); erfc by Abramowitz and Stegun 7.1.26 (absolute error 1.5e-7)
struct Gelu {
  inline vf operator()(vf x) const {
    vf z = (x < 0.0f ? -x : x) * 0.70710678118654752f;
    vf t = 1.0f / (1.0f + 0.3275911f * z);
    vf p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    vf half_erfc = 0.5f * p * vexp(-z * z);
    return x * (x < 0.0f ? half_erfc : 1.0f - half_erfc);
  }
};
struct GeluTanh {
  inline vf operator()(vf x) const {
    return 0.5f * x * (1.0f + vtanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
  }
};
struct Relu {
  inline vf operator()(vf x) const { return x < 0.0f ? vf{} : x; }
};
struct Relu2 {
  inline vf operator()(vf x) const {
    vf y = x < 0.0f ? vf{} : x;
    return y * y;
  }
};
struct Sigmoid {
  inline vf operator()(vf x) const { return vsigmoid(x); }
};
struct QuickGelu {
  inline vf operator()(vf x) const { return x * vsigmoid(1.702f * x); }
};
struct Identity {
  inline vf operator()(vf x) const { return x; }
};

template <class T, class Act, int64_t D, class GateRows, class UpRows, class OutRows>
GS_INLINE void act_mul(const T* gate, const T* up, T* out, int64_t n, int64_t threads) {
  parallel_for(threads, n, 8192 / D + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T *g = GateRows().at(gate, row), *u = UpRows().at(up, row);
      T* o = OutRows().at(out, row);
      for_lanes<D>([&](int64_t i, int lanes) {
        store_lanes(o + i, rounded<T>(Act()(load_lanes(g + i, lanes))) * load_lanes(u + i, lanes), lanes);
      });
    }
  });
}

template <class T, class Act, int64_t D, class XRows, class OutRows>
GS_INLINE void activation(const T* x, T* out, int64_t n, int64_t threads) {
  parallel_for(threads, n, 8192 / D + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* in = XRows().at(x, row);
      T* o = OutRows().at(out, row);
      for_lanes<D>([&](int64_t i, int lanes) { store_lanes(o + i, Act()(load_lanes(in + i, lanes)), lanes); });
    }
  });
}
