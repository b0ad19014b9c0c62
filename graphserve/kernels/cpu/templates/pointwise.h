// Elementwise groups: floats in fp32 lanes, integers up to 32 bits in `vi`, int64 in `vl`, truth as 0 or -1 in `vi`.
#include <type_traits>

typedef int64_t vl __attribute__((vector_size(8 * GS_WIDTH)));
typedef uint64_t vul __attribute__((vector_size(8 * GS_WIDTH)));

GS_INLINE vl set1l(int64_t x) {
  vl v;
  for (int i = 0; i < W; ++i) v[i] = x;
  return v;
}

// A product the compiler may not fuse with the sum that takes it: each op of a group rounds by itself.
template <class V>
GS_INLINE V fenced(V v) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_assoc_barrier)
  return __builtin_assoc_barrier(v);
#elif __has_builtin(__arithmetic_fence)
  return __arithmetic_fence(v);
#endif
#endif
  return v;
}

// ---- columns
// The lane count of all steps but the last, known to the compiler.
struct WholeVector {
  constexpr operator int() const { return W; }
};
template <class F>
GS_INLINE void for_columns(int64_t first, int64_t last, const F& f) {
  int64_t i = first;
  for (; i + W <= last; i += W) f(i, WholeVector());
  if (i < last) f(i, int(last - i));
}

// ---- loads and stores; lanes from n on read as zero and are not written
template <class T>
GS_INLINE vf load_strided(const T* p, int64_t stride, int n) {
  T lanes[W] = {};
  for (int j = 0; j < n; ++j) lanes[j] = p[j * stride];
  return load(lanes);
}
template <class T>
GS_INLINE void store_strided(T* p, int64_t stride, vf v, int n) {
  T lanes[W];
  store(lanes, v);
  for (int j = 0; j < n; ++j) p[j * stride] = lanes[j];
}
template <class V>
using Lane = std::conditional_t<sizeof(V) == sizeof(vl), int64_t, int32_t>;
template <class V, class T>
GS_INLINE V load_ints(const T* p, int64_t stride, int n) {
  Lane<V> lanes[W] = {};
  for (int j = 0; j < n; ++j) lanes[j] = Lane<V>(p[j * stride]);
  V v;
  memcpy(&v, lanes, sizeof(v));
  return v;
}
template <class T, class V>
GS_INLINE void store_ints(T* p, int64_t stride, V v, int n) {
  Lane<V> lanes[W];
  memcpy(lanes, &v, sizeof(v));
  for (int j = 0; j < n; ++j) p[j * stride] = T(lanes[j]);
}

// ---- conversions
GS_INLINE vf mask_to_float(vi mask) { return mask ? set1(1.0f) : vf{}; }
GS_INLINE vl mask_to_long(vi mask) { return __builtin_convertvector(-mask, vl); }
GS_INLINE vi long_to_mask(vl v) { return __builtin_convertvector(v != 0, vi); }
// The value as an integer type of 8 or 16 bits holds it.
template <class T>
GS_INLINE vi wrapped(vi v) {
  constexpr int SHIFT = 32 - 8 * int(sizeof(T));
  vu high = bitcast<vu>(v) << SHIFT;
  return std::is_signed<T>::value ? bitcast<vi>(high) >> SHIFT : bitcast<vi>(high >> SHIFT);
}

// ---- integers wrap around
template <class V>
using Unsigned = std::conditional_t<sizeof(V) == sizeof(vl), vul, vu>;
template <class V>
GS_INLINE V wrap_add(V a, V b) { return bitcast<V>(bitcast<Unsigned<V>>(a) + bitcast<Unsigned<V>>(b)); }
template <class V>
GS_INLINE V wrap_sub(V a, V b) { return bitcast<V>(bitcast<Unsigned<V>>(a) - bitcast<Unsigned<V>>(b)); }
template <class V>
GS_INLINE V wrap_mul(V a, V b) { return bitcast<V>(bitcast<Unsigned<V>>(a) * bitcast<Unsigned<V>>(b)); }

// ---- choices
GS_INLINE vf choose(vi mask, vf a, vf b) { return mask ? a : b; }
GS_INLINE vi choose(vi mask, vi a, vi b) { return mask ? a : b; }
GS_INLINE vl choose(vi mask, vl a, vl b) { return __builtin_convertvector(mask, vl) ? a : b; }
// NaN where either is NaN.
template <class V>
GS_INLINE V largest(V a, V b) { return ((a > b) | (a != a)) ? a : b; }
template <class V>
GS_INLINE V smallest(V a, V b) { return ((a < b) | (a != a)) ? a : b; }

// ---- functions
template <class F>
GS_INLINE vf lanewise(vf v, const F& f) {
  float lanes[W];
  store(lanes, v);
  for (int j = 0; j < W; ++j) lanes[j] = f(lanes[j]);
  return load(lanes);
}
GS_INLINE vf vsqrt(vf x) {
  return lanewise(x, [](float a) { return sqrtf(a); });
}
// vexp stops at 88.3; up to the largest float, and infinity beyond it.
GS_INLINE vf exp_of(vf x) { return x > 88.0f ? vexp(x - 2.0f) * 7.3890560989306495f : vexp(x); }
// vtanh loses its digits near 0, where five terms of the series are exact to fp32.
GS_INLINE vf tanh_of(vf x) {
  vf square = x * x;
  vf series = 1.0f - square * (0.33333334f - square * (0.13333334f - square * (0.05396825f - square * 0.021869488f)));
  vf size = x < 0.0f ? -x : x;
  return size < 0.2f ? x * series : vtanh(x);
}
GS_INLINE vf expm1_of(vf x) { return tanh_of(0.5f * x) * (exp_of(x) + 1.0f); }

// ---- rows
template <class V>
GS_INLINE V keep(V v, WholeVector, V) { return v; }
template <class V>
GS_INLINE V keep(V v, int n, V outside) { return choose(lane_ids() < n, v, outside); }
template <class V, class F>
GS_INLINE V fold(V v, const F& f) {
  V all = v;
  for (int half = W / 2; half > 0; half /= 2) {
    V other = all;
    for (int j = 0; j < half; ++j) other[j] = all[j + half];
    all = f(all, other);
  }
  for (int j = 1; j < W; ++j) all[j] = all[0];
  return all;
}
template <class V>
GS_INLINE V fold_sum(V v) {
  if constexpr (std::is_same<V, vf>::value) return set1(sum_lanes(v));
  else return fold(v, [](V a, V b) { return a + b; });
}
template <class V>
GS_INLINE V fold_largest(V v) {
  return fold(v, [](V a, V b) { return largest(a, b); });
}
template <class V>
GS_INLINE V fold_smallest(V v) {
  return fold(v, [](V a, V b) { return smallest(a, b); });
}
