// Threads of our own, which wait between calls.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <mutex>

#include "job.h"

namespace unishard {

class Pool {
  public:
    // Runs the job on the caller's thread and `helpers` others. False, and nothing done, while another caller has them.
    bool run(Job& job, unsigned helpers);

  private:
    void grow(unsigned helpers);
    void serve();

    std::mutex turn_, mutex_;
    std::condition_variable arrived_, finished_;
    Job* job_ = nullptr;
    std::size_t generation_ = 0;
    unsigned threads_ = 0, open_places_ = 0, working_ = 0;
};

}  // namespace unishard
