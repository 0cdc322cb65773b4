/* Buckets: layout, slots and settling. How contributions get there is in bucket_boundary.c and
 * bucket_early.c; what is shared is described in bucket_impl.h. Invariant: see bucket.h. */
#include "bucket_impl.h"

#include "alloc.h"
#include "arena.h"
#include "kernels/kernels.h"
#include "log.h"

#include <string.h>

/* ---- where things are ---- */

struct dsc__record *dsc__bucket_record(const struct dsc_buckets *set, size_t b) {
    int owner = set->bucket[b].owner;
    size_t k = b - set->first[owner];
    return (struct dsc__record *)(void *)(set->window->base[owner] + DSC__HEADER_BYTES +
                                          k * set->sizes.record_stride);
}

char *dsc__bucket_slot(const struct dsc_buckets *set, int rank, int32_t slot) {
    return set->window->base[rank] + set->sizes.slots_offset +
           (size_t)slot * set->slot_elems * sizeof(float);
}

enum dsc_dtype dsc__bucket_slot_dtype(const struct dsc_buckets *set,
                                      const struct dsc_source *source) {
    return dsc_wire_dtype(&set->options.wire, source->local ? DSC_F32 : set->space->dtype);
}

uint64_t dsc__bucket_tag(int32_t slot, enum dsc_dtype dtype) {
    return ((uint64_t)slot + 1) << 8 | (uint64_t)dtype << 1;
}

static const char *tag_data(const struct dsc_buckets *set, int rank, uint64_t tag,
                            enum dsc_dtype *dtype) {
    *dtype = (enum dsc_dtype)((tag & 0xff) >> 1);
    return dsc__bucket_slot(set, rank, (int32_t)(tag >> 8) - 1);
}

const float *dsc_buckets_sums(const struct dsc_buckets *set, int owner) {
    struct dsc_range owned = dsc_space_owned(set->space, owner);
    if (dsc_range_size(owned) == 0)
        return NULL;
    if (set->private_sums) /* of this rank's range, or of all */
        return owned.begin >= set->sizes.held.begin && owned.end <= set->sizes.held.end
                   ? set->private_sums + (owned.begin - set->sizes.held.begin)
                   : NULL;
    return (const float *)(const void *)(set->window->base[owner] + set->sizes.sums_offset);
}

float *dsc__bucket_own_sums(struct dsc_buckets *set) {
    if (set->private_sums)
        return set->private_sums +
               (dsc_space_owned(set->space, set->rank).begin - set->sizes.held.begin);
    return (float *)(void *)(set->window->base[set->rank] + set->sizes.sums_offset);
}

static float *sums_at(struct dsc_buckets *set, const struct dsc__bucket *bucket) {
    size_t offset = bucket->range.begin - dsc_space_owned(set->space, bucket->owner).begin;
    if (set->private_sums)
        return dsc__bucket_own_sums(set) + offset;
    return (float *)(void *)(set->window->base[bucket->owner] + set->sizes.sums_offset) + offset;
}

size_t dsc__bucket_at(const struct dsc_buckets *set, size_t elem) {
    int low = 0, high = set->size - 1;
    while (low < high) {
        int middle = low + (high - low) / 2;
        if (dsc_space_owned(set->space, middle).end > elem)
            high = middle;
        else
            low = middle + 1;
    }
    return set->first[low] + (elem - dsc_space_owned(set->space, low).begin) / set->slot_elems;
}

/* ---- slots ---- */

static bool consumed(const struct dsc_buckets *set, const struct dsc__outstanding *item) {
    return atomic_load(&dsc__bucket_record(set, item->bucket)->entry[set->rank]) != item->tag;
}

static void reclaim(struct dsc_buckets *set) {
    uint32_t bell = dsc_comm_bell(set->comm);
    /* Whoever settles rings the contributors, so an unchanged bell means nothing was consumed. */
    if (bell == set->reclaim_bell)
        return;
    set->reclaim_bell = bell;
    int32_t kept = 0;
    for (int32_t i = 0; i < set->n_outstanding; i++) {
        if (consumed(set, &set->outstanding[i]))
            set->free_slots[set->n_free++] = (int32_t)(set->outstanding[i].tag >> 8) - 1;
        else
            set->outstanding[kept++] = set->outstanding[i];
    }
    set->n_outstanding = kept;
}

int32_t dsc__bucket_take_slot(struct dsc_buckets *set, int32_t limit) {
    if (set->n_free == 0)
        reclaim(set);
    if (set->n_free > 0)
        return set->free_slots[--set->n_free];
    if (set->n_slots >= limit)
        return -1;
    if (set->options.early && set->n_outstanding > 0) {
        set->counters.n_extra_slots++;
        if (!set->said_ahead) {
            set->said_ahead = true;
            dsc_log(DSC_LOG_DEBUG, "rank %d is ahead of other ranks and takes more staging",
                    set->rank);
        }
    }
    return set->n_slots++;
}

/* ---- settling ---- */

struct sum_job {
    struct dsc_buckets *set;
    const struct dsc__bucket *bucket;
    struct dsc__record *record;
    int begin, end;                  /* ranks whose contributions are added */
    const struct dsc_source *own;    /* boundary: this rank's part, read where it lies */
    const struct dsc__arrival *here; /* early: the same */
    bool starts;                     /* this round's sums start: from zero if it is the first one */
    bool first;
    bool takes_parked;
    _Atomic bool finite; /* of `here` */
    double *squares;
};

static void add_contribution(const struct sum_job *job, int rank, struct dsc_range range,
                             float *dst) {
    uint64_t tag = atomic_load_explicit(&job->record->entry[rank], memory_order_relaxed);
    if (tag == DSC__NOTHING)
        return;
    enum dsc_dtype dtype;
    const char *data = tag_data(job->set, rank, tag, &dtype);
    size_t offset = range.begin - job->bucket->range.begin;
    dsc_kernels()->accumulate[dtype](dst, data + offset * dsc_dtype_size(dtype),
                                     dsc_range_size(range), false);
}

static void add_own(const struct sum_job *job, struct dsc_range range, float *dst) {
    const struct dsc_wire *wire = &job->set->options.wire;
    enum dsc_dtype to = dsc__bucket_slot_dtype(job->set, job->own);
    struct dsc_parts it = dsc_parts(job->set->space, range);
    while (dsc_parts_next(&it)) {
        enum dsc_dtype dtype;
        const void *src = dsc_source_at(job->own, it.segment, it.part.begin, &dtype);
        if (src)
            dsc_wire_add(wire, dst + (it.part.begin - range.begin), to, src, dtype,
                         dsc_range_size(it.part));
    }
}

/* What stays between rounds has the precision that data_types.grad_accum_dtype asks for. */
void dsc__bucket_round_sums(const struct dsc_buckets *set, float *sums) {
    enum dsc_dtype dtype = set->options.accum;
    uint16_t narrow[DSC_BLOCK];
    if (dtype == DSC_F32)
        return;
    dsc_kernels()->from_f32[dtype](narrow, sums, DSC_BLOCK);
    dsc_kernels()->to_f32[dtype](sums, narrow, DSC_BLOCK);
}

static void add_here(struct sum_job *job, struct dsc_range range, float *dst) {
    const struct dsc__arrival *here = job->here;
    struct dsc_range part = dsc_range_cut(range, here->range);
    size_t n = dsc_range_size(part);
    if (n == 0)
        return;
    const char *src =
        (const char *)here->data + (part.begin - here->range.begin) * dsc_dtype_size(here->dtype);
    dsc_wire_add(&job->set->options.wire, dst + (part.begin - range.begin), job->set->slot_dtype,
                 src, here->dtype, n);
    if (!dsc_kernels()->is_finite[here->dtype](src, n))
        atomic_store_explicit(&job->finite, false, memory_order_relaxed);
}

/* Block by block, so that a block stays in the first-level cache while all ranks are added. */
static void sum_blocks(void *context, size_t first_block, size_t end_block) {
    struct sum_job *job = context;
    float *sums = sums_at(job->set, job->bucket), parked[DSC_BLOCK];
    for (size_t k = first_block; k < end_block; k++) {
        struct dsc_range range = {job->bucket->range.begin + k * DSC_BLOCK,
                                  job->bucket->range.begin + (k + 1) * DSC_BLOCK};
        float *dst = sums + k * DSC_BLOCK;
        if (job->takes_parked)
            memcpy(parked, dst, sizeof parked);
        if (job->starts && job->first)
            memset(dst, 0, DSC_BLOCK * sizeof *dst);
        else if (job->starts)
            dsc__bucket_round_sums(job->set, dst);
        for (int rank = job->begin; rank < job->end; rank++) {
            if (job->takes_parked && rank == DSC__PARKS)
                dsc_kernels()->accumulate[DSC_F32](dst, parked, DSC_BLOCK, false);
            else if (job->own && rank == job->set->rank)
                add_own(job, range, dst);
            else if (job->here && rank == job->set->rank)
                add_here(job, range, dst);
            else
                add_contribution(job, rank, range, dst);
        }
        if (job->squares)
            job->squares[k] = dsc_kernels()->sum_squares(dst, DSC_BLOCK);
    }
}

/* Adds the ranks' contributions, and the squares of what comes out where a norm is asked for. */
static void sum_up(struct sum_job *job, struct dsc_norm *norm) {
    size_t n_blocks = dsc_range_size(job->bucket->range) / DSC_BLOCK;
    job->squares = norm ? job->set->squares : NULL;
    dsc_pool_run(job->set->options.pool, n_blocks, 32, sum_blocks, job);
    for (size_t k = 0; norm && k < n_blocks; k++)
        dsc_norm_add(norm, job->set->squares[k]);
}

/* All ranks' contributions to this round are in the sums. */
static void count_settled(struct dsc_buckets *set, const struct dsc__bucket *bucket,
                          struct dsc__record *record) {
    size_t n_bytes = bucket->n_used * sizeof(float);
    atomic_fetch_add(&record->n_settled, 1);
    set->counters.n_settled++;
    set->counters.n_bytes_settled += n_bytes;
    if (set->in_backward)
        set->counters.n_bytes_settled_in_backward += n_bytes;
}

/* This rank too: its own entry is free now, which its backlog and its slots may wait for. */
static void ring_all(struct dsc_buckets *set) {
    dsc_comm_ring(set->comm, set->rank);
    dsc_comm_ring_others(set->comm);
}

void dsc__bucket_settle(struct dsc_buckets *set, size_t b, const struct dsc_source *own,
                        struct dsc_norm *norm) {
    struct dsc__record *record = dsc__bucket_record(set, b);
    struct sum_job job = {
        .set = set,
        .bucket = &set->bucket[b],
        .record = record,
        .end = set->size,
        .own = own,
        .starts = true,
        .first = atomic_load(&record->n_settled) == 0,
    };
    sum_up(&job, norm);
    count_settled(set, job.bucket, record);
    for (int rank = 0; rank < set->size; rank++)
        atomic_store(&record->entry[rank], 0);
    ring_all(set);
}

struct square_job {
    const float *sums;
    double *squares;
};

static void square_blocks(void *context, size_t begin, size_t end) {
    const struct square_job *job = context;
    for (size_t k = begin; k < end; k++)
        job->squares[k] = dsc_kernels()->sum_squares(job->sums + k * DSC_BLOCK, DSC_BLOCK);
}

void dsc__bucket_add_squares(struct dsc_buckets *set, const float *sums, size_t n_blocks,
                             struct dsc_norm *norm) {
    struct square_job job = {sums, set->squares};
    dsc_pool_run(set->options.pool, n_blocks, 64, square_blocks, &job);
    for (size_t k = 0; k < n_blocks; k++)
        dsc_norm_add(norm, set->squares[k]);
}

bool dsc__bucket_complete(const struct dsc_buckets *set, struct dsc__record *record, int except) {
    for (int rank = 0; rank < set->size; rank++)
        if (rank != except && atomic_load(&record->entry[rank]) == 0)
            return false;
    return true;
}

/* Until its owner has left the step before, a bucket's sums are in use, and a contribution waits in
 * its entry; the owner's own will find it. */
static bool is_open(const struct dsc_buckets *set, struct dsc__record *record) {
    return atomic_load(&record->step) == set->step;
}

/* The rank up to which contributions to the open round can be added, from the next one on. Sums
 * that all ranks read are in use until the last rank has contributed: then all are added. */
static int reach(const struct dsc_buckets *set, struct dsc__record *record,
                 const struct dsc__arrival *here) {
    int begin = (int)atomic_load(&record->n_added), end = begin;
    while (end < set->size &&
           ((here && end == set->rank) || (record->parked && end == DSC__PARKS) ||
            atomic_load(&record->entry[end]) != 0))
        end++;
    return set->options.shared_sums && end < set->size ? begin : end;
}

/* The caller has the lock, and there is something to add. here: NULL, or what this rank, whose turn
 * it is, contributes. False where that is not finite. */
static bool add_early(struct dsc_buckets *set, size_t b, const struct dsc__arrival *here) {
    struct dsc__record *record = dsc__bucket_record(set, b);
    int begin = (int)atomic_load(&record->n_added), end = reach(set, record, here);
    struct sum_job job = {
        .set = set,
        .bucket = &set->bucket[b],
        .record = record,
        .begin = begin,
        .end = end,
        .here = here,
        .starts = begin == 0,
        .first = atomic_load(&record->n_settled) == 0,
        .takes_parked = record->parked,
        .finite = true,
    };
    struct dsc_norm *norm = end == set->size && set->last ? &record->norm : NULL;
    if (norm) {
        memset(norm, 0, sizeof *norm);
        record->norm_round = atomic_load(&record->n_settled) + 1;
    }
    sum_up(&job, norm);
    record->parked = false;
    atomic_store(&record->n_added, (uint32_t)(end == set->size ? 0 : end));
    if (end == set->size)
        count_settled(set, job.bucket, record);
    for (int rank = begin; rank < end; rank++) {
        if ((here && rank == set->rank) || (job.takes_parked && rank == DSC__PARKS))
            continue; /* an entry of theirs is the next round's */
        atomic_store(&record->entry[rank], 0);
        dsc_comm_ring(set->comm, rank);
    }
    if (end == set->size)
        ring_all(set);
    return atomic_load(&job.finite);
}

/* With the lock. */
static bool has_work(const struct dsc_buckets *set, struct dsc__record *record) {
    return reach(set, record, NULL) > (int)atomic_load(&record->n_added);
}

/* Without. */
static bool may_have_work(const struct dsc_buckets *set, struct dsc__record *record) {
    if (set->options.shared_sums)
        return dsc__bucket_complete(set, record, -1);
    return is_open(set, record) && atomic_load(&record->entry[atomic_load(&record->n_added)]) != 0;
}

void dsc__bucket_try_settle(struct dsc_buckets *set, size_t b) {
    struct dsc__record *record = dsc__bucket_record(set, b);
    while (may_have_work(set, record)) {
        if (atomic_exchange(&record->lock, 1) != 0)
            return;
        while (has_work(set, record))
            (void)add_early(set, b, NULL);
        atomic_store(&record->lock, 0);
    }
}

/* Rank 1's is the second addend of the first sum, and a sum of two has no order: it may wait in the
 * sums' own memory. */
static void park(struct dsc_buckets *set, size_t b, const struct dsc__arrival *here, bool *finite) {
    struct dsc__record *record = dsc__bucket_record(set, b);
    struct sum_job job = {
        .set = set,
        .bucket = &set->bucket[b],
        .record = record,
        .begin = DSC__PARKS,
        .end = DSC__PARKS + 1,
        .here = here,
        .starts = true,
        .first = true,
        .finite = true,
    };
    sum_up(&job, NULL);
    record->parked = true;
    *finite &= atomic_load(&job.finite);
}

bool dsc__bucket_add(struct dsc_buckets *set, size_t b, const struct dsc__arrival *here,
                     bool *finite) {
    struct dsc__record *record = dsc__bucket_record(set, b);
    if (!is_open(set, record) || atomic_load(&record->entry[set->rank]) != 0 ||
        atomic_exchange(&record->lock, 1) != 0)
        return false;
    while (has_work(set, record))
        (void)add_early(set, b, NULL);
    int n_added = (int)atomic_load(&record->n_added);
    bool its_turn = n_added == set->rank && reach(set, record, here) > n_added;
    bool parks = !its_turn && set->rank == DSC__PARKS && n_added == 0 && !record->parked &&
                 !set->options.shared_sums && atomic_load(&record->n_settled) == 0;
    if (its_turn)
        *finite &= add_early(set, b, here);
    else if (parks)
        park(set, b, here, finite);
    atomic_store(&record->lock, 0);
    dsc__bucket_try_settle(set, b); /* what came while it was locked */
    return its_turn || parks;
}

void dsc__bucket_post(struct dsc_buckets *set, size_t b, uint64_t tag) {
    if (tag != DSC__NOTHING) {
        size_t slot = (size_t)(tag >> 8) - 1;
        size_t width = dsc_dtype_size((enum dsc_dtype)((tag & 0xff) >> 1));
        set->slot_width[slot] = (uint8_t)dsc_max(set->slot_width[slot], width);
        set->outstanding[set->n_outstanding++] = (struct dsc__outstanding){(uint32_t)b, tag};
    }
    atomic_store(&dsc__bucket_record(set, b)->entry[set->rank], tag);
}

/* ---- opening and closing ---- */

static enum dsc_status lay_buckets(struct dsc_buckets *set) {
    size_t n = 0;
    DSC_TRY(dsc_alloc(((size_t)set->size + 1) * sizeof *set->first, (void **)&set->first));
    for (int r = 0; r < set->size; r++) {
        set->first[r] = n;
        n += dsc__bucket_count(set->space, r, set->slot_elems);
    }
    set->first[set->size] = n;
    DSC_TRY(dsc_alloc(n * sizeof *set->bucket, (void **)&set->bucket));
    for (int r = 0; r < set->size; r++)
        for (size_t b = set->first[r]; b < set->first[r + 1]; b++) {
            size_t begin =
                dsc_space_owned(set->space, r).begin + (b - set->first[r]) * set->slot_elems;
            struct dsc_range range = {
                begin, dsc_min(begin + set->slot_elems, dsc_space_owned(set->space, r).end)};
            struct dsc_parts it = dsc_parts(set->space, range);
            set->bucket[b] = (struct dsc__bucket){.range = range, .owner = r, .slot = -1};
            while (dsc_parts_next(&it))
                set->bucket[b].n_used += (uint32_t)dsc_range_size(it.part);
        }
    return DSC_OK;
}

static enum dsc_status lay_slots(struct dsc_buckets *set) {
    size_t n = (size_t)set->sizes.max_slots;
    set->max_backlog = set->first[set->size] + 1;
    DSC_TRY(dsc_alloc(n, (void **)&set->slot_width));
    memset(set->slot_width, sizeof(float), (size_t)set->sizes.first_slots);
    DSC_TRY(dsc_alloc(n * sizeof *set->free_slots, (void **)&set->free_slots));
    DSC_TRY(dsc_alloc(n * sizeof *set->outstanding, (void **)&set->outstanding));
    DSC_TRY(dsc_alloc(set->max_backlog * sizeof *set->backlog, (void **)&set->backlog));
    return dsc_alloc(set->slot_elems / DSC_BLOCK * sizeof *set->squares, (void **)&set->squares);
}

enum dsc_status dsc__bucket_hold(struct dsc_buckets *set) {
    return dsc_arena_alloc(dsc_range_size(set->sizes.held) * sizeof(float),
                           (void **)&set->private_sums);
}

static enum dsc_status open_window(struct dsc_buckets *set) {
    if (!set->sizes.sums_are_shared)
        DSC_TRY(dsc__bucket_hold(set));
    return dsc_comm_window_open(set->comm, set->sizes.window_bytes, "engine: gradient buckets",
                                &set->window);
}

/* What a step in the steady state touches: this rank's slots, and all sums that it reads or adds
 * to. */
static void populate(struct dsc_buckets *set) {
    size_t n_slot_bytes = (size_t)set->sizes.first_slots * set->slot_elems * sizeof(float);
    for (int r = 0; r < set->size; r++) {
        dsc_arena_populate(set->window->base[r], set->sizes.sums_offset);
        if (!set->private_sums)
            dsc_arena_populate(set->window->base[r] + set->sizes.sums_offset,
                               dsc_range_size(dsc_space_owned(set->space, r)) * sizeof(float));
        dsc_arena_populate(set->window->base[r] + set->sizes.slots_offset, n_slot_bytes);
    }
}

static enum dsc_status open_local(struct dsc_buckets *set) {
    set->reclaim_bell = dsc_comm_bell(set->comm) - 1;
    DSC_TRY(dsc_alloc(set->space->n_segments * sizeof *set->arrived, (void **)&set->arrived));
    DSC_TRY(lay_buckets(set));
    DSC_TRY(lay_slots(set));
    DSC_TRY(open_window(set));
    populate(set);
    for (size_t b = set->first[set->rank]; b < set->first[set->rank + 1]; b++)
        atomic_store(&dsc__bucket_record(set, b)->step, set->step);
    return DSC_OK;
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
    set->step = 1;
    set->slot_dtype = dsc_wire_dtype(&options->wire, space->dtype);
    set->sizes = dsc_bucket_sizes_of(space, set->rank, options);
    set->slot_elems = set->sizes.slot_elems;
    enum dsc_status status = options->remote ? dsc__remote_open(set) : open_local(set);
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
    if (set->remote)
        dsc__remote_close(set);
    if (set->private_sums)
        dsc_arena_free(set->private_sums, dsc_range_size(set->sizes.held) * sizeof(float));
    dsc_free(set->squares);
    dsc_free(set->backlog);
    dsc_free(set->outstanding);
    dsc_free(set->slot_width);
    dsc_free(set->free_slots);
    dsc_free(set->bucket);
    dsc_free(set->first);
    dsc_free(set->arrived);
    dsc_free(set);
}

struct dsc_bucket_counters dsc_buckets_counters(const struct dsc_buckets *set) {
    return set->counters;
}

size_t dsc_buckets_private_bytes(const struct dsc_buckets *set) {
    return set->sizes.staging_bytes +
           (set->private_sums ? dsc_range_size(set->sizes.held) * sizeof(float) : 0);
}

size_t dsc_buckets_shared_bytes(const struct dsc_buckets *set) {
    if (set->remote)
        return 0;
    size_t sums = set->private_sums
                      ? 0
                      : dsc_range_size(dsc_space_owned(set->space, set->rank)) * sizeof(float);
    size_t width = 0;
    for (int32_t i = 0; i < set->sizes.max_slots; i++)
        width += set->slot_width[i];
    return sums + width * set->slot_elems;
}
