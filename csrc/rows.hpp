// A row of what stands between the matrix products of a decoder layer, in plain C++ for any instruction set: RMS norm and
// rotation, as sampling and training share them. Arithmetic in fp32; bf16 is rounded where PyTorch rounds it.
#pragma once

#include <cmath>

#include "epilogue.hpp"

namespace r1fast {

R1FAST_INLINE float rounded(float x, float) { return x; }
R1FAST_INLINE float rounded(float x, Bf16) { return float_of(bf16_bits(x) << 16); }

R1FAST_INLINE float fold(float (&lanes)[16]) {
  for (int step = 8; step > 0; step /= 2) {
    for (int l = 0; l < step; ++l) lanes[l] += lanes[l + step];
  }
  return lanes[0];
}

// 1 / rms(x)
template <class T>
R1FAST_INLINE float inverse_rms(const T* x, float eps, int64_t dim) {
  float lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= dim; i += 16) {
    for (int l = 0; l < 16; ++l) lanes[l] += to_float(x[i + l]) * to_float(x[i + l]);
  }
  float sum = 0;
  for (; i < dim; ++i) sum += to_float(x[i]) * to_float(x[i]);
  return 1 / std::sqrt((sum + fold(lanes)) / static_cast<float>(dim) + eps);
}

// y = x / rms(x) * weight over `dim` elements; y may be x.
template <class T>
R1FAST_INLINE void norm_row(const T* x, const T* weight, float eps, int64_t dim, T* y) {
  const float scale = inverse_rms(x, eps, dim);
  for (int64_t i = 0; i < dim; ++i) store(y + i, to_float(x[i]) * scale * to_float(weight[i]));
}

// out = x cos + (x2, x1) sin; `rotation` is cos, then sin with its first half negated.
template <class T>
R1FAST_INLINE void rotate_head(const T* __restrict x, const float* __restrict rotation, int64_t dim,
                               T* __restrict out) {
  const int64_t half = dim / 2;
  const float *const c0 = rotation, *const c1 = c0 + half, *const s0 = c0 + dim, *const s1 = s0 + half;
  const T* const x1 = x + half;
  T* __restrict const out1 = out + half;
  for (int64_t d = 0; d < half; ++d) {
    const float a = to_float(x[d]), b = to_float(x1[d]);
    store(out + d, rounded(a * rounded(c0[d], T{}), T{}) + b * rounded(s0[d], T{}));
    store(out1 + d, rounded(b * rounded(c1[d], T{}), T{}) + a * rounded(s1[d], T{}));
  }
}

}  // namespace r1fast
