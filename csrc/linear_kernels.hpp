// Of linear.hpp, for each level.
struct LinearKernels {
  // y (num_rows, num_columns) of sums, rows `ld_sums` apart on cache lines: `up` and `up_bias` are of kSilu. A bias may
  // be null.
  template <After kAfter, class T, class Y>
  R1FAST_NATIVE static void finish(const float* sums, const float* up, int64_t ld_sums, int64_t num_rows,
                                   int64_t num_columns, const T* bias, const T* up_bias, Y* y, int64_t ld_y) {
    for (int64_t j = 0; j < num_columns; j += kLanes) {
      const Mask mask = column_mask(j, num_columns);
      const Lanes add = bias == nullptr ? zeros() : load_lanes(bias + j, mask);
      const Lanes up_add = up_bias == nullptr ? zeros() : load_lanes(up_bias + j, mask);
      for (int64_t i = 0; i < num_rows; ++i) {
        Y* const to = y + i * ld_y + j;
        Lanes x = plus(load_lanes(sums + i * ld_sums + j), add);
        if constexpr (kAfter == After::kAdd) {
          x = plus(load_lanes(to, mask), round_lanes(x, Y{}));
        } else if constexpr (kAfter == After::kSilu) {
          const Lanes gate = round_lanes(x, Y{});
          const Lanes other = round_lanes(plus(load_lanes(up + i * ld_sums + j), up_add), Y{});
          const Lanes e = exp_lanes(minus(zeros(), gate));
          x = times(round_lanes(over(gate, plus(all(1), e)), Y{}), other);
        }
        store_lanes(to, mask, x);
      }
    }
  }
};
