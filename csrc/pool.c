/* A loop is one 64-bit word: its ticket above, its unclaimed pieces below. A thread that moves the
 * word from (ticket, left) to (ticket, left - 1) owns a piece.
 *
 * Invariant: a worker that is late, or asleep, holds nobody up. It reads the loop's description
 * first and claims after; a claim succeeds only while the word is still the one that it read, with
 * pieces left, and the description changes only once all pieces are done, which the claimed one is
 * not. */
#define _GNU_SOURCE
#include "pool.h"

#include "alloc.h"
#include "fpenv.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { SPIN_NS = 20000, POLLS_PER_CLOCK = 32, CACHE_LINE = 64 };

struct dsc_pool {
    /* The description: written by the caller between loops. */
    _Alignas(CACHE_LINE) _Atomic(void (*)(void *, size_t, size_t)) body;
    _Atomic(void *) context;
    atomic_size_t n_items, grain;
    atomic_uint n_pieces;
    /* What the threads fight over, on lines of their own. */
    _Alignas(CACHE_LINE) _Atomic uint64_t claim;
    _Alignas(CACHE_LINE) atomic_uint n_done;
    _Alignas(CACHE_LINE) atomic_uint n_sleepers;
    atomic_bool caller_sleeps, closing, busy;

    pthread_mutex_t lock;
    pthread_cond_t work, done;
    pid_t owner;
    int n_threads;
    struct dsc_team team;
    int n_workers; /* none with a team */
    pthread_t workers[];
};

static void relax(void) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Polls `ready` for SPIN_NS; false where it did not come true. */
static bool spin_until(bool (*ready)(struct dsc_pool *, uint32_t), struct dsc_pool *pool,
                       uint32_t ticket) {
    int64_t end = now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < POLLS_PER_CLOCK; i++) {
            if (ready(pool, ticket))
                return true;
            relax();
        }
    } while (now_ns() < end);
    return false;
}

static uint32_t ticket_of(uint64_t claim) {
    return (uint32_t)(claim >> 32);
}

static void count_piece(struct dsc_pool *pool, uint32_t n_pieces) {
    if (atomic_fetch_add(&pool->n_done, 1) + 1 != n_pieces || !atomic_load(&pool->caller_sleeps))
        return;
    pthread_mutex_lock(&pool->lock);
    pthread_cond_signal(&pool->done);
    pthread_mutex_unlock(&pool->lock);
}

/* Runs pieces of the current loop until none is left to claim; gives the loop's ticket. */
static uint32_t work_off(struct dsc_pool *pool) {
    uint64_t claim = atomic_load(&pool->claim);
    while ((uint32_t)claim) {
        void (*body)(void *, size_t, size_t) =
            atomic_load_explicit(&pool->body, memory_order_relaxed);
        void *context = atomic_load_explicit(&pool->context, memory_order_relaxed);
        size_t n_items = atomic_load_explicit(&pool->n_items, memory_order_relaxed);
        size_t grain = atomic_load_explicit(&pool->grain, memory_order_relaxed);
        uint32_t n_pieces = atomic_load_explicit(&pool->n_pieces, memory_order_relaxed);
        if (!atomic_compare_exchange_weak(&pool->claim, &claim, claim - 1))
            continue;
        size_t begin = (n_pieces - (uint32_t)claim) * grain;
        body(context, begin, begin + dsc_min(grain, n_items - begin));
        count_piece(pool, n_pieces);
        claim = atomic_load(&pool->claim);
    }
    return ticket_of(claim);
}

static bool loop_changed(struct dsc_pool *pool, uint32_t ticket) {
    return ticket_of(atomic_load(&pool->claim)) != ticket || atomic_load(&pool->closing);
}

static bool loop_done(struct dsc_pool *pool, uint32_t ticket) {
    (void)ticket;
    return atomic_load(&pool->n_done) ==
           atomic_load_explicit(&pool->n_pieces, memory_order_relaxed);
}

static void *worker_main(void *argument) {
    struct dsc_pool *pool = argument;
    (void)dsc_fp_enter();
    while (!atomic_load(&pool->closing)) {
        uint32_t ticket = work_off(pool);
        if (spin_until(loop_changed, pool, ticket))
            continue;
        pthread_mutex_lock(&pool->lock);
        /* The count goes up before the word is read, and a caller moves the word before it reads
         * the count: one of the two sees the other. */
        atomic_fetch_add(&pool->n_sleepers, 1);
        while (!loop_changed(pool, ticket))
            pthread_cond_wait(&pool->work, &pool->lock);
        atomic_fetch_sub(&pool->n_sleepers, 1);
        pthread_mutex_unlock(&pool->lock);
    }
    return NULL;
}

static void wake_workers(struct dsc_pool *pool) {
    if (atomic_load(&pool->n_sleepers) == 0)
        return;
    pthread_mutex_lock(&pool->lock);
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
}

static void wait_done(struct dsc_pool *pool) {
    if (spin_until(loop_done, pool, 0))
        return;
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->caller_sleeps, true);
    while (!loop_done(pool, 0))
        pthread_cond_wait(&pool->done, &pool->lock);
    atomic_store(&pool->caller_sleeps, false);
    pthread_mutex_unlock(&pool->lock);
}

static void run_inline(size_t n_items, size_t grain, void (*body)(void *, size_t, size_t),
                       void *context) {
    for (size_t begin = 0; begin < n_items;) {
        size_t end = begin + dsc_min(grain, n_items - begin);
        body(context, begin, end);
        begin = end;
    }
}

static void take_part(void *argument) {
    uint64_t saved = dsc_fp_enter();
    (void)work_off(argument);
    dsc_fp_leave(saved);
}

static void run_on_threads(struct dsc_pool *pool, size_t n_items, size_t grain, uint32_t n_pieces,
                           void (*body)(void *, size_t, size_t), void *context) {
    atomic_store_explicit(&pool->body, body, memory_order_relaxed);
    atomic_store_explicit(&pool->context, context, memory_order_relaxed);
    atomic_store_explicit(&pool->n_items, n_items, memory_order_relaxed);
    atomic_store_explicit(&pool->grain, grain, memory_order_relaxed);
    atomic_store_explicit(&pool->n_pieces, n_pieces, memory_order_relaxed);
    atomic_store_explicit(&pool->n_done, 0, memory_order_relaxed);
    uint32_t ticket = ticket_of(atomic_load(&pool->claim)) + 1;
    atomic_store(&pool->claim, (uint64_t)ticket << 32 | n_pieces);
    if (pool->team.run) {
        uint32_t n = 0;
        if (pool->team.count && pool->team.count(&n) != 0)
            n = 0;
        pool->team.run(take_part, pool, n, 0);
        return;
    }
    wake_workers(pool);
    (void)work_off(pool);
    wait_done(pool);
}

int dsc_pool_size(const struct dsc_pool *pool) {
    /* Not cached: a fork leaves the pool's memory behind and takes the threads away. */
    return pool && pool->n_threads > 1 && getpid() == pool->owner ? pool->n_threads : 1;
}

void dsc_pool_run(struct dsc_pool *pool, size_t n_items, size_t grain,
                  void (*body)(void *context, size_t begin, size_t end), void *context) {
    if (n_items == 0)
        return;
    grain = dsc_max(grain, 1);
    size_t n_pieces = (n_items - 1) / grain + 1;
    uint64_t saved = dsc_fp_enter();
    if (n_pieces > 1 && n_pieces <= UINT32_MAX && dsc_pool_size(pool) > 1 &&
        !atomic_exchange(&pool->busy, true)) {
        run_on_threads(pool, n_items, grain, (uint32_t)n_pieces, body, context);
        atomic_store(&pool->busy, false);
    } else {
        run_inline(n_items, grain, body, context);
    }
    dsc_fp_leave(saved);
}

/* Workers inherit the mask. Faults stay deliverable, so that a crash handler still sees them. */
static void block_signals(sigset_t *saved) {
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP, SIGSYS};
    sigset_t blocked;
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        sigdelset(&blocked, faults[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, saved);
}

static int start_workers(struct dsc_pool *pool, int n_workers) {
    sigset_t saved;
    int code = 0;
    block_signals(&saved);
    while (pool->n_workers < n_workers) {
        code = pthread_create(&pool->workers[pool->n_workers], NULL, worker_main, pool);
        if (code)
            break;
        pool->n_workers++;
    }
    pthread_sigmask(SIG_SETMASK, &saved, NULL);
    return code;
}

enum dsc_status dsc_pool_open(int n_threads, struct dsc_team team, struct dsc_pool **out) {
    struct dsc_pool *pool = NULL;
    if (n_threads < 1 || n_threads > DSC_POOL_MAX_THREADS)
        return DSC_FAIL(DSC_EINVAL, "a pool of %d threads was asked for; allowed are 1 to %d",
                        n_threads, DSC_POOL_MAX_THREADS);
    int n_workers = team.run ? 0 : n_threads - 1;
    size_t n_bytes = sizeof *pool + (size_t)n_workers * sizeof *pool->workers;
    DSC_TRY(dsc_alloc(n_bytes, (void **)&pool));
    pool->owner = getpid();
    pool->n_threads = n_threads;
    pool->team = team;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->done, NULL);
    int code = start_workers(pool, n_workers);
    if (code) {
        int n_started = pool->n_workers;
        dsc_pool_close(pool);
        return DSC_FAIL(DSC_EIO, "could not start thread %d of %d: %s", n_started + 2, n_threads,
                        strerror(code));
    }
    *out = pool;
    return DSC_OK;
}

void dsc_pool_close(struct dsc_pool *pool) {
    if (!pool)
        return;
    if (getpid() == pool->owner) {
        pthread_mutex_lock(&pool->lock);
        atomic_store(&pool->closing, true);
        pthread_cond_broadcast(&pool->work);
        pthread_mutex_unlock(&pool->lock);
        for (int i = 0; i < pool->n_workers; i++)
            pthread_join(pool->workers[i], NULL);
        pthread_cond_destroy(&pool->done);
        pthread_cond_destroy(&pool->work);
        pthread_mutex_destroy(&pool->lock);
    }
    /* In a forked child a lock may be held by a thread that is not there: leave them alone. */
    dsc_free(pool);
}
