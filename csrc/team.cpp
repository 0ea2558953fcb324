// Whose threads do the work.
//
// PyTorch's OpenMP threads spin for milliseconds after each of its operations. Threads of our own would compete with
// them for the cores, so the work goes to that very team, through the entry point that compilers call (its interface
// is fixed, and the other OpenMP runtimes offer it too). Measured on two cores right after a matrix product: 300,000
// elements take half as long as with threads of our own, 50 million 5 % less.
//
// A process forked from one that used OpenMP would wait forever in it. There, and where no OpenMP is loaded, a pool of
// our own does the work.
#include "team.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <memory>

#include "job.h"
#include "pool.h"

namespace unishard {
namespace {

using OpenMP = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<bool> forked{false};
std::atomic<Pool*> shared{nullptr};

// A forked child has none of its parent's threads, and their locks in any state: the parent's pool is left alone.
const int registered = pthread_atfork(nullptr, nullptr, [] {
    forked.store(true);
    shared.store(nullptr);
});

OpenMP openmp() {
    if (forked.load()) return nullptr;
    static std::atomic<OpenMP> found{nullptr};
    OpenMP known = found.load();
    if (known == nullptr) {  // until it is there: PyTorch may be imported after this module
        known = reinterpret_cast<OpenMP>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        found.store(known);
    }
    return known;
}

// Never destroyed: its threads may still wait in it while the process exits.
Pool& pool() {
    Pool* current = shared.load();
    if (current == nullptr) {
        auto fresh = std::make_unique<Pool>();
        if (shared.compare_exchange_strong(current, fresh.get())) current = fresh.release();
    }
    return *current;
}

}  // namespace

const char* team_name() { return openmp() != nullptr ? "OpenMP" : "own"; }

void parallel_for(std::size_t tasks, unsigned threads, void (*body)(void*, std::size_t), void* context) {
    static_cast<void>(registered);
    Job job(body, context, tasks);
    if (threads <= 1 || tasks <= 1) return job.work();
    if (const OpenMP parallel = openmp()) {
        // All of the team even for fewer tasks: libgomp ends and restarts threads when a team's size changes.
        return parallel([](void* self) { static_cast<Job*>(self)->help(); }, &job, threads, 0);
    }
    const std::size_t helpers = (threads < tasks ? threads : tasks) - 1;
    if (!pool().run(job, static_cast<unsigned>(helpers))) job.work();
}

}  // namespace unishard
