/* Private arena memory: anonymous mappings, huge pages advised, populated at once. The last bytes
 * of a mapping count the owners beyond the first. */
#define _GNU_SOURCE
#include "arena.h"

#include "alloc.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

/* A mapping is aligned to a page only; huge pages start at 2 MiB, so round large ones up. */
enum { HUGE = 2 << 20 };

size_t dsc_arena_bytes(size_t n_bytes) {
    if (n_bytes == 0)
        return 0;
    n_bytes += sizeof(atomic_int);
    return dsc_round_up(n_bytes, n_bytes >= HUGE ? HUGE : 4096);
}

static atomic_int *more_owners(void *block, size_t n_bytes) {
    return (atomic_int *)(void *)((char *)block + dsc_arena_bytes(n_bytes)) - 1;
}

void dsc_arena_populate(void *begin, size_t n_bytes) {
    uintptr_t first = (uintptr_t)begin / 4096 * 4096;
    uintptr_t last = ((uintptr_t)begin + n_bytes + 4095) / 4096 * 4096;
    (void)madvise((void *)first, last - first, MADV_POPULATE_WRITE);
}

enum dsc_status dsc_arena_alloc(size_t n_bytes, void **out) {
    if (n_bytes == 0) {
        *out = NULL;
        return DSC_OK;
    }
    size_t size = dsc_arena_bytes(n_bytes);
    void *block = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED)
        return DSC_FAIL(DSC_ENOMEM, "could not map %zu bytes of private memory: %s", n_bytes,
                        strerror(errno));
    /* Advice: a kernel without it serves small pages. */
    (void)madvise(block, size, MADV_HUGEPAGE);
    dsc_arena_populate(block, size);
    dsc__alloc_count(1, (int64_t)n_bytes);
    *out = block;
    return DSC_OK;
}

/* The page that counts owners stays anonymous. */
enum dsc_status dsc_arena_map(int descriptor, size_t offset, size_t n_bytes, void **out) {
    size_t size = dsc_arena_bytes(n_bytes);
    void *block = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED || mmap(block, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                                    descriptor, (off_t)offset) == MAP_FAILED) {
        int error = errno;
        if (block != MAP_FAILED)
            (void)munmap(block, size);
        return DSC_FAIL(DSC_ENOMEM, "could not map %zu bytes of a file: %s", n_bytes,
                        strerror(error));
    }
    dsc__alloc_count(1, (int64_t)n_bytes);
    *out = block;
    return DSC_OK;
}

void dsc_arena_retain(void *block, size_t n_bytes) {
    atomic_fetch_add(more_owners(block, n_bytes), 1);
}

void dsc_arena_free(void *block, size_t n_bytes) {
    if (!block || atomic_fetch_sub(more_owners(block, n_bytes), 1) > 0)
        return;
    (void)munmap(block, dsc_arena_bytes(n_bytes));
    dsc__alloc_count(-1, -(int64_t)n_bytes);
}
