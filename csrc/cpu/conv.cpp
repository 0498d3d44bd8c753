// Convolution as a product: rows of the result, gathered by pointers, times panels of the weight.
//
// Forward and dgrad differ in what they gather. Forward takes, for each output position and tap, one
// row of x. dgrad takes, for each input position and tap, one row of dz; with strides, positions of
// one residue share their taps and are a section of their own. How that work is cut depends on the
// sizes alone, and so do the roundings, whatever the number of threads; wgrad's is cut to suit them.
#include "conv.h"

#include <vector>

#include "gemm.h"
#include "parallel.h"
#include "workspace.h"

namespace fusedshape {
namespace {

constexpr int64_t kBlockRows = 96;       // of a result, whose left operand stays in the cache
constexpr int64_t kImages = 2 * kTile;   // whose positions are taken together
constexpr int64_t kReduce = 512;         // numbers of a sum before a tile is written
constexpr int64_t kPanelNumbers = 1 << 22;  // of W, packed at once
constexpr int64_t kItems = 64;           // pieces of work to aim at, enough for many threads
constexpr int64_t kRowsPerFlush = 32;    // rows added up in float before they go into a double
constexpr int64_t kCorrelateRows = 96;   // positions of one panel of wgrad's
constexpr int64_t kGroupPanels = 4;      // panels of x that wgrad copies at once
constexpr int64_t kSumNumbers = 1 << 16;      // of dw, which stay in the cache for a chunk
constexpr int64_t kPartialNumbers = 1 << 18;  // of dw, for all chunks together
constexpr int64_t kNearNumbers = 1 << 18;     // of x and dz, that need not be fetched ahead
constexpr int64_t kItemsPerThread = 8;        // of wgrad, so that threads end together

// The same as a linear layer, where positions do not matter.
Conv flat(const Conv& conv) {
  const Sizes ones = {1, 1, 1}, zeros = {0, 0, 0};
  if (conv.taps() > 1 || conv.stride != ones || conv.padding != zeros) {
    return conv;
  }
  return {conv.in_rows(), conv.in_channels, conv.out_channels, ones, ones, ones, ones, zeros, ones};
}

// One dimension of a section: `count` positions first, first + step, … of the result; tap t of
// position i takes position i · scale + offset[t] of the source.
struct Axis {
  int64_t count, first, step, size, scale, source_size;
  std::vector<int64_t> offset, tap;
};

using Section = std::array<Axis, kSpatial>;

Section forward_section(const Conv& conv) {
  Section section;
  for (int d = 0; d < kSpatial; ++d) {
    section[d] = {conv.out[d], 0, 1, conv.out[d], conv.stride[d], conv.in[d], {}, {}};
    for (int64_t k = 0; k < conv.kernel[d]; ++k) {
      section[d].offset.push_back(k * conv.dilation[d] - conv.padding[d]);
      section[d].tap.push_back(k);
    }
  }
  return section;
}

Section dgrad_section(const Conv& conv, const Sizes& residue) {
  Section section;
  for (int d = 0; d < kSpatial; ++d) {
    const int64_t stride = conv.stride[d];
    const int64_t count = ceil_div(conv.in[d] - residue[d], stride);
    section[d] = {count, residue[d], stride, conv.in[d], 1, conv.out[d], {}, {}};
    for (int64_t k = 0; k < conv.kernel[d]; ++k) {
      const int64_t reach = residue[d] + conv.padding[d] - k * conv.dilation[d];
      if (reach % stride == 0) {
        section[d].offset.push_back(reach / stride);
        section[d].tap.push_back(k);
      }
    }
  }
  return section;
}

int64_t positions(const Section& s) { return s[0].count * s[1].count * s[2].count; }

int64_t taps(const Section& s) {
  return static_cast<int64_t>(s[0].tap.size() * s[1].tap.size() * s[2].tap.size());
}

// f(i, offsets) for each tap i of a section.
template <class F>
void each_tap(const Section& s, const F& f) {
  int64_t i = 0;
  for (size_t a = 0; a < s[0].tap.size(); ++a) {
    for (size_t b = 0; b < s[1].tap.size(); ++b) {
      for (size_t c = 0; c < s[2].tap.size(); ++c) {
        f(i++, std::array<size_t, kSpatial>{a, b, c});
      }
    }
  }
}

// Rows of a source times W: W's channels are `reduced`, which are summed over, and `columns`, which
// the result has; `row` and `column` are their distances in W.
struct Product {
  int64_t batch;
  const float* source;
  int64_t reduced, columns;
  const Weight& w;
  int64_t row, column;
  float* result;
};

// The panels of the weight for one section and columns [begin, end) of the result.
void pack_panels(const Section& section, const Product& product, int64_t begin, int64_t end,
                 float* panels) {
  const int64_t reduced = product.reduced, row = product.row, column = product.column;
  const Weight& w = product.w;
  const int64_t length = taps(section) * reduced;
  std::vector<const float*> starts(taps(section));
  each_tap(section, [&](int64_t i, const std::array<size_t, kSpatial>& t) {
    starts[i] = w.data + begin * column;
    for (int d = 0; d < kSpatial; ++d) {
      starts[i] += section[d].tap[t[d]] * w.tap[d];
    }
  });
  const int64_t count = ceil_div(end - begin, kPanel);
  parallel(count * taps(section), reduced * kPanel, [&](int64_t item) {
    const int64_t j = item / taps(section) * kPanel, i = item % taps(section);
    const int64_t width = std::min(kPanel, end - begin - j);
    pack(starts[i] + j * column, row, column, reduced, width,
         panels + j * length + i * reduced * width);
  });
}

// Goes through the positions of a batch, some images at a time: one position of each, then the next.
// What lies beyond an edge does so for whole tiles then, which need not be computed.
class Walk {
 public:
  Walk(const Section& section, int64_t batch, int64_t begin) : section_(section), batch_(batch) {
    const int64_t all = positions(section);
    first_ = begin / (kImages * all) * kImages;
    const int64_t rest = begin - first_ * all;
    image_ = rest % together();
    int64_t position = rest / together();
    for (int d = kSpatial - 1; d >= 0; --d) {
      at_[d] = position % section[d].count;
      position /= section[d].count;
    }
  }

  int64_t at(int d) const { return at_[d]; }
  int64_t image() const { return first_ + image_; }
  int64_t images() const { return together() - image_; }  // from image() on, at this position

  void skip(int64_t images) {
    image_ += images;
    if (image_ < together()) {
      return;
    }
    image_ = 0;
    for (int d = kSpatial - 1; d >= 0 && ++at_[d] == section_[d].count; --d) {
      at_[d] = 0;
      first_ += d == 0 ? kImages : 0;
    }
  }

 private:
  int64_t together() const { return std::max<int64_t>(1, std::min(kImages, batch_ - first_)); }

  const Section& section_;
  int64_t batch_, first_, image_;
  Sizes at_;
};

// Where the rows of a block of the result go, and the rows of the source that make them.
class Rows {
 public:
  // `zeros` stand for what lies beyond the source's edges.
  Rows(const Section& section, int64_t batch, const float* source, int64_t channels,
       const float* zeros)
      : section_(section), batch_(batch), source_(source), channels_(channels), zeros_(zeros),
        taps_(taps(section)), from_(taps_) {
    source_image_ = channels;
    for (int d = 0; d < kSpatial; ++d) {
      source_image_ *= section[d].source_size;
    }
  }

  void find(int64_t begin, int64_t rows) {
    target_.resize(rows);
    left_.resize(rows * taps_);
    const int64_t image = section_[0].size * section_[1].size * section_[2].size;
    Walk walk(section_, batch_, begin);
    for (int64_t r = 0; r < rows;) {
      const int64_t images = std::min(walk.images(), rows - r);
      int64_t target = walk.image();
      for (int d = 0; d < kSpatial; ++d) {
        target = target * section_[d].size + section_[d].first + walk.at(d) * section_[d].step;
      }
      take(walk);
      const float* source = source_ + walk.image() * source_image_;
      for (const int64_t last = r + images; r < last; ++r) {
        target_[r] = target;
        const int64_t tile = r / kTile * kTile, height = std::min(kTile, rows - tile);
        const float** left = left_.data() + tile * taps_ + r - tile;
        for (const int64_t from : from_) {
          *left = from == kOutside ? zeros_ : source + from;
          left += height;
        }
        target += image;
        source += source_image_;
      }
      walk.skip(images);
    }
    for (int64_t r = 0; r < rows; r += kTile) {
      const int64_t height = std::min(kTile, rows - r);
      const float** left = left_.data() + r * taps_;
      for (const float** end = left + height * taps_; left != end; left += height) {
        if (std::count(left, left + height, zeros_) == height) {
          *left = nullptr;
        }
      }
    }
  }

  int64_t target(int64_t r) const { return target_[r]; }

  // For the tile that begins at row r: for each tap, from `tap` on, one pointer a row; the first is
  // null where the tap meets nothing but zeros.
  const float* const* left(int64_t r, int64_t tap) const {
    const int64_t height = std::min<int64_t>(kTile, target_.size() - r);
    return left_.data() + r * taps_ + tap * height;
  }

  // How far the next tile's rows are from those of the tile that begins at row r.
  int64_t ahead(int64_t r, int64_t tap) const {
    if (r + kTile >= static_cast<int64_t>(target_.size())) {
      return 0;
    }
    const float *here = *left(r, tap), *next = *left(r + kTile, tap);
    return here != nullptr && next != nullptr ? next - here : 0;
  }

 private:
  static constexpr int64_t kOutside = -1;

  // What each tap takes for one position, counted from the beginning of an image.
  void take(const Walk& walk) {
    std::array<int64_t, kSpatial> size;
    size[2] = channels_;
    size[1] = size[2] * section_[2].source_size;
    size[0] = size[1] * section_[1].source_size;
    each_tap(section_, [&](int64_t i, const std::array<size_t, kSpatial>& t) {
      int64_t from = 0;
      bool inside = true;
      for (int d = 0; d < kSpatial; ++d) {
        const int64_t p = walk.at(d) * section_[d].scale + section_[d].offset[t[d]];
        inside &= 0 <= p && p < section_[d].source_size;
        from += p * size[d];
      }
      from_[i] = inside ? from : kOutside;
    });
  }

  const Section& section_;
  int64_t batch_;
  const float* source_;
  int64_t channels_;
  const float* zeros_;
  int64_t taps_, source_image_;
  std::vector<int64_t> from_;
  std::vector<int64_t> target_;
  std::vector<const float*> left_;
};

// How a result is cut into items, all of about one size: blocks of rows × groups of panels.
struct Cut {
  int64_t rows, columns, blocks, group;

  Cut(int64_t rows, int64_t columns)
      : rows(rows), columns(columns), blocks(ceil_div(rows, kBlockRows)) {
    const int64_t panels = ceil_div(columns, kPanel);
    group = ceil_div(panels, std::min(panels, ceil_div(kItems, blocks))) * kPanel;
  }

  int64_t groups() const { return ceil_div(columns, group); }

  // Where a block begins.
  int64_t row(int64_t block) const {
    return std::min(rows, ceil_div(rows, kTile) * block / blocks * kTile);
  }
};

// Finishes the rows of one item; rows that lie together, and are whole, at once. The sums of each
// column are added to `partial` unless it is null.
void finish_rows(const Finish& finish, const Rows& rows, int64_t count, float* result,
                 int64_t channels, int64_t column, int64_t width, double* partial) {
  if (finish.value == nullptr && finish.grad == nullptr) {
    return;
  }
  const int64_t most = width == channels ? std::max<int64_t>(1, kWidth / width) : 1;
  std::vector<float> bias(most * width), sums(finish.grad == nullptr ? 0 : most * width);
  for (int64_t i = 0; i < most; ++i) {
    std::copy_n(finish.bias + column, width, bias.begin() + i * width);
  }
  int64_t unflushed = 0;
  for (int64_t r = 0, n; r < count; r += n) {
    for (n = 1; n < most && r + n < count && rows.target(r + n) == rows.target(r) + n;) {
      ++n;
    }
    const int64_t at = rows.target(r) * channels + column;
    float* y = result + at;
    if (finish.value != nullptr) {
      if (finish.residual != nullptr) {
        const float* residual = finish.residual + at;
        for (int64_t i = 0; i < n * width; ++i) {
          y[i] += finish.share * residual[i];
        }
      }
      finish.value(y, bias.data(), y, n * width, finish.constants);
      continue;
    }
    finish.grad(y, finish.saved + at, bias.data(), y, sums.data(), n * width, finish.constants);
    if (partial != nullptr && (++unflushed == kRowsPerFlush || r + n == count)) {
      for (int64_t i = 0; i < most * width; ++i) {
        partial[i % width] += sums[i];
      }
      std::fill(sums.begin(), sums.end(), 0.0f);
      unflushed = 0;
    }
  }
}

// Columns [left, right) of one section of a result.
void gather(const Section& section, const Product& product, int64_t left, int64_t right,
            const Finish& finish, double* totals) {
  const int64_t batch = product.batch, reduced = product.reduced, columns = product.columns;
  const float* source = product.source;
  float* result = product.result;
  const int64_t count = batch * positions(section), tap_count = taps(section);
  const Workspace panels(tap_count * reduced * (right - left));
  pack_panels(section, product, left, right, panels.get());
  const std::vector<float> zeros(reduced);
  const Cut cut(count, right - left);
  const int64_t piece = ceil_div(ceil_div(reduced, ceil_div(reduced, kReduce)), kStep) * kStep;
  const int64_t runs = ceil_div(tap_count, std::max<int64_t>(1, kReduce / reduced));
  const int64_t run = ceil_div(tap_count, std::max<int64_t>(runs, 1));
  std::vector<double> partials(totals == nullptr ? 0 : cut.blocks * columns);
  parallel(cut.blocks * cut.groups(), kGrain, [&](int64_t item) {
    const int64_t block = item / cut.groups(), first = left + item % cut.groups() * cut.group;
    const int64_t begin = cut.row(block), height = cut.row(block + 1) - begin;
    const int64_t last = std::min(first + cut.group, right);
    Rows rows(section, batch, source, reduced, zeros.data());
    rows.find(begin, height);
    for (int64_t tap = 0; tap < tap_count; tap += run) {
      for (int64_t from = 0; from < reduced; from += piece) {
        const int64_t n = std::min(piece, reduced - from), some = std::min(run, tap_count - tap);
        for (int64_t j = first; j < last; j += kPanel) {
          const int64_t width = std::min(kPanel, right - j);
          const float* panel =
              panels.get() + (j - left) * tap_count * reduced + (tap * reduced + from) * width;
          for (int64_t r = 0; r < height; r += kTile) {
            const int64_t tile = std::min(kTile, height - r);
            float* c[kTile];
            for (int64_t i = 0; i < tile; ++i) {
              c[i] = result + rows.target(r + i) * columns + j;
            }
            multiply(tile, width, rows.left(r, tap), from, some, n, rows.ahead(r, tap), panel, c,
                     tap + from > 0);
          }
        }
      }
    }
    if (tap_count == 0) {
      for (int64_t r = 0; r < height; ++r) {
        std::fill_n(result + rows.target(r) * columns + first, last - first, 0.0f);
      }
    }
    finish_rows(finish, rows, height, result, columns, first, last - first,
                totals == nullptr ? nullptr : partials.data() + block * columns + first);
  });
  if (totals != nullptr) {
    for (int64_t block = 0; block < cut.blocks; ++block) {
      for (int64_t j = left; j < right; ++j) {
        totals[j] += partials[block * columns + j];
      }
    }
  }
}

// One section of a result, some columns after others, so that panels of a large W take little memory.
void gather(const Section& section, const Product& product, const Finish& finish, double* totals) {
  if (product.batch * positions(section) == 0) {
    return;
  }
  const int64_t length = std::max<int64_t>(1, taps(section) * product.reduced);
  const int64_t some = std::max<int64_t>(1, kPanelNumbers / (length * kPanel)) * kPanel;
  for (int64_t left = 0; left < product.columns; left += some) {
    gather(section, product, left, std::min(left + some, product.columns), finish, totals);
  }
}

}  // namespace

void conv_forward(const Conv& given, const float* x, const Weight& w, float* y,
                  const Finish& finish) {
  const Conv conv = flat(given);
  const Product product = {conv.batch, x,     conv.in_channels, conv.out_channels, w,
                           w.column,   w.row, y};
  gather(forward_section(conv), product, finish, nullptr);
}

void conv_dgrad(const Conv& given, const float* dz, const Weight& w, float* dx,
                const Finish& finish) {
  const Conv conv = flat(given);
  const Product product = {conv.batch, dz,       conv.out_channels, conv.in_channels, w,
                           w.row,      w.column, dx};
  std::vector<double> totals(conv.in_channels);
  Sizes residue, residues;
  for (int d = 0; d < kSpatial; ++d) {
    residues[d] = std::min(conv.stride[d], conv.in[d]);
  }
  for (residue[0] = 0; residue[0] < residues[0]; ++residue[0]) {
    for (residue[1] = 0; residue[1] < residues[1]; ++residue[1]) {
      for (residue[2] = 0; residue[2] < residues[2]; ++residue[2]) {
        gather(dgrad_section(conv, residue), product, finish,
               finish.sums == nullptr ? nullptr : totals.data());
      }
    }
  }
  if (finish.sums != nullptr) {
    std::copy(totals.begin(), totals.end(), finish.sums);
  }
}

namespace {

Sizes tap_at(const Conv& conv, int64_t t) {
  const int64_t k1 = conv.kernel[1], k2 = conv.kernel[2];
  return {t / (k1 * k2), t / k2 % k1, t % k2};
}

// The rows of x that one tap takes for a block of output positions, and the rows of dz there.
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

// How wgrad is cut into items: chunks of positions × taps × groups of panels. Chunks cost memory for
// their sums, groups read dz once more each.
struct CorrelateCut {
  int64_t rows, chunks, group;

  explicit CorrelateCut(const Conv& conv) : rows(conv.out_rows()) {
    const int64_t wanted = kItemsPerThread * torch::stable::get_num_threads();
    const int64_t taps = conv.taps(), panels = ceil_div(conv.in_channels, kPanel);
    const int64_t size = taps * conv.in_channels * conv.out_channels;
    group = std::clamp(kSumNumbers / (conv.out_channels * kPanel), int64_t{1}, kGroupPanels);
    const int64_t most =
        std::max<int64_t>(1, std::min(kPartialNumbers / size, rows / kCorrelateRows));
    chunks = std::clamp(ceil_div(wanted, taps * ceil_div(panels, group)), int64_t{1}, most);
    while (group > 1 && chunks * taps * ceil_div(panels, group) < wanted) {
      --group;
    }
    group *= kPanel;
  }

  int64_t row(int64_t chunk) const { return rows * chunk / chunks; }
};

// sum += the products of one tap over a chunk of positions, for columns [first, last) of dw: as
// (panel, output channel, column of the panel).
void correlate_chunk(const Conv& conv, int64_t tap, int64_t begin, int64_t rows, int64_t first,
                     int64_t last, const float* x, const float* dz, float* sum) {
  const int64_t out = conv.out_channels, tiles = ceil_div(out, kTile);
  const int64_t blocks = ceil_div(rows, kCorrelateRows);
  const bool near = conv.in_rows() * conv.in_channels + conv.out_rows() * out < kNearNumbers;
  const int64_t step = near ? 0 : ceil_div(kCorrelateRows, tiles * ceil_div(last - first, kPanel));
  alignas(64) float panels[kCorrelateRows * kGroupPanels * kPanel];
  Taken taken[2];
  const auto find = [&](int64_t block) {
    const int64_t from = rows * block / blocks, to = rows * (block + 1) / blocks;
    taken[block % 2].find(conv, tap, begin + from, to - from, x, dz);
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
    int64_t fetched = 0;  // of the next block's rows, a few by each tile
    for (int64_t j = first; j < last; j += kPanel) {
      const int64_t width = std::min(kPanel, last - j);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        for (int64_t i = 0; i < step && fetched < next.rows; ++i, ++fetched) {
          fetch_row(next.x[fetched] + first, last - first);
          fetch_row(next.dz[fetched], out);
        }
        const int64_t k = out * tile / tiles, k_end = out * (tile + 1) / tiles;
        correlate(k_end - k, width, now.dz.data(), k, now.rows, panels + (j - first) * now.rows,
                  sum + (j - first) * out + k * width);
      }
    }
  }
}

// Columns [first, last) of one tap of dw, from the sums of some chunks, `distance` apart.
void write_sums(const Conv& conv, int64_t tap, int64_t first, int64_t last, const float* sums,
                int64_t chunks, int64_t distance, const Weight& dw) {
  const Sizes at = tap_at(conv, tap);
  float* target = dw.data;
  for (int d = 0; d < kSpatial; ++d) {
    target += at[d] * dw.tap[d];
  }
  for (int64_t j = first; j < last; j += kPanel) {
    const int64_t width = std::min(kPanel, last - j);
    for (int64_t k = 0; k < conv.out_channels; ++k) {
      alignas(64) float total[kPanel] = {};
      for (int64_t c = 0; c < chunks; ++c) {
        for (int64_t i = 0; i < width; ++i) {
          total[i] += sums[c * distance + k * width + i];
        }
      }
      for (int64_t i = 0; i < width; ++i) {
        target[k * dw.row + (j + i) * dw.column] = total[i];
      }
    }
    sums += width * conv.out_channels;
  }
}

}  // namespace

void conv_wgrad(const Conv& given, const float* dz, const float* x, const Weight& dw) {
  const Conv conv = flat(given);
  const int64_t in = conv.in_channels, out = conv.out_channels, taps = conv.taps();
  const CorrelateCut cut(conv);
  const int64_t groups = ceil_div(in, cut.group), chunks = cut.chunks, size = taps * in * out;
  const Workspace partials(chunks == 1 ? 0 : chunks * size);  // (chunk, tap, sums)
  parallel(chunks * taps * groups, kGrain, [&](int64_t item) {
    const int64_t chunk = item / (taps * groups), tap = item / groups % taps;
    const int64_t first = item % groups * cut.group, last = std::min(first + cut.group, in);
    const int64_t begin = cut.row(chunk), rows = cut.row(chunk + 1) - begin;
    const Workspace own(chunks == 1 ? (last - first) * out : 0);
    float* sum = chunks == 1 ? own.get() : partials.get() + chunk * size + (tap * in + first) * out;
    std::fill_n(sum, (last - first) * out, 0.0f);
    correlate_chunk(conv, tap, begin, rows, first, last, x, dz, sum);
    if (chunks == 1) {
      write_sums(conv, tap, first, last, sum, 1, 0, dw);
    }
  });
  if (chunks > 1) {
    parallel(taps * groups, chunks * out * cut.group, [&](int64_t item) {
      const int64_t tap = item / groups, first = item % groups * cut.group;
      write_sums(conv, tap, first, std::min(first + cut.group, in),
                 partials.get() + (tap * in + first) * out, chunks, size, dw);
    });
  }
}

}  // namespace fusedshape
