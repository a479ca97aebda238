// Every Python-visible function of csrc/: reads the arguments, releases the GIL, calls the header. No logic here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "block_allocator.hpp"
#include "decode_attention.hpp"
#include "decoder.hpp"
#include "epilogue.hpp"
#include "group_packing.hpp"
#include "head.hpp"
#include "packing.hpp"
#include "sampling.hpp"

namespace py = pybind11;

namespace {

std::string type_name(py::handle value) { return Py_TYPE(value.ptr())->tp_name; }

int64_t to_int64(py::handle value, const std::string& what) {
  if (PyBool_Check(value.ptr()) || !PyIndex_Check(value.ptr())) {
    throw py::type_error(what + " must be an integer, got " + type_name(value) + " " +
                         std::string(py::repr(value)));
  }
  const auto integer = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!integer) throw py::error_already_set();
  int overflow = 0;
  const int64_t result = PyLong_AsLongLongAndOverflow(integer.ptr(), &overflow);
  if (overflow != 0) {
    throw py::value_error(what + " does not fit in 64 bits: " + std::string(py::repr(value)));
  }
  return result;
}

// A list or tuple of integers, or a 1-d integer array (numpy, or what numpy can view). Copied, so that the caller
// may change its array while the GIL is released.
std::vector<int64_t> to_lengths(const py::object& values) {
  if (PyList_Check(values.ptr()) || PyTuple_Check(values.ptr())) {
    std::vector<int64_t> lengths(PySequence_Fast_GET_SIZE(values.ptr()));
    for (size_t i = 0; i < lengths.size(); ++i) {
      PyObject* item = PySequence_Fast_GET_ITEM(values.ptr(), i);
      lengths[i] = to_int64(item, "lengths[" + std::to_string(i) + "]");
    }
    return lengths;
  }
  const py::array array = py::array::ensure(values);
  if (!array) PyErr_Clear();
  if (!array || (array.dtype().kind() != 'i' && array.dtype().kind() != 'u') || array.ndim() != 1) {
    std::string got = type_name(values);
    if (array) {
      got += " of dtype " + std::string(py::str(array.dtype())) + " with " + std::to_string(array.ndim()) +
             " dimension(s)";
    }
    throw py::type_error("lengths must be a list of integers or a 1-d integer array, got " + got);
  }
  const py::array_t<int64_t, py::array::c_style | py::array::forcecast> contiguous(array);
  std::vector<int64_t> lengths(contiguous.data(), contiguous.data() + contiguous.size());
  if (array.dtype().kind() == 'u') {
    for (size_t i = 0; i < lengths.size(); ++i) {
      if (lengths[i] < 0) throw py::value_error("lengths[" + std::to_string(i) + "] does not fit in 64 bits");
    }
  }
  return lengths;
}

std::vector<double> to_costs(const py::object& values, const std::vector<int64_t>& lengths) {
  if (values.is_none()) return {lengths.begin(), lengths.end()};
  const py::array_t<double, py::array::c_style | py::array::forcecast> array(values);
  if (array.ndim() != 1) throw py::type_error("costs must be a list of numbers or a 1-d array");
  return {array.data(), array.data() + array.size()};
}

py::array_t<int64_t> to_array(std::vector<int64_t>&& values) {
  auto* owned = new std::vector<int64_t>(std::move(values));
  const py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<int64_t>*>(p); });
  return py::array_t<int64_t>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

r1fast::FlatBins pack(const py::object& lengths, const py::object& token_budget) {
  const std::vector<int64_t> values = to_lengths(lengths);
  const int64_t budget = to_int64(token_budget, "token_budget");
  py::gil_scoped_release release;
  return r1fast::pack(values, budget);
}

// An address from Tensor.data_ptr(), or 0. The caller, kernels/cpu_head.py, has checked dtypes, shapes and strides.
template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Calls body with an element type of the given dtype.
template <class Body>
void with_dtype(bool bf16, const Body& body) {
  py::gil_scoped_release release;
  if (bf16) {
    body(r1fast::Bf16{});
  } else {
    body(0.0f);
  }
}

#if defined(__x86_64__)
void check_amx(bool amx, bool bf16) {
  if (amx && !(bf16 && r1fast::amx_supported())) throw std::invalid_argument("AMX needs bf16, and a CPU that has it");
}
#endif

// The head. The native_ functions are compiled for x86-64 alone, and run where `head_native` says so.
void bind_head(py::module_& m) {
  using r1fast::Bf16;
  using Address = uintptr_t;

  m.def(
      "head_native",
      [](bool bf16) {
#if defined(__x86_64__)
        return r1fast::native_supported(bf16);
#else
        return false && bf16;
#endif
      },
      py::arg("bf16"), "Whether this CPU runs the native_ functions.");

  m.def(
      "head_amx",
      [] {
#if defined(__x86_64__)
        return r1fast::amx_supported();
#else
        return false;
#endif
      },
      "Whether this CPU, and the kernel, let the native_ functions multiply bf16 on AMX.");

  m.def("head_ld", &r1fast::head_ld, py::arg("num_rows"), "Words between two rows of the transposed E.");

  m.def("head_words", &r1fast::head_words, py::arg("num_rows"), py::arg("vocab_size"), py::arg("bf16"),
        "Words of 32 bits that hold the transposed E.");

  m.def(
      "epilogue",
      [](Address z, int64_t ld, bool bf16, int64_t num_rows, int64_t vocab_size, Address bias, Address target_ids,
         Address anchor, float inv_temperature, float softcap, Address s, Address sz, const std::string& level,
         int64_t num_threads) {
        const r1fast::LogitMap map{at<float>(bias), at<int64_t>(target_ids), at<float>(anchor), inv_temperature,
                                   softcap};
        with_dtype(bf16, [&](auto kind) {
          r1fast::epilogue(at<decltype(kind)>(z), ld, num_rows, vocab_size, map, at<float>(s), at<float>(sz), level,
                           num_threads);
        });
      },
      py::arg("z"), py::arg("ld"), py::arg("bf16"), py::arg("num_rows"), py::arg("vocab_size"), py::arg("bias"),
      py::arg("target_ids"), py::arg("anchor"), py::arg("inv_temperature"), py::arg("softcap"), py::arg("s"),
      py::arg("sz"), py::arg("level"), py::arg("num_threads"), "z (R, V) becomes E in place; s and sz are written.");

  m.def(
      "affine_rows",
      [](Address e, int64_t ld, bool bf16, int64_t num_rows, int64_t vocab_size, Address a, Address b,
         const std::string& level, int64_t num_threads) {
        with_dtype(bf16, [&](auto kind) {
          r1fast::affine_rows(at<decltype(kind)>(e), ld, num_rows, vocab_size, at<float>(a), at<float>(b), level,
                              num_threads);
        });
      },
      py::arg("e"), py::arg("ld"), py::arg("bf16"), py::arg("num_rows"), py::arg("vocab_size"), py::arg("a"),
      py::arg("b"), py::arg("level"), py::arg("num_threads"), "E (R, V) becomes E (a + b log E) in place.");

  m.def(
      "compact_rows",
      [](Address e, int64_t ld, bool bf16, int64_t vocab_size, Address kept, int64_t num_kept, int64_t num_threads) {
        with_dtype(bf16, [&](auto kind) {
          r1fast::compact_rows(at<decltype(kind)>(e), ld, vocab_size, at<int64_t>(kept), num_kept, num_threads);
        });
      },
      py::arg("e"), py::arg("ld"), py::arg("bf16"), py::arg("vocab_size"), py::arg("kept"), py::arg("num_kept"),
      py::arg("num_threads"), "Moves the kept rows of E (R, V) to its head.");

  m.def(
      "narrow_to_bf16",
      [](Address x, int64_t size, int64_t num_threads) {
        py::gil_scoped_release release;
        r1fast::narrow_to_bf16(at<float>(x), size, num_threads);
      },
      py::arg("x"), py::arg("size"), py::arg("num_threads"), "fp32 becomes bf16 in the first half of its memory.");

  m.def("advise_huge_pages", [](Address from, int64_t num_bytes) { r1fast::advise_huge_pages(at<void>(from), num_bytes); },
        py::arg("memory"), py::arg("num_bytes"), "Asks for huge pages where fresh memory is large.");

#if defined(__x86_64__)
  using r1fast::HeadView;
  using r1fast::Word;

  m.def(
      "native_forward",
      [](Address hidden, int64_t ld_hidden, Address weight, int64_t ld_weight, int64_t width, bool bf16, Address bias,
         Address target_ids, Address anchor, float inv_temperature, float softcap, Address e, int64_t ld,
         int64_t num_rows, int64_t vocab_size, Address s, Address sz, bool amx, int64_t num_threads) {
        const r1fast::LogitMap map{at<float>(bias), at<int64_t>(target_ids), at<float>(anchor), inv_temperature,
                                   softcap};
        const HeadView view{at<Word>(e), ld, num_rows, vocab_size};
        check_amx(amx, bf16);
        with_dtype(bf16, [&](auto kind) {
          using T = decltype(kind);
          const auto forward = [&](auto tiles) {
            r1fast::head_forward<decltype(tiles)>(at<const T>(hidden), ld_hidden, at<const T>(weight), ld_weight, width,
                                                  map, view, at<float>(s), at<float>(sz), num_threads);
          };
          if constexpr (sizeof kind == sizeof(Bf16)) {
            if (amx) return forward(r1fast::AmxTiles{});
          }
          forward(r1fast::Avx512Tiles{});
        });
      },
      py::arg("hidden"), py::arg("ld_hidden"), py::arg("weight"), py::arg("ld_weight"), py::arg("width"),
      py::arg("bf16"), py::arg("bias"), py::arg("target_ids"), py::arg("anchor"), py::arg("inv_temperature"),
      py::arg("softcap"), py::arg("e"), py::arg("ld"), py::arg("num_rows"), py::arg("vocab_size"), py::arg("s"),
      py::arg("sz"), py::arg("amx"), py::arg("num_threads"), "Writes E, transposed (or not, if e is 0), s and sz (if not 0).");

  m.def(
      "native_dhidden",
      [](Address e, int64_t ld, int64_t num_rows, int64_t vocab_size, Address weight, int64_t ld_weight,
         int64_t width, bool bf16, Address dhidden, bool amx, int64_t num_threads) {
        const HeadView view{at<Word>(e), ld, num_rows, vocab_size};
        check_amx(amx, bf16);
        with_dtype(bf16, [&](auto kind) {
          if constexpr (sizeof kind == sizeof(Bf16)) {
            if (amx) {
              return r1fast::head_dhidden_amx(view, at<const Bf16>(weight), ld_weight, width, at<float>(dhidden),
                                              num_threads);
            }
          }
          r1fast::head_dhidden(view, at<const decltype(kind)>(weight), ld_weight, width, at<float>(dhidden),
                               num_threads);
        });
      },
      py::arg("e"), py::arg("ld"), py::arg("num_rows"), py::arg("vocab_size"), py::arg("weight"),
      py::arg("ld_weight"), py::arg("width"), py::arg("bf16"), py::arg("dhidden"), py::arg("amx"),
      py::arg("num_threads"),
      "dhidden = E @ W.");

  m.def(
      "native_dweight",
      [](Address e, int64_t ld, int64_t num_rows, int64_t vocab_size, bool bf16, Address x, int64_t ld_x,
         bool x_bf16, int64_t width, Address dweight, int64_t ld_dweight, bool accumulate, bool amx, int64_t num_threads) {
        if (x_bf16 && !bf16) throw std::invalid_argument("an fp32 E takes an fp32 x");
        const HeadView view{at<Word>(e), ld, num_rows, vocab_size};
        check_amx(amx, bf16);
        with_dtype(x_bf16, [&](auto kind) {
          const auto* rows = at<const decltype(kind)>(x);
          const auto dweight_of = [&](auto tiles, auto e_bf16) {
            r1fast::head_dweight<decltype(tiles), decltype(e_bf16)::value>(
                view, rows, ld_x, width, at<float>(dweight), ld_dweight, accumulate, num_threads);
          };
          if constexpr (sizeof kind == sizeof(float)) {
            if (!bf16) return dweight_of(r1fast::Avx512Tiles{}, std::false_type{});
          }
          if (amx) return dweight_of(r1fast::AmxTiles{}, std::true_type{});
          dweight_of(r1fast::Avx512Tiles{}, std::true_type{});
        });
      },
      py::arg("e"), py::arg("ld"), py::arg("num_rows"), py::arg("vocab_size"), py::arg("bf16"), py::arg("x"),
      py::arg("ld_x"), py::arg("x_bf16"), py::arg("width"), py::arg("dweight"), py::arg("ld_dweight"),
      py::arg("accumulate"), py::arg("amx"), py::arg("num_threads"), "dweight = or += E^T @ x, x (R, D).");

  m.def(
      "native_dbias",
      [](Address e, int64_t ld, int64_t num_rows, int64_t vocab_size, bool bf16, Address x, Address dbias,
         bool accumulate, int64_t num_threads) {
        const HeadView view{at<Word>(e), ld, num_rows, vocab_size};
        with_dtype(bf16, [&](auto kind) {
          r1fast::head_dbias<sizeof kind == sizeof(Bf16)>(view, at<float>(x), at<float>(dbias), accumulate,
                                                          num_threads);
        });
      },
      py::arg("e"), py::arg("ld"), py::arg("num_rows"), py::arg("vocab_size"), py::arg("bf16"), py::arg("x"),
      py::arg("dbias"), py::arg("accumulate"), py::arg("num_threads"), "dbias = or += E^T @ x, x (R).");

  m.def(
      "native_affine",
      [](Address e, int64_t ld, int64_t num_rows, int64_t vocab_size, bool bf16, Address a, Address b,
         int64_t num_threads) {
        const HeadView view{at<Word>(e), ld, num_rows, vocab_size};
        with_dtype(bf16, [&](auto kind) {
          r1fast::head_affine<sizeof kind == sizeof(Bf16)>(view, at<float>(a), at<float>(b), num_threads);
        });
      },
      py::arg("e"), py::arg("ld"), py::arg("num_rows"), py::arg("vocab_size"), py::arg("bf16"), py::arg("a"),
      py::arg("b"), py::arg("num_threads"), "E becomes E (a + b log E) in place.");

  m.def(
      "native_compact",
      [](Address e, int64_t ld, int64_t num_rows, int64_t vocab_size, bool bf16, Address kept, int64_t num_kept,
         int64_t num_threads) {
        const HeadView view{at<Word>(e), ld, num_rows, vocab_size};
        py::gil_scoped_release release;
        r1fast::head_compact(view, bf16, at<int64_t>(kept), num_kept, num_threads);
      },
      py::arg("e"), py::arg("ld"), py::arg("num_rows"), py::arg("vocab_size"), py::arg("bf16"), py::arg("kept"),
      py::arg("num_kept"), py::arg("num_threads"), "Moves the kept rows' columns of the transposed E to its head.");
#endif
}

using Int32Array = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

// Its calls are short and belong to one thread: they keep the GIL.
void bind_block_allocator(py::module_& m) {
  using r1fast::BlockAllocator;
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

// The paged cache and decode attention. The caller, kernels/paged_*.py, has checked dtypes, shapes and strides.
void bind_decode(py::module_& m) {
  using Address = uintptr_t;
  using r1fast::DecodeWorkspace;
  using r1fast::PagedCache;

  m.def(
      "write_kv",
      [](Address keys, Address values, int64_t num_kv_heads, int64_t head_dim, bool bf16, Address k, int64_t ld_k,
         Address v, int64_t ld_v, Address slots, int64_t num_tokens, int64_t num_threads) {
        with_dtype(bf16, [&](auto kind) {
          using T = decltype(kind);
          const PagedCache<T> cache{at<T>(keys), at<T>(values), num_kv_heads, head_dim};
          r1fast::write_kv(cache, at<const T>(k), ld_k, at<const T>(v), ld_v, at<const int64_t>(slots), num_tokens,
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
             int64_t max_blocks, int64_t block_size, Address context_lens, Address query_starts, Address group_starts,
             Address shared_blocks, int64_t num_groups, const std::string& level, int64_t num_threads) {
            with_dtype(bf16, [&](auto kind) {
              using T = decltype(kind);
              const r1fast::DecodeProblem<T> problem{at<const T>(q),
                                                     at<T>(out),
                                                     num_heads,
                                                     scale,
                                                     at<const int32_t>(block_table),
                                                     max_blocks,
                                                     block_size / r1fast::kTile,
                                                     at<const int32_t>(context_lens),
                                                     at<const int32_t>(query_starts),
                                                     at<const int32_t>(group_starts),
                                                     at<const int32_t>(shared_blocks),
                                                     num_groups};
              const PagedCache<T> cache{at<T>(keys), at<T>(values), num_kv_heads, head_dim};
              self.run(problem, cache, level, num_threads);
            });
          },
          py::arg("q"), py::arg("out"), py::arg("num_heads"), py::arg("scale"), py::arg("keys"), py::arg("values"),
          py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("bf16"), py::arg("block_table"),
          py::arg("max_blocks"), py::arg("block_size"), py::arg("context_lens"), py::arg("query_starts"),
          py::arg("group_starts"), py::arg("shared_blocks"), py::arg("num_groups"), py::arg("level"),
          py::arg("num_threads"), "out (Nq, H, Dh): attention of q over the tiled cache.");
}

#if defined(__x86_64__)
template <class T, class Tiles>
void bind_decoder_of(py::module_& m, const char* name) {
  using Address = uintptr_t;
  using Decoder = r1fast::Decoder<T, Tiles>;
  using Linear = typename Decoder::Linear;
  py::class_<Decoder>(m, name, "The decoder's forward over packed weights and a tiled cache.")
      .def(py::init([](int64_t width, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t mlp_width,
                       float eps, Address embedding, int64_t ld_embedding, Address norm) {
             return std::make_unique<Decoder>(
                 r1fast::DecoderShape{width, num_heads, num_kv_heads, head_dim, mlp_width, eps},
                 at<const T>(embedding), ld_embedding, at<const T>(norm));
           }),
           py::arg("width"), py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"),
           py::arg("mlp_width"), py::arg("eps"), py::arg("embedding"), py::arg("ld_embedding"), py::arg("norm"))
      .def(
          "add_layer",
          [](Decoder& self, Address attn_norm, Address q_norm, Address k_norm, Address mlp_norm, const Linear& qkv,
             const Linear& o, const Linear& gate_up, const Linear& down, Address keys, Address values) {
            self.add_layer({at<const T>(attn_norm), at<const T>(q_norm), at<const T>(k_norm), at<const T>(mlp_norm),
                            &qkv, &o, &gate_up, &down, at<T>(keys), at<T>(values)});
          },
          py::arg("attn_norm"), py::arg("q_norm"), py::arg("k_norm"), py::arg("mlp_norm"), py::arg("qkv"),
          py::arg("o"), py::arg("gate_up"), py::arg("down"), py::arg("keys"), py::arg("values"),
          py::keep_alive<1, 6>(), py::keep_alive<1, 7>(), py::keep_alive<1, 8>(), py::keep_alive<1, 9>())
      .def(
          "run",
          [](Decoder& self, Address tokens, Address positions, Address slots, int64_t num_tokens, Address rotations,
             Address block_table, int64_t max_blocks, int64_t block_size, Address context_lens, Address query_starts,
             Address group_starts, Address shared_blocks, int64_t num_groups, Address hidden, int64_t ld_hidden,
             int64_t num_threads) {
            py::gil_scoped_release release;
            const r1fast::DecodeProblem<T> attention{nullptr,
                                                     nullptr,
                                                     0,
                                                     0,
                                                     at<const int32_t>(block_table),
                                                     max_blocks,
                                                     block_size / r1fast::kTile,
                                                     at<const int32_t>(context_lens),
                                                     at<const int32_t>(query_starts),
                                                     at<const int32_t>(group_starts),
                                                     at<const int32_t>(shared_blocks),
                                                     num_groups};
            const typename Decoder::Step step{at<const int64_t>(tokens), at<const int64_t>(positions),
                                              at<const int64_t>(slots),  num_tokens,
                                              at<const float>(rotations), attention};
            self.run(step, at<T>(hidden), ld_hidden, num_threads);
          },
          py::arg("tokens"), py::arg("positions"), py::arg("slots"), py::arg("num_tokens"), py::arg("rotations"),
          py::arg("block_table"), py::arg("max_blocks"), py::arg("block_size"), py::arg("context_lens"),
          py::arg("query_starts"), py::arg("group_starts"), py::arg("shared_blocks"), py::arg("num_groups"),
          py::arg("hidden"), py::arg("ld_hidden"), py::arg("num_threads"));
}
#endif

// The decoder's own products and what stands between them. The caller, rollout/native.py, has checked shapes and strides.
void bind_decoder(py::module_& m) {
  using Address = uintptr_t;
#if defined(__x86_64__)
  using r1fast::After;
  using r1fast::Bf16;
  py::enum_<After>(m, "After").value("store", After::kStore).value("add", After::kAdd).value("silu", After::kSilu);

  const auto bind_linear = [&m](auto kind, auto tiles, const char* name) {
    using T = decltype(kind);
    using Linear = r1fast::PackedLinear<T, decltype(tiles)>;
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
              if (to_float32) {
                self.run(at<const T>(x), ld_x, num_rows, at<float>(y), ld_y, after, num_threads);
              } else {
                self.run(at<const T>(x), ld_x, num_rows, at<T>(y), ld_y, after, num_threads);
              }
            },
            py::arg("x"), py::arg("ld_x"), py::arg("num_rows"), py::arg("y"), py::arg("ld_y"), py::arg("after"),
            py::arg("to_float32"), py::arg("num_threads"));
  };
  bind_linear(0.0f, r1fast::Avx512Tiles{}, "PackedLinearF32");
  bind_linear(Bf16{}, r1fast::Avx512Tiles{}, "PackedLinearBF16");
  bind_linear(Bf16{}, r1fast::AmxTiles{}, "PackedLinearAMX");

  bind_decoder_of<float, r1fast::Avx512Tiles>(m, "DecoderF32");
  bind_decoder_of<Bf16, r1fast::Avx512Tiles>(m, "DecoderBF16");
  bind_decoder_of<Bf16, r1fast::AmxTiles>(m, "DecoderAMX");
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
          const r1fast::SampleProblem<T> problem{at<const T>(logits),
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
          r1fast::sample(problem, level, num_threads);
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

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU-side hot loops of r1fast. Signatures and shapes are in _C.pyi.";

  bind_head(m);
  bind_block_allocator(m);
  bind_decoder(m);
  bind_decode(m);
  bind_sample(m);

  m.def(
      "pack",
      [](const py::object& lengths, const py::object& token_budget) {
        const r1fast::FlatBins bins = pack(lengths, token_budget);
        const size_t num_bins = bins.offsets.size() - 1;
        py::list result(num_bins);
        for (size_t b = 0; b < num_bins; ++b) {
          const int64_t begin = bins.offsets[b], end = bins.offsets[b + 1];
          py::list bin(end - begin);
          for (int64_t k = begin; k < end; ++k) {
            PyList_SET_ITEM(bin.ptr(), k - begin, PyLong_FromLongLong(bins.order[k]));
          }
          PyList_SET_ITEM(result.ptr(), b, bin.release().ptr());
        }
        return result;
      },
      py::arg("lengths"), py::arg("token_budget"),
      "First-fit decreasing: the indices of the sequences in each micro-batch of at most `token_budget` tokens.");

  m.def(
      "pack_flat",
      [](const py::object& lengths, const py::object& token_budget) {
        r1fast::FlatBins bins = pack(lengths, token_budget);
        return py::make_tuple(to_array(std::move(bins.order)), to_array(std::move(bins.offsets)));
      },
      py::arg("lengths"), py::arg("token_budget"),
      "`pack` as two int64 arrays: micro-batch b is order[offsets[b]:offsets[b + 1]].");

  m.def(
      "pack_balanced",
      [](const py::object& lengths, const py::object& token_budget, const py::object& num_ranks,
         const py::object& costs) {
        const std::vector<int64_t> values = to_lengths(lengths);
        const int64_t budget = to_int64(token_budget, "token_budget");
        const int64_t ranks = to_int64(num_ranks, "num_ranks");
        const std::vector<double> cost_values = to_costs(costs, values);
        py::gil_scoped_release release;
        return r1fast::pack_balanced(values, budget, ranks, cost_values);
      },
      py::arg("lengths"), py::arg("token_budget"), py::arg("num_ranks"), py::arg("costs") = py::none(),
      "rank -> micro-batch -> sequence indices, with equal numbers of micro-batches and even costs.");

  m.def(
      "pack_groups",
      [](const py::object& prompt_lengths, const std::vector<py::object>& completion_lengths,
         const py::object& token_budget, double cost_per_token, const py::object& num_ranks) {
        const std::vector<int64_t> prompts = to_lengths(prompt_lengths);
        std::vector<std::vector<int64_t>> completions;
        for (const py::object& lengths : completion_lengths) completions.push_back(to_lengths(lengths));
        const int64_t budget = to_int64(token_budget, "token_budget");
        const int64_t ranks = to_int64(num_ranks, "num_ranks");
        std::vector<r1fast::GroupBins> packed;
        {
          const py::gil_scoped_release release;
          packed = r1fast::GroupPacker(prompts, completions, budget, cost_per_token).pack(ranks);
        }
        py::list result;
        for (const r1fast::GroupBins& bins : packed) {
          py::list of_rank;
          for (const std::vector<r1fast::GroupPiece>& bin : bins) {
            py::list pieces;
            for (const r1fast::GroupPiece& piece : bin) {
              pieces.append(py::make_tuple(piece.group, py::cast(piece.completions)));
            }
            of_rank.append(std::move(pieces));
          }
          result.append(std::move(of_rank));
        }
        return result;
      },
      py::arg("prompt_lengths"), py::arg("completion_lengths"), py::arg("token_budget"),
      py::arg("cost_per_token") = 0.0, py::arg("num_ranks") = 1,
      "rank -> micro-batch -> (group, its completions): each prompt once a micro-batch, groups split where they must be.");

  m.def(
      "lower_bound",
      [](const py::object& lengths, const py::object& token_budget) {
        const std::vector<int64_t> values = to_lengths(lengths);
        const int64_t budget = to_int64(token_budget, "token_budget");
        py::gil_scoped_release release;
        return r1fast::lower_bound(values, budget);
      },
      py::arg("lengths"), py::arg("token_budget"), "No packing uses fewer micro-batches than this.");
}
