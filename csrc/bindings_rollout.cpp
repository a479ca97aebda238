#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "block_allocator.hpp"
#include "decode_attention.hpp"
#include "decode_loop.hpp"
#include "sampling.hpp"
#include "tails.hpp"

namespace r1fast {

namespace {

using Int32Array = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

// An array as it lies, of just this type: it may be written.
template <class T>
using Exactly = py::array_t<T, py::array::c_style>;

// Its calls are short and belong to one thread: they keep the GIL.
void bind_block_allocator(py::module_& m) {
  py::class_<BlockAllocator>(m, "BlockAllocator", "Holders of the blocks of a KV cache, and its prefix cache.")
      .def(py::init<int64_t, int64_t, int64_t, int64_t>(), py::arg("num_blocks"), py::arg("block_size"),
           py::arg("max_cached") = -1, py::arg("hash_bits") = 64)
      .def_property_readonly("num_blocks", &BlockAllocator::num_blocks)
      .def_property_readonly("block_size", &BlockAllocator::block_size)
      .def_property_readonly("num_used", &BlockAllocator::num_used)
      .def_property_readonly("num_cached", &BlockAllocator::num_cached)
      .def_property_readonly("num_available", &BlockAllocator::num_available)
      .def_property_readonly("peak_used", &BlockAllocator::peak_used)
      .def("holders", &BlockAllocator::holders, py::arg("block"))
      .def(
          "allocate",
          [](BlockAllocator& self, int64_t count) {
            std::vector<int32_t> blocks(static_cast<size_t>(std::max<int64_t>(std::min(count, self.num_blocks()), 0)));
            self.allocate(count, blocks.data());
            return py::array_t<int32_t>(static_cast<py::ssize_t>(blocks.size()), blocks.data());
          },
          py::arg("count"))
      .def(
          "share", [](BlockAllocator& self, const Int32Array& blocks) { self.share(blocks.data(), blocks.size()); },
          py::arg("blocks"))
      .def(
          "free", [](BlockAllocator& self, const Int32Array& blocks) { self.free(blocks.data(), blocks.size()); },
          py::arg("blocks"))
      .def(
          "lookup",
          [](BlockAllocator& self, const Int32Array& tokens) {
            std::vector<int32_t> found(static_cast<size_t>(tokens.size() / self.block_size()));
            const int64_t count = self.lookup(tokens.data(), tokens.size(), found.data());
            return py::array_t<int32_t>(count, found.data());
          },
          py::arg("tokens"))
      .def(
          "insert",
          [](BlockAllocator& self, const Int32Array& tokens, const Int32Array& blocks) {
            self.insert(tokens.data(), tokens.size(), blocks.data(), blocks.size());
          },
          py::arg("tokens"), py::arg("blocks"))
      .def("reset", &BlockAllocator::reset);
}

// Likewise.
void bind_tails(py::module_& m) {
  const auto exactly = [](const char* arg) { return py::arg(arg).noconvert(); };
  py::class_<Tails>(m, "Tails", "Positions of running sequences that fill no tile yet.")
      .def(py::init<BlockAllocator&, int64_t, int64_t, int64_t, int64_t>(), py::arg("allocator"), py::arg("num_slots"),
           py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("element_bytes"), py::keep_alive<1, 2>())
      .def(
          "add_layer",
          [](Tails& self, uintptr_t keys, uintptr_t values) { self.add_layer(at<void>(keys), at<void>(values)); },
          py::arg("keys"), py::arg("values"))
      .def_property_readonly("num_positions", &Tails::num_positions)
      .def_property_readonly("table",
                             [](const py::object& self) {
                               const auto& tails = self.cast<const Tails&>();
                               return py::array_t<int32_t>({tails.num_slots(), kTile}, tails.table(), self);
                             })
      .def(
          "missing",
          [](const Tails& self, const Exactly<int64_t>& slots, const Exactly<int64_t>& length,
             Exactly<int64_t> num_blocks) {
            return self.missing({slots.data(), slots.size(), length.data(), nullptr, 0, num_blocks.mutable_data()});
          },
          exactly("slots"), exactly("length"), exactly("num_blocks"))
      .def(
          "grow",
          [](Tails& self, const Exactly<int64_t>& slots, const Exactly<int64_t>& length, Exactly<int32_t> blocks,
             Exactly<int64_t> num_blocks) {
            return self.grow({slots.data(), slots.size(), length.data(), blocks.mutable_data(), blocks.shape(1),
                              num_blocks.mutable_data()});
          },
          exactly("slots"), exactly("length"), exactly("blocks"), exactly("num_blocks"))
      .def("adopt", &Tails::adopt, py::arg("slot"), py::arg("block"), py::arg("num_positions"))
      .def("release", &Tails::release, py::arg("slot"));
}

// The plan of kernels/paged_attention.py, without queries.
template <class T>
DecodeProblem<T> who_sees_what(uintptr_t block_table, int64_t max_blocks, uintptr_t tails, int64_t block_size,
                               uintptr_t context_lens, uintptr_t query_starts, uintptr_t group_starts,
                               uintptr_t shared_blocks, int64_t num_groups) {
  DecodeProblem<T> problem{};
  problem.block_table = at<const int32_t>(block_table);
  problem.max_blocks = max_blocks;
  problem.tails = at<const int32_t>(tails);
  problem.tiles_per_block = block_size / kTile;
  problem.context_lens = at<const int32_t>(context_lens);
  problem.query_starts = at<const int32_t>(query_starts);
  problem.group_starts = at<const int32_t>(group_starts);
  problem.shared_blocks = at<const int32_t>(shared_blocks);
  problem.num_groups = num_groups;
  return problem;
}

// The paged cache and decode attention. The caller, kernels/paged_*.py, has checked dtypes, shapes and strides.
void bind_decode(py::module_& m) {
  using Address = uintptr_t;

  m.def(
      "write_kv",
      [](Address keys, Address values, int64_t num_kv_heads, int64_t head_dim, bool bf16, Address k, int64_t ld_k,
         Address v, int64_t ld_v, Address slots, int64_t num_tokens, int64_t num_threads) {
        with_dtype(bf16, [&](auto kind) {
          using T = decltype(kind);
          const PagedCache<T> cache{at<T>(keys), at<T>(values), num_kv_heads, head_dim};
          write_kv(cache, at<const T>(k), ld_k, at<const T>(v), ld_v, at<const int64_t>(slots), num_tokens,
                           num_threads);
        });
      },
      py::arg("keys"), py::arg("values"), py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("bf16"), py::arg("k"),
      py::arg("ld_k"), py::arg("v"), py::arg("ld_v"), py::arg("slots"), py::arg("num_tokens"),
      py::arg("num_threads"), "Stores k and v (N, K, Dh) in their slots of the tiled cache.");

  py::class_<DecodeWorkspace>(m, "DecodeWorkspace", "Memory of decode attention, kept between calls.")
      .def(py::init<>())
      .def(
          "attend",
          [](DecodeWorkspace& self, Address q, Address out, int64_t num_heads, float scale, Address keys,
             Address values, int64_t num_kv_heads, int64_t head_dim, bool bf16, Address block_table,
             int64_t max_blocks, Address tails, int64_t block_size, Address context_lens, Address query_starts,
             Address group_starts, Address shared_blocks, int64_t num_groups, const std::string& level,
             int64_t num_threads) {
            with_dtype(bf16, [&](auto kind) {
              using T = decltype(kind);
              DecodeProblem<T> problem = who_sees_what<T>(block_table, max_blocks, tails, block_size, context_lens,
                                                          query_starts, group_starts, shared_blocks, num_groups);
              problem.q = at<const T>(q);
              problem.out = at<T>(out);
              problem.num_heads = num_heads;
              problem.scale = scale;
              const PagedCache<T> cache{at<T>(keys), at<T>(values), num_kv_heads, head_dim};
              self.run(problem, cache, level, num_threads);
            });
          },
          py::arg("q"), py::arg("out"), py::arg("num_heads"), py::arg("scale"), py::arg("keys"), py::arg("values"),
          py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("bf16"), py::arg("block_table"),
          py::arg("max_blocks"), py::arg("tails"), py::arg("block_size"), py::arg("context_lens"),
          py::arg("query_starts"), py::arg("group_starts"), py::arg("shared_blocks"), py::arg("num_groups"),
          py::arg("level"),
          py::arg("num_threads"), "out (Nq, H, Dh): attention of q over the tiled cache.");
}

#if defined(__x86_64__)
template <class T, class Tiles>
void bind_decoder_of(py::module_& m, const char* name) {
  using Address = uintptr_t;
  using Native = Decoder<T, Tiles>;
  using Linear = typename Native::Linear;
  py::class_<Native>(m, name, "The decoder's forward over packed weights and a tiled cache.")
      .def(py::init([](int64_t width, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t mlp_width,
                       float eps, Address embedding, int64_t ld_embedding, Address norm) {
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
            const typename Native::Step step{
                at<const int64_t>(tokens), at<const int64_t>(positions), at<const int64_t>(slots), num_tokens,
                at<const float>(rotations),
                who_sees_what<T>(block_table, max_blocks, tails, block_size, context_lens, query_starts, group_starts,
                                 shared_blocks, num_groups)};
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
            const LoopRows rows{tokens.mutable_data(),
                                logprobs.mutable_data(),
                                truncated.mutable_data(),
                                entropies ? entropies->mutable_data() : nullptr,
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

// The decoder's own products and what stands between them. The caller, rollout/native.py, has checked shapes and strides.
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

// The caller, kernels/sample.py, has checked dtypes and shapes; 0 is the address of what is absent.
void bind_sample(py::module_& m) {
  using Address = uintptr_t;

  m.def(
      "sample",
      [](Address logits, int64_t ld, bool bf16, int64_t num_rows, int64_t vocab_size, Address u, Address temperature,
         Address top_k, Address top_p, Address min_p, Address tokens, Address logprobs, Address truncated_logprobs,
         Address is_bad, Address row_starts, Address ids, Address penalty, Address bias, Address given,
         Address entropies, int64_t num_top, Address top_ids, Address top_logprobs, const std::string& level,
         int64_t num_threads) {
        with_dtype(bf16, [&](auto kind) {
          using T = decltype(kind);
          const SampleProblem<T> problem{at<const T>(logits),
                                                 ld,
                                                 num_rows,
                                                 vocab_size,
                                                 at<const double>(u),
                                                 at<const float>(temperature),
                                                 at<const int64_t>(top_k),
                                                 at<const float>(top_p),
                                                 at<const float>(min_p),
                                                 at<int64_t>(tokens),
                                                 at<float>(logprobs),
                                                 at<float>(truncated_logprobs),
                                                 at<bool>(is_bad),
                                                 at<const int64_t>(row_starts),
                                                 at<const int64_t>(ids),
                                                 at<const float>(penalty),
                                                 at<const float>(bias),
                                                 at<const int64_t>(given),
                                                 at<float>(entropies),
                                                 num_top,
                                                 at<int64_t>(top_ids),
                                                 at<float>(top_logprobs)};
          sample(problem, level, num_threads);
        });
      },
      py::arg("logits"), py::arg("ld"), py::arg("bf16"), py::arg("num_rows"), py::arg("vocab_size"), py::arg("u"),
      py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"), py::arg("tokens"),
      py::arg("logprobs"), py::arg("truncated_logprobs"), py::arg("is_bad"), py::arg("row_starts"), py::arg("ids"),
      py::arg("penalty"), py::arg("bias"), py::arg("given"), py::arg("entropies"), py::arg("num_top"),
      py::arg("top_ids"), py::arg("top_logprobs"), py::arg("level"), py::arg("num_threads"),
      "A token and its log-probability, a row.");
}

}  // namespace

void bind_rollout(py::module_& m) {
  bind_block_allocator(m);
  bind_tails(m);
  bind_decoder(m);
  bind_decode(m);
  bind_sample(m);
}

}  // namespace r1fast
