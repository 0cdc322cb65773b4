/* Messages between two ranks of the node.
 *
 * Decides: how they find each other and travel. A pair of ranks has a few lanes per direction, in
 * the sender's region; a message claims one, writes what it is, and streams through the lane's
 * ring. What fits into the ring is sent when it is written, not when it is received. A receiver
 * takes the oldest message with its tag that nobody has taken. Invariant: a lane is claimed by its
 * sender and freed by its receiver, and never in between by anybody. */
#include "shm.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define TAKEN (UINT64_C(1) << 63) /* the mark of a message that a receiver has */

static struct dsc__shm_region *own_region(const struct dsc__shm *shm) {
    return dsc__shm_region_of(shm, shm->rank);
}

static void ring_rank(const struct dsc__shm *shm, int rank) {
    struct dsc__shm_region *region = dsc__shm_region_of(shm, rank);
    atomic_fetch_add(&region->mail, 1);
    if (atomic_load(&region->mail_sleepers))
        (void)syscall(SYS_futex, &region->mail, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

void dsc__shm_ring_mail(void *state) {
    struct dsc__shm *shm = state;
    ring_rank(shm, shm->rank);
}

uint32_t dsc__shm_mail(void *state) {
    return atomic_load(&own_region(state)->mail);
}

static struct dsc__shm_mailbox *mailbox(const struct dsc__shm *shm, int from, int to) {
    return &dsc__shm_region_of(shm, from)->mailboxes[shm->members[to]];
}

/* ---- the two ends find each other ---- */

static void claim_lane(const struct dsc__shm *shm, struct dsc__message *m) {
    struct dsc__shm_mailbox *box = mailbox(shm, shm->rank, m->peer);
    for (int i = 0; i < DSC__SHM_LANES && !m->lane; i++) {
        struct dsc__shm_lane *lane = &box->lanes[i];
        uint32_t nobody = 0;
        if (!atomic_compare_exchange_strong(&lane->claimed, &nobody, 1))
            continue;
        atomic_store_explicit(&lane->tag, m->what.tag, memory_order_relaxed);
        lane->n_bytes = m->n_bytes;
        lane->dtype = m->what.dtype;
        snprintf(lane->label, sizeof lane->label, "%s", m->what.label ? m->what.label : "");
        atomic_store(&lane->n_written, 0);
        atomic_store(&lane->n_read, 0);
        atomic_store(&lane->stamp, 1 + atomic_fetch_add(&box->n_stamps, 1));
        m->lane = lane;
    }
}

static void free_lane(struct dsc__shm_lane *lane) {
    atomic_store(&lane->stamp, 0);
    atomic_store(&lane->claimed, 0);
}

/* Takes the oldest message with the tag, if there is one. Another thread may take and free a lane
 * that this one looks at, and the sender use it again: stamps never repeat, so the mark lands only
 * on the message whose tag was read. */
static struct dsc__shm_lane *take_oldest(struct dsc__shm_mailbox *box, uint64_t tag) {
    struct dsc__shm_lane *found;
    uint64_t oldest;
    do {
        found = NULL;
        oldest = TAKEN;
        for (int i = 0; i < DSC__SHM_LANES; i++) {
            struct dsc__shm_lane *lane = &box->lanes[i];
            uint64_t stamp = atomic_load(&lane->stamp);
            if (stamp != 0 && stamp < oldest && atomic_load(&lane->tag) == tag) {
                oldest = stamp;
                found = lane;
            }
        }
    } while (found && !atomic_compare_exchange_strong(&found->stamp, &oldest, oldest | TAKEN));
    return found;
}

static enum dsc_status find_lane(const struct dsc__shm *shm, struct dsc__message *m) {
    int first = m->peer < 0 ? 0 : m->peer, last = m->peer < 0 ? shm->size - 1 : m->peer;
    for (int from = first; from <= last && !m->lane; from++) {
        struct dsc__shm_lane *lane =
            from == shm->rank ? NULL : take_oldest(mailbox(shm, from, shm->rank), m->what.tag);
        if (!lane)
            continue;
        m->lane = lane;
        m->peer = from;
        if (lane->dtype != (uint32_t)m->what.dtype || lane->n_bytes != m->n_bytes)
            return dsc__message_differs(m, shm->rank, (enum dsc_dtype)lane->dtype,
                                        (size_t)lane->n_bytes, lane->label);
    }
    return DSC_OK;
}

/* ---- data ---- */

/* Copies between the ring, from position n_moved on, and the message; in pieces, so that the other
 * end works on one while this end works on the next. */
static void move_bytes(const struct dsc__shm *shm, struct dsc__message *m,
                       struct dsc__shm_lane *lane) {
    enum { PIECE = DSC__SHM_LANE_BYTES / 4 };
    for (;;) {
        size_t ready = m->is_send
                           ? DSC__SHM_LANE_BYTES - (m->n_moved - (size_t)atomic_load(&lane->n_read))
                           : (size_t)atomic_load(&lane->n_written) - m->n_moved;
        size_t place = m->n_moved % DSC__SHM_LANE_BYTES;
        size_t n = dsc_min(dsc_min(ready, m->n_bytes - m->n_moved), PIECE);
        n = dsc_min(n, DSC__SHM_LANE_BYTES - place);
        if (n == 0)
            return;
        char *data = (char *)m->what.data + m->n_moved;
        if (m->is_send)
            memcpy(lane->data + place, data, n);
        else
            memcpy(data, lane->data + place, n);
        m->n_moved += n;
        atomic_store(m->is_send ? &lane->n_written : &lane->n_read, m->n_moved);
        ring_rank(shm, m->peer);
    }
}

enum dsc_status dsc__shm_message_advance(void *state, struct dsc__message *m) {
    struct dsc__shm *shm = state;
    bool is_new = !m->lane;
    DSC_TRY(dsc__shm_check_broken(shm));
    if (is_new && m->is_send)
        claim_lane(shm, m);
    else if (is_new)
        DSC_TRY(find_lane(shm, m));
    struct dsc__shm_lane *lane = m->lane;
    if (!lane)
        return DSC_OK;
    if (is_new && m->n_bytes == 0)
        ring_rank(shm, m->peer);
    move_bytes(shm, m, lane);
    if (m->n_moved < m->n_bytes)
        return DSC_OK;
    m->done = true;
    if (!m->is_send) {
        free_lane(lane);
        ring_rank(shm, m->peer); /* it may wait for a lane */
    }
    return DSC_OK;
}

/* ---- waiting ---- */

void dsc__shm_message_wait(void *state, uint32_t seen) {
    struct dsc__shm *shm = state;
    struct dsc__shm_region *mine = own_region(shm);
    struct timespec slice = {.tv_nsec = 100 * 1000000L};
    for (unsigned i = 0; i < shm->n_spins_max; i++) {
        if (atomic_load(&mine->mail) != seen)
            return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    atomic_fetch_add(&mine->mail_sleepers, 1);
    (void)syscall(SYS_futex, &mine->mail, FUTEX_WAIT, seen, &slice, NULL, 0);
    atomic_fetch_sub(&mine->mail_sleepers, 1);
}

/* How a rank has gone, NULL while it has not. */
static const char *how_gone(const struct dsc__shm *shm, int rank) {
    if (atomic_load(&shm->blocks[rank]->left))
        return "left (it closed its communicator)";
    return dsc__shm_is_dead(shm, rank) ? "died or ended" : NULL;
}

/* The other end has gone (from any rank: all that could be it), and left nothing to take. */
static enum dsc_status check_peer(struct dsc__shm *shm, struct dsc__message *m, const char *call) {
    int first = m->peer < 0 ? 0 : m->peer, last = m->peer < 0 ? shm->size - 1 : m->peer, gone = -1;
    const char *how = NULL;
    for (int r = first; r <= last; r++) {
        if (r == shm->rank)
            continue;
        how = how_gone(shm, r);
        if (!how)
            return DSC_OK;
        gone = r;
    }
    DSC_TRY(dsc__shm_message_advance(shm, m));
    if (m->done)
        return DSC_OK;
    return DSC_FAIL(DSC_EDEAD, "rank %d (pid %d) %s; rank %d waits in %s", gone,
                    (int)dsc__shm_region_of(shm, gone)->pid, how, shm->rank, call);
}

enum dsc_status dsc__shm_message_check(void *state, struct dsc__message *m, uint32_t seen) {
    struct dsc__shm *shm = state;
    const struct dsc_comm_options *options = shm->options;
    char call[DSC__CALL_TEXT_MAX];
    double waited_s = dsc_comm_now() - m->since;
    dsc__message_call(m, call);
    DSC_TRY(check_peer(shm, m, call));
    if (m->done)
        return DSC_OK;
    if (options->interrupted(options->interrupt_context))
        return DSC_FAIL(DSC_EINTR, "interrupted in %s", call);
    if (options->timeout_s > 0 && waited_s >= options->timeout_s)
        return DSC_FAIL(DSC_ETIMEDOUT, "rank %d waited %.1f s in %s", shm->rank, waited_s, call);
    struct dsc__shm_wait wait = {.kind = DSC__SHM_MAIL, .target = seen, .label = call};
    return m->is_async || m->peer < 0 ? DSC_OK : dsc__shm_look_for_standstill(shm, &wait, m->peer);
}

void dsc__shm_message_end(void *state) {
    dsc__shm_end_look(state);
}
