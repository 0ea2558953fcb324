// CRC-32 as zlib computes it, where the processor can multiply polynomials.
#pragma once

#include <cstddef>
#include <cstdint>

namespace unishard {

// Whether `crc32` may be called: zlib's own is the better choice elsewhere.
bool has_crc32();

std::uint32_t crc32(const char* data, std::size_t bytes);

}  // namespace unishard
