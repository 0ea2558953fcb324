// The operations that Python calls: each passes over its memory once, on up to `threads` threads.
#pragma once

#include <cstddef>
#include <vector>

#include "kernels.h"

namespace unishard {

struct Piece {
    Array array;
    std::size_t numel;
};

// One flat range of parameters with what belongs to it. Absent arrays are null.
struct Target {
    std::size_t numel;
    Array param, grad, state[2], copy;
};

// Updates every target with the optimizer's block kernel, and rounds the new parameters into `copy` where there is one.
void update(const Kernels& kernels, StepBlock step, const void* constants, const std::vector<Target>& targets,
            unsigned threads);

// The sum of squares over all pieces; the same bits for any number of threads.
double squared_norm(const Kernels& kernels, const std::vector<Piece>& pieces, unsigned threads);

// out = beta * out + scale * (pieces[0] + pieces[1] + ...), summed in that order in single precision.
void sum_pieces(const Kernels& kernels, float* out, std::size_t numel, const std::vector<Array>& pieces, float scale,
                float beta, unsigned threads);

// Lays the pieces end to end in `out`, converted and scaled.
void pack(const Kernels& kernels, Array out, const std::vector<Piece>& pieces, float scale, unsigned threads);

}  // namespace unishard
