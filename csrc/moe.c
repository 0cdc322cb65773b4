/* Choices, places and their gradient. Rows of logits go to the pool in pieces, places in one loop
 * over experts: whoever runs a piece, each number is made from the same numbers in one order. */
#include "moe.h"

#include "alloc.h"
#include "kernels/bits.h"
#include "kernels/kernels.h"

#include <float.h>
#include <string.h>

enum { ROWS = 256, NOBODY = -1 };

static enum dsc_status check(const struct dsc_moe_size *z) {
    size_t most = z->rule == DSC_MOE_TOP1 ? 1 : z->rule == DSC_MOE_TOP2 ? 2 : z->n_experts;
    if (z->k < 1 || z->k > z->n_experts || (z->rule != DSC_MOE_TOPK && z->k != most))
        return DSC_FAIL(DSC_EINVAL, "a token goes to k = %zu of %zu experts; allowed: 1 to %zu",
                        z->k, z->n_experts, z->n_experts);
    if (z->n_tokens > INT32_MAX / z->n_experts || z->capacity > INT32_MAX / z->n_experts)
        return DSC_FAIL(DSC_EINVAL,
                        "%zu tokens, %zu experts of capacity %zu: more than 2^31 - 1 pairs",
                        z->n_tokens, z->n_experts, z->capacity);
    return DSC_OK;
}

/* ---- choice ---- */

/* Integers in the order of the floats, -0 like +0, NaN on top. */
static uint32_t rank_of(float x) {
    uint32_t bits = dsc_bits_of_f32(dsc_one_nan(x + 0.0f));
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* The best expert behind `previous` in the order (higher rank, lower index); previous -1: the best
 * of all. `noise` may be NULL. */
static int32_t next_best(const float *logits, const float *noise, size_t n, int32_t previous) {
    int32_t best = NOBODY;
    uint32_t best_rank = 0, limit = 0;
    if (previous >= 0)
        limit = rank_of(noise ? logits[previous] + noise[previous] : logits[previous]);
    for (size_t e = 0; e < n; e++) {
        uint32_t rank = rank_of(noise ? logits[e] + noise[e] : logits[e]);
        if (previous >= 0 && (rank > limit || (rank == limit && (int32_t)e <= previous)))
            continue;
        if (best < 0 || rank > best_rank) {
            best = (int32_t)e;
            best_rank = rank;
        }
    }
    return best;
}

/* The best expert but one. */
static int32_t best_without(const float *logits, const float *noise, size_t n, int32_t without) {
    int32_t best = next_best(logits, noise, n, NOBODY);
    return best == without ? next_best(logits, noise, n, best) : best;
}

static void choose_rows(void *context, size_t begin, size_t end) {
    const struct dsc_moe_choice *c = context;
    size_t n = c->size.n_experts, k = c->size.k;
    dsc_kernels()->softmax(c->gates + begin * n, c->logits + begin * n, end - begin, n);
    for (size_t s = begin; s < end; s++) {
        const float *logits = c->logits + s * n, *noise = c->noise ? c->noise + s * n : NULL;
        int32_t *experts = c->experts + s * k;
        bool first_is_noisy = c->size.rule == DSC_MOE_TOP1;
        experts[0] = next_best(logits, first_is_noisy ? noise : NULL, n, NOBODY);
        if (c->size.rule == DSC_MOE_TOP2)
            experts[1] = best_without(logits, noise, n, experts[0]);
        else
            for (size_t j = 1; j < k; j++)
                experts[j] = next_best(logits, NULL, n, experts[j - 1]);
        if (c->used && !c->used[s])
            for (size_t j = 0; j < k; j++)
                experts[j] = NOBODY;
    }
}

/* me[e] = sum over tokens of gates[s][e], in token order, for a range of experts. */
struct column_sums {
    const struct dsc_moe_choice *choice;
    double *sums;
};
enum { COLUMNS = 8 };
static void sum_columns(void *context, size_t begin, size_t end) {
    const struct column_sums *c = context;
    const float *gates = c->choice->gates;
    size_t n = c->choice->size.n_experts;
    double sums[COLUMNS] = {0};
    for (size_t s = 0; s < c->choice->size.n_tokens; s++)
        for (size_t e = begin; e < end; e++)
            sums[e - begin] += (double)gates[s * n + e];
    memcpy(c->sums + begin, sums, (end - begin) * sizeof *sums);
}

/* l_aux = factor * sum over e of mean(gates[e]) * mean(mask[e]); the mask is of the first choices
 * in top-2 and of all others', so its factor is E, and E / k in top-k. */
static void measure_load(const struct dsc_moe_choice *c, const double *sums) {
    size_t n = c->size.n_experts, k = c->size.k, n_tokens = c->size.n_tokens;
    double loss = 0, per_token = n_tokens ? 1.0 / (double)n_tokens : 0;
    double factor = (double)n / (c->size.rule == DSC_MOE_TOPK ? (double)k : 1.0);
    memset(c->counts, 0, n * sizeof *c->counts);
    for (size_t i = 0; i < n_tokens * k; i += c->size.rule == DSC_MOE_TOP2 ? k : 1)
        if (c->experts[i] >= 0)
            c->counts[c->experts[i]]++;
    for (size_t e = 0; e < n; e++) {
        double slope = factor * ((double)c->counts[e] * per_token) * per_token;
        c->slope[e] = (float)slope;
        loss += slope * sums[e];
    }
    *c->l_aux = dsc_one_nan((float)loss);
    if (c->size.rule == DSC_MOE_TOP2)
        for (size_t i = 1; i < n_tokens * k; i += k)
            if (c->experts[i] >= 0)
                c->counts[c->experts[i]]++;
}

enum dsc_status dsc_moe_choose(struct dsc_pool *pool, const struct dsc_moe_choice *c) {
    struct dsc_moe_size size = c->size;
    double *sums;
    size.capacity = 0;
    DSC_TRY(check(&size));
    DSC_TRY(dsc_alloc(size.n_experts * sizeof *sums, (void **)&sums));
    struct column_sums columns = {c, sums};
    dsc_pool_run(pool, size.n_tokens, ROWS, choose_rows, (void *)c);
    dsc_pool_run(pool, size.n_experts, COLUMNS, sum_columns, &columns);
    measure_load(c, sums);
    dsc_free(sums);
    return DSC_OK;
}

/* ---- places ---- */

struct placing {
    const struct dsc_moe_placement *p;
    int32_t *list;  /* choices in order of experts, of each expert in order of places */
    size_t *starts; /* (E + 1): where each expert's begin */
};

static void list_choices(const struct placing *l) {
    const struct dsc_moe_placement *p = l->p;
    size_t n = p->size.n_experts, k = p->size.k, n_choices = p->size.n_tokens * k;
    bool firsts_first = p->size.rule == DSC_MOE_TOP2;
    l->starts[0] = 0;
    for (size_t e = 0; e < n; e++)
        l->starts[e + 1] = l->starts[e] + (size_t)p->counts[e];
    for (size_t round = 0; round < (firsts_first ? k : 1); round++)
        for (size_t i = round; i < n_choices; i += firsts_first ? k : 1) {
            if (p->experts[i] < 0)
                p->slots[i] = NOBODY;
            else
                l->list[l->starts[p->experts[i]]++] = (int32_t)i;
        }
    for (size_t e = n; e > 0; e--) /* each start has moved to the next one's */
        l->starts[e] = l->starts[e - 1];
    l->starts[0] = 0;
}

static uint32_t priority_of(const struct dsc_moe_placement *p, int32_t entry, size_t expert) {
    return rank_of(p->priority[(size_t)entry / p->size.k * p->size.n_experts + expert]);
}

/* The rank of the C-th largest of n > C > 0 priorities, and in *n_ties how many of that rank are
 * among the C largest: digit by digit from the top. */
static uint32_t smallest_kept(const struct dsc_moe_placement *p, const int32_t *list, size_t n,
                              size_t expert, size_t *n_ties) {
    uint32_t found = 0;
    size_t wanted = p->size.capacity;
    for (int shift = 24; shift >= 0; shift -= 8) {
        size_t histogram[256] = {0};
        uint32_t above = shift == 24 ? 0 : ~(uint32_t)0 << (shift + 8);
        for (size_t i = 0; i < n; i++) {
            uint32_t rank = priority_of(p, list[i], expert);
            histogram[rank >> shift & 255] += (rank & above) == found;
        }
        unsigned digit = 255;
        while (wanted > histogram[digit])
            wanted -= histogram[digit--];
        found |= (uint32_t)digit << shift;
    }
    *n_ties = wanted;
    return found;
}

static void place_expert(const struct placing *l, size_t expert) {
    const struct dsc_moe_placement *p = l->p;
    const int32_t *list = l->list + l->starts[expert];
    size_t n = l->starts[expert + 1] - l->starts[expert], capacity = p->size.capacity;
    size_t n_placed = 0, n_ties = 0, base = expert * capacity;
    bool ranked = p->drop == DSC_MOE_LARGEST && n > capacity && capacity > 0;
    uint32_t least = ranked ? smallest_kept(p, list, n, expert, &n_ties) : 0;
    for (size_t i = 0; i < n; i++) {
        bool kept = n_placed < capacity;
        if (ranked) {
            uint32_t rank = priority_of(p, list[i], expert);
            kept = rank > least || (rank == least && n_ties > 0);
            n_ties -= rank == least && n_ties > 0;
        }
        p->slots[list[i]] = kept ? (int32_t)(base + n_placed) : NOBODY;
        if (kept)
            p->entries[base + n_placed++] = list[i];
    }
    for (; n_placed < capacity; n_placed++)
        p->entries[base + n_placed] = NOBODY;
}

static void place_experts(void *context, size_t begin, size_t end) {
    for (size_t e = begin; e < end; e++)
        place_expert(context, e);
}

/* Gates of the choices that have a place, 0 for the others, and their sum, at least epsilon. */
static float kept_gates(const struct dsc_moe_size *z, const float *gates, const int32_t *experts,
                        const int32_t *slots, float *kept) {
    float sum = 0;
    for (size_t j = 0; j < z->k; j++) {
        kept[j] = slots[j] >= 0 ? gates[experts[j]] : 0.0f;
        sum += kept[j];
    }
    return sum;
}

static void weigh_rows(void *context, size_t begin, size_t end) {
    const struct dsc_moe_placement *p = context;
    size_t k = p->size.k;
    for (size_t s = begin; s < end; s++) {
        float *weights = p->weights + s * k;
        float sum = kept_gates(&p->size, p->gates + s * p->size.n_experts, p->experts + s * k,
                               p->slots + s * k, weights);
        if (p->size.rule == DSC_MOE_TOP1)
            continue;
        for (size_t j = 0; j < k; j++)
            weights[j] /= sum < FLT_EPSILON ? FLT_EPSILON : sum;
    }
}

enum dsc_status dsc_moe_place(struct dsc_pool *pool, const struct dsc_moe_placement *p) {
    struct placing placing = {p, NULL, NULL};
    size_t n = p->size.n_experts;
    DSC_TRY(check(&p->size));
    DSC_TRY(dsc_alloc((n + 1) * sizeof(size_t), (void **)&placing.starts));
    enum dsc_status status =
        dsc_alloc(p->size.n_tokens * p->size.k * sizeof(int32_t), (void **)&placing.list);
    if (status == DSC_OK) {
        list_choices(&placing);
        dsc_pool_run(pool, n, 1, place_experts, &placing);
        dsc_pool_run(pool, p->size.n_tokens, ROWS, weigh_rows, (void *)p);
    }
    dsc_free(placing.list);
    dsc_free(placing.starts);
    return status;
}

/* ---- gradient ---- */

/* d gates of one row, in `d`. With w_j = g_j / sum: d g_j = (dw_j - sum over i of dw_i w_i) / sum,
 * and without the second term where epsilon stands in for the sum. */
static void differentiate_weights(const struct dsc_moe_grad *g, size_t s, float *d) {
    size_t k = g->size.k, n = g->size.n_experts;
    const float *gates = g->gates + s * n, *d_weights = g->d_weights + s * k;
    const int32_t *experts = g->experts + s * k, *slots = g->slots + s * k;
    float sum = 1.0f, common = 0.0f;
    if (g->size.rule != DSC_MOE_TOP1) {
        float along = 0;
        sum = 0;
        for (size_t j = 0; j < k; j++)
            if (slots[j] >= 0) {
                sum += gates[experts[j]];
                along += d_weights[j] * gates[experts[j]];
            }
        common = sum < FLT_EPSILON ? 0.0f : along / sum;
        sum = sum < FLT_EPSILON ? FLT_EPSILON : sum;
    }
    for (size_t j = 0; j < k; j++)
        if (slots[j] >= 0)
            d[experts[j]] += (d_weights[j] - common) / sum;
}

static void differentiate_rows(void *context, size_t begin, size_t end) {
    const struct dsc_moe_grad *g = context;
    size_t n = g->size.n_experts;
    float d_l_aux = g->d_l_aux ? *g->d_l_aux : 0.0f;
    for (size_t s = begin; s < end; s++) {
        const float *gates = g->gates + s * n;
        float *d = g->d_logits + s * n;
        double mean = 0;
        for (size_t e = 0; e < n; e++)
            d[e] = d_l_aux * g->slope[e];
        if (g->d_weights)
            differentiate_weights(g, s, d);
        for (size_t e = 0; e < n; e++)
            mean += (double)gates[e] * (double)d[e];
        for (size_t e = 0; e < n; e++)
            d[e] = dsc_one_nan((float)((double)gates[e] * ((double)d[e] - mean)));
    }
}

enum dsc_status dsc_moe_differentiate(struct dsc_pool *pool, const struct dsc_moe_grad *g) {
    DSC_TRY(check(&g->size));
    dsc_pool_run(pool, g->size.n_tokens, ROWS, differentiate_rows, (void *)g);
    return DSC_OK;
}
