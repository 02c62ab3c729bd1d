// Kernels that cannot go through the boxed fallback: creation, views, copies, and the two operations whose cost on the
// real device depends on how they are done (convolution, attention).
#include <ATen/EmptyTensor.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <cstring>
#include <limits>

#include "fallback.h"
#include "interception.h"
#include "state.h"
#include "tensors.h"

namespace simulated_mps {

namespace {

using OptionalTensor = std::optional<at::Tensor>;

bool defined(const OptionalTensor& tensor) { return tensor && tensor->defined(); }

// ---- creation

// Fresh memory of the real device holds what was there before; all bits set is NaN in every floating-point type.
at::Tensor poisoned(at::Tensor tensor) {
  if (state().poison_empty && !state().dry(tensor.numel()) && tensor.nbytes()) {
    std::memset(tensor.storage().mutable_data(), 0xFF, tensor.storage().nbytes());
  }
  return tensor;
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<c10::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const auto type = c10::dtype_or_default(dtype);
  refuse_float64(type);
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  for (const int64_t extent : size) {
    TORCH_CHECK(extent <= limit, "MPS supports tensors with dimensions <= ", limit, ", but got ", extent, ".");
  }
  return poisoned(at::detail::empty_generic(size, allocator(), kKeys, type, format));
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  const auto type = c10::dtype_or_default(dtype);
  refuse_float64(type);
  return poisoned(at::detail::empty_strided_generic(size, stride, allocator(), kKeys, type));
}

// ---- copies

at::Tensor& copy_(at::Tensor& destination, const at::Tensor& source, bool) {
  const bool to_device = destination.device().is_mps(), from_device = source.device().is_mps();
  if (destination.scalar_type() != source.scalar_type()) {
    for (const auto type : {source.scalar_type(), destination.scalar_type()}) refuse_cast(type);
  }
  if (!state().dry(destination.numel())) {
    at::Tensor to = to_device ? cpu_alias(destination) : destination;
    to.copy_(from_device ? cpu_alias(source) : source);
  }
  const auto bytes = static_cast<int64_t>(destination.nbytes());
  const auto direction = !to_device    ? &Counters::device_to_host
                         : from_device ? &Counters::device_to_device
                                       : &Counters::host_to_device;
  state().count_copy(direction, bytes);
  if (!to_device) state().count_sync();
  state().count("copy", 2 * bytes, destination.numel());
  return destination;
}

// ---- convolution

at::Tensor convolution(const at::Tensor& input, const at::Tensor& given_weight, const OptionalTensor& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                       at::IntArrayRef output_padding, int64_t groups) {
  for (const at::Tensor* other : {&given_weight, defined(bias) ? &*bias : nullptr}) {
    TORCH_CHECK(!other || other->device() == input.device(), "Input type (", input.toString(), ") and ",
                other == &given_weight ? "weight" : "bias", " type (", other ? other->toString() : "",
                ") should be the same");
  }
  const int64_t dimensions = input.dim() - 2;
  const bool half = input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16;
  TORCH_CHECK(!(transposed && dimensions == 3 && half),
              "ConvTranspose 3D with BF16 or FP16 types is not supported on MPS");
  const bool measured = state().dry();
  const auto face = [&](const at::Tensor& tensor) { return measured ? meta_like(tensor) : cpu_alias(tensor); };
  const OptionalTensor face_of_bias = defined(bias) ? OptionalTensor(face(*bias)) : OptionalTensor();
  NamedValues arguments{{"input", face(input)}, {"weight", face(given_weight)}, {"transposed", transposed},
                        {"stride", stride},     {"padding", padding},           {"dilation", dilation},
                        {"groups", groups}};
  std::optional<Interception> rules;
  if (intercepted("convolution")) rules.emplace("convolution", arguments);

  const auto run = [&](const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& b) {
    return at::convolution(x, weight, b, stride, padding, dilation, transposed, output_padding, groups);
  };
  at::Tensor output = run(arguments[0].second.toTensor(), arguments[1].second.toTensor(), face_of_bias);
  if (rules) rules->finish({output});
  const int64_t largest = std::max({input.numel(), given_weight.numel(), output.numel()});
  const std::string name = (transposed ? "conv_transpose" : "conv") + std::to_string(dimensions) + "d";
  state().count(name, static_cast<int64_t>(input.nbytes() + given_weight.nbytes() + output.nbytes()), largest);
  if (!measured) return adopt(output);
  if (state().dry(largest)) return reserve_like(output);
  return adopt(run(cpu_alias(input), cpu_alias(given_weight),
                   defined(bias) ? OptionalTensor(cpu_alias(*bias)) : OptionalTensor()));
}

// ---- attention

enum class AttentionPath { prefill, vector, materialised };

const char* name_of(AttentionPath path) {
  switch (path) {
    case AttentionPath::prefill:
      return "prefill";
    case AttentionPath::vector:
      return "vector";
    default:
      return "materialised";
  }
}

// Which kernel the chosen torch version takes. The two without a score matrix have conditions on the head dim, the
// number of queries, the mask's dtype and dropout.
AttentionPath attention_path(const at::Tensor& query, const at::Tensor& value, const OptionalTensor& mask,
                             double dropout) {
  static const std::unordered_set<int64_t> prefill_dims{32, 64, 72, 80, 96, 128, 256}, vector_dims{64, 96, 128};
  const OpTable& table = state().table;
  const int64_t head_dim = query.size(-1), queries = query.size(-2);
  const bool plain_mask = !defined(mask) || mask->scalar_type() == at::kBool ||
                          mask->scalar_type() == query.scalar_type();
  if (dropout != 0 || head_dim != value.size(-1) || !plain_mask) return AttentionPath::materialised;
  if (table.prefill_attention && queries > 8 && prefill_dims.count(head_dim)) return AttentionPath::prefill;
  if (table.vector_attention && queries <= 8 && vector_dims.count(head_dim)) return AttentionPath::vector;
  return AttentionPath::materialised;
}

// sdpa_general_mps holds the scores in the query's dtype and in float32 at once, inside one MPSGraph run.
void materialise_scores(const at::Tensor& query, const at::Tensor& key) {
  constexpr int64_t most = int64_t(1) << 32;
  const int64_t rows = query.numel() / std::max<int64_t>(query.size(-1), 1);
  const int64_t scores = rows * key.size(-2);
  TORCH_CHECK(scores <= most, "Error: total bytes of NDArray > 2**32: attention would materialise ", scores,
              " scores (simulated device: the real one aborts the process)");
  const Block block = state().memory.acquire(static_cast<size_t>(scores) * (query.element_size() + sizeof(float)));
  state().memory.release(block);
}

at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const OptionalTensor& mask, double dropout, bool causal, std::optional<double> scale, bool gqa) {
  TORCH_CHECK(query.device().is_mps() && key.device().is_mps() && value.device().is_mps(),
              "Expected query, key, and value to have the same device type, but got query.device: ", query.device(),
              " key.device: ", key.device(), " and value.device: ", value.device(), " instead.");
  TORCH_CHECK(!defined(mask) || mask->device().is_mps(), "Placeholder storage has not been allocated on MPS device!");
  const AttentionPath path = attention_path(query, value, mask, dropout);
  if (path == AttentionPath::materialised) materialise_scores(query, key);
  const bool measured = state().dry(std::max({query.numel(), key.numel(), value.numel()}));
  const auto face = [&](const at::Tensor& tensor) { return measured ? meta_like(tensor) : cpu_alias(tensor); };

  const c10::IValue mask_value = defined(mask) ? c10::IValue(face(*mask)) : c10::IValue();
  const c10::IValue scale_value = scale ? c10::IValue(*scale) : c10::IValue();
  NamedValues arguments{{"query", face(query)},    {"key", face(key)},        {"value", face(value)},
                        {"attn_mask", mask_value}, {"is_causal", causal},     {"scale", scale_value},
                        {"enable_gqa", gqa},       {"path", name_of(path)},   {"after_fallback", state().fallback_pending}};
  std::optional<Interception> rules;
  if (intercepted("scaled_dot_product_attention")) rules.emplace("scaled_dot_product_attention", arguments);

  at::Tensor output;
  if (measured) {
    TORCH_CHECK(query.scalar_type() == key.scalar_type() && query.scalar_type() == value.scalar_type(),
                "Expected query, key, and value to have the same dtype, but got query.dtype: ", query.scalar_type(),
                " key.dtype: ", key.scalar_type(), " and value.dtype: ", value.scalar_type(), " instead.");
    auto sizes = query.sizes().vec();
    sizes.back() = value.size(-1);
    output = at::empty(sizes, query.options().device(c10::kMeta));
  } else {
    const OptionalTensor face_of_mask = defined(mask) ? OptionalTensor(mask_value.toTensor()) : OptionalTensor();
    output = at::scaled_dot_product_attention(arguments[0].second.toTensor(), arguments[1].second.toTensor(),
                                              arguments[2].second.toTensor(), face_of_mask, dropout, causal, scale, gqa)
                 .contiguous();
  }
  if (rules) rules->finish({output});
  const int64_t largest = std::max({query.numel(), key.numel(), value.numel(), output.numel()});
  state().count(std::string("sdpa.") + name_of(path),
                static_cast<int64_t>(query.nbytes() + key.nbytes() + value.nbytes() + output.nbytes()), largest);
  return measured ? reserve_like(output) : adopt(output);
}

// ---- views

at::Tensor as_strided(const at::Tensor& tensor, at::IntArrayRef size, at::IntArrayRef stride,
                      std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(tensor, size, stride, offset);
}

at::Tensor& set_storage(at::Tensor& tensor, at::Storage storage, int64_t offset, at::IntArrayRef size,
                        at::IntArrayRef stride) {
  return at::native::set_storage_cpu_(tensor, std::move(storage), offset, size, stride);
}

// Composites of a CPU build that have a kernel of their own on MPS, or that would call a DispatchStub which only a
// macOS build fills for MPS.
constexpr const char* kThroughTheFallback[] = {"constant_pad_nd", "linear", "repeat", "floor_divide.Scalar"};

}  // namespace

TORCH_LIBRARY_IMPL(_, MPS, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, MPS, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("as_strided", TORCH_FN(as_strided));
  m.impl("view", [](const at::Tensor& t, at::IntArrayRef size) { return at::native::view(t, size); });
  m.impl("_reshape_alias", [](const at::Tensor& t, at::IntArrayRef size, at::IntArrayRef stride) {
    return at::native::_reshape_alias(t, size, stride);
  });
  m.impl("unfold", [](const at::Tensor& t, int64_t dim, int64_t size, int64_t step) {
    return at::native::unfold(t, dim, size, step);
  });
  m.impl("view_as_real", [](const at::Tensor& t) { return at::native::view_as_real(t); });
  m.impl("view_as_complex", [](const at::Tensor& t) { return at::native::view_as_complex(t); });
  m.impl("resize_", [](const at::Tensor& t, at::IntArrayRef size, std::optional<at::MemoryFormat> format)
             -> const at::Tensor& { return at::native::resize_(t, size, format); });
  m.impl("set_.source_Storage",
         [](at::Tensor& t, at::Storage source) -> at::Tensor& { return at::native::set_(t, std::move(source)); });
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Tensor",
         [](at::Tensor& t, const at::Tensor& source) -> at::Tensor& { return at::native::set_tensor_(t, source); });
  m.impl("convolution_overrideable", TORCH_FN(convolution));
  m.impl("scaled_dot_product_attention", TORCH_FN(attention));
  for (const char* name : kThroughTheFallback) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

}  // namespace simulated_mps
