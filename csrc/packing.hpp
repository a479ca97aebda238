// Packs sequences of unequal length into micro-batches of at most `token_budget` tokens.
//
// `pack` is exact first-fit decreasing: at most 11/9 OPT + 6/9 bins, and on long-tailed lengths within a bin of
// ceil(sum / budget). Sequences of equal length are placed in runs, so the search tree is asked once per
// (bin, length) instead of once per sequence: O(n + (bins + distinct lengths) log bins) after a radix sort.
// Everything is deterministic: ties go to the lower index.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <queue>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace r1fast {

// Bin b holds order[offsets[b]] .. order[offsets[b + 1] - 1].
struct FlatBins {
  std::vector<int64_t> order;
  std::vector<int64_t> offsets;
};

using Bins = std::vector<std::vector<int64_t>>;

// Throws on what cannot be packed; returns the sum of the lengths.
inline int64_t check_lengths(const std::vector<int64_t>& lengths, int64_t token_budget) {
  if (token_budget <= 0) {
    throw std::invalid_argument("token_budget must be positive, got " + std::to_string(token_budget));
  }
  if (lengths.size() >= std::numeric_limits<uint32_t>::max()) {
    throw std::invalid_argument("at most 2**32 - 2 sequences can be packed at once, got " +
                                std::to_string(lengths.size()));
  }
  int64_t total = 0;
  for (size_t i = 0; i < lengths.size(); ++i) {
    if (lengths[i] <= 0) {
      throw std::invalid_argument("sequence " + std::to_string(i) + " has length " +
                                  std::to_string(lengths[i]) +
                                  "; lengths must be positive: drop empty sequences before packing");
    }
    if (lengths[i] > token_budget) {
      throw std::invalid_argument("sequence " + std::to_string(i) + " has " + std::to_string(lengths[i]) +
                                  " tokens, more than token_budget " + std::to_string(token_budget) +
                                  "; raise token_budget to at least " + std::to_string(lengths[i]) +
                                  ", or shorten the sequence (max_completion_tokens)");
    }
    if (__builtin_add_overflow(total, lengths[i], &total)) {
      throw std::invalid_argument("the lengths sum to more than 2**63 - 1 (at sequence " +
                                  std::to_string(i) + ")");
    }
  }
  return total;
}

// Sequence indices, longest first, equal lengths by index: a stable radix sort on (longest - length).
inline std::vector<uint32_t> longest_first(const std::vector<int64_t>& lengths) {
  constexpr int kDigitBits = 11;
  constexpr uint64_t kDigits = uint64_t{1} << kDigitBits;
  std::vector<uint32_t> order(lengths.size()), sorted(lengths.size());
  std::iota(order.begin(), order.end(), 0);
  if (lengths.empty()) return order;

  const auto [shortest, longest] = std::minmax_element(lengths.begin(), lengths.end());
  const uint64_t max_key = static_cast<uint64_t>(*longest - *shortest);
  for (int shift = 0; shift < 64 && (max_key >> shift) != 0; shift += kDigitBits) {
    const auto digit = [&, top = *longest](uint32_t i) {
      return (static_cast<uint64_t>(top - lengths[i]) >> shift) & (kDigits - 1);
    };
    std::vector<size_t> next(kDigits + 1, 0);
    for (uint32_t i : order) ++next[digit(i) + 1];
    std::partial_sum(next.begin(), next.end(), next.begin());
    for (uint32_t i : order) sorted[next[digit(i)]++] = i;
    order.swap(sorted);
  }
  return order;
}

// The room left in each bin, in a tournament tree: finds the first bin with enough room in O(log bins).
class RoomTree {
 public:
  RoomTree(size_t num_bins, int64_t room) {
    while (num_leaves_ < num_bins) num_leaves_ *= 2;
    max_room_.assign(2 * num_leaves_, room);
  }

  size_t first_bin_with(int64_t length) const {
    size_t node = 1;
    while (node < num_leaves_) {
      node *= 2;
      if (max_room_[node] < length) ++node;
    }
    return node - num_leaves_;
  }

  int64_t room(size_t bin) const { return max_room_[num_leaves_ + bin]; }

  void take(size_t bin, int64_t tokens) {
    size_t node = num_leaves_ + bin;
    max_room_[node] -= tokens;
    for (node /= 2; node >= 1; node /= 2) {
      const int64_t best = std::max(max_room_[2 * node], max_room_[2 * node + 1]);
      if (best == max_room_[node]) break;
      max_room_[node] = best;
    }
  }

 private:
  size_t num_leaves_ = 1;
  std::vector<int64_t> max_room_;  // a heap-ordered tree: node k has children 2k and 2k + 1
};

inline FlatBins pack(const std::vector<int64_t>& lengths, int64_t token_budget) {
  const int64_t total = check_lengths(lengths, token_budget);
  const size_t n = lengths.size();
  if (n == 0) return {{}, {0}};

  // any two bins of first-fit hold more than one budget together, so this many bins always suffice
  const size_t max_bins = std::min<size_t>(n, 2 * static_cast<size_t>(total / token_budget) + 2);
  const std::vector<uint32_t> order = longest_first(lengths);
  RoomTree rooms(max_bins, token_budget);
  std::vector<uint32_t> bin_of(n);  // by position in `order`
  std::vector<int64_t> offsets{0};  // counts at first

  for (size_t begin = 0; begin < n;) {
    const int64_t length = lengths[order[begin]];
    size_t end = begin + 1;
    while (end < n && lengths[order[end]] == length) ++end;
    while (begin < end) {
      const size_t bin = rooms.first_bin_with(length);
      const size_t count = std::min<size_t>(end - begin, rooms.room(bin) / length);
      rooms.take(bin, static_cast<int64_t>(count) * length);
      if (offsets.size() < bin + 2) offsets.resize(bin + 2, 0);
      offsets[bin + 1] += static_cast<int64_t>(count);
      std::fill_n(bin_of.begin() + begin, count, static_cast<uint32_t>(bin));
      begin += count;
    }
  }

  std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
  FlatBins bins{std::vector<int64_t>(n), offsets};
  std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
  for (size_t k = 0; k < n; ++k) bins.order[next[bin_of[k]]++] = order[k];
  return bins;
}

// The L2 bound of Martello and Toth, >= ceil(sum / budget): no packing uses fewer bins.
// For each threshold k <= budget / 2: sequences above budget / 2 need a bin each; those above budget - k share with
// nobody of length >= k; what the others leave free takes the rest of the sequences of length >= k.
inline int64_t lower_bound(const std::vector<int64_t>& lengths, int64_t token_budget) {
  const int64_t total = check_lengths(lengths, token_budget);
  std::vector<int64_t> sorted(lengths);
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  std::vector<int64_t> sum_of_first(sorted.size() + 1, 0);
  std::partial_sum(sorted.begin(), sorted.end(), sum_of_first.begin() + 1);

  const auto ceil_div = [&](int64_t tokens) { return tokens / token_budget + (tokens % token_budget != 0); };
  const auto num_longer_than = [&](int64_t length) {
    return std::lower_bound(sorted.begin(), sorted.end(), length, std::greater<>()) - sorted.begin();
  };
  const int64_t num_large = num_longer_than(token_budget / 2);
  int64_t bound = std::max(num_large, ceil_div(total));
  for (size_t end = num_large + 1; end <= sorted.size(); ++end) {
    if (end < sorted.size() && sorted[end] == sorted[end - 1]) continue;  // not the last of its length
    const int64_t num_alone = num_longer_than(token_budget - sorted[end - 1]);
    const int64_t small = sum_of_first[end] - sum_of_first[num_large];
    const int64_t shared = sum_of_first[num_large] - sum_of_first[num_alone];
    // the difference fits (every shared bin is over half full), the product may wrap: so unsigned
    const auto shared_room = static_cast<uint64_t>(num_large - num_alone) * static_cast<uint64_t>(token_budget);
    const auto free = static_cast<int64_t>(shared_room - static_cast<uint64_t>(shared));
    if (small > free) bound = std::max(bound, num_large + ceil_div(small - free));
  }
  return bound;
}

// Bins under construction, kept sorted by (cost, number of sequences, index).
class LoadedBins {
 public:
  LoadedBins(size_t num_bins, int64_t token_budget)
      : bins(num_bins), cost_(num_bins, 0.0), room_(num_bins, token_budget) {
    for (size_t b = 0; b < num_bins; ++b) by_load_.insert(key(b));
  }

  Bins bins;

  size_t lightest() const { return std::get<2>(*by_load_.begin()); }
  size_t heaviest() const { return std::get<2>(*by_load_.rbegin()); }
  double cost(size_t b) const { return cost_[b]; }
  int64_t room(size_t b) const { return room_[b]; }

  // The least loaded bin with room for `length`; bins.size() if there is none.
  size_t lightest_with_room(int64_t length) const {
    for (const auto& [cost, count, b] : by_load_) {
      if (room_[b] >= length) return b;
    }
    return bins.size();
  }

  void add(size_t b, int64_t sequence, int64_t length, double cost) {
    by_load_.erase(key(b));
    bins[b].push_back(sequence);
    room_[b] -= length;
    cost_[b] += cost;
    by_load_.insert(key(b));
  }

  void remove(size_t b, size_t position, int64_t length, double cost) {
    by_load_.erase(key(b));
    bins[b].erase(bins[b].begin() + position);
    room_[b] += length;
    cost_[b] = bins[b].empty() ? 0.0 : cost_[b] - cost;
    by_load_.insert(key(b));
  }

 private:
  std::tuple<double, size_t, size_t> key(size_t b) const { return {cost_[b], bins[b].size(), b}; }

  std::vector<double> cost_;
  std::vector<int64_t> room_;
  std::set<std::tuple<double, size_t, size_t>> by_load_;
};

// Costliest first, each to the least loaded bin with room. False if a sequence finds none.
inline bool spread_by_cost(LoadedBins& loaded, const std::vector<int64_t>& lengths,
                           const std::vector<double>& costs) {
  std::vector<int64_t> order(lengths.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return costs[a] > costs[b]; });
  for (int64_t i : order) {
    const size_t b = loaded.lightest_with_room(lengths[i]);
    if (b == loaded.bins.size()) return false;
    loaded.add(b, i, lengths[i], costs[i]);
  }
  return true;
}

// The first-fit bins plus empty ones, evened out: no bin stays empty if another has two sequences, then single
// sequences move from the heaviest bin to the lightest for as long as that lowers the heavier of the two.
inline void spread_from(LoadedBins& loaded, const FlatBins& packed, const std::vector<int64_t>& lengths,
                        const std::vector<double>& costs) {
  const size_t num_packed = packed.offsets.size() - 1;
  for (size_t b = 0; b < num_packed; ++b) {
    for (int64_t k = packed.offsets[b]; k < packed.offsets[b + 1]; ++k) {
      const int64_t i = packed.order[k];
      loaded.add(b, i, lengths[i], costs[i]);
    }
  }
  const auto move = [&](size_t from, size_t position, size_t to) {
    const int64_t i = loaded.bins[from][position];
    loaded.remove(from, position, lengths[i], costs[i]);
    loaded.add(to, i, lengths[i], costs[i]);
  };

  std::priority_queue<std::pair<size_t, size_t>> by_count;  // (number of sequences, bin)
  for (size_t b = 0; b < num_packed; ++b) by_count.emplace(loaded.bins[b].size(), b);
  for (size_t empty = num_packed; empty < loaded.bins.size() && by_count.top().first > 1; ++empty) {
    const auto [count, from] = by_count.top();
    by_count.pop();
    move(from, 0, empty);  // the longest
    by_count.emplace(count - 1, from);
  }

  for (size_t num_moves = 0; num_moves < lengths.size(); ++num_moves) {
    const size_t from = loaded.heaviest(), to = loaded.lightest();
    const double gap = loaded.cost(from) - loaded.cost(to);
    if (loaded.bins[from].size() < 2) return;
    size_t best = loaded.bins[from].size();
    double best_distance = gap / 2;  // moving a cost in (0, gap) lowers the maximum of the two; gap / 2 is ideal
    for (size_t position = 0; position < loaded.bins[from].size(); ++position) {
      const int64_t i = loaded.bins[from][position];
      const double distance = std::abs(costs[i] - gap / 2);
      if (lengths[i] <= loaded.room(to) && distance < best_distance) {
        best = position;
        best_distance = distance;
      }
    }
    if (best == loaded.bins[from].size()) return;
    move(from, best, to);
  }
}

// Micro-batches for every rank: result[rank][step] is a list of sequences. Every rank gets the same number of
// micro-batches, as few as first-fit decreasing allows; costs are evened over micro-batches, and each step's
// micro-batches are alike, so that no rank waits long for another.
inline std::vector<Bins> pack_balanced(const std::vector<int64_t>& lengths, int64_t token_budget,
                                       int64_t num_ranks, const std::vector<double>& costs) {
  constexpr int64_t kMaxRanks = 1 << 20;  // each has lists of its own
  if (num_ranks <= 0) {
    throw std::invalid_argument("num_ranks must be positive, got " + std::to_string(num_ranks));
  }
  if (num_ranks > kMaxRanks) {
    throw std::invalid_argument("num_ranks must be at most 2**20, got " + std::to_string(num_ranks));
  }
  const FlatBins packed = pack(lengths, token_budget);
  if (costs.size() != lengths.size()) {
    throw std::invalid_argument("got " + std::to_string(costs.size()) + " costs for " +
                                std::to_string(lengths.size()) + " lengths; give one cost per sequence");
  }
  for (size_t i = 0; i < costs.size(); ++i) {
    if (!std::isfinite(costs[i]) || costs[i] < 0) {
      throw std::invalid_argument("cost of sequence " + std::to_string(i) + " is " +
                                  std::to_string(costs[i]) + "; costs must be finite and not negative");
    }
  }
  const size_t ranks = static_cast<size_t>(num_ranks);
  const size_t num_steps = (packed.offsets.size() - 1 + ranks - 1) / ranks;

  LoadedBins loaded(num_steps * ranks, token_budget);
  if (!spread_by_cost(loaded, lengths, costs)) {
    loaded = LoadedBins(num_steps * ranks, token_budget);
    spread_from(loaded, packed, lengths, costs);
  }

  // heaviest bins first, `ranks` of them a step; within a step the heaviest goes to the rank with the least so far
  std::vector<size_t> heaviest_first(loaded.bins.size());
  std::iota(heaviest_first.begin(), heaviest_first.end(), 0);
  std::stable_sort(heaviest_first.begin(), heaviest_first.end(),
                   [&](size_t a, size_t b) { return loaded.cost(a) > loaded.cost(b); });
  std::vector<Bins> result(ranks, Bins(num_steps));
  std::vector<double> rank_cost(ranks, 0.0);
  std::vector<size_t> lightest_rank(ranks);
  std::iota(lightest_rank.begin(), lightest_rank.end(), 0);
  for (size_t step = 0; step < num_steps; ++step) {
    std::stable_sort(lightest_rank.begin(), lightest_rank.end(),
                     [&](size_t a, size_t b) { return rank_cost[a] < rank_cost[b]; });
    for (size_t k = 0; k < ranks; ++k) {
      const size_t bin = heaviest_first[step * ranks + k], rank = lightest_rank[k];
      rank_cost[rank] += loaded.cost(bin);
      result[rank][step] = std::move(loaded.bins[bin]);
      std::sort(result[rank][step].begin(), result[rank][step].end());
    }
  }
  return result;
}

}  // namespace r1fast
