// Many loops, one after the other, in one parallel region: what follows a loop needs all of its tasks, not all threads.
//
//   run_team(num_threads, [&](Member& each) { each(n, body);  each(m, next_body); });
//
// Every member runs the same program; a loop's tasks go to whoever comes. A member that the system has taken its core
// from holds up only the task it is in: when it comes back, it passes by the loops that the others have finished. So
// what a loop writes must not depend on the thread, and what decides the order of loops may only change inside a loop.
#pragma once

#include "parallel.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <thread>
#endif

namespace r1fast {

// One loop at a time, in a word: its number, its tasks, those handed out and those done.
class Team {
 public:
  explicit Team(int64_t num_threads) : num_threads_(num_threads) {}
  int64_t num_threads() const { return num_threads_; }

 private:
  friend class Member;
  static constexpr int kBits = 14;
  static constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1, kDone = 1, kTaken = uint64_t{1} << kBits;
  static uint64_t opened(uint64_t loop, uint64_t num_tasks) { return loop << 3 * kBits | num_tasks << 2 * kBits; }
  static uint64_t loop_of(uint64_t state) { return state >> 3 * kBits; }
  static uint64_t tasks_of(uint64_t state) { return state >> 2 * kBits & kMask; }
  static uint64_t taken_of(uint64_t state) { return state >> kBits & kMask; }
  static uint64_t done_of(uint64_t state) { return state & kMask; }

  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) int64_t num_threads_;
};

class Member {
 public:
  Member(Team& team, int64_t thread) : team_(team), thread_(thread) {}
  int64_t num_threads() const { return team_.num_threads(); }

  // body(task, thread) for each task. Returns when all of them are done, whoever has done them.
  template <class Body>
  void operator()(int64_t num_tasks, const Body& body) {
    // more tasks than can be counted are handed out several at a time
    const int64_t grain = std::max<int64_t>(ceil_div(num_tasks, static_cast<int64_t>(Team::kMask)), 1);
    std::atomic<uint64_t>& state = team_.state_;
    const uint64_t loop = ++loop_;
    uint64_t now = state.load(std::memory_order_acquire);
    if (Team::loop_of(now) < loop) {  // the one before is done: this member has waited for it
      const uint64_t fresh = Team::opened(loop, static_cast<uint64_t>(ceil_div(num_tasks, grain)));
      if (state.compare_exchange_strong(now, fresh, std::memory_order_acq_rel, std::memory_order_acquire)) now = fresh;
    }
    while (Team::loop_of(now) == loop && Team::taken_of(now) < Team::tasks_of(now)) {
      const int64_t first = static_cast<int64_t>(Team::taken_of(now)) * grain;
      if (!state.compare_exchange_weak(now, now + Team::kTaken, std::memory_order_acq_rel, std::memory_order_acquire)) {
        continue;
      }
      for (int64_t task = first; task < std::min(first + grain, num_tasks); ++task) body(task, thread_);
      now = state.fetch_add(Team::kDone, std::memory_order_acq_rel) + Team::kDone;
    }
    for (int64_t round = 0; Team::loop_of(now) == loop && Team::done_of(now) < Team::tasks_of(now); ++round) {
      pause(round);
      now = state.load(std::memory_order_acquire);
    }
  }

 private:
  // Spins while another core is likely to be at it; then its thread waits for a core, perhaps for this one.
  static void pause(int64_t round) {
    constexpr int64_t kSpins = 1000;
    if (round > kSpins) return std::this_thread::yield();
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  Team& team_;
  int64_t thread_;
  uint64_t loop_ = 0;  // 22 bits
};

template <class Program>
void run_team(int64_t num_threads, const Program& program) {
  Team team(std::max<int64_t>(num_threads, 1));
  on_threads(team.num_threads(), [&](int64_t thread) {
    Member member(team, thread);
    program(member);
  });
}

// The same call for a loop that stands alone.
struct Alone {
  int64_t threads;
  int64_t num_threads() const { return threads; }
  template <class Body>
  void operator()(int64_t num_tasks, const Body& body) const {
    parallel_for(num_tasks, threads, body);
  }
};

}  // namespace r1fast
