// Splits arrays into chunks, which threads take one after another.
#pragma once

#include <cstddef>
#include <vector>

#include "team.h"

namespace unishard {

// Elements that pass through the first-level cache at a time, in up to five buffers of floats. Measured at 128 to 2048:
// flat from 256 to 1024, a tenth slower at 2048.
constexpr std::size_t kBlock = 512;
// Elements that a thread takes at a time: long enough for the prefetchers, short enough to share out evenly.
constexpr std::size_t kChunk = 32768;
// Fewer elements than this are done sooner by one thread than by waking another.
constexpr std::size_t kWorthThreads = 131072;

struct Chunk {
    std::size_t item, begin, end;
};

// Calls body(first element, elements) for every block of a chunk.
template <class Body>
void for_each_block(const Chunk& chunk, Body body) {
    for (std::size_t i = chunk.begin; i < chunk.end; i += kBlock) {
        body(i, chunk.end - i < kBlock ? chunk.end - i : kBlock);
    }
}

// The chunks of arrays with `sizes` elements, in order. They depend on the sizes alone, so that sums do too.
inline std::vector<Chunk> chunks_of(const std::vector<std::size_t>& sizes) {
    std::vector<Chunk> chunks;
    for (std::size_t item = 0; item < sizes.size(); ++item) {
        for (std::size_t begin = 0; begin < sizes[item]; begin += kChunk) {
            const std::size_t end = begin + kChunk < sizes[item] ? begin + kChunk : sizes[item];
            chunks.push_back({item, begin, end});
        }
    }
    return chunks;
}

// Calls body(index, chunk) for every chunk, on up to `threads` threads.
template <class Body>
void for_each_chunk(const std::vector<Chunk>& chunks, unsigned threads, Body body) {
    std::size_t elements = 0;
    for (const Chunk& chunk : chunks) elements += chunk.end - chunk.begin;
    auto task = [&](std::size_t index) { body(index, chunks[index]); };
    parallel_for(chunks.size(), elements < kWorthThreads ? 1 : threads, task);
}

}  // namespace unishard
