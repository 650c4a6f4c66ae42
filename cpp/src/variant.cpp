// Compiled once per instruction set, with GLOBE_VARIANT its name.
#include "variant.hpp"

#include "simd/compose.hpp"

#define GLOBE_TEXT_OF(name) #name
#define GLOBE_TEXT(name) GLOBE_TEXT_OF(name)

namespace globe::detail::GLOBE_VARIANT {

extern const Variant table;
const Variant table = {
    GLOBE_TEXT(GLOBE_VARIANT),
    {{compose_row<Float32, Float32>, compose_row<Float32, Float16>, compose_row<Float32, BFloat16>},
     {compose_row<Float16, Float32>, compose_row<Float16, Float16>, compose_row<Float16, BFloat16>},
     {compose_row<BFloat16, Float32>, compose_row<BFloat16, Float16>, compose_row<BFloat16, BFloat16>}},
    {{dot<Float32, Float32>, dot<Float32, Float16>, dot<Float32, BFloat16>},
     {dot<Float16, Float32>, dot<Float16, Float16>, dot<Float16, BFloat16>},
     {dot<BFloat16, Float32>, dot<BFloat16, Float16>, dot<BFloat16, BFloat16>}},
};

}  // namespace globe::detail::GLOBE_VARIANT
