/* Messages over the connections of tcp_link.c: which one a recv takes, and who waits for what.
 *
 * Decides: order (a recv takes the oldest with its tag that nobody has taken), how much may lie
 * untaken (DSC__MAIL_UNTAKEN_MAX per direction of a pair; the next send waits), and when a send is
 * done: when its receiver's memory has it, because this process may end then, and what only the
 * kernel has is lost where a receipt for something else comes after that.
 * Invariant: a caller's memory is written or read only while its message is neither done nor
 * dropped. */
#define _GNU_SOURCE
#include "tcp_impl.h"

#include "../alloc.h"

#include <errno.h>
#include <netdb.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

enum { SLICE_MS = 100 };

void dsc__mail_changed(struct dsc__mail *mail) {
    mail->count++;
    (void)pthread_cond_broadcast(&mail->changed);
}

/* ---- outgoing ---- */

static void append(struct dsc__outbox *box, struct dsc__outgoing *out) {
    out->next = NULL;
    if (box->last)
        box->last->next = out;
    else
        box->first = out;
    box->last = out;
}

static struct dsc__outgoing *take_first(struct dsc__outbox *box) {
    struct dsc__outgoing *out = box->first;
    box->first = out->next;
    if (!box->first)
        box->last = NULL;
    return out;
}

static void deliver(struct dsc__outgoing *out) {
    out->delivered = true;
    if (out->dropped)
        dsc_free(out);
}

void dsc__mail_written(struct dsc__link *link) {
    struct dsc__outgoing *out = take_first(&link->queue);
    link->n_written = 0;
    append(&link->waiting, out);
}

/* Takes it out of those that wait, NULL where it is not there. */
static struct dsc__outgoing *find_waiting(struct dsc__link *link, uint64_t id) {
    struct dsc__outbox others = {NULL, NULL};
    struct dsc__outgoing *found = NULL;
    while (link->waiting.first) {
        struct dsc__outgoing *out = take_first(&link->waiting);
        if (out->head.id == id)
            found = out;
        else
            append(&others, out);
    }
    link->waiting = others;
    return found;
}

static bool is_received(struct dsc__link *link, uint64_t id) {
    struct dsc__outgoing *found = find_waiting(link, id);
    if (found)
        deliver(found);
    return found;
}

static bool is_taken(struct dsc__link *link, uint64_t id) {
    struct dsc__outgoing *found = find_waiting(link, id);
    link->n_untaken--;
    if (found && found->head.n_bytes <= DSC__MAIL_EAGER) { /* taken while it comes */
        append(&link->waiting, found);
    } else if (found && found->dropped) { /* its receiver waits in vain: this rank has given up */
        dsc_free(found);
    } else if (found) {
        found->head.kind = DSC__BODY;
        found->body = found->data;
        append(&link->queue, found);
    }
    return link->n_untaken >= 0;
}

bool dsc__mail_receipt(struct dsc__mail *mail, struct dsc__link *link) {
    struct dsc__receipt receipt = link->in.receipt;
    bool known = receipt.id > 0 && receipt.id <= link->n_ids;
    if (known && receipt.kind == DSC__RECEIVED)
        known = is_received(link, receipt.id);
    else
        known = known && receipt.kind == DSC__TAKEN && is_taken(link, receipt.id);
    dsc__mail_changed(mail);
    return known;
}

static enum dsc_status post(struct dsc__mail *mail, struct dsc__message *m) {
    struct dsc__link *link = dsc__link_to(mail, m->peer);
    struct dsc__outgoing *out = NULL;
    dsc__link_connect(mail, link);
    if (link->state == DSC__LINK_DEAD || link->n_untaken == DSC__MAIL_UNTAKEN_MAX)
        return DSC_OK;
    DSC_TRY(dsc_alloc(sizeof *out, (void **)&out));
    out->data = m->what.data;
    out->body = m->n_bytes > DSC__MAIL_EAGER ? NULL : out->data;
    out->head = (struct dsc__letter){.kind = DSC__LETTER,
                                     .dtype = m->what.dtype,
                                     .id = ++link->n_ids,
                                     .tag = m->what.tag,
                                     .n_bytes = m->n_bytes};
    snprintf(out->head.label, sizeof out->head.label, "%s", m->what.label ? m->what.label : "");
    link->n_untaken++;
    m->lane = out;
    append(&link->queue, out);
    dsc__link_flush(mail, link);
    return DSC_OK;
}

static enum dsc_status advance_send(struct dsc__mail *mail, struct dsc__message *m) {
    struct dsc__outgoing *out = m->lane;
    if (!out)
        return post(mail, m);
    if (!out->delivered)
        return DSC_OK;
    m->n_moved = m->n_bytes;
    m->done = true;
    m->lane = NULL;
    dsc_free(out);
    return DSC_OK;
}

/* ---- incoming ---- */

static void unlink_parcel(struct dsc__mail *mail, struct dsc__parcel *parcel) {
    struct dsc__parcel **at = &mail->inbox;
    while (*at != parcel)
        at = &(*at)->next;
    *at = parcel->next;
    dsc_free(parcel->copy);
    dsc_free(parcel);
}

static struct dsc__parcel *long_parcel(struct dsc__mail *mail, int from, uint64_t id) {
    for (struct dsc__parcel *p = mail->inbox; p; p = p->next)
        if (p->from == from && p->head.id == id && p->taken && !p->complete && !p->copy)
            return p;
    return NULL;
}

bool dsc__mail_letter(struct dsc__mail *mail, struct dsc__link *link) {
    struct dsc__parcel *parcel = NULL, **at = &mail->inbox;
    struct dsc__letter *head = &link->in.letter;
    bool is_long = head->n_bytes > DSC__MAIL_EAGER;
    head->label[sizeof head->label - 1] = '\0';
    link->n_filled = 0;
    if (head->kind == DSC__BODY) {
        link->filling = long_parcel(mail, link->peer, head->id);
        return link->filling && link->filling->head.n_bytes == head->n_bytes;
    }
    if (head->kind != DSC__LETTER || dsc_alloc(sizeof *parcel, (void **)&parcel) != DSC_OK)
        return false;
    if (!is_long && head->n_bytes > 0 &&
        dsc_alloc(head->n_bytes, (void **)&parcel->copy) != DSC_OK) {
        dsc_free(parcel);
        return false;
    }
    parcel->head = *head;
    parcel->from = link->peer;
    while (*at)
        at = &(*at)->next;
    *at = parcel;
    if (!is_long) {
        link->filling = parcel;
        if (head->n_bytes == 0)
            dsc__mail_filled(mail, link);
    }
    dsc__mail_changed(mail);
    return true;
}

void dsc__mail_filled(struct dsc__mail *mail, struct dsc__link *link) {
    struct dsc__parcel *parcel = link->filling;
    link->filling = NULL;
    parcel->complete = true;
    dsc__link_receipt(mail, link->peer, DSC__RECEIVED, parcel->head.id);
    if (parcel->dropped)
        unlink_parcel(mail, parcel);
    dsc__mail_changed(mail);
}

static enum dsc_status take(struct dsc__mail *mail, struct dsc__message *m,
                            struct dsc__parcel *parcel) {
    m->peer = parcel->from;
    if (parcel->head.dtype != (uint32_t)m->what.dtype || parcel->head.n_bytes != m->n_bytes)
        return dsc__message_differs(m, mail->rank, (enum dsc_dtype)parcel->head.dtype,
                                    (size_t)parcel->head.n_bytes, parcel->head.label);
    m->lane = parcel;
    parcel->taken = true;
    if (m->n_bytes > DSC__MAIL_EAGER)
        parcel->to = m->what.data;
    dsc__link_receipt(mail, m->peer, DSC__TAKEN, parcel->head.id);
    return DSC_OK;
}

static enum dsc_status advance_recv(struct dsc__mail *mail, struct dsc__message *m) {
    struct dsc__parcel *parcel = m->lane, *p = mail->inbox;
    if (!parcel) {
        while (p &&
               (p->taken || p->head.tag != m->what.tag || (m->peer >= 0 && p->from != m->peer)))
            p = p->next;
        if (!p)
            return DSC_OK;
        DSC_TRY(take(mail, m, p));
        parcel = p;
    }
    if (!parcel->complete)
        return DSC_OK;
    if (parcel->copy)
        memcpy(m->what.data, parcel->copy, m->n_bytes);
    m->n_moved = m->n_bytes;
    m->done = true;
    m->lane = NULL;
    unlink_parcel(mail, parcel);
    return DSC_OK;
}

/* What came only in part never will: who wants it hears that the rank has gone. */
void dsc__mail_ended(struct dsc__mail *mail, struct dsc__link *link) {
    link->filling = NULL;
    for (struct dsc__parcel *p = mail->inbox, *next; p && !link->is_out; p = next) {
        next = p->next;
        if (p->from == link->peer && !p->complete && (!p->taken || p->dropped))
            unlink_parcel(mail, p);
    }
}

/* ---- what comm.c's side sees ---- */

enum dsc_status dsc__mail_advance(struct dsc__mail *mail, struct dsc__message *m) {
    (void)pthread_mutex_lock(&mail->lock);
    enum dsc_status status = DSC_OK;
    if (mail->broken != DSC_OK)
        status = DSC_FAIL(mail->broken, "%s", mail->reason);
    else if (mail->stop)
        status = DSC_FAIL(DSC_ESTATE, "the communicator is closed");
    else
        status = m->is_send ? advance_send(mail, m) : advance_recv(mail, m);
    (void)pthread_mutex_unlock(&mail->lock);
    return status;
}

static bool is_queued(const struct dsc__link *link, const struct dsc__outgoing *out) {
    const struct dsc__outgoing *at = link->queue.first;
    while (at && at != out)
        at = at->next;
    return at;
}

/* The bytes of a body that is not all sent are missing: its link ends. */
void dsc__mail_drop(struct dsc__mail *mail, struct dsc__message *m) {
    struct dsc__parcel *parcel = m->lane;
    struct dsc__outgoing *out = m->lane;
    (void)pthread_mutex_lock(&mail->lock);
    if (m->lane && !m->is_send) {
        parcel->to = NULL;
        parcel->dropped = true;
        if (parcel->complete || dsc__link_from(mail, parcel->from)->state == DSC__LINK_DEAD)
            unlink_parcel(mail, parcel);
    } else if (m->lane && out->delivered) {
        dsc_free(out);
    } else if (m->lane) {
        struct dsc__link *link = dsc__link_to(mail, m->peer);
        out->dropped = true;
        link->failed |= is_queued(link, out) && out->body;
        dsc__link_wake(mail);
    }
    m->lane = NULL;
    (void)pthread_mutex_unlock(&mail->lock);
}

uint32_t dsc__mail_count(struct dsc__mail *mail) {
    (void)pthread_mutex_lock(&mail->lock);
    uint32_t count = mail->count;
    (void)pthread_mutex_unlock(&mail->lock);
    return count;
}

void dsc__mail_ring(struct dsc__mail *mail) {
    (void)pthread_mutex_lock(&mail->lock);
    dsc__mail_changed(mail);
    (void)pthread_mutex_unlock(&mail->lock);
}

/* A tenth of a second at most. Lock held. */
static void sleep_held(struct dsc__mail *mail) {
    struct timespec until;
    (void)clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += SLICE_MS * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_nsec -= 1000000000L;
        until.tv_sec++;
    }
    (void)pthread_cond_timedwait(&mail->changed, &mail->lock, &until);
}

void dsc__mail_wait(struct dsc__mail *mail, uint32_t seen) {
    (void)pthread_mutex_lock(&mail->lock);
    if (mail->count == seen)
        sleep_held(mail);
    (void)pthread_mutex_unlock(&mail->lock);
}

bool dsc__mail_gone(struct dsc__mail *mail, int peer, bool is_send) {
    (void)pthread_mutex_lock(&mail->lock);
    struct dsc__link *to = dsc__link_to(mail, peer);
    dsc__link_connect(mail, to);
    bool gone = to->state == DSC__LINK_DEAD &&
                (is_send || dsc__link_from(mail, peer)->state != DSC__LINK_OPEN);
    (void)pthread_mutex_unlock(&mail->lock);
    return gone;
}

void dsc__mail_break(struct dsc__mail *mail, enum dsc_status status, const char *reason) {
    (void)pthread_mutex_lock(&mail->lock);
    if (mail->broken == DSC_OK) {
        mail->broken = status;
        snprintf(mail->reason, sizeof mail->reason, "%s", reason);
    }
    dsc__mail_changed(mail);
    (void)pthread_mutex_unlock(&mail->lock);
}

bool dsc__mail_knows(struct dsc__mail *mail, int peer) {
    (void)pthread_mutex_lock(&mail->lock);
    bool knows = mail->places[peer].n_address > 0;
    (void)pthread_mutex_unlock(&mail->lock);
    return knows;
}

enum dsc_status dsc__mail_introduce(struct dsc__mail *mail, int peer, const char *where) {
    char host[256], port[8], token[DSC__TOKEN_CHARS + 1];
    const char *second = strchr(where, ' '), *third = second ? strchr(second + 1, ' ') : NULL;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found = NULL;
    if (!third || (size_t)(second - where) >= sizeof host ||
        (size_t)(third - second) > sizeof port || strlen(third + 1) != DSC__TOKEN_CHARS)
        return DSC_FAIL(DSC_EDEAD, "rank %d has left no address for messages (\"%.60s\")", peer,
                        where);
    snprintf(host, sizeof host, "%.*s", (int)(second - where), where);
    snprintf(port, sizeof port, "%.*s", (int)(third - second - 1), second + 1);
    snprintf(token, sizeof token, "%s", third + 1);
    int error = getaddrinfo(host, port, &hints, &found);
    if (error)
        return DSC_FAIL(DSC_EDEAD,
                        "rank %d listens for messages at \"%s\", which is no address: %s", peer,
                        host, gai_strerror(error));
    (void)pthread_mutex_lock(&mail->lock);
    struct dsc__mail_place *place = &mail->places[peer];
    memcpy(&place->address, found->ai_addr, found->ai_addrlen);
    place->n_address = found->ai_addrlen;
    memcpy(place->token, token, sizeof place->token);
    (void)pthread_mutex_unlock(&mail->lock);
    freeaddrinfo(found);
    return DSC_OK;
}

/* ---- life ---- */

static enum dsc_status start(struct dsc__mail *mail) {
    pthread_condattr_t monotonic;
    sigset_t all, before;
    (void)pthread_mutex_init(&mail->lock, NULL);
    (void)pthread_condattr_init(&monotonic);
    (void)pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    (void)pthread_cond_init(&mail->changed, &monotonic);
    (void)pthread_condattr_destroy(&monotonic);
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&mail->thread, NULL, dsc__link_serve, mail);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error)
        return DSC_FAIL(DSC_ENOMEM, "could not start a thread for messages: %s", strerror(error));
    return DSC_OK;
}

static enum dsc_status allocate(struct dsc__mail *mail, int size) {
    size_t n = 2 * (size_t)size, n_polled = 2 + DSC__MAIL_STRANGERS + n;
    DSC_TRY(dsc_alloc((size_t)size * sizeof *mail->places, (void **)&mail->places));
    DSC_TRY(dsc_alloc(n * sizeof *mail->links, (void **)&mail->links));
    DSC_TRY(dsc_alloc(n_polled * sizeof(struct pollfd), (void **)&mail->polled));
    DSC_TRY(dsc_alloc(n_polled * sizeof(void *), (void **)&mail->polled_links));
    for (size_t i = 0; i < n; i++)
        mail->links[i] = (struct dsc__link){
            .fd = -1, .peer = (int)(i % (size_t)size), .is_out = i < (size_t)size};
    for (int i = 0; i < DSC__MAIL_STRANGERS; i++)
        mail->strangers[i] = (struct dsc__link){.fd = -1, .peer = -1};
    mail->wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (mail->wake < 0)
        return DSC_FAIL(DSC_EIO, "messages: eventfd: %s", strerror(errno));
    return DSC_OK;
}

static void free_outbox(struct dsc__outbox *box) {
    while (box->first)
        dsc_free(take_first(box));
}

static void free_all(struct dsc__mail *mail) {
    for (int i = 0; mail->links && i < 2 * mail->size; i++) {
        free_outbox(&mail->links[i].queue);
        free_outbox(&mail->links[i].waiting);
    }
    while (mail->inbox)
        unlink_parcel(mail, mail->inbox);
    dsc_free(mail->places);
    dsc_free(mail->links);
    dsc_free(mail->polled);
    dsc_free(mail->polled_links);
    dsc_free(mail);
}

/* Closing is all that a forked child may do, too. */
void dsc__mail_forked(struct dsc__mail *mail) {
    for (int i = 0; i < 2 * mail->size; i++)
        if (mail->links[i].fd >= 0)
            (void)close(mail->links[i].fd);
    for (int i = 0; i < DSC__MAIL_STRANGERS; i++)
        if (mail->strangers[i].fd >= 0)
            (void)close(mail->strangers[i].fd);
    if (mail->wake >= 0)
        (void)close(mail->wake);
    (void)close(mail->listener);
}

enum dsc_status dsc__mail_open(int listener, const char *token, int rank, int size,
                               struct dsc__mail **out) {
    struct dsc__mail *mail = NULL;
    enum dsc_status status = DSC_OK;
    if (strlen(token) != DSC__TOKEN_CHARS)
        status = DSC_FAIL(DSC_EINVAL, "messages: a token of %d characters is expected",
                          (int)DSC__TOKEN_CHARS);
    if (status == DSC_OK)
        status = dsc_alloc(sizeof *mail, (void **)&mail);
    if (status != DSC_OK) {
        (void)close(listener);
        return status;
    }
    mail->rank = rank;
    mail->size = size;
    mail->listener = listener;
    mail->wake = -1;
    memcpy(mail->token, token, DSC__TOKEN_CHARS);
    if ((status = allocate(mail, size)) == DSC_OK)
        status = start(mail);
    if (status != DSC_OK) {
        if (mail->wake >= 0)
            (void)close(mail->wake);
        (void)close(listener);
        free_all(mail);
        return status;
    }
    *out = mail;
    return DSC_OK;
}

void dsc__mail_finish(struct dsc__mail *mail) {
    (void)pthread_mutex_lock(&mail->lock);
    bool again = mail->stop;
    mail->stop = true;
    dsc__mail_changed(mail);
    (void)pthread_mutex_unlock(&mail->lock);
    if (again)
        return;
    dsc__link_wake(mail);
    (void)pthread_join(mail->thread, NULL);
}

void dsc__mail_close(struct dsc__mail *mail) {
    if (!mail)
        return;
    dsc__mail_forked(mail);
    (void)pthread_cond_destroy(&mail->changed);
    (void)pthread_mutex_destroy(&mail->lock);
    free_all(mail);
}
