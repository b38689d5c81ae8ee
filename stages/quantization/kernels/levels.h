/* Levels of instructions: a file of kernels is compiled once for each, and AT_LEVEL gives what it defines a name of its own. */
#ifndef HEADRACE_LEVELS_H
#define HEADRACE_LEVELS_H

#include <stddef.h>
#include <stdint.h>

#ifndef LEVEL
#define LEVEL baseline
#endif
#define JOINED(name, level) name##_##level
#define EXPANDED(name, level) JOINED(name, level)
#define AT_LEVEL(name) EXPANDED(name, LEVEL)
#define INLINE static inline __attribute__((always_inline))

#endif
