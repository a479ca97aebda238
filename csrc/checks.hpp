// What can be told of a call's arguments before memory is touched: sizes that cannot be, rows that overlap, addresses of
// nothing. Whether an address is that of enough live memory only its caller knows. Messages are made where one is needed.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace r1fast {

constexpr int64_t kAddressSpace = int64_t{1} << 47;  // bytes a process may have: sums of a few such sizes do not wrap
constexpr int64_t kMaxThreads = 4096;

inline void check_range(const char* name, int64_t value, int64_t least, int64_t most = kAddressSpace) {
  if (value >= least && value <= most) return;
  throw std::invalid_argument(std::string(name) + " must be from " + std::to_string(least) + " to " +
                              std::to_string(most) + ", got " + std::to_string(value));
}

inline void check_threads(int64_t num_threads) { check_range("num_threads", num_threads, 1, kMaxThreads); }

// a * b * c of sizes that are not negative; more than memory can have is an error.
inline int64_t check_product(const char* name, int64_t a, int64_t b, int64_t c = 1) {
  int64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product) || __builtin_mul_overflow(product, c, &product) || product > kAddressSpace) {
    throw std::invalid_argument(std::string(name) + " of " + std::to_string(a) + " x " + std::to_string(b) + " x " +
                                std::to_string(c) + " does not fit into memory");
  }
  return product;
}

// `count` elements of `bytes` each. What has none may lie nowhere.
inline void check_array(const char* name, uintptr_t address, int64_t count, int64_t bytes) {
  const int64_t size = check_product(name, count, bytes);
  if (size == 0) return;
  if (address == 0 || address % static_cast<uintptr_t>(bytes) != 0 ||
      address > static_cast<uintptr_t>(kAddressSpace - size)) {
    throw std::invalid_argument(std::string(name) + " of " + std::to_string(count) + " elements of " +
                                std::to_string(bytes) + " bytes cannot lie at address " + std::to_string(address));
  }
}

// Rows `ld` elements apart. Those that are only read may overlap, as expanded ones do.
inline void check_rows(const char* name, uintptr_t address, int64_t num_rows, int64_t width, int64_t ld, int64_t bytes,
                       bool is_written = false) {
  if (num_rows == 0 || width == 0) return;
  if (num_rows > 1 && (ld < (is_written ? width : 0) || ld > kAddressSpace)) {
    throw std::invalid_argument(std::string(name) + ": rows of " + std::to_string(width) + " elements cannot be " +
                                std::to_string(ld) + " apart");
  }
  const int64_t before = num_rows == 1 ? 0 : check_product(name, num_rows - 1, ld);
  check_array(name, address, before + width, bytes);
}

// As check_array, of what may be absent.
inline void check_optional(const char* name, uintptr_t address, int64_t count, int64_t bytes) {
  if (address != 0) check_array(name, address, count, bytes);
}

// Bounds (count + 1) of parts that follow each other, from 0. Returns where the last one ends.
template <class Int>
int64_t check_starts(const char* name, const Int* starts, int64_t count, int64_t most = kAddressSpace) {
  for (int64_t i = 0; i < count; ++i) {
    if (starts[0] != 0 || starts[i + 1] < starts[i]) {
      throw std::invalid_argument(std::string(name) + " must begin with 0 and not fall, got " +
                                  std::to_string(starts[i]) + " before " + std::to_string(starts[i + 1]));
    }
  }
  const int64_t end = count == 0 ? 0 : static_cast<int64_t>(starts[count]);
  check_range(name, end, 0, most);
  return end;
}

template <class Int>
void check_each(const char* name, const Int* values, int64_t count, int64_t least, int64_t most) {
  for (int64_t i = 0; i < count; ++i) check_range(name, static_cast<int64_t>(values[i]), least, most);
}

}  // namespace r1fast
