// The CPU's own forward of a decoder: packed weights, the decoder, whole decode steps.
#include "bindings_arrays.hpp"
#include "decode_loop.hpp"

namespace r1fast {

namespace {

#if defined(__x86_64__)
// Throws where this CPU lacks the instructions.
template <class Tiles>
void check_has() {
  bool is_here = best_level() >= Level::kAvx2;
  if constexpr (std::is_same_v<Tiles, Avx512Tiles>) is_here = best_level() == Level::kAvx512;
  if constexpr (std::is_same_v<Tiles, AmxTiles>) is_here = amx_supported();
  if (!is_here) throw std::invalid_argument("this CPU has no such instructions; native_level says what it has");
}

template <class T, class Tiles>
void bind_decoder_of(py::module_& m, const char* name) {
  using Address = uintptr_t;
  using Native = Decoder<T, Tiles>;
  using Linear = typename Native::Linear;
  py::class_<Native>(m, name, "The decoder's forward over packed weights and a tiled cache.")
      .def(py::init([](int64_t width, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t mlp_width,
                       float eps, Address embedding, int64_t ld_embedding, Address norm) {
             check_has<Tiles>();
             return std::make_unique<Native>(
                 DecoderShape{width, num_heads, num_kv_heads, head_dim, mlp_width, eps},
                 at<const T>(embedding), ld_embedding, at<const T>(norm));
           }),
           py::arg("width"), py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"),
           py::arg("mlp_width"), py::arg("eps"), py::arg("embedding"), py::arg("ld_embedding"), py::arg("norm"))
      .def(
          "add_layer",
          [](Native& self, Address attn_norm, Address q_norm, Address k_norm, Address mlp_norm, const Linear& qkv,
             const Linear& o, const Linear& gate_up, const Linear& down, Address keys, Address values,
             const Linear* qkv_a, const Linear* o_a, const Linear* gate_up_a, const Linear* down_a) {
            self.add_layer({at<const T>(attn_norm), at<const T>(q_norm), at<const T>(k_norm), at<const T>(mlp_norm),
                            {&qkv, qkv_a}, {&o, o_a}, {&gate_up, gate_up_a}, {&down, down_a},
                            at<T>(keys), at<T>(values)});
          },
          py::arg("attn_norm"), py::arg("q_norm"), py::arg("k_norm"), py::arg("mlp_norm"), py::arg("qkv"),
          py::arg("o"), py::arg("gate_up"), py::arg("down"), py::arg("keys"), py::arg("values"),
          py::arg("qkv_a") = nullptr, py::arg("o_a") = nullptr, py::arg("gate_up_a") = nullptr,
          py::arg("down_a") = nullptr, py::keep_alive<1, 6>(), py::keep_alive<1, 7>(), py::keep_alive<1, 8>(),
          py::keep_alive<1, 9>(), py::keep_alive<1, 12>(), py::keep_alive<1, 13>(), py::keep_alive<1, 14>(),
          py::keep_alive<1, 15>())
      .def(
          "run",
          [](Native& self, Address tokens, Address positions, Address slots, int64_t num_tokens, Address rotations,
             Address block_table, int64_t max_blocks, Address tails, int64_t block_size, Address context_lens,
             Address query_starts, Address group_starts, Address shared_blocks, int64_t num_groups, Address hidden,
             int64_t ld_hidden, int64_t num_threads) {
            py::gil_scoped_release release;
            check_range("num_tokens", num_tokens, 0, INT32_MAX);
            check_threads(num_threads);
            check_array("tokens", tokens, num_tokens, kInt64);
            check_array("positions", positions, num_tokens, kInt64);
            check_array("slots", slots, num_tokens, kInt64);
            check_each("tokens", at<const int64_t>(tokens), num_tokens, 0, INT32_MAX);
            check_each("positions", at<const int64_t>(positions), num_tokens, 0, INT32_MAX);
            check_array("rotations", rotations, num_tokens == 0 ? 0 : 2 * self.shape().head_dim, kFloat);
            check_rows("hidden", hidden, num_tokens, self.shape().width, ld_hidden, sizeof(T), true);
            const typename Native::Step step{
                at<const int64_t>(tokens), at<const int64_t>(positions), at<const int64_t>(slots), num_tokens,
                at<const float>(rotations),
                who_sees_what<T>(block_table, max_blocks, tails, block_size, context_lens, query_starts, group_starts,
                                 shared_blocks, num_groups)};
            check_range("the queries of the plan", step.attention.check(), num_tokens, num_tokens);
            self.run(step, at<T>(hidden), ld_hidden, num_threads);
          },
          py::arg("tokens"), py::arg("positions"), py::arg("slots"), py::arg("num_tokens"), py::arg("rotations"),
          py::arg("block_table"), py::arg("max_blocks"), py::arg("tails"), py::arg("block_size"),
          py::arg("context_lens"), py::arg("query_starts"), py::arg("group_starts"), py::arg("shared_blocks"),
          py::arg("num_groups"), py::arg("hidden"), py::arg("ld_hidden"), py::arg("num_threads"));
}

template <class T, class Tiles>
void bind_decode_loop_of(py::module_& m, const char* name) {
  using Loop = DecodeLoop<T, Tiles>;
  const auto exactly = [](const char* arg) { return py::arg(arg).noconvert(); };
  py::class_<Loop>(m, name, "Decode steps of all running rows: forward, head, draw, append.")
      .def(py::init<typename Loop::Native&, const typename Loop::Linear&, int64_t>(), py::arg("decoder"),
           py::arg("head"), py::arg("vocab_size"), py::keep_alive<1, 2>(), py::keep_alive<1, 3>())
      .def(
          "run",
          [](Loop& self, Exactly<int64_t> tokens, Exactly<float> logprobs, Exactly<float> truncated,
             std::optional<Exactly<float>> entropies, Exactly<int32_t> blocks, Tails* tails, Exactly<int64_t> length,
             Exactly<int64_t> num_blocks, const Exactly<int64_t>& prompt_length, const Exactly<int64_t>& limit,
             const Exactly<int64_t>& seed, const Exactly<float>& temperature, const Exactly<int64_t>& top_k,
             const Exactly<float>& top_p, const Exactly<float>& min_p, const Exactly<bool>& ignore_eos,
             const Exactly<int64_t>& stop_ids, const Exactly<bool>& is_eos, const Exactly<int64_t>& slots,
             const Exactly<int32_t>& group_starts, const Exactly<int32_t>& shared_blocks, BlockAllocator& allocator,
             uintptr_t rotations, int64_t max_steps, double max_seconds, int64_t num_threads) {
            const int64_t num_slots = length.size();
            check_shape("tokens", tokens, {num_slots, -1});
            for (const py::array& x : {py::array(logprobs), py::array(truncated)}) {
              check_shape("logprobs and truncated", x, {num_slots, tokens.shape(1)});
            }
            if (entropies) check_shape("entropies", *entropies, {num_slots, tokens.shape(1)});
            check_shape("blocks", blocks, {num_slots, -1});
            for (const py::array& x : {py::array(length), py::array(num_blocks), py::array(prompt_length), py::array(limit),
                                       py::array(seed), py::array(temperature), py::array(top_k), py::array(top_p),
                                       py::array(min_p), py::array(ignore_eos)}) {
              check_shape("an array over slots", x, {num_slots});
            }
            check_shape("stop_ids", stop_ids, {num_slots, -1});
            check_shape("is_eos", is_eos, {self.vocab_size()});
            check_shape("slots", slots, {-1});
            check_shape("shared_blocks", shared_blocks, {-1});
            check_shape("group_starts", group_starts, {shared_blocks.size() + 1});
            check_array("rotations", rotations, 1, kFloat);
            const LoopRows rows{tokens.mutable_data(),
                                logprobs.mutable_data(),
                                truncated.mutable_data(),
                                entropies ? entropies->mutable_data() : nullptr,
                                num_slots,
                                tokens.shape(1),
                                blocks.mutable_data(),
                                blocks.shape(1),
                                tails,
                                length.mutable_data(),
                                num_blocks.mutable_data(),
                                prompt_length.data(),
                                limit.data(),
                                seed.data(),
                                temperature.data(),
                                top_k.data(),
                                top_p.data(),
                                min_p.data(),
                                ignore_eos.data(),
                                stop_ids.data(),
                                stop_ids.shape(1),
                                is_eos.data(),
                                slots.data(),
                                slots.size(),
                                group_starts.data(),
                                shared_blocks.data(),
                                shared_blocks.size()};
            self.check(rows, allocator, max_steps, num_threads);
            py::array_t<uint8_t> outcomes(slots.size());
            auto* const written = reinterpret_cast<Outcome*>(outcomes.mutable_data());
            int64_t num_steps = 0;
            {
              py::gil_scoped_release release;
              num_steps = self.run(rows, allocator, max_steps, max_seconds, at<const float>(rotations), num_threads,
                                   written);
            }
            return py::make_tuple(num_steps, outcomes);
          },
          exactly("tokens"), exactly("logprobs"), exactly("truncated"), exactly("entropies"), exactly("blocks"),
          py::arg("tails").none(true), exactly("length"), exactly("num_blocks"), exactly("prompt_length"), exactly("limit"), exactly("seed"),
          exactly("temperature"), exactly("top_k"), exactly("top_p"), exactly("min_p"), exactly("ignore_eos"),
          exactly("stop_ids"), exactly("is_eos"), exactly("slots"), exactly("group_starts"), exactly("shared_blocks"),
          py::arg("allocator"), py::arg("rotations"), py::arg("max_steps"), py::arg("max_seconds"),
          py::arg("num_threads"));
}
#endif

// The decoder's own products and what stands between them, called by rollout/native.py.
}  // namespace

void bind_decoder(py::module_& m) {
  using Address = uintptr_t;
#if defined(__x86_64__)
  py::enum_<After>(m, "After").value("store", After::kStore).value("add", After::kAdd).value("silu", After::kSilu);

  const auto bind_linear = [&m](auto kind, auto tiles, const char* name) {
    using T = decltype(kind);
    using Linear = PackedLinear<T, decltype(tiles)>;
    py::class_<Linear>(m, name, "A weight (N, D) packed for x W^T.")
        .def(py::init([](Address weight, int64_t ld, Address bias, int64_t num_out, int64_t num_in, bool halved,
                         int64_t num_threads) {
               check_has<decltype(tiles)>();
               check_range("num_out", num_out, 1, INT32_MAX);
               check_range("num_in", num_in, 1, INT32_MAX);
               check_threads(num_threads);
               check_rows("weight", weight, num_out, num_in, ld, sizeof(T));
               check_optional("bias", bias, num_out, sizeof(T));
               check_product("the packed weight", num_out, num_in, 2 * sizeof(T));
               if (halved && num_out % 2 != 0) throw std::invalid_argument("halved weights have an even num_out");
               py::gil_scoped_release release;
               return std::make_unique<Linear>(at<const T>(weight), ld, at<const T>(bias), num_out, num_in, halved,
                                               num_threads);
             }),
             py::arg("weight"), py::arg("ld"), py::arg("bias"), py::arg("num_out"), py::arg("num_in"),
             py::arg("halved"), py::arg("num_threads"))
        .def_property_readonly("num_bytes", &Linear::num_bytes)
        .def_property_readonly("words_read", &Linear::words_read)
        .def(
            "run",
            [](const Linear& self, Address x, int64_t ld_x, int64_t num_rows, Address y, int64_t ld_y, After after,
               bool to_float32, int64_t num_threads) {
              constexpr int64_t kPerWord = sizeof(Word) / sizeof(T);
              const int64_t read = self.words_read() * kPerWord;
              check_range("num_rows", num_rows, 0, INT32_MAX);
              check_threads(num_threads);
              if (ld_x % kPerWord != 0 || x % sizeof(Word) != 0) throw std::invalid_argument("rows of x must be whole words");
              if (to_float32 && sizeof(T) != kFloat && after != After::kStore) throw std::invalid_argument("float32 is stored alone");
              check_rows("x", x, num_rows, read, ld_x, sizeof(T));
              check_rows("y", y, num_rows, self.num_out(), ld_y, to_float32 ? kFloat : sizeof(T), true);
              py::gil_scoped_release release;
              const Alone each{worthwhile_threads(num_threads, self.steps(num_rows))};
              if (to_float32) {
                self.run(at<const T>(x), ld_x, num_rows, at<float>(y), ld_y, after, each);
              } else {
                self.run(at<const T>(x), ld_x, num_rows, at<T>(y), ld_y, after, each);
              }
            },
            py::arg("x"), py::arg("ld_x"), py::arg("num_rows"), py::arg("y"), py::arg("ld_y"), py::arg("after"),
            py::arg("to_float32"), py::arg("num_threads"));
  };
  bind_linear(0.0f, Avx512Tiles{}, "PackedLinearF32");
  bind_linear(Bf16{}, Avx512Tiles{}, "PackedLinearBF16");
  bind_linear(Bf16{}, AmxTiles{}, "PackedLinearAMX");
  bind_linear(0.0f, Avx2Tiles{}, "PackedLinearF32AVX2");
  bind_linear(Bf16{}, Avx2Tiles{}, "PackedLinearBF16AVX2");

  bind_decoder_of<float, Avx512Tiles>(m, "DecoderF32");
  bind_decoder_of<Bf16, Avx512Tiles>(m, "DecoderBF16");
  bind_decoder_of<Bf16, AmxTiles>(m, "DecoderAMX");
  bind_decoder_of<float, Avx2Tiles>(m, "DecoderF32AVX2");
  bind_decoder_of<Bf16, Avx2Tiles>(m, "DecoderBF16AVX2");

  py::enum_<Outcome>(m, "Outcome")
      .value("going", Outcome::kGoing)
      .value("stopped", Outcome::kStopped)
      .value("full", Outcome::kFull)
      .value("bad", Outcome::kBad);
  bind_decode_loop_of<float, Avx512Tiles>(m, "DecodeLoopF32");
  bind_decode_loop_of<Bf16, Avx512Tiles>(m, "DecodeLoopBF16");
  bind_decode_loop_of<Bf16, AmxTiles>(m, "DecodeLoopAMX");
  bind_decode_loop_of<float, Avx2Tiles>(m, "DecodeLoopF32AVX2");
  bind_decode_loop_of<Bf16, Avx2Tiles>(m, "DecodeLoopBF16AVX2");
#endif
}

}  // namespace r1fast
