// Sixteen lanes of fp32, or of 32-bit words, as kernels of the native forward and head see them: one AVX-512 register, or two
// of AVX2. Both namespaces have the same names, and the same results but for bf16 below its smallest normal number, which
// AVX-512's instructions for bf16 take for 0.
#pragma once

#include "epilogue.hpp"
#include "exp.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

namespace r1fast {

using Word = float __attribute__((may_alias));

constexpr int kLanes = 16;

namespace avx512 {

inline const bool kHasBf16 = avx512_bf16_supported();

using Lanes = __m512;
using Words = __m512i;
using Mask = __mmask16;   // of memory: the first so many lanes
using Truth = __mmask16;  // of lanes

// Of the 16 columns from `column` on, those below `num_columns`.
inline Mask column_mask(int64_t column, int64_t num_columns) {
  const int64_t left = num_columns - column;
  return static_cast<Mask>(left >= kLanes ? 0xffff : left <= 0 ? 0 : (1 << left) - 1);
}
inline Truth column_truth(int64_t column, int64_t num_columns) { return column_mask(column, num_columns); }
inline Truth none() { return 0; }
R1FAST_AVX512_INLINE Truth and_differs(Truth truth, Words words, int32_t from) {
  return _mm512_mask_cmpneq_epi32_mask(truth, words, _mm512_set1_epi32(from));
}

R1FAST_AVX512_INLINE Lanes zeros() { return _mm512_setzero_ps(); }
R1FAST_AVX512_INLINE Lanes all(float x) { return _mm512_set1_ps(x); }
R1FAST_AVX512_INLINE float first(Lanes x) { return _mm512_cvtss_f32(x); }
R1FAST_AVX512_INLINE Lanes plus(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
R1FAST_AVX512_INLINE Lanes minus(Lanes a, Lanes b) { return _mm512_sub_ps(a, b); }
R1FAST_AVX512_INLINE Lanes times(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
R1FAST_AVX512_INLINE Lanes over(Lanes a, Lanes b) { return _mm512_div_ps(a, b); }
R1FAST_AVX512_INLINE Lanes times_plus(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
R1FAST_AVX512_INLINE Lanes times_minus(Lanes a, Lanes b, Lanes c) { return _mm512_fmsub_ps(a, b, c); }
R1FAST_AVX512_INLINE Lanes larger(Lanes a, Lanes b) { return _mm512_maskz_max_ps(0xffff, a, b); }  // b of a NaN
R1FAST_AVX512_INLINE Lanes exp_lanes(Lanes x) { return exp_vector(x); }
R1FAST_AVX512_INLINE Lanes where(Truth truth, Lanes a, Lanes b) { return _mm512_mask_mov_ps(b, truth, a); }
R1FAST_AVX512_INLINE Lanes where(Truth truth, Lanes a) { return _mm512_maskz_mov_ps(truth, a); }
// a b + c, or c
R1FAST_AVX512_INLINE Lanes times_plus_where(Truth truth, Lanes a, Lanes b, Lanes c) {
  return _mm512_mask3_fmadd_ps(a, b, c, truth);
}

template <class Combine>
R1FAST_AVX512_INLINE float across_lanes(Lanes x, const Combine& combine) {
  x = combine(x, _mm512_maskz_shuffle_f32x4(0xffff, x, x, 0x4e));
  x = combine(x, _mm512_maskz_shuffle_f32x4(0xffff, x, x, 0xb1));
  x = combine(x, _mm512_maskz_permute_ps(0xffff, x, 0x4e));
  x = combine(x, _mm512_maskz_permute_ps(0xffff, x, 0xb1));
  return _mm512_cvtss_f32(x);
}

R1FAST_AVX512_INLINE Words load_words(const void* from) { return _mm512_loadu_si512(from); }
R1FAST_AVX512_INLINE Words load_words(const void* from, Mask mask) { return _mm512_maskz_loadu_epi32(mask, from); }
R1FAST_AVX512_INLINE void stream_lanes(Word* to, Lanes x) { _mm512_stream_ps(to, x); }
R1FAST_AVX512_INLINE void stream_words(Word* to, Words x) { _mm512_stream_si512(reinterpret_cast<__m512i*>(to), x); }
R1FAST_AVX512_INLINE void store_words(Word* to, Words x) { _mm512_storeu_si512(to, x); }
R1FAST_AVX512_INLINE Words as_words(Lanes x) { return _mm512_castps_si512(x); }

// The low and the high halves of words, as floats.
R1FAST_AVX512_INLINE void halves(Words words, Lanes& low, Lanes& high) {
  low = _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, words, 16));
  high = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Rounded to bf16, in the low halves of words, by instructions of fp32 alone; a NaN stays one.
R1FAST_AVX512_INLINE Words round_words(Lanes x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(0xffff, bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_maskz_srli_epi32(0xffff, _mm512_mask_mov_epi32(rounded, is_nan, quiet), 16);
}
R1FAST_AVX512_INLINE __m256i to_bf16(Lanes x) {
  return kHasBf16 ? (__m256i)_mm512_cvtneps_pbh(x) : _mm512_maskz_cvtepi32_epi16(0xffff, round_words(x));
}

// Two vectors rounded to bf16, in words: low[0] high[0] low[1] high[1] ...
R1FAST_AVX512_INLINE Words interleave_bf16(Lanes low, Lanes high) {
  if (!kHasBf16) {
    return _mm512_or_si512(round_words(low), _mm512_maskz_slli_epi32(0xffff, round_words(high), 16));
  }
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);  // 16 of low, then 16 of high
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_maskz_permutexvar_epi16(~__mmask32{0}, _mm512_load_si512(kOrder), both);
}

// Two rows of 16 bf16, as they lie, in words.
R1FAST_AVX512_INLINE Words interleave_rows(const Bf16* low_row, Mask low_mask, const Bf16* high_row, Mask high_mask) {
  const __m512i low = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(low_mask, low_row));
  const __m512i high = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(high_mask, high_row));
  return _mm512_or_si512(low, _mm512_maskz_slli_epi32(0xffff, high, 16));
}

// 16 words of pairs (v, v + 1): the eight words of v, then those of v + 1.
R1FAST_AVX512_INLINE void split_pairs(const Word* pairs, Word* even_to, Word* odd_to) {
  const __m512i order = _mm512_set_epi32(0x0f0e0b0a, 0x0d0c0908, 0x07060302, 0x05040100, 0x0f0e0b0a, 0x0d0c0908,
                                         0x07060302, 0x05040100, 0x0f0e0b0a, 0x0d0c0908, 0x07060302, 0x05040100,
                                         0x0f0e0b0a, 0x0d0c0908, 0x07060302, 0x05040100);
  const __m512i even = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 15, 13, 11, 9, 7, 5, 3, 1);
  const __m512i words = _mm512_shuffle_epi8(_mm512_loadu_si512(pairs), order);
  _mm512_mask_storeu_epi32(even_to, 0x00ff, _mm512_maskz_permutexvar_epi32(0x00ff, even, words));
  _mm512_mask_storeu_epi32(odd_to, 0x00ff, _mm512_maskz_permutexvar_epi32(0x00ff, odd, words));
}

// The first `count` columns of a block [16][16], each a row of `to`.
R1FAST_AVX512_INLINE void turn_block(const float* block, int64_t count, Word* to, int64_t ld) {
  const __m512i every_16th = _mm512_set_epi32(240, 224, 208, 192, 176, 160, 144, 128, 112, 96, 80, 64, 48, 32, 16, 0);
  for (int64_t i = 0; i < count; ++i) {
    const __m512 turned = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, every_16th, block + i, sizeof(float));
    _mm512_storeu_ps(to + i * ld, turned);
  }
}

// Elements from and to memory, where the mask says so, and rounded as if they had been there.
R1FAST_AVX512_INLINE Lanes load_lanes(const Word* from) { return _mm512_loadu_ps(from); }
R1FAST_AVX512_INLINE Lanes load_lanes(const Word* from, Mask mask) { return _mm512_maskz_loadu_ps(mask, from); }
R1FAST_AVX512_INLINE Lanes widen(__m256i bits) {
  return (__m512)_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, bits), 16);
}
R1FAST_AVX512_INLINE Lanes load_lanes(const Bf16* from, Mask mask) {
  return widen(_mm256_maskz_loadu_epi16(mask, from));
}
R1FAST_AVX512_INLINE void store_lanes(Word* to, Lanes x) { _mm512_storeu_ps(to, x); }
R1FAST_AVX512_INLINE void store_lanes(Word* to, Mask mask, Lanes x) { _mm512_mask_storeu_ps(to, mask, x); }
R1FAST_AVX512_INLINE void store_lanes(Bf16* to, Mask mask, Lanes x) {
  _mm256_mask_storeu_epi16(to, mask, to_bf16(x));
}
R1FAST_AVX512_INLINE Lanes round_lanes(Lanes x, float) { return x; }
R1FAST_AVX512_INLINE Lanes round_lanes(Lanes x, Bf16) { return widen(to_bf16(x)); }

}  // namespace avx512

namespace avx2 {

struct Lanes {
  __m256 low, high;
};
struct Words {
  __m256i low, high;
};
struct Truth {
  __m256 low, high;
};
// Masked stores are slow on some processors: whole vectors go without.
struct Mask {
  int32_t count;
  bool is_whole() const { return count == kLanes; }
};

inline Mask column_mask(int64_t column, int64_t num_columns) {
  return {static_cast<int32_t>(std::clamp<int64_t>(num_columns - column, 0, kLanes))};
}
R1FAST_AVX2_INLINE Truth column_truth(int64_t column, int64_t num_columns) {
  const __m256i count = _mm256_set1_epi32(column_mask(column, num_columns).count);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(count, _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0))),
          _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, _mm256_set_epi32(15, 14, 13, 12, 11, 10, 9, 8)))};
}
R1FAST_AVX2_INLINE Truth none() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
R1FAST_AVX2_INLINE Truth and_differs(Truth truth, Words words, int32_t from) {
  const __m256i x = _mm256_set1_epi32(from);
  return {_mm256_andnot_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(words.low, x)), truth.low),
          _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(words.high, x)), truth.high)};
}

R1FAST_AVX2_INLINE Lanes zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
R1FAST_AVX2_INLINE Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
R1FAST_AVX2_INLINE Lanes all_of(__m256 x) { return {x, x}; }
R1FAST_AVX2_INLINE float first(Lanes x) { return _mm256_cvtss_f32(x.low); }
R1FAST_AVX2_INLINE Lanes plus(Lanes a, Lanes b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
R1FAST_AVX2_INLINE Lanes minus(Lanes a, Lanes b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
R1FAST_AVX2_INLINE Lanes times(Lanes a, Lanes b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
R1FAST_AVX2_INLINE Lanes over(Lanes a, Lanes b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
R1FAST_AVX2_INLINE Lanes times_plus(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
R1FAST_AVX2_INLINE Lanes times_minus(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
R1FAST_AVX2_INLINE Lanes larger(Lanes a, Lanes b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
R1FAST_AVX2_INLINE Lanes exp_lanes(Lanes x) { return {exp_vector(x.low), exp_vector(x.high)}; }
R1FAST_AVX2_INLINE Lanes where(Truth truth, Lanes a, Lanes b) {
  return {_mm256_blendv_ps(b.low, a.low, truth.low), _mm256_blendv_ps(b.high, a.high, truth.high)};
}
R1FAST_AVX2_INLINE Lanes where(Truth truth, Lanes a) {
  return {_mm256_and_ps(truth.low, a.low), _mm256_and_ps(truth.high, a.high)};
}
R1FAST_AVX2_INLINE Lanes times_plus_where(Truth truth, Lanes a, Lanes b, Lanes c) {
  return where(truth, times_plus(a, b, c), c);
}

// In the order of AVX-512's.
template <class Combine>
R1FAST_AVX2_INLINE float across_lanes(Lanes x, const Combine& combine) {
  x = combine(x, Lanes{x.high, x.low});  // from here on its halves are alike
  x = combine(x, all_of(_mm256_permute2f128_ps(x.low, x.low, 1)));
  x = combine(x, all_of(_mm256_permute_ps(x.low, 0x4e)));
  x = combine(x, all_of(_mm256_permute_ps(x.low, 0xb1)));
  return _mm256_cvtss_f32(x.low);
}

R1FAST_AVX2_INLINE __m256i load_eight(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
R1FAST_AVX2_INLINE Words load_words(const void* from) {
  return {load_eight(from), load_eight(static_cast<const char*>(from) + 32)};
}
// As many bytes as the mask says, from a copy with zeros behind them.
R1FAST_AVX2_INLINE Words load_words(const void* from, Mask mask) {
  if (mask.is_whole()) return load_words(from);
  alignas(32) char copy[64] = {};
  std::memcpy(copy, from, static_cast<size_t>(mask.count) * 4);
  return load_words(copy);
}
R1FAST_AVX2_INLINE void stream_lanes(Word* to, Lanes x) {
  _mm256_stream_ps(to, x.low);
  _mm256_stream_ps(to + 8, x.high);
}
R1FAST_AVX2_INLINE void stream_words(Word* to, Words x) {
  stream_lanes(to, {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)});
}
R1FAST_AVX2_INLINE void store_words(Word* to, Words x) {
  _mm256_storeu_ps(to, _mm256_castsi256_ps(x.low));
  _mm256_storeu_ps(to + 8, _mm256_castsi256_ps(x.high));
}
R1FAST_AVX2_INLINE Words as_words(Lanes x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }

R1FAST_AVX2_INLINE __m256 low_halves(__m256i words) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }
R1FAST_AVX2_INLINE __m256 high_halves(__m256i words) {
  return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
R1FAST_AVX2_INLINE void halves(Words words, Lanes& low, Lanes& high) {
  low = {low_halves(words.low), low_halves(words.high)};
  high = {high_halves(words.low), high_halves(words.high)};
}

// Rounded to bf16, as the high halves of words whose low halves are not 0; a NaN stays one.
R1FAST_AVX2_INLINE __m256i round_eight(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(nan),
                                              _mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
R1FAST_AVX2_INLINE __m256i interleave_eight(__m256 low, __m256 high) {
  return _mm256_blend_epi16(_mm256_srli_epi32(round_eight(low), 16), round_eight(high), 0xaa);
}
R1FAST_AVX2_INLINE Words interleave_bf16(Lanes low, Lanes high) {
  return {interleave_eight(low.low, high.low), interleave_eight(low.high, high.high)};
}

// 16 bf16, and zeros where there are fewer.
struct Halfwords {
  __m128i low, high;
};
R1FAST_AVX2_INLINE Halfwords load_halfwords(const Bf16* from, Mask mask) {
  alignas(32) char copy[32] = {};
  const void* at = from;
  if (!mask.is_whole()) {
    std::memcpy(copy, from, static_cast<size_t>(mask.count) * 2);
    at = copy;
  }
  const auto* const eights = static_cast<const __m128i*>(at);
  return {_mm_loadu_si128(eights), _mm_loadu_si128(eights + 1)};
}
R1FAST_AVX2_INLINE __m256i interleave_halfwords(__m128i low, __m128i high) {
  return _mm256_set_m128i(_mm_unpackhi_epi16(low, high), _mm_unpacklo_epi16(low, high));
}
R1FAST_AVX2_INLINE Words interleave_rows(const Bf16* low_row, Mask low_mask, const Bf16* high_row, Mask high_mask) {
  const Halfwords a = load_halfwords(low_row, low_mask), b = load_halfwords(high_row, high_mask);
  return {interleave_halfwords(a.low, b.low), interleave_halfwords(a.high, b.high)};
}

R1FAST_AVX2_INLINE void split_pairs(const Word* pairs, Word* even_to, Word* odd_to) {
  const __m256i order = _mm256_set_epi32(0x0f0e0b0a, 0x07060302, 0x0d0c0908, 0x05040100, 0x0f0e0b0a, 0x07060302,
                                         0x0d0c0908, 0x05040100);  // two words of v, then two of v + 1
  for (int i = 0; i < 2; ++i) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(load_eight(pairs + 8 * i), order), 0xd8);
    _mm_storeu_ps(even_to + 4 * i, _mm_castsi128_ps(_mm256_castsi256_si128(words)));
    _mm_storeu_ps(odd_to + 4 * i, _mm_castsi128_ps(_mm256_extracti128_si256(words, 1)));
  }
}

R1FAST_AVX2_INLINE void turn_block(const float* block, int64_t count, Word* to, int64_t ld) {
  alignas(32) float turned[kLanes * kLanes];
  for (int corner = 0; corner < 4; ++corner) {
    const float* const from = block + corner / 2 * 8 * kLanes + corner % 2 * 8;
    float* const corner_to = turned + corner % 2 * 8 * kLanes + corner / 2 * 8;
    __m256 a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + i * kLanes);
    for (int i = 0; i < 8; i += 2) {  // pairs of rows
      b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {  // fours
      a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
      a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
      a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      _mm256_store_ps(corner_to + i * kLanes, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
      _mm256_store_ps(corner_to + (i + 4) * kLanes, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    _mm256_storeu_ps(to + i * ld, _mm256_load_ps(turned + i * kLanes));
    _mm256_storeu_ps(to + i * ld + 8, _mm256_load_ps(turned + i * kLanes + 8));
  }
}

R1FAST_AVX2_INLINE Lanes load_lanes(const Word* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
R1FAST_AVX2_INLINE Lanes load_lanes(const Word* from, Mask mask) {
  const Words words = load_words(from, mask);
  return {_mm256_castsi256_ps(words.low), _mm256_castsi256_ps(words.high)};
}
R1FAST_AVX2_INLINE Lanes load_lanes(const Bf16* from, Mask mask) {
  const Halfwords bits = load_halfwords(from, mask);
  return {low_halves(_mm256_cvtepu16_epi32(bits.low)), low_halves(_mm256_cvtepu16_epi32(bits.high))};
}
R1FAST_AVX2_INLINE void store_lanes(Word* to, Lanes x) {
  _mm256_storeu_ps(to, x.low);
  _mm256_storeu_ps(to + 8, x.high);
}
R1FAST_AVX2_INLINE void store_lanes(Word* to, Mask mask, Lanes x) {
  if (mask.is_whole()) return store_lanes(to, x);
  alignas(32) Word copy[kLanes];
  store_lanes(copy, x);
  std::memcpy(static_cast<void*>(to), copy, static_cast<size_t>(mask.count) * 4);
}
R1FAST_AVX2_INLINE void store_lanes(Bf16* to, Mask mask, Lanes x) {
  const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(round_eight(x.low), 16),
                                             _mm256_srli_epi32(round_eight(x.high), 16));
  const __m256i bits = _mm256_permute4x64_epi64(packed, 0xd8);
  if (mask.is_whole()) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
  alignas(32) char copy[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(copy), bits);
  std::memcpy(static_cast<void*>(to), copy, static_cast<size_t>(mask.count) * 2);
}
R1FAST_AVX2_INLINE Lanes round_lanes(Lanes x, float) { return x; }
R1FAST_AVX2_INLINE Lanes round_lanes(Lanes x, Bf16) {
  return {high_halves(round_eight(x.low)), high_halves(round_eight(x.high))};
}

}  // namespace avx2
}  // namespace r1fast
#endif
