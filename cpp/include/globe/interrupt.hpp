// A way to end a long call before its time, for callers that must answer to someone.
#pragma once

#include <exception>
#include <memory>

#include "globe/export.h"

namespace globe {

// What a call throws that was interrupted; what it has written by then is to be thrown away.
class GLOBE_API Interrupted : public std::exception {
  public:
    const char* what() const noexcept override;
};

// While one lives, the calls of its thread ask `wanted(context)` about ten times a second, on that thread,
// and end with Interrupted once it says true, on all their threads; the pool then serves the next call.
// Kernels look between blocks of rows or columns that take some hundredths of a second at most; a single row
// of entmax or nnls is always finished. `wanted` must not throw. Scopes may be nested; the innermost is
// asked.
class GLOBE_API InterruptScope {
  public:
    InterruptScope(bool (*wanted)(void*), void* context);
    ~InterruptScope();
    InterruptScope(const InterruptScope&) = delete;
    InterruptScope& operator=(const InterruptScope&) = delete;

  private:
    struct State;
    std::unique_ptr<State> state_;
};

// Throws Interrupted where the call that this thread works for is to end. For tasks of parallel_for that take
// long.
GLOBE_API void check_interrupt();

}  // namespace globe
