/* The global gradient norm and the factor that clips it.
 *
 * Decides: how partial sums of squares combine. Invariant: the result does not depend on the order,
 * the number of ranks, threads or tiers (contract N2): partial fp64 sums go into a fixed-point
 * number that is wide enough for any count of finite fp32 squares, so addition is exact and has no
 * order. */
#ifndef DSC_CLIP_H
#define DSC_CLIP_H

#include "dsc.h"

/* Fixed point, little-endian words, lowest bit 2^-320; 10 words reach 2^320. A plain value: copy
 * it, send it as bytes, zero it to start. */
enum { DSC_NORM_WORDS = 10 };
struct dsc_norm {
    uint64_t word[DSC_NORM_WORDS];
    uint64_t n_nonfinite; /* partial sums that were inf or NaN and are not in `word` */
};

/* Adds a partial sum of squares (>= 0, or inf/NaN, which is counted apart). */
void dsc_norm_add(struct dsc_norm *norm, double sum_squares);
/* into += from */
void dsc_norm_merge(struct dsc_norm *into, const struct dsc_norm *from);
/* The exact sum rounded once to double (to nearest); +inf beyond double's range; NaN where
 * n_nonfinite > 0. */
double dsc_norm_sum(const struct dsc_norm *norm);
/* Factor for gradients of norm `norm`: 1 where clip <= 0 or norm <= clip - 1e-6, else
 * clip / (norm + 1e-6), as torch.nn.utils.clip_grad_norm_. NaN norm gives NaN. */
double dsc_clip_factor(double norm, double clip);

#endif
