/* Learning-rate schedules: pure functions of the step index.
 *
 * Decides: the formulas of WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle and LRRangeTest
 * (semantics: DeepSpeed's lr_schedules). Invariant: the same index gives the same rate, whatever
 * was called before. */
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

/* OneCycle: `first` steps from low to high, `second` back, then a decay that divides by 1 + rate *
 * d after every decay_step steps (none if 0). Stairs cut a half into so many levels; 0 or less:
 * smooth. */
struct dsc_lr_cycle {
    double first, second;
    int64_t first_stairs, second_stairs;
    double decay_step;
};

/* DSC_EINVAL names the parameter. */
enum dsc_status dsc_lr_cycle_check(const struct dsc_lr_cycle *cycle);
/* The rate at index i (-1 is construction): min to max and back, then min / (1 + rate * d). */
double dsc_lr_cycle_at(const struct dsc_lr_cycle *cycle, double min, double max, double decay_rate,
                       int64_t i);
/* The momentum at index i: max to min and back, then max * (1 + rate * d), which grows. */
double dsc_lr_cycle_mom_at(const struct dsc_lr_cycle *cycle, double min, double max,
                           double decay_rate, int64_t i);

/* LRRangeTest at index i: min * (1 + rate * k), k the share of n_step (at least 1) done, its whole
 * part with `staircase`. */
double dsc_lr_range_at(double min, int64_t n_step, double rate, bool staircase, int64_t i);

#endif
