// What the tests share: a failed check is counted and the test goes on.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>

#include "globe/isa.hpp"

namespace globe::tests {

inline int failures = 0;

inline void check(bool condition, const std::string& what) {
    if (condition) return;
    std::fprintf(stderr, "FAILED (%s): %s\n", active_isa().c_str(), what.c_str());
    ++failures;
}

// The call must throw std::invalid_argument with a message that begins with the argument's name.
template <class Call>
void check_refused(const std::string& argument, const Call& call) {
    try {
        call();
        check(false, "no error for " + argument);
    } catch (const std::invalid_argument& error) {
        check(std::string(error.what()).rfind(argument + ":", 0) == 0,
              std::string("message: ") + error.what());
    }
}

// Runs a test on every instruction set of this machine.
template <class Test>
void on_every_isa(const Test& test) {
    for (const auto& isa : runnable_isas()) {
        use_isa(isa);
        test();
    }
}

inline int result() {
    return failures == 0 ? 0 : 1;
}

}  // namespace globe::tests
