/* Ranks that wait for each other in operations of different channels would wait for ever: one is in
 * engine.step, the other in a user's barrier.
 *
 * Decides: when that is so. A rank whose main thread has waited for a while says in its region in
 * what, and for whom. A waiter follows these pointers from itself; if they lead back, and nobody on
 * the way has been served or has moved since, nobody can ever move: the threads that would have to
 * come are those that wait. Invariant: no false alarm where only main threads and threads of
 * communicators call operations. A rank that still has asynchronous operations in the channel that
 * it is awaited in may come without its main thread, so it ends the search, as does a rank that is
 * not waiting (slow is not dead); a circle must be seen in two looks. */
#include "shm.h"

#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { NAMED_MAX = 4 };

/* One rank's blocked record as read: epoch 0 if there is none, or it was being changed. */
struct look {
    uint64_t epoch, target;
    uint32_t waits_for, slot, kind;
    char text[DSC__SHM_BLOCKED_TEXT];
};

static void look_at(const struct dsc__shm_node *node, int rank, struct look *out) {
    struct dsc__shm_blocked *b = &node->regions[rank]->blocked;
    uint64_t words[DSC__SHM_BLOCKED_TEXT / sizeof(uint64_t)];
    out->epoch = atomic_load(&b->epoch);
    out->target = atomic_load(&b->target);
    out->waits_for = atomic_load(&b->waits_for);
    out->slot = atomic_load(&b->slot);
    out->kind = atomic_load(&b->kind);
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        words[i] = atomic_load(&b->text[i]);
    memcpy(out->text, words, sizeof out->text);
    out->text[sizeof out->text - 1] = '\0';
    if (out->epoch % 2 == 0 || atomic_load(&b->epoch) != out->epoch ||
        out->waits_for >= (uint32_t)node->size || out->slot >= DSC__SHM_CHANNELS)
        out->epoch = 0;
}

/* Whether `rank` still waits: the awaited one has not come, nor can it without its main thread. */
static bool still_waits(const struct dsc__shm_node *node, int rank, const struct look *look) {
    struct dsc__shm_region *awaited = node->regions[look->waits_for];
    struct dsc__shm_block *block = &awaited->blocks[look->slot];
    if (look->kind == DSC__SHM_MAIL)
        return atomic_load(&awaited->n_messages) == 0 &&
               atomic_load(&node->regions[rank]->mail) == (uint32_t)look->target;
    if (look->kind == DSC__SHM_OPEN)
        return dsc__shm_find_key(awaited, look->target) == 0;
    return atomic_load(&block->n_posted) == 0 &&
           !dsc__shm_has(block, (enum dsc__shm_awaited)look->kind, look->target);
}

/* Follows the pointers from this rank. Returns the length of the circle, 0 if there is none; *mark
 * becomes a number that differs if anything in the circle has changed. */
static int follow(const struct dsc__shm_node *node, uint64_t *mark) {
    struct look look;
    uint64_t sum = 1;
    int rank = node->rank, n = 0;
    do {
        look_at(node, rank, &look);
        if (look.epoch == 0 || !still_waits(node, rank, &look) || ++n > node->size)
            return 0;
        sum = sum * 0x100000001b3u + look.epoch * 1024 + (uint64_t)rank;
        rank = (int)look.waits_for;
    } while (rank != node->rank);
    *mark = sum;
    return n;
}

static enum dsc_status fail(const struct dsc__shm_node *node, int n) {
    char text[DSC__REASON_MAX] = "";
    size_t used = 0;
    struct look look;
    int rank = node->rank;
    for (int i = 0; i < n && i < NAMED_MAX && used < sizeof text - 1; i++) {
        look_at(node, rank, &look);
        used += (size_t)snprintf(text + used, sizeof text - used, "%srank %d in %.180s for rank %u",
                                 i ? ", " : "", rank, look.text, (unsigned)look.waits_for);
        rank = (int)look.waits_for;
    }
    return DSC_FAIL(DSC_EDIVERGED, "ranks wait for each other in different operations: %s%s", text,
                    n > NAMED_MAX ? ", ..." : "");
}

/* Only a main thread speaks for its rank: what other threads wait in, others may end. */
static bool speaks_for_rank(const struct dsc__shm *shm) {
    if (shm->node->world)
        return !dsc__on_own_thread(shm->options->interrupt_context);
    return (pid_t)syscall(SYS_gettid) == getpid();
}

static void tell(struct dsc__shm *shm, const struct dsc__shm_wait *wait, int missing) {
    struct dsc__shm_blocked *b = &shm->node->regions[shm->node->rank]->blocked;
    uint64_t epoch = atomic_load(&b->epoch), words[DSC__SHM_BLOCKED_TEXT / sizeof(uint64_t)];
    uint32_t waits_for = (uint32_t)shm->members[missing];
    char text[DSC__SHM_BLOCKED_TEXT] = "";
    if (epoch % 2 == 1 && atomic_load(&b->waits_for) == waits_for &&
        atomic_load(&b->target) == wait->target)
        return; /* told already */
    dsc__shm_describe_wait(shm, wait, text);
    memcpy(words, text, sizeof words);
    epoch += epoch % 2;
    atomic_store(&b->epoch, epoch);
    atomic_store(&b->waits_for, waits_for);
    atomic_store(&b->slot, shm->slots[missing]);
    atomic_store(&b->kind, (uint32_t)wait->kind);
    atomic_store(&b->target, wait->target);
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        atomic_store(&b->text[i], words[i]);
    atomic_store(&b->epoch, epoch + 1);
}

enum dsc_status dsc__shm_look_for_standstill(struct dsc__shm *shm, const struct dsc__shm_wait *wait,
                                             int missing) {
    uint64_t mark = 0, again = 0;
    if (wait->kind == DSC__SHM_BELL || missing >= shm->size || !speaks_for_rank(shm))
        return DSC_OK;
    tell(shm, wait, missing);
    int n = follow(shm->node, &mark);
    bool seen_before = n > 0 && mark == shm->standstill;
    shm->standstill = n > 0 ? mark : 0;
    if (!seen_before || follow(shm->node, &again) != n || again != mark)
        return DSC_OK;
    return fail(shm->node, n);
}

void dsc__shm_end_look(struct dsc__shm *shm) {
    struct dsc__shm_blocked *b = &shm->node->regions[shm->node->rank]->blocked;
    uint64_t epoch = atomic_load(&b->epoch);
    if (epoch % 2 == 0 || !speaks_for_rank(shm))
        return;
    shm->standstill = 0;
    atomic_store(&b->epoch, epoch + 1);
}
