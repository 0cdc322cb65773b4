/* The NEON tier of aarch64: loops.h at its baseline, and the fp16 conversion instructions, which
 * keep NaNs as cast.h does in the state of fpenv.h (no default NaN, IEEE half precision). The
 * instructions for CRC32C came with ARMv8.1; a machine of the baseline may lack them. */
#include "tier.h"

#if defined(__aarch64__)
#include <arm_acle.h>
#include <arm_neon.h>
#include <sys/auxv.h>

#include "cast.h"

DSC_TARGET_BEGIN("+crc")

#include "crc32c.h"

static inline uint32_t crc32c_8(uint32_t crc, uint64_t eight) {
    return __crc32cd(crc, eight);
}

static inline uint32_t crc32c_1(uint32_t crc, uint8_t one) {
    return __crc32cb(crc, one);
}

static uint32_t crc32c_by_instructions(uint32_t before, const void *data, size_t n_bytes) {
    return dsc_crc32c_three(before, data, n_bytes, crc32c_8, crc32c_1);
}

DSC_TARGET_END

static uint32_t crc32c(uint32_t before, const void *data, size_t n_bytes) {
    enum { HAS_CRC32 = 1 << 7 }; /* HWCAP_CRC32 of the kernel's ABI */
    return getauxval(AT_HWCAP) & HAS_CRC32 ? crc32c_by_instructions(before, data, n_bytes)
                                           : dsc__crc32c_table(before, data, n_bytes);
}

static void widen_f16(float *dst, const uint16_t *src, size_t n) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4)
        vst1q_f32(dst + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(src + i))));
    for (; i < n; i++)
        dst[i] = dsc_f32_of_f16(src[i]);
}

static void narrow_f16(uint16_t *dst, const float *src, size_t n) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4)
        vst1_u16(dst + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(src + i))));
    for (; i < n; i++)
        dst[i] = dsc_f16_of_f32(src[i]);
}

#define TIER neon
#define VECTOR_BYTES 16
#include "loops.h"
#endif
