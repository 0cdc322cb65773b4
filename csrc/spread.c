/* Two halves per owner, counted by commits and releases. Counters wrap; only differences are used.
 */
#include "spread.h"

#include "alloc.h"
#include "arena.h"

#include <stdatomic.h>

enum { HALF_BYTES = DSC_SPREAD_ELEMS * 4, LINE = 64 };

struct line {
    _Alignas(LINE) _Atomic uint32_t n;
};

struct dsc_spread {
    struct dsc_comm *comm;
    struct dsc_window *window; /* NULL where ranks share no memory */
    char *gathered;            /* there: a chunk of each rank, and then the one to send */
    size_t n_stride;           /* bytes from one rank's to the next */
    int rank, size;
    size_t halves_offset;
    double seconds, taking_since;
    uint32_t n_committed; /* mine */
    uint32_t n_taken[];   /* per owner */
};

/* In an owner's window: line 0 counts its commits, line 1 + r counts the releases of rank r. */
static struct line *lines_of(const struct dsc_spread *spread, int owner) {
    return (struct line *)(void *)spread->window->base[owner];
}

/* Counters, before the halves. */
static size_t n_line_bytes(int size) {
    return dsc_round_up((1 + (size_t)size) * sizeof(struct line), 4096);
}

struct dsc_spread_sizes dsc_spread_sizes_of(int size, bool remote) {
    struct dsc_spread_sizes sizes = {0, 0};
    if (remote)
        sizes.private_bytes = ((size_t)size + 1) * HALF_BYTES;
    else
        sizes.window_bytes = n_line_bytes(size) + 2 * (size_t)HALF_BYTES;
    return sizes;
}

enum dsc_status dsc_spread_open(struct dsc_comm *comm, bool remote, struct dsc_spread **out) {
    struct dsc_spread *spread = NULL;
    size_t size = (size_t)dsc_comm_size(comm);
    DSC_TRY(dsc_alloc(sizeof *spread + size * sizeof spread->n_taken[0], (void **)&spread));
    spread->comm = comm;
    spread->rank = dsc_comm_rank(comm);
    spread->size = (int)size;
    struct dsc_spread_sizes sizes = dsc_spread_sizes_of(spread->size, remote);
    if (remote) {
        *out = spread;
        enum dsc_status status = dsc_arena_alloc(sizes.private_bytes, (void **)&spread->gathered);
        if (status != DSC_OK)
            dsc_free(spread);
        return status;
    }
    spread->halves_offset = n_line_bytes(spread->size);
    enum dsc_status status = dsc_comm_window_open(comm, sizes.window_bytes,
                                                  "engine: parameter staging", &spread->window);
    if (status != DSC_OK) {
        dsc_free(spread);
        return status;
    }
    for (size_t r = 0; r < size; r++)
        dsc_arena_populate(spread->window->base[r], sizes.window_bytes);
    *out = spread;
    return DSC_OK;
}

size_t dsc_spread_private_bytes(const struct dsc_spread *spread) {
    return dsc_spread_sizes_of(spread->size, !spread->window).private_bytes;
}

void dsc_spread_close(struct dsc_spread *spread) {
    if (!spread)
        return;
    dsc_comm_window_close(spread->comm, spread->window);
    dsc_arena_free(spread->gathered, dsc_spread_private_bytes(spread));
    dsc_free(spread);
}

static char *half(const struct dsc_spread *spread, int owner, uint32_t count) {
    return spread->window->base[owner] + spread->halves_offset + (count & 1) * (size_t)HALF_BYTES;
}

static bool all_released(const struct dsc_spread *spread, uint32_t count) {
    struct line *lines = lines_of(spread, spread->rank);
    for (int r = 0; r < spread->size; r++)
        if (r != spread->rank &&
            (int32_t)(atomic_load_explicit(&lines[1 + r].n, memory_order_acquire) - count) < 0)
            return false;
    return true;
}

enum dsc_status dsc_spread_acquire(struct dsc_spread *spread, const char *label, void **out) {
    double since = dsc_comm_now();
    if (!spread->window) {
        *out = spread->gathered + (size_t)spread->size * HALF_BYTES;
        return DSC_OK;
    }
    for (;;) {
        uint32_t bell = dsc_comm_bell(spread->comm);
        if (all_released(spread, spread->n_committed - 1))
            break;
        DSC_TRY(dsc_comm_wait_bell(spread->comm, bell, label, since));
    }
    *out = half(spread, spread->rank, spread->n_committed);
    spread->seconds += dsc_comm_now() - since;
    return DSC_OK;
}

void dsc_spread_commit(struct dsc_spread *spread) {
    if (!spread->window)
        return;
    spread->n_committed++;
    atomic_store_explicit(&lines_of(spread, spread->rank)[0].n, spread->n_committed,
                          memory_order_release);
    dsc_comm_ring_others(spread->comm);
}

enum dsc_status dsc_spread_share(struct dsc_spread *spread, size_t n_bytes, const char *label) {
    if (spread->window)
        return DSC_OK;
    struct dsc_coll coll = {.src = spread->gathered + (size_t)spread->size * HALF_BYTES,
                            .dst = spread->gathered,
                            .n_elems = n_bytes,
                            .dtype = DSC_U8,
                            .label = label};
    double since = dsc_comm_now();
    spread->n_stride = n_bytes;
    enum dsc_status status = dsc_comm_all_gather(spread->comm, &coll);
    spread->seconds += dsc_comm_now() - since;
    return status;
}

enum dsc_status dsc_spread_take(struct dsc_spread *spread, int owner, const char *label,
                                const void **out) {
    double since = spread->taking_since = dsc_comm_now();
    if (!spread->window) {
        *out = spread->gathered + (size_t)owner * spread->n_stride;
        return DSC_OK;
    }
    for (;;) {
        uint32_t bell = dsc_comm_bell(spread->comm);
        uint32_t n = atomic_load_explicit(&lines_of(spread, owner)[0].n, memory_order_acquire);
        if ((int32_t)(n - spread->n_taken[owner]) > 0)
            break;
        DSC_TRY(dsc_comm_wait_bell(spread->comm, bell, label, since));
    }
    *out = half(spread, owner, spread->n_taken[owner]);
    return DSC_OK;
}

void dsc_spread_release(struct dsc_spread *spread, int owner) {
    spread->seconds += dsc_comm_now() - spread->taking_since;
    if (!spread->window)
        return;
    spread->n_taken[owner]++;
    atomic_store_explicit(&lines_of(spread, owner)[1 + spread->rank].n, spread->n_taken[owner],
                          memory_order_release);
    dsc_comm_ring(spread->comm, owner);
}

double dsc_spread_seconds(struct dsc_spread *spread) {
    double seconds = spread->seconds;
    spread->seconds = 0;
    return seconds;
}
