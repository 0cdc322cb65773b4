/* The store: memory that all ranks of a communicator hold once, for parameters at ZeRO stage 3.
 *
 * Decides: where each piece lies. Pieces follow one another in slabs, which are parts of windows,
 * so that every rank finds a piece at the same place of the same memory without telling anybody.
 * Invariant: ranks take the same sizes in the same order; no piece is given out twice. Memory is
 * not taken back piece by piece: a slab goes when its last piece and the store have let go of it.
 *
 * A store belongs to one thread at a time; pieces may be let go of in any thread. */
#ifndef DSC_STORE_H
#define DSC_STORE_H

#include "comm/comm.h"

struct dsc_store;
struct dsc_slab;

enum { DSC_STORE_ALIGN = 64 };

struct dsc_store_counters {
    size_t n_bytes; /* taken, with the padding between pieces; the node has them once */
    size_t n_slabs; /* opened so far */
};

/* Local. The communicator must stay open while pieces are taken. folder: slabs are files there
 * (file_io.h), whole from the start, whose pages the kernel may write out; NULL: memory.
 * DSC_ENOTYET where ranks share no memory. */
enum dsc_status dsc_store_open(struct dsc_comm *comm, const char *folder, struct dsc_store **out);
/* NULL is fine; local, also once the communicator is closed. Pieces stay. */
void dsc_store_close(struct dsc_store *store);

/* What a piece of n_bytes takes of the node's memory. */
static inline size_t dsc_store_bytes(size_t n_bytes) {
    return dsc_round_up(n_bytes, DSC_STORE_ALIGN);
}
/* The slabs of a store, counted without making it. */
struct dsc_store_slabs {
    size_t n_bytes; /* of all; in files they are there from the start */
    size_t n_taken; /* in pieces */
    size_t n_left;  /* in the last one */
};
void dsc_store_count(struct dsc_store_slabs *slabs, size_t piece_bytes);

/* n_bytes zeroed bytes (> 0) at DSC_STORE_ALIGN in *memory; the caller owns a share of *slab.
 * Collective whenever a slab is full: what ranks have taken is compared then. Its pages are there
 * on return, in this rank's mapping, unless they are a file's. */
enum dsc_status dsc_store_take(struct dsc_store *store, size_t n_bytes, struct dsc_slab **slab,
                               void **memory);
/* Whether all ranks have taken the same so far. Collective. */
enum dsc_status dsc_store_agree(struct dsc_store *store, const char *label);
/* Gives up a share. Never fails. */
void dsc_slab_release(struct dsc_slab *slab);

/* Of this store, whichever pieces are still held. */
struct dsc_store_counters dsc_store_counters(const struct dsc_store *store);

#endif
