// Bindings of what a decoder layer computes in training. The callers, in kernels/, have checked dtypes, shapes and strides.
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "blocks.hpp"
#include "linear.hpp"
#include "products.hpp"
#include "tiles.hpp"

namespace r1fast {

namespace {

void check_head_dim(int64_t head_dim) {
  if (head_dim > kMaxHeadDim) throw std::invalid_argument("head_dim above 1024");
}

void bind_blocks(py::module_& m) {
  using Address = uintptr_t;

  m.def(
      "norm_forward",
      [](Address x, int64_t ld_x, Address delta, int64_t ld_delta, Address weight, float eps, int64_t num_rows,
         int64_t dim, bool bf16, Address sum, Address y, const std::string& level, int64_t num_threads) {
        with_dtype(bf16, [&](auto kind) {
          using T = decltype(kind);
          const NormForward<T> call{at<const T>(x),      ld_x, at<const T>(delta), ld_delta,
                                    at<const T>(weight), eps,  dim,                at<T>(sum), at<T>(y)};
          run_rows(call, num_rows, dim, at<T>(0), 0, level, num_threads);
        });
      },
      py::arg("x"), py::arg("ld_x"), py::arg("delta"), py::arg("ld_delta"), py::arg("weight"), py::arg("eps"),
      py::arg("num_rows"), py::arg("dim"), py::arg("bf16"), py::arg("sum"), py::arg("y"), py::arg("level"),
      py::arg("num_threads"), "sum = x + delta (unless delta is 0), y = sum / rms(sum) * weight.");

  m.def(
      "norm_backward",
      [](Address dy, int64_t ld_dy, Address residual, int64_t ld_residual, Address x, int64_t ld_x, Address weight,
         float eps, int64_t num_rows, int64_t dim, bool bf16, Address dx, Address dweight, const std::string& level,
         int64_t num_threads) {
        with_dtype(bf16, [&](auto kind) {
          using T = decltype(kind);
          const NormBackward<T> call{at<const T>(dy), ld_dy, at<const T>(residual), ld_residual, at<const T>(x),
                                     ld_x,            at<const T>(weight), eps,    dim,         at<T>(dx)};
          run_rows(call, num_rows, dim, at<T>(dweight), dim, level, num_threads);
        });
      },
      py::arg("dy"), py::arg("ld_dy"), py::arg("residual"), py::arg("ld_residual"), py::arg("x"), py::arg("ld_x"),
      py::arg("weight"), py::arg("eps"), py::arg("num_rows"), py::arg("dim"), py::arg("bf16"), py::arg("dx"),
      py::arg("dweight"), py::arg("level"), py::arg("num_threads"), "dx = residual + the norm's, and dweight.");

  m.def(
      "rope_forward",
      [](Address qkv, int64_t ld, Address rotations, Address q_weight, Address k_weight, float eps, int64_t num_tokens,
         int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, bool bf16, Address q, Address k,
         const std::string& level, int64_t num_threads) {
        check_head_dim(head_dim);
        with_dtype(bf16, [&](auto kind) {
          using T = decltype(kind);
          const RopeForward<T> call{at<const T>(qkv), ld,        at<const float>(rotations), at<const T>(q_weight),
                                    at<const T>(k_weight), eps,  num_heads,                  num_kv_heads,
                                    head_dim,         at<T>(q),  at<T>(k)};
          run_rows(call, num_tokens, (num_heads + num_kv_heads) * head_dim, at<T>(0), 0, level, num_threads);
        });
      },
      py::arg("qkv"), py::arg("ld"), py::arg("rotations"), py::arg("q_weight"), py::arg("k_weight"), py::arg("eps"),
      py::arg("num_tokens"), py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("bf16"),
      py::arg("q"), py::arg("k"), py::arg("level"), py::arg("num_threads"), "q and k of qkv, normed and rotated.");

  using Strided = std::tuple<Address, int64_t, int64_t>;
  m.def(
      "rope_backward",
      [](const Strided& dq, const Strided& dk, const Strided& dv, Address qkv, int64_t ld, Address rotations,
         Address q_weight, Address k_weight, float eps, int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads,
         int64_t head_dim, bool bf16, Address dqkv, Address dweight, const std::string& level, int64_t num_threads) {
        check_head_dim(head_dim);
        with_dtype(bf16, [&](auto kind) {
          using T = decltype(kind);
          const auto heads = [](const Strided& x) {
            return Heads<T>{at<const T>(std::get<0>(x)), std::get<1>(x), std::get<2>(x)};
          };
          const RopeBackward<T> call{heads(dq), heads(dk), heads(dv), at<const T>(qkv), ld, at<const float>(rotations),
                                     at<const T>(q_weight), at<const T>(k_weight), eps, num_heads, num_kv_heads,
                                     head_dim, at<T>(dqkv)};
          run_rows(call, num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, at<T>(dweight),
                   q_weight == 0 ? 0 : 2 * head_dim, level, num_threads);
        });
      },
      py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("qkv"), py::arg("ld"), py::arg("rotations"),
      py::arg("q_weight"), py::arg("k_weight"), py::arg("eps"), py::arg("num_tokens"), py::arg("num_heads"),
      py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("bf16"), py::arg("dqkv"), py::arg("dweight"),
      py::arg("level"), py::arg("num_threads"), "dqkv, and the gradients of the norms' weights.");

  m.def(
      "swiglu_forward",
      [](Address gate_up, int64_t ld, int64_t num_rows, int64_t width, bool bf16, Address y, const std::string& level,
         int64_t num_threads) {
        with_dtype(bf16, [&](auto kind) {
          using T = decltype(kind);
          const SwigluForward<T> call{at<const T>(gate_up), ld, width, at<T>(y)};
          run_rows(call, num_rows, 8 * width, at<T>(0), 0, level, num_threads);
        });
      },
      py::arg("gate_up"), py::arg("ld"), py::arg("num_rows"), py::arg("width"), py::arg("bf16"), py::arg("y"),
      py::arg("level"), py::arg("num_threads"), "y = silu(gate) up.");

  m.def(
      "swiglu_backward",
      [](Address dy, int64_t ld_dy, Address gate_up, int64_t ld, int64_t num_rows, int64_t width, bool bf16,
         Address dgate_up, const std::string& level, int64_t num_threads) {
        with_dtype(bf16, [&](auto kind) {
          using T = decltype(kind);
          const SwigluBackward<T> call{at<const T>(dy), ld_dy, at<const T>(gate_up), ld, width, at<T>(dgate_up)};
          run_rows(call, num_rows, 8 * width, at<T>(0), 0, level, num_threads);
        });
      },
      py::arg("dy"), py::arg("ld_dy"), py::arg("gate_up"), py::arg("ld"), py::arg("num_rows"), py::arg("width"),
      py::arg("bf16"), py::arg("dgate_up"), py::arg("level"), py::arg("num_threads"), "The gradient of gate and up.");
}

}  // namespace

void bind_training(py::module_& m) {
  bind_blocks(m);
#if defined(__x86_64__)
  using Address = uintptr_t;

  m.def(
      "linear_forward",
      [](Address x, int64_t ld_x, int64_t num_tokens, Address weight, int64_t ld_weight, int64_t num_out,
         int64_t num_in, Address bias, Address y, const std::string& level, int64_t num_threads) {
        const py::gil_scoped_release release;
        with_tiles<float>(level, [&](auto tiles) {
          linear_forward<decltype(tiles)>(at<float>(x), ld_x, num_tokens, at<float>(weight), ld_weight, num_out, num_in,
                                          at<float>(bias), at<float>(y), num_out, num_threads);
        });
      },
      py::arg("x"), py::arg("ld_x"), py::arg("num_tokens"), py::arg("weight"), py::arg("ld_weight"),
      py::arg("num_out"), py::arg("num_in"), py::arg("bias"), py::arg("y"), py::arg("level"), py::arg("num_threads"),
      "y = x W^T + bias.");

  m.def(
      "linear_forward_bf16",
      [](Address x, int64_t ld_x, int64_t num_tokens, Address weight, int64_t ld_weight, int64_t num_out,
         int64_t num_in, Address bias, Address y, const std::string& level, int64_t num_threads) {
        const py::gil_scoped_release release;
        with_tiles<Bf16>(level, [&](auto tiles) {
          linear_once<Bf16, decltype(tiles)>(at<const Bf16>(x), ld_x, num_tokens, at<const Bf16>(weight), ld_weight,
                                             num_out, num_in, at<const Bf16>(bias), at<Bf16>(y), num_threads);
        });
      },
      py::arg("x"), py::arg("ld_x"), py::arg("num_tokens"), py::arg("weight"), py::arg("ld_weight"),
      py::arg("num_out"), py::arg("num_in"), py::arg("bias"), py::arg("y"), py::arg("level"), py::arg("num_threads"),
      "y = x W^T + bias by the sums of PackedLinear.");

  m.def(
      "linear_dx",
      [](Address dy, int64_t ld_dy, int64_t num_tokens, Address weight, int64_t ld_weight, int64_t num_out,
         int64_t num_in, Address dx, const std::string& level, int64_t num_threads) {
        const py::gil_scoped_release release;
        with_tiles<float>(level, [&](auto tiles) {
          linear_dx<decltype(tiles)>(at<float>(dy), ld_dy, num_tokens, at<float>(weight), ld_weight, num_out, num_in,
                                     at<float>(dx), num_in, num_threads);
        });
      },
      py::arg("dy"), py::arg("ld_dy"), py::arg("num_tokens"), py::arg("weight"), py::arg("ld_weight"),
      py::arg("num_out"), py::arg("num_in"), py::arg("dx"), py::arg("level"), py::arg("num_threads"), "dx = dy W.");

  m.def(
      "linear_dweight",
      [](Address dy, int64_t ld_dy, int64_t num_tokens, Address x, int64_t ld_x, int64_t num_out, int64_t num_in,
         Address dweight, const std::string& level, int64_t num_threads) {
        const py::gil_scoped_release release;
        with_tiles<float>(level, [&](auto tiles) {
          linear_dweight<decltype(tiles)>(at<float>(dy), ld_dy, num_tokens, at<float>(x), ld_x, num_out, num_in,
                                          at<float>(dweight), num_in, num_threads);
        });
      },
      py::arg("dy"), py::arg("ld_dy"), py::arg("num_tokens"), py::arg("x"), py::arg("ld_x"), py::arg("num_out"),
      py::arg("num_in"), py::arg("dweight"), py::arg("level"), py::arg("num_threads"), "dweight = dy^T x.");
#endif
}

}  // namespace r1fast
