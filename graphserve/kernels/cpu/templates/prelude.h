// Vectors of GS_WIDTH fp32 lanes over the compilers' vector extension, bf16 conversion, and the thread team.
// GS_WIDTH (16, 8 or 4) and GS_DPBF16 (0 or 1) are defined by the lines above this one.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if GS_WIDTH > 4
#include <immintrin.h>
#endif

#define GS_INLINE inline __attribute__((always_inline))

constexpr int W = GS_WIDTH;
typedef float vf __attribute__((vector_size(4 * GS_WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * GS_WIDTH)));
typedef uint32_t vu __attribute__((vector_size(4 * GS_WIDTH)));
typedef uint16_t vh __attribute__((vector_size(2 * GS_WIDTH)));

struct bf16 {
  uint16_t bits;
};

template <class To, class From>
GS_INLINE To bitcast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bitcast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- scalars
GS_INLINE float to_float(float x) { return x; }
GS_INLINE float to_float(bf16 x) { return bitcast<float>(uint32_t(x.bits) << 16); }

template <class T>
GS_INLINE T from_float(float x);
template <>
GS_INLINE float from_float<float>(float x) { return x; }
template <>
GS_INLINE bf16 from_float<bf16>(float x) {
  uint32_t u = bitcast<uint32_t>(x);
  if (x != x) return bf16{uint16_t((u >> 16) | 0x40)};  // a quiet NaN stays one
  return bf16{uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};  // nearest, ties to even
}

// ---- vectors
GS_INLINE vf set1(float x) { return x - vf{}; }
GS_INLINE vi set1i(int32_t x) { return x - vi{}; }
GS_INLINE vi lane_ids() {
  vi ids;
  for (int i = 0; i < W; ++i) ids[i] = i;
  return ids;
}

// 16-bit lanes to 32-bit lanes and back. GCC 12 splits the 16-lane __builtin_convertvector into halves.
GS_INLINE vu widen(vh h) {
#if GS_WIDTH == 16
  return bitcast<vu>(_mm512_cvtepu16_epi32(bitcast<__m256i>(h)));
#elif GS_WIDTH == 8
  return bitcast<vu>(_mm256_cvtepu16_epi32(bitcast<__m128i>(h)));
#else
  return __builtin_convertvector(h, vu);
#endif
}
GS_INLINE vh narrow(vu u) {
#if GS_WIDTH == 16
  return bitcast<vh>(_mm512_cvtepi32_epi16(bitcast<__m512i>(u)));
#else
  return __builtin_convertvector(u, vh);
#endif
}

GS_INLINE vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof(v));
  return v;
}
GS_INLINE vf load(const bf16* p) {
  vh h;
  memcpy(&h, p, sizeof(h));
  return bitcast<vf>(widen(h) << 16);
}
GS_INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof(v)); }
GS_INLINE vh bf16_bits(vf v) {
#if GS_DPBF16
  return bitcast<vh>(_mm512_cvtneps_pbh(bitcast<__m512>(v)));
#else
  vu u = bitcast<vu>(v);
  vu nearest = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu quiet = (u >> 16) | 0x40u;
  return narrow(v != v ? quiet : nearest);
#endif
}
GS_INLINE void store(bf16* p, vf v) {
  vh h = bf16_bits(v);
  memcpy(p, &h, sizeof(h));
}

// The first n lanes (n < W); other lanes read as zero and are not written.
template <class T>
GS_INLINE vf load_n(const T* p, int n) {
  T lanes[W] = {};
  memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <class T>
GS_INLINE void store_n(T* p, vf v, int n) {
  T lanes[W];
  store(lanes, v);
  memcpy(p, lanes, n * sizeof(T));
}
template <class T>
GS_INLINE vf load_upto(const T* p, int64_t n) {
  return n >= W ? load(p) : load_n(p, int(n));
}
template <class T>
GS_INLINE void store_upto(T* p, vf v, int64_t n) {
  if (n >= W) store(p, v);
  else store_n(p, v, int(n));
}

// The value as T would hold it, back in fp32.
template <class T>
GS_INLINE vf rounded(vf v);
template <>
GS_INLINE vf rounded<float>(vf v) { return v; }
template <>
GS_INLINE vf rounded<bf16>(vf v) { return bitcast<vf>(widen(bf16_bits(v)) << 16); }

GS_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
GS_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
GS_INLINE float sum_lanes(vf v) {
#if GS_WIDTH == 16
  return _mm512_reduce_add_ps(bitcast<__m512>(v));
#else
  float half[W / 2];
  for (int i = 0; i < W / 2; ++i) half[i] = v[i] + v[i + W / 2];
  float total = 0;
  for (int i = 0; i < W / 2; ++i) total += half[i];
  return total;
#endif
}
GS_INLINE float max_lanes(vf v) {
#if GS_WIDTH == 16
  return _mm512_reduce_max_ps(bitcast<__m512>(v));
#else
  float top = v[0];
  for (int i = 1; i < W; ++i) top = v[i] > top ? v[i] : top;
  return top;
#endif
}

// e^x to about 1 ulp: x = n ln2 + r, degree-6 Taylor on |r| <= ln2/2 (remainder 1e-8 relative); 0 below -87.3.
GS_INLINE vf vexp(vf x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  vf c = x > 88.3f ? set1(88.3f) : x;
  c = c < -87.3f ? set1(-87.3f) : c;
  vf n = (c * 1.44269504088896341f + magic) - magic;
  vf r = c - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = set1(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
  vf y = p * bitcast<vf>(exponent);
  return x < -87.3f ? vf{} : y;
}
GS_INLINE vf vsigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }
GS_INLINE vf vtanh(vf x) {
  vf a = x < 0.0f ? -x : x;
  vf y = 1.0f - 2.0f / (vexp(2.0f * a) + 1.0f);
  return x < 0.0f ? -y : y;
}

// ---- threads
// The OpenMP runtime torch has loaded is entered through its C ABI: no compiler flag, and no second thread pool.
#if GS_OPENMP
extern "C" {
void GOMP_parallel(void (*fn)(void*), void* data, unsigned num_threads, unsigned flags);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
}
#endif

// Calls f(thread, num_threads) on each thread of a team of at most `threads`.
template <class F>
GS_INLINE void parallel(int64_t threads, const F& f) {
#if GS_OPENMP
  if (threads > 1) {
    GOMP_parallel([](void* data) { (*static_cast<const F*>(data))(omp_get_thread_num(), omp_get_num_threads()); },
                  const_cast<F*>(&f), unsigned(threads), 0);
    return;
  }
#endif
  f(0, 1);
}

// Splits [0, n) into contiguous shares, one a thread; stays on one thread below `grain` items for each of two.
template <class F>
GS_INLINE void parallel_for(int64_t threads, int64_t n, int64_t grain, const F& f) {
  int64_t useful = n / (grain > 0 ? grain : 1);
  if (useful < threads) threads = useful;
  if (threads <= 1) {
    f(int64_t(0), n);
    return;
  }
  parallel(threads, [&](int64_t thread, int64_t team) { f(n * thread / team, n * (thread + 1) / team); });
}

// Memory of the calling thread that is kept from call to call and only grows.
struct Workspace {
  char* base = nullptr;
  size_t bytes = 0;
  char* reserve(size_t wanted) {
    if (wanted > bytes) {
      free(base);
      bytes = (wanted + 4095) & ~size_t(4095);
      base = static_cast<char*>(aligned_alloc(64, bytes));
      if (!base) abort();
    }
    return base;
  }
  ~Workspace() { free(base); }
};

// Calls f(i, n) for lanes i..i+n of D elements: n == W, then once the remainder.
template <int64_t D, class F>
GS_INLINE void for_lanes(const F& f) {
  for (int64_t i = 0; i + W <= D; i += W) f(i, W);
  if constexpr (D % W != 0) f(D / W * W, int(D % W));
}
template <class T>
GS_INLINE vf load_lanes(const T* p, int n) {
  return n == W ? load(p) : load_n(p, n);
}
template <class T>
GS_INLINE void store_lanes(T* p, vf v, int n) {
  if (n == W) store(p, v);
  else store_n(p, v, n);
}

// Row i of a tensor whose leading dimensions are [outer, INNER] with strides S0, S1 (elements).
template <int64_t INNER, int64_t S0, int64_t S1>
struct Rows {
  static constexpr int64_t S0_ = S0;
  template <class T>
  inline __attribute__((always_inline)) T* at(T* base, int64_t i) const {
    return INNER == 1 ? base + i * S0 : base + (i / INNER) * S0 + (i % INNER) * S1;
  }
};
