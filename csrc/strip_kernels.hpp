// Of decode_strip.hpp, for each level.

// Of 4 rows: so many tiles of scores, or vectors of values, have room in registers at once.
constexpr int kStripVectors = kFewerRows ? 1 : 4;
constexpr int kBf16Rows = kFewerRows ? 2 : 4;  // of accumulators, whose vectors of bf16 values are two

// Scores of M rows by N tiles from `first` on, from word `k` of q and of the keys. bf16 is multiplied as fp32: dot products
// of bf16 pairs have a quarter of the throughput on the first CPUs that have them.
template <int M, int N>
R1FAST_NATIVE_INLINE void score_word(const Strip<float>& strip, const float* q, int64_t ld, int first, int64_t k,
                                     Lanes (&s)[M][N]) {
  Lanes key[N];
  for (int j = 0; j < N; ++j) key[j] = load_lanes(strip.keys[first + j] + k * kTile);
  for (int i = 0; i < M; ++i) {
    const Lanes value = all(q[i * ld + k]);
    for (int j = 0; j < N; ++j) s[i][j] = times_plus(value, key[j], s[i][j]);
  }
}

template <int M, int N>
R1FAST_NATIVE_INLINE void score_word(const Strip<Bf16>& strip, const float* q, int64_t ld, int first, int64_t k,
                                     Lanes (&s)[M][N]) {
  Lanes low[N], high[N];
  for (int j = 0; j < N; ++j) halves(load_words(strip.keys[first + j] + 2 * k * kTile), low[j], high[j]);
  for (int i = 0; i < M; ++i) {
    const Lanes even = all(q[i * ld + 2 * k]), odd = all(q[i * ld + 2 * k + 1]);
    for (int j = 0; j < N; ++j) s[i][j] = times_plus(even, low[j], s[i][j]);
    for (int j = 0; j < N; ++j) s[i][j] = times_plus(odd, high[j], s[i][j]);
  }
}

// M rows by 16 N positions; a line of the next strip's keys is fetched for each that is read.
template <class T, int M, int N>
R1FAST_NATIVE_INLINE void score_tiles(const Strip<T>& strip, const float* q, int64_t ld, int first,
                                      Lanes (&s)[M][N]) {
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) s[i][j] = zeros();
  }
  const int64_t num_words = strip.head_dim * static_cast<int64_t>(sizeof(T)) / 4;
  for (int part = 0; part < N; ++part) {
    const char* line = reinterpret_cast<const char*>(strip.next->keys[first + part]);
    for (int64_t k = num_words * part / N; k < num_words * (part + 1) / N; ++k) {
      for (int j = 0; j < N; ++j, line += 64) _mm_prefetch(line, _MM_HINT_T0);
      score_word<M, N>(strip, q, ld, first, k, s);
    }
  }
}

template <class T, int M, int N>
R1FAST_NATIVE_INLINE void score_rows(const Strip<T>& strip, const float* q, int64_t ld, Lanes (&s)[M][N]) {
  if constexpr (N <= kStripVectors) {
    score_tiles<T, M, N>(strip, q, ld, 0, s);
  } else {
    for (int j = 0; j < N; ++j) {
      Lanes one[M][1];
      score_tiles<T, M, 1>(strip, q, ld, j, one);
      for (int i = 0; i < M; ++i) s[i][j] = one[i][0];
    }
  }
}

// p (M, kStrip) and what a shrinks by, from the scores of N tiles.
template <class T, int M, int N>
R1FAST_NATIVE_INLINE void softmax_strip(const Strip<T>& strip, const Rows& rows, float (&p)[M][kStrip],
                                        float (&shrink)[M]) {
  Lanes s[M][N];
  score_rows<T, M, N>(strip, rows.q, rows.ld, s);
  const Truth in_sight = column_truth((N - 1) * kTile, strip.num_positions);
  const Lanes minus_infinity = all(-kInfinity);
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) s[i][j] = times(s[i][j], all(strip.scale));
    s[i][N - 1] = where(in_sight, s[i][N - 1], minus_infinity);
    Lanes most = s[i][0];
    for (int j = 1; j < N; ++j) most = larger(most, s[i][j]);
    const float m = std::max(rows.m[i], across_lanes(most, larger));
    Lanes sum = zeros();
    for (int j = 0; j < N; ++j) {
      const Lanes e = exp_lanes(minus(s[i][j], all(m)));
      store_lanes(p[i] + j * kTile, e);
      sum = plus(sum, e);
    }
    shrink[i] = first(exp_lanes(all(rows.m[i] - m)));
    rows.m[i] = m;
    rows.l[i] = std::fma(rows.l[i], shrink[i], across_lanes(sum, plus));
  }
}

// Columns of a, N vectors of values from element `column` on; `mask` of the last one's lanes. Rows of p are kStrip apart.
template <int M, int N>
R1FAST_NATIVE_INLINE void add_values(const Strip<float>& strip, const Rows& rows, const float* p, const float* shrink,
                                     int64_t column, Mask mask) {
  Lanes a[M][N];
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) {
      a[i][j] = times(load_lanes(rows.a + i * rows.ld + column + 16 * j), all(shrink[i]));
    }
  }
  for (int64_t begin = 0; begin < strip.num_positions; begin += kTile) {
    const float* value = strip.values[begin / kTile] + column;
    const float* next = strip.next->values[begin / kTile] + column;
    const int64_t end = std::min(begin + kTile, strip.num_positions);
    for (int64_t t = begin; t < end; ++t, value += strip.head_dim, next += strip.head_dim) {
      for (int j = 0; j < N; ++j) _mm_prefetch(next + 16 * j, _MM_HINT_T0);
      Lanes v[N];
      for (int j = 0; j < N - 1; ++j) v[j] = load_lanes(value + 16 * j);
      v[N - 1] = load_lanes(value + 16 * (N - 1), mask);
      for (int i = 0; i < M; ++i) {
        const Lanes weight = all(p[i * kStrip + t]);
        for (int j = 0; j < N; ++j) a[i][j] = times_plus(weight, v[j], a[i][j]);
      }
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) store_lanes(rows.a + i * rows.ld + column + 16 * j, a[i][j]);
  }
}

template <int M, int N>
R1FAST_NATIVE_INLINE void add_values(const Strip<Bf16>& strip, const Rows& rows, const float* p, const float* shrink,
                                     int64_t column, Mask mask) {
  Lanes a[M][2 * N];
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < 2 * N; ++j) {
      a[i][j] = times(load_lanes(rows.a + i * rows.ld + column + 16 * j), all(shrink[i]));
    }
  }
  for (int64_t begin = 0; begin < strip.num_positions; begin += kTile) {
    const Bf16* value = strip.values[begin / kTile] + column;
    const Bf16* next = strip.next->values[begin / kTile] + column;
    const int64_t end = std::min(begin + kTile, strip.num_positions);
    for (int64_t t = begin; t < end; ++t, value += strip.head_dim, next += strip.head_dim) {
      for (int j = 0; j < N; ++j) _mm_prefetch(next + 32 * j, _MM_HINT_T0);
      Lanes v[2 * N];
      for (int j = 0; j < N; ++j) {
        const Words words = j < N - 1 ? load_words(value + 32 * j) : load_words(value + 32 * (N - 1), mask);
        halves(words, v[2 * j], v[2 * j + 1]);
      }
      for (int i = 0; i < M; ++i) {
        const Lanes weight = all(p[i * kStrip + t]);
        for (int j = 0; j < 2 * N; ++j) a[i][j] = times_plus(weight, v[j], a[i][j]);
      }
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < 2 * N; ++j) store_lanes(rows.a + i * rows.ld + column + 16 * j, a[i][j]);
  }
}

template <class T, int M, int N>
R1FAST_NATIVE_INLINE void add_vectors(const Strip<T>& strip, const Rows& rows, const float (&p)[M][kStrip],
                                      const float (&shrink)[M], int64_t column, Mask mask) {
  constexpr int kRows = sizeof(T) == 4 || M < kBf16Rows ? M : kBf16Rows;
  add_values<kRows, N>(strip, rows, p[0], shrink, column, mask);
  if constexpr (kRows < M) {
    add_values<M - kRows, N>(strip, rows.slice(kRows, M), p[kRows], shrink + kRows, column, mask);
  }
}

template <class T, int M>
R1FAST_NATIVE void attend_some(const Strip<T>& strip, const Rows& rows) {
  alignas(64) float p[M][kStrip];
  float shrink[M];
  switch (ceil_div(strip.num_positions, kTile)) {
    case 1: softmax_strip<T, M, 1>(strip, rows, p, shrink); break;
    case 2: softmax_strip<T, M, 2>(strip, rows, p, shrink); break;
    case 3: softmax_strip<T, M, 3>(strip, rows, p, shrink); break;
    default: softmax_strip<T, M, 4>(strip, rows, p, shrink);
  }
  constexpr int64_t kElements = 64 / sizeof(T);  // of a vector of values
  constexpr int64_t kMost = std::max<int64_t>(kStripVectors * static_cast<int64_t>(sizeof(T)) / 4, 1);
  const int64_t num_vectors = ceil_div(strip.head_dim, kElements);
  for (int64_t j = 0; j < num_vectors;) {
    const int64_t n = part_of(num_vectors - j, kMost);
    const int64_t column = j * kElements;
    j += n;
    const Mask mask = column_mask((j - 1) * kTile, strip.head_dim * static_cast<int64_t>(sizeof(T)) / 4);
    if (n == 1) {
      add_vectors<T, M, 1>(strip, rows, p, shrink, column, mask);
    } else if constexpr (kMost > 1) {
      if (n == 2) {
        add_vectors<T, M, 2>(strip, rows, p, shrink, column, mask);
      } else if constexpr (kMost > 2) {
        if (n == 3) {
          add_vectors<T, M, 3>(strip, rows, p, shrink, column, mask);
        } else {
          add_vectors<T, M, 4>(strip, rows, p, shrink, column, mask);
        }
      }
    }
  }
}

template <class T>
R1FAST_NATIVE void attend_rows(const Strip<T>& strip, const Rows& rows) {
  for (int64_t r = 0; r < rows.count;) {
    const int64_t n = part_of(rows.count - r, 4);
    const Rows part = rows.slice(r, r + n);
    r += n;
    switch (n) {
      case 1: attend_some<T, 1>(strip, part); break;
      case 2: attend_some<T, 2>(strip, part); break;
      case 3: attend_some<T, 3>(strip, part); break;
      default: attend_some<T, 4>(strip, part);
    }
  }
}
