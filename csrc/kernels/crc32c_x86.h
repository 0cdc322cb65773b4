/* CRC32C by SSE4.2's instructions, for the tiers of x86-64 that have them; each includes it once,
 * after <immintrin.h>. Invariant: see crc32c.h. */
#ifndef DSC_KERNELS_CRC32C_X86_H
#define DSC_KERNELS_CRC32C_X86_H

#include "crc32c.h"

static inline uint32_t crc32c_8(uint32_t crc, uint64_t eight) {
    return (uint32_t)_mm_crc32_u64(crc, eight);
}

static inline uint32_t crc32c_1(uint32_t crc, uint8_t one) {
    return _mm_crc32_u8(crc, one);
}

static uint32_t crc32c(uint32_t before, const void *data, size_t n_bytes) {
    return dsc_crc32c_three(before, data, n_bytes, crc32c_8, crc32c_1);
}

#endif
