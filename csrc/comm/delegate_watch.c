/* Waiting over a delegate: who is dead, who gave up, and who waits for what will never come.
 *
 * Decides: what a blocked rank does in its slices of 100 ms. Each: signals, time-out. Each third:
 * whether a process of its machine has ended, which is no error yet (what it owed may be on its
 * way), but noted for those whose connection breaks and who cannot see it. Each second:
 * whether a rank gave up, in whatever channel, or the job stands still. After 1.5 s it posts that
 * it is blocked: when all of the job are, none of them in an operation that all have come to, and
 * nothing has moved between two looks, that is a standstill, which the first to see it posts for
 * all. Invariant: an operation that goes on is no standstill: one that all its ranks are in, or
 * that a rank has left behind it, counts as `hope`. The board has a constant number of keys per
 * rank. */
#define _GNU_SOURCE
#include "delegate_impl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { SLICE_MS = 100, LOOK_EACH = 10, NOTE_EACH = 3, POST_AT = 15, NAMED_MAX = 4, READ_MAX = 16 };
#define LINGER_S 1.5

/* ---- what the board says ---- */

static enum dsc_status look(struct dsc__delegate *d, const char *list, const char *what,
                            char text[DSC_BOARD_TEXT_MAX]) {
    char key[DSC_BOARD_KEY_MAX];
    snprintf(key, sizeof key, "%s/%s", list, what);
    return d->ops.look(d->ops.context, key, text);
}

static enum dsc_status add(struct dsc__delegate *d, const char *what, int64_t by, int64_t *value) {
    return d->ops.add(d->ops.context, what, by, value);
}

static enum dsc_status add_here(struct dsc__delegate *d, uint64_t sequence, int64_t by,
                                int64_t *value) {
    char key[DSC_BOARD_KEY_MAX];
    snprintf(key, sizeof key, "at/%s/%llu", d->channel, (unsigned long long)sequence);
    return add(d, key, by, value);
}

void dsc__delegate_tell(struct dsc__delegate *d, const char *list, bool of_all,
                        enum dsc_status status, const char *reason) {
    char key[DSC_BOARD_KEY_MAX], text[DSC_BOARD_TEXT_MAX];
    snprintf(key, sizeof key, "%s/%s", list, of_all ? "all" : d->channel);
    snprintf(text, sizeof text, "%d %d %d %s", (int)status, d->comm->rank, (int)getpid(), reason);
    /* Whoever cannot be told sees this process's end; and the error stays what it was. */
    if (d->ops.put(d->ops.context, key, text, true) != DSC_OK)
        (void)DSC_FAIL(status, "%s", reason);
}

/* The store ends with the process of rank 0, whose exception may end it at once: it stays until all
 * ranks know, or have had the time to look. */
void dsc__delegate_linger(struct dsc__delegate *d, enum dsc_status status, const char *reason) {
    const struct timespec pause = {.tv_nsec = 20 * 1000000};
    double since = dsc_comm_now();
    int64_t n_know = 0;
    enum dsc_status result = add(d, "know", 1, &n_know);
    while (result == DSC_OK && d->ops.job_rank == 0 && n_know < d->ops.job_size &&
           dsc_comm_now() - since < LINGER_S) {
        (void)nanosleep(&pause, NULL);
        result = add(d, "know", 0, &n_know);
    }
    if (result != DSC_OK)
        (void)DSC_FAIL(status, "%s", reason);
}

/* What a rank told, as this rank's error. */
static enum dsc_status heard(const struct dsc__delegate *d, const char *text, const char *how) {
    char *at = NULL;
    int code = (int)strtol(text, &at, 10);
    int rank = (int)strtol(at, &at, 10), pid = (int)strtol(at, &at, 10);
    /* A rank that was interrupted, or ran out of memory, is for the others one that is gone. */
    if (code != DSC_ETIMEDOUT && code != DSC_EDIVERGED)
        code = DSC_EDEAD;
    return DSC_FAIL((enum dsc_status)code, "rank %d (pid %d%s) %s: %.900s", rank, pid,
                    rank == d->comm->rank ? ", this one" : "", how, at + (*at == ' '));
}

enum dsc_status dsc__delegate_check_board(struct dsc__delegate *d) {
    char text[DSC_BOARD_TEXT_MAX];
    DSC_TRY(look(d, "broken", "all", text));
    if (text[0])
        return heard(d, text, "gave up");
    DSC_TRY(look(d, "standstill", "all", text));
    if (text[0])
        return DSC_FAIL(DSC_EDIVERGED, "%.1000s", text);
    return DSC_OK;
}

/* ---- a standstill ---- */

/* Whether this rank counts among the blocked: in a thread of the communicator's own only while
 * another thread waits for that, since else the rank itself goes on. */
static enum dsc_status count(struct dsc__delegate *d) {
    char key[DSC_BOARD_KEY_MAX], text[DSC_BOARD_TEXT_MAX], call[DSC__CALL_TEXT_MAX];
    bool counts = !dsc__on_own_thread(d->comm) || dsc__is_awaited(d->comm);
    int64_t unused;
    if (counts == d->watch.counts)
        return DSC_OK;
    dsc__print_operation(&d->current, call);
    snprintf(key, sizeof key, "where/%d", d->ops.job_rank);
    snprintf(text, sizeof text, "%s of \"%s\"", call, d->channel);
    if (counts)
        DSC_TRY(d->ops.put(d->ops.context, key, text, false));
    DSC_TRY(add(d, "moves", 1, &unused));
    DSC_TRY(add(d, "blocked", counts ? 1 : -1, &unused));
    d->watch.counts = counts;
    return DSC_OK;
}

/* This rank has come to its operation. The operation before is one that somebody has left behind.
 */
static enum dsc_status post(struct dsc__delegate *d) {
    int64_t here, behind, ahead, unused;
    uint64_t sequence = d->current.sequence;
    DSC_TRY(add_here(d, sequence, 1, &here));
    DSC_TRY(add_here(d, sequence - 1, 0, &behind));
    DSC_TRY(add_here(d, sequence + 1, 0, &ahead));
    d->watch.hopeful = here == d->comm->size || behind > 0 || ahead > 0;
    if (d->watch.hopeful)
        DSC_TRY(add(d, "hope", 1, &unused));
    DSC_TRY(add(d, "moves", 1, &unused));
    d->watch.sequence = sequence;
    d->watch.posted = true;
    return count(d);
}

static void unpost(struct dsc__delegate *d) {
    int64_t unused;
    bool counts = d->watch.counts;
    d->watch.posted = d->watch.counts = false;
    if (add(d, "blocked", counts ? -1 : 0, &unused) != DSC_OK ||
        add(d, "moves", 1, &unused) != DSC_OK)
        return; /* the next wait finds the board gone */
    (void)add_here(d, d->watch.sequence, -1, &unused);
    if (d->watch.hopeful)
        (void)add(d, "hope", -1, &unused);
}

/* A handful of ranks, each place once. */
static void describe(struct dsc__delegate *d, char out[DSC_BOARD_TEXT_MAX]) {
    char places[NAMED_MAX][DSC_BOARD_TEXT_MAX], key[16];
    int n_named = 0;
    size_t used = (size_t)snprintf(out, DSC_BOARD_TEXT_MAX,
                                   "ranks wait for each other in different operations:");
    for (int i = 0; i < d->ops.job_size && i < READ_MAX && n_named < NAMED_MAX; i++) {
        int rank = (d->ops.job_rank + i) % d->ops.job_size, k = 0;
        snprintf(key, sizeof key, "%d", rank);
        if (look(d, "where", key, places[n_named]) != DSC_OK)
            return;
        while (k < n_named && strcmp(places[k], places[n_named]) != 0)
            k++;
        if (k < n_named || used >= DSC_BOARD_TEXT_MAX - 1)
            continue;
        used += (size_t)snprintf(out + used, DSC_BOARD_TEXT_MAX - used, "%s rank %d in %.220s",
                                 n_named ? "," : "", rank, places[n_named]);
        n_named++;
    }
}

static enum dsc_status check_standstill(struct dsc__delegate *d) {
    char text[DSC_BOARD_TEXT_MAX];
    int64_t n_blocked, hope, moves;
    DSC_TRY(add(d, "blocked", 0, &n_blocked));
    if (n_blocked < d->ops.job_size) {
        d->watch.seen = -1;
        return DSC_OK;
    }
    DSC_TRY(add(d, "hope", 0, &hope));
    DSC_TRY(add(d, "moves", 0, &moves));
    bool again = hope == 0 && moves == d->watch.seen;
    d->watch.seen = hope == 0 ? moves : -1;
    if (!again)
        return DSC_OK;
    describe(d, text);
    DSC_TRY(d->ops.put(d->ops.context, "standstill/all", text, true));
    return dsc__delegate_check_board(d);
}

/* ---- the end of a wait ---- */

static enum dsc_status timed_out(const struct dsc__delegate *d) {
    char call[DSC__CALL_TEXT_MAX];
    dsc__print_operation(&d->current, call);
    return DSC_FAIL(DSC_ETIMEDOUT, "%s: not all of %d ranks came within %.1f s", call,
                    d->comm->size, d->comm->options.timeout_s);
}

enum dsc_status dsc__delegate_note_dead(struct dsc__delegate *d) {
    char key[DSC_BOARD_KEY_MAX], dead[DSC_BOARD_DEAD_MAX] = "";
    d->ops.dead(d->ops.context, dead);
    if (!dead[0] || atomic_exchange(&d->watch.noted, true))
        return DSC_OK;
    snprintf(key, sizeof key, "ended/%s", d->channel);
    return d->ops.put(d->ops.context, key, dead, true);
}

/* A process that is known to have ended, by this rank or by one of its machine. */
static enum dsc_status find_dead(struct dsc__delegate *d, char text[DSC_BOARD_TEXT_MAX]) {
    d->ops.dead(d->ops.context, text);
    return text[0] ? DSC_OK : look(d, "ended", d->channel, text);
}

/* Whose end, or whose decision, a lost connection was shows within a moment. */
enum dsc_status dsc__delegate_gone(struct dsc__delegate *d, const char *reason, const char *call) {
    char text[DSC_BOARD_TEXT_MAX];
    for (int i = 0; i < LOOK_EACH; i++) {
        const struct timespec pause = {.tv_nsec = SLICE_MS * 1000000};
        DSC_TRY(dsc__delegate_check_board(d));
        DSC_TRY(find_dead(d, text));
        if (text[0])
            return DSC_FAIL(DSC_EDEAD, "%.60s died or ended; rank %d waits in %s", text,
                            d->comm->rank, call);
        DSC_TRY(look(d, "left", d->channel, text));
        if (text[0])
            return heard(d, text, "left");
        (void)nanosleep(&pause, NULL);
    }
    return DSC_FAIL(DSC_EDEAD, "the connection to another rank is lost (%s); rank %d waits in %s",
                    reason, d->comm->rank, call);
}

enum dsc_status dsc__delegate_lost(struct dsc__delegate *d, enum dsc_status status) {
    char reason[400], call[DSC__CALL_TEXT_MAX];
    snprintf(reason, sizeof reason, "%s", dsc_last_error());
    dsc__print_operation(&d->current, call);
    return status == DSC_EDEAD ? dsc__delegate_gone(d, reason, call)
                               : DSC_FAIL(status, "%s", reason);
}

enum dsc_status dsc__delegate_look_around(struct dsc__delegate *d, double since) {
    const struct dsc_comm_options *options = &d->comm->options;
    struct dsc__watch *watch = &d->watch;
    if (options->interrupted && options->interrupted(options->interrupt_context))
        return DSC_FAIL(DSC_EINTR, "interrupted while waiting for other ranks");
    if (options->timeout_s > 0 && dsc_comm_now() - since > options->timeout_s)
        return timed_out(d);
    watch->n_slices++;
    if (watch->n_slices % NOTE_EACH == 0)
        DSC_TRY(dsc__delegate_note_dead(d));
    if (watch->n_slices == POST_AT)
        DSC_TRY(post(d));
    else if (watch->n_slices % LOOK_EACH == 0)
        DSC_TRY(dsc__delegate_check_board(d));
    if (watch->posted && watch->n_slices % LOOK_EACH == 0)
        DSC_TRY(count(d));
    if (watch->n_slices > POST_AT && watch->n_slices % LOOK_EACH == LOOK_EACH / 2)
        return check_standstill(d);
    return DSC_OK;
}

void dsc__delegate_begin_wait(struct dsc__delegate *d) {
    d->watch.n_slices = 0;
    d->watch.seen = -1;
}

void dsc__delegate_end_wait(struct dsc__delegate *d) {
    if (d->watch.posted)
        unpost(d);
}

enum dsc_status dsc__delegate_finish(struct dsc__delegate *d) {
    double since = dsc_comm_now();
    bool done = false;
    enum dsc_status status = DSC_OK;
    dsc__delegate_begin_wait(d);
    while (status == DSC_OK && !done) {
        status = d->ops.wait(d->moving, SLICE_MS, &done);
        if (status != DSC_OK)
            status = dsc__delegate_lost(d, status);
        else if (!done)
            status = dsc__delegate_look_around(d, since);
    }
    dsc__delegate_end_wait(d);
    return status;
}
