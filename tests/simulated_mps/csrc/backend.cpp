// The parts that make torch believe in the device: guard, allocator, generator and MPSHooks.
#include "backend.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "state.h"
#include "tensors.h"

namespace simulated_mps {

namespace {

struct Guard final : public c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::MPS> {
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
};

// ---- allocator

// Large buffers are mappings without reserved swap, so dry mode may hold far more than this machine has.
constexpr size_t kMapped = size_t(1) << 20;

void* take(size_t bytes) {
  if (bytes < kMapped) return std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return address == MAP_FAILED ? nullptr : address;
}

struct Buffer {
  void* address;
  Block block;
};

void give_back(void* context) {
  auto* buffer = static_cast<Buffer*>(context);
  state().memory.release(buffer->block);
  if (buffer->block.bytes < kMapped) {
    std::free(buffer->address);
  } else {
    munmap(buffer->address, buffer->block.bytes);
  }
  delete buffer;
}

struct Adopted {
  c10::Storage storage;
  Block block;
};

void release_adopted(void* context) {
  auto* adopted = static_cast<Adopted*>(context);
  state().memory.release(adopted->block);
  delete adopted;
}

struct Allocator final : public c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, kDevice};
    const Block block = state().memory.acquire(bytes);
    void* address = take(bytes);
    if (!address) {
      state().memory.release(block);
      TORCH_CHECK(false, "The machine that simulates the device has no memory for ", bytes, " bytes.");
    }
    return {address, new Buffer{address, block}, &give_back, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};

// ---- generator: the CPU's random numbers, so that seeded results equal the CPU run's

struct Generator final : public c10::GeneratorImpl {
  at::Generator cpu;

  explicit Generator(uint64_t seed) : c10::GeneratorImpl(kDevice, kKeys), cpu(at::detail::createCPUGenerator(seed)) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& bytes) override { cpu.unsafeGetGeneratorImpl()->set_state(bytes); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override {
    auto* copy = new Generator(0);
    copy->cpu = cpu.clone();
    return copy;
  }
};

// ---- hooks

bool version_at_least(unsigned major, unsigned minor) {
  const auto [our_major, our_minor] = macos_version();
  return our_major > major || (our_major == major && our_minor >= minor);
}

struct Hooks final : public at::MPSHooksInterface {
  void init() const override {}
  bool hasMPS() const override { return true; }
  bool isOnMacOSorNewer(unsigned major, unsigned minor) const override { return version_at_least(major, minor); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Generator>(c10::default_rng_seed_val);
  }
  at::Allocator* getMPSDeviceAllocator() const override { return allocator(); }
  void deviceSynchronize() const override { state().count_sync(); }
  void commitStream() const override {}
  uint32_t acquireEvent(bool) const override { return 1; }
  void releaseEvent(uint32_t) const override {}
  void recordEvent(uint32_t) const override {}
  void waitForEvent(uint32_t) const override {}
  void synchronizeEvent(uint32_t) const override { state().count_sync(); }
  bool queryEvent(uint32_t) const override { return true; }
  double elapsedTimeOfEvents(uint32_t, uint32_t) const override { return 0; }
  void emptyCache() const override { state().memory.empty_cache(); }
  size_t getCurrentAllocatedMemory() const override { return state().memory.live(); }
  size_t getDriverAllocatedMemory() const override { return state().memory.driver(); }
  size_t getRecommendedMaxMemory() const override { return state().limits.recommended; }
  void setMemoryFraction(double ratio) const override { set_memory_fraction(ratio); }
  c10::Device getDeviceFromPtr(void*) const override { return kDevice; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
};

unsigned macos_major = 26, macos_minor = 3;

}  // namespace

std::pair<unsigned, unsigned> macos_version() { return {macos_major, macos_minor}; }

void set_macos_version(unsigned major, unsigned minor) {
  macos_major = major;
  macos_minor = minor;
}

void set_memory_fraction(double ratio) {
  Limits& limits = state().limits;
  limits.ceiling = static_cast<size_t>(static_cast<double>(limits.recommended) * ratio);
}

const at::Generator& default_generator() {
  static auto* generator = new at::Generator(at::make_generator<Generator>(c10::default_rng_seed_val));
  return *generator;
}

at::Generator cpu_generator(const at::Generator& generator) {
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->cpu;
}

at::Allocator* allocator() {
  static auto* instance = new Allocator;
  return instance;
}

void install_backend() {
  c10::SetAllocator(c10::DeviceType::MPS, allocator());
  watch_operations();
}

// ---- tensors

at::Tensor cpu_alias(const at::Tensor& tensor) {
  const c10::Storage& storage = tensor.storage();
  c10::DataPtr data(const_cast<void*>(storage.data()), c10::Device(c10::DeviceType::CPU));
  c10::Storage alias(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetCPUAllocator(), true);
  const c10::DispatchKeySet cpu_keys(c10::DispatchKey::CPU);
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(alias), cpu_keys, tensor.dtype());
  c10::TensorImpl* impl = result.unsafeGetTensorImpl();
  impl->set_storage_offset(tensor.storage_offset());
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  if (tensor.is_conj()) impl->_set_conj(true);
  if (tensor.is_neg()) impl->_set_neg(true);
  return result;
}

at::Tensor device_view(const at::Tensor& base, const at::Tensor& view) {
  auto result = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(base.storage()), kKeys, view.dtype());
  c10::TensorImpl* impl = result.unsafeGetTensorImpl();
  impl->set_storage_offset(view.storage_offset());
  impl->set_sizes_and_strides(view.sizes(), view.strides());
  if (view.is_conj()) impl->_set_conj(true);
  if (view.is_neg()) impl->_set_neg(true);
  return result;
}

at::Tensor adopt(const at::Tensor& tensor) {
  refuse_float64(tensor.scalar_type());
  const c10::Storage& source = tensor.storage();
  const Block block = state().memory.acquire(source.nbytes());
  c10::DataPtr data(const_cast<void*>(source.data()), new Adopted{source, block}, &release_adopted, kDevice);
  c10::Storage storage(c10::Storage::use_byte_size_t(), source.nbytes(), std::move(data), allocator(), true);
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), kKeys, tensor.dtype());
  c10::TensorImpl* impl = result.unsafeGetTensorImpl();
  impl->set_storage_offset(tensor.storage_offset());
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  return result;
}

at::Tensor meta_like(const at::Tensor& tensor) {
  auto result = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(c10::kMeta));
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) result.unsafeGetTensorImpl()->set_wrapped_number(true);
  return result;
}

at::Tensor reserve_like(const at::Tensor& meta) {
  refuse_float64(meta.scalar_type());
  return at::detail::empty_strided_generic(meta.sizes(), meta.strides(), allocator(), kKeys, meta.scalar_type());
}

C10_REGISTER_GUARD_IMPL(MPS, Guard)

}  // namespace simulated_mps

// torch looks the hooks up by this name in a registry of namespace at.
namespace at {
using SimulatedHooks = ::simulated_mps::Hooks;
C10_REGISTER_TYPED_CLASS(MPSHooksRegistry, "MPSHooks", SimulatedHooks)
}  // namespace at
