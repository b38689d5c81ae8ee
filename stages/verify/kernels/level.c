/* The table of a level's kernels, which checks.h declares. */
#include "checks.h"

const struct checks AT_LEVEL(checks) = {
    .name = LEVEL_NAME,
    .compared = AT_LEVEL(compared),
    .kept = AT_LEVEL(kept),
    .words_as_rows = AT_LEVEL(words_as_rows),
    .columns_as_rows = AT_LEVEL(columns_as_rows),
};
