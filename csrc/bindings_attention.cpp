#include "bindings.hpp"
#include "training_attention.hpp"

namespace r1fast {

// Attention of training. The caller, kernels/cpu_attention.py, has checked dtypes, shapes and strides.
void bind_attention(py::module_& m) {
  using Address = uintptr_t;

  m.def(
      "attention_forward",
      [](Address q, int64_t ld_q, Address k, int64_t ld_k, Address v, int64_t ld_v, bool bf16, int64_t num_heads,
         int64_t num_kv_heads, int64_t head_dim, float scale, Address bounds, Address prefix_of, int64_t num_segments,
         Address out, Address wide_out, Address m, Address share, const std::string& level, int64_t num_threads) {
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
