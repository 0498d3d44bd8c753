// The inner loops of products. A tile of the result stays in registers while its sums are made.
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

constexpr int64_t kTile = 6;                   // most rows of a tile
constexpr int64_t kPanel = kLanes * kVectors;  // most columns of a tile, a multiple of kLanes
constexpr int64_t kStep = 16;                  // products that `multiply` adds to a sum at a time

// The size of a tile: at most kTile rows, and at most kPanel columns, a multiple of kLanes.
struct TileSize {
  int64_t rows, columns;
};

// The left operand of a tile of the result: for each tap, one pointer for each row of the tile.
struct Taps {
  const float* const* rows;  // the first of a tap is null if the tap adds nothing
  int64_t count;
  int64_t offset, n;  // which numbers of each row are multiplied; n is a multiple of kStep
  int64_t ahead;      // distance to the rows of the next tile, which are prefetched
};

// A panel is a matrix of up to kPanel columns whose rows lie one after the other, without gaps.

// c[i][j] = Σ_t Σ_r taps.rows[t · size.rows + i][offset + r] · panel[t · n + r][j]. If `add`, this is
// added to c.
void multiply(const TileSize& size, const Taps& taps, const float* panel, float* const* c, bool add);

// c[i][j] += Σ_r left[r][offset + i] · panel[r][j] for r < n; the rows of c lie one after the other.
void correlate(const TileSize& size, const float* const* left, int64_t offset, int64_t n,
               const float* panel, float* c);

// The strides of a matrix.
struct Strides {
  int64_t row, column;
};

// panel[r][j] = x[r · strides.row + j · strides.column].
void pack(const float* x, const Strides& strides, int64_t rows, int64_t columns, float* panel);

// panel[r][j] = rows[r][first + j].
void copy_rows(const float* const* rows, int64_t count, int64_t first, int64_t columns,
               float* panel);

// Prefetches n numbers into the second-level cache.
void fetch_row(const float* x, int64_t n);

}  // namespace fusedshape
