/* Buckets: how one rank's gradients become the sums that their owners hold.
 *
 * A bucket is a run of elements inside one owner's range. Every rank contributes to each bucket
 * once per round (one backward pass): data, or 'nothing', which equals zero. Contributions are
 * added in rank order, starting at +0.0, into the owner's sums; what has to wait for that is
 * published in a slot of its rank's own staging. With all of them in, the bucket is settled.
 *
 * At the boundary (stages 0 and 1): dsc_buckets_exchange does all of it, with waits; only the owner
 * settles, reads its own gradients where they lie, and takes the norm while the sums are in cache.
 * Early (stage 2, or overlap_comm): gradients arrive one by one inside backward. One whose rank's
 * turn it is is added where it lies; another one is published, and added by whoever comes before
 * it; nothing waits before the boundary. A rank that is ahead takes more slots.
 * Where ranks share no memory there is the exchange only, as one walk of all ranks over chunks of
 * all owners.
 *
 * Invariant: the sums depend on the published values and the order of ranks and rounds only, never
 * on time, bucket size or who settles (contract N1). */
#ifndef DSC_BUCKET_H
#define DSC_BUCKET_H

#include "clip.h"
#include "comm/comm.h"
#include "pool.h"
#include "source.h"
#include "wire.h"

struct dsc_bucket_options {
    bool early;          /* gradients settle during backward */
    bool shared_sums;    /* all ranks read the sums (stage 0) */
    bool remote;         /* no windows, even where there are some */
    size_t bucket_elems; /* reduce_bucket_size */
    struct dsc_pool *pool;
    struct dsc_wire wire; /* how contributions travel */
    /* What sums are rounded to between the rounds of a step; DSC_F32: nothing. */
    enum dsc_dtype accum;
};

/* What a rank's buckets take, told before they are opened. */
struct dsc_bucket_sizes {
    size_t slot_elems;
    bool sums_are_shared;  /* in the window */
    struct dsc_range held; /* what private sums are of; empty where they are shared */
    size_t staging_bytes;  /* private, where ranks share no memory; no window there */
    int32_t max_slots;     /* of one rank */
    int32_t first_slots;   /* of them, present from the start */
    size_t record_stride, sums_offset, slots_offset, window_bytes;
};
struct dsc_bucket_sizes dsc_bucket_sizes_of(const struct dsc_space *space, int rank,
                                            const struct dsc_bucket_options *options);

struct dsc_bucket_counters {
    uint64_t n_settled, n_bytes_settled, n_bytes_settled_in_backward;
    uint64_t n_extra_slots; /* taken because this rank was ahead */
};

struct dsc_buckets;

/* Collective. `space` must outlive the result. Not for a world of one. */
enum dsc_status dsc_buckets_open(struct dsc_comm *comm, const struct dsc_space *space,
                                 const struct dsc_bucket_options *options,
                                 struct dsc_buckets **out);
void dsc_buckets_close(struct dsc_buckets *buckets);

/* At the boundary: publishes and settles everything; adds the squares of this rank's sums to norm.
 * Where ranks share no memory, also for one round of several: source NULL is nothing, norm NULL
 * takes none, and all ranks must have set the same dtype (dsc_buckets_set_dtype).
 */
enum dsc_status dsc_buckets_exchange(struct dsc_buckets *buckets, const struct dsc_source *source,
                                     struct dsc_norm *norm, const char *label);

/* Where ranks share no memory: adds the squares of this rank's sums. */
void dsc_buckets_norm(struct dsc_buckets *buckets, struct dsc_norm *norm);

/* Early. What contributions are from the next round on: of the model's dtype, or fp32 where they
 * are sums over micro-steps; they travel as options.wire says. The same on all ranks or not: a tag
 * says what a slot holds. */
void dsc_buckets_set_dtype(struct dsc_buckets *buckets, enum dsc_dtype dtype);
/* Early. True when the segment has not arrived in the open round. */
bool dsc_buckets_expects(const struct dsc_buckets *buckets, size_t segment);
/* Takes a parameter's gradient (all of it); *finite says whether every element was. */
enum dsc_status dsc_buckets_arrive(struct dsc_buckets *buckets, size_t segment, const void *grad,
                                   enum dsc_dtype dtype, bool *finite);
/* Ends the round: what did not arrive comes from `source`, or is nothing (NULL). */
enum dsc_status dsc_buckets_end_round(struct dsc_buckets *buckets, const struct dsc_source *source);
/* Waits until n_rounds rounds of this rank's buckets are settled; then the norm as above. */
enum dsc_status dsc_buckets_finish(struct dsc_buckets *buckets, uint32_t n_rounds,
                                   struct dsc_norm *norm, const char *label);
/* Waits as finish does, and takes no norm. */
enum dsc_status dsc_buckets_wait_settled(struct dsc_buckets *buckets, uint32_t n_rounds,
                                         const char *label);
/* Replaces this rank's sums of a segment's part that it owns by `values` (of the segment's first
 * element on) times factor. Settled sums only; early, a meeting has to follow before any rank opens
 * a round. */
void dsc_buckets_put_sums(struct dsc_buckets *buckets, size_t segment, const float *values,
                          float factor);
/* Before a round is opened: waits while an earlier round of this rank still waits for a rank that
 * is in its own backward passes; a rank at the boundary is not waited for, since it waits for this
 * one. Keeps the staging to two rounds. */
enum dsc_status dsc_buckets_wait_turn(struct dsc_buckets *buckets, const char *label);
/* Tells the others that this rank is at the boundary, until it leaves (dsc_buckets_reset does that
 * too). */
void dsc_buckets_at_boundary(struct dsc_buckets *buckets);
void dsc_buckets_leave_boundary(struct dsc_buckets *buckets);
/* What settlements from here on are: inside a backward pass (for the counters), and probably the
 * last of their step (then they take the norm on the way; finish checks, and does what is missing).
 */
void dsc_buckets_set_phase(struct dsc_buckets *buckets, bool in_backward, bool last);
/* Once all ranks have settled (a meeting after finish or exchange): ready for the next step. */
void dsc_buckets_reset(struct dsc_buckets *buckets);

/* The sums of an owner's range, from its first element on: this rank's own, or any rank's where
 * they are shared or early. NULL where the owner has nothing. */
const float *dsc_buckets_sums(const struct dsc_buckets *buckets, int owner);
struct dsc_bucket_counters dsc_buckets_counters(const struct dsc_buckets *buckets);
/* Bytes of private memory, and of shared memory that this rank's slots and sums have touched: for
 * the memory table. */
size_t dsc_buckets_private_bytes(const struct dsc_buckets *buckets);
size_t dsc_buckets_shared_bytes(const struct dsc_buckets *buckets);

#endif
