/* What the memory control groups of this process still allow: its own and those around it.
 *
 * Decides: which of their figures count: what can only be freed by ending somebody (anonymous and
 * shared memory), not the page cache, which the kernel takes back. Invariant: what it calls too
 * much would end a process; it may call too little enough. */
#ifndef DSC_MEMORY_LIMIT_H
#define DSC_MEMORY_LIMIT_H

#include "dsc.h"

/* Of more groups with a limit than these, the outermost ones share the last place: the one that has
 * least left counts. */
enum { DSC_MEMORY_LIMITS = 4 };

struct dsc_memory_limit {
    uint64_t limit, left; /* bytes; left: with free swap that it may use */
    uint64_t group;       /* equal for processes in the same control group */
};

/* The limits that there are and that can be read, from the innermost group on; their number.
 * root: stands before /proc and /sys; "", but in a test. */
size_t dsc_memory_limits(const char *root, struct dsc_memory_limit out[DSC_MEMORY_LIMITS]);

#endif
