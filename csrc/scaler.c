/* The loss scale: when it halves, when it doubles.
 *
 * Decides: ZeRO's rule at every stage, with hysteresis. Invariant: the next scale is a function of
 * the value and of one bit per boundary step; a failed update changes nothing. Called by the engine
 * after it has unscaled with the scale that the gradients were made with. */
#include "scaler.h"

#include <assert.h>
#include <float.h>

void dsc_scaler_init_static(struct dsc_scaler *scaler, double scale) {
    *scaler = (struct dsc_scaler){.scale = scale, .min_scale = scale, .last_overflow = -1};
}

void dsc_scaler_init_dynamic(struct dsc_scaler *scaler, double initial, double min_scale,
                             int64_t window, int64_t hysteresis, bool consecutive_hysteresis) {
    assert(initial > 0 && min_scale > 0 && window > 0 && hysteresis > 0);
    *scaler = (struct dsc_scaler){.scale = initial,
                                  .dynamic = true,
                                  .consecutive_hysteresis = consecutive_hysteresis,
                                  .min_scale = min_scale,
                                  .window = window,
                                  .hysteresis = hysteresis,
                                  .hysteresis_left = hysteresis,
                                  .last_overflow = -1};
}

static enum dsc_status shrink(struct dsc_scaler *scaler) {
    if (scaler->hysteresis_left > 1) {
        scaler->hysteresis_left--;
        return DSC_OK;
    }
    if (scaler->scale <= scaler->min_scale && !scaler->stays_at_min)
        return DSC_FAIL(
            DSC_ESTATE,
            "gradients overflow fp16 although the loss scale is already at its minimum "
            "(%g): it cannot shrink further. Look for inf or NaN in the data and the "
            "loss, lower the learning rate, train in bf16, or lower fp16.min_loss_scale",
            scaler->min_scale);
    scaler->scale = scaler->scale / 2 > scaler->min_scale ? scaler->scale / 2 : scaler->min_scale;
    return DSC_OK;
}

static void grow(struct dsc_scaler *scaler) {
    if (scaler->consecutive_hysteresis)
        scaler->hysteresis_left = scaler->hysteresis;
    /* Counted from the step after the last overflow; before the first, last_overflow is -1, so that
     * the first growth too needs window + 1 clean steps. */
    const int64_t n_clean = scaler->iter - scaler->last_overflow - 1;
    if (n_clean <= 0 || n_clean % scaler->window != 0)
        return;
    scaler->hysteresis_left = scaler->hysteresis;
    if (scaler->scale <= DBL_MAX / 2)
        scaler->scale *= 2;
}

enum dsc_status dsc_scaler_update(struct dsc_scaler *scaler, bool overflow) {
    if (scaler->dynamic && overflow)
        DSC_TRY(shrink(scaler));
    if (scaler->dynamic && !overflow)
        grow(scaler);
    if (overflow)
        scaler->last_overflow = scaler->iter;
    scaler->iter++;
    return DSC_OK;
}
