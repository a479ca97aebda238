// Decode attention over the tiled cache of paged_cache.hpp; the formulas are in kernels/paged_attention.py.
//
// Work is cut into units (some queries of one group, one kv head) and, where units are few, into chunks of positions.
// A unit reads the strips that its sequences share once for all its rows, then each sequence's own. Every row walks
// the same strips of 64 positions and merges the same chunks of 512, in order, whatever is shared and however work
// is cut: its result depends neither on the rows beside it nor on the number of threads.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "checks.hpp"
#include "decode_strip.hpp"
#include "team.hpp"

namespace r1fast {

constexpr int64_t kChunkPositions = 8 * kStrip;
constexpr int64_t kUnitRows = 64;      // rows that share a strip while it is in the cache
constexpr int64_t kUnitsPerThread = 4;  // fewer, and the work is cut finer

// Arrays of the caller. query_starts may be null: one query a sequence.
template <class T>
struct DecodeProblem {
  const T* q;  // (Nq, H, Dh)
  T* out;      // (Nq, H, Dh)
  int64_t num_heads;
  float scale;
  const int32_t* block_table;  // (B, max_blocks), or (S, max_blocks) with
  const int64_t* table_rows;   // (B): a sequence's row of it; null: sequence b has row b
  int64_t max_blocks;
  const int32_t* tails;  // rows of 16 as those of block_table: the slots of a block -1, see paged_cache.hpp; or null
  int64_t tiles_per_block;
  const int32_t* context_lens;   // (B)
  const int32_t* query_starts;   // (B + 1)
  const int32_t* group_starts;   // (num_groups + 1)
  const int32_t* shared_blocks;  // (num_groups)
  int64_t num_groups;

  int64_t first_query(int64_t sequence) const {
    return query_starts == nullptr ? sequence : query_starts[sequence];
  }
  // Positions that `query`, one of `sequence`, sees.
  int64_t limit(int64_t sequence, int64_t query) const {
    return context_lens[sequence] - (first_query(sequence + 1) - query) + 1;
  }
  // Throws unless the arrays that say who sees what fit together; blocks are not looked at beyond their sign. Returns the
  // number of queries.
  int64_t check() const {
    check_range("block_size", tiles_per_block, 1, 1 << 12);
    check_range("num_groups", num_groups, 0, INT32_MAX);
    check_range("max_blocks", max_blocks, 0, INT32_MAX);
    check_array("group_starts", reinterpret_cast<uintptr_t>(group_starts), num_groups + 1, sizeof(int32_t));
    check_array("shared_blocks", reinterpret_cast<uintptr_t>(shared_blocks), num_groups, sizeof(int32_t));
    const int64_t num_sequences = check_starts("group_starts", group_starts, num_groups);
    check_array("block_table", reinterpret_cast<uintptr_t>(block_table), num_sequences * max_blocks, sizeof(int32_t));
    check_optional("tails", reinterpret_cast<uintptr_t>(tails), num_sequences * kTile, sizeof(int32_t));
    check_array("context_lens", reinterpret_cast<uintptr_t>(context_lens), num_sequences, sizeof(int32_t));
    int64_t num_queries = num_sequences;
    if (query_starts != nullptr) {
      check_array("query_starts", reinterpret_cast<uintptr_t>(query_starts), num_sequences + 1, sizeof(int32_t));
      num_queries = check_starts("query_starts", query_starts, num_sequences);
    }
    const int64_t block_size = tiles_per_block * kTile;
    check_each("context_lens", context_lens, num_sequences, 0, max_blocks * block_size);
    for (int64_t group = 0; group < num_groups; ++group) {
      check_range("shared_blocks", shared_blocks[group], 0, max_blocks);
      for (int64_t b = group_starts[group]; b < group_starts[group + 1]; ++b) check_sequence(b, shared_blocks[group], block_size);
    }
    return num_queries;
  }

  int64_t table_row(int64_t sequence) const { return table_rows == nullptr ? sequence : table_rows[sequence]; }
  int64_t tile(int64_t sequence, int64_t position) const {  // below 0: it is a tail
    const int64_t index = position / kTile;
    const int32_t* const row = block_table + table_row(sequence) * max_blocks;
    if (tiles_per_block == 1) return row[index];
    return row[index / tiles_per_block] * tiles_per_block + index % tiles_per_block;
  }

 private:
  void check_sequence(int64_t sequence, int64_t shared, int64_t block_size) const {
    const int64_t context = context_lens[sequence], begin = first_query(sequence), end = first_query(sequence + 1);
    if (end > begin && shared * block_size > std::max<int64_t>(limit(sequence, begin), 0)) {
      throw std::invalid_argument("shared_blocks of sequence " + std::to_string(sequence) + " reach beyond " +
                                  "what its first query sees");
    }
    const int32_t* const row = block_table + table_row(sequence) * max_blocks;
    const int64_t num_blocks = ceil_div(context, block_size);
    for (int64_t i = 0; i < num_blocks; ++i) {
      if (row[i] >= 0 || (tails != nullptr && tiles_per_block == 1 && i + 1 == num_blocks)) continue;
      throw std::invalid_argument("block " + std::to_string(i) + " of sequence " + std::to_string(sequence) + " is " +
                                  std::to_string(row[i]));
    }
  }
};

// Queries [begin, end) of one group, the first of them in `sequence`.
struct DecodeUnit {
  int64_t sequence;
  int64_t begin;
  int64_t end;
  int64_t shared;      // positions that all of them see and their sequences share: whole strips
  int64_t num_chunks;  // of the longest limit
  int64_t first_partial;  // rows before it in the partial results, of one kv head
};

template <class T>
struct StripKernels {
  void (*attend)(const Strip<T>&, const Rows&);
  void (*merge)(const Rows&, const Rows&);
  void (*finish)(const float*, float, int64_t, T*);
};

template <class T>
void attend_strip_baseline(const Strip<T>& strip, const Rows& rows) {
  attend_strip(strip, rows);
}

#define R1FAST_STRIP_KERNELS(suffix, attributes)                                                             \
  attributes inline void merge_rows_##suffix(const Rows& rows, const Rows& more) { merge_rows(rows, more); } \
  template <class T>                                                                                         \
  attributes void finish_row_##suffix(const float* a, float l, int64_t head_dim, T* out) {                   \
    finish_row(a, l, head_dim, out);                                                                         \
  }
R1FAST_STRIP_KERNELS(baseline, )
#if defined(__x86_64__)
R1FAST_STRIP_KERNELS(avx2, R1FAST_AVX2)
R1FAST_STRIP_KERNELS(avx512, R1FAST_AVX512)
#endif
#undef R1FAST_STRIP_KERNELS

// `level` is auto, baseline, avx2 or avx512.
template <class T>
StripKernels<T> strip_kernels(const std::string& level) {
  const Level found = level_of(level);
#if defined(__x86_64__)
  if (found == Level::kAvx512) return {&avx512::attend_rows<T>, &merge_rows_avx512, &finish_row_avx512<T>};
  if (found == Level::kAvx2) return {&avx2::attend_rows<T>, &merge_rows_avx2, &finish_row_avx2<T>};
#endif
  return {&attend_strip_baseline<T>, &merge_rows_baseline, &finish_row_baseline<T>};
}

// What a call needs beside its arguments, kept from one call to the next: nothing is allocated once it is large enough.
class DecodeWorkspace {
 public:
  template <class T>
  void run(const DecodeProblem<T>& problem, const PagedCache<T>& cache, const std::string& level,
           int64_t num_threads) {
    const StripKernels<T> kernels = strip_kernels<T>(level);
    const double steps = prepare(problem, cache.num_kv_heads, cache.head_dim, num_threads);
    attend(problem, cache, kernels, Alone{worthwhile_threads(num_threads, steps)});
  }

  // Cuts the work, for any cache and queries of these shapes. Returns the multiply-adds, about.
  template <class T>
  double prepare(const DecodeProblem<T>& problem, int64_t kv_heads, int64_t head_dim, int64_t num_threads) {
    const double steps = plan(problem, problem.num_heads / kv_heads, kv_heads, num_threads);
    const int64_t num_units = static_cast<int64_t>(units_.size()) * kv_heads;
    num_parts_ = 1;
    if (num_threads > 1 && num_units < kUnitsPerThread * num_threads) {
      for (const DecodeUnit& unit : units_) num_parts_ = std::max(num_parts_, unit.num_chunks);
    }
    num_tasks_ = num_units * num_parts_;
    // of each thread q, and (m, l, a) twice: of all chunks so far and of one
    const int64_t ld = row_floats(head_dim), row = ld + 2;
    tail_ = problem.tails == nullptr ? 0 : 4 * round_up(head_dim * kTile * static_cast<int64_t>(sizeof(T)) / 4, kTile);
    scratch_ = round_up(most_rows_ * (ld + 2 * row), kTile) + tail_;
    reserve(scratch_ * std::max<int64_t>(num_threads, 1), kv_heads * row);
    return steps * kv_heads * head_dim;
  }

  // The same sequences and queries some positions later. The number of tasks stays: who asks for it may be late.
  template <class T>
  void go_on(const DecodeProblem<T>& problem, int64_t kv_heads, int64_t head_dim, int64_t num_threads) {
    plan(problem, problem.num_heads / kv_heads, kv_heads, num_threads);
    reserve(scratch_ * std::max<int64_t>(num_threads, 1), kv_heads * (row_floats(head_dim) + 2));
  }

  // The problem that was prepared, in no more threads.
  template <class T, class Each>
  void attend(const DecodeProblem<T>& problem, const PagedCache<T>& cache, const StripKernels<T>& kernels,
              Each&& each) {
    const int64_t kv_heads = cache.num_kv_heads;
    each(num_tasks_, [&](int64_t task, int64_t thread) {
      float* const memory = floats_->data() + thread * scratch_;
      const Call<T> call{problem, cache, kernels, problem.num_heads / kv_heads, row_floats(cache.head_dim), partials_,
                         reinterpret_cast<T*>(memory)};
      const int64_t index = task / num_parts_, part = task % num_parts_, head = index % kv_heads;
      const DecodeUnit& unit = units_[static_cast<size_t>(index / kv_heads)];
      float* const scratch = memory + tail_;
      if (num_parts_ == 1 || unit.num_chunks == 1) {
        if (part == 0) attend_unit(call, unit, head, 0, unit.num_chunks, scratch);
        return;
      }
      const int64_t parts = std::min(num_parts_, unit.num_chunks);
      if (part >= parts) return;
      for (int64_t chunk = part; chunk < (part + 1 < parts ? part + 1 : unit.num_chunks); ++chunk) {
        attend_unit(call, unit, head, chunk, chunk + 1, scratch);
      }
      // the last one to finish merges them all
      std::atomic<int64_t>& finished = finished_[static_cast<size_t>(index)];
      if (finished.fetch_add(1, std::memory_order_acq_rel) + 1 == parts) {
        finished.store(0, std::memory_order_relaxed);
        finish_unit(call, unit, head);
      }
    });
  }

 private:
  template <class T>
  struct Call {
    const DecodeProblem<T>& problem;
    const PagedCache<T>& cache;
    const StripKernels<T>& kernels;
    int64_t heads;  // query heads of a kv head
    int64_t ld;
    float* partials;
    T* tiles;  // keys and values of tails, of two strips
  };

  // Strips one after the other: each is attended to when the next one is known.
  template <class T>
  struct Walk {
    const Call<T>& call;
    int64_t head;
    Strip<T> strips[2];
    Rows rows[2];
    int64_t count = 0;

    void visit(int64_t sequence, int64_t position, int64_t num_positions, const Rows& of) {
      Strip<T>& strip = strips[count % 2];
      strip = {{}, {}, num_positions, call.cache.head_dim, call.problem.scale, &strip};
      for (int64_t t = 0; t < kStripTiles; ++t) {
        const int64_t left = num_positions - t * kTile;
        if (left <= 0) {  // behind the last tile the first one again: it can be fetched
          strip.keys[t] = strip.keys[0];
          strip.values[t] = strip.values[0];
          continue;
        }
        const int64_t tile = call.problem.tile(sequence, position + t * kTile);
        if (tile < 0) {
          T* const keys = call.tiles + count % 2 * 2 * call.cache.tile_size();
          T* const values = keys + call.cache.tile_size();
          const int32_t* const slots = call.problem.tails + call.problem.table_row(sequence) * kTile;
          gather_rows(call.cache, head, slots, std::min(left, kTile), keys, values);
          strip.keys[t] = keys;
          strip.values[t] = values;
        } else {
          strip.keys[t] = call.cache.key_tile(tile, head);
          strip.values[t] = call.cache.value_tile(tile, head);
        }
      }
      rows[count % 2] = of;
      if (count++ > 0) {
        strips[count % 2].next = &strip;
        call.kernels.attend(strips[count % 2], rows[count % 2]);
      }
    }
    void finish() {
      if (count > 0) call.kernels.attend(strips[(count - 1) % 2], rows[(count - 1) % 2]);
    }
  };

  // Fills units_; returns query rows times positions, about, over one kv head's query heads.
  template <class T>
  double plan(const DecodeProblem<T>& problem, int64_t heads, int64_t kv_heads, int64_t num_threads) {
    const int64_t num_sequences = problem.group_starts[problem.num_groups];
    const int64_t wanted = kUnitsPerThread * num_threads;
    int64_t queries = std::max<int64_t>(kUnitRows / heads, 1);
    const int64_t all = problem.first_query(num_sequences);
    while (queries > 1 && std::max(ceil_div(all, queries), problem.num_groups) * kv_heads < wanted) queries /= 2;
    units_.clear();
    num_partials_ = most_rows_ = 0;
    double steps = 0;
    for (int64_t g = 0; g < problem.num_groups; ++g) {
      int64_t sequence = problem.group_starts[g];
      const int64_t end = problem.first_query(problem.group_starts[g + 1]);
      for (int64_t begin = problem.first_query(sequence); begin < end; begin += queries) {
        while (problem.first_query(sequence + 1) <= begin) ++sequence;
        DecodeUnit unit{sequence, begin, std::min(begin + queries, end), 0, 0, num_partials_};
        int64_t least = problem.limit(sequence, begin), most = 0, last = sequence;
        for (int64_t q = begin; q < unit.end; ++q) {
          while (problem.first_query(last + 1) <= q) ++last;
          least = std::min(least, problem.limit(last, q));
          most = std::max(most, problem.limit(last, q));
          steps += static_cast<double>(problem.limit(last, q) * heads);
        }
        const int64_t shared = problem.shared_blocks[g] * problem.tiles_per_block * kTile;
        unit.shared = std::max<int64_t>(std::min(shared, least), 0) / kStrip * kStrip;
        unit.num_chunks = std::max<int64_t>(ceil_div(most, kChunkPositions), 1);
        const int64_t num_rows = (unit.end - begin) * heads;
        num_partials_ += num_rows * unit.num_chunks;
        most_rows_ = std::max(most_rows_, num_rows);
        units_.push_back(unit);
      }
    }
    return steps;
  }

  void reserve(int64_t of_threads, int64_t of_partial) {
    const bool in_parts = num_parts_ > 1;
    const int64_t num_floats = of_threads + (in_parts ? num_partials_ * of_partial : 0);
    if (floats_ == nullptr || num_floats > capacity_) {
      capacity_ = num_floats + num_floats / 2;
      floats_ = std::make_unique<AlignedBuffer<float>>(capacity_);
    }
    partials_ = floats_->data() + of_threads;
    if (in_parts && static_cast<int64_t>(finished_.size()) < num_tasks_) {
      finished_ = std::vector<std::atomic<int64_t>>(static_cast<size_t>(num_tasks_));
    }
  }

  // Rows whose (m, l, a) lie one after the other in `memory`.
  static Rows rows_at(float* memory, const float* q, int64_t count, int64_t ld) {
    return {q, memory, memory + count, memory + 2 * count, ld, count};
  }

  template <class T>
  static Rows partial(const Call<T>& call, const DecodeUnit& unit, int64_t head, int64_t chunk) {
    const int64_t count = (unit.end - unit.begin) * call.heads;
    const int64_t before = unit.first_partial * call.cache.num_kv_heads + (head * unit.num_chunks + chunk) * count;
    return rows_at(call.partials + before * (call.ld + 2), nullptr, count, call.ld);
  }

  // The unit's rows over some chunks: all of them go to `out`, a single one of several to the partial results.
  template <class T>
  static void attend_unit(const Call<T>& call, const DecodeUnit& unit, int64_t head, int64_t first_chunk, int64_t end_chunk,
                          float* scratch) {
    const int64_t count = (unit.end - unit.begin) * call.heads, dim = call.cache.head_dim, ld = call.ld;
    for (int64_t r = 0; r < count; ++r) {
      load_query(call.problem.q + query_head(call, unit, head, r) * dim, dim, scratch + r * ld);
    }
    float* const state = scratch + count * ld;
    const bool whole = first_chunk == 0 && end_chunk == unit.num_chunks;
    Rows sums = whole ? rows_at(state, scratch, count, ld) : partial(call, unit, head, first_chunk);
    sums.q = scratch;
    clear(sums);
    attend_chunk(call, unit, head, first_chunk, sums);
    const Rows more = rows_at(state + count * (ld + 2), scratch, count, ld);
    for (int64_t chunk = first_chunk + 1; chunk < end_chunk; ++chunk) {
      clear(more);
      attend_chunk(call, unit, head, chunk, more);
      call.kernels.merge(sums, more);
    }
    if (whole) write(call, unit, head, sums);
  }

  template <class T>
  static void finish_unit(const Call<T>& call, const DecodeUnit& unit, int64_t head) {
    const Rows sums = partial(call, unit, head, 0);
    for (int64_t chunk = 1; chunk < unit.num_chunks; ++chunk) call.kernels.merge(sums, partial(call, unit, head, chunk));
    write(call, unit, head, sums);
  }

  template <class T>
  static void write(const Call<T>& call, const DecodeUnit& unit, int64_t head, const Rows& rows) {
    const int64_t dim = call.cache.head_dim;
    for (int64_t r = 0; r < rows.count; ++r) {
      T* const out = call.problem.out + query_head(call, unit, head, r) * dim;
      call.kernels.finish(rows.a + r * rows.ld, rows.l[r], dim, out);
    }
  }

  // Row r of a unit as a row of (Nq * H, Dh).
  template <class T>
  static int64_t query_head(const Call<T>& call, const DecodeUnit& unit, int64_t head, int64_t r) {
    return (unit.begin + r / call.heads) * call.problem.num_heads + head * call.heads + r % call.heads;
  }

  template <class T>
  static void attend_chunk(const Call<T>& call, const DecodeUnit& unit, int64_t head, int64_t chunk, const Rows& rows) {
    const int64_t begin = chunk * kChunkPositions, end = begin + kChunkPositions;
    const int64_t shared_end = std::clamp(unit.shared, begin, end);
    Walk<T> walk{call, head, {}, {}};
    for (int64_t p = begin; p < shared_end; p += kStrip) walk.visit(unit.sequence, p, kStrip, rows);
    int64_t sequence = unit.sequence;
    for (int64_t q = unit.begin; q < unit.end;) {
      while (call.problem.first_query(sequence + 1) <= q) ++sequence;
      const int64_t q_end = std::min(call.problem.first_query(sequence + 1), unit.end);
      const Rows own = rows.slice((q - unit.begin) * call.heads, (q_end - unit.begin) * call.heads);
      attend_own(walk, sequence, q, q_end, shared_end, end, own);
      q = q_end;
    }
    walk.finish();
  }

  // Queries [q, q_end) of one sequence over positions [begin, end): those that see a whole strip together.
  template <class T>
  static void attend_own(Walk<T>& walk, int64_t sequence, int64_t q, int64_t q_end, int64_t begin, int64_t end,
                         const Rows& rows) {
    const DecodeProblem<T>& problem = walk.call.problem;
    const int64_t heads = walk.call.heads, most = std::min(end, problem.limit(sequence, q_end - 1));
    for (int64_t p = begin; p < most; p += kStrip) {
      int64_t i = 0;  // limits increase
      for (; i < q_end - q; ++i) {
        const int64_t in_sight = problem.limit(sequence, q + i) - p;
        if (in_sight >= kStrip) break;
        if (in_sight > 0) walk.visit(sequence, p, in_sight, rows.slice(i * heads, (i + 1) * heads));
      }
      if (i < q_end - q) walk.visit(sequence, p, kStrip, rows.slice(i * heads, rows.count));
    }
  }

  std::vector<DecodeUnit> units_;
  std::vector<std::atomic<int64_t>> finished_;  // parts of a unit and a head
  std::unique_ptr<AlignedBuffer<float>> floats_;
  int64_t capacity_ = 0;
  float* partials_ = nullptr;
  int64_t num_tasks_ = 0;
  int64_t num_parts_ = 1;     // that a unit is cut into
  int64_t scratch_ = 0;       // floats of a thread,
  int64_t tail_ = 0;          // the first of which are the tiles of tails
  int64_t num_partials_ = 0;  // rows times chunks of all units
  int64_t most_rows_ = 0;     // of a unit
};

}  // namespace r1fast
