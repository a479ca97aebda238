// exp, log and tanh in fp32, in two forms: plain C++ without branches or library calls, for loops that the compiler
// vectorises for whatever instructions the calling function may use, and AVX-512 and AVX2 for the native kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Inlined into functions compiled for different instruction sets, so that each has its own.
#define R1FAST_INLINE __attribute__((always_inline)) inline

namespace r1fast {

// exp(r) = 1 + r + r^2 P(r) for |r| <= ln(2) / 2: relative error 3e-9, before rounding.
constexpr float kExpPoly[5] = {0.49999994f, 0.16666520f, 0.041668393f, 0.0083687808f, 0.0013814467f};
constexpr float kLog2e = 1.44269504f;
constexpr float kLn2High = 0.693359375f;  // few bits, so that n * kLn2High is exact
constexpr float kLn2Low = -2.12194440e-4f;
// exp is 0 below and infinite above: arguments are clamped here first, which keeps 2^n and inf - inf out of trouble
constexpr float kMinExp = -110.0f;
constexpr float kMaxExp = 100.0f;

R1FAST_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

R1FAST_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// condition ? a : b by masks: GCC makes branches of the operator, and a loop with branches is not vectorised.
R1FAST_INLINE float select(bool condition, float a, float b) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return float_of((bits_of(a) & mask) | (bits_of(b) & ~mask));
}

// x clamped to where exp changes. A NaN stays.
R1FAST_INLINE float clamp_exponent(float x) {
  x = select(x < kMinExp, kMinExp, x);
  return select(x > kMaxExp, kMaxExp, x);
}

struct ExpParts {
  float r_squared_p;  // exp(x) = 2^n (1 + r + r^2 P(r))
  float r;
  int32_t n;
};

R1FAST_INLINE ExpParts exp_parts(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, found in the low bits
  const float shifted = x * kLog2e + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = kExpPoly[4];
  for (int i = 3; i >= 0; --i) p = p * r + kExpPoly[i];
  return {p * r * r, r, static_cast<int32_t>(bits_of(shifted) - bits_of(kRound))};
}

R1FAST_INLINE float power_of_two(int32_t n) { return float_of(static_cast<uint32_t>(n + 127) << 23); }

// For clamped x. In two steps, because 2^n alone may not be a normal number.
R1FAST_INLINE float exp_clamped(float x) {
  const ExpParts parts = exp_parts(x);
  const int32_t half = parts.n >> 1;
  return (1 + (parts.r + parts.r_squared_p)) * power_of_two(half) * power_of_two(parts.n - half);
}

// log of a positive number, subnormal numbers included; what it says of others is not used.
R1FAST_INLINE float log_positive(float x) {
  const bool tiny = x < 1.17549435e-38f;
  const uint32_t bits = bits_of(x * select(tiny, 16777216.0f, 1.0f));
  const uint32_t above_sqrt_half = bits - 0x3f3504f3u;  // so that the mantissa lies in [sqrt(1/2), sqrt(2))
  const int32_t exponent = static_cast<int32_t>(above_sqrt_half) >> 23;
  const float n = static_cast<float>(exponent - 24 * static_cast<int32_t>(tiny));
  const float f = float_of((above_sqrt_half & 0x007fffffu) + 0x3f3504f3u) - 1;
  constexpr float kPoly[8] = {0.33333331f,  -0.25000821f, 0.20001227f, -0.16623357f,
                              0.14201757f, -0.13160183f, 0.12761576f, -0.076344967f};
  float q = kPoly[7];
  for (int i = 6; i >= 0; --i) q = q * f + kPoly[i];
  const float square = f * f;
  const float low = n * kLn2Low + (square * f * q - 0.5f * square);
  return n * kLn2High + (f + low);
}

struct Tanh {
  float value;
  float slope;  // 1 - value^2, without its cancellation
};

R1FAST_INLINE Tanh tanh_and_slope(float x) {
  const float magnitude = std::fabs(x);
  const float twice = select(magnitude > 43.0f, 86.0f, 2 * magnitude);
  const ExpParts parts = exp_parts(twice);
  const float half_scale = power_of_two(parts.n - 1);
  // expm1(2|x|) / 2: accurate near 0, where n = 0
  const float half_expm1 = half_scale * (parts.r + parts.r_squared_p) + (half_scale - 0.5f);
  const float inverse = 1 / (half_expm1 + 1);
  const float value = half_expm1 * inverse;
  return {std::copysign(value, x), inverse * (1 + value)};
}

#if defined(__x86_64__)
#define R1FAST_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")))
#define R1FAST_AVX512_INLINE R1FAST_AVX512 __attribute__((always_inline)) inline
#define R1FAST_AVX2 __attribute__((target("avx2,fma")))
#define R1FAST_AVX2_INLINE R1FAST_AVX2 __attribute__((always_inline)) inline

// For any x: 0 below -104, infinity above 88.7, NaN for NaN.
R1FAST_AVX512_INLINE __m512 exp_vector(__m512 x) {
  // the second operand of min and max is the result for a NaN
  x = _mm512_maskz_max_ps(0xffff, _mm512_set1_ps(kMinExp), x);
  x = _mm512_maskz_min_ps(0xffff, _mm512_set1_ps(kMaxExp), x);
  const __m512 n = _mm512_maskz_roundscale_ps(0xffff, _mm512_mul_ps(x, _mm512_set1_ps(kLog2e)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2High), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2Low), r);
  __m512 p = _mm512_set1_ps(kExpPoly[4]);
  for (int i = 3; i >= 0; --i) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kExpPoly[i]));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
  return _mm512_maskz_scalef_ps(0xffff, p, n);
}

// The same steps, and the same bits.
R1FAST_AVX2_INLINE __m256 exp_vector(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(kMinExp), x);
  x = _mm256_min_ps(_mm256_set1_ps(kMaxExp), x);
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(kLog2e)), _MM_FROUND_TO_NEAREST_INT);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2High), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2Low), r);
  __m256 p = _mm256_set1_ps(kExpPoly[4]);
  for (int i = 3; i >= 0; --i) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(kExpPoly[i]));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1));
  // 2^n in two steps, the second of which alone may round
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), one = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, one), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), one), 23);
  return _mm256_mul_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}
#endif

}  // namespace r1fast
