// What stands between the matrix products of a decoder layer, a row at a time: RMS norm; and the norm of q and k, their
// rotation, and the write of k and v into the paged cache. In bf16 it rounds where PyTorch rounds.
#pragma once

#include "linear.hpp"
#include "paged_cache.hpp"

#if defined(__x86_64__)
namespace r1fast {

// y = x / rms(x) * weight over `dim` elements; y may be x.
template <class T>
R1FAST_AVX512_INLINE void norm_row(const T* x, const T* weight, float eps, int64_t dim, T* y) {
  float lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= dim; i += 16) {
    for (int l = 0; l < 16; ++l) lanes[l] += to_float(x[i + l]) * to_float(x[i + l]);
  }
  float sum = 0;
  for (; i < dim; ++i) sum += to_float(x[i]) * to_float(x[i]);
  for (int step = 8; step > 0; step /= 2) {
    for (int l = 0; l < step; ++l) lanes[l] += lanes[l + step];
  }
  const float scale = 1 / std::sqrt((sum + lanes[0]) / static_cast<float>(dim) + eps);
  for (i = 0; i < dim; ++i) store(y + i, to_float(x[i]) * scale * to_float(weight[i]));
}

template <class T>
R1FAST_AVX512 void norm_rows(const T* x, int64_t ld_x, const T* weight, float eps, int64_t dim, T* y, int64_t ld_y,
                             int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) norm_row(x + i * ld_x, weight, eps, dim, y + i * ld_y);
}

constexpr int64_t kRowsPerTask = 8;

// body(begin, end) for parts of `num_rows` rows.
template <class Each, class Body>
void for_rows(int64_t num_rows, Each&& each, const Body& body) {
  each(ceil_div(num_rows, kRowsPerTask), [&](int64_t task, int64_t) {
    body(task * kRowsPerTask, std::min((task + 1) * kRowsPerTask, num_rows));
  });
}

// The heads of one token: q (H, Dh), k (K, Dh), v (K, Dh) side by side.
template <class T>
struct HeadsCall {
  const T* qkv;  // (N, H + 2 K, Dh)
  int64_t ld;
  const T* q_norm;  // (Dh) or null
  const T* k_norm;
  float eps;
  const float* rotations;    // (P, 2 Dh): cos, then sin with its first half negated
  const int64_t* positions;  // (N)
  int64_t num_heads;
  T* q;  // (N, H, Dh), written
};

// out = x cos + (x2, x1) sin
template <class T>
R1FAST_AVX512_INLINE void rotate_head(const T* x, const float* rotation, int64_t dim, T* out) {
  const float *const cos = rotation, *const sin = rotation + dim;
  const int64_t half = dim / 2;
  for (int64_t d = 0; d < half; ++d) {
    const float a = to_float(x[d]), b = to_float(x[d + half]);
    const float c0 = rounded(cos[d], T{}), c1 = rounded(cos[d + half], T{});
    const float s0 = rounded(sin[d], T{}), s1 = rounded(sin[d + half], T{});
    store(out + d, rounded(a * c0, T{}) + b * s0);
    store(out + d + half, rounded(b * c1, T{}) + a * s1);
  }
}

template <class T>
R1FAST_AVX512 void make_heads(const HeadsCall<T>& call, int64_t num_kv_heads, int64_t dim, int64_t begin, int64_t end,
                              T* k_row) {
  for (int64_t i = begin; i < end; ++i) {
    const float* const rotation = call.rotations + call.positions[i] * 2 * dim;
    for (int64_t h = 0; h < call.num_heads + num_kv_heads; ++h) {
      const bool is_key = h >= call.num_heads;
      const T* from = call.qkv + i * call.ld + h * dim;
      T* const to = is_key ? k_row + ((i - begin) * num_kv_heads + h - call.num_heads) * dim
                           : call.q + (i * call.num_heads + h) * dim;
      T normed[1024];
      if (call.q_norm != nullptr) {
        norm_row(from, is_key ? call.k_norm : call.q_norm, call.eps, dim, normed);
        from = normed;
      }
      rotate_head(from, rotation, dim, to);
    }
  }
}

template <class T>
void write_heads(const HeadsCall<T>& call, const PagedCache<T>& cache, const int64_t* slots, int64_t begin,
                 int64_t end) {
  const int64_t dim = cache.head_dim, width = cache.num_kv_heads * dim;
  const AlignedBuffer<T> keys((end - begin) * width);
  make_heads(call, cache.num_kv_heads, dim, begin, end, keys.data());
  const T* const values = call.qkv + begin * call.ld + (call.num_heads + cache.num_kv_heads) * dim;
  write_kv(cache, keys.data(), width, values, call.ld, slots + begin, end - begin, 1);
}

}  // namespace r1fast
#endif
