// Products of bf16 tiles on AMX with fp32 sums, for the chips that have it: the same words and panels as in gemm.hpp.
//
// A tile register holds 16 rows of 16 words. C (16 x 16 sums) += A (16 rows, 16 words of k) B (16 words of k, 16
// columns). Blocks are 2 x 2 tiles, 32 by 32: four loads feed four products. An element's sum runs over k in one fixed
// order wherever it lies, so a row's result depends neither on its neighbours nor on its place.
#pragma once

#include "gemm.hpp"
#include "level.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace r1fast {

#define R1FAST_AMX                                                                                              \
  __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")))

constexpr int64_t kTileWords = 16;  // rows of a tile, and words of a row

// Whether the chip has the tiles and the kernel lets this process use them: asked once.
inline bool amx_supported() {
  static const bool supported = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    if (!avx512_bf16_supported() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (kBf16 | kTile))) return false;
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
  }();
  return supported;
}

// c (16 M rows, 16 N columns) = or += the sum over num_k words, a multiple of 16. Rows of A are lda words apart and its
// next 16 words of k a_step further; rows of B, one for each word of k, are ldb apart.
template <int M, int N>
R1FAST_AMX void amx_block(bool accumulate, int64_t num_k, const Word* a, int64_t a_step, int64_t lda, const Word* b,
                          int64_t ldb, float* c, int64_t ldc) {
  const int64_t c_bytes = ldc * 4, a_bytes = lda * 4, b_bytes = ldb * 4;
  float* const c1 = c + kTileWords * ldc;
  asm volatile("" ::: "memory");  // the intrinsics do not say that they read memory
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (N == 2) _tile_loadd(1, c + kTileWords, c_bytes);
    if constexpr (M == 2) _tile_loadd(2, c1, c_bytes);
    if constexpr (M == 2 && N == 2) _tile_loadd(3, c1 + kTileWords, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (N == 2) _tile_zero(1);
    if constexpr (M == 2) _tile_zero(2);
    if constexpr (M == 2 && N == 2) _tile_zero(3);
  }
  for (int64_t k = 0; k < num_k; k += kTileWords, a += a_step, b += kTileWords * ldb) {
    // all loads first: a load into a tile that a product still reads would wait for it
    _tile_loadd(4, a, a_bytes);
    if constexpr (M == 2) _tile_loadd(5, a + kTileWords * lda, a_bytes);
    _tile_loadd(6, b, b_bytes);
    if constexpr (N == 2) _tile_loadd(7, b + kTileWords, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (M == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (M == 2 && N == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (N == 2) _tile_stored(1, c + kTileWords, c_bytes);
  if constexpr (M == 2) _tile_stored(2, c1, c_bytes);
  if constexpr (M == 2 && N == 2) _tile_stored(3, c1 + kTileWords, c_bytes);
}

inline void amx_block(int64_t num_row_tiles, int64_t num_column_tiles, bool accumulate, int64_t num_k, const Word* a,
                      int64_t a_step, int64_t lda, const Word* b, int64_t ldb, float* c, int64_t ldc) {
  const auto block = num_row_tiles == 2 ? (num_column_tiles == 2 ? &amx_block<2, 2> : &amx_block<2, 1>)
                                        : (num_column_tiles == 2 ? &amx_block<1, 2> : &amx_block<1, 1>);
  block(accumulate, num_k, a, a_step, lda, b, ldb, c, ldc);
}

// A has kRows rows that may be read, and as many words as the panel has rows of k.
struct AmxTiles : Avx512Tiles {
  static constexpr int64_t kRows = 2 * kTileWords;
  static constexpr int64_t kMaxVectors = 2;
  static constexpr int64_t kWordMultiple = kTileWords;

  static int64_t panel_vectors(int64_t num_left) { return std::min<int64_t>(num_left, kMaxVectors); }

  // While it lives, this thread's tile registers are set up: 16 rows of 64 bytes each.
  class Session {
   public:
    R1FAST_AMX Session() {
      alignas(64) uint8_t config[64] = {1};
      for (int tile = 0; tile < 8; ++tile) {
        config[16 + 2 * tile] = 64;
        config[48 + tile] = kTileWords;
      }
      asm volatile("" ::: "memory");
      _tile_loadconfig(config);
    }
    R1FAST_AMX ~Session() { _tile_release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  template <bool kBf16>
  static void into(Into into, int64_t num_vectors, int64_t num_k, const Word* a, int64_t lda, const Word* panel,
                   float* c, int64_t ldc, int64_t num_rows, int64_t num_columns) {
    static_assert(kBf16, "AMX multiplies bf16");
    const int64_t row_tiles = num_rows > kTileWords ? 2 : 1, ld_panel = kLanes * num_vectors;
    if (into == Into::kBuffer) {
      amx_block(row_tiles, num_vectors, false, num_k, a, kTileWords, lda, panel, ld_panel, c, ldc);
      return;
    }
    for (int64_t i = 0; i < std::min(num_rows, kRows); ++i) {
      for (int64_t j = 0; j < num_vectors; ++j) __builtin_prefetch(c + i * ldc + kLanes * j, 1);
    }
    alignas(64) float sums[kRows][kLanes * kMaxVectors];
    amx_block(row_tiles, num_vectors, false, num_k, a, kTileWords, lda, panel, ld_panel, &sums[0][0],
              kLanes * kMaxVectors);
    add_sums(into == Into::kAdd, sums, num_vectors, c, ldc, std::min(num_rows, kRows), num_columns);
  }

 private:
  R1FAST_AVX512 static void add_sums(bool accumulate, const float (&sums)[kRows][kLanes * kMaxVectors],
                                     int64_t num_vectors, float* c, int64_t ldc, int64_t num_rows,
                                     int64_t num_columns) {
    for (int64_t i = 0; i < num_rows; ++i) {
      for (int64_t j = 0; j < num_vectors; ++j) {
        const __mmask16 mask = avx512::column_mask(kLanes * j, num_columns);
        float* const to = c + i * ldc + kLanes * j;
        __m512 value = _mm512_load_ps(&sums[i][kLanes * j]);
        if (accumulate) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, to));
        _mm512_mask_storeu_ps(to, mask, value);
      }
    }
  }
};

// 16 words of each of 16 rows, turned: to[i] gets word i of every row.
R1FAST_AVX512_INLINE void transpose_words(const __m512i (&rows)[16], Word* to, int64_t ld) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {  // pairs of rows
    a[i] = _mm512_maskz_unpacklo_epi32(0xffff, rows[i], rows[i + 1]);
    a[i + 1] = _mm512_maskz_unpackhi_epi32(0xffff, rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // fours
    b[i] = _mm512_maskz_unpacklo_epi64(0xff, a[i], a[i + 2]);
    b[i + 1] = _mm512_maskz_unpackhi_epi64(0xff, a[i], a[i + 2]);
    b[i + 2] = _mm512_maskz_unpacklo_epi64(0xff, a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_maskz_unpackhi_epi64(0xff, a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // 128-bit lanes: word 4 l + i of rows 4 q .. 4 q + 3 is lane l of b[4 q + i]
    const __m512i low = _mm512_maskz_shuffle_i32x4(0xffff, b[i], b[4 + i], 0x88), high = _mm512_maskz_shuffle_i32x4(0xffff, b[8 + i], b[12 + i], 0x88);
    const __m512i low2 = _mm512_maskz_shuffle_i32x4(0xffff, b[i], b[4 + i], 0xdd), high2 = _mm512_maskz_shuffle_i32x4(0xffff, b[8 + i], b[12 + i], 0xdd);
    _mm512_storeu_si512(to + i * ld, _mm512_maskz_shuffle_i32x4(0xffff, low, high, 0x88));
    _mm512_storeu_si512(to + (8 + i) * ld, _mm512_maskz_shuffle_i32x4(0xffff, low, high, 0xdd));
    _mm512_storeu_si512(to + (4 + i) * ld, _mm512_maskz_shuffle_i32x4(0xffff, low2, high2, 0x88));
    _mm512_storeu_si512(to + (12 + i) * ld, _mm512_maskz_shuffle_i32x4(0xffff, low2, high2, 0xdd));
  }
}

// Rows [first, first + 32) and columns [begin, begin + 16) of a bf16 matrix as a tile of A: a row for each column, a
// word for each pair of rows. What lies outside the matrix is zero.
R1FAST_AVX512 inline void pack_turned(const Bf16* matrix, int64_t ld, int64_t first, int64_t num_rows, int64_t begin,
                                      int64_t num_columns, Word* tile) {
  const __mmask16 mask = avx512::column_mask(begin, num_columns);
  __m512i rows[16];
  for (int i = 0; i < 16; ++i) {
    const int64_t row = first + 2 * i;
    const Bf16* const from = matrix + row * ld + begin;
    const __mmask16 low_mask = row < num_rows ? mask : 0, high_mask = row + 1 < num_rows ? mask : 0;
    const __m512i low = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(low_mask, from));
    const __m512i high = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(high_mask, from + ld));
    rows[i] = _mm512_or_si512(low, _mm512_maskz_slli_epi32(0xffff, high, 16));
  }
  transpose_words(rows, tile, kTileWords);
}

}  // namespace r1fast
#endif
