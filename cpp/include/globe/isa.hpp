// Which instruction set the kernels run on.
#pragma once

#include <string>
#include <vector>

#include "globe/export.h"

namespace globe {

// Every kernel is compiled once per instruction set: "baseline", "avx2", "avx512", "avx512_vnni" and
// "avx512_bf16" (which has vnni) on x86-64, "baseline" (NEON) and "neon_bf16" on Arm. The strongest that the
// machine runs is picked once, at the first call, unless the environment variable GLOBE_ISA names another.

// Those of this build that this machine can run, weakest first.
GLOBE_API std::vector<std::string> runnable_isas();

// The one in use. Throws std::invalid_argument where GLOBE_ISA names none that can run.
GLOBE_API std::string active_isa();

// Switches to another, for tests and comparisons; not while a kernel runs.
// Throws std::invalid_argument for a name that is not among runnable_isas().
GLOBE_API void use_isa(const std::string& name);

}  // namespace globe
