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
// where `native_level` says so.
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

// What "auto" is. The environment is read once; a variable that is empty counts as unset.
inline Level cpu_level() {
  static const Level level = [] {
    const char* const asked = std::getenv("R1FAST_CPU_LEVEL");
    return asked == nullptr || *asked == '\0' ? best_level() : parse_level("R1FAST_CPU_LEVEL", asked, best_level());
  }();
  return level;
}

// `name` is auto, baseline, avx2 or avx512.
inline Level level_of(const std::string& name) { return parse_level("level", name, cpu_level()); }

inline bool avx512_bf16_supported() {
#if defined(__x86_64__)
  return best_level() == Level::kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Of the forward and the head, which have no code for kBaseline: that stands for none.
inline Level native_level(bool bf16) {
  const bool is_short = bf16 && cpu_level() == Level::kAvx512 && !avx512_bf16_supported();
  return is_short ? Level::kAvx2 : cpu_level();
}

}  // namespace r1fast
