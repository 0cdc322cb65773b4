/* Small, rank-private heap memory, counted.
 *
 * Decides: where malloc is called (only in alloc.c). Model-sized memory comes from arena.h.
 * Invariant: every block given out is returned through dsc_free exactly once; a training step in
 * the steady state calls neither (contract M2; tests read the counter). */
#ifndef DSC_ALLOC_H
#define DSC_ALLOC_H

#include "dsc.h"

struct dsc_alloc_counters {
    uint64_t n_calls; /* allocations since the process began, heap and arena */
    int64_t n_live;   /* blocks not yet freed */
    int64_t n_bytes;  /* bytes not yet freed, shared windows not counted */
};

/* `n_bytes` zeroed bytes, 64-byte aligned, in *out. n_bytes 0 gives a valid pointer. */
enum dsc_status dsc_alloc(size_t n_bytes, void **out);
/* Grows or shrinks *block, which may hold NULL; new bytes are zero; *block is untouched on failure.
 */
enum dsc_status dsc_realloc(void **block, size_t n_bytes);
/* NULL is fine. */
void dsc_free(void *block);
/* Asks the C library's heap to keep freed blocks of up to 128 MiB instead of giving them back to
 * the kernel: for who frees and takes the same blocks in every training step, and would pay for
 * their pages each time (32 MiB: 13 ms, as long as copying them seven times). Costs what the heap
 * cannot join again: up to a third of the peak was seen. Process-wide, torch's CPU tensors
 * included; once is enough. Leaves a user's own MALLOC_*_THRESHOLD_ or GLIBC_TUNABLES alone; does
 * nothing where malloc is not glibc's. */
void dsc_alloc_keep_freed(void);
/* Gives the kernel what the C library's heap keeps of freed blocks now: once what a training will
 * not need again has been freed. Process-wide; does nothing where malloc is not glibc's. */
void dsc_alloc_give_back(void);
/* Arena memory counts here too, so that one number says whether a step allocated. */
void dsc__alloc_count(int64_t n_blocks, int64_t n_bytes);
struct dsc_alloc_counters dsc_alloc_counters(void);

#endif
