/* The engine with all ranks as threads: contract N1 over stage, overlap, bucket size and dtype with
 * random delays, clipping and skips, and that a step in the steady state allocates nothing. */
#include "case.h"

#include "alloc.h"
#include "comm/comm.h"
#include "engine.h"
#include "kernels/kernels.h"
#include "store.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

enum { N_PARAMS = 7, MAX_RANKS = 4, N_STEPS = 4 };
static const size_t sizes[N_PARAMS] = {1000, 17, 0, 5000, 33, 2048, 12345};
enum { TOTAL = 1000 + 17 + 5000 + 33 + 2048 + 12345 };
/* Among four ranks: on all of them, experts of pairs, experts of one rank. */
static const int reduce_of[N_PARAMS] = {0, 1, 0, 2, 0, 1, 0};

struct setup {
    int size, stage, n_micro;
    bool overlap, delays, slow_rank, whole;
    int n_threads; /* of a rank; 0: one */
    enum dsc_optim_kind optim;
    size_t bucket;
    enum dsc_dtype dtype;
    double scale;
    int poison_step;  /* rank 1 makes one element infinite in this step; -1: never */
    int unused_param; /* gets no gradient on rank 0; -1: none */
    bool experts;     /* four ranks, see reduce_of */
    int turns;        /* 1: ranks run backward one after another; -1: the last rank first */
};

struct outcome {
    float master[TOTAL];
    float of_all[MAX_RANKS]; /* each rank's experts, as a sum that other bits change */
    double norm[N_STEPS];
    bool stepped[N_STEPS];
    struct dsc_step_report last;
    struct dsc_engine_counters counters;
    uint64_t allocs_in_last_step;
};

struct rank_job {
    const struct setup *setup;
    struct dsc_comm *comm;
    int rank;
    atomic_int *n_done; /* backward passes of all ranks */
    struct outcome out;
};

static float value_of(int what, int rank, int step, size_t i) {
    uint32_t x =
        (uint32_t)(what * 7919 + rank * 104729 + step * 1299709) + (uint32_t)i * 2654435761u;
    x ^= x >> 15;
    x *= 2246822519u;
    x ^= x >> 13;
    x *= 3266489917u;
    x ^= x >> 16;
    /* Full mantissas and many exponents: sums in another order must show in the last bits. */
    return ldexpf((float)(x >> 5) / 134217728.0f - 0.5f, -(int)(x & 7));
}

static void sleep_us(long us) {
    struct timespec t = {0, us * 1000};
    nanosleep(&t, NULL);
}

static void maybe_delay(const struct rank_job *job, uint32_t *seed) {
    *seed = *seed * 1664525u + 1013904223u;
    if (job->setup->delays && (*seed >> 28) == 0)
        sleep_us((long)(*seed >> 20 & 0xff));
    if (job->setup->slow_rank && job->rank == 1)
        sleep_us(300);
}

/* A rank's parameters and gradients, as torch would hold them. */
struct model {
    char *data[N_PARAMS], *grad[N_PARAMS];
    struct dsc_slab *slab[N_PARAMS]; /* at stage 3: the data is memory of a reduce group's */
    bool has_grad[N_PARAMS];
    struct dsc_view views[N_PARAMS];
};

static void fill(char *dst, enum dsc_dtype dtype, const float *src, size_t n) {
    dsc_kernels()->from_f32[dtype](dst, src, n);
}

static void model_open(struct model *model, enum dsc_dtype dtype) {
    float *values = calloc(TOTAL, sizeof(float));
    memset(model, 0, sizeof *model);
    for (int p = 0; p < N_PARAMS; p++) {
        size_t n_bytes = dsc_round_up(sizes[p] * 4 + 1, 64);
        model->data[p] = aligned_alloc(64, n_bytes);
        model->grad[p] = aligned_alloc(64, n_bytes);
        for (size_t i = 0; i < sizes[p]; i++)
            values[i] = value_of(100 + p, 0, 0, i);
        fill(model->data[p], dtype, values, sizes[p]);
    }
    free(values);
}

/* Stage 3: the first rank of each parameter's reduce group writes it where all of them have it. */
static void model_share(struct model *model, enum dsc_dtype dtype,
                        const struct dsc_engine_ranks *ranks, const struct dsc_param *params) {
    struct dsc_store *store[3];
    for (size_t g = 0; g < ranks->n_reduce; g++)
        CHECK_OK(dsc_store_open(ranks->reduce[g].comm, NULL, &store[g]));
    for (int p = 0; p < N_PARAMS; p++) {
        struct dsc_comm *comm = ranks->reduce[params[p].reduce].comm;
        void *memory;
        if (sizes[p] == 0)
            continue;
        CHECK_OK(dsc_store_take(store[params[p].reduce], sizes[p] * dsc_dtype_size(dtype),
                                &model->slab[p], &memory));
        if (dsc_comm_rank(comm) == 0)
            memcpy(memory, model->data[p], sizes[p] * dsc_dtype_size(dtype));
        free(model->data[p]);
        model->data[p] = memory;
    }
    for (size_t g = 0; g < ranks->n_reduce; g++) {
        CHECK_OK(dsc_comm_barrier(ranks->reduce[g].comm, "values"));
        dsc_store_close(store[g]);
    }
}

static void model_close(struct model *model) {
    for (int p = 0; p < N_PARAMS; p++) {
        if (model->slab[p])
            dsc_slab_release(model->slab[p]);
        else
            free(model->data[p]);
        free(model->grad[p]);
    }
}

/* .grad += fresh, in the model's dtype */
static void autograd_adds(struct model *model, int p, enum dsc_dtype dtype, const float *fresh) {
    float *sum = calloc(sizes[p] + 1, sizeof(float));
    if (model->has_grad[p])
        dsc_kernels()->to_f32[dtype](sum, model->grad[p], sizes[p]);
    for (size_t i = 0; i < sizes[p]; i++)
        sum[i] = model->has_grad[p] ? sum[i] + fresh[i] : fresh[i];
    fill(model->grad[p], dtype, sum, sizes[p]);
    model->has_grad[p] = true;
    free(sum);
}

static struct dsc_view *view(struct model *model, enum dsc_dtype dtype) {
    for (int p = 0; p < N_PARAMS; p++)
        model->views[p] = (struct dsc_view){.data = model->data[p],
                                            .grad = model->has_grad[p] ? model->grad[p] : NULL,
                                            .grad_dtype = dtype};
    return model->views;
}

static void satisfy(struct dsc_engine *engine, struct model *model, enum dsc_dtype dtype,
                    int need) {
    if (need & DSC_NEED_CHECK)
        dsc_engine_check(engine, view(model, dtype));
    if (need & DSC_NEED_FOLD) {
        CHECK_OK(dsc_engine_fold(engine, view(model, dtype)));
        memset(model->has_grad, 0, sizeof model->has_grad);
    }
}

/* With turns: until all have left the step before, and those whose turn is earlier are done. */
static void wait_for_turn(struct rank_job *job, int pass) {
    const struct setup *s = job->setup;
    if (s->turns == 0)
        return;
    CHECK_OK(dsc_comm_barrier(job->comm, "turns"));
    int place = s->turns > 0 ? job->rank : s->size - 1 - job->rank;
    while (atomic_load(job->n_done) < pass * s->size + place)
        sleep_us(20);
}

static void backward(struct rank_job *job, struct dsc_engine *engine, struct model *model, int step,
                     int micro, uint32_t *seed) {
    const struct setup *s = job->setup;
    bool boundary = micro == s->n_micro - 1;
    int need;
    CHECK_OK(dsc_engine_begin_backward(engine, boundary, &need));
    satisfy(engine, model, s->dtype, need);
    float *fresh = calloc(TOTAL, sizeof(float));
    for (int p = N_PARAMS; p-- > 0;) {
        if (p == s->unused_param && job->rank == 0)
            continue;
        for (size_t i = 0; i < sizes[p]; i++)
            fresh[i] = value_of(p, job->rank, step * 10 + micro, i) * (float)s->scale;
        if (step == s->poison_step && micro == 0 && job->rank == 1 && p == 3)
            fresh[4321] = INFINITY;
        autograd_adds(model, p, s->dtype, fresh);
        maybe_delay(job, seed);
        bool taken;
        CHECK_OK(dsc_engine_arrive(engine, (size_t)p, model->grad[p], s->dtype, &taken));
        if (taken)
            model->has_grad[p] = false;
    }
    free(fresh);
    CHECK_OK(dsc_engine_end_backward(engine, boundary, &need));
    satisfy(engine, model, s->dtype, need);
}

/* What somebody else's optimizer might do: p -= g / 8, or with whole parameters p -= g[0] / 8. */
static void step_foreign(struct dsc_engine *engine, struct model *model, enum dsc_dtype dtype,
                         bool whole) {
    for (size_t p = 0; p < N_PARAMS; p++) {
        struct dsc_held grad = dsc_engine_held(engine, p, DSC_HELD_GRADIENT);
        struct dsc_held master = dsc_engine_held(engine, p, DSC_HELD_MASTER);
        CHECK(dtype == DSC_F32 ? !master.values : master.n == grad.n);
        CHECK(!whole || grad.n == 0 || (grad.begin == 0 && grad.n == sizes[p]));
        float *values =
            dtype == DSC_F32 ? (float *)(void *)model->data[p] + grad.begin : master.values;
        for (size_t i = 0; grad.values && i < grad.n; i++)
            values[i] -= grad.values[whole ? 0 : i] / 8;
    }
}

/* The pairs are {0, 2} and {1, 3}. */
static void open_ranks(struct rank_job *job, struct dsc_engine_ranks *ranks) {
    static const struct dsc_comm_options none = {0};
    *ranks = dsc_engine_ranks_of(job->comm);
    if (!job->setup->experts)
        return;
    int first = job->rank % 2, pair[2] = {first, first + 2};
    CHECK_OK(dsc_comm_open_group(job->comm, NULL, pair, 2, first ? "odd" : "even",
                                 &ranks->reduce[1].comm));
    CHECK_OK(dsc_comm_open_self(&none, &ranks->reduce[2].comm));
    ranks->reduce[1].id = first;
    ranks->reduce[2].id = job->rank;
    ranks->n_reduce = 3;
}

static void close_ranks(struct dsc_engine_ranks *ranks) {
    for (size_t g = 1; g < ranks->n_reduce; g++)
        dsc_comm_close(ranks->reduce[g].comm);
}

static void *run_rank(void *context) {
    struct rank_job *job = context;
    const struct setup *s = job->setup;
    struct dsc_engine_options options = {.stage = s->stage,
                                         .overlap = s->overlap,
                                         .bucket_elems = s->bucket,
                                         .clip = 1.0,
                                         .skip_nonfinite = true,
                                         .many_micro_steps = s->n_micro > 1,
                                         .optim = s->optim,
                                         .whole = s->whole,
                                         .n_threads = s->n_threads ? s->n_threads : 1};
    dsc_scaler_init_static(&options.scaler, s->scale);
    struct dsc_param params[N_PARAMS];
    for (int p = 0; p < N_PARAMS; p++)
        params[p] = (struct dsc_param){.n_elems = sizes[p],
                                       .dtype = s->dtype,
                                       .group = p % 2,
                                       .reduce = s->experts ? reduce_of[p] : 0};
    struct dsc_hyper groups[2] = {{.lr = 1e-2,
                                   .weight_decay = 0.1,
                                   .beta1 = 0.9,
                                   .beta2 = 0.999,
                                   .eps = 1e-8,
                                   .max_coeff = 10,
                                   .min_coeff = 0.01,
                                   .momentum = 0.9,
                                   .decoupled = true,
                                   .bias_correction = true,
                                   .nesterov = true},
                                  {.lr = 3e-3,
                                   .beta1 = 0.8,
                                   .beta2 = 0.99,
                                   .eps = 1e-8,
                                   .max_coeff = 10,
                                   .momentum = 0.5,
                                   .bias_correction = true}};
    struct model model;
    struct dsc_engine *engine;
    uint32_t seed = (uint32_t)job->rank * 77 + 5;
    model_open(&model, s->dtype);
    struct dsc_engine_ranks ranks;
    open_ranks(job, &ranks);
    if (s->stage == 3)
        model_share(&model, s->dtype, &ranks, params);
    CHECK_OK(dsc_engine_open(&ranks, &options, params, N_PARAMS, 2, &engine));
    dsc_engine_load_masters(engine, view(&model, s->dtype));
    for (int step = 0; step < N_STEPS; step++) {
        uint64_t before = dsc_alloc_counters().n_calls;
        for (int micro = 0; micro < s->n_micro; micro++) {
            wait_for_turn(job, step * s->n_micro + micro);
            backward(job, engine, &model, step, micro, &seed);
            if (s->turns != 0)
                atomic_fetch_add(job->n_done, 1);
        }
        maybe_delay(job, &seed);
        CHECK_OK(dsc_engine_step(engine, view(&model, s->dtype), groups, &job->out.last));
        if (s->optim == DSC_OPTIM_FOREIGN) {
            step_foreign(engine, &model, s->dtype, s->whole);
            CHECK_OK(dsc_engine_end_step(engine, view(&model, s->dtype), false, &job->out.last));
        }
        memset(model.has_grad, 0, sizeof model.has_grad);
        job->out.norm[step] = job->out.last.norm;
        job->out.stepped[step] = job->out.last.stepped;
        job->out.allocs_in_last_step = dsc_alloc_counters().n_calls - before;
    }
    size_t at = 0;
    for (int p = 0; p < N_PARAMS; p++) {
        dsc_kernels()->to_f32[s->dtype](job->out.master + at, model.data[p], sizes[p]);
        at += sizes[p];
    }
    job->out.counters = dsc_engine_counters(engine);
    dsc_engine_close(engine);
    close_ranks(&ranks);
    model_close(&model);
    return NULL;
}

/* A parameter is the same on all ranks that reduce it together. */
static void check_masters(const struct rank_job *jobs, int r) {
    size_t at = 0;
    for (int p = 0; p < N_PARAMS; at += sizes[p++]) {
        int kind = jobs[r].setup->experts ? reduce_of[p] : 0;
        int other = kind == 0 ? 0 : kind == 1 ? r % 2 : r;
        CHECK(memcmp(jobs[r].out.master + at, jobs[other].out.master + at,
                     sizes[p] * sizeof(float)) == 0);
        if (kind == 1 && jobs[r].setup->poison_step < 0)
            CHECK(memcmp(jobs[r].out.master + at, jobs[!(r % 2)].out.master + at,
                         sizes[p] * sizeof(float)) != 0);
    }
}

static struct outcome *run(const struct setup *setup) {
    struct rank_job *jobs = calloc((size_t)setup->size, sizeof *jobs);
    atomic_int n_done = 0;
    struct dsc_comm *comms[MAX_RANKS];
    pthread_t threads[MAX_RANKS];
    struct dsc_comm_options options = {.timeout_s = 8};
    if (setup->size == 1)
        CHECK_OK(dsc_comm_open_self(&options, &comms[0]));
    else
        CHECK_OK(dsc_comm_open_threads(&options, setup->size, comms));
    for (int r = 0; r < setup->size; r++) {
        jobs[r].setup = setup;
        jobs[r].comm = comms[r];
        jobs[r].n_done = &n_done;
        jobs[r].rank = r;
        CHECK(pthread_create(&threads[r], NULL, run_rank, &jobs[r]) == 0);
    }
    for (int r = 0; r < setup->size; r++)
        pthread_join(threads[r], NULL);
    struct outcome *first = calloc(1, sizeof *first);
    *first = jobs[0].out;
    for (int r = 0; r < setup->size; r++) {
        check_masters(jobs, r);
        for (size_t i = 0; i < TOTAL; i++)
            first->of_all[r] += jobs[r].out.master[i];
    }
    for (int r = 1; r < setup->size; r++) {
        CHECK(memcmp(jobs[r].out.norm, first->norm, sizeof first->norm) == 0);
        first->counters.n_settled += jobs[r].out.counters.n_settled;
        first->counters.n_extra_slots += jobs[r].out.counters.n_extra_slots;
        first->counters.n_bytes_settled += jobs[r].out.counters.n_bytes_settled;
        first->counters.n_bytes_settled_in_backward +=
            jobs[r].out.counters.n_bytes_settled_in_backward;
    }
    for (int r = 0; r < setup->size; r++)
        dsc_comm_close(comms[r]);
    free(jobs);
    return first;
}

/* ---- engines over groups ---- */

/* One of four ranks: the engine of its pair, {0, 2} or {3, 1}, while the other pair runs another.
 */
static void *run_in_pair(void *context) {
    struct rank_job *job = context;
    struct dsc_comm *world = job->comm;
    bool odd = job->rank % 2;
    CHECK_OK(dsc_comm_open_group(world, NULL, odd ? (int[]){3, 1} : (int[]){0, 2}, 2,
                                 odd ? "odd" : "even", &job->comm));
    if (odd)
        dsc_comm_close(world);
    job->rank = dsc_comm_rank(job->comm);
    (void)run_rank(job);
    dsc_comm_close(job->comm);
    if (!odd)
        dsc_comm_close(world);
    return NULL;
}

/* Two pairs side by side give what each gives alone. */
static void check_pairs(const struct setup *even, const struct setup *odd) {
    struct rank_job *jobs = calloc(4, sizeof *jobs);
    struct dsc_comm *comms[4];
    pthread_t threads[4];
    struct dsc_comm_options options = {.timeout_s = 8};
    CHECK_OK(dsc_comm_open_threads(&options, 4, comms));
    for (int r = 0; r < 4; r++) {
        jobs[r] = (struct rank_job){.setup = r % 2 ? odd : even, .comm = comms[r], .rank = r};
        CHECK(pthread_create(&threads[r], NULL, run_in_pair, &jobs[r]) == 0);
    }
    for (int r = 0; r < 4; r++)
        pthread_join(threads[r], NULL);
    for (int r = 0; r < 4; r++) {
        struct outcome *alone = run(jobs[r].setup);
        CHECK(memcmp(jobs[r].out.master, alone->master, sizeof alone->master) == 0);
        CHECK(memcmp(jobs[r].out.norm, alone->norm, sizeof alone->norm) == 0);
        free(alone);
    }
    free(jobs);
}

static void check_same(const struct setup *a, const struct setup *b) {
    struct outcome *x = run(a), *y = run(b);
    CHECK(memcmp(x->of_all, y->of_all, sizeof x->of_all) == 0);
    if (memcmp(x->master, y->master, sizeof x->master) != 0 ||
        memcmp(x->norm, y->norm, sizeof x->norm) != 0) {
        size_t i = 0;
        while (i < TOTAL - 1 && x->master[i] == y->master[i])
            i++;
        fprintf(
            stderr,
            "stage %d overlap %d bucket %zu differs from stage %d overlap %d bucket %zu "
            "(%d ranks, %s, %d micro-steps): element %zu is %.9g, not %.9g; norm %.17g, %.17g\n",
            b->stage, b->overlap, b->bucket, a->stage, a->overlap, a->bucket, a->size,
            dsc_dtype_name(a->dtype), a->n_micro, i, (double)y->master[i], (double)x->master[i],
            y->norm[0], x->norm[0]);
        exit(1);
    }
    free(x);
    free(y);
}

static const struct setup plain = {.size = 2,
                                   .n_micro = 1,
                                   .bucket = 500000000,
                                   .scale = 1,
                                   .poison_step = -1,
                                   .unused_param = -1};

static void sweep_from(struct setup base, bool delays) {
    for (int dtype = 0; dtype < DSC_TRAIN_DTYPE_COUNT; dtype++) {
        base.dtype = (enum dsc_dtype)dtype;
        base.unused_param = 5;
        struct setup other = base;
        other.delays = delays;
        for (other.stage = 0; other.stage <= 3; other.stage++)
            for (int overlap = 0; overlap < 2; overlap++)
                for (int small = 0; small < 2; small++) {
                    other.overlap = overlap;
                    other.bucket = small ? 1000 : 500000000;
                    /* Several micro-steps: 0 equals 1; 2 sums in another order, and equals 3. */
                    base.stage = base.n_micro > 1 && other.stage >= 2 ? 2 : 0;
                    check_same(&base, &other);
                }
    }
}

static void sweep(int size, int n_micro, bool delays, enum dsc_optim_kind optim, bool whole) {
    struct setup base = plain;
    base.size = size;
    base.n_micro = n_micro;
    base.optim = optim;
    base.whole = whole;
    sweep_from(base, delays);
}

static void experts_sweep(int n_micro, enum dsc_optim_kind optim, bool whole) {
    struct setup base = plain;
    base.size = 4;
    base.n_micro = n_micro;
    base.optim = optim;
    base.whole = whole;
    base.experts = true;
    sweep_from(base, true);
}

static void pairs_of_ranks_run_engines_of_their_own(void) {
    struct setup even = plain, odd = plain;
    even.bucket = odd.bucket = 1000;
    even.delays = odd.delays = true;
    odd.n_micro = 3;
    odd.dtype = DSC_BF16;
    for (even.stage = 0; even.stage <= 3; even.stage++) {
        odd.stage = 3 - even.stage;
        odd.overlap = even.stage == 1;
        check_pairs(&even, &odd);
    }
}

static void stages_overlap_and_buckets_agree_on_2_ranks(void) {
    sweep(2, 1, false, DSC_OPTIM_ADAM, false);
}
static void stages_overlap_and_buckets_agree_on_4_ranks(void) {
    sweep(4, 1, false, DSC_OPTIM_ADAM, false);
}
static void three_micro_steps_agree_on_2_ranks(void) {
    sweep(2, 3, false, DSC_OPTIM_ADAM, false);
}
static void three_micro_steps_agree_on_4_ranks(void) {
    sweep(4, 3, false, DSC_OPTIM_SGD, false);
}
static void random_delays_change_no_bit_2_ranks(void) {
    sweep(2, 1, true, DSC_OPTIM_SGD, false);
}
static void random_delays_change_no_bit_3_ranks(void) {
    sweep(3, 2, true, DSC_OPTIM_ADAM, false);
}

/* What arrives in the order of ranks holds no slot; what comes against it does. */
static void contributions_in_turn_take_no_slots(void) {
    for (int size = 2; size <= 4; size += 2)
        for (int n_micro = 1; n_micro <= 2; n_micro++)
            for (int stage = 1; stage <= 3; stage++) {
                struct setup base = plain, ordered = plain;
                base.size = ordered.size = size;
                base.n_micro = ordered.n_micro = n_micro;
                base.stage = ordered.stage = stage;
                base.overlap = ordered.overlap = true;
                base.bucket = ordered.bucket = 1000;
                ordered.turns = 1;
                check_same(&base, &ordered);
                struct outcome *in_turn = run(&ordered);
                ordered.turns = -1;
                check_same(&base, &ordered);
                struct outcome *against = run(&ordered);
                CHECK(in_turn->counters.n_extra_slots == 0);
                CHECK(against->counters.n_extra_slots > 0);
                free(in_turn);
                free(against);
            }
}

/* Two large parameters, the second one rank 1's: rank 0 has none of it to replace, and is in its
 * next backward pass while rank 1 still writes. */
enum { LARGE = 1 << 20 };

static void *replace_sums(void *context) {
    struct rank_job *job = context;
    struct dsc_engine_options options = {
        .stage = 2, .bucket_elems = LARGE, .many_micro_steps = true, .n_threads = 1};
    struct dsc_param params[2] = {{.n_elems = LARGE, .dtype = DSC_F32},
                                  {.n_elems = LARGE, .dtype = DSC_F32}};
    struct dsc_hyper hyper = {.beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8};
    struct dsc_engine_ranks ranks = dsc_engine_ranks_of(job->comm);
    float *
        memory[4]; /* the parameter that is looked at and its gradient, what is set, what is read */
    dsc_scaler_init_static(&options.scaler, 1);
    for (int k = 0; k < 4; k++) {
        memory[k] = aligned_alloc(64, LARGE * sizeof(float));
        for (size_t i = 0; i < LARGE; i++)
            memory[k][i] = k == 2 ? 1e-40f : 1; /* subnormal: many processors are slow */
    }
    struct dsc_engine *engine;
    CHECK_OK(dsc_engine_open(&ranks, &options, params, 2, 1, &engine));
    for (int step = 0; step < 20; step++) {
        struct dsc_view views[2] = {{.data = memory[0]}, {.data = memory[0]}};
        struct dsc_step_report report;
        double into_grad;
        int need;
        bool taken;
        for (int micro = 0; micro < 2; micro++) {
            CHECK_OK(dsc_engine_begin_backward(engine, micro == 1, &need));
            CHECK_OK(dsc_engine_arrive(engine, 1, memory[1], DSC_F32, &taken));
            CHECK_OK(dsc_engine_end_backward(engine, micro == 1, &need));
            if (micro == 0)
                CHECK_OK(dsc_engine_set_grad(engine, 1, views, memory[2], &into_grad));
        }
        CHECK_OK(dsc_engine_get_grad(engine, 1, views, memory[3]));
        for (size_t i = 0; i < LARGE; i++)
            CHECK(memory[3][i] == 1); /* what was set, and the mean of the second pass */
        CHECK_OK(dsc_engine_step(engine, views, &hyper, &report));
    }
    dsc_engine_close(engine);
    for (int k = 0; k < 4; k++)
        free(memory[k]);
    return NULL;
}

static void a_replaced_gradient_keeps_what_comes_after_it(void) {
    struct rank_job jobs[2] = {{.rank = 0}, {.rank = 1}};
    struct dsc_comm *comms[2];
    pthread_t threads[2];
    struct dsc_comm_options options = {.timeout_s = 8};
    CHECK_OK(dsc_comm_open_threads(&options, 2, comms));
    for (int r = 0; r < 2; r++) {
        jobs[r].comm = comms[r];
        CHECK(pthread_create(&threads[r], NULL, replace_sums, &jobs[r]) == 0);
    }
    for (int r = 0; r < 2; r++)
        pthread_join(threads[r], NULL);
    for (int r = 0; r < 2; r++)
        dsc_comm_close(comms[r]);
}

static void lamb_agrees_over_stages_on_2_ranks(void) {
    sweep(2, 1, true, DSC_OPTIM_LAMB, false);
}
static void lamb_agrees_over_stages_on_4_ranks(void) {
    sweep(4, 3, false, DSC_OPTIM_LAMB, false);
}
static void lion_and_adagrad_agree_over_stages_on_3_ranks(void) {
    sweep(3, 1, false, DSC_OPTIM_LION, false);
    sweep(3, 1, false, DSC_OPTIM_ADAGRAD, false);
}
static void a_foreign_optimizer_agrees_over_stages_on_2_ranks(void) {
    sweep(2, 1, true, DSC_OPTIM_FOREIGN, false);
}
static void a_foreign_optimizer_of_whole_parameters_agrees_over_stages_on_4_ranks(void) {
    sweep(4, 1, false, DSC_OPTIM_FOREIGN, true);
}

static void experts_over_fewer_ranks_agree_over_stages(void) {
    experts_sweep(1, DSC_OPTIM_ADAM, false);
}
static void three_micro_steps_of_experts_agree_over_stages(void) {
    experts_sweep(3, DSC_OPTIM_SGD, false);
}
static void whole_experts_agree_over_stages(void) {
    experts_sweep(1, DSC_OPTIM_FOREIGN, true);
}

/* One step of SGD without clipping: gradients of four ranks, or of two, or of one, over four. */
static void experts_are_averaged_over_all_data_ranks_and_counted_once(void) {
    for (int stage = 0; stage <= 3; stage++) {
        struct setup s = plain;
        s.size = 4;
        s.stage = stage;
        s.experts = true;
        struct outcome *o = run(&s);
        double squares = 0;
        for (int p = 0; p < N_PARAMS; p++)
            for (int first = 0; first < (int[]){1, 2, 4}[reduce_of[p]]; first++)
                for (size_t i = 0; i < sizes[p]; i++) {
                    double sum = 0;
                    for (int r = first; r < 4; r += (int[]){1, 2, 4}[reduce_of[p]])
                        sum += (double)value_of(p, r, 0, i);
                    squares += sum * sum / 16;
                }
        CHECK(fabs(o->norm[0] - sqrt(squares)) < 1e-6 * o->norm[0]);
        free(o);
    }
}

static void lamb_does_not_depend_on_threads(void) {
    struct setup a = plain;
    a.size = 1;
    a.optim = DSC_OPTIM_LAMB;
    a.dtype = DSC_BF16;
    struct setup b = a;
    b.n_threads = 3;
    check_same(&a, &b);
    struct outcome *x = run(&b);
    CHECK(x->allocs_in_last_step == 0);
    free(x);
}

static void cuts_between_parameters_stand_nearest_to_equal_shares(void) {
    struct dsc_param params[11];
    int space_of[11];
    size_t segment_of[11], n_spaces;
    struct dsc_space *spaces;
    for (int i = 0; i < 11; i++)
        params[i] = (struct dsc_param){.n_elems = i == 5 ? 40000 : 1000, .dtype = DSC_F32};
    struct dsc_cutting cutting = {(int[]){3}, 1, true};
    CHECK_OK(dsc_space_build(params, 11, &cutting, &spaces, &n_spaces, space_of, segment_of));
    CHECK(n_spaces == 1 && spaces->cuts[0] == 0 && spaces->cuts[3] == spaces->n_elems);
    for (int r = 0; r < 3; r++) {
        struct dsc_range owned = dsc_space_owned(spaces, r);
        struct dsc_parts it = dsc_parts(spaces, owned);
        CHECK(owned.begin % DSC_BLOCK == 0 && owned.begin <= owned.end);
        while (dsc_parts_next(&it))
            CHECK(dsc_range_size(it.part) == it.segment->n_elems);
    }
    /* 50,000 elements: the border nearest to 16,667 is 5,000, that nearest to 33,333 is 45,000. */
    CHECK(spaces->segments[5].begin == spaces->cuts[1]);
    CHECK(spaces->segments[6].begin == spaces->cuts[2]);
    dsc_space_free(spaces, n_spaces);
}

static void a_world_of_one_agrees_over_stages(void) {
    struct setup a = plain, b = plain;
    a.size = b.size = 1;
    a.n_micro = b.n_micro = 3;
    a.dtype = b.dtype = DSC_BF16;
    for (b.stage = 1; b.stage <= 3; b.stage++)
        check_same(&a, &b);
}

static void a_slow_rank_is_waited_for_over_many_micro_steps(void) {
    struct setup a = plain, b = plain;
    a.stage = 2;
    a.n_micro = b.n_micro = 40; /* more rounds than a rank may be ahead */
    b.slow_rank = true;
    b.bucket = 1000;
    for (b.stage = 2; b.stage <= 3; b.stage++)
        check_same(&a, &b);
}

static void overlap_settles_at_least_half_in_backward(void) {
    struct setup s = plain;
    s.overlap = true;
    s.stage = 2;
    struct outcome *large = run(&s);
    CHECK(2 * large->counters.n_bytes_settled_in_backward >= large->counters.n_bytes_settled);
    CHECK(large->counters.n_bytes_settled == (uint64_t)N_STEPS * TOTAL * sizeof(float));
    s.bucket = 1000;
    struct outcome *small = run(&s);
    CHECK(small->counters.n_settled > large->counters.n_settled);
    CHECK(small->counters.n_bytes_settled == large->counters.n_bytes_settled);
    free(large);
    free(small);
}

static void an_infinite_gradient_is_skipped_and_its_place_is_named(void) {
    for (int dtype = 0; dtype < DSC_TRAIN_DTYPE_COUNT; dtype++)
        for (int stage = 0; stage <= 3; stage++)
            for (int n_micro = 1; n_micro <= 2; n_micro++) {
                struct setup s = plain;
                s.experts = n_micro == 1; /* then it is in the experts of one rank */
                s.size = s.experts ? 4 : 2;
                s.dtype = (enum dsc_dtype)dtype;
                s.stage = stage;
                s.n_micro = n_micro;
                s.overlap = stage == 1;
                s.poison_step = N_STEPS - 1;
                struct outcome *o = run(&s);
                CHECK(!o->stepped[N_STEPS - 1] && o->stepped[N_STEPS - 2]);
                CHECK_EQ_INT(o->last.bad_rank, 1);
                CHECK_EQ_INT(o->last.bad_param, 3);
                CHECK_EQ_INT(o->last.bad_elem, 4321);
                CHECK_EQ_INT(o->last.bad_micro, 1);
                free(o);
            }
}

static void a_power_of_two_loss_scale_changes_no_bit(void) {
    struct setup a = plain, b = plain;
    a.stage = b.stage = 1;
    b.scale = 1024;
    check_same(&a, &b);
}

static void a_step_in_the_steady_state_allocates_nothing(void) {
    for (int k = 0; k < 8; k++) {
        struct setup s = plain;
        s.stage = k / 2;
        s.experts = k % 2;
        s.size = s.experts ? 4 : 2;
        struct outcome *o = run(&s);
        CHECK_EQ_INT(o->allocs_in_last_step, 0);
        free(o);
    }
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

static void a_stage_that_does_not_exist_says_so(void) {
    struct dsc_comm *comm;
    struct dsc_comm_options comm_options = {.timeout_s = 5};
    struct dsc_engine_options options = {.stage = 4, .bucket_elems = 1000};
    struct dsc_param param = {.n_elems = 10, .dtype = DSC_F32};
    struct dsc_engine *engine;
    CHECK_OK(dsc_comm_open_self(&comm_options, &comm));
    struct dsc_engine_ranks ranks = dsc_engine_ranks_of(comm);
    CHECK(dsc_engine_open(&ranks, &options, &param, 1, 1, &engine) == DSC_EINVAL);
    CHECK(strstr(dsc_last_error(), "zero_optimization.stage is 4"));
    dsc_comm_close(comm);
}

static const struct test_case cases[] = {
    CASE(a_stage_that_does_not_exist_says_so),
    CASE(experts_over_fewer_ranks_agree_over_stages),
    CASE(three_micro_steps_of_experts_agree_over_stages),
    CASE(whole_experts_agree_over_stages),
    CASE(experts_are_averaged_over_all_data_ranks_and_counted_once),
    CASE(lamb_agrees_over_stages_on_2_ranks),
    CASE(lamb_agrees_over_stages_on_4_ranks),
    CASE(lion_and_adagrad_agree_over_stages_on_3_ranks),
    CASE(a_foreign_optimizer_agrees_over_stages_on_2_ranks),
    CASE(a_foreign_optimizer_of_whole_parameters_agrees_over_stages_on_4_ranks),
    CASE(lamb_does_not_depend_on_threads),
    CASE(cuts_between_parameters_stand_nearest_to_equal_shares),
    CASE(a_world_of_one_agrees_over_stages),
    CASE(pairs_of_ranks_run_engines_of_their_own),
    CASE(stages_overlap_and_buckets_agree_on_2_ranks),
    CASE(stages_overlap_and_buckets_agree_on_4_ranks),
    CASE(three_micro_steps_agree_on_2_ranks),
    CASE(three_micro_steps_agree_on_4_ranks),
    CASE(contributions_in_turn_take_no_slots),
    CASE(a_replaced_gradient_keeps_what_comes_after_it),
    CASE(random_delays_change_no_bit_2_ranks),
    CASE(random_delays_change_no_bit_3_ranks),
    CASE(a_slow_rank_is_waited_for_over_many_micro_steps),
    CASE(overlap_settles_at_least_half_in_backward),
    CASE(an_infinite_gradient_is_skipped_and_its_place_is_named),
    CASE(a_power_of_two_loss_scale_changes_no_bit),
    CASE(a_step_in_the_steady_state_allocates_nothing),
};
RUN_CASES(cases)
