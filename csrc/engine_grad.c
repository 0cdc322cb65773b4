/* Gradients between backward and step: deferring, reading, replacing.
 *
 * Decides: what a user sees as the full gradient: the one that a step would use, averaged over the
 * ranks and unscaled, before clipping. Invariant: reading changes no bit of the step that follows:
 * it hands over only what the boundary would hand over in the same order. */
#include "engine_impl.h"

#include "fpenv.h"
#include "kernels/kernels.h"

#include <stdio.h>
#include <string.h>

/* ---- deferring ---- */

enum dsc_status dsc_engine_begin_deferring(struct dsc_engine *e) {
    DSC_TRY(dsc__engine_usable(e));
    if (e->round_open)
        DSC_TRY(dsc__engine_end_round(e, NULL));
    e->deferring = true;
    return DSC_OK;
}

enum dsc_status dsc_engine_end_deferring(struct dsc_engine *e, struct dsc_view *views) {
    enum dsc_status status = DSC_OK;
    DSC_TRY(dsc__engine_usable(e));
    if (!e->ways.keeps) {
        uint64_t saved = dsc_fp_enter();
        status = dsc__engine_hand_over(e, views);
        dsc_fp_leave(saved);
    }
    e->deferring = false;
    return status;
}

/* ---- the full gradient ---- */

/* Whether a parameter's gradients of the open step are with their owners; the same on all ranks. */
static bool handed_over(const struct dsc_engine *e, size_t param) {
    return dsc__engine_shares(e, e->param_space[param]) &&
           (!e->ways.keeps || (e->ways.early && e->boundary));
}

/* All of this step's gradients become settled sums. */
static enum dsc_status settle_all(struct dsc_engine *e, struct dsc_view *views) {
    uint32_t n_rounds;
    DSC_TRY(dsc__engine_make_sources(e, views));
    DSC_TRY(dsc__engine_end_rounds(e, views, &n_rounds));
    for (size_t s = 0; e->ways.early && s < e->n_spaces; s++)
        if (e->holdings[s].buckets)
            DSC_TRY(dsc_buckets_wait_settled(e->holdings[s].buckets, n_rounds, e->label));
    return DSC_OK;
}

/* Every owner's part of a parameter's sums goes to all ranks. */
static enum dsc_status gather_sums(struct dsc_engine *e, size_t param, float *grad) {
    const struct dsc_holding *holding = &e->holdings[e->param_space[param]];
    const struct dsc_space *space = holding->space;
    const struct dsc_segment *segment = dsc__engine_segment(e, param);
    int rank = dsc_comm_rank(holding->comm);
    const float *mine = dsc_buckets_sums(holding->buckets, rank);
    for (int r = 0; r < space->n_ranks; r++) {
        struct dsc_range owned = dsc_space_owned(space, r);
        struct dsc_range part = dsc_range_cut(dsc_segment_range(segment), owned);
        size_t n = dsc_range_size(part);
        float *dst = grad + (part.begin - segment->begin);
        if (n == 0)
            continue;
        if (r == rank)
            memcpy(dst, mine + (part.begin - owned.begin), n * sizeof *dst);
        struct dsc_coll coll = {
            .dst = dst, .n_elems = n, .dtype = DSC_F32, .root = r, .label = e->label};
        DSC_TRY(dsc_comm_broadcast(holding->comm, &coll));
    }
    return DSC_OK;
}

/* What this rank would contribute, as it would travel. */
static void contribution(const struct dsc_engine *e, size_t param, const struct dsc_view *view,
                         float *grad) {
    size_t n = e->params[param].n_elems;
    const struct dsc_wire *wire = &e->options.wire;
    const float *local = e->local[e->param_space[param]];
    enum dsc_dtype dtype = view->grad ? view->grad_dtype : DSC_F32;
    const void *src = view->grad;
    memset(grad, 0, n * sizeof *grad);
    if (e->folded[param]) {
        memcpy(grad, local + dsc__engine_segment(e, param)->begin, n * sizeof *grad);
        if (view->grad)
            dsc_kernels()->accumulate[dtype](grad, view->grad, n, false);
        src = grad;
        dtype = DSC_F32;
    }
    if (!src)
        return;
    enum dsc_dtype to = dsc_wire_dtype(wire, dtype);
    for (size_t at = 0; at < n; at += DSC_BLOCK) { /* `src` may be `grad` */
        float block[DSC_BLOCK] = {0};
        size_t part = dsc_min(DSC_BLOCK, n - at);
        dsc_wire_add(wire, block, to, (const char *)src + at * dsc_dtype_size(dtype), dtype, part);
        memcpy(grad + at, block, part * sizeof *block);
    }
}

static enum dsc_status get_grad(struct dsc_engine *e, size_t param, struct dsc_view *views,
                                float *grad) {
    size_t n = e->params[param].n_elems;
    if (handed_over(e, param)) {
        DSC_TRY(settle_all(e, views));
        DSC_TRY(gather_sums(e, param, grad));
    } else {
        contribution(e, param, &views[param], grad);
        struct dsc_coll coll = {.src = grad,
                                .dst = grad,
                                .n_elems = n,
                                .dtype = DSC_F32,
                                .op = DSC_SUM,
                                .label = e->label};
        DSC_TRY(dsc_comm_all_reduce(e->holdings[e->param_space[param]].comm, &coll));
    }
    float inverse = (float)(1.0 / (e->scaler.scale * dsc__engine_divisor(e)));
    for (size_t i = 0; i < n; i++)
        grad[i] *= inverse;
    return DSC_OK;
}

enum dsc_status dsc_engine_get_grad(struct dsc_engine *e, size_t param, struct dsc_view *views,
                                    float *grad) {
    DSC_TRY(dsc__engine_usable(e));
    if (e->param_space[param] < 0)
        return DSC_OK;
    snprintf(e->label, sizeof e->label, "safe_get_full_grad");
    uint64_t saved = dsc_fp_enter();
    enum dsc_status status = get_grad(e, param, views, grad);
    dsc_fp_leave(saved);
    return status;
}

/* Each rank's share of a gradient that all ranks have: their sum is what a step divides. */
static enum dsc_status put_local(struct dsc_engine *e, size_t param, struct dsc_view *views,
                                 const float *grad, float factor) {
    size_t s = (size_t)e->param_space[param];
    views[param].grad = NULL;
    DSC_TRY(dsc__engine_need_local(e, s));
    float *local = e->local[s] + dsc__engine_segment(e, param)->begin;
    for (size_t i = 0; i < e->params[param].n_elems; i++)
        local[i] = grad[i] * factor;
    e->n_folded[s] += !e->folded[param];
    e->folded[param] = true;
    return DSC_OK;
}

/* A rank in its next backward pass adds to the sums of others: not before all are replaced. */
static enum dsc_status put_sums(struct dsc_engine *e, size_t param, const float *grad,
                                float factor) {
    const struct dsc_holding *holding = &e->holdings[e->param_space[param]];
    dsc_buckets_put_sums(holding->buckets, e->param_segment[param], grad, factor);
    return e->ways.early ? dsc_comm_barrier(holding->comm, e->label) : DSC_OK;
}

enum dsc_status dsc_engine_set_grad(struct dsc_engine *e, size_t param, struct dsc_view *views,
                                    const float *grad, double *into_grad) {
    enum dsc_status status = DSC_OK;
    *into_grad = 0;
    DSC_TRY(dsc__engine_usable(e));
    if (e->param_space[param] < 0)
        return DSC_OK;
    snprintf(e->label, sizeof e->label, "safe_set_full_grad");
    double sum = e->scaler.scale * dsc__engine_divisor(e);
    double done = e->options.wire.divisor != 0 ? e->options.wire.divisor : 1.0;
    double share = sum * done / e->spaces[e->param_space[param]].n_ranks;
    uint64_t saved = dsc_fp_enter();
    if (handed_over(e, param)) {
        status = settle_all(e, views);
        if (status == DSC_OK)
            status = put_sums(e, param, grad, (float)sum);
    } else if (!dsc__engine_is_16bit(e, param)) {
        *into_grad = share;
    } else {
        status = put_local(e, param, views, grad, (float)share);
    }
    dsc_fp_leave(saved);
    return status;
}
