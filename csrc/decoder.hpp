// The decoder's forward for rollouts, without autograd: one call a step, over weights packed once and memory that is kept.
//
//   x = x + o(attend(rope(norm(q)), rope(norm(k)), v))      q, k, v = qkv(rms_norm(x))
//   x = x + down(silu(gate) * up)                           gate, up = gate_up(rms_norm(x))
//
// A layer with low-rank adapters is one product too: (x, x A^T) (W, B)^T, over rows that have their x A^T behind them.
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

  struct Product {
    const Linear* weight;    // (N, D), or (N, round_up(D, kWholeTiles) + R) with adapters: W, zeros, B
    const Linear* low_rank;  // A (R, D), or null

    int64_t tail() const { return low_rank == nullptr ? 0 : low_rank->num_out(); }
    double steps(int64_t n) const { return weight->steps(n) + (low_rank == nullptr ? 0 : low_rank->steps(n)); }
  };

  struct Layer {
    const T* attn_norm;
    const T* q_norm;  // (Dh) or null
    const T* k_norm;
    const T* mlp_norm;
    Product qkv;
    Product o;
    Product gate_up;
    Product down;
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
    check_range("width", shape.width, 1, INT32_MAX);
    check_range("num_heads", shape.num_heads, 1, 1 << 20);
    check_range("num_kv_heads", shape.num_kv_heads, 1, shape.num_heads);
    check_range("head_dim", shape.head_dim, 2, 1024);
    check_range("mlp_width", shape.mlp_width, 1, INT32_MAX);
    if (shape.num_heads % shape.num_kv_heads != 0 || shape.head_dim % 2 != 0) {
      throw std::invalid_argument("num_heads must be a multiple of num_kv_heads, and head_dim even");
    }
    check_range("ld_embedding", ld_embedding, shape.width);
    check_array("embedding", reinterpret_cast<uintptr_t>(embedding), shape.width, sizeof(T));
    check_array("norm", reinterpret_cast<uintptr_t>(norm), shape.width, sizeof(T));
  }

  const DecoderShape& shape() const { return shape_; }
  void add_layer(const Layer& layer) {
    const DecoderShape& s = shape_;
    const int64_t mixed_width = s.num_heads * s.head_dim;
    check_product_of("qkv", layer.qkv, s.width, mixed_width + 2 * s.num_kv_heads * s.head_dim, 1);
    check_product_of("o", layer.o, mixed_width, s.width, 1);
    check_product_of("gate_up", layer.gate_up, s.width, s.mlp_width, 2);
    check_product_of("down", layer.down, s.mlp_width, s.width, 1);
    for (const T* weight : {layer.attn_norm, layer.mlp_norm}) {
      check_array("a norm", reinterpret_cast<uintptr_t>(weight), s.width, sizeof(T));
    }
    for (const T* weight : {layer.q_norm, layer.k_norm}) {
      check_optional("a norm", reinterpret_cast<uintptr_t>(weight), s.head_dim, sizeof(T));
    }
    if ((layer.q_norm == nullptr) != (layer.k_norm == nullptr)) {
      throw std::invalid_argument("both of q and k have a norm, or neither");
    }
    for (const T* cache : {layer.keys, layer.values}) {
      check_array("the cache", reinterpret_cast<uintptr_t>(cache), kTile * s.num_kv_heads * s.head_dim, sizeof(T));
    }
    layers_.push_back(layer);
    h_tail_ = std::max({h_tail_, layer.qkv.tail(), layer.gate_up.tail()});
    mixed_tail_ = std::max(mixed_tail_, layer.o.tail());
    mlp_tail_ = std::max(mlp_tail_, layer.down.tail());
  }

  // hidden (N, D): after the final norm. Keys and values are written before a layer attends.
  void run(const Step& step, T* hidden, int64_t ld_hidden, int64_t num_threads) {
    const double steps = prepare(step, num_threads);
    run_team(worthwhile_threads(num_threads, steps), [&](Member& each) { forward(step, hidden, ld_hidden, each); });
  }

  // Memory for a step of so many tokens, and who attends to what; then `forward`, in no more threads. Returns the
  // multiply-adds, about.
  double prepare(const Step& step, int64_t num_threads) {
    const DecoderShape& s = shape_;
    const int64_t n = step.num_tokens, mixed_width = s.num_heads * s.head_dim;
    x_.reserve(n, s.width);
    h_.reserve(n, with_tail(s.width, h_tail_));
    qkv_.reserve(n, mixed_width + 2 * s.num_kv_heads * s.head_dim);
    q_.reserve(n, mixed_width);
    attended_.reserve(n, mixed_width);
    mixed_.reserve(n, with_tail(mixed_width, mixed_tail_));
    mlp_.reserve(n, with_tail(s.mlp_width, mlp_tail_));
    double steps = attention_.prepare(attention_of(step), s.num_kv_heads, s.head_dim, num_threads);
    if (layers_.empty()) return steps;
    const Layer& layer = layers_.front();
    for (const Product* product : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) steps += product->steps(n);
    return steps * static_cast<double>(layers_.size());
  }

  // The same rows, each at its next position.
  void go_on(const Step& step, int64_t num_threads) {
    attention_.go_on(attention_of(step), shape_.num_kv_heads, shape_.head_dim, num_threads);
  }

  // What each member of a team does.
  void forward(const Step& step, T* hidden, int64_t ld_hidden, Member& each) {
    const int64_t n = step.num_tokens;
    for_rows(n, each, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* const from = embedding_ + step.tokens[i] * ld_embedding_;
        std::copy(from, from + shape_.width, x_.data() + i * x_.ld());
      }
    });
    for (const Layer& layer : layers_) {
      norm(layer.attn_norm, n, h_.data(), h_.ld(), each);
      product(layer.qkv, h_.data(), h_.ld(), shape_.width, n, qkv_, After::kStore, each);
      attend(step, layer, each);
      norm(layer.mlp_norm, n, h_.data(), h_.ld(), each);
      product(layer.gate_up, h_.data(), h_.ld(), shape_.width, n, mlp_, After::kSilu, each);
      product(layer.down, mlp_.data(), mlp_.ld(), shape_.mlp_width, n, x_, After::kAdd, each);
    }
    norm(norm_, n, hidden, ld_hidden, each);
  }

 private:
  // Throws unless the product takes rows of `num_in` elements, and those of its adapter behind them, and makes num_out.
  static void check_product_of(const char* name, const Product& p, int64_t num_in, int64_t num_out, int64_t num_halves) {
    const int64_t reads = with_tail(num_in, p.tail());
    const bool is_of_shape = p.weight->num_out() == num_out && p.weight->num_halves() == num_halves &&
                             p.weight->num_in() == reads;
    if (!is_of_shape || (p.low_rank != nullptr && p.low_rank->num_in() != num_in)) {
      throw std::invalid_argument(std::string(name) + " must be a weight of " + std::to_string(num_out * num_halves) +
                                  " x " + std::to_string(reads) + (num_halves == 2 ? ", halved" : "") +
                                  ", and its adapter of as many inputs as there are");
    }
  }

  // Where x A^T begins: behind what a product of x alone reads, so that the gap stays 0.
  static int64_t tail_start(int64_t width) { return round_up(width, kWholeTiles); }
  static int64_t with_tail(int64_t width, int64_t tail) { return tail == 0 ? width : tail_start(width) + tail; }

  // y of x (n, width), whose rows have room for a tail.
  static void product(const Product& p, T* x, int64_t ld, int64_t width, int64_t n, const RowBuffer<T>& y, After after,
                      Member& each) {
    if (p.low_rank != nullptr) p.low_rank->run(x, ld, n, x + tail_start(width), ld, After::kStore, each);
    p.weight->run(x, ld, n, y.data(), y.ld(), after, each);
  }

  void norm(const T* weight, int64_t n, T* y, int64_t ld_y, Member& each) const {
    for_rows(n, each, [&](int64_t begin, int64_t end) {
      Tiles::Rows::norm_rows(static_cast<const T*>(x_.data()), x_.ld(), weight, shape_.eps, shape_.width, y, ld_y,
                             begin, end);
    });
  }

  DecodeProblem<T> attention_of(const Step& step) const {
    DecodeProblem<T> problem = step.attention;
    problem.q = q_.data();
    problem.out = attended_.data();
    problem.num_heads = shape_.num_heads;
    problem.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(shape_.head_dim)));
    return problem;
  }

  // x = x + o(attend(...)), from qkv_.
  void attend(const Step& step, const Layer& layer, Member& each) {
    const DecoderShape& s = shape_;
    const int64_t n = step.num_tokens;
    const PagedCache<T> cache{layer.keys, layer.values, s.num_kv_heads, s.head_dim};
    const HeadsCall<T> heads{qkv_.data(), qkv_.ld(),      layer.q_norm,   layer.k_norm, s.eps,
                             step.rotations, step.positions, s.num_heads, q_.data()};
    for_rows(n, each, [&](int64_t begin, int64_t end) { write_heads<Tiles>(heads, cache, step.slots, begin, end); });
    attention_.attend(attention_of(step), cache, kernels_, each);
    // with rows mixed_.ld() apart; what lies between them stays 0: a NaN of one row must not reach another
    const int64_t width = s.num_heads * s.head_dim;
    const bool is_apart = mixed_.ld() != width;
    if (is_apart) {
      for_rows(n, each, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          std::copy(attended_.data() + i * width, attended_.data() + (i + 1) * width, mixed_.data() + i * mixed_.ld());
        }
      });
    }
    T* const mixed = is_apart ? mixed_.data() : attended_.data();
    product(layer.o, mixed, mixed_.ld(), width, n, x_, After::kAdd, each);
  }

  DecoderShape shape_;
  const T* embedding_;
  int64_t ld_embedding_;
  const T* norm_;
  std::vector<Layer> layers_;
  int64_t h_tail_ = 0, mixed_tail_ = 0, mlp_tail_ = 0;
  RowBuffer<T> x_, h_, qkv_, q_, attended_, mixed_, mlp_;
  DecodeWorkspace attention_;
  StripKernels<T> kernels_ = strip_kernels<T>("auto");
};

}  // namespace r1fast
#endif
