// The block kernels, compiled once for each instruction set.
#include "kernels.h"
#include "lanes.h"

namespace unishard::UNISHARD_ISA {
namespace {

// value + weight * (target - value), computed from the nearer end: exact at weights 0 and 1.
struct Lerp {
    float weight, complement;
    Floats operator()(Floats value, Floats target) const {
        const Floats difference = target - value;
        return weight < 0.5f ? value + weight * difference : target - complement * difference;
    }
};

// The hardware follows a few streams to the end of a page; a step has up to seven. A null array is asked for in vain.
template <class At, class... Arrays>
inline void ask_ahead(At at, Arrays... arrays) {
    (at.ask_ahead(arrays), ...);
}

// The gradient as the optimizer sees it: unscaled and clipped, with the L2 term.
inline Floats gradient(Floats grad, Floats param, float scale, float l2) {
    const Floats g = grad * scale;
    return l2 != 0.0f ? g + param * l2 : g;  // without decay an infinite parameter must not make g NaN
}

// Kingma, Ba 2015 (arXiv:1412.6980), algorithm 1; decoupled decay from Loshchilov, Hutter 2019 (arXiv:1711.05101).
void adam(float* param, const float* grad, float* first, float* second, std::size_t n, const void* constants,
          bool ahead) {
    const AdamConstants c = *static_cast<const AdamConstants*>(constants);
    const Lerp average{c.one_minus_beta1, c.beta1};
    for_each_register(n, [&](auto at) {
        if (ahead) ask_ahead(at, param, grad, first, second);
        Floats w = at.get(param);
        const Floats g = gradient(at.get(grad), w, c.grad_scale, c.l2);
        w = w * c.keep;
        const Floats m = average(at.get(first), g);
        const Floats v = at.get(second) * c.beta2 + c.one_minus_beta2 * g * g;
        w = w - c.step_size * (m / (square_root(v) / c.root_correction2 + c.eps));
        at.put(first, m);
        at.put(second, v);
        at.put(param, w);
    });
}

// Chen et al. 2023 (arXiv:2302.06675), algorithm 2.
void lion(float* param, const float* grad, float* momentum, float*, std::size_t n, const void* constants,
          bool ahead) {
    const LionConstants c = *static_cast<const LionConstants*>(constants);
    const Lerp direction{c.one_minus_beta1, c.beta1}, average{c.one_minus_beta2, c.beta2};
    const Floats up = all(c.lr), none{};
    for_each_register(n, [&](auto at) {
        if (ahead) ask_ahead(at, param, grad, momentum);
        const Floats g = at.get(grad) * c.grad_scale, m = at.get(momentum);
        const Floats d = direction(m, g);
        const Floats step = d > 0.0f ? up : (d < 0.0f ? -up : none);  // NaN has no sign, as in torch.sign
        at.put(param, at.get(param) * c.keep - step);
        at.put(momentum, average(m, g));
    });
}

// Duchi, Hazan, Singer 2011, diagonal case.
void adagrad(float* param, const float* grad, float* sum, float*, std::size_t n, const void* constants,
             bool ahead) {
    const AdagradConstants c = *static_cast<const AdagradConstants*>(constants);
    for_each_register(n, [&](auto at) {
        if (ahead) ask_ahead(at, param, grad, sum);
        const Floats w = at.get(param), g = gradient(at.get(grad), w, c.grad_scale, c.l2);
        const Floats s = at.get(sum) + g * g;
        at.put(param, w - c.step_size * (g / (square_root(s) + c.eps)));
        at.put(sum, s);
    });
}

// Sutskever et al. 2013, in the form of torch.optim.SGD: the learning rate multiplies the buffer, not its input.
void sgd(float* param, const float* grad, float* buffer, float*, std::size_t n, const void* constants,
         bool ahead) {
    const SgdConstants c = *static_cast<const SgdConstants*>(constants);
    for_each_register(n, [&](auto at) {
        if (ahead) ask_ahead(at, param, grad, buffer);
        const Floats w = at.get(param), g = gradient(at.get(grad), w, c.grad_scale, c.l2);
        Floats step = g;
        if (buffer != nullptr) {
            const Floats b = c.first ? g : at.get(buffer) * c.momentum + g * c.one_minus_dampening;
            at.put(buffer, b);
            step = c.nesterov ? g + b * c.momentum : b;
        }
        at.put(param, w - step * c.lr);
    });
}

// Elements of `size` bytes before the first whose address is a multiple of 64.
std::size_t before_alignment(const void* to, std::size_t size) {
    return (64 - reinterpret_cast<std::uintptr_t>(to) % 64) % 64 / size;
}

// Writes value(at) to each place of an array, around the caches where it is aligned.
template <Dtype D, class Value>
void stream_each(void* dst, std::size_t n, Value value) {
    char* to = static_cast<char*>(dst);
    const std::size_t before = before_alignment(dst, size_of(D));
    std::size_t i = 0;
    while (i < n && i < before) {
        const std::size_t end = before < n ? before : n;
        const Rest at{i, end - i < kLanes ? end - i : kLanes};
        at.template put<D>(dst, value(at));
        i += at.count;
    }
    for (; i + kLanes <= n; i += kLanes) store_around_caches<D>(to + i * size_of(D), value(Whole{i}));
    if (i < n) Rest{i, n - i}.template put<D>(dst, value(Rest{i, n - i}));
}

template <Dtype To, Dtype From>
void convert_as(void* dst, const void* src, std::size_t n, float scale, bool stream) {
    const auto value = [&](auto at) { return at.template get<From>(src) * scale; };
    if (stream) return stream_each<To>(dst, n, value);
    for_each_register(n, [&](auto at) { at.template put<To>(dst, value(at)); });
}

template <Dtype To>
void convert_to(void* dst, Array src, std::size_t n, float scale, bool stream) {
    switch (src.dtype) {
        case Dtype::f32: return convert_as<To, Dtype::f32>(dst, src.data, n, scale, stream);
        case Dtype::bf16: return convert_as<To, Dtype::bf16>(dst, src.data, n, scale, stream);
        case Dtype::f16: return convert_as<To, Dtype::f16>(dst, src.data, n, scale, stream);
    }
}

void convert(Array dst, Array src, std::size_t n, float scale, bool stream) {
    switch (dst.dtype) {
        case Dtype::f32: return convert_to<Dtype::f32>(dst.data, src, n, scale, stream);
        case Dtype::bf16: return convert_to<Dtype::bf16>(dst.data, src, n, scale, stream);
        case Dtype::f16: return convert_to<Dtype::f16>(dst.data, src, n, scale, stream);
    }
}

template <Dtype D>
void sum_as(float* dst, const Addends& addends, std::size_t n, const Blend& blend) {
    const auto value = [&](auto at) {
        std::size_t p = 0;
        Floats total = addends.start != nullptr ? at.get(addends.start) : at.template get<D>(addends.pieces[p++]);
        for (; p < addends.count; ++p) total = total + at.template get<D>(addends.pieces[p]);
        return total * blend.scale;
    };
    if (blend.beta != 0.0f) {
        for_each_register(n, [&](auto at) { at.put(dst, at.get(dst) * blend.beta + value(at)); });
    } else if (blend.stream) {
        stream_each<Dtype::f32>(dst, n, value);
    } else {
        for_each_register(n, [&](auto at) { at.put(dst, value(at)); });
    }
}

void sum(float* dst, const Addends& addends, std::size_t n, const Blend& blend) {
    switch (addends.dtype) {
        case Dtype::f32: return sum_as<Dtype::f32>(dst, addends, n, blend);
        case Dtype::bf16: return sum_as<Dtype::bf16>(dst, addends, n, blend);
        case Dtype::f16: return sum_as<Dtype::f16>(dst, addends, n, blend);
    }
}

// Sixteen running sums in double precision. Element i is added to sum i % 16; at the end the sums are added in order.
class SixteenSums {
  public:
    static constexpr std::size_t kRegisters = 16 / kLanes;

    template <class Value>
    void add(std::size_t r, Floats x, Value value) {
        const DoublePair wide = to_doubles(x);
        sums_[2 * r] += value(wide.low);
        sums_[2 * r + 1] += value(wide.high);
    }

    double total() const {
        double lanes[16], total = 0.0;
        std::memcpy(lanes, sums_, sizeof lanes);
        for (const double lane : lanes) total += lane;
        return total;
    }

  private:
    Doubles sums_[2 * kRegisters] = {};
};

// Squares of floats are exact in double precision and cannot overflow there.
template <Dtype D>
double exact_squares(const void* src, std::size_t n) {
    SixteenSums sums;
    const auto squared = [](Doubles x) { return x * x; };
    std::size_t i = 0, r = 0;
    for (; i + kLanes <= n; i += kLanes, r = (r + 1) % SixteenSums::kRegisters) {
        sums.add(r, Whole{i}.template get<D>(src), squared);
    }
    if (i < n) sums.add(r, Rest{i, n - i}.template get<D>(src), squared);
    return sums.total();
}

// Four squares are added in single precision, which errs by at most 4 * 2^-24, before they are added in double.
template <Dtype D>
double fast_squares(const void* src, std::size_t n) {
    constexpr std::size_t kGroup = 64;
    SixteenSums sums;
    const auto as_is = [](Doubles x) { return x; };
    std::size_t i = 0;
    for (; i + kGroup <= n; i += kGroup) {
        for (std::size_t r = 0; r < SixteenSums::kRegisters; ++r) {
            Floats four{};
            for (std::size_t k = 0; k < kGroup; k += 16) {
                const Floats x = Whole{i + k + r * kLanes}.template get<D>(src);
                four = four + x * x;
            }
            sums.add(r, four, as_is);
        }
    }
    return sums.total() + exact_squares<D>(static_cast<const char*>(src) + i * size_of(D), n - i);
}

// Below this a sum of 2^16 squares may have lost more than 1e-6 of itself to underflow, even where subnormal numbers
// are flushed to zero.
constexpr double kSafeSum = 1e-27;

template <Dtype D>
double squares_as(const void* src, std::size_t n) {
    const double sum = fast_squares<D>(src, n);
    // Not finite: single precision overflowed, or an element is not finite, which the exact sum tells apart.
    return sum >= kSafeSum && sum < __builtin_inf() ? sum : exact_squares<D>(src, n);
}

double squares(Array src, std::size_t n) {
    switch (src.dtype) {
        case Dtype::f32: return squares_as<Dtype::f32>(src.data, n);
        case Dtype::bf16: return squares_as<Dtype::bf16>(src.data, n);
        case Dtype::f16: return squares_as<Dtype::f16>(src.data, n);
    }
    return 0.0;
}

void fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace

#define UNISHARD_TEXT(x) #x
#define UNISHARD_NAME(x) UNISHARD_TEXT(x)

extern const Kernels kernels;
const Kernels kernels{UNISHARD_NAME(UNISHARD_ISA), adam, lion, adagrad, sgd, convert, sum, squares, fence};

}  // namespace unishard::UNISHARD_ISA
