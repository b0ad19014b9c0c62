// The router of experts. Distinct choices have one order, which vectors find; where two are equal (or one is NaN), the
// best are chosen by the algorithms of the standard library that torch.topk runs on a CPU, so that the same one wins.
#include <algorithm>

struct Ranked {
  float value;
  int32_t id;
};

// The K largest of N (a multiple of W) one after the other, each replaced by -infinity; false if two are equal.
template <int64_t N, int64_t K>
GS_INLINE bool take_distinct(float* left, Ranked* best) {
  vi odd = {};
  for (int64_t i = 0; i < N; i += W) odd |= load(left + i) != load(left + i);
  for (int64_t k = 0; k < K; ++k) {
    vf top = set1(-INFINITY);
    for (int64_t i = 0; i < N; i += W) top = vmax(load(left + i), top);
    const float highest = max_lanes(top);
    vi count = -odd, place = {};
    for (int64_t i = 0; i < N; i += W) {
      vi equal = load(left + i) == highest;
      count -= equal;
      place |= equal & (lane_ids() + int32_t(i));
    }
    int32_t total = 0, id = 0;
    for (int j = 0; j < W; ++j) {
      total += count[j];
      id |= place[j];
    }
    if (total != 1) return false;
    best[k] = {highest, id};
    left[id] = -INFINITY;
  }
  return true;
}

// The K best of N in order; NaN ranks above every number.
template <int64_t N, int64_t K>
GS_INLINE void take_best(const float* values, Ranked* best) {
  if constexpr (K <= 16) {
    constexpr int64_t PADDED = (N + W - 1) / W * W;
    float left[PADDED];
    memcpy(left, values, N * sizeof(float));
    for (int64_t i = N; i < PADDED; ++i) left[i] = -INFINITY;
    if (take_distinct<PADDED, K>(left, best)) return;
  }
  Ranked all[N];
  for (int64_t i = 0; i < N; ++i) all[i] = {values[i], int32_t(i)};
  auto before = [](const Ranked& a, const Ranked& b) {
    return (a.value != a.value && b.value == b.value) || a.value > b.value;
  };
  if (K * 64 <= N) {
    std::partial_sort(all, all + K, all + N, before);
  } else {
    std::nth_element(all, all + K - 1, all + N, before);
    std::sort(all, all + K - 1, before);
  }
  memcpy(best, all, K * sizeof(Ranked));
}

struct SoftmaxScores {
  template <int64_t E>
  static GS_INLINE void of(float* scores) {
    vf top = set1(-INFINITY), sum = {};
    for (int64_t i = 0; i < E; i += W) top = vmax(load(scores + i), top);
    const float highest = max_lanes(top);
    for (int64_t i = 0; i < E; i += W) {
      vf y = vexp(load(scores + i) - highest);
      store(scores + i, y);
      sum = sum + y;
    }
    const float total = sum_lanes(sum);
    for (int64_t i = 0; i < E; i += W) store(scores + i, load(scores + i) / total);
  }
};
struct SigmoidScores {
  template <int64_t E>
  static GS_INLINE void of(float* scores) {
    for (int64_t i = 0; i < E; i += W) store(scores + i, vsigmoid(load(scores + i)));
  }
};
struct PlainScores {
  template <int64_t E>
  static GS_INLINE void of(float*) {}
};

struct PlainWeights {
  static GS_INLINE void of(float*, int64_t, float, float) {}
};
struct SumWeights {
  static GS_INLINE void of(float* weights, int64_t k, float eps, float min_sum) {
    float sum = 0;
    for (int64_t j = 0; j < k; ++j) sum += weights[j];
    sum += eps;
    if (sum < min_sum) sum = min_sum;
    for (int64_t j = 0; j < k; ++j) weights[j] /= sum;
  }
};
struct SoftmaxWeights {
  static GS_INLINE void of(float* weights, int64_t k, float, float) {
    float top = weights[0], sum = 0;
    for (int64_t j = 1; j < k; ++j) top = weights[j] > top ? weights[j] : top;
    for (int64_t j = 0; j < k; ++j) sum += weights[j] = expf(weights[j] - top);
    for (int64_t j = 0; j < k; ++j) weights[j] /= sum;
  }
};
struct SigmoidWeights {
  static GS_INLINE void of(float* weights, int64_t k, float, float) {
    for (int64_t j = 0; j < k; ++j) weights[j] = 1.0f / (1.0f + expf(-weights[j]));
  }
};

// One group of neighbours in G ranks by the sum of its GROUP_TOP best; the others' choices become -infinity.
template <int64_t E, int64_t G, int64_t TOP_GROUPS, int64_t GROUP_TOP>
GS_INLINE void keep_best_groups(float* choice) {
  constexpr int64_t SIZE = E / G;
  Ranked members[GROUP_TOP], groups[TOP_GROUPS];
  float ranks[G];
  bool kept[G] = {};
  for (int64_t g = 0; g < G; ++g) {
    take_best<SIZE, GROUP_TOP>(choice + g * SIZE, members);
    ranks[g] = 0;
    for (int64_t j = 0; j < GROUP_TOP; ++j) ranks[g] += members[j].value;
  }
  take_best<G, TOP_GROUPS>(ranks, groups);
  for (int64_t j = 0; j < TOP_GROUPS; ++j) kept[groups[j].id] = true;
  for (int64_t e = 0; e < E; ++e)
    if (!kept[e / SIZE]) choice[e] = -INFINITY;
}

template <class T, class Bias, class Out, class Scores, class Weights, int64_t E, int64_t K, int64_t G,
          int64_t TOP_GROUPS, int64_t GROUP_TOP, class LogitRows, class OutRows, class IdRows>
GS_INLINE void route(const T* logits, const Bias* bias, Out* weights_out, int64_t* ids_out, int64_t n, int64_t threads,
                     float eps, float min_sum, float scale) {
  constexpr int64_t PADDED = (E + W - 1) / W * W;
  parallel_for(threads, n, 2048 / E + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* in = LogitRows().at(logits, row);
      float scores[PADDED], choice[PADDED], weights[K];
      Ranked ranked[K];
      for (int64_t e = 0; e < PADDED; ++e) scores[e] = -INFINITY;  // experts past the end add nothing to a softmax
      for_lanes<E>([&](int64_t i, int lanes) { store_lanes(scores + i, load_lanes(in + i, lanes), lanes); });
      Scores::template of<PADDED>(scores);
      for (int64_t e = 0; e < E; ++e) choice[e] = bias ? scores[e] + to_float(bias[e]) : scores[e];
      if constexpr (G > 1) keep_best_groups<E, G, TOP_GROUPS, GROUP_TOP>(choice);
      take_best<E, K>(choice, ranked);
      for (int64_t j = 0; j < K; ++j) weights[j] = scores[ranked[j].id];
      Weights::of(weights, K, eps, min_sum);
      Out* to = OutRows().at(weights_out, row);
      int64_t* ids = IdRows().at(ids_out, row);
      for (int64_t j = 0; j < K; ++j) {
        to[j] = from_float<Out>(weights[j] * scale);
        ids[j] = ranked[j].id;
      }
    }
  });
}
