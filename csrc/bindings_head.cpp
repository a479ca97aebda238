#include "bindings.hpp"
#include "head.hpp"
#include "tiles.hpp"

namespace r1fast {

// The head. The native_ functions are compiled for x86-64 alone, and run where `native_level` does not say baseline.

namespace {

using Address = uintptr_t;

// The transposed E: rows of words, of one vocabulary entry each, or in bf16 of two.
void check_e(Address e, int64_t ld, int64_t num_rows, int64_t vocab_size, bool bf16, int64_t num_threads) {
  check_range("num_rows", num_rows, 0);
  check_range("vocab_size", vocab_size, 0, INT32_MAX - kVocabPadding);
  check_threads(num_threads);
  if (num_rows == 0 || vocab_size == 0) return;
  check_range("ld", ld, head_ld(num_rows));
  check_array("e", e, check_product("e", ld, round_up(vocab_size, kVocabPadding)) / (bf16 ? 2 : 1), kFloat);
}

// (R, V) as it is, and vectors (R).
void check_plain(Address e, int64_t ld, bool bf16, int64_t num_rows, int64_t vocab_size, int64_t num_threads) {
  check_range("num_rows", num_rows, 0);
  check_range("vocab_size", vocab_size, 0);
  check_threads(num_threads);
  check_rows("rows", e, num_rows, vocab_size, ld, element_bytes(bf16), true);
}

void check_map(Address bias, Address target_ids, Address anchor, Address s, Address sz, int64_t num_rows,
               int64_t vocab_size) {
  check_optional("bias", bias, vocab_size, kFloat);
  check_array("target_ids", target_ids, num_rows, kInt64);
  check_array("anchor", anchor, num_rows, kFloat);
  check_array("s", s, num_rows, kFloat);
  check_optional("sz", sz, num_rows, kFloat);
}

void check_kept(Address kept, int64_t num_kept, int64_t num_rows) {
  check_range("num_kept", num_kept, 0, num_rows);
  check_array("kept", kept, num_kept, kInt64);
  const auto* const rows = at<const int64_t>(kept);
  check_each("kept", rows, num_kept, 0, num_rows - 1);
  for (int64_t i = 1; i < num_kept; ++i) {
    if (rows[i] <= rows[i - 1]) throw std::invalid_argument("kept must increase");
  }
}

}  // namespace

void bind_head(py::module_& m) {

  m.def(
      "cpu_level", [] { return std::string(name_of(cpu_level())); },
      "What the level auto is: what this CPU has, or what R1FAST_CPU_LEVEL asks for.");

  m.def("has_avx512_bf16", &avx512_bf16_supported, "Whether AVX-512 multiplies bf16 by instructions of its own.");

  m.def(
      "native_level",
      [](bool bf16) {
#if defined(__x86_64__)
        return best_tiles(bf16);
#else
        return std::string("baseline") + (bf16 ? "" : "");
#endif
      },
      py::arg("bf16"), "What the level auto of the native_ functions is, or baseline: then there are none.");

  m.def(
      "head_ld",
      [](int64_t num_rows) {
        check_range("num_rows", num_rows, 0);
        return head_ld(num_rows);
      },
      py::arg("num_rows"), "Words between two rows of the transposed E.");

  m.def(
      "head_words",
      [](int64_t num_rows, int64_t vocab_size, bool bf16) {
        check_range("num_rows", num_rows, 0);
        check_range("vocab_size", vocab_size, 0);
        check_product("E", head_ld(num_rows), round_up(vocab_size, kVocabPadding), kFloat);
        return head_words(num_rows, vocab_size, bf16);
      },
      py::arg("num_rows"), py::arg("vocab_size"), py::arg("bf16"), "Words of 32 bits that hold the transposed E.");

  m.def(
      "epilogue",
      [](Address z, int64_t ld, bool bf16, int64_t num_rows, int64_t vocab_size, Address bias, Address target_ids,
         Address anchor, float inv_temperature, float softcap, Address s, Address sz, const std::string& level,
         int64_t num_threads) {
        check_plain(z, ld, bf16, num_rows, vocab_size, num_threads);
        check_map(bias, target_ids, anchor, s, sz, num_rows, vocab_size);
        const LogitMap map{at<float>(bias), at<int64_t>(target_ids), at<float>(anchor), inv_temperature,
                                   softcap};
        with_dtype(bf16, [&](auto kind) {
          epilogue(at<decltype(kind)>(z), ld, num_rows, vocab_size, map, at<float>(s), at<float>(sz), level,
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
        check_plain(e, ld, bf16, num_rows, vocab_size, num_threads);
        check_array("a", a, num_rows, kFloat);
        check_array("b", b, num_rows, kFloat);
        with_dtype(bf16, [&](auto kind) {
          affine_rows(at<decltype(kind)>(e), ld, num_rows, vocab_size, at<float>(a), at<float>(b), level,
                              num_threads);
        });
      },
      py::arg("e"), py::arg("ld"), py::arg("bf16"), py::arg("num_rows"), py::arg("vocab_size"), py::arg("a"),
      py::arg("b"), py::arg("level"), py::arg("num_threads"), "E (R, V) becomes E (a + b log E) in place.");

  m.def(
      "compact_rows",
      [](Address e, int64_t ld, bool bf16, int64_t vocab_size, Address kept, int64_t num_kept, int64_t num_threads) {
        check_range("num_kept", num_kept, 0);
        check_array("kept", kept, num_kept, kInt64);
        const int64_t num_rows = num_kept == 0 ? 0 : std::max<int64_t>(at<const int64_t>(kept)[num_kept - 1], -1) + 1;
        check_range("the rows of e", num_rows, 0);
        check_kept(kept, num_kept, num_rows);
        check_plain(e, ld, bf16, num_rows, vocab_size, num_threads);
        with_dtype(bf16, [&](auto kind) {
          compact_rows(at<decltype(kind)>(e), ld, vocab_size, at<int64_t>(kept), num_kept, num_threads);
        });
      },
      py::arg("e"), py::arg("ld"), py::arg("bf16"), py::arg("vocab_size"), py::arg("kept"), py::arg("num_kept"),
      py::arg("num_threads"), "Moves the kept rows of E (R, V) to its head.");

  m.def(
      "narrow_to_bf16",
      [](Address x, int64_t size, int64_t num_threads) {
        check_range("size", size, 0);
        check_array("x", x, size, kFloat);
        check_threads(num_threads);
        py::gil_scoped_release release;
        narrow_to_bf16(at<float>(x), size, num_threads);
      },
      py::arg("x"), py::arg("size"), py::arg("num_threads"), "fp32 becomes bf16 in the first half of its memory.");

  m.def(
      "advise_huge_pages",
      [](Address from, int64_t num_bytes) {
        check_range("num_bytes", num_bytes, 0);
        check_array("memory", from, num_bytes, 1);
        advise_huge_pages(at<void>(from), num_bytes);
      },
      py::arg("memory"), py::arg("num_bytes"), "Asks for huge pages where fresh memory is large.");

#if defined(__x86_64__)

  m.def(
      "native_forward",
      [](Address hidden, int64_t ld_hidden, Address weight, int64_t ld_weight, int64_t width, bool bf16, Address bias,
         Address target_ids, Address anchor, float inv_temperature, float softcap, Address e, int64_t ld,
         int64_t num_rows, int64_t vocab_size, Address s, Address sz, const std::string& level, int64_t num_threads) {
        check_range("width", width, 1);
        check_range("num_rows", num_rows, 1);
        check_range("vocab_size", vocab_size, 1, INT32_MAX - kVocabPadding);
        check_threads(num_threads);
        check_rows("hidden", hidden, num_rows, width, ld_hidden, element_bytes(bf16));
        check_rows("weight", weight, vocab_size, width, ld_weight, element_bytes(bf16));
        check_map(bias, target_ids, anchor, s, sz, num_rows, vocab_size);
        if (e != 0) {
          check_e(e, ld, num_rows, vocab_size, bf16, num_threads);
          if (e % 64 != 0) throw std::invalid_argument("e must lie on a cache line's boundary");
        }
        const LogitMap map{at<float>(bias), at<int64_t>(target_ids), at<float>(anchor), inv_temperature,
                                   softcap};
        const HeadView view{at<Word>(e), ld, num_rows, vocab_size};
        with_dtype(bf16, [&](auto kind) {
          using T = decltype(kind);
          with_tiles<T>(level, [&](auto tiles) {
            head_forward<decltype(tiles)>(at<const T>(hidden), ld_hidden, at<const T>(weight), ld_weight, width, map,
                                          view, at<float>(s), at<float>(sz), num_threads);
          });
        });
      },
      py::arg("hidden"), py::arg("ld_hidden"), py::arg("weight"), py::arg("ld_weight"), py::arg("width"),
      py::arg("bf16"), py::arg("bias"), py::arg("target_ids"), py::arg("anchor"), py::arg("inv_temperature"),
      py::arg("softcap"), py::arg("e"), py::arg("ld"), py::arg("num_rows"), py::arg("vocab_size"), py::arg("s"),
      py::arg("sz"), py::arg("level"), py::arg("num_threads"), "Writes E, transposed (or not, if e is 0), s and sz (if not 0).");

  m.def(
      "native_dhidden",
      [](Address e, int64_t ld, int64_t num_rows, int64_t vocab_size, Address weight, int64_t ld_weight,
         int64_t width, bool bf16, Address dhidden, const std::string& level, int64_t num_threads) {
        check_e(e, ld, num_rows, vocab_size, bf16, num_threads);
        check_range("width", width, 0);
        check_rows("weight", weight, vocab_size, width, ld_weight, element_bytes(bf16));
        check_rows("dhidden", dhidden, num_rows, width, width, kFloat, true);
        if (num_rows == 0 || width == 0 || vocab_size == 0) return;
        const HeadView view{at<Word>(e), ld, num_rows, vocab_size};
        with_dtype(bf16, [&](auto kind) {
          using T = decltype(kind);
          with_tiles<T>(level, [&](auto tiles) {
            if constexpr (std::is_same_v<decltype(tiles), AmxTiles>) {
              head_dhidden_amx(view, at<const Bf16>(weight), ld_weight, width, at<float>(dhidden), num_threads);
            } else {
              head_dhidden<decltype(tiles)>(view, at<const T>(weight), ld_weight, width, at<float>(dhidden),
                                            num_threads);
            }
          });
        });
      },
      py::arg("e"), py::arg("ld"), py::arg("num_rows"), py::arg("vocab_size"), py::arg("weight"),
      py::arg("ld_weight"), py::arg("width"), py::arg("bf16"), py::arg("dhidden"), py::arg("level"),
      py::arg("num_threads"),
      "dhidden = E @ W.");

  m.def(
      "native_dweight",
      [](Address e, int64_t ld, int64_t num_rows, int64_t vocab_size, bool bf16, Address x, int64_t ld_x,
         bool x_bf16, int64_t width, Address dweight, int64_t ld_dweight, bool accumulate, const std::string& level, int64_t num_threads) {
        check_e(e, ld, num_rows, vocab_size, bf16, num_threads);
        check_range("width", width, 0);
        check_rows("x", x, num_rows, width, ld_x, element_bytes(x_bf16));
        check_rows("dweight", dweight, vocab_size, width, ld_dweight, kFloat, true);
        if (x_bf16 && !bf16) throw std::invalid_argument("an fp32 E takes an fp32 x");
        const HeadView view{at<Word>(e), ld, num_rows, vocab_size};
        py::gil_scoped_release release;
        const auto dweight_of = [&](auto kind, auto* rows) {
          with_tiles<decltype(kind)>(level, [&](auto tiles) {
            head_dweight<decltype(tiles), sizeof kind == sizeof(Bf16)>(view, rows, ld_x, width, at<float>(dweight),
                                                                       ld_dweight, accumulate, num_threads);
          });
        };
        if (x_bf16) return dweight_of(Bf16{}, at<const Bf16>(x));
        if (bf16) return dweight_of(Bf16{}, at<const float>(x));
        dweight_of(0.0f, at<const float>(x));
      },
      py::arg("e"), py::arg("ld"), py::arg("num_rows"), py::arg("vocab_size"), py::arg("bf16"), py::arg("x"),
      py::arg("ld_x"), py::arg("x_bf16"), py::arg("width"), py::arg("dweight"), py::arg("ld_dweight"),
      py::arg("accumulate"), py::arg("level"), py::arg("num_threads"), "dweight = or += E^T @ x, x (R, D).");

  m.def(
      "native_dbias",
      [](Address e, int64_t ld, int64_t num_rows, int64_t vocab_size, bool bf16, Address x, Address dbias,
         bool accumulate, const std::string& level, int64_t num_threads) {
        check_e(e, ld, num_rows, vocab_size, bf16, num_threads);
        check_array("x", x, num_rows, kFloat);
        check_array("dbias", dbias, vocab_size, kFloat);
        const HeadView view{at<Word>(e), ld, num_rows, vocab_size};
        with_dtype(bf16, [&](auto kind) {
          with_tiles<decltype(kind)>(level, [&](auto tiles) {
            head_dbias<decltype(tiles), sizeof kind == sizeof(Bf16)>(view, at<float>(x), at<float>(dbias), accumulate,
                                                                     num_threads);
          });
        });
      },
      py::arg("e"), py::arg("ld"), py::arg("num_rows"), py::arg("vocab_size"), py::arg("bf16"), py::arg("x"),
      py::arg("dbias"), py::arg("accumulate"), py::arg("level"), py::arg("num_threads"), "dbias = or += E^T @ x, x (R).");

  m.def(
      "native_affine",
      [](Address e, int64_t ld, int64_t num_rows, int64_t vocab_size, bool bf16, Address a, Address b,
         const std::string& level, int64_t num_threads) {
        check_e(e, ld, num_rows, vocab_size, bf16, num_threads);
        check_array("a", a, num_rows, kFloat);
        check_array("b", b, num_rows, kFloat);
        const HeadView view{at<Word>(e), ld, num_rows, vocab_size};
        with_dtype(bf16, [&](auto kind) {
          with_tiles<decltype(kind)>(level, [&](auto tiles) {
            head_affine<decltype(tiles), sizeof kind == sizeof(Bf16)>(view, at<float>(a), at<float>(b), num_threads);
          });
        });
      },
      py::arg("e"), py::arg("ld"), py::arg("num_rows"), py::arg("vocab_size"), py::arg("bf16"), py::arg("a"),
      py::arg("b"), py::arg("level"), py::arg("num_threads"), "E becomes E (a + b log E) in place.");

  m.def(
      "native_compact",
      [](Address e, int64_t ld, int64_t num_rows, int64_t vocab_size, bool bf16, Address kept, int64_t num_kept,
         int64_t num_threads) {
        check_e(e, ld, num_rows, vocab_size, bf16, num_threads);
        check_kept(kept, num_kept, num_rows);
        const HeadView view{at<Word>(e), ld, num_rows, vocab_size};
        py::gil_scoped_release release;
        head_compact(view, bf16, at<int64_t>(kept), num_kept, num_threads);
      },
      py::arg("e"), py::arg("ld"), py::arg("num_rows"), py::arg("vocab_size"), py::arg("bf16"), py::arg("kept"),
      py::arg("num_kept"), py::arg("num_threads"), "Moves the kept rows' columns of the transposed E to its head.");
#endif
}

}  // namespace r1fast
