#include "bindings.hpp"
#include "training_attention.hpp"

namespace r1fast {

namespace {

using Address = uintptr_t;

// Everything that is read, and m and share. Returns the tokens T.
int64_t check_problem(Address q, int64_t ld_q, Address k, int64_t ld_k, Address v, int64_t ld_v, bool bf16,
                      int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, Address bounds, Address prefix_of,
                      int64_t num_segments, Address m, Address share, int64_t num_threads) {
  check_range("num_heads", num_heads, 1, 1 << 20);
  check_range("num_kv_heads", num_kv_heads, 1, num_heads);
  check_range("head_dim", head_dim, 1, 1 << 20);
  if (num_heads % num_kv_heads != 0) throw std::invalid_argument("num_heads must be a multiple of num_kv_heads");
  check_range("num_segments", num_segments, 0);
  check_threads(num_threads);
  check_array("bounds", bounds, num_segments + 1, kInt64);
  check_optional("prefix_of", prefix_of, num_segments, kInt64);
  const int64_t num_tokens = check_starts("bounds", at<const int64_t>(bounds), num_segments);
  const auto* const prefixes = at<const int64_t>(prefix_of);
  for (int64_t s = 0; prefixes != nullptr && s < num_segments; ++s) {
    if (prefixes[s] >= s || (prefixes[s] >= 0 && prefixes[prefixes[s]] >= 0)) {
      throw std::invalid_argument("segment " + std::to_string(s) + " must continue one before it that continues none");
    }
  }
  const int64_t bytes = element_bytes(bf16);
  check_rows("q", q, num_tokens, num_heads * head_dim, ld_q, bytes);
  check_rows("k", k, num_tokens, num_kv_heads * head_dim, ld_k, bytes);
  check_rows("v", v, num_tokens, num_kv_heads * head_dim, ld_v, bytes);
  check_array("m", m, check_product("m", num_tokens, num_heads), kFloat);
  check_array("share", share, num_tokens * num_heads, kFloat);
  return num_tokens;
}

}  // namespace

// Attention of training, called by kernels/cpu_attention.py.
void bind_attention(py::module_& m) {

  m.def(
      "attention_forward",
      [](Address q, int64_t ld_q, Address k, int64_t ld_k, Address v, int64_t ld_v, bool bf16, int64_t num_heads,
         int64_t num_kv_heads, int64_t head_dim, float scale, Address bounds, Address prefix_of, int64_t num_segments,
         Address out, Address wide_out, Address m, Address share, const std::string& level, int64_t num_threads) {
        const int64_t num_tokens = check_problem(q, ld_q, k, ld_k, v, ld_v, bf16, num_heads, num_kv_heads, head_dim,
                                                 bounds, prefix_of, num_segments, m, share, num_threads);
        const int64_t size = check_product("out", num_tokens, num_heads, head_dim);
        check_array("out", out, size, element_bytes(bf16));
        check_optional("wide_out", wide_out, size, kFloat);
        with_dtype(bf16, [&](auto kind) {
          using T = decltype(kind);
          const AttentionProblem<T> problem{{at<const int64_t>(bounds), at<const int64_t>(prefix_of), num_segments},
                                            num_heads, num_kv_heads, head_dim, scale, at<const T>(q), ld_q,
                                            at<const T>(k), ld_k, at<const T>(v), ld_v, at<float>(m), at<float>(share),
                                            at<float>(wide_out)};
          TrainingAttention<T>(problem, level, num_threads).forward(at<T>(out));
        });
      },
      py::arg("q"), py::arg("ld_q"), py::arg("k"), py::arg("ld_k"), py::arg("v"), py::arg("ld_v"), py::arg("bf16"),
      py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("scale"), py::arg("bounds"),
      py::arg("prefix_of"), py::arg("num_segments"), py::arg("out"), py::arg("wide_out"), py::arg("m"), py::arg("share"),
      py::arg("level"), py::arg("num_threads"), "out (T, H, Dh): packed causal attention with shared prefixes.");

  m.def(
      "attention_backward",
      [](Address q, int64_t ld_q, Address k, int64_t ld_k, Address v, int64_t ld_v, bool bf16, int64_t num_heads,
         int64_t num_kv_heads, int64_t head_dim, float scale, Address bounds, Address prefix_of, int64_t num_segments,
         Address wide_out, Address m, Address share, Address dout, int64_t ld_dout, Address dq, Address dk, Address dv,
         const std::string& level, int64_t num_threads) {
        const int64_t num_tokens = check_problem(q, ld_q, k, ld_k, v, ld_v, bf16, num_heads, num_kv_heads, head_dim,
                                                 bounds, prefix_of, num_segments, m, share, num_threads);
        const int64_t size = check_product("out", num_tokens, num_heads, head_dim), bytes = element_bytes(bf16);
        check_array("wide_out", wide_out, size, kFloat);
        check_rows("dout", dout, num_tokens, num_heads * head_dim, ld_dout, bytes);
        check_array("dq", dq, size, bytes);
        check_array("dk", dk, num_tokens * num_kv_heads * head_dim, bytes);
        check_array("dv", dv, num_tokens * num_kv_heads * head_dim, bytes);
        with_dtype(bf16, [&](auto kind) {
          using T = decltype(kind);
          const AttentionProblem<T> problem{{at<const int64_t>(bounds), at<const int64_t>(prefix_of), num_segments},
                                            num_heads, num_kv_heads, head_dim, scale, at<const T>(q), ld_q,
                                            at<const T>(k), ld_k, at<const T>(v), ld_v, at<float>(m), at<float>(share),
                                            at<float>(wide_out)};
          TrainingAttention<T>(problem, level, num_threads)
              .backward(at<const T>(dout), ld_dout, at<T>(dq), at<T>(dk), at<T>(dv));
        });
      },
      py::arg("q"), py::arg("ld_q"), py::arg("k"), py::arg("ld_k"), py::arg("v"), py::arg("ld_v"), py::arg("bf16"),
      py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("scale"), py::arg("bounds"),
      py::arg("prefix_of"), py::arg("num_segments"), py::arg("wide_out"), py::arg("m"), py::arg("share"), py::arg("dout"),
      py::arg("ld_dout"), py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("level"), py::arg("num_threads"),
      "Its gradients dq (T, H, Dh), dk and dv (T, K, Dh).");
}

}  // namespace r1fast
