// Forward and dgrad: rows of the source, gathered through pointers, times panels of the weight.
//
// The two differ in what they gather. Forward takes one row of x for each output position and tap.
// dgrad takes one row of dz for each input position and tap. With strides, only positions of the same
// residue share their taps, so each residue is a section of its own. How the work is cut depends on the
// sizes alone, so results are rounded alike for any number of threads.
#include "conv.h"

#include <vector>

#include "gemm.h"
#include "parallel.h"
#include "workspace.h"

namespace fusedshape {
namespace {

constexpr int64_t kBlockRows = 96;      // rows of a result whose left operand stays in the cache
constexpr int64_t kImages = 2 * kTile;  // images whose positions are taken together; see Walk
constexpr int64_t kReduce = 512;        // products that are added up before a tile is written
constexpr int64_t kPanelNumbers = 1 << 22;  // numbers of W that are packed at once
constexpr int64_t kItems = 64;              // pieces of work wanted, so that many threads have some
constexpr int64_t kRowsPerFlush = 32;  // rows that are added up in float before they go into a double

// One dimension of a section: the `count` positions first, first + step, … of the result. For
// position i, tap t takes position i · scale + offset[t] of the source; tap[t] is its place in W.
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

// Calls f(i, t) for each tap i of a section, t its numbers in the three dimensions.
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

// Rows of a source times W. The `reduced` channels of the source are summed over, and the result has
// `columns` channels; `strides` are those of the two in W.
struct Product {
  int64_t batch;
  const float* source;
  int64_t reduced, columns;
  const Weight& w;
  Strides strides;
  float* result;
};

// The panels of the weight for one section and columns [begin, end) of the result.
void pack_panels(const Section& section, const Product& product, int64_t begin, int64_t end,
                 float* panels) {
  const int64_t reduced = product.reduced, column = product.strides.column;
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
    pack(starts[i] + j * column, product.strides, reduced, width,
         panels + j * length + i * reduced * width);
  });
}

// Goes through the positions of a batch, some images at a time: one position of all these images, then
// the next. A tile is then mostly one position of several images, so that a tap beyond an edge is so
// for the whole tile, and need not be computed.
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
  int64_t images() const { return together() - image_; }  // left at this position, with image()

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

// The rows of a block of the result: where they are written, and which rows of the source make them.
class Rows {
 public:
  // A row of zeros is taken where a tap is beyond the source's edges.
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

  // For the tile that begins at row r, one pointer for each tap from `tap` on and each row; the first
  // of a tap is null if the tap meets nothing but zeros.
  const float* const* left(int64_t r, int64_t tap) const {
    const int64_t height = std::min<int64_t>(kTile, target_.size() - r);
    return left_.data() + r * taps_ + tap * height;
  }

  // The distance from the rows of the tile that begins at row r to those of the next; 0 if unknown.
  int64_t ahead(int64_t r, int64_t tap) const {
    if (r + kTile >= static_cast<int64_t>(target_.size())) {
      return 0;
    }
    const float *here = *left(r, tap), *next = *left(r + kTile, tap);
    return here != nullptr && next != nullptr ? next - here : 0;
  }

 private:
  static constexpr int64_t kOutside = -1;

  // Finds what each tap takes for one position, counted from the beginning of an image.
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

// Cuts a result into items of about the same size: blocks of rows × groups of panels.
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

// The columns [first, last) of a result of so many channels.
struct Columns {
  int64_t first, last, channels;
};

// Applies `finish` to `count` rows of the result, to several at once where they are whole and lie one
// after the other. The sums of each column are added to `partial` unless it is null.
void finish_rows(const Finish& finish, const Rows& rows, int64_t count, const Columns& columns,
                 float* result, double* partial) {
  if (finish.value == nullptr && finish.grad == nullptr) {
    return;
  }
  const int64_t column = columns.first, width = columns.last - column, channels = columns.channels;
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

// Computes the columns [left, right) of one section of a result, and finishes them. The sums of each
// column are added to `totals` unless it is null.
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
            const Taps operand = {rows.left(r, tap), some, from, n, rows.ahead(r, tap)};
            multiply({tile, width}, operand, panel, c, tap + from > 0);
          }
        }
      }
    }
    if (tap_count == 0) {
      for (int64_t r = 0; r < height; ++r) {
        std::fill_n(result + rows.target(r) * columns + first, last - first, 0.0f);
      }
    }
    finish_rows(finish, rows, height, {first, last, columns}, result,
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

// Computes one section of a result, some columns at a time, so that the panels of a large W take little
// memory.
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
  const Conv conv = given.flat();
  const Product product = {
      conv.batch, x, conv.in_channels, conv.out_channels, w, {w.column, w.row}, y};
  gather(forward_section(conv), product, finish, nullptr);
}

void conv_dgrad(const Conv& given, const float* dz, const Weight& w, float* dx,
                const Finish& finish) {
  const Conv conv = given.flat();
  const Product product = {
      conv.batch, dz, conv.out_channels, conv.in_channels, w, {w.row, w.column}, dx};
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

}  // namespace fusedshape
