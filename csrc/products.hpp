// The three products of a linear layer in training, in fp32 on AVX-512 or AVX2: y = x W^T + b, dx = dy W, dW = dy^T x.
//
// An element is a sum of blocks of kDepth products, all in one fixed order: neither the number of threads nor the rows
// beside it change a bit of a row, and the error is that of MKL's sums.
#pragma once

#include "gemm.hpp"

#if defined(__x86_64__)
namespace r1fast {

constexpr int64_t kDepth = 192;              // a panel of B, so deep, stays in the first-level cache
constexpr int64_t kChunkDepth = 4 * kDepth;  // of k: a group's rows, so long, stay in the second-level cache
constexpr int64_t kGroupRows = 192;          // of A, that meet one panel after another
constexpr int64_t kShallow = 64, kShallowRows = 64;  // the same of so few k, which stay in the first-level cache
constexpr int64_t kSetColumns = 768;         // of C, that stay there while k is gone through
constexpr int64_t kWordBytes = sizeof(Word);

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

// A as it lies, rows `ld` apart.
struct PlainRows {
  static constexpr bool kIsTurned = false;
  const float* data;
  int64_t ld;

  const float* tile(int64_t row, int64_t k) const { return data + row * ld + k; }
};

// A that lies turned, (K, M): made tiles [depth][kRowsOfTile].
template <class Tiles>
struct TurnedRows {
  static constexpr bool kIsTurned = true;
  const float* data;
  int64_t ld;

  void pack(int64_t row, int64_t count, int64_t k, int64_t depth, float* to) const {
    Tiles::Products::pack_turned_rows(data + k * ld + row, ld, depth, count, to);
  }
};

// B as it lies, (K, N).
template <class Tiles>
struct PlainColumns {
  const float* data;
  int64_t ld, num_columns;

  // Vectors [first, first + n) of its columns as a panel [depth][16 n].
  void pack(int64_t first, int64_t n, int64_t k, int64_t depth, float* to) const {
    Tiles::template pack_columns<false>(data, ld, k, k + depth, first * kLanes, num_columns, n, to);
  }
  // Asks for what `pack` will read.
  Prefetcher prefetcher(int64_t first, int64_t n, int64_t k, int64_t depth, int64_t num_steps) const {
    const int64_t count = std::min(n * kLanes, num_columns - first * kLanes);
    return {data + k * ld + first * kLanes, depth, count * kWordBytes, ld * kWordBytes, num_steps};
  }
};

// B that lies turned, (N, K).
template <class Tiles>
struct TurnedColumns {
  const float* data;
  int64_t ld, num_columns;

  void pack(int64_t first, int64_t n, int64_t k, int64_t depth, float* to) const {
    Tiles::pack_lanes(data + k, ld, first * kLanes, num_columns, depth, depth, n * kLanes, to);
  }
  Prefetcher prefetcher(int64_t first, int64_t n, int64_t k, int64_t depth, int64_t num_steps) const {
    const int64_t count = std::min(n * kLanes, num_columns - first * kLanes);
    return {data + first * kLanes * ld + k, count, depth * kWordBytes, ld * kWordBytes, num_steps};
  }
};

// c (M, N) = A (M, K) B (K, N) + bias, of matrices as above. A task has a group of rows and a set of panels.
//
// Several groups share the panels: those of a chunk of k are packed first. A single group packs each for itself while it is
// at it: what takes the time of few rows is to read B, which goes on behind the products.
template <class Tiles, class A, class B>
void product(const A& a, const B& b, int64_t num_rows, int64_t num_k, int64_t num_columns, const float* bias, float* c,
             int64_t ld_c, int64_t num_threads) {
  constexpr int64_t kTileRows = Tiles::kRowsOfTile, kPanelFloats = Panels<Tiles>::kMost * kLanes * kDepth;
  constexpr int64_t kTurnedFloats = A::kIsTurned ? kGroupRows * kChunkDepth : 0;
  const Panels<Tiles> panels(num_columns);
  const int64_t group_rows = (num_k <= kShallow ? kShallowRows : kGroupRows) / kTileRows * kTileRows;
  const int64_t num_groups = ceil_div(num_rows, group_rows);
  const bool is_shared = num_groups > 1;
  const int64_t threads = worthwhile_threads(num_threads, 0.1 * num_rows * num_k * num_columns);
  const int64_t wanted = std::max(is_shared ? 1 : ceil_div(num_columns, kSetColumns),
                                  threads == 1 ? 1 : ceil_div(2 * threads, num_groups));
  const int64_t num_sets = std::min(panels.count(), wanted);
  const int64_t chunk = is_shared ? std::min(num_k, kChunkDepth) : num_k;
  const AlignedBuffer<float> packed(is_shared ? panels.num_vectors * kLanes * chunk : 0);
  const AlignedBuffer<float> scratch(threads * (kTurnedFloats + kPanelFloats));

  // The group's rows times a block of a panel; `next` is asked for meanwhile.
  const auto multiply = [&](int64_t row, int64_t count, const float* turned, int64_t p, const float* panel, int64_t k,
                            int64_t depth, Prefetcher next) {
    const int64_t column = panels.first(p) * kLanes, n = panels.vectors(p);
    const Into into = k > 0 ? Into::kAdd : Into::kSet;
    for (int64_t i = 0; i < count; i += kTileRows) {
      next.step();
      float* const to = c + (row + i) * ld_c + column;
      const int64_t of_tile = std::min(kTileRows, count - i);
      if constexpr (A::kIsTurned) {
        Tiles::template into_of_columns<false>(into, n, depth, turned + i * depth, kTileRows, panel, to, ld_c, of_tile,
                                               num_columns - column);
      } else {
        Tiles::Products::times_panel(into, a.tile(row + i, k), a.ld, of_tile, depth, panel, n, to, ld_c,
                                     num_columns - column);
      }
    }
  };

  for (int64_t begin = 0; begin < num_k; begin += chunk) {
    const int64_t end = std::min(begin + chunk, num_k), num_blocks = ceil_div(end - begin, kDepth);
    const auto depth_of = [&](int64_t k) { return std::min(kDepth, end - k); };
    const auto shared_panel = [&](int64_t p, int64_t k) {
      return packed.data() + kLanes * (panels.first(p) * (end - begin) + (k - begin) * panels.vectors(p));
    };
    if (is_shared) {
      parallel_for(panels.count() * num_blocks, threads, [&](int64_t task, int64_t) {
        const int64_t p = task / num_blocks, k = begin + task % num_blocks * kDepth;
        b.pack(panels.first(p), panels.vectors(p), k, depth_of(k), shared_panel(p, k));
      });
    }
    parallel_for(num_groups * num_sets, threads, [&](int64_t task, int64_t thread) {
      const int64_t row = task / num_sets * group_rows, count = std::min(group_rows, num_rows - row);
      const int64_t set = task % num_sets, num_steps = ceil_div(count, kTileRows);
      const int64_t first = panels.count() * set / num_sets, last = panels.count() * (set + 1) / num_sets;
      float* const turned = scratch.data() + thread * (kTurnedFloats + kPanelFloats);
      float* const own = turned + kTurnedFloats;
      const auto turn = [&](int64_t k, float* to) {
        if constexpr (A::kIsTurned) a.pack(row, count, k, depth_of(k), to);
      };
      if (is_shared) {
        for (int64_t k = begin; k < end; k += kDepth) turn(k, turned + (k - begin) * group_rows);
        for (int64_t p = first; p < last; ++p) {
          for (int64_t k = begin; k < end; k += kDepth) {
            const float* const next = shared_panel(p, k) + depth_of(k) * panels.vectors(p) * kLanes;
            const int64_t left = shared_panel(last - 1, end) - next;
            multiply(row, count, turned + (k - begin) * group_rows, p, shared_panel(p, k), k, depth_of(k),
                     {next, 1, std::min(left, kPanelFloats) * kWordBytes, 0, num_steps});
          }
        }
      } else {
        for (int64_t k = 0; k < num_k; k += kDepth) {
          turn(k, turned);
          for (int64_t p = first; p < last; ++p) {
            b.pack(panels.first(p), panels.vectors(p), k, depth_of(k), own);
            const bool is_last = p + 1 == last;
            const int64_t next = is_last ? first : p + 1, next_k = is_last ? std::min(k + kDepth, num_k) : k;
            multiply(row, count, turned, p, own, k, depth_of(k),
                     b.prefetcher(panels.first(next), panels.vectors(next), next_k, depth_of(next_k), num_steps));
          }
        }
      }
      if (bias != nullptr && end == num_k) {
        const int64_t column = panels.first(first) * kLanes;
        const int64_t beyond = last == panels.count() ? num_columns : panels.first(last) * kLanes;
        Tiles::Products::add_bias(bias + column, count, beyond - column, c + row * ld_c + column, ld_c);
      }
    });
  }
}

// y (T, N) = x (T, D) W^T + bias, W (N, D).
template <class Tiles>
void linear_forward(const float* x, int64_t ld_x, int64_t num_tokens, const float* weight, int64_t ld_weight,
                    int64_t num_out, int64_t num_in, const float* bias, float* y, int64_t ld_y, int64_t num_threads) {
  product<Tiles>(PlainRows{x, ld_x}, TurnedColumns<Tiles>{weight, ld_weight, num_out}, num_tokens, num_in, num_out,
                 bias, y, ld_y, num_threads);
}

// dx (T, D) = dy (T, N) W.
template <class Tiles>
void linear_dx(const float* dy, int64_t ld_dy, int64_t num_tokens, const float* weight, int64_t ld_weight,
               int64_t num_out, int64_t num_in, float* dx, int64_t ld_dx, int64_t num_threads) {
  product<Tiles>(PlainRows{dy, ld_dy}, PlainColumns<Tiles>{weight, ld_weight, num_in}, num_tokens, num_out, num_in,
                 nullptr, dx, ld_dx, num_threads);
}

// dw (N, D) = dy^T x, dy (T, N), x (T, D).
template <class Tiles>
void linear_dweight(const float* dy, int64_t ld_dy, int64_t num_tokens, const float* x, int64_t ld_x, int64_t num_out,
                    int64_t num_in, float* dw, int64_t ld_dw, int64_t num_threads) {
  product<Tiles>(TurnedRows<Tiles>{dy, ld_dy}, PlainColumns<Tiles>{x, ld_x, num_in}, num_out, num_tokens, num_in, nullptr,
                 dw, ld_dw, num_threads);
}

}  // namespace r1fast
#endif
