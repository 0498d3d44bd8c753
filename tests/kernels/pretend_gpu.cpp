// What libtorch asks a CUDA build for: which device is current, its streams, backward's threads.
#include <array>
#include <atomic>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream, c10::StreamId;

constexpr DeviceIndex kDevices = 3;
thread_local DeviceIndex current = 0;
thread_local std::array<StreamId, kDevices> streams{};

DeviceIndex at(Device device) {
  return device.has_index() ? device.index() : current;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const override { return {DeviceType::CUDA, current}; }
  void setDevice(Device device) const override { current = at(device); }
  void uncheckedSetDevice(Device device) const noexcept override { current = at(device); }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    current = at(device);
    return before;
  }
  Stream stream(Device device, StreamId id) const {
    return Stream(Stream::UNSAFE, Device(DeviceType::CUDA, at(device)), id);
  }
  Stream getStream(Device device) const override { return stream(device, streams[at(device)]); }
  Stream getDefaultStream(Device device) const override { return stream(device, 0); }
  Stream getNewStream(Device device, int) const override {
    static std::atomic<StreamId> last{0};
    return stream(device, ++last);
  }
  Stream exchangeStream(Stream next) const override {
    const Stream before = getStream(next.device());
    streams[at(next.device())] = next.id();
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void record(void** event, const Stream&, DeviceIndex, c10::EventFlag) const override {
    static int happened;
    *event = &happened;
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(DeviceIndex) const override {}
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  at::Generator getNewGenerator(DeviceIndex) const override {
    return at::make_generator<at::CPUGeneratorImpl>();
  }
};

using at::CUDAHooksRegistry, at::RegistererCUDAHooksRegistry;
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks)
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace
