/* Routing of tokens to experts, and moving their rows there and back. moe_logits.c, moe.c and
 * moe_rows.c have the three parts below.
 *
 * Decides: which experts a token goes to, which of its choices find a place, and what each weighs.
 * S tokens, E experts, k choices per token, C places per expert (the capacity). A choice is the
 * entry s * k + j of the arrays (S, k); a place is the slot e * C + position.
 * Invariant: no array is larger than the tokens and places themselves (nothing is S x E x C), and
 * results depend on values only, never on threads. Ties: the lower expert wins a token, the earlier
 * token (and the earlier choice) a place. Logits are compared, not their softmax, whose rounding
 * makes ties; -0 equals +0, NaN is above everything. Calls borrow their arrays. */
#ifndef DSC_MOE_H
#define DSC_MOE_H

#include "pool.h"

/* How experts are chosen and weighed; docs/moe.md has the formulas. */
enum dsc_moe_rule { DSC_MOE_TOP1, DSC_MOE_TOP2, DSC_MOE_TOPK };

/* Who finds a place where more than C chose an expert. */
enum dsc_moe_drop {
    DSC_MOE_FIRST,   /* the earlier token */
    DSC_MOE_LARGEST, /* the larger `priority` */
};

/* The sizes of one call; every function checks them: k in [1, E] (1, 2 for those rules), S * k and
 * E * C below 2^31, else DSC_EINVAL. */
struct dsc_moe_size {
    enum dsc_moe_rule rule;
    size_t n_tokens, n_experts, k, capacity;
};

/* ---- logits ---- */

/* logits = x . weight^T in fp32: what of a model's dtype comes is widened where it is read. */
struct dsc_moe_linear {
    size_t n_tokens, n_columns, n_experts;
    const void *x; /* (S, M) */
    enum dsc_dtype dtype;
    const float *weight; /* (E, M) */
};
enum dsc_status dsc_moe_logits(struct dsc_pool *pool, const struct dsc_moe_linear *l,
                               float *logits);
/* d_x (S, M) in x's dtype: increased by d_logits . weight (`add`) or set to it; d_weight (E, M):
 * set. Each may be NULL: not wanted. */
enum dsc_status dsc_moe_logits_backward(struct dsc_pool *pool, const struct dsc_moe_linear *l,
                                        const float *d_logits, void *d_x, bool add,
                                        float *d_weight);

/* ---- gates ---- */

struct dsc_moe_choice {
    struct dsc_moe_size size; /* capacity is not looked at */
    const float *logits;      /* (S, E) */
    const float *noise;       /* (S, E), added to the logits that choose: the expert of top-1, the
                               * second of top-2; NULL for none */
    const int32_t *used;      /* (S), 0 where a token takes no part; NULL: all do */
    float *gates;             /* out (S, E): softmax of the logits */
    int32_t *experts;         /* out (S, k): best first; -1 where the token takes no part */
    int64_t *counts;          /* out (E): choices before any is dropped */
    float *slope;             /* out (E): d l_aux / d gates[s][e], the same for every s */
    float *l_aux;             /* out: the loss of unequal load, 0 without tokens */
};
/* Softmax, choice, load. */
enum dsc_status dsc_moe_choose(struct dsc_pool *pool, const struct dsc_moe_choice *c);

struct dsc_moe_placement {
    struct dsc_moe_size size;
    enum dsc_moe_drop drop;
    const float *gates;
    const int32_t *experts;
    const int64_t *counts;
    const float *priority; /* (S, E) for DSC_MOE_LARGEST */
    int32_t *slots;        /* out (S, k); -1 where dropped or not used */
    int32_t *entries;      /* out (E * C): the choice in each place, -1 for none */
    float *weights;        /* out (S, k); 0 where slots is -1 */
};
/* Gives choices their places: in token order; in top-2 all first choices before all second ones.
 * DSC_ENOMEM is the only other failure. */
enum dsc_status dsc_moe_place(struct dsc_pool *pool, const struct dsc_moe_placement *p);

struct dsc_moe_grad {
    struct dsc_moe_size size;
    const float *gates;
    const int32_t *experts, *slots;
    const float *slope;
    const float *d_weights, *d_l_aux; /* (S, k), one number; NULL is zero */
    float *d_logits;                  /* out (S, E) */
};
/* The gradient of weights and l_aux in the logits; choices and drops are constants. */
enum dsc_status dsc_moe_differentiate(struct dsc_pool *pool, const struct dsc_moe_grad *g);

/* ---- rows: of the types that a model may train in, DSC_ETYPE for others ---- */

/* Where the places' rows are: n_parts pieces of memory, each (n_ranks, C, M). Expert e = r *
 * n_parts + j has its C rows in piece j at rank r. */
struct dsc_moe_parts {
    void *const *data;
    size_t n_parts, n_ranks;
    enum dsc_dtype dtype;
};

struct dsc_moe_rows {
    struct dsc_moe_size size;
    size_t n_columns; /* M */
    const int32_t *slots, *entries;
    struct dsc_moe_parts parts;
    enum dsc_dtype dtype; /* of the tokens' rows */
};

/* parts[place] = x[token of that place], zero where nobody has it; one dtype on both sides. */
enum dsc_status dsc_moe_dispatch(struct dsc_pool *pool, const struct dsc_moe_rows *rows,
                                 const void *x);
/* out[token] = sum over its choices j in order of weights[j] * parts[place of j]: fp32 products and
 * sums, rounded once. weights NULL: 1. Without a place the row is zero. */
enum dsc_status dsc_moe_combine(struct dsc_pool *pool, const struct dsc_moe_rows *rows,
                                const float *weights, void *out);
/* The backward of combine with weights. d_parts[place] = weights * d_out[token], zero where nobody
 * has it; d_weights[j] = d_out[token] . parts[place of j], 0 without a place. d_parts
 * is like rows->parts, data NULL: not wanted; d_weights NULL: not wanted. */
enum dsc_status dsc_moe_combine_backward(struct dsc_pool *pool, const struct dsc_moe_rows *rows,
                                         const float *weights, const void *d_out,
                                         void *const *d_parts, float *d_weights);

#endif
