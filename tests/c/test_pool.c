/* The pool: every piece once, the same pieces on any number of threads, nothing left behind. */
#define _GNU_SOURCE
#include "pool.h"

#include "alloc.h"
#include "case.h"
#include "fpenv.h"

#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { N = 10000 };

struct tally {
    atomic_int hits[N];
    size_t n, grain;
    atomic_int wrong;
    struct dsc_pool *pool;
};

static void count_hits(void *context, size_t begin, size_t end) {
    struct tally *tally = context;
    if (begin % tally->grain || end != dsc_min(begin + tally->grain, tally->n))
        atomic_fetch_add(&tally->wrong, 1);
    for (size_t i = begin; i < end; i++)
        atomic_fetch_add(&tally->hits[i], 1);
}

static void check_run(struct dsc_pool *pool, struct tally *tally, size_t n, size_t grain) {
    memset((void *)tally->hits, 0, sizeof tally->hits);
    tally->n = n;
    tally->grain = dsc_max(grain, 1);
    dsc_pool_run(pool, n, grain, count_hits, tally);
    for (size_t i = 0; i < N; i++)
        CHECK_EQ_INT(atomic_load(&tally->hits[i]), i < n);
    CHECK_EQ_INT(atomic_load(&tally->wrong), 0);
}

static struct tally tally;

static void open_refuses_sizes_out_of_range(void) {
    struct dsc_pool *pool = (struct dsc_pool *)&tally;
    CHECK_EQ_INT(dsc_pool_open(0, (struct dsc_team){0}, &pool), DSC_EINVAL);
    CHECK_EQ_INT(dsc_pool_open(INT_MIN, (struct dsc_team){0}, &pool), DSC_EINVAL);
    CHECK(strstr(dsc_last_error(), "-2147483648 threads"));
    CHECK_EQ_INT(dsc_pool_open(DSC_POOL_MAX_THREADS + 1, (struct dsc_team){0}, &pool), DSC_EINVAL);
    CHECK(pool == (struct dsc_pool *)&tally); /* untouched */
}

static void null_pool_runs_inline(void) {
    CHECK_EQ_INT(dsc_pool_size(NULL), 1);
    check_run(NULL, &tally, N, 7);
    check_run(NULL, &tally, 0, 1);
    dsc_pool_close(NULL);
}

static void every_piece_runs_once_on_any_number_of_threads(void) {
    static const int sizes[] = {1, 2, 3, 8};
    for (size_t s = 0; s < 4; s++) {
        struct dsc_pool *pool;
        CHECK_OK(dsc_pool_open(sizes[s], (struct dsc_team){0}, &pool));
        CHECK_EQ_INT(dsc_pool_size(pool), sizes[s]);
        check_run(pool, &tally, 0, 4);
        check_run(pool, &tally, 1, 4);
        check_run(pool, &tally, N, 1);
        check_run(pool, &tally, N, 0); /* counts as 1 */
        check_run(pool, &tally, N - 1, 64);
        check_run(pool, &tally, N, SIZE_MAX);
        dsc_pool_close(pool);
    }
}

static void note_thread(void *context, size_t begin, size_t end) {
    pthread_t *who = context;
    struct timespec moment = {0, 1000000};
    (void)end;
    who[begin] = pthread_self();
    nanosleep(&moment, NULL); /* leaves pieces for the others */
}

static void workers_take_part(void) {
    struct dsc_pool *pool;
    pthread_t who[64];
    int n_others = 0;
    CHECK_OK(dsc_pool_open(3, (struct dsc_team){0}, &pool));
    dsc_pool_run(pool, 64, 1, note_thread, who);
    for (int i = 0; i < 64; i++)
        n_others += !pthread_equal(who[i], pthread_self());
    CHECK(n_others > 0);
    CHECK(n_others < 64);
    dsc_pool_close(pool);
}

static void a_loop_inside_a_body(void *context, size_t begin, size_t end) {
    struct tally *outer = context;
    (void)begin;
    (void)end;
    struct tally *inner = calloc(1, sizeof *inner);
    inner->n = 100;
    inner->grain = 3;
    dsc_pool_run(outer->pool, 100, 3, count_hits, inner);
    for (int i = 0; i < 100; i++)
        if (atomic_load(&inner->hits[i]) != 1)
            atomic_fetch_add(&outer->wrong, 1);
    atomic_fetch_add(&outer->hits[0], 1);
    free(inner);
}

static void nested_loops_run_inline(void) {
    CHECK_OK(dsc_pool_open(3, (struct dsc_team){0}, &tally.pool));
    dsc_pool_run(tally.pool, 50, 1, a_loop_inside_a_body, &tally);
    CHECK_EQ_INT(atomic_load(&tally.hits[0]), 50);
    CHECK_EQ_INT(atomic_load(&tally.wrong), 0);
    dsc_pool_close(tally.pool);
}

static void *run_many(void *argument) {
    struct dsc_pool *pool = argument;
    struct tally *mine = calloc(1, sizeof *mine);
    for (int i = 0; i < 200; i++)
        check_run(pool, mine, 100 + (size_t)i, 9);
    free(mine);
    return NULL;
}

static void two_callers_share_a_pool(void) {
    struct dsc_pool *pool;
    pthread_t other;
    CHECK_OK(dsc_pool_open(3, (struct dsc_team){0}, &pool));
    CHECK_EQ_INT(pthread_create(&other, NULL, run_many, pool), 0);
    run_many(pool);
    CHECK_EQ_INT(pthread_join(other, NULL), 0);
    dsc_pool_close(pool);
}

/* Loops far apart find the workers asleep, loops close together find them spinning or late. */
static void loops_after_any_pause_complete(void) {
    struct dsc_pool *pool;
    uint32_t state = 1;
    CHECK_OK(dsc_pool_open(4, (struct dsc_team){0}, &pool));
    for (int i = 0; i < 2000; i++) {
        state = state * 1664525 + 1013904223;
        check_run(pool, &tally, 1 + (state >> 8) % 97, 1 + (state >> 20) % 5);
        if (i % 8 == 0) {
            struct timespec pause = {0, (long)(state >> 14) % 60000};
            nanosleep(&pause, NULL);
        }
    }
    dsc_pool_close(pool);
}

static void a_run_allocates_nothing(void) {
    struct dsc_pool *pool;
    CHECK_OK(dsc_pool_open(3, (struct dsc_team){0}, &pool));
    uint64_t before = dsc_alloc_counters().n_calls;
    for (int i = 0; i < 100; i++)
        check_run(pool, &tally, 1000, 10);
    CHECK_EQ_INT(dsc_alloc_counters().n_calls, before);
    dsc_pool_close(pool);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

static void divide(void *context, size_t begin, size_t end) {
    volatile float *out = context;
    volatile float tiny = 1e-38f;
    for (size_t i = begin; i < end; i++)
        out[i] = tiny / 64.0f; /* a denormal, unless flushed */
}

/* Sets flush-to-zero in the calling thread; gives the control state that then holds. */
static uint64_t flush_denormals(void) {
#if defined(__x86_64__)
    _mm_setcsr(_mm_getcsr() | 0x8040);
    return _mm_getcsr() & 0xFFC0; /* without the flags of past operations */
#elif defined(__aarch64__)
    dsc_fp_leave((uint64_t)1 << 24);
    return (uint64_t)1 << 24;
#else
    return dsc_fp_enter();
#endif
}

static void bodies_keep_denormals_whatever_the_caller_set(void) {
    float out[256] = {0};
    struct dsc_pool *pool;
    uint64_t flushing = flush_denormals();
    CHECK_OK(dsc_pool_open(3, (struct dsc_team){0}, &pool)); /* threads inherit the state */
    dsc_pool_run(pool, 256, 1, divide, out);
    uint64_t found = dsc_fp_enter();
    CHECK_EQ_INT(found & ~(uint64_t)0x3F, flushing);
    dsc_pool_close(pool);
    for (int i = 0; i < 256; i++)
        CHECK(out[i] > 0.0f);
}

static void note_masks(void *context, size_t begin, size_t end) {
    atomic_int *bad = context;
    sigset_t mask;
    struct timespec moment = {0, 500000};
    (void)begin;
    (void)end;
    nanosleep(&moment, NULL);
    pthread_sigmask(SIG_BLOCK, NULL, &mask);
    bool is_worker = getpid() != (pid_t)gettid();
    if (is_worker && (!sigismember(&mask, SIGINT) || !sigismember(&mask, SIGTERM) ||
                      sigismember(&mask, SIGSEGV)))
        atomic_fetch_add(bad, 1);
    if (!is_worker && sigismember(&mask, SIGINT))
        atomic_fetch_add(bad, 1);
}

static void workers_block_signals_but_faults_and_the_caller_does_not(void) {
    struct dsc_pool *pool;
    atomic_int bad = 0;
    CHECK_OK(dsc_pool_open(3, (struct dsc_team){0}, &pool));
    dsc_pool_run(pool, 32, 1, note_masks, &bad);
    CHECK_EQ_INT(atomic_load(&bad), 0);
    dsc_pool_close(pool);
}

static void a_forked_child_runs_inline_and_closes_safely(void) {
    struct dsc_pool *pool;
    CHECK_OK(dsc_pool_open(3, (struct dsc_team){0}, &pool));
    check_run(pool, &tally, N, 10);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        alarm(5);
        CHECK_EQ_INT(dsc_pool_size(pool), 1);
        check_run(pool, &tally, N, 10);
        dsc_pool_close(pool);
        _exit(0);
    }
    int status;
    CHECK_EQ_INT(waitpid(child, &status, 0), child);
    CHECK_EQ_INT(status, 0);
    check_run(pool, &tally, N, 10); /* the parent's pool is whole */
    dsc_pool_close(pool);
}

/* A team of as many threads as it likes, made for each loop; NULL bodies never come. */
enum { N_TEAM = 5 };
static atomic_int n_team_loops;
static atomic_uint n_asked_for;
struct member {
    void (*body)(void *);
    void *argument;
};

static void *join_in(void *argument) {
    struct member *member = argument;
    (void)flush_denormals(); /* another runtime's threads may be in any state */
    member->body(member->argument);
    return NULL;
}

static void run_team(void (*body)(void *), void *argument, unsigned n_threads, unsigned flags) {
    struct member member = {body, argument};
    pthread_t threads[N_TEAM];
    CHECK_EQ_INT(flags, 0);
    atomic_fetch_add(&n_team_loops, 1);
    atomic_store(&n_asked_for, n_threads);
    for (int i = 0; i < N_TEAM; i++)
        CHECK_EQ_INT(pthread_create(&threads[i], NULL, join_in, &member), 0);
    body(argument);
    for (int i = 0; i < N_TEAM; i++)
        CHECK_EQ_INT(pthread_join(threads[i], NULL), 0);
}

static const struct dsc_team of_any_size = {run_team, NULL};

static int32_t three(uint32_t *n) {
    *n = 3;
    return 0;
}

static int32_t fails(uint32_t *n) {
    *n = 7;
    return 1;
}

static void a_team_has_the_threads_that_it_counts(void) {
    static const struct dsc_team teams[] = {{run_team, three}, {run_team, fails}, {run_team, NULL}};
    static const unsigned expected[] = {3, 0, 0};
    for (int i = 0; i < 3; i++) {
        struct dsc_pool *pool;
        CHECK_OK(dsc_pool_open(2, teams[i], &pool));
        check_run(pool, &tally, N, 7);
        CHECK_EQ_INT(atomic_load(&n_asked_for), expected[i]);
        dsc_pool_close(pool);
    }
}

static int n_threads_now(void) {
    char line[128];
    int n = 0;
    FILE *status = fopen("/proc/self/status", "r");
    CHECK(status);
    while (fgets(line, sizeof line, status))
        (void)sscanf(line, "Threads: %d", &n);
    fclose(status);
    return n;
}

static void a_team_runs_every_piece_once_and_no_thread_is_started(void) {
    struct dsc_pool *pool;
    int before = n_threads_now();
    CHECK_OK(dsc_pool_open(2, of_any_size, &pool));
    CHECK_EQ_INT(n_threads_now(), before);
    check_run(pool, &tally, N, 7);
    check_run(pool, &tally, N, 1);
    check_run(pool, &tally, 3, 1); /* fewer pieces than threads */
    CHECK_EQ_INT(atomic_load(&n_team_loops), 3);
    check_run(pool, &tally, 1, 1);
    CHECK_EQ_INT(atomic_load(&n_team_loops), 3); /* one piece: no need of it */
    dsc_pool_close(pool);
    CHECK_OK(dsc_pool_open(1, of_any_size, &pool));
    check_run(pool, &tally, N, 7);
    CHECK_EQ_INT(atomic_load(&n_team_loops), 3);
    dsc_pool_close(pool);
}

static void bodies_on_a_team_keep_denormals(void) {
    float out[256] = {0};
    struct dsc_pool *pool;
    CHECK_OK(dsc_pool_open(2, of_any_size, &pool));
    dsc_pool_run(pool, 256, 1, divide, out);
    dsc_pool_close(pool);
    for (int i = 0; i < 256; i++)
        CHECK(out[i] > 0.0f);
}

static void nested_loops_on_a_team_run_inline(void) {
    CHECK_OK(dsc_pool_open(2, of_any_size, &tally.pool));
    atomic_store(&tally.hits[0], 0);
    dsc_pool_run(tally.pool, 50, 1, a_loop_inside_a_body, &tally);
    CHECK_EQ_INT(atomic_load(&tally.hits[0]), 50);
    CHECK_EQ_INT(atomic_load(&tally.wrong), 0);
    CHECK_EQ_INT(atomic_load(&n_team_loops), 1);
    dsc_pool_close(tally.pool);
}

static const struct test_case cases[] = {
    CASE(open_refuses_sizes_out_of_range),
    CASE(null_pool_runs_inline),
    CASE(every_piece_runs_once_on_any_number_of_threads),
    CASE(workers_take_part),
    CASE(nested_loops_run_inline),
    CASE(two_callers_share_a_pool),
    CASE(loops_after_any_pause_complete),
    CASE(a_run_allocates_nothing),
    CASE(bodies_keep_denormals_whatever_the_caller_set),
    CASE(workers_block_signals_but_faults_and_the_caller_does_not),
    CASE(a_forked_child_runs_inline_and_closes_safely),
    CASE(a_team_runs_every_piece_once_and_no_thread_is_started),
    CASE(a_team_has_the_threads_that_it_counts),
    CASE(bodies_on_a_team_keep_denormals),
    CASE(nested_loops_on_a_team_run_inline),
};
RUN_CASES(cases)
