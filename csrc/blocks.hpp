// What stands between a decoder layer's products in training, forward and backward: RMS norm with the residual sum before
// it, the norm and rotation of the heads, and silu(gate) up. The formulas are in kernels/rms_norm.py, rope.py, swiglu.py.
//
// Rows in plain C++, compiled for AVX-512, AVX2 and any machine. Gradients of weights are summed in blocks of rows, then over
// the blocks in order: the number of threads changes no bit.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

#include "rows.hpp"

namespace r1fast {

constexpr int64_t kBlockRows = 64;  // a task
constexpr int64_t kSumRows = 8;     // summed apart: with kBlockRows part of the result, where weights have gradients

// s = x + delta, y = s / rms(s) * weight
template <class T>
struct NormForward {
  const T* x;
  int64_t ld_x;
  const T* delta;  // null: s is x, and not written
  int64_t ld_delta;
  const T* weight;
  float eps;
  int64_t dim;
  T* sum;
  T* y;

  R1FAST_INLINE void rows(int64_t begin, int64_t end, float*) const {
    for (int64_t row = begin; row < end; ++row) {
      const T* s = x + row * ld_x;
      if (delta != nullptr) {
        const T* __restrict const other = delta + row * ld_delta;
        T* __restrict const to = sum + row * dim;
        for (int64_t i = 0; i < dim; ++i) store(to + i, to_float(s[i]) + to_float(other[i]));
        s = to;
      }
      norm_row(s, weight, eps, dim, y + row * dim);
    }
  }
};

// dx = residual + dnorm, dweight += its share, for one row x.
template <class T>
R1FAST_INLINE void norm_row_backward(const T* __restrict dy, const T* __restrict residual, const T* __restrict x,
                                     const T* __restrict weight, float eps, int64_t dim, T* __restrict dx,
                                     float* __restrict dweight) {
  float lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= dim; i += 16) {
    for (int l = 0; l < 16; ++l) lanes[l] += to_float(dy[i + l]) * to_float(weight[i + l]) * to_float(x[i + l]);
  }
  float sum = 0;
  for (; i < dim; ++i) sum += to_float(dy[i]) * to_float(weight[i]) * to_float(x[i]);
  const float scale = inverse_rms(x, eps, dim);
  const float c = (sum + fold(lanes)) * scale * scale / static_cast<float>(dim);
  for (i = 0; i < dim; ++i) dweight[i] += to_float(dy[i]) * (to_float(x[i]) * scale);
  if (residual != nullptr) {
    for (i = 0; i < dim; ++i) {
      const float d = scale * (to_float(dy[i]) * to_float(weight[i]) - to_float(x[i]) * c);
      store(dx + i, to_float(residual[i]) + d);
    }
  } else {
    for (i = 0; i < dim; ++i) store(dx + i, scale * (to_float(dy[i]) * to_float(weight[i]) - to_float(x[i]) * c));
  }
}

template <class T>
struct NormBackward {
  const T* dy;
  int64_t ld_dy;
  const T* residual;  // the gradient of s by itself, or null
  int64_t ld_residual;
  const T* x;  // s of the forward
  int64_t ld_x;
  const T* weight;
  float eps;
  int64_t dim;
  T* dx;

  R1FAST_INLINE void rows(int64_t begin, int64_t end, float* dweight) const {
    for (int64_t row = begin; row < end; ++row) {
      norm_row_backward(dy + row * ld_dy, residual == nullptr ? nullptr : residual + row * ld_residual, x + row * ld_x,
                        weight, eps, dim, dx + row * dim, dweight);
    }
  }
};

constexpr int64_t kMaxHeadDim = 1024;

// q (T, H, Dh) and k (T, K, Dh) of qkv (T, H + 2 K, Dh): normed where there are weights, and rotated.
template <class T>
struct RopeForward {
  const T* qkv;
  int64_t ld;
  const float* rotations;  // (T, 2 Dh): cos, then sin with its first half negated
  const T* q_weight;       // (Dh) or null
  const T* k_weight;
  float eps;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t dim;
  T* q;
  T* k;

  R1FAST_INLINE void rows(int64_t begin, int64_t end, float*) const {
    T normed[kMaxHeadDim];
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t h = 0; h < num_heads + num_kv_heads; ++h) {
        const bool is_key = h >= num_heads;
        const T* from = qkv + t * ld + h * dim;
        if (q_weight != nullptr) {
          norm_row(from, is_key ? k_weight : q_weight, eps, dim, normed);
          from = normed;
        }
        T* const to = is_key ? k + (t * num_kv_heads + h - num_heads) * dim : q + (t * num_heads + h) * dim;
        rotate_head(from, rotations + t * 2 * dim, dim, to);
      }
    }
  }
};

// A head (Dh contiguous) of token t is at x + t * token + h * head.
template <class T>
struct Heads {
  const T* x;
  int64_t token;
  int64_t head;
  const T* at(int64_t t, int64_t h) const { return x + t * token + h * head; }
};

// The gradient of rotate_head.
template <class T>
R1FAST_INLINE void rotate_back(const T* __restrict dy, const float* __restrict rotation, int64_t dim,
                               T* __restrict dx) {
  const int64_t half = dim / 2;
  const float *const c0 = rotation, *const c1 = c0 + half, *const s0 = c0 + dim, *const s1 = s0 + half;
  const T* const dy1 = dy + half;
  T* __restrict const dx1 = dx + half;
  for (int64_t d = 0; d < half; ++d) {
    const float a = to_float(dy[d]), b = to_float(dy1[d]);
    store(dx + d, a * rounded(c0[d], T{}) + b * rounded(s1[d], T{}));
    store(dx1 + d, b * rounded(c1[d], T{}) + a * rounded(s0[d], T{}));
  }
}

// dqkv (T, H + 2 K, Dh) from the gradients of q, k and v; dweight is that of q, then of k.
template <class T>
struct RopeBackward {
  Heads<T> dq;
  Heads<T> dk;
  Heads<T> dv;
  const T* qkv;  // read where there are weights
  int64_t ld;
  const float* rotations;
  const T* q_weight;
  const T* k_weight;
  float eps;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t dim;
  T* dqkv;

  R1FAST_INLINE void rows(int64_t begin, int64_t end, float* dweight) const {
    const int64_t num_rotated = num_heads + num_kv_heads;
    T turned[kMaxHeadDim];
    float of_token[2 * kMaxHeadDim];  // summed apart: a block has many heads
    for (int64_t t = begin; t < end; ++t) {
      if (q_weight != nullptr) std::fill_n(of_token, 2 * dim, 0.0f);
      for (int64_t h = 0; h < num_rotated; ++h) {
        const bool is_key = h >= num_heads;
        const T* const dy = is_key ? dk.at(t, h - num_heads) : dq.at(t, h);
        T* const to = dqkv + (t * (num_rotated + num_kv_heads) + h) * dim;
        rotate_back(dy, rotations + t * 2 * dim, dim, q_weight == nullptr ? to : turned);
        if (q_weight != nullptr) {
          norm_row_backward(turned, static_cast<const T*>(nullptr), qkv + t * ld + h * dim,
                            is_key ? k_weight : q_weight, eps, dim, to, of_token + (is_key ? dim : 0));
        }
      }
      for (int64_t i = 0; q_weight != nullptr && i < 2 * dim; ++i) dweight[i] += of_token[i];
      for (int64_t h = 0; h < num_kv_heads; ++h) {
        std::copy_n(dv.at(t, h), dim, dqkv + (t * (num_rotated + num_kv_heads) + num_rotated + h) * dim);
      }
    }
  }
};

// 1 / (1 + exp(-x))
R1FAST_INLINE float sigmoid(float x) { return 1 / (1 + exp_clamped(clamp_exponent(-x))); }

template <class T>
R1FAST_INLINE void swiglu_row(const T* __restrict gate, const T* __restrict up, int64_t width, T* __restrict y) {
  for (int64_t i = 0; i < width; ++i) {
    const float g = to_float(gate[i]);
    store(y + i, rounded(g * sigmoid(g), T{}) * to_float(up[i]));
  }
}

// y = silu(gate) up, of rows of gate (F) and up (F).
template <class T>
struct SwigluForward {
  const T* gate_up;
  int64_t ld;
  int64_t width;
  T* y;

  R1FAST_INLINE void rows(int64_t begin, int64_t end, float*) const {
    for (int64_t row = begin; row < end; ++row) {
      const T* const gate = gate_up + row * ld;
      swiglu_row(gate, gate + width, width, y + row * width);
    }
  }
};

// The gradients of `width` gates and ups.
template <class T>
R1FAST_INLINE void swiglu_backward_row(const T* __restrict dy, const T* __restrict gate, const T* __restrict up,
                                       int64_t width, T* __restrict dgate, T* __restrict dup) {
  for (int64_t i = 0; i < width; ++i) {
    const float g = to_float(gate[i]), s = sigmoid(g), d = to_float(dy[i]);
    store(dgate + i, d * to_float(up[i]) * (s * (1 + g * (1 - s))));
    store(dup + i, d * (g * s));
  }
}

template <class T>
struct SwigluBackward {
  const T* dy;
  int64_t ld_dy;
  const T* gate_up;
  int64_t ld;
  int64_t width;
  T* dgate_up;  // (T, 2 F)

  R1FAST_INLINE void rows(int64_t begin, int64_t end, float*) const {
    for (int64_t row = begin; row < end; ++row) {
      const T* const gate = gate_up + row * ld;
      T* const dgate = dgate_up + row * 2 * width;
      swiglu_backward_row(dy + row * ld_dy, gate, gate + width, width, dgate, dgate + width);
    }
  }
};

template <class Call>
void rows_baseline(const Call& call, int64_t begin, int64_t end, float* sums) {
  call.rows(begin, end, sums);
}
#if defined(__x86_64__)
template <class Call>
R1FAST_AVX2 void rows_avx2(const Call& call, int64_t begin, int64_t end, float* sums) {
  call.rows(begin, end, sums);
}
template <class Call>
R1FAST_AVX512 void rows_avx512(const Call& call, int64_t begin, int64_t end, float* sums) {
  call.rows(begin, end, sums);
}
#endif

// `level` is auto, baseline, avx2 or avx512.
template <class Call>
auto rows_for(const std::string& level) -> decltype(&rows_baseline<Call>) {
  const Level found = level_of(level);
#if defined(__x86_64__)
  if (found == Level::kAvx512) return &rows_avx512<Call>;
  if (found == Level::kAvx2) return &rows_avx2<Call>;
#endif
  return &rows_baseline<Call>;
}

// call.rows over all rows of `row_size` elements, and what they add to `num_sums` numbers.
template <class Call, class T>
void run_rows(const Call& call, int64_t num_rows, int64_t row_size, T* sums, int64_t num_sums,
              const std::string& level, int64_t num_threads) {
  const auto rows = rows_for<Call>(level);
  const int64_t num_blocks = ceil_div(num_rows, kBlockRows);
  std::vector<float> partial(static_cast<size_t>(num_blocks * num_sums));
  parallel_for(num_blocks, worthwhile_threads(num_threads, 4.0 * num_rows * row_size), [&](int64_t block, int64_t) {
    const int64_t begin = block * kBlockRows, end = std::min(begin + kBlockRows, num_rows);
    if (num_sums == 0) return rows(call, begin, end, nullptr);
    std::vector<float> some(static_cast<size_t>(num_sums));
    float* const all = partial.data() + block * num_sums;
    for (int64_t row = begin; row < end; row += kSumRows) {
      std::fill(some.begin(), some.end(), 0.0f);
      rows(call, row, std::min(row + kSumRows, end), some.data());
      for (int64_t i = 0; i < num_sums; ++i) all[i] += some[i];
    }
  });
  for (int64_t i = 0; i < num_sums; ++i) {
    double sum = 0;
    for (int64_t block = 0; block < num_blocks; ++block) sum += partial[block * num_sums + i];
    store(sums + i, static_cast<float>(sum));
  }
}

}  // namespace r1fast
