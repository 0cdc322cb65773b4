/* Asynchronous operations: a queue, and a thread of the communicator that works it off.
 *
 * Decides: order and life. The thread exists from the first asynchronous operation to the close,
 * and a synchronous operation waits until the queue is empty, so operations run in the order of
 * their calls. It blocks all signals and calls nothing of the caller's. Invariant: a work is under
 * its queue's lock or belongs to the thread; a handle may outlive queue and communicator. */
#define _GNU_SOURCE
#include "backend.h"

#include "../alloc.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { SLICE_MS = 100 };

/* ---- queue and thread ---- */

static void queue_unref(struct dsc__queue *queue) {
    if (!queue || atomic_fetch_sub(&queue->n_refs, 1) != 1)
        return;
    (void)pthread_cond_destroy(&queue->changed);
    (void)pthread_mutex_destroy(&queue->lock);
    dsc_free(queue);
}

static void *run_thread(void *arg) {
    struct dsc__queue *queue = arg;
    (void)pthread_mutex_lock(&queue->lock);
    (void)pthread_mutex_unlock(&queue->lock);
    queue->serve(queue);
    return NULL;
}

static int start_thread(struct dsc__queue *queue) {
    sigset_t all, before;
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&queue->thread, NULL, run_thread, queue);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

enum dsc_status dsc__queue_open(struct dsc_comm *comm, dsc__serve_fn serve,
                                struct dsc__queue *_Atomic *out) {
    void *block = NULL;
    pthread_condattr_t monotonic;
    DSC_TRY(dsc_alloc(sizeof(struct dsc__queue), &block));
    struct dsc__queue *queue = block;
    atomic_store(&queue->n_refs, 1);
    queue->comm = comm;
    queue->pid = getpid();
    queue->serve = serve;
    (void)pthread_mutex_init(&queue->lock, NULL);
    (void)pthread_condattr_init(&monotonic);
    (void)pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    (void)pthread_cond_init(&queue->changed, &monotonic);
    (void)pthread_condattr_destroy(&monotonic);
    /* The thread waits for the lock, so it finds itself where it looks whose thread it is. */
    (void)pthread_mutex_lock(&queue->lock);
    int error = start_thread(queue);
    if (!error)
        atomic_store(out, queue);
    (void)pthread_mutex_unlock(&queue->lock);
    if (error) {
        queue_unref(queue);
        return DSC_FAIL(DSC_ENOMEM, "could not start a thread for asynchronous operations: %s",
                        strerror(error));
    }
    return DSC_OK;
}

void dsc__queue_close(struct dsc__queue *queue) {
    if (!queue)
        return;
    (void)pthread_mutex_lock(&queue->lock);
    atomic_store(&queue->stop, true);
    (void)pthread_cond_broadcast(&queue->changed);
    (void)pthread_mutex_unlock(&queue->lock);
    if (queue == queue->comm->messages)
        queue->comm->backend->ring_mail(queue->comm->state);
    (void)pthread_join(queue->thread, NULL);
    queue_unref(queue);
}

bool dsc__queue_empty(struct dsc__queue *queue) {
    (void)pthread_mutex_lock(&queue->lock);
    bool empty = !queue->head;
    (void)pthread_mutex_unlock(&queue->lock);
    return empty;
}

static bool is_own(const struct dsc__queue *queue) {
    return queue && pthread_equal(queue->thread, pthread_self());
}

bool dsc__on_own_thread(const struct dsc_comm *comm) {
    return is_own(comm->works) || is_own(comm->messages);
}

bool dsc__is_awaited(const struct dsc_comm *comm) {
    return comm->works && atomic_load(&comm->works->n_waiting) > 0;
}

bool dsc__interrupted(void *context) {
    const struct dsc_comm *comm = context;
    if (is_own(comm->works))
        return atomic_load(&comm->works->stop);
    if (is_own(comm->messages))
        return atomic_load(&comm->messages->stop);
    if (atomic_load(&comm->halting))
        return true;
    return comm->given.interrupted && comm->given.interrupted(comm->given.interrupt_context);
}

/* ---- works ---- */

enum dsc_status dsc__work_new(struct dsc__queue *queue, enum dsc_comm_op op, const char *label,
                              struct dsc_work **out) {
    void *block = NULL;
    DSC_TRY(dsc_alloc(sizeof(struct dsc_work), &block));
    struct dsc_work *work = block;
    atomic_store(&work->n_refs, 2); /* the caller's and the queue's */
    work->op = op;
    work->queue = queue;
    atomic_fetch_add(&queue->n_refs, 1);
    if (label)
        snprintf(work->label, sizeof work->label, "%s", label);
    *out = work;
    return DSC_OK;
}

void dsc_work_release(struct dsc_work *work) {
    if (!work || atomic_fetch_sub(&work->n_refs, 1) != 1)
        return;
    queue_unref(work->queue);
    dsc_free(work->counts);
    dsc_free(work->pieces);
    dsc_free(work);
}

void dsc__queue_push(struct dsc__queue *queue, struct dsc_work *work) {
    const struct dsc_comm *comm = queue->comm;
    if (comm->backend->posted)
        comm->backend->posted(comm->state, work->op, 1);
    (void)pthread_mutex_lock(&queue->lock);
    if (queue->tail)
        queue->tail->next = work;
    else
        queue->head = work;
    queue->tail = work;
    (void)pthread_cond_broadcast(&queue->changed);
    (void)pthread_mutex_unlock(&queue->lock);
}

enum dsc_status dsc__fail_closed(void) {
    return DSC_FAIL(DSC_ESTATE, "the communicator was closed before this operation ended");
}

void dsc__queue_end(struct dsc__queue *queue, struct dsc_work *work, enum dsc_status status) {
    const struct dsc_comm *comm = queue->comm;
    if (status == DSC_EINTR)
        status = dsc__fail_closed();
    if (comm->backend->posted)
        comm->backend->posted(comm->state, work->op, -1);
    (void)pthread_mutex_lock(&queue->lock);
    struct dsc_work **at = &queue->head, *before = NULL;
    for (; *at != work; at = &(*at)->next)
        before = *at;
    *at = work->next;
    if (queue->tail == work)
        queue->tail = before;
    work->status = status;
    if (status != DSC_OK)
        snprintf(work->reason, sizeof work->reason, "%s", dsc_last_error());
    work->done = true;
    (void)pthread_cond_broadcast(&queue->changed);
    (void)pthread_mutex_unlock(&queue->lock);
    dsc_work_release(work);
}

/* In a forked child, where the lock may be held for ever and nothing goes on. */
static bool is_inherited(const struct dsc_work *work) {
    return work->queue->pid != getpid();
}

bool dsc_work_done(struct dsc_work *work) {
    if (is_inherited(work))
        return work->done;
    (void)pthread_mutex_lock(&work->queue->lock);
    bool done = work->done;
    (void)pthread_mutex_unlock(&work->queue->lock);
    return done;
}

int dsc_work_peer(struct dsc_work *work) {
    return work->message.peer;
}

/* Sleeps until something in the queue changes, `s` seconds or a tenth at most. Lock held. */
static void sleep_held(struct dsc__queue *queue, double s) {
    struct timespec until;
    (void)clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += s < SLICE_MS * 1e-3 ? (long)(s * 1e9) : SLICE_MS * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_nsec -= 1000000000L;
        until.tv_sec++;
    }
    (void)pthread_cond_timedwait(&queue->changed, &queue->lock, &until);
}

static enum dsc_status wait_for_end(struct dsc_work *work, double timeout_s,
                                    dsc_interrupt_fn interrupted, void *context) {
    double since = dsc_comm_now();
    while (!dsc_work_done(work)) {
        double waited = dsc_comm_now() - since;
        if (timeout_s > 0 && waited >= timeout_s)
            return DSC_FAIL(DSC_ETIMEDOUT, "waited %.3g s; the operation still runs", timeout_s);
        if (waited > SLICE_MS * 1e-3 && interrupted && interrupted(context))
            return DSC_FAIL(DSC_EINTR, "interrupted in a wait; the operation still runs");
        (void)pthread_mutex_lock(&work->queue->lock);
        if (!work->done)
            sleep_held(work->queue, timeout_s > 0 ? timeout_s - waited : 1);
        (void)pthread_mutex_unlock(&work->queue->lock);
    }
    return work->status == DSC_OK ? DSC_OK : DSC_FAIL(work->status, "%s", work->reason);
}

enum dsc_status dsc_work_wait(struct dsc_work *work, double timeout_s, dsc_interrupt_fn interrupted,
                              void *context) {
    if (is_inherited(work) && !work->done)
        return DSC_FAIL(DSC_ESTATE, "a forked child cannot wait for its parent's operation");
    bool for_ever = timeout_s <= 0;
    atomic_fetch_add(&work->queue->n_waiting, for_ever);
    enum dsc_status status = wait_for_end(work, timeout_s, interrupted, context);
    atomic_fetch_sub(&work->queue->n_waiting, for_ever);
    return status;
}

/* ---- collectives ---- */

typedef enum dsc_status (*call_fn)(struct dsc_comm *, const struct dsc_coll *);

static enum dsc_status run(struct dsc_comm *comm, struct dsc_work *work) {
    static const call_fn calls[DSC_COMM_OP_COUNT] = {
        [DSC_COMM_ALL_REDUCE] = dsc_comm_all_reduce,
        [DSC_COMM_REDUCE_SCATTER] = dsc_comm_reduce_scatter,
        [DSC_COMM_ALL_GATHER] = dsc_comm_all_gather,
        [DSC_COMM_BROADCAST] = dsc_comm_broadcast,
        [DSC_COMM_REDUCE] = dsc_comm_reduce,
        [DSC_COMM_GATHER] = dsc_comm_gather,
        [DSC_COMM_SCATTER] = dsc_comm_scatter,
        [DSC_COMM_ALL_TO_ALL] = dsc_comm_all_to_all,
    };
    if (work->op == DSC_COMM_BARRIER)
        return dsc_comm_barrier(comm, work->coll.label);
    if (work->op == DSC_COMM_GATHER_PIECES)
        return dsc__gather_pieces(comm, work->label, work->tag, work->pieces, work->n_pieces);
    if (work->op == DSC_COMM_ALL_TO_ALL_V)
        return dsc_comm_all_to_all_v(comm, &work->coll, work->counts, work->counts + comm->size);
    return calls[work->op](comm, &work->coll);
}

static void serve(struct dsc__queue *queue) {
    (void)pthread_mutex_lock(&queue->lock);
    for (;;) {
        while (!queue->head && !atomic_load(&queue->stop))
            (void)pthread_cond_wait(&queue->changed, &queue->lock);
        struct dsc_work *work = queue->head;
        if (!work)
            break;
        (void)pthread_mutex_unlock(&queue->lock);
        dsc__queue_end(queue, work, atomic_load(&queue->stop) ? DSC_EINTR : run(queue->comm, work));
        (void)pthread_mutex_lock(&queue->lock);
    }
    (void)pthread_mutex_unlock(&queue->lock);
}

static enum dsc_status work_of(struct dsc_comm *comm, enum dsc_comm_op op,
                               const struct dsc_coll *coll, const size_t *n_send,
                               const size_t *n_recv, struct dsc_work **out) {
    size_t n = (size_t)comm->size * sizeof(size_t);
    struct dsc_work *work = NULL;
    void *counts = NULL;
    if (op == DSC_COMM_ALL_TO_ALL_V)
        DSC_TRY(dsc_alloc(2 * n, &counts));
    enum dsc_status status = dsc__work_new(comm->works, op, coll->label, &work);
    if (status != DSC_OK) {
        dsc_free(counts);
        return status;
    }
    work->coll = *coll;
    work->coll.label = coll->label ? work->label : NULL;
    work->counts = counts;
    if (counts) {
        memcpy(work->counts, n_send, n);
        memcpy(work->counts + comm->size, n_recv, n);
    }
    *out = work;
    return DSC_OK;
}

static enum dsc_status need_thread(struct dsc_comm *comm) {
    DSC_TRY(dsc__check_usable(comm));
    return comm->works ? DSC_OK : dsc__queue_open(comm, serve, &comm->works);
}

enum dsc_status dsc_comm_post(struct dsc_comm *comm, enum dsc_comm_op op,
                              const struct dsc_coll *coll, const size_t *n_send,
                              const size_t *n_recv, struct dsc_work **out) {
    struct dsc_work *work = NULL;
    if (op > DSC_COMM_ALL_TO_ALL_V && op != DSC_COMM_BARRIER)
        return DSC_FAIL(DSC_EINVAL, "operation %d cannot be asynchronous", (int)op);
    DSC_TRY(need_thread(comm));
    DSC_TRY(work_of(comm, op, coll, n_send, n_recv, &work));
    dsc__queue_push(comm->works, work);
    *out = work;
    return DSC_OK;
}

enum dsc_status dsc_comm_post_pieces(struct dsc_comm *comm, const char *label,
                                     const struct dsc_piece *pieces, size_t n_pieces,
                                     struct dsc_work **out) {
    struct dsc_work *work = NULL;
    void *copy = NULL;
    DSC_TRY(need_thread(comm));
    DSC_TRY(dsc_alloc(n_pieces * sizeof *pieces, &copy));
    enum dsc_status status = dsc__work_new(comm->works, DSC_COMM_GATHER_PIECES, label, &work);
    if (status != DSC_OK) {
        dsc_free(copy);
        return status;
    }
    if (n_pieces > 0)
        memcpy(copy, pieces, n_pieces * sizeof *pieces);
    work->pieces = copy;
    work->n_pieces = n_pieces;
    work->tag = dsc__pieces_tag(label, pieces, n_pieces);
    dsc__queue_push(comm->works, work);
    *out = work;
    return DSC_OK;
}

static enum dsc_status wait_until_empty(struct dsc_comm *comm, struct dsc__queue *queue) {
    double since = dsc_comm_now();
    while (!dsc__queue_empty(queue)) {
        if (dsc_comm_now() - since > SLICE_MS * 1e-3 && dsc__interrupted(comm))
            return DSC_FAIL(DSC_EINTR, "interrupted in a wait for asynchronous operations");
        (void)pthread_mutex_lock(&queue->lock);
        if (queue->head)
            sleep_held(queue, 1);
        (void)pthread_mutex_unlock(&queue->lock);
    }
    return dsc__check_usable(comm); /* one of them may have broken it */
}

enum dsc_status dsc__drain(struct dsc_comm *comm) {
    struct dsc__queue *queue = comm->works;
    if (is_own(queue))
        return DSC_OK;
    atomic_fetch_add(&queue->n_waiting, 1);
    enum dsc_status status = wait_until_empty(comm, queue);
    atomic_fetch_sub(&queue->n_waiting, 1);
    return status;
}
