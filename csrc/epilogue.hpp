// What follows the logits' matrix product, in place on a row-major z (R, V) in fp32 or bf16 (arithmetic in fp32):
//
//   u = z + bias;  z = softcap tanh(u / softcap);  x = z / temperature - anchor;  e = exp(x)
//   E = e (1 - (z / softcap)^2), 0 at the target;  s = sum of e, sz = sum of e x, both without the target
//
// The loops are plain C++ over short buffers, compiled three times: AVX-512, AVX2 and the baseline (any machine).
// A row is summed in fixed blocks of columns, so the number of threads changes nothing.
#pragma once

#include <string>

#include "exp.hpp"
#include "level.hpp"
#include "parallel.hpp"

namespace r1fast {

struct Bf16 {
  uint16_t bits;
};

R1FAST_INLINE float to_float(float x) { return x; }
R1FAST_INLINE float to_float(Bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

// Rounded to nearest, ties to even. A NaN stays one.
R1FAST_INLINE uint32_t bf16_bits(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  return x != x ? 0x7fc0u : rounded;
}
R1FAST_INLINE void store(float* to, float x) { *to = x; }
R1FAST_INLINE void store(Bf16* to, float x) { to->bits = static_cast<uint16_t>(bf16_bits(x)); }

// How z becomes E: shared by both layouts. Pointers may be null where a quantity is absent, softcap 0.
struct LogitMap {
  const float* bias;          // (V)
  const int64_t* target_ids;  // (R), -1: no target among these columns
  const float* anchor;        // (R)
  float inv_temperature;
  float softcap;
};

// E (a + b log E): the gradient of the entropy keeps its zeros.
R1FAST_INLINE float affine_in_log(float e, float a, float b) {
  return select(e == 0, 0.0f, e * (a + b * log_positive(e)));
}

constexpr int64_t kChunk = 512;               // columns in the buffers of one step
constexpr int64_t kSumBlock = 32 * kChunk;    // columns summed apart, by one task

struct Sums {
  double s = 0;
  double sz = 0;
};

R1FAST_INLINE double sum_lanes(const float* values, int64_t num_lines) {
  float lanes[16] = {};
  for (int64_t k = 0; k < num_lines; ++k) {
    for (int l = 0; l < 16; ++l) lanes[l] += values[16 * k + l];
  }
  double sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

template <class T>
R1FAST_INLINE Sums epilogue_block(T* z, const float* bias, int64_t num_columns, int64_t target, float anchor,
                                  float inv_temperature, float softcap, bool want_sz) {
  Sums sums;
  float x[kChunk], e[kChunk], slope[kChunk];
  for (int64_t begin = 0; begin < num_columns; begin += kChunk) {
    const int64_t n = std::min(kChunk, num_columns - begin);
    T* const chunk = z + begin;
    for (int64_t i = 0; i < n; ++i) x[i] = to_float(chunk[i]);
    if (bias != nullptr) {
      for (int64_t i = 0; i < n; ++i) x[i] += bias[begin + i];
    }
    if (softcap != 0) {
      const float inv_softcap = 1 / softcap;
      for (int64_t i = 0; i < n; ++i) {
        const Tanh t = tanh_and_slope(x[i] * inv_softcap);
        x[i] = softcap * t.value;
        slope[i] = t.slope;
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      x[i] = clamp_exponent(x[i] * inv_temperature - anchor);
      e[i] = exp_clamped(x[i]);
    }
    if (target >= begin && target < begin + n) x[target - begin] = e[target - begin] = 0;
    const int64_t num_lines = ceil_div(n, 16);
    for (int64_t i = n; i < 16 * num_lines; ++i) x[i] = e[i] = 0;
    sums.s += sum_lanes(e, num_lines);
    if (want_sz) {
      for (int64_t i = 0; i < 16 * num_lines; ++i) x[i] *= e[i];
      sums.sz += sum_lanes(x, num_lines);
    }
    if (softcap != 0) {
      for (int64_t i = 0; i < n; ++i) e[i] *= slope[i];
    }
    for (int64_t i = 0; i < n; ++i) store(chunk + i, e[i]);
  }
  return sums;
}

template <class T>
R1FAST_INLINE void affine_span(T* e, int64_t num_columns, float a, float b) {
  for (int64_t i = 0; i < num_columns; ++i) store(e + i, affine_in_log(to_float(e[i]), a, b));
}

// The same two loops for each instruction set.
#define R1FAST_SPANS(suffix, attributes)                                                                        \
  template <class T>                                                                                            \
  attributes Sums epilogue_block_##suffix(T* z, const float* bias, int64_t num_columns, int64_t target,         \
                                          float anchor, float inv_temperature, float softcap, bool want_sz) {   \
    return epilogue_block(z, bias, num_columns, target, anchor, inv_temperature, softcap, want_sz);             \
  }                                                                                                             \
  template <class T>                                                                                            \
  attributes void affine_span_##suffix(T* e, int64_t num_columns, float a, float b) {                           \
    affine_span(e, num_columns, a, b);                                                                          \
  }
R1FAST_SPANS(baseline, )
#if defined(__x86_64__)
R1FAST_SPANS(avx2, R1FAST_AVX2)
R1FAST_SPANS(avx512, R1FAST_AVX512)
#endif
#undef R1FAST_SPANS

template <class T>
struct Spans {
  decltype(&epilogue_block_baseline<T>) epilogue;
  decltype(&affine_span_baseline<T>) affine;
};

// `level` is auto, baseline, avx2 or avx512.
template <class T>
Spans<T> spans_for(const std::string& level) {
  const Level found = level_of(level);
#if defined(__x86_64__)
  if (found == Level::kAvx512) return {&epilogue_block_avx512<T>, &affine_span_avx512<T>};
  if (found == Level::kAvx2) return {&epilogue_block_avx2<T>, &affine_span_avx2<T>};
#endif
  return {&epilogue_block_baseline<T>, &affine_span_baseline<T>};
}

// s and sz are (R) fp32; sz may be null.
template <class T>
void epilogue(T* z, int64_t ld, int64_t num_rows, int64_t num_columns, const LogitMap& map, float* s, float* sz,
              const std::string& level, int64_t num_threads) {
  const auto block = spans_for<T>(level).epilogue;
  const int64_t num_blocks = ceil_div(num_columns, kSumBlock);
  std::vector<Sums> partial(static_cast<size_t>(num_rows * num_blocks));
  parallel_for(num_rows * num_blocks, worthwhile_threads(num_threads, 8.0 * num_rows * num_columns),
               [&](int64_t task, int64_t) {
                 const int64_t row = task / num_blocks, begin = task % num_blocks * kSumBlock;
                 const int64_t target = std::max<int64_t>(map.target_ids[row], -1);
                 partial[task] = block(z + row * ld + begin, map.bias == nullptr ? nullptr : map.bias + begin,
                                       std::min(kSumBlock, num_columns - begin), target - begin,
                                       map.anchor[row], map.inv_temperature, map.softcap, sz != nullptr);
               });
  for (int64_t row = 0; row < num_rows; ++row) {
    Sums total;
    for (int64_t b = 0; b < num_blocks; ++b) {
      total.s += partial[row * num_blocks + b].s;
      total.sz += partial[row * num_blocks + b].sz;
    }
    s[row] = static_cast<float>(total.s);
    if (sz != nullptr) sz[row] = static_cast<float>(total.sz);
  }
}

template <class T>
void affine_rows(T* e, int64_t ld, int64_t num_rows, int64_t num_columns, const float* a, const float* b,
                 const std::string& level, int64_t num_threads) {
  const auto span = spans_for<T>(level).affine;
  parallel_for(num_rows, worthwhile_threads(num_threads, 8.0 * num_rows * num_columns), [&](int64_t row, int64_t) {
    span(e + row * ld, num_columns, a[row], b[row]);
  });
}

// Row j becomes row kept[j] (increasing). Threads share out the columns: rows move over each other.
template <class T>
void compact_rows(T* e, int64_t ld, int64_t num_columns, const int64_t* kept, int64_t num_kept, int64_t num_threads) {
  constexpr int64_t kColumns = 4096;
  parallel_for(ceil_div(num_columns, kColumns), worthwhile_threads(num_threads, 1.0 * num_kept * num_columns),
               [&](int64_t task, int64_t) {
                 const int64_t begin = task * kColumns, n = std::min(kColumns, num_columns - begin);
                 for (int64_t j = 0; j < num_kept; ++j) {
                   if (kept[j] == j) continue;
                   std::memcpy(e + j * ld + begin, e + kept[j] * ld + begin, static_cast<size_t>(n) * sizeof(T));
                 }
               });
}

// fp32 rounded to bf16 in the first half of its own memory. Elements [m, 2 m) are written where [m / 2, m) were read,
// so each doubling can be shared out.
inline void narrow_to_bf16(float* x, int64_t size, int64_t num_threads) {
  constexpr int64_t kStep = 4096;
  char* const bytes = reinterpret_cast<char*>(x);
  const auto narrow = [&](int64_t begin, int64_t end) {
    float from[kStep];
    Bf16 to[kStep];
    for (int64_t n; begin < end; begin += n) {
      n = std::min(kStep, end - begin);
      std::memcpy(from, bytes + begin * 4, static_cast<size_t>(n) * 4);
      for (int64_t i = 0; i < n; ++i) store(to + i, from[i]);
      std::memcpy(bytes + begin * 2, to, static_cast<size_t>(n) * 2);
    }
  };
  const int64_t alone = std::min<int64_t>(size, 16 * kStep);
  narrow(0, alone);
  for (int64_t begin = alone, end; begin < size; begin = end) {
    end = std::min(size, 2 * begin);
    const int64_t num_tasks = ceil_div(end - begin, 4 * kStep);
    parallel_for(num_tasks, worthwhile_threads(num_threads, 1.0 * (end - begin)), [&](int64_t task, int64_t) {
      narrow(begin + task * 4 * kStep, std::min(end, begin + (task + 1) * 4 * kStep));
    });
  }
  release_pages(bytes + size * 2, size * 2);
}

}  // namespace r1fast
