/* What the bucket files share: the records in the window, the state of one rank, the
 * primitive moves. Nobody else includes it.
 *
 * The window of rank r holds, in this order: a header, a control record for each bucket that r
 * owns, r's sums where other ranks need them, and r's slots. A record has one entry per rank: 0
 * while that rank has published nothing new, else a tag (slot and dtype, or DSC__NOTHING).
 * Invariant: entries and the lock are sequentially consistent, because a publisher that fails to
 * take the lock relies on the holder to look again after it unlocked, which needs the total order.
 */
#ifndef DSC_BUCKET_IMPL_H
#define DSC_BUCKET_IMPL_H

#include "bucket.h"

#include <stdatomic.h>

/* The tag of a contribution that equals zero. */
#define DSC__NOTHING ((uint64_t)1)
/* How many backward passes a rank may be ahead of the slowest before it is an error. */
enum { DSC__MAX_ROUNDS_AHEAD = 16 };

/* First in each rank's window: whether that rank is at the boundary, where it waits for the others
 * and then publishes what it lacks. */
struct dsc__header {
    _Atomic uint32_t finishing; /* the step, counted from 1, at whose boundary it is; 0: none */
};
enum { DSC__HEADER_BYTES = 64 };

/* The rank whose contribution may wait in the sums' memory, see dsc__bucket_add. */
enum { DSC__PARKS = 1 };

struct dsc__record {
    _Atomic uint32_t lock;
    _Atomic uint32_t n_settled;
    _Atomic uint32_t step;    /* early: the one that its owner's sums are of */
    _Atomic uint32_t n_added; /* early: ranks whose part of the open round is in the sums */
    bool parked;              /* early, under the lock: one's lies where the first sum will be */
    uint32_t norm_round;  /* early: `norm` is of the sums after this many rounds; 0: not taken */
    struct dsc_norm norm; /* written before n_settled counts up, by whoever settles */
    _Atomic uint64_t entry[];
};

struct dsc__bucket {
    struct dsc_range range;
    int owner;
    uint32_t n_used;    /* elements that belong to parameters */
    uint32_t n_missing; /* of them, not yet arrived in the open round */
    int32_t slot;       /* being filled; -1: none */
    int32_t n_waiting;  /* entries of the backlog */
    bool published;     /* in the open round */
    bool blocked;       /* in one pass over the backlog */
};

/* Early: all of a bucket's elements, as a gradient that has just arrived has them. */
struct dsc__arrival {
    const void *data; /* of the range's first element on */
    enum dsc_dtype dtype;
    struct dsc_range range;
};

struct dsc__outstanding {
    uint32_t bucket;
    uint64_t tag;
};

struct dsc_buckets {
    struct dsc_comm *comm;
    const struct dsc_space *space;
    struct dsc_bucket_options options;
    int rank, size;
    size_t *first; /* per rank: its first bucket; first[size] is the count */
    struct dsc__bucket *bucket;
    uint32_t *arrived; /* per segment: the round in which it last arrived, counted from 1 */
    uint32_t round;    /* the open round */
    uint32_t step;     /* the open step, counted from 1 */
    struct dsc_bucket_sizes sizes;
    size_t slot_elems;         /* of sizes */
    enum dsc_dtype slot_dtype; /* early: of the open round */

    struct dsc_window *window;
    float *private_sums;        /* of sizes.held; NULL where the sums are in the window */
    struct dsc__remote *remote; /* where ranks share no memory: no window, buckets nor slots */

    int32_t n_slots;
    uint8_t *slot_width; /* per slot: bytes of an element in its widest use */
    int32_t *free_slots, n_free;
    struct dsc__outstanding *outstanding; /* published, not known to be consumed */
    int32_t n_outstanding;
    uint32_t reclaim_bell;
    struct dsc__outstanding *backlog; /* published rounds that wait for an earlier one */
    size_t n_backlog, max_backlog;

    double *squares; /* per block of one slot */
    bool in_backward, last, said_ahead;
    struct dsc_bucket_counters counters;
};

struct dsc__record *dsc__bucket_record(const struct dsc_buckets *set, size_t b);
/* A slot's memory in any rank's window. */
char *dsc__bucket_slot(const struct dsc_buckets *set, int rank, int32_t slot);
/* The type in which a source's gradients travel. */
enum dsc_dtype dsc__bucket_slot_dtype(const struct dsc_buckets *set,
                                      const struct dsc_source *source);
uint64_t dsc__bucket_tag(int32_t slot, enum dsc_dtype dtype);
/* The sums of this rank's own range. */
float *dsc__bucket_own_sums(struct dsc_buckets *set);
/* The bucket that holds an element of the space. */
size_t dsc__bucket_at(const struct dsc_buckets *set, size_t elem);
/* A slot to fill, or -1 where `limit` slots are in use. */
int32_t dsc__bucket_take_slot(struct dsc_buckets *set, int32_t limit);
/* Makes this rank's contribution visible; its entry must be free. */
void dsc__bucket_post(struct dsc_buckets *set, size_t b, uint64_t tag);
/* Whether every rank but `except` (-1: none) has published. */
bool dsc__bucket_complete(const struct dsc_buckets *set, struct dsc__record *record, int except);
/* Adds all contributions; the caller has the bucket for itself. own: this rank's part read where it
 * lies, instead of an entry. norm: NULL, or takes the squares of the sums. */
void dsc__bucket_settle(struct dsc_buckets *set, size_t b, const struct dsc_source *own,
                        struct dsc_norm *norm);
/* norm += the squares of n_blocks blocks (of one slot at most) from `sums` on. */
void dsc__bucket_add_squares(struct dsc_buckets *set, const float *sums, size_t n_blocks,
                             struct dsc_norm *norm);
/* Early: adds, in rank order, what is there, and settles the bucket where that is all. Never waits:
 * if another rank holds the lock, that rank looks again after it has unlocked. */
void dsc__bucket_try_settle(struct dsc_buckets *set, size_t b);
/* Early: adds this rank's contribution from where it lies, if it is its turn and nobody else is at
 * the bucket; false: it is not, and the contribution has to be published. */
bool dsc__bucket_add(struct dsc_buckets *set, size_t b, const struct dsc__arrival *here,
                     bool *finite);

/* dst (of type `to`, at range.begin) = a source's values as they travel, zero where there is none.
 */
void dsc__bucket_pack(const struct dsc_buckets *set, const struct dsc_source *source,
                      struct dsc_range range, enum dsc_dtype to, char *dst);
/* What the precision of options.accum leaves of a block of sums between two rounds. */
void dsc__bucket_round_sums(const struct dsc_buckets *set, float *sums);

/* Private sums of what this rank reads of them. */
enum dsc_status dsc__bucket_hold(struct dsc_buckets *set);
/* bucket_sizes.c: into how many buckets an owner's range falls. */
size_t dsc__bucket_count(const struct dsc_space *space, int owner, size_t slot_elems);

/* bucket_remote.c */
enum dsc_status dsc__remote_open(struct dsc_buckets *set);
void dsc__remote_close(struct dsc_buckets *set);
enum dsc_status dsc__remote_exchange(struct dsc_buckets *set, const struct dsc_source *source,
                                     struct dsc_norm *norm, const char *label);
void dsc__remote_reset(struct dsc_buckets *set);

#endif
