/* Publishing and settling. The window of rank r holds, in this order: a control record for each
 * bucket that r owns, r's sums where other ranks need them, and r's slots. A record has one entry
 * per rank: 0 while that rank has published nothing new, else a tag (slot and dtype, or NOTHING).
 * Entries and the lock are sequentially consistent: a publisher that fails to take the lock relies
 * on the holder to look again after it unlocked, which needs the total order (the same pattern as a
 * sleeping waiter). */
#include "bucket.h"

#include "alloc.h"
#include "arena.h"
#include "kernels/kernels.h"
#include "log.h"

#include <stdatomic.h>
#include <string.h>

enum {
    /* Slots of the boundary exchange stay in the second-level cache between writer and reader. */
    BOUNDARY_SLOT_ELEMS = 128 * 1024,
    BOUNDARY_SLOTS_PER_PEER = 3,
    EARLY_SLOT_ELEMS = 1024 * 1024,
    /* How many backward passes a rank may be ahead of the slowest before it is an error. */
    MAX_ROUNDS_AHEAD = 16,
};

static const uint64_t NOTHING = 1;

struct record {
    _Atomic uint32_t lock;
    _Atomic uint32_t n_settled;
    _Atomic uint64_t entry[];
};

struct bucket {
    struct dsc_range range;
    int owner;
    uint32_t n_used;    /* elements that belong to parameters */
    uint32_t n_missing; /* of them, not yet arrived in the open round */
    int32_t slot;       /* being filled; -1: none */
    int32_t n_waiting;  /* entries of the backlog */
    bool published;     /* in the open round */
    bool blocked;       /* in one pass over the backlog */
};

struct outstanding {
    uint32_t bucket;
    uint64_t tag;
};

struct dsc_buckets {
    struct dsc_comm *comm;
    const struct dsc_space *space;
    struct dsc_bucket_options options;
    int rank, size;
    struct dsc_range *owned; /* per rank */
    size_t *first;           /* per rank: its first bucket; first[size] is the count */
    struct bucket *bucket;
    uint32_t *arrived; /* per segment: the round in which it last arrived, counted from 1 */
    uint32_t round;    /* the open round */
    size_t slot_elems;
    enum dsc_dtype slot_dtype; /* early: of the open round */

    struct dsc_window *window;
    size_t record_stride, sums_offset, slots_offset;
    float *private_sums; /* NULL where the sums are in the window */

    int32_t n_slots, max_slots, budget_slots;
    int32_t *free_slots, n_free;
    struct outstanding *outstanding; /* published, not known to be consumed */
    int32_t n_outstanding;
    uint32_t reclaim_bell;
    bool reclaim_due; /* this rank settled something itself, which rings no bell of its own */
    struct outstanding
        *backlog; /* published rounds that wait for the previous one of their bucket */
    size_t n_backlog, max_backlog;

    double *squares; /* per block of one slot */
    bool in_backward, said_ahead;
    struct dsc_bucket_counters counters;
};

/* ---- sources ---- */

const void *dsc_source_at(const struct dsc_source *source, const struct dsc_segment *segment,
                          size_t begin, enum dsc_dtype *dtype) {
    if (source->local && source->folded[segment->param]) {
        *dtype = DSC_F32;
        return source->local + begin;
    }
    const struct dsc_view *view = source->views ? &source->views[segment->param] : NULL;
    if (!view || !view->grad)
        return NULL;
    *dtype = view->grad_dtype;
    return (const char *)view->grad + (begin - segment->begin) * dsc_dtype_size(view->grad_dtype);
}

void dsc_source_read(const struct dsc_source *source, const struct dsc_space *space,
                     struct dsc_range range, float *dst) {
    struct dsc_parts it = dsc_parts(space, range);
    memset(dst, 0, dsc_range_size(range) * sizeof *dst);
    while (dsc_parts_next(&it)) {
        enum dsc_dtype dtype;
        const void *src = dsc_source_at(source, it.segment, it.part.begin, &dtype);
        if (src)
            dsc_kernels()->accumulate[dtype](dst + (it.part.begin - range.begin), src,
                                             dsc_range_size(it.part), false);
    }
}

/* ---- where things are ---- */

static struct record *record_of(const struct dsc_buckets *set, size_t b) {
    int owner = set->bucket[b].owner;
    size_t k = b - set->first[owner];
    return (struct record *)(void *)(set->window->base[owner] + k * set->record_stride);
}

static char *slot_address(const struct dsc_buckets *set, int rank, int32_t slot) {
    return set->window->base[rank] + set->slots_offset +
           (size_t)slot * set->slot_elems * sizeof(float);
}

static uint64_t make_tag(int32_t slot, enum dsc_dtype dtype) {
    return ((uint64_t)slot + 1) << 8 | (uint64_t)dtype << 1;
}

static const char *tag_data(const struct dsc_buckets *set, int rank, uint64_t tag,
                            enum dsc_dtype *dtype) {
    *dtype = (enum dsc_dtype)((tag & 0xff) >> 1);
    return slot_address(set, rank, (int32_t)(tag >> 8) - 1);
}

const float *dsc_buckets_sums(const struct dsc_buckets *set, int owner) {
    if (set->private_sums)
        return owner == set->rank ? set->private_sums : NULL;
    return (const float *)(const void *)(set->window->base[owner] + set->sums_offset);
}

static float *sums_at(struct dsc_buckets *set, const struct bucket *bucket) {
    size_t offset = bucket->range.begin - set->owned[bucket->owner].begin;
    if (set->private_sums)
        return set->private_sums + offset;
    return (float *)(void *)(set->window->base[bucket->owner] + set->sums_offset) + offset;
}

static size_t bucket_at(const struct dsc_buckets *set, size_t elem) {
    int low = 0, high = set->size - 1;
    while (low < high) {
        int middle = low + (high - low) / 2;
        if (set->owned[middle].end > elem)
            high = middle;
        else
            low = middle + 1;
    }
    return set->first[low] + (elem - set->owned[low].begin) / set->slot_elems;
}

/* ---- slots ---- */

static bool consumed(const struct dsc_buckets *set, const struct outstanding *item) {
    return atomic_load(&record_of(set, item->bucket)->entry[set->rank]) != item->tag;
}

static void reclaim(struct dsc_buckets *set) {
    uint32_t bell = dsc_comm_bell(set->comm);
    /* Whoever settles rings the contributors, so an unchanged bell means nothing was consumed. */
    if (bell == set->reclaim_bell && !set->reclaim_due)
        return;
    set->reclaim_bell = bell;
    set->reclaim_due = false;
    int32_t kept = 0;
    for (int32_t i = 0; i < set->n_outstanding; i++) {
        if (consumed(set, &set->outstanding[i]))
            set->free_slots[set->n_free++] = (int32_t)(set->outstanding[i].tag >> 8) - 1;
        else
            set->outstanding[kept++] = set->outstanding[i];
    }
    set->n_outstanding = kept;
}

/* A slot to fill, or -1 where `limit` slots are in use. */
static int32_t take_slot(struct dsc_buckets *set, int32_t limit) {
    if (set->n_free == 0)
        reclaim(set);
    if (set->n_free > 0)
        return set->free_slots[--set->n_free];
    if (set->n_slots >= limit)
        return -1;
    if (set->n_slots >= set->budget_slots) {
        set->counters.n_extra_slots++;
        if (!set->said_ahead) {
            set->said_ahead = true;
            dsc_log(DSC_LOG_DEBUG,
                    "rank %d is ahead of other ranks and takes staging beyond reduce_bucket_size",
                    set->rank);
        }
    }
    return set->n_slots++;
}

/* ---- settling ---- */

struct sum_job {
    struct dsc_buckets *set;
    const struct bucket *bucket;
    struct record *record;
    const struct dsc_source *own; /* boundary: this rank's part; NULL: its entry counts */
    bool first;
    double *squares;
};

static void add_contribution(const struct sum_job *job, int rank, struct dsc_range range,
                             float *dst) {
    uint64_t tag = atomic_load_explicit(&job->record->entry[rank], memory_order_relaxed);
    if (tag == NOTHING)
        return;
    enum dsc_dtype dtype;
    const char *data = tag_data(job->set, rank, tag, &dtype);
    size_t offset = range.begin - job->bucket->range.begin;
    dsc_kernels()->accumulate[dtype](dst, data + offset * dsc_dtype_size(dtype),
                                     dsc_range_size(range), false);
}

static void add_own(const struct sum_job *job, struct dsc_range range, float *dst) {
    struct dsc_parts it = dsc_parts(job->set->space, range);
    while (dsc_parts_next(&it)) {
        enum dsc_dtype dtype;
        const void *src = dsc_source_at(job->own, it.segment, it.part.begin, &dtype);
        if (src)
            dsc_kernels()->accumulate[dtype](dst + (it.part.begin - range.begin), src,
                                             dsc_range_size(it.part), false);
    }
}

/* Block by block, so that a block stays in the first-level cache while all ranks are added. */
static void sum_blocks(void *context, size_t first_block, size_t end_block) {
    const struct sum_job *job = context;
    float *sums = sums_at(job->set, job->bucket);
    for (size_t k = first_block; k < end_block; k++) {
        struct dsc_range range = {job->bucket->range.begin + k * DSC_BLOCK,
                                  job->bucket->range.begin + (k + 1) * DSC_BLOCK};
        float *dst = sums + k * DSC_BLOCK;
        if (job->first)
            memset(dst, 0, DSC_BLOCK * sizeof *dst);
        for (int rank = 0; rank < job->set->size; rank++) {
            if (job->own && rank == job->set->rank)
                add_own(job, range, dst);
            else
                add_contribution(job, rank, range, dst);
        }
        if (job->squares)
            job->squares[k] = dsc_kernels()->sum_squares(dst, DSC_BLOCK);
    }
}

static void settle(struct dsc_buckets *set, size_t b, const struct dsc_source *own,
                   struct dsc_norm *norm) {
    const struct bucket *bucket = &set->bucket[b];
    struct record *record = record_of(set, b);
    struct sum_job job = {
        set, bucket, record, own, atomic_load(&record->n_settled) == 0, norm ? set->squares : NULL};
    size_t n_blocks = dsc_range_size(bucket->range) / DSC_BLOCK;
    dsc_pool_run(set->options.pool, n_blocks, 32, sum_blocks, &job);
    for (size_t k = 0; norm && k < n_blocks; k++)
        dsc_norm_add(norm, set->squares[k]);
    atomic_fetch_add(&record->n_settled, 1);
    for (int rank = 0; rank < set->size; rank++)
        atomic_store(&record->entry[rank], 0);
    set->reclaim_due = true;
    dsc_comm_ring_others(set->comm);
    size_t n_bytes = bucket->n_used * sizeof(float);
    set->counters.n_settled++;
    set->counters.n_bytes_settled += n_bytes;
    if (set->in_backward)
        set->counters.n_bytes_settled_in_backward += n_bytes;
}

static bool complete(const struct dsc_buckets *set, struct record *record, int except) {
    for (int rank = 0; rank < set->size; rank++)
        if (rank != except && atomic_load(&record->entry[rank]) == 0)
            return false;
    return true;
}

/* Settles a bucket where all entries are there. Never waits: if another rank holds the lock, that
 * rank looks again after it has unlocked. */
static void try_settle(struct dsc_buckets *set, size_t b) {
    struct record *record = record_of(set, b);
    while (complete(set, record, -1)) {
        if (atomic_exchange(&record->lock, 1) != 0)
            return;
        while (complete(set, record, -1))
            settle(set, b, NULL, NULL);
        atomic_store(&record->lock, 0);
    }
}

/* ---- publishing ---- */

static void post(struct dsc_buckets *set, size_t b, uint64_t tag) {
    if (tag != NOTHING)
        set->outstanding[set->n_outstanding++] = (struct outstanding){(uint32_t)b, tag};
    atomic_store(&record_of(set, b)->entry[set->rank], tag);
}

static bool entry_is_free(const struct dsc_buckets *set, size_t b) {
    return atomic_load(&record_of(set, b)->entry[set->rank]) == 0;
}

/* Posts what waited for an earlier round of its bucket, in order per bucket. */
static void flush_backlog(struct dsc_buckets *set) {
    size_t kept = 0;
    for (size_t i = 0; i < set->n_backlog; i++) {
        struct outstanding item = set->backlog[i];
        struct bucket *bucket = &set->bucket[item.bucket];
        /* An earlier round of the bucket goes first, even if its entry became free just now. */
        if (bucket->blocked || !entry_is_free(set, item.bucket)) {
            bucket->blocked = true;
            set->backlog[kept++] = item;
            continue;
        }
        bucket->n_waiting--;
        post(set, item.bucket, item.tag);
        try_settle(set, item.bucket);
    }
    set->n_backlog = kept;
    for (size_t i = 0; i < kept; i++)
        set->bucket[set->backlog[i].bucket].blocked = false;
}

static enum dsc_status publish(struct dsc_buckets *set, size_t b, uint64_t tag) {
    struct bucket *bucket = &set->bucket[b];
    bucket->published = true;
    bucket->slot = -1;
    if (bucket->n_waiting == 0 && entry_is_free(set, b)) {
        post(set, b, tag);
        if (set->options.settle_in_hooks)
            try_settle(set, b);
        return DSC_OK;
    }
    if (set->n_backlog == set->max_backlog) {
        size_t more = 2 * set->max_backlog;
        DSC_TRY(dsc_realloc((void **)&set->backlog, more * sizeof *set->backlog));
        set->max_backlog = more;
    }
    set->backlog[set->n_backlog++] = (struct outstanding){(uint32_t)b, tag};
    bucket->n_waiting++;
    return DSC_OK;
}

/* ---- early: gradients arrive inside backward ---- */

bool dsc_buckets_expects(const struct dsc_buckets *set, size_t segment) {
    return set->arrived[segment] != set->round;
}

void dsc_buckets_set_dtype(struct dsc_buckets *set, enum dsc_dtype dtype) {
    set->slot_dtype = dtype;
}

static void zero_gaps(struct dsc_buckets *set, const struct bucket *bucket, char *slot) {
    size_t elem_size = dsc_dtype_size(set->slot_dtype), at = bucket->range.begin;
    struct dsc_parts it = dsc_parts(set->space, bucket->range);
    while (dsc_parts_next(&it)) {
        memset(slot + (at - bucket->range.begin) * elem_size, 0, (it.part.begin - at) * elem_size);
        at = it.part.end;
    }
    memset(slot + (at - bucket->range.begin) * elem_size, 0, (bucket->range.end - at) * elem_size);
}

static enum dsc_status open_slot(struct dsc_buckets *set, size_t b) {
    struct bucket *bucket = &set->bucket[b];
    /* Without overlap, settling starts when the staging that was asked for is full. */
    if (!set->options.settle_in_hooks && set->n_free == 0 && set->n_slots >= set->budget_slots)
        dsc_buckets_settle_ready(set);
    bucket->slot = take_slot(set, set->max_slots);
    if (bucket->slot < 0)
        return DSC_FAIL(
            DSC_ENOMEM,
            "rank %d is more than %d backward passes ahead of the slowest rank, and its "
            "staging is full; ranks must call backward equally often between steps",
            set->rank, MAX_ROUNDS_AHEAD);
    bucket->n_missing = bucket->n_used;
    zero_gaps(set, bucket, slot_address(set, set->rank, bucket->slot));
    return DSC_OK;
}

/* src NULL: zeros. */
static enum dsc_status fill(struct dsc_buckets *set, size_t b, struct dsc_range part,
                            const void *src, enum dsc_dtype dtype, bool *finite) {
    struct bucket *bucket = &set->bucket[b];
    size_t elem_size = dsc_dtype_size(set->slot_dtype), n = dsc_range_size(part);
    if (bucket->slot < 0)
        DSC_TRY(open_slot(set, b));
    char *dst =
        slot_address(set, set->rank, bucket->slot) + (part.begin - bucket->range.begin) * elem_size;
    if (!src) {
        memset(dst, 0, n * elem_size);
    } else if (dtype == set->slot_dtype) {
        *finite &= dsc_kernels()->copy_finite[dtype](dst, src, n);
    } else {
        dsc_kernels()->to_f32[dtype]((float *)(void *)dst, src, n);
        *finite &= dsc_kernels()->is_finite[DSC_F32](dst, n);
    }
    bucket->n_missing -= (uint32_t)n;
    if (bucket->n_missing == 0)
        return publish(set, b, make_tag(bucket->slot, set->slot_dtype));
    return DSC_OK;
}

enum dsc_status dsc_buckets_arrive(struct dsc_buckets *set, size_t segment, const void *grad,
                                   enum dsc_dtype dtype, bool *finite) {
    const struct dsc_segment *where = &set->space->segments[segment];
    struct dsc_range whole = dsc_segment_range(where);
    if (dtype != set->slot_dtype && set->slot_dtype != DSC_F32)
        return DSC_FAIL(DSC_ETYPE, "parameter %d is %s and its gradient %s", where->param,
                        dsc_dtype_name(set->space->dtype), dsc_dtype_name(dtype));
    *finite = true;
    set->arrived[segment] = set->round;
    if (set->n_backlog)
        flush_backlog(set);
    for (size_t at = whole.begin; at < whole.end;) {
        size_t b = bucket_at(set, at);
        struct dsc_range part = dsc_range_cut(whole, set->bucket[b].range);
        DSC_TRY(fill(set, b, part, (const char *)grad + (at - whole.begin) * dsc_dtype_size(dtype),
                     dtype, finite));
        at = part.end;
    }
    return DSC_OK;
}

/* A segment that did not arrive: from the source, or zeros where its bucket is being filled. */
static enum dsc_status complete_segment(struct dsc_buckets *set, size_t segment,
                                        const struct dsc_source *source) {
    const struct dsc_segment *where = &set->space->segments[segment];
    struct dsc_range whole = dsc_segment_range(where);
    enum dsc_dtype dtype = set->slot_dtype;
    const void *src = source ? dsc_source_at(source, where, where->begin, &dtype) : NULL;
    bool finite;
    if (src)
        return dsc_buckets_arrive(set, segment, src, dtype, &finite);
    for (size_t at = whole.begin; at < whole.end;) {
        size_t b = bucket_at(set, at);
        struct dsc_range part = dsc_range_cut(whole, set->bucket[b].range);
        if (set->bucket[b].slot >= 0)
            DSC_TRY(fill(set, b, part, NULL, set->slot_dtype, &finite));
        at = part.end;
    }
    return DSC_OK;
}

enum dsc_status dsc_buckets_end_round(struct dsc_buckets *set, const struct dsc_source *source) {
    /* Two passes: first what has data (which may open slots), then zeros into the open slots. */
    for (int pass = 0; pass < 2; pass++)
        for (size_t s = 0; s < set->space->n_segments; s++) {
            enum dsc_dtype dtype;
            const struct dsc_segment *where = &set->space->segments[s];
            if (!dsc_buckets_expects(set, s))
                continue;
            bool has_data = source && dsc_source_at(source, where, where->begin, &dtype);
            if (has_data == (pass == 0))
                DSC_TRY(complete_segment(set, s, source));
        }
    for (size_t b = 0; b < set->first[set->size]; b++) {
        if (!set->bucket[b].published)
            DSC_TRY(publish(set, b, NOTHING));
        set->bucket[b].published = false;
    }
    set->round++;
    dsc_comm_ring_others(set->comm);
    return DSC_OK;
}

void dsc_buckets_settle_ready(struct dsc_buckets *set) {
    if (set->n_backlog)
        flush_backlog(set);
    for (size_t b = 0; b < set->first[set->size]; b++)
        try_settle(set, b);
}

/* ---- the boundary ---- */

struct norm_job {
    const float *sums;
    double *squares;
};

static void norm_blocks(void *context, size_t begin, size_t end) {
    const struct norm_job *job = context;
    for (size_t k = begin; k < end; k++)
        job->squares[k] = dsc_kernels()->sum_squares(job->sums + k * DSC_BLOCK, DSC_BLOCK);
}

static void norm_of_own(struct dsc_buckets *set, struct dsc_norm *norm) {
    size_t n_blocks = dsc_range_size(set->owned[set->rank]) / DSC_BLOCK;
    size_t step = set->slot_elems / DSC_BLOCK;
    const float *sums = dsc_buckets_sums(set, set->rank);
    for (size_t at = 0; at < n_blocks; at += step) {
        size_t n = dsc_min(step, n_blocks - at);
        struct norm_job job = {sums + at * DSC_BLOCK, set->squares};
        dsc_pool_run(set->options.pool, n, 64, norm_blocks, &job);
        for (size_t k = 0; k < n; k++)
            dsc_norm_add(norm, set->squares[k]);
    }
}

enum dsc_status dsc_buckets_finish(struct dsc_buckets *set, uint32_t n_rounds,
                                   struct dsc_norm *norm, const char *label) {
    size_t at = set->first[set->rank], end = set->first[set->rank + 1];
    double since = dsc_comm_now();
    for (;;) {
        uint32_t bell = dsc_comm_bell(set->comm);
        flush_backlog(set);
        size_t before = at;
        while (at < end) {
            try_settle(set, at);
            if (atomic_load(&record_of(set, at)->n_settled) < n_rounds)
                break;
            at++;
        }
        if (at == end && set->n_backlog == 0)
            break;
        if (at != before)
            since = dsc_comm_now();
        DSC_TRY(dsc_comm_wait_bell(set->comm, bell, label, since));
    }
    norm_of_own(set, norm);
    return DSC_OK;
}

void dsc_buckets_in_backward(struct dsc_buckets *set, bool inside) {
    set->in_backward = inside;
}

void dsc_buckets_reset(struct dsc_buckets *set) {
    for (size_t b = set->first[set->rank]; b < set->first[set->rank + 1]; b++)
        atomic_store(&record_of(set, b)->n_settled, 0);
}

/* Publishing order of the boundary: the k-th bucket of every other owner, then the next k; each
 * rank starts with the owner behind it, so that not all write to one. */
struct cursor {
    size_t k;
    int step;
};

static bool next_to_publish(const struct dsc_buckets *set, struct cursor *at, size_t *b) {
    size_t most = 0;
    for (int r = 0; r < set->size; r++)
        most = dsc_max(most, set->first[r + 1] - set->first[r]);
    for (; at->k < most; at->k++, at->step = 1)
        for (; at->step < set->size; at->step++) {
            int owner = (set->rank + at->step) % set->size;
            if (set->first[owner] + at->k < set->first[owner + 1]) {
                *b = set->first[owner] + at->k;
                return true;
            }
        }
    return false;
}

struct copy_job {
    const struct dsc_buckets *set;
    const struct dsc_source *source;
    struct dsc_range range;
    enum dsc_dtype dtype;
    char *slot;
};

static void copy_blocks(void *context, size_t begin, size_t end) {
    const struct copy_job *job = context;
    struct dsc_range range = {job->range.begin + begin * DSC_BLOCK,
                              job->range.begin + end * DSC_BLOCK};
    size_t elem_size = dsc_dtype_size(job->dtype), at = range.begin;
    char *base = job->slot - job->range.begin * elem_size;
    struct dsc_parts it = dsc_parts(job->set->space, range);
    while (dsc_parts_next(&it)) {
        enum dsc_dtype dtype;
        const void *src = dsc_source_at(job->source, it.segment, it.part.begin, &dtype);
        size_t n = dsc_range_size(it.part);
        memset(base + at * elem_size, 0, (it.part.begin - at) * elem_size);
        if (!src)
            memset(base + it.part.begin * elem_size, 0, n * elem_size);
        else if (dtype == job->dtype)
            memcpy(base + it.part.begin * elem_size, src, n * elem_size);
        else
            dsc_kernels()->to_f32[dtype]((float *)(void *)base + it.part.begin, src, n);
        at = it.part.end;
    }
    memset(base + at * elem_size, 0, (range.end - at) * elem_size);
}

static bool has_data(const struct dsc_buckets *set, const struct dsc_source *source,
                     struct dsc_range range) {
    struct dsc_parts it = dsc_parts(set->space, range);
    enum dsc_dtype dtype;
    while (dsc_parts_next(&it))
        if (dsc_source_at(source, it.segment, it.part.begin, &dtype))
            return true;
    return false;
}

/* Copies one bucket into a slot and posts it; false where no slot is free. */
static bool publish_from_source(struct dsc_buckets *set, size_t b,
                                const struct dsc_source *source) {
    const struct bucket *bucket = &set->bucket[b];
    uint64_t tag = NOTHING;
    /* The entry of the previous step must have been consumed; it has, since all ranks met after it.
     */
    if (has_data(set, source, bucket->range)) {
        int32_t slot = take_slot(set, set->max_slots);
        if (slot < 0)
            return false;
        enum dsc_dtype dtype = source->local ? DSC_F32 : set->space->dtype;
        struct copy_job job = {set, source, bucket->range, dtype,
                               slot_address(set, set->rank, slot)};
        dsc_pool_run(set->options.pool, dsc_range_size(bucket->range) / DSC_BLOCK, 32, copy_blocks,
                     &job);
        tag = make_tag(slot, dtype);
    }
    post(set, b, tag);
    dsc_comm_ring(set->comm, bucket->owner);
    return true;
}

enum dsc_status dsc_buckets_exchange(struct dsc_buckets *set, const struct dsc_source *source,
                                     struct dsc_norm *norm, const char *label) {
    size_t at = set->first[set->rank], end = set->first[set->rank + 1], b = 0;
    struct cursor cursor = {0, 1};
    double since = dsc_comm_now();
    for (;;) {
        uint32_t bell = dsc_comm_bell(set->comm);
        bool moved = false;
        bool publishing = next_to_publish(set, &cursor, &b);
        if (publishing && publish_from_source(set, b, source)) {
            cursor.step++;
            moved = true;
        }
        if (at < end && complete(set, record_of(set, at), set->rank)) {
            settle(set, at, source, norm);
            at++;
            moved = true;
        }
        if (at == end && !publishing)
            return DSC_OK;
        if (moved)
            since = dsc_comm_now();
        else
            DSC_TRY(dsc_comm_wait_bell(set->comm, bell, label, since));
    }
}

/* ---- opening and closing ---- */

static enum dsc_status lay_buckets(struct dsc_buckets *set) {
    size_t n = 0;
    DSC_TRY(dsc_alloc((size_t)set->size * sizeof *set->owned, (void **)&set->owned));
    DSC_TRY(dsc_alloc(((size_t)set->size + 1) * sizeof *set->first, (void **)&set->first));
    for (int r = 0; r < set->size; r++) {
        set->owned[r] = dsc_partition_range(set->space->n_elems, r, set->size);
        set->first[r] = n;
        n += (dsc_range_size(set->owned[r]) + set->slot_elems - 1) / set->slot_elems;
    }
    set->first[set->size] = n;
    DSC_TRY(dsc_alloc(n * sizeof *set->bucket, (void **)&set->bucket));
    for (int r = 0; r < set->size; r++)
        for (size_t b = set->first[r]; b < set->first[r + 1]; b++) {
            size_t begin = set->owned[r].begin + (b - set->first[r]) * set->slot_elems;
            struct dsc_range range = {begin, dsc_min(begin + set->slot_elems, set->owned[r].end)};
            struct dsc_parts it = dsc_parts(set->space, range);
            set->bucket[b] = (struct bucket){.range = range, .owner = r, .slot = -1};
            while (dsc_parts_next(&it))
                set->bucket[b].n_used += (uint32_t)dsc_range_size(it.part);
        }
    return DSC_OK;
}

static enum dsc_status lay_slots(struct dsc_buckets *set) {
    size_t n_buckets = set->first[set->size];
    size_t asked = set->options.bucket_elems / set->slot_elems;
    set->budget_slots = (int32_t)dsc_max(1, dsc_min(asked, n_buckets));
    set->max_slots = set->options.early ? (int32_t)(MAX_ROUNDS_AHEAD * n_buckets + 1)
                                        : BOUNDARY_SLOTS_PER_PEER * (set->size - 1);
    if (!set->options.early)
        set->budget_slots = set->max_slots;
    set->max_backlog = n_buckets + 1;
    DSC_TRY(dsc_alloc((size_t)set->max_slots * sizeof *set->free_slots, (void **)&set->free_slots));
    DSC_TRY(
        dsc_alloc((size_t)set->max_slots * sizeof *set->outstanding, (void **)&set->outstanding));
    DSC_TRY(dsc_alloc(set->max_backlog * sizeof *set->backlog, (void **)&set->backlog));
    return dsc_alloc(set->slot_elems / DSC_BLOCK * sizeof *set->squares, (void **)&set->squares);
}

static enum dsc_status open_window(struct dsc_buckets *set) {
    size_t most_buckets = 0, most_elems = 0;
    for (int r = 0; r < set->size; r++) {
        most_buckets = dsc_max(most_buckets, set->first[r + 1] - set->first[r]);
        most_elems = dsc_max(most_elems, dsc_range_size(set->owned[r]));
    }
    bool shared = set->options.early || set->options.shared_sums;
    set->record_stride =
        dsc_round_up(sizeof(struct record) + (size_t)set->size * sizeof(uint64_t), 64);
    set->sums_offset = dsc_round_up(most_buckets * set->record_stride, 4096);
    set->slots_offset =
        dsc_round_up(set->sums_offset + (shared ? most_elems * sizeof(float) : 0), 4096);
    size_t n_bytes = set->slots_offset + (size_t)set->max_slots * set->slot_elems * sizeof(float);
    if (!shared)
        DSC_TRY(dsc_arena_alloc(dsc_range_size(set->owned[set->rank]) * sizeof(float),
                                (void **)&set->private_sums));
    return dsc_comm_window_open(set->comm, n_bytes, "engine: gradient buckets", &set->window);
}

enum dsc_status dsc_buckets_open(struct dsc_comm *comm, const struct dsc_space *space,
                                 const struct dsc_bucket_options *options,
                                 struct dsc_buckets **out) {
    struct dsc_buckets *set = NULL;
    DSC_TRY(dsc_alloc(sizeof *set, (void **)&set));
    set->comm = comm;
    set->space = space;
    set->options = *options;
    set->rank = dsc_comm_rank(comm);
    set->size = dsc_comm_size(comm);
    set->round = 1;
    set->slot_dtype = space->dtype;
    set->reclaim_bell = dsc_comm_bell(comm) - 1;
    size_t cap = options->early ? EARLY_SLOT_ELEMS : BOUNDARY_SLOT_ELEMS;
    size_t share = dsc_range_size(dsc_partition_range(space->n_elems, set->size - 1, set->size));
    set->slot_elems = dsc_max(dsc_min(options->bucket_elems, dsc_min(cap, share)), 1);
    set->slot_elems = dsc_round_up(set->slot_elems, DSC_BLOCK);
    enum dsc_status status =
        dsc_alloc(space->n_segments * sizeof *set->arrived, (void **)&set->arrived);
    if (status == DSC_OK)
        status = lay_buckets(set);
    if (status == DSC_OK)
        status = lay_slots(set);
    if (status == DSC_OK)
        status = open_window(set);
    if (status != DSC_OK) {
        dsc_buckets_close(set);
        return status;
    }
    *out = set;
    return DSC_OK;
}

void dsc_buckets_close(struct dsc_buckets *set) {
    if (!set)
        return;
    if (set->window)
        dsc_comm_window_close(set->comm, set->window);
    if (set->private_sums)
        dsc_arena_free(set->private_sums, dsc_range_size(set->owned[set->rank]) * sizeof(float));
    dsc_free(set->squares);
    dsc_free(set->backlog);
    dsc_free(set->outstanding);
    dsc_free(set->free_slots);
    dsc_free(set->bucket);
    dsc_free(set->first);
    dsc_free(set->owned);
    dsc_free(set->arrived);
    dsc_free(set);
}

struct dsc_bucket_counters dsc_buckets_counters(const struct dsc_buckets *set) {
    struct dsc_bucket_counters counters = set->counters;
    counters.n_slots = (uint64_t)set->n_slots;
    return counters;
}

size_t dsc_buckets_private_bytes(const struct dsc_buckets *set) {
    return set->private_sums ? dsc_range_size(set->owned[set->rank]) * sizeof(float) : 0;
}

size_t dsc_buckets_shared_bytes(const struct dsc_buckets *set) {
    size_t sums = set->private_sums ? 0 : dsc_range_size(set->owned[set->rank]) * sizeof(float);
    return sums + (size_t)set->n_slots * set->slot_elems * sizeof(float);
}
