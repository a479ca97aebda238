// The cache's bookkeeping, decode attention and sampling.
#include "bindings_arrays.hpp"
#include "block_allocator.hpp"
#include "sampling.hpp"
#include "tails.hpp"

namespace r1fast {

namespace {

// A 1-d array of integers that fit in 32 bits, or what numpy makes one of; nothing is rounded or wrapped around.
class Int32s {
 public:
  explicit Int32s(const py::object& values) {
    const py::array array = py::array::ensure(values);
    if (!array) throw py::type_error("blocks and tokens must be 1-d arrays of integers");
    const char kind = array.dtype().kind();
    if (array.ndim() != 1 || (kind != 'i' && kind != 'u' && array.size() > 0)) {
      throw py::type_error("blocks and tokens must be 1-d arrays of integers, got " +
                           std::string(py::str(array.dtype())) + " with " + std::to_string(array.ndim()) +
                           " dimension(s)");
    }
    values_.resize(static_cast<size_t>(array.size()));
    if (py::isinstance<py::array_t<int32_t>>(array)) {
      const Exactly<int32_t> exact(array);
      std::copy_n(exact.data(), values_.size(), values_.begin());
      return;
    }
    const py::array_t<int64_t, py::array::c_style | py::array::forcecast> wide(array);
    check_each("blocks and tokens", wide.data(), wide.size(), kind == 'u' ? 0 : INT32_MIN, INT32_MAX);
    std::copy_n(wide.data(), values_.size(), values_.begin());
  }

  const int32_t* data() const { return values_.data(); }
  int64_t size() const { return static_cast<int64_t>(values_.size()); }

 private:
  std::vector<int32_t> values_;
};

// Its calls are short and belong to one thread: they keep the GIL.
void bind_block_allocator(py::module_& m) {
  py::class_<BlockAllocator>(m, "BlockAllocator", "Holders of the blocks of a KV cache, and its prefix cache.")
      .def(py::init<int64_t, int64_t, int64_t, int64_t>(), py::arg("num_blocks"), py::arg("block_size"),
           py::arg("max_cached") = -1, py::arg("hash_bits") = 64)
      .def_property_readonly("num_blocks", &BlockAllocator::num_blocks)
      .def_property_readonly("block_size", &BlockAllocator::block_size)
      .def_property_readonly("num_used", &BlockAllocator::num_used)
      .def_property_readonly("num_cached", &BlockAllocator::num_cached)
      .def_property_readonly("num_available", &BlockAllocator::num_available)
      .def_property_readonly("peak_used", &BlockAllocator::peak_used)
      .def("holders", &BlockAllocator::holders, py::arg("block"))
      .def(
          "allocate",
          [](BlockAllocator& self, int64_t count) {
            std::vector<int32_t> blocks(static_cast<size_t>(std::max<int64_t>(std::min(count, self.num_blocks()), 0)));
            self.allocate(count, blocks.data());
            return py::array_t<int32_t>(static_cast<py::ssize_t>(blocks.size()), blocks.data());
          },
          py::arg("count"))
      .def(
          "share",
          [](BlockAllocator& self, const py::object& values) {
            const Int32s blocks(values);
            self.share(blocks.data(), blocks.size());
          },
          py::arg("blocks"))
      .def(
          "free",
          [](BlockAllocator& self, const py::object& values) {
            const Int32s blocks(values);
            self.free(blocks.data(), blocks.size());
          },
          py::arg("blocks"))
      .def(
          "lookup",
          [](BlockAllocator& self, const py::object& values) {
            const Int32s tokens(values);
            std::vector<int32_t> found(static_cast<size_t>(tokens.size() / self.block_size()));
            const int64_t count = self.lookup(tokens.data(), tokens.size(), found.data());
            return py::array_t<int32_t>(count, found.data());
          },
          py::arg("tokens"))
      .def(
          "insert",
          [](BlockAllocator& self, const py::object& token_values, const py::object& block_values) {
            const Int32s tokens(token_values), blocks(block_values);
            self.insert(tokens.data(), tokens.size(), blocks.data(), blocks.size());
          },
          py::arg("tokens"), py::arg("blocks"))
      .def("reset", &BlockAllocator::reset);
}

// Likewise.
void bind_tails(py::module_& m) {
  const auto exactly = [](const char* arg) { return py::arg(arg).noconvert(); };
  py::class_<Tails>(m, "Tails", "Positions of running sequences that fill no tile yet.")
      .def(py::init<BlockAllocator&, int64_t, int64_t, int64_t, int64_t>(), py::arg("allocator"), py::arg("num_slots"),
           py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("element_bytes"), py::keep_alive<1, 2>())
      .def(
          "add_layer",
          [](Tails& self, uintptr_t keys, uintptr_t values) { self.add_layer(at<void>(keys), at<void>(values)); },
          py::arg("keys"), py::arg("values"))
      .def_property_readonly("num_positions", &Tails::num_positions)
      .def_property_readonly("table",
                             [](const py::object& self) {
                               const auto& tails = self.cast<const Tails&>();
                               return py::array_t<int32_t>({tails.num_slots(), kTile}, tails.table(), self);
                             })
      .def(
          "missing",
          [](const Tails& self, const Exactly<int64_t>& slots, const Exactly<int64_t>& length,
             const Exactly<int64_t>& num_blocks) {
            check_shape("slots", slots, {-1});
            check_shape("length", length, {-1});
            check_shape("num_blocks", num_blocks, {length.size()});
            // is only read
            const Tails::Running running{slots.data(), slots.size(), length.data(), nullptr, INT32_MAX,
                                         const_cast<int64_t*>(num_blocks.data())};
            self.check(running, length.size());
            return self.missing(running);
          },
          exactly("slots"), exactly("length"), exactly("num_blocks"))
      .def(
          "grow",
          [](Tails& self, const Exactly<int64_t>& slots, const Exactly<int64_t>& length, Exactly<int32_t> blocks,
             Exactly<int64_t> num_blocks) {
            check_shape("slots", slots, {-1});
            check_shape("length", length, {-1});
            check_shape("blocks", blocks, {length.size(), -1});
            check_shape("num_blocks", num_blocks, {length.size()});
            const Tails::Running running{slots.data(), slots.size(), length.data(), blocks.mutable_data(), blocks.shape(1),
                                         num_blocks.mutable_data()};
            self.check(running, length.size());
            return self.grow(running);
          },
          exactly("slots"), exactly("length"), exactly("blocks"), exactly("num_blocks"))
      .def("adopt", &Tails::adopt, py::arg("slot"), py::arg("block"), py::arg("num_positions"))
      .def("release", &Tails::release, py::arg("slot"));
}

// Returns the elements of a token's keys.
int64_t check_heads(int64_t num_heads, int64_t num_kv_heads, int64_t head_dim) {
  check_range("num_heads", num_heads, 1, 1 << 20);
  check_range("num_kv_heads", num_kv_heads, 1, num_heads);
  check_range("head_dim", head_dim, 2, 1 << 20);
  if (num_heads % num_kv_heads != 0 || head_dim % 2 != 0) {
    throw std::invalid_argument("num_heads must be a multiple of num_kv_heads, and head_dim even");
  }
  return num_kv_heads * head_dim;
}

// The paged cache and decode attention, called by kernels/paged_*.py.
void bind_decode(py::module_& m) {
  using Address = uintptr_t;

  m.def(
      "write_kv",
      [](Address keys, Address values, int64_t num_kv_heads, int64_t head_dim, bool bf16, Address k, int64_t ld_k,
         Address v, int64_t ld_v, Address slots, int64_t num_tokens, int64_t num_threads) {
        const int64_t bytes = element_bytes(bf16), width = check_heads(num_kv_heads, num_kv_heads, head_dim);
        check_range("num_tokens", num_tokens, 0);
        check_threads(num_threads);
        check_rows("k", k, num_tokens, width, ld_k, bytes);
        check_rows("v", v, num_tokens, width, ld_v, bytes);
        check_array("slots", slots, num_tokens, kInt64);
        if (num_tokens > 0) {
          check_array("keys", keys, width * kTile, bytes);
          check_array("values", values, width * kTile, bytes);
        }
        with_dtype(bf16, [&](auto kind) {
          using T = decltype(kind);
          const PagedCache<T> cache{at<T>(keys), at<T>(values), num_kv_heads, head_dim};
          write_kv(cache, at<const T>(k), ld_k, at<const T>(v), ld_v, at<const int64_t>(slots), num_tokens,
                           num_threads);
        });
      },
      py::arg("keys"), py::arg("values"), py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("bf16"), py::arg("k"),
      py::arg("ld_k"), py::arg("v"), py::arg("ld_v"), py::arg("slots"), py::arg("num_tokens"),
      py::arg("num_threads"), "Stores k and v (N, K, Dh) in their slots of the tiled cache.");

  py::class_<DecodeWorkspace>(m, "DecodeWorkspace", "Memory of decode attention, kept between calls.")
      .def(py::init<>())
      .def(
          "attend",
          [](DecodeWorkspace& self, Address q, Address out, int64_t num_heads, float scale, Address keys,
             Address values, int64_t num_kv_heads, int64_t head_dim, bool bf16, Address block_table,
             int64_t max_blocks, Address tails, int64_t block_size, Address context_lens, Address query_starts,
             Address group_starts, Address shared_blocks, int64_t num_groups, const std::string& level,
             int64_t num_threads) {
            const int64_t bytes = element_bytes(bf16), width = check_heads(num_heads, num_kv_heads, head_dim);
            check_threads(num_threads);
            with_dtype(bf16, [&](auto kind) {
              using T = decltype(kind);
              DecodeProblem<T> problem = who_sees_what<T>(block_table, max_blocks, tails, block_size, context_lens,
                                                          query_starts, group_starts, shared_blocks, num_groups);
              problem.q = at<const T>(q);
              problem.out = at<T>(out);
              problem.num_heads = num_heads;
              problem.scale = scale;
              if (const int64_t num_queries = problem.check(); num_queries > 0) {
                const int64_t size = check_product("q", num_queries, num_heads, head_dim);
                check_array("q", q, size, bytes);
                check_array("out", out, size, bytes);
                check_array("keys", keys, width * kTile, bytes);
                check_array("values", values, width * kTile, bytes);
              }
              const PagedCache<T> cache{at<T>(keys), at<T>(values), num_kv_heads, head_dim};
              self.run(problem, cache, level, num_threads);
            });
          },
          py::arg("q"), py::arg("out"), py::arg("num_heads"), py::arg("scale"), py::arg("keys"), py::arg("values"),
          py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("bf16"), py::arg("block_table"),
          py::arg("max_blocks"), py::arg("tails"), py::arg("block_size"), py::arg("context_lens"),
          py::arg("query_starts"), py::arg("group_starts"), py::arg("shared_blocks"), py::arg("num_groups"),
          py::arg("level"),
          py::arg("num_threads"), "out (Nq, H, Dh): attention of q over the tiled cache.");
}

// Called by kernels/sample.py; 0 is the address of what is absent.
void bind_sample(py::module_& m) {
  using Address = uintptr_t;

  m.def(
      "sample",
      [](Address logits, int64_t ld, bool bf16, int64_t num_rows, int64_t vocab_size, Address u, Address temperature,
         Address top_k, Address top_p, Address min_p, Address tokens, Address logprobs, Address truncated_logprobs,
         Address is_bad, Address row_starts, Address ids, Address penalty, Address bias, Address given,
         Address entropies, int64_t num_top, Address top_ids, Address top_logprobs, const std::string& level,
         int64_t num_threads) {
        check_range("num_rows", num_rows, 0, INT32_MAX);
        check_range("vocab_size", vocab_size, 1, INT32_MAX);
        check_range("num_top", num_top, 0, vocab_size);
        check_threads(num_threads);
        check_rows("logits", logits, num_rows, vocab_size, ld, element_bytes(bf16));
        check_array("u", u, num_rows, sizeof(double));
        for (const Address x : {temperature, top_p, min_p, logprobs, truncated_logprobs}) {
          check_array("a row's parameters and results", x, num_rows, kFloat);
        }
        check_array("top_k", top_k, num_rows, kInt64);
        check_array("tokens", tokens, num_rows, kInt64);
        check_array("is_bad", is_bad, num_rows, sizeof(bool));
        check_optional("given", given, num_rows, kInt64);
        check_optional("entropies", entropies, num_rows, kFloat);
        check_array("top_ids", top_ids, check_product("top_ids", num_rows, num_top), kInt64);
        check_array("top_logprobs", top_logprobs, num_rows * num_top, kFloat);
        if (given != 0) check_each("given", at<const int64_t>(given), num_rows, 0, vocab_size - 1);
        if (row_starts != 0) {
          check_array("row_starts", row_starts, num_rows + 1, kInt64);
          const int64_t num_changes = check_starts("row_starts", at<const int64_t>(row_starts), num_rows);
          check_array("ids", ids, num_changes, kInt64);
          check_each("ids", at<const int64_t>(ids), num_changes, 0, vocab_size - 1);
          check_array("penalty", penalty, num_changes, kFloat);
          check_array("bias", bias, num_changes, kFloat);
        }
        with_dtype(bf16, [&](auto kind) {
          using T = decltype(kind);
          const SampleProblem<T> problem{at<const T>(logits),
                                                 ld,
                                                 num_rows,
                                                 vocab_size,
                                                 at<const double>(u),
                                                 at<const float>(temperature),
                                                 at<const int64_t>(top_k),
                                                 at<const float>(top_p),
                                                 at<const float>(min_p),
                                                 at<int64_t>(tokens),
                                                 at<float>(logprobs),
                                                 at<float>(truncated_logprobs),
                                                 at<bool>(is_bad),
                                                 at<const int64_t>(row_starts),
                                                 at<const int64_t>(ids),
                                                 at<const float>(penalty),
                                                 at<const float>(bias),
                                                 at<const int64_t>(given),
                                                 at<float>(entropies),
                                                 num_top,
                                                 at<int64_t>(top_ids),
                                                 at<float>(top_logprobs)};
          sample(problem, level, num_threads);
        });
      },
      py::arg("logits"), py::arg("ld"), py::arg("bf16"), py::arg("num_rows"), py::arg("vocab_size"), py::arg("u"),
      py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"), py::arg("tokens"),
      py::arg("logprobs"), py::arg("truncated_logprobs"), py::arg("is_bad"), py::arg("row_starts"), py::arg("ids"),
      py::arg("penalty"), py::arg("bias"), py::arg("given"), py::arg("entropies"), py::arg("num_top"),
      py::arg("top_ids"), py::arg("top_logprobs"), py::arg("level"), py::arg("num_threads"),
      "A token and its log-probability, a row.");
}

}  // namespace

void bind_rollout(py::module_& m) {
  bind_block_allocator(m);
  bind_tails(m);
  bind_decode(m);
  bind_sample(m);
}

}  // namespace r1fast
