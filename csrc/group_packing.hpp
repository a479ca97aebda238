// Packs groups, a prompt and its completions, into micro-batches that hold each prompt once.
//
// A group of prompt P and completions R_1 .. R_n takes P + sum R_i tokens. It is split, and its prompt repeated, only
// if that is more than `token_budget`: into as few pieces as first-fit decreasing finds. The pieces are then packed as
// sequences are (packing.hpp). Two ways to cut are tried, full pieces with a short last one, which others can fill up,
// and even pieces; the even ones are taken unless they need more micro-batches.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "packing.hpp"

namespace r1fast {

struct GroupPiece {
  int64_t group;
  std::vector<int64_t> completions;  // their indices in the group, ascending
};

using GroupBins = std::vector<std::vector<GroupPiece>>;  // micro-batch -> pieces, ascending by group

class GroupPacker {
 public:
  // Lengths count forwarded tokens; a completion may have none (its one token is only predicted). The cost of a token
  // outside attention is in pairs of query and key.
  GroupPacker(const std::vector<int64_t>& prompts, const std::vector<std::vector<int64_t>>& completions,
              int64_t token_budget, double cost_per_token)
      : prompts_(prompts), completions_(completions), budget_(token_budget), cost_per_token_(cost_per_token) {
    if (token_budget <= 0) {
      throw std::invalid_argument("token_budget must be positive, got " + std::to_string(token_budget));
    }
    if (prompts.size() != completions.size()) {
      throw std::invalid_argument("got " + std::to_string(prompts.size()) + " prompts and completions of " +
                                  std::to_string(completions.size()) + " groups");
    }
    if (!std::isfinite(cost_per_token) || cost_per_token < 0) {
      throw std::invalid_argument("cost_per_token must be finite and not negative, got " +
                                  std::to_string(cost_per_token));
    }
    for (size_t g = 0; g < prompts.size(); ++g) check_group(g);
  }

  // rank -> micro-batches
  std::vector<GroupBins> pack(int64_t num_ranks) const {
    std::vector<GroupPiece> pieces = cut(true);
    if (pieces.size() > prompts_.size()) {  // some group was split
      std::vector<GroupPiece> full = cut(false);
      const auto num_bins = [&](const std::vector<GroupPiece>& p) {
        return r1fast::pack(sizes(p), budget_).offsets.size();
      };
      if (num_bins(pieces) > num_bins(full)) pieces = std::move(full);
    }
    std::vector<double> costs;
    for (const GroupPiece& piece : pieces) costs.push_back(cost(piece));

    std::vector<GroupBins> result;
    for (const Bins& bins : pack_balanced(sizes(pieces), budget_, num_ranks, costs)) {
      result.emplace_back();
      for (const std::vector<int64_t>& bin : bins) {
        std::map<int64_t, std::vector<int64_t>> by_group;  // pieces that met again share their prompt
        for (int64_t i : bin) {
          std::vector<int64_t>& members = by_group[pieces[i].group];
          members.insert(members.end(), pieces[i].completions.begin(), pieces[i].completions.end());
        }
        result.back().emplace_back();
        for (auto& [group, members] : by_group) {
          std::sort(members.begin(), members.end());
          result.back().back().push_back({group, std::move(members)});
        }
      }
    }
    return result;
  }

 private:
  void check_group(size_t g) const {
    const std::string name = "group " + std::to_string(g);
    if (prompts_[g] <= 0) {
      throw std::invalid_argument(name + " has a prompt of length " + std::to_string(prompts_[g]) +
                                  "; it must have a token");
    }
    if (completions_[g].empty()) throw std::invalid_argument(name + " has no completion: leave it out");
    int64_t total = prompts_[g];
    for (size_t i = 0; i < completions_[g].size(); ++i) {
      const int64_t length = completions_[g][i];
      if (length < 0) {
        throw std::invalid_argument(name + ", completion " + std::to_string(i) + " has length " +
                                    std::to_string(length));
      }
      if (prompts_[g] > budget_ || length > budget_ - prompts_[g]) {
        throw std::invalid_argument(
            name + ", completion " + std::to_string(i) + " has " + std::to_string(length) +
            " tokens and a prompt of " + std::to_string(prompts_[g]) + ", more than token_budget " +
            std::to_string(budget_) + " together; raise token_budget, or shorten the completion " +
            "(max_completion_tokens)");
      }
      if (__builtin_add_overflow(total, length, &total)) {
        throw std::invalid_argument("the lengths of " + name + " sum to more than 2**63 - 1");
      }
    }
  }

  std::vector<GroupPiece> cut(bool evenly) const {
    std::vector<GroupPiece> pieces;
    for (size_t g = 0; g < prompts_.size(); ++g) {
      const int64_t group = static_cast<int64_t>(g);
      const std::vector<int64_t>& all = completions_[g];
      std::vector<int64_t> indices(all.size());
      std::iota(indices.begin(), indices.end(), 0);
      if (prompts_[g] + std::accumulate(all.begin(), all.end(), int64_t{0}) <= budget_) {
        pieces.push_back({group, std::move(indices)});
        continue;
      }
      std::vector<int64_t> placed, lengths, empty;
      for (int64_t i : indices) (all[i] > 0 ? placed : empty).push_back(i);
      for (int64_t i : placed) lengths.push_back(all[i]);
      const size_t first = pieces.size();
      for (const std::vector<int64_t>& bin : split(lengths, budget_ - prompts_[g], evenly)) {
        pieces.push_back({group, {}});
        for (int64_t k : bin) pieces.back().completions.push_back(placed[k]);
      }
      pieces[first].completions.insert(pieces[first].completions.end(), empty.begin(), empty.end());
    }
    return pieces;
  }

  static Bins split(const std::vector<int64_t>& lengths, int64_t room, bool evenly) {
    if (evenly) return pack_balanced(lengths, room, 1, {lengths.begin(), lengths.end()})[0];
    const FlatBins flat = r1fast::pack(lengths, room);
    Bins bins;
    for (size_t b = 0; b + 1 < flat.offsets.size(); ++b) {
      bins.emplace_back(flat.order.begin() + flat.offsets[b], flat.order.begin() + flat.offsets[b + 1]);
    }
    return bins;
  }

  int64_t size(const GroupPiece& piece) const {
    int64_t total = prompts_[piece.group];
    for (int64_t i : piece.completions) total += completions_[piece.group][i];
    return total;
  }

  std::vector<int64_t> sizes(const std::vector<GroupPiece>& pieces) const {
    std::vector<int64_t> result;
    for (const GroupPiece& piece : pieces) result.push_back(size(piece));
    return result;
  }

  double cost(const GroupPiece& piece) const {
    const auto prompt = static_cast<double>(prompts_[piece.group]);
    double pairs = prompt * (prompt + 1) / 2;
    for (int64_t i : piece.completions) {
      const auto length = static_cast<double>(completions_[piece.group][i]);
      pairs += length * (prompt + (length + 1) / 2);
    }
    return pairs + cost_per_token_ * static_cast<double>(size(piece));
  }

  const std::vector<int64_t>& prompts_;
  const std::vector<std::vector<int64_t>>& completions_;
  int64_t budget_;
  double cost_per_token_;
};

}  // namespace r1fast
