/* The loss scale of fp16 training: static or dynamic.
 *
 * Decides: when the scale halves and doubles (semantics.md section 2, ZeRO's rule at every stage).
 * Invariant: a plain value; gradients made with a scale are unscaled with that scale, because the
 * engine reads `scale` before it calls update. */
#ifndef DSC_SCALER_H
#define DSC_SCALER_H

#include "dsc.h"

struct dsc_scaler {
    double scale;
    bool dynamic;
    bool consecutive_hysteresis;
    bool stays_at_min; /* where it would fail to shrink */
    double min_scale;
    int64_t window;
    int64_t hysteresis; /* as configured */
    int64_t hysteresis_left;
    int64_t iter;          /* boundary steps seen */
    int64_t last_overflow; /* index of the last overflow, -1 before */
};

/* A scale that update() leaves alone. */
void dsc_scaler_init_static(struct dsc_scaler *scaler, double scale);
/* All numbers positive (the configuration has checked them); `initial` is the first scale. */
void dsc_scaler_init_dynamic(struct dsc_scaler *scaler, double initial, double min_scale,
                             int64_t window, int64_t hysteresis, bool consecutive_hysteresis);
/* Once per boundary step, after unscaling. DSC_ESTATE when the scale is at its minimum and must
 * shrink (the value is unchanged then, and the text says what to do). */
enum dsc_status dsc_scaler_update(struct dsc_scaler *scaler, bool overflow);

#endif
