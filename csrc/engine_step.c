/* The boundary: gradients become sums, sums a norm, and owned elements new values.
 *
 * Invariant: every rank decides from the same numbers (all meet before gradients move and before
 * values change), so that all step, all skip, or all fail. */
#include "engine_impl.h"

#include "arena.h"
#include "clip.h"
#include "fpenv.h"
#include "kernels/kernels.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static void show_steps(struct dsc_engine *e) {
    for (size_t i = 0; i < e->n_params; i++)
        e->shown_steps[i] = e->steps[e->params[i].group];
}

/* A number that is not what was shown has been written by somebody, and is its group's. */
static void adopt_steps(struct dsc_engine *e) {
    float *next = e->steps + e->n_groups;
    memcpy(next, e->steps, (size_t)e->n_groups * sizeof *next);
    for (size_t i = 0; i < e->n_params; i++)
        if (e->shown_steps[i] != e->steps[e->params[i].group])
            next[e->params[i].group] = e->shown_steps[i];
    memcpy(e->steps, next, (size_t)e->n_groups * sizeof *next);
    show_steps(e);
}

/* What ranks tell each other before gradients move: everything that must agree. */
struct dsc__plan {
    uint64_t hyper_hash;
    double first_lr;
    uint64_t
        frozen_hash[DSC_REDUCE_MAX]; /* per reduce group: parameters that are not to be stepped */
    uint32_t refused; /* this rank cannot step, and the others must not wait for it */
    uint32_t folded;  /* brings fp32 sums of 16-bit gradients; need not agree */
};

static uint64_t hyper_hash(const struct dsc_engine *e, const struct dsc_hyper *groups) {
    uint64_t hash = DSC_HASH_START;
    for (int g = 0; g < e->n_groups; g++) {
        const struct dsc_hyper *h = &groups[g];
        double row[] = {h->lr,        h->weight_decay,  h->beta1,      h->beta2,
                        h->eps,       h->momentum,      h->dampening,  h->lr_decay,
                        h->min_coeff, h->max_coeff,     h->decoupled,  h->bias_correction,
                        h->nesterov,  h->raw_numerator, h->eps_inside, e->steps[g]};
        hash = dsc_hash(hash, row, sizeof row);
    }
    return hash;
}

/* hash: DSC_REDUCE_MAX of them. Parameters go by their numbers in the group: its ranks may have
 * different other ones. */
static void frozen_hashes(const struct dsc_engine *e, const struct dsc_view *views,
                          uint64_t *hash) {
    size_t n_seen[DSC_REDUCE_MAX] = {0};
    for (size_t g = 0; g < DSC_REDUCE_MAX; g++)
        hash[g] = DSC_HASH_START;
    for (size_t i = 0; i < e->n_params; i++) {
        int g = e->params[i].reduce;
        if (views[i].frozen)
            hash[g] = dsc_hash(hash[g], &n_seen[g], sizeof n_seen[g]);
        n_seen[g]++;
    }
}

/* Where sums over micro-steps exist, the last gradients join them. */
enum dsc_status dsc__engine_make_sources(struct dsc_engine *e, struct dsc_view *views) {
    for (size_t i = 0; i < e->n_params; i++) {
        int s = e->param_space[i];
        if (views[i].grad && s >= 0 && e->n_folded[s] &&
            (e->deferring || dsc__engine_keeps(e, s))) {
            DSC_TRY(dsc__engine_fold_one(e, i, views[i].grad, views[i].grad_dtype,
                                         dsc_max(e->n_micro, 1)));
            views[i].grad = NULL;
        }
    }
    for (size_t s = 0; s < e->n_spaces; s++)
        e->sources[s] = (struct dsc_source){
            .views = views,
            .local = e->n_folded[s] ? e->local[s] : NULL,
            .folded = e->folded,
            .wire = &e->options.wire,
        };
    return DSC_OK;
}

/* What must agree between two ranks of one reduce group, g; r is the first rank of it. */
static enum dsc_status compare_plans(size_t g, int r, const struct dsc__plan *first, int q,
                                     const struct dsc__plan *other) {
    if (other->hyper_hash != first->hyper_hash)
        return DSC_FAIL(DSC_EINVAL,
                        "optimizer settings differ between ranks: group 0 has lr %.9g on rank %d "
                        "and %.9g on rank %d%s; every rank must use the same param_groups",
                        first->first_lr, r, other->first_lr, q,
                        first->first_lr == other->first_lr ? " (another key or group differs)"
                                                           : "");
    if (other->frozen_hash[g] != first->frozen_hash[g])
        return DSC_FAIL(DSC_EINVAL,
                        "requires_grad of parameters differs between rank %d and rank %d; every "
                        "rank must freeze the same ones",
                        r, q);
    return DSC_OK;
}

/* All ranks look at all plans, in e->meeting, so that all fail together. */
static enum dsc_status compare_all_plans(struct dsc_engine *e) {
    struct dsc__plan first, other;
    for (size_t q = 1; q < (size_t)e->size; q++)
        for (size_t g = 0, r = 0; g < DSC_REDUCE_MAX; g++, r = 0) {
            int32_t id = e->ids[q * DSC_REDUCE_MAX + g];
            while (e->ids[r * DSC_REDUCE_MAX + g] != id)
                r++;
            memcpy(&first, e->meeting + r * sizeof first, sizeof first);
            memcpy(&other, e->meeting + q * sizeof other, sizeof other);
            if (id >= 0)
                DSC_TRY(compare_plans(g, (int)r, &first, (int)q, &other));
        }
    return DSC_OK;
}

/* Before anything changes: settings must agree, and a rank that cannot step says so to all. */
static enum dsc_status meet_plan(struct dsc_engine *e, const struct dsc__plan *mine) {
    struct dsc__plan other;
    if (e->size == 1)
        return DSC_OK;
    DSC_TRY(dsc_comm_meet(e->comm, e->label, 1, mine, sizeof *mine, e->meeting));
    e->any_folded = false;
    for (int r = 0; r < e->size; r++) {
        memcpy(&other, e->meeting + (size_t)r * sizeof other, sizeof other);
        e->any_folded |= other.folded != 0;
        if (other.refused && r != e->rank)
            return DSC_FAIL(DSC_EINVAL,
                            "rank %d cannot step (its own error says why); nothing has changed", r);
    }
    return mine->refused ? DSC_OK : compare_all_plans(e);
}

static enum dsc_status meet_rounds(struct dsc_engine *e, uint32_t mine, uint32_t *most) {
    DSC_TRY(dsc_comm_meet(e->comm, e->label, 4, &mine, sizeof mine, e->meeting));
    *most = mine;
    for (int r = 0; r < e->size; r++) {
        uint32_t other;
        memcpy(&other, e->meeting + (size_t)r * sizeof other, sizeof other);
        *most = (uint32_t)dsc_max(*most, other);
    }
    return DSC_OK;
}

/* Ends the round of this step with what did not arrive; marks what it takes, so that it counts
 * once. */
static enum dsc_status end_last_round(struct dsc_engine *e, struct dsc_view *views) {
    if (!e->round_open && e->n_rounds > 0)
        return DSC_OK;
    if (!e->round_open)
        dsc__engine_open_round(e);
    for (size_t i = 0; i < e->n_params; i++)
        e->marked[i] =
            dsc__engine_shares(e, e->param_space[i]) &&
            dsc_buckets_expects(e->holdings[e->param_space[i]].buckets, e->param_segment[i]);
    DSC_TRY(dsc__engine_end_round(e, e->sources));
    for (size_t i = 0; i < e->n_params; i++)
        if (e->marked[i]) {
            views[i].grad = NULL;
            e->folded[i] = false;
        }
    return DSC_OK;
}

void dsc__engine_forget_sources(struct dsc_engine *e, struct dsc_view *views) {
    for (size_t i = 0; i < e->n_params; i++)
        if (dsc__engine_shares(e, e->param_space[i])) {
            views[i].grad = NULL;
            e->folded[i] = false;
        }
}

bool dsc__engine_anything_left(const struct dsc_engine *e) {
    enum dsc_dtype dtype;
    for (size_t i = 0; i < e->n_params; i++)
        if (dsc__engine_shares(e, e->param_space[i]) &&
            dsc_source_at(&e->sources[e->param_space[i]], dsc__engine_segment(e, i),
                          dsc__engine_segment(e, i)->begin, &dtype))
            return true;
    return false;
}

enum dsc_status dsc__engine_end_rounds(struct dsc_engine *e, struct dsc_view *views,
                                       uint32_t *n_rounds) {
    dsc__engine_check(e, views, true); /* usually nothing is left to look at */
    if (e->ways.remote)
        return dsc__engine_remote_end_rounds(e, views, n_rounds);
    DSC_TRY(end_last_round(e, views));
    bool left = dsc__engine_anything_left(e);
    DSC_TRY(meet_rounds(e, e->n_rounds + left, n_rounds));
    for (; e->n_rounds < *n_rounds; left = false) {
        dsc__engine_open_round(e);
        DSC_TRY(dsc__engine_end_round(e, left ? e->sources : NULL));
        dsc__engine_forget_sources(e, views);
    }
    return DSC_OK;
}

enum dsc_status dsc__engine_hand_over(struct dsc_engine *e, struct dsc_view *views) {
    DSC_TRY(dsc__engine_make_sources(e, views));
    if (e->ways.remote) {
        DSC_TRY(dsc__engine_remote_round(e, views));
    } else {
        dsc__engine_open_round(e);
        DSC_TRY(end_last_round(e, views));
    }
    for (size_t s = 0; s < e->n_spaces; s++)
        if (dsc__engine_shares(e, (int)s))
            e->n_folded[s] = 0;
    return DSC_OK;
}

/* The norm of this rank's part, and apart from it what does not count: there only non-finite sums
 * matter. */
struct norms {
    struct dsc_norm counted, uncounted;
};

static struct dsc_norm *norm_of(struct norms *norms, const struct dsc_space *space) {
    return space->uncounted ? &norms->uncounted : &norms->counted;
}

/* Gradients become sums, with their norms. */
static enum dsc_status reduce_early(struct dsc_engine *e, struct dsc_view *views,
                                    struct norms *norms) {
    uint32_t n_rounds;
    for (size_t s = 0; s < e->n_spaces; s++)
        if (e->holdings[s].buckets)
            dsc_buckets_set_phase(e->holdings[s].buckets, false, true);
    DSC_TRY(dsc__engine_end_rounds(e, views, &n_rounds));
    for (size_t s = 0; s < e->n_spaces; s++)
        if (e->holdings[s].buckets)
            DSC_TRY(dsc_buckets_finish(e->holdings[s].buckets, n_rounds,
                                       norm_of(norms, &e->spaces[s]), e->label));
    return DSC_OK;
}

struct norm_job {
    const struct dsc_space *space;
    const struct dsc_source *source;
    size_t first_block;
    double *squares;
};

static void norm_blocks(void *context, size_t begin, size_t end) {
    const struct norm_job *job = context;
    float scratch[DSC_BLOCK];
    for (size_t k = begin; k < end; k++) {
        size_t at = (job->first_block + k) * DSC_BLOCK;
        dsc_source_read(job->source, job->space, (struct dsc_range){at, at + DSC_BLOCK}, scratch);
        job->squares[k] = dsc_kernels()->sum_squares(scratch, DSC_BLOCK);
    }
}

/* A group of one: gradients are their own sums and stay where they are. */
static void norm_alone(struct dsc_engine *e, size_t s, struct dsc_norm *norm) {
    size_t n_blocks = e->spaces[s].n_elems / DSC_BLOCK;
    for (size_t at = 0; at < n_blocks; at += DSC__ENGINE_RUN) {
        size_t n = dsc_min(DSC__ENGINE_RUN, n_blocks - at);
        struct norm_job job = {&e->spaces[s], &e->sources[s], at, e->squares};
        dsc_pool_run(e->pool, n, 32, norm_blocks, &job);
        for (size_t k = 0; k < n; k++)
            dsc_norm_add(norm, e->squares[k]);
    }
}

/* The same at stage 2 where ranks share no memory: rounds are exchanged already. */
static enum dsc_status reduce_rounds(struct dsc_engine *e, struct dsc_view *views,
                                     struct norms *norms) {
    uint32_t n_rounds;
    DSC_TRY(dsc__engine_end_rounds(e, views, &n_rounds));
    for (size_t s = 0; s < e->n_spaces; s++)
        if (e->holdings[s].buckets)
            dsc_buckets_norm(e->holdings[s].buckets, norm_of(norms, &e->spaces[s]));
    return DSC_OK;
}

/* The same at stages 0 and 1: everything travels now. */
static enum dsc_status reduce_now(struct dsc_engine *e, struct norms *norms) {
    if (e->ways.remote)
        dsc__engine_remote_set_dtypes(e);
    for (size_t s = 0; s < e->n_spaces; s++)
        if (e->holdings[s].buckets)
            DSC_TRY(dsc_buckets_exchange(e->holdings[s].buckets, &e->sources[s],
                                         norm_of(norms, &e->spaces[s]), e->label));
    return DSC_OK;
}

static enum dsc_status reduce(struct dsc_engine *e, struct dsc_view *views, struct dsc_norm *norm) {
    struct norms norms;
    memset(&norms, 0, sizeof norms);
    if (e->ways.early)
        DSC_TRY(reduce_early(e, views, &norms));
    else if (!e->ways.keeps)
        DSC_TRY(reduce_rounds(e, views, &norms));
    else
        DSC_TRY(reduce_now(e, &norms));
    for (size_t s = 0; s < e->n_spaces; s++)
        if (!e->holdings[s].buckets)
            norm_alone(e, s, norm_of(&norms, &e->spaces[s]));
    *norm = norms.counted;
    norm->n_nonfinite += norms.uncounted.n_nonfinite;
    return DSC_OK;
}

/* Everyone's part of the norm; after it, all sums of all ranks are there. */
static enum dsc_status meet_norm(struct dsc_engine *e, struct dsc_norm *norm) {
    if (e->size == 1)
        return DSC_OK;
    struct dsc_norm part = *norm;
    DSC_TRY(dsc_comm_meet(e->comm, e->label, 2, &part, sizeof part, e->meeting));
    memset(norm, 0, sizeof *norm);
    for (int r = 0; r < e->size; r++) {
        memcpy(&part, e->meeting + (size_t)r * sizeof part, sizeof part);
        dsc_norm_merge(norm, &part);
    }
    return DSC_OK;
}

/* Where it began: the earliest micro-step, then the lowest rank. Only runs when something is wrong.
 */
static enum dsc_status find_culprit(struct dsc_engine *e, const struct dsc_view *views,
                                    struct dsc_step_report *report) {
    struct dsc__culprit seen;
    dsc_engine_check(e, views);
    memcpy(e->meeting, &e->culprit, sizeof seen);
    if (e->size > 1) {
        struct dsc__culprit mine = e->culprit;
        DSC_TRY(dsc_comm_meet(e->comm, e->label, 3, &mine, sizeof mine, e->meeting));
    }
    for (int r = 0; r < e->size; r++) {
        memcpy(&seen, e->meeting + (size_t)r * sizeof seen, sizeof seen);
        if (seen.param < 0 || (report->bad_rank >= 0 && seen.micro >= report->bad_micro))
            continue;
        report->bad_rank = r;
        report->bad_param = (int)seen.param;
        report->bad_elem = seen.elem;
        report->bad_micro = seen.micro;
    }
    return DSC_OK;
}

static enum dsc_status prepare_args(struct dsc_engine *e, const struct dsc_hyper *groups,
                                    double grad_scale) {
    enum dsc_optim_kind kind = e->options.optim;
    for (int g = 0; g < e->n_groups; g++) {
        bool counts = kind != DSC_OPTIM_SGD || groups[g].momentum != 0;
        if (counts && kind == DSC_OPTIM_SGD)
            DSC_TRY(dsc_engine_hold_momentum(e));
        e->steps[g] += counts;
        dsc_optim_prepare(kind, &groups[g], (uint64_t)e->steps[g], grad_scale, &e->args[g]);
    }
    show_steps(e);
    return DSC_OK;
}

static struct dsc_update update_of(struct dsc_engine *e, struct dsc_view *views, size_t s,
                                   double grad_scale) {
    return (struct dsc_update){.pool = e->pool,
                               .views = views,
                               .source = &e->sources[s],
                               .args = e->args,
                               .grad_scale = grad_scale,
                               .norms = e->lamb_norms,
                               .label = e->label,
                               .changed = e->changed};
}

/* At stage 3 ranks that share memory have their parameters once: nobody reads them before all
 * owners have stepped. */
static enum dsc_status meet_stepped(struct dsc_engine *e) {
    uint32_t done = 1;
    for (size_t g = 0; e->options.stage == 3 && g < e->ranks.n_reduce; g++) {
        struct dsc_comm *comm = e->ranks.reduce[g].comm;
        if (dsc_comm_size(comm) > 1 && dsc_comm_has_windows(comm))
            DSC_TRY(dsc_comm_meet(comm, e->label, 7, &done, sizeof done, e->meeting));
    }
    return DSC_OK;
}

static enum dsc_status update(struct dsc_engine *e, struct dsc_view *views,
                              const struct dsc_hyper *groups, double grad_scale) {
    DSC_TRY(prepare_args(e, groups, grad_scale));
    for (size_t s = 0; s < e->n_spaces; s++) {
        struct dsc_update update = update_of(e, views, s, grad_scale);
        if (e->options.optim == DSC_OPTIM_FOREIGN)
            DSC_TRY(dsc_update_gradients(&update, &e->holdings[s]));
        else
            DSC_TRY(dsc_update_run(&update, &e->holdings[s]));
    }
    e->between = e->options.optim == DSC_OPTIM_FOREIGN;
    return e->between ? DSC_OK : meet_stepped(e);
}

static void forget_step(struct dsc_engine *e) {
    for (size_t s = 0; s < e->n_spaces; s++)
        if (e->holdings[s].buckets)
            dsc_buckets_reset(e->holdings[s].buckets);
    memset(e->folded, 0, e->n_params * sizeof *e->folded);
    memset(e->touched, 0, e->n_params * sizeof *e->touched);
    memset(e->n_folded, 0, e->n_spaces * sizeof *e->n_folded);
    e->n_micro = 0;
    e->n_rounds = 0;
    e->reduce_s = 0;
    e->pending_16bit = false;
    e->culprit.param = -1;
    e->n_boundaries++;
}

static void count_changes(struct dsc_engine *e, struct dsc_step_report *report) {
    for (size_t i = e->n_params; i-- > 0;)
        if (atomic_exchange_explicit(&e->changed[i], false, memory_order_relaxed)) {
            report->changed_param = (int)i;
            report->n_changed++;
        }
}

/* The meeting that starts a step; `refused`: this rank will not. */
static enum dsc_status begin_step(struct dsc_engine *e, const struct dsc_view *views,
                                  const struct dsc_hyper *groups, bool refused) {
    struct dsc__plan plan;
    memset(&plan, 0, sizeof plan);
    plan.refused = refused;
    plan.folded = dsc__engine_any_folded(e);
    if (!refused) {
        adopt_steps(e);
        frozen_hashes(e, views, plan.frozen_hash);
        plan.hyper_hash = hyper_hash(e, groups);
        plan.first_lr = groups[0].lr;
    }
    snprintf(e->label, sizeof e->label, "engine.step %llu",
             (unsigned long long)e->n_boundaries + 1);
    for (size_t s = 0; e->ways.early && s < e->n_spaces; s++)
        if (e->holdings[s].buckets)
            dsc_buckets_at_boundary(e->holdings[s].buckets);
    enum dsc_status status = dsc__engine_remote_gate(e);
    if (status == DSC_OK)
        status = meet_plan(e, &plan);
    for (size_t s = 0; status != DSC_OK && e->ways.early && s < e->n_spaces; s++)
        if (e->holdings[s].buckets)
            dsc_buckets_leave_boundary(e->holdings[s].buckets);
    return status;
}

double dsc__engine_divisor(const struct dsc_engine *e) {
    double done = e->options.wire.divisor != 0 ? e->options.wire.divisor : 1.0;
    return e->options.sum_only ? 1.0 : e->ranks.n_averaged / done;
}

bool dsc__engine_cover(struct dsc_engine *e, bool covered) {
    bool before = dsc_comm_cover(e->comm, covered);
    for (size_t g = 0; g < e->ranks.n_reduce; g++)
        (void)dsc_comm_cover(e->ranks.reduce[g].comm, covered);
    return before;
}

static enum dsc_status end_step(struct dsc_engine *e, struct dsc_step_report *report) {
    count_changes(e, report);
    report->reduce_s = e->reduce_s;
    for (size_t g = 0; g < e->ranks.n_reduce; g++)
        report->gather_s += e->spread[g] ? dsc_spread_seconds(e->spread[g]) : 0;
    forget_step(e);
    report->over = true;
    enum dsc_status status = dsc_scaler_update(&e->scaler, !report->stepped);
    report->next_scale = e->scaler.scale;
    return status;
}

static enum dsc_status step(struct dsc_engine *e, struct dsc_view *views,
                            const struct dsc_hyper *groups, struct dsc_step_report *report) {
    struct dsc_norm norm;
    double since = dsc_comm_now();
    DSC_TRY(begin_step(e, views, groups, false));
    dsc__engine_begin_files(e);
    DSC_TRY(dsc__engine_make_sources(e, views));
    DSC_TRY(reduce(e, views, &norm));
    DSC_TRY(meet_norm(e, &norm));
    if (e->size > 1)
        e->reduce_s += dsc_comm_now() - since;
    double inverse = 1.0 / (e->scaler.scale * dsc__engine_divisor(e));
    report->norm = sqrt(dsc_norm_sum(&norm)) * inverse;
    report->scale = e->scaler.scale;
    report->nonfinite = norm.n_nonfinite > 0;
    if (report->nonfinite)
        DSC_TRY(find_culprit(e, views, report));
    report->stepped = !(report->nonfinite && e->options.skip_nonfinite);
    if (report->stepped)
        DSC_TRY(update(e, views, groups, inverse * dsc_clip_factor(report->norm, e->options.clip)));
    return e->between ? DSC_OK : end_step(e, report);
}

void dsc_engine_refuse_step(struct dsc_engine *e) {
    if (dsc__engine_usable(e) == DSC_OK)
        (void)begin_step(e, NULL, NULL, true);
}

/* What an optimizer of torch's has changed before it raised cannot be undone, and differs between
 * ranks: at stage 0 one has stepped in part and the others wholly. */
enum dsc_status dsc__engine_check_whole(const struct dsc_engine *e) {
    if (e->file_failed)
        return DSC_FAIL(DSC_ESTATE,
                        "an earlier step failed while it read or wrote the file of masters and "
                        "optimizer states, so it is half done; load a checkpoint into a new job");
    if (!e->torn_by)
        return DSC_OK;
    return DSC_FAIL(DSC_ESTATE,
                    "the optimizer raised on rank %d in an earlier step, so ranks may hold "
                    "different values; load them on every rank (the module's, then "
                    "optimizer.load_state_dict), or call initialize again",
                    e->torn_by - 1);
}

void dsc_engine_mend(struct dsc_engine *e) {
    e->torn_by = 0;
}

enum dsc_status dsc_engine_step(struct dsc_engine *e, struct dsc_view *views,
                                const struct dsc_hyper *groups, struct dsc_step_report *report) {
    *report = (struct dsc_step_report){.bad_rank = -1, .bad_param = -1, .changed_param = -1};
    DSC_TRY(dsc__engine_usable(e));
    if (e->torn_by || e->file_failed) {
        (void)begin_step(e, NULL, NULL, true);
        return dsc__engine_check_whole(e);
    }
    for (int g = 0; g < e->n_groups; g++)
        if (dsc_optim_check(e->options.optim, &groups[g], g) != DSC_OK) {
            (void)begin_step(e, NULL, NULL, true);
            return dsc_optim_check(e->options.optim, &groups[g], g); /* its text, again */
        }
    uint64_t saved = dsc_fp_enter();
    (void)dsc__engine_cover(e, true); /* what follows the plan's meeting follows from it */
    enum dsc_status status = dsc__engine_end_files(e, step(e, views, groups, report));
    (void)dsc__engine_cover(e, false);
    dsc_fp_leave(saved);
    return status;
}

/* Whether every rank's foreign optimizer has run; all meet before values change hands. */
static enum dsc_status meet_optimizers(struct dsc_engine *e, bool failed) {
    uint32_t mine = failed;
    if (e->size > 1)
        DSC_TRY(dsc_comm_meet(e->comm, e->label, 5, &mine, sizeof mine, e->meeting));
    for (int r = 0; e->size > 1 && r < e->size; r++) {
        memcpy(&mine, e->meeting + (size_t)r * sizeof mine, sizeof mine);
        if (!mine)
            continue;
        e->torn_by = 1 + r;
        return DSC_FAIL(
            DSC_ESTATE, "the optimizer raised on rank %d (its own error says why)%s", r,
            e->options.stage < 3 ? "; this step has reached no parameter of another rank" : "");
    }
    return DSC_OK;
}

enum dsc_status dsc_engine_end_step(struct dsc_engine *e, struct dsc_view *views, bool failed,
                                    struct dsc_step_report *report) {
    if (!e->between)
        return DSC_FAIL(DSC_ESTATE, "there is no step to end");
    e->between = false;
    uint64_t saved = dsc_fp_enter();
    enum dsc_status status = meet_optimizers(e, failed);
    (void)dsc__engine_cover(e, true);
    for (size_t s = 0; status == DSC_OK && !failed && s < e->n_spaces; s++) {
        struct dsc_update update = update_of(e, views, s, 0);
        status = dsc_update_values(&update, &e->holdings[s]);
    }
    if (status == DSC_OK)
        status = meet_stepped(e);
    (void)dsc__engine_cover(e, false);
    enum dsc_status end = end_step(e, report);
    dsc_fp_leave(saved);
    return status != DSC_OK ? status : end;
}
