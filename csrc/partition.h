/* Who owns which elements of a space. Pure arithmetic.
 *
 * Decides: the range of each rank. Invariant: ranges are whole norm blocks, cover the space in rank
 * order without gap or overlap, and differ by at most one block. */
#ifndef DSC_PARTITION_H
#define DSC_PARTITION_H

#include "dsc.h"

struct dsc_range {
    size_t begin, end;
};

static inline size_t dsc_range_size(struct dsc_range range) {
    return range.end - range.begin;
}

/* The overlap of two ranges; empty (begin == end) where they do not meet. */
static inline struct dsc_range dsc_range_cut(struct dsc_range a, struct dsc_range b) {
    struct dsc_range cut = {dsc_max(a.begin, b.begin), dsc_min(a.end, b.end)};
    if (cut.end < cut.begin)
        cut.end = cut.begin;
    return cut;
}

/* The elements of `rank` of `size` in a space of n_elems, which is a multiple of DSC_BLOCK. */
struct dsc_range dsc_partition_range(size_t n_elems, int rank, int size);

#endif
