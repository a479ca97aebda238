// The three products of a linear layer in training, in fp32 on AVX-512 or AVX2: y = x W^T + b, dx = dy W, dW = dy^T x.
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
constexpr int64_t kTurnedTiles = 8;            // of dy, that one task turns

// Columns in panels of as many vectors as a tile has, three: then the last two of two where one would be left over.
template <class Tiles>
struct Panels {
  static constexpr int64_t kMost = Tiles::kMaxVectors;
  int64_t num_vectors;

  explicit Panels(int64_t num_columns) : num_vectors(ceil_div(num_columns, kLanes)) {}
  int64_t count() const { return ceil_div(num_vectors, kMost); }
  int64_t first(int64_t p) const {
    const int64_t left = num_vectors - std::min<int64_t>(2, kMost) * (count() - p);
    return std::max<int64_t>(0, std::min(p * kMost, left));
  }
  int64_t vectors(int64_t p) const { return (p + 1 < count() ? first(p + 1) : num_vectors) - first(p); }
};

}  // namespace r1fast

#define R1FAST_KERNELS "product_kernels.hpp"
#include "each_level.hpp"

namespace r1fast {

// c (M, N) = a (M, K) B + bias, where pack(p, n, to) writes the panel of vectors [p, p + n) of B (K, N).
template <class Tiles, class Pack>
void product(const float* a, int64_t ld_a, int64_t num_rows, int64_t num_k, int64_t num_columns, const float* bias,
             float* c, int64_t ld_c, int64_t num_threads, const Pack& pack) {
  const Panels<Tiles> panels(num_columns);
  const int64_t num_groups = ceil_div(num_rows, kGroupRows);
  const int64_t threads = worthwhile_threads(num_threads, 0.1 * num_rows * num_k * num_columns);
  const AlignedBuffer<float> packed(panels.num_vectors * kLanes * num_k);
  const auto panel = [&](int64_t p) { return packed.data() + panels.first(p) * kLanes * num_k; };
  parallel_for(panels.count(), threads, [&](int64_t p, int64_t) { pack(panels.first(p), panels.vectors(p), panel(p)); });
  parallel_for(num_groups * panels.count(), threads, [&](int64_t task, int64_t) {
    const int64_t p = task % panels.count(), first = task / panels.count() * kGroupRows;
    const int64_t column = panels.first(p) * kLanes;
    Tiles::Products::times_panel(a, ld_a, first, std::min(first + kGroupRows, num_rows), panel(p), panels.vectors(p),
                                 num_k, bias == nullptr ? nullptr : bias + column, c + column, ld_c,
                                 num_columns - column);
  });
}

// y (T, N) = x (T, D) W^T + bias, W (N, D).
template <class Tiles>
void linear_forward(const float* x, int64_t ld_x, int64_t num_tokens, const float* weight, int64_t ld_weight,
                           int64_t num_out, int64_t num_in, const float* bias, float* y, int64_t ld_y,
                           int64_t num_threads) {
  product<Tiles>(x, ld_x, num_tokens, num_in, num_out, bias, y, ld_y, num_threads, [&](int64_t p, int64_t n, float* to) {
    Tiles::pack_lanes(weight, ld_weight, p * kLanes, num_out, num_in, num_in, n * kLanes, to);
  });
}

// dx (T, D) = dy (T, N) W.
template <class Tiles>
void linear_dx(const float* dy, int64_t ld_dy, int64_t num_tokens, const float* weight, int64_t ld_weight,
                      int64_t num_out, int64_t num_in, float* dx, int64_t ld_dx, int64_t num_threads) {
  product<Tiles>(dy, ld_dy, num_tokens, num_out, num_in, nullptr, dx, ld_dx, num_threads, [&](int64_t p, int64_t n, float* to) {
    Tiles::template pack_columns<false>(weight, ld_weight, 0, num_out, p * kLanes, num_in, n, to);
  });
}

// dw (N, D) = dy^T x, dy (T, N), x (T, D). A task owns some rows and columns of dw and goes through all tokens.
template <class Tiles>
void linear_dweight(const float* dy, int64_t ld_dy, int64_t num_tokens, const float* x, int64_t ld_x,
                           int64_t num_out, int64_t num_in, float* dw, int64_t ld_dw, int64_t num_threads) {
  constexpr int64_t kTileRows = Tiles::kRowsOfTile, kTurnedColumns = kTurnedTiles * kTileRows;
  const Panels<Tiles> panels(num_in);
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
      Tiles::template pack_columns<false>(x, ld_x, t, t + depth_of(b), panels.first(p) * kLanes, num_in,
                                          panels.vectors(p), panel(b, p));
    });
    parallel_for(row_parts * column_parts, threads, [&](int64_t task, int64_t thread) {
      const int64_t n = task / column_parts * kTurnedColumns, part = task % column_parts;
      const int64_t count = std::min(kTurnedColumns, num_out - n);
      const int64_t first = panels.count() * part / column_parts, last = panels.count() * (part + 1) / column_parts;
      float* const mine = turned.data() + thread * kTurnedColumns * kDepth;
      for (int64_t b = 0; b < num_blocks; ++b) {
        const int64_t t = begin + b * kDepth, depth = depth_of(b);
        Tiles::Products::pack_turned_rows(dy + t * ld_dy + n, ld_dy, depth, count, mine);
        Prefetcher next_dy(dy + (t + depth) * ld_dy + n, std::clamp<int64_t>(num_tokens - t - depth, 0, kDepth),
                           count * sizeof(float), ld_dy * sizeof(float),
                           (last - first) * ceil_div(count, kTileRows));
        for (int64_t p = first; p < last; ++p) {
          const int64_t column = panels.first(p) * kLanes;
          for (int64_t i = 0; i < count; i += kTileRows) {
            next_dy.step();
            Tiles::template into_of_columns<false>(t > 0 ? Into::kAdd : Into::kSet, panels.vectors(p), depth,
                                                   mine + i * depth, kTileRows, panel(b, p),
                                                   dw + (n + i) * ld_dw + column, ld_dw,
                                                   std::min(kTileRows, count - i), num_in - column);
          }
        }
      }
    });
  }
}

}  // namespace r1fast
#endif
