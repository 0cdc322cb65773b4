/* The gate's linear map, M features to few experts, forward and backward: a matrix product so
 * narrow that it is memory traffic. x is read once each way; the gradient of the weight is summed
 * in blocks of tokens, each in registers, one thread to a range of columns. */
#include "kernels/kernels.h"
#include "moe.h"

#include <string.h>

enum { PIECE_ROWS = 32, CHUNK = 512, COLUMNS = 128, TOKENS = 64 };

struct job {
    const struct dsc_moe_linear *l;
    float *logits;
    const float *d_logits;
    char *d_x;
    bool add;
    float *d_weight;
};

static const float *row_chunk(const struct dsc_moe_linear *l, size_t token, size_t at, size_t n,
                              float *scratch) {
    const char *begin = (const char *)l->x + (token * l->n_columns + at) * dsc_dtype_size(l->dtype);
    if (l->dtype == DSC_F32)
        return (const float *)(const void *)begin;
    dsc_kernels()->to_f32[l->dtype](scratch, begin, n);
    return scratch;
}

/* A row longer than a chunk is the sum of its chunks. */
static void logits_of_rows(void *context, size_t begin, size_t end) {
    const struct job *job = context;
    const struct dsc_moe_linear *l = job->l;
    const struct dsc_kernels *kernels = dsc_kernels();
    float wide[CHUNK], part[CHUNK];
    for (size_t s = begin; s < end; s++) {
        float *logits = job->logits + s * l->n_experts;
        memset(logits, 0, l->n_experts * sizeof *logits);
        for (size_t at = 0; at < l->n_columns; at += CHUNK) {
            size_t n = dsc_min(CHUNK, l->n_columns - at);
            const float *x = row_chunk(l, s, at, n, wide);
            for (size_t e = 0; e < l->n_experts; e += CHUNK) {
                size_t n_rows = dsc_min(CHUNK, l->n_experts - e);
                kernels->dot_rows(part, x, l->weight + e * l->n_columns + at, l->n_columns, n_rows,
                                  n);
                kernels->accumulate[DSC_F32](logits + e, part, n_rows, at == 0);
            }
        }
    }
}

static enum dsc_status check(const struct dsc_moe_linear *l) {
    if ((int)l->dtype >= (int)DSC_TRAIN_DTYPE_COUNT)
        return DSC_FAIL(DSC_ETYPE, "tokens of %s; allowed: fp32, bf16, fp16",
                        dsc_dtype_name(l->dtype));
    return DSC_OK;
}

enum dsc_status dsc_moe_logits(struct dsc_pool *pool, const struct dsc_moe_linear *l,
                               float *logits) {
    struct job job = {.l = l, .logits = logits};
    DSC_TRY(check(l));
    dsc_pool_run(pool, l->n_tokens, PIECE_ROWS, logits_of_rows, &job);
    return DSC_OK;
}

static void d_x_of_rows(void *context, size_t begin, size_t end) {
    const struct job *job = context;
    const struct dsc_moe_linear *l = job->l;
    const struct dsc_kernels *kernels = dsc_kernels();
    size_t size = dsc_dtype_size(l->dtype);
    float wide[CHUNK];
    for (size_t s = begin; s < end; s++) {
        for (size_t at = 0; at < l->n_columns; at += CHUNK) {
            size_t n = dsc_min(CHUNK, l->n_columns - at);
            char *d_x = job->d_x + (s * l->n_columns + at) * size;
            float *sum = l->dtype == DSC_F32 ? (float *)(void *)d_x : wide;
            if (!job->add)
                memset(sum, 0, n * sizeof *sum);
            else if (l->dtype != DSC_F32)
                kernels->to_f32[l->dtype](wide, d_x, n);
            kernels->add_weighted_rows(sum, l->weight + at, l->n_columns,
                                       job->d_logits + s * l->n_experts, l->n_experts, n);
            if (l->dtype != DSC_F32)
                kernels->from_f32[l->dtype](d_x, wide, n);
        }
    }
}

/* Columns [at, at + n) of d_weight from the tokens [token, token + n_tokens). */
static void add_block(const struct job *job, size_t token, size_t n_tokens, size_t at, size_t n) {
    const struct dsc_moe_linear *l = job->l;
    const struct dsc_kernels *kernels = dsc_kernels();
    float wide[TOKENS * COLUMNS], sum[COLUMNS], weights[TOKENS];
    const float *x = row_chunk(l, token, at, n, wide);
    size_t stride = l->dtype == DSC_F32 ? l->n_columns : COLUMNS;
    for (size_t s = 1; s < n_tokens && l->dtype != DSC_F32; s++)
        (void)row_chunk(l, token + s, at, n, wide + s * COLUMNS);
    for (size_t e = 0; e < l->n_experts; e++) {
        for (size_t s = 0; s < n_tokens; s++)
            weights[s] = job->d_logits[(token + s) * l->n_experts + e];
        memset(sum, 0, sizeof sum);
        kernels->add_weighted_rows(sum, x, stride, weights, n_tokens, n);
        kernels->accumulate[DSC_F32](job->d_weight + e * l->n_columns + at, sum, n, token == 0);
    }
}

static void d_weight_of_columns(void *context, size_t begin, size_t end) {
    const struct job *job = context;
    for (size_t token = 0; token < job->l->n_tokens; token += TOKENS)
        add_block(job, token, dsc_min(TOKENS, job->l->n_tokens - token), begin, end - begin);
}

enum dsc_status dsc_moe_logits_backward(struct dsc_pool *pool, const struct dsc_moe_linear *l,
                                        const float *d_logits, void *d_x, bool add,
                                        float *d_weight) {
    struct job job = {.l = l, .d_logits = d_logits, .d_x = d_x, .add = add, .d_weight = d_weight};
    DSC_TRY(check(l));
    if (d_x)
        dsc_pool_run(pool, l->n_tokens, PIECE_ROWS, d_x_of_rows, &job);
    if (d_weight && l->n_tokens == 0)
        memset(d_weight, 0, l->n_experts * l->n_columns * sizeof *d_weight);
    else if (d_weight)
        dsc_pool_run(pool, l->n_columns, COLUMNS, d_weight_of_columns, &job);
    return DSC_OK;
}
