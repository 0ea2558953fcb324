// One register of floats, and how it is loaded, stored and rounded, in the instruction set this file is compiled for.
//
// Compiled once for each instruction set, with UNISHARD_ISA as its namespace. Nothing here may come from the standard
// library's templates: the linker would keep one copy of such a function, compiled for any of the instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "arrays.h"

namespace unishard::UNISHARD_ISA {

#if defined(__AVX512F__)
constexpr std::size_t kLanes = 16;
#elif defined(__AVX2__)
constexpr std::size_t kLanes = 8;
#else
constexpr std::size_t kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef std::uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef double Doubles __attribute__((vector_size(kLanes * 4)));  // half as many lanes

inline Floats all(float value) { return Floats{} + value; }

template <class To, class From>
inline To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

inline Floats square_root(Floats x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (Floats)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
    return (Floats)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
    return (Floats)vsqrtq_f32((float32x4_t)x);
#else
    for (std::size_t i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

struct DoublePair {
    Doubles low, high;
};

inline DoublePair to_doubles(Floats x) {
#if defined(__AVX512F__)
    const __m512 all = (__m512)x;
    return {(Doubles)_mm512_cvtps_pd(_mm512_castps512_ps256(all)),
            (Doubles)_mm512_cvtps_pd(_mm512_extractf32x8_ps(all, 1))};
#elif defined(__AVX2__)
    const __m256 all = (__m256)x;
    return {(Doubles)_mm256_cvtps_pd(_mm256_castps256_ps128(all)),
            (Doubles)_mm256_cvtps_pd(_mm256_extractf128_ps(all, 1))};
#else
    return {Doubles{x[0], x[1]}, Doubles{x[2], x[3]}};
#endif
}

// 16-bit words to 32-bit words and back; the upper halves of `wide` are ignored.
inline Words extend(Halves narrow) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu16_epi32((__m256i)narrow);
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu16_epi32((__m128i)narrow);
#elif defined(__aarch64__)
    return (Words)vmovl_u16((uint16x4_t)narrow);
#else
    return __builtin_convertvector(narrow, Words);
#endif
}

inline Halves truncate(Words wide) {
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtepi32_epi16((__m512i)wide);
#elif defined(__AVX2__)
    const __m256i low = _mm256_and_si256((__m256i)wide, _mm256_set1_epi32(0xffff));
    return (Halves)_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
#elif defined(__aarch64__)
    return (Halves)vmovn_u32((uint32x4_t)wide);
#else
    return __builtin_convertvector(wide, Halves);
#endif
}

inline Floats from_bf16(Halves h) { return bits<Floats>(extend(h) << 16); }

inline Halves to_bf16(Floats x) {
    const Words u = bits<Words>(x);
    // Half a unit in the last place of bf16, less one where the result would be even already.
    const Words rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const Words quiet_nan = (u >> 16) | 0x40u;
    return truncate(x == x ? rounded : quiet_nan);
}

inline Floats from_f16(Halves h) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__)
    return (Floats)vcvt_f32_f16((float16x4_t)h);
#else
    const Words w = extend(h);
    const Words sign = (w & 0x8000u) << 16, exponent = w & 0x7c00u, shifted = (w & 0x7fffu) << 13;
    // Normal numbers: the exponents' biases are 15 and 127. Infinity and NaN: all ones.
    const Words normal = shifted + (112u << 23);
    const Words special = shifted | 0x7f800000u;
    // Subnormal numbers count units of 2^-24: place them under 2^-14 and subtract it. No float is subnormal here.
    const Words subnormal = bits<Words>(bits<Floats>(shifted + (113u << 23)) - 0x1p-14f);
    Words magnitude = exponent == 0x7c00u ? special : normal;
    magnitude = exponent == 0u ? subnormal : magnitude;
    return bits<Floats>(magnitude | sign);
#endif
}

inline Halves to_f16(Floats x) {
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
    return (Halves)vcvt_f16_f32((float32x4_t)x);
#else
    const Words u = bits<Words>(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    const Words normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14 the result counts units of 2^-24, which is the unit in the last place of 0.5.
    const Words subnormal = bits<Words>(bits<Floats>(magnitude) + 0.5f) - 0x3f000000u;
    const Words quiet_nan = 0x7e00u | (magnitude >> 13);
    Words result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x477ff000u ? Words{} + 0x7c00u : result;  // 65520 and more round to infinity
    result = magnitude > 0x7f800000u ? quiet_nan : result;
    return truncate(result | sign);
#endif
}

template <Dtype D>
inline Floats load(const void* from) {
    if constexpr (D == Dtype::f32) {
        Floats x;
        std::memcpy(&x, from, sizeof x);
        return x;
    } else {
        Halves h;
        std::memcpy(&h, from, sizeof h);
        return D == Dtype::bf16 ? from_bf16(h) : from_f16(h);
    }
}

template <Dtype D>
inline void store(void* to, Floats x) {
    if constexpr (D == Dtype::f32) {
        std::memcpy(to, &x, sizeof x);
    } else {
        const Halves h = D == Dtype::bf16 ? to_bf16(x) : to_f16(x);
        std::memcpy(to, &h, sizeof h);
    }
}

// `to` is aligned to the size of what is stored.
template <Dtype D>
inline void store_around_caches(void* to, Floats x) {
#if defined(__x86_64__)
    if constexpr (D == Dtype::f32) {
#if defined(__AVX512F__)
        _mm512_stream_ps((float*)to, (__m512)x);
#elif defined(__AVX2__)
        _mm256_stream_ps((float*)to, (__m256)x);
#else
        _mm_stream_ps((float*)to, (__m128)x);
#endif
    } else {
        const Halves h = D == Dtype::bf16 ? to_bf16(x) : to_f16(x);
#if defined(__AVX512F__)
        _mm256_stream_si256((__m256i*)to, (__m256i)h);
#elif defined(__AVX2__)
        _mm_stream_si128((__m128i*)to, (__m128i)h);
#else
        long long both;
        std::memcpy(&both, &h, sizeof both);
        _mm_stream_si64((long long*)to, both);
#endif
    }
#else
    store<D>(to, x);
#endif
}

// The last elements of an array, fewer than a register holds; zeros fill it up.
template <Dtype D>
inline Floats load_some(const void* from, std::size_t count) {
    alignas(64) char padded[kLanes * 4] = {};
    std::memcpy(padded, from, count * size_of(D));
    return load<D>(padded);
}

template <Dtype D>
inline void store_some(void* to, Floats x, std::size_t count) {
    alignas(64) char padded[kLanes * 4];
    store<D>(padded, x);
    std::memcpy(to, padded, count * size_of(D));
}

// How far ahead memory is asked for, in bytes. Measured at 256 to 4096: best from 1536 to 2304, worst at 512 and 4096,
// where the streams meet in one set of the cache.
constexpr std::size_t kAhead = 1792;

// `count` elements of an array from `first` on: a whole register, or the rest of the array.
struct Whole {
    std::size_t first;
    void ask_ahead(const float* array) const { __builtin_prefetch(array + first + kAhead / sizeof(float)); }
    template <Dtype D = Dtype::f32>
    Floats get(const void* from) const {
        return load<D>(static_cast<const char*>(from) + first * size_of(D));
    }
    template <Dtype D = Dtype::f32>
    void put(void* to, Floats x) const {
        store<D>(static_cast<char*>(to) + first * size_of(D), x);
    }
};

struct Rest {
    std::size_t first, count;
    void ask_ahead(const float*) const {}
    template <Dtype D = Dtype::f32>
    Floats get(const void* from) const {
        return load_some<D>(static_cast<const char*>(from) + first * size_of(D), count);
    }
    template <Dtype D = Dtype::f32>
    void put(void* to, Floats x) const {
        store_some<D>(static_cast<char*>(to) + first * size_of(D), x, count);
    }
};

template <class Body>
inline void for_each_register(std::size_t n, Body body) {
    std::size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) body(Whole{i});
    if (i < n) body(Rest{i, n - i});
}

}  // namespace unishard::UNISHARD_ISA
