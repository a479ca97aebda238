// What the files of bindings share. Each reads arguments, releases the GIL and calls a header: no logic there.
#pragma once

#include <pybind11/pybind11.h>

#include "checks.hpp"
#include "epilogue.hpp"

namespace r1fast {

namespace py = pybind11;

void bind_head(py::module_& m);     // the vocabulary's head: bindings_head.cpp
void bind_attention(py::module_& m);  // attention of training: bindings_attention.cpp
void bind_rollout(py::module_& m);  // cache, attention, sampling: bindings_rollout.cpp
void bind_decoder(py::module_& m);  // the forward of a decoder, and decode steps: bindings_decoder.cpp
void bind_training(py::module_& m);  // the layers' products, forward and backward: bindings_training.cpp

// An address from Tensor.data_ptr(), or 0. The callers, in kernels/, have checked dtypes, shapes and strides; here checks.hpp
// refuses what cannot be, whoever calls.
template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

constexpr int64_t kFloat = sizeof(float), kInt64 = sizeof(int64_t), kInt32 = sizeof(int32_t);
inline int64_t element_bytes(bool bf16) { return bf16 ? static_cast<int64_t>(sizeof(Bf16)) : kFloat; }

// Calls body with an element type of the given dtype.
template <class Body>
void with_dtype(bool bf16, const Body& body) {
  py::gil_scoped_release release;
  if (bf16) {
    body(Bf16{});
  } else {
    body(0.0f);
  }
}

}  // namespace r1fast
