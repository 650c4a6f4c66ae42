// JSON of checkpoints, read strictly: UTF-8, no key twice in an object, whole numbers where numbers are asked
// for.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace globe::detail {

using Json = nlohmann::json;

// What is wrong with the content of a file; whoever knows the file says its name.
class Damaged : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

void require(bool condition, const std::string& found);

Json parse_json(std::string_view text);  // an object

// The same with null for NaN and infinities, which Python writes as words that are not JSON.
std::string without_infinities(std::string_view text);

const Json& object(const Json& value, const char* what);
const Json& member(const Json& value, const std::string& key);
std::string text(const Json& value, const char* what);
std::int64_t whole(const Json& value, const char* what);  // at least 0
std::vector<std::int64_t> wholes(const Json& value, const char* what);

}  // namespace globe::detail
