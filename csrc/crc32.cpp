// Folding by carry-less multiplication (Gopal et al. 2009, "Fast CRC Computation for Generic Polynomials Using
// PCLMULQDQ Instruction", section 3): 16 bytes are replaced by their remainder at a place further on, which leaves the
// CRC of the whole as it was.
#include "crc32.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#include <array>
#endif

namespace unishard {

#if defined(__x86_64__)

namespace {

constexpr std::uint32_t polynomial = 0xEDB88320u;  // the first bit of a byte is the highest power

constexpr std::array<std::uint32_t, 256> make_table() {
    std::array<std::uint32_t, 256> table{};
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
        std::uint32_t rest = byte;
        for (int bit = 0; bit < 8; ++bit) rest = (rest >> 1) ^ ((rest & 1) != 0 ? polynomial : 0);
        table[byte] = rest;
    }
    return table;
}

constexpr std::array<std::uint32_t, 256> table = make_table();

std::uint32_t extend(std::uint32_t crc, const unsigned char* data, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; ++i) crc = (crc >> 8) ^ table[(crc ^ data[i]) & 0xFF];
    return crc;
}

// x^n modulo the polynomial, as a factor: one place up, because products of mirrored numbers end one place low.
constexpr std::uint64_t power(unsigned n) {
    std::uint32_t rest = 0x80000000u;  // x^0
    for (unsigned i = 0; i < n; ++i) rest = (rest >> 1) ^ ((rest & 1) != 0 ? polynomial : 0);
    return static_cast<std::uint64_t>(rest) << 1;
}

struct Factors {
    std::uint64_t first, second;  // for the eight bytes that come first, and those that follow
};

// Moves 16 bytes on by `bits`.
constexpr Factors over(unsigned bits) { return {power(bits + 32), power(bits - 32)}; }

__attribute__((target("pclmul,sse4.1"))) inline __m128i load(const void* from) {
    return _mm_loadu_si128(static_cast<const __m128i*>(from));
}

__attribute__((target("pclmul,sse4.1"))) inline __m128i fold(__m128i value, __m128i factors, __m128i onto) {
    const __m128i first = _mm_clmulepi64_si128(value, factors, 0x00);
    const __m128i second = _mm_clmulepi64_si128(value, factors, 0x11);
    return _mm_xor_si128(_mm_xor_si128(first, second), onto);
}

__attribute__((target("pclmul,sse4.1"))) std::uint32_t folded(const unsigned char* data, std::size_t bytes) {
    constexpr std::size_t lanes = 4, width = 16, stride = lanes * width;
    static constexpr Factors far = over(8 * stride), near = over(8 * width);
    const __m128i by_stride = load(&far), by_width = load(&near);
    __m128i lane[lanes];
    for (std::size_t i = 0; i < lanes; ++i) lane[i] = load(data + i * width);
    lane[0] = _mm_xor_si128(lane[0], _mm_cvtsi32_si128(-1));  // zlib starts from all ones
    std::size_t at = stride;
    for (; at + stride <= bytes; at += stride) {
        for (std::size_t i = 0; i < lanes; ++i) lane[i] = fold(lane[i], by_stride, load(data + at + i * width));
    }
    __m128i value = lane[0];
    for (std::size_t i = 1; i < lanes; ++i) value = fold(value, by_width, lane[i]);
    for (; at + width <= bytes; at += width) value = fold(value, by_width, load(data + at));
    unsigned char rest[width];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), value);
    return extend(extend(0, rest, width), data + at, bytes - at);
}

}  // namespace

bool has_crc32() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & (1u << 1)) != 0 && (c & (1u << 19)) != 0;
}

std::uint32_t crc32(const char* data, std::size_t bytes) {
    const auto* const from = reinterpret_cast<const unsigned char*>(data);
    return ~(bytes < 64 ? extend(~0u, from, bytes) : folded(from, bytes));
}

#else

bool has_crc32() { return false; }
std::uint32_t crc32(const char*, std::size_t) { return 0; }

#endif

}  // namespace unishard
