/* Connections of the mail: connecting, accepting, reading, writing, and the thread that waits.
 *
 * Decides: who may talk to this rank (who shows the token that the job's store has, and is a rank
 * of this world), and when a connection has ended. Invariant: no call here waits but the thread's
 * poll, which holds no lock; a connection that ended is never opened again. */
#define _GNU_SOURCE
#include "tcp_impl.h"

#include "../alloc.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

static const uint64_t MAGIC = 0x316d6c69616d7364; /* "dsmailm1" */
enum { AT_ONCE = 4 << 20, SCRATCH = 64 * 1024 };  /* bytes of one link before the lock is free */
enum { STRANGER_S = 5, FULL_MS = 100 };

void dsc__link_wake(struct dsc__mail *mail) {
    const uint64_t one = 1;
    ssize_t unused = write(mail->wake, &one, sizeof one); /* a full counter wakes as well */
    (void)unused;
}

/* ---- opening ---- */

/* A machine that vanishes is noticed in about half a minute. */
static void tune(int fd) {
    const int one = 1, idle_s = 10, step_s = 5, n_steps = 4, patience_ms = 30000;
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    (void)setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof idle_s);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &step_s, sizeof step_s);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &n_steps, sizeof n_steps);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &patience_ms, sizeof patience_ms);
}

void dsc__link_connect(struct dsc__mail *mail, struct dsc__link *link) {
    const struct dsc__mail_place *place = &mail->places[link->peer];
    const struct sockaddr *address = (const struct sockaddr *)(const void *)&place->address;
    struct dsc__hello hello = {.magic = MAGIC, .from = mail->rank, .to = link->peer};
    if (link->state != DSC__LINK_NONE || place->n_address == 0)
        return;
    link->state = DSC__LINK_CONNECTING;
    memcpy(hello.token, place->token, sizeof hello.token);
    memcpy(link->small, &hello, sizeof hello);
    link->n_small = sizeof hello;
    link->fd = socket(address->sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (link->fd < 0) {
        link->failed = true;
    } else {
        tune(link->fd);
        if (connect(link->fd, address, place->n_address) < 0 && errno != EINPROGRESS)
            link->failed = true;
    }
    dsc__link_wake(mail);
}

static void accept_all(struct dsc__mail *mail) {
    for (int i = 0; i < DSC__MAIL_STRANGERS; i++) {
        if (mail->strangers[i].fd >= 0)
            continue;
        int fd = accept4(mail->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) {
            mail->full = errno != EAGAIN;
            return;
        }
        tune(fd);
        mail->strangers[i] = (struct dsc__link){
            .state = DSC__LINK_OPEN, .fd = fd, .peer = -1, .since = dsc_comm_now()};
    }
}

/* ---- reading ---- */

/* Bytes read; 0 where there are none now, or the link has failed. */
static size_t read_some(struct dsc__link *link, void *to, size_t n) {
    ssize_t got = recv(link->fd, to, n, 0);
    if (got > 0)
        return (size_t)got;
    if (got == 0 || (errno != EAGAIN && errno != EINTR))
        link->failed = true;
    return 0;
}

/* Whether all n bytes of what comes first are there. */
static bool read_head(struct dsc__link *link, size_t n) {
    link->n_in += read_some(link, (char *)&link->in + link->n_in, n - link->n_in);
    if (link->n_in < n)
        return false;
    link->n_in = 0;
    return true;
}

/* The body of a parcel; what nobody wants any more is read all the same. Returns false where
 * nothing more is there. */
static bool read_body(struct dsc__mail *mail, struct dsc__link *link) {
    struct dsc__parcel *parcel = link->filling;
    char scratch[SCRATCH], *to = parcel->copy ? parcel->copy : parcel->to;
    size_t n = (size_t)parcel->head.n_bytes - link->n_filled;
    size_t got = to ? read_some(link, to + link->n_filled, n)
                    : read_some(link, scratch, dsc_min(n, sizeof scratch));
    link->n_filled += got;
    if (got == n)
        dsc__mail_filled(mail, link);
    return got > 0;
}

static void read_letters(struct dsc__mail *mail, struct dsc__link *link) {
    for (int i = 0; i < AT_ONCE / SCRATCH && !link->failed; i++) {
        if (link->filling) {
            if (!read_body(mail, link))
                return;
        } else if (!read_head(link, sizeof link->in.letter)) {
            return;
        } else if (!dsc__mail_letter(mail, link)) {
            link->failed = true;
        }
    }
}

static void read_receipts(struct dsc__mail *mail, struct dsc__link *link) {
    while (!link->failed && read_head(link, sizeof link->in.receipt))
        if (!dsc__mail_receipt(mail, link))
            link->failed = true;
}

/* A stranger that says who it is takes its place; any other is closed by the caller. */
static void read_hello(struct dsc__mail *mail, struct dsc__link *link) {
    if (!read_head(link, sizeof link->in.hello))
        return;
    const struct dsc__hello *hello = &link->in.hello;
    bool known = hello->magic == MAGIC && dsc__same_token(hello->token, mail->token) &&
                 hello->to == mail->rank && hello->from >= 0 && hello->from < mail->size &&
                 hello->from != mail->rank;
    struct dsc__link *place = known ? dsc__link_from(mail, hello->from) : NULL;
    if (!place || place->state != DSC__LINK_NONE) {
        link->failed = true;
        return;
    }
    place->fd = link->fd;
    place->state = DSC__LINK_OPEN;
    link->fd = -1;
    dsc__link_flush(mail, place);
    read_letters(mail, place);
}

/* ---- writing ---- */

/* Bytes written; 0 where nothing fits now, or the link has failed. */
static size_t write_some(struct dsc__link *link, const void *from, size_t n, bool more) {
    ssize_t put = send(link->fd, from, n, MSG_NOSIGNAL | (more ? MSG_MORE : 0));
    if (put >= 0)
        return (size_t)put;
    if (errno != EAGAIN && errno != EINTR)
        link->failed = true;
    return 0;
}

static bool write_small(struct dsc__link *link) {
    size_t n = write_some(link, link->small, link->n_small, link->queue.first != NULL);
    memmove(link->small, link->small + n, link->n_small - n);
    link->n_small -= n;
    return n > 0;
}

static bool write_first(struct dsc__link *link) {
    const struct dsc__outgoing *first = link->queue.first;
    size_t n_head = sizeof first->head, at = link->n_written, n;
    size_t n_all = n_head + (first->body ? (size_t)first->head.n_bytes : 0);
    if (at < n_head)
        n = write_some(link, (const char *)&first->head + at, n_head - at, n_all > n_head);
    else
        n = write_some(link, first->body + (at - n_head), n_all - at, false);
    link->n_written += n;
    if (link->n_written == n_all)
        dsc__mail_written(link);
    return n > 0;
}

static bool has_output(const struct dsc__link *link) {
    return link->n_small > 0 || link->queue.first;
}

static void write_all(struct dsc__mail *mail, struct dsc__link *link) {
    while (link->state == DSC__LINK_OPEN && !link->failed && has_output(link)) {
        bool completes = link->queue.first && link->n_small == 0;
        const struct dsc__outgoing *first = link->queue.first;
        if (!(link->n_small > 0 ? write_small(link) : write_first(link)))
            return;
        if (completes && link->queue.first != first)
            dsc__mail_changed(mail);
    }
}

void dsc__link_flush(struct dsc__mail *mail, struct dsc__link *link) {
    write_all(mail, link);
    if (link->failed || has_output(link))
        dsc__link_wake(mail);
}

void dsc__link_receipt(struct dsc__mail *mail, int to, enum dsc__receipt_kind kind, uint64_t id) {
    struct dsc__link *link = dsc__link_from(mail, to);
    struct dsc__receipt receipt = {kind, id};
    if (link->state != DSC__LINK_OPEN || link->n_small + sizeof receipt > sizeof link->small)
        return; /* it has ended; or it sends more than a rank of ours would */
    memcpy(link->small + link->n_small, &receipt, sizeof receipt);
    link->n_small += sizeof receipt;
    dsc__link_flush(mail, link);
}

/* ---- the thread ---- */

static void end(struct dsc__mail *mail, struct dsc__link *link) {
    if (link->fd >= 0)
        (void)close(link->fd);
    link->fd = -1;
    if (link->peer < 0)
        return;
    link->state = DSC__LINK_DEAD;
    dsc__mail_ended(mail, link);
    dsc__mail_changed(mail);
}

static void finish_connecting(struct dsc__link *link) {
    int error = 0;
    socklen_t size = sizeof error;
    if (getsockopt(link->fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0 || error)
        link->failed = true;
    else
        link->state = DSC__LINK_OPEN;
}

static void serve_link(struct dsc__mail *mail, struct dsc__link *link, short events) {
    if (link->state == DSC__LINK_CONNECTING && events)
        finish_connecting(link);
    if (!link->failed && (events & (POLLIN | POLLHUP | POLLERR))) {
        if (link->peer < 0)
            read_hello(mail, link);
        else if (link->is_out)
            read_receipts(mail, link);
        else
            read_letters(mail, link);
    }
    if (link->fd >= 0 && !link->failed)
        write_all(mail, link);
    if (link->failed)
        end(mail, link);
}

static void add(struct dsc__mail *mail, nfds_t *n, struct dsc__link *link) {
    if (link->failed && link->state != DSC__LINK_DEAD)
        end(mail, link);
    if (link->fd < 0)
        return;
    bool connects = link->state == DSC__LINK_CONNECTING;
    mail->polled[*n] = (struct pollfd){.fd = link->fd,
                                       .events = connects           ? POLLOUT
                                                 : has_output(link) ? POLLIN | POLLOUT
                                                                    : POLLIN};
    mail->polled_links[(*n)++] = link;
}

/* What to poll, and for how long. Strangers that say nothing make room; the next ones wait until
 * there is some, and for a while where they cannot be accepted. */
static nfds_t list(struct dsc__mail *mail, int *timeout_ms) {
    nfds_t n = 2;
    double now = dsc_comm_now();
    for (int i = 0; i < DSC__MAIL_STRANGERS; i++) {
        mail->strangers[i].failed |= now - mail->strangers[i].since > STRANGER_S;
        add(mail, &n, &mail->strangers[i]);
    }
    *timeout_ms = mail->full ? FULL_MS : n > 2 ? 1000 * STRANGER_S : -1;
    bool has_room = n < 2 + DSC__MAIL_STRANGERS && !mail->full;
    mail->full = false;
    mail->polled[0] = (struct pollfd){.fd = mail->wake, .events = POLLIN};
    mail->polled[1] = (struct pollfd){.fd = has_room ? mail->listener : -1, .events = POLLIN};
    for (int i = 0; i < 2 * mail->size; i++)
        add(mail, &n, &mail->links[i]);
    return n;
}

void *dsc__link_serve(void *context) {
    struct dsc__mail *mail = context;
    uint64_t woken;
    int timeout_ms;
    (void)pthread_mutex_lock(&mail->lock);
    while (!mail->stop) {
        nfds_t n = list(mail, &timeout_ms);
        (void)pthread_mutex_unlock(&mail->lock);
        (void)poll(mail->polled, n, timeout_ms);
        (void)pthread_mutex_lock(&mail->lock);
        if (mail->polled[0].revents && read(mail->wake, &woken, sizeof woken) < 0)
            continue; /* everything is looked at anew */
        for (nfds_t i = 2; i < n; i++)
            if (mail->polled[i].revents)
                serve_link(mail, mail->polled_links[i], mail->polled[i].revents);
        if (mail->polled[1].revents)
            accept_all(mail);
    }
    (void)pthread_mutex_unlock(&mail->lock);
    return NULL;
}
