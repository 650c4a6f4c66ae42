#include "globe/interrupt.hpp"

#include "interruption.hpp"

namespace globe {
namespace detail {

Interruption::Interruption(bool (*question)(void*), void* context)
    : ask_(question), context_(context), next_(std::chrono::steady_clock::now() + interrupt_interval) {}

void Interruption::ask() {
    if (wanted() || std::chrono::steady_clock::now() < next_) return;
    if (ask_(context_)) wanted_.store(true, std::memory_order_relaxed);
    next_ = std::chrono::steady_clock::now() + interrupt_interval;
}

Interruptible& interruptible() {
    thread_local Interruptible current;
    return current;
}

bool interrupt_wanted() {
    const Interruptible& here = interruptible();
    if (here.interruption == nullptr) return false;
    if (here.asks) here.interruption->ask();
    return here.interruption->wanted();
}

}  // namespace detail

const char* Interrupted::what() const noexcept {
    return "interrupted";
}

struct InterruptScope::State {
    detail::Interruption interruption;
    const detail::Interruptible outer = detail::interruptible();

    State(bool (*wanted)(void*), void* context) : interruption(wanted, context) {}
};

InterruptScope::InterruptScope(bool (*wanted)(void*), void* context)
    : state_(std::make_unique<State>(wanted, context)) {
    detail::interruptible() = {&state_->interruption, true};
}

InterruptScope::~InterruptScope() {
    detail::interruptible() = state_->outer;
}

void check_interrupt() {
    if (detail::interrupt_wanted()) throw Interrupted();
}

}  // namespace globe
