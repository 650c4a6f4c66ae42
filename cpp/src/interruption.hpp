// What the threads of a call share about its interruption.
#pragma once

#include <atomic>
#include <chrono>

namespace globe::detail {

class Interruption {
  public:
    Interruption(bool (*question)(void*), void* context);

    // On the thread that made this: asks, if the last time is long enough ago.
    void ask();
    bool wanted() const { return wanted_.load(std::memory_order_relaxed); }

  private:
    bool (*const ask_)(void*);
    void* const context_;
    std::chrono::steady_clock::time_point next_;
    std::atomic<bool> wanted_{false};
};

// How long a caller may wait for other threads between two questions.
constexpr auto interrupt_interval = std::chrono::milliseconds(100);

// What this thread works for, and whether it is the one to ask.
struct Interruptible {
    Interruption* interruption = nullptr;
    bool asks = false;
};
Interruptible& interruptible();

// Lets a thread of the pool work for another thread's call.
class Working {
  public:
    explicit Working(Interruption* interruption) : before_(interruptible()) {
        if (interruption != before_.interruption) interruptible() = {interruption, false};
    }
    ~Working() { interruptible() = before_; }
    Working(const Working&) = delete;
    Working& operator=(const Working&) = delete;

  private:
    const Interruptible before_;
};

// Without throwing: whether the call that this thread works for is to end.
bool interrupt_wanted();

}  // namespace globe::detail
