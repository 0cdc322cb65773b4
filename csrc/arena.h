/* Model-sized memory by kind. Today: private (masters, optimizer states, accumulators that only
 * their owner reads). Node-shared memory is a window of the communicator (comm/comm.h), because
 * the ranks that map it must agree on it. A part of a file is mapped where its owner streams it and
 * somebody else wants to see it (swap.h). Pinned and device kinds stand here when they come.
 *
 * Invariant: private arena memory is zero when it is given out, 64-byte aligned, first touched by
 * the rank that owns it, and in huge pages where the kernel gives them. */
#ifndef DSC_ARENA_H
#define DSC_ARENA_H

#include "dsc.h"

/* Zeroed private memory in *out; its pages are there on return, so that no step pays for them.
 * n_bytes 0 gives NULL. */
enum dsc_status dsc_arena_alloc(size_t n_bytes, void **out);
/* What n_bytes take with what they are rounded up to. */
size_t dsc_arena_bytes(size_t n_bytes);
/* A part of a file as memory that may be written to, in pages that come on first touch and that the
 * kernel may take back: offset and n_bytes are multiples of 4096. It goes as other arena memory,
 * and may outlive the descriptor. */
enum dsc_status dsc_arena_map(int descriptor, size_t offset, size_t n_bytes, void **out);
/* Makes the pages of a range present, so that the first step does not pay for them: of a shared
 * window too, in this rank's mapping. Advice: where the kernel cannot, pages come on first touch.
 */
void dsc_arena_populate(void *begin, size_t n_bytes);
/* One owner more; each ends with dsc_arena_free, from any thread. For tensors that are lent out and
 * may outlive the engine. */
void dsc_arena_retain(void *block, size_t n_bytes);
/* `n_bytes` as asked for; NULL is fine. The memory goes with its last owner. */
void dsc_arena_free(void *block, size_t n_bytes);

#endif
