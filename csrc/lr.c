/* Learning-rate schedules as pure functions of the step index.
 *
 * Decides: the rate of WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle and LRRangeTest at index i
 * (formulas: semantics of DeepSpeed's lr_schedules). Invariant: no state, so resuming needs the
 * index and nothing else. Called by runtime/lr_schedules.py through the binding. */
#include "lr.h"

#include <math.h>

static const double PI = 3.14159265358979323846;

static bool needs_total(enum dsc_lr_kind kind) {
    return kind == DSC_LR_WARMUP_DECAY || kind == DSC_LR_WARMUP_COSINE;
}

enum dsc_status dsc_lr_check(const struct dsc_lr *schedule) {
    if ((unsigned)schedule->kind > DSC_LR_WARMUP_COSINE)
        return DSC_FAIL(DSC_EINVAL,
                        "schedule kind %d is not one of 0 (WarmupLR), 1 "
                        "(WarmupDecayLR), 2 (WarmupCosineLR)",
                        (int)schedule->kind);
    if ((unsigned)schedule->ramp > DSC_LR_LINEAR)
        return DSC_FAIL(DSC_EINVAL, "warm-up ramp %d is not one of 0 (log), 1 (linear)",
                        (int)schedule->ramp);
    if (schedule->n_warmup < 1)
        return DSC_FAIL(DSC_EINVAL, "warmup_num_steps must be a positive integer, got %lld",
                        (long long)schedule->n_warmup);
    if (needs_total(schedule->kind) && schedule->n_total < 1)
        return DSC_FAIL(DSC_EINVAL, "total_num_steps must be a positive integer, got %lld",
                        (long long)schedule->n_total);
    const bool cosine = schedule->kind == DSC_LR_WARMUP_COSINE;
    if (!isfinite(schedule->min))
        return DSC_FAIL(DSC_EINVAL, "%s must be finite, got %g",
                        cosine ? "warmup_min_ratio" : "warmup_min_lr", schedule->min);
    if (!isfinite(schedule->max))
        return DSC_FAIL(DSC_EINVAL, "%s must be finite, got %g",
                        cosine ? "cos_min_ratio" : "warmup_max_lr", schedule->max);
    return DSC_OK;
}

/* Two at least, because the logarithmic ramp divides by ln(w). */
static int64_t warmup_count(const struct dsc_lr *schedule) {
    return schedule->n_warmup < 2 ? 2 : schedule->n_warmup;
}

/* Share of the warm-up done at 0 <= i < w: ln(i+1)/ln(w), which is 1 at i = w-1, or i/w. */
static double ramp_at(const struct dsc_lr *schedule, int64_t i) {
    const double w = (double)warmup_count(schedule);
    if (schedule->ramp == DSC_LR_LINEAR)
        return (double)i / w;
    return log((double)i + 1.0) / log(w);
}

/* T - w, at least 1, so that a schedule whose warm-up is its whole length has no division by zero.
 */
static double n_after_warmup(const struct dsc_lr *schedule) {
    return fmax(1.0, (double)schedule->n_total - (double)warmup_count(schedule));
}

static double cosine_ratio(const struct dsc_lr *schedule, int64_t i) {
    if (i < warmup_count(schedule))
        return schedule->min + (1.0 - schedule->min) * ramp_at(schedule, i);
    const double done = (double)i - (double)warmup_count(schedule) + 1.0;
    const double progress = fmin(1.0, done / n_after_warmup(schedule));
    const double wave = (1.0 + cos(PI * progress)) / 2.0;
    return fmax(0.0, schedule->max + (1.0 - schedule->max) * wave);
}

static double warmup_share(const struct dsc_lr *schedule, int64_t i) {
    if (i < warmup_count(schedule))
        return ramp_at(schedule, i);
    if (schedule->kind == DSC_LR_WARMUP)
        return 1.0;
    return fmax(0.0, ((double)schedule->n_total - (double)i) / n_after_warmup(schedule));
}

double dsc_lr_at(const struct dsc_lr *schedule, int64_t i, double base) {
    const bool cosine = schedule->kind == DSC_LR_WARMUP_COSINE;
    if (i < 0)
        return cosine ? 0.0 : schedule->min;
    if (cosine)
        return base * cosine_ratio(schedule, i);
    return schedule->min + (schedule->max - schedule->min) * warmup_share(schedule, i);
}

enum dsc_status dsc_lr_cycle_check(const struct dsc_lr_cycle *cycle) {
    if (!(cycle->first > 0) || !isfinite(cycle->first))
        return DSC_FAIL(DSC_EINVAL, "cycle_first_step_size must be positive and finite, got %g",
                        cycle->first);
    if (!(cycle->second >= 0) || !isfinite(cycle->second))
        return DSC_FAIL(DSC_EINVAL,
                        "cycle_second_step_size must be finite and not negative, got %g",
                        cycle->second);
    if (!(cycle->decay_step >= 0) || !isfinite(cycle->decay_step))
        return DSC_FAIL(DSC_EINVAL, "decay_step_size must be finite and not negative, got %g",
                        cycle->decay_step);
    return DSC_OK;
}

/* Height in the cycle, 0 to 1 and back to 0. fmod is exact, so whole step sizes meet their stairs
 * and ends exactly, in every cycle. */
static double cycle_share(const struct dsc_lr_cycle *cycle, int64_t i) {
    const double phase = fmod((double)i + 1.0, cycle->first + cycle->second);
    const bool rising = phase <= cycle->first;
    const double done = rising ? phase : cycle->first + cycle->second - phase;
    const double length = rising ? cycle->first : cycle->second;
    const int64_t n_stairs = rising ? cycle->first_stairs : cycle->second_stairs;
    if (n_stairs > 0)
        return floor(done * (double)n_stairs / length) / (double)n_stairs;
    return done / length;
}

static bool in_cycle(const struct dsc_lr_cycle *cycle, int64_t i) {
    return (double)i < cycle->first + cycle->second;
}

/* 1 + rate * d after the cycle, d the decay steps done; 1 without a decay. */
static double decay_growth(const struct dsc_lr_cycle *cycle, double rate, int64_t i) {
    if (cycle->decay_step == 0)
        return 1.0;
    return 1.0 + rate * ((double)i - (cycle->first + cycle->second) + 1.0) / cycle->decay_step;
}

double dsc_lr_cycle_at(const struct dsc_lr_cycle *cycle, double min, double max, double decay_rate,
                       int64_t i) {
    if (in_cycle(cycle, i))
        return min + (max - min) * cycle_share(cycle, i);
    return min / decay_growth(cycle, decay_rate, i);
}

double dsc_lr_cycle_mom_at(const struct dsc_lr_cycle *cycle, double min, double max,
                           double decay_rate, int64_t i) {
    if (in_cycle(cycle, i))
        return max - (max - min) * cycle_share(cycle, i);
    return max * decay_growth(cycle, decay_rate, i);
}

double dsc_lr_range_at(double min, int64_t n_step, double rate, bool staircase, int64_t i) {
    const double done = ((double)i + 1.0) / (double)n_step;
    return min * (1.0 + rate * (staircase ? floor(done) : done));
}
