/* What the shared library shows. */
#pragma once

#if defined(__GNUC__)
#define GLOBE_API __attribute__((visibility("default")))
#else
#define GLOBE_API
#endif
