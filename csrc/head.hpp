// A language-model head on AVX-512, AVX2, and AMX where the products are of bf16: z = h W^T with its epilogue (epilogue.hpp) in one pass, then E @ W and E^T @ X.
//
// E is stored transposed, in words [vocabulary][ld]: the vector lanes are rows of h, so the sums over the vocabulary
// need no horizontal additions. bf16 keeps two vocabulary entries in a word. Work is shared out in blocks of the
// vocabulary (forward, dweight) or of the result (dhidden): the number of threads changes no bit of the results.
#pragma once

#include "amx.hpp"
#include "epilogue.hpp"
#include "gemm.hpp"

namespace r1fast {

constexpr int64_t kVocabPadding = 8;  // entries whose epilogue is one call

// Words from one row of the transposed E to the next: an odd number of cache lines, so that a column of it does not
// fall into a few sets of the cache.
inline int64_t head_ld(int64_t num_rows) { return 16 * (ceil_div(num_rows, 16) | 1); }
inline int64_t head_words(int64_t num_rows, int64_t vocab_size, bool bf16) {
  return head_ld(num_rows) * round_up(vocab_size, kVocabPadding) / (bf16 ? 2 : 1);
}

#if defined(__x86_64__)

// The transposed E of `num_rows` rows of h.
struct HeadView {
  Word* words;
  int64_t ld;
  int64_t num_rows;
  int64_t vocab_size;
};

// Vocabulary entries whose sums are taken apart: part of the result, unlike the other block sizes.
constexpr int64_t kVocabBlock = 256;
constexpr int64_t kDweightBlock = 128;   // entries a task
constexpr int64_t kDhiddenBlock = 128;   // words of E a step: a panel of W stays in the first-level cache
constexpr int64_t kTurnedBytes = 512 << 10;  // of W, likewise
constexpr int64_t kCopyBytes = 300 << 10;  // of W, in the second-level cache beside a panel of h

template <class T>
struct Forward {
  const T* weight;
  int64_t ld_weight;
  int64_t width;  // D
  LogitMap map;
  HeadView e;           // words may be null: sums only
  const Word* panels;   // h packed
  const int32_t* target_ids;  // (padded R)
  const float* anchor;        // (padded R)
  int64_t padded_rows;
  float* s_blocks;   // (blocks, padded R)
  float* sz_blocks;  // null: not asked for
};

}  // namespace r1fast

#define R1FAST_KERNELS "head_kernels.hpp"
#include "each_level.hpp"

namespace r1fast {

template <class Tiles, class T>
void forward_block(const Forward<T>& f, int64_t block, int64_t next_block, int64_t num_k, int64_t copy_rows,
                   int64_t ld_copy, Word* copy) {
  constexpr bool kBf16 = sizeof(T) == sizeof(Bf16);
  constexpr int64_t kLd = kLanes * Tiles::kMaxVectors;
  const bool softcap = f.map.softcap != 0, want_sz = f.sz_blocks != nullptr;
  using Kernels = typename Tiles::Head;
  const auto plain = want_sz ? &Kernels::template tile_epilogue<kBf16, false, true, kLd, T>
                             : &Kernels::template tile_epilogue<kBf16, false, false, kLd, T>;
  const auto capped = want_sz ? &Kernels::template tile_epilogue<kBf16, true, true, kLd, T>
                              : &Kernels::template tile_epilogue<kBf16, true, false, kLd, T>;
  const auto finish = softcap ? capped : plain;
  const typename Tiles::Session session;
  const int64_t num_vectors = f.padded_rows / kLanes;
  const int64_t end = std::min(f.e.vocab_size, (block + 1) * kVocabBlock);
  std::fill_n(f.s_blocks + block * f.padded_rows, f.padded_rows, 0.0f);
  if (want_sz) std::fill_n(f.sz_blocks + block * f.padded_rows, f.padded_rows, 0.0f);
  for (int64_t begin = block * kVocabBlock; begin < end; begin += copy_rows) {
    // A copy: rows of W may be unaligned, of odd width, and a power of two apart, all in one set of the cache.
    const int64_t count = std::min(copy_rows, end - begin);
    for (int64_t i = 0; i < std::min(round_up(count, Tiles::kRows), copy_rows); ++i) {
      Word* const row = copy + i * ld_copy;
      const int64_t num_words = i < count ? f.width * sizeof(T) / sizeof(Word) : 0;  // that are full
      std::fill(row + num_words, row + num_k, 0.0f);
      if (i < count) {
        std::memcpy(static_cast<void*>(row), f.weight + (begin + i) * f.ld_weight,
                    static_cast<size_t>(f.width) * sizeof(T));
      }
    }
    const int64_t next = begin + copy_rows < end ? begin + copy_rows : next_block * kVocabBlock;
    Prefetcher prefetcher(f.weight + next * f.ld_weight, std::clamp<int64_t>(f.e.vocab_size - next, 0, copy_rows),
                          f.width * sizeof(T), f.ld_weight * sizeof(T),
                          ceil_div(num_vectors, Tiles::kMaxVectors) * ceil_div(count, Tiles::kRows));
    for (int64_t p = 0, n; p < num_vectors; p += n) {
      n = Tiles::panel_vectors(num_vectors - p);
      for (int64_t i = 0; i < count; i += Tiles::kRows) {
        prefetcher.step();
        alignas(64) float tile[Tiles::kRows][kLd];
        const int64_t num_rows = std::min(Tiles::kRows, round_up(count - i, kVocabPadding));
        Tiles::template into<kBf16>(Into::kBuffer, n, num_k, copy + i * ld_copy, ld_copy,
                                    f.panels + p * kLanes * num_k, &tile[0][0], kLd, num_rows, kLanes * n);
        for (int64_t r = 0; r < num_rows; r += kVocabPadding) {
          finish(f, tile + r, n, begin + i + r, p * kLanes, block);
        }
      }
    }
  }
  _mm_sfence();  // the streaming stores of E
}

// s and sz are (R); sz and e.words may be null.
template <class Tiles, class T>
void head_forward(const T* hidden, int64_t ld_hidden, const T* weight, int64_t ld_weight, int64_t width,
                  const LogitMap& map, const HeadView& e, float* s, float* sz, int64_t num_threads) {
  constexpr int64_t kPerWord = sizeof(Word) / sizeof(T);
  const int64_t num_rows = e.num_rows, padded_rows = round_up(num_rows, kLanes);
  const int64_t num_k = round_up(ceil_div(width, kPerWord), Tiles::kWordMultiple);
  const int64_t num_blocks = ceil_div(e.vocab_size, kVocabBlock);
  const int64_t ld_copy = 16 * (ceil_div(num_k, 16) | 1);
  int64_t copy_rows = kVocabBlock;
  while (copy_rows > Tiles::kRows && copy_rows * ld_copy * 4 > kCopyBytes) copy_rows /= 2;
  const int64_t threads = worthwhile_threads(num_threads, 0.1 * num_rows * width * e.vocab_size);

  const AlignedBuffer<float> panels(padded_rows * num_k), copies(threads * copy_rows * ld_copy), anchor(padded_rows);
  const AlignedBuffer<float> partial((sz == nullptr ? 1 : 2) * num_blocks * padded_rows);
  const AlignedBuffer<int32_t> targets(padded_rows);
  for (int64_t t = 0; t < padded_rows; ++t) {
    anchor.data()[t] = t < num_rows ? map.anchor[t] : 0.0f;
    const int64_t target = t < num_rows ? map.target_ids[t] : -1;
    targets.data()[t] = target >= 0 && target < e.vocab_size ? static_cast<int32_t>(target) : -1;
  }
  for (int64_t p = 0, n; p < padded_rows / kLanes; p += n) {
    n = Tiles::panel_vectors(padded_rows / kLanes - p);
    Tiles::pack_lanes(hidden, ld_hidden, p * kLanes, num_rows, width, num_k, n * kLanes, panels.data() + p * kLanes * num_k);
  }
  const Forward<T> f{weight,      ld_weight,    width,         map,         e,
                     panels.data(), targets.data(), anchor.data(), padded_rows, partial.data(),
                     sz == nullptr ? nullptr : partial.data() + num_blocks * padded_rows};
  parallel_for(num_blocks, threads, [&](int64_t block, int64_t thread) {
    forward_block<Tiles>(f, block, block + threads, num_k, copy_rows, ld_copy,
                         copies.data() + thread * copy_rows * ld_copy);
  });
  for (int64_t t = 0; t < num_rows; ++t) {
    double sum = 0, sum_z = 0;
    for (int64_t b = 0; b < num_blocks; ++b) {
      sum += f.s_blocks[b * padded_rows + t];
      if (sz != nullptr) sum_z += f.sz_blocks[b * padded_rows + t];
    }
    s[t] = static_cast<float>(sum);
    if (sz != nullptr) sz[t] = static_cast<float>(sum_z);
  }
}

// dhidden (R, D) = E @ W. A task owns a part of the result and goes through the whole vocabulary.
template <class Tiles, class T>
void head_dhidden(const HeadView& e, const T* weight, int64_t ld_weight, int64_t width, float* dhidden,
                  int64_t num_threads) {
  constexpr bool kBf16 = sizeof(T) == sizeof(Bf16);
  constexpr int64_t kEntries = kDhiddenBlock * (kBf16 ? 2 : 1);
  constexpr int64_t kTileRows = Tiles::kRowsOfTile, kTileVectors = Tiles::kMaxVectors;
  const int64_t num_vectors = ceil_div(width, kLanes), num_tiles = ceil_div(e.num_rows, kTileRows);
  const int64_t threads = worthwhile_threads(num_threads, 0.1 * e.num_rows * width * e.vocab_size);
  // two parts a thread: E is read once more, for 1% of the time, and a core that another process slows takes fewer
  const int64_t num_parts = threads == 1 ? 1 : 2 * threads;
  const int64_t column_parts = std::min(num_parts, ceil_div(num_vectors, kTileVectors));
  const int64_t row_parts = std::min(ceil_div(num_parts, column_parts), num_tiles);
  constexpr int64_t kPanelWords = kDhiddenBlock * kLanes * kTileVectors;
  const AlignedBuffer<float> panels(threads * kPanelWords);

  parallel_for(column_parts * row_parts, threads, [&](int64_t task, int64_t thread) {
    Word* const panel = panels.data() + thread * kPanelWords;
    const int64_t column_part = task % column_parts, row_part = task / column_parts;
    const int64_t first_vector = num_vectors * column_part / column_parts;
    const int64_t last_vector = num_vectors * (column_part + 1) / column_parts;
    const int64_t first_tile = num_tiles * row_part / row_parts, last_tile = num_tiles * (row_part + 1) / row_parts;
    for (int64_t v = 0; v < e.vocab_size; v += kEntries) {
      const int64_t last = std::min(v + kEntries, e.vocab_size), num_k = ceil_div(last - v, kBf16 ? 2 : 1);
      const Word* const rows = e.words + v / (kBf16 ? 2 : 1) * e.ld;
      Prefetcher next_e(rows + kDhiddenBlock * e.ld + first_tile * kTileRows,
                        std::clamp<int64_t>(ceil_div(e.vocab_size - last, kBf16 ? 2 : 1), 0, kDhiddenBlock),
                        (last_tile - first_tile) * kTileRows * sizeof(Word), e.ld * sizeof(Word),
                        (last_tile - first_tile) * ceil_div(last_vector - first_vector, kTileVectors));
      for (int64_t d = first_vector, n; d < last_vector; d += n) {
        n = Tiles::panel_vectors(last_vector - d);
        Tiles::template pack_columns<kBf16>(weight, ld_weight, v, last, d * kLanes, width, n, panel);
        // the next panel of W, and the next rows of E a part with every panel
        const bool wraps = d + n >= last_vector;
        const int64_t next_v = wraps ? v + kEntries : v, next_d = wraps ? first_vector : d + n;
        Prefetcher next_w(weight + next_v * ld_weight + next_d * kLanes,
                          std::clamp<int64_t>(e.vocab_size - next_v, 0, kEntries),
                          std::min<int64_t>(kLanes * kTileVectors, width - next_d * kLanes) * sizeof(T),
                          ld_weight * sizeof(T), last_tile - first_tile);
        for (int64_t tile = first_tile; tile < last_tile; ++tile) {
          next_w.step();
          next_e.step();
          const int64_t t = tile * kTileRows;
          Tiles::template into_of_columns<kBf16>(v > 0 ? Into::kAdd : Into::kSet, n, num_k, rows + t, e.ld, panel,
                                                 dhidden + t * width + d * kLanes, width,
                                                 std::min(kTileRows, e.num_rows - t), width - d * kLanes);
        }
      }
    }
  });
}

// The same on AMX, as dhidden^T = W^T E^T: the transposed E is a B as it lies, and W is turned a block at a time.
inline void head_dhidden_amx(const HeadView& e, const Bf16* weight, int64_t ld_weight, int64_t width, float* dhidden,
                             int64_t num_threads) {
  constexpr int64_t kSide = AmxTiles::kRows, kWords = kTileWords, kStep = kSide * kWords;
  const int64_t threads = worthwhile_threads(num_threads, 0.1 * e.num_rows * width * e.vocab_size);
  const int64_t num_parts = threads == 1 ? 1 : 2 * threads;  // as in head_dhidden
  const int64_t num_panels = ceil_div(width, kSide), num_columns = ceil_div(e.num_rows, kSide);
  const int64_t width_parts = std::min(num_parts, num_panels);
  const int64_t row_parts = std::min(ceil_div(num_parts, width_parts), num_columns);
  const int64_t most_panels = ceil_div(num_panels, width_parts);
  // entries a step, so that the turned W stays in the second-level cache
  const int64_t entries = std::clamp<int64_t>(kTurnedBytes / (most_panels * kSide * 2) / kSide * kSide, 256, 1024);
  const int64_t num_words = e.vocab_size / 2 / kWords * kWords;  // of E's rows of words, in whole tiles
  const int64_t tail_words = round_up(e.vocab_size, kVocabPadding) / 2 - num_words;
  const int64_t padded_rows = round_up(e.num_rows, kLanes), ld_sums = padded_rows | kLanes;
  const int64_t turned_size = most_panels * entries / 2 * kSide, sums_size = most_panels * kSide * ld_sums;
  const AlignedBuffer<float> turned(threads * turned_size), sums(threads * sums_size);
  // the last rows of words, with zeros below
  const AlignedBuffer<float> tail(kWords * e.ld);
  std::fill_n(tail.data(), kWords * e.ld, 0.0f);
  std::copy_n(e.words + num_words * e.ld, tail_words * e.ld, tail.data());

  parallel_for(width_parts * row_parts, threads, [&](int64_t task, int64_t thread) {
    const AmxTiles::Session session;
    Word* const panel = turned.data() + thread * turned_size;
    float* const mine = sums.data() + thread * sums_size;
    const int64_t width_part = task % width_parts, row_part = task / width_parts;
    const int64_t first = num_panels * width_part / width_parts, last = num_panels * (width_part + 1) / width_parts;
    const int64_t first_t = num_columns * row_part / row_parts * kSide;
    const int64_t last_t = std::min(num_columns * (row_part + 1) / row_parts * kSide, padded_rows);
    for (int64_t v = 0; v < e.vocab_size; v += entries) {
      const int64_t count = std::min(entries, e.vocab_size - v), num_tiles = ceil_div(count, kSide);
      for (int64_t tile = 0; tile < num_tiles; ++tile) {
        const int64_t next = v + (tile + 1) * kSide;
        Prefetcher next_w(weight + next * ld_weight + first * kSide, std::clamp<int64_t>(e.vocab_size - next, 0, kSide),
                          std::min((last - first) * kSide, width - first * kSide) * sizeof(Bf16),
                          ld_weight * sizeof(Bf16), last - first);
        for (int64_t d = first; d < last; ++d) {
          next_w.step();
          Word* const to = panel + ((d - first) * num_tiles + tile) * kStep;
          for (int64_t half = 0; half < 2; ++half) {
            pack_turned(weight, ld_weight, v + tile * kSide, e.vocab_size, d * kSide + half * kLanes, width,
                        to + half * kWords * kWords);
          }
        }
      }
      const int64_t whole = std::min(ceil_div(count, 2), num_words - v / 2) / kWords * kWords;
      Prefetcher next_e(e.words + (v + entries) / 2 * e.ld + first_t,
                        std::clamp<int64_t>(num_words - (v + entries) / 2, 0, entries / 2),
                        (last_t - first_t) * sizeof(Word), e.ld * sizeof(Word),
                        (last - first) * ceil_div(last_t - first_t, kSide));
      for (int64_t d = first; d < last; ++d) {
        const Word* const a = panel + (d - first) * num_tiles * kStep;
        for (int64_t t = first_t; t < last_t; t += kSide) {
          next_e.step();
          const int64_t n = std::min<int64_t>(kSide, last_t - t) / kLanes;
          float* const c = mine + (d - first) * kSide * ld_sums + t;
          amx_block(2, n, v > 0, whole, a, kStep, kWords, e.words + v / 2 * e.ld + t, e.ld, c, ld_sums);
          if (whole < num_tiles * kWords) {
            amx_block(2, n, true, kWords, a + whole / kWords * kStep, kStep, kWords, tail.data() + t, e.ld, c, ld_sums);
          }
        }
      }
    }
    for (int64_t t = first_t; t < std::min(last_t, e.num_rows); ++t) {
      for (int64_t d = first * kSide; d < std::min(last * kSide, width); ++d) {
        dhidden[t * width + d] = mine[(d - first * kSide) * ld_sums + t];
      }
    }
  });
}

// dweight (V, D) = or += E^T @ x, x (R, D) in fp32 or bf16.
template <class Tiles, bool kBf16, class X>
void head_dweight(const HeadView& e, const X* x, int64_t ld_x, int64_t width, float* dweight, int64_t ld_dweight,
                  bool accumulate, int64_t num_threads) {
  const int64_t num_words = ceil_div(e.num_rows, kBf16 ? 2 : 1), num_k = round_up(num_words, Tiles::kWordMultiple);
  const int64_t num_vectors = ceil_div(width, kLanes), ld_pairs = 16 * (ceil_div(num_k, 16) | 1);
  const int64_t threads = worthwhile_threads(num_threads, 0.1 * e.num_rows * width * e.vocab_size);
  const AlignedBuffer<float> panels(num_vectors * kLanes * num_k);
  const AlignedBuffer<float> pairs(kBf16 ? threads * kDweightBlock * ld_pairs : 1);
  for (int64_t d = 0, n; d < num_vectors; d += n) {
    n = Tiles::panel_vectors(num_vectors - d);
    Word* const panel = panels.data() + d * kLanes * num_k;
    Tiles::template pack_columns<kBf16>(x, ld_x, 0, e.num_rows, d * kLanes, width, n, panel);
    std::fill(panel + num_words * kLanes * n, panel + num_k * kLanes * n, 0.0f);
  }
  parallel_for(ceil_div(e.vocab_size, kDweightBlock), threads, [&](int64_t task, int64_t thread) {
    const typename Tiles::Session session;
    const int64_t v = task * kDweightBlock, count = std::min(kDweightBlock, e.vocab_size - v);
    const Word* rows = e.words + v * e.ld;
    int64_t ld = e.ld;
    if (kBf16) {
      Word* const mine = pairs.data() + thread * kDweightBlock * ld_pairs;
      Tiles::Head::pair_rows(e.words + v / 2 * e.ld, e.ld, round_up(count, kVocabPadding) / 2, num_words, mine, ld_pairs);
      for (int64_t i = 0; i < count; ++i) std::fill(mine + i * ld_pairs + num_words, mine + i * ld_pairs + num_k, 0.0f);
      rows = mine;
      ld = ld_pairs;
    }
    const int64_t next = (task + threads) * kDweightBlock;
    Prefetcher next_e(e.words + next / (kBf16 ? 2 : 1) * e.ld,
                      std::clamp<int64_t>(e.vocab_size - next, 0, kDweightBlock) / (kBf16 ? 2 : 1),
                      e.num_rows * sizeof(Word), e.ld * sizeof(Word),
                      ceil_div(num_vectors, Tiles::kMaxVectors) * ceil_div(count, Tiles::kRows));
    for (int64_t d = 0, n; d < num_vectors; d += n) {
      n = Tiles::panel_vectors(num_vectors - d);
      for (int64_t i = 0; i < count; i += Tiles::kRows) {
        next_e.step();
        Tiles::template into<kBf16>(accumulate ? Into::kAdd : Into::kSet, n, num_k, rows + i * ld, ld,
                                    panels.data() + d * kLanes * num_k, dweight + (v + i) * ld_dweight + d * kLanes,
                                    ld_dweight, std::min(Tiles::kRows, count - i), width - d * kLanes);
      }
    }
  });
}

// Runs over the rows of words in blocks.
template <class Body>
void for_word_rows(const HeadView& e, bool bf16, int64_t num_threads, const Body& body) {
  constexpr int64_t kBlock = 256;
  const int64_t num_rows = round_up(e.vocab_size, kVocabPadding) / (bf16 ? 2 : 1);
  parallel_for(ceil_div(num_rows, kBlock), worthwhile_threads(num_threads, 2.0 * num_rows * e.num_rows),
               [&](int64_t task, int64_t) {
                 const int64_t end = std::min(num_rows, (task + 1) * kBlock);
                 for (int64_t row = task * kBlock; row < end; ++row) body(row);
               });
}

// dbias (V) = or += E^T @ x, x (R).
template <class Tiles, bool kBf16>
void head_dbias(const HeadView& e, const float* x, float* dbias, bool accumulate, int64_t num_threads) {
  for_word_rows(e, kBf16, num_threads, [&](int64_t row) {
    const int64_t v = row * (kBf16 ? 2 : 1);
    if (v < e.vocab_size) Tiles::Head::template dbias_rows<kBf16>(e, x, dbias, accumulate, v);
  });
}

// Keeps the rows kept[0] < kept[1] < ... of h; the lanes up to the next whole line become zero.
inline void head_compact(const HeadView& e, bool bf16, const int64_t* kept, int64_t num_kept, int64_t num_threads) {
  for_word_rows(e, bf16, num_threads, [&](int64_t row) {
    Word* const words = e.words + row * e.ld;
    for (int64_t j = 0; j < num_kept; ++j) words[j] = words[kept[j]];
    std::fill(words + num_kept, words + round_up(num_kept, kLanes), 0.0f);
  });
}

// E (a[r] + b[r] log E) in place.
template <class Tiles, bool kBf16>
void head_affine(const HeadView& e, const float* a, const float* b, int64_t num_threads) {
  for_word_rows(e, kBf16, num_threads,
                [&](int64_t row) { Tiles::Head::template affine_words<kBf16>(e.words + row * e.ld, a, b, e.num_rows); });
}

#endif

}  // namespace r1fast
