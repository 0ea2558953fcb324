// What crosses the border from Python: flat arrays of a known dtype, by address.
#pragma once

#include <cstddef>
#include <cstdint>

namespace unishard {

// The numbers are part of the interface with src/unishard/kernels/native.py.
enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

constexpr std::size_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// A null address means "absent".
struct Array {
    char* data = nullptr;
    Dtype dtype = Dtype::f32;

    // From an element on; what is absent stays so.
    Array from(std::size_t element) const { return data != nullptr ? Array{data + element * size_of(dtype), dtype} : *this; }
    explicit operator bool() const { return data != nullptr; }
};

}  // namespace unishard
