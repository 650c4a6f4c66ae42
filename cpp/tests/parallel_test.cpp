// Every task runs once, whatever throws, nests, competes or forks.
#include "globe/parallel.hpp"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "check.hpp"

namespace {

using globe::parallel_for;
using globe::tests::check;

bool each_once(std::int64_t count, int threads) {
    std::vector<std::atomic<int>> calls(static_cast<std::size_t>(count));
    parallel_for(count, threads, [&](std::int64_t i) { ++calls[static_cast<std::size_t>(i)]; });
    for (const auto& times : calls) {
        if (times != 1) return false;
    }
    return true;
}

void runs_every_task_once() {
    for (const std::int64_t count : {0, 1, 2, 3, 1000}) {
        for (const int threads : {-1, 0, 1, 2, 7}) {
            check(each_once(count, threads),
                  std::to_string(count) + " tasks on " + std::to_string(threads) + " threads");
        }
    }
}

void throws_the_first_exception() {
    for (const int threads : {1, 4}) {
        try {
            parallel_for(1000, threads, [](std::int64_t i) {
                if (i % 100 == 42) throw std::out_of_range("task");
            });
            check(false, "the exception of a task is lost");
        } catch (const std::out_of_range& error) {
            check(std::string(error.what()) == "task", "the exception is the task's");
        }
        check(each_once(1000, threads), "the pool works on after an exception");
    }
}

void nests() {
    std::atomic<int> sum{0};
    parallel_for(20, 4, [&](std::int64_t) { parallel_for(30, 4, [&](std::int64_t) { ++sum; }); });
    check(sum == 600, "nested calls");
}

// Threads look for work for a tenth of a millisecond, then sleep; so does a caller whose helpers are late.
void wakes_up() {
    const auto pause = [] { std::this_thread::sleep_for(std::chrono::microseconds(500)); };
    int wrong = 0;
    for (int round = 0; round < 50; ++round) {
        if (round % 2 == 0) pause();
        wrong += each_once(50, 3) ? 0 : 1;
        const auto caller = std::this_thread::get_id();
        parallel_for(3, 3, [&](std::int64_t) {
            if (std::this_thread::get_id() != caller) pause();
        });
    }
    check(wrong == 0, "work after a rest");
}

void serves_concurrent_callers() {
    std::atomic<int> wrong{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller) {
        callers.emplace_back([&] {
            for (int round = 0; round < 200; ++round) wrong += each_once(50, 3) ? 0 : 1;
        });
    }
    for (auto& caller : callers) caller.join();
    check(wrong == 0, "concurrent callers");
}

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define __SANITIZE_THREAD__ 1
#endif
#endif
// ThreadSanitizer and QEMU allow no threads in a forked child.
#if defined(_WIN32) || defined(__SANITIZE_THREAD__) || defined(GLOBE_TEST_EMULATED)
void works_in_a_forked_child() {}
#else
// A child has none of its parent's threads.
bool child_works() {
    const pid_t child = fork();
    if (child == 0) _exit(each_once(1000, 4) ? 0 : 1);
    int status = 1;
    return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}

void works_in_a_forked_child() {
    check(child_works(), "after a fork of an idle process");
    std::atomic<int> wrong{0};
    parallel_for(4, 4, [&](std::int64_t) { wrong += child_works() ? 0 : 1; });
    check(wrong == 0, "after a fork while the pool is busy");
}
#endif

}  // namespace

int main() {
    runs_every_task_once();
    throws_the_first_exception();
    nests();
    wakes_up();
    serves_concurrent_callers();
    works_in_a_forked_child();
    const int processors = globe::resolve_threads(0);
    check(processors >= 1 && globe::resolve_threads(1) == 1, "resolve_threads");
    check(globe::resolve_threads(std::numeric_limits<int>::max()) == processors, "no more than processors");
    return globe::tests::result();
}
