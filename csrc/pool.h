/* Threads for data-parallel loops inside one rank.
 *
 * Decides: how a loop is cut and who takes which piece. Invariant: the pieces are [k * grain,
 * (k + 1) * grain) whatever the number of threads, and every piece runs once, in the floating-point
 * state of fpenv.h; so a body that writes by index gives the same bits on any pool.
 *
 * Threads of its own: n_threads - 1 workers, with asynchronous signals blocked. They spin about 20
 * us for the next loop and then sleep. A forked child has none of them: there, loops run inline. */
#ifndef DSC_POOL_H
#define DSC_POOL_H

#include "dsc.h"

struct dsc_pool;

enum { DSC_POOL_MAX_THREADS = 1024 };

/* n_threads counts the caller; 1 starts no thread. DSC_EINVAL outside [1, DSC_POOL_MAX_THREADS],
 * DSC_EIO where a thread cannot be started (none is left behind then). */
enum dsc_status dsc_pool_open(int n_threads, struct dsc_pool **out);
/* Ends the workers; NULL is fine. No loop may be running. In a forked child it frees memory only.
 */
void dsc_pool_close(struct dsc_pool *pool);
/* Threads that a loop runs on here and now; 1 for NULL and in a forked child. */
int dsc_pool_size(const struct dsc_pool *pool);

/* Calls body(context, begin, end) for every piece of [0, n_items) and returns when all are done;
 * what the bodies wrote is visible then. The caller takes part. Runs inline, piece by piece, where
 * the pool is NULL, there is one piece, or the pool is busy (a loop inside a body, or another
 * thread's loop). Grain 0 counts as 1. Allocates nothing. */
void dsc_pool_run(struct dsc_pool *pool, size_t n_items, size_t grain,
                  void (*body)(void *context, size_t begin, size_t end), void *context);

#endif
