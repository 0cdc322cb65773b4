/* The front of every communicator: what is checked, numbered, compared and remembered.
 *
 * Invariant: an operation first passes all argument checks (a failure there changes nothing and
 * uses no number), then agrees on its fingerprint with every rank, then moves data; a failure from
 * agreement on breaks the communicator, tells the other ranks, and is what every later call
 * returns. */
#define _GNU_SOURCE
#include "backend.h"

#include "../alloc.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

double dsc_comm_now(void) {
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- life ---- */

enum dsc_status dsc__comm_new(const struct dsc_comm_backend *backend,
                              const struct dsc_comm_options *options, int rank, int size,
                              struct dsc_comm **out) {
    void *block = NULL, *state = NULL;
    enum dsc_status status;
    DSC_TRY(dsc_alloc(sizeof(struct dsc_comm), &block));
    if ((status = dsc_alloc(backend->state_size, &state)) != DSC_OK) {
        dsc_free(block);
        return status;
    }
    struct dsc_comm *comm = block;
    comm->backend = backend;
    comm->state = state;
    if (options)
        comm->given = *options;
    comm->options = comm->given;
    comm->options.interrupted = dsc__interrupted;
    comm->options.interrupt_context = comm;
    comm->rank = rank;
    comm->size = size;
    atomic_flag_clear(&comm->busy);
    if ((status = dsc__fork_register(comm)) != DSC_OK) {
        dsc_free(state);
        dsc_free(block);
        return status;
    }
    *out = comm;
    return DSC_OK;
}

void dsc__comm_delete(struct dsc_comm *comm) {
    dsc__fork_forget(comm);
    dsc_free(comm->state);
    dsc_free(comm);
}

static void close_queues(struct dsc_comm *comm) {
    dsc__queue_close(comm->works);
    dsc__queue_close(comm->messages);
    comm->works = comm->messages = NULL;
}

/* A thread of the caller's that waits inside a delegate is in code that does not bear a thread's
 * end, as the end of an interpreter brings it; so its wait is interrupted, and comes to its end. */
static void end_waits(struct dsc_comm *comm) {
    enum { PATIENCE_MS = 1000 };
    const struct timespec pause = {.tv_nsec = 1000000};
    bool is_busy = true;
    atomic_store(&comm->halting, true);
    for (int i = 0; i < PATIENCE_MS && is_busy; i++) {
        is_busy = atomic_flag_test_and_set_explicit(&comm->busy, memory_order_acquire);
        if (is_busy)
            (void)nanosleep(&pause, NULL);
    }
    if (!is_busy)
        atomic_flag_clear_explicit(&comm->busy, memory_order_release);
    atomic_store(&comm->halting, false);
}

void dsc_comm_halt(struct dsc_comm *comm) {
    if (!comm || atomic_load(&comm->forked))
        return;
    comm->silent = true;
    close_queues(comm);
    if (comm->backend->halt)
        comm->backend->halt(comm->state);
    if (comm->backend->agrees_by_message)
        end_waits(comm);
}

void dsc_comm_close(struct dsc_comm *comm) {
    if (!comm || atomic_load(&comm->forked))
        return;
    close_queues(comm);
    comm->backend->close(comm->state);
    dsc__comm_delete(comm);
}

int dsc_comm_rank(const struct dsc_comm *comm) {
    return comm->rank;
}

int dsc_comm_size(const struct dsc_comm *comm) {
    return comm->size;
}

const char *dsc_comm_backend(const struct dsc_comm *comm) {
    return comm->backend->name;
}

/* ---- one call at a time, none after a failure, none in a forked child ---- */

enum dsc_status dsc__check_usable(const struct dsc_comm *comm) {
    if (atomic_load_explicit(&comm->forked, memory_order_relaxed))
        return DSC_FAIL(DSC_ESTATE, "a forked child cannot use its parent's communicator: only the "
                                    "process that opened it is a rank");
    if (comm->broken != DSC_OK)
        return DSC_FAIL(comm->broken, "%s", comm->reason);
    return DSC_OK;
}

enum dsc_status dsc__enter(struct dsc_comm *comm) {
    DSC_TRY(dsc__check_usable(comm));
    if (comm->works)
        DSC_TRY(dsc__drain(comm));
    if (atomic_flag_test_and_set_explicit(&comm->busy, memory_order_acquire))
        return DSC_FAIL(DSC_ESTATE, "an operation of this communicator is already running in "
                                    "another thread");
    return DSC_OK;
}

/* Ends what enter began. A failure breaks the communicator and is told to the others. */
enum dsc_status dsc__leave(struct dsc_comm *comm, enum dsc_status status) {
    if (status == DSC_EINTR && dsc__on_own_thread(comm))
        status = dsc__fail_closed();
    if (status != DSC_OK) {
        snprintf(comm->reason, sizeof comm->reason, "%s", dsc_last_error());
        comm->broken = status;
        if (!comm->silent)
            comm->backend->give_up(comm->state, status, comm->reason);
    }
    atomic_flag_clear_explicit(&comm->busy, memory_order_release);
    return status;
}

/* May come while an operation runs in another thread: that one then fails, and writes the reason.
 */
void dsc_comm_abort(struct dsc_comm *comm, const char *reason) {
    if (!comm || atomic_load(&comm->forked))
        return;
    if (!reason)
        reason = "no reason given";
    if (!atomic_flag_test_and_set_explicit(&comm->busy, memory_order_acquire)) {
        if (comm->broken == DSC_OK) {
            snprintf(comm->reason, sizeof comm->reason, "rank %d (this one) gave up: %s",
                     comm->rank, reason);
            comm->broken = DSC_EDEAD;
        }
        atomic_flag_clear_explicit(&comm->busy, memory_order_release);
    }
    comm->backend->give_up(comm->state, DSC_EDEAD, reason);
}

void dsc_comm_leave(struct dsc_comm *comm) {
    if (!comm || atomic_load(&comm->forked))
        return;
    close_queues(comm);
    if (!atomic_flag_test_and_set_explicit(&comm->busy, memory_order_acquire)) {
        if (comm->broken == DSC_OK) {
            snprintf(comm->reason, sizeof comm->reason,
                     "rank %d (this one) closed the communicator", comm->rank);
            comm->broken = DSC_ESTATE;
        }
        atomic_flag_clear_explicit(&comm->busy, memory_order_release);
    }
    comm->backend->leave(comm->state);
}

/* ---- argument checks ---- */

static enum dsc_status check_buffer(const char *call, const char *what, const void *p, size_t n,
                                    size_t n_ranks, enum dsc_dtype dtype) {
    size_t size = dsc_dtype_size(dtype);
    if (n > PTRDIFF_MAX / size / n_ranks)
        return DSC_FAIL(DSC_EINVAL, "%s: %zu elements of %s for %zu ranks exceed the address space",
                        call, n, dsc_dtype_name(dtype), n_ranks);
    if (n > 0 && !p)
        return DSC_FAIL(DSC_EINVAL, "%s: %s is NULL, %zu elements expected", call, what, n);
    if ((uintptr_t)p % size != 0)
        return DSC_FAIL(DSC_EINVAL, "%s: %s is not aligned to its elements (%s needs %zu bytes)",
                        call, what, dsc_dtype_name(dtype), size);
    return DSC_OK;
}

static enum dsc_status check_dtype(const char *call, enum dsc_dtype dtype) {
    if ((unsigned)dtype >= DSC_DTYPE_COUNT)
        return DSC_FAIL(DSC_EINVAL, "%s: %d is no element type", call, (int)dtype);
    return DSC_OK;
}

static enum dsc_status check_reduction(const char *call, const struct dsc_coll *coll) {
    if (coll->dtype == DSC_U8)
        return DSC_FAIL(DSC_ETYPE, "%s: bytes cannot be combined, only moved", call);
    if ((unsigned)coll->op >= DSC_OP_COUNT)
        return DSC_FAIL(DSC_EINVAL, "%s: %d is no reduction; sum, avg, min, max, prod are", call,
                        (int)coll->op);
    if (coll->op == DSC_AVG && (coll->dtype == DSC_I32 || coll->dtype == DSC_I64))
        return DSC_FAIL(DSC_EINVAL,
                        "%s: avg of %s has no exact result; use sum and divide, or a float type",
                        call, dsc_dtype_name(coll->dtype));
    return DSC_OK;
}

static enum dsc_status check_root(const struct dsc_comm *comm, const char *call, int root) {
    if (root < 0 || root >= comm->size)
        return DSC_FAIL(DSC_EINVAL, "%s: root is %d; a rank of 0 to %d is allowed", call, root,
                        comm->size - 1);
    return DSC_OK;
}

/* Two buffers may be apart, or `inner` exactly at the place named by `allowed`. */
static enum dsc_status check_overlap(const char *call, const char *inner, size_t n_inner,
                                     const char *outer, size_t n_outer, const char *allowed,
                                     const char *remedy) {
    uintptr_t a = (uintptr_t)inner, b = (uintptr_t)outer;
    if (n_inner == 0 || inner == allowed || a + n_inner <= b || b + n_outer <= a)
        return DSC_OK;
    return DSC_FAIL(DSC_EINVAL, "%s: the two buffers overlap; %s", call, remedy);
}

enum dsc_status dsc__check_pair(const struct dsc_comm *comm, const char *call,
                                const struct dsc_coll *coll, size_t n_src, size_t n_dst) {
    size_t size = dsc_dtype_size(coll->dtype);
    DSC_TRY(dsc__check_usable(comm));
    DSC_TRY(check_dtype(call, coll->dtype));
    DSC_TRY(check_buffer(call, n_dst > 0 ? "src" : "data", coll->src, n_src, 1, coll->dtype));
    DSC_TRY(check_buffer(call, "dst", coll->dst, n_dst, 1, coll->dtype));
    return check_overlap(call, coll->src, n_src * size, coll->dst, n_dst * size, NULL,
                         "two buffers apart from each other are needed");
}

/* ---- agreement ---- */

struct dsc__print dsc__print_of(const struct dsc_comm *comm, enum dsc_comm_op op,
                                const char *label) {
    struct dsc__print print;
    memset(&print, 0, sizeof print);
    print.op = op;
    print.size = (uint32_t)comm->size;
    for (size_t i = 0; label && label[i] && i < DSC__LABEL_MAX - 1; i++)
        print.label[i] = label[i];
    return print;
}

enum dsc_status dsc__agree(struct dsc_comm *comm, struct dsc__print *mine, const void *payload,
                           size_t n_payload) {
    mine->sequence = ++comm->sequence;
    if (comm->backend->agrees_by_message && mine->op != DSC_COMM_MEET &&
        !dsc__on_own_thread(comm) && comm->covered)
        return DSC_OK;
    DSC_TRY(comm->backend->agree(comm->state, mine, payload, n_payload));
    return dsc__print_compare(comm, mine);
}

typedef enum dsc_status (*move_fn)(void *state, const struct dsc_coll *coll);

/* Agreement, then data: the body of the collectives with equal parts. */
static enum dsc_status run(struct dsc_comm *comm, const struct dsc_coll *coll, enum dsc_comm_op op,
                           const void *payload, size_t n_payload, move_fn move) {
    struct dsc__print mine = dsc__print_of(comm, op, coll->label);
    mine.n_elems = coll->n_elems;
    mine.dtype = coll->dtype;
    if (op == DSC_COMM_ALL_REDUCE || op == DSC_COMM_REDUCE_SCATTER || op == DSC_COMM_REDUCE)
        mine.reduce = coll->op;
    if (op == DSC_COMM_BROADCAST || op == DSC_COMM_REDUCE || op == DSC_COMM_GATHER ||
        op == DSC_COMM_SCATTER)
        mine.root = (uint32_t)coll->root;

    DSC_TRY(dsc__enter(comm));
    enum dsc_status status = dsc__agree(comm, &mine, payload, n_payload);
    if (status == DSC_OK && coll->n_elems > 0)
        status = move(comm->state, coll);
    return dsc__leave(comm, status);
}

enum dsc_status dsc_comm_all_reduce(struct dsc_comm *comm, const struct dsc_coll *coll) {
    DSC_TRY(dsc__check_usable(comm));
    DSC_TRY(check_dtype("all_reduce", coll->dtype));
    DSC_TRY(check_reduction("all_reduce", coll));
    DSC_TRY(check_buffer("all_reduce", "src", coll->src, coll->n_elems, 1, coll->dtype));
    DSC_TRY(check_buffer("all_reduce", "dst", coll->dst, coll->n_elems, 1, coll->dtype));
    size_t n_bytes = coll->n_elems * dsc_dtype_size(coll->dtype);
    DSC_TRY(check_overlap("all_reduce", coll->src, n_bytes, coll->dst, n_bytes, coll->dst,
                          "pass the same buffer twice to reduce in place"));
    return run(comm, coll, DSC_COMM_ALL_REDUCE, coll->src, n_bytes, comm->backend->all_reduce);
}

enum dsc_status dsc_comm_reduce_scatter(struct dsc_comm *comm, const struct dsc_coll *coll) {
    size_t n_ranks = (size_t)comm->size;
    DSC_TRY(dsc__check_usable(comm));
    DSC_TRY(check_dtype("reduce_scatter", coll->dtype));
    DSC_TRY(check_reduction("reduce_scatter", coll));
    DSC_TRY(check_buffer("reduce_scatter", "src", coll->src, coll->n_elems, n_ranks, coll->dtype));
    DSC_TRY(check_buffer("reduce_scatter", "dst", coll->dst, coll->n_elems, 1, coll->dtype));
    size_t n_bytes = coll->n_elems * dsc_dtype_size(coll->dtype);
    const char *src = coll->src, *own = src ? src + (size_t)comm->rank * n_bytes : NULL;
    DSC_TRY(check_overlap("reduce_scatter", coll->dst, n_bytes, src, n_bytes * n_ranks, own,
                          "only the rank's own part of the input may also be the output"));
    return run(comm, coll, DSC_COMM_REDUCE_SCATTER, coll->src, n_bytes * n_ranks,
               comm->backend->reduce_scatter);
}

enum dsc_status dsc_comm_all_gather(struct dsc_comm *comm, const struct dsc_coll *coll) {
    size_t n_ranks = (size_t)comm->size;
    DSC_TRY(dsc__check_usable(comm));
    DSC_TRY(check_dtype("all_gather", coll->dtype));
    DSC_TRY(check_buffer("all_gather", "src", coll->src, coll->n_elems, 1, coll->dtype));
    DSC_TRY(check_buffer("all_gather", "dst", coll->dst, coll->n_elems, n_ranks, coll->dtype));
    size_t n_bytes = coll->n_elems * dsc_dtype_size(coll->dtype);
    const char *dst = coll->dst, *own = dst ? dst + (size_t)comm->rank * n_bytes : NULL;
    DSC_TRY(check_overlap("all_gather", coll->src, n_bytes, dst, n_bytes * n_ranks, own,
                          "only the rank's own part of the output may also be the input"));
    return run(comm, coll, DSC_COMM_ALL_GATHER, coll->src, n_bytes, comm->backend->all_gather);
}

enum dsc_status dsc_comm_broadcast(struct dsc_comm *comm, const struct dsc_coll *coll) {
    DSC_TRY(dsc__check_usable(comm));
    DSC_TRY(check_dtype("broadcast", coll->dtype));
    DSC_TRY(check_root(comm, "broadcast", coll->root));
    DSC_TRY(check_buffer("broadcast", "dst", coll->dst, coll->n_elems, 1, coll->dtype));
    size_t n_bytes = coll->n_elems * dsc_dtype_size(coll->dtype);
    return run(comm, coll, DSC_COMM_BROADCAST, coll->dst, comm->rank == coll->root ? n_bytes : 0,
               comm->backend->broadcast);
}

enum dsc_status dsc_comm_reduce(struct dsc_comm *comm, const struct dsc_coll *coll) {
    DSC_TRY(dsc__check_usable(comm));
    DSC_TRY(check_dtype("reduce", coll->dtype));
    DSC_TRY(check_reduction("reduce", coll));
    DSC_TRY(check_root(comm, "reduce", coll->root));
    DSC_TRY(check_buffer("reduce", "src", coll->src, coll->n_elems, 1, coll->dtype));
    size_t n_bytes = coll->n_elems * dsc_dtype_size(coll->dtype);
    if (comm->rank == coll->root) {
        DSC_TRY(check_buffer("reduce", "dst", coll->dst, coll->n_elems, 1, coll->dtype));
        DSC_TRY(check_overlap("reduce", coll->src, n_bytes, coll->dst, n_bytes, coll->dst,
                              "pass the same buffer twice to reduce in place"));
    }
    return run(comm, coll, DSC_COMM_REDUCE, coll->src, n_bytes, comm->backend->reduce);
}

enum dsc_status dsc_comm_gather(struct dsc_comm *comm, const struct dsc_coll *coll) {
    size_t n_ranks = (size_t)comm->size;
    DSC_TRY(dsc__check_usable(comm));
    DSC_TRY(check_dtype("gather", coll->dtype));
    DSC_TRY(check_root(comm, "gather", coll->root));
    DSC_TRY(check_buffer("gather", "src", coll->src, coll->n_elems, 1, coll->dtype));
    size_t n_bytes = coll->n_elems * dsc_dtype_size(coll->dtype);
    if (comm->rank == coll->root) {
        DSC_TRY(check_buffer("gather", "dst", coll->dst, coll->n_elems, n_ranks, coll->dtype));
        const char *dst = coll->dst, *own = dst ? dst + (size_t)comm->rank * n_bytes : NULL;
        DSC_TRY(check_overlap("gather", coll->src, n_bytes, dst, n_bytes * n_ranks, own,
                              "only the root's own part of the output may also be its input"));
    }
    return run(comm, coll, DSC_COMM_GATHER, coll->src, n_bytes, comm->backend->gather);
}

enum dsc_status dsc_comm_scatter(struct dsc_comm *comm, const struct dsc_coll *coll) {
    size_t n_ranks = (size_t)comm->size, n_payload = 0;
    DSC_TRY(dsc__check_usable(comm));
    DSC_TRY(check_dtype("scatter", coll->dtype));
    DSC_TRY(check_root(comm, "scatter", coll->root));
    DSC_TRY(check_buffer("scatter", "dst", coll->dst, coll->n_elems, 1, coll->dtype));
    size_t n_bytes = coll->n_elems * dsc_dtype_size(coll->dtype);
    if (comm->rank == coll->root) {
        DSC_TRY(check_buffer("scatter", "src", coll->src, coll->n_elems, n_ranks, coll->dtype));
        const char *src = coll->src, *own = src ? src + (size_t)comm->rank * n_bytes : NULL;
        DSC_TRY(check_overlap("scatter", coll->dst, n_bytes, src, n_bytes * n_ranks, own,
                              "only the root's own part of the input may also be its output"));
        n_payload = n_bytes * n_ranks;
    }
    return run(comm, coll, DSC_COMM_SCATTER, coll->src, n_payload, comm->backend->scatter);
}

enum dsc_status dsc_comm_all_to_all(struct dsc_comm *comm, const struct dsc_coll *coll) {
    size_t n_ranks = (size_t)comm->size;
    DSC_TRY(dsc__check_usable(comm));
    DSC_TRY(check_dtype("all_to_all", coll->dtype));
    DSC_TRY(check_buffer("all_to_all", "src", coll->src, coll->n_elems, n_ranks, coll->dtype));
    DSC_TRY(check_buffer("all_to_all", "dst", coll->dst, coll->n_elems, n_ranks, coll->dtype));
    size_t n_bytes = coll->n_elems * n_ranks * dsc_dtype_size(coll->dtype);
    DSC_TRY(check_overlap("all_to_all", coll->src, n_bytes, coll->dst, n_bytes, NULL,
                          "two buffers apart from each other are needed"));
    return run(comm, coll, DSC_COMM_ALL_TO_ALL, coll->src, n_bytes, comm->backend->all_to_all);
}

enum dsc_status dsc_comm_barrier(struct dsc_comm *comm, const char *label) {
    struct dsc__print mine = dsc__print_of(comm, DSC_COMM_BARRIER, label);
    DSC_TRY(dsc__enter(comm));
    return dsc__leave(comm, dsc__agree(comm, &mine, NULL, 0));
}

enum dsc_status dsc_comm_meet(struct dsc_comm *comm, const char *label, uint64_t tag,
                              const void *mine, size_t n_bytes, void *all) {
    DSC_TRY(dsc__check_usable(comm));
    if (n_bytes > DSC_MEET_MAX)
        return DSC_FAIL(DSC_EINVAL, "meet: %zu bytes; at most %d are allowed", n_bytes,
                        (int)DSC_MEET_MAX);
    if (n_bytes > 0 && (!mine || !all))
        return DSC_FAIL(DSC_EINVAL, "meet: %s is NULL", mine ? "all" : "mine");
    struct dsc__print print = dsc__print_of(comm, DSC_COMM_MEET, label);
    print.tag = tag;
    print.n_elems = n_bytes;

    DSC_TRY(dsc__enter(comm));
    enum dsc_status status = dsc__agree(comm, &print, mine, n_bytes);
    for (int r = 0; status == DSC_OK && n_bytes > 0 && r < comm->size; r++)
        memcpy((char *)all + (size_t)r * n_bytes, comm->backend->payload_of(comm->state, r),
               n_bytes);
    return dsc__leave(comm, status);
}

/* ---- groups ---- */

static enum dsc_status check_group(const struct dsc_comm *parent, const int *ranks, int n_ranks,
                                   const char *name, struct dsc__group *group) {
    group->rank = -1;
    if (n_ranks < 1 || n_ranks > parent->size || !name || !name[0])
        return DSC_FAIL(DSC_EINVAL, "group: %d ranks of %d, and a name, are expected", n_ranks,
                        parent->size);
    for (int i = 0; i < n_ranks; i++) {
        if (ranks[i] < 0 || ranks[i] >= parent->size)
            return DSC_FAIL(DSC_EINVAL, "group \"%s\": rank %d; 0 to %d are allowed", name,
                            ranks[i], parent->size - 1);
        for (int k = 0; k < i; k++)
            if (ranks[k] == ranks[i])
                return DSC_FAIL(DSC_EINVAL, "group \"%s\": rank %d twice", name, ranks[i]);
        if (ranks[i] == parent->rank)
            group->rank = i;
    }
    if (group->rank < 0)
        return DSC_FAIL(DSC_EINVAL, "group \"%s\": this rank (%d) is not a member", name,
                        parent->rank);
    return DSC_OK;
}

/* A group ends its opening with an agreement on who belongs. */
enum dsc_status dsc_comm_open_group(struct dsc_comm *parent, const struct dsc_comm_options *options,
                                    const int *ranks, int n_ranks, const char *name,
                                    struct dsc_comm **out) {
    struct dsc__group group = {.options = options ? options : &parent->given,
                               .ranks = ranks,
                               .size = n_ranks,
                               .name = name};
    struct dsc_comm *comm = NULL;
    DSC_TRY(dsc__check_usable(parent));
    DSC_TRY(check_group(parent, ranks, n_ranks, name, &group));
    group.key = dsc_hash(DSC_HASH_START, name, strlen(name)) | 1;
    if (n_ranks == 1)
        return dsc_comm_open_self(group.options, out);
    if (!parent->backend->open_group)
        return DSC_FAIL(DSC_ENOTYET, "group \"%s\": \"%s\" opens no groups", name,
                        parent->backend->name);
    DSC_TRY(parent->backend->open_group(parent->state, &group, &comm));
    enum dsc_status status =
        dsc_comm_meet(comm, name, dsc_hash(DSC_HASH_START, ranks, (size_t)n_ranks * sizeof *ranks),
                      NULL, 0, NULL);
    if (status != DSC_OK) {
        dsc_comm_close(comm);
        return status;
    }
    if (comm->backend->opened)
        comm->backend->opened(comm->state);
    *out = comm;
    return DSC_OK;
}

/* ---- windows and bells ---- */

enum dsc_status dsc_comm_window_open(struct dsc_comm *comm, size_t n_bytes, const char *label,
                                     struct dsc_window **out) {
    DSC_TRY(dsc__check_usable(comm));
    if (!dsc_comm_has_windows(comm))
        return DSC_FAIL(DSC_ENOTYET, "window: ranks of \"%s\" share no memory",
                        comm->backend->name);
    if (n_bytes > PTRDIFF_MAX / 2)
        return DSC_FAIL(DSC_EINVAL, "window: %zu bytes exceed the address space", n_bytes);
    struct dsc__print mine = dsc__print_of(comm, DSC_COMM_WINDOW, label);
    mine.n_elems = n_bytes;

    DSC_TRY(dsc__enter(comm));
    enum dsc_status status = dsc__agree(comm, &mine, NULL, 0);
    if (status == DSC_OK)
        status = comm->backend->window_open(comm->state, n_bytes, out);
    return dsc__leave(comm, status);
}

void dsc_comm_window_close(struct dsc_comm *comm, struct dsc_window *window) {
    if (comm && window && !atomic_load(&comm->forked))
        comm->backend->window_close(comm->state, window);
}

void dsc_comm_window_keep(struct dsc_comm *comm, struct dsc_window *window, int rank,
                          struct dsc_kept *out) {
    comm->backend->window_keep(comm->state, window, rank, out);
    (void)madvise(out->base, out->n_bytes, MADV_DOFORK);
}

bool dsc_comm_has_windows(const struct dsc_comm *comm) {
    return comm->backend->window_open != NULL;
}

bool dsc_comm_cover(struct dsc_comm *comm, bool covered) {
    bool before = comm->covered;
    comm->covered = covered;
    return before;
}

void dsc_comm_ring(struct dsc_comm *comm, int rank) {
    if (rank >= 0 && rank < comm->size &&
        !atomic_load_explicit(&comm->forked, memory_order_relaxed))
        comm->backend->ring(comm->state, rank);
}

void dsc_comm_ring_others(struct dsc_comm *comm) {
    for (int r = 0; r < comm->size; r++)
        if (r != comm->rank)
            dsc_comm_ring(comm, r);
}

uint32_t dsc_comm_bell(struct dsc_comm *comm) {
    if (atomic_load_explicit(&comm->forked, memory_order_relaxed))
        return 0;
    return comm->backend->bell(comm->state);
}

enum dsc_status dsc_comm_wait_bell(struct dsc_comm *comm, uint32_t seen, const char *label,
                                   double since) {
    DSC_TRY(dsc__enter(comm));
    if (comm->size == 1 && comm->backend->bell(comm->state) == seen) {
        atomic_flag_clear_explicit(&comm->busy, memory_order_release);
        return DSC_FAIL(DSC_ESTATE, "the only rank waits for itself in %s: nobody can ring",
                        label ? label : "a bell wait");
    }
    return dsc__leave(
        comm, comm->backend->wait_bell(comm->state, seen, label ? label : "a bell wait", since));
}
