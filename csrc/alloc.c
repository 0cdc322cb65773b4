/* The only caller of malloc. A 64-byte header holds the size, so that free can count bytes. */
#include "alloc.h"

#include <limits.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

enum { HEADER = 64 };

static _Atomic uint64_t n_calls;
static _Atomic int64_t n_live;
static _Atomic int64_t n_live_bytes;

void dsc__alloc_count(int64_t n_blocks, int64_t n_bytes) {
    if (n_blocks > 0)
        atomic_fetch_add_explicit(&n_calls, (uint64_t)n_blocks, memory_order_relaxed);
    atomic_fetch_add_explicit(&n_live, n_blocks, memory_order_relaxed);
    atomic_fetch_add_explicit(&n_live_bytes, n_bytes, memory_order_relaxed);
}

struct dsc_alloc_counters dsc_alloc_counters(void) {
    return (struct dsc_alloc_counters){
        .n_calls = atomic_load_explicit(&n_calls, memory_order_relaxed),
        .n_live = atomic_load_explicit(&n_live, memory_order_relaxed),
        .n_bytes = atomic_load_explicit(&n_live_bytes, memory_order_relaxed),
    };
}

enum dsc_status dsc_alloc(size_t n_bytes, void **out) {
    char *block = NULL;
    if (n_bytes > PTRDIFF_MAX - 2 * HEADER ||
        (block = aligned_alloc(HEADER, dsc_round_up(n_bytes, HEADER) + HEADER)) == NULL)
        return DSC_FAIL(DSC_ENOMEM, "could not allocate %zu bytes", n_bytes);
    memset(block, 0, dsc_round_up(n_bytes, HEADER) + HEADER);
    *(size_t *)block = n_bytes;
    dsc__alloc_count(1, (int64_t)n_bytes);
    *out = block + HEADER;
    return DSC_OK;
}

enum dsc_status dsc_realloc(void **block, size_t n_bytes) {
    void *fresh = NULL;
    DSC_TRY(dsc_alloc(n_bytes, &fresh));
    if (*block) {
        size_t held = *(size_t *)((char *)*block - HEADER);
        memcpy(fresh, *block, dsc_min(held, n_bytes));
        dsc_free(*block);
    }
    *block = fresh;
    return DSC_OK;
}

void dsc_free(void *block) {
    if (!block)
        return;
    char *header = (char *)block - HEADER;
    dsc__alloc_count(-1, -(int64_t)(*(size_t *)header));
    free(header);
}

void dsc_alloc_keep_freed(void) {
#ifdef __GLIBC__
    if (getenv("MALLOC_TRIM_THRESHOLD_") || getenv("MALLOC_MMAP_THRESHOLD_") ||
        getenv("GLIBC_TUNABLES"))
        return;
    /* Some versions take no more than 32 MiB here. */
    if (!mallopt(M_MMAP_THRESHOLD, 128 << 20))
        (void)mallopt(M_MMAP_THRESHOLD, 32 << 20);
    (void)mallopt(M_TRIM_THRESHOLD, INT_MAX);
#endif
}

void dsc_alloc_give_back(void) {
#ifdef __GLIBC__
    (void)malloc_trim(0);
#endif
}
