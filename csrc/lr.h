/* Learning-rate schedules: pure functions of the step index.
 *
 * Decides: the formulas of WarmupLR, WarmupDecayLR, WarmupCosineLR (semantics: DeepSpeed's
 * lr_schedules). Invariant: the same index gives the same rate, whatever was called before. */
#ifndef DSC_LR_H
#define DSC_LR_H

#include "dsc.h"

enum dsc_lr_kind { DSC_LR_WARMUP, DSC_LR_WARMUP_DECAY, DSC_LR_WARMUP_COSINE };
enum dsc_lr_ramp { DSC_LR_LOG, DSC_LR_LINEAR };

/* A plain value. min/max are rates for WARMUP and WARMUP_DECAY, ratios (of base) for the cosine:
 * min = warmup_min_ratio, max = cos_min_ratio there. */
struct dsc_lr {
    enum dsc_lr_kind kind;
    enum dsc_lr_ramp ramp;
    int64_t n_warmup; /* as given; max(2, n) is used */
    int64_t n_total;  /* WARMUP_DECAY, WARMUP_COSINE */
    double min, max;
};

/* DSC_EINVAL names the parameter: n_warmup must be positive, n_total too where it is used. */
enum dsc_status dsc_lr_check(const struct dsc_lr *schedule);
/* The rate at index i (-1 is construction). `base` is used by the cosine only. */
double dsc_lr_at(const struct dsc_lr *schedule, int64_t i, double base);

#endif
