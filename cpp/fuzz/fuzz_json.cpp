// JSON: refused or an object, with and without the words that Python writes for what is not finite.
#include <cstdint>
#include <cstdlib>

#include "checkpoint/json.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace globe::detail;
    const std::string_view given(reinterpret_cast<const char*>(data), size);
    bool plain = false;
    try {
        plain = parse_json(given).is_object();
        if (!plain) std::abort();
    } catch (const Damaged&) {
    }
    try {
        parse_json(without_infinities(given));
    } catch (const Damaged&) {
        if (plain) std::abort();
    }
    return 0;
}
