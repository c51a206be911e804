// A lookup in one layer of a replica on a CPU; what model_runner/replica/native.py compiles and calls.
//
// nearest: keys are scanned as bytes. How far a distance may be off by that is known for every row, so that the exact
// distances of all rows that may be among the K nearest are computed: what is found is exact.
// answer: lambda, abstention, the blend of logits and what is counted: replica/arithmetic.py in one pass.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

extern "C" {

// Keys less their mean, a scale for each row. `bytes` int8 [blocks][quads][16 rows][4 numbers], zeros behind the last.
struct Keys {
  const int8_t* bytes;
  const float *scales, *norms, *errors;  // [16 * blocks]; norms: squared, +inf where a row is not found
  const int32_t* sums;                   // 128 times those of a row's bytes
  const float *mean, *keys;              // [d]; [rows, d], those of the layer
  int64_t blocks, dimension, quads;      // quads: even
  float longest;                         // of the lengths of all rows less the mean, at least
};

struct Settings {
  float gamma, step_size, null_weight, min_lambda, min_similarity, smallest;
  int64_t deltas;
};
}

namespace {

constexpr int64_t kRows = 16, kTokens = 8;
// The best of each of so many groups of rows: of the K best of them, K different rows are at least as near.
constexpr int64_t kClasses = 16, kGroups = kClasses * kRows;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// What f32 may be off by, as a share of the square of what is subtracted.
constexpr float kRounding = 4e-6f;

struct Query {
  const uint8_t* bytes;
  float scale, slope, width;  // a distance is off by at most slope * error of the row + width
  float *lower, *minima;      // of all rows; the smallest upper bound of each group
  bool finite;
};

struct Scratch {
  std::vector<float> lower, minima;
  std::vector<uint8_t> bytes;
  std::vector<int32_t> chosen;
  std::vector<std::pair<float, int32_t>> found;
};

float squared_distance(const float* a, const float* b, int64_t d) {
  __m512 total = _mm512_setzero_ps();
  for (int64_t i = 0; i < d; i += 16) {
    const __mmask16 there = d - i >= 16 ? 0xffff : (1u << (d - i)) - 1;
    const __m512 x =
        _mm512_sub_ps(_mm512_maskz_loadu_ps(there, a + i), _mm512_maskz_loadu_ps(there, b + i));
    total = _mm512_fmadd_ps(x, x, total);
  }
  return _mm512_reduce_add_ps(total);
}

void encode(const Keys& layer, const float* vector, uint8_t* bytes, Query& query) {
  float largest = 0, square = 0, left = 0;
  for (int64_t i = 0; i < layer.dimension; i++) {
    const float x = vector[i] - layer.mean[i];
    largest = std::max(largest, std::fabs(x));
    square += x * x;
  }
  query.finite = std::isfinite(square);
  std::fill_n(bytes, layer.quads * 4, 128);
  query.bytes = bytes;
  query.scale = query.slope = query.width = 0;
  std::fill_n(query.minima, kGroups, kInfinity);
  if (!query.finite) return;
  query.scale = std::max(largest / 127, 1e-30f);
  const float inverse = 1 / query.scale;
  for (int64_t i = 0; i < layer.dimension; i++) {
    const float x = vector[i] - layer.mean[i], whole = std::nearbyint(x * inverse);
    bytes[i] = static_cast<uint8_t>(static_cast<int>(whole) + 128);
    left += (x - whole * query.scale) * (x - whole * query.scale);
  }
  const float length = std::sqrt(square), both = length + layer.longest;
  query.slope = 2 * length;
  query.width = 2 * std::sqrt(left) * layer.longest + kRounding * both * both;
}

template <int N>
void scan(const Keys& layer, const Query* queries) {
  for (int64_t block = 0; block < layer.blocks; block++) {
    const int8_t* numbers = layer.bytes + block * layer.quads * 64;
    __m512i even[N], odd[N];
    for (int t = 0; t < N; t++) even[t] = odd[t] = _mm512_setzero_si512();
    for (int64_t i = 0; i < layer.quads; i += 2) {
      const __m512i one = _mm512_loadu_si512(numbers + i * 64);
      const __m512i two = _mm512_loadu_si512(numbers + i * 64 + 64);
      for (int t = 0; t < N; t++) {
        const int32_t* asked = reinterpret_cast<const int32_t*>(queries[t].bytes) + i;
        even[t] = _mm512_dpbusd_epi32(even[t], _mm512_set1_epi32(asked[0]), one);
        odd[t] = _mm512_dpbusd_epi32(odd[t], _mm512_set1_epi32(asked[1]), two);
      }
    }
    const int64_t row = block * kRows;
    const __m512 scale = _mm512_loadu_ps(layer.scales + row);
    const __m512 norm = _mm512_loadu_ps(layer.norms + row);
    const __m512 error = _mm512_loadu_ps(layer.errors + row);
    const __m512i sums = _mm512_loadu_si512(layer.sums + row);
    for (int t = 0; t < N; t++) {
      const __m512 product =
          _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_add_epi32(even[t], odd[t]), sums));
      const __m512 twice = _mm512_mul_ps(scale, _mm512_set1_ps(2 * queries[t].scale));
      const __m512 score = _mm512_fnmadd_ps(twice, product, norm);
      const __m512 width = _mm512_fmadd_ps(error, _mm512_set1_ps(queries[t].slope),
                                           _mm512_set1_ps(queries[t].width));
      _mm512_storeu_ps(queries[t].lower + row, _mm512_sub_ps(score, width));
      float* best = queries[t].minima + (block % kClasses) * kRows;
      _mm512_storeu_ps(best, _mm512_min_ps(_mm512_loadu_ps(best), _mm512_add_ps(score, width)));
    }
  }
}

int64_t may_be_near(const Keys& layer, const Query& query, int64_t k, int32_t* chosen) {
  std::nth_element(query.minima, query.minima + k - 1, query.minima + kGroups);
  const __m512 bound =
      _mm512_set1_ps(std::min(query.minima[k - 1], std::numeric_limits<float>::max()));
  const __m512i places =
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  int64_t count = 0;
  for (int64_t row = 0; row < layer.blocks * kRows; row += kRows) {
    const __mmask16 near =
        _mm512_cmp_ps_mask(_mm512_loadu_ps(query.lower + row), bound, _CMP_LE_OQ);
    if (!near) continue;
    const __m512i rows = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(row)), places);
    _mm512_mask_compressstoreu_epi32(chosen + count, near, rows);
    count += __builtin_popcount(near);
  }
  return count;
}

void closest(const Keys& layer, const float* vector, const int32_t* chosen, int64_t count, int64_t k,
             std::vector<std::pair<float, int32_t>>& found, int64_t* rows, float* distances) {
  const int64_t d = layer.dimension, ahead = 4;
  found.resize(count);
  for (int64_t i = 0; i < count; i++) {
    if (i + ahead < count)
      for (int64_t j = 0; j < d; j += 16)
        _mm_prefetch(layer.keys + chosen[i + ahead] * d + j, _MM_HINT_T0);
    found[i] = {squared_distance(vector, layer.keys + chosen[i] * d, d), chosen[i]};
  }
  const int64_t kept = std::min(count, k);
  std::partial_sort(found.begin(), found.begin() + kept, found.end());
  for (int64_t i = 0; i < k; i++) {
    rows[i] = i < kept ? found[i].second : 0;
    distances[i] = i < kept ? found[i].first : kInfinity;
  }
}

// Returns how many exact distances were computed.
int64_t nearest_of_some(const Keys& layer, const float* vectors, int64_t tokens, int64_t k,
                        int64_t* rows, float* distances) {
  int64_t looked_at = 0;
  static thread_local Scratch scratch;
  const int64_t every = layer.blocks * kRows, padded = layer.quads * 4;
  scratch.lower.resize(kTokens * every);
  scratch.minima.resize(kTokens * kGroups);
  scratch.bytes.resize(kTokens * padded);
  scratch.chosen.resize(every);
  for (int64_t first = 0; first < tokens; first += kTokens) {
    const int64_t count = std::min(kTokens, tokens - first);
    Query queries[kTokens];
    for (int64_t t = 0; t < count; t++) {
      queries[t].lower = scratch.lower.data() + t * every;
      queries[t].minima = scratch.minima.data() + t * kGroups;
      encode(layer, vectors + (first + t) * layer.dimension, scratch.bytes.data() + t * padded,
             queries[t]);
    }
    for (int64_t t = 0; t < count;) {
      if (count - t >= 8) scan<8>(layer, queries + t), t += 8;
      else if (count - t >= 4) scan<4>(layer, queries + t), t += 4;
      else if (count - t >= 2) scan<2>(layer, queries + t), t += 2;
      else scan<1>(layer, queries + t), t += 1;
    }
    for (int64_t t = 0; t < count; t++) {
      const int64_t token = first + t;
      const int64_t near =
          queries[t].finite ? may_be_near(layer, queries[t], k, scratch.chosen.data()) : 0;
      closest(layer, vectors + token * layer.dimension, scratch.chosen.data(), near, k,
              scratch.found, rows + token * k, distances + token * k);
      looked_at += near;
    }
  }
  return looked_at;
}

}  // namespace

extern "C" {

// rows int64 [T, k], distances f32 [T, k], ascending; an empty slot is row 0 at +inf, as is all of a token that is not
// finite. k is at most 128. queries f32 [T, d]. Returns how many exact distances were computed.
int64_t nearest(const Keys* layer, const float* queries, int64_t tokens, int64_t k, int64_t* rows,
                float* distances) {
  // A team of all threads or none: teams of other sizes in between would make threads anew, here and in torch.
  const int64_t threads = tokens > 1 ? omp_get_max_threads() : 1;
  if (threads == 1) return nearest_of_some(*layer, queries, tokens, k, rows, distances);
  const int64_t each = (tokens + threads - 1) / threads;
  int64_t looked_at = 0;
#pragma omp parallel for schedule(static, 1) reduction(+ : looked_at)
  for (int64_t part = 0; part < threads; part++) {
    const int64_t first = part * each, count = std::min(each, tokens - first);
    if (count > 0)
      looked_at += nearest_of_some(*layer, queries + first * layer->dimension, count, k,
                                   rows + first * k, distances + first * k);
  }
  return looked_at;
}

// inputs f32 [T, d], logits f32 [T, n], valid bool [T] or null, rows and distances as of `nearest`, values f32 [rows, n].
// Writes blended f32 [T, n], lambdas f32 [T], abstained bool [T], counts f64 [4]; adds to hits int32 [rows] and to
// totals f64 [4].
void answer(const Settings* settings, const float* inputs, int64_t d, const float* logits, int64_t n,
            const uint8_t* valid, const int64_t* rows, const float* distances, int64_t k,
            int64_t tokens, const float* values, float* blended, float* lambdas, uint8_t* abstained,
            double* counts, int32_t* hits, double* totals) {
  const Settings& how = *settings;
  static thread_local std::vector<float> near;
  near.resize(k);
  std::fill_n(counts, 4, 0.0);
  for (int64_t t = 0; t < tokens; t++) {
    const bool there = valid == nullptr || valid[t];
    float square = 0, sum = 0, total = 0;
    for (int64_t i = 0; i < d; i++) square += inputs[t * d + i] * inputs[t * d + i];
    for (int64_t i = 0; i < n; i++) sum += logits[t * n + i];
    const bool looked_up = there && std::isfinite(std::sqrt(square) + sum);
    for (int64_t j = 0; looked_up && j < k; j++) {
      near[j] = std::exp(-how.gamma * distances[t * k + j]);
      total += near[j];
    }
    const float whole = how.deltas ? std::max(total + how.null_weight, how.smallest) : k;
    const float lambda = total / whole;
    const bool answered = looked_up && lambda > how.min_lambda;
    lambdas[t] = answered ? lambda : 0;
    abstained[t] = looked_up && !answered;
    counts[0] += looked_up;
    counts[1] += abstained[t];
    counts[2] += there && !looked_up;
    counts[3] += lambdas[t];
    float* out = blended + t * n;
    std::copy_n(logits + t * n, n, out);
    if (!answered) continue;
    const float kept = how.deltas ? 1 : 1 - lambda, step = how.deltas ? how.step_size : 1;
    for (int64_t i = 0; i < n; i++) out[i] *= kept;
    for (int64_t j = 0; j < k; j++) {
      const float share = step * (near[j] / whole);
      const float* value = values + rows[t * k + j] * n;
      for (int64_t i = 0; i < n; i++) out[i] += share * value[i];
      hits[rows[t * k + j]] += near[j] >= how.min_similarity;
    }
  }
  for (int i = 0; i < 4; i++) totals[i] += counts[i];
}
}
