#include "swap.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <system_error>

#include "checksum.h"

namespace unishard {

struct Swap::Request {
    Transfer transfer;
    std::size_t next = 0;      // the first block that nobody took
    std::size_t unfinished = 0;
    Outcome outcome;
};

struct Swap::State {
    std::size_t block;
    pid_t process = getpid();
    std::mutex mutex;
    std::condition_variable arrived, finished;
    std::deque<std::shared_ptr<Request>> queue;
    std::unordered_map<std::uint64_t, std::shared_ptr<Request>> tickets;
    std::uint64_t issued = 0;
    bool closing = false;
    std::vector<std::thread> threads;
};

namespace {

// Page-aligned memory of one thread, for arrays and ends of arrays that O_DIRECT cannot take as they are.
class Bounce {
  public:
    static constexpr std::size_t size = std::size_t{1} << 20;

    ~Bounce() { std::free(data_); }
    char* data() {
        if (data_ == nullptr) data_ = static_cast<char*>(std::aligned_alloc(4096, size));
        return data_;
    }

  private:
    char* data_ = nullptr;
};

Outcome move(const Transfer& transfer, char* data, std::size_t bytes, std::uint64_t offset) {
    while (bytes > 0) {
        const ssize_t done = transfer.write ? pwrite(transfer.descriptor, data, bytes, static_cast<off_t>(offset))
                                            : pread(transfer.descriptor, data, bytes, static_cast<off_t>(offset));
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return {Ending::failed, errno, offset};
        if (done == 0) return {Ending::truncated, 0, offset};
        data += done;
        bytes -= static_cast<std::size_t>(done);
        offset += static_cast<std::uint64_t>(done);
        // The rest of a short transfer that ends off the alignment is refused with O_DIRECT, and so reported.
    }
    return {};
}

Outcome move_through(Bounce& bounce, const Transfer& transfer, char* data, std::size_t bytes, std::uint64_t offset) {
    char* const aligned = bounce.data();
    if (aligned == nullptr) return {Ending::failed, ENOMEM, offset};
    for (std::size_t at = 0; at < bytes; at += Bounce::size) {
        const std::size_t part = std::min(Bounce::size, bytes - at);
        const std::size_t padded = (part + transfer.alignment - 1) & ~(transfer.alignment - 1);
        if (transfer.write) {
            std::memcpy(aligned, data + at, part);
            std::memset(aligned + part, 0, padded - part);
        }
        const Outcome outcome = move(transfer, aligned, padded, offset + at);
        if (outcome.ending != Ending::well) return outcome;
        if (!transfer.write) std::memcpy(data + at, aligned, part);
    }
    return {};
}

Outcome move_block(Bounce& bounce, const Transfer& transfer, std::size_t start, std::size_t bytes,
                   std::uint64_t* sum) {
    char* data = transfer.data + start;
    const std::uint64_t offset = transfer.offset + start;
    if (transfer.write) *sum = checksum(data, bytes);
    Outcome outcome;
    if (reinterpret_cast<std::uintptr_t>(data) % transfer.alignment != 0) {
        outcome = move_through(bounce, transfer, data, bytes, offset);
    } else {
        const std::size_t tail = bytes % transfer.alignment, body = bytes - tail;
        outcome = move(transfer, data, body, offset);
        if (outcome.ending == Ending::well && tail > 0) {
            outcome = move_through(bounce, transfer, data + body, tail, offset + body);
        }
    }
    if (outcome.ending == Ending::well && !transfer.write && checksum(data, bytes) != *sum) {
        outcome = {Ending::changed, 0, offset};
    }
    return outcome;
}

}  // namespace

Swap::Swap(unsigned threads, std::size_t block) {
    if (threads == 0 || block == 0) throw std::invalid_argument("a swap needs a thread and a block size");
    state_ = new State{};
    state_->block = block;
    // Signals are for the threads that Python knows.
    sigset_t every, before;
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);
    try {
        for (unsigned i = 0; i < threads; ++i) state_->threads.emplace_back([state = state_] { serve(*state); });
    } catch (const std::system_error&) {
        // No more threads to be had: those there are do the work.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (state_->threads.empty()) {
        delete state_;
        throw std::runtime_error("no thread can be started");
    }
}

Swap::~Swap() {
    // A forked child has none of these threads, and the lock in any state: what it inherited is left alone.
    if (state_->process != getpid()) return;
    {
        std::lock_guard<std::mutex> lock(state_->mutex);
        state_->closing = true;
    }
    state_->arrived.notify_all();
    for (std::thread& thread : state_->threads) thread.join();
    delete state_;
}

std::uint64_t Swap::start(const Transfer& transfer) {
    auto request = std::make_shared<Request>();
    request->transfer = transfer;
    request->unfinished = (transfer.bytes + state_->block - 1) / state_->block;
    std::uint64_t ticket = 0;
    {
        std::lock_guard<std::mutex> lock(state_->mutex);
        ticket = ++state_->issued;
        state_->tickets.emplace(ticket, request);
        if (request->unfinished > 0) state_->queue.push_back(request);
    }
    if (request->unfinished > 1) state_->arrived.notify_all();
    else state_->arrived.notify_one();
    return ticket;
}

bool Swap::done(std::uint64_t ticket) {
    std::lock_guard<std::mutex> lock(state_->mutex);
    const auto found = state_->tickets.find(ticket);
    return found == state_->tickets.end() || found->second->unfinished == 0;
}

bool Swap::wait(std::uint64_t ticket, double seconds, Outcome* outcome) {
    std::unique_lock<std::mutex> lock(state_->mutex);
    const auto found = state_->tickets.find(ticket);
    if (found == state_->tickets.end()) throw std::invalid_argument("this transfer was waited for already");
    const std::shared_ptr<Request> request = found->second;
    const auto limit = std::chrono::duration<double>(seconds);
    if (!state_->finished.wait_for(lock, limit, [&] { return request->unfinished == 0; })) return false;
    *outcome = request->outcome;
    state_->tickets.erase(ticket);
    return true;
}

void Swap::serve(State& state) {
    Bounce bounce;
    std::unique_lock<std::mutex> lock(state.mutex);
    for (;;) {
        state.arrived.wait(lock, [&] { return state.closing || !state.queue.empty(); });
        if (state.queue.empty()) return;  // closing, and nothing left to do
        const std::shared_ptr<Request> request = state.queue.front();
        const Transfer& transfer = request->transfer;
        const std::size_t index = request->next++, start = index * state.block;
        const std::size_t bytes = std::min(state.block, transfer.bytes - start);
        if (start + bytes == transfer.bytes) state.queue.pop_front();
        const bool lost = request->outcome.ending != Ending::well;
        lock.unlock();
        // After a failure the rest is not worth the disk's time.
        const Outcome outcome =
            lost ? Outcome{} : move_block(bounce, transfer, start, bytes, transfer.checksums + index);
        lock.lock();
        // Blocks are taken in order and end in any: the first one lost is told, so that a fault reads the same each time.
        if (outcome.ending != Ending::well &&
            (request->outcome.ending == Ending::well || outcome.offset < request->outcome.offset)) {
            request->outcome = outcome;
        }
        if (--request->unfinished == 0) state.finished.notify_all();
    }
}

}  // namespace unishard
