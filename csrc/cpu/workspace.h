// Memory that kernels need for a while, kept from call to call: new pages cost more than the work.
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
