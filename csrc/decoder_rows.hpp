// What stands between the matrix products of a decoder layer, a row at a time: RMS norm; and the norm of q and k, their
// rotation, and the write of k and v into the paged cache. In bf16 it rounds where PyTorch rounds.
#pragma once

#include "linear.hpp"
#include "paged_cache.hpp"

#if defined(__x86_64__)
namespace r1fast {

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

}  // namespace r1fast

#define R1FAST_KERNELS "row_kernels.hpp"
#include "each_level.hpp"

namespace r1fast {

template <class Tiles, class T>
void write_heads(const HeadsCall<T>& call, const PagedCache<T>& cache, const int64_t* slots, int64_t begin,
                 int64_t end) {
  const int64_t dim = cache.head_dim, width = cache.num_kv_heads * dim;
  const AlignedBuffer<T> keys((end - begin) * width);
  Tiles::Rows::make_heads(call, cache.num_kv_heads, dim, begin, end, keys.data());
  const T* const values = call.qkv + begin * call.ld + (call.num_heads + cache.num_kv_heads) * dim;
  write_kv(cache, keys.data(), width, values, call.ld, slots + begin, end - begin, 1);
}

}  // namespace r1fast
#endif
