/* Early buckets: gradients arrive one by one inside backward, and nothing waits before the
 * boundary. A contribution is added at once if it is all of a bucket and its rank's turn, else
 * published when all its parts are there. A rank whose previous round of a bucket is not settled
 * yet keeps the next in its backlog. Invariant: rounds of a bucket are posted in order. */
#include "bucket_impl.h"

#include "alloc.h"
#include "kernels/kernels.h"

#include <string.h>

static bool entry_is_free(const struct dsc_buckets *set, size_t b) {
    return atomic_load(&dsc__bucket_record(set, b)->entry[set->rank]) == 0;
}

/* Posts what waited for an earlier round of its bucket, in order per bucket. */
static void flush_backlog(struct dsc_buckets *set) {
    size_t kept = 0;
    for (size_t i = 0; i < set->n_backlog; i++) {
        struct dsc__outstanding item = set->backlog[i];
        struct dsc__bucket *bucket = &set->bucket[item.bucket];
        /* An earlier round of the bucket goes first, even if its entry became free just now. */
        if (bucket->blocked || !entry_is_free(set, item.bucket)) {
            bucket->blocked = true;
            set->backlog[kept++] = item;
            continue;
        }
        bucket->n_waiting--;
        dsc__bucket_post(set, item.bucket, item.tag);
        dsc__bucket_try_settle(set, item.bucket);
    }
    set->n_backlog = kept;
    for (size_t i = 0; i < kept; i++)
        set->bucket[set->backlog[i].bucket].blocked = false;
}

static enum dsc_status publish(struct dsc_buckets *set, size_t b, uint64_t tag) {
    struct dsc__bucket *bucket = &set->bucket[b];
    bucket->published = true;
    bucket->slot = -1;
    if (bucket->n_waiting == 0 && entry_is_free(set, b)) {
        dsc__bucket_post(set, b, tag);
        dsc__bucket_try_settle(set, b);
        return DSC_OK;
    }
    if (set->n_backlog == set->max_backlog) {
        size_t more = 2 * set->max_backlog;
        DSC_TRY(dsc_realloc((void **)&set->backlog, more * sizeof *set->backlog));
        set->max_backlog = more;
    }
    set->backlog[set->n_backlog++] = (struct dsc__outstanding){(uint32_t)b, tag};
    bucket->n_waiting++;
    return DSC_OK;
}

/* ---- early: gradients arrive inside backward ---- */

bool dsc_buckets_expects(const struct dsc_buckets *set, size_t segment) {
    return set->arrived[segment] != set->round;
}

void dsc_buckets_set_dtype(struct dsc_buckets *set, enum dsc_dtype dtype) {
    set->slot_dtype = dsc_wire_dtype(&set->options.wire, dtype);
}

static void zero_gaps(struct dsc_buckets *set, const struct dsc__bucket *bucket, char *slot) {
    size_t elem_size = dsc_dtype_size(set->slot_dtype), at = bucket->range.begin;
    struct dsc_parts it = dsc_parts(set->space, bucket->range);
    while (dsc_parts_next(&it)) {
        memset(slot + (at - bucket->range.begin) * elem_size, 0, (it.part.begin - at) * elem_size);
        at = it.part.end;
    }
    memset(slot + (at - bucket->range.begin) * elem_size, 0, (bucket->range.end - at) * elem_size);
}

static enum dsc_status open_slot(struct dsc_buckets *set, size_t b) {
    struct dsc__bucket *bucket = &set->bucket[b];
    bucket->slot = dsc__bucket_take_slot(set, set->sizes.max_slots);
    if (bucket->slot < 0)
        return DSC_FAIL(
            DSC_ENOMEM,
            "rank %d is more than %d backward passes ahead of the slowest rank, and its "
            "staging is full; ranks must call backward equally often between steps",
            set->rank, DSC__MAX_ROUNDS_AHEAD);
    bucket->n_missing = bucket->n_used;
    zero_gaps(set, bucket, dsc__bucket_slot(set, set->rank, bucket->slot));
    return DSC_OK;
}

/* A gradient that is all of a bucket needs no slot where its turn has come. */
static bool add_at_once(struct dsc_buckets *set, size_t b, const struct dsc__arrival *here,
                        bool *finite) {
    struct dsc__bucket *bucket = &set->bucket[b];
    if (bucket->slot >= 0 || bucket->n_waiting > 0 ||
        dsc_range_size(here->range) != bucket->n_used || !dsc__bucket_add(set, b, here, finite))
        return false;
    bucket->published = true;
    return true;
}

/* src NULL: zeros. */
static enum dsc_status fill(struct dsc_buckets *set, size_t b, struct dsc_range part,
                            const void *src, enum dsc_dtype dtype, bool *finite) {
    struct dsc__bucket *bucket = &set->bucket[b];
    size_t elem_size = dsc_dtype_size(set->slot_dtype), n = dsc_range_size(part);
    if (bucket->slot < 0)
        DSC_TRY(open_slot(set, b));
    char *dst = dsc__bucket_slot(set, set->rank, bucket->slot) +
                (part.begin - bucket->range.begin) * elem_size;
    if (!src) {
        memset(dst, 0, n * elem_size);
    } else if (dtype == set->slot_dtype && set->options.wire.divisor == 0.0f) {
        *finite &= dsc_kernels()->copy_finite[dtype](dst, src, n);
    } else {
        dsc_wire_pack(&set->options.wire, dst, set->slot_dtype, src, dtype, n);
        *finite &= dsc_kernels()->is_finite[dtype](src, n);
    }
    bucket->n_missing -= (uint32_t)n;
    if (bucket->n_missing == 0)
        return publish(set, b, dsc__bucket_tag(bucket->slot, set->slot_dtype));
    return DSC_OK;
}

enum dsc_status dsc_buckets_arrive(struct dsc_buckets *set, size_t segment, const void *grad,
                                   enum dsc_dtype dtype, bool *finite) {
    const struct dsc_segment *where = &set->space->segments[segment];
    struct dsc_range whole = dsc_segment_range(where);
    if (dtype != set->slot_dtype && set->slot_dtype != DSC_F32 && !set->options.wire.narrow)
        return DSC_FAIL(DSC_ETYPE, "parameter %d is %s and its gradient %s", where->param,
                        dsc_dtype_name(set->space->dtype), dsc_dtype_name(dtype));
    *finite = true;
    set->arrived[segment] = set->round;
    if (set->n_backlog)
        flush_backlog(set);
    for (size_t at = whole.begin; at < whole.end;) {
        size_t b = dsc__bucket_at(set, at);
        struct dsc_range part = dsc_range_cut(whole, set->bucket[b].range);
        const struct dsc__arrival here = {
            (const char *)grad + (at - whole.begin) * dsc_dtype_size(dtype), dtype, part};
        if (!add_at_once(set, b, &here, finite))
            DSC_TRY(fill(set, b, part, here.data, dtype, finite));
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
        size_t b = dsc__bucket_at(set, at);
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
            DSC_TRY(publish(set, b, DSC__NOTHING));
        set->bucket[b].published = false;
    }
    set->round++;
    dsc_comm_ring_others(set->comm);
    return DSC_OK;
}

/* ---- the boundary ---- */

/* Settlements took the norm where they knew that they were the last. */
static void norm_of_bucket(struct dsc_buckets *set, size_t b, uint32_t n_rounds,
                           struct dsc_norm *norm) {
    const struct dsc__record *record = dsc__bucket_record(set, b);
    struct dsc_range range = set->bucket[b].range;
    if (record->norm_round == n_rounds) {
        dsc_norm_merge(norm, &record->norm);
        return;
    }
    const float *sums = dsc_buckets_sums(set, set->rank);
    dsc__bucket_add_squares(set,
                            sums + (range.begin - dsc_space_owned(set->space, set->rank).begin),
                            dsc_range_size(range) / DSC_BLOCK, norm);
}

/* norm NULL: only waits. */
static enum dsc_status finish(struct dsc_buckets *set, uint32_t n_rounds, struct dsc_norm *norm,
                              const char *label) {
    size_t at = set->first[set->rank], end = set->first[set->rank + 1];
    double since = dsc_comm_now();
    for (;;) {
        uint32_t bell = dsc_comm_bell(set->comm);
        flush_backlog(set);
        size_t before = at;
        while (at < end) {
            dsc__bucket_try_settle(set, at);
            if (atomic_load(&dsc__bucket_record(set, at)->n_settled) < n_rounds)
                break;
            if (norm)
                norm_of_bucket(set, at, n_rounds, norm);
            at++;
        }
        if (at == end && set->n_backlog == 0)
            return DSC_OK;
        if (at != before)
            since = dsc_comm_now();
        DSC_TRY(dsc_comm_wait_bell(set->comm, bell, label, since));
    }
    return DSC_OK;
}

enum dsc_status dsc_buckets_finish(struct dsc_buckets *set, uint32_t n_rounds,
                                   struct dsc_norm *norm, const char *label) {
    return finish(set, n_rounds, norm, label);
}

enum dsc_status dsc_buckets_wait_settled(struct dsc_buckets *set, uint32_t n_rounds,
                                         const char *label) {
    return finish(set, n_rounds, NULL, label);
}

void dsc_buckets_put_sums(struct dsc_buckets *set, size_t segment, const float *values,
                          float factor) {
    const struct dsc_segment *where = &set->space->segments[segment];
    /* Where no memory is shared, each rank has all that it steps from, at stage 0 everything. */
    struct dsc_range kept = set->remote ? set->sizes.held : dsc_space_owned(set->space, set->rank);
    struct dsc_range part = dsc_range_cut(dsc_segment_range(where), kept);
    float *sums = set->remote ? set->private_sums : dsc__bucket_own_sums(set);
    for (size_t i = part.begin; i < part.end; i++)
        sums[i - kept.begin] = values[i - where->begin] * factor;
    if (set->remote)
        return;
    for (size_t at = part.begin; at < part.end;) { /* the norm that settlements took is stale */
        size_t b = dsc__bucket_at(set, at);
        dsc__bucket_record(set, b)->norm_round = 0;
        at = set->bucket[b].range.end;
    }
}

static struct dsc__header *header_of(const struct dsc_buckets *set, int rank) {
    return (struct dsc__header *)(void *)set->window->base[rank];
}

/* Of this step: a rank that has not left the previous boundary yet will come to backward, and is
 * waited for. */
static bool anyone_finishing(const struct dsc_buckets *set) {
    for (int rank = 0; rank < set->size; rank++)
        if (atomic_load(&header_of(set, rank)->finishing) == set->step)
            return true;
    return false;
}

void dsc_buckets_at_boundary(struct dsc_buckets *set) {
    atomic_store(&header_of(set, set->rank)->finishing, set->step);
    dsc_comm_ring_others(set->comm);
}

void dsc_buckets_leave_boundary(struct dsc_buckets *set) {
    atomic_store(&header_of(set, set->rank)->finishing, 0);
}

enum dsc_status dsc_buckets_wait_turn(struct dsc_buckets *set, const char *label) {
    double since = dsc_comm_now();
    for (;;) {
        uint32_t bell = dsc_comm_bell(set->comm);
        flush_backlog(set);
        if (set->n_backlog == 0 || anyone_finishing(set))
            return DSC_OK;
        DSC_TRY(dsc_comm_wait_bell(set->comm, bell, label, since));
    }
}

void dsc_buckets_set_phase(struct dsc_buckets *set, bool in_backward, bool last) {
    set->in_backward = in_backward;
    set->last = last;
}

void dsc_buckets_reset(struct dsc_buckets *set) {
    if (set->remote) {
        dsc__remote_reset(set);
        return;
    }
    dsc_buckets_leave_boundary(set);
    set->step++;
    for (size_t b = set->first[set->rank]; b < set->first[set->rank + 1]; b++) {
        dsc__bucket_record(set, b)->norm_round = 0;
        atomic_store(&dsc__bucket_record(set, b)->n_settled, 0);
        atomic_store(&dsc__bucket_record(set, b)->step, set->step);
    }
}
