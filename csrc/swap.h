// Transfers between memory and a file, in blocks, by threads that wait in the kernel and not in Python.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

namespace unishard {

// The numbers are part of the interface with src/unishard/offload/native.py.
enum class Ending : int { well = 0, failed = 1, truncated = 2, changed = 3 };

struct Outcome {
    Ending ending = Ending::well;
    int error = 0;             // errno, where the operating system refused
    std::uint64_t offset = 0;  // of the first block that went wrong, in the file
};

// One direction of one array. Memory and checksums stay alive and unchanged until `wait` has returned.
struct Transfer {
    int descriptor = -1;
    bool write = false;
    char* data = nullptr;
    std::size_t bytes = 0;
    std::uint64_t offset = 0;            // in the file, a multiple of the alignment
    std::uint64_t* checksums = nullptr;  // one a block: filled by a write, compared by a read
    std::size_t alignment = 1;           // of memory, offsets and lengths, for O_DIRECT; a power of two
};

class Swap {
  public:
    // `threads` blocks are in flight at most. `block` bytes, a multiple of every alignment.
    Swap(unsigned threads, std::size_t block);
    ~Swap();
    Swap(const Swap&) = delete;
    Swap& operator=(const Swap&) = delete;

    std::uint64_t start(const Transfer& transfer);
    bool done(std::uint64_t ticket);
    // True once the transfer has ended, its outcome given and its ticket forgotten; false after `seconds`.
    bool wait(std::uint64_t ticket, double seconds, Outcome* outcome);

  private:
    struct Request;
    struct State;
    static void serve(State& state);

    State* state_;
};

}  // namespace unishard
