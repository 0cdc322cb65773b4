/* Routing: who is chosen, who finds a place, what rows become, on any number of threads. */
#include "moe.h"

#include "case.h"
#include "fpenv.h"
#include "kernels/kernels.h"
#include "random.h"

#include <math.h>

enum { S = 700, E = 7, K = 3, M = 515, C = 90 };

/* Few different values, so that ties abound. */
static float next_tied(void) {
    return (float)(int)(next_random() >> 40 & 7) * 0.25f - 1.0f;
}
static float next_float(void) {
    return (float)((int64_t)(next_random() >> 40) - (1 << 23)) * 0x1p-23f;
}

struct routes {
    float logits[S * E], gates[S * E], slope[E], l_aux, weights[S * K], d_logits[S * E];
    int32_t experts[S * K], slots[S * K], entries[E * C];
    int64_t counts[E];
};

static struct dsc_moe_size size_of(enum dsc_moe_rule rule) {
    size_t k = rule == DSC_MOE_TOP1 ? 1 : rule == DSC_MOE_TOP2 ? 2 : K;
    return (struct dsc_moe_size){rule, S, E, k, C};
}

static void route(struct dsc_pool *pool, enum dsc_moe_rule rule, enum dsc_moe_drop drop,
                  struct routes *r) {
    struct dsc_moe_size size = size_of(rule);
    struct dsc_moe_choice choice = {.size = size,
                                    .logits = r->logits,
                                    .gates = r->gates,
                                    .experts = r->experts,
                                    .counts = r->counts,
                                    .slope = r->slope,
                                    .l_aux = &r->l_aux};
    CHECK_OK(dsc_moe_choose(pool, &choice));
    struct dsc_moe_placement placement = {.size = size,
                                          .drop = drop,
                                          .gates = r->gates,
                                          .experts = r->experts,
                                          .counts = r->counts,
                                          .priority = r->gates,
                                          .slots = r->slots,
                                          .entries = r->entries,
                                          .weights = r->weights};
    CHECK_OK(dsc_moe_place(pool, &placement));
    struct dsc_moe_grad grad = {size,     r->gates,   r->experts, r->slots,
                                r->slope, r->weights, &r->l_aux,  r->d_logits};
    CHECK_OK(dsc_moe_differentiate(pool, &grad));
}

static void sizes_that_cannot_be_are_refused_with_the_numbers(void) {
    static const struct dsc_moe_size bad[] = {
        {DSC_MOE_TOP1, 4, 3, 2, 1},
        {DSC_MOE_TOP2, 4, 1, 2, 1},
        {DSC_MOE_TOPK, 4, 3, 0, 1},
        {DSC_MOE_TOPK, 4, 3, 4, 1},
        {DSC_MOE_TOPK, 4, 0, 1, 1},
        {DSC_MOE_TOPK, (size_t)1 << 30, 3, 1, 1},
        {DSC_MOE_TOPK, 4, 3, 1, (size_t)1 << 30},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct dsc_moe_grad grad = {.size = bad[i]};
        CHECK_EQ_INT(dsc_moe_differentiate(NULL, &grad), DSC_EINVAL);
    }
    CHECK(strstr(dsc_last_error(), "4 tokens, 3 experts of capacity 1073741824"));
}

static void equal_logits_go_to_the_lowest_experts_and_the_first_tokens(void) {
    static struct routes r;
    static const enum dsc_moe_drop drops[] = {DSC_MOE_FIRST, DSC_MOE_LARGEST};
    for (int s = 0; s < S; s++)
        for (int e = 0; e < E; e++)
            r.logits[s * E + e] = e % 2 ? -0.0f : 0.0f;
    for (int d = 0; d < 2; d++) {
        route(NULL, DSC_MOE_TOPK, drops[d], &r);
        for (int s = 0; s < S; s++)
            for (int j = 0; j < K; j++) {
                CHECK_EQ_INT(r.experts[s * K + j], j);
                CHECK_EQ_INT(r.slots[s * K + j], s < C ? j * C + s : -1);
                CHECK(fabsf(r.weights[s * K + j] - (s < C ? 1.0f / 3 : 0.0f)) < 1e-7f);
            }
        CHECK_EQ_INT(r.entries[3 * C], -1);
        CHECK_EQ_INT(r.counts[2], S);
    }
    route(NULL, DSC_MOE_TOP2, DSC_MOE_FIRST, &r);
    CHECK_EQ_INT(r.slots[0], 0);
    CHECK_EQ_INT(r.slots[1], C);
}

/* Slots and entries are each other's inverse, places fill from the front, and who stays beats who
 * goes. */
static void check_places(const struct routes *r, const struct dsc_moe_size *z, bool largest) {
    for (size_t e = 0; e < E; e++) {
        float least = 2;
        size_t n = 0;
        for (; n < C && r->entries[e * C + n] >= 0; n++) {
            size_t entry = (size_t)r->entries[e * C + n];
            CHECK_EQ_INT(r->experts[entry], e);
            CHECK_EQ_INT(r->slots[entry], e * C + n);
            least = fminf(least, r->gates[entry / z->k * E + e]);
        }
        CHECK_EQ_INT(n, dsc_min((size_t)r->counts[e], C));
        for (size_t i = n; i < C; i++)
            CHECK_EQ_INT(r->entries[e * C + i], -1);
        for (size_t i = 0; largest && i < S * z->k; i++)
            if (r->experts[i] == (int32_t)e && r->slots[i] < 0)
                CHECK(r->gates[i / z->k * E + e] <= least);
    }
}

static void places_are_consistent_and_no_bit_depends_on_threads(void) {
    static struct routes one, many;
    struct dsc_pool *pool;
    CHECK_OK(dsc_pool_open(3, (struct dsc_team){0}, &pool));
    for (int rule = DSC_MOE_TOP1; rule <= DSC_MOE_TOPK; rule++) {
        for (int drop = DSC_MOE_FIRST; drop <= DSC_MOE_LARGEST; drop++) {
            struct dsc_moe_size size = size_of((enum dsc_moe_rule)rule);
            for (int i = 0; i < S * E; i++)
                one.logits[i] = next_tied();
            many = one;
            route(NULL, size.rule, (enum dsc_moe_drop)drop, &one);
            route(pool, size.rule, (enum dsc_moe_drop)drop, &many);
            CHECK(memcmp(&one, &many, sizeof one) == 0);
            check_places(&one, &size, drop == DSC_MOE_LARGEST);
        }
    }
    dsc_pool_close(pool);
}

static void nan_everywhere_and_capacity_zero_end_well(void) {
    static struct routes r;
    for (int i = 0; i < S * E; i++)
        r.logits[i] = NAN;
    route(NULL, DSC_MOE_TOPK, DSC_MOE_LARGEST, &r);
    CHECK_EQ_INT(r.experts[2], 2);
    CHECK_EQ_INT(r.slots[(C - 1) * K], C - 1);
    CHECK_EQ_INT(r.slots[C * K], -1);
    struct dsc_moe_placement p = {.size = {DSC_MOE_TOPK, S, E, K, 0},
                                  .drop = DSC_MOE_LARGEST,
                                  .gates = r.gates,
                                  .experts = r.experts,
                                  .counts = r.counts,
                                  .priority = r.gates,
                                  .slots = r.slots,
                                  .weights = r.weights};
    CHECK_OK(dsc_moe_place(NULL, &p));
    for (int i = 0; i < S * K; i++)
        CHECK(r.slots[i] == -1 && r.weights[i] == 0);
}

/* ---- rows ---- */

static float value_at(enum dsc_dtype dtype, const void *data, size_t i) {
    float x;
    dsc_kernels()->to_f32[dtype](&x, (const char *)data + i * dsc_dtype_size(dtype), 1);
    return x;
}

static bool near(float a, double b) {
    return fabs((double)a - b) <= 0.01 * fabs(b) + 0.01;
}

/* Two pieces for two ranks each: experts 0 and 2 in one, 1 and 3 in the other. */
enum { ROWS_E = 4, ROWS_S = 50, ROWS_C = 20, ROWS_K = 2, N_PARTS = 2 };
struct rows {
    int32_t experts[ROWS_S * ROWS_K], slots[ROWS_S * ROWS_K], entries[ROWS_E * ROWS_C];
    float weights[ROWS_S * ROWS_K], d_weights[ROWS_S * ROWS_K];
    float x[ROWS_S * M], out[ROWS_S * M], parts[N_PARTS][ROWS_E / N_PARTS * ROWS_C * M],
        d_parts[N_PARTS][ROWS_E / N_PARTS * ROWS_C * M];
};

static size_t index_of(int32_t slot, size_t column, size_t *part) {
    size_t e = (size_t)slot / ROWS_C, position = (size_t)slot % ROWS_C;
    *part = e % N_PARTS;
    return (e / N_PARTS * ROWS_C + position) * M + column;
}

static void fill_rows(struct rows *r, enum dsc_dtype dtype) {
    float row[M];
    memset(r->entries, 0xFF, sizeof r->entries);
    for (int i = 0; i < ROWS_S * ROWS_K; i++) {
        size_t slot = next_random() % (ROWS_E * ROWS_C);
        r->slots[i] = r->entries[slot] < 0 ? (int32_t)slot : -1;
        if (r->slots[i] >= 0)
            r->entries[slot] = i;
        r->weights[i] = next_float();
    }
    for (int s = 0; s < ROWS_S; s++) {
        for (int i = 0; i < M; i++)
            row[i] = next_float();
        dsc_kernels()->from_f32[dtype]((char *)r->x + (size_t)s * M * dsc_dtype_size(dtype), row,
                                       M);
    }
}

static void check_rows(const struct rows *r, enum dsc_dtype dtype) {
    size_t part;
    for (int i = 0; i < ROWS_E * ROWS_C; i++)
        for (size_t m = 0; m < M; m += 37) {
            size_t at = index_of(i, m, &part);
            float got = value_at(dtype, r->parts[part], at);
            float d = value_at(dtype, r->d_parts[part], at);
            int32_t entry = r->entries[i];
            float x = entry < 0 ? 0 : value_at(dtype, r->x, (size_t)entry / ROWS_K * M + m);
            CHECK(got == x);
            CHECK(near(d, entry < 0 ? 0 : (double)r->weights[entry] * (double)x));
        }
    for (size_t s = 0; s < ROWS_S; s++)
        for (size_t m = 0; m < M; m += 41) {
            double sum = 0;
            for (size_t i = s * ROWS_K; i < (s + 1) * ROWS_K; i++)
                sum += r->slots[i] < 0 ? 0 : (double)r->weights[i];
            CHECK(near(value_at(dtype, r->out, s * M + m),
                       sum * (double)value_at(dtype, r->x, s * M + m)));
        }
    for (size_t i = 0; i < ROWS_S * ROWS_K; i++) {
        double square = 0;
        for (size_t m = 0; m < M && r->slots[i] >= 0; m++)
            square += pow((double)value_at(dtype, r->x, i / ROWS_K * M + m), 2);
        CHECK(near(r->d_weights[i], square));
    }
}

static void rows_go_to_their_places_and_back_in_every_dtype(void) {
    static struct rows one, many;
    struct dsc_pool *pool;
    CHECK_OK(dsc_pool_open(3, (struct dsc_team){0}, &pool));
    for (int dtype = 0; dtype < DSC_TRAIN_DTYPE_COUNT; dtype++) {
        fill_rows(&one, (enum dsc_dtype)dtype);
        many = one;
        for (int threads = 0; threads < 2; threads++) {
            struct rows *r = threads ? &many : &one;
            void *parts[] = {r->parts[0], r->parts[1]}, *d_parts[] = {r->d_parts[0], r->d_parts[1]};
            struct dsc_moe_rows rows = {{DSC_MOE_TOPK, ROWS_S, ROWS_E, ROWS_K, ROWS_C},
                                        M,
                                        r->slots,
                                        r->entries,
                                        {parts, N_PARTS, ROWS_E / N_PARTS, (enum dsc_dtype)dtype},
                                        (enum dsc_dtype)dtype};
            struct dsc_pool *on = threads ? pool : NULL;
            CHECK_OK(dsc_moe_dispatch(on, &rows, r->x));
            CHECK_OK(dsc_moe_combine(on, &rows, r->weights, r->out));
            CHECK_OK(dsc_moe_combine_backward(on, &rows, r->weights, r->x, d_parts, r->d_weights));
        }
        check_rows(&one, (enum dsc_dtype)dtype);
        CHECK(memcmp(&one, &many, sizeof one) == 0);
    }
    dsc_pool_close(pool);
}

/* ---- logits ---- */

static void logits_and_their_gradients_are_matrix_products(void) {
    static float x[S * M], weight[E * M], logits[S * E], d_x[S * M], d_weight[E * M];
    static float more[S * M], threaded[E * M];
    struct dsc_pool *pool;
    CHECK_OK(dsc_pool_open(3, (struct dsc_team){0}, &pool));
    for (int i = 0; i < S * M; i++)
        x[i] = next_float();
    for (int i = 0; i < E * M; i++)
        weight[i] = next_float();
    struct dsc_moe_linear l = {S, M, E, x, DSC_F32, weight};
    CHECK_OK(dsc_moe_logits(pool, &l, logits));
    CHECK_OK(dsc_moe_logits_backward(NULL, &l, logits, d_x, false, d_weight));
    memcpy(more, d_x, sizeof more);
    CHECK_OK(dsc_moe_logits_backward(pool, &l, logits, more, true, threaded));
    CHECK(memcmp(threaded, d_weight, sizeof d_weight) == 0);
    for (int s = 0; s < S; s += 13)
        for (int e = 0; e < E; e++) {
            double sum = 0;
            for (int m = 0; m < M; m++)
                sum += (double)x[s * M + m] * (double)weight[e * M + m];
            CHECK(fabs((double)logits[s * E + e] - sum) < 1e-4);
        }
    for (int i = 0; i < S * M; i += 131) {
        double sum = 0;
        for (int e = 0; e < E; e++)
            sum += (double)logits[i / M * E + e] * (double)weight[e * M + i % M];
        CHECK(fabs((double)d_x[i] - sum) < 1e-4 && fabs((double)more[i] - 2 * sum) < 2e-4);
    }
    for (int i = 0; i < E * M; i += 17) {
        double sum = 0;
        for (int s = 0; s < S; s++)
            sum += (double)logits[s * E + i / M] * (double)x[s * M + i % M];
        CHECK(fabs((double)d_weight[i] - sum) < 1e-2);
    }
    l.n_tokens = 0;
    CHECK_OK(dsc_moe_logits_backward(pool, &l, logits, NULL, false, d_weight));
    CHECK(d_weight[0] == 0 && d_weight[E * M - 1] == 0);
    dsc_pool_close(pool);
}

static const struct test_case cases[] = {
    CASE(sizes_that_cannot_be_are_refused_with_the_numbers),
    CASE(equal_logits_go_to_the_lowest_experts_and_the_first_tokens),
    CASE(places_are_consistent_and_no_bit_depends_on_threads),
    CASE(nan_everywhere_and_capacity_zero_end_well),
    CASE(rows_go_to_their_places_and_back_in_every_dtype),
    CASE(logits_and_their_gradients_are_matrix_products),
};
RUN_CASES(cases)
