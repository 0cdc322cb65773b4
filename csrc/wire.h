/* How a rank's contribution to a sum travels: the type it is rounded to, the division before the
 * sum.
 *
 * Decides: the arithmetic of communication_data_type, prescale_gradients and
 * gradient_predivide_factor. Invariant: a contribution that stays where it lies (an owner's own)
 * counts with the same bits as one that travelled, so that who owns an element changes nothing. */
#ifndef DSC_WIRE_H
#define DSC_WIRE_H

#include "dsc.h"

struct dsc_wire {
    bool narrow;          /* contributions are rounded to `dtype`, which has 16 bits */
    enum dsc_dtype dtype; /* with narrow */
    float divisor;        /* divides in fp32 before rounding; 0: nothing is divided */
};

/* The type in which values of type `from` travel; a wider one than theirs would change no bit. */
enum dsc_dtype dsc_wire_dtype(const struct dsc_wire *wire, enum dsc_dtype from);
/* dst (of type `to`: dsc_wire_dtype's, or fp32) = src (of type `from`) as it travels. */
void dsc_wire_pack(const struct dsc_wire *wire, void *dst, enum dsc_dtype to, const void *src,
                   enum dsc_dtype from, size_t n);
/* acc += src as it would have travelled in type `to`. */
void dsc_wire_add(const struct dsc_wire *wire, float *acc, enum dsc_dtype to, const void *src,
                  enum dsc_dtype from, size_t n);

#endif
