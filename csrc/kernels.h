// The block kernels of one instruction set. Each works on one block that fits the first-level cache, on one thread.
//
// Every instruction set gives the same bits: the arithmetic is IEEE single precision, element by element, without
// fused multiply-add, and sums over elements run in sixteen fixed lanes whatever the width of the registers.
#pragma once

#include <cstddef>

#include "arrays.h"

namespace unishard {

// Options of one step, derived in double precision from the user's (src/unishard/kernels/rules.py), rounded once.
struct AdamConstants {
    float grad_scale;
    float keep;           // 1 - lr * weight_decay where decay is decoupled, else 1
    float l2;             // weight_decay where it is an L2 term, else 0
    float beta1;
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float root_correction2;  // sqrt(1 - beta2^step), or 1
    float eps;
    float step_size;  // lr / (1 - beta1^step), or lr
};

struct LionConstants {
    float grad_scale, keep, beta1, one_minus_beta1, beta2, one_minus_beta2, lr;
};

struct AdagradConstants {
    float grad_scale, l2, eps, step_size;
};

struct SgdConstants {
    float grad_scale, l2, lr, momentum, one_minus_dampening;
    bool nesterov;
    bool first;  // the momentum buffer starts as the gradient and is not read
};

// One step over `n` elements; arrays that the optimizer does not have are null. `constants` is the optimizer's own.
// `ahead` asks for memory before it is needed, which pays where all the arrays are streamed from memory.
using StepBlock = void (*)(float* param, const float* grad, float* state0, float* state1, std::size_t n,
                           const void* constants, bool ahead);

// What a sum adds, in order: `start` (where it is not null), then up to kMaxAddends pieces of one dtype.
constexpr std::size_t kMaxAddends = 8;

struct Addends {
    const float* start;
    const void* pieces[kMaxAddends];
    std::size_t count;
    Dtype dtype;
};

// dst = scale * sum + beta * dst; dst is not read where beta is 0. `stream` writes around the caches.
struct Blend {
    float scale, beta;
    bool stream;
};

struct Kernels {
    const char* name;
    StepBlock adam, lion, adagrad, sgd;
    // dst = round_to_nearest_even(scale * src)
    void (*convert)(Array dst, Array src, std::size_t n, float scale, bool stream);
    void (*sum)(float* dst, const Addends& addends, std::size_t n, const Blend& blend);
    // The sum of squares, within 3e-7 of itself; finite exactly if every element is. n is at most 2^16.
    double (*squares)(Array src, std::size_t n);
    void (*fence)();  // orders streamed writes before what follows
};

// The instruction sets of this build that this processor has, fastest last; never empty.
const Kernels* const* available(std::size_t* count);

}  // namespace unishard
