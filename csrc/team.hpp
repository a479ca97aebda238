// Many loops, one after the other, in one parallel region: what follows a loop needs all of its tasks, not all threads.
//
//   run_team(num_threads, [&](Member& each) { each(n, body);  each(m, next_body); });
//
// Every member runs the same program. A member has a share of each loop's tasks, the same one in the same loop every time, so that
// what it reads is in its own caches; when it is through it takes what is left of the others' shares. So a member that the
// system has taken its core from holds up no more than the task it is in: when it comes back, it passes by the loops that
// the others have finished meanwhile. Therefore the number of a loop's tasks must not depend on what a loop writes, nor
// what a task writes on the thread.
#pragma once

#include "parallel.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace r1fast {

class Team {
 public:
  explicit Team(int64_t num_threads) : shares_(static_cast<size_t>(num_threads)) {}
  int64_t num_threads() const { return static_cast<int64_t>(shares_.size()); }

 private:
  friend class Member;
  struct alignas(64) Share {
    std::atomic<uint64_t> taken{0};  // the latest loop that a task was taken in, and how many of them: 32 bits each
  };

  std::vector<Share> shares_;
  alignas(64) std::atomic<int64_t> num_done_{0};  // tasks of all loops
};

class Member {
 public:
  Member(Team& team, int64_t thread) : team_(team), thread_(thread) {}

  // body(task, thread) for each task. Returns when all of them are done, whoever has done them.
  template <class Body>
  void operator()(int64_t num_tasks, const Body& body) {
    ++loop_;
    due_ += num_tasks;
    int64_t num_done = 0;
    const int64_t size = team_.num_threads();
    for (int64_t i = 0; i < size; ++i) {
      const int64_t owner = (thread_ + i) % size;
      num_done += take_share(num_tasks * owner / size, num_tasks * (owner + 1) / size,
                             team_.shares_[static_cast<size_t>(owner)].taken, body);
    }
    if (num_done > 0) team_.num_done_.fetch_add(num_done, std::memory_order_acq_rel);
    for (int64_t round = 0; team_.num_done_.load(std::memory_order_acquire) < due_; ++round) pause(round);
  }

 private:
  // What is left of tasks [begin, end). Returns how many that were.
  template <class Body>
  int64_t take_share(int64_t begin, int64_t end, std::atomic<uint64_t>& taken, const Body& body) {
    int64_t num_done = 0;
    if (begin == end) return 0;
    uint64_t now = taken.load(std::memory_order_relaxed);
    while (now < (loop_ << 32 | static_cast<uint64_t>(end - begin))) {
      const uint64_t next = std::max(now, loop_ << 32);
      if (!taken.compare_exchange_weak(now, next + 1, std::memory_order_relaxed)) continue;
      now = next + 1;
      body(begin + static_cast<int64_t>(next & 0xffffffffu), thread_);
      ++num_done;
    }
    return num_done;
  }

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
  uint64_t loop_ = 0;
  int64_t due_ = 0;  // tasks of the loops so far
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
  int64_t num_threads;
  template <class Body>
  void operator()(int64_t num_tasks, const Body& body) const {
    parallel_for(num_tasks, num_threads, body);
  }
};

}  // namespace r1fast
