/* Messages from one rank to another, beside the sequence of the collectives.
 *
 * Decides: who moves a message on. A synchronous one is moved by its caller; asynchronous ones by a
 * thread of the communicator that tries all in turn, so that they do not wait for each other.
 * Invariant: messages of one pair of ranks and one tag start in the order of their calls, whoever
 * moves them: a synchronous call joins the queue if that is not empty. */
#include "backend.h"

#include "../alloc.h"

#include <stdio.h>
#include <string.h>

static enum dsc_status check_message(const struct dsc_comm *comm, const char *call,
                                     const struct dsc_p2p *message, int lowest) {
    struct dsc_coll coll = {.src = message->data, .dtype = message->dtype};
    if (message->peer < lowest || message->peer >= comm->size || message->peer == comm->rank)
        return DSC_FAIL(DSC_EINVAL, "%s: the other rank is %d, this one is %d of %d", call,
                        message->peer, comm->rank, comm->size);
    DSC_TRY(dsc__check_pair(comm, call, &coll, message->n_elems, 0));
    if (!comm->backend->message_advance ||
        (comm->backend->has_messages && !comm->backend->has_messages(comm->state)))
        return DSC_FAIL(DSC_ENOTYET,
                        "%s: this communicator (\"%s\") has no messages between two ranks", call,
                        comm->backend->name);
    return DSC_OK;
}

static struct dsc__message message_of(const struct dsc_p2p *what, bool is_send) {
    return (struct dsc__message){.what = *what,
                                 .is_send = is_send,
                                 .peer = what->peer,
                                 .n_bytes = what->n_elems * dsc_dtype_size(what->dtype),
                                 .since = dsc_comm_now()};
}

void dsc__message_call(const struct dsc__message *m, char text[DSC__CALL_TEXT_MAX]) {
    struct dsc__print print;
    memset(&print, 0, sizeof print);
    print.op = m->is_send ? DSC_COMM_SEND : DSC_COMM_RECV;
    print.dtype = m->what.dtype;
    print.n_elems = m->what.n_elems;
    print.root = (uint32_t)m->peer;
    print.tag = m->what.tag;
    snprintf(print.label, sizeof print.label, "%s", m->what.label ? m->what.label : "");
    dsc__print_call(&print, text);
}

enum dsc_status dsc__message_differs(const struct dsc__message *m, int rank, enum dsc_dtype dtype,
                                     size_t n_bytes, const char *label) {
    struct dsc__message sent = {.what = m->what, .is_send = true, .peer = rank};
    char calls[2][DSC__CALL_TEXT_MAX];
    sent.what.dtype = dtype;
    sent.what.n_elems = n_bytes / dsc_max(dsc_dtype_size(dtype), 1);
    sent.what.label = label;
    dsc__message_call(&sent, calls[0]);
    dsc__message_call(m, calls[1]);
    return DSC_FAIL(DSC_EDIVERGED, "rank %d called %s while rank %d called %s", m->peer, calls[0],
                    rank, calls[1]);
}

static void drop(const struct dsc_comm *comm, struct dsc__message *message) {
    if (comm->backend->message_drop)
        comm->backend->message_drop(comm->state, message);
}

/* A failed message breaks the node: its other end must hear of it. */
static enum dsc_status fail(struct dsc_comm *comm, enum dsc_status status) {
    if (!comm->silent)
        comm->backend->give_up(comm->state, status, dsc_last_error());
    return status;
}

/* ---- asynchronous ---- */

/* Whether an older work must start before this one. */
static bool must_wait(const struct dsc_work *head, const struct dsc_work *work) {
    const struct dsc__message *m = &work->message;
    for (const struct dsc_work *w = head; w != work; w = w->next)
        if (!w->message.lane && w->message.is_send == m->is_send &&
            (m->is_send ? w->message.peer == m->peer
                        : w->message.what.tag == m->what.tag &&
                              (w->message.peer == m->peer || w->message.peer < 0 || m->peer < 0)))
            return true;
    return false;
}

/* Moves every message as far as it goes. Only this thread takes works out of the queue, so the list
 * up to the tail that it has seen is its own. */
static void advance_all(struct dsc__queue *queue, bool look, uint32_t seen) {
    const struct dsc_comm_backend *backend = queue->comm->backend;
    void *state = queue->comm->state;
    (void)pthread_mutex_lock(&queue->lock);
    struct dsc_work *work = queue->head;
    while (work) {
        bool waits = !work->message.lane && must_wait(queue->head, work);
        (void)pthread_mutex_unlock(&queue->lock);
        enum dsc_status status = atomic_load(&queue->stop) ? DSC_EINTR : DSC_OK;
        if (status == DSC_OK && !waits)
            status = backend->message_advance(state, &work->message);
        if (status == DSC_OK && look && !work->message.done)
            status = backend->message_check(state, &work->message, seen);
        if (status != DSC_OK && status != DSC_EINTR)
            (void)fail(queue->comm, status);
        if (status != DSC_OK)
            drop(queue->comm, &work->message);
        (void)pthread_mutex_lock(&queue->lock);
        struct dsc_work *next = work->next;
        if (status != DSC_OK || work->message.done) {
            (void)pthread_mutex_unlock(&queue->lock);
            dsc__queue_end(queue, work, status);
            (void)pthread_mutex_lock(&queue->lock);
        }
        work = next;
    }
    (void)pthread_mutex_unlock(&queue->lock);
}

static void serve(struct dsc__queue *queue) {
    const struct dsc_comm_backend *backend = queue->comm->backend;
    double looked = dsc_comm_now();
    for (;;) {
        uint32_t seen = backend->mail(queue->comm->state);
        (void)pthread_mutex_lock(&queue->lock);
        while (!queue->head && !atomic_load(&queue->stop))
            (void)pthread_cond_wait(&queue->changed, &queue->lock);
        bool ended = !queue->head;
        (void)pthread_mutex_unlock(&queue->lock);
        if (ended)
            return;
        bool look = dsc_comm_now() - looked > 0.09;
        if (look)
            looked = dsc_comm_now();
        advance_all(queue, look, seen);
        if (!dsc__queue_empty(queue))
            backend->message_wait(queue->comm->state, seen);
    }
}

static enum dsc_status post(struct dsc_comm *comm, bool is_send, const struct dsc_p2p *what,
                            struct dsc_work **out) {
    struct dsc_work *work = NULL;
    if (!comm->messages)
        DSC_TRY(dsc__queue_open(comm, serve, &comm->messages));
    DSC_TRY(
        dsc__work_new(comm->messages, is_send ? DSC_COMM_SEND : DSC_COMM_RECV, what->label, &work));
    work->message = message_of(what, is_send);
    work->message.is_async = true;
    work->message.what.label = what->label ? work->label : NULL;
    dsc__queue_push(comm->messages, work);
    comm->backend->ring_mail(comm->state);
    *out = work;
    return DSC_OK;
}

enum dsc_status dsc_comm_post_message(struct dsc_comm *comm, bool is_send,
                                      const struct dsc_p2p *what, struct dsc_work **out) {
    DSC_TRY(check_message(comm, is_send ? "isend" : "irecv", what, is_send ? 0 : -1));
    return post(comm, is_send, what, out);
}

/* ---- synchronous ---- */

static enum dsc_status move_on(struct dsc_comm *comm, struct dsc__message *message) {
    const struct dsc_comm_backend *backend = comm->backend;
    double looked = message->since;
    for (;;) {
        uint32_t seen = backend->mail(comm->state);
        DSC_TRY(backend->message_advance(comm->state, message));
        if (message->done)
            return DSC_OK;
        if (dsc_comm_now() - looked > 0.09) {
            looked = dsc_comm_now();
            DSC_TRY(backend->message_check(comm->state, message, seen));
        }
        backend->message_wait(comm->state, seen);
    }
}

static enum dsc_status move_queued(struct dsc_comm *comm, bool is_send, const struct dsc_p2p *what,
                                   int *from) {
    struct dsc_work *work = NULL;
    DSC_TRY(post(comm, is_send, what, &work));
    enum dsc_status status = dsc_work_wait(work, 0, dsc__interrupted, comm);
    if (status == DSC_EINTR && !dsc_work_done(work)) {
        /* The buffer is the caller's again only when the thread has heard of this, too. */
        (void)fail(comm, status);
        comm->backend->ring_mail(comm->state);
        (void)dsc_work_wait(work, 0, NULL, NULL);
        status = DSC_FAIL(DSC_EINTR, "interrupted in %s", is_send ? "send" : "recv");
    }
    *from = dsc_work_peer(work);
    dsc_work_release(work);
    return status;
}

static enum dsc_status move(struct dsc_comm *comm, bool is_send, const struct dsc_p2p *what,
                            int *from) {
    if (comm->messages && !dsc__queue_empty(comm->messages))
        return move_queued(comm, is_send, what, from);
    struct dsc__message message = message_of(what, is_send);
    enum dsc_status status = move_on(comm, &message);
    if (comm->backend->message_end)
        comm->backend->message_end(comm->state);
    if (status != DSC_OK)
        drop(comm, &message);
    *from = message.peer;
    return status == DSC_OK ? DSC_OK : fail(comm, status);
}

enum dsc_status dsc_comm_send(struct dsc_comm *comm, const struct dsc_p2p *message) {
    int to = 0;
    DSC_TRY(check_message(comm, "send", message, 0));
    return move(comm, true, message, &to);
}

enum dsc_status dsc_comm_recv(struct dsc_comm *comm, const struct dsc_p2p *message, int *from) {
    int sender = 0;
    DSC_TRY(check_message(comm, "recv", message, -1));
    return move(comm, false, message, from ? from : &sender);
}
