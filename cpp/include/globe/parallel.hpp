// A loop over independent tasks on a small pool of plain std::thread.
#pragma once

#include <cstdint>

#include "globe/export.h"

namespace globe {

// The number of threads to use: as given, but at most one for every processor that the calling thread may run
// on; threads <= 0 means that many.
GLOBE_API int resolve_threads(int threads);

namespace detail {
GLOBE_API void run_tasks(std::int64_t count, int threads, void (*call)(const void*, std::int64_t),
                         const void* task);
}

// Calls task(i) once for every i in [0, count), on the calling thread and up to threads - 1 of the pool's,
// which are started at first use and then wait for work; see resolve_threads. Which thread runs a task is
// left to chance, so tasks must write to disjoint places; the result then does not depend on the number of
// threads. A call made while the pool is busy (from a task, or from another thread) runs its tasks on the
// calling thread alone. The first exception thrown by a task is thrown again here, after all tasks have
// stopped. Ends early where an InterruptScope says so, see interrupt.hpp.
template <class Task>
void parallel_for(std::int64_t count, int threads, const Task& task) {
    detail::run_tasks(
        count, threads, [](const void* self, std::int64_t i) { (*static_cast<const Task*>(self))(i); },
        &task);
}

}  // namespace globe
