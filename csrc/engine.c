/* The engine's life and its backward passes. The boundary is in engine_step.c, the state in
 * engine_impl.h. Invariant: whatever open fails to do, it undoes. */
#include "engine_impl.h"

#include "alloc.h"
#include "arena.h"
#include "fpenv.h"
#include "kernels/kernels.h"

#include <string.h>
#include <unistd.h>

/* ---- opening ---- */

/* What all control ranks must have alike, and what those of one data-parallel group must. */
struct settings {
    int32_t stage, overlap, optim, whole, skip_nonfinite, many_micro_steps;
    uint64_t bucket_elems;
    double clip, scale;
};
struct identity {
    struct settings settings;
    uint64_t hash, n_params, n_elems;
    int32_t n_groups, ids[DSC_REDUCE_MAX];
};

static struct identity identity_of(const struct dsc_engine *e) {
    struct identity id;
    memset(&id, 0, sizeof id); /* padding is compared too */
    id.settings.stage = e->options.stage;
    id.settings.overlap = e->options.overlap;
    id.settings.optim = (int32_t)e->options.optim;
    id.settings.whole = e->options.whole;
    id.settings.bucket_elems = e->options.bucket_elems;
    id.settings.clip = e->options.clip;
    id.settings.skip_nonfinite = e->options.skip_nonfinite;
    id.settings.many_micro_steps = e->options.many_micro_steps;
    id.settings.scale = e->options.scaler.scale;
    id.hash = e->options.names_hash ^ DSC_HASH_START;
    id.n_params = e->n_params;
    id.n_groups = e->n_groups;
    for (size_t g = 0; g < DSC_REDUCE_MAX; g++)
        id.ids[g] = g < e->ranks.n_reduce ? e->ranks.reduce[g].id : -1;
    for (size_t i = 0; i < e->n_params; i++) {
        uint64_t row[4] = {e->params[i].n_elems, (uint64_t)e->params[i].dtype,
                           (uint64_t)e->params[i].group, (uint64_t)e->params[i].reduce};
        id.hash = dsc_hash(id.hash, row, sizeof row);
        id.n_elems += e->params[i].n_elems;
    }
    return id;
}

static bool same_model(const struct identity *a, const struct identity *b) {
    return a->hash == b->hash && a->n_params == b->n_params && a->n_elems == b->n_elems &&
           a->n_groups == b->n_groups;
}

static enum dsc_status fail_different(int r, const struct identity *first, int q,
                                      const struct identity *other) {
    const struct settings *a = &first->settings, *b = &other->settings;
    return DSC_FAIL(
        DSC_EINVAL,
        "ranks initialise different engines: rank %d has %llu parameters with %llu elements "
        "in %d groups (stage %d, overlap_comm %d, reduce_bucket_size %llu, clipping %g), "
        "rank %d has %llu with %llu in %d (stage %d, overlap_comm %d, reduce_bucket_size "
        "%llu, clipping %g)%s",
        r, (unsigned long long)first->n_params, (unsigned long long)first->n_elems, first->n_groups,
        a->stage, a->overlap, (unsigned long long)a->bucket_elems, a->clip, q,
        (unsigned long long)other->n_params, (unsigned long long)other->n_elems, other->n_groups,
        b->stage, b->overlap, (unsigned long long)b->bucket_elems, b->clip,
        first->n_elems == other->n_elems ? "; names, shapes, dtypes or settings differ" : "");
}

/* Every rank is compared with rank 0, and with the first of its data-parallel group, and all ranks
 * look at all, so that all fail together. */
static enum dsc_status compare_models(struct dsc_engine *e) {
    struct identity mine = identity_of(e), first, other, begins;
    DSC_TRY(dsc_comm_meet(e->comm, "initialize", 0, &mine, sizeof mine, e->meeting));
    memcpy(&first, e->meeting, sizeof first);
    for (int r = 0; r < e->size; r++) {
        memcpy(&other, e->meeting + (size_t)r * sizeof other, sizeof other);
        memcpy(e->ids + (size_t)r * DSC_REDUCE_MAX, other.ids, sizeof other.ids);
        int q = 0;
        while (e->ids[(size_t)q * DSC_REDUCE_MAX] != other.ids[0])
            q++;
        memcpy(&begins, e->meeting + (size_t)q * sizeof begins, sizeof begins);
        if (memcmp(&other.settings, &first.settings, sizeof first.settings) != 0)
            return fail_different(0, &first, r, &other);
        if (!same_model(&other, &begins))
            return fail_different(q, &begins, r, &other);
    }
    return DSC_OK;
}

struct dsc_space_needs dsc__engine_needs(const struct dsc_engine *e, size_t s) {
    const struct dsc_space *space = &e->spaces[s];
    return dsc_engine_needs(&e->options, &e->ways, space,
                            dsc_comm_rank(e->ranks.reduce[space->reduce].comm));
}

static enum dsc_status hold_space(struct dsc_engine *e, size_t s) {
    const struct dsc_space *space = &e->spaces[s];
    struct dsc_holding *holding = &e->holdings[s];
    struct dsc_comm *comm = e->ranks.reduce[space->reduce].comm;
    struct dsc_space_needs needs = dsc__engine_needs(e, s);
    holding->space = space;
    holding->comm = comm;
    holding->stepped = needs.stepped;
    holding->owns = needs.owns;
    if (needs.master)
        DSC_TRY(dsc__engine_hold(holding, DSC_SWAP_MASTER, &holding->master));
    for (int i = 0; i < needs.n_states; i++)
        DSC_TRY(dsc__engine_hold(holding, DSC_SWAP_STATE + i, &holding->state[i]));
    if (needs.grads)
        DSC_TRY(dsc_arena_alloc(dsc_range_size(needs.stepped) * sizeof(float),
                                (void **)&holding->grads));
    if (needs.local)
        DSC_TRY(dsc__engine_need_local(e, s));
    if (!needs.shared)
        return DSC_OK;
    struct dsc_spread **spread = &e->spread[space->reduce];
    if (needs.spread && !*spread)
        DSC_TRY(dsc_spread_open(comm, e->ways.remote, spread));
    holding->spread = *spread;
    needs.buckets.pool = e->pool;
    return dsc_buckets_open(comm, space, &needs.buckets, &holding->buckets);
}

enum dsc_status dsc_engine_hold_momentum(struct dsc_engine *e) {
    for (size_t s = 0; e->options.optim == DSC_OPTIM_SGD && s < e->n_spaces; s++) {
        struct dsc_holding *holding = &e->holdings[s];
        if (!holding->state[0])
            DSC_TRY(dsc__engine_hold(holding, DSC_SWAP_STATE, &holding->state[0]));
    }
    return DSC_OK;
}

enum dsc_status dsc__engine_need_local(struct dsc_engine *e, size_t s) {
    if (e->local[s])
        return DSC_OK;
    return dsc_arena_alloc(e->spaces[s].n_elems * sizeof(float), (void **)&e->local[s]);
}

static enum dsc_status allocate(struct dsc_engine *e, const struct dsc_param *params) {
    size_t n = e->n_params;
    DSC_TRY(dsc_alloc(n * sizeof *e->params, (void **)&e->params));
    memcpy(e->params, params, n * sizeof *e->params);
    DSC_TRY(dsc_alloc(n * sizeof *e->param_space, (void **)&e->param_space));
    DSC_TRY(dsc_alloc(n * sizeof *e->param_segment, (void **)&e->param_segment));
    DSC_TRY(dsc_alloc(n * sizeof *e->folded, (void **)&e->folded));
    DSC_TRY(dsc_alloc(n * sizeof *e->touched, (void **)&e->touched));
    DSC_TRY(dsc_alloc(n * sizeof *e->marked, (void **)&e->marked));
    DSC_TRY(dsc_alloc(n * sizeof *e->changed, (void **)&e->changed));
    DSC_TRY(dsc_alloc((size_t)e->n_groups * sizeof *e->args, (void **)&e->args));
    DSC_TRY(dsc_alloc((size_t)e->size * DSC_MEET_MAX, (void **)&e->meeting));
    DSC_TRY(dsc_alloc((size_t)e->size * DSC_REDUCE_MAX * sizeof *e->ids, (void **)&e->ids));
    DSC_TRY(dsc_alloc(DSC__ENGINE_RUN * sizeof *e->squares, (void **)&e->squares));
    DSC_TRY(dsc_alloc(2 * (size_t)e->n_groups * sizeof *e->steps, (void **)&e->steps));
    DSC_TRY(dsc_arena_alloc(n * sizeof *e->shown_steps, (void **)&e->shown_steps));
    if (e->options.optim == DSC_OPTIM_LAMB)
        DSC_TRY(dsc_alloc(DSC_LAMB_NORMS * sizeof *e->lamb_norms, (void **)&e->lamb_norms));
    DSC_TRY(dsc_pool_open(e->options.n_threads, e->options.team, &e->pool));
    int n_ranks[DSC_REDUCE_MAX];
    for (size_t g = 0; g < e->ranks.n_reduce; g++)
        n_ranks[g] = dsc_comm_size(e->ranks.reduce[g].comm);
    struct dsc_cutting cutting = {n_ranks, e->ranks.n_reduce, e->options.whole};
    return dsc_space_build(params, n, &cutting, &e->spaces, &e->n_spaces, e->param_space,
                           e->param_segment);
}

static enum dsc_status hold_all(struct dsc_engine *e) {
    DSC_TRY(dsc_alloc(e->n_spaces * sizeof *e->holdings, (void **)&e->holdings));
    DSC_TRY(dsc_alloc(e->n_spaces * sizeof *e->local, (void **)&e->local));
    DSC_TRY(dsc_alloc(e->n_spaces * sizeof *e->sources, (void **)&e->sources));
    DSC_TRY(dsc_alloc(e->n_spaces * sizeof *e->n_folded, (void **)&e->n_folded));
    DSC_TRY(dsc__engine_check_room(e));
    DSC_TRY(dsc__engine_open_files(e));
    for (size_t s = 0; s < e->n_spaces; s++)
        DSC_TRY(hold_space(e, s));
    return DSC_OK;
}

struct dsc_engine_ranks dsc_engine_ranks_of(struct dsc_comm *comm) {
    return (struct dsc_engine_ranks){
        .control = comm, .reduce = {{comm, 0}}, .n_reduce = 1, .n_averaged = dsc_comm_size(comm)};
}

enum dsc_status dsc_engine_open(const struct dsc_engine_ranks *ranks,
                                const struct dsc_engine_options *options,
                                const struct dsc_param *params, size_t n_params, int n_groups,
                                struct dsc_engine **out) {
    struct dsc_engine *e = NULL;
    DSC_TRY(dsc_engine_check_options(options));
    DSC_TRY(dsc_alloc(sizeof *e, (void **)&e));
    e->ranks = *ranks;
    e->comm = ranks->control;
    e->options = *options;
    e->options.whole = dsc_engine_keeps_whole(options);
    e->rank = dsc_comm_rank(e->comm);
    e->size = dsc_comm_size(e->comm);
    e->pid = getpid();
    e->ways = dsc_engine_ways_of(&e->options, dsc_comm_size(ranks->reduce[0].comm),
                                 !dsc_comm_has_windows(e->comm));
    e->n_params = n_params;
    e->n_groups = n_groups;
    e->scaler = options->scaler;
    e->culprit.param = -1;
    if (e->ways.alone)
        e->options.wire = (struct dsc_wire){0}; /* nothing travels */
    enum dsc_status status = allocate(e, params);
    if (status == DSC_OK)
        status = compare_models(e);
    if (status == DSC_OK)
        status = hold_all(e);
    if (status != DSC_OK) {
        dsc_engine_close(e);
        return status;
    }
    *out = e;
    return DSC_OK;
}

void dsc_engine_close(struct dsc_engine *e) {
    if (!e)
        return;
    for (size_t s = 0; e->holdings && s < e->n_spaces; s++) {
        struct dsc_holding *holding = &e->holdings[s];
        size_t n_bytes = dsc_range_size(holding->stepped) * sizeof(float);
        dsc_buckets_close(holding->buckets);
        dsc_arena_free(holding->master, n_bytes);
        for (int i = 0; i < DSC_OPTIM_MAX_STATES; i++)
            dsc_arena_free(holding->state[i], n_bytes);
        dsc_arena_free(holding->grads, n_bytes);
        dsc_swap_close(holding->swap);
        if (e->local)
            dsc_arena_free(e->local[s], e->spaces[s].n_elems * sizeof(float));
    }
    for (size_t g = 0; g < e->ranks.n_reduce; g++)
        dsc_spread_close(e->spread[g]);
    dsc_io_close(e->io);
    dsc_space_free(e->spaces, e->n_spaces);
    dsc_pool_close(e->pool);
    dsc_free(e->sources);
    dsc_free(e->local);
    dsc_free(e->holdings);
    dsc_arena_free(e->shown_steps, e->n_params * sizeof *e->shown_steps);
    dsc_free(e->steps);
    dsc_free(e->lamb_norms);
    dsc_free(e->squares);
    dsc_free(e->meeting);
    dsc_free(e->n_folded);
    dsc_free(e->ids);
    dsc_free(e->args);
    dsc_free(e->changed);
    dsc_free(e->touched);
    dsc_free(e->marked);
    dsc_free(e->folded);
    dsc_free(e->param_segment);
    dsc_free(e->param_space);
    dsc_free(e->params);
    dsc_free(e);
}

const struct dsc_segment *dsc__engine_segment(const struct dsc_engine *e, size_t param) {
    return &e->spaces[e->param_space[param]].segments[e->param_segment[param]];
}

void dsc_engine_load_masters(struct dsc_engine *e, const struct dsc_view *views) {
    uint64_t saved = dsc_fp_enter();
    for (size_t i = 0; i < e->n_params; i++)
        if (e->param_space[i] >= 0)
            dsc_update_load_master(&e->holdings[e->param_space[i]], dsc__engine_segment(e, i),
                                   &views[i]);
    dsc_fp_leave(saved);
}

/* ---- backward ---- */

bool dsc_engine_early(const struct dsc_engine *e) {
    return e->ways.early;
}

static void tell_buckets(struct dsc_engine *e, bool inside) {
    for (size_t s = 0; s < e->n_spaces; s++)
        if (e->holdings[s].buckets)
            dsc_buckets_set_phase(e->holdings[s].buckets, inside, e->boundary);
}

enum dsc_status dsc__engine_end_round(struct dsc_engine *e, const struct dsc_source *sources) {
    for (size_t s = 0; s < e->n_spaces; s++)
        if (e->holdings[s].buckets)
            DSC_TRY(dsc_buckets_end_round(e->holdings[s].buckets, sources ? &sources[s] : NULL));
    e->round_open = false;
    e->n_rounds++;
    return DSC_OK;
}

enum dsc_status dsc__engine_usable(const struct dsc_engine *e) {
    if (e->pid != getpid())
        return DSC_FAIL(DSC_ESTATE, "this is a forked child: the engine belongs to process %ld",
                        (long)e->pid);
    return DSC_OK;
}

enum dsc_status dsc_engine_begin_backward(struct dsc_engine *e, bool boundary, int *need) {
    DSC_TRY(dsc__engine_usable(e));
    DSC_TRY(dsc__engine_check_whole(e));
    /* Another backward pass after that of the boundary (a second loss): what came so far is a
     * round. */
    if (e->round_open)
        DSC_TRY(dsc__engine_end_round(e, NULL));
    for (size_t s = 0; e->ways.early && !e->ways.keeps && !e->deferring && s < e->n_spaces; s++)
        if (e->holdings[s].buckets)
            DSC_TRY(dsc_buckets_wait_turn(e->holdings[s].buckets, "backward (others are behind)"));
    e->boundary = boundary;
    tell_buckets(e, true);
    *need = e->pending_16bit ? DSC_NEED_FOLD : DSC_NEED_NOTHING;
    return DSC_OK;
}

enum dsc_status dsc_engine_end_backward(struct dsc_engine *e, bool boundary, int *need) {
    enum dsc_status status = dsc__engine_usable(e);
    *need = DSC_NEED_NOTHING;
    if (status != DSC_OK)
        return status;
    e->n_micro++;
    if (!e->ways.keeps && !e->deferring && e->ways.remote) {
        *need |= DSC_NEED_HAND_OVER;
    } else if (!e->ways.keeps && !e->deferring) {
        double since = dsc_comm_now();
        status = dsc__engine_end_round(e, NULL);
        e->reduce_s += dsc_comm_now() - since;
    }
    for (size_t s = 0; s < e->n_spaces; s++) {
        bool folds = e->spaces[s].dtype != DSC_F32 && e->ways.folds;
        if (!e->deferring && !dsc__engine_keeps(e, (int)s))
            continue;
        if (boundary && !e->deferring)
            e->pending_16bit |= folds;
        else if (folds)
            *need |= DSC_NEED_FOLD;
        else if (e->culprit.param < 0)
            *need |= DSC_NEED_CHECK;
    }
    tell_buckets(e, false);
    return status;
}

static void accuse(struct dsc_engine *e, size_t param, const void *grad, enum dsc_dtype dtype,
                   uint64_t micro) {
    size_t low = 0, n = e->params[param].n_elems, elem_size = dsc_dtype_size(dtype);
    if (e->culprit.param >= 0)
        return;
    while (n > 1) { /* the first half that is not finite holds the first element */
        size_t half = n / 2;
        if (dsc_kernels()->is_finite[dtype]((const char *)grad + low * elem_size, half)) {
            low += half;
            n -= half;
        } else {
            n = half;
        }
    }
    e->culprit = (struct dsc__culprit){(int64_t)param, low, micro};
}

enum dsc_status dsc__engine_fold_one(struct dsc_engine *e, size_t i, const void *grad,
                                     enum dsc_dtype dtype, uint64_t micro) {
    size_t s = (size_t)e->param_space[i];
    DSC_TRY(dsc__engine_need_local(e, s));
    size_t n = e->params[i].n_elems;
    if (!dsc_kernels()->is_finite[dtype](grad, n))
        accuse(e, i, grad, dtype, micro);
    dsc_kernels()->accumulate[dtype](e->local[s] + dsc__engine_segment(e, i)->begin, grad, n,
                                     !e->folded[i]);
    e->n_folded[s] += !e->folded[i];
    e->folded[i] = e->touched[i] = true;
    return DSC_OK;
}

bool dsc__engine_is_16bit(const struct dsc_engine *e, size_t param) {
    return e->param_space[param] >= 0 && e->params[param].dtype != DSC_F32;
}

enum dsc_status dsc_engine_hand_over(struct dsc_engine *e, struct dsc_view *views) {
    uint64_t saved = dsc_fp_enter();
    for (size_t i = 0; i < e->n_params; i++)
        e->touched[i] |= e->param_space[i] >= 0 && views[i].grad;
    dsc__engine_check(e, views, true);
    double since = dsc_comm_now();
    enum dsc_status status = dsc__engine_hand_over(e, views);
    e->reduce_s += dsc_comm_now() - since;
    dsc_fp_leave(saved);
    return status;
}

bool dsc__engine_any_folded(const struct dsc_engine *e) {
    for (size_t s = 0; s < e->n_spaces; s++)
        if (e->n_folded[s] > 0)
            return true;
    return false;
}

enum dsc_status dsc_engine_fold(struct dsc_engine *e, struct dsc_view *views) {
    uint64_t saved = dsc_fp_enter();
    enum dsc_status status = DSC_OK;
    for (size_t i = 0; status == DSC_OK && i < e->n_params; i++)
        if (dsc__engine_is_16bit(e, i) && views[i].grad &&
            (e->deferring || dsc__engine_keeps(e, e->param_space[i]))) {
            status = dsc__engine_fold_one(e, i, views[i].grad, views[i].grad_dtype, e->n_micro);
            views[i].grad = NULL;
        }
    e->pending_16bit = false;
    dsc_fp_leave(saved);
    return status;
}

void dsc_engine_drop_sums(struct dsc_engine *e) {
    memset(e->folded, 0, e->n_params * sizeof *e->folded);
    e->pending_16bit = false;
    e->culprit.param = -1;
    /* A round that is open has fp32 slots; that stays so until it ends. */
    if (!e->round_open)
        memset(e->n_folded, 0, e->n_spaces * sizeof *e->n_folded);
}

void dsc_engine_check(struct dsc_engine *e, const struct dsc_view *views) {
    dsc__engine_check(e, views, false);
}

void dsc__engine_check(struct dsc_engine *e, const struct dsc_view *views, bool shared_only) {
    for (size_t i = 0; e->culprit.param < 0 && i < e->n_params; i++)
        if (e->param_space[i] >= 0 && views[i].grad &&
            (!shared_only || dsc__engine_shares(e, e->param_space[i])) &&
            !dsc_kernels()->is_finite[views[i].grad_dtype](views[i].grad, e->params[i].n_elems))
            accuse(e, i, views[i].grad, views[i].grad_dtype, dsc_max(e->n_micro, 1));
}

void dsc__engine_open_round(struct dsc_engine *e) {
    e->round_open = true;
    for (size_t s = 0; s < e->n_spaces; s++)
        if (e->holdings[s].buckets)
            dsc_buckets_set_dtype(e->holdings[s].buckets,
                                  e->n_folded[s] ? DSC_F32 : e->spaces[s].dtype);
}

enum dsc_status dsc_engine_arrive(struct dsc_engine *e, size_t param, const void *grad,
                                  enum dsc_dtype dtype, bool *taken) {
    int s = e->param_space[param];
    bool finite = true;
    *taken = false;
    /* In a forked child the gradient is the child's own and stays. */
    if (!e->ways.early || !dsc__engine_shares(e, s) || e->pid != getpid() || e->deferring ||
        (e->ways.keeps && !e->boundary))
        return DSC_OK;
    if (!e->round_open)
        dsc__engine_open_round(e);
    struct dsc_buckets *buckets = e->holdings[s].buckets;
    /* A second gradient in one round (a checkpointed module used twice, a second loss) stays in
     * .grad and goes with the next round. */
    if (!dsc_buckets_expects(buckets, e->param_segment[param]))
        return DSC_OK;
    uint64_t saved = dsc_fp_enter();
    double since = dsc_comm_now();
    enum dsc_status status = DSC_OK;
    const void *src = grad;
    enum dsc_dtype src_dtype = dtype;
    if (e->ways.keeps && e->n_folded[s] && dsc__engine_is_16bit(e, param)) {
        status = dsc__engine_fold_one(e, param, grad, dtype, e->n_micro + 1);
        src = e->local[s] + dsc__engine_segment(e, param)->begin;
        src_dtype = DSC_F32;
    }
    if (status == DSC_OK)
        status = dsc_buckets_arrive(buckets, e->param_segment[param], src, src_dtype, &finite);
    if (!finite)
        accuse(e, param, src, src_dtype, e->n_micro + 1);
    if (src != grad)
        e->folded[param] = false; /* n_folded stays: it says that this step's slots are fp32 */
    e->reduce_s += dsc_comm_now() - since;
    dsc_fp_leave(saved);
    *taken = e->touched[param] = status == DSC_OK;
    return status;
}

/* ---- looking ---- */

double dsc_engine_scale(const struct dsc_engine *e) {
    return e->scaler.scale;
}

struct dsc_engine_counters dsc_engine_counters(const struct dsc_engine *e) {
    struct dsc_engine_counters sum = {0};
    for (size_t g = 0; g < e->ranks.n_reduce; g++)
        sum.private_bytes += e->spread[g] ? dsc_spread_private_bytes(e->spread[g]) : 0;
    for (size_t s = 0; s < e->n_spaces; s++) {
        const struct dsc_holding *holding = &e->holdings[s];
        size_t n_stepped = dsc_range_size(holding->stepped);
        sum.owned_elems += n_stepped;
        sum.padded_elems += e->spaces[s].n_elems - e->spaces[s].n_used;
        sum.private_bytes += (holding->grads ? 4 : 0) * n_stepped;
        size_t *states = holding->swap ? &sum.file_bytes : &sum.private_bytes;
        *states += (holding->master ? 4 : 0) * n_stepped;
        for (int i = 0; i < DSC_OPTIM_MAX_STATES; i++)
            *states += (holding->state[i] ? 4 : 0) * n_stepped;
        sum.private_bytes += holding->swap ? dsc_swap_memory_bytes(holding->swap) : 0;
        sum.private_bytes += (e->local[s] ? 4 : 0) * e->spaces[s].n_elems;
        if (!holding->buckets)
            continue;
        struct dsc_bucket_counters counters = dsc_buckets_counters(holding->buckets);
        sum.n_settled += counters.n_settled;
        sum.n_bytes_settled += counters.n_bytes_settled;
        sum.n_bytes_settled_in_backward += counters.n_bytes_settled_in_backward;
        sum.n_extra_slots += counters.n_extra_slots;
        sum.private_bytes += dsc_buckets_private_bytes(holding->buckets);
        sum.shared_bytes += dsc_buckets_shared_bytes(holding->buckets);
    }
    return sum;
}

int64_t dsc_engine_unused(const struct dsc_engine *e, const struct dsc_view *views) {
    for (size_t i = 0; i < e->n_params; i++)
        if (e->param_space[i] >= 0 && !e->touched[i] && !views[i].grad && !views[i].frozen)
            return (int64_t)i;
    return -1;
}

void dsc_engine_place(const struct dsc_engine *e, size_t param, int *rank, int *size) {
    const struct dsc_comm *comm = e->ranks.reduce[e->params[param].reduce].comm;
    *rank = dsc_comm_rank(comm);
    *size = dsc_comm_size(comm);
}

void dsc_engine_part(const struct dsc_engine *e, size_t param, int rank, size_t *begin, size_t *n) {
    *begin = *n = 0;
    if (e->param_space[param] < 0)
        return;
    const struct dsc_segment *segment = dsc__engine_segment(e, param);
    const struct dsc_space *space = &e->spaces[e->param_space[param]];
    struct dsc_range stepped = {0, space->n_elems};
    if (e->options.stage > 0)
        stepped = dsc_space_owned(space, rank);
    struct dsc_range part = dsc_range_cut(dsc_segment_range(segment), stepped);
    *begin = part.begin - segment->begin;
    *n = dsc_range_size(part);
}

struct dsc_held dsc_engine_held(const struct dsc_engine *e, size_t param, int which) {
    struct dsc_held held = {NULL, 0, 0, NULL, 0};
    if (e->param_space[param] < 0)
        return held;
    const struct dsc_holding *holding = &e->holdings[e->param_space[param]];
    const struct dsc_segment *segment = dsc__engine_segment(e, param);
    float *base = which == DSC_HELD_GRADIENT ? holding->grads
                  : which == DSC_HELD_MASTER ? holding->master
                                             : holding->state[which];
    struct dsc_range part = dsc_range_cut(dsc_segment_range(segment), holding->stepped);
    held.begin = part.begin - segment->begin;
    held.n = dsc_range_size(part);
    if (!base || held.n == 0)
        return held;
    held.values = base + (part.begin - holding->stepped.begin);
    held.block = base;
    held.block_bytes = dsc_range_size(holding->stepped) * sizeof(float);
    return held;
}

struct dsc_held dsc_engine_steps(const struct dsc_engine *e) {
    return (struct dsc_held){e->shown_steps, 0, e->n_params, e->shown_steps,
                             e->n_params * sizeof *e->shown_steps};
}

struct dsc_scaler dsc_engine_scaler(const struct dsc_engine *e) {
    return e->scaler;
}

void dsc_engine_set_scaler(struct dsc_engine *e, const struct dsc_scaler *scaler) {
    e->scaler = *scaler;
}
