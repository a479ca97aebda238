// Of products.hpp, for each level.
struct ProductKernels {
  // c = or += at most kTileRows rows of A times a panel [depth][16 num_vectors].
  R1FAST_NATIVE static void times_panel(Into into, const float* a, int64_t ld_a, int64_t num_rows, int64_t depth,
                                        const float* panel, int64_t num_vectors, float* c, int64_t ld_c,
                                        int64_t num_columns) {
    alignas(64) float tail[kTileRows * kDepth];
    if (num_rows < kTileRows && !kFewerRows) {  // a tile reads all its rows
      std::fill_n(tail, kTileRows * depth, 0.0f);
      for (int64_t i = 0; i < num_rows; ++i) std::copy_n(a + i * ld_a, depth, tail + i * depth);
      a = tail;
      ld_a = depth;
    }
    tile_into<false, false>(into, num_vectors, depth, a, ld_a, panel, c, ld_c, num_rows, num_columns);
  }

  // Each of num_rows rows of c + bias.
  R1FAST_NATIVE static void add_bias(const float* bias, int64_t num_rows, int64_t num_columns, float* c, int64_t ld_c) {
    for (int64_t j = 0; j < num_columns; j += kLanes) {
      const Mask mask = column_mask(j, num_columns);
      const Lanes add = load_lanes(bias + j, mask);
      for (int64_t i = 0; i < num_rows; ++i) {
        float* const to = c + i * ld_c + j;
        store_lanes(to, mask, plus(load_lanes(to, mask), add));
      }
    }
  }

  // `depth` rows of `count` columns of A turned as tiles [depth][kTileRows], what is missing of the last tile 0.
  R1FAST_NATIVE static void pack_turned_rows(const float* from, int64_t ld, int64_t depth, int64_t count, float* tiles) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t i = 0; i < count; i += kTileRows) {
        float* const to = tiles + i * depth + k * kTileRows;
        const float* const row = from + k * ld + i;
        if (i + kTileRows <= count) {
          std::memcpy(to, row, kTileRows * sizeof(float));
        } else {
          std::fill_n(to, kTileRows, 0.0f);
          std::copy_n(row, count - i, to);
        }
      }
    }
  }
};
