/* The first meeting of the ranks of a node: who belongs, and whose memory is where.
 *
 * Decides: which processes may be ranks of one node, and what they show each other (memory, pidfd)
 * by way of shm_gather.c. Invariant: all map all, or nobody has a communicator. */
#include "shm.h"

#include "../alloc.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* ---- identity ---- */

enum dsc_status dsc_shm_node(char node[DSC_SHM_NODE_MAX]) {
    char boot[64] = "", net[64] = "";
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, boot, sizeof boot - 1);
    int error = errno;
    if (fd >= 0)
        (void)close(fd);
    if (n <= 0)
        return DSC_FAIL(DSC_EIO, "could not read the boot id of this machine: %s", strerror(error));
    boot[strcspn(boot, "\n")] = '\0';
    /* Abstract sockets belong to a network namespace: two containers of a machine may have two. */
    if (readlink("/proc/self/ns/net", net, sizeof net - 1) < 0)
        return DSC_FAIL(DSC_EIO, "could not read this process's network namespace: %s",
                        strerror(errno));
    snprintf(node, DSC_SHM_NODE_MAX, "%.36s/%u/%.40s", boot, (unsigned)geteuid(), net);
    return DSC_OK;
}

/* ---- memory of one rank ---- */

/* Makes and fills this rank's region; fds: memory, pidfd. The caller closes them. */
static enum dsc_status own_region(struct dsc__shm *shm, struct dsc__shm_message *fds) {
    void *memory = NULL;
    DSC_TRY(dsc__shm_memfd("deepspeed_c ranks", dsc__shm_region_size(shm->size), &fds->fds[0]));
    fds->n_fds = 1;
    int pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);
    if (pidfd < 0)
        return DSC_FAIL(DSC_EIO, "pidfd_open of this process: %s (Linux 5.3 or later is needed)",
                        strerror(errno));
    fds->fds[1] = pidfd;
    fds->n_fds = 2;
    DSC_TRY(dsc__shm_map(fds->fds[0], dsc__shm_region_size(shm->size), shm->rank, &memory));
    struct dsc__shm_region *region = shm->node->regions[shm->rank] = memory;
    region->pid = (int32_t)getpid();
    if (sched_getaffinity(0, sizeof region->cpus, &region->cpus) != 0)
        CPU_ZERO(&region->cpus); /* then nobody spins */
    return DSC_OK;
}

/* Maps a peer's region and keeps its pidfd. */
static enum dsc_status adopt_region(void *context, int rank, struct dsc__shm_message *message) {
    struct dsc__shm *shm = context;
    void *memory = NULL;
    enum dsc_status status =
        shm->node->regions[rank]
            ? DSC_FAIL(DSC_EDIVERGED, "rank %d was introduced twice", rank)
            : dsc__shm_map(message->fds[0], dsc__shm_region_size(shm->size), rank, &memory);
    if (status == DSC_OK) {
        shm->node->regions[rank] = memory;
        shm->node->pidfds[rank] = message->fds[1];
        message->n_fds = 1;
    }
    dsc__shm_close_fds(message);
    return status;
}

/* ---- opening ---- */

static enum dsc_status open_pidfds(struct dsc__shm_node *node) {
    void *array = NULL;
    DSC_TRY(dsc_alloc((size_t)node->size * sizeof *node->pidfds, &array));
    node->pidfds = array;
    for (int r = 0; r < node->size; r++)
        node->pidfds[r] = -1;
    return DSC_OK;
}

static enum dsc_status meet(struct dsc__shm *shm, const struct dsc_shm_listener *listener,
                            const char *address, const char *token) {
    struct dsc__shm_message own = dsc__shm_message_of(DSC__SHM_HELLO, shm->rank, shm->size);
    struct dsc__shm_gathering gathering = {.own = &own,
                                           .patience = {.options = shm->options,
                                                        .since = dsc_comm_now(),
                                                        .what = "gathering the ranks of a node"},
                                           .take = adopt_region,
                                           .context = shm};
    enum dsc_status status = own_region(shm, &own);
    if (status == DSC_OK)
        status = shm->rank == 0 ? dsc__shm_gather_as_leader(&gathering, listener)
                                : dsc__shm_gather_as_follower(&gathering, address, token);
    dsc__shm_close_fds(&own);
    return status;
}

enum dsc_status dsc_comm_open_shm(const struct dsc_comm_options *options,
                                  struct dsc_shm_listener *listener, const char *address,
                                  const char *token, int rank, int size, struct dsc_comm **out) {
    struct dsc_comm *comm = NULL;
    struct dsc__shm_node *node = NULL;
    DSC_TRY(dsc__shm_check_world(rank, size));
    if ((rank == 0) != (listener != NULL))
        return DSC_FAIL(DSC_EINVAL, "rank %d %s a listener; rank 0 alone has one", rank,
                        listener ? "brings" : "lacks");
    if (rank != 0 && (!address || !address[0] || !token || strlen(token) != DSC__SHM_TOKEN - 1))
        return DSC_FAIL(DSC_EINVAL,
                        "rank %d needs the address and the token that rank 0's "
                        "listener was given",
                        rank);
    DSC_TRY(dsc__shm_node_new(rank, size, &node));
    enum dsc_status status = open_pidfds(node);
    if (status == DSC_OK)
        status = dsc__comm_new(&dsc__shm_backend, options, rank, size, &comm);
    if (status == DSC_OK)
        status = dsc__shm_prepare(comm->state, rank, size, &comm->options, node);
    if (status == DSC_OK)
        status = meet(comm->state, listener, address, token);
    if (status == DSC_OK) {
        dsc__shm_use_world(comm->state);
        dsc_shm_listener_close(listener);
        *out = comm;
    } else {
        /* Those that hold this rank's memory already learn from it that it will not come. */
        if (node->regions[rank])
            atomic_store(&node->regions[rank]->blocks[0].left, 1);
        if (comm) {
            dsc__shm_release(comm->state);
            dsc__comm_delete(comm);
        }
    }
    dsc__shm_node_unref(node); /* the channel has its own reference */
    return status;
}
