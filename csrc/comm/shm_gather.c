/* Descriptors of all ranks to all ranks, over sockets that exist only meanwhile: the first meeting
 * of a node, and every window.
 *
 * Decides: rank 0 of the ranks listens on an abstract Unix socket with a random name; every other
 * one connects and sends its message (token, rank, descriptors); rank 0 sends each everybody
 * else's. Invariant: only a process of this user that knows the token takes part. Whoever does not
 * (another user, garbage, a wrong token, silence) is dropped and changes nothing; a bearer of the
 * token that contradicts (another world size, a rank taken twice) ends the gathering for all, with
 * a reason. */
#include "shm.h"

#include "../alloc.h"

#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { TOKEN_BYTES = 16, BACKLOG = 4096, GUESTS_MAX = 64 };
_Static_assert(2 * TOKEN_BYTES + 1 == DSC__SHM_TOKEN, "two digits per byte");

struct dsc_shm_listener {
    int socket;
    char address[DSC_SHM_ADDRESS_MAX];
    char token[DSC__SHM_TOKEN];
};

/* ---- names ---- */

static enum dsc_status random_text(char text[DSC__SHM_TOKEN]) {
    unsigned char bytes[TOKEN_BYTES];
    if (getrandom(bytes, sizeof bytes, 0) != (ssize_t)sizeof bytes)
        return DSC_FAIL(DSC_EIO, "no random bytes for a token: %s", strerror(errno));
    for (int i = 0; i < TOKEN_BYTES; i++)
        snprintf(text + 2 * i, 3, "%02x", bytes[i]);
    return DSC_OK;
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
                               char token[DSC__SHM_TOKEN]) {
    void *block = NULL;
    char name[DSC__SHM_TOKEN];
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
    memcpy(token, listener->token, DSC__SHM_TOKEN);
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

/* ---- rank 0 ---- */

/* A connection that said nothing yet, and since when it is here. */
struct guest {
    int socket;
    double since;
};

/* What rank 0 knows while it waits. polls: the listener, then the guests. */
struct hall {
    const struct dsc__shm_gathering *gathering;
    const struct dsc_shm_listener *listener;
    int size, n_guests, n_joined;
    struct guest guests[GUESTS_MAX]; /* the longest silent one first */
    struct dsc__shm_message *joined; /* per rank: its message with descriptors; n_fds 0 if absent */
    int *sockets;                    /* per rank, -1 if absent */
    struct pollfd *polls;
};

/* Whether a message is one of this gathering. */
static bool belongs(const struct dsc__shm_gathering *gathering,
                    const struct dsc__shm_message *message) {
    const struct dsc__shm_message *own = gathering->own;
    return message->kind == own->kind && message->number == own->number &&
           message->n_fds == own->n_fds;
}

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
    int size = hall->size;
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
    if (got != DSC__SHM_GOT || !belongs(hall->gathering, &hello) ||
        !dsc__same_token(hello.text, hall->listener->token)) {
        if (got == DSC__SHM_GOT)
            dsc__shm_close_fds(&hello);
        drop_guest(hall, i);
        return DSC_OK;
    }
    enum dsc_status status = check_hello(hall, &hello);
    if (status != DSC_OK) {
        struct dsc__shm_message no = dsc__shm_message_of(DSC__SHM_REFUSED, 0, hall->size);
        struct dsc__shm_patience brief = {.options = hall->gathering->patience.options,
                                          .what = "refusing"};
        snprintf(no.text, sizeof no.text, "%s", dsc_last_error());
        (void)dsc__shm_send(hall->guests[i].socket, hello.rank, &brief, &no);
        dsc__shm_close_fds(&hello);
        return DSC_FAIL(status, "%s", no.text); /* the send may have failed and spoken last */
    }
    hall->joined[hello.rank] = hello;
    hall->sockets[hello.rank] = hall->guests[i].socket;
    hall->n_joined++;
    forget_guest(hall, i);
    return DSC_OK;
}

/* A joined rank says nothing until it is answered, so anything from its socket is its end. */
static enum dsc_status check_joined(const struct hall *hall) {
    for (int r = 1; r < hall->size; r++) {
        struct pollfd p = {.fd = hall->sockets[r], .events = POLLIN};
        if (p.fd >= 0 && poll(&p, 1, 0) > 0)
            return DSC_FAIL(DSC_EDEAD, "rank %d (pid %d) went away before all ranks had connected",
                            r, hall->joined[r].pid);
    }
    return DSC_OK;
}

static enum dsc_status fail_absent(const struct hall *hall) {
    char absent[256] = "";
    size_t used = 0;
    for (int r = 1; r < hall->size && used < sizeof absent - 16; r++)
        if (hall->sockets[r] < 0)
            used +=
                (size_t)snprintf(absent + used, sizeof absent - used, "%s%d", used ? ", " : "", r);
    return DSC_FAIL(DSC_ETIMEDOUT, "waited %.1f s for ranks to connect; absent of %d: %s",
                    hall->gathering->patience.options->timeout_s, hall->size, absent);
}

static enum dsc_status welcome_all(struct hall *hall) {
    const struct dsc__shm_patience *patience = &hall->gathering->patience;
    double checked = patience->since;
    while (hall->n_joined < hall->size - 1) {
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
        enum dsc_status status = dsc__shm_patience_check(patience);
        if (status == DSC_ETIMEDOUT)
            return fail_absent(hall);
        DSC_TRY(status);
    }
    return DSC_OK;
}

/* Sends every rank the descriptors of all the others, then takes them here. */
static enum dsc_status introduce_all(struct hall *hall) {
    const struct dsc__shm_gathering *gathering = hall->gathering;
    for (int to = 1; to < hall->size; to++) {
        for (int r = 0; r < hall->size; r++) {
            struct dsc__shm_message message = r == 0 ? *gathering->own : hall->joined[r];
            memset(message.text, 0, sizeof message.text);
            if (r != to)
                DSC_TRY(dsc__shm_send(hall->sockets[to], to, &gathering->patience, &message));
        }
    }
    for (int r = 1; r < hall->size; r++)
        DSC_TRY(gathering->take(gathering->context, r, &hall->joined[r]));
    return DSC_OK;
}

/* Ends the wait of those that had joined, with the reason, which also remains this rank's own. */
static enum dsc_status refuse_joined(struct hall *hall, enum dsc_status status) {
    struct dsc__shm_message no = dsc__shm_message_of(DSC__SHM_REFUSED, 0, hall->size);
    struct dsc__shm_patience brief = {.options = hall->gathering->patience.options,
                                      .what = "refusing"};
    char reason[DSC__SHM_TEXT_MAX];
    snprintf(reason, sizeof reason, "%s", dsc_last_error());
    memcpy(no.text, reason, sizeof no.text);
    for (int r = 1; r < hall->size; r++)
        if (hall->sockets[r] >= 0)
            (void)dsc__shm_send(hall->sockets[r], r, &brief, &no);
    return DSC_FAIL(status, "%s", reason); /* a send may have failed and spoken last */
}

static void empty(struct hall *hall) {
    while (hall->n_guests > 0)
        drop_guest(hall, 0);
    for (int r = 0; r < hall->size; r++) {
        if (hall->joined)
            dsc__shm_close_fds(&hall->joined[r]);
        if (hall->sockets && hall->sockets[r] >= 0)
            (void)close(hall->sockets[r]);
    }
    dsc_free(hall->joined);
    dsc_free(hall->sockets);
    dsc_free(hall->polls);
}

static enum dsc_status furnish(struct hall *hall) {
    void *array = NULL;
    size_t n = (size_t)hall->size;
    DSC_TRY(dsc_alloc(n * sizeof *hall->joined, &array));
    hall->joined = array;
    DSC_TRY(dsc_alloc((1 + GUESTS_MAX) * sizeof *hall->polls, &array));
    hall->polls = array;
    DSC_TRY(dsc_alloc(n * sizeof *hall->sockets, &array));
    hall->sockets = array;
    for (size_t r = 0; r < n; r++)
        hall->sockets[r] = -1;
    return DSC_OK;
}

enum dsc_status dsc__shm_gather_as_leader(const struct dsc__shm_gathering *gathering,
                                          const struct dsc_shm_listener *listener) {
    struct hall hall = {.gathering = gathering, .listener = listener, .size = gathering->own->size};
    enum dsc_status status = furnish(&hall);
    if (status == DSC_OK)
        status = welcome_all(&hall);
    if (status == DSC_OK)
        status = introduce_all(&hall);
    if (status != DSC_OK && hall.sockets)
        status = refuse_joined(&hall, status);
    empty(&hall);
    return status;
}

/* ---- the other ranks ---- */

static enum dsc_status connect_to(int fd, const char *address,
                                  const struct dsc__shm_patience *patience) {
    struct sockaddr_un where;
    socklen_t n = abstract_name(address, &where);
    while (connect(fd, (struct sockaddr *)&where, n) != 0) {
        /* Ranks that know each other will hear why rank 0 has closed its socket. */
        bool is_gone = errno == ECONNREFUSED && patience->check;
        if (!is_gone && errno != EAGAIN && errno != EINTR)
            return DSC_FAIL(DSC_EIO,
                            "could not connect to rank 0 at \"%s\": %s (rank 0 listens before it "
                            "tells its address: has it ended, or is it on another machine?)",
                            address, strerror(errno));
        (void)poll(NULL, 0, 1); /* or the queue of rank 0 is full */
        DSC_TRY(dsc__shm_patience_check(patience));
    }
    if (!dsc__shm_same_user(fd))
        return DSC_FAIL(DSC_EIO, "the listener at \"%s\" belongs to another user", address);
    return DSC_OK;
}

static enum dsc_status follow(const struct dsc__shm_gathering *gathering, int fd,
                              const char *address, const char *token) {
    struct dsc__shm_message own = *gathering->own;
    DSC_TRY(connect_to(fd, address, &gathering->patience));
    snprintf(own.text, sizeof own.text, "%s", token);
    DSC_TRY(dsc__shm_send(fd, 0, &gathering->patience, &own));
    for (int i = 0; i < own.size - 1; i++) {
        struct dsc__shm_message peer;
        DSC_TRY(dsc__shm_receive(fd, 0, &gathering->patience, &peer));
        if (!belongs(gathering, &peer) || peer.rank < 0 || peer.rank >= own.size ||
            peer.rank == own.rank) {
            dsc__shm_close_fds(&peer);
            return DSC_FAIL(DSC_EDIVERGED, "rank 0 introduced rank %d, which was not expected",
                            peer.rank);
        }
        DSC_TRY(gathering->take(gathering->context, peer.rank, &peer));
    }
    return DSC_OK;
}

enum dsc_status dsc__shm_gather_as_follower(const struct dsc__shm_gathering *gathering,
                                            const char *address, const char *token) {
    int fd = unix_socket();
    if (fd < 0)
        return DSC_FAIL(DSC_EIO, "could not make a Unix socket: %s", strerror(errno));
    enum dsc_status status = follow(gathering, fd, address, token);
    (void)close(fd);
    return status;
}
