#include "globe/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "globe/interrupt.hpp"
#include "interruption.hpp"

#if !defined(_WIN32)
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace globe {
namespace {

// The process that started a pool: threads do not survive fork.
long process_id() {
#if defined(_WIN32)
    return 0;
#else
    return static_cast<long>(getpid());
#endif
}

// The processors that the calling thread, and so any that it starts, may run on.
int processors() {
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return std::max(1, CPU_COUNT(&allowed));
#endif
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Threads look for this long before they sleep: waking one takes the system 20 to 40 microseconds, and
// kernels that pass over their data block by block call again at once.
constexpr auto patience = std::chrono::microseconds(100);

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Whether it came true while we looked.
template <class Condition>
bool spin_until(const Condition& condition) {
    const auto end = std::chrono::steady_clock::now() + patience;
    do {
        for (int look = 0; look < 32; ++look) {
            if (condition()) return true;
            relax();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

struct Job {
    std::int64_t count;
    void (*call)(const void*, std::int64_t);
    const void* task;
    detail::Interruption* interruption = detail::interruptible().interruption;  // of the caller
    std::atomic<std::int64_t> next{0};
    std::exception_ptr error;
    std::mutex error_mutex;

    Job(std::int64_t n, void (*f)(const void*, std::int64_t), const void* t) : count(n), call(f), task(t) {}

    void work() {
        const detail::Working working(interruption);
        try {
            for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
                check_interrupt();
                call(task, i);
            }
        } catch (...) {
            next.store(count, std::memory_order_relaxed);
            const std::lock_guard<std::mutex> lock(error_mutex);
            if (!error) error = std::current_exception();
        }
    }
};

class Pool {
  public:
    explicit Pool(long process) : process_(process) {}

    long process() const { return process_; }

    // False if another job is in the pool.
    bool try_run(Job& job, int helpers) {
        if (busy_.exchange(true, std::memory_order_acquire)) return false;
        start(helpers);
        const int wanted = std::min(helpers, started_);
        job_ = &job;
        running_ = wanted;
        wanted_ = wanted;
        notify(asleep_, wake_);
        job.work();
        running_ -= wanted_.exchange(0);  // those that have not begun need not
        await([this] { return running_ == 0; }, waiting_, done_, job.interruption != nullptr);
        busy_.store(false, std::memory_order_release);
        return true;
    }

  private:
    void start(int helpers) {
        try {
            for (; started_ < helpers; ++started_) std::thread([this] { serve(); }).detach();
        } catch (const std::exception&) {
            // The system refuses more threads: those already started do the work.
        }
    }

    void serve() {
        for (;;) {
            await([this] { return wanted_ > 0; }, asleep_, wake_, false);
            if (!join()) continue;
            job_->work();
            if (--running_ == 0) notify(waiting_, done_);
        }
    }

    // Takes one of the wanted places; the job then stays until we leave.
    bool join() {
        int wanted = wanted_;
        while (wanted > 0) {
            if (wanted_.compare_exchange_weak(wanted, wanted - 1)) return true;
        }
        return false;
    }

    // A sleeper counts itself before it looks once more, and a notifier changes what is looked at before it
    // counts sleepers, all in one order: no wake-up is lost.
    template <class Condition>
    void await(const Condition& condition, std::atomic<int>& sleepers, std::condition_variable& signal,
               bool interruptible) {
        if (spin_until(condition)) return;
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleepers;
        if (!interruptible) signal.wait(lock, condition);
        while (!signal.wait_for(lock, detail::interrupt_interval, condition)) {
            lock.unlock();  // whoever is asked may need a thread that notifies us
            detail::interrupt_wanted();
            lock.lock();
        }
        --sleepers;
    }

    void notify(const std::atomic<int>& sleepers, std::condition_variable& signal) {
        if (sleepers == 0) return;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
        }
        signal.notify_all();
    }

    const long process_;
    std::atomic<bool> busy_{false};  // a job is in the pool; whoever set it owns the next two
    int started_ = 0;                // threads
    Job* job_ = nullptr;
    std::atomic<int> wanted_{0};   // threads that should still join the job
    std::atomic<int> running_{0};  // threads that joined or should join, and have not left
    std::atomic<int> asleep_{0}, waiting_{0};
    std::mutex mutex_;  // no sleeper is between its look and its sleep while this is held
    std::condition_variable wake_, done_;
};

// Never destroyed: its threads wait for work until the process ends. A forked child gets a new one; no lock
// is taken here, because another thread of the parent could have held it.
Pool& pool() {
    static std::atomic<Pool*> current{nullptr};
    const long process = process_id();
    Pool* found = current.load(std::memory_order_acquire);
    while (found == nullptr || found->process() != process) {
        auto fresh = std::make_unique<Pool>(process);
        if (current.compare_exchange_strong(found, fresh.get(), std::memory_order_acq_rel))
            return *fresh.release();
    }
    return *found;
}

}  // namespace

int resolve_threads(int threads) {
    if (threads == 1) return 1;
    return threads > 0 ? std::min(threads, processors()) : processors();
}

void detail::run_tasks(std::int64_t count, int threads, void (*call)(const void*, std::int64_t),
                       const void* task) {
    check_interrupt();
    const auto workers =
        count <= 1 ? 1 : static_cast<int>(std::min<std::int64_t>(resolve_threads(threads), count));
    Job job(count, call, task);
    if (workers <= 1 || !pool().try_run(job, workers - 1)) job.work();
    if (job.error) std::rethrow_exception(job.error);
}

}  // namespace globe
