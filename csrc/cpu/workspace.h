// Scratch memory for kernels. It is kept from call to call, because new pages cost more time than the
// work on them.
#pragma once

#include <cstdint>

namespace fusedshape {

class Workspace {
 public:
  explicit Workspace(int64_t floats);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  float* get() const { return data_; }

 private:
  float* data_;
  int64_t bytes_;
};

}  // namespace fusedshape
