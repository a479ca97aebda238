// Threads and aligned memory for the CPU kernels. Where OpenMP is to be had the threads are PyTorch's own: both ask one
// libgomp, whose threads are still awake after the matrix product before. Without it, threads are started per call: a
// pool of its own would fight with PyTorch's over the cores.
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
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace r1fast {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Calls body(thread) on `num_threads` threads, this one among them, or on fewer where there are not as many.
template <class Body>
void on_threads(int64_t num_threads, const Body& body) {
  if (num_threads <= 1) return body(0);
#if defined(_OPENMP)
#pragma omp parallel num_threads(static_cast<int>(num_threads))
  body(omp_get_thread_num());
#else
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(num_threads - 1));
  try {
    for (int64_t i = 1; i < num_threads; ++i) threads.emplace_back(body, i);
  } catch (const std::system_error&) {  // no more threads to be had: those that started do the work
  }
  body(0);
  for (std::thread& thread : threads) thread.join();
#endif
}

// Calls body(task, thread) once for every task in [0, num_tasks), tasks handed out as threads come free: a core that
// another process uses takes fewer. So what a task writes must not depend on the thread that runs it.
template <class Body>
void parallel_for(int64_t num_tasks, int64_t num_threads, const Body& body) {
  std::atomic<int64_t> next{0};
  on_threads(std::min(num_threads, num_tasks), [&](int64_t thread) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) body(task, thread);
  });
}

// Threads worth having for a number of multiply-adds, or of similar steps: a start costs tens of microseconds, to ask one
// of OpenMP's that is awake costs few.
inline int64_t worthwhile_threads(int64_t num_threads, double steps) {
#if defined(_OPENMP)
  constexpr double kWorthwhile = 2e5;
#else
  constexpr double kWorthwhile = 2e6;
#endif
  return steps < kWorthwhile ? 1 : std::max<int64_t>(num_threads, 1);
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

// Gives back the whole pages of memory that nobody will read again; it stays addressable.
inline void release_pages(void* from, int64_t num_bytes) {
#if defined(__linux__)
  constexpr int64_t kPage = 4096;
  const auto begin = round_up(reinterpret_cast<intptr_t>(from), kPage);
  const auto end = (reinterpret_cast<intptr_t>(from) + num_bytes) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_DONTNEED);
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
