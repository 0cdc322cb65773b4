/* The tier that every machine has: plain C at the baseline of the ABI (SSE2 on x86-64). It is the
 * truth that the other tiers are tested against. */
#include "tier.h"

#include "cast.h"
#include "crc32c.h"

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

static uint32_t crc32c(uint32_t before, const void *data, size_t n_bytes) {
    return dsc__crc32c_table(before, data, n_bytes);
}

#define TIER scalar
#define VECTOR_BYTES 16
#include "loops.h"
