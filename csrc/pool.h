/* Threads for data-parallel loops inside one rank.
 *
 * Decides: how a loop is cut and who takes which piece. Invariant: the pieces are [k * grain,
 * (k + 1) * grain) whatever the number of threads, and every piece runs once, in the floating-point
 * state of fpenv.h; so a body that writes by index gives the same bits on any pool.
 *
 * The threads are another runtime's where a team is given, so that a process has one set of threads
 * that wait for work: torch's spin for milliseconds after each operation, and a second set then
 * shares their cores with them. Else they are the pool's own, n_threads - 1 workers with
 * asynchronous signals blocked, which spin about 20 us for the next loop and then sleep. A forked
 * child has neither: there, loops run inline. */
#ifndef DSC_POOL_H
#define DSC_POOL_H

#include "dsc.h"

struct dsc_pool;

/* Another runtime's threads. */
struct dsc_team {
    /* Calls body(argument) on n_threads of them, the caller's among them, and returns when all have
     * returned. n_threads 0: as many as the runtime takes for a loop of this thread's. flags: 0. So
     * libgomp's GOMP_parallel has it, and other OpenMP runtimes. NULL: there is no team. */
    void (*run)(void (*body)(void *), void *argument, unsigned n_threads, unsigned flags);
    /* How many a loop may have now, in *n; 0 where it succeeds. NULL: the runtime knows. */
    int32_t (*count)(uint32_t *n);
};

enum { DSC_POOL_MAX_THREADS = 1024 };

/* n_threads counts the caller; 1 starts no thread and leaves the team alone. team: without one the
 * threads are the pool's own; a team has the number of threads that it has at each loop. DSC_EINVAL
 * outside [1, DSC_POOL_MAX_THREADS], DSC_EIO where a thread cannot be started (none is left behind
 * then).
 */
enum dsc_status dsc_pool_open(int n_threads, struct dsc_team team, struct dsc_pool **out);
/* Ends the workers; NULL is fine. No loop may be running. In a forked child it frees memory only.
 */
void dsc_pool_close(struct dsc_pool *pool);
/* Threads that a loop is cut for here and now; 1 for NULL and in a forked child. */
int dsc_pool_size(const struct dsc_pool *pool);

/* Calls body(context, begin, end) for every piece of [0, n_items) and returns when all are done;
 * what the bodies wrote is visible then. The caller takes part. Runs inline, piece by piece, where
 * the pool is NULL, there is one piece, or the pool is busy (a loop inside a body, or another
 * thread's loop). Grain 0 counts as 1. Allocates nothing. */
void dsc_pool_run(struct dsc_pool *pool, size_t n_items, size_t grain,
                  void (*body)(void *context, size_t begin, size_t end), void *context);

#endif
