/* Slabs are cut from front to back. A slab is rank 0's part of a window; the others' parts are
 * never touched, and go at once. */
#include "store.h"

#include "alloc.h"
#include "arena.h"

#include <stdatomic.h>
#include <string.h>

/* Pages cost memory once touched; a slab is large so that windows, which ranks open together, are
 * few. */
enum { SLAB_BYTES = 64 << 20 };

struct dsc_slab {
    atomic_int n_owners;
    struct dsc_kept kept;
};

/* What ranks compare. */
struct taken {
    uint64_t hash, n, n_bytes, last;
};

struct dsc_store {
    struct dsc_comm *comm;
    struct dsc_slab *slab; /* NULL before the first piece */
    size_t n_used;         /* of its bytes */
    struct taken taken;
    size_t n_slabs;
};

enum dsc_status dsc_store_open(struct dsc_comm *comm, struct dsc_store **out) {
    struct dsc_store *store;
    if (!dsc_comm_has_windows(comm))
        return DSC_FAIL(DSC_ENOTYET, "store: ranks of \"%s\" share no memory",
                        dsc_comm_backend(comm));
    DSC_TRY(dsc_alloc(sizeof *store, (void **)&store));
    store->comm = comm;
    store->taken.hash = DSC_HASH_START;
    *out = store;
    return DSC_OK;
}

void dsc_slab_release(struct dsc_slab *slab) {
    if (atomic_fetch_sub(&slab->n_owners, 1) != 1)
        return;
    slab->kept.release(&slab->kept);
    dsc_free(slab);
}

void dsc_store_close(struct dsc_store *store) {
    if (!store)
        return;
    if (store->slab)
        dsc_slab_release(store->slab);
    dsc_free(store);
}

static enum dsc_status compare(const struct dsc_store *store, const struct taken *all) {
    for (int r = 1; r < dsc_comm_size(store->comm); r++)
        if (memcmp(&all[r], &all[0], sizeof all[0]) != 0)
            return DSC_FAIL(
                DSC_EDIVERGED,
                "ranks make different parameters for ZeRO stage 3: rank 0 has made %llu of %llu "
                "bytes (the last of %llu), rank %d %llu of %llu (the last of %llu); all must make "
                "the same ones in the same order",
                (unsigned long long)all[0].n, (unsigned long long)all[0].n_bytes,
                (unsigned long long)all[0].last, r, (unsigned long long)all[r].n,
                (unsigned long long)all[r].n_bytes, (unsigned long long)all[r].last);
    return DSC_OK;
}

enum dsc_status dsc_store_agree(struct dsc_store *store, const char *label) {
    struct taken *all = NULL;
    size_t size = (size_t)dsc_comm_size(store->comm);
    if (size == 1)
        return DSC_OK;
    DSC_TRY(dsc_alloc(size * sizeof *all, (void **)&all));
    enum dsc_status status =
        dsc_comm_meet(store->comm, label, 0, &store->taken, sizeof store->taken, all);
    if (status == DSC_OK)
        status = compare(store, all);
    dsc_free(all);
    return status;
}

/* A slab with room for n_bytes takes the place of the full one. */
static enum dsc_status open_slab(struct dsc_store *store, size_t n_bytes) {
    struct dsc_window *window = NULL;
    struct dsc_slab *slab = NULL;
    DSC_TRY(dsc_store_agree(store, "memory for parameters"));
    DSC_TRY(dsc_alloc(sizeof *slab, (void **)&slab));
    enum dsc_status status = dsc_comm_window_open(store->comm, dsc_max(n_bytes, SLAB_BYTES),
                                                  "memory for parameters", &window);
    if (status != DSC_OK) {
        dsc_free(slab);
        return status;
    }
    dsc_comm_window_keep(store->comm, window, 0, &slab->kept);
    atomic_store(&slab->n_owners, 1);
    if (store->slab)
        dsc_slab_release(store->slab);
    store->slab = slab;
    store->n_used = 0;
    store->n_slabs++;
    return DSC_OK;
}

enum dsc_status dsc_store_take(struct dsc_store *store, size_t n_bytes, struct dsc_slab **slab,
                               void **memory) {
    uint64_t size = n_bytes;
    n_bytes = dsc_store_bytes(n_bytes);
    store->taken.hash = dsc_hash(store->taken.hash, &size, sizeof size);
    store->taken.n++;
    store->taken.n_bytes += n_bytes;
    store->taken.last = size;
    if (!store->slab || store->slab->kept.n_bytes - store->n_used < n_bytes)
        DSC_TRY(open_slab(store, n_bytes));
    *memory = store->slab->kept.base + store->n_used;
    *slab = store->slab;
    store->n_used += n_bytes;
    atomic_fetch_add(&store->slab->n_owners, 1);
    dsc_arena_populate(*memory, n_bytes);
    return DSC_OK;
}

struct dsc_store_counters dsc_store_counters(const struct dsc_store *store) {
    return (struct dsc_store_counters){store->taken.n_bytes, store->n_slabs};
}
