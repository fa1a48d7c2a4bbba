// Tensors through torch's stable C interface, and from them to the pointers and types of a kernel. This header and
// library.h, parallel.h and cuda.h beside it are all that knows torch: what they use is there in every torch from 2.10 on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/dtype.h"

namespace efe {

namespace stable = torch::stable::detail;
using torch::headeronly::BFloat16;
using torch::headeronly::CppTypeToScalarType;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// torch writes to stderr why a call fails: the interface hands no exception over.
inline void check(AOTITorchError error) {
    STD_TORCH_CHECK(error == TORCH_SUCCESS, "efe: torch could not do what was asked of it; the cause stands on stderr.");
}

// The number of a dtype is torch's own affair, and finding it out takes up to twenty calls: the usual ones are remembered.
inline ScalarType scalar_type_of(int32_t number) {
    static const int32_t float32 = aoti_torch_dtype_float32(), boolean = aoti_torch_dtype_bool();
    if (number == float32) return ScalarType::Float;
    if (number == boolean) return ScalarType::Bool;
    return stable::to<ScalarType>(stable::from(number));
}

// A reference to a tensor, or none. Its form is asked for once, because every question is a call into torch.
class Tensor {
public:
    Tensor() = default;

    // Takes the reference over.
    explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
        int32_t type;
        int64_t *sizes, *strides;
        check(aoti_torch_get_dim(handle, &dim_));
        check(aoti_torch_get_sizes(handle, &sizes));
        check(aoti_torch_get_strides(handle, &strides));
        check(aoti_torch_get_dtype(handle, &type));
        check(torch_get_const_data_ptr(handle, &data_));
        sizes_ = sizes;
        strides_ = strides;
        type_ = scalar_type_of(type);
    }

    // A second reference.
    Tensor share() const {
        AtenTensorHandle handle;
        check(aoti_torch_new_tensor_handle(this->handle(), &handle));
        return Tensor(*this, handle);
    }
    AtenTensorHandle release() { return handle_.release(); }

    AtenTensorHandle handle() const { return handle_.get(); }
    bool defined() const { return handle_ != nullptr; }
    ScalarType scalar_type() const { return type_; }
    int64_t dim() const { return dim_; }
    int64_t size(int64_t dim) const { return sizes_[dim]; }
    int64_t stride(int64_t dim) const { return strides_[dim]; }
    const int64_t* sizes() const { return sizes_; }
    const int64_t* strides() const { return strides_; }

    int64_t numel() const {
        int64_t numel = 1;
        for (int64_t d = 0; d < dim_; ++d) numel *= sizes_[d];
        return numel;
    }

    bool is_contiguous() const {
        bool contiguous;
        check(aoti_torch_is_contiguous(handle(), &contiguous));
        return contiguous;
    }

    const void* data() const { return data_; }
    void* mutable_data() const { return const_cast<void*>(data_); }  // only of what was made here

    // Null without a tensor, as in the next one.
    template <class T>
    const T* data() const {
        STD_TORCH_CHECK(!defined() || type_ == CppTypeToScalarType<T>::value, "efe: a tensor is ", type_, " and not ",
                        CppTypeToScalarType<T>::value, ".");
        return static_cast<const T*>(data_);
    }
    template <class T>
    T* mutable_data() const {
        return const_cast<T*>(data<T>());
    }

private:
    Tensor(const Tensor& form, AtenTensorHandle handle)
        : handle_(handle), dim_(form.dim_), sizes_(form.sizes_), strides_(form.strides_), type_(form.type_),
          data_(form.data_) {}

    struct Delete {
        void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
    };

    std::unique_ptr<AtenTensorOpaque, Delete> handle_;
    int64_t dim_ = 0;
    const int64_t *sizes_ = nullptr, *strides_ = nullptr;
    ScalarType type_ = ScalarType::Undefined;
    const void* data_ = nullptr;
};

using OptionalTensor = std::optional<Tensor>;

// On the device of `like`.
inline Tensor empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, ScalarType type,
                            const Tensor& like) {
    int32_t device_type, device_index;
    check(aoti_torch_get_device_type(like.handle(), &device_type));
    check(aoti_torch_get_device_index(like.handle(), &device_index));
    const auto dtype = stable::to<int32_t>(stable::from(type));
    AtenTensorHandle handle;
    check(aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device_index, &handle));
    return Tensor(handle);
}

// Row-major, on the device of `like`.
inline Tensor empty(int64_t dim, const int64_t* sizes, ScalarType type, const Tensor& like) {
    constexpr int64_t kMaxDim = 64;  // torch has no more
    STD_TORCH_CHECK(dim <= kMaxDim, "efe: no kernel for a tensor of ", dim, " dimensions.");
    std::array<int64_t, kMaxDim> strides;
    int64_t stride = 1;
    for (int64_t d = dim - 1; d >= 0; --d) {
        strides[d] = stride;
        stride *= std::max<int64_t>(sizes[d], 1);
    }
    return empty_strided(dim, sizes, strides.data(), type, like);
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& like) {
    return empty(static_cast<int64_t>(sizes.size()), sizes.begin(), type, like);
}

// Row-major with the sizes of `like`.
inline Tensor empty(const Tensor& like, ScalarType type) { return empty(like.dim(), like.sizes(), type, like); }

// Whether the elements lie one behind the other in some order of the dimensions.
inline bool is_dense(const Tensor& tensor) {
    std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
    for (int64_t d = 0; d < tensor.dim(); ++d)
        if (tensor.size(d) != 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
    std::sort(dims.begin(), dims.end());
    int64_t expected = 1;
    for (const auto& [stride, size] : dims) {
        if (stride != expected) return false;
        expected *= size;
    }
    return true;
}

// The tensor that an op of torch makes of the arguments on the stack, which it takes over.
inline Tensor call(const char* op, const char* overload, StableIValue* stack) {
    check(torch_call_dispatcher(op, overload, stack, TORCH_ABI_VERSION));
    return Tensor(stable::to<AtenTensorHandle>(*stack));
}

// In the form of `like`, as torch.empty_like: with its strides where it is dense.
inline Tensor empty_like(const Tensor& like, ScalarType type) {
    if (like.is_contiguous() || is_dense(like))
        return empty_strided(like.dim(), like.sizes(), like.strides(), type, like);
    const StableIValue none = stable::from(std::nullopt);
    StableIValue stack[] = {
        stable::from(like.share().release()), stable::from(std::optional(type)), none, none, none, none};
    return call("aten::empty_like", "", stack);
}

// Row-major with the sizes and the dtype of `like`.
inline Tensor zeros(const Tensor& like) {
    Tensor out = empty(like, like.scalar_type());
    check(aoti_torch_zero_(out.handle()));
    return out;
}

// The sum over the rows of a matrix.
inline Tensor sum_rows(const Tensor& matrix) {
    const int64_t dim = 0;
    const std::optional<torch::headeronly::IntHeaderOnlyArrayRef> dims({&dim, 1});
    StableIValue stack[] = {
        stable::from(matrix.share().release()), stable::from(dims), stable::from(false), stable::from(std::nullopt)};
    return call("aten::sum", "dim_IntList", stack);
}

inline void copy(const Tensor& from, const Tensor& to) { check(aoti_torch_copy_(to.handle(), from.handle(), 0)); }

// Row-major in a dtype.
inline Tensor contiguous_as(const Tensor& tensor, ScalarType type) {
    if (tensor.scalar_type() == type && tensor.is_contiguous()) return tensor.share();
    Tensor out = empty(tensor, type);
    copy(tensor, out);
    return out;
}

// The same of a row-major result.
inline Tensor result_as(Tensor result, ScalarType type) {
    return result.scalar_type() == type ? std::move(result) : contiguous_as(result, type);
}

// Undefined where there is none.
inline Tensor contiguous_as(const OptionalTensor& tensor, ScalarType type) {
    return tensor.has_value() ? contiguous_as(*tensor, type) : Tensor();
}

// A row-major result in the form and the dtype of `like`.
inline Tensor result_like(Tensor result, const Tensor& like) {
    if (result.scalar_type() == like.scalar_type() && like.is_contiguous()) return result;
    Tensor out = empty_like(like, like.scalar_type());
    copy(result, out);
    return out;
}

// A wrong value, which Python shows as a ValueError.
template <class... Parts>
[[noreturn]] void refuse_value(const Parts&... parts) {
    std::ostringstream sentence;
    (sentence << ... << parts);
    throw std::invalid_argument(sentence.str());
}

inline bool is_floating(ScalarType type) {
    return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
           type == ScalarType::BFloat16;
}

inline Dtype dtype_of(ScalarType type) {
    switch (type) {
        case ScalarType::Float:
            return Dtype::float32;
        case ScalarType::Double:
            return Dtype::float64;
        case ScalarType::Half:
            return Dtype::float16;
        case ScalarType::BFloat16:
            return Dtype::bfloat16;
        default:
            STD_TORCH_CHECK(false, "efe: no kernel for ", type, ".");
    }
}

// body(T{}) with the type T of a dtype, always inlined.
template <class Body>
inline __attribute__((always_inline)) void for_dtype(Dtype dtype, const Body& body) {
    for_dtype<Half, BFloat16>(dtype, body);
}

// The dtype to which two floating-point ones promote.
inline ScalarType promoted(ScalarType a, ScalarType b) {
    if (a == b) return a;
    return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The dtype that values of a dtype are computed in.
inline ScalarType arithmetic_type(ScalarType type) {
    return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline ScalarType arithmetic_type(const Tensor& tensor) { return arithmetic_type(tensor.scalar_type()); }

template <class Body>
void for_arithmetic(ScalarType type, const Body& body) {
    for_arithmetic(type == ScalarType::Double ? Dtype::float64 : Dtype::float32, body);
}

// Element `index` of a tensor of one dimension or none, on the CPU.
inline double number_in(const Tensor& tensor, int64_t index = 0) {
    double number = 0;
    for_dtype(dtype_of(tensor.scalar_type()), [&](auto zero) {
        number = static_cast<double>(tensor.data<decltype(zero)>()[tensor.dim() == 0 ? 0 : index * tensor.stride(0)]);
    });
    return number;
}

// A mask as bytes, which are 0 or 1.
inline const uint8_t* bytes_of(const Tensor& mask) { return reinterpret_cast<const uint8_t*>(mask.data<bool>()); }

}  // namespace efe
