// What the bindings of a rollout share: numpy arrays that are read or written as they lie, and decode attention's plan.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "decode_attention.hpp"

namespace r1fast {

// An array as it lies, of just this type: it may be written.
template <class T>
using Exactly = py::array_t<T, py::array::c_style>;

// Throws unless the array has this shape; -1: any.
inline void check_shape(const char* name, const py::array& array, const std::vector<int64_t>& shape) {
  bool is_ok = array.ndim() == static_cast<py::ssize_t>(shape.size());
  for (size_t i = 0; is_ok && i < shape.size(); ++i) is_ok = shape[i] < 0 || array.shape(static_cast<py::ssize_t>(i)) == shape[i];
  if (is_ok) return;
  std::string got, wanted;
  for (py::ssize_t i = 0; i < array.ndim(); ++i) got += (i ? ", " : "") + std::to_string(array.shape(i));
  for (size_t i = 0; i < shape.size(); ++i) wanted += (i ? ", " : "") + (shape[i] < 0 ? "any" : std::to_string(shape[i]));
  throw std::invalid_argument(std::string(name) + " must be of shape (" + wanted + "), got (" + got + ")");
}

// The plan of kernels/paged_attention.py, without queries.
template <class T>
DecodeProblem<T> who_sees_what(uintptr_t block_table, int64_t max_blocks, uintptr_t tails, int64_t block_size,
                               uintptr_t context_lens, uintptr_t query_starts, uintptr_t group_starts,
                               uintptr_t shared_blocks, int64_t num_groups) {
  if (block_size % kTile != 0) throw std::invalid_argument("block_size must be a multiple of 16");
  DecodeProblem<T> problem{};
  problem.block_table = at<const int32_t>(block_table);
  problem.max_blocks = max_blocks;
  problem.tails = at<const int32_t>(tails);
  problem.tiles_per_block = block_size / kTile;
  problem.context_lens = at<const int32_t>(context_lens);
  problem.query_starts = at<const int32_t>(query_starts);
  problem.group_starts = at<const int32_t>(group_starts);
  problem.shared_blocks = at<const int32_t>(shared_blocks);
  problem.num_groups = num_groups;
  return problem;
}

}  // namespace r1fast
