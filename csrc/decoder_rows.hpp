// What stands between the matrix products of a decoder layer, a row at a time: RMS norm; and the norm of q and k, their
// rotation, and the write of k and v into the paged cache. In bf16 it rounds where PyTorch rounds.
#pragma once

#include "linear.hpp"
#include "paged_cache.hpp"

#if defined(__x86_64__)
namespace r1fast {

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
