// The instruction set is the environment's or the strongest, and can be switched.
#include "globe/isa.hpp"

#include <cstdlib>
#include <set>
#include <stdexcept>
#include <string>

#include "check.hpp"

namespace {

using globe::tests::check;

void refuses(const std::string& argument, void (*call)()) {
    try {
        call();
        check(false, argument + ": no error");
    } catch (const std::invalid_argument& error) {
        const std::string message = error.what();
        check(message.rfind(argument + ": found 'sse9'; expected one of baseline", 0) == 0, message);
    }
}

}  // namespace

int main() {
    // The environment is read at the first use, so this comes first.
    setenv("GLOBE_ISA", "sse9", 1);
    refuses("GLOBE_ISA", [] { globe::active_isa(); });
    setenv("GLOBE_ISA", "baseline", 1);
    check(globe::active_isa() == "baseline", "GLOBE_ISA=baseline");

    const auto names = globe::runnable_isas();
    check(!names.empty() && names.front() == "baseline", "baseline always runs");
    check(std::set<std::string>(names.begin(), names.end()).size() == names.size(), "names differ");
    for (const auto& name : names) {
        globe::use_isa(name);
        check(globe::active_isa() == name, "use_isa " + name);
    }
    refuses("isa", [] { globe::use_isa("sse9"); });
    check(globe::active_isa() == names.back(), "a refused name changes nothing");
    return globe::tests::result();
}
