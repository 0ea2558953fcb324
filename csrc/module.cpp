// The Python module: addresses, counts and scalars in, nothing held. Callers check shapes, dtypes and lifetimes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "checksum.h"
#include "crc32.h"
#include "operations.h"
#include "swap.h"
#include "team.h"

namespace nb = nanobind;
using namespace unishard;

namespace {

using Address = std::uintptr_t;
using RawArray = std::array<Address, 2>;   // address, dtype code
using RawPiece = std::array<Address, 3>;   // address, dtype code, elements
using RawTarget = std::array<Address, 11>;  // elements; parameter, gradient, two states, copy as address, dtype code

const Kernels* active = nullptr;

const Kernels& chosen() {
    if (active == nullptr) {
        std::size_t count = 0;
        const Kernels* const* all = available(&count);
        active = all[count - 1];
    }
    return *active;
}

std::vector<std::string> isas() {
    std::size_t count = 0;
    const Kernels* const* all = available(&count);
    std::vector<std::string> names;
    for (std::size_t i = 0; i < count; ++i) names.emplace_back(all[i]->name);
    return names;
}

void set_isa(const std::string& name) {
    std::size_t count = 0;
    const Kernels* const* all = available(&count);
    for (std::size_t i = 0; i < count; ++i) {
        if (name == all[i]->name) {
            active = all[i];
            return;
        }
    }
    throw std::invalid_argument("this processor or build has no instruction set named " + name);
}

Array array_at(Address address, Address code) { return {reinterpret_cast<char*>(address), static_cast<Dtype>(code)}; }

std::vector<Piece> pieces_of(const std::vector<RawPiece>& raw) {
    std::vector<Piece> pieces;
    pieces.reserve(raw.size());
    for (const RawPiece& piece : raw) pieces.push_back({array_at(piece[0], piece[1]), piece[2]});
    return pieces;
}

std::vector<Target> targets_of(const std::vector<RawTarget>& raw) {
    std::vector<Target> targets;
    targets.reserve(raw.size());
    for (const RawTarget& t : raw) {
        targets.push_back({t[0], array_at(t[1], t[2]), array_at(t[3], t[4]),
                           {array_at(t[5], t[6]), array_at(t[7], t[8])}, array_at(t[9], t[10])});
    }
    return targets;
}

float single(double value) { return static_cast<float>(value); }

void adam(const std::vector<RawTarget>& targets, double grad_scale, double keep, double l2, double beta1, double beta2,
          double root_correction2, double eps, double step_size, unsigned threads) {
    const AdamConstants constants{single(grad_scale),  single(keep),  single(l2),
                                  single(beta1),       single(1.0 - beta1),
                                  single(beta2),       single(1.0 - beta2),
                                  single(root_correction2), single(eps), single(step_size)};
    update(chosen(), chosen().adam, &constants, targets_of(targets), threads);
}

void lion(const std::vector<RawTarget>& targets, double grad_scale, double keep, double beta1, double beta2, double lr,
          unsigned threads) {
    const LionConstants constants{single(grad_scale), single(keep),        single(beta1), single(1.0 - beta1),
                                  single(beta2),      single(1.0 - beta2), single(lr)};
    update(chosen(), chosen().lion, &constants, targets_of(targets), threads);
}

void adagrad(const std::vector<RawTarget>& targets, double grad_scale, double l2, double eps, double step_size,
             unsigned threads) {
    const AdagradConstants constants{single(grad_scale), single(l2), single(eps), single(step_size)};
    update(chosen(), chosen().adagrad, &constants, targets_of(targets), threads);
}

void sgd(const std::vector<RawTarget>& targets, double grad_scale, double l2, double lr, double momentum,
         double dampening, bool nesterov, bool first, unsigned threads) {
    const SgdConstants constants{single(grad_scale), single(l2), single(lr), single(momentum), single(1.0 - dampening),
                                 nesterov,           first};
    update(chosen(), chosen().sgd, &constants, targets_of(targets), threads);
}

double squared_norm_of(const std::vector<RawPiece>& pieces, unsigned threads) {
    return squared_norm(chosen(), pieces_of(pieces), threads);
}

void sum_into(Address out, std::size_t numel, const std::vector<RawArray>& pieces, double scale, double beta,
              unsigned threads) {
    std::vector<Array> arrays;
    arrays.reserve(pieces.size());
    for (const RawArray& piece : pieces) arrays.push_back(array_at(piece[0], piece[1]));
    sum_pieces(chosen(), reinterpret_cast<float*>(out), numel, arrays, single(scale), single(beta), threads);
}

void pack_into(const RawArray& out, const std::vector<RawPiece>& pieces, double scale, unsigned threads) {
    pack(chosen(), array_at(out[0], out[1]), pieces_of(pieces), single(scale), threads);
}

std::uint64_t start_transfer(Swap& swap, int descriptor, bool write, Address data, std::size_t bytes,
                             std::uint64_t offset, Address checksums, std::size_t alignment) {
    return swap.start({descriptor, write, reinterpret_cast<char*>(data), bytes, offset,
                       reinterpret_cast<std::uint64_t*>(checksums), alignment});
}

// Nothing while the transfer is still under way after `seconds`.
std::optional<std::tuple<int, int, std::uint64_t>> wait_transfer(Swap& swap, std::uint64_t ticket, double seconds) {
    Outcome outcome;
    if (!swap.wait(ticket, seconds, &outcome)) return std::nullopt;
    return std::make_tuple(static_cast<int>(outcome.ending), outcome.error, outcome.offset);
}

std::uint64_t checksum_at(Address data, std::size_t bytes) {
    return checksum(reinterpret_cast<const char*>(data), bytes);
}

std::uint32_t crc32_at(Address data, std::size_t bytes) { return crc32(reinterpret_cast<const char*>(data), bytes); }

}  // namespace

NB_MODULE(_native, m) {
    const nb::call_guard<nb::gil_scoped_release> release;
    m.def("isas", &isas);
    m.def("isa", [] { return std::string(chosen().name); });
    m.def("set_isa", &set_isa);
    m.def("team", [] { return std::string(team_name()); });
    m.def("adam", &adam, release);
    m.def("lion", &lion, release);
    m.def("adagrad", &adagrad, release);
    m.def("sgd", &sgd, release);
    m.def("squared_norm", &squared_norm_of, release);
    m.def("sum_pieces", &sum_into, release);
    m.def("pack", &pack_into, release);
    m.def("checksum", &checksum_at, release);
    m.def("has_crc32", &has_crc32);
    m.def("crc32", &crc32_at, release);
    nb::class_<Swap>(m, "Swap")
        .def(nb::init<unsigned, std::size_t>())
        .def("start", &start_transfer, release)
        .def("done", &Swap::done, release)
        .def("wait", &wait_transfer, release);
}
