/* One pass over the ranks, each of which adds up its spaces. Invariant: see plan.h. */
#include "plan.h"

#include "alloc.h"
#include "arena.h"
#include "engine_needs.h"
#include "spread.h"
#include "store.h"

#include <math.h>
#include <string.h>

/* One rank's bytes. */
struct tally {
    size_t own[DSC_PLAN_KIND_COUNT];    /* private; what comes and goes: unused */
    size_t shared[DSC_PLAN_KIND_COUNT]; /* its part of what the node shares */
    size_t file[DSC_PLAN_KIND_COUNT];
    struct dsc_store_slabs slabs[DSC_REDUCE_MAX]; /* its own files for parameters */
    size_t grads[DSC_PLAN_PHASE_COUNT], gathered[DSC_PLAN_PHASE_COUNT]; /* come and go */
    struct dsc_plan_bytes traffic[DSC_PLAN_TRAFFIC_COUNT];
};

struct planner {
    const struct dsc_plan_job *job;
    double scale;
    struct dsc_engine_ways ways;
    struct dsc_param *params; /* scaled */
    struct dsc_space *spaces;
    size_t n_spaces;
    int *param_space;
    size_t *param_segment;
    size_t *largest; /* per space: elements of its largest parameter */
    /* Per reduce group: what parameters take where they lie; of all, elements and bytes. */
    size_t param_bytes[DSC_REDUCE_MAX], frozen_bytes[DSC_REDUCE_MAX];
    size_t whole_elems[DSC_REDUCE_MAX], whole_bytes[DSC_REDUCE_MAX];
    struct dsc_store_slabs slabs[DSC_REDUCE_MAX]; /* of a store for them */
};

static int place_in(const struct dsc_plan_group *group, int rank) {
    return rank / group->stride % group->n_ranks;
}

/* Nodes that the reduce group of this rank is on: those from its first rank's to its last one's. */
static int nodes_of(const struct planner *p, int reduce, int rank) {
    const struct dsc_plan_group *group = &p->job->reduce[reduce];
    int n_local = p->job->n_ranks / p->job->n_nodes;
    int first = rank - place_in(group, rank) * group->stride;
    int last = first + (group->n_ranks - 1) * group->stride;
    int n_nodes = last / n_local - first / n_local + 1;
    return n_nodes < group->n_ranks ? n_nodes : group->n_ranks;
}

/* At stage 3 a group's parameters are in parts where it is on several nodes, else in a store. */
static bool in_parts(const struct planner *p, int reduce, int rank) {
    return p->job->options->stage == 3 && nodes_of(p, reduce, rank) > 1;
}

/* A part lies in memory, or is a piece of its rank's store of files. */
static void hold_part(const struct planner *p, int reduce, enum dsc_plan_kind kind, size_t n_bytes,
                      struct tally *t) {
    if (p->job->params_in_files) {
        t->file[kind] += dsc_store_bytes(n_bytes);
        dsc_store_count(&t->slabs[reduce], n_bytes);
    } else {
        t->own[kind] += n_bytes;
    }
}

static size_t scaled(const struct planner *p, size_t n) {
    return p->scale == 1.0 ? n : (size_t)llround((double)n * p->scale);
}

/* ---- one rank ---- */

/* An array of the core's own. */
static void hold(struct tally *t, enum dsc_plan_kind kind, size_t n_bytes) {
    t->own[kind] += n_bytes;
    t->own[DSC_PLAN_ROUNDING] += dsc_arena_bytes(n_bytes) - n_bytes;
}

/* Where .grad holds something, beside inside a backward pass. */
static void count_grads(const struct planner *p, const struct dsc_space_needs *needs, size_t s,
                        struct tally *t) {
    const struct dsc_space *space = &p->spaces[s];
    size_t elem_size = dsc_dtype_size(space->dtype), all = space->n_used * elem_size;
    bool handed_over = needs->buckets.early && needs->shared;
    bool in_backward_only = !needs->keeps || handed_over;
    /* Of earlier micro-steps: 16-bit ones have moved into fp32 sums. */
    bool adds_up = needs->keeps && p->job->n_micro_steps > 1;
    bool stays = adds_up && !needs->local;
    if (stays)
        t->grads[DSC_PLAN_FORWARD] += all;
    bool one_by_one = handed_over && !adds_up;
    t->grads[DSC_PLAN_BACKWARD] += one_by_one ? p->largest[s] * elem_size : all;
    if (!in_backward_only)
        t->grads[DSC_PLAN_STEP] += all;
}

/* What leaves and reaches a rank; the share of a group's ranks that are on other nodes travels
 * between them, once for all ranks of a node. */
static void count_traffic(const struct planner *p, const struct dsc_space_needs *needs, size_t s,
                          int rank, struct tally *t) {
    const struct dsc_plan_job *job = p->job;
    const struct dsc_space *space = &p->spaces[s];
    int place = place_in(&job->reduce[space->reduce], rank);
    size_t own = dsc_range_size(dsc_space_owned(space, place)), others = space->n_elems - own;
    size_t peers = (size_t)space->n_ranks - 1, value = dsc_dtype_size(space->dtype);
    size_t n_nodes = (size_t)nodes_of(p, space->reduce, rank), n_local = (peers + 1) / n_nodes;
    size_t abroad = space->n_elems / n_nodes * (n_nodes - 1) / n_local;
    enum dsc_dtype wire =
        dsc_wire_dtype(&needs->buckets.wire, needs->local ? DSC_F32 : space->dtype);
    size_t sent = dsc_dtype_size(wire), rounds = needs->keeps ? 1 : job->n_micro_steps;
    bool in_levels = n_local > 1;

    struct dsc_plan_bytes *reduce = &t->traffic[DSC_PLAN_REDUCE];
    reduce->times = dsc_max(reduce->times, rounds);
    reduce->sent += rounds * sent * (needs->buckets.early ? space->n_elems : others);
    reduce->received += rounds * sent * own * (needs->buckets.early ? peers + 1 : peers);
    reduce->between_nodes += rounds * abroad * (in_levels ? sizeof(float) : sent);
    if (job->options->stage == 0 && needs->buckets.remote) {
        struct dsc_plan_bytes *sums = &t->traffic[DSC_PLAN_SHARE_SUMS];
        sums->times = dsc_max(sums->times, rounds);
        sums->sent += rounds * own * peers * sizeof(float);
        sums->received += rounds * others * sizeof(float);
        sums->between_nodes += rounds * abroad * sizeof(float);
    }
    if (needs->spread) {
        struct dsc_plan_bytes *values = &t->traffic[DSC_PLAN_SPREAD];
        values->times = 1;
        values->sent += own * peers * value;
        values->received += others * value;
        values->between_nodes += abroad * value;
    }
}

static void count_space(const struct planner *p, size_t s, int rank, struct tally *t) {
    const struct dsc_plan_job *job = p->job;
    const struct dsc_space *space = &p->spaces[s];
    int place = place_in(&job->reduce[space->reduce], rank);
    struct dsc_space_needs needs = dsc_engine_needs(job->options, &p->ways, space, place);
    size_t n = dsc_range_size(needs.stepped), array = n * sizeof(float);
    int n_states = needs.n_states;
    if (job->options->optim == DSC_OPTIM_SGD && job->model.momentum)
        n_states = dsc_optim_info(DSC_OPTIM_SGD)->n_states;
    if (needs.n_filed > 0) {
        t->file[DSC_PLAN_MASTERS] += dsc_swap_file_bytes(n, needs.master);
        t->file[DSC_PLAN_STATES] += dsc_swap_file_bytes(n, needs.n_filed - needs.master);
        hold(t, DSC_PLAN_STAGING, dsc_swap_private_bytes(n, needs.n_filed, needs.n_buffers));
    } else {
        hold(t, DSC_PLAN_MASTERS, needs.master ? array : 0);
        for (int i = 0; i < n_states; i++)
            hold(t, DSC_PLAN_STATES, array);
    }
    if (needs.grads) {
        hold(t, DSC_PLAN_SUMS, array);
        t->own[DSC_PLAN_STATES] += (size_t)llround((double)n * job->model.foreign_state_bytes);
    }
    if (needs.local)
        hold(t, DSC_PLAN_MICRO_SUMS, space->n_elems * sizeof(float));
    count_grads(p, &needs, s, t);
    if (!needs.shared)
        return;
    struct dsc_parts it = dsc_parts(space, dsc_space_owned(space, place));
    while (in_parts(p, space->reduce, rank) && dsc_parts_next(&it))
        hold_part(p, space->reduce, DSC_PLAN_PARAMETERS,
                  dsc_range_size(it.part) * dsc_dtype_size(space->dtype), t);
    struct dsc_bucket_sizes sizes = dsc_bucket_sizes_of(space, place, &needs.buckets);
    hold(t, DSC_PLAN_SUMS, dsc_range_size(sizes.held) * sizeof(float));
    for (int i = 0; i < 2; i++) /* to send from, and to receive in */
        hold(t, DSC_PLAN_STAGING, sizes.staging_bytes / 2);
    if (sizes.sums_are_shared)
        t->shared[DSC_PLAN_SUMS] += dsc_range_size(dsc_space_owned(space, place)) * sizeof(float);
    t->shared[DSC_PLAN_STAGING] +=
        sizes.sums_offset + (size_t)sizes.first_slots * sizes.slot_elems * sizeof(float);
    count_traffic(p, &needs, s, rank, t);
}

/* As equal as whole elements can be. */
static size_t frozen_part(const struct planner *p, const struct dsc_plan_frozen *frozen) {
    size_t n_ranks = (size_t)p->job->reduce[frozen->reduce].n_ranks;
    return (scaled(p, frozen->n_elems) + n_ranks - 1) / n_ranks * frozen->elem_size;
}

static size_t share_of(size_t bytes, size_t part, size_t whole) {
    return whole == 0 ? 0 : (size_t)llround((double)bytes * ((double)part / (double)whole));
}

/* Parameters in parts: what is gathered at most, and how it travels. What stays from one use to the
 * next travels once per step, else before each forward and each backward pass. */
static void count_gathered(const struct planner *p, size_t g, int rank, struct tally *t) {
    const struct dsc_plan_job *job = p->job;
    const struct dsc_plan_group *group = &job->reduce[g];
    size_t all = p->whole_elems[g], bytes = p->whole_bytes[g];
    size_t kept = dsc_min(scaled(p, group->kept_elems), all);
    size_t most = dsc_fetch_most(&job->fetch, all, kept, scaled(p, group->used_elems));
    for (int phase = 0; phase < DSC_PLAN_PHASE_COUNT; phase++)
        t->gathered[phase] += share_of(bytes, kept, all);
    t->gathered[DSC_PLAN_FORWARD] += share_of(bytes, most - kept, all);
    t->gathered[DSC_PLAN_BACKWARD] += share_of(bytes, most - kept, all);
    for (size_t i = 0; i < job->model.n_frozen; i++)
        if (job->model.frozen[i].reduce == (int)g)
            hold_part(p, (int)g, DSC_PLAN_FROZEN, frozen_part(p, &job->model.frozen[i]), t);

    uint64_t times = most == all && job->fetch.reuse >= all ? 1 : 2 * job->n_micro_steps;
    size_t n_ranks = (size_t)group->n_ranks, n_nodes = (size_t)nodes_of(p, (int)g, rank);
    size_t moved = share_of(bytes, kept, all) + times * share_of(bytes, all - kept, all);
    struct dsc_plan_bytes *gather = &t->traffic[DSC_PLAN_GATHER];
    gather->times = times > gather->times ? times : gather->times;
    gather->sent += moved / n_ranks * (n_ranks - 1);
    gather->received += moved / n_ranks * (n_ranks - 1);
    gather->between_nodes += moved / n_nodes * (n_nodes - 1) / (n_ranks / n_nodes);
}

/* At stage 3 ranks that share memory have parameters once, in the store; who is alone has the
 * store's memory for itself, in huge pages. */
static void count_params(const struct planner *p, size_t g, int rank, struct tally *t) {
    const struct dsc_plan_group *group = &p->job->reduce[g];
    bool in_store = p->job->options->stage == 3;
    size_t *mine = in_store && group->n_ranks > 1 ? t->shared : t->own;
    size_t n_bytes = p->param_bytes[g] + p->frozen_bytes[g];
    if (in_store && p->job->params_in_files)
        mine = t->file;
    if (mine != t->own && place_in(group, rank) != 0)
        return;
    if (in_store && mine == t->own)
        t->own[DSC_PLAN_ROUNDING] += dsc_arena_bytes(n_bytes) - n_bytes;
    mine[DSC_PLAN_PARAMETERS] += p->param_bytes[g];
    mine[DSC_PLAN_FROZEN] += p->frozen_bytes[g];
    if (mine == t->file)
        t->slabs[g] = p->slabs[g];
}

static void count_rank(const struct planner *p, int rank, struct tally *t) {
    const struct dsc_plan_job *job = p->job;
    bool spreads[DSC_REDUCE_MAX] = {false};
    memset(t, 0, sizeof *t);
    for (size_t g = 0; g < job->n_reduce; g++) {
        if (in_parts(p, (int)g, rank))
            count_gathered(p, g, rank, t);
        else
            count_params(p, g, rank, t);
    }
    t->own[DSC_PLAN_BUFFERS] = scaled(p, job->model.buffer_bytes);
    t->own[DSC_PLAN_STAGING] = job->comm_private_bytes;
    t->shared[DSC_PLAN_STAGING] = job->comm_shared_bytes;
    for (size_t s = 0; s < p->n_spaces; s++) {
        int g = p->spaces[s].reduce, place = place_in(&job->reduce[g], rank);
        count_space(p, s, rank, t);
        if (!spreads[g] && dsc_engine_needs(job->options, &p->ways, &p->spaces[s], place).spread) {
            struct dsc_spread_sizes sizes =
                dsc_spread_sizes_of(job->reduce[g].n_ranks, p->ways.remote);
            hold(t, DSC_PLAN_STAGING, sizes.private_bytes);
            t->shared[DSC_PLAN_STAGING] += sizes.window_bytes;
            spreads[g] = true;
        }
    }
    for (size_t g = 0; g < job->n_reduce; g++)
        t->file[DSC_PLAN_ROUNDING] += t->slabs[g].n_bytes - t->slabs[g].n_taken;
}

/* While a model is cast, or moves to where it lies, old and new values meet one parameter at a
 * time; the core allocates after that. */
static size_t given(const struct planner *p) {
    return scaled(p, p->job->model.given_bytes) + scaled(p, p->job->model.cast_bytes);
}

/* ---- all ranks ---- */

static size_t sum_of(const size_t *bytes, size_t n) {
    size_t sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += bytes[i];
    return sum;
}

static size_t most_of(const size_t *bytes, size_t n) {
    size_t most = 0;
    for (size_t i = 0; i < n; i++)
        most = dsc_max(most, bytes[i]);
    return most;
}

static size_t in_phase(const struct tally *t, int phase) {
    return sum_of(t->own, DSC_PLAN_KIND_COUNT) + t->grads[phase] + t->gathered[phase];
}

/* out takes over what is more than it has. */
static void take_rank(const struct planner *p, const struct tally *t, struct dsc_plan *out) {
    size_t phases[DSC_PLAN_PHASE_COUNT];
    for (int phase = 0; phase < DSC_PLAN_PHASE_COUNT; phase++)
        phases[phase] = in_phase(t, phase);
    phases[DSC_PLAN_INITIALIZE] = dsc_max(phases[DSC_PLAN_INITIALIZE], given(p));
    for (int k = 0; k < DSC_PLAN_TRAFFIC_COUNT; k++) {
        struct dsc_plan_bytes *most = &out->traffic[k];
        most->times = t->traffic[k].times > most->times ? t->traffic[k].times : most->times;
        most->sent = dsc_max(most->sent, t->traffic[k].sent);
        most->received = dsc_max(most->received, t->traffic[k].received);
    }
    if (most_of(phases, DSC_PLAN_PHASE_COUNT) <= most_of(out->rank_bytes, DSC_PLAN_PHASE_COUNT))
        return;
    memcpy(out->rank_bytes, phases, sizeof phases);
    memcpy(out->private_bytes, t->own, sizeof t->own);
    out->private_bytes[DSC_PLAN_GRADIENTS] = most_of(t->grads, DSC_PLAN_PHASE_COUNT);
    out->private_bytes[DSC_PLAN_GATHERED] = most_of(t->gathered, DSC_PLAN_PHASE_COUNT);
}

static void add_up(const struct planner *p, struct dsc_plan *out) {
    const struct dsc_plan_job *job = p->job;
    int n_local = job->n_ranks / job->n_nodes;
    memset(out, 0, sizeof *out);
    for (int node = 0; node < job->n_nodes; node++) {
        size_t shared[DSC_PLAN_KIND_COUNT] = {0}, file[DSC_PLAN_KIND_COUNT] = {0};
        size_t phases[DSC_PLAN_PHASE_COUNT] = {0};
        size_t between[DSC_PLAN_TRAFFIC_COUNT] = {0};
        struct tally t;
        for (int rank = node * n_local; rank < (node + 1) * n_local; rank++) {
            count_rank(p, rank, &t);
            take_rank(p, &t, out);
            for (int k = 0; k < DSC_PLAN_KIND_COUNT; k++) {
                shared[k] += t.shared[k];
                file[k] += t.file[k];
            }
            for (int phase = 0; phase < DSC_PLAN_PHASE_COUNT; phase++)
                phases[phase] += in_phase(&t, phase) + sum_of(t.shared, DSC_PLAN_KIND_COUNT);
            for (int k = 0; k < DSC_PLAN_TRAFFIC_COUNT; k++)
                between[k] += t.traffic[k].between_nodes;
        }
        phases[DSC_PLAN_INITIALIZE] =
            dsc_max(phases[DSC_PLAN_INITIALIZE], (size_t)n_local * given(p));
        for (int k = 0; k < DSC_PLAN_TRAFFIC_COUNT; k++)
            out->traffic[k].between_nodes = dsc_max(out->traffic[k].between_nodes, between[k]);
        if (most_of(phases, DSC_PLAN_PHASE_COUNT) <= most_of(out->node_bytes, DSC_PLAN_PHASE_COUNT))
            continue;
        memcpy(out->node_bytes, phases, sizeof phases);
        memcpy(out->shared_bytes, shared, sizeof shared);
        memcpy(out->file_bytes, file, sizeof file);
    }
}

/* ---- one plan ---- */

/* At stage 3 a store rounds each piece up. */
static void place_params(struct planner *p) {
    const struct dsc_plan_model *model = &p->job->model;
    bool rounds = p->job->options->stage == 3;
    for (size_t i = 0; i < model->n_params; i++) {
        int g = p->params[i].reduce;
        size_t n_bytes = p->params[i].n_elems * dsc_dtype_size(p->params[i].dtype);
        p->whole_elems[g] += p->params[i].n_elems;
        p->whole_bytes[g] += n_bytes;
        p->param_bytes[g] += rounds ? dsc_store_bytes(n_bytes) : n_bytes;
        dsc_store_count(&p->slabs[g], n_bytes);
    }
    for (size_t i = 0; i < model->n_frozen; i++) {
        int g = model->frozen[i].reduce;
        size_t n = scaled(p, model->frozen[i].n_elems), size = model->frozen[i].elem_size;
        p->whole_elems[g] += n;
        p->whole_bytes[g] += n * size;
        p->frozen_bytes[g] += rounds ? dsc_store_bytes(n * size) : n * size;
        dsc_store_count(&p->slabs[g], n * size);
    }
}

static enum dsc_status lay_out(struct planner *p) {
    const struct dsc_plan_job *job = p->job;
    size_t n = job->model.n_params;
    int n_ranks[DSC_REDUCE_MAX];
    struct dsc_cutting cutting = {n_ranks, job->n_reduce, dsc_engine_keeps_whole(job->options)};
    for (size_t g = 0; g < job->n_reduce; g++)
        n_ranks[g] = job->reduce[g].n_ranks;
    DSC_TRY(dsc_alloc(n * sizeof *p->params, (void **)&p->params));
    DSC_TRY(dsc_alloc(n * sizeof *p->param_space, (void **)&p->param_space));
    DSC_TRY(dsc_alloc(n * sizeof *p->param_segment, (void **)&p->param_segment));
    for (size_t i = 0; i < n; i++) {
        p->params[i] = job->model.params[i];
        p->params[i].n_elems = scaled(p, p->params[i].n_elems);
    }
    place_params(p);
    DSC_TRY(dsc_space_build(p->params, n, &cutting, &p->spaces, &p->n_spaces, p->param_space,
                            p->param_segment));
    DSC_TRY(dsc_alloc(p->n_spaces * sizeof *p->largest, (void **)&p->largest));
    for (size_t i = 0; i < n; i++)
        if (p->param_space[i] >= 0) {
            size_t *largest = &p->largest[p->param_space[i]];
            *largest = dsc_max(*largest, p->params[i].n_elems);
        }
    return DSC_OK;
}

enum dsc_status dsc_plan_make(const struct dsc_plan_job *job, double scale, struct dsc_plan *out) {
    if (job->n_ranks < 1 || job->n_nodes < 1 || job->n_ranks % job->n_nodes != 0)
        return DSC_FAIL(DSC_EINVAL,
                        "%d ranks on %d nodes; allowed: 1 or more nodes with equally many ranks",
                        job->n_ranks, job->n_nodes);
    DSC_TRY(dsc_engine_check_options(job->options));
    struct planner p = {.job = job, .scale = scale};
    p.ways = dsc_engine_ways_of(job->options, job->reduce[0].n_ranks, job->n_nodes > 1);
    enum dsc_status status = lay_out(&p);
    if (status == DSC_OK)
        add_up(&p, out);
    dsc_space_free(p.spaces, p.n_spaces);
    dsc_free(p.params);
    dsc_free(p.param_space);
    dsc_free(p.param_segment);
    dsc_free(p.largest);
    return status;
}

enum dsc_status dsc_plan_fit(const struct dsc_plan_job *job, size_t n_bytes, double *scale) {
    struct dsc_plan plan;
    double low = 0.0, high = 1.0;
    DSC_TRY(dsc_plan_make(job, high, &plan));
    while (most_of(plan.node_bytes, DSC_PLAN_PHASE_COUNT) <= n_bytes && high < 0x1p40) {
        low = high;
        high *= 2.0;
        DSC_TRY(dsc_plan_make(job, high, &plan));
    }
    for (int i = 0; i < 40; i++) {
        double middle = (low + high) / 2.0;
        DSC_TRY(dsc_plan_make(job, middle, &plan));
        if (most_of(plan.node_bytes, DSC_PLAN_PHASE_COUNT) <= n_bytes)
            low = middle;
        else
            high = middle;
    }
    *scale = low;
    return DSC_OK;
}

#define X(name, text) text,
static const char *const kind_names[] = {DSC_PLAN_KIND_MAP(X)};
static const char *const phase_names[] = {DSC_PLAN_PHASE_MAP(X)};
static const char *const traffic_names[] = {DSC_PLAN_TRAFFIC_MAP(X)};
#undef X

const char *dsc_plan_kind_name(enum dsc_plan_kind kind) {
    return kind_names[kind];
}
const char *dsc_plan_phase_name(enum dsc_plan_phase phase) {
    return phase_names[phase];
}
const char *dsc_plan_traffic_name(enum dsc_plan_traffic traffic) {
    return traffic_names[traffic];
}
