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

// In plain C++, for the compiler to vectorise.
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

#if defined(__x86_64__)
// The low and the high halves of 16 words, as floats.
R1FAST_AVX512_INLINE void halves(__m512i words, __m512& low, __m512& high) {
  low = _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, words, 16));
  high = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Scores of M rows by N tiles, from word `k` of q and of the keys. bf16 is multiplied as fp32: dot products of bf16
// pairs have a quarter of the throughput on the first CPUs that have them.
template <int M, int N>
R1FAST_AVX512_INLINE void score_word(const Strip<float>& strip, const float* q, int64_t ld, int64_t k,
                                     __m512 (&s)[M][N]) {
  __m512 key[N];
  for (int j = 0; j < N; ++j) key[j] = _mm512_loadu_ps(strip.keys[j] + k * kTile);
  for (int i = 0; i < M; ++i) {
    const __m512 value = _mm512_set1_ps(q[i * ld + k]);
    for (int j = 0; j < N; ++j) s[i][j] = _mm512_fmadd_ps(value, key[j], s[i][j]);
  }
}

template <int M, int N>
R1FAST_AVX512_INLINE void score_word(const Strip<Bf16>& strip, const float* q, int64_t ld, int64_t k,
                                     __m512 (&s)[M][N]) {
  __m512 low[N], high[N];
  for (int j = 0; j < N; ++j) halves(_mm512_loadu_si512(strip.keys[j] + 2 * k * kTile), low[j], high[j]);
  for (int i = 0; i < M; ++i) {
    const __m512 first = _mm512_set1_ps(q[i * ld + 2 * k]), second = _mm512_set1_ps(q[i * ld + 2 * k + 1]);
    for (int j = 0; j < N; ++j) s[i][j] = _mm512_fmadd_ps(first, low[j], s[i][j]);
    for (int j = 0; j < N; ++j) s[i][j] = _mm512_fmadd_ps(second, high[j], s[i][j]);
  }
}

// M rows by 16 N positions; a line of the next strip's keys is fetched for each that is read.
template <class T, int M, int N>
R1FAST_AVX512_INLINE void score_rows(const Strip<T>& strip, const float* q, int64_t ld, __m512 (&s)[M][N]) {
  const int64_t num_words = strip.head_dim * static_cast<int64_t>(sizeof(T)) / 4;
  for (int part = 0; part < N; ++part) {
    const char* line = reinterpret_cast<const char*>(strip.next->keys[part]);
    for (int64_t k = num_words * part / N; k < num_words * (part + 1) / N; ++k) {
      for (int j = 0; j < N; ++j, line += 64) _mm_prefetch(line, _MM_HINT_T0);
      score_word<M, N>(strip, q, ld, k, s);
    }
  }
}

template <class Combine>
R1FAST_AVX512_INLINE float across_lanes(__m512 x, const Combine& combine) {
  x = combine(x, _mm512_maskz_shuffle_f32x4(0xffff, x, x, 0x4e));
  x = combine(x, _mm512_maskz_shuffle_f32x4(0xffff, x, x, 0xb1));
  x = combine(x, _mm512_maskz_permute_ps(0xffff, x, 0x4e));
  x = combine(x, _mm512_maskz_permute_ps(0xffff, x, 0xb1));
  return _mm512_cvtss_f32(x);
}

R1FAST_AVX512_INLINE __m512 larger(__m512 a, __m512 b) { return _mm512_maskz_max_ps(0xffff, a, b); }

// p (M, kStrip) and what a shrinks by, from the scores of N tiles.
template <class T, int M, int N>
R1FAST_AVX512_INLINE void softmax_rows(const Strip<T>& strip, const Rows& rows, float (&p)[M][kStrip],
                                       float (&shrink)[M]) {
  __m512 s[M][N];
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) s[i][j] = _mm512_setzero_ps();
  }
  score_rows<T, M, N>(strip, rows.q, rows.ld, s);
  const __mmask16 in_sight = column_mask((N - 1) * kTile, strip.num_positions);
  const __m512 minus_infinity = _mm512_set1_ps(-kInfinity);
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) s[i][j] = _mm512_mul_ps(s[i][j], _mm512_set1_ps(strip.scale));
    s[i][N - 1] = _mm512_mask_mov_ps(minus_infinity, in_sight, s[i][N - 1]);
    __m512 most = s[i][0];
    for (int j = 1; j < N; ++j) most = larger(most, s[i][j]);
    const float m = std::max(rows.m[i], across_lanes(most, larger));
    __m512 sum = _mm512_setzero_ps();
    for (int j = 0; j < N; ++j) {
      const __m512 e = exp_vector(_mm512_sub_ps(s[i][j], _mm512_set1_ps(m)));
      _mm512_storeu_ps(p[i] + j * kTile, e);
      sum = _mm512_add_ps(sum, e);
    }
    shrink[i] = _mm512_cvtss_f32(exp_vector(_mm512_set1_ps(rows.m[i] - m)));
    rows.m[i] = m;
    rows.l[i] = std::fma(rows.l[i], shrink[i], across_lanes(sum, _mm512_add_ps));
  }
}

// Columns of a, N vectors of values from element `column` on; `mask` of the last one's lanes.
template <int M, int N>
R1FAST_AVX512_INLINE void add_values(const Strip<float>& strip, const Rows& rows, const float (&p)[M][kStrip],
                                     const float (&shrink)[M], int64_t column, __mmask16 mask) {
  __m512 a[M][N];
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) {
      a[i][j] = _mm512_mul_ps(_mm512_loadu_ps(rows.a + i * rows.ld + column + 16 * j), _mm512_set1_ps(shrink[i]));
    }
  }
  for (int64_t begin = 0; begin < strip.num_positions; begin += kTile) {
    const float* value = strip.values[begin / kTile] + column;
    const float* next = strip.next->values[begin / kTile] + column;
    const int64_t end = std::min(begin + kTile, strip.num_positions);
    for (int64_t t = begin; t < end; ++t, value += strip.head_dim, next += strip.head_dim) {
      for (int j = 0; j < N; ++j) _mm_prefetch(next + 16 * j, _MM_HINT_T0);
      __m512 v[N];
      for (int j = 0; j < N - 1; ++j) v[j] = _mm512_loadu_ps(value + 16 * j);
      v[N - 1] = _mm512_maskz_loadu_ps(mask, value + 16 * (N - 1));
      for (int i = 0; i < M; ++i) {
        const __m512 weight = _mm512_set1_ps(p[i][t]);
        for (int j = 0; j < N; ++j) a[i][j] = _mm512_fmadd_ps(weight, v[j], a[i][j]);
      }
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) _mm512_storeu_ps(rows.a + i * rows.ld + column + 16 * j, a[i][j]);
  }
}

template <int M, int N>
R1FAST_AVX512_INLINE void add_values(const Strip<Bf16>& strip, const Rows& rows, const float (&p)[M][kStrip],
                                     const float (&shrink)[M], int64_t column, __mmask16 mask) {
  __m512 a[M][2 * N];
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < 2 * N; ++j) {
      a[i][j] = _mm512_mul_ps(_mm512_loadu_ps(rows.a + i * rows.ld + column + 16 * j), _mm512_set1_ps(shrink[i]));
    }
  }
  for (int64_t begin = 0; begin < strip.num_positions; begin += kTile) {
    const Bf16* value = strip.values[begin / kTile] + column;
    const Bf16* next = strip.next->values[begin / kTile] + column;
    const int64_t end = std::min(begin + kTile, strip.num_positions);
    for (int64_t t = begin; t < end; ++t, value += strip.head_dim, next += strip.head_dim) {
      for (int j = 0; j < N; ++j) _mm_prefetch(next + 32 * j, _MM_HINT_T0);
      __m512 v[2 * N];
      for (int j = 0; j < N; ++j) {
        const __m512i words = j < N - 1 ? _mm512_loadu_si512(value + 32 * j)
                                        : _mm512_maskz_loadu_epi32(mask, value + 32 * (N - 1));
        halves(words, v[2 * j], v[2 * j + 1]);
      }
      for (int i = 0; i < M; ++i) {
        const __m512 weight = _mm512_set1_ps(p[i][t]);
        for (int j = 0; j < 2 * N; ++j) a[i][j] = _mm512_fmadd_ps(weight, v[j], a[i][j]);
      }
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < 2 * N; ++j) _mm512_storeu_ps(rows.a + i * rows.ld + column + 16 * j, a[i][j]);
  }
}

// How many of `left` to take at once, at most 4: nearly equal parts.
R1FAST_INLINE int64_t part_of(int64_t left, int64_t most) {
  return left <= most ? left : left < 2 * most ? (left + 1) / 2 : most;
}

template <class T, int M>
R1FAST_AVX512 void attend_strip_rows(const Strip<T>& strip, const Rows& rows) {
  alignas(64) float p[M][kStrip];
  float shrink[M];
  switch (ceil_div(strip.num_positions, kTile)) {
    case 1: softmax_rows<T, M, 1>(strip, rows, p, shrink); break;
    case 2: softmax_rows<T, M, 2>(strip, rows, p, shrink); break;
    case 3: softmax_rows<T, M, 3>(strip, rows, p, shrink); break;
    default: softmax_rows<T, M, 4>(strip, rows, p, shrink);
  }
  constexpr int64_t kElements = 64 / sizeof(T);  // of a vector of values
  const int64_t num_vectors = ceil_div(strip.head_dim, kElements);
  for (int64_t j = 0; j < num_vectors;) {
    const int64_t n = part_of(num_vectors - j, 4 * static_cast<int64_t>(sizeof(T)) / 4);
    const int64_t column = j * kElements;
    j += n;
    const __mmask16 mask = column_mask((j - 1) * kTile, strip.head_dim * static_cast<int64_t>(sizeof(T)) / 4);
    if (n == 1) {
      add_values<M, 1>(strip, rows, p, shrink, column, mask);
    } else if (n == 2) {
      add_values<M, 2>(strip, rows, p, shrink, column, mask);
    } else if constexpr (sizeof(T) == 4) {
      if (n == 3) {
        add_values<M, 3>(strip, rows, p, shrink, column, mask);
      } else {
        add_values<M, 4>(strip, rows, p, shrink, column, mask);
      }
    }
  }
}

template <class T>
R1FAST_AVX512 void attend_strip_native(const Strip<T>& strip, const Rows& rows) {
  for (int64_t r = 0; r < rows.count;) {
    const int64_t n = part_of(rows.count - r, 4);
    const Rows part = rows.slice(r, r + n);
    r += n;
    switch (n) {
      case 1: attend_strip_rows<T, 1>(strip, part); break;
      case 2: attend_strip_rows<T, 2>(strip, part); break;
      case 3: attend_strip_rows<T, 3>(strip, part); break;
      default: attend_strip_rows<T, 4>(strip, part);
    }
  }
}

#endif

}  // namespace r1fast
