// The three products of a linear layer in training, in fp32 on AVX-512: y = x W^T + b, dx = dy W, dW = dy^T x.
//
// An element is a sum of blocks of kDepth products, all in one fixed order: neither the number of threads nor the rows
// beside it change a bit of a row, and the error is that of MKL's sums.
#pragma once

#include "gemm.hpp"

#if defined(__x86_64__)
namespace r1fast {

constexpr int64_t kDepth = 192;       // a panel of B, so deep, stays in the first-level cache
constexpr int64_t kGroupRows = 128;   // of A, that meet one panel after another
constexpr int64_t kPackedTokens = 6 * kDepth;  // of x, packed at a time
constexpr int64_t kTurnedColumns = 64;         // of dy, that one task turns

// Columns in panels of three vectors, the last two of two where one would be left over.
struct Panels {
  int64_t num_vectors;

  explicit Panels(int64_t num_columns) : num_vectors(ceil_div(num_columns, kLanes)) {}
  int64_t count() const { return ceil_div(num_vectors, kTileVectors); }
  int64_t first(int64_t p) const {
    return std::max<int64_t>(0, std::min(p * kTileVectors, num_vectors - 2 * (count() - p)));
  }
  int64_t vectors(int64_t p) const { return (p + 1 < count() ? first(p + 1) : num_vectors) - first(p); }
};

// Rows [first, last) of c (M, N) = a (M, K) B + bias, for the columns of one panel [K][16 n] of B.
R1FAST_AVX512 inline void times_panel(const float* a, int64_t ld_a, int64_t first, int64_t last, const float* panel,
                                      int64_t num_vectors, int64_t num_k, const float* bias, float* c, int64_t ld_c,
                                      int64_t num_columns) {
  alignas(64) float tail[kTileRows * kDepth];
  for (int64_t k = 0; k < num_k; k += kDepth) {
    const int64_t depth = std::min(kDepth, num_k - k);
    for (int64_t row = first; row < last; row += kTileRows) {
      const int64_t count = std::min<int64_t>(kTileRows, last - row);
      const float* from = a + row * ld_a + k;
      int64_t ld = ld_a;
      if (count < kTileRows) {  // a tile reads eight rows
        std::fill_n(tail, kTileRows * depth, 0.0f);
        for (int64_t i = 0; i < count; ++i) std::copy_n(from + i * ld_a, depth, tail + i * depth);
        from = tail;
        ld = depth;
      }
      tile_into<false, false>(k > 0 ? Into::kAdd : Into::kSet, num_vectors, depth, from, ld,
                              panel + k * kLanes * num_vectors, c + row * ld_c, ld_c, count, num_columns);
    }
  }
  for (int64_t j = 0; bias != nullptr && j < num_vectors; ++j) {
    const __mmask16 mask = column_mask(kLanes * j, num_columns);
    const __m512 add = _mm512_maskz_loadu_ps(mask, bias + kLanes * j);
    for (int64_t row = first; row < last; ++row) {
      float* const to = c + row * ld_c + kLanes * j;
      _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), add));
    }
  }
}

// c (M, N) = a (M, K) B + bias, where pack(p, n, to) writes the panel of vectors [p, p + n) of B (K, N).
template <class Pack>
void product(const float* a, int64_t ld_a, int64_t num_rows, int64_t num_k, int64_t num_columns, const float* bias,
             float* c, int64_t ld_c, int64_t num_threads, const Pack& pack) {
  const Panels panels(num_columns);
  const int64_t num_groups = ceil_div(num_rows, kGroupRows);
  const int64_t threads = worthwhile_threads(num_threads, 0.1 * num_rows * num_k * num_columns);
  const AlignedBuffer<float> packed(panels.num_vectors * kLanes * num_k);
  const auto panel = [&](int64_t p) { return packed.data() + panels.first(p) * kLanes * num_k; };
  parallel_for(panels.count(), threads, [&](int64_t p, int64_t) { pack(panels.first(p), panels.vectors(p), panel(p)); });
  parallel_for(num_groups * panels.count(), threads, [&](int64_t task, int64_t) {
    const int64_t p = task % panels.count(), first = task / panels.count() * kGroupRows;
    const int64_t column = panels.first(p) * kLanes;
    times_panel(a, ld_a, first, std::min(first + kGroupRows, num_rows), panel(p), panels.vectors(p), num_k,
                 bias == nullptr ? nullptr : bias + column, c + column, ld_c, num_columns - column);
  });
}

// y (T, N) = x (T, D) W^T + bias, W (N, D).
inline void linear_forward(const float* x, int64_t ld_x, int64_t num_tokens, const float* weight, int64_t ld_weight,
                           int64_t num_out, int64_t num_in, const float* bias, float* y, int64_t ld_y,
                           int64_t num_threads) {
  product(x, ld_x, num_tokens, num_in, num_out, bias, y, ld_y, num_threads, [&](int64_t p, int64_t n, float* to) {
    pack_lanes(weight, ld_weight, p * kLanes, num_out, num_in, num_in, n * kLanes, to);
  });
}

// dx (T, D) = dy (T, N) W.
inline void linear_dx(const float* dy, int64_t ld_dy, int64_t num_tokens, const float* weight, int64_t ld_weight,
                      int64_t num_out, int64_t num_in, float* dx, int64_t ld_dx, int64_t num_threads) {
  product(dy, ld_dy, num_tokens, num_out, num_in, nullptr, dx, ld_dx, num_threads, [&](int64_t p, int64_t n, float* to) {
    pack_columns<false>(weight, ld_weight, 0, num_out, p * kLanes, num_in, n, to);
  });
}

// `depth` rows of `count` columns of dy as tiles [depth][8], what is missing of the last tile 0.
R1FAST_AVX512 inline void pack_turned_rows(const float* dy, int64_t ld_dy, int64_t depth, int64_t count, float* tiles) {
  for (int64_t t = 0; t < depth; ++t) {
    for (int64_t n = 0; n < count; n += kTileRows) {
      const __mmask8 mask = static_cast<__mmask8>(column_mask(n, count));
      _mm256_storeu_ps(tiles + n * depth + t * kTileRows, _mm256_maskz_loadu_ps(mask, dy + t * ld_dy + n));
    }
  }
}

// dw (N, D) = dy^T x, dy (T, N), x (T, D). A task owns some rows and columns of dw and goes through all tokens.
inline void linear_dweight(const float* dy, int64_t ld_dy, int64_t num_tokens, const float* x, int64_t ld_x,
                           int64_t num_out, int64_t num_in, float* dw, int64_t ld_dw, int64_t num_threads) {
  const Panels panels(num_in);
  const int64_t width = panels.num_vectors * kLanes, row_parts = ceil_div(num_out, kTurnedColumns);
  const int64_t threads = worthwhile_threads(num_threads, 0.1 * num_tokens * num_out * num_in);
  const int64_t column_parts = std::min(panels.count(), ceil_div(threads == 1 ? 1 : 2 * threads, row_parts));
  const AlignedBuffer<float> packed(std::min(kPackedTokens, num_tokens) * width);
  const AlignedBuffer<float> turned(threads * kTurnedColumns * kDepth);
  for (int64_t begin = 0; begin < num_tokens; begin += kPackedTokens) {
    const int64_t num_blocks = ceil_div(std::min(kPackedTokens, num_tokens - begin), kDepth);
    const auto depth_of = [&](int64_t b) { return std::min(kDepth, num_tokens - begin - b * kDepth); };
    const auto panel = [&](int64_t b, int64_t p) {
      return packed.data() + b * kDepth * width + panels.first(p) * kLanes * depth_of(b);
    };
    parallel_for(num_blocks * panels.count(), threads, [&](int64_t task, int64_t) {
      const int64_t b = task / panels.count(), p = task % panels.count(), t = begin + b * kDepth;
      pack_columns<false>(x, ld_x, t, t + depth_of(b), panels.first(p) * kLanes, num_in, panels.vectors(p), panel(b, p));
    });
    parallel_for(row_parts * column_parts, threads, [&](int64_t task, int64_t thread) {
      const int64_t n = task / column_parts * kTurnedColumns, part = task % column_parts;
      const int64_t count = std::min(kTurnedColumns, num_out - n);
      const int64_t first = panels.count() * part / column_parts, last = panels.count() * (part + 1) / column_parts;
      float* const mine = turned.data() + thread * kTurnedColumns * kDepth;
      for (int64_t b = 0; b < num_blocks; ++b) {
        const int64_t t = begin + b * kDepth, depth = depth_of(b);
        pack_turned_rows(dy + t * ld_dy + n, ld_dy, depth, count, mine);
        Prefetcher next_dy(dy + (t + depth) * ld_dy + n, std::clamp<int64_t>(num_tokens - t - depth, 0, kDepth),
                           count * sizeof(float), ld_dy * sizeof(float),
                           (last - first) * ceil_div(count, kTileRows));
        for (int64_t p = first; p < last; ++p) {
          const int64_t column = panels.first(p) * kLanes;
          for (int64_t i = 0; i < count; i += kTileRows) {
            next_dy.step();
            tile_into<false, true>(t > 0 ? Into::kAdd : Into::kSet, panels.vectors(p), depth, mine + i * depth,
                                   kTileRows, panel(b, p), dw + (n + i) * ld_dw + column, ld_dw,
                                   std::min<int64_t>(kTileRows, count - i), num_in - column);
          }
        }
      }
    });
  }
}

}  // namespace r1fast
#endif
