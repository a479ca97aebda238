// y = x W^T for the decoder: weights packed once, sums in fp32, and what follows the product done while it is in the cache.
//
//   kStore      y = x W^T + b                    kAdd     y = y + (x W^T + b)
//   kSilu       y = silu(g) u                    g, u = the halves of x W^T + b
//
// In bf16 every line above is rounded where PyTorch rounds it. An element is summed over k in one fixed order, see gemm.hpp and
// amx.hpp: a row's result depends neither on the rows beside it nor on how many there are.
#pragma once

#include "amx.hpp"
#include "rows.hpp"
#include "team.hpp"

#if defined(__x86_64__)
namespace r1fast {

enum class After { kStore, kAdd, kSilu };

}  // namespace r1fast

#define R1FAST_KERNELS "linear_kernels.hpp"
#include "each_level.hpp"

namespace r1fast {

// Tiles: Avx512Tiles, Avx2Tiles or, for bf16, AmxTiles.
template <class T, class Tiles>
class PackedLinear {
 public:
  // weight (num_out, num_in), rows `ld` elements apart; bias (num_out) or null, which must outlive this. The halves of
  // `halved` weights are packed side by side, for kSilu.
  PackedLinear(const T* weight, int64_t ld, const T* bias, int64_t num_out, int64_t num_in, bool halved,
               int64_t num_threads)
      : bias_(bias),
        num_out_(halved ? num_out / 2 : num_out),
        num_in_(num_in),
        num_k_(round_up(ceil_div(num_in, kPerWord), Tiles::kWordMultiple)),
        halves_(halved ? 2 : 1),
        packed_(num_bytes() / static_cast<int64_t>(sizeof(Word))) {
    const int64_t num_vectors = ceil_div(num_out_, kLanes);
    for (int64_t first = 0, n; first < num_vectors; first += n) {
      n = Tiles::panel_vectors(num_vectors - first);
      panels_.push_back({first * kLanes, n});
    }
    parallel_for(num_panels() * halves_, num_threads, [&](int64_t task, int64_t) {
      const int64_t half = task % halves_;
      const Panel& p = panels_[static_cast<size_t>(task / halves_)];
      Tiles::pack_lanes(weight + half * num_out_ * ld, ld, p.begin, std::min(p.begin + p.width(), num_out_), num_in,
                        num_k_, p.width(), words(p, half));
    });
  }

  int64_t num_out() const { return num_out_; }  // elements that `run` writes of a row
  int64_t num_in() const { return num_in_; }
  int64_t num_halves() const { return halves_; }
  int64_t num_bytes() const { return round_up(num_out_, kLanes) * halves_ * num_k_ * static_cast<int64_t>(sizeof(Word)); }

  // Words of x that are read of a row, and rows beyond num_rows that may be: all must be there, and finite.
  static constexpr int64_t kRows = Tiles::kRows;
  int64_t words_read() const { return num_k_; }

  // Multiply-adds, of words.
  double steps(int64_t num_rows) const { return 1.0 * num_rows * num_out_ * halves_ * num_k_; }

  // x (num_rows, num_in); Y is T, or float for kStore alone. `each` is a Member or Alone.
  template <class Y, class Each>
  void run(const T* x, int64_t ld_x, int64_t num_rows, Y* y, int64_t ld_y, After after, Each&& each) const {
    if ((after == After::kSilu) != (halves_ == 2)) throw std::invalid_argument("silu is of halved weights");
    each(ceil_div(num_rows, kGroupRows) * num_panels(), [&](int64_t task, int64_t) {
      const typename Tiles::Session session;
      const Panel& p = panels_[static_cast<size_t>(task % num_panels())];
      const int64_t first = task / num_panels() * kGroupRows;
      const int64_t last = std::min(first + kGroupRows, num_rows);
      for (int64_t row = first; row < last; row += kRows) {
        block(x + row * ld_x, ld_x, std::min(last - row, kRows), p, y + row * ld_y, ld_y, after);
      }
    });
  }

 private:
  static constexpr bool kBf16 = sizeof(T) == sizeof(Bf16);
  static constexpr int64_t kPerWord = sizeof(Word) / sizeof(T);
  static constexpr int64_t kMaxWidth = kLanes * Tiles::kMaxVectors;
  static constexpr int64_t kGroupRows = 128;  // of x, that stay in the cache while a task meets one panel after another

  struct Panel {
    int64_t begin;  // of its columns
    int64_t num_vectors;
    int64_t width() const { return num_vectors * kLanes; }
  };
  int64_t num_panels() const { return static_cast<int64_t>(panels_.size()); }
  Word* words(const Panel& p, int64_t half) const {
    return reinterpret_cast<Word*>(packed_.data()) + (p.begin * halves_ + half * p.width()) * num_k_;
  }

  template <class Y>
  void block(const T* x, int64_t ld_x, int64_t num_rows, const Panel& p, Y* y, int64_t ld_y, After after) const {
    for (int64_t i = 0; i < num_rows; ++i) __builtin_prefetch(y + i * ld_y + p.begin, 1);  // lines far apart
    alignas(64) float sums[2][kRows * kMaxWidth];
    for (int64_t half = 0; half < halves_; ++half) {
      Tiles::template into<kBf16>(Into::kBuffer, p.num_vectors, num_k_, reinterpret_cast<const Word*>(x),
                                  ld_x / kPerWord, words(p, half), sums[half], kMaxWidth, num_rows, p.width());
    }
    const T* const bias = bias_ == nullptr ? nullptr : bias_ + p.begin;
    const T* const second_bias = bias == nullptr || halves_ == 1 ? nullptr : bias + num_out_;
    const int64_t num_columns = std::min(p.width(), num_out_ - p.begin);
    y += p.begin;
    using Kernels = typename Tiles::Linear;
    const auto finish = after == After::kSilu  ? &Kernels::template finish<After::kSilu, T, Y>
                        : after == After::kAdd ? &Kernels::template finish<After::kAdd, T, Y>
                                               : &Kernels::template finish<After::kStore, T, Y>;
    finish(sums[0], sums[1], kMaxWidth, num_rows, num_columns, bias, second_bias, y, ld_y);
  }

  const T* bias_;
  int64_t num_out_, num_in_, num_k_, halves_;
  std::vector<Panel> panels_;
  AlignedBuffer<float> packed_;
};

// y (T, N) = x (T, D) W^T + bias with the sums above, for a forward that must agree with the sampler's. D is even.
template <class T, class Tiles>
void linear_once(const T* x, int64_t ld_x, int64_t num_tokens, const T* weight, int64_t ld_weight, int64_t num_out,
                 int64_t num_in, const T* bias, T* y, int64_t num_threads) {
  using Linear = PackedLinear<T, Tiles>;
  const Linear packed(weight, ld_weight, bias, num_out, num_in, false, num_threads);
  const Alone each{worthwhile_threads(num_threads, packed.steps(num_tokens))};
  // whole tiles are read: where x has them, else of a copy with zeros
  const int64_t width = packed.words_read() * static_cast<int64_t>(sizeof(Word) / sizeof(T));
  const bool has_tiles = num_in == width && reinterpret_cast<uintptr_t>(x) % sizeof(Word) == 0 &&
                         ld_x * static_cast<int64_t>(sizeof(T)) % static_cast<int64_t>(sizeof(Word)) == 0;
  const int64_t whole = has_tiles ? num_tokens / Linear::kRows * Linear::kRows : 0, rest = num_tokens - whole;
  if (whole > 0) packed.run(x, ld_x, whole, y, num_out, After::kStore, each);
  if (rest == 0) return;
  const AlignedBuffer<T> copy(round_up(rest, Linear::kRows) * width);
  std::fill_n(copy.data(), round_up(rest, Linear::kRows) * width, T{});
  for (int64_t i = 0; i < rest; ++i) std::copy_n(x + (whole + i) * ld_x, num_in, copy.data() + i * width);
  packed.run(static_cast<const T*>(copy.data()), width, rest, y + whole * num_out, num_out, After::kStore, each);
}

}  // namespace r1fast
#endif
