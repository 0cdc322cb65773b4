/* All ranks as threads of one process, over one mapping: the same words, waits and algorithms as
 * with processes, where ThreadSanitizer can see them. No process dies here, so there are no pidfds.
 *
 * Invariant: the mapping, and each window's, goes with the last rank that lets go of it. */
#include "shm.h"

#include "../alloc.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct part {
    atomic_int n_refs;
    size_t n_bytes;
    char *memory;
};

struct dsc__shm_world {
    atomic_int n_refs;
    size_t n_bytes;
    char *regions; /* one behind the other */
};

static enum dsc_status map_zeroed(size_t n_bytes, void **out) {
    void *memory = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return DSC_FAIL(DSC_ENOMEM, "could not map %zu bytes for ranks as threads: %s", n_bytes,
                        strerror(errno));
    (void)madvise(memory, n_bytes, MADV_DONTFORK);
    *out = memory;
    return DSC_OK;
}

void dsc__shm_world_unref(struct dsc__shm_world *world) {
    if (!world || atomic_fetch_sub(&world->n_refs, 1) != 1)
        return;
    (void)munmap(world->regions, world->n_bytes);
    dsc_free(world);
}

static enum dsc_status world_new(int size, struct dsc__shm_world **out) {
    void *block = NULL, *memory = NULL;
    size_t n_bytes = (size_t)size * dsc__shm_region_size(size);
    DSC_TRY(dsc_alloc(sizeof(struct dsc__shm_world), &block));
    enum dsc_status status = map_zeroed(n_bytes, &memory);
    if (status != DSC_OK) {
        dsc_free(block);
        return status;
    }
    struct dsc__shm_world *world = block;
    atomic_store(&world->n_refs, 1); /* the opener's, until all ranks hold theirs */
    world->n_bytes = n_bytes;
    world->regions = memory;
    *out = world;
    return DSC_OK;
}

static struct dsc__shm_region *region_of(const struct dsc__shm_world *world, int rank, int size) {
    return (struct dsc__shm_region *)(void *)(world->regions +
                                              (size_t)rank * dsc__shm_region_size(size));
}

static enum dsc_status open_rank(const struct dsc_comm_options *options, int rank, int size,
                                 struct dsc__shm_world *world, struct dsc_comm **out) {
    struct dsc_comm *comm = NULL;
    struct dsc__shm_node *node = NULL;
    DSC_TRY(dsc__shm_node_new(rank, size, &node));
    for (int r = 0; r < size; r++)
        node->regions[r] = region_of(world, r, size);
    node->world = world;
    atomic_fetch_add(&world->n_refs, 1);
    enum dsc_status status = dsc__comm_new(&dsc__shm_backend, options, rank, size, &comm);
    if (status == DSC_OK)
        status = dsc__shm_prepare(comm->state, rank, size, &comm->options, node);
    dsc__shm_node_unref(node); /* the channel has its own reference */
    if (status == DSC_OK) {
        dsc__shm_use_world(comm->state);
        *out = comm;
    } else if (comm) {
        dsc__shm_release(comm->state);
        dsc__comm_delete(comm);
    }
    return status;
}

enum dsc_status dsc_comm_open_threads(const struct dsc_comm_options *options, int size,
                                      struct dsc_comm **out) {
    struct dsc__shm_world *world = NULL;
    enum dsc_status status = DSC_OK;
    int n_open = 0;
    DSC_TRY(dsc__shm_check_world(0, size));
    DSC_TRY(world_new(size, &world));
    for (int r = 0; r < size; r++) {
        struct dsc__shm_region *region = region_of(world, r, size);
        region->pid = (int32_t)getpid();
        (void)sched_getaffinity(0, sizeof region->cpus, &region->cpus);
    }
    for (; n_open < size && status == DSC_OK; n_open += status == DSC_OK)
        status = open_rank(options, n_open, size, world, &out[n_open]);
    for (int r = 0; r < n_open && status != DSC_OK; r++) {
        dsc_comm_close(out[r]);
        out[r] = NULL;
    }
    dsc__shm_world_unref(world);
    return status;
}

/* ---- windows ---- */

static void part_unref(struct part *part) {
    if (!part || atomic_fetch_sub(&part->n_refs, 1) != 1)
        return;
    if (part->n_bytes > 0)
        (void)munmap(part->memory, part->n_bytes);
    dsc_free(part);
}

static enum dsc_status part_new(size_t n_bytes, int n_refs, struct part **out) {
    void *block = NULL, *memory = NULL;
    DSC_TRY(dsc_alloc(sizeof(struct part), &block));
    enum dsc_status status = n_bytes > 0 ? map_zeroed(n_bytes, &memory) : DSC_OK;
    if (status != DSC_OK) {
        dsc_free(block);
        return status;
    }
    struct part *part = block;
    atomic_store(&part->n_refs, n_refs);
    part->n_bytes = n_bytes;
    part->memory = memory;
    *out = part;
    return DSC_OK;
}

/* The parts of a window lie behind its base pointers. */
static struct part **parts_of(struct dsc_window *window, int size) {
    return (struct part **)(void *)&window->base[size];
}

enum dsc_status dsc__shm_threads_window(struct dsc__shm *shm, size_t n_bytes,
                                        struct dsc_window **out) {
    void *block = NULL;
    struct part *own = NULL;
    size_t n = (size_t)shm->size;
    DSC_TRY(dsc_alloc(sizeof(struct dsc_window) + 2 * n * sizeof(char *), &block));
    enum dsc_status status = part_new(n_bytes, shm->size, &own);
    if (status != DSC_OK) {
        dsc_free(block);
        return status;
    }
    memcpy(shm->blocks[shm->rank]->small[shm->sequence & 1], &own, sizeof own);
    if ((status = dsc__shm_step(shm, 1)) != DSC_OK) {
        /* The world is broken; who else holds the part is unknown, so it stays. */
        dsc_free(block);
        return status;
    }
    struct dsc_window *window = block;
    window->n_bytes = n_bytes;
    for (int r = 0; r < shm->size; r++) {
        struct part *part;
        memcpy(&part, shm->blocks[r]->small[shm->sequence & 1], sizeof part);
        window->base[r] = part->memory;
        parts_of(window, shm->size)[r] = part;
    }
    /* A window costs what is touched, not its size: it counts as a block without bytes. */
    dsc__alloc_count(1, 0);
    *out = window;
    return DSC_OK;
}

void dsc__shm_threads_window_close(struct dsc__shm *shm, struct dsc_window *window) {
    for (int r = 0; r < shm->size; r++)
        part_unref(parts_of(window, shm->size)[r]);
    dsc__alloc_count(-1, 0);
    dsc_free(window);
}

static void release_kept(struct dsc_kept *kept) {
    part_unref(kept->owner);
    dsc__alloc_count(-1, 0);
}

void dsc__shm_threads_window_keep(struct dsc__shm *shm, struct dsc_window *window, int rank,
                                  struct dsc_kept *out) {
    struct part *part = parts_of(window, shm->size)[rank];
    *out = (struct dsc_kept){part->memory, part->n_bytes, part, release_kept};
    dsc__alloc_count(1, 0);
    parts_of(window, shm->size)[rank] = NULL; /* part_unref bears it */
    dsc__shm_threads_window_close(shm, window);
}
