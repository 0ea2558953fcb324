#include "pool.h"

#include <pthread.h>

#include <csignal>
#include <system_error>
#include <thread>

namespace unishard {

bool Pool::run(Job& job, unsigned helpers) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    grow(helpers);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        job_ = &job;
        open_places_ = helpers;
        ++generation_;
    }
    arrived_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    // Threads that have not woken up yet stay out: nobody waits for them.
    open_places_ = 0;
    finished_.wait(lock, [&] { return working_ == 0; });
    job_ = nullptr;
    return true;
}

void Pool::grow(unsigned helpers) {
    if (threads_ >= helpers) return;
    // Signals are for the threads that Python knows.
    sigset_t every, before;
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);
    try {
        for (; threads_ < helpers; ++threads_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
        // No more threads to be had: those there are, and the caller, do the work.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void Pool::serve() {
    std::size_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        arrived_.wait(lock, [&] { return generation_ != seen && open_places_ > 0; });
        seen = generation_;
        --open_places_;
        ++working_;
        Job& job = *job_;
        lock.unlock();
        job.help();
        lock.lock();
        if (--working_ == 0) finished_.notify_one();
    }
}

}  // namespace unishard
