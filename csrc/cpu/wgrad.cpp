// wgrad: for each tap, dz transposed times panels of the rows of x that the tap takes.
//
// Positions are cut into chunks, which decide the order of additions, so they depend on the sizes
// alone. Columns are cut into groups, which do not, so they depend on the number of threads too.
#include <vector>

#include "conv.h"
#include "gemm.h"
#include "parallel.h"
#include "workspace.h"

namespace fusedshape {
namespace {

constexpr int64_t kCorrelateRows = 96;        // positions of one panel
constexpr int64_t kGroupPanels = 4;           // panels of x that are copied at once
constexpr int64_t kSumNumbers = 1 << 16;      // sums of a chunk that stay in the cache
constexpr int64_t kPartialNumbers = 1 << 18;  // sums of all chunks together
constexpr int64_t kNearNumbers = 1 << 18;     // x and dz of so few numbers need no prefetching
constexpr int64_t kItems = 64;                // pieces of work wanted, so that many threads have some
constexpr int64_t kItemsPerThread = 8;        // pieces wanted, so that all threads end together

Sizes tap_at(const Conv& conv, int64_t t) {
  const int64_t k1 = conv.kernel[1], k2 = conv.kernel[2];
  return {t / (k1 * k2), t / k2 % k1, t % k2};
}

// The rows of x that one tap takes for a block of output positions, and the rows of dz they go with.
struct Taken {
  int64_t rows = 0;
  std::array<const float*, kCorrelateRows> x, dz;

  void find(const Conv& conv, int64_t tap, int64_t begin, int64_t count, const float* x_data,
            const float* dz_data) {
    const Sizes at = tap_at(conv, tap);
    Sizes offset;
    for (int d = 0; d < kSpatial; ++d) {
      offset[d] = at[d] * conv.dilation[d] - conv.padding[d];
    }
    rows = 0;
    const int64_t width = conv.out[2], height = conv.out[1], depth = conv.out[0];
    for (int64_t row = begin; row < begin + count;) {
      // A run along the last dimension.
      const int64_t first = row % width, line = row / width;
      const int64_t length = std::min(width - first, begin + count - row);
      const int64_t p1 = line % height * conv.stride[1] + offset[1];
      const int64_t p0 = line / height % depth * conv.stride[0] + offset[0];
      if (0 <= p0 && p0 < conv.in[0] && 0 <= p1 && p1 < conv.in[1]) {
        const int64_t image = line / height / depth;
        const int64_t from = ((image * conv.in[0] + p0) * conv.in[1] + p1) * conv.in[2];
        for (int64_t i = 0; i < length; ++i) {
          const int64_t p2 = (first + i) * conv.stride[2] + offset[2];
          if (0 <= p2 && p2 < conv.in[2]) {
            x[rows] = x_data + (from + p2) * conv.in_channels;
            dz[rows++] = dz_data + (row + i) * conv.out_channels;
          }
        }
      }
      row += length;
    }
  }
};

// One piece of the work: a tap, a chunk of `rows` positions from `begin` on, and the columns
// [first, last) of dw.
struct Item {
  int64_t chunk, tap, begin, rows, first, last;
};

// Cuts the work into items. More chunks need more memory for their sums, and each group of columns
// reads dz once more.
struct Cut {
  int64_t rows, chunks, group;

  explicit Cut(const Conv& conv) : rows(conv.out_rows()) {
    const int64_t taps = conv.taps(), panels = ceil_div(conv.in_channels, kPanel);
    const int64_t size = taps * conv.in_channels * conv.out_channels;
    group = std::clamp(kSumNumbers / (conv.out_channels * kPanel), int64_t{1}, kGroupPanels);
    const int64_t most =
        std::max<int64_t>(1, std::min(kPartialNumbers / size, rows / kCorrelateRows));
    chunks = std::clamp(ceil_div(kItems, taps * ceil_div(panels, group)), int64_t{1}, most);
    const int64_t wanted = kItemsPerThread * torch::stable::get_num_threads();
    while (group > 1 && chunks * taps * ceil_div(panels, group) < wanted) {
      --group;
    }
    group *= kPanel;
  }

  Item item(const Conv& conv, int64_t i) const {
    const int64_t in = conv.in_channels, taps = conv.taps(), groups = ceil_div(in, group);
    const int64_t chunk = i / (taps * groups), first = i % groups * group;
    const int64_t begin = rows * chunk / chunks, end = rows * (chunk + 1) / chunks;
    return {chunk, i / groups % taps, begin, end - begin, first, std::min(first + group, in)};
  }
};

// Adds the products of an item to `sum`, whose order is (panel, output channel, column of the panel).
void correlate_chunk(const Conv& conv, const Item& item, const float* x, const float* dz,
                     float* sum) {
  const int64_t first = item.first, last = item.last;
  const int64_t out = conv.out_channels, tiles = ceil_div(out, kTile);
  const int64_t blocks = ceil_div(item.rows, kCorrelateRows);
  const bool near = conv.in_rows() * conv.in_channels + conv.out_rows() * out < kNearNumbers;
  const int64_t step = near ? 0 : ceil_div(kCorrelateRows, tiles * ceil_div(last - first, kPanel));
  alignas(64) float panels[kCorrelateRows * kGroupPanels * kPanel];
  Taken taken[2];
  const auto find = [&](int64_t block) {
    const int64_t from = item.rows * block / blocks, to = item.rows * (block + 1) / blocks;
    taken[block % 2].find(conv, item.tap, item.begin + from, to - from, x, dz);
  };
  if (blocks > 0) {
    find(0);
  }
  for (int64_t block = 0; block < blocks; ++block) {
    const Taken &now = taken[block % 2], &next = taken[(block + 1) % 2];
    taken[(block + 1) % 2].rows = 0;
    if (block + 1 < blocks) {
      find(block + 1);
    }
    if (now.rows == 0) {
      continue;
    }
    for (int64_t j = first; j < last; j += kPanel) {
      copy_rows(now.x.data(), now.rows, j, std::min(kPanel, last - j),
                panels + (j - first) * now.rows);
    }
    int64_t fetched = 0;  // rows of the next block; each tile prefetches a few
    for (int64_t j = first; j < last; j += kPanel) {
      const int64_t width = std::min(kPanel, last - j);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        for (int64_t i = 0; i < step && fetched < next.rows; ++i, ++fetched) {
          fetch_row(next.x[fetched] + first, last - first);
          fetch_row(next.dz[fetched], out);
        }
        const int64_t k = out * tile / tiles, k_end = out * (tile + 1) / tiles;
        correlate({k_end - k, width}, now.dz.data(), k, now.rows,
                  panels + (j - first) * now.rows, sum + (j - first) * out + k * width);
      }
    }
  }
}

// The sums of the same columns by several chunks, `distance` apart.
struct Sums {
  const float* data;
  int64_t chunks, distance;
};

// Adds up the sums of all chunks, and writes them where the item's tap and columns are in dw.
void write_sums(const Conv& conv, const Item& item, const Sums& sums, const Weight& dw) {
  const Sizes at = tap_at(conv, item.tap);
  float* target = dw.data;
  for (int d = 0; d < kSpatial; ++d) {
    target += at[d] * dw.tap[d];
  }
  const float* data = sums.data;
  for (int64_t j = item.first; j < item.last; j += kPanel) {
    const int64_t width = std::min(kPanel, item.last - j);
    for (int64_t k = 0; k < conv.out_channels; ++k) {
      alignas(64) float total[kPanel] = {};
      for (int64_t c = 0; c < sums.chunks; ++c) {
        for (int64_t i = 0; i < width; ++i) {
          total[i] += data[c * sums.distance + k * width + i];
        }
      }
      for (int64_t i = 0; i < width; ++i) {
        target[k * dw.row + (j + i) * dw.column] = total[i];
      }
    }
    data += width * conv.out_channels;
  }
}

}  // namespace

void conv_wgrad(const Conv& given, const float* dz, const float* x, const Weight& dw) {
  const Conv conv = given.flat();
  const int64_t in = conv.in_channels, out = conv.out_channels, taps = conv.taps();
  const Cut cut(conv);
  const int64_t groups = ceil_div(in, cut.group), chunks = cut.chunks, size = taps * in * out;
  const Workspace partials(chunks == 1 ? 0 : chunks * size);  // (chunk, tap, sums)
  const auto place = [&](const Item& item) {
    return partials.get() + item.chunk * size + (item.tap * in + item.first) * out;
  };
  parallel(chunks * taps * groups, kGrain, [&](int64_t i) {
    const Item item = cut.item(conv, i);
    const int64_t count = (item.last - item.first) * out;
    const Workspace own(chunks == 1 ? count : 0);
    float* sum = chunks == 1 ? own.get() : place(item);
    std::fill_n(sum, count, 0.0f);
    correlate_chunk(conv, item, x, dz, sum);
    if (chunks == 1) {
      write_sums(conv, item, {sum, 1, 0}, dw);
    }
  });
  if (chunks > 1) {
    parallel(taps * groups, chunks * out * cut.group, [&](int64_t i) {
      const Item item = cut.item(conv, i);  // of the first chunk
      write_sums(conv, item, {place(item), chunks, size}, dw);
    });
  }
}

}  // namespace fusedshape
