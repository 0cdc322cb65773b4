/* Memory that ranks share: memfds, their mapping, and the exchange that opens a window.
 *
 * Decides: how big memory comes and goes. A memfd has no name and no link to /dev/shm's size, and
 * ends with its last user. Invariant: a mapped memfd cannot shrink (sealed), so a peer cannot make
 * a read fault; descriptors are closed as soon as the mapping stands; mappings are not inherited by
 * forked children. */
#include "shm.h"

#include "../alloc.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SEALS = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL };

static enum dsc_status translate(int error, const char *what, size_t n_bytes) {
    enum dsc_status status = error == ENOMEM || error == ENOSPC ? DSC_ENOMEM : DSC_EIO;
    return DSC_FAIL(status, "%s of %zu bytes of shared memory: %s", what, n_bytes, strerror(error));
}

enum dsc_status dsc__shm_memfd(const char *name, size_t n_bytes, int *out) {
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return translate(errno, "creation", n_bytes);
    if (ftruncate(fd, (off_t)n_bytes) != 0 || fcntl(fd, F_ADD_SEALS, SEALS) != 0) {
        int error = errno;
        (void)close(fd);
        return translate(error, "sizing", n_bytes);
    }
    *out = fd;
    return DSC_OK;
}

enum dsc_status dsc__shm_map(int fd, size_t n_bytes, int owner, void **out) {
    struct stat info;
    int seals = fcntl(fd, F_GET_SEALS);
    if (fstat(fd, &info) != 0 || seals < 0 || !(seals & F_SEAL_SHRINK) ||
        (size_t)info.st_size != n_bytes)
        return DSC_FAIL(DSC_EDIVERGED,
                        "rank %d shared no sealed memory of %zu bytes; do all ranks run the same "
                        "deepspeed_c?",
                        owner, n_bytes);
    void *memory = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED)
        return translate(errno, "mapping", n_bytes);
    (void)madvise(memory, n_bytes, MADV_DONTFORK);
    *out = memory;
    return DSC_OK;
}

/* ---- windows ---- */

static size_t part_size(const struct dsc_window *window) {
    return dsc_round_up(window->n_bytes, DSC__SHM_PAGE);
}

void dsc__shm_window_close(void *state, struct dsc_window *window) {
    struct dsc__shm *shm = state;
    if (shm->node->world) {
        dsc__shm_threads_window_close(shm, window);
        return;
    }
    for (int r = 0; r < shm->size; r++)
        if (window->base[r])
            (void)munmap(window->base[r], part_size(window));
    dsc__alloc_count(-1, 0);
    dsc_free(window);
}

static enum dsc_status check_ranks(void *context) {
    struct dsc__shm *shm = context;
    /* A rank that has not come to the step after the exchange is one that is still needed. */
    struct dsc__shm_wait wait = {.kind = DSC__SHM_PHASE, .target = shm->phase + 1};
    return dsc__shm_check_ranks(shm, &wait);
}

static enum dsc_status map_part(struct dsc_window *window, int rank, int fd) {
    void *memory = NULL;
    DSC_TRY(dsc__shm_map(fd, part_size(window), rank, &memory));
    if (window->n_bytes >= 2 << 20)
        (void)madvise(memory, part_size(window), MADV_HUGEPAGE); /* advice only */
    window->base[rank] = memory;
    return DSC_OK;
}

/* The descriptor of a window's part from `peer`; rank 0 passes on the others'. */
static enum dsc_status receive_part(struct dsc__shm *shm, int peer,
                                    const struct dsc__shm_patience *patience,
                                    struct dsc__shm_message *out) {
    DSC_TRY(dsc__shm_receive(shm->node->sockets[peer], peer, patience, out));
    if (out->kind == DSC__SHM_WINDOW && out->number == shm->sequence && out->n_fds == 1 &&
        strcmp(out->text, shm->name) == 0 && out->rank >= 0 && out->rank < shm->size)
        return DSC_OK;
    dsc__shm_close_fds(out);
    return DSC_FAIL(DSC_EDIVERGED, "rank %d sent something else while opening a window", peer);
}

/* Rank 0: takes a part from each rank, maps it and passes it to all others. */
static enum dsc_status exchange_as_leader(struct dsc__shm *shm, struct dsc_window *window,
                                          const struct dsc__shm_patience *patience,
                                          struct dsc__shm_message *own) {
    enum dsc_status status = DSC_OK;
    for (int r = 0; r < shm->size && status == DSC_OK; r++) {
        struct dsc__shm_message message = *own;
        if (r != 0) {
            DSC_TRY(receive_part(shm, r, patience, &message));
            message.rank = r;
            status = map_part(window, r, message.fds[0]);
        }
        for (int to = 1; to < shm->size && status == DSC_OK; to++)
            if (to != r)
                status = dsc__shm_send(shm->node->sockets[to], to, patience, &message);
        if (r != 0)
            dsc__shm_close_fds(&message);
    }
    return status;
}

static enum dsc_status exchange_as_follower(struct dsc__shm *shm, struct dsc_window *window,
                                            const struct dsc__shm_patience *patience,
                                            struct dsc__shm_message *own) {
    DSC_TRY(dsc__shm_send(shm->node->sockets[0], 0, patience, own));
    for (int i = 0; i < shm->size - 1; i++) {
        struct dsc__shm_message message;
        DSC_TRY(receive_part(shm, 0, patience, &message));
        enum dsc_status status = message.rank == shm->rank || window->base[message.rank]
                                     ? DSC_FAIL(DSC_EDIVERGED, "a window's part came twice")
                                     : map_part(window, message.rank, message.fds[0]);
        dsc__shm_close_fds(&message);
        DSC_TRY(status);
    }
    return DSC_OK;
}

static enum dsc_status exchange(struct dsc__shm *shm, struct dsc_window *window) {
    struct dsc__shm_message own = dsc__shm_message_of(DSC__SHM_WINDOW, shm->rank, shm->size);
    struct dsc__shm_patience patience = {.options = shm->options,
                                         .since = dsc_comm_now(),
                                         .what = "opening a window",
                                         .check = check_ranks,
                                         .context = shm};
    own.number = shm->sequence;
    snprintf(own.text, sizeof own.text, "%s", shm->name);
    DSC_TRY(dsc__shm_memfd("deepspeed_c window", part_size(window), &own.fds[0]));
    own.n_fds = 1;
    enum dsc_status status = map_part(window, shm->rank, own.fds[0]);
    if (status == DSC_OK)
        status = shm->rank == 0 ? exchange_as_leader(shm, window, &patience, &own)
                                : exchange_as_follower(shm, window, &patience, &own);
    dsc__shm_close_fds(&own);
    return status;
}

enum dsc_status dsc__shm_window_open(void *state, size_t n_bytes, struct dsc_window **out) {
    struct dsc__shm *shm = state;
    void *block = NULL;
    bool is_whole = shm->size == shm->node->size;
    for (int r = 0; r < shm->size; r++)
        is_whole = is_whole && shm->members[r] == r;
    if (!is_whole)
        return DSC_FAIL(DSC_ENOTYET, "a window of a group (%s) of some of the node's ranks",
                        shm->name);
    if (shm->node->world)
        return dsc__shm_threads_window(shm, n_bytes, out);
    DSC_TRY(dsc_alloc(sizeof(struct dsc_window) + (size_t)shm->size * sizeof(char *), &block));
    struct dsc_window *window = block;
    window->n_bytes = n_bytes;
    /* A window costs what is touched, not its size: it counts as a block without bytes. */
    dsc__alloc_count(1, 0);
    enum dsc_status status = n_bytes > 0 ? exchange(shm, window) : DSC_OK;
    /* A rank that could not map its part tells so here, before anybody relies on the window. */
    if (status == DSC_OK)
        status = dsc__shm_step(shm);
    if (status != DSC_OK) {
        dsc__shm_window_close(shm, window);
        return status;
    }
    *out = window;
    return DSC_OK;
}
