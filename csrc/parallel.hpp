// Threads and aligned memory for the CPU kernels. Threads are started per call, where the work of a call is milliseconds:
// a pool of its own would fight with PyTorch's over the cores. A caller of many short kernels brings a Team.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace r1fast {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Helpers that stay between calls: for a short while they look for work, then they sleep. The kernels that are called by
// a thread inside its Scope use them. One that the machine does not run just now is not waited for.
class Team {
 public:
  // `num_helpers` beside the thread that calls; fewer if no more can be had.
  explicit Team(int64_t num_helpers) : shared_(std::make_shared<Shared>()) {
    try {
      for (int64_t i = 0; i < num_helpers; ++i) {
        std::thread([shared = shared_, i] { help(*shared, i + 1); }).detach();
      }
    } catch (const std::system_error&) {
    }
  }
  ~Team() {
    shared_->stop.store(true);
    wake();
  }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  static Team*& current() {
    thread_local Team* team = nullptr;
    return team;
  }

  // Calls work(0) here and work(thread) on up to `num_helpers` helpers, those that come in time.
  void run(int64_t num_helpers, void (*work)(const void*, int64_t), const void* argument) {
    Shared& s = *shared_;
    s.work = work;
    s.argument = argument;
    s.wanted = num_helpers;
    s.left.store(0, std::memory_order_relaxed);
    const uint64_t opened = (s.gate.load(std::memory_order_relaxed) / kEpoch + 1) * kEpoch + kOpen;
    s.gate.store(opened, std::memory_order_seq_cst);
    if (s.sleeping.load(std::memory_order_seq_cst) > 0) wake();
    work(argument, 0);
    const uint64_t joined = s.gate.fetch_and(~kOpen, std::memory_order_acq_rel) % kOpen;
    while (s.left.load(std::memory_order_acquire) != joined) pause();
  }

 private:
  // gate: how many have joined, whether one may join, and above these the number of the call
  static constexpr uint64_t kOpen = 1 << 15, kEpoch = 1 << 16;
  static constexpr int kSpins = 4000;  // some tens of microseconds

  struct Shared {
    std::atomic<uint64_t> gate{0};
    std::atomic<uint64_t> left{0};
    std::atomic<int64_t> sleeping{0};
    std::atomic<bool> stop{false};
    void (*work)(const void*, int64_t) = nullptr;
    const void* argument = nullptr;
    int64_t wanted = 0;
    std::mutex mutex;
    std::condition_variable awake;
  };

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  void wake() {
    const std::lock_guard<std::mutex> lock(shared_->mutex);
    shared_->awake.notify_all();
  }

  static void help(Shared& s, int64_t thread) {
    uint64_t seen = 0;
    const auto is_new = [&](uint64_t gate) { return (gate & kOpen) != 0 && gate / kEpoch != seen; };
    for (;;) {
      for (int i = 0; i < kSpins && !is_new(s.gate.load(std::memory_order_acquire)); ++i) pause();
      uint64_t gate = s.gate.load(std::memory_order_acquire);
      if (!is_new(gate)) {
        std::unique_lock<std::mutex> lock(s.mutex);
        s.sleeping.fetch_add(1, std::memory_order_seq_cst);
        s.awake.wait(lock, [&] { return s.stop.load() || is_new(s.gate.load(std::memory_order_seq_cst)); });
        s.sleeping.fetch_sub(1);
        if (s.stop.load()) return;
        continue;
      }
      if (!s.gate.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) continue;
      seen = gate / kEpoch;
      if (thread <= s.wanted) s.work(s.argument, thread);
      s.left.fetch_add(1, std::memory_order_release);
    }
  }

  std::shared_ptr<Shared> shared_;
};

// Calls body(task, thread) once for every task in [0, num_tasks), tasks handed out as threads come free: a core that
// another process uses takes fewer. So what a task writes must not depend on the thread that runs it.
template <class Body>
void parallel_for(int64_t num_tasks, int64_t num_threads, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t thread) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) body(task, thread);
  };
  const int64_t num_helpers = std::min(num_threads, num_tasks) - 1;
  if (Team* const team = Team::current(); team != nullptr && num_helpers > 0) {
    team->run(num_helpers, [](const void* f, int64_t thread) { (*static_cast<decltype(&work)>(f))(thread); }, &work);
    return;
  }
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(std::max<int64_t>(num_helpers, 0)));
  try {
    for (int64_t i = 0; i < num_helpers; ++i) threads.emplace_back(work, i + 1);
  } catch (const std::system_error&) {  // no more threads to be had: those that started do the work
  }
  work(0);
  for (std::thread& thread : threads) thread.join();
}

// Threads worth having for a number of multiply-adds, or of similar steps: a start costs tens of microseconds, a
// helper of a team about one.
inline int64_t worthwhile_threads(int64_t num_threads, double steps) {
  return steps < (Team::current() == nullptr ? 2e6 : 1e5) ? 1 : std::max<int64_t>(num_threads, 1);
}

// Asks for huge pages in fresh memory: touching it for the first time then costs half as much. Only a hint.
inline void advise_huge_pages(void* from, int64_t num_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kHugePage = 2 << 20, kPage = 4096;
  const auto begin = round_up(reinterpret_cast<intptr_t>(from), kPage);
  const auto end = (reinterpret_cast<intptr_t>(from) + num_bytes) / kPage * kPage;
  if (num_bytes >= 2 * kHugePage) madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_HUGEPAGE);
#else
  (void)from, (void)num_bytes;
#endif
}

// Uninitialised, on a cache line's boundary.
template <class T>
class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t size)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(size) * sizeof(T), kLine))) {}
  ~AlignedBuffer() { ::operator delete(data_, kLine); }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  T* data() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  T* data_;
};

}  // namespace r1fast
