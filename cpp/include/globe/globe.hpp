// The whole public C++ API of GloBE.
#pragma once

#include "globe/compose.hpp"
#include "globe/compose_matmul.hpp"
#include "globe/entmax.hpp"
#include "globe/expert.hpp"
#include "globe/factored.hpp"
#include "globe/gram.hpp"
#include "globe/interrupt.hpp"
#include "globe/isa.hpp"
#include "globe/layer.hpp"
#include "globe/nnls.hpp"
#include "globe/parallel.hpp"
#include "globe/qmatmul.hpp"
#include "globe/view.hpp"
