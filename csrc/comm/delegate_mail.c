/* Messages between two ranks over a delegate: tcp_mail.c's, with the delegate's board.
 *
 * Decides: what a rank that waits for a message looks at, and when. Each tenth of a second:
 * signals, time-out, whether the other end still listens; each third: whether a process of its
 * machine has ended, for those who cannot see it; each second: whether a rank gave up.
 * Invariant: the board, which may need the interpreter, is never asked under the mail's lock. */
#include "delegate_impl.h"

#include <stdio.h>

enum {
    LOOK_EACH = 10,
    NOTE_EACH = 3,
    GONE_AT = 3
}; /* checks: what came before an end is read first */

static enum dsc_status know(struct dsc__delegate *d, int peer) {
    char key[DSC_BOARD_KEY_MAX], where[DSC_BOARD_TEXT_MAX];
    if (dsc__mail_knows(d->mail, peer))
        return DSC_OK;
    snprintf(key, sizeof key, "mail/%d", peer);
    DSC_TRY(d->ops.look(d->ops.context, key, where));
    return dsc__mail_introduce(d->mail, peer, where);
}

bool dsc__delegate_has_messages(void *state) {
    const struct dsc__delegate *d = state;
    return d->mail;
}

enum dsc_status dsc__delegate_message_advance(void *state, struct dsc__message *m) {
    struct dsc__delegate *d = state;
    if (m->is_send)
        DSC_TRY(know(d, m->peer));
    return dsc__mail_advance(d->mail, m);
}

void dsc__delegate_message_drop(void *state, struct dsc__message *m) {
    struct dsc__delegate *d = state;
    dsc__mail_drop(d->mail, m);
}

uint32_t dsc__delegate_mail(void *state) {
    struct dsc__delegate *d = state;
    return dsc__mail_count(d->mail);
}

void dsc__delegate_message_wait(void *state, uint32_t seen) {
    struct dsc__delegate *d = state;
    dsc__mail_wait(d->mail, seen);
}

void dsc__delegate_ring_mail(void *state) {
    struct dsc__delegate *d = state;
    dsc__mail_ring(d->mail);
}

/* Whether all ranks that could be the other end have gone. */
static enum dsc_status look_for_end(struct dsc__delegate *d, const struct dsc__message *m,
                                    bool *gone) {
    int first = m->peer < 0 ? 0 : m->peer, last = m->peer < 0 ? d->comm->size - 1 : m->peer;
    *gone = true;
    for (int r = first; r <= last; r++) {
        if (r == d->comm->rank)
            continue;
        DSC_TRY(know(d, r));
        *gone &= dsc__mail_gone(d->mail, r, m->is_send);
    }
    return DSC_OK;
}

static enum dsc_status check(struct dsc__delegate *d, struct dsc__message *m) {
    const struct dsc_comm_options *options = &d->comm->options;
    char call[DSC__CALL_TEXT_MAX], reason[40];
    double waited_s = dsc_comm_now() - m->since;
    bool gone;
    dsc__message_call(m, call);
    if (options->interrupted(options->interrupt_context))
        return DSC_FAIL(DSC_EINTR, "interrupted in %s", call);
    if (options->timeout_s > 0 && waited_s >= options->timeout_s)
        return DSC_FAIL(DSC_ETIMEDOUT, "rank %d waited %.1f s in %s", d->comm->rank, waited_s,
                        call);
    if (m->n_looks % NOTE_EACH == 0)
        DSC_TRY(dsc__delegate_note_dead(d));
    if (m->n_looks++ % LOOK_EACH == 0)
        DSC_TRY(dsc__delegate_check_board(d));
    DSC_TRY(look_for_end(d, m, &gone));
    m->n_gone = gone ? m->n_gone + 1 : 0;
    if (m->n_gone < GONE_AT)
        return DSC_OK;
    snprintf(reason, sizeof reason,
             m->peer < 0 ? "all have closed theirs" : "rank %d has closed it", m->peer);
    return dsc__delegate_gone(d, reason, call);
}

/* What has come is no error, whatever became of its sender since. */
enum dsc_status dsc__delegate_message_check(void *state, struct dsc__message *m, uint32_t seen) {
    struct dsc__delegate *d = state;
    enum dsc_status status = check(d, m);
    (void)seen;
    if (status == DSC_EDEAD && dsc__mail_advance(d->mail, m) == DSC_OK && m->done)
        return DSC_OK;
    return status;
}
