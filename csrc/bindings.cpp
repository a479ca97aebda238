// The module, and packing's bindings.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "group_packing.hpp"
#include "packing.hpp"

namespace py = pybind11;

namespace {

std::string type_name(py::handle value) { return Py_TYPE(value.ptr())->tp_name; }

int64_t to_int64(py::handle value, const std::string& what) {
  if (PyBool_Check(value.ptr()) || !PyIndex_Check(value.ptr())) {
    throw py::type_error(what + " must be an integer, got " + type_name(value) + " " +
                         std::string(py::repr(value)));
  }
  const auto integer = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!integer) throw py::error_already_set();
  int overflow = 0;
  const int64_t result = PyLong_AsLongLongAndOverflow(integer.ptr(), &overflow);
  if (overflow != 0) {
    throw py::value_error(what + " does not fit in 64 bits: " + std::string(py::repr(value)));
  }
  return result;
}

// A list or tuple of integers, or a 1-d integer array (numpy, or what numpy can view). Copied, so that the caller
// may change its array while the GIL is released.
std::vector<int64_t> to_lengths(const py::object& values) {
  if (PyList_Check(values.ptr()) || PyTuple_Check(values.ptr())) {
    std::vector<int64_t> lengths(PySequence_Fast_GET_SIZE(values.ptr()));
    for (size_t i = 0; i < lengths.size(); ++i) {
      PyObject* item = PySequence_Fast_GET_ITEM(values.ptr(), i);
      lengths[i] = to_int64(item, "lengths[" + std::to_string(i) + "]");
    }
    return lengths;
  }
  const py::array array = py::array::ensure(values);
  if (!array) PyErr_Clear();
  if (!array || (array.dtype().kind() != 'i' && array.dtype().kind() != 'u') || array.ndim() != 1) {
    std::string got = type_name(values);
    if (array) {
      got += " of dtype " + std::string(py::str(array.dtype())) + " with " + std::to_string(array.ndim()) +
             " dimension(s)";
    }
    throw py::type_error("lengths must be a list of integers or a 1-d integer array, got " + got);
  }
  const py::array_t<int64_t, py::array::c_style | py::array::forcecast> contiguous(array);
  std::vector<int64_t> lengths(contiguous.data(), contiguous.data() + contiguous.size());
  if (array.dtype().kind() == 'u') {
    for (size_t i = 0; i < lengths.size(); ++i) {
      if (lengths[i] < 0) throw py::value_error("lengths[" + std::to_string(i) + "] does not fit in 64 bits");
    }
  }
  return lengths;
}

std::vector<double> to_costs(const py::object& values, const std::vector<int64_t>& lengths) {
  if (values.is_none()) return {lengths.begin(), lengths.end()};
  const py::array_t<double, py::array::c_style | py::array::forcecast> array(values);
  if (array.ndim() != 1) throw py::type_error("costs must be a list of numbers or a 1-d array");
  return {array.data(), array.data() + array.size()};
}

py::array_t<int64_t> to_array(std::vector<int64_t>&& values) {
  auto* owned = new std::vector<int64_t>(std::move(values));
  const py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<int64_t>*>(p); });
  return py::array_t<int64_t>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

r1fast::FlatBins pack(const py::object& lengths, const py::object& token_budget) {
  const std::vector<int64_t> values = to_lengths(lengths);
  const int64_t budget = to_int64(token_budget, "token_budget");
  py::gil_scoped_release release;
  return r1fast::pack(values, budget);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU-side hot loops of r1fast. Signatures and shapes are in _C.pyi.";

  r1fast::bind_head(m);
  r1fast::bind_attention(m);
  r1fast::bind_rollout(m);
  r1fast::bind_decoder(m);
  r1fast::bind_training(m);

  m.def(
      "pack",
      [](const py::object& lengths, const py::object& token_budget) {
        const r1fast::FlatBins bins = pack(lengths, token_budget);
        const size_t num_bins = bins.offsets.size() - 1;
        py::list result(num_bins);
        for (size_t b = 0; b < num_bins; ++b) {
          const int64_t begin = bins.offsets[b], end = bins.offsets[b + 1];
          py::list bin(end - begin);
          for (int64_t k = begin; k < end; ++k) {
            PyList_SET_ITEM(bin.ptr(), k - begin, PyLong_FromLongLong(bins.order[k]));
          }
          PyList_SET_ITEM(result.ptr(), b, bin.release().ptr());
        }
        return result;
      },
      py::arg("lengths"), py::arg("token_budget"),
      "First-fit decreasing: the indices of the sequences in each micro-batch of at most `token_budget` tokens.");

  m.def(
      "pack_flat",
      [](const py::object& lengths, const py::object& token_budget) {
        r1fast::FlatBins bins = pack(lengths, token_budget);
        return py::make_tuple(to_array(std::move(bins.order)), to_array(std::move(bins.offsets)));
      },
      py::arg("lengths"), py::arg("token_budget"),
      "`pack` as two int64 arrays: micro-batch b is order[offsets[b]:offsets[b + 1]].");

  m.def(
      "pack_balanced",
      [](const py::object& lengths, const py::object& token_budget, const py::object& num_ranks,
         const py::object& costs) {
        const std::vector<int64_t> values = to_lengths(lengths);
        const int64_t budget = to_int64(token_budget, "token_budget");
        const int64_t ranks = to_int64(num_ranks, "num_ranks");
        const std::vector<double> cost_values = to_costs(costs, values);
        py::gil_scoped_release release;
        return r1fast::pack_balanced(values, budget, ranks, cost_values);
      },
      py::arg("lengths"), py::arg("token_budget"), py::arg("num_ranks"), py::arg("costs") = py::none(),
      "rank -> micro-batch -> sequence indices, with equal numbers of micro-batches and even costs.");

  m.def(
      "pack_groups",
      [](const py::object& prompt_lengths, const std::vector<py::object>& completion_lengths,
         const py::object& token_budget, double cost_per_token, const py::object& num_ranks) {
        const std::vector<int64_t> prompts = to_lengths(prompt_lengths);
        std::vector<std::vector<int64_t>> completions;
        for (const py::object& lengths : completion_lengths) completions.push_back(to_lengths(lengths));
        const int64_t budget = to_int64(token_budget, "token_budget");
        const int64_t ranks = to_int64(num_ranks, "num_ranks");
        std::vector<r1fast::GroupBins> packed;
        {
          const py::gil_scoped_release release;
          packed = r1fast::GroupPacker(prompts, completions, budget, cost_per_token).pack(ranks);
        }
        py::list result;
        for (const r1fast::GroupBins& bins : packed) {
          py::list of_rank;
          for (const std::vector<r1fast::GroupPiece>& bin : bins) {
            py::list pieces;
            for (const r1fast::GroupPiece& piece : bin) {
              pieces.append(py::make_tuple(piece.group, py::cast(piece.completions)));
            }
            of_rank.append(std::move(pieces));
          }
          result.append(std::move(of_rank));
        }
        return result;
      },
      py::arg("prompt_lengths"), py::arg("completion_lengths"), py::arg("token_budget"),
      py::arg("cost_per_token") = 0.0, py::arg("num_ranks") = 1,
      "rank -> micro-batch -> (group, its completions): each prompt once a micro-batch, groups split where they must be.");

  m.def(
      "lower_bound",
      [](const py::object& lengths, const py::object& token_budget) {
        const std::vector<int64_t> values = to_lengths(lengths);
        const int64_t budget = to_int64(token_budget, "token_budget");
        py::gil_scoped_release release;
        return r1fast::lower_bound(values, budget);
      },
      py::arg("lengths"), py::arg("token_budget"), "No packing uses fewer micro-batches than this.");
}
