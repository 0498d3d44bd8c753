// Cuts memory into rows and blocks for the threads, and adds up the channel sums.
//
// There are two ways, chosen by how many numbers of a channel lie together. Where they are many
// (NCHW), they make rows themselves, each with one bias and one sum. Where they are few
// (channels_last, features last, tiny images), such rows would be too short. Memory is then read as a
// matrix with one period of all channels, or several short ones, as its columns, so that every column
// has one bias and one sum. How memory is cut depends on the layout alone, so the sums are rounded
// alike for any number of threads.
#include "kernels.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "parallel.h"

namespace fusedshape {
namespace {

constexpr int64_t kLongRun = 32;       // from so many numbers on, a run is a row of its own
constexpr int64_t kRowsPerFlush = 32;  // rows whose sums are added in A before they go into a double
constexpr int64_t kMinRows = 8, kMaxRows = 128;  // of a block
constexpr int64_t kBlocks = 64;                  // wanted, so that many threads have work

// A row in the type that it is computed in: where it lies, or converted in a buffer.
template <class T, class A>
class Staged {
 public:
  const A* read(const T* x, int64_t n) {
    if constexpr (std::is_same_v<T, A>) {
      return x;
    } else {
      load(x, buffer_, n);
      return buffer_;
    }
  }

  A* place([[maybe_unused]] T* y) {
    if constexpr (std::is_same_v<T, A>) {
      return y;
    } else {
      return buffer_;
    }
  }

  void write([[maybe_unused]] T* y, [[maybe_unused]] int64_t n) {
    if constexpr (!std::is_same_v<T, A>) {
      store(buffer_, y, n);
    }
  }

 private:
  A buffer_[std::is_same_v<T, A> ? 1 : kWidth];
};

// Memory in pieces of one size, which are cut where a channel's run ends.
struct Runs {
  static constexpr int64_t size = kGrain;
  const Layout& layout;

  int64_t count() const { return ceil_div(layout.numel, size); }

  // How many runs a piece can touch; its partial sums are numbered from its first run.
  int64_t touched() const { return (size - 1) / layout.inner + 2; }

  int64_t first_channel(int64_t piece) const {
    return piece * size / layout.inner % layout.channels;
  }

  int64_t next(int64_t channel) const { return channel + 1 == layout.channels ? 0 : channel + 1; }

  // Calls f(run, channel, start, n) for each row of a piece; a long run makes several rows.
  template <class F>
  void each(int64_t piece, const F& f) const {
    const int64_t begin = piece * size, last = std::min(begin + size, layout.numel);
    int64_t run = 0, channel = first_channel(piece);
    int64_t end = (begin / layout.inner + 1) * layout.inner;
    for (int64_t start = begin; start < last;) {
      const int64_t n = std::min({end - start, last - start, kWidth});
      f(run, channel, start, n);
      start += n;
      if (start == end) {
        end += layout.inner;
        ++run;
        channel = next(channel);
      }
    }
  }
};

template <class T, class A>
void bias_act_runs(const Forward<T>& tensors, const Layout& layout, ValueRow<A> row,
                   const Constants<A>& constants) {
  const T* x = tensors.x;
  const A* bias = tensors.bias;
  T* y = tensors.y;
  const Runs runs{layout};
  parallel(runs.count(), runs.size, [&](int64_t piece) {
    const A none = 0;
    Staged<T, A> staged;
    runs.each(piece, [&](int64_t, int64_t channel, int64_t start, int64_t n) {
      row(staged.read(x + start, n), bias == nullptr ? &none : bias + channel,
          staged.place(y + start), n, constants);
      staged.write(y + start, n);
    });
  });
}

template <class T, class A>
void act_grad_runs(const Backward<T>& tensors, const Layout& layout, GradRow<A> row,
                   const Constants<A>& constants) {
  const T *grad = tensors.grad, *saved = tensors.saved;
  const A* bias = tensors.bias;
  T* dx = tensors.dx;
  A* sums = tensors.sums;
  const Runs runs{layout};
  const int64_t touched = runs.touched();
  std::vector<double> partials(sums == nullptr ? 0 : runs.count() * touched);
  parallel(runs.count(), runs.size, [&](int64_t piece) {
    const A none = 0;
    Staged<T, A> staged_grad, staged;
    runs.each(piece, [&](int64_t run, int64_t channel, int64_t start, int64_t n) {
      A total = 0;
      row(staged_grad.read(grad + start, n), staged.read(saved + start, n),
          bias == nullptr ? &none : bias + channel, staged_grad.place(dx + start), &total, n,
          constants);
      staged_grad.write(dx + start, n);
      if (sums != nullptr) {
        partials[piece * touched + run] += total;
      }
    });
  });
  if (sums != nullptr) {
    std::vector<double> totals(layout.channels);
    for (int64_t piece = 0; piece < runs.count(); ++piece) {
      int64_t channel = runs.first_channel(piece);
      for (int64_t run = 0; run < touched; ++run) {
        totals[channel] += partials[piece * touched + run];
        channel = runs.next(channel);
      }
    }
    std::copy(totals.begin(), totals.end(), sums);
  }
}

struct Block {
  int64_t row, rows, column, width;
};

// Memory read as a matrix; a block is a few of its rows, in at most kWidth of its columns.
struct Matrix {
  const Layout& layout;
  int64_t period, width, columns, rows, rows_per_block;

  explicit Matrix(const Layout& layout) : layout(layout) {
    period = layout.channels * layout.inner;
    if (period <= kWidth / 2) {
      period *= std::min(kWidth / period, ceil_div(layout.numel, period));
    }
    columns = ceil_div(period, kWidth);
    width = ceil_div(ceil_div(period, columns), 16) * 16;
    rows = ceil_div(layout.numel, period);
    rows_per_block = std::clamp(layout.numel / (width * kBlocks), kMinRows, kMaxRows);
  }

  int64_t count() const { return ceil_div(rows, rows_per_block) * columns; }

  int64_t size() const { return rows_per_block * width; }

  Block operator[](int64_t i) const {
    const int64_t row = i / columns * rows_per_block, column = i % columns * width;
    return {row, std::min(rows_per_block, rows - row), column, std::min(width, period - column)};
  }

  // How many channels a block can touch; its partial sums are numbered from its first channel.
  int64_t touched() const { return std::min(layout.channels, (width - 1) / layout.inner + 2); }

  int64_t first_channel(const Block& block) const { return block.column / layout.inner; }

  // Calls f(row, start, n) for each row of a block; the matrix's last row may be short.
  template <class F>
  void each(const Block& block, const F& f) const {
    for (int64_t row = block.row; row < block.row + block.rows; ++row) {
      const int64_t start = row * period + block.column;
      f(row, start, std::min(block.width, layout.numel - start));
    }
  }

  // The bias of each column of a block: a part of `bias` where that will do, else `memory`, filled.
  template <class A>
  const A* spread(const A* bias, const Block& block, A* memory) const {
    if (bias == nullptr) {
      std::fill_n(memory, block.width, A(0));
      return memory;
    }
    const int64_t channels = layout.channels, inner = layout.inner;
    if (inner == 1) {
      if (block.width <= channels) {
        return bias + block.column;
      }
      for (int64_t begin = 0; begin < block.width; begin += channels) {
        std::copy_n(bias, channels, memory + begin);
      }
      return memory;
    }
    int64_t channel = first_channel(block), left = inner - block.column % inner;
    for (int64_t i = 0; i < block.width; ++i) {
      memory[i] = bias[channel];
      if (--left == 0) {
        left = inner;
        channel = channel + 1 == channels ? 0 : channel + 1;
      }
    }
    return memory;
  }

  // Adds the sums of a block's columns to its partial sums, and clears them.
  template <class A>
  void flush(const Block& block, A* sums, double* partials) const {
    const int64_t channels = layout.channels, inner = layout.inner;
    if (inner == 1) {
      for (int64_t begin = 0; begin < block.width; begin += channels) {
        const int64_t n = std::min(channels, block.width - begin);
        for (int64_t i = 0; i < n; ++i) {
          partials[i] += sums[begin + i];
        }
      }
    } else {
      const int64_t first = first_channel(block);
      int64_t channel = first, left = inner - block.column % inner;
      for (int64_t i = 0; i < block.width; ++i) {
        partials[channel - first] += sums[i];
        if (--left == 0) {
          left = inner;
          channel = channel + 1 == channels ? 0 : channel + 1;
        }
      }
    }
    std::fill_n(sums, block.width, A(0));
  }
};

template <class T, class A>
void bias_act_columns(const Forward<T>& tensors, const Layout& layout, ValueRow<A> row,
                      const Constants<A>& constants) {
  const T* x = tensors.x;
  const A* bias = tensors.bias;
  T* y = tensors.y;
  const Matrix matrix(layout);
  parallel(matrix.count(), matrix.size(), [&](int64_t i) {
    const Block block = matrix[i];
    A memory[kWidth];
    Staged<T, A> staged;
    const A* b = matrix.spread(bias, block, memory);
    matrix.each(block, [&](int64_t, int64_t start, int64_t n) {
      row(staged.read(x + start, n), b, staged.place(y + start), n, constants);
      staged.write(y + start, n);
    });
  });
}

template <class T, class A>
void act_grad_columns(const Backward<T>& tensors, const Layout& layout, GradRow<A> row,
                      const Constants<A>& constants) {
  const T *grad = tensors.grad, *saved = tensors.saved;
  const A* bias = tensors.bias;
  T* dx = tensors.dx;
  A* sums = tensors.sums;
  const Matrix matrix(layout);
  const int64_t touched = matrix.touched();
  std::vector<double> partials(sums == nullptr ? 0 : matrix.count() * touched);
  parallel(matrix.count(), matrix.size(), [&](int64_t i) {
    const Block block = matrix[i];
    const int64_t last = block.row + block.rows - 1;
    A memory[kWidth];
    A totals[kWidth] = {};
    Staged<T, A> staged_grad, staged;
    const A* b = matrix.spread(bias, block, memory);
    matrix.each(block, [&](int64_t r, int64_t start, int64_t n) {
      row(staged_grad.read(grad + start, n), staged.read(saved + start, n), b,
          staged_grad.place(dx + start), totals, n, constants);
      staged_grad.write(dx + start, n);
      if (sums != nullptr && (r == last || (r - block.row + 1) % kRowsPerFlush == 0)) {
        matrix.flush(block, totals, partials.data() + i * touched);
      }
    });
  });
  if (sums != nullptr) {
    std::vector<double> totals(layout.channels);
    for (int64_t i = 0; i < matrix.count(); ++i) {
      const int64_t first = matrix.first_channel(matrix[i]);
      const int64_t n = std::min(touched, layout.channels - first);
      for (int64_t c = 0; c < n; ++c) {
        totals[first + c] += partials[i * touched + c];
      }
    }
    std::copy(totals.begin(), totals.end(), sums);
  }
}

Along along(const Layout& layout) {
  return layout.channels == 1 || layout.inner >= kLongRun ? Along::run : Along::channels;
}

}  // namespace

template <class T>
void bias_act(const Forward<T>& tensors, const Layout& layout, const Activation& activation) {
  using A = typename Opmath<T>::type;
  const Along way = along(layout);
  const auto kernel = way == Along::run ? bias_act_runs<T, A> : bias_act_columns<T, A>;
  kernel(tensors, layout, value_row<A>(activation.id, way),
         activation.constants.template as<A>());
}

template <class T>
void act_grad(const Backward<T>& tensors, const Layout& layout, const Activation& activation,
              bool from_output) {
  using A = typename Opmath<T>::type;
  const Along way = along(layout);
  const auto kernel = way == Along::run ? act_grad_runs<T, A> : act_grad_columns<T, A>;
  kernel(tensors, layout, grad_row<A>(activation.id, from_output, way),
         activation.constants.template as<A>());
}

#define FS_INSTANTIATE(T)                                                             \
  template void bias_act<T>(const Forward<T>&, const Layout&, const Activation&);     \
  template void act_grad<T>(const Backward<T>&, const Layout&, const Activation&, bool);
FS_INSTANTIATE(float)
FS_INSTANTIATE(double)
FS_INSTANTIATE(BFloat16)
FS_INSTANTIATE(Float16)

}  // namespace fusedshape
