#include "bindings.hpp"
#include "head.hpp"
#include "tiles.hpp"

namespace r1fast {

// The head. The native_ functions are compiled for x86-64 alone, and run where `native_level` does not say baseline.
void bind_head(py::module_& m) {
  using Address = uintptr_t;

  m.def(
      "cpu_level", [] { return std::string(name_of(cpu_level())); },
      "What the level auto is: what this CPU has, or what R1FAST_CPU_LEVEL asks for.");

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

  m.def("head_ld", &head_ld, py::arg("num_rows"), "Words between two rows of the transposed E.");

  m.def("head_words", &head_words, py::arg("num_rows"), py::arg("vocab_size"), py::arg("bf16"),
        "Words of 32 bits that hold the transposed E.");

  m.def(
      "epilogue",
      [](Address z, int64_t ld, bool bf16, int64_t num_rows, int64_t vocab_size, Address bias, Address target_ids,
         Address anchor, float inv_temperature, float softcap, Address s, Address sz, const std::string& level,
         int64_t num_threads) {
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
        with_dtype(bf16, [&](auto kind) {
          compact_rows(at<decltype(kind)>(e), ld, vocab_size, at<int64_t>(kept), num_kept, num_threads);
        });
      },
      py::arg("e"), py::arg("ld"), py::arg("bf16"), py::arg("vocab_size"), py::arg("kept"), py::arg("num_kept"),
      py::arg("num_threads"), "Moves the kept rows of E (R, V) to its head.");

  m.def(
      "narrow_to_bf16",
      [](Address x, int64_t size, int64_t num_threads) {
        py::gil_scoped_release release;
        narrow_to_bf16(at<float>(x), size, num_threads);
      },
      py::arg("x"), py::arg("size"), py::arg("num_threads"), "fp32 becomes bf16 in the first half of its memory.");

  m.def("advise_huge_pages", [](Address from, int64_t num_bytes) { advise_huge_pages(at<void>(from), num_bytes); },
        py::arg("memory"), py::arg("num_bytes"), "Asks for huge pages where fresh memory is large.");

#if defined(__x86_64__)

  m.def(
      "native_forward",
      [](Address hidden, int64_t ld_hidden, Address weight, int64_t ld_weight, int64_t width, bool bf16, Address bias,
         Address target_ids, Address anchor, float inv_temperature, float softcap, Address e, int64_t ld,
         int64_t num_rows, int64_t vocab_size, Address s, Address sz, const std::string& level, int64_t num_threads) {
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
        const HeadView view{at<Word>(e), ld, num_rows, vocab_size};
        py::gil_scoped_release release;
        head_compact(view, bf16, at<int64_t>(kept), num_kept, num_threads);
      },
      py::arg("e"), py::arg("ld"), py::arg("num_rows"), py::arg("vocab_size"), py::arg("bf16"), py::arg("kept"),
      py::arg("num_kept"), py::arg("num_threads"), "Moves the kept rows' columns of the transposed E to its head.");
#endif
}

}  // namespace r1fast
