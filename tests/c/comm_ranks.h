/* Ranks as threads, for the tests of communicators. */
#ifndef DSC_TEST_COMM_RANKS_H
#define DSC_TEST_COMM_RANKS_H

#define _GNU_SOURCE
#include "case.h"

#include "comm/comm.h"

#include <pthread.h>
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

#endif
