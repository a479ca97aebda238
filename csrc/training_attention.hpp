// Attention of training on the CPU, forward and backward: causal in each segment of a packed batch, and over the whole of
// the segment that it continues. The formulas are in kernels/prefix_attention.py.
//
// A tile holds some queries of one tree, a row for each query head of one kv head. It meets strips of keys one after the
// other, first those of the root, then each segment's own, in one online softmax:
//
//   s = scale q k^T;  m' = max(m, max s);  p = exp(s - m');  l = l exp(m - m') + sum p;  o = o exp(m - m') + p v
//
// Strips and the order of sums are decode's (decode_attention.hpp): a row of o has the sampler's bits. What is read once, and
// for how many rows, is not decode's.
//
// and backward, with share = 1 / l and delta = do . o:
//
//   p = share exp(s - m);  ds = scale p (do v^T - delta);  dq += ds k;  dk += ds^T q;  dv += p^T do
//
// All sums are in fp32, whatever the type. A row of o and dq is the same bits whatever else is in the batch.
#pragma once

#include "attention_plan.hpp"
#include "attention_tiles.hpp"
#include "decode_attention.hpp"

namespace r1fast {

// Arrays of the caller; `ld_` is elements from token to token, and heads lie side by side.
template <class T>
struct AttentionProblem {
  Segments segments;
  int64_t num_heads, num_kv_heads, head_dim;
  float scale;
  const T* q;  // (T, H, Dh)
  int64_t ld_q;
  const T* k;  // (T, K, Dh)
  int64_t ld_k;
  const T* v;
  int64_t ld_v;
  float* m;         // (T, H)
  float* share;     // (T, H)
  float* wide_out;  // (T, H, Dh), or null forward

  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t width() const { return round_up(head_dim, kVector); }

  // Tokens from `first` on of the query heads of one kv head.
  template <class U>
  TokenRows<U> queries(U* data, int64_t ld, int64_t head, int64_t first, int64_t count) const {
    return {data + first * ld + head * group() * head_dim, ld, count, group(), head_dim};
  }
  template <class U>
  TokenRows<U> keys(U* data, int64_t ld, int64_t head, int64_t first, int64_t count) const {
    return {data + first * ld + head * head_dim, ld, count, 1, head_dim};
  }
};

template <class T>
class TrainingAttention {
 public:
  TrainingAttention(const AttentionProblem<T>& problem, const std::string& level, int64_t num_threads)
      : problem_(problem),
        tiles_(attention_tiles<T>(level)),
        kernels_(strip_kernels<T>(level)),
        group_(problem.group()),
        width_(problem.width()),
        num_queries_(std::max<int64_t>(kTileFloats / width_ / group_, 1)),
        plan_(problem.segments, num_queries_, static_cast<double>(group_ * width_)),
        num_threads_(worthwhile_threads(num_threads, plan_.pairs * problem.num_heads * width_)) {}

  void forward(T* out) const {
    const int64_t rows = num_queries_ * group_;
    const int64_t size = rows * 3 * width_ + 6 * round_up(rows, kVector) + kForwardKeys * (2 * width_ + kBlockRows) +
                         kStrip * width_;
    const AlignedBuffer<float> memory(size * num_threads_);
    const std::vector<int64_t> order = by_cost(plan_.units);
    parallel_for(num_tasks(order), num_threads_, [&](int64_t task, int64_t thread) {
      const Unit& unit = plan_.units[static_cast<size_t>(order[static_cast<size_t>(task / problem_.num_kv_heads)])];
      Scratch scratch(memory.data() + thread * size);
      forward_unit(unit, task % problem_.num_kv_heads, scratch, out);
    });
  }

  // dout (T, H, Dh); dq (T, H, Dh), dk and dv (T, K, Dh) are contiguous.
  void backward(const T* dout, int64_t ld_dout, T* dq, T* dk, T* dv) const {
    const int64_t rows = num_queries_ * group_;
    const int64_t task_size = plan_.num_task_rows * 2 * width_, shared_size = plan_.num_shared_rows * 2 * width_;
    const int64_t size = task_size + rows * 3 * width_ + 4 * round_up(rows, kVector) +
                         kPanelKeys * (3 * width_ + 2 * kGradientRows);
    const AlignedBuffer<float> memory(size * num_threads_);
    const AlignedBuffer<float> shared(shared_size * problem_.num_kv_heads);
    const std::vector<int64_t> order = by_cost(plan_.tasks);
    parallel_for(num_tasks(order), num_threads_, [&](int64_t index, int64_t thread) {
      const Task& task = plan_.tasks[static_cast<size_t>(order[static_cast<size_t>(index / problem_.num_kv_heads)])];
      const int64_t head = index % problem_.num_kv_heads;
      Scratch scratch(memory.data() + thread * size);
      const Regions regions{scratch.take(task_size), shared.data() + head * shared_size};
      for (int64_t r = task.first_region; r < task.end_region; ++r) {
        const Sums sums = sums_at(r, regions);
        std::fill(sums.dk, sums.dk + 2 * sums.num_keys * width_, 0.0f);
      }
      for (int64_t u = task.first_unit; u < task.end_unit; ++u) {
        backward_unit(task, plan_.units[static_cast<size_t>(u)], head, scratch, regions, dout, ld_dout, dq);
      }
      for (int64_t r = task.first_region; r < task.end_region; ++r) {
        if (!plan_.regions[static_cast<size_t>(r)].is_shared) store_sums(r, regions, head, dk, dv);
      }
    });
    parallel_for(static_cast<int64_t>(plan_.shared.size()) * problem_.num_kv_heads, num_threads_,
                 [&](int64_t index, int64_t) {
                   const int64_t head = index % problem_.num_kv_heads;
                   const Regions regions{nullptr, shared.data() + head * shared_size};
                   add_up(plan_.shared[static_cast<size_t>(index / problem_.num_kv_heads)], regions, head, dk, dv);
                 });
  }

 private:
  static constexpr int64_t kTileFloats = 32768;  // of a tile's q: with the others half of a cache of 1 MiB
  static constexpr int64_t kForwardKeys = 256;   // whose scores are in the cache together: some strips of one chunk
  static constexpr int64_t kGradientRows = 96;   // whose p and ds are kept at a time

  // Hands out a thread's memory, on cache lines.
  class Scratch {
   public:
    explicit Scratch(float* next) : next_(next) {}
    float* take(int64_t size) {
      float* const memory = next_;
      next_ += round_up(size, kVector);
      return memory;
    }

   private:
    float* next_;
  };

  // Memory of a task's regions, and of those that outlive their tasks, of one kv head.
  struct Regions {
    float* own;
    float* shared;
  };

  struct Sums {
    float* dk;  // (num_keys, width)
    float* dv;
    int64_t num_keys;
  };

  Sums sums_at(int64_t r, const Regions& regions) const {
    const Region& region = plan_.regions[static_cast<size_t>(r)];
    float* const dk = (region.is_shared ? regions.shared : regions.own) + region.first_row * 2 * width_;
    return {dk, dk + region.num_keys * width_, region.num_keys};
  }

  int64_t num_tasks(const std::vector<int64_t>& order) const {
    return static_cast<int64_t>(order.size()) * problem_.num_kv_heads;
  }

  // The longest first: then no thread begins one when the others are done.
  template <class Part>
  static std::vector<int64_t> by_cost(const std::vector<Part>& parts) {
    std::vector<int64_t> order(parts.size());
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return parts[static_cast<size_t>(a)].pairs > parts[static_cast<size_t>(b)].pairs;
    });
    return order;
  }

  // Calls body(piece, the first token, its rows in the tile) for each piece.
  template <class Body>
  void for_pieces(const Unit& unit, const Body& body) const {
    int64_t row = 0;
    for (int64_t i = unit.first_piece; i < unit.end_piece; ++i) {
      const Piece& piece = plan_.pieces[static_cast<size_t>(i)];
      body(piece, problem_.segments.bounds[piece.segment] + piece.begin, row);
      row += (piece.end - piece.begin) * group_;
    }
  }

  // limits[r]: how many of the keys of `segment` row r sees; they increase.
  void set_limits(const Piece& piece, int64_t segment, int32_t* limits) const {
    for (int64_t q = piece.begin; q < piece.end; ++q, limits += group_) {
      const int64_t limit = piece.segment == segment ? q + 1 : problem_.segments.length(segment);
      std::fill(limits, limits + group_, static_cast<int32_t>(limit));
    }
  }

  // Calls body(the segment whose keys come next, its region, first row, end row) for the tile's rows with limits set.
  template <class Body>
  void for_keys(const Unit& unit, int64_t root_region, int32_t* limits, const Body& body) const {
    for_pieces(unit, [&](const Piece& piece, int64_t, int64_t row) { set_limits(piece, unit.root, limits + row); });
    body(unit.root, root_region, 0, unit.num_queries * group_);
    for_pieces(unit, [&](const Piece& piece, int64_t, int64_t row) {
      if (piece.segment == unit.root) return;
      set_limits(piece, piece.segment, limits + row);
      body(piece.segment, piece.region, row, row + (piece.end - piece.begin) * group_);
    });
  }

  // How many keys of a block each of n rows sees; returns the last one's, the most.
  static int64_t count_keys(const int32_t* limits, int64_t begin, int64_t count, int64_t n, int64_t* counts) {
    for (int64_t i = 0; i < n; ++i) counts[i] = std::clamp<int64_t>(limits[i] - begin, 0, count);
    return counts[n - 1];
  }

  // Strips of kStrip positions, counted from the root's first, and chunks of kChunkPositions that are merged.
  void forward_unit(const Unit& unit, int64_t head, Scratch scratch, T* out) const {
    const int64_t rows = unit.num_queries * group_, before = problem_.segments.length(unit.root);
    float* const q = scratch.take(rows * width_);
    const Rows sums = take_rows(scratch, q, rows), chunk = take_rows(scratch, q, rows);
    auto* const limits = reinterpret_cast<int32_t*>(scratch.take(rows));  // positions that a row sees; they increase
    float* const shares = scratch.take(rows);
    int64_t most = 0;
    for_pieces(unit, [&](const Piece& piece, int64_t token, int64_t row) {
      tiles_.load_rows(problem_.queries(problem_.q, problem_.ld_q, head, token, piece.end - piece.begin), width_,
                       q + row * width_);
      const int64_t first = piece.segment == unit.root ? 0 : before;
      for (int64_t i = piece.begin; i < piece.end; ++i, row += group_) {
        std::fill_n(limits + row, group_, static_cast<int32_t>(first + i + 1));
      }
      most = std::max(most, first + piece.end);
    });
    clear(sums);
    if (most > kChunkPositions) clear(chunk);
    const auto walk = [&](int64_t segment, int64_t begin, int64_t end, int64_t first_row, int64_t end_row) {
      const Rows of_walk = sums.slice(first_row, end_row), of_chunk = chunk.slice(first_row, end_row);
      for (int64_t p = begin, next; p < end; p = next) {
        next = std::min(p / kForwardKeys * kForwardKeys + kForwardKeys, end);
        if (p % kChunkPositions == 0 && p > kChunkPositions) {
          kernels_.merge(of_walk, of_chunk);
          clear(of_chunk);
        }
        attend({unit.root, segment, p, next - p}, head, limits + first_row,
               p < kChunkPositions ? of_walk : of_chunk, scratch);
      }
    };
    // the strips that lie in the root are those of all rows
    const int64_t shared = std::min<int64_t>(before / kStrip * kStrip, limits[rows - 1]);
    walk(unit.root, 0, shared, 0, rows);
    for_pieces(unit, [&](const Piece& piece, int64_t, int64_t row) {
      const int64_t end_row = row + (piece.end - piece.begin) * group_;
      walk(piece.segment, shared, limits[end_row - 1], row, end_row);
    });
    if (most > kChunkPositions) kernels_.merge(sums, chunk);
    for (int64_t r = 0; r < rows; ++r) shares[r] = 1 / sums.l[r];
    const int64_t ld = problem_.num_heads * problem_.head_dim;
    for_pieces(unit, [&](const Piece& piece, int64_t token, int64_t row) {
      const int64_t count = piece.end - piece.begin;
      const float* const from = sums.a + row * width_;
      tiles_.store_rows(from, width_, shares + row, problem_.queries(out, ld, head, token, count));
      if (problem_.wide_out != nullptr) {
        tiles_.store_wide_rows(from, width_, shares + row, problem_.queries(problem_.wide_out, ld, head, token, count));
      }
      for (int64_t i = 0; i < count; ++i) {
        std::copy_n(sums.m + row + i * group_, group_, problem_.m + first_row(token + i, head));
        std::copy_n(shares + row + i * group_, group_, problem_.share + first_row(token + i, head));
      }
    });
  }

  Rows take_rows(Scratch& scratch, const float* q, int64_t count) const {
    float* const m = scratch.take(count);
    float* const l = scratch.take(count);
    return {q, m, l, scratch.take(count * width_), width_, count};
  }

  // In (T, H).
  int64_t first_row(int64_t token, int64_t head) const { return token * problem_.num_heads + head * group_; }

  // Positions [begin, begin + count) of the sequence of a root and a segment that continues it, or is it.
  struct KeyBlock {
    int64_t root, segment, begin, count;
  };

  void attend(const KeyBlock& block, int64_t head, const int32_t* limits, const Rows& rows, Scratch scratch) const {
    float* const keys = scratch.take(kForwardKeys * width_);
    float* const values = scratch.take(kForwardKeys * width_);
    float* const s = scratch.take(kForwardKeys * kBlockRows);
    auto* const both = reinterpret_cast<T*>(scratch.take(kStrip * width_));
    for (int64_t i = 0; i < block.count; i += kStrip) {
      const int64_t count = std::min(block.count - i, kStrip);
      load_keys({block.root, block.segment, block.begin + i, count}, head, keys + i * width_, values + i * width_, both);
    }
    int64_t row = 0;
    while (limits[row] <= block.begin) ++row;
    for (int64_t n; row < rows.count; row += n) {
      n = part_of(rows.count - row, kBlockRows);
      const int64_t most = std::min<int64_t>(limits[row + n - 1] - block.begin, block.count);
      float shrink[kForwardKeys / kStrip * kBlockRows];
      for (int64_t i = 0; i < most; i += kStrip) {
        int64_t counts[kBlockRows];
        const int64_t in_sight =
            round_up(count_keys(limits + row, block.begin + i, std::min(block.count - i, kStrip), n, counts), kVector);
        tiles_.multiply({n, in_sight, width_, rows.q + row * width_, width_, keys + i * width_, kPanelKeys, s + i,
                         kForwardKeys, false, nullptr});
        tiles_.softmax_rows({n, in_sight, counts, problem_.scale, s + i, kForwardKeys, rows.m + row, rows.l + row,
                             shrink + i / kStrip * kBlockRows});
      }
      tiles_.multiply({n, width_, most, s, kForwardKeys, values, width_, rows.a + row * width_, width_, false, shrink});
    }
  }

  // Turned keys, and values, of a strip. `both` is for keys of which some are of the root.
  void load_keys(const KeyBlock& strip, int64_t head, float* keys, float* values, T* both) const {
    const Segments& segments = problem_.segments;
    const int64_t length = segments.length(strip.root);
    const bool has_root = strip.begin < length;
    const int64_t token = has_root ? segments.bounds[strip.root] + strip.begin
                                   : segments.bounds[strip.segment] + strip.begin - length;
    const int64_t count = has_root ? std::min(strip.count, length - strip.begin) : strip.count;
    const int64_t rest = strip.count - count;
    TokenRows<const T> k = problem_.keys(problem_.k, problem_.ld_k, head, token, count);
    tiles_.load_rows(problem_.keys(problem_.v, problem_.ld_v, head, token, count), width_, values);
    if (rest > 0) {
      const int64_t first = segments.bounds[strip.segment];
      const TokenRows<const T> own = problem_.keys(problem_.k, problem_.ld_k, head, first, rest);
      for (const TokenRows<const T>& from : {k, own}) {
        for (int64_t i = 0; i < from.num_tokens; ++i, both += k.head_dim) {
          std::copy_n(from.data + i * from.ld, k.head_dim, both);
        }
      }
      k = {both - strip.count * k.head_dim, k.head_dim, strip.count, 1, k.head_dim};
      tiles_.load_rows(problem_.keys(problem_.v, problem_.ld_v, head, first, rest), width_, values + count * width_);
    }
    tiles_.turn_rows(k, width_, keys);
  }

  void backward_unit(const Task& task, const Unit& unit, int64_t head, Scratch scratch, const Regions& regions,
                     const T* dout, int64_t ld_dout, T* dq) const {
    const int64_t rows = unit.num_queries * group_, ld = problem_.num_heads * problem_.head_dim;
    GradientTile tile{};
    tile.q = scratch.take(rows * width_);
    tile.dout = scratch.take(rows * width_);
    tile.dq = scratch.take(rows * width_);
    tile.m = scratch.take(rows);
    tile.share = scratch.take(rows);
    tile.delta = scratch.take(rows);
    auto* const limits = reinterpret_cast<int32_t*>(scratch.take(rows));
    for_pieces(unit, [&](const Piece& piece, int64_t token, int64_t row) {
      const int64_t count = piece.end - piece.begin;
      float* const out = tile.dq + row * width_;  // for a moment
      tiles_.load_rows(problem_.queries(problem_.q, problem_.ld_q, head, token, count), width_, tile.q + row * width_);
      tiles_.load_rows(problem_.queries(dout, ld_dout, head, token, count), width_, tile.dout + row * width_);
      tiles_.load_wide_rows(problem_.queries(static_cast<const float*>(problem_.wide_out), ld, head, token, count), width_,
                            out);
      tiles_.dot_rows(tile.dout + row * width_, out, count * group_, width_, tile.delta + row);
      for (int64_t i = 0; i < count; ++i) {
        std::copy_n(problem_.m + first_row(token + i, head), group_, tile.m + row + i * group_);
        std::copy_n(problem_.share + first_row(token + i, head), group_, tile.share + row + i * group_);
      }
    });
    std::fill(tile.dq, tile.dq + rows * width_, 0.0f);
    for_keys(unit, task.first_region, limits, [&](int64_t segment, int64_t r, int64_t begin, int64_t end) {
      differentiate(segment, head, limits + begin, end - begin, tile.from(begin, width_), sums_at(r, regions), scratch);
    });
    for_pieces(unit, [&](const Piece& piece, int64_t token, int64_t row) {
      tiles_.store_rows(tile.dq + row * width_, width_, nullptr,
                        problem_.queries(dq, ld, head, token, piece.end - piece.begin));
    });
  }

  struct GradientTile {
    float* q;
    float* dout;
    float* dq;
    float* m;
    float* share;
    float* delta;

    GradientTile from(int64_t row, int64_t width) const {
      return {q + row * width, dout + row * width, dq + row * width, m + row, share + row, delta + row};
    }
  };

  void differentiate(int64_t segment, int64_t head, const int32_t* limits, int64_t num_rows, const GradientTile& tile,
                     const Sums& sums, Scratch scratch) const {
    float* const turned_keys = scratch.take(kPanelKeys * width_);
    float* const turned_values = scratch.take(kPanelKeys * width_);
    float* const keys = scratch.take(kPanelKeys * width_);
    float* const p = scratch.take(kPanelKeys * kGradientRows);
    float* const ds = scratch.take(kPanelKeys * kGradientRows);
    const int64_t num_keys = limits[num_rows - 1], token = problem_.segments.bounds[segment];
    int64_t first = 0;  // the first row that sees the block
    for (int64_t begin = 0; begin < num_keys; begin += kPanelKeys) {
      const int64_t count = std::min(num_keys - begin, kPanelKeys);
      const TokenRows<const T> k = problem_.keys(problem_.k, problem_.ld_k, head, token + begin, count);
      tiles_.turn_rows(k, width_, turned_keys);
      tiles_.turn_rows(problem_.keys(problem_.v, problem_.ld_v, head, token + begin, count), width_, turned_values);
      tiles_.load_rows(k, width_, keys);
      while (limits[first] <= begin) ++first;
      for (int64_t row = first; row < num_rows; row += kGradientRows) {
        const int64_t n = std::min(num_rows - row, kGradientRows);
        const GradientTile part = tile.from(row, width_);
        weigh(part, limits + row, n, begin, count, turned_keys, turned_values, keys, p, ds);
        for (int64_t key = 0, seen = 0, m; key < count; key += m) {
          m = part_of(count - key, kBlockRows);
          while (seen < n && limits[row + seen] <= begin + key) ++seen;  // rows before see none of these keys
          if (seen == n) break;
          const int64_t at = (begin + key) * width_, from = seen * kPanelKeys + key;
          tiles_.multiply_turned({m, width_, n - seen, ds + from, kPanelKeys, part.q + seen * width_, width_,
                                  sums.dk + at, width_, true, nullptr});
          tiles_.multiply_turned({m, width_, n - seen, p + from, kPanelKeys, part.dout + seen * width_, width_,
                                  sums.dv + at, width_, true, nullptr});
        }
      }
    }
  }

  // p and ds of n rows and a block of keys, and what they add to dq.
  void weigh(const GradientTile& tile, const int32_t* limits, int64_t num_rows, int64_t begin, int64_t count,
             const float* turned_keys, const float* turned_values, const float* keys, float* p, float* ds) const {
    for (int64_t row = 0, n; row < num_rows; row += n) {
      n = part_of(num_rows - row, kBlockRows);
      int64_t counts[kBlockRows];
      const int64_t most = count_keys(limits + row, begin, count, n, counts), in_sight = round_up(most, kVector);
      float* const p_rows = p + row * kPanelKeys;
      float* const ds_rows = ds + row * kPanelKeys;
      tiles_.multiply({n, in_sight, width_, tile.q + row * width_, width_, turned_keys, kPanelKeys, p_rows, kPanelKeys,
                       false, nullptr});
      tiles_.multiply({n, in_sight, width_, tile.dout + row * width_, width_, turned_values, kPanelKeys, ds_rows,
                       kPanelKeys, false, nullptr});
      tiles_.gradient_rows({n, in_sight, counts, problem_.scale, p_rows, ds_rows, kPanelKeys, tile.m + row,
                            tile.share + row, tile.delta + row});
      for (int64_t i = 0; i < n; ++i) {  // later keys, which a product over whole rows will read
        std::fill(p_rows + i * kPanelKeys + in_sight, p_rows + (i + 1) * kPanelKeys, 0.0f);
        std::fill(ds_rows + i * kPanelKeys + in_sight, ds_rows + (i + 1) * kPanelKeys, 0.0f);
      }
      tiles_.multiply({n, width_, most, ds_rows, kPanelKeys, keys, width_, tile.dq + row * width_, width_, true,
                       nullptr});
    }
  }

  // The regions of a segment, added to the last one.
  void add_up(const std::vector<int64_t>& regions_of_segment, const Regions& regions, int64_t head, T* dk, T* dv) const {
    const Sums whole = sums_at(regions_of_segment.back(), regions);
    for (size_t i = 0; i + 1 < regions_of_segment.size(); ++i) {
      const Sums part = sums_at(regions_of_segment[i], regions);
      tiles_.add_rows(part.dk, part.num_keys * width_, whole.dk);
      tiles_.add_rows(part.dv, part.num_keys * width_, whole.dv);
    }
    store_sums(regions_of_segment.back(), regions, head, dk, dv);
  }

  void store_sums(int64_t r, const Regions& regions, int64_t head, T* dk, T* dv) const {
    const Sums sums = sums_at(r, regions);
    const int64_t token = problem_.segments.bounds[plan_.regions[static_cast<size_t>(r)].segment];
    const int64_t ld = problem_.num_kv_heads * problem_.head_dim;
    tiles_.store_rows(sums.dk, width_, nullptr, problem_.keys(dk, ld, head, token, sums.num_keys));
    tiles_.store_rows(sums.dv, width_, nullptr, problem_.keys(dv, ld, head, token, sums.num_keys));
  }

  const AttentionProblem<T>& problem_;
  const AttentionTiles<T> tiles_;
  const StripKernels<T> kernels_;  // decode's merge
  const int64_t group_, width_, num_queries_;
  const AttentionPlan plan_;
  const int64_t num_threads_;
};

}  // namespace r1fast
