/* This rank's own contribution to the sums, where it lies.
 *
 * Decides: which memory counts: fp32 sums over micro-steps where a parameter has been folded, else
 * the view's gradient, else nothing. Invariant: a source owns nothing and is valid for one call. */
#ifndef DSC_SOURCE_H
#define DSC_SOURCE_H

#include "space.h"
#include "wire.h"

struct dsc_source {
    const struct dsc_view *views; /* per parameter; may be NULL */
    const float *local;           /* over the space; NULL: no sums */
    const bool *folded;           /* per parameter; with local */
    const struct dsc_wire *wire;  /* how contributions travel: what is read here counts alike */
};
/* The part's values and their dtype, or NULL for nothing. */
const void *dsc_source_at(const struct dsc_source *source, const struct dsc_segment *segment,
                          size_t begin, enum dsc_dtype *dtype);
/* dst = the source over a range, as fp32, zero where there is nothing (and in padding). */
void dsc_source_read(const struct dsc_source *source, const struct dsc_space *space,
                     struct dsc_range range, float *dst);

#endif
