#include "checkpoint/json.hpp"

#include <set>

namespace globe::detail {
namespace {

// The keys so far of the objects that are open.
class Keys {
  public:
    bool operator()(int /*depth*/, Json::parse_event_t event, const Json& value) {
        if (event == Json::parse_event_t::object_start) open_.emplace_back();
        if (event == Json::parse_event_t::object_end) open_.pop_back();
        if (event == Json::parse_event_t::key) {
            const auto& key = value.get_ref<const std::string&>();
            require(open_.back().insert(key).second, "key " + key + " is there twice");
        }
        return true;
    }

  private:
    std::vector<std::set<std::string>> open_;
};

// The length of a word for what is not a finite number; 0 where there is none.
std::size_t word_at(std::string_view text) {
    for (const std::string_view word : {"NaN", "Infinity", "-Infinity"}) {
        if (text.substr(0, word.size()) == word) return word.size();
    }
    return 0;
}

}  // namespace

void require(bool condition, const std::string& found) {
    if (!condition) throw Damaged(found);
}

Json parse_json(std::string_view text) {
    try {
        Keys keys;
        const Json::parser_callback_t look = [&keys](int depth, Json::parse_event_t event, Json& value) {
            return keys(depth, event, value);
        };
        Json value = Json::parse(text.begin(), text.end(), look);
        require(value.is_object(), "expected a JSON object, found " + std::string(value.type_name()));
        return value;
    } catch (const Json::exception&) {
        throw Damaged("not valid JSON");
    }
}

std::string without_infinities(std::string_view text) {
    std::string clean;
    bool inside = false;  // a string
    for (std::size_t at = 0; at < text.size(); ++at) {
        const auto length = inside ? 0 : word_at(text.substr(at));
        if (length > 0) {
            clean += "null";
            at += length - 1;
            continue;
        }
        clean += text[at];
        if (text[at] == '"') inside = !inside;
        if (inside && text[at] == '\\' && at + 1 < text.size()) clean += text[++at];
    }
    return clean;
}

const Json& object(const Json& value, const char* what) {
    require(value.is_object(), std::string(what) + " is " + value.type_name() + "; expected an object");
    return value;
}

const Json& member(const Json& value, const std::string& key) {
    const auto found = object(value, ("what should have " + key).c_str()).find(key);
    require(found != value.end(), key + " is missing");
    return *found;
}

std::string text(const Json& value, const char* what) {
    require(value.is_string(), std::string(what) + " is " + value.type_name() + "; expected text");
    return value.get<std::string>();
}

std::int64_t whole(const Json& value, const char* what) {
    const bool fits = value.is_number_unsigned() && value.get<std::uint64_t>() <= INT64_MAX;
    require(fits, std::string(what) + " is not a whole number of at least 0");
    return value.get<std::int64_t>();
}

std::vector<std::int64_t> wholes(const Json& value, const char* what) {
    require(value.is_array(), std::string(what) + " is " + value.type_name() + "; expected a list");
    std::vector<std::int64_t> found;
    for (const Json& entry : value) found.push_back(whole(entry, what));
    return found;
}

}  // namespace globe::detail
