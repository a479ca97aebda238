// The matrix products of the forward and the head: a microkernel for fp32 and one for bf16, with fp32 sums, on AVX-512 and on
// AVX2, and the panels that they read.
//
// Everything is counted in words of 32 bits: one fp32, or two bf16 that follow each other in the summed index k.
// A tile is M rows of A by N vectors of 16 columns of B: each word of A is broadcast, B is packed in panels [k][16 N]. An
// element's sum runs over k in one fixed order whatever M and N are and wherever it lies, so a row's result depends neither
// on its neighbours nor on its place; of a word of bf16 the high halves' product is added before the low halves'.
// Without instructions for bf16, on AVX2 and on AVX-512 before AVX512-BF16, rows of A are made fp32 in a buffer, panels in
// registers: a product of bf16 is exact in fp32, so the sums are the same.
#pragma once

#include "lanes.hpp"
#include "parallel.hpp"

#if defined(__x86_64__)
namespace r1fast {

// What tile_into does with the products: fill a buffer that is in the cache, or set or add to what is not.
enum class Into { kBuffer, kSet, kAdd };

// Asks for a strided matrix's cache lines a few at a time, while something else is computed: its rows are too far
// apart for the hardware to see what comes next.
class Prefetcher {
 public:
  // In all, num_steps calls of step() cover the rows.
  Prefetcher(const void* first, int64_t num_rows, int64_t row_bytes, int64_t stride_bytes, int64_t num_steps)
      : row_(static_cast<const char*>(first)), left_(num_rows), row_bytes_(row_bytes), stride_(stride_bytes) {
    const int64_t num_lines = num_rows * ceil_div(row_bytes, kLineBytes);
    per_step_ = ceil_div(num_lines, std::max<int64_t>(num_steps, 1));
  }

  void step() {
    for (int64_t i = 0; i < per_step_ && left_ > 0; ++i) {
      __builtin_prefetch(row_ + offset_, 0, 2);
      offset_ += kLineBytes;
      if (offset_ >= row_bytes_) {
        offset_ = 0;
        row_ += stride_;
        --left_;
      }
    }
  }

 private:
  static constexpr int64_t kLineBytes = 64;
  const char* row_;
  int64_t left_, row_bytes_, stride_, per_step_, offset_ = 0;
};

// Word k of a row of `size` elements; past the end there are zeros.
template <class T>
inline Word word_of_row(const T* row, int64_t size, int64_t k) {
  if constexpr (sizeof(T) == sizeof(Word)) {
    return row[k];
  } else {
    const uint32_t low = row[2 * k].bits, high = 2 * k + 1 < size ? row[2 * k + 1].bits : 0;
    return float_of(low | high << 16);
  }
}

constexpr int64_t kWide = 128;  // words of bf16 rows that are made fp32 at a time

// sums[i][j] = sum over k of A(i, k) * panel(k, 16 j ..): A(i, k) is a[i * lda + k], or a[k * lda + i] if kColumns.
namespace avx512 {

constexpr int kTileRows = 8;     // with 3 vectors 24 sums, 3 of B and one of A are in registers
constexpr int kTileVectors = 3;
constexpr bool kFewerRows = false;  // tiles have all their rows, those that do not count are read as well

// `count` words of the rows of A as fp32: the low halves of row i at wide[i * kWide], or word by word at wide[16 k] if
// kColumns; the high halves behind them.
template <bool kColumns>
R1FAST_AVX512_INLINE void widen_rows(const Word* a, int64_t lda, int64_t count, float* wide) {
  if constexpr (kColumns) {
    for (int64_t k = 0; k < count; ++k) {
      const __m512i words = load_words(a + k * lda, 0x00ff);
      Lanes low, high;
      halves(words, low, high);
      store_lanes(wide + 16 * k, 0x00ff, low);
      store_lanes(wide + 16 * k + 8, 0x00ff, high);
    }
  } else {
    for (int i = 0; i < kTileRows; ++i) {
      for (int64_t k = 0; k < count; k += kLanes) {
        Lanes low, high;
        halves(load_words(a + i * lda + k, column_mask(k, count)), low, high);
        store_lanes(wide + i * kWide + k, low);
        store_lanes(wide + (kTileRows + i) * kWide + k, high);
      }
    }
  }
}

// sums += the products of words of bf16, made fp32 first: those of the high halves, then those of the low ones.
template <bool kColumns, int M, int N>
R1FAST_AVX512_INLINE void add_widened_products(int64_t num_k, const Word* a, int64_t lda, const Word* panel,
                                               Lanes (&sums)[M][N]) {
  constexpr int64_t kRow = kColumns ? 1 : kWide, kWord = kColumns ? 16 : 1, kHigh = kTileRows * kRow;
  alignas(64) float wide[2 * kTileRows * kWide];
  for (int64_t begin = 0; begin < num_k; begin += kWide) {
    const int64_t count = std::min(kWide, num_k - begin);
    widen_rows<kColumns>(a + begin * (kColumns ? lda : 1), lda, count, wide);
    const float* from = wide;
#pragma GCC unroll 1
    for (int64_t k = 0; k < count; ++k, from += kWord, panel += kLanes * N) {
      Lanes low[N], high[N];
      for (int j = 0; j < N; ++j) halves(load_words(panel + kLanes * j), low[j], high[j]);
#pragma GCC unroll 8
      for (int i = 0; i < kTileRows; ++i) {
        const Lanes value = all(from[kHigh + i * kRow]);
        for (int j = 0; j < N; ++j) sums[i][j] = times_plus(value, high[j], sums[i][j]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kTileRows; ++i) {
        const Lanes value = all(from[i * kRow]);
        for (int j = 0; j < N; ++j) sums[i][j] = times_plus(value, low[j], sums[i][j]);
      }
    }
  }
}

template <bool kBf16, bool kColumns, int M, int N>
R1FAST_AVX512_INLINE void tile_products(int64_t num_k, const Word* a, int64_t lda, const Word* panel,
                                        Lanes (&sums)[M][N]) {
  for (int i = 0; i < kTileRows; ++i) {
    for (int j = 0; j < N; ++j) sums[i][j] = _mm512_setzero_ps();
  }
  if (kBf16 && !kHasBf16) return add_widened_products<kColumns>(num_k, a, lda, panel, sums);
  const Word* a0 = a;
  const Word* a3 = kColumns ? a : a + 3 * lda;  // three pointers reach eight rows: +lda, +2 lda are addressing modes
  const Word* a6 = kColumns ? a : a + 6 * lda;
#pragma GCC unroll 2
  for (int64_t k = 0; k < num_k; ++k) {
    __m512 b[N];
    for (int j = 0; j < N; ++j) b[j] = _mm512_loadu_ps(panel + kLanes * j);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const Word* row = kColumns ? a0 + i : (i < 3 ? a0 : i < 6 ? a3 : a6) + (i % 3) * lda;
      const __m512 value = _mm512_set1_ps(*row);
      for (int j = 0; j < N; ++j) {
        if constexpr (kBf16) {
          sums[i][j] = _mm512_dpbf16_ps(sums[i][j], (__m512bh)value, (__m512bh)b[j]);
        } else {
          sums[i][j] = _mm512_fmadd_ps(value, b[j], sums[i][j]);
        }
      }
    }
    panel += kLanes * N;
    if (kColumns) {
      a0 += lda;
    } else {
      ++a0, ++a3, ++a6;
    }
  }
}

}  // namespace avx512

namespace avx2 {

constexpr int kTileRows = 6;     // 12 sums in registers of 8, 2 of B and one of A
constexpr int kTileVectors = 1;
constexpr bool kFewerRows = true;  // tiles have as many rows as count

// `count` words of M rows of A as fp32: the low halves of row i at wide[i * kWide], or word by word at wide[16 k] if
// kColumns; the high halves behind them.
template <bool kColumns, int M>
R1FAST_AVX2_INLINE void widen_rows(const Word* a, int64_t lda, int64_t count, float* wide) {
  if constexpr (kColumns) {
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(M), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
    for (int64_t k = 0; k < count; ++k) {
      const __m256i words = _mm256_maskload_epi32(reinterpret_cast<const int*>(a + k * lda), mask);
      _mm256_store_ps(wide + 16 * k, low_halves(words));
      _mm256_store_ps(wide + 16 * k + 8, high_halves(words));
    }
  } else {
    for (int i = 0; i < M; ++i) {
      for (int64_t k = 0; k < count; ++k) {
        const uint32_t word = bits_of(a[i * lda + k]);
        wide[i * kWide + k] = float_of(word << 16);
        wide[(M + i) * kWide + k] = float_of(word & 0xffff0000u);
      }
    }
  }
}

// low[i], high[i] += a_i times columns 0 .. 7 and 8 .. 15, where a_i is a[i * kStep]. In this order: GCC's own leaves too few
// registers for the sums.
template <int M, int64_t kStep>
R1FAST_AVX2_INLINE void add_products(const float* a, __m256 b0, __m256 b1, __m256 (&low)[M], __m256 (&high)[M]) {
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) {
    const __m256 value = _mm256_set1_ps(a[i * kStep]);
    low[i] = _mm256_fmadd_ps(value, b0, low[i]);
    high[i] = _mm256_fmadd_ps(value, b1, high[i]);
    asm volatile("" : "+x"(low[i]), "+x"(high[i]));
  }
}

// sums += the products of `count` words of bf16 from widen_rows and of the panel. A function of its own, likewise.
template <bool kColumns, int M>
__attribute__((noinline)) R1FAST_AVX2 void add_bf16_products(int64_t count, const float* wide, const Word* panel,
                                                             Lanes* sums) {
  constexpr int64_t kRow = kColumns ? 1 : kWide, kWord = kColumns ? 16 : 1, kHigh = kColumns ? 8 : M * kWide;
  __m256 low[M], high[M];
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) low[i] = sums[i].low, high[i] = sums[i].high;
#pragma GCC unroll 1
  for (int64_t k = 0; k < count; ++k, wide += kWord, panel += kLanes) {
    const Words top = load_words(panel);
    add_products<M, kRow>(wide + kHigh, high_halves(top.low), high_halves(top.high), low, high);
    asm volatile("" : "+r"(panel));  // loaded again, not kept
    const Words bottom = load_words(panel);
    add_products<M, kRow>(wide, low_halves(bottom.low), low_halves(bottom.high), low, high);
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) sums[i] = {low[i], high[i]};
}

template <bool kBf16, bool kColumns, int M, int N>
R1FAST_AVX2_INLINE void tile_products(int64_t num_k, const Word* a, int64_t lda, const Word* panel,
                                      Lanes (&sums)[M][N]) {
  static_assert(N == 1);
  if constexpr (kBf16) {
    for (int i = 0; i < M; ++i) sums[i][0] = zeros();
    alignas(32) float wide[kColumns ? 16 * kWide : 2 * M * kWide];
    for (int64_t k = 0; k < num_k; k += kWide) {
      const int64_t count = std::min(kWide, num_k - k);
      widen_rows<kColumns, M>(a + k * (kColumns ? lda : 1), lda, count, wide);
      add_bf16_products<kColumns, M>(count, wide, panel + k * kLanes, &sums[0][0]);
    }
  } else {
    __m256 low[M], high[M];
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) low[i] = high[i] = _mm256_setzero_ps();
    const Word* a3 = kColumns ? a : a + 3 * lda;
#pragma GCC unroll 1
    for (int64_t k = 0; k < num_k; ++k, panel += kLanes) {
      const __m256 b0 = _mm256_loadu_ps(panel), b1 = _mm256_loadu_ps(panel + 8);
#pragma GCC unroll 6
      for (int i = 0; i < M; ++i) {
        const __m256 value = _mm256_set1_ps(*(kColumns ? a + i : (i < 3 ? a : a3) + (i % 3) * lda));
        low[i] = _mm256_fmadd_ps(value, b0, low[i]);
        high[i] = _mm256_fmadd_ps(value, b1, high[i]);
      }
      a += kColumns ? lda : 1;
      a3 += kColumns ? lda : 1;
    }
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) sums[i][0] = {low[i], high[i]};
  }
}

}  // namespace avx2
}  // namespace r1fast

#define R1FAST_KERNELS "gemm_kernels.hpp"
#include "each_level.hpp"

namespace r1fast {
using Avx512Tiles = avx512::Tiles;
using Avx2Tiles = avx2::Tiles;
}  // namespace r1fast
#endif
