/* Memory that ranks share: memfds, their mapping, and windows.
 *
 * Decides: how big memory comes and goes. A memfd has no name and no link to /dev/shm's size, and
 * ends with its last user. Invariant: a mapped memfd cannot shrink (sealed), so a peer cannot make
 * a read fault; descriptors are closed as soon as the mapping stands; mappings are not inherited by
 * forked children. */
#include "shm.h"

#include "../alloc.h"

#include <errno.h>
#include <fcntl.h>
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

static void release_kept(struct dsc_kept *kept) {
    (void)munmap(kept->base, dsc_round_up(kept->n_bytes, DSC__SHM_PAGE));
    dsc__alloc_count(-1, 0);
}

void dsc__shm_window_keep(void *state, struct dsc_window *window, int rank, struct dsc_kept *out) {
    struct dsc__shm *shm = state;
    if (shm->node->world) {
        dsc__shm_threads_window_keep(shm, window, rank, out);
        return;
    }
    *out = (struct dsc_kept){window->base[rank], window->n_bytes, NULL, release_kept};
    dsc__alloc_count(1, 0);
    window->base[rank] = NULL;
    dsc__shm_window_close(shm, window);
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

static enum dsc_status take_part(void *context, int rank, struct dsc__shm_message *message) {
    struct dsc_window *window = context;
    enum dsc_status status = window->base[rank]
                                 ? DSC_FAIL(DSC_EDIVERGED, "a window's part came twice")
                                 : map_part(window, rank, message->fds[0]);
    dsc__shm_close_fds(message);
    return status;
}

/* Where rank 0 of the window's ranks listens: told through its block, which only ranks can read. */
struct invitation {
    char address[DSC_SHM_ADDRESS_MAX], token[DSC__SHM_TOKEN];
};

static enum dsc_status invite(struct dsc__shm *shm, struct dsc_shm_listener **listener) {
    struct invitation text;
    if (shm->rank == 0) {
        DSC_TRY(dsc_shm_listen(listener, text.address, text.token));
        memcpy(shm->blocks[0]->small[shm->sequence & 1], &text, sizeof text);
    }
    return dsc__shm_step(shm, 1);
}

static enum dsc_status gather_parts(struct dsc__shm *shm, struct dsc_window *window,
                                    const struct dsc_shm_listener *listener,
                                    struct dsc__shm_message *own) {
    struct dsc__shm_gathering gathering = {.own = own,
                                           .patience = {.options = shm->options,
                                                        .since = dsc_comm_now(),
                                                        .what = "opening a window",
                                                        .check = check_ranks,
                                                        .context = shm},
                                           .take = take_part,
                                           .context = window};
    struct invitation text;
    DSC_TRY(map_part(window, shm->rank, own->fds[0]));
    if (shm->rank == 0)
        return dsc__shm_gather_as_leader(&gathering, listener);
    memcpy(&text, shm->blocks[0]->small[shm->sequence & 1], sizeof text);
    return dsc__shm_gather_as_follower(&gathering, text.address, text.token);
}

static enum dsc_status exchange(struct dsc__shm *shm, struct dsc_window *window) {
    struct dsc_shm_listener *listener = NULL;
    struct dsc__shm_message own = dsc__shm_message_of(DSC__SHM_WINDOW, shm->rank, shm->size);
    own.number = shm->sequence;
    enum dsc_status status = invite(shm, &listener);
    if (status == DSC_OK)
        status = dsc__shm_memfd("deepspeed_c window", part_size(window), &own.fds[0]);
    if (status == DSC_OK) {
        own.n_fds = 1;
        status = gather_parts(shm, window, listener, &own);
    }
    dsc__shm_close_fds(&own);
    dsc_shm_listener_close(listener);
    return status;
}

enum dsc_status dsc__shm_window_open(void *state, size_t n_bytes, struct dsc_window **out) {
    struct dsc__shm *shm = state;
    void *block = NULL;
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
        status = dsc__shm_step(shm, 1);
    if (status != DSC_OK) {
        dsc__shm_window_close(shm, window);
        return status;
    }
    *out = window;
    return DSC_OK;
}
