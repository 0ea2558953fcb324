// Tasks that several threads take one after another.
#pragma once

#include <atomic>
#include <cfenv>
#include <cstddef>

namespace unishard {

class Job {
  public:
    Job(void (*body)(void*, std::size_t), void* context, std::size_t tasks)
        : body_(body), context_(context), tasks_(tasks) {
        std::fegetenv(&caller_);
    }

    // Returns when no task is left to take; others may still be at work on theirs.
    void work() {
        for (;;) {
            const std::size_t task = next_.fetch_add(1, std::memory_order_relaxed);
            if (task >= tasks_) return;
            body_(context_, task);
        }
    }

    // The same on another thread, under the caller's rounding and flush-to-zero modes.
    void help() {
        std::fenv_t own;
        std::fegetenv(&own);
        std::fesetenv(&caller_);
        work();
        std::fesetenv(&own);
    }

  private:
    void (*body_)(void*, std::size_t);
    void* context_;
    std::size_t tasks_;
    std::fenv_t caller_;
    std::atomic<std::size_t> next_{0};
};

}  // namespace unishard
