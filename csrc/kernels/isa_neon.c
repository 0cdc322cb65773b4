/* The NEON tier of aarch64: loops.h at its baseline, and the fp16 conversion instructions, which
 * keep NaNs as cast.h does in the state of fpenv.h (no default NaN, IEEE half precision). */
#include "tier.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include "cast.h"

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
