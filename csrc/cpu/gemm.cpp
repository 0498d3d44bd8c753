// One function for each size of a tile, rows × vectors, so that it fits the registers; and panels.
#include "gemm.h"

#include <array>
#include <cstring>
#include <utility>

namespace fusedshape {
namespace {

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef float Unaligned __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

inline Vector load(const float* x) { return *reinterpret_cast<const Unaligned*>(x); }
inline void store(float* y, Vector x) { *reinterpret_cast<Unaligned*>(y) = x; }

template <int rows, int vectors>
void multiply_tile(const Taps& taps, const float* panel, float* const* c, bool add) {
  const float* const* left = taps.rows;
  const int64_t count = taps.count, offset = taps.offset, n = taps.n, ahead = taps.ahead;
  Vector sum[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      sum[i][j] = Vector{};
    }
  }
  for (int64_t t = 0; t < count; ++t) {
    if (left[t * rows] == nullptr) {
      panel += n * vectors * kLanes;
      continue;
    }
    const float* row[rows];
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      row[i] = left[t * rows + i] + offset;
    }
    for (int64_t begin = 0; begin < n; begin += kStep) {
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        __builtin_prefetch(row[i] + begin + ahead);
      }
      for (int64_t r = begin; r < begin + kStep; ++r, panel += vectors * kLanes) {
        Vector right[vectors];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) {
          right[j] = load(panel + j * kLanes);
        }
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) {
          const Vector l = row[i][r] - Vector{};
#pragma GCC unroll 4
          for (int j = 0; j < vectors; ++j) {
            sum[i][j] += l * right[j];
          }
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      float* to = c[i] + j * kLanes;
      store(to, add ? load(to) + sum[i][j] : sum[i][j]);
    }
  }
}

template <int rows, int vectors>
void correlate_tile(const float* const* left, int64_t offset, int64_t n, const float* panel,
                    float* c) {
  constexpr int64_t columns = vectors * kLanes;
  Vector sum[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      sum[i][j] = Vector{};
    }
  }
  for (int64_t r = 0; r < n; ++r, panel += columns) {
    const float* numbers = left[r] + offset;
    Vector right[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      right[j] = load(panel + j * kLanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Vector l = numbers[i] - Vector{};
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        sum[i][j] += l * right[j];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      float* to = c + i * columns + j * kLanes;
      store(to, load(to) + sum[i][j]);
    }
  }
}

using Multiply = void (*)(const Taps&, const float*, float* const*, bool);
using Correlate = void (*)(const float* const*, int64_t, int64_t, const float*, float*);

template <int... k>
constexpr std::array<Multiply, sizeof...(k)> multiply_table(std::integer_sequence<int, k...>) {
  return {multiply_tile<k / kVectors + 1, k % kVectors + 1>...};
}

template <int... k>
constexpr std::array<Correlate, sizeof...(k)> correlate_table(std::integer_sequence<int, k...>) {
  return {correlate_tile<k / kVectors + 1, k % kVectors + 1>...};
}

using AllSizes = std::make_integer_sequence<int, kTile * kVectors>;
constexpr auto kMultiply = multiply_table(AllSizes());
constexpr auto kCorrelate = correlate_table(AllSizes());

// The place of a size in the tables.
int64_t index_of(const TileSize& size) {
  return (size.rows - 1) * kVectors + size.columns / kLanes - 1;
}

typedef int32_t Index __attribute__((vector_size(kLanes * sizeof(int32_t))));

// Picks numbers of a and b: from[i] counts through a, then through b.
inline Vector shuffle(Vector a, Vector b, Index from) {
#if defined(__clang__)
  Vector y;
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) {
    y[lane] = from[lane] < kLanes ? a[from[lane]] : b[from[lane] - kLanes];
  }
  return y;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// Transposes a square in place. Each step exchanges one bit of the row index with the same bit of the
// column index.
void transpose(Vector (&x)[kLanes]) {
#pragma GCC unroll 4
  for (int bit = kLanes / 2; bit > 0; bit /= 2) {
    Index low, high;
    for (int lane = 0; lane < kLanes; ++lane) {
      low[lane] = lane & bit ? kLanes + lane - bit : lane;
      high[lane] = lane & bit ? kLanes + lane : lane + bit;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & bit) == 0) {
        const Vector a = x[i], b = x[i + bit];
        x[i] = shuffle(a, b, low);
        x[i + bit] = shuffle(a, b, high);
      }
    }
  }
}

}  // namespace

void multiply(const TileSize& size, const Taps& taps, const float* panel, float* const* c,
              bool add) {
  kMultiply[index_of(size)](taps, panel, c, add);
}

void correlate(const TileSize& size, const float* const* left, int64_t offset, int64_t n,
               const float* panel, float* c) {
  kCorrelate[index_of(size)](left, offset, n, panel, c);
}

void pack(const float* x, const Strides& strides, int64_t rows, int64_t columns, float* panel) {
  const auto [row, column] = strides;
  if (column == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(panel + r * columns, x + r * row, columns * sizeof(float));
    }
    return;
  }
  int64_t r = 0;
  if (row == 1) {
    for (; r + kLanes <= rows; r += kLanes) {
      for (int64_t j = 0; j < columns; j += kLanes) {
        Vector square[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          square[i] = load(x + r + (j + i) * column);
        }
        transpose(square);
        for (int i = 0; i < kLanes; ++i) {
          store(panel + (r + i) * columns + j, square[i]);
        }
      }
    }
  }
  for (; r < rows; ++r) {
    for (int64_t j = 0; j < columns; ++j) {
      panel[r * columns + j] = x[r * row + j * column];
    }
  }
}

void copy_rows(const float* const* rows, int64_t count, int64_t first, int64_t columns,
               float* panel) {
  for (int64_t r = 0; r < count; ++r, panel += columns) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      store(panel + j, load(rows[r] + first + j));
    }
  }
}

void fetch_row(const float* x, int64_t n) {
  constexpr int64_t line = 16;
  for (int64_t i = 0; i < n; i += line) {
    __builtin_prefetch(x + i, 0, 2);
  }
}

}  // namespace fusedshape
