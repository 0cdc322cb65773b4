/* The order in which an epoch visits its samples: a keyed permutation, evaluated position by
 * position.
 *
 * Decides: which sample stands at position i of epoch e under a seed. Invariant: a pure function of
 * (seed, epoch, n, i), the same on every machine, rank, world size and version of this library
 * (contract N6; golden values in tests/c/test_shuffle.c), in O(1) memory. */
#ifndef DSC_SHUFFLE_H
#define DSC_SHUFFLE_H

#include "dsc.h"

/* The sample at position i of the permutation of [0, n); positions wrap around: i is taken mod n,
 * so that an epoch padded to a multiple of the world size starts over. n == 0 gives 0. */
uint64_t dsc_shuffle_at(uint64_t seed, uint64_t epoch, uint64_t n, uint64_t i);

/* out[k] = sample at position start + k * stride, for k in [0, count). DSC_EINVAL when n is 0 and
 * count is not, n does not fit int64, or a position overflows 64 bits; `out` is untouched then. */
enum dsc_status dsc_shuffle_fill(uint64_t seed, uint64_t epoch, uint64_t n, uint64_t start,
                                 uint64_t stride, uint64_t count, int64_t *out);

#endif
