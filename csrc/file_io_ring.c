/* io_uring moves the bytes. liburing is looked for when this is built, by its header, and opened
 * when a queue is, so that the extension loads where the library is missing. Invariant: as many
 * entries as requests, so that the ring is never full. */
#define _GNU_SOURCE
#include "file_io_impl.h"

#if __has_include(<liburing.h>)
#define HAS_LIBURING 1
#include <liburing.h>
#endif

#include "alloc.h"

#include <dlfcn.h>
#include <errno.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#ifdef HAS_LIBURING

/* What liburing does not have as inline functions. */
struct library {
    void *handle;
    int (*queue_init)(unsigned entries, struct io_uring *ring, unsigned flags);
    void (*queue_exit)(struct io_uring *ring);
    int (*submit)(struct io_uring *ring);
    int (*submit_and_wait)(struct io_uring *ring, unsigned n);
};

struct state {
    struct library library;
    struct io_uring ring;
};

static bool find(void *handle, const char *name, void *function, size_t n_bytes) {
    void *found = dlsym(handle, name);
    memcpy(function, &found, n_bytes);
    return found != NULL;
}

static enum dsc_status open_library(struct library *library) {
    library->handle = dlopen("liburing.so.2", RTLD_NOW | RTLD_LOCAL);
    if (!library->handle)
        return DSC_FAIL(DSC_ENOTYET, "liburing.so.2 is not there: %s", dlerror());
#define FIND(field) find(library->handle, "io_uring_" #field, &library->field, sizeof(void *))
    if (FIND(queue_init) && FIND(queue_exit) && FIND(submit) && FIND(submit_and_wait))
        return DSC_OK;
#undef FIND
    (void)dlclose(library->handle);
    return DSC_FAIL(DSC_ENOTYET, "liburing.so.2 lacks a function that is needed");
}

/* Kernels know reads and writes of plain buffers since they know this feature too. */
static enum dsc_status open_queue(struct dsc_io *io, struct state *state) {
    int error = state->library.queue_init((unsigned)io->options.queue_depth, &state->ring, 0);
    if (error < 0)
        return DSC_FAIL(DSC_ENOTYET, "the kernel gave no io_uring: %s", strerror(-error));
    if (state->ring.features & IORING_FEAT_RW_CUR_POS)
        return DSC_OK;
    state->library.queue_exit(&state->ring);
    return DSC_FAIL(DSC_ENOTYET, "the kernel's io_uring is too old");
}

static enum dsc_status open_ring(struct dsc_io *io) {
    struct state *state;
    DSC_TRY(dsc_alloc(sizeof *state, (void **)&state));
    enum dsc_status status = open_library(&state->library);
    if (status == DSC_OK && (status = open_queue(io, state)) != DSC_OK)
        (void)dlclose(state->library.handle);
    if (status != DSC_OK) {
        dsc_free(state);
        return status;
    }
    io->state = state;
    return DSC_OK;
}

static void close_ring(struct dsc_io *io) {
    struct state *state = io->state;
    if (io->pid == getpid()) { /* a child shares the ring's memory, and leaves it alone */
        state->library.queue_exit(&state->ring);
        (void)dlclose(state->library.handle);
    }
    dsc_free(state);
}

static void start_request(struct dsc_io *io, struct dsc__io_request *request) {
    struct state *state = io->state;
    const struct dsc_transfer *transfer = request->transfer;
    struct io_uring_sqe *entry = io_uring_get_sqe(&state->ring);
    if (!entry) { /* against the invariant above */
        dsc__io_ended(io, request, -ENOBUFS);
        return;
    }
    if (transfer->writes)
        io_uring_prep_write(entry, transfer->file->fd, request->data, (unsigned)request->n_bytes,
                            request->offset);
    else
        io_uring_prep_read(entry, transfer->file->fd, request->data, (unsigned)request->n_bytes,
                           request->offset);
    /* Through the page cache a request is a copy, which then runs beside this thread. */
    if (!transfer->file->direct)
        io_uring_sqe_set_flags(entry, IOSQE_ASYNC);
    io_uring_sqe_set_data(entry, request);
}

/* The kernel took nothing: what was to be submitted is taken back, and ends. */
static void take_back(struct dsc_io *io, long result) {
    struct io_uring_sq *sq = &((struct state *)io->state)->ring.sq;
    struct dsc__io_request *taken = NULL, *request;
    while (sq->sqe_tail != *sq->khead) {
        request = (void *)(uintptr_t)sq->sqes[--sq->sqe_tail & *sq->kring_mask].user_data;
        request->next = taken;
        taken = request;
    }
    *sq->ktail = sq->sqe_tail;
    while ((request = taken)) { /* what may be tried again gets a new entry */
        taken = request->next;
        dsc__io_ended(io, request, result);
    }
}

static void submit(struct dsc_io *io, bool waits) {
    const struct timespec a_moment = {.tv_nsec = 1000000};
    struct state *state = io->state;
    int n = waits ? state->library.submit_and_wait(&state->ring, 1)
                  : state->library.submit(&state->ring);
    if (n >= 0 || n == -EINTR)
        return;
    take_back(io, n);
    if (waits) /* also for what is under way, which may no longer be waited for */
        (void)nanosleep(&a_moment, NULL);
}

static void turn_ring(struct dsc_io *io, bool waits) {
    struct state *state = io->state;
    waits = waits && io_uring_cq_ready(&state->ring) == 0;
    if (waits || io_uring_sq_ready(&state->ring) > 0)
        submit(io, waits);
    while (io_uring_cq_ready(&state->ring) > 0) {
        unsigned head = *state->ring.cq.khead & *state->ring.cq.kring_mask;
        const struct io_uring_cqe *entry = &state->ring.cq.cqes[head];
        struct dsc__io_request *request = io_uring_cqe_get_data(entry);
        long result = entry->res;
        io_uring_cq_advance(&state->ring, 1);
        dsc__io_ended(io, request, result);
    }
}

#else

static enum dsc_status open_ring(struct dsc_io *io) {
    (void)io;
    return DSC_FAIL(DSC_ENOTYET, "this was built without liburing's header");
}
static void close_ring(struct dsc_io *io) {
    (void)io;
}
static void start_request(struct dsc_io *io, struct dsc__io_request *request) {
    (void)io;
    (void)request;
}
static void turn_ring(struct dsc_io *io, bool waits) {
    (void)io;
    (void)waits;
}

#endif

const struct dsc__io_mover dsc__io_ring = {
    .open = open_ring,
    .close = close_ring,
    .start = start_request,
    .turn = turn_ring,
};
