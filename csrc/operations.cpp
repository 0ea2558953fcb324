#include "operations.h"

#include <cstring>

#include "chunks.h"

namespace unishard {
namespace {

// Writes this large leave nothing useful in the caches, so they may as well go around them.
constexpr std::size_t kStreamBytes = std::size_t{8} << 20;

bool worth_streaming(std::size_t elements, Dtype dtype) { return elements * size_of(dtype) >= kStreamBytes; }

float* floats(const Array& array) { return reinterpret_cast<float*>(array.data); }

// One block of an array as floats: in place where it holds floats, else in a buffer of the first-level cache.
class FloatBlock {
  public:
    float* read(const Kernels& kernels, const Array& array, std::size_t n) {
        if (!array) return nullptr;
        if (array.dtype == Dtype::f32) return floats(array);
        kernels.convert({reinterpret_cast<char*>(buffer_), Dtype::f32}, array, n, 1.0f, false);
        return buffer_;
    }

    void write_back(const Kernels& kernels, const Array& array, std::size_t n) {
        if (!array || array.dtype == Dtype::f32) return;
        kernels.convert(array, {reinterpret_cast<char*>(buffer_), Dtype::f32}, n, 1.0f, false);
    }

  private:
    alignas(64) float buffer_[kBlock];
};

bool all_floats(const Target& target) {
    for (const Array* array : {&target.param, &target.grad, &target.state[0], &target.state[1]}) {
        if (*array && array->dtype != Dtype::f32) return false;
    }
    return !target.copy;
}

void update_chunk(const Kernels& kernels, StepBlock step, const void* constants, const Target& target,
                  const Chunk& chunk) {
    if (all_floats(target)) {
        const std::size_t begin = chunk.begin, n = chunk.end - chunk.begin;
        step(floats(target.param.from(begin)), floats(target.grad.from(begin)), floats(target.state[0].from(begin)),
             floats(target.state[1].from(begin)), n, constants, true);
        return;
    }
    FloatBlock params, grads, states[2];
    for_each_block(chunk, [&](std::size_t i, std::size_t n) {
        const Array param = target.param.from(i), state[2] = {target.state[0].from(i), target.state[1].from(i)};
        float* values = params.read(kernels, param, n);
        float* first = states[0].read(kernels, state[0], n);
        float* second = states[1].read(kernels, state[1], n);
        step(values, grads.read(kernels, target.grad.from(i), n), first, second, n, constants, false);
        params.write_back(kernels, param, n);
        states[0].write_back(kernels, state[0], n);
        states[1].write_back(kernels, state[1], n);
        // Through the caches: writing around them gained nothing beside the six other streams.
        if (target.copy) {
            kernels.convert(target.copy.from(i), {reinterpret_cast<char*>(values), Dtype::f32}, n, 1.0f, false);
        }
    });
}

// Sums any number of pieces, kMaxAddends at a time: more streams at once than that defeat the prefetchers.
void sum_block(const Kernels& kernels, float* out, const std::vector<Array>& pieces, std::size_t first, std::size_t n,
               const Blend& blend) {
    alignas(64) float partial[kBlock];
    Addends addends{nullptr, {}, 0, pieces[0].dtype};
    for (std::size_t p = 0; p < pieces.size(); ++p) {
        addends.pieces[addends.count++] = pieces[p].from(first).data;
        if (p + 1 == pieces.size()) return kernels.sum(out, addends, n, blend);
        if (addends.count == kMaxAddends) {
            kernels.sum(partial, addends, n, {1.0f, 0.0f, false});
            addends.start = partial;
            addends.count = 0;
        }
    }
}

template <class Item>
std::vector<std::size_t> sizes_of(const std::vector<Item>& items) {
    std::vector<std::size_t> sizes;
    sizes.reserve(items.size());
    for (const Item& item : items) sizes.push_back(item.numel);
    return sizes;
}

}  // namespace

void update(const Kernels& kernels, StepBlock step, const void* constants, const std::vector<Target>& targets,
            unsigned threads) {
    for_each_chunk(chunks_of(sizes_of(targets)), threads, [&](std::size_t, const Chunk& chunk) {
        update_chunk(kernels, step, constants, targets[chunk.item], chunk);
    });
}

double squared_norm(const Kernels& kernels, const std::vector<Piece>& pieces, unsigned threads) {
    const std::vector<Chunk> chunks = chunks_of(sizes_of(pieces));
    std::vector<double> sums(chunks.size());
    for_each_chunk(chunks, threads, [&](std::size_t index, const Chunk& chunk) {
        sums[index] = kernels.squares(pieces[chunk.item].array.from(chunk.begin), chunk.end - chunk.begin);
    });
    double total = 0.0;
    for (const double sum : sums) total += sum;
    return total;
}

void sum_pieces(const Kernels& kernels, float* out, std::size_t numel, const std::vector<Array>& pieces, float scale,
                float beta, unsigned threads) {
    const Blend blend{scale, beta, worth_streaming(numel, Dtype::f32)};
    for_each_chunk(chunks_of({numel}), threads, [&](std::size_t, const Chunk& chunk) {
        for_each_block(chunk, [&](std::size_t i, std::size_t n) {
            sum_block(kernels, out + i, pieces, i, n, blend);
        });
        if (blend.stream) kernels.fence();
    });
}

void pack(const Kernels& kernels, Array out, const std::vector<Piece>& pieces, float scale, unsigned threads) {
    const std::vector<std::size_t> sizes = sizes_of(pieces);
    std::vector<std::size_t> starts;
    std::size_t total = 0;
    for (const std::size_t size : sizes) {
        starts.push_back(total);
        total += size;
    }
    const bool stream = worth_streaming(total, out.dtype);
    for_each_chunk(chunks_of(sizes), threads, [&](std::size_t, const Chunk& chunk) {
        const Array from = pieces[chunk.item].array.from(chunk.begin), to = out.from(starts[chunk.item] + chunk.begin);
        const std::size_t n = chunk.end - chunk.begin;
        if (from.dtype == to.dtype && scale == 1.0f) {
            std::memcpy(to.data, from.data, n * size_of(to.dtype));  // bit for bit, NaN's payloads too
            return;
        }
        kernels.convert(to, from, n, scale, stream);
        if (stream) kernels.fence();
    });
}

}  // namespace unishard
