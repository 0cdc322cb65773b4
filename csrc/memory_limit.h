/* What the memory control group of this process still allows.
 *
 * Decides: which of its figures count: what can only be freed by ending somebody (anonymous and
 * shared memory), not the page cache, which the kernel takes back. Invariant: what it calls too
 * much would end a process; it may call too little enough. */
#ifndef DSC_MEMORY_LIMIT_H
#define DSC_MEMORY_LIMIT_H

#include "dsc.h"

struct dsc_memory_limit {
    uint64_t limit, left; /* bytes; left: with free swap */
    uint64_t group;       /* equal for processes of the same control group */
};

/* False where there is no such limit, or none that can be read. */
bool dsc_memory_limit(struct dsc_memory_limit *out);

#endif
