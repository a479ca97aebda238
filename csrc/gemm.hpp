// The matrix products of the head: one AVX-512 microkernel for fp32 and for bf16 with fp32 accumulators.
//
// Everything is counted in words of 32 bits: one fp32, or two bf16 that follow each other in the summed index k.
// A tile is 8 rows of A by N <= 3 vectors of B: each word of A is broadcast, B is packed in panels [k][16 N]. An
// element's sum runs over k in one fixed order whatever N is and wherever it lies, so a row's result depends neither
// on its neighbours nor on its place.
#pragma once

#include "epilogue.hpp"
#include "exp.hpp"
#include "parallel.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

namespace r1fast {

using Word = float __attribute__((may_alias));

constexpr int kLanes = 16;
constexpr int kTileRows = 8;
constexpr int kTileVectors = 3;

// Code compiled with R1FAST_AVX512 runs only where this says so. It names bf16 for the fp32 instances too: bf16
// instructions come from intrinsics alone.
inline bool native_supported(bool bf16) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma") && (!bf16 || __builtin_cpu_supports("avx512bf16"));
}

// Of the 16 columns from `column` on, those below `num_columns`.
inline __mmask16 column_mask(int64_t column, int64_t num_columns) {
  const int64_t left = num_columns - column;
  return static_cast<__mmask16>(left >= kLanes ? 0xffff : left <= 0 ? 0 : (1 << left) - 1);
}

// Two vectors rounded to bf16, in words: low[0] high[0] low[1] high[1] ...
R1FAST_AVX512_INLINE __m512i interleave_bf16(__m512 low, __m512 high) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);  // 16 of low, then 16 of high
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_maskz_permutexvar_epi16(~__mmask32{0}, _mm512_load_si512(kOrder), both);
}

// sums[i][j] = sum over k of A(i, k) * panel(k, 16 j ..): A(i, k) is a[i * lda + k], or a[k * lda + i] if kColumns.
template <bool kBf16, bool kColumns, int N>
R1FAST_AVX512_INLINE void tile_products(int64_t num_k, const Word* a, int64_t lda, const Word* panel,
                                        __m512 (&sums)[kTileRows][N]) {
  for (int i = 0; i < kTileRows; ++i) {
    for (int j = 0; j < N; ++j) sums[i][j] = _mm512_setzero_ps();
  }
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

// What tile_into does with the products: fill a buffer that is in the cache, or set or add to what is not.
enum class Into { kBuffer, kSet, kAdd };

// C(i, 16 j ..) = or += the products, for the first num_rows rows and num_columns columns of the tile.
template <bool kBf16, bool kColumns, int N>
R1FAST_AVX512 void tile_into(Into into, int64_t num_k, const Word* a, int64_t lda, const Word* panel, float* c,
                             int64_t ldc, int64_t num_rows, int64_t num_columns) {
  if (into != Into::kBuffer) {
    for (int i = 0; i < num_rows; ++i) {
      for (int j = 0; j < N; ++j) __builtin_prefetch(c + i * ldc + kLanes * j, 1);
    }
  }
  __m512 sums[kTileRows][N];
  tile_products<kBf16, kColumns, N>(num_k, a, lda, panel, sums);
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
    if (i >= num_rows) break;
    for (int j = 0; j < N; ++j) {
      const __mmask16 mask = column_mask(kLanes * j, num_columns);
      float* const to = c + i * ldc + kLanes * j;
      __m512 value = sums[i][j];
      if (into == Into::kAdd) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, to));
      _mm512_mask_storeu_ps(to, mask, value);
    }
  }
}

template <bool kBf16, bool kColumns>
inline void tile_into(Into into, int64_t num_vectors, int64_t num_k, const Word* a, int64_t lda, const Word* panel,
                      float* c, int64_t ldc, int64_t num_rows, int64_t num_columns) {
  const auto tile = num_vectors == 3   ? &tile_into<kBf16, kColumns, 3>
                    : num_vectors == 2 ? &tile_into<kBf16, kColumns, 2>
                                       : &tile_into<kBf16, kColumns, 1>;
  tile(into, num_k, a, lda, panel, c, ldc, num_rows, num_columns);
}

// How the head divides its products, for this instruction set; amx.hpp has the other.
struct Avx512Tiles {
  static constexpr int64_t kRows = kTileRows;           // of A at a time
  static constexpr int64_t kMaxVectors = kTileVectors;  // of B
  static constexpr int64_t kWordMultiple = 1;           // words of k come in multiples of this, padded with zeros

  // Vectors in the next panel: 3, but never a lone 1 after a 3.
  static int64_t panel_vectors(int64_t num_left) {
    return num_left == 4 ? 2 : std::min<int64_t>(num_left, kMaxVectors);
  }

  struct Session {
    Session() {}  // nothing to set up
  };

  template <bool kBf16>
  static void into(Into into, int64_t num_vectors, int64_t num_k, const Word* a, int64_t lda, const Word* panel,
                   float* c, int64_t ldc, int64_t num_rows, int64_t num_columns) {
    tile_into<kBf16, false>(into, num_vectors, num_k, a, lda, panel, c, ldc, num_rows, num_columns);
  }
};

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

// Rows [begin, end) of a row-major matrix, one a lane, as a panel [num_k][width], width a multiple of 16. What lies
// outside it is zero. Turned 16 by 16 in a buffer: rows may be a power of two apart, all in one set of the cache.
template <class T>
R1FAST_AVX512 void pack_lanes(const T* matrix, int64_t ld, int64_t begin, int64_t end, int64_t size, int64_t num_k,
                              int64_t width, Word* panel) {
  const int64_t num_words = ceil_div(size, sizeof(Word) / sizeof(T)), num_whole = size * sizeof(T) / sizeof(Word);
  const __m512i every_16th = _mm512_set_epi32(240, 224, 208, 192, 176, 160, 144, 128, 112, 96, 80, 64, 48, 32, 16, 0);
  alignas(64) float block[kLanes * kLanes];
  for (int64_t lane = 0; lane < width; lane += kLanes) {
    for (int64_t k = 0; k < num_k; k += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t row = begin + lane + i;
        const __mmask16 mask = row < end ? column_mask(k, num_whole) : __mmask16{0};
        const auto* const from = reinterpret_cast<const char*>(matrix + row * ld) + k * sizeof(Word);
        _mm512_store_ps(block + i * kLanes, _mm512_maskz_loadu_ps(mask, from));
      }
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, num_k - k); ++i) {
        const __m512 turned = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, every_16th, block + i, sizeof(float));
        _mm512_storeu_ps(panel + (k + i) * width + lane, turned);
      }
    }
    for (int64_t i = 0; num_whole < num_words && i < std::min<int64_t>(kLanes, end - begin - lane); ++i) {
      panel[num_whole * width + lane + i] = word_of_row(matrix + (begin + lane + i) * ld, size, num_whole);
    }
  }
}

// Columns [begin, begin + 16 num_vectors) of rows [first, last) of a row-major matrix as a panel [k][16 num_vectors]:
// bf16 rows in pairs. What lies outside the matrix is zero.
template <bool kBf16, class T>
R1FAST_AVX512 void pack_columns(const T* matrix, int64_t ld, int64_t first, int64_t last, int64_t begin,
                                int64_t num_columns, int64_t num_vectors, Word* panel) {
  for (int64_t row = first; row < last; row += kBf16 ? 2 : 1) {
    for (int64_t j = 0; j < num_vectors; ++j, panel += kLanes) {
      const int64_t column = begin + kLanes * j;
      const __mmask16 mask = column_mask(column, num_columns);
      const __mmask16 next_mask = row + 1 < last ? mask : 0;
      const T* const from = matrix + row * ld + column;
      if constexpr (!kBf16) {
        _mm512_storeu_ps(panel, _mm512_maskz_loadu_ps(mask, from));
      } else if constexpr (sizeof(T) == sizeof(Bf16)) {
        const __m512i low = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(mask, from));
        const __m512i high = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(next_mask, from + ld));
        _mm512_storeu_si512(panel, _mm512_or_si512(low, _mm512_maskz_slli_epi32(0xffff, high, 16)));
      } else {
        const __m512 low = _mm512_maskz_loadu_ps(mask, from);
        const __m512 high = _mm512_maskz_loadu_ps(next_mask, from + ld);
        _mm512_storeu_si512(panel, interleave_bf16(low, high));
      }
    }
  }
}

}  // namespace r1fast
#endif
