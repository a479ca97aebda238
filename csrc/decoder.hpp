// The decoder's forward for rollouts, without autograd: one call a step, over weights packed once and memory that is kept.
//
//   x = x + o(attend(rope(norm(q)), rope(norm(k)), v))      q, k, v = qkv(rms_norm(x))
//   x = x + down(silu(gate) * up)                           gate, up = gate_up(rms_norm(x))
//
// The layer of r1fast/model.py, rounded in the same places. A row's hidden state is the same bits whatever rows are beside it.
#pragma once

#include "decode_attention.hpp"
#include "decoder_rows.hpp"

#if defined(__x86_64__)
namespace r1fast {

constexpr int64_t kWholeTiles = 32;  // rows and elements that a product may read at once

// Rows that products read in whole tiles: there is memory behind them, and what is in it is finite.
template <class T>
class RowBuffer {
 public:
  void reserve(int64_t num_rows, int64_t width) {
    const int64_t rows = round_up(num_rows, kWholeTiles), ld = round_up(width, kWholeTiles);
    if (rows * ld > capacity_) {
      capacity_ = rows * ld;
      memory_ = std::make_unique<AlignedBuffer<T>>(capacity_);
      std::fill(memory_->data(), memory_->data() + capacity_, T{});
    }
    ld_ = ld;
  }
  T* data() const { return memory_->data(); }
  int64_t ld() const { return ld_; }

 private:
  std::unique_ptr<AlignedBuffer<T>> memory_;
  int64_t capacity_ = 0, ld_ = 0;
};

struct DecoderShape {
  int64_t width;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t mlp_width;
  float eps;
};

template <class T, class Tiles>
class Decoder {
 public:
  using Linear = PackedLinear<T, Tiles>;

  struct Layer {
    const T* attn_norm;
    const T* q_norm;  // (Dh) or null
    const T* k_norm;
    const T* mlp_norm;
    const Linear* qkv;
    const Linear* o;
    const Linear* gate_up;
    const Linear* down;
    T* keys;  // of the tiled cache
    T* values;
  };

  struct Step {
    const int64_t* tokens;     // (N)
    const int64_t* positions;  // (N)
    const int64_t* slots;      // (N): where keys and values go
    int64_t num_tokens;
    const float* rotations;       // (P, 2 Dh), P above every position
    DecodeProblem<T> attention;  // but for q, out, heads and scale
  };

  Decoder(const DecoderShape& shape, const T* embedding, int64_t ld_embedding, const T* norm)
      : shape_(shape), embedding_(embedding), ld_embedding_(ld_embedding), norm_(norm) {
    if (shape.head_dim > 1024) throw std::invalid_argument("head_dim above 1024");
  }

  void add_layer(const Layer& layer) { layers_.push_back(layer); }

  // hidden (N, D): after the final norm. Keys and values are written before a layer attends.
  void run(const Step& step, T* hidden, int64_t ld_hidden, int64_t num_threads) {
    const DecoderShape& s = shape_;
    const int64_t n = step.num_tokens, mixed_width = s.num_heads * s.head_dim;
    x_.reserve(n, s.width);
    h_.reserve(n, s.width);
    qkv_.reserve(n, mixed_width + 2 * s.num_kv_heads * s.head_dim);
    q_.reserve(n, mixed_width);
    attended_.reserve(n, mixed_width);
    mixed_.reserve(n, mixed_width);
    mlp_.reserve(n, s.mlp_width);
    for (int64_t i = 0; i < n; ++i) {
      const T* const from = embedding_ + step.tokens[i] * ld_embedding_;
      std::copy(from, from + s.width, x_.data() + i * x_.ld());
    }
    for (const Layer& layer : layers_) {
      norm(layer.attn_norm, n, h_.data(), h_.ld(), num_threads);
      layer.qkv->run(h_.data(), h_.ld(), n, qkv_.data(), qkv_.ld(), After::kStore, num_threads);
      attend(step, layer, num_threads);
      norm(layer.mlp_norm, n, h_.data(), h_.ld(), num_threads);
      layer.gate_up->run(h_.data(), h_.ld(), n, mlp_.data(), mlp_.ld(), After::kSilu, num_threads);
      layer.down->run(mlp_.data(), mlp_.ld(), n, x_.data(), x_.ld(), After::kAdd, num_threads);
    }
    norm(norm_, n, hidden, ld_hidden, num_threads);
  }

 private:
  void norm(const T* weight, int64_t n, T* y, int64_t ld_y, int64_t num_threads) const {
    rms_norm(static_cast<const T*>(x_.data()), x_.ld(), weight, shape_.eps, n, shape_.width, y, ld_y, num_threads);
  }

  // x = x + o(attend(...)), from qkv_.
  void attend(const Step& step, const Layer& layer, int64_t num_threads) {
    const DecoderShape& s = shape_;
    const int64_t n = step.num_tokens;
    const PagedCache<T> cache{layer.keys, layer.values, s.num_kv_heads, s.head_dim};
    const HeadsCall<T> heads{qkv_.data(), qkv_.ld(),      layer.q_norm,   layer.k_norm, s.eps,
                             step.rotations, step.positions, s.num_heads, q_.data()};
    write_heads(heads, cache, step.slots, n, num_threads);
    DecodeProblem<T> problem = step.attention;
    problem.q = q_.data();
    problem.out = attended_.data();
    problem.num_heads = s.num_heads;
    problem.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(s.head_dim)));
    attention_.run(problem, cache, "auto", num_threads);
    layer.o->run(mixed(n), mixed_.ld(), n, x_.data(), x_.ld(), After::kAdd, num_threads);
  }

  // What attention has written side by side, with its rows `mixed_.ld()` apart. What lies between them stays 0: a NaN of
  // one row must not reach another.
  const T* mixed(int64_t n) {
    const int64_t width = shape_.num_heads * shape_.head_dim, ld = mixed_.ld();
    if (ld == width) return attended_.data();
    for (int64_t i = 0; i < n; ++i) {
      std::copy(attended_.data() + i * width, attended_.data() + (i + 1) * width, mixed_.data() + i * ld);
    }
    return mixed_.data();
  }

  DecoderShape shape_;
  const T* embedding_;
  int64_t ld_embedding_;
  const T* norm_;
  std::vector<Layer> layers_;
  RowBuffer<T> x_, h_, qkv_, q_, attended_, mixed_, mlp_;
  DecodeWorkspace attention_;
};

}  // namespace r1fast
#endif
