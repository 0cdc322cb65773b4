/* A world of one: the same checks, numbers and arithmetic (a sum is +0.0 + x), nobody to wait for.
 * The template for further back ends. No thread of its own.
 *
 * Invariant: what a program gets here is what it gets from `shm` with one rank, bit for bit. */
#define _GNU_SOURCE
#include "backend.h"

#include "../alloc.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

struct self {
    atomic_uint bell;
    _Alignas(16) char payload[DSC_MEET_MAX];
};

static void close_self(void *state) {
    (void)state;
}

static void forked(void *state) {
    (void)state;
}

static enum dsc_status agree(void *state, const struct dsc__print *mine, const void *payload,
                             size_t n_payload) {
    struct self *self = state;
    (void)mine;
    if (n_payload > 0 && n_payload <= sizeof self->payload)
        memcpy(self->payload, payload, n_payload);
    return DSC_OK;
}

/* Never called: a world of one has nothing to compare. Kept so that no entry is NULL. */
static void print_of(void *state, int rank, struct dsc__print *out) {
    (void)state;
    (void)rank;
    memset(out, 0, sizeof *out);
}

static const void *payload_of(void *state, int rank) {
    (void)rank;
    return ((struct self *)state)->payload;
}

static enum dsc_status reduce(void *state, const struct dsc_coll *coll) {
    (void)state;
    dsc__reduce(coll->dst, &coll->src, 1, coll->n_elems, coll->dtype, coll->op,
                coll->n_elems * dsc_dtype_size(coll->dtype) >= DSC__STREAM_FROM);
    return DSC_OK;
}

static enum dsc_status all_gather(void *state, const struct dsc_coll *coll) {
    (void)state;
    if (coll->dst != coll->src)
        memcpy(coll->dst, coll->src, coll->n_elems * dsc_dtype_size(coll->dtype));
    return DSC_OK;
}

static enum dsc_status all_to_all_v(void *state, const struct dsc_coll *coll,
                                    const struct dsc__parts *parts) {
    (void)state;
    memcpy(coll->dst, coll->src, parts->n_send[0] * dsc_dtype_size(coll->dtype));
    return DSC_OK;
}

static enum dsc_status broadcast(void *state, const struct dsc_coll *coll) {
    (void)state;
    (void)coll;
    return DSC_OK;
}

static enum dsc_status window_open(void *state, size_t n_bytes, struct dsc_window **out) {
    void *block = NULL, *memory = NULL;
    (void)state;
    DSC_TRY(dsc_alloc(sizeof(struct dsc_window) + sizeof(char *), &block));
    if (n_bytes > 0) {
        memory = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) {
            dsc_free(block);
            return DSC_FAIL(DSC_ENOMEM, "window: could not map %zu bytes: %s", n_bytes,
                            strerror(errno));
        }
        (void)madvise(memory, n_bytes, MADV_DONTFORK);
        (void)madvise(memory, n_bytes, MADV_HUGEPAGE); /* advice only */
        dsc__alloc_count(1, (int64_t)n_bytes);
    }
    struct dsc_window *window = block;
    window->n_bytes = n_bytes;
    window->base[0] = memory;
    *out = window;
    return DSC_OK;
}

static void window_close(void *state, struct dsc_window *window) {
    (void)state;
    if (window->n_bytes > 0) {
        (void)munmap(window->base[0], window->n_bytes);
        dsc__alloc_count(-1, -(int64_t)window->n_bytes);
    }
    dsc_free(window);
}

static void release_kept(struct dsc_kept *kept) {
    (void)munmap(kept->base, kept->n_bytes);
    dsc__alloc_count(-1, 0);
}

/* Whoever keeps a part may touch little of it: from here on it counts as a block without bytes. */
static void window_keep(void *state, struct dsc_window *window, int rank, struct dsc_kept *out) {
    (void)state;
    (void)rank;
    *out = (struct dsc_kept){window->base[0], window->n_bytes, NULL, release_kept};
    dsc__alloc_count(0, -(int64_t)window->n_bytes);
    dsc_free(window);
}

static void ring(void *state, int rank) {
    (void)rank;
    atomic_fetch_add(&((struct self *)state)->bell, 1);
}

static uint32_t bell(void *state) {
    return atomic_load(&((struct self *)state)->bell);
}

/* comm.c refuses a wait that could not end. */
static enum dsc_status wait_bell(void *state, uint32_t seen, const char *label, double since) {
    (void)state;
    (void)seen;
    (void)label;
    (void)since;
    return DSC_OK;
}

static void give_up(void *state, enum dsc_status status, const char *reason) {
    (void)state;
    (void)status;
    (void)reason;
}

static void leave(void *state) {
    (void)state;
}

static const struct dsc_comm_backend self_backend = {
    .name = "self",
    .state_size = sizeof(struct self),
    .close = close_self,
    .forked = forked,
    .agree = agree,
    .print_of = print_of,
    .payload_of = payload_of,
    .all_reduce = reduce,
    .reduce_scatter = reduce,
    .all_gather = all_gather,
    .broadcast = broadcast,
    .reduce = reduce,
    .gather = all_gather,
    .scatter = all_gather,
    .all_to_all = all_gather,
    .all_to_all_v = all_to_all_v,
    .window_open = window_open,
    .window_close = window_close,
    .window_keep = window_keep,
    .ring = ring,
    .bell = bell,
    .wait_bell = wait_bell,
    .give_up = give_up,
    .leave = leave,
};

enum dsc_status dsc_comm_open_self(const struct dsc_comm_options *options, struct dsc_comm **out) {
    return dsc__comm_new(&self_backend, options, 0, 1, out);
}
