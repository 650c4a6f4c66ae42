// Compiled once per instruction set, with GLOBE_VARIANT its name.
#include "variant.hpp"

#include "simd/compose.hpp"
#include "simd/compose_matmul.hpp"
#include "simd/entmax.hpp"
#include "simd/entmax_backward.hpp"
#include "simd/gram.hpp"
#include "simd/nnls.hpp"
#include "simd/qmatmul.hpp"

#define GLOBE_TEXT_OF(name) #name
#define GLOBE_TEXT(name) GLOBE_TEXT_OF(name)

namespace globe::detail::GLOBE_VARIANT {

extern const Variant table;
const Variant table = {
    GLOBE_TEXT(GLOBE_VARIANT),
    {{compose<Float32, Float32>, compose<Float32, Float16>, compose<Float32, BFloat16>},
     {compose<Float16, Float32>, compose<Float16, Float16>, compose<Float16, BFloat16>},
     {compose<BFloat16, Float32>, compose<BFloat16, Float16>, compose<BFloat16, BFloat16>}},
    {{dot<Float32, Float32>, dot<Float32, Float16>, dot<Float32, BFloat16>},
     {dot<Float16, Float32>, dot<Float16, Float16>, dot<Float16, BFloat16>},
     {dot<BFloat16, Float32>, dot<BFloat16, Float16>, dot<BFloat16, BFloat16>}},
    {round_sums<Float32>, round_sums<Float16>, round_sums<BFloat16>},
    {{entmax::forward<float>, entmax::forward<double>}, {entmax::backward<float>, entmax::backward<double>}},
    gram::kernels,
    {nnls::extend, nnls::forward, nnls::backward, nnls::gradient, nnls::exceeding},
    qmatmul::kernels,
    compose_matmul::kernels,
};

}  // namespace globe::detail::GLOBE_VARIANT
