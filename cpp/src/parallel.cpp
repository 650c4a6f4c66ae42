#include "globe/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <unistd.h>
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

struct Job {
    std::int64_t count;
    void (*call)(const void*, std::int64_t);
    const void* task;
    std::atomic<std::int64_t> next{0};
    std::exception_ptr error;
    std::mutex error_mutex;

    Job(std::int64_t n, void (*f)(const void*, std::int64_t), const void* t) : count(n), call(f), task(t) {}

    void work() {
        try {
            for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) call(task, i);
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
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            job_ = &job;
            wanted_ = std::min(helpers, started_);
            running_ = wanted_;
        }
        wake_.notify_all();
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        running_ -= wanted_;  // those that have not begun need not
        wanted_ = 0;
        done_.wait(lock, [this] { return running_ == 0; });
        job_ = nullptr;
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
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return wanted_ > 0; });
            --wanted_;
            Job& job = *job_;
            lock.unlock();
            job.work();
            lock.lock();
            if (--running_ == 0) done_.notify_all();
        }
    }

    const long process_;
    std::atomic<bool> busy_{false};  // a job is in the pool
    std::mutex mutex_;               // guards the fields below
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    int started_ = 0;  // threads; written while busy_
    int wanted_ = 0;   // threads that should still join the job
    int running_ = 0;  // threads that joined or should join, and have not left
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
    if (threads > 0) return threads;
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

void detail::run_tasks(std::int64_t count, int threads, void (*call)(const void*, std::int64_t),
                       const void* task) {
    const auto workers = static_cast<int>(std::min<std::int64_t>(resolve_threads(threads), count));
    Job job(count, call, task);
    if (workers <= 1 || !pool().try_run(job, workers - 1)) job.work();
    if (job.error) std::rethrow_exception(job.error);
}

}  // namespace globe
