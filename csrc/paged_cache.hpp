// The tiled storage of kernels/paged_cache.py: tiles of 16 slots, keys (tiles, K, Dh, 16), or in bf16
// (tiles, K, Dh / 2, 16, 2), and values (tiles, K, 16, Dh). A tile may instead hold 16 rows, keys and values (K, Dh): slot
// -1 - i is row i of all that there would be.
#pragma once

#include "epilogue.hpp"
#include "parallel.hpp"

namespace r1fast {

constexpr int64_t kTile = 16;  // slots

template <class T>
struct PagedCache {
  T* keys;
  T* values;
  int64_t num_kv_heads;
  int64_t head_dim;

  int64_t tile_size() const { return head_dim * kTile; }
  T* key_tile(int64_t tile, int64_t head) const { return keys + (tile * num_kv_heads + head) * tile_size(); }
  T* value_tile(int64_t tile, int64_t head) const { return values + (tile * num_kv_heads + head) * tile_size(); }
  int64_t row(int64_t slot, int64_t head) const { return (~slot * num_kv_heads + head) * head_dim; }
};

// k and v (N, K, Dh), rows of heads `ld_` elements apart, to their slots.
template <class T>
void write_kv(const PagedCache<T>& cache, const T* k, int64_t ld_k, const T* v, int64_t ld_v, const int64_t* slots,
              int64_t num_tokens, int64_t num_threads) {
  using Pair = std::conditional_t<sizeof(T) == 2, uint32_t, T>;  // what lies side by side in a lane
  constexpr int64_t kPerPair = sizeof(Pair) / sizeof(T);
  const int64_t dim = cache.head_dim;
  const auto token = [&](int64_t i, int64_t) {
    if (slots[i] < 0) {
      const int64_t row = cache.row(slots[i], 0);
      std::memcpy(cache.keys + row, k + i * ld_k, sizeof(T) * cache.num_kv_heads * dim);
      std::memcpy(cache.values + row, v + i * ld_v, sizeof(T) * cache.num_kv_heads * dim);
      return;
    }
    const int64_t tile = slots[i] / kTile, lane = slots[i] % kTile;
    for (int64_t head = 0; head < cache.num_kv_heads; ++head) {
      T* const to = cache.key_tile(tile, head) + lane * kPerPair;
      const T* const from = k + i * ld_k + head * dim;
      for (int64_t d = 0; d < dim; d += kPerPair) std::memcpy(to + d * kTile, from + d, sizeof(Pair));
      std::memcpy(cache.value_tile(tile, head) + lane * dim, v + i * ld_v + head * dim, sizeof(T) * dim);
    }
  };
  // a key is spread over as many cache lines as it has words
  const double steps = 64.0 * num_tokens * cache.num_kv_heads * dim;
  parallel_for(num_tokens, worthwhile_threads(num_threads, steps), token);
}

// The rows of these slots (n) as one head's tile. Nobody may look at its other lanes.
template <class T>
void gather_rows(const PagedCache<T>& cache, int64_t head, const int32_t* slots, int64_t n, T* keys, T* values) {
  const int64_t dim = cache.head_dim, num_words = dim * static_cast<int64_t>(sizeof(T)) / 4;
  for (int64_t lane = 0; lane < n; ++lane) {
    std::memcpy(values + lane * dim, cache.values + cache.row(slots[lane], head), sizeof(T) * dim);
  }
  for (int64_t lane = 0; lane < n; lane += 4) {
    const char* from[4];
    for (int64_t i = 0; i < 4; ++i) {
      from[i] = reinterpret_cast<const char*>(cache.keys + cache.row(slots[lane + i < n ? lane + i : lane], head));
    }
    char* const to = reinterpret_cast<char*>(keys) + 4 * lane;
    int64_t w = 0;
#if defined(__SSE2__)  // as every x86-64 has it
    for (; w + 4 <= num_words; w += 4) {
      __m128 x[4];
      for (int i = 0; i < 4; ++i) x[i] = _mm_loadu_ps(reinterpret_cast<const float*>(from[i] + 4 * w));
      _MM_TRANSPOSE4_PS(x[0], x[1], x[2], x[3]);
      for (int i = 0; i < 4; ++i) _mm_storeu_ps(reinterpret_cast<float*>(to + (w + i) * 4 * kTile), x[i]);
    }
#endif
    for (; w < num_words; ++w) {
      for (int64_t i = 0; i < 4; ++i) std::memcpy(to + w * 4 * kTile + 4 * i, from[i] + 4 * w, 4);
    }
  }
}

}  // namespace r1fast
