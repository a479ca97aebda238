// Decode steps of all running rows, from their last tokens to the next ones: forward, head, draw, append. Several of them
// in one call, as long as no row ends and the cache has blocks; the arrays are those of rollout/rows.py.
#pragma once

#include <chrono>

#include "block_allocator.hpp"
#include "decoder.hpp"
#include "sampling.hpp"
#include "tails.hpp"

#if defined(__x86_64__)
namespace r1fast {

// Arrays over S slots, and the rows of the batch (B): which slots, in which groups.
struct LoopRows {
  int64_t* tokens;  // (S, L): token n of a slot; the last one is not in the cache yet
  float* logprobs;  // (S, L): of what was drawn
  float* truncated;
  float* entropies;  // or null
  int64_t num_slots;    // S
  int64_t num_columns;  // L
  int32_t* blocks;  // (S, M)
  int64_t max_blocks;
  Tails* tails;  // or null: every row has blocks for all its positions
  int64_t* length;
  int64_t* num_blocks;
  const int64_t* prompt_length;
  const int64_t* limit;
  const int64_t* seed;
  const float* temperature;
  const int64_t* top_k;
  const float* top_p;
  const float* min_p;
  const bool* ignore_eos;
  const int64_t* stop_ids;  // (S, num_stop_ids), -1: none
  int64_t num_stop_ids;
  const bool* is_eos;  // (V)

  const int64_t* slots;  // (B)
  int64_t num_rows;
  const int32_t* group_starts;  // (num_groups + 1)
  const int32_t* shared_blocks;
  int64_t num_groups;
};

enum class Outcome : uint8_t { kGoing, kStopped, kFull, kBad };  // kBad: its logits are not finite, nothing was appended

// rollout/sampler.py's uniforms: splitmix64 of a sample's seed and a token's place in its completion.
inline double uniform(int64_t seed, int64_t position) {
  uint64_t x = static_cast<uint64_t>(seed) + 0x9e3779b97f4a7c15u * (static_cast<uint64_t>(position) + 1);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return static_cast<double>((x ^ (x >> 31)) >> 11) * 0x1p-53;
}

template <class T, class Tiles>
class DecodeLoop {
 public:
  using Native = Decoder<T, Tiles>;
  using Linear = PackedLinear<T, Tiles>;

  DecodeLoop(Native& decoder, const Linear& head, int64_t vocab_size)
      : decoder_(decoder), head_(head), vocab_size_(vocab_size) {
    check_range("vocab_size", vocab_size, 1, INT32_MAX);
    if (head.num_out() != vocab_size || head.num_in() != decoder.shape().width || head.num_halves() != 1) {
      throw std::invalid_argument("the head must be a weight of " + std::to_string(vocab_size) + " x " +
                                  std::to_string(decoder.shape().width));
    }
  }

  int64_t vocab_size() const { return vocab_size_; }

  // Throws unless the rows are slots of these arrays, each once, that have a token and room for `max_steps` more, and blocks
  // of this allocator for the first step.
  void check(const LoopRows& rows, const BlockAllocator& allocator, int64_t max_steps, int64_t num_threads) const {
    const int64_t block_size = allocator.block_size();
    check_threads(num_threads);
    check_range("max_steps", max_steps, 1, rows.num_columns);
    if (block_size % kTile != 0) throw std::invalid_argument("a decode loop needs blocks of whole tiles");
    if (rows.tails != nullptr) check_range("the slots of tails", rows.tails->num_slots(), rows.num_slots, rows.num_slots);
    const int64_t num_rows = check_starts("group_starts", rows.group_starts, rows.num_groups);
    check_range("the rows of group_starts", num_rows, rows.num_rows, rows.num_rows);
    std::vector<bool> is_taken(static_cast<size_t>(rows.num_slots));
    for (int64_t r = 0; r < rows.num_rows; ++r) {
      const int64_t slot = rows.slots[r];
      check_range("slots", slot, 0, rows.num_slots - 1);
      if (is_taken[static_cast<size_t>(slot)]) throw std::invalid_argument("slot " + std::to_string(slot) + " comes twice");
      is_taken[static_cast<size_t>(slot)] = true;
      const int64_t length = rows.length[slot], last = length - 1 + max_steps, num_blocks = rows.num_blocks[slot];
      check_range("length", length, 1, rows.num_columns - max_steps);
      check_range("prompt_length", rows.prompt_length[slot], 0, length);
      check_range("num_blocks", num_blocks, 0, rows.max_blocks);
      check_range("the blocks of the last step", ceil_div(last, block_size), 0, rows.max_blocks);
      const bool has_room = rows.tails != nullptr ? rows.tails->has_room(slot, length, num_blocks)
                                                  : num_blocks * block_size >= length;
      if (!has_room) throw std::invalid_argument("slot " + std::to_string(slot) + " has no place for its last token");
      check_each("blocks", rows.blocks + slot * rows.max_blocks, num_blocks, 0, allocator.num_blocks() - 1);
      check_each("tokens", rows.tokens + slot * rows.num_columns + length - 1, 1, 0, vocab_size_ - 1);
    }
    for (int64_t g = 0; g < rows.num_groups; ++g) {
      for (int64_t r = rows.group_starts[g]; r < rows.group_starts[g + 1]; ++r) {
        const int64_t slot = rows.slots[r];
        const int64_t full = std::min(rows.num_blocks[slot], rows.length[slot] / block_size);
        check_range("shared_blocks", rows.shared_blocks[g], 0, full);
      }
    }
  }

  // At most `max_steps` steps, and none is begun after `max_seconds`. There are blocks for the first one. `rotations`
  // reach as far as the last. Returns how many were made; outcomes (B) are the last one's.
  int64_t run(const LoopRows& rows, BlockAllocator& allocator, int64_t max_steps, double max_seconds,
              const float* rotations, int64_t num_threads, Outcome* outcomes) {
    const int64_t n = rows.num_rows;
    const auto begun = std::chrono::steady_clock::now();
    hidden_.reserve(n, decoder_.shape().width);
    logits_.resize(static_cast<size_t>(n * vocab_size_));
    set_up(rows);
    const auto step = step_of(rows, allocator.block_size() / kTile, rotations);
    begin_step(rows, allocator.block_size());
    const double steps = decoder_.prepare(step, num_threads) + head_.steps(n);
    const int64_t threads = worthwhile_threads(num_threads, steps);
    if (scratch_.size() < static_cast<size_t>(threads)) scratch_.resize(static_cast<size_t>(threads));
    const SampleProblem<float> problem = problem_of(rows);
    const auto sample_one = sample_row_for<float>("auto");
    const int64_t together = std::clamp<int64_t>(kTogether / vocab_size_, 1, kRowsPerTask);
    int64_t num_steps = 0;
    std::atomic<bool> is_going{true};
    run_team(threads, [&](Member& each) {
      while (is_going.load(std::memory_order_relaxed)) {
        decoder_.forward(step, hidden_.data(), hidden_.ld(), each);
        head_.run(static_cast<const T*>(hidden_.data()), hidden_.ld(), n, logits_.data(), vocab_size_, After::kStore,
                  each);
        each(ceil_div(n, together), [&](int64_t task, int64_t thread) {
          for (int64_t r = task * together; r < std::min((task + 1) * together, n); ++r) {
            sample_one(problem, r, scratch_[static_cast<size_t>(thread)]);
          }
        });
        each(1, [&](int64_t, int64_t) {
          const bool all_go_on = append(rows, outcomes);
          const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begun;
          if (++num_steps == max_steps || !all_go_on || taken.count() > max_seconds || !grow(rows, allocator)) {
            is_going.store(false, std::memory_order_relaxed);
            return;
          }
          begin_step(rows, allocator.block_size());
          decoder_.go_on(step, num_threads);
        });
      }
    });
    return num_steps;
  }

 private:
  static constexpr int64_t kTogether = 8192;  // logits that are worth a task

  // What stays as it is from step to step.
  void set_up(const LoopRows& rows) {
    const auto n = static_cast<size_t>(rows.num_rows);
    for (auto* x : {&tokens_, &positions_, &slots_, &drawn_, &top_k_}) x->resize(n);
    for (auto* x : {&temperature_, &top_p_, &min_p_, &logprobs_, &truncated_, &entropies_}) x->resize(n);
    context_.resize(n);
    u_.resize(n);
    if (num_bad_ < n) is_bad_ = std::make_unique<bool[]>(num_bad_ = n);
    for (size_t r = 0; r < n; ++r) {
      const int64_t slot = rows.slots[r];
      temperature_[r] = rows.temperature[slot];
      top_k_[r] = rows.top_k[slot];
      top_p_[r] = rows.top_p[slot];
      min_p_[r] = rows.min_p[slot];
    }
  }

  typename Native::Step step_of(const LoopRows& rows, int64_t tiles_per_block, const float* rotations) const {
    DecodeProblem<T> attention{};
    attention.block_table = rows.blocks;
    attention.table_rows = rows.slots;
    attention.max_blocks = rows.max_blocks;
    attention.tails = rows.tails == nullptr ? nullptr : rows.tails->table();
    attention.tiles_per_block = tiles_per_block;
    attention.context_lens = context_.data();
    attention.group_starts = rows.group_starts;
    attention.shared_blocks = rows.shared_blocks;
    attention.num_groups = rows.num_groups;
    return {tokens_.data(), positions_.data(), slots_.data(), rows.num_rows, rotations, attention};
  }

  SampleProblem<float> problem_of(const LoopRows& rows) {
    SampleProblem<float> problem{};
    problem.logits = logits_.data();
    problem.ld = problem.vocab_size = vocab_size_;
    problem.num_rows = rows.num_rows;
    problem.u = u_.data();
    problem.temperature = temperature_.data();
    problem.top_k = top_k_.data();
    problem.top_p = top_p_.data();
    problem.min_p = min_p_.data();
    problem.tokens = drawn_.data();
    problem.logprobs = logprobs_.data();
    problem.truncated_logprobs = truncated_.data();
    problem.is_bad = is_bad_.get();
    problem.entropies = rows.entropies == nullptr ? nullptr : entropies_.data();
    return problem;
  }

  void begin_step(const LoopRows& rows, int64_t block_size) {
    for (int64_t r = 0; r < rows.num_rows; ++r) {
      const int64_t slot = rows.slots[r], position = rows.length[slot] - 1;
      const auto i = static_cast<size_t>(r);
      tokens_[i] = rows.tokens[slot * rows.num_columns + position];
      positions_[i] = position;
      const int64_t block = rows.blocks[slot * rows.max_blocks + position / block_size];
      slots_[i] = block < 0 ? rows.tails->table()[slot * kTile + position % kTile]
                            : block * block_size + position % block_size;
      context_[i] = static_cast<int32_t>(position + 1);
      u_[i] = uniform(rows.seed[slot], position + 1 - rows.prompt_length[slot]);
    }
  }

  // What was drawn becomes the rows' last tokens. Whether none of them ends with it.
  bool append(const LoopRows& rows, Outcome* outcomes) const {
    bool all_go_on = true;
    for (int64_t r = 0; r < rows.num_rows; ++r) {
      const auto i = static_cast<size_t>(r);
      const int64_t slot = rows.slots[r], at = rows.length[slot], token = drawn_[i];
      outcomes[r] = Outcome::kBad;
      if (!is_bad_[i]) {
        rows.tokens[slot * rows.num_columns + at] = token;
        const int64_t result = slot * rows.num_columns + at - rows.prompt_length[slot];
        rows.logprobs[result] = logprobs_[i];
        rows.truncated[result] = truncated_[i];
        if (rows.entropies != nullptr) rows.entropies[result] = entropies_[i];
        rows.length[slot] = at + 1;
        const int64_t* const stops = rows.stop_ids + slot * rows.num_stop_ids;
        const bool is_stop = (rows.is_eos[token] && !rows.ignore_eos[slot]) ||
                             std::find(stops, stops + rows.num_stop_ids, token) != stops + rows.num_stop_ids;
        outcomes[r] = is_stop ? Outcome::kStopped : at + 1 >= rows.limit[slot] ? Outcome::kFull : Outcome::kGoing;
      }
      all_go_on &= outcomes[r] == Outcome::kGoing;
    }
    return all_go_on;
  }

  // Room for each row's next position. False, and nothing is taken, if there are not as many.
  static bool grow(const LoopRows& rows, BlockAllocator& allocator) {
    if (rows.tails != nullptr) {
      return rows.tails->grow(
          {rows.slots, rows.num_rows, rows.length, rows.blocks, rows.max_blocks, rows.num_blocks});
    }
    const auto is_short = [&](int64_t r) {
      const int64_t slot = rows.slots[r];
      return rows.length[slot] > rows.num_blocks[slot] * allocator.block_size();
    };
    int64_t missing = 0;
    for (int64_t r = 0; r < rows.num_rows; ++r) missing += is_short(r);
    if (missing > allocator.num_available()) return false;
    for (int64_t r = 0; r < rows.num_rows && missing > 0; ++r) {
      if (!is_short(r)) continue;
      const int64_t slot = rows.slots[r];
      allocator.allocate(1, rows.blocks + slot * rows.max_blocks + rows.num_blocks[slot]++);
      --missing;
    }
    return true;
  }

  Native& decoder_;
  const Linear& head_;
  int64_t vocab_size_;
  RowBuffer<T> hidden_;
  std::vector<float> logits_;
  std::vector<SampleScratch> scratch_;
  std::vector<int64_t> tokens_, positions_, slots_, drawn_, top_k_;  // (B) each, as the rest
  std::vector<int32_t> context_;
  std::vector<double> u_;
  std::vector<float> temperature_, top_p_, min_p_, logprobs_, truncated_, entropies_;
  std::unique_ptr<bool[]> is_bad_;
  size_t num_bad_ = 0;
};

}  // namespace r1fast
#endif
