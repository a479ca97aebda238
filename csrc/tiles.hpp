// By which Tiles the forward, the head and the layers' products multiply.
#pragma once

#include "amx.hpp"
#include "level.hpp"

#if defined(__x86_64__)
namespace r1fast {

// avx2, avx512 or, for bf16 alone, amx: the best that the CPU has and R1FAST_CPU_LEVEL allows; baseline, if none of them.
inline std::string best_tiles(bool bf16) {
  const Level level = cpu_level();
  return bf16 && level == Level::kAvx512 && amx_supported() ? "amx" : name_of(level);
}

// Calls body with the Tiles that multiply T: those of best_tiles for "auto".
template <class T, class Body>
auto with_tiles(const std::string& level, const Body& body) {
  constexpr bool kBf16 = sizeof(T) == sizeof(Bf16);
  const std::string name = level == "auto" ? best_tiles(kBf16) : level;
  if (name == "avx2" && best_level() >= Level::kAvx2) return body(Avx2Tiles{});
  if (name == "avx512" && best_level() == Level::kAvx512) return body(Avx512Tiles{});
  if constexpr (kBf16) {
    if (name == "amx" && amx_supported()) return body(AmxTiles{});
  }
  throw std::invalid_argument("level must be auto, avx2, avx512 or, for bf16, amx, one that this CPU has; got " + level);
}

}  // namespace r1fast
#endif
