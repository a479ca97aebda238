// Bindings of what a decoder layer computes in training. The callers, in kernels/, have checked dtypes, shapes and strides.
#include "bindings.hpp"
#include "products.hpp"

namespace r1fast {

void bind_training(py::module_& m) {
#if defined(__x86_64__)
  using Address = uintptr_t;

  m.def(
      "linear_forward",
      [](Address x, int64_t ld_x, int64_t num_tokens, Address weight, int64_t ld_weight, int64_t num_out,
         int64_t num_in, Address bias, Address y, int64_t num_threads) {
        const py::gil_scoped_release release;
        linear_forward(at<float>(x), ld_x, num_tokens, at<float>(weight), ld_weight, num_out, num_in, at<float>(bias),
                       at<float>(y), num_out, num_threads);
      },
      py::arg("x"), py::arg("ld_x"), py::arg("num_tokens"), py::arg("weight"), py::arg("ld_weight"),
      py::arg("num_out"), py::arg("num_in"), py::arg("bias"), py::arg("y"), py::arg("num_threads"),
      "y = x W^T + bias.");

  m.def(
      "linear_dx",
      [](Address dy, int64_t ld_dy, int64_t num_tokens, Address weight, int64_t ld_weight, int64_t num_out,
         int64_t num_in, Address dx, int64_t num_threads) {
        const py::gil_scoped_release release;
        linear_dx(at<float>(dy), ld_dy, num_tokens, at<float>(weight), ld_weight, num_out, num_in, at<float>(dx),
                  num_in, num_threads);
      },
      py::arg("dy"), py::arg("ld_dy"), py::arg("num_tokens"), py::arg("weight"), py::arg("ld_weight"),
      py::arg("num_out"), py::arg("num_in"), py::arg("dx"), py::arg("num_threads"), "dx = dy W.");

  m.def(
      "linear_dweight",
      [](Address dy, int64_t ld_dy, int64_t num_tokens, Address x, int64_t ld_x, int64_t num_out, int64_t num_in,
         Address dweight, int64_t num_threads) {
        const py::gil_scoped_release release;
        linear_dweight(at<float>(dy), ld_dy, num_tokens, at<float>(x), ld_x, num_out, num_in, at<float>(dweight),
                       num_in, num_threads);
      },
      py::arg("dy"), py::arg("ld_dy"), py::arg("num_tokens"), py::arg("x"), py::arg("ld_x"), py::arg("num_out"),
      py::arg("num_in"), py::arg("dweight"), py::arg("num_threads"), "dweight = dy^T x.");
#else
  (void)m;
#endif
}

}  // namespace r1fast
