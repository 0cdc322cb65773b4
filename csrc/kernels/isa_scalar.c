/* The tier that every machine has: plain C at the baseline of the ABI (SSE2 on x86-64). It is the
 * truth that the other tiers are tested against. */
#include "tier.h"

#include "cast.h"

static void widen_f16(float *dst, const uint16_t *src, size_t n) {
    DSC_IVDEP
    for (size_t i = 0; i < n; i++)
        dst[i] = dsc_f32_of_f16(src[i]);
}

static void narrow_f16(uint16_t *dst, const float *src, size_t n) {
    DSC_IVDEP
    for (size_t i = 0; i < n; i++)
        dst[i] = dsc_f16_of_f32(src[i]);
}

#define TIER scalar
#define VECTOR_BYTES 16
#include "loops.h"
