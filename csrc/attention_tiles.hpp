// What training attention does to tiles in the cache: small matrix products, the two softmax loops, and moves from and to
// the caller's rows. All tiles are fp32. Each is written in plain C++, compiled for the baseline and for AVX2, and what
// takes the time once more with AVX-512, the softmax loops with AVX2 too.
//
// A product is cut into blocks of rows and vectors that are summed in registers. An element's sum runs over k in one
// order, wherever it lies, and over 0 < k <= num_k alone: what is beside it changes nothing.
#pragma once

#include <array>
#include <utility>

#include "amx.hpp"
#include "decode_strip.hpp"

namespace r1fast {

constexpr int64_t kVector = 16;       // floats; tiles' rows are whole vectors
constexpr int64_t kPanelKeys = 64;    // keys of a turned panel [Dp][64]
constexpr int64_t kBlockRows = 6;     // of a product, at a time
constexpr int64_t kBlockVectors = 4;  // 24 sums, 4 of b and one of a are in registers

// c (num_rows, num_columns) = or += a b. With factors sums begin at c, and before each kStrip of k they are multiplied by
// them, one a row. Columns are whole vectors.
struct Product {
  int64_t num_rows, num_columns, num_k;
  const float* a;  // (num_rows, num_k), or turned: (num_k, num_rows)
  int64_t lda;
  const float* b;  // (num_k, num_columns)
  int64_t ldb;
  float* c;
  int64_t ldc;
  bool accumulate;
  const float* factors;  // (num_k / kStrip, kBlockRows), for at most kBlockRows rows, or null
};

// At most kBlockRows rows of scores with a running softmax. Row i sees its first counts[i] keys; from there to `width`, a multiple of 16,
// its scores are not read and its weights become 0.
struct SoftmaxRows {
  int64_t num_rows, width;
  const int64_t* counts;
  float scale;
  float* s;  // scores, which become weights
  int64_t ld;
  float* m;  // (num_rows)
  float* l;
  float* shrink;  // what all that was summed before is worth now
};

// Weights p = share exp(scale s - m) and ds = scale p (dp - delta); rows as above.
struct GradientRows {
  int64_t num_rows, width;
  const int64_t* counts;
  float scale;
  float* s;   // becomes p
  float* dp;  // becomes ds
  int64_t ld;
  const float* m;
  const float* share;
  const float* delta;
};

// Rows of the caller, `group` neighbouring heads of each token: in a tile a row for each head.
template <class T>
struct TokenRows {
  T* data;     // of the first token
  int64_t ld;  // elements from token to token
  int64_t num_tokens;
  int64_t group;
  int64_t head_dim;
};

R1FAST_INLINE void softmax_rows(const SoftmaxRows& rows) {
  for (int64_t i = 0; i < rows.num_rows; ++i) {
    float* const s = rows.s + i * rows.ld;
    float most[kVector], sums[kVector] = {};
    for (int64_t k = 0; k < kVector; ++k) most[k] = -kInfinity;
    for (int64_t j = 0; j < rows.width; j += kVector) {
      for (int64_t k = 0; k < kVector; ++k) {
        s[j + k] = select(j + k < rows.counts[i], s[j + k] * rows.scale, -kInfinity);
        most[k] = select(s[j + k] > most[k], s[j + k], most[k]);
      }
    }
    float m = rows.m[i];
    for (const float lane : most) m = select(lane > m, lane, m);
    for (int64_t j = 0; j < rows.width; j += kVector) {
      for (int64_t k = 0; k < kVector; ++k) s[j + k] = exp_clamped(clamp_exponent(s[j + k] - m));
      for (int64_t k = 0; k < kVector; ++k) s[j + k] = select(j + k < rows.counts[i], s[j + k], 0.0f);
      for (int64_t k = 0; k < kVector; ++k) sums[k] += s[j + k];
    }
    float sum = 0;
    for (const float lane : sums) sum += lane;
    rows.shrink[i] = exp_clamped(clamp_exponent(rows.m[i] - m));
    rows.m[i] = m;
    rows.l[i] = rows.l[i] * rows.shrink[i] + sum;
  }
}

R1FAST_INLINE void gradient_rows(const GradientRows& rows) {
  for (int64_t i = 0; i < rows.num_rows; ++i) {
    float* const s = rows.s + i * rows.ld;
    float* const dp = rows.dp + i * rows.ld;
    const float m = rows.m[i], share = rows.share[i], delta = rows.delta[i];
    for (int64_t j = 0; j < rows.width; ++j) {
      const bool seen = j < rows.counts[i];
      s[j] = select(seen, share * exp_clamped(clamp_exponent(s[j] * rows.scale - m)), 0.0f);
      dp[j] = select(seen, s[j] * ((dp[j] - delta) * rows.scale), 0.0f);
    }
  }
}

// The vectors of plain C++: AVX2's, and what every machine has.
using Eight = float __attribute__((vector_size(32), aligned(4), may_alias));
using Four = float __attribute__((vector_size(16), aligned(4), may_alias));

template <class V, bool kTurned, int M>
R1FAST_INLINE void multiply_rows(const Product& p, int64_t row, int64_t column) {
  constexpr int kSize = sizeof(V) / sizeof(float), kCount = kVector / kSize;
  V sums[M][kCount] = {};
  for (int i = 0; i < M && p.factors != nullptr; ++i) {
    std::memcpy(sums[i], p.c + (row + i) * p.ldc + column, sizeof sums[i]);
  }
  const float* a = p.a + (kTurned ? row : row * p.lda);
  const float* b = p.b + column;
  for (int64_t k = 0; k < p.num_k; ++k, a += kTurned ? p.lda : 1, b += p.ldb) {
    if (p.factors != nullptr && k % kStrip == 0) {
      for (int i = 0; i < M; ++i) {
        for (int j = 0; j < kCount; ++j) {
          sums[i][j] *= p.factors[k / kStrip * kBlockRows + row + i];
#if defined(__x86_64__)
          asm("" : "+x"(sums[i][j]));  // rounded, and not fused with the sum that follows: decode's is not
#endif
        }
      }
    }
    for (int i = 0; i < M; ++i) {
      const float value = a[kTurned ? i : i * p.lda];
      for (int j = 0; j < kCount; ++j) sums[i][j] += value * *reinterpret_cast<const V*>(b + j * kSize);
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < kCount; ++j) {
      V* const c = reinterpret_cast<V*>(p.c + (row + i) * p.ldc + column + j * kSize);
      *c = p.accumulate ? *c + sums[i][j] : sums[i][j];
    }
  }
}

template <class V, bool kTurned>
R1FAST_INLINE void multiply(const Product& p) {
  constexpr int kRows = sizeof(V) == sizeof(Eight) ? kBlockRows : 3;  // 12 sums are in registers
  int64_t row = 0;
  for (; row + kRows <= p.num_rows; row += kRows) {
    for (int64_t j = 0; j < p.num_columns; j += kVector) multiply_rows<V, kTurned, kRows>(p, row, j);
  }
  for (; row < p.num_rows; ++row) {
    for (int64_t j = 0; j < p.num_columns; j += kVector) multiply_rows<V, kTurned, 1>(p, row, j);
  }
}

constexpr int64_t kTokensAhead = 12;  // asked for meanwhile: memory is far, and rows are too far apart to be guessed

template <class T>
R1FAST_INLINE void prefetch_row(const T* row, int64_t size) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t d = 0; d < size; d += kLine) __builtin_prefetch(row + d);
}

// The caller's rows as fp32, `width` floats each; what is beyond the head's width is 0.
template <class T>
R1FAST_INLINE void load_rows(const TokenRows<const T>& from, int64_t width, float* to) {
  for (int64_t token = 0; token < from.num_tokens; ++token) {
    const T* row = from.data + token * from.ld;
    prefetch_row(row + kTokensAhead * from.ld, from.group * from.head_dim);
    for (int64_t head = 0; head < from.group; ++head, row += from.head_dim, to += width) {
      int64_t d = 0;
      for (; d + kVector <= from.head_dim; d += kVector) {
        for (int64_t k = 0; k < kVector; ++k) to[d + k] = to_float(row[d + k]);
      }
      for (; d < width; ++d) to[d] = d < from.head_dim ? to_float(row[d]) : 0;
    }
  }
}

// And back, each times its factor where there are factors.
template <class T>
R1FAST_INLINE void store_rows(const float* from, int64_t width, const float* factors, const TokenRows<T>& to) {
  for (int64_t token = 0; token < to.num_tokens; ++token) {
    T* row = to.data + token * to.ld;
    for (int64_t head = 0; head < to.group; ++head, row += to.head_dim, from += width) {
      const float factor = factors == nullptr ? 1 : *factors++;
      int64_t d = 0;
      for (; d + kVector <= to.head_dim; d += kVector) {
        for (int64_t k = 0; k < kVector; ++k) store(row + d + k, from[d + k] * factor);
      }
      for (; d < to.head_dim; ++d) store(row + d, from[d] * factor);
    }
  }
}

// sums[r] = a_r . b_r
R1FAST_INLINE void dot_rows(const float* a, const float* b, int64_t num_rows, int64_t width, float* sums) {
  for (int64_t r = 0; r < num_rows; ++r, a += width, b += width) {
    float lanes[kVector] = {}, sum = 0;
    for (int64_t d = 0; d < width; d += kVector) {
      for (int64_t k = 0; k < kVector; ++k) lanes[k] += a[d + k] * b[d + k];
    }
    for (const float lane : lanes) sum += lane;
    sums[r] = sum;
  }
}

R1FAST_INLINE void add_rows(const float* from, int64_t size, float* to) {
  for (int64_t i = 0; i < size; ++i) to[i] += from[i];
}

// At most 64 tokens of one head, turned: to[d * 64 + i] is element d of token i. What fills the last 16 tokens is 0.
template <class T>
R1FAST_INLINE void turn_rows(const TokenRows<const T>& from, int64_t width, float* to) {
  for (int64_t i = 0; i < round_up(from.num_tokens, kVector); ++i) {
    const T* const row = from.data + i * from.ld;
    const int64_t size = i < from.num_tokens ? from.head_dim : 0;
    for (int64_t d = 0; d < size; ++d) to[d * kPanelKeys + i] = to_float(row[d]);
    for (int64_t d = size; d < width; ++d) to[d * kPanelKeys + i] = 0;
  }
}

#if defined(__x86_64__)
namespace avx512 {

// Where the next k of a block is: its rows of a, its columns of b.
struct BlockPlace {
  const float* a0;
  const float* a3;  // as in gemm.hpp
  const float* b;
};

template <bool kTurned, int M, int N>
R1FAST_AVX512_INLINE void add_products(const Product& p, int64_t num_k, BlockPlace& at, __m512 (&sums)[M][N]) {
  const int64_t lda = p.lda;
#pragma GCC unroll 2
  for (int64_t k = 0; k < num_k; ++k) {
    __m512 v[N];
    for (int j = 0; j < N; ++j) v[j] = _mm512_loadu_ps(at.b + kLanes * j);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) {
      // not (...)[i % 3 * lda], which GCC 12 computes for i < 3 alone under -fsanitize=undefined
      const __m512 value = _mm512_set1_ps(*(kTurned ? at.a0 + i : (i < 3 ? at.a0 : at.a3) + i % 3 * lda));
      for (int j = 0; j < N; ++j) sums[i][j] = _mm512_fmadd_ps(value, v[j], sums[i][j]);
    }
    at.b += p.ldb;
    at.a0 += kTurned ? lda : 1;
    at.a3 += kTurned ? lda : 1;
  }
}

template <bool kTurned, int M, int N>
R1FAST_AVX512 void multiply_block(const Product& p, int64_t row, int64_t column) {
  const float* const a = p.a + (kTurned ? row : row * p.lda);
  BlockPlace at{a, a + 3 * p.lda, p.b + column};
  float* c = p.c + row * p.ldc + column;
  __m512 sums[M][N];
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) sums[i][j] = _mm512_setzero_ps();
  }
  if (kTurned || p.factors == nullptr) {
    add_products<kTurned>(p, p.num_k, at, sums);
  } else {
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < N; ++j) sums[i][j] = _mm512_loadu_ps(c + i * p.ldc + kLanes * j);
    }
    const float* factors = p.factors + row;
    for (int64_t k = 0; k < p.num_k; k += kStrip, factors += kBlockRows) {
#pragma GCC unroll 6
      for (int i = 0; i < M; ++i) {
        for (int j = 0; j < N; ++j) sums[i][j] = _mm512_mul_ps(sums[i][j], _mm512_set1_ps(factors[i]));
      }
      add_products<kTurned>(p, std::min(p.num_k - k, kStrip), at, sums);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i, c += p.ldc) {
    for (int j = 0; j < N; ++j) {
      __m512 sum = sums[i][j];
      if (p.accumulate) sum = _mm512_add_ps(sum, _mm512_loadu_ps(c + kLanes * j));
      _mm512_storeu_ps(c + kLanes * j, sum);
    }
  }
}

template <bool kTurned, size_t... kIndex>
constexpr auto multiply_blocks(std::index_sequence<kIndex...>) {
  return std::array{&multiply_block<kTurned, kIndex / kBlockVectors + 1, kIndex % kBlockVectors + 1>...};
}

template <bool kTurned>
inline void multiply(const Product& p) {
  static constexpr auto kBlocks = multiply_blocks<kTurned>(std::make_index_sequence<kBlockRows * kBlockVectors>{});
  const int64_t num_vectors = p.num_columns / kVector;
  for (int64_t row = 0, rows; row < p.num_rows; row += rows) {
    rows = part_of(p.num_rows - row, kBlockRows);
    for (int64_t j = 0, vectors; j < num_vectors; j += vectors) {
      vectors = part_of(num_vectors - j, kBlockVectors);
      kBlocks[(rows - 1) * kBlockVectors + vectors - 1](p, row, j * kVector);
    }
  }
}

constexpr int kRowsAcross = 8;  // reduced together: row r is in lanes 4 r and 4 r + 1, or 4 (r - 4) + 2 and the next

// across_lanes (decode_strip.hpp) of each row: the same tree.
template <class Combine>
R1FAST_AVX512_INLINE __m512 across_rows(const __m512 (&x)[kRowsAcross], const Combine& combine) {
  __m512 halves[4], quarters[2];
  for (int i = 0; i < 4; ++i) {
    halves[i] = combine(_mm512_maskz_shuffle_f32x4(0xffff, x[2 * i], x[2 * i + 1], 0x44),
                        _mm512_maskz_shuffle_f32x4(0xffff, x[2 * i], x[2 * i + 1], 0xee));
  }
  for (int i = 0; i < 2; ++i) {
    quarters[i] = combine(_mm512_maskz_shuffle_f32x4(0xffff, halves[2 * i], halves[2 * i + 1], 0x88),
                          _mm512_maskz_shuffle_f32x4(0xffff, halves[2 * i], halves[2 * i + 1], 0xdd));
  }
  const __m512 pairs = combine(_mm512_maskz_shuffle_ps(0xffff, quarters[0], quarters[1], 0x44),
                               _mm512_maskz_shuffle_ps(0xffff, quarters[0], quarters[1], 0xee));
  return combine(pairs, _mm512_maskz_permute_ps(0xffff, pairs, 0xb1));
}

// Numbers of the rows, from their order to those lanes and back.
R1FAST_AVX512_INLINE __m512 to_lanes(__m512 x) {
  return _mm512_maskz_permutexvar_ps(0xffff, _mm512_setr_epi32(0, 0, 4, 4, 1, 1, 5, 5, 2, 2, 6, 6, 3, 3, 7, 7), x);
}
R1FAST_AVX512_INLINE __m512 from_lanes(__m512 x) {
  return _mm512_maskz_permutexvar_ps(0xffff, _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0), x);
}

R1FAST_AVX512 inline void softmax_rows(const SoftmaxRows& rows) {
  const __m512 scale = _mm512_set1_ps(rows.scale), minus_infinity = _mm512_set1_ps(-kInfinity);
  __m512 most[kRowsAcross], sums[kRowsAcross];
  for (int64_t i = 0; i < kRowsAcross; ++i) {
    most[i] = minus_infinity;
    sums[i] = _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < rows.num_rows; ++i) {
    float* const s = rows.s + i * rows.ld;
    for (int64_t j = 0; j < rows.width; j += kVector) {
      const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(s + j), scale);
      const __m512 seen = _mm512_mask_mov_ps(minus_infinity, column_mask(j, rows.counts[i]), x);
      _mm512_storeu_ps(s + j, seen);
      most[i] = larger(most[i], seen);
    }
  }
  const __mmask16 is_row = column_mask(0, rows.num_rows);
  const __m512 before = to_lanes(_mm512_maskz_loadu_ps(is_row, rows.m));
  const __m512 after = larger(across_rows(most, larger), before);
  alignas(64) float m[kVector];
  _mm512_store_ps(m, from_lanes(after));
  _mm512_mask_storeu_ps(rows.m, is_row, from_lanes(after));
  for (int64_t i = 0; i < rows.num_rows; ++i) {
    float* const s = rows.s + i * rows.ld;
    for (int64_t j = 0; j < rows.width; j += kVector) {
      const __m512 p = exp_vector(_mm512_sub_ps(_mm512_loadu_ps(s + j), _mm512_set1_ps(m[i])));
      const __m512 seen = _mm512_maskz_mov_ps(column_mask(j, rows.counts[i]), p);
      _mm512_storeu_ps(s + j, seen);
      sums[i] = _mm512_add_ps(sums[i], seen);
    }
  }
  const __m512 shrink = exp_vector(_mm512_sub_ps(before, after));
  const __m512 l = to_lanes(_mm512_maskz_loadu_ps(is_row, rows.l));
  const __m512 sum = _mm512_fmadd_ps(l, shrink, across_rows(sums, _mm512_add_ps));
  _mm512_mask_storeu_ps(rows.l, is_row, from_lanes(sum));
  _mm512_mask_storeu_ps(rows.shrink, is_row, from_lanes(shrink));
}

R1FAST_AVX512_INLINE __m512i wide_words(const float* from, __mmask16 mask) {
  return _mm512_castps_si512(_mm512_maskz_loadu_ps(mask, from));
}
R1FAST_AVX512_INLINE __m512i wide_words(const Bf16* from, __mmask16 mask) {
  return _mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(mask, from)), 16);
}

template <class T>
R1FAST_AVX512 void turn_rows(const TokenRows<const T>& from, int64_t width, float* to) {
  for (int64_t i = 0; i < from.num_tokens; ++i) prefetch_row(from.data + i * from.ld, from.head_dim);
  for (int64_t i = 0; i < from.num_tokens; i += kLanes) {
    for (int64_t d = 0; d < width; d += kLanes) {
      const __mmask16 mask = column_mask(d, from.head_dim);
      __m512i words[kLanes];
      for (int64_t k = 0; k < kLanes; ++k) {
        words[k] = wide_words(from.data + (i + k) * from.ld + d, i + k < from.num_tokens ? mask : 0);
      }
      transpose_words(words, to + d * kPanelKeys + i, kPanelKeys);
    }
  }
}

}  // namespace avx512
#endif

}  // namespace r1fast

#define R1FAST_KERNELS "softmax_kernels.hpp"
#include "each_level.hpp"

namespace r1fast {

// The loops of one instruction set. `T` is the caller's type.
template <class T>
struct AttentionTiles {
  void (*multiply)(const Product&);
  void (*multiply_turned)(const Product&);
  void (*softmax_rows)(const SoftmaxRows&);
  void (*gradient_rows)(const GradientRows&);
  void (*load_rows)(const TokenRows<const T>&, int64_t, float*);
  void (*load_wide_rows)(const TokenRows<const float>&, int64_t, float*);
  void (*turn_rows)(const TokenRows<const T>&, int64_t, float*);
  void (*store_rows)(const float*, int64_t, const float*, const TokenRows<T>&);
  void (*store_wide_rows)(const float*, int64_t, const float*, const TokenRows<float>&);
  void (*dot_rows)(const float*, const float*, int64_t, int64_t, float*);
  void (*add_rows)(const float*, int64_t, float*);
};

#define R1FAST_ATTENTION_TILES(suffix, attributes, V)                                                                \
  template <class T>                                                                                                \
  AttentionTiles<T> attention_tiles_##suffix() {                                                                    \
    return {                                                                                                        \
        [](const Product& p) attributes { multiply<V, false>(p); },                                                  \
        [](const Product& p) attributes { multiply<V, true>(p); },                                                   \
        [](const SoftmaxRows& rows) attributes { softmax_rows(rows); },                                             \
        [](const GradientRows& rows) attributes { gradient_rows(rows); },                                           \
        [](const TokenRows<const T>& from, int64_t width, float* to) attributes { load_rows(from, width, to); },    \
        [](const TokenRows<const float>& from, int64_t width, float* to) attributes { load_rows(from, width, to); }, \
        [](const TokenRows<const T>& from, int64_t width, float* to) attributes { turn_rows(from, width, to); },    \
        [](const float* from, int64_t width, const float* factors, const TokenRows<T>& to) attributes {             \
          store_rows(from, width, factors, to);                                                                     \
        },                                                                                                          \
        [](const float* from, int64_t width, const float* factors, const TokenRows<float>& to) attributes {         \
          store_rows(from, width, factors, to);                                                                     \
        },                                                                                                          \
        [](const float* a, const float* b, int64_t num_rows, int64_t width, float* sums) attributes {               \
          dot_rows(a, b, num_rows, width, sums);                                                                    \
        },                                                                                                          \
        [](const float* from, int64_t size, float* to) attributes { add_rows(from, size, to); },                    \
    };                                                                                                              \
  }
R1FAST_ATTENTION_TILES(baseline, , Four)
#if defined(__x86_64__)
R1FAST_ATTENTION_TILES(avx2, R1FAST_AVX2, Eight)
R1FAST_ATTENTION_TILES(avx512, R1FAST_AVX512, Eight)
#endif
#undef R1FAST_ATTENTION_TILES

// `level` is auto, baseline, avx2 or avx512.
template <class T>
AttentionTiles<T> attention_tiles(const std::string& level) {
  const Level found = level_of(level);
#if defined(__x86_64__)
  if (found == Level::kAvx2) {
    AttentionTiles<T> tiles = attention_tiles_avx2<T>();
    tiles.softmax_rows = &avx2::softmax_tile;
    tiles.gradient_rows = &avx2::gradient_tile;
    return tiles;
  }
  if (found == Level::kAvx512) {
    AttentionTiles<T> tiles = attention_tiles_avx512<T>();
    tiles.multiply = &avx512::multiply<false>;
    tiles.multiply_turned = &avx512::multiply<true>;
    tiles.softmax_rows = &avx512::softmax_rows;
    tiles.gradient_rows = &avx512::gradient_tile;
    tiles.turn_rows = &avx512::turn_rows<T>;
    return tiles;
  }
#endif
  return attention_tiles_baseline<T>();
}

}  // namespace r1fast
