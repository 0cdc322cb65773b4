/* Spreading new parameter values from their owner to the other ranks of the node.
 *
 * Decides: the order and the staging: an owner writes a chunk into one of two halves of its
 * staging, the others copy it while it works on the next. The staging is small enough to stay in
 * cache, so new values cross memory once. Where ranks share no memory, chunks are gathered instead,
 * one of each owner at a time. Invariant: a half is written again only after every other
 * rank has released it. */
#ifndef DSC_SPREAD_H
#define DSC_SPREAD_H

#include "comm/comm.h"

/* Elements of one chunk; a chunk never takes more than 4 bytes an element. */
enum { DSC_SPREAD_ELEMS = 128 * 1024 };

struct dsc_spread;

/* Collective; not for a group of one. remote: no windows, even where there are some. */
enum dsc_status dsc_spread_open(struct dsc_comm *comm, bool remote, struct dsc_spread **out);
void dsc_spread_close(struct dsc_spread *spread);

/* The half to write the next chunk into; waits until it is free. */
enum dsc_status dsc_spread_acquire(struct dsc_spread *spread, const char *label, void **out);
/* Lets the others see it. */
void dsc_spread_commit(struct dsc_spread *spread);
/* After this rank's chunk, if it has one, and before those of others are taken: n_bytes of the
 * longest chunk, equal on all ranks. Collective. */
enum dsc_status dsc_spread_share(struct dsc_spread *spread, size_t n_bytes, const char *label);
/* The next chunk of `owner`, in the order of its commits; waits for it. */
enum dsc_status dsc_spread_take(struct dsc_spread *spread, int owner, const char *label,
                                const void **out);
void dsc_spread_release(struct dsc_spread *spread, int owner);
/* Time spent in waiting for other ranks and copying what they wrote, since the last call. */
double dsc_spread_seconds(struct dsc_spread *spread);
/* Staging of one rank of `size`: private, or in its window. */
struct dsc_spread_sizes {
    size_t private_bytes, window_bytes;
};
struct dsc_spread_sizes dsc_spread_sizes_of(int size, bool remote);
/* Private staging; what lies in a window is not counted here. */
size_t dsc_spread_private_bytes(const struct dsc_spread *spread);

#endif
