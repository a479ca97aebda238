// Of gemm.hpp, for each level: tiles to their place, and the packing of panels.

// C(i, 16 j ..) = or += the products, for the first num_rows rows and num_columns columns of the tile.
template <bool kBf16, bool kColumns, int M, int N>
R1FAST_NATIVE void tile_into(Into into, int64_t num_k, const Word* a, int64_t lda, const Word* panel, float* c,
                             int64_t ldc, int64_t num_rows, int64_t num_columns) {
  if (into != Into::kBuffer) {
    for (int i = 0; i < num_rows; ++i) {
      for (int j = 0; j < N; ++j) __builtin_prefetch(c + i * ldc + kLanes * j, 1);
    }
  }
  Lanes sums[M][N];
  tile_products<kBf16, kColumns, M, N>(num_k, a, lda, panel, sums);
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    if (i >= num_rows) break;
    for (int j = 0; j < N; ++j) {
      const Mask mask = column_mask(kLanes * j, num_columns);
      float* const to = c + i * ldc + kLanes * j;
      Lanes value = sums[i][j];
      if (into == Into::kAdd) value = plus(value, load_lanes(to, mask));
      store_lanes(to, mask, value);
    }
  }
}

template <bool kBf16, bool kColumns>
inline void tile_into(Into into, int64_t num_vectors, int64_t num_k, const Word* a, int64_t lda, const Word* panel,
                      float* c, int64_t ldc, int64_t num_rows, int64_t num_columns) {
  if constexpr (kFewerRows) {
    using Tile = decltype(&tile_into<kBf16, kColumns, 1, 1>);
    static constexpr Tile kTiles[] = {
        &tile_into<kBf16, kColumns, 1, 1>, &tile_into<kBf16, kColumns, 2, 1>, &tile_into<kBf16, kColumns, 3, 1>,
        &tile_into<kBf16, kColumns, 4, 1>, &tile_into<kBf16, kColumns, 5, 1>, &tile_into<kBf16, kColumns, 6, 1>};
    kTiles[num_rows - 1](into, num_k, a, lda, panel, c, ldc, num_rows, num_columns);
  } else {
    const auto tile = num_vectors == 3   ? &tile_into<kBf16, kColumns, kTileRows, 3>
                      : num_vectors == 2 ? &tile_into<kBf16, kColumns, kTileRows, 2>
                                         : &tile_into<kBf16, kColumns, kTileRows, 1>;
    tile(into, num_k, a, lda, panel, c, ldc, num_rows, num_columns);
  }
}

struct HeadKernels;  // the other files' kernels of this level
struct LinearKernels;
struct ProductKernels;
struct RowKernels;

// How products are divided on this level; amx.hpp has another.
struct Tiles {
  using Head = HeadKernels;
  using Linear = LinearKernels;
  using Products = ProductKernels;
  using Rows = RowKernels;

  static constexpr int64_t kRowsOfTile = kTileRows;
  static constexpr int64_t kRows = kFewerRows ? 4 * kTileRows : kTileRows;  // of A at a time
  static constexpr int64_t kMaxVectors = kTileVectors;  // of B
  static constexpr int64_t kWordMultiple = 1;  // words of k come in multiples of this, padded with zeros

  // Vectors in the next panel: 3, but never a lone 1 after a 3.
  static int64_t panel_vectors(int64_t num_left) {
    return kMaxVectors == 3 && num_left == 4 ? 2 : std::min<int64_t>(num_left, kMaxVectors);
  }

  struct Session {
    Session() {}  // nothing to set up
  };

  // C = or += A B of at most kRows rows and one panel.
  template <bool kBf16>
  static void into(Into into, int64_t num_vectors, int64_t num_k, const Word* a, int64_t lda, const Word* panel,
                   float* c, int64_t ldc, int64_t num_rows, int64_t num_columns) {
    for (int64_t i = 0; i < num_rows; i += kTileRows) {
      tile_into<kBf16, false>(into, num_vectors, num_k, a + i * lda, lda, panel, c + i * ldc, ldc,
                              std::min<int64_t>(kTileRows, num_rows - i), num_columns);
    }
  }

  // The same of one tile, A turned: [k][lda].
  template <bool kBf16>
  static void into_of_columns(Into into, int64_t num_vectors, int64_t num_k, const Word* a, int64_t lda,
                              const Word* panel, float* c, int64_t ldc, int64_t num_rows, int64_t num_columns) {
    tile_into<kBf16, true>(into, num_vectors, num_k, a, lda, panel, c, ldc, num_rows, num_columns);
  }

  // Rows [begin, end) of a row-major matrix, one a lane, as a panel [num_k][width], width a multiple of 16. What lies
  // outside it is zero. Turned 16 by 16 in a buffer: rows may be a power of two apart, all in one set of the cache.
  template <class T>
  R1FAST_NATIVE static void pack_lanes(const T* matrix, int64_t ld, int64_t begin, int64_t end, int64_t size, int64_t num_k,
                                int64_t width, Word* panel) {
    const int64_t num_words = ceil_div(size, sizeof(Word) / sizeof(T)), num_whole = size * sizeof(T) / sizeof(Word);
    alignas(64) float block[kLanes * kLanes];
    for (int64_t lane = 0; lane < width; lane += kLanes) {
      for (int64_t k = 0; k < num_k; k += kLanes) {
        for (int64_t i = 0; i < kLanes; ++i) {
          const int64_t row = begin + lane + i;
          const Mask mask = row < end ? column_mask(k, num_whole) : Mask{};
          const auto* const from = reinterpret_cast<const char*>(matrix + row * ld) + k * sizeof(Word);
          store_lanes(block + i * kLanes, load_lanes(reinterpret_cast<const Word*>(from), mask));
        }
        turn_block(block, std::min<int64_t>(kLanes, num_k - k), panel + k * width + lane, width);
      }
      for (int64_t i = 0; num_whole < num_words && i < std::min<int64_t>(kLanes, end - begin - lane); ++i) {
        panel[num_whole * width + lane + i] = word_of_row(matrix + (begin + lane + i) * ld, size, num_whole);
      }
    }
  }

  // Columns [begin, begin + 16 num_vectors) of rows [first, last) of a row-major matrix as a panel [k][16 num_vectors]:
  // bf16 rows in pairs. What lies outside the matrix is zero.
  template <bool kBf16, class T>
  R1FAST_NATIVE static void pack_columns(const T* matrix, int64_t ld, int64_t first, int64_t last, int64_t begin,
                                  int64_t num_columns, int64_t num_vectors, Word* panel) {
    for (int64_t row = first; row < last; row += kBf16 ? 2 : 1) {
      for (int64_t j = 0; j < num_vectors; ++j, panel += kLanes) {
        const int64_t column = begin + kLanes * j;
        const Mask mask = column_mask(column, num_columns);
        const Mask next_mask = row + 1 < last ? mask : Mask{};
        const T* const from = matrix + row * ld + column;
        if constexpr (!kBf16) {
          store_lanes(panel, load_lanes(from, mask));
        } else if constexpr (sizeof(T) == sizeof(Bf16)) {
          store_words(panel, interleave_rows(from, mask, from + ld, next_mask));
        } else {
          store_words(panel, interleave_bf16(load_lanes(from, mask), load_lanes(from + ld, next_mask)));
        }
      }
    }
  }
};
