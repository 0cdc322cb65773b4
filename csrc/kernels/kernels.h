/* The table of element-wise maths, and the hyper-parameters that it takes.
 *
 * Decides: what a kernel is; which tier serves is decided once, in dispatch.c (DSC_ISA forces one).
 * Invariant: every tier gives the same bits for the same input (contract N2), given the state of
 * fpenv.h. Pointers need only the alignment of their element; n may be 0; buffers do not overlap
 * unless they are the same. A NaN that arithmetic gives is the positive quiet one without payload;
 * copies keep bits. */
#ifndef DSC_KERNELS_H
#define DSC_KERNELS_H

#include "../dsc.h"

/* One Adam or AdamW step. The factors are prepared in double by optim.c, once per group and step:
 * step_size = lr / c1, inv_sqrt_c2 = 1 / sqrt(c2), decay = lr * weight_decay (decoupled) or
 * weight_decay (L2), with c1 = 1 - beta1^t, c2 = 1 - beta2^t, or both 1 without bias correction.
 *   g = grad * grad_scale;  L2: g += decay * p
 *   m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g * g
 *   p -= (decoupled ? decay * p : 0) + step_size * m / (sqrt(v) * inv_sqrt_c2 + eps) */
struct dsc_adam {
    float grad_scale, step_size, beta1, one_minus_beta1, beta2, one_minus_beta2;
    float inv_sqrt_c2, eps, decay;
    bool decoupled;
};

/* One SGD step, torch.optim.SGD's rule:
 *   g = grad * grad_scale + weight_decay * p
 *   momentum != 0: buf = first ? g : momentum * buf + (1 - dampening) * g
 *                  g = nesterov ? g + momentum * buf : buf
 *   p -= lr * g */
struct dsc_sgd {
    float grad_scale, lr, momentum, one_minus_dampening, weight_decay;
    bool nesterov, first;
};

/* One Adagrad step; step_size = lr / (1 + (t - 1) * lr_decay).
 *   r = grad * grad_scale;  g = r + weight_decay * p;  sum += g * g
 *   p -= step_size * (raw_numerator ? r : g) / (sqrt(sum) + eps)
 * raw_numerator is DeepSpeedCPUAdagrad's rule; without it this is torch.optim.Adagrad's. */
struct dsc_adagrad {
    float grad_scale, step_size, weight_decay, eps;
    bool raw_numerator;
};

/* One Lion step; decay = lr * weight_decay.
 *   g = grad * grad_scale;  u = beta1 * m + (1 - beta1) * g
 *   p -= lr * sign(u) + decay * p;  m = beta2 * m + (1 - beta2) * g */
struct dsc_lion {
    float grad_scale, lr, beta1, one_minus_beta1, beta2, one_minus_beta2, decay;
};

/* One LAMB step, in two passes over a whole parameter; decay = weight_decay.
 *   lamb_moments: g = grad * grad_scale;  m = beta1 * m + (1 - beta1) * g
 *                 v = beta2 * v + (1 - beta2) * g * g
 *                 u = m / (eps_inside ? sqrt(v + eps) : sqrt(v) + eps) + decay * p
 *                 squares = of p and of u, as sum_squares
 *   lamb_step:    p -= step * u, with u as above
 * step = lr * sqrt(c2) / c1 * r with the trust ratio r = clamp(|p| / |u|) is made in between. */
struct dsc_lamb {
    float grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay;
    bool eps_inside;
};

struct dsc_kernels {
    const char *name; /* "scalar", "avx2", "avx512", "neon" */

    /* dst[i] = (first ? +0.0f : dst[i]) + (float)src[i]; indexed by training dtype */
    void (*accumulate[DSC_TRAIN_DTYPE_COUNT])(float *dst, const void *src, size_t n, bool first);
    /* dst[i] = (float)src[i] */
    void (*to_f32[DSC_TRAIN_DTYPE_COUNT])(float *dst, const void *src, size_t n);
    /* dst[i] = src[i] rounded to nearest even; DSC_F32 copies */
    void (*from_f32[DSC_TRAIN_DTYPE_COUNT])(void *dst, const float *src, size_t n);
    /* Copies and says whether every element is finite (the copy is complete either way). */
    bool (*copy_finite[DSC_TRAIN_DTYPE_COUNT])(void *dst, const void *src, size_t n);
    bool (*is_finite[DSC_TRAIN_DTYPE_COUNT])(const void *src, size_t n);

    /* Sum of squares in fp64: lane i mod 16 adds in index order, then the lanes in a fixed tree. */
    double (*sum_squares)(const float *x, size_t n);

    void (*adam)(float *p, float *m, float *v, const float *grad, size_t n,
                 const struct dsc_adam *h);
    /* buf may be NULL where momentum is 0 */
    void (*sgd)(float *p, float *buf, const float *grad, size_t n, const struct dsc_sgd *h);
    void (*adagrad)(float *p, float *sum, const float *grad, size_t n, const struct dsc_adagrad *h);
    void (*lion)(float *p, float *m, const float *grad, size_t n, const struct dsc_lion *h);
    void (*lamb_moments)(float *m, float *v, const float *p, const float *grad, size_t n,
                         const struct dsc_lamb *h, double squares[2]);
    void (*lamb_step)(float *p, const float *m, const float *v, size_t n, float step,
                      const struct dsc_lamb *h);

    /* acc[i] = (first ? 0 : acc[i]) + weight * x[i]; the first is the product itself, and acc is
     * not read then */
    void (*add_weighted)(float *acc, const float *x, float weight, size_t n, bool first);
    /* acc[i] += sum over r of weights[r] * x[r * stride + i], for n_rows rows in order: what so
     * many calls of add_weighted give, with acc kept in registers */
    void (*add_weighted_rows)(float *acc, const float *x, size_t stride, const float *weights,
                              size_t n_rows, size_t n);
    /* out[r] = sum of x[i] * rows[r * stride + i], n_rows of them: 16 fp32 lanes by i mod 16, then
     * one tree */
    void (*dot_rows)(float *out, const float *x, const float *rows, size_t stride, size_t n_rows,
                     size_t n);
    /* out[r] = softmax of the row x[r], for n_rows rows of n elements one behind the other; out may
     * be x. Elements below e^-87 of the row's largest are 0; a NaN or +inf makes its row NaN. The
     * sum is in fp64, in index order. */
    void (*softmax)(float *out, const float *x, size_t n_rows, size_t n);

    /* CRC32C of n_bytes, going on from the checksum of what came before (crc32c.h) */
    uint32_t (*crc32c)(uint32_t before, const void *data, size_t n_bytes);

    /* acc[i] = acc[i] op src[i] for collectives. acc is fp32 where the dtype is BF16 or F16, else
     * of the dtype itself. AVG adds (the caller divides). MIN and MAX propagate NaN. Integers wrap.
     */
    void (*combine[DSC_REDUCE_DTYPE_COUNT][DSC_OP_COUNT])(void *acc, const void *src, size_t n);
};

/* DSC_EINVAL where the environment's DSC_ISA names no tier of this machine and build; the fastest
 * serves then. The binding calls it at import, so that a forced tier is never silently another one.
 */
enum dsc_status dsc_kernels_check(void);
/* The chosen table; never NULL; the choice is made on first use and then stays. */
const struct dsc_kernels *dsc_kernels(void);
/* The table of a tier, or NULL where the build or this machine lacks it. */
const struct dsc_kernels *dsc_kernels_tier(const char *name);
/* Names of the tiers that this machine can run, NULL-terminated, slowest first. */
const char *const *dsc_kernels_tiers(void);

/* memcpy with stores that go around the caches (isa_stream.c); no tiers. */
void dsc__stream_copy(void *dst, const void *src, size_t n_bytes);

#endif
