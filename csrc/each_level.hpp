// Includes the file R1FAST_KERNELS once for each instruction set: in the namespace of its lanes (lanes.hpp), with
// R1FAST_NATIVE and R1FAST_NATIVE_INLINE for its functions. No guard: a function of one target cannot be inlined into a
// function of another, nor into a template of none, so that templates over a vector type would not do.
#if defined(__x86_64__)
#define R1FAST_NATIVE R1FAST_AVX512
#define R1FAST_NATIVE_INLINE R1FAST_AVX512_INLINE
namespace r1fast::avx512 {
#include R1FAST_KERNELS
}
#undef R1FAST_NATIVE
#undef R1FAST_NATIVE_INLINE

#define R1FAST_NATIVE R1FAST_AVX2
#define R1FAST_NATIVE_INLINE R1FAST_AVX2_INLINE
namespace r1fast::avx2 {
#include R1FAST_KERNELS
}
#undef R1FAST_NATIVE
#undef R1FAST_NATIVE_INLINE
#endif
#undef R1FAST_KERNELS
