/* The first meeting of the ranks of a node: who belongs, and whose memory is where.
 *
 * Decides: rank 0 listens on an abstract Unix socket with a random name; every other rank connects
 * and sends a hello (token, rank, its memory, its pidfd); rank 0 sends each rank everybody else's;
 * all map all. Invariant: only a process of this user that knows the token becomes a rank. Whoever
 * does not (another user, garbage, a wrong token, silence) is dropped and changes nothing; a bearer
 * of the token that contradicts (another world size, a rank taken twice) ends the rendezvous for
 * all, with a reason. */
#include "shm.h"

#include "../alloc.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

enum { TOKEN_BYTES = 16, TOKEN_TEXT = 2 * TOKEN_BYTES + 1, BACKLOG = 4096, GUESTS_MAX = 64 };

struct dsc_shm_listener {
    int socket;
    char address[DSC_SHM_ADDRESS_MAX];
    char token[TOKEN_TEXT];
};

/* ---- identity, names ---- */

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

static enum dsc_status random_text(char text[TOKEN_TEXT]) {
    unsigned char bytes[TOKEN_BYTES];
    if (getrandom(bytes, sizeof bytes, 0) != (ssize_t)sizeof bytes)
        return DSC_FAIL(DSC_EIO, "no random bytes for a token: %s", strerror(errno));
    for (int i = 0; i < TOKEN_BYTES; i++)
        snprintf(text + 2 * i, 3, "%02x", bytes[i]);
    return DSC_OK;
}

/* In time that does not depend on where two tokens differ. */
static bool same_token(const char *a, const char *b) {
    unsigned difference = 0;
    for (int i = 0; i < TOKEN_TEXT - 1; i++)
        difference |= (unsigned char)a[i] ^ (unsigned char)b[i];
    return difference == 0;
}

/* An abstract name: a NUL and the text; gone with the socket, never in the file system. */
static socklen_t abstract_name(const char *address, struct sockaddr_un *out) {
    size_t n = strnlen(address, sizeof out->sun_path - 1);
    memset(out, 0, sizeof *out);
    out->sun_family = AF_UNIX;
    memcpy(out->sun_path + 1, address, n);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + n);
}

static int unix_socket(void) {
    return socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
}

enum dsc_status dsc_shm_listen(struct dsc_shm_listener **out, char address[DSC_SHM_ADDRESS_MAX],
                               char token[TOKEN_TEXT]) {
    void *block = NULL;
    char name[TOKEN_TEXT];
    struct sockaddr_un where;
    DSC_TRY(random_text(name));
    DSC_TRY(dsc_alloc(sizeof(struct dsc_shm_listener), &block));
    struct dsc_shm_listener *listener = block;
    enum dsc_status status = random_text(listener->token);
    snprintf(listener->address, sizeof listener->address, "deepspeed_c-%s", name);
    socklen_t n = abstract_name(listener->address, &where);
    listener->socket = status == DSC_OK ? unix_socket() : -1;
    if (status == DSC_OK &&
        (listener->socket < 0 || bind(listener->socket, (struct sockaddr *)&where, n) != 0 ||
         listen(listener->socket, BACKLOG) != 0))
        status = DSC_FAIL(DSC_EIO, "could not listen on a Unix socket: %s", strerror(errno));
    if (status != DSC_OK) {
        dsc_shm_listener_close(listener);
        return status;
    }
    memcpy(address, listener->address, DSC_SHM_ADDRESS_MAX);
    memcpy(token, listener->token, TOKEN_TEXT);
    *out = listener;
    return DSC_OK;
}

void dsc_shm_listener_close(struct dsc_shm_listener *listener) {
    if (!listener)
        return;
    if (listener->socket >= 0)
        (void)close(listener->socket);
    dsc_free(listener);
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

/* Maps a peer's region and keeps its pidfd; the message holds no descriptors afterwards. */
static enum dsc_status adopt_region(struct dsc__shm *shm, int rank,
                                    struct dsc__shm_message *message) {
    void *memory = NULL;
    enum dsc_status status =
        dsc__shm_map(message->fds[0], dsc__shm_region_size(shm->size), rank, &memory);
    if (status != DSC_OK) {
        dsc__shm_close_fds(message);
        return status;
    }
    shm->node->regions[rank] = memory;
    shm->node->pidfds[rank].fd = message->fds[1];
    (void)close(message->fds[0]);
    message->n_fds = 0;
    return DSC_OK;
}

/* ---- rank 0 ---- */

/* A connection that said nothing yet, and since when it is here. */
struct guest {
    int socket;
    double since;
};

/* What rank 0 knows while it waits. polls: the listener, then the guests. */
struct hall {
    struct dsc__shm *shm;
    const struct dsc_shm_listener *listener;
    int n_guests, n_joined;
    struct guest guests[GUESTS_MAX]; /* the longest silent one first */
    struct dsc__shm_message *joined; /* per rank: its hello with descriptors; n_fds 0 if absent */
    struct pollfd *polls;
};

static void forget_guest(struct hall *hall, int i) {
    hall->n_guests--;
    memmove(&hall->guests[i], &hall->guests[i + 1],
            (size_t)(hall->n_guests - i) * sizeof hall->guests[0]);
}

static void drop_guest(struct hall *hall, int i) {
    (void)close(hall->guests[i].socket);
    forget_guest(hall, i);
}

/* In a full hall those who come wait outside until others have been heard: ranks speak at once.
 * Silence that lasts makes room, or a stranger could keep the ranks out. */
static bool has_room(struct hall *hall) {
    const double silence_max_s = 1.0;
    if (hall->n_guests == GUESTS_MAX && dsc_comm_now() - hall->guests[0].since > silence_max_s)
        drop_guest(hall, 0);
    return hall->n_guests < GUESTS_MAX;
}

static void accept_guests(struct hall *hall) {
    while (has_room(hall)) {
        int guest = accept4(hall->listener->socket, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (guest < 0)
            return; /* none waits, or it has gone; a shortage of descriptors ends in the time-out */
        if (!dsc__shm_same_user(guest)) {
            (void)close(guest);
            continue;
        }
        hall->guests[hall->n_guests++] = (struct guest){.socket = guest, .since = dsc_comm_now()};
    }
}

/* A process with the right token is one of this job: what it contradicts is an error for all. */
static enum dsc_status check_hello(const struct hall *hall, const struct dsc__shm_message *hello) {
    int size = hall->shm->size;
    if (hello->size != size)
        return DSC_FAIL(DSC_EDIVERGED,
                        "rank %d (pid %d) opens a world of %d ranks, rank 0 one of %d", hello->rank,
                        hello->pid, hello->size, size);
    if (hello->rank < 1 || hello->rank >= size)
        return DSC_FAIL(DSC_EDIVERGED, "pid %d connected as rank %d; 1 to %d are expected",
                        hello->pid, hello->rank, size - 1);
    if (hall->joined[hello->rank].n_fds > 0)
        return DSC_FAIL(DSC_EDIVERGED, "two processes are rank %d: pid %d and pid %d", hello->rank,
                        hall->joined[hello->rank].pid, hello->pid);
    return DSC_OK;
}

static enum dsc_status hear_guest(struct hall *hall, int i) {
    struct dsc__shm_message hello;
    enum dsc__shm_received got = dsc__shm_receive_now(hall->guests[i].socket, &hello);
    if (got == DSC__SHM_NOTHING)
        return DSC_OK;
    if (got != DSC__SHM_GOT || hello.kind != DSC__SHM_HELLO || hello.n_fds != 2 ||
        !same_token(hello.text, hall->listener->token)) {
        if (got == DSC__SHM_GOT)
            dsc__shm_close_fds(&hello);
        drop_guest(hall, i);
        return DSC_OK;
    }
    enum dsc_status status = check_hello(hall, &hello);
    if (status != DSC_OK) {
        struct dsc__shm_message no = dsc__shm_message_of(DSC__SHM_REFUSED, 0, hall->shm->size);
        struct dsc__shm_patience brief = {.options = hall->shm->options, .what = "refusing"};
        snprintf(no.text, sizeof no.text, "%s", dsc_last_error());
        (void)dsc__shm_send(hall->guests[i].socket, hello.rank, &brief, &no);
        dsc__shm_close_fds(&hello);
        return DSC_FAIL(status, "%s", no.text); /* the send may have failed and spoken last */
    }
    hall->joined[hello.rank] = hello;
    hall->shm->node->sockets[hello.rank] = hall->guests[i].socket;
    hall->n_joined++;
    forget_guest(hall, i);
    return DSC_OK;
}

/* A joined rank says nothing until it is answered, so anything from its socket is its end. */
static enum dsc_status check_joined(const struct hall *hall) {
    for (int r = 1; r < hall->shm->size; r++) {
        struct pollfd p = {.fd = hall->shm->node->sockets[r], .events = POLLIN};
        if (p.fd >= 0 && poll(&p, 1, 0) > 0)
            return DSC_FAIL(DSC_EDEAD, "rank %d (pid %d) went away before all ranks had connected",
                            r, hall->joined[r].pid);
    }
    return DSC_OK;
}

static enum dsc_status fail_absent(const struct hall *hall) {
    char absent[256] = "";
    size_t used = 0;
    for (int r = 1; r < hall->shm->size && used < sizeof absent - 16; r++)
        if (hall->shm->node->sockets[r] < 0)
            used +=
                (size_t)snprintf(absent + used, sizeof absent - used, "%s%d", used ? ", " : "", r);
    return DSC_FAIL(DSC_ETIMEDOUT, "waited %.1f s for ranks to connect; absent of %d: %s",
                    hall->shm->options->timeout_s, hall->shm->size, absent);
}

static enum dsc_status welcome_all(struct hall *hall, double since) {
    struct dsc__shm_patience patience = {
        .options = hall->shm->options, .since = since, .what = "waiting for ranks to connect"};
    double checked = since;
    while (hall->n_joined < hall->shm->size - 1) {
        int n = 0;
        /* Nobody can be let into a full hall: those outside must not end the poll at once. */
        hall->polls[n++] = (struct pollfd){
            .fd = hall->n_guests < GUESTS_MAX ? hall->listener->socket : -1, .events = POLLIN};
        for (int i = 0; i < hall->n_guests; i++)
            hall->polls[n++] = (struct pollfd){.fd = hall->guests[i].socket, .events = POLLIN};
        (void)poll(hall->polls, (nfds_t)n, 100);
        accept_guests(hall);
        for (int i = hall->n_guests; i-- > 0;) /* downwards: hearing one may remove it */
            DSC_TRY(hear_guest(hall, i));
        if (dsc_comm_now() - checked < 0.09)
            continue; /* a flood of strangers does not put off the checks below */
        checked = dsc_comm_now();
        DSC_TRY(check_joined(hall));
        enum dsc_status status = dsc__shm_patience_check(&patience);
        if (status == DSC_ETIMEDOUT)
            return fail_absent(hall);
        DSC_TRY(status);
    }
    return DSC_OK;
}

/* Sends every rank the descriptors of all the others, then maps them here. */
static enum dsc_status introduce_all(struct hall *hall, struct dsc__shm_message *own,
                                     double since) {
    struct dsc__shm *shm = hall->shm;
    struct dsc__shm_patience patience = {
        .options = shm->options, .since = since, .what = "introducing the ranks"};
    for (int to = 1; to < shm->size; to++) {
        for (int r = 0; r < shm->size; r++) {
            struct dsc__shm_message message = r == 0 ? *own : hall->joined[r];
            message.kind = DSC__SHM_PEER;
            memset(message.text, 0, sizeof message.text);
            if (r != to)
                DSC_TRY(dsc__shm_send(shm->node->sockets[to], to, &patience, &message));
        }
    }
    for (int r = 1; r < shm->size; r++)
        DSC_TRY(adopt_region(shm, r, &hall->joined[r]));
    return DSC_OK;
}

/* Ends the wait of those that had joined, with the reason, which also remains this rank's own. */
static enum dsc_status refuse_joined(struct hall *hall, enum dsc_status status) {
    struct dsc__shm_message no = dsc__shm_message_of(DSC__SHM_REFUSED, 0, hall->shm->size);
    struct dsc__shm_patience brief = {.options = hall->shm->options, .what = "refusing"};
    char reason[DSC__SHM_TEXT_MAX];
    snprintf(reason, sizeof reason, "%s", dsc_last_error());
    memcpy(no.text, reason, sizeof no.text);
    for (int r = 1; r < hall->shm->size; r++)
        if (hall->shm->node->sockets[r] >= 0)
            (void)dsc__shm_send(hall->shm->node->sockets[r], r, &brief, &no);
    return DSC_FAIL(status, "%s", reason); /* a send may have failed and spoken last */
}

static enum dsc_status meet_as_leader(struct dsc__shm *shm, const struct dsc_shm_listener *listener,
                                      struct dsc__shm_message *own, double since) {
    void *joined = NULL, *polls = NULL;
    struct hall hall = {.shm = shm, .listener = listener};
    enum dsc_status status = dsc_alloc((size_t)shm->size * sizeof *hall.joined, &joined);
    if (status == DSC_OK)
        status = dsc_alloc((1 + GUESTS_MAX) * sizeof *hall.polls, &polls);
    hall.joined = joined;
    hall.polls = polls;
    if (status == DSC_OK)
        status = welcome_all(&hall, since);
    if (status == DSC_OK)
        status = introduce_all(&hall, own, since);
    if (status != DSC_OK && joined)
        status = refuse_joined(&hall, status);
    while (hall.n_guests > 0)
        drop_guest(&hall, 0);
    for (int r = 0; joined && r < shm->size; r++)
        dsc__shm_close_fds(&hall.joined[r]);
    dsc_free(joined);
    dsc_free(polls);
    return status;
}

/* ---- the other ranks ---- */

static enum dsc_status connect_to_leader(struct dsc__shm *shm, const char *address,
                                         const struct dsc__shm_patience *patience) {
    struct sockaddr_un where;
    socklen_t n = abstract_name(address, &where);
    int fd = shm->node->sockets[0] = unix_socket();
    if (fd < 0)
        return DSC_FAIL(DSC_EIO, "could not make a Unix socket: %s", strerror(errno));
    while (connect(fd, (struct sockaddr *)&where, n) != 0) {
        if (errno != EAGAIN && errno != EINTR)
            return DSC_FAIL(DSC_EIO,
                            "could not connect to rank 0 at \"%s\": %s (rank 0 listens before it "
                            "tells its address: has it ended, or is it on another machine?)",
                            address, strerror(errno));
        (void)poll(NULL, 0, 1); /* the queue of rank 0 is full */
        DSC_TRY(dsc__shm_patience_check(patience));
    }
    if (!dsc__shm_same_user(fd))
        return DSC_FAIL(DSC_EIO, "the listener at \"%s\" belongs to another user", address);
    return DSC_OK;
}

static enum dsc_status meet_as_follower(struct dsc__shm *shm, const char *address,
                                        const char *token, struct dsc__shm_message *own,
                                        double since) {
    struct dsc__shm_patience patience = {
        .options = shm->options, .since = since, .what = "waiting for rank 0 to gather all ranks"};
    DSC_TRY(connect_to_leader(shm, address, &patience));
    snprintf(own->text, sizeof own->text, "%s", token);
    DSC_TRY(dsc__shm_send(shm->node->sockets[0], 0, &patience, own));
    for (int i = 0; i < shm->size - 1; i++) {
        struct dsc__shm_message peer;
        DSC_TRY(dsc__shm_receive(shm->node->sockets[0], 0, &patience, &peer));
        if (peer.kind != DSC__SHM_PEER || peer.n_fds != 2 || peer.rank < 0 ||
            peer.rank >= shm->size || shm->node->regions[peer.rank]) {
            dsc__shm_close_fds(&peer);
            return DSC_FAIL(DSC_EDIVERGED, "rank 0 introduced rank %d, which was not expected",
                            peer.rank);
        }
        DSC_TRY(adopt_region(shm, peer.rank, &peer));
    }
    return DSC_OK;
}

/* ---- opening ---- */

static enum dsc_status open_pidfds(struct dsc__shm_node *node) {
    void *array = NULL;
    DSC_TRY(dsc_alloc((size_t)node->size * sizeof *node->pidfds, &array));
    node->pidfds = array;
    for (int r = 0; r < node->size; r++)
        node->pidfds[r] = (struct pollfd){.fd = -1, .events = POLLIN};
    return DSC_OK;
}

static enum dsc_status meet(struct dsc__shm *shm, const struct dsc_shm_listener *listener,
                            const char *address, const char *token) {
    double since = dsc_comm_now();
    struct dsc__shm_message own = dsc__shm_message_of(DSC__SHM_HELLO, shm->rank, shm->size);
    enum dsc_status status = own_region(shm, &own);
    if (status == DSC_OK)
        status = shm->rank == 0 ? meet_as_leader(shm, listener, &own, since)
                                : meet_as_follower(shm, address, token, &own, since);
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
    if (rank != 0 && (!address || !address[0] || !token || strlen(token) != TOKEN_TEXT - 1))
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
