// Of products.hpp, for each level.
struct ProductKernels {
  // Rows [first, last) of c (M, N) = a (M, K) B + bias, for the columns of one panel [K][16 n] of B.
  R1FAST_NATIVE static void times_panel(const float* a, int64_t ld_a, int64_t first, int64_t last, const float* panel,
                                        int64_t num_vectors, int64_t num_k, const float* bias, float* c, int64_t ld_c,
                                        int64_t num_columns) {
    alignas(64) float tail[kTileRows * kDepth];
    for (int64_t k = 0; k < num_k; k += kDepth) {
      const int64_t depth = std::min(kDepth, num_k - k);
      for (int64_t row = first; row < last; row += kTileRows) {
        const int64_t count = std::min<int64_t>(kTileRows, last - row);
        const float* from = a + row * ld_a + k;
        int64_t ld = ld_a;
        if (count < kTileRows && !kFewerRows) {  // a tile reads all its rows
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
      const Mask mask = column_mask(kLanes * j, num_columns);
      const Lanes add = load_lanes(bias + kLanes * j, mask);
      for (int64_t row = first; row < last; ++row) {
        float* const to = c + row * ld_c + kLanes * j;
        store_lanes(to, mask, plus(load_lanes(to, mask), add));
      }
    }
  }

  // `depth` rows of `count` columns of dy as tiles [depth][kTileRows], what is missing of the last tile 0.
  R1FAST_NATIVE static void pack_turned_rows(const float* dy, int64_t ld_dy, int64_t depth, int64_t count, float* tiles) {
    for (int64_t t = 0; t < depth; ++t) {
      for (int64_t n = 0; n < count; n += kTileRows) {
        float* const to = tiles + n * depth + t * kTileRows;
        const float* const from = dy + t * ld_dy + n;
        if (n + kTileRows <= count) {
          std::memcpy(to, from, kTileRows * sizeof(float));
        } else {
          std::fill_n(to, kTileRows, 0.0f);
          std::copy_n(from, count - n, to);
        }
      }
    }
  }
};
