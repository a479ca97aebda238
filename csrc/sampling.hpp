// A token for each row of logits; what is computed is in kernels/sample.py.
//
// One pass over the row in blocks that stay in the cache: each block's maximum, then its sum of exponentials relative to
// that maximum. The inverse CDF walks the blocks' sums, then one block. Only a row whose distribution is cut looks at its
// elements again, to select a threshold from a histogram; nothing is sorted. Rows do not meet, so neither batch nor
// threads change a bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "epilogue.hpp"

namespace r1fast {

// Arrays of the caller, one element a row; those of the second half may be null.
template <class T>
struct SampleProblem {
  const T* logits;  // (B, V), rows `ld` elements apart
  int64_t ld;
  int64_t num_rows;
  int64_t vocab_size;
  const double* u;
  const float* temperature;
  const int64_t* top_k;
  const float* top_p;
  const float* min_p;
  int64_t* tokens;
  float* logprobs;
  float* truncated_logprobs;
  bool* is_bad;

  const int64_t* row_starts;  // (B + 1) into the adjustments
  const int64_t* ids;
  const float* penalty;
  const float* bias;
  const int64_t* given;  // (B), of tokens that stand instead of drawn ones: for their log-probabilities
  float* entropies;
  int64_t num_top;
  int64_t* top_ids;     // (B, num_top)
  float* top_logprobs;  // (B, num_top)
};

constexpr int64_t kSampleBlock = 1024;
constexpr int64_t kBuckets = 2048;  // of the exponents between kMinExp and 0
constexpr float kBucketsPerUnit = kBuckets / 112.0f;

struct BlockSums {
  float max;
  double s;   // sum of e = exp((x - max) / temperature)
  double sz;  // sum of e log e
};

// softmax(x / temperature) of one row: p = exp((x - max) / temperature) / s.
struct RowSums {
  float max = -std::numeric_limits<float>::infinity();
  double s = 0;
  double sz = 0;
  bool is_bad = false;
  std::vector<BlockSums> blocks;

  double logprob(float x, double inv_temperature) const {
    return (static_cast<double>(x) - max) * inv_temperature - std::log(s);
  }
};

R1FAST_INLINE float max_of(const float* x) {  // of kSampleBlock; a NaN is passed over
  constexpr int64_t kMaxLanes = 64;           // enough that the compiler makes vectors of them
  float most[kMaxLanes];
  for (int64_t l = 0; l < kMaxLanes; ++l) most[l] = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < kSampleBlock; i += kMaxLanes) {
    for (int64_t l = 0; l < kMaxLanes; ++l) most[l] = x[i + l] > most[l] ? x[i + l] : most[l];
  }
  return *std::max_element(most, most + kMaxLanes);
}

// A block as floats, filled up with -inf: in `buffer`, or where it lies already.
template <class T>
R1FAST_INLINE const float* load_block(const T* from, int64_t n, float* buffer) {
  if constexpr (std::is_same_v<T, float>) {
    if (n == kSampleBlock) return from;
  }
  for (int64_t i = 0; i < n; ++i) buffer[i] = to_float(from[i]);
  for (int64_t i = n; i < kSampleBlock; ++i) buffer[i] = -std::numeric_limits<float>::infinity();
  return buffer;
}

// How many of a block cannot be logits: NaN or +inf.
R1FAST_INLINE int64_t count_bad(const float* x) {
  int32_t num_bad = 0;
  for (int64_t i = 0; i < kSampleBlock; ++i) num_bad += !(x[i] < std::numeric_limits<float>::infinity());
  return num_bad;
}

// What is below the smallest normal number counts as 0: arithmetic on such numbers is a hundred times slower.
R1FAST_INLINE void exponentials(const float* x, int64_t n, float max, float inv_temperature, float* z, float* e) {
  constexpr float kMinNormalExp = -87;
  for (int64_t i = 0; i < n; ++i) {
    z[i] = clamp_exponent((x[i] - max) * inv_temperature);
    const bool is_zero = z[i] < kMinNormalExp;
    e[i] = select(is_zero, 0.0f, exp_clamped(select(is_zero, 0.0f, z[i])));
  }
}

template <class T>
R1FAST_INLINE void sum_row(const T* logits, int64_t vocab_size, double inv_temperature, bool want_sz, RowSums& row) {
  const float scale = static_cast<float>(inv_temperature);
  float buffer[kSampleBlock], z[kSampleBlock], e[kSampleBlock];
  row = RowSums{row.max, 0, 0, false, std::move(row.blocks)};
  row.max = -std::numeric_limits<float>::infinity();
  row.blocks.clear();
  int64_t num_bad = 0;
  for (int64_t begin = 0; begin < vocab_size; begin += kSampleBlock) {
    const float* const x = load_block(logits + begin, std::min(kSampleBlock, vocab_size - begin), buffer);
    num_bad += count_bad(x);
    BlockSums block{max_of(x), 0, 0};
    if (block.max > -std::numeric_limits<float>::infinity()) {
      exponentials(x, kSampleBlock, block.max, scale, z, e);
      block.s = sum_lanes(e, kSampleBlock / 16);
      if (want_sz) {
        for (int64_t i = 0; i < kSampleBlock; ++i) z[i] *= e[i];
        block.sz = sum_lanes(z, kSampleBlock / 16);
      }
    }
    row.blocks.push_back(block);
    row.max = std::max(row.max, block.max);
  }
  row.is_bad = num_bad > 0 || !(row.max > -std::numeric_limits<float>::infinity());
  if (row.is_bad) return;
  for (BlockSums& block : row.blocks) {
    if (block.s == 0) continue;
    const double below = (static_cast<double>(block.max) - row.max) * inv_temperature, share = std::exp(below);
    row.s += block.s * share;
    row.sz += share == 0 ? 0 : share * (block.sz + below * block.s);
  }
}

struct Place {
  int64_t block;
  double left;  // of the target, before this block
};

// The first block whose cumulative mass is above `target`, of masses that are not all 0.
template <class Mass>
Place find_block(const std::vector<BlockSums>& blocks, double target, const Mass& mass) {
  Place place{0, 0};
  for (size_t b = 0; b < blocks.size(); ++b) {
    const double here = mass(blocks[b]);
    if (here == 0) continue;
    place = {static_cast<int64_t>(b), target};
    if (target < here) break;
    target -= here;
  }
  return place;
}

// The lowest index whose cumulative weight is above `target`, of weights that are not all 0.
inline int64_t find_above(const float* weights, int64_t n, double target) {
  double sum = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (weights[i] > 0) last = i;
    sum += weights[i];
    if (sum > target) return i;
  }
  return last;  // the rounding of the sums
}

template <class T>
R1FAST_INLINE int64_t draw(const T* logits, int64_t vocab_size, double inv_temperature, double u, const RowSums& row) {
  const auto share = [&](const BlockSums& block) {
    return block.s == 0 ? 0 : std::exp((static_cast<double>(block.max) - row.max) * inv_temperature);
  };
  const Place place = find_block(row.blocks, u * row.s, [&](const BlockSums& block) { return block.s * share(block); });
  float buffer[kSampleBlock], z[kSampleBlock], e[kSampleBlock];
  const int64_t begin = place.block * kSampleBlock, n = std::min(kSampleBlock, vocab_size - begin);
  const BlockSums& block = row.blocks[static_cast<size_t>(place.block)];
  exponentials(load_block(logits + begin, n, buffer), kSampleBlock, block.max, static_cast<float>(inv_temperature), z, e);
  return begin + find_above(e, n, place.left / share(block));
}

// The lowest id of the largest logit.
template <class T>
R1FAST_INLINE int64_t argmax(const T* logits, const RowSums& row) {
  int64_t i = 0;
  for (const BlockSums& block : row.blocks) {
    if (block.max == row.max) break;
    i += kSampleBlock;
  }
  while (to_float(logits[i]) != row.max) ++i;
  return i;
}

// In descending order of x, then ascending of id: smaller keys go first.
struct Candidate {
  uint64_t key;
  float weight;
};

inline uint64_t order_key(float x, int64_t id) {
  const uint32_t bits = bits_of(x + 0.0f);  // -0 is 0
  const uint32_t ascending = (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(~ascending) << 32 | static_cast<uint32_t>(id);
}

// The smallest prefix, in the order of keys, whose weight reaches `target`: its last key and its weight, without the
// last element's. All of them if none does.
struct Prefix {
  uint64_t last;
  double before;
};

template <class Weight>
Prefix smallest_prefix(std::vector<Candidate>& candidates, double target, const Weight& weight) {
  auto low = candidates.begin(), high = candidates.end();
  double before = 0;
  while (high - low > 1) {
    const auto middle = low + (high - low) / 2;
    std::nth_element(low, middle, high, [](const Candidate& a, const Candidate& b) { return a.key < b.key; });
    double sum = 0;
    for (auto c = low; c != middle; ++c) sum += weight(*c);
    if (before + sum >= target) {
      high = middle;
    } else {
      before += sum;
      low = middle;
    }
  }
  return {low->key, before};
}

// Memory of one thread.
struct SampleScratch {
  std::vector<float> adjusted, weights, exponents;
  std::vector<double> masses;
  std::vector<int64_t> counts;
  std::vector<Candidate> candidates;
  RowSums policy, sampled;
};

inline int64_t bucket_of(float exponent) { return static_cast<int64_t>(-exponent * kBucketsPerUnit); }

// Leaves the weights of the elements of one bucket that go up to `last`.
template <class T>
void gather_bucket(const T* logits, int64_t vocab_size, int64_t bucket, uint64_t last, SampleScratch& scratch) {
  scratch.candidates.clear();
  for (int64_t i = 0; i < vocab_size; ++i) {
    if (bucket_of(scratch.exponents[i]) != bucket) continue;
    const uint64_t key = order_key(to_float(logits[i]), i);
    if (key <= last) scratch.candidates.push_back({key, scratch.weights[i]});
  }
}

// The last key of the top_k largest, then of the smallest set of them that has top_p of their mass.
template <class T>
uint64_t select_threshold(const T* logits, int64_t vocab_size, int64_t top_k, double top_p, SampleScratch& scratch) {
  scratch.masses.assign(kBuckets, 0);
  scratch.counts.assign(kBuckets, 0);
  for (int64_t i = 0; i < vocab_size; ++i) {
    const int64_t b = bucket_of(scratch.exponents[i]);
    scratch.masses[b] += scratch.weights[i];
    scratch.counts[b] += 1;
  }
  uint64_t last = ~uint64_t{0};
  double total = 0;
  int64_t bucket = 0;
  if (top_k > 0 && top_k < vocab_size) {
    int64_t count = 0;
    for (; count + scratch.counts[bucket] < top_k; ++bucket) {
      count += scratch.counts[bucket];
      total += scratch.masses[bucket];
    }
    gather_bucket(logits, vocab_size, bucket, last, scratch);
    last = smallest_prefix(scratch.candidates, static_cast<double>(top_k - count), [](const Candidate&) {
             return 1.0;
           }).last;
    for (const Candidate& c : scratch.candidates) total += c.key <= last ? c.weight : 0;
  } else {
    bucket = kBuckets - 1;
    for (const double mass : scratch.masses) total += mass;
  }
  if (top_p >= 1) return last;
  double before = 0;
  int64_t b = 0, filled = 0;
  for (; b <= bucket; ++b) {
    if (scratch.counts[b] == 0) continue;
    filled = b;
    if (b == bucket || before + scratch.masses[b] >= top_p * total) break;
    before += scratch.masses[b];
  }
  gather_bucket(logits, vocab_size, filled, last, scratch);
  const auto mass = [](const Candidate& c) { return static_cast<double>(c.weight); };
  return std::min(last, smallest_prefix(scratch.candidates, top_p * total - before, mass).last);
}

struct Draw {
  int64_t token;
  double mass;  // of what is kept, relative to the whole
};

// From the distribution cut by top_k, top_p and min_p.
template <class T>
R1FAST_INLINE Draw draw_truncated(const T* logits, int64_t vocab_size, double inv_temperature, int64_t top_k,
                                  float top_p, float min_p, double u, SampleScratch& scratch) {
  const RowSums& row = scratch.sampled;
  scratch.weights.resize(static_cast<size_t>(vocab_size));
  scratch.exponents.resize(static_cast<size_t>(vocab_size));
  float* const e = scratch.weights.data();
  float* const z = scratch.exponents.data();
  for (int64_t i = 0; i < vocab_size; ++i) {
    z[i] = clamp_exponent((to_float(logits[i]) - row.max) * static_cast<float>(inv_temperature));
    e[i] = exp_clamped(z[i]);
  }
  if ((top_k > 0 && top_k < vocab_size) || top_p < 1) {
    const uint64_t last = select_threshold(logits, vocab_size, top_k, top_p, scratch);
    const uint32_t ascending = ~static_cast<uint32_t>(last >> 32);
    const float least = float_of((ascending >> 31) != 0 ? ascending & 0x7fffffffu : ~ascending);
    const int32_t last_id = static_cast<int32_t>(last & 0xffffffffu);
    if (last != ~uint64_t{0}) {
      for (int32_t i = 0; i < vocab_size; ++i) {
        const float x = to_float(logits[i]);
        e[i] = select((x > least) | ((x == least) & (i <= last_id)), e[i], 0.0f);
      }
    }
  }
  for (int64_t i = 0; i < vocab_size; ++i) e[i] = select(e[i] >= min_p, e[i], 0.0f);
  double kept = 0;
  std::vector<BlockSums>& blocks = scratch.policy.blocks;  // the policy's are not needed any more
  blocks.clear();
  for (int64_t begin = 0; begin < vocab_size; begin += kSampleBlock) {
    const int64_t n = std::min(kSampleBlock, vocab_size - begin);
    double s = sum_lanes(e + begin, n / 16);
    for (int64_t i = begin + n / 16 * 16; i < begin + n; ++i) s += e[i];
    blocks.push_back({0, s, 0});
    kept += s;
  }
  const Place place = find_block(blocks, u * kept, [](const BlockSums& block) { return block.s; });
  const int64_t begin = place.block * kSampleBlock, n = std::min(kSampleBlock, vocab_size - begin);
  return {begin + find_above(e + begin, n, place.left), kept / row.s};
}

// The num_top largest, in descending order; of equal ones the lower id first.
template <class T>
R1FAST_INLINE void find_top(const T* logits, int64_t vocab_size, int64_t num_top, const RowSums& row, int64_t* ids) {
  int64_t found = 0;
  for (int64_t begin = 0; begin < vocab_size; begin += kSampleBlock) {
    const float block_max = row.blocks[static_cast<size_t>(begin / kSampleBlock)].max;
    if (found == num_top && !(block_max > to_float(logits[ids[found - 1]]))) continue;
    const int64_t end = std::min(begin + kSampleBlock, vocab_size);
    for (int64_t i = begin; i < end; ++i) {
      const float x = to_float(logits[i]);
      if (found == num_top && !(x > to_float(logits[ids[found - 1]]))) continue;
      int64_t place = found < num_top ? found++ : found - 1;
      for (; place > 0 && x > to_float(logits[ids[place - 1]]); --place) ids[place] = ids[place - 1];
      ids[place] = i;
    }
  }
}

template <class T, class Row>
R1FAST_INLINE void sample_from(const SampleProblem<T>& problem, int64_t r, const Row* logits, double inv_temperature,
                               SampleScratch& scratch) {
  const T* const raw = problem.logits + r * problem.ld;
  const int64_t V = problem.vocab_size, top_k = problem.top_k[r];
  const float top_p = problem.top_p[r], min_p = problem.min_p[r];
  const RowSums& row = scratch.sampled;
  const bool greedy = problem.temperature[r] == 0;
  Draw drawn{0, 1};
  if (problem.given != nullptr) {
    drawn.token = problem.given[r];
  } else if (greedy) {
    drawn.token = argmax(logits, row);
  } else if ((top_k > 0 && top_k < V) || top_p < 1 || min_p > 0) {
    drawn = draw_truncated(logits, V, inv_temperature, top_k, top_p, min_p, problem.u[r], scratch);
  } else {
    drawn.token = draw(logits, V, inv_temperature, problem.u[r], row);
  }
  problem.tokens[r] = drawn.token;
  problem.logprobs[r] = static_cast<float>(scratch.policy.logprob(to_float(raw[drawn.token]), inv_temperature));
  problem.truncated_logprobs[r] =
      static_cast<float>(row.logprob(to_float(logits[drawn.token]), inv_temperature) - std::log(drawn.mass));
}

template <class T>
R1FAST_INLINE void sample_row(const SampleProblem<T>& problem, int64_t r, SampleScratch& scratch) {
  const T* const raw = problem.logits + r * problem.ld;
  const int64_t V = problem.vocab_size;
  const float temperature = problem.temperature[r];
  const double inv_temperature = temperature == 0 ? 1.0 : 1.0 / temperature;
  RowSums& policy = scratch.policy;
  sum_row(raw, V, inv_temperature, problem.entropies != nullptr, policy);
  const int64_t first = problem.row_starts == nullptr ? 0 : problem.row_starts[r];
  const int64_t end = problem.row_starts == nullptr ? 0 : problem.row_starts[r + 1];
  if (end > first && !policy.is_bad) {
    std::vector<float>& adjusted = scratch.adjusted;
    adjusted.resize(static_cast<size_t>(V));
    for (int64_t i = 0; i < V; ++i) adjusted[i] = to_float(raw[i]);
    for (int64_t k = first; k < end; ++k) {
      float& x = adjusted[static_cast<size_t>(problem.ids[k])];
      if (problem.penalty[k] != 1) x = x > 0 ? x / problem.penalty[k] : x * problem.penalty[k];
    }
    for (int64_t k = first; k < end; ++k) adjusted[static_cast<size_t>(problem.ids[k])] += problem.bias[k];
    sum_row(adjusted.data(), V, inv_temperature, false, scratch.sampled);
  } else {
    scratch.sampled = policy;
  }
  const bool is_bad = policy.is_bad || scratch.sampled.is_bad;
  problem.is_bad[r] = is_bad;
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  if (problem.entropies != nullptr) {
    problem.entropies[r] = is_bad ? kNan : static_cast<float>(std::log(policy.s) - policy.sz / policy.s);
  }
  int64_t* const top_ids = problem.top_ids + r * problem.num_top;
  float* const top_logprobs = problem.top_logprobs + r * problem.num_top;
  std::fill(top_ids, top_ids + problem.num_top, 0);
  std::fill(top_logprobs, top_logprobs + problem.num_top, kNan);
  if (is_bad) {
    problem.tokens[r] = 0;
    problem.logprobs[r] = problem.truncated_logprobs[r] = kNan;
    return;
  }
  if (problem.num_top > 0) find_top(raw, V, problem.num_top, policy, top_ids);
  for (int64_t i = 0; i < problem.num_top; ++i) {
    top_logprobs[i] = static_cast<float>(policy.logprob(to_float(raw[top_ids[i]]), inv_temperature));
  }
  if (end > first) {
    sample_from(problem, r, scratch.adjusted.data(), inv_temperature, scratch);
  } else {
    sample_from(problem, r, raw, inv_temperature, scratch);
  }
}

#define R1FAST_SAMPLE_ROW(suffix, attributes)                                                             \
  template <class T>                                                                                      \
  attributes void sample_row_##suffix(const SampleProblem<T>& problem, int64_t r, SampleScratch& scratch) { \
    sample_row(problem, r, scratch);                                                                      \
  }
R1FAST_SAMPLE_ROW(baseline, )
#if defined(__x86_64__)
R1FAST_SAMPLE_ROW(avx2, R1FAST_AVX2)
R1FAST_SAMPLE_ROW(avx512, R1FAST_AVX512)
#endif
#undef R1FAST_SAMPLE_ROW

// `level` is auto, baseline, avx2 or avx512.
template <class T>
auto sample_row_for(const std::string& level) -> decltype(&sample_row_baseline<T>) {
  const Level found = level_of(level);
#if defined(__x86_64__)
  if (found == Level::kAvx512) return &sample_row_avx512<T>;
  if (found == Level::kAvx2) return &sample_row_avx2<T>;
#endif
  return &sample_row_baseline<T>;
}

template <class T>
void sample(const SampleProblem<T>& problem, const std::string& level, int64_t num_threads) {
  const auto row = sample_row_for<T>(level);
  num_threads = worthwhile_threads(num_threads, 8.0 * problem.num_rows * problem.vocab_size);
  std::vector<SampleScratch> scratch(static_cast<size_t>(num_threads));
  parallel_for(problem.num_rows, num_threads, [&](int64_t r, int64_t thread) {
    row(problem, r, scratch[static_cast<size_t>(thread)]);
  });
}

}  // namespace r1fast
