// Bindings of what a decoder layer computes in training.
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "blocks.hpp"
#include "linear.hpp"
#include "products.hpp"
#include "tiles.hpp"

namespace r1fast {

namespace {

using Address = uintptr_t;

void check_sizes(int64_t num_rows, int64_t width, int64_t num_threads) {
  check_range("num_rows", num_rows, 0);
  check_range("width", width, 0, int64_t{1} << 31);
  check_threads(num_threads);
}

// Returns the elements of a token in qkv.
int64_t check_heads(int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, Address rotations,
                    Address q_weight, Address k_weight, int64_t bytes, int64_t num_threads) {
  check_range("num_tokens", num_tokens, 0);
  check_range("num_heads", num_heads, 1, 1 << 20);
  check_range("num_kv_heads", num_kv_heads, 1, num_heads);
  check_range("head_dim", head_dim, 2, kMaxHeadDim);
  if (head_dim % 2 != 0) throw std::invalid_argument("head_dim must be even");
  check_threads(num_threads);
  check_array("rotations", rotations, check_product("rotations", num_tokens, 2 * head_dim), kFloat);
  check_optional("q_weight", q_weight, head_dim, bytes);
  check_optional("k_weight", k_weight, head_dim, bytes);
  if ((q_weight == 0) != (k_weight == 0)) throw std::invalid_argument("both of q and k have a norm, or neither");
  return (num_heads + 2 * num_kv_heads) * head_dim;
}

void check_linear(Address a, int64_t ld_a, int64_t a_width, Address b, int64_t ld_b, int64_t num_b, int64_t b_width,
                  int64_t num_tokens, int64_t num_out, int64_t num_in, int64_t bytes, int64_t num_threads) {
  check_range("num_tokens", num_tokens, 0);
  check_range("num_out", num_out, 1, int64_t{1} << 31);
  check_range("num_in", num_in, 1, int64_t{1} << 31);
  check_threads(num_threads);
  check_rows("the first factor", a, num_tokens, a_width, ld_a, bytes);
  check_rows("the second factor", b, num_b, b_width, ld_b, bytes);
}

void bind_blocks(py::module_& m) {

  m.def(
      "norm_forward",
      [](Address x, int64_t ld_x, Address delta, int64_t ld_delta, Address weight, float eps, int64_t num_rows,
         int64_t dim, bool bf16, Address sum, Address y, const std::string& level, int64_t num_threads) {
        check_sizes(num_rows, dim, num_threads);
        const int64_t bytes = element_bytes(bf16), size = check_product("y", num_rows, dim);
        check_rows("x", x, num_rows, dim, ld_x, bytes);
        if (delta != 0) {
          check_rows("delta", delta, num_rows, dim, ld_delta, bytes);
          check_array("sum", sum, size, bytes);
        }
        check_array("weight", weight, dim, bytes);
        check_array("y", y, size, bytes);
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
        check_sizes(num_rows, dim, num_threads);
        const int64_t bytes = element_bytes(bf16);
        check_rows("dy", dy, num_rows, dim, ld_dy, bytes);
        if (residual != 0) check_rows("residual", residual, num_rows, dim, ld_residual, bytes);
        check_rows("x", x, num_rows, dim, ld_x, bytes);
        check_array("weight", weight, dim, bytes);
        check_rows("dx", dx, num_rows, dim, dim, bytes, true);
        check_array("dweight", dweight, dim, bytes);
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
        const int64_t bytes = element_bytes(bf16);
        const int64_t width =
            check_heads(num_tokens, num_heads, num_kv_heads, head_dim, rotations, q_weight, k_weight, bytes, num_threads);
        check_rows("qkv", qkv, num_tokens, width, ld, bytes);
        check_array("q", q, check_product("q", num_tokens, num_heads, head_dim), bytes);
        check_array("k", k, num_tokens * num_kv_heads * head_dim, bytes);
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
        const int64_t bytes = element_bytes(bf16);
        const int64_t width =
            check_heads(num_tokens, num_heads, num_kv_heads, head_dim, rotations, q_weight, k_weight, bytes, num_threads);
        const auto check_strided = [&](const char* name, const Strided& x, int64_t heads) {
          const auto& [address, per_token, per_head] = x;
          check_range(name, per_token, 0);
          check_range(name, per_head, 0);
          if (num_tokens == 0) return;
          check_array(name, address, check_product(name, num_tokens - 1, per_token) +
                                         check_product(name, heads - 1, per_head) + head_dim, bytes);
        };
        check_strided("dq", dq, num_heads);
        check_strided("dk", dk, num_kv_heads);
        check_strided("dv", dv, num_kv_heads);
        if (q_weight != 0) {
          check_rows("qkv", qkv, num_tokens, width, ld, bytes);
          check_array("dweight", dweight, 2 * head_dim, bytes);
        }
        check_rows("dqkv", dqkv, num_tokens, width, width, bytes, true);
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
        check_sizes(num_rows, width, num_threads);
        check_rows("gate_up", gate_up, num_rows, 2 * width, ld, element_bytes(bf16));
        check_rows("y", y, num_rows, width, width, element_bytes(bf16), true);
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
        check_sizes(num_rows, width, num_threads);
        check_rows("dy", dy, num_rows, width, ld_dy, element_bytes(bf16));
        check_rows("gate_up", gate_up, num_rows, 2 * width, ld, element_bytes(bf16));
        check_rows("dgate_up", dgate_up, num_rows, 2 * width, 2 * width, element_bytes(bf16), true);
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

  m.def(
      "linear_forward",
      [](Address x, int64_t ld_x, int64_t num_tokens, Address weight, int64_t ld_weight, int64_t num_out,
         int64_t num_in, Address bias, Address y, const std::string& level, int64_t num_threads) {
        check_linear(x, ld_x, num_in, weight, ld_weight, num_out, num_in, num_tokens, num_out, num_in, kFloat, num_threads);
        check_optional("bias", bias, num_out, kFloat);
        check_rows("y", y, num_tokens, num_out, num_out, kFloat, true);
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
        check_linear(x, ld_x, num_in, weight, ld_weight, num_out, num_in, num_tokens, num_out, num_in, element_bytes(true), num_threads);
        check_optional("bias", bias, num_out, element_bytes(true));
        check_rows("y", y, num_tokens, num_out, num_out, element_bytes(true), true);
        if (num_in % 2 != 0) throw std::invalid_argument("num_in must be even in bfloat16");
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
        check_linear(dy, ld_dy, num_out, weight, ld_weight, num_out, num_in, num_tokens, num_out, num_in, kFloat, num_threads);
        check_rows("dx", dx, num_tokens, num_in, num_in, kFloat, true);
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
        check_linear(dy, ld_dy, num_out, x, ld_x, num_tokens, num_in, num_tokens, num_out, num_in, kFloat, num_threads);
        check_rows("dweight", dweight, num_out, num_in, num_in, kFloat, true);
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
