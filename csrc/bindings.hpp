// What the files of bindings share. Each reads arguments, releases the GIL and calls a header: no logic there.
#pragma once

#include <pybind11/pybind11.h>

#include "epilogue.hpp"

namespace r1fast {

namespace py = pybind11;

void bind_head(py::module_& m);     // the vocabulary's head: bindings_head.cpp
void bind_attention(py::module_& m);  // attention of training: bindings_attention.cpp
void bind_rollout(py::module_& m);  // cache, attention, decoder, sampling: bindings_rollout.cpp
void bind_training(py::module_& m);  // the layers' products, forward and backward: bindings_training.cpp

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
    body(Bf16{});
  } else {
    body(0.0f);
  }
}

}  // namespace r1fast
