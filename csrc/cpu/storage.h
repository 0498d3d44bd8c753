// Converts rows of stored numbers to and from the type they are computed in, rounding to nearest even.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace fusedshape {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// The type in which numbers of a stored type are computed.
template <class T>
struct Opmath {
  using type = float;
};
template <>
struct Opmath<double> {
  using type = double;
};

inline void load(const BFloat16* x, float* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t wide = static_cast<uint32_t>(x[i].bits) << 16;
    std::memcpy(y + i, &wide, sizeof wide);
  }
}

inline void store(const float* x, BFloat16* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    uint32_t wide;
    std::memcpy(&wide, x + i, sizeof wide);
    const uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    y[i].bits = static_cast<uint16_t>(x[i] != x[i] ? 0x7fc0u : rounded);
  }
}

// With intrinsics, because GCC 12 does not vectorise these conversions.
inline void load(const Float16* x, float* y, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
    _mm256_storeu_ps(y + i, _mm256_cvtph_ps(packed));
  }
#endif
  for (; i < n; ++i) {
    y[i] = torch::headeronly::detail::fp16_ieee_to_fp32_value(x[i].bits);
  }
}

inline void store(const float* x, Float16* y, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) {
    const __m128i packed = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), packed);
  }
#endif
  for (; i < n; ++i) {
    y[i].bits = torch::headeronly::detail::fp16_ieee_from_fp32_value(x[i]);
  }
}

inline void load(const float* x, double* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    y[i] = x[i];
  }
}

}  // namespace fusedshape
