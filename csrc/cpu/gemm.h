// The inner loops of products: tiles of the result that stay in registers while a sum is made.
#pragma once

#include <cstdint>

namespace fusedshape {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 4;
#elif defined(__AVX__)
constexpr int kLanes = 8, kVectors = 2;
#else
constexpr int kLanes = 4, kVectors = 4;
#endif

constexpr int64_t kTile = 6;                   // rows of a tile, at most
constexpr int64_t kPanel = kLanes * kVectors;  // columns of a tile, at most; others are n · kLanes
constexpr int64_t kStep = 16;                  // of the sums that multiply makes

// A panel is up to kPanel columns of a matrix, row after row, without gaps.

// c[i][j] = Σ_t Σ_r left[t · rows + i][offset + r] · panel[t · n + r][j], or is added to, for
// i < rows ≤ kTile and j < columns ≤ kPanel; n is a multiple of kStep. A tap t whose first pointer is
// null adds nothing. What lies `ahead` of the left operand is fetched into the cache meanwhile.
void multiply(int64_t rows, int64_t columns, const float* const* left, int64_t offset, int64_t taps,
              int64_t n, int64_t ahead, const float* panel, float* const* c, bool add);

// c[i][j] += Σ_r left[r][offset + i] · panel[r][j]; c's rows lie together.
void correlate(int64_t rows, int64_t columns, const float* const* left, int64_t offset, int64_t n,
               const float* panel, float* c);

// panel[r][j] = x[r · row + j · column].
void pack(const float* x, int64_t row, int64_t column, int64_t rows, int64_t columns, float* panel);

// panel[r][j] = rows[r][first + j].
void copy_rows(const float* const* rows, int64_t count, int64_t first, int64_t columns,
               float* panel);

// Brings n numbers into the second-level cache.
void fetch_row(const float* x, int64_t n);

}  // namespace fusedshape
