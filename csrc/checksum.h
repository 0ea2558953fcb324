// A 64-bit checksum that keeps up with memory: four lanes, each multiplying sixteen bytes into its state.
//
// A product of 128 bits, folded, makes every bit of the words and of the state bear on the whole of the next state, so
// that no small change cancels another's whatever the data. Not cryptographic: it finds lost, torn and misplaced
// writes and flipped bits, not an adversary's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace unishard {

inline std::uint64_t folded_product(std::uint64_t a, std::uint64_t b) {
    __extension__ using Wide = unsigned __int128;
    const Wide product = static_cast<Wide>(a) * b;
    return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

inline std::uint64_t checksum(const char* data, std::size_t bytes) {
    constexpr std::size_t lanes = 4, stride = lanes * 16;
    // The first digits of the fractional parts of the square roots of 2, 3, 5 and 7.
    constexpr std::uint64_t keys[lanes] = {0x6A09E667F3BCC908ULL, 0xBB67AE8584CAA73BULL, 0x3C6EF372FE94F82BULL,
                                           0xA54FF53A5F1D36F1ULL};
    std::uint64_t state[lanes] = {keys[1], keys[2], keys[3], keys[0]};
    const auto absorb = [&](const char* from) {
        std::uint64_t words[2 * lanes];
        std::memcpy(words, from, stride);
        for (std::size_t i = 0; i < lanes; ++i) {
            state[i] = folded_product(words[2 * i] ^ keys[i], words[2 * i + 1] ^ state[i]);
        }
    };
    std::size_t at = 0;
    for (; at + stride <= bytes; at += stride) absorb(data + at);
    char rest[stride] = {};
    if (at < bytes) std::memcpy(rest, data + at, bytes - at);
    absorb(rest);
    std::uint64_t digest = bytes;
    for (std::size_t i = 0; i < lanes; ++i) digest = folded_product(digest ^ keys[i], state[i] ^ keys[3 - i]);
    return digest;
}

}  // namespace unishard
