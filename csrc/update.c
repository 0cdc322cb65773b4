/* Work goes in runs of a few norm blocks, so that the gradient, the new fp32 value and its cast
 * stay in the first cache levels between the three loops that touch them. */
#include "update.h"

#include "kernels/kernels.h"

#include <string.h>

enum { RUN = 4 * DSC_BLOCK };

struct job {
    const struct dsc_update *update;
    const struct dsc_holding *holding;
    struct dsc_range range;
    const float *sums; /* of range.begin on; NULL: read the source */
    char *out;         /* new values of `range` in the model's dtype; NULL: nobody needs them */
};

/* Whoever writes to a 16-bit parameter, through whatever alias, leaves a value that is not the
 * rounded master; torch's version counter would miss writes through .data. The line is in cache
 * anyway, since the new value goes there. */
static void adopt_changes(const struct job *job, int param, float *master, const char *data,
                          size_t n) {
    const struct dsc_kernels *kernels = dsc_kernels();
    enum dsc_dtype dtype = job->holding->space->dtype;
    uint16_t expected[RUN];
    const uint16_t *found = (const uint16_t *)(const void *)data;
    kernels->from_f32[dtype](expected, master, n);
    if (memcmp(expected, found, n * sizeof *found) == 0)
        return;
    atomic_store_explicit(&job->update->changed[param], true, memory_order_relaxed);
    for (size_t i = 0; i < n; i++)
        if (expected[i] != found[i])
            kernels->to_f32[dtype](&master[i], &found[i], 1);
}

static void step_part(const struct job *job, const struct dsc_segment *segment,
                      struct dsc_range part, const float *grad) {
    const struct dsc_holding *holding = job->holding;
    enum dsc_dtype dtype = holding->space->dtype;
    size_t elem_size = dsc_dtype_size(dtype), n = dsc_range_size(part);
    size_t at = part.begin - holding->stepped.begin;
    char *data =
        (char *)job->update->views[segment->param].data + (part.begin - segment->begin) * elem_size;
    float wide[RUN];
    float *p = holding->master ? holding->master + at : (float *)(void *)data;
    float *state[DSC_OPTIM_MAX_STATES];
    for (int i = 0; i < DSC_OPTIM_MAX_STATES; i++)
        state[i] = holding->state[i] ? holding->state[i] + at : NULL;
    if (holding->master) {
        adopt_changes(job, segment->param, p, data, n);
    } else if (dtype != DSC_F32) { /* the parameter is its own master */
        p = wide;
        dsc_kernels()->to_f32[dtype](p, data, n);
    }
    if (!job->update->views[segment->param].frozen)
        dsc_optim_apply(&job->update->args[segment->group], p, state, grad, n);
    if (dtype != DSC_F32)
        dsc_kernels()->from_f32[dtype](data, p, n);
    if (job->out)
        memcpy(job->out + (part.begin - job->range.begin) * elem_size, data, n * elem_size);
}

static void step_runs(void *context, size_t begin, size_t end) {
    const struct job *job = context;
    float scratch[RUN];
    for (size_t i = begin; i < end; i++) {
        struct dsc_range run = {job->range.begin + i * RUN, job->range.begin + (i + 1) * RUN};
        run.end = dsc_min(run.end, job->range.end);
        const float *grad = scratch;
        if (job->sums)
            grad = job->sums + (run.begin - job->range.begin);
        else
            dsc_source_read(job->update->source, job->holding->space, run, scratch);
        struct dsc_parts it = dsc_parts(job->holding->space, run);
        while (dsc_parts_next(&it))
            step_part(job, it.segment, it.part, grad + (it.part.begin - run.begin));
    }
}

static void step_range(const struct dsc_update *update, const struct dsc_holding *holding,
                       struct dsc_range range, const float *sums, char *out) {
    struct job job = {update, holding, range, sums, out};
    dsc_pool_run(update->pool, (dsc_range_size(range) + RUN - 1) / RUN, 8, step_runs, &job);
}

/* Stage 0: every rank steps all elements, owner by owner, from the owners' sums. */
static void step_all(const struct dsc_update *update, const struct dsc_holding *holding) {
    int size = dsc_comm_size(update->comm);
    if (!holding->buckets) {
        step_range(update, holding, holding->stepped, NULL, NULL);
        return;
    }
    for (int owner = 0; owner < size; owner++)
        step_range(update, holding, dsc_partition_range(holding->space->n_elems, owner, size),
                   dsc_buckets_sums(holding->buckets, owner), NULL);
}

static void copy_in(const struct dsc_update *update, const struct dsc_space *space,
                    struct dsc_range range, const char *chunk) {
    size_t elem_size = dsc_dtype_size(space->dtype);
    struct dsc_parts it = dsc_parts(space, range);
    while (dsc_parts_next(&it))
        memcpy((char *)update->views[it.segment->param].data +
                   (it.part.begin - it.segment->begin) * elem_size,
               chunk + (it.part.begin - range.begin) * elem_size,
               dsc_range_size(it.part) * elem_size);
}

static struct dsc_range chunk_of(struct dsc_range owned, size_t k) {
    struct dsc_range chunk = {owned.begin + k * DSC_SPREAD_ELEMS,
                              owned.begin + (k + 1) * DSC_SPREAD_ELEMS};
    return dsc_range_cut(chunk, owned);
}

static enum dsc_status step_chunk(const struct dsc_update *update,
                                  const struct dsc_holding *holding, struct dsc_range chunk) {
    void *out;
    int rank = dsc_comm_rank(update->comm);
    const float *sums = dsc_buckets_sums(holding->buckets, rank);
    DSC_TRY(dsc_spread_acquire(update->spread, update->label, &out));
    step_range(update, holding, chunk, sums + (chunk.begin - holding->stepped.begin), out);
    dsc_spread_commit(update->spread);
    return DSC_OK;
}

enum dsc_status dsc_update_run(const struct dsc_update *update, const struct dsc_holding *holding) {
    if (!update->spread) {
        step_all(update, holding);
        return DSC_OK;
    }
    int rank = dsc_comm_rank(update->comm), size = dsc_comm_size(update->comm);
    size_t n_elems = holding->space->n_elems;
    /* All ranks walk the same number of chunks: that of the largest range. */
    size_t most = 0;
    for (int r = 0; r < size; r++)
        most = dsc_max(most, dsc_range_size(dsc_partition_range(n_elems, r, size)));
    for (size_t k = 0; k * DSC_SPREAD_ELEMS < most; k++)
        for (int d = 0; d < size; d++) {
            int owner = (rank + d) % size;
            struct dsc_range chunk = chunk_of(dsc_partition_range(n_elems, owner, size), k);
            const void *values;
            if (dsc_range_size(chunk) == 0)
                continue;
            if (d == 0) {
                DSC_TRY(step_chunk(update, holding, chunk));
                continue;
            }
            DSC_TRY(dsc_spread_take(update->spread, owner, update->label, &values));
            copy_in(update, holding->space, chunk, values);
            dsc_spread_release(update->spread, owner);
        }
    return DSC_OK;
}

void dsc_update_load_master(const struct dsc_holding *holding, const struct dsc_segment *segment,
                            const void *data) {
    enum dsc_dtype dtype = holding->space->dtype;
    struct dsc_range part = dsc_range_cut(dsc_segment_range(segment), holding->stepped);
    if (holding->master && dsc_range_size(part) > 0)
        dsc_kernels()->to_f32[dtype](holding->master + (part.begin - holding->stepped.begin),
                                     (const char *)data +
                                         (part.begin - segment->begin) * dsc_dtype_size(dtype),
                                     dsc_range_size(part));
}
