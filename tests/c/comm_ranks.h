/* Ranks as threads, and what they run, for the tests of communicators. */
#ifndef DSC_TEST_COMM_RANKS_H
#define DSC_TEST_COMM_RANKS_H

#define _GNU_SOURCE
#include "case.h"

#include "comm/comm.h"

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

enum { RANKS_MAX = 4 };

#define CHECK_TEXT(part)                                                                           \
    do {                                                                                           \
        if (!strstr(dsc_last_error(), part)) {                                                     \
            fprintf(stderr, "%s:%d: \"%s\" is not in: %s\n", __FILE__, __LINE__, part,             \
                    dsc_last_error());                                                             \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

/* ---- ranks as threads ---- */

typedef void (*rank_fn)(struct dsc_comm *comm, int rank, void *arg);
struct rank_thread {
    struct dsc_comm *comm;
    rank_fn body;
    void *arg;
};

static inline void *run_rank(void *arg) {
    struct rank_thread *t = arg;
    t->body(t->comm, dsc_comm_rank(t->comm), t->arg);
    return NULL;
}

/* Runs body on every rank; a body that closes its communicator says so in `closes`. */
static inline void run_threads(int size, double timeout_s, bool closes, rank_fn body, void *arg) {
    struct dsc_comm_options options = {.timeout_s = timeout_s};
    struct dsc_comm *comms[RANKS_MAX];
    struct rank_thread threads[RANKS_MAX];
    pthread_t ids[RANKS_MAX];
    CHECK_OK(dsc_comm_open_threads(&options, size, comms));
    for (int r = 0; r < size; r++) {
        threads[r] = (struct rank_thread){.comm = comms[r], .body = body, .arg = arg};
        CHECK(pthread_create(&ids[r], NULL, run_rank, &threads[r]) == 0);
    }
    for (int r = 0; r < size; r++)
        CHECK(pthread_join(ids[r], NULL) == 0);
    for (int r = 0; r < size && !closes; r++)
        dsc_comm_close(comms[r]);
}

static inline void nap_ms(int ms) {
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L};
    (void)nanosleep(&t, NULL);
}

static inline unsigned next_random(unsigned *seed) {
    return *seed = *seed * 1664525u + 1013904223u;
}

/* ---- bodies that several programs run ---- */

static inline void window_body(struct dsc_comm *comm, int rank, void *arg) {
    static const size_t sizes[] = {1, 5000, 3 << 20, 0};
    int size = dsc_comm_size(comm);
    (void)arg;
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        struct dsc_window *window = NULL;
        size_t n = sizes[k];
        CHECK_OK(dsc_comm_window_open(comm, n, "test", &window));
        CHECK(window->n_bytes == n);
        if (n > 0) {
            CHECK((uintptr_t)window->base[rank] % 4096 == 0);
            CHECK(window->base[rank][0] == 0 && window->base[rank][n - 1] == 0);
            window->base[rank][n - 1] = (char)(rank + 1);
        }
        CHECK_OK(dsc_comm_barrier(comm, NULL));
        for (int r = 0; r < size && n > 0; r++)
            CHECK_EQ_INT(window->base[r][n - 1], r + 1);
        dsc_comm_window_close(comm, window);
    }
}

/* A ring of ranks: each waits for its left neighbour's count, adds one to its own, rings the right.
 */
static inline void bell_body(struct dsc_comm *comm, int rank, void *arg) {
    int size = dsc_comm_size(comm), left = (rank + size - 1) % size, right = (rank + 1) % size;
    unsigned seed = (unsigned)rank;
    struct dsc_window *window = NULL;
    CHECK_OK(dsc_comm_window_open(comm, sizeof(int), "counts", &window));
    _Atomic int *mine = (void *)window->base[rank], *others = (void *)window->base[left];
    for (int turn = 1; turn <= 400; turn++) {
        double since = dsc_comm_now();
        int need = rank == 0 ? turn - 1 : turn;
        for (;;) {
            uint32_t seen = dsc_comm_bell(comm);
            if (atomic_load_explicit(others, memory_order_relaxed) >= need)
                break;
            CHECK_OK(dsc_comm_wait_bell(comm, seen, "the left neighbour", since));
        }
        if (arg && next_random(&seed) % 64 == 0)
            nap_ms(1);
        atomic_store_explicit(mine, turn, memory_order_relaxed);
        dsc_comm_ring(comm, right);
    }
    CHECK_OK(dsc_comm_barrier(comm, NULL));
    dsc_comm_window_close(comm, window);
}

#endif
