/* The boundary exchange: all gradients are there, and waiting is allowed. Ranks copy what others
 * own into a few slots that stay in cache, and each owner settles its own buckets as they fill,
 * reading its own part where it lies and taking the norm on the way. Invariant: all ranks walk
 * buckets in the same order of k, so the one that is least far always can move. */
#include "bucket_impl.h"

#include <string.h>

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
    enum dsc_dtype own, to; /* as this rank would send it, and as it is sent */
    char *slot;
};

static void copy_part(const struct copy_job *job, const struct dsc_segment *segment,
                      struct dsc_range part, char *dst) {
    enum dsc_dtype dtype;
    const struct dsc_wire *wire = &job->set->options.wire;
    const void *src = dsc_source_at(job->source, segment, part.begin, &dtype);
    size_t n = dsc_range_size(part);
    if (src && job->own == job->to) {
        dsc_wire_pack(wire, dst, job->to, src, dtype, n);
        return;
    }
    memset(dst, 0, n * dsc_dtype_size(job->to));
    if (src) /* another rank brings fp32 sums */
        dsc_wire_add(wire, (float *)(void *)dst, job->own, src, dtype, n);
}

static void copy_blocks(void *context, size_t begin, size_t end) {
    const struct copy_job *job = context;
    struct dsc_range range = {job->range.begin + begin * DSC_BLOCK,
                              job->range.begin + end * DSC_BLOCK};
    size_t elem_size = dsc_dtype_size(job->to), at = range.begin;
    char *base = job->slot - job->range.begin * elem_size;
    struct dsc_parts it = dsc_parts(job->set->space, range);
    while (dsc_parts_next(&it)) {
        memset(base + at * elem_size, 0, (it.part.begin - at) * elem_size);
        copy_part(job, it.segment, it.part, base + it.part.begin * elem_size);
        at = it.part.end;
    }
    memset(base + at * elem_size, 0, (range.end - at) * elem_size);
}

void dsc__bucket_pack(const struct dsc_buckets *set, const struct dsc_source *source,
                      struct dsc_range range, enum dsc_dtype to, char *dst) {
    struct copy_job job = {set, source, range, dsc__bucket_slot_dtype(set, source), to, dst};
    dsc_pool_run(set->options.pool, dsc_range_size(range) / DSC_BLOCK, 32, copy_blocks, &job);
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
    const struct dsc__bucket *bucket = &set->bucket[b];
    uint64_t tag = DSC__NOTHING;
    /* The entry of the previous step must have been consumed; it has, since all ranks met after it.
     */
    if (has_data(set, source, bucket->range)) {
        int32_t slot = dsc__bucket_take_slot(set, set->sizes.max_slots);
        if (slot < 0)
            return false;
        enum dsc_dtype dtype = dsc__bucket_slot_dtype(set, source);
        dsc__bucket_pack(set, source, bucket->range, dtype, dsc__bucket_slot(set, set->rank, slot));
        tag = dsc__bucket_tag(slot, dtype);
    }
    dsc__bucket_post(set, b, tag);
    dsc_comm_ring(set->comm, bucket->owner);
    return true;
}

enum dsc_status dsc_buckets_exchange(struct dsc_buckets *set, const struct dsc_source *source,
                                     struct dsc_norm *norm, const char *label) {
    if (set->remote)
        return dsc__remote_exchange(set, source, norm, label);
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
        if (at < end && dsc__bucket_complete(set, dsc__bucket_record(set, at), set->rank)) {
            dsc__bucket_settle(set, at, source, norm);
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
