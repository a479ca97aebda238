// Of attention_tiles.hpp, for each level: the softmax loops, by the steps of decode's, which rounds what training computes again.

R1FAST_NATIVE inline void softmax_tile(const SoftmaxRows& rows) {
  const Lanes scale = all(rows.scale), minus_infinity = all(-kInfinity);
  for (int64_t i = 0; i < rows.num_rows; ++i) {
    float* const s = rows.s + i * rows.ld;
    Lanes most = minus_infinity, sum = zeros();
    for (int64_t j = 0; j < rows.width; j += kVector) {
      const Lanes x = times(load_lanes(s + j), scale);
      const Lanes seen = where(column_truth(j, rows.counts[i]), x, minus_infinity);
      store_lanes(s + j, seen);
      most = larger(most, seen);
    }
    const float m = std::max(rows.m[i], across_lanes(most, larger));
    for (int64_t j = 0; j < rows.width; j += kVector) {
      const Lanes p = exp_lanes(minus(load_lanes(s + j), all(m)));
      const Lanes seen = where(column_truth(j, rows.counts[i]), p);
      store_lanes(s + j, seen);
      sum = plus(sum, seen);
    }
    rows.shrink[i] = first(exp_lanes(all(rows.m[i] - m)));
    rows.m[i] = m;
    rows.l[i] = std::fma(rows.l[i], rows.shrink[i], across_lanes(sum, plus));
  }
}

R1FAST_NATIVE inline void gradient_tile(const GradientRows& rows) {
  const Lanes scale = all(rows.scale);
  for (int64_t i = 0; i < rows.num_rows; ++i) {
    float* const s = rows.s + i * rows.ld;
    float* const dp = rows.dp + i * rows.ld;
    const Lanes m = all(rows.m[i]), share = all(rows.share[i]), delta = all(rows.delta[i]);
    for (int64_t j = 0; j < rows.width; j += kVector) {
      const Truth seen = column_truth(j, rows.counts[i]);
      const Lanes x = minus(times(load_lanes(s + j), scale), m);
      const Lanes p = where(seen, times(share, exp_lanes(x)));
      const Lanes d = times(minus(load_lanes(dp + j), delta), scale);
      store_lanes(s + j, p);
      store_lanes(dp + j, where(seen, times(p, d)));
    }
  }
}
