#include "checkpoint/layouts.hpp"

#include "checkpoint/json.hpp"
#include "checkpoint/names.hpp"

namespace globe::detail {
namespace {

constexpr char layouts_json[] =
#include "layouts.inc"
    ;

constexpr std::string_view prefixes[] = {"model.",         "model.language_model.", "language_model.model.",
                                         "model.decoder.", "thinker.model.",        ""};

bool starts_with(std::string_view text, std::string_view start) {
    return text.substr(0, start.size()) == start;
}

// Takes one to six digits off the front.
bool take_number(std::string_view& text, std::int64_t& number) {
    std::size_t count = 0;
    for (number = 0; count < text.size() && text[count] >= '0' && text[count] <= '9'; ++count) {
        if (count == 6) return false;
        number = 10 * number + (text[count] - '0');
    }
    text.remove_prefix(count);
    return count > 0;
}

// A template has the form {prefix}..{layer}..[{expert}..].
std::optional<Place> match(std::string_view form, std::string_view prefix, std::string_view tensor) {
    Place place{-1, -1};
    while (!form.empty()) {
        if (starts_with(form, "{prefix}")) {
            if (!starts_with(tensor, prefix)) return std::nullopt;
            tensor.remove_prefix(prefix.size());
            form.remove_prefix(8);
        } else if (starts_with(form, "{layer}")) {
            if (!take_number(tensor, place.layer)) return std::nullopt;
            form.remove_prefix(7);
        } else if (starts_with(form, "{expert}")) {
            if (!take_number(tensor, place.expert)) return std::nullopt;
            form.remove_prefix(8);
        } else {
            if (tensor.empty() || tensor.front() != form.front()) return std::nullopt;
            tensor.remove_prefix(1);
            form.remove_prefix(1);
        }
    }
    return tensor.empty() ? std::optional(place) : std::nullopt;
}

}  // namespace

std::optional<Place> Layout::place(std::size_t family, std::string_view tensor) const {
    const Templates& forms = named[family];
    for (const std::string& form : {forms.single, forms.fused}) {
        for (const std::string_view prefix : prefixes) {
            const auto found = form.empty() ? std::nullopt : match(form, prefix, tensor);
            if (found) return found;
        }
    }
    return std::nullopt;
}

Layout layout_of(const std::string& name) {
    static const Json known = Json::parse(layouts_json);
    for (const Json& entry : known) {
        if (entry.at("name") != name) continue;
        Layout layout;
        for (std::size_t family = 0; family < 3; ++family) {
            const char* whole = family == 2 ? "fused_down" : "fused";
            if (entry.contains("templates"))
                layout.named[family].single = entry["templates"][family_names[family]];
            if (entry.contains(whole)) layout.named[family].fused = entry[whole];
        }
        return layout;
    }
    throw Damaged("layout " + name + " is not known; update globe");
}

}  // namespace globe::detail
