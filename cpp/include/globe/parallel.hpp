// A loop over independent tasks on plain std::thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace globe {

// threads <= 0 means one per hardware thread.
inline int resolve_threads(int threads) {
    if (threads > 0) return threads;
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Calls task(i) once for every i in [0, count). Which thread runs a task is left to chance, so tasks must
// write to disjoint places; the result then does not depend on the number of threads. The first exception
// thrown by a task is thrown again here, after all threads have stopped.
template <class Task>
void parallel_for(std::int64_t count, int threads, const Task& task) {
    const auto workers = static_cast<int>(std::min<std::int64_t>(resolve_threads(threads), count));
    if (workers <= 1) {
        for (std::int64_t i = 0; i < count; ++i) task(i);
        return;
    }
    std::atomic<std::int64_t> next{0};
    std::exception_ptr error;
    std::mutex error_mutex;
    auto work = [&] {
        try {
            for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
        } catch (...) {
            next.store(count, std::memory_order_relaxed);
            const std::lock_guard<std::mutex> lock(error_mutex);
            if (!error) error = std::current_exception();
        }
    };
    std::vector<std::thread> pool;
    pool.reserve(static_cast<std::size_t>(workers - 1));
    try {
        for (int t = 1; t < workers; ++t) pool.emplace_back(work);
    } catch (const std::exception&) {
        // The system refuses more threads: those already started and this one do the work.
    }
    work();
    for (auto& thread : pool) thread.join();
    if (error) std::rethrow_exception(error);
}

}  // namespace globe
