/* Messages with descriptors over Unix sockets (SOCK_SEQPACKET, non-blocking, close-on-exec).
 *
 * Decides: the wire format and how long one is patient. Invariant: every descriptor that arrives is
 * close-on-exec and either handed on or closed; a message of the wrong size, magic or number of
 * descriptors is garbage, never half-used. */
#include "shm.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static const uint64_t MAGIC = 0x316d6873637364; /* "dscshm1" */

struct dsc__shm_message dsc__shm_message_of(enum dsc__shm_kind kind, int rank, int size) {
    struct dsc__shm_message message;
    memset(&message, 0, sizeof message);
    message.magic = MAGIC;
    message.kind = kind;
    message.rank = rank;
    message.size = size;
    message.pid = (int32_t)getpid();
    return message;
}

void dsc__shm_close_fds(struct dsc__shm_message *message) {
    for (int i = 0; i < message->n_fds; i++)
        (void)close(message->fds[i]);
    message->n_fds = 0;
}

bool dsc__shm_same_user(int socket) {
    struct ucred peer;
    socklen_t size = sizeof peer;
    return getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && peer.uid == geteuid();
}

enum dsc_status dsc__shm_patience_check(const struct dsc__shm_patience *patience) {
    const struct dsc_comm_options *options = patience->options;
    if (patience->check)
        DSC_TRY(patience->check(patience->context));
    if (options->interrupted && options->interrupted(options->interrupt_context))
        return DSC_FAIL(DSC_EINTR, "interrupted while %s", patience->what);
    if (options->timeout_s > 0 && dsc_comm_now() - patience->since >= options->timeout_s)
        return DSC_FAIL(DSC_ETIMEDOUT, "waited %.1f s while %s", options->timeout_s,
                        patience->what);
    return DSC_OK;
}

/* ---- descriptors as ancillary data ---- */

union control {
    struct cmsghdr header; /* for its alignment */
    char bytes[CMSG_SPACE(sizeof(int) * DSC__SHM_FDS_MAX)];
};

/* Moves the descriptors that came with `header` into the message; false if they are not its own. */
static bool take_fds(struct msghdr *header, struct dsc__shm_message *out) {
    int32_t expected = out->n_fds;
    out->n_fds = 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(header); c; c = CMSG_NXTHDR(header, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < n; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
            if (out->n_fds < DSC__SHM_FDS_MAX)
                out->fds[out->n_fds++] = fd;
            else
                (void)close(fd);
        }
    }
    return out->n_fds == expected && !(header->msg_flags & (MSG_TRUNC | MSG_CTRUNC));
}

enum dsc__shm_received dsc__shm_receive_now(int socket, struct dsc__shm_message *out) {
    union control control;
    struct iovec part = {.iov_base = out, .iov_len = sizeof *out};
    struct msghdr header = {.msg_iov = &part,
                            .msg_iovlen = 1,
                            .msg_control = control.bytes,
                            .msg_controllen = sizeof control.bytes};
    memset(out, 0, sizeof *out);
    ssize_t n = recvmsg(socket, &header, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (n < 0)
        return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR ? DSC__SHM_NOTHING
                                                                         : DSC__SHM_CLOSED;
    bool whole = take_fds(&header, out);
    if (n == 0 && out->n_fds == 0)
        return DSC__SHM_CLOSED;
    out->text[DSC__SHM_TEXT_MAX - 1] = '\0';
    if (whole && n == (ssize_t)sizeof *out && out->magic == MAGIC)
        return DSC__SHM_GOT;
    dsc__shm_close_fds(out);
    return DSC__SHM_GARBAGE;
}

/* ---- with patience ---- */

static enum dsc_status wait_for(int socket, short events,
                                const struct dsc__shm_patience *patience) {
    struct pollfd p = {.fd = socket, .events = events};
    int n = poll(&p, 1, 100);
    return n > 0 ? DSC_OK : dsc__shm_patience_check(patience);
}

enum dsc_status dsc__shm_receive(int socket, int peer, const struct dsc__shm_patience *patience,
                                 struct dsc__shm_message *out) {
    for (;;) {
        switch (dsc__shm_receive_now(socket, out)) {
        case DSC__SHM_GOT:
            if (out->kind == DSC__SHM_REFUSED) {
                dsc__shm_close_fds(out);
                return DSC_FAIL(DSC_EDEAD, "rank %d refused while %s: %s", peer, patience->what,
                                out->text);
            }
            return DSC_OK;
        case DSC__SHM_NOTHING:
            DSC_TRY(wait_for(socket, POLLIN, patience));
            break;
        case DSC__SHM_CLOSED:
            if (patience->check)
                DSC_TRY(patience->check(patience->context));
            return DSC_FAIL(DSC_EDEAD, "rank %d closed the connection while %s", peer,
                            patience->what);
        case DSC__SHM_GARBAGE:
            return DSC_FAIL(DSC_EDIVERGED,
                            "rank %d sent no message of this version while %s; do all ranks run "
                            "the same deepspeed_c?",
                            peer, patience->what);
        }
    }
}

enum dsc_status dsc__shm_send(int socket, int peer, const struct dsc__shm_patience *patience,
                              const struct dsc__shm_message *message) {
    union control control;
    struct iovec part = {.iov_base = (void *)message, .iov_len = sizeof *message};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};
    memset(&control, 0, sizeof control);
    if (message->n_fds > 0) {
        size_t n_bytes = sizeof(int) * (size_t)message->n_fds;
        header.msg_control = control.bytes;
        header.msg_controllen = CMSG_SPACE(n_bytes);
        struct cmsghdr *c = CMSG_FIRSTHDR(&header);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(n_bytes);
        memcpy(CMSG_DATA(c), message->fds, n_bytes);
    }
    while (sendmsg(socket, &header, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
        int error = errno;
        if (error == ETOOMANYREFS) {
            /* The kernel bounds the descriptors that an ordinary user has in flight: there is room
             * when others, perhaps on other sockets, have received theirs. */
            (void)poll(NULL, 0, 1);
            DSC_TRY(dsc__shm_patience_check(patience));
            continue;
        }
        if (error == EAGAIN || error == EWOULDBLOCK || error == EINTR) {
            DSC_TRY(wait_for(socket, POLLOUT, patience));
            continue;
        }
        if (patience->check)
            DSC_TRY(patience->check(patience->context));
        return DSC_FAIL(error == EPIPE || error == ECONNRESET ? DSC_EDEAD : DSC_EIO,
                        "could not send to rank %d while %s: %s", peer, patience->what,
                        strerror(error));
    }
    return DSC_OK;
}
