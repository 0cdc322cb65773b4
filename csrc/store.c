/* Slabs are cut from front to back. A slab is rank 0's part of a window; the others' parts are
 * never touched, and go at once. */
#define _GNU_SOURCE
#include "store.h"

#include "alloc.h"
#include "arena.h"
#include "file_io.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

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
    char *folder;          /* NULL: slabs are memory */
    struct dsc_slab *slab; /* NULL before the first piece */
    size_t n_used;         /* of its bytes */
    struct taken taken;
    size_t n_slabs;
};

enum dsc_status dsc_store_open(struct dsc_comm *comm, const char *folder, struct dsc_store **out) {
    struct dsc_store *store;
    if (!dsc_comm_has_windows(comm))
        return DSC_FAIL(DSC_ENOTYET, "store: ranks of \"%s\" share no memory",
                        dsc_comm_backend(comm));
    DSC_TRY(dsc_alloc(sizeof *store, (void **)&store));
    enum dsc_status status = DSC_OK;
    if (folder)
        status = dsc_alloc(strlen(folder) + 1, (void **)&store->folder);
    if (status != DSC_OK) {
        dsc_free(store);
        return status;
    }
    if (folder)
        memcpy(store->folder, folder, strlen(folder) + 1);
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
    dsc_free(store->folder);
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

/* Rank 0's file, which has no name, for the others to open. */
struct door {
    int64_t pid;
    int32_t descriptor, failed;
    uint64_t device, inode;
};

static enum dsc_status map_slab(int descriptor, size_t n_bytes, struct dsc_kept *kept) {
    return dsc_arena_map(descriptor, 0, n_bytes, (void **)&kept->base);
}

static enum dsc_status map_through(const struct door *door, size_t n_bytes, struct dsc_kept *kept) {
    char path[64];
    struct stat info;
    snprintf(path, sizeof path, "/proc/%lld/fd/%d", (long long)door->pid, (int)door->descriptor);
    int descriptor = open(path, O_RDWR | O_CLOEXEC);
    if (descriptor < 0 || fstat(descriptor, &info) != 0 || info.st_dev != door->device ||
        info.st_ino != door->inode) {
        int error = errno;
        if (descriptor >= 0)
            (void)close(descriptor);
        return DSC_FAIL(DSC_EIO, "rank 0's file of parameters could not be opened through %s: %s",
                        path, descriptor < 0 ? strerror(error) : "it is another one");
    }
    enum dsc_status status = map_slab(descriptor, n_bytes, kept);
    (void)close(descriptor);
    return status;
}

static enum dsc_status make_slab_file(const struct dsc_store *store, size_t n_bytes,
                                      struct dsc_file **file, struct door *door) {
    struct stat info;
    DSC_TRY(dsc_file_open(store->folder, "parameters", n_bytes, file));
    door->pid = getpid();
    door->descriptor = dsc_file_descriptor(*file);
    if (fstat(door->descriptor, &info) != 0)
        return DSC_FAIL(DSC_EIO, "fstat of a new file in %s: %s", store->folder, strerror(errno));
    door->device = info.st_dev;
    door->inode = info.st_ino;
    return DSC_OK;
}

/* Everybody learns who failed; the first rank's door in *first. */
static enum dsc_status meet_door(const struct dsc_store *store, uint64_t tag, struct door *mine,
                                 enum dsc_status status, struct door *first) {
    struct door *all;
    int size = dsc_comm_size(store->comm);
    mine->failed = status != DSC_OK;
    *first = *mine;
    if (size == 1)
        return status;
    DSC_TRY(dsc_alloc((size_t)size * sizeof *all, (void **)&all));
    enum dsc_status met =
        dsc_comm_meet(store->comm, "file for parameters", tag, mine, sizeof *mine, all);
    *first = all[0];
    for (int r = 0; status == DSC_OK && met == DSC_OK && r < size; r++)
        if (all[r].failed)
            status =
                DSC_FAIL(DSC_EIO, "rank %d has no file for parameters (its own error says why)", r);
    dsc_free(all);
    return status != DSC_OK ? status : met;
}

static void unmap_slab(struct dsc_kept *kept) {
    dsc_arena_free(kept->base, kept->n_bytes);
}

static enum dsc_status open_file_slab(const struct dsc_store *store, size_t n_bytes,
                                      struct dsc_kept *kept) {
    struct dsc_file *file = NULL;
    struct door mine = {0}, first;
    enum dsc_status status = DSC_OK;
    kept->n_bytes = n_bytes;
    kept->release = unmap_slab;
    if (dsc_comm_rank(store->comm) == 0)
        status = make_slab_file(store, kept->n_bytes, &file, &mine);
    status = meet_door(store, 1, &mine, status, &first);
    if (status == DSC_OK)
        status = file ? map_slab(mine.descriptor, kept->n_bytes, kept)
                      : map_through(&first, kept->n_bytes, kept);
    if (first.failed == 0) { /* all know of that one, and nobody else comes */
        status = meet_door(store, 2, &mine, status, &first);
        if (status != DSC_OK)
            dsc_arena_free(kept->base, kept->n_bytes);
    }
    dsc_file_close(file);
    return status;
}

static enum dsc_status open_memory_slab(const struct dsc_store *store, size_t n_bytes,
                                        struct dsc_kept *kept) {
    struct dsc_window *window = NULL;
    DSC_TRY(dsc_comm_window_open(store->comm, n_bytes, "memory for parameters", &window));
    dsc_comm_window_keep(store->comm, window, 0, kept);
    return DSC_OK;
}

static size_t slab_bytes(size_t piece_bytes) {
    return dsc_round_up(dsc_max(piece_bytes, SLAB_BYTES), DSC_FILE_ALIGN);
}

void dsc_store_count(struct dsc_store_slabs *slabs, size_t piece_bytes) {
    piece_bytes = dsc_store_bytes(piece_bytes);
    if (slabs->n_left < piece_bytes) {
        slabs->n_left = slab_bytes(piece_bytes);
        slabs->n_bytes += slabs->n_left;
    }
    slabs->n_left -= piece_bytes;
    slabs->n_taken += piece_bytes;
}

/* A slab with room for n_bytes takes the place of the full one. */
static enum dsc_status open_slab(struct dsc_store *store, size_t n_bytes) {
    struct dsc_slab *slab = NULL;
    DSC_TRY(dsc_store_agree(store, "memory for parameters"));
    DSC_TRY(dsc_alloc(sizeof *slab, (void **)&slab));
    n_bytes = slab_bytes(n_bytes);
    enum dsc_status status = store->folder ? open_file_slab(store, n_bytes, &slab->kept)
                                           : open_memory_slab(store, n_bytes, &slab->kept);
    if (status != DSC_OK) {
        dsc_free(slab);
        return status;
    }
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
    if (!store->folder)
        dsc_arena_populate(*memory, n_bytes);
    return DSC_OK;
}

struct dsc_store_counters dsc_store_counters(const struct dsc_store *store) {
    return (struct dsc_store_counters){store->taken.n_bytes, store->n_slabs};
}
