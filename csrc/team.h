// The threads that share the work of one call.
#pragma once

#include <cstddef>

namespace unishard {

// Calls body(context, task) once for each task in [0, tasks), on the caller's thread and at most `threads` - 1 others.
// The body must not throw.
void parallel_for(std::size_t tasks, unsigned threads, void (*body)(void*, std::size_t), void* context);

template <class Body>
void parallel_for(std::size_t tasks, unsigned threads, Body& body) {
    parallel_for(tasks, threads, [](void* self, std::size_t task) { (*static_cast<Body*>(self))(task); }, &body);
}

// "OpenMP" or "own": whose threads the next call will use.
const char* team_name();

}  // namespace unishard
