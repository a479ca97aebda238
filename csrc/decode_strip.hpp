// The inner loop of decode attention: query rows against a strip of at most 64 positions, with a running softmax.
//
//   s = scale q k;  m' = max(m, max s);  p = exp(s - m');  l = l exp(m - m') + sum p;  a = a exp(m - m') + sum p v
//
// A row's sums run over dimensions and positions in one fixed order, whatever rows are beside it. Accumulators of
// bf16 values hold a word's low halves (even dimensions) in one vector and its high halves in the next.
#pragma once

#include <limits>

#include "gemm.hpp"
#include "paged_cache.hpp"

namespace r1fast {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kStripTiles = 4;
constexpr int64_t kStrip = kStripTiles * kTile;  // positions

template <class T>
struct Strip {
  const T* keys[kStripTiles];
  const T* values[kStripTiles];
  int64_t num_positions;  // in sight, 1 to kStrip
  int64_t head_dim;
  float scale;
  const Strip* next;  // to be fetched meanwhile: memory is far when every sequence has blocks of its own
};

// Rows of one kv head: `ld` floats apart in q and a.
struct Rows {
  const float* q;
  float* m;
  float* l;
  float* a;
  int64_t ld;
  int64_t count;

  Rows slice(int64_t begin, int64_t end) const {
    return {q + begin * ld, m + begin, l + begin, a + begin * ld, ld, end - begin};
  }
};

// Rows that have seen no position.
inline void clear(const Rows& rows) {
  std::fill(rows.m, rows.m + rows.count, -kInfinity);
  std::fill(rows.l, rows.l + rows.count, 0.0f);
  std::fill(rows.a, rows.a + rows.count * rows.ld, 0.0f);
}

// Floats of one row: whole vectors, in pairs.
inline int64_t row_floats(int64_t head_dim) { return round_up(head_dim, 2 * kTile); }

// Where dimension d lies in a row of accumulators.
template <class T>
R1FAST_INLINE int64_t accumulator_of(int64_t d) {
  if constexpr (sizeof(T) == 4) return d;
  return d / 32 * 32 + d % 2 * 16 + d % 32 / 2;
}

R1FAST_INLINE float low_half(uint32_t word) { return float_of(word << 16); }
R1FAST_INLINE float high_half(uint32_t word) { return float_of(word & 0xffff0000u); }

R1FAST_INLINE void score_tile(const float* q, const float* keys, int64_t head_dim, float* scores) {
  for (int64_t d = 0; d < head_dim; ++d) {
    for (int64_t i = 0; i < kTile; ++i) scores[i] += q[d] * keys[d * kTile + i];
  }
}

R1FAST_INLINE void score_tile(const float* q, const Bf16* keys, int64_t head_dim, float* scores) {
  for (int64_t d = 0; d < head_dim; d += 2) {
    uint32_t words[kTile];
    std::memcpy(words, keys + d * kTile, sizeof words);
    for (int64_t i = 0; i < kTile; ++i) scores[i] += q[d] * low_half(words[i]);
    for (int64_t i = 0; i < kTile; ++i) scores[i] += q[d + 1] * high_half(words[i]);
  }
}

R1FAST_INLINE void add_value(float p, const float* value, int64_t head_dim, float* a) {
  for (int64_t d = 0; d < head_dim; ++d) a[d] += p * value[d];
}

R1FAST_INLINE void add_value(float p, const Bf16* value, int64_t head_dim, float* a) {
  int64_t d = 0;
  for (; d + 32 <= head_dim; d += 32) {
    uint32_t words[16];
    std::memcpy(words, value + d, sizeof words);
    for (int64_t i = 0; i < 16; ++i) a[d + i] += p * low_half(words[i]);
    for (int64_t i = 0; i < 16; ++i) a[d + 16 + i] += p * high_half(words[i]);
  }
  for (; d < head_dim; ++d) a[accumulator_of<Bf16>(d)] += p * to_float(value[d]);
}

// In plain C++, for the baseline.
template <class T>
R1FAST_INLINE void attend_strip(const Strip<T>& strip, const Rows& rows) {
  const int64_t num_tiles = ceil_div(strip.num_positions, kTile);
  for (int64_t r = 0; r < rows.count; ++r) {
    float* const a = rows.a + r * rows.ld;
    float p[kStrip] = {};
    for (int64_t t = 0; t < num_tiles; ++t) {
      score_tile(rows.q + r * rows.ld, strip.keys[t], strip.head_dim, p + t * kTile);
    }
    for (int64_t i = 0; i < kStrip; ++i) p[i] = select(i < strip.num_positions, p[i] * strip.scale, -kInfinity);
    float most[kTile], sums[kTile] = {};
    for (int64_t i = 0; i < kTile; ++i) most[i] = p[i];
    for (int64_t i = kTile; i < kStrip; ++i) most[i % kTile] = select(p[i] > most[i % kTile], p[i], most[i % kTile]);
    float m = rows.m[r];
    for (int64_t i = 0; i < kTile; ++i) m = select(most[i] > m, most[i], m);
    for (int64_t i = 0; i < kStrip; ++i) p[i] = exp_clamped(clamp_exponent(p[i] - m));
    for (int64_t i = 0; i < kStrip; ++i) sums[i % kTile] += p[i];
    float sum = 0;
    for (const float lane : sums) sum += lane;
    const float shrink = exp_clamped(clamp_exponent(rows.m[r] - m));
    rows.m[r] = m;
    rows.l[r] = rows.l[r] * shrink + sum;
    for (int64_t d = 0; d < rows.ld; ++d) a[d] *= shrink;
    for (int64_t i = 0; i < strip.num_positions; ++i) {
      add_value(p[i], strip.values[i / kTile] + i % kTile * strip.head_dim, strip.head_dim, a);
    }
  }
}

// (m, l, a) of `more` merged into `rows`.
R1FAST_INLINE void merge_rows(const Rows& rows, const Rows& more) {
  for (int64_t r = 0; r < rows.count; ++r) {
    if (more.l[r] == 0) continue;  // it has seen no position; a NaN is not equal to 0
    const float m = select(more.m[r] > rows.m[r], more.m[r], rows.m[r]);
    const float old_share = exp_clamped(clamp_exponent(rows.m[r] - m));
    const float new_share = exp_clamped(clamp_exponent(more.m[r] - m));
    rows.m[r] = m;
    rows.l[r] = rows.l[r] * old_share + more.l[r] * new_share;
    for (int64_t d = 0; d < rows.ld; ++d) {
      rows.a[r * rows.ld + d] = rows.a[r * rows.ld + d] * old_share + more.a[r * rows.ld + d] * new_share;
    }
  }
}

// o = a / l, or 0 of a row that has seen no position.
R1FAST_INLINE void finish_row(const float* a, float l, int64_t head_dim, float* out) {
  const float share = l == 0 ? 0 : 1 / l;
  for (int64_t d = 0; d < head_dim; ++d) out[d] = a[d] * share;
}

R1FAST_INLINE void finish_row(const float* a, float l, int64_t head_dim, Bf16* out) {
  const float share = l == 0 ? 0 : 1 / l;
  int64_t d = 0;
  for (; d + 32 <= head_dim; d += 32) {
    uint32_t words[16];
    for (int64_t i = 0; i < 16; ++i) {
      words[i] = bf16_bits(a[d + i] * share) | bf16_bits(a[d + 16 + i] * share) << 16;
    }
    std::memcpy(out + d, words, sizeof words);
  }
  for (; d < head_dim; ++d) store(out + d, a[accumulator_of<Bf16>(d)] * share);
}

R1FAST_INLINE void load_query(const float* q, int64_t head_dim, float* row) {
  std::memcpy(row, q, sizeof(float) * head_dim);
}
R1FAST_INLINE void load_query(const Bf16* q, int64_t head_dim, float* row) {
  for (int64_t d = 0; d < head_dim; ++d) row[d] = to_float(q[d]);
}

// How many of `left` to take at once, at most `most`: nearly equal parts.
R1FAST_INLINE int64_t part_of(int64_t left, int64_t most) {
  return left <= most ? left : left < 2 * most ? (left + 1) / 2 : most;
}

}  // namespace r1fast

#define R1FAST_KERNELS "strip_kernels.hpp"
#include "each_level.hpp"
