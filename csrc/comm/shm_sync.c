/* Words between ranks: publishing, waiting, and finding out that somebody will not come.
 *
 * Decides: how a rank waits (spin briefly, then sleep on its own futex in slices of 100 ms; each
 * slice looks for dead ranks, signals and the deadline) and what the errors say. Invariant: sleeper
 * and waker follow Dekker: the sleeper stores `asleep`, then looks at what it waits for; the waker
 * stores that, then looks at `asleep`; all sequentially consistent, so one sees the other. */
#include "shm.h"

#include <errno.h>
#include <linux/futex.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { SLICE_MS = 100 };

static void pause_cpu(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* ---- waking ---- */

static void wake_if_asleep(struct dsc__shm_block *block) {
    if (!atomic_load(&block->asleep))
        return;
    atomic_fetch_add(&block->wake, 1);
    (void)syscall(SYS_futex, &block->wake, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static void wake_others(struct dsc__shm *shm) {
    for (int r = 0; r < shm->size; r++)
        if (r != shm->rank)
            wake_if_asleep(shm->blocks[r]);
}

void dsc__shm_ring(void *state, int rank) {
    struct dsc__shm *shm = state;
    atomic_fetch_add(&shm->blocks[rank]->bell, 1);
    if (rank != shm->rank)
        wake_if_asleep(shm->blocks[rank]);
}

uint32_t dsc__shm_bell(void *state) {
    struct dsc__shm *shm = state;
    return atomic_load(&shm->blocks[shm->rank]->bell);
}

void dsc__shm_leave(void *state) {
    struct dsc__shm *shm = state;
    atomic_store(&shm->blocks[shm->rank]->left, 1);
    wake_others(shm);
}

/* Everybody on the node who sleeps, in whatever channel. */
static void wake_node(const struct dsc__shm_node *node) {
    for (int r = 0; r < node->size; r++)
        for (int slot = 0; slot < DSC__SHM_CHANNELS && r != node->rank; slot++)
            if (slot == 0 || atomic_load(&node->regions[r]->entries[slot].n_refs))
                wake_if_asleep(&node->regions[r]->blocks[slot]);
}

/* Told to the whole node, whichever channel it happened in: the processes should end. */
void dsc__shm_give_up(void *state, enum dsc_status status, const char *reason) {
    struct dsc__shm *shm = state;
    struct dsc__shm_region *mine = shm->node->regions[shm->node->rank];
    uint32_t nobody = 0;
    if (atomic_exchange(&mine->giving, 1))
        return; /* readers hold the first reason */
    snprintf(mine->reason, sizeof mine->reason, "%s", reason);
    atomic_store(&mine->gave_up, (uint32_t)-status);
    (void)atomic_compare_exchange_strong(&shm->node->regions[0]->broken, &nobody,
                                         1 + (uint32_t)shm->node->rank);
    wake_node(shm->node);
}

/* ---- fingerprints in slots ---- */

void dsc__shm_publish(struct dsc__shm *shm, const struct dsc__print *print) {
    struct dsc__shm_slot *slot = &shm->blocks[shm->rank]->ring[print->sequence % DSC__SHM_RING];
    uint64_t words[DSC__SHM_PRINT_WORDS];
    memcpy(words, print, sizeof words);
    /* A reader that only describes this rank may look at any moment: word 0 tells it to look again.
     */
    atomic_store_explicit(&slot->words[0], 0, memory_order_release);
    for (int i = 1; i < DSC__SHM_PRINT_WORDS; i++)
        atomic_store_explicit(&slot->words[i], words[i], memory_order_release);
    atomic_store(&slot->words[0], words[0]);
    wake_others(shm);
}

/* False if the slot changed meanwhile. */
static bool read_slot(struct dsc__shm_slot *slot, struct dsc__print *out) {
    uint64_t words[DSC__SHM_PRINT_WORDS];
    words[0] = atomic_load_explicit(&slot->words[0], memory_order_acquire);
    for (int i = 1; i < DSC__SHM_PRINT_WORDS; i++)
        words[i] = atomic_load_explicit(&slot->words[i], memory_order_acquire);
    memcpy(out, words, sizeof words);
    out->label[DSC__LABEL_MAX - 1] = '\0';
    return words[0] != 0 && atomic_load_explicit(&slot->words[0], memory_order_acquire) == words[0];
}

void dsc__shm_read_print(const struct dsc__shm *shm, int rank, uint64_t sequence,
                         struct dsc__print *out) {
    /* Called between agreement and the next operation: the slot cannot change. */
    (void)read_slot(&shm->blocks[rank]->ring[sequence % DSC__SHM_RING], out);
}

void dsc__shm_last_print(const struct dsc__shm *shm, int rank, struct dsc__print *out) {
    struct dsc__print print;
    memset(out, 0, sizeof *out);
    for (int i = 0; i < DSC__SHM_RING; i++)
        if (read_slot(&shm->blocks[rank]->ring[i], &print) && print.sequence > out->sequence)
            *out = print;
}

/* ---- what can go wrong in a wait ---- */

bool dsc__shm_has(struct dsc__shm_block *block, enum dsc__shm_awaited kind, uint64_t target) {
    if (kind == DSC__SHM_PRINT)
        return atomic_load(&block->ring[target % DSC__SHM_RING].words[0]) == target;
    return atomic_load(&block->phase) >= target;
}

static bool arrived(const struct dsc__shm *shm, const struct dsc__shm_wait *wait, int rank) {
    if (wait->kind == DSC__SHM_BELL)
        return atomic_load(&shm->blocks[shm->rank]->bell) != (uint32_t)wait->target;
    return dsc__shm_has(shm->blocks[rank], wait->kind, wait->target);
}

/* The first rank at or after `from` that did not come, or size. */
static int first_missing(const struct dsc__shm *shm, const struct dsc__shm_wait *wait, int from) {
    for (int r = from; r < shm->size; r++)
        if (r != shm->rank && !arrived(shm, wait, r))
            return r;
    return shm->size;
}

void dsc__shm_describe_wait(const struct dsc__shm *shm, const struct dsc__shm_wait *wait,
                            char text[DSC__SHM_BLOCKED_TEXT]) {
    char call[DSC__CALL_TEXT_MAX];
    const char *of = shm->name[0] ? " of group " : "";
    /* `current` belongs to the thread in a collective; who waits in something else says so. */
    if (!wait->label)
        dsc__print_operation(&shm->current, call);
    snprintf(text, DSC__SHM_BLOCKED_TEXT, "%s%s%s", wait->label ? wait->label : call, of,
             shm->name);
}

static void describe_last(const struct dsc__shm *shm, int rank, char text[DSC__CALL_TEXT_MAX]) {
    struct dsc__print print;
    dsc__shm_last_print(shm, rank, &print);
    dsc__print_operation(&print, text);
}

static enum dsc_status fail_gone(const struct dsc__shm *shm, const struct dsc__shm_wait *wait,
                                 int rank, const char *how) {
    char last[DSC__CALL_TEXT_MAX], here[DSC__SHM_BLOCKED_TEXT];
    describe_last(shm, rank, last);
    dsc__shm_describe_wait(shm, wait, here);
    return DSC_FAIL(DSC_EDEAD,
                    "rank %d (pid %d) %s; the last call that it began: %s; rank %d waits in %s",
                    rank, (int)dsc__shm_region_of(shm, rank)->pid, how, last, shm->rank, here);
}

/* A rank that came before it went is no obstacle, so arrival is looked at again after the sign of
 * death: what a rank stored before it died or left is visible by then. */
static int first_left(const struct dsc__shm *shm, const struct dsc__shm_wait *wait) {
    for (int r = 0; r < shm->size; r++)
        if (r != shm->rank && atomic_load(&shm->blocks[r]->left) && !arrived(shm, wait, r))
            return r;
    return shm->size;
}

bool dsc__shm_is_dead(const struct dsc__shm *shm, int rank) {
    const int *pidfds = shm->node->pidfds;
    /* Threads of several channels look at the same time: each polls for itself. */
    struct pollfd death = {.fd = pidfds ? pidfds[shm->members[rank]] : -1, .events = POLLIN};
    return poll(&death, 1, 0) > 0;
}

static enum dsc_status check_dead(struct dsc__shm *shm, const struct dsc__shm_wait *wait) {
    for (int r = 0; r < shm->size; r++)
        if (r != shm->rank && !arrived(shm, wait, r) && dsc__shm_is_dead(shm, r) &&
            !atomic_load(&shm->blocks[r]->left) && !arrived(shm, wait, r)) {
            /* One that gave up and ended then has said why. */
            if (atomic_load(&dsc__shm_region_of(shm, r)->gave_up))
                DSC_TRY(dsc__shm_check_broken(shm));
            return fail_gone(shm, wait, r, "died or ended");
        }
    return DSC_OK;
}

enum dsc_status dsc__shm_check_broken(const struct dsc__shm *shm) {
    uint32_t first = atomic_load(&shm->node->regions[0]->broken);
    if (first == 0 || first > (uint32_t)shm->node->size)
        return DSC_OK;
    int rank = (int)first - 1;
    const struct dsc__shm_region *region = shm->node->regions[rank];
    enum dsc_status status = -(enum dsc_status)atomic_load(&region->gave_up);
    /* A rank that was interrupted, or ran out of memory, is for the others one that is gone. */
    if (status != DSC_ETIMEDOUT && status != DSC_EDIVERGED)
        status = DSC_EDEAD;
    return DSC_FAIL(status, "rank %d (pid %d%s) gave up: %.*s", rank, (int)region->pid,
                    rank == shm->node->rank ? ", this one" : "", DSC__REASON_MAX - 1,
                    region->reason);
}

/* Causes before their consequences: ranks that lost one give up, and then leave. */
static enum dsc_status check_ranks(struct dsc__shm *shm, const struct dsc__shm_wait *wait) {
    DSC_TRY(check_dead(shm, wait));
    DSC_TRY(dsc__shm_check_broken(shm));
    int left = first_left(shm, wait);
    return left == shm->size ? DSC_OK
                             : fail_gone(shm, wait, left, "left (it closed its communicator)");
}

enum dsc_status dsc__shm_check_ranks(struct dsc__shm *shm, const struct dsc__shm_wait *wait) {
    enum { LATE_RING_MS = 5 };
    enum dsc_status status = check_ranks(shm, wait);
    if (status == DSC_OK || wait->kind != DSC__SHM_BELL)
        return status;
    /* A bell does not say whom it waits for. The rank that has gone may not be the one, and the one
     * may have stored what is awaited and be about to ring. */
    (void)poll(NULL, 0, LATE_RING_MS);
    return arrived(shm, wait, shm->rank) ? DSC_OK : status;
}

static enum dsc_status fail_timed_out(const struct dsc__shm *shm,
                                      const struct dsc__shm_wait *wait) {
    enum { NAMED_MAX = 4 };
    char here[DSC__SHM_BLOCKED_TEXT], last[DSC__CALL_TEXT_MAX], missing[DSC__REASON_MAX] = "";
    int n_missing = 0;
    size_t used = 0;
    dsc__shm_describe_wait(shm, wait, here);
    for (int r = 0; r < shm->size; r++) {
        if (r == shm->rank || arrived(shm, wait, r) || ++n_missing > NAMED_MAX)
            continue;
        describe_last(shm, r, last);
        used += (size_t)snprintf(missing + used, sizeof missing - used,
                                 "%srank %d (pid %d; the last call that it began: %s)",
                                 used ? ", " : "", r, (int)dsc__shm_region_of(shm, r)->pid, last);
    }
    if (n_missing > NAMED_MAX)
        snprintf(missing + used, sizeof missing - used, " and %d more", n_missing - NAMED_MAX);
    return DSC_FAIL(DSC_ETIMEDOUT, "rank %d waited %.1f s in %s for %s", shm->rank,
                    shm->options->timeout_s, here, missing);
}

/* Everything that a slice looks for. */
static enum dsc_status check_all(struct dsc__shm *shm, const struct dsc__shm_wait *wait,
                                 double waited_s) {
    const struct dsc_comm_options *options = shm->options;
    DSC_TRY(dsc__shm_check_ranks(shm, wait));
    if (options->interrupted && options->interrupted(options->interrupt_context)) {
        char here[DSC__SHM_BLOCKED_TEXT];
        dsc__shm_describe_wait(shm, wait, here);
        return DSC_FAIL(DSC_EINTR, "interrupted in %s", here);
    }
    int missing = first_missing(shm, wait, 0);
    if (options->timeout_s > 0 && waited_s >= options->timeout_s && missing < shm->size)
        return fail_timed_out(shm, wait);
    return dsc__shm_look_for_standstill(shm, wait, missing);
}

/* ---- waiting ---- */

/* One sleep. *ready is set if nobody is missing any more. */
static enum dsc_status sleep_once(struct dsc__shm *shm, const struct dsc__shm_wait *wait,
                                  double left_s, bool *ready, bool *signalled) {
    struct dsc__shm_block *mine = shm->blocks[shm->rank];
    double slice_s = left_s < SLICE_MS * 1e-3 ? left_s : SLICE_MS * 1e-3;
    struct timespec slice = {.tv_nsec = (long)(slice_s * 1e9)};
    uint32_t seen = atomic_load(&mine->wake);
    enum dsc_status status = DSC_OK;

    atomic_store(&mine->asleep, 1);
    *ready = first_missing(shm, wait, 0) == shm->size;
    if (!*ready &&
        (atomic_load(&shm->node->regions[0]->broken) || first_left(shm, wait) < shm->size))
        status = dsc__shm_check_ranks(shm, wait);
    if (!*ready && status == DSC_OK)
        *signalled = syscall(SYS_futex, &mine->wake, FUTEX_WAIT, seen, &slice, NULL, 0) != 0 &&
                     errno == EINTR;
    atomic_store(&mine->asleep, 0);
    return status;
}

static enum dsc_status sleep_in_slices(struct dsc__shm *shm, const struct dsc__shm_wait *wait) {
    double now = dsc_comm_now(), since = wait->since > 0 ? wait->since : now, checked = now;
    double timeout_s = shm->options->timeout_s;
    bool ready = false, signalled = false;
    for (;;) {
        double left_s = timeout_s > 0 ? timeout_s - (now - since) : SLICE_MS;
        DSC_TRY(sleep_once(shm, wait, left_s > 1e-4 ? left_s : 1e-4, &ready, &signalled));
        if (ready)
            return DSC_OK;
        now = dsc_comm_now();
        bool expired = timeout_s > 0 && now - since >= timeout_s;
        if (signalled || expired || now - checked >= SLICE_MS * 1e-3 * 0.9) {
            checked = now;
            signalled = false;
            DSC_TRY(check_all(shm, wait, now - since));
        }
    }
}

static enum dsc_status sleep_until(struct dsc__shm *shm, const struct dsc__shm_wait *wait) {
    enum dsc_status status = sleep_in_slices(shm, wait);
    dsc__shm_end_look(shm);
    return status;
}

/* Looks n_spins times; returns how often it had to, n_spins if in vain. */
static unsigned spin(const struct dsc__shm *shm, const struct dsc__shm_wait *wait,
                     unsigned n_spins) {
    int missing = 0;
    for (unsigned i = 0; i < n_spins; i++) {
        missing = first_missing(shm, wait, missing);
        if (missing == shm->size)
            return i;
        pause_cpu();
    }
    return n_spins;
}

/* A spin in vain costs this rank, and one that shares its core more; so it is halved then, until a
 * spin pays again. (Finding everybody there at once says nothing about spinning.) But it must be
 * able to outlast a sleeper's way back, about 30 us under a hypervisor: with less, one late rank
 * puts the ranks to sleep in turns, for ever. So every eighth wait tries the whole length. */
enum dsc_status dsc__shm_wait(struct dsc__shm *shm, const struct dsc__shm_wait *wait) {
    enum { SPINS_MIN = 10, TRY_EVERY = 8 };
    struct dsc__shm_spin *state = &shm->spins[wait->kind];
    bool is_try = ++state->n_waits % TRY_EVERY == 0;
    unsigned n_spins = is_try ? shm->n_spins_max : state->budget;
    unsigned n_spun = spin(shm, wait, n_spins);

    if (n_spun < n_spins) {
        if (n_spun > 0)
            state->budget = shm->n_spins_max;
        return DSC_OK;
    }
    if (state->budget > SPINS_MIN)
        state->budget /= 2;
    return sleep_until(shm, wait);
}

enum dsc_status dsc__shm_step(struct dsc__shm *shm, size_t lag) {
    struct dsc__shm_wait wait = {.kind = DSC__SHM_PHASE};
    shm->phase++;
    wait.target = shm->phase >= lag ? shm->phase - (lag - 1) : 0;
    atomic_store(&shm->blocks[shm->rank]->phase, shm->phase);
    wake_others(shm);
    return dsc__shm_wait(shm, &wait);
}

enum dsc_status dsc__shm_wait_bell(void *state, uint32_t seen, const char *label, double since) {
    struct dsc__shm_wait wait = {
        .kind = DSC__SHM_BELL, .target = seen, .label = label, .since = since};
    return dsc__shm_wait(state, &wait);
}
