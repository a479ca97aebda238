// Which instruction sets the kernels use: what the CPU has, unless the environment's R1FAST_CPU_LEVEL asks for less.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace r1fast {

enum class Level { kBaseline, kAvx2, kAvx512 };

inline const char* name_of(Level level) {
  return level == Level::kAvx512 ? "avx512" : level == Level::kAvx2 ? "avx2" : "baseline";
}

// The most that this CPU has. Code of kAvx512 names bf16 too, but those instructions come from intrinsics alone, which run
// where `avx512_bf16_supported` says so.
inline Level best_level() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Level::kBaseline;
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has_avx512 ? Level::kAvx512 : Level::kAvx2;
#else
  return Level::kBaseline;
#endif
}

// `what` is named in the error. "auto" is `otherwise`.
inline Level parse_level(const std::string& what, const std::string& name, Level otherwise) {
  if (name == "auto") return otherwise;
  for (const Level level : {Level::kBaseline, Level::kAvx2, Level::kAvx512}) {
    if (name == name_of(level) && level <= best_level()) return level;
  }
  throw std::invalid_argument(what + " must be auto, baseline, avx2 or avx512, one that this CPU has (at most " +
                              name_of(best_level()) + "); got '" + name + "'");
}

inline std::string from_environment(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// What "auto" is. The environment is read once; a variable that is empty counts as unset.
inline Level cpu_level() {
  static const Level level = [] {
    const std::string asked = from_environment("R1FAST_CPU_LEVEL"), bf16 = from_environment("R1FAST_CPU_BF16");
    if (bf16 != "" && bf16 != "0" && bf16 != "1") {
      throw std::invalid_argument("R1FAST_CPU_BF16 must be 0 or 1; got '" + bf16 + "'");
    }
    return asked == "" ? best_level() : parse_level("R1FAST_CPU_LEVEL", asked, best_level());
  }();
  return level;
}

// `name` is auto, baseline, avx2 or avx512.
inline Level level_of(const std::string& name) { return parse_level("level", name, cpu_level()); }

// Whether AVX-512 multiplies and rounds bf16 by instructions of its own; without them it does so by those of fp32, with the
// same sums. R1FAST_CPU_BF16=0 in the environment, read once: as if the CPU had none, for tests and measurements.
inline bool avx512_bf16_supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // lanes.hpp asks before main
  static const bool is_left_out = from_environment("R1FAST_CPU_BF16") == "0";
  return !is_left_out && best_level() == Level::kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace r1fast
