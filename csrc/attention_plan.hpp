// How training attention is cut up: who works on which queries, and where gradients of keys and values are summed.
//
// A tree is a segment that continues none, its root, and the segments that continue it. Queries are cut into units, pieces
// of the segments of one tree, which walk over the keys together. Forward, each unit is a task. Backward, a task is
// some units one after the other; it sums the gradients of each segment's keys in a region of its own, and where
// several tasks have met a segment, their regions outlive them and are added in order. All of this depends on shapes
// alone, so that results are the same bits for any number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "parallel.hpp"

namespace r1fast {

struct Segments {
  const int64_t* bounds;     // (count + 1) tokens, from 0
  const int64_t* prefix_of;  // (count) the segment before it that it continues, -1: none; or null: none does
  int64_t count;

  int64_t length(int64_t s) const { return bounds[s + 1] - bounds[s]; }
  int64_t root(int64_t s) const { return prefix_of == nullptr || prefix_of[s] < 0 ? s : prefix_of[s]; }
};

// Queries [begin, end) of a segment, counted from its first.
struct Piece {
  int64_t segment, begin, end;
  int64_t region;  // of its segment's keys
};

struct Unit {
  int64_t root;
  int64_t first_piece, end_piece;
  int64_t num_queries;
  double pairs;  // of query and key
};

struct Task {
  int64_t first_unit, end_unit;
  int64_t first_region, end_region;  // the first is the root's
  double pairs;
};

// Sums over a segment's first keys.
struct Region {
  int64_t segment, num_keys;
  bool is_shared;     // other tasks have regions of the segment too
  int64_t first_row;  // keys in the regions before: in the task's memory, or in that of shared ones
};

struct AttentionPlan {
  std::vector<Piece> pieces;
  std::vector<Unit> units;
  std::vector<Task> tasks;
  std::vector<Region> regions;
  std::vector<std::vector<int64_t>> shared;  // regions of a segment that has several, in order: the last has all keys
  int64_t num_task_rows = 0;                 // at most, in regions of one task
  int64_t num_shared_rows = 0;
  double pairs = 0;

  static constexpr int64_t kMaxTasks = 8;    // of a tree and kv head: each has regions of its own
  static constexpr double kTaskSteps = 6e7;  // multiply-adds of one product that are worth a task

  // `steps` multiply-adds a pair: of one product, over a kv head's query heads.
  AttentionPlan(const Segments& segments, int64_t max_queries, double steps) {
    std::vector<int64_t> order(static_cast<size_t>(segments.count));
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return segments.root(a) < segments.root(b); });
    size_t first_of_tree = 0;
    for (size_t i = 0; i < order.size(); ++i) {
      const int64_t root = segments.root(order[i]);
      const bool is_first = i == 0 || segments.root(order[i - 1]) != root;
      if (is_first) {
        cut_tasks(segments, first_of_tree, steps);
        first_of_tree = units.size();
      }
      add_segment(segments, order[i], root, max_queries, first_of_tree);
    }
    cut_tasks(segments, first_of_tree, steps);
    place_regions(segments);
  }

 private:
  // A segment goes on in the last unit of its tree where it fits in whole; else it begins one.
  void add_segment(const Segments& segments, int64_t s, int64_t root, int64_t max_queries, size_t first_of_tree) {
    const int64_t length = segments.length(s), before = s == root ? 0 : segments.length(root);
    for (int64_t begin = 0, end; begin < length; begin = end) {
      if (units.size() == first_of_tree || units.back().num_queries + length - begin > max_queries) {
        const auto piece = static_cast<int64_t>(pieces.size());
        units.push_back({root, piece, piece, 0, 0});
      }
      Unit& unit = units.back();
      end = std::min(length, begin + max_queries);
      pieces.push_back({s, begin, end, -1});
      ++unit.end_piece;
      unit.num_queries += end - begin;
      const auto count = static_cast<double>(end - begin);
      unit.pairs += count * (static_cast<double>(before + begin) + (count + 1) / 2);
    }
  }

  // The units of a tree, those from `first` on, become tasks of about equal cost.
  void cut_tasks(const Segments& segments, size_t first, double steps) {
    double all = 0, done = 0;
    for (size_t u = first; u < units.size(); ++u) all += units[u].pairs;
    const double wanted = std::min(std::ceil(all * steps / kTaskSteps), static_cast<double>(kMaxTasks));
    double last = -1;
    for (size_t u = first; u < units.size(); ++u) {
      const double part = std::floor((done + units[u].pairs / 2) / all * wanted);
      if (part != last) {
        const auto region = static_cast<int64_t>(regions.size());
        tasks.push_back({static_cast<int64_t>(u), static_cast<int64_t>(u), region, region, 0});
      }
      last = part;
      add_unit(segments, static_cast<int64_t>(u));
      done += units[u].pairs;
    }
    pairs += all;
  }

  void add_unit(const Segments& segments, int64_t u) {
    Task& task = tasks.back();
    const Unit& unit = units[static_cast<size_t>(u)];
    if (task.first_unit == task.end_unit) add_region(unit.root);
    const auto root_region = static_cast<size_t>(task.first_region);
    for (int64_t i = unit.first_piece; i < unit.end_piece; ++i) {
      Piece& piece = pieces[static_cast<size_t>(i)];
      if (piece.segment != unit.root) {
        regions[root_region].num_keys = segments.length(unit.root);
        if (regions.back().segment != piece.segment) add_region(piece.segment);
      }
      piece.region = static_cast<int64_t>(regions.size()) - 1;
      regions.back().num_keys = std::max(regions.back().num_keys, piece.end);
    }
    task.end_unit = u + 1;
    task.end_region = static_cast<int64_t>(regions.size());
    task.pairs += unit.pairs;
  }

  void add_region(int64_t segment) { regions.push_back({segment, 0, false, 0}); }

  void place_regions(const Segments& segments) {
    std::vector<std::vector<int64_t>> of_segment(static_cast<size_t>(segments.count));
    for (size_t r = 0; r < regions.size(); ++r) {
      of_segment[static_cast<size_t>(regions[r].segment)].push_back(static_cast<int64_t>(r));
    }
    for (const Task& task : tasks) {
      int64_t num_rows = 0;
      for (int64_t r = task.first_region; r < task.end_region; ++r) {
        Region& region = regions[static_cast<size_t>(r)];
        region.is_shared = of_segment[static_cast<size_t>(region.segment)].size() > 1;
        int64_t& row = region.is_shared ? num_shared_rows : num_rows;
        region.first_row = row;
        row += region.num_keys;
      }
      num_task_rows = std::max(num_task_rows, num_rows);
    }
    for (std::vector<int64_t>& several : of_segment) {
      if (several.size() > 1) shared.push_back(std::move(several));
    }
  }
};

}  // namespace r1fast
