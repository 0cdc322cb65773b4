/* Work goes in runs of a few norm blocks, so that the gradient, the new fp32 value and its cast
 * stay in the first cache levels between the three loops that touch them. */
#include "update.h"

#include "kernels/kernels.h"

#include <string.h>

enum { RUN = 4 * DSC_BLOCK };

/* What a pass does with each part. */
enum pass { STEP, GRADIENTS, VALUES };

struct job {
    const struct dsc_update *update;
    const struct dsc_holding *holding;
    enum pass pass;
    struct dsc_range range;
    const float *sums; /* of range.begin on; NULL: read the source */
    char *out;         /* new values of `range` in the model's dtype; NULL: nobody needs them */
};

/* Whoever writes to a 16-bit parameter, through whatever alias, leaves a value that is not the
 * rounded master; torch's version counter would miss writes through .data. The line is in cache
 * anyway, since the new value goes there. */
static void adopt_changes(const struct dsc_update *update, const struct dsc_holding *holding,
                          int param, float *master, const void *data, size_t n) {
    const struct dsc_kernels *kernels = dsc_kernels();
    enum dsc_dtype dtype = holding->space->dtype;
    uint16_t expected[RUN];
    const uint16_t *found = data;
    kernels->from_f32[dtype](expected, master, n);
    if (memcmp(expected, found, n * sizeof *found) == 0)
        return;
    atomic_store_explicit(&update->changed[param], true, memory_order_relaxed);
    for (size_t i = 0; i < n; i++)
        if (expected[i] != found[i])
            kernels->to_f32[dtype](&master[i], &found[i], 1);
}

static char *place_of(const struct dsc_view *view, const struct dsc_space *space,
                      const struct dsc_segment *segment, size_t elem) {
    return (char *)view->data +
           (elem - segment->begin - view->begin) * dsc_dtype_size(space->dtype);
}

static char *data_of(const struct dsc_update *update, const struct dsc_space *space,
                     const struct dsc_segment *segment, size_t elem) {
    return place_of(&update->views[segment->param], space, segment, elem);
}

/* The fp32 values that are stepped: the master's, or those of an fp32 parameter itself. */
static float *stepped_of(const struct dsc_update *update, const struct dsc_holding *holding,
                         const struct dsc_segment *segment, size_t elem) {
    return holding->master ? holding->master + (elem - holding->stepped.begin)
                           : (float *)(void *)data_of(update, holding->space, segment, elem);
}

static void step_part(const struct job *job, const struct dsc_segment *segment, size_t at, float *p,
                      const float *grad, size_t n) {
    const struct dsc_holding *holding = job->holding;
    float *state[DSC_OPTIM_MAX_STATES];
    for (int i = 0; i < DSC_OPTIM_MAX_STATES; i++)
        state[i] = holding->state[i] ? holding->state[i] + at : NULL;
    if (!job->update->views[segment->param].frozen)
        dsc_optim_apply(&job->update->args[segment->group], p, state, grad, n);
}

static void do_part(const struct job *job, const struct dsc_segment *segment, struct dsc_range part,
                    const float *grad) {
    const struct dsc_holding *holding = job->holding;
    enum dsc_dtype dtype = holding->space->dtype;
    size_t n = dsc_range_size(part), at = part.begin - holding->stepped.begin;
    char *data = data_of(job->update, holding->space, segment, part.begin);
    float *p = stepped_of(job->update, holding, segment, part.begin), wide[RUN];
    if (holding->master && job->pass != VALUES) {
        adopt_changes(job->update, holding, segment->param, p, data, n);
    } else if (!holding->master && dtype != DSC_F32) { /* the parameter is its own master */
        p = wide;
        dsc_kernels()->to_f32[dtype](p, data, n);
    }
    if (job->pass == GRADIENTS) {
        float scale = (float)job->update->grad_scale;
        for (size_t i = 0; i < n; i++)
            holding->grads[at + i] = grad[i] * scale;
        return;
    }
    if (job->pass == STEP)
        step_part(job, segment, at, p, grad, n);
    if (dtype != DSC_F32)
        dsc_kernels()->from_f32[dtype](data, p, n);
    if (job->out)
        memcpy(job->out + (part.begin - job->range.begin) * dsc_dtype_size(dtype), data,
               n * dsc_dtype_size(dtype));
}

static void do_runs(void *context, size_t begin, size_t end) {
    const struct job *job = context;
    float scratch[RUN];
    for (size_t i = begin; i < end; i++) {
        struct dsc_range run = {job->range.begin + i * RUN, job->range.begin + (i + 1) * RUN};
        run.end = dsc_min(run.end, job->range.end);
        const float *grad = scratch;
        if (job->sums)
            grad = job->sums + (run.begin - job->range.begin);
        else if (job->pass != VALUES)
            dsc_source_read(job->update->source, job->holding->space, run, scratch);
        struct dsc_parts it = dsc_parts(job->holding->space, run);
        while (dsc_parts_next(&it))
            do_part(job, it.segment, it.part, grad + (it.part.begin - run.begin));
    }
}

static void run(const struct job *job) {
    dsc_pool_run(job->update->pool, (dsc_range_size(job->range) + RUN - 1) / RUN, 8, do_runs,
                 (void *)job);
}

/* `here`: the job's holding, with masters and states of the window that holds `at`. */
static enum dsc_status take_window(const struct job *job, size_t at, struct dsc_holding *here) {
    const struct dsc_holding *holding = job->holding;
    struct dsc_swap_window window;
    DSC_TRY(dsc_swap_take(holding->swap, at - holding->stepped.begin, &window));
    here->stepped = (struct dsc_range){holding->stepped.begin + window.begin,
                                       holding->stepped.begin + window.end};
    here->master = window.tensors[DSC_SWAP_MASTER];
    for (int i = 0; i < DSC_OPTIM_MAX_STATES; i++)
        here->state[i] = window.tensors[DSC_SWAP_STATE + i];
    return DSC_OK;
}

/* Steps stream masters and states, where they are a file's, in pieces short enough for the reads
 * and writes beside them to be looked after. */
static enum dsc_status do_range(const struct job *job) {
    if (!job->holding->swap || job->pass != STEP) {
        run(job);
        return DSC_OK;
    }
    struct dsc_holding here = *job->holding;
    struct job piece = *job;
    size_t elem_size = dsc_dtype_size(here.space->dtype);
    piece.holding = &here;
    for (size_t at = job->range.begin; at < job->range.end; at = piece.range.end) {
        DSC_TRY(take_window(job, at, &here));
        piece.range = dsc_range_cut((struct dsc_range){at, at + DSC_SPREAD_ELEMS}, here.stepped);
        piece.range = dsc_range_cut(piece.range, job->range);
        piece.sums = job->sums ? job->sums + (at - job->range.begin) : NULL;
        piece.out = job->out ? job->out + (at - job->range.begin) * elem_size : NULL;
        run(&piece);
    }
    return DSC_OK;
}

/* The owners from whose sums this rank steps: all of them at stage 0, itself elsewhere, nobody (one
 * pass over the source) in a group of one. */
static int first_owner(const struct dsc_holding *holding) {
    return holding->owns ? dsc_comm_rank(holding->comm) : 0;
}
static int end_owner(const struct dsc_holding *holding) {
    return holding->owns ? dsc_comm_rank(holding->comm) + 1 : dsc_comm_size(holding->comm);
}

static struct job job_of(const struct dsc_update *update, const struct dsc_holding *holding,
                         enum pass pass, int owner) {
    struct job job = {update, holding, pass, holding->stepped, NULL, NULL};
    if (holding->buckets) {
        job.range = dsc_space_owned(holding->space, owner);
        job.sums = dsc_buckets_sums(holding->buckets, owner);
    }
    return job;
}

static enum dsc_status do_all(const struct dsc_update *update, const struct dsc_holding *holding,
                              enum pass pass) {
    for (int owner = first_owner(holding); owner < end_owner(holding); owner++) {
        struct job job = job_of(update, holding, pass, owner);
        DSC_TRY(do_range(&job));
    }
    return DSC_OK;
}

enum dsc_status dsc_update_gradients(const struct dsc_update *update,
                                     const struct dsc_holding *holding) {
    return do_all(update, holding, GRADIENTS);
}

/* ---- LAMB: parameter by parameter ---- */

struct whole {
    const struct job *job;
    const struct dsc_segment *segment;
};

static const float *whole_gradient(void *context, size_t begin, size_t n, float *scratch) {
    const struct whole *whole = context;
    const struct job *job = whole->job;
    const struct dsc_holding *holding = job->holding;
    size_t elem = whole->segment->begin + begin;
    if (holding->master)
        adopt_changes(job->update, holding, whole->segment->param,
                      holding->master + (elem - holding->stepped.begin),
                      data_of(job->update, holding->space, whole->segment, elem), n);
    if (job->sums)
        return job->sums + (elem - job->range.begin);
    dsc_source_read(job->update->source, holding->space, (struct dsc_range){elem, elem + n},
                    scratch);
    return scratch;
}

/* A parameter that is not stepped keeps what somebody wrote to it: its master is cast all the same.
 */
static void adopt_whole(const struct job *job, const struct dsc_segment *segment) {
    const struct dsc_holding *holding = job->holding;
    for (size_t at = 0; holding->master && at < segment->n_elems; at += RUN) {
        size_t elem = segment->begin + at;
        adopt_changes(job->update, holding, segment->param,
                      holding->master + (elem - holding->stepped.begin),
                      data_of(job->update, holding->space, segment, elem),
                      dsc_min(RUN, segment->n_elems - at));
    }
}

static void lamb_parameters(const struct job *job) {
    const struct dsc_holding *holding = job->holding;
    struct dsc_parts it = dsc_parts(holding->space, job->range);
    while (dsc_parts_next(&it)) { /* each part is a whole parameter */
        if (job->update->views[it.segment->param].frozen) {
            adopt_whole(job, it.segment);
            continue;
        }
        size_t at = it.part.begin - holding->stepped.begin;
        struct whole whole = {job, it.segment};
        struct dsc_lamb_job lamb = {
            .pool = job->update->pool,
            .args = &job->update->args[it.segment->group],
            .p = stepped_of(job->update, holding, it.segment, it.part.begin),
            .m = holding->state[0] + at,
            .v = holding->state[1] + at,
            .n = dsc_range_size(it.part),
            .gradient = whole_gradient,
            .context = &whole,
            .norms = job->update->norms,
        };
        (void)dsc_lamb_step(&lamb);
    }
}

static void lamb(const struct dsc_update *update, const struct dsc_holding *holding) {
    for (int owner = first_owner(holding); owner < end_owner(holding); owner++) {
        struct job job = job_of(update, holding, STEP, owner);
        lamb_parameters(&job);
    }
}

/* ---- new values to the other ranks ---- */

static void copy_in(const struct dsc_update *update, const struct dsc_space *space,
                    struct dsc_range range, const char *chunk) {
    size_t elem_size = dsc_dtype_size(space->dtype);
    struct dsc_parts it = dsc_parts(space, range);
    while (dsc_parts_next(&it))
        memcpy(data_of(update, space, it.segment, it.part.begin),
               chunk + (it.part.begin - range.begin) * elem_size,
               dsc_range_size(it.part) * elem_size);
}

static struct dsc_range chunk_of(struct dsc_range owned, size_t k) {
    struct dsc_range chunk = {owned.begin + k * DSC_SPREAD_ELEMS,
                              owned.begin + (k + 1) * DSC_SPREAD_ELEMS};
    return dsc_range_cut(chunk, owned);
}

static enum dsc_status do_chunk(const struct dsc_update *update, const struct dsc_holding *holding,
                                enum pass pass, struct dsc_range chunk) {
    void *out;
    struct job job = job_of(update, holding, pass, dsc_comm_rank(holding->comm));
    DSC_TRY(dsc_spread_acquire(holding->spread, update->label, &out));
    job.sums += chunk.begin - job.range.begin;
    job.range = chunk;
    job.out = out;
    DSC_TRY(do_range(&job));
    dsc_spread_commit(holding->spread);
    return DSC_OK;
}

static enum dsc_status spread(const struct dsc_update *update, const struct dsc_holding *holding,
                              enum pass pass) {
    int rank = dsc_comm_rank(holding->comm), size = dsc_comm_size(holding->comm);
    /* All ranks walk the same number of chunks: that of the largest range. */
    size_t most = dsc_space_most_owned(holding->space);
    for (size_t at = 0, k = 0; at < most; at += DSC_SPREAD_ELEMS, k++) {
        size_t n_bytes =
            dsc_min(DSC_SPREAD_ELEMS, most - at) * dsc_dtype_size(holding->space->dtype);
        struct dsc_range chunk = chunk_of(dsc_space_owned(holding->space, rank), k);
        if (dsc_range_size(chunk) > 0)
            DSC_TRY(do_chunk(update, holding, pass, chunk));
        DSC_TRY(dsc_spread_share(holding->spread, n_bytes, update->label));
        for (int d = 1; d < size; d++) {
            int owner = (rank + d) % size;
            const void *values;
            chunk = chunk_of(dsc_space_owned(holding->space, owner), k);
            if (dsc_range_size(chunk) == 0)
                continue;
            DSC_TRY(dsc_spread_take(holding->spread, owner, update->label, &values));
            copy_in(update, holding->space, chunk, values);
            dsc_spread_release(holding->spread, owner);
        }
    }
    return DSC_OK;
}

enum dsc_status dsc_update_values(const struct dsc_update *update,
                                  const struct dsc_holding *holding) {
    if (holding->spread)
        return spread(update, holding, VALUES);
    return holding->master ? do_all(update, holding, VALUES) : DSC_OK;
}

enum dsc_status dsc_update_run(const struct dsc_update *update, const struct dsc_holding *holding) {
    if (update->args[0].kind == DSC_OPTIM_LAMB) {
        lamb(update, holding);
        return dsc_update_values(update, holding);
    }
    if (holding->spread)
        DSC_TRY(spread(update, holding, STEP));
    else
        DSC_TRY(do_all(update, holding, STEP));
    return holding->swap ? dsc_swap_finish(holding->swap) : DSC_OK;
}

void dsc_update_load_master(const struct dsc_holding *holding, const struct dsc_segment *segment,
                            const struct dsc_view *view) {
    enum dsc_dtype dtype = holding->space->dtype;
    struct dsc_range part = dsc_range_cut(dsc_segment_range(segment), holding->stepped);
    if (holding->master && dsc_range_size(part) > 0)
        dsc_kernels()->to_f32[dtype](holding->master + (part.begin - holding->stepped.begin),
                                     place_of(view, holding->space, segment, part.begin),
                                     dsc_range_size(part));
}
