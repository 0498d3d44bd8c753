// Keeps a few blocks of memory that are not in use, for the next calls.
#include "workspace.h"

#include <torch/headeronly/util/Exception.h>

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <vector>

namespace fusedshape {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kKept = 64 << 20;  // bytes that are kept at most

struct Block {
  float* data;
  int64_t bytes;
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> blocks;
  int64_t bytes = 0;
};

// The pool is never destroyed, because threads may outlive main. The lock is taken around a fork:
// otherwise, if another thread held it, it would stay locked in the child forever.
Pool& pool() {
  static Pool* const it = [] {
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); },
                   [] { pool().mutex.unlock(); });
    return new Pool;
  }();
  return *it;
}

// Takes the smallest block of at least `bytes` and at most twice that; null if there is none.
Block take(int64_t bytes) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  auto best = p.blocks.end();
  for (auto it = p.blocks.begin(); it != p.blocks.end(); ++it) {
    if (bytes <= it->bytes && it->bytes <= 2 * bytes &&
        (best == p.blocks.end() || it->bytes < best->bytes)) {
      best = it;
    }
  }
  if (best == p.blocks.end()) {
    return {nullptr, 0};
  }
  const Block block = *best;
  p.blocks.erase(best);
  p.bytes -= block.bytes;
  return block;
}

}  // namespace

Workspace::Workspace(int64_t floats)
    : data_(nullptr),
      bytes_((floats * int64_t{sizeof(float)} + kAlignment - 1) / kAlignment * kAlignment) {
  if (bytes_ == 0) {
    return;
  }
  const Block block = take(bytes_);
  if (block.data != nullptr) {
    data_ = block.data;
    bytes_ = block.bytes;
    return;
  }
  data_ = static_cast<float*>(std::aligned_alloc(kAlignment, bytes_));
  STD_TORCH_CHECK(data_ != nullptr, "out of memory: a kernel needs ", bytes_, " bytes for itself");
}

Workspace::~Workspace() {
  if (data_ == nullptr) {
    return;
  }
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  p.blocks.push_back({data_, bytes_});
  p.bytes += bytes_;
  while (p.bytes > kKept) {  // the oldest goes first
    p.bytes -= p.blocks.front().bytes;
    std::free(p.blocks.front().data);
    p.blocks.erase(p.blocks.begin());
  }
}

}  // namespace fusedshape
