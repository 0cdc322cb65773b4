/* The AVX2 tier: loops.h with 32-byte vectors, and F16C for fp16. */
#include "tier.h"

#if defined(__x86_64__)
#include <immintrin.h>

DSC_TARGET_BEGIN("avx2,f16c")

#include "cast.h"
#include "crc32c_x86.h"

static void widen_f16(float *dst, const uint16_t *src, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(src + i))));
    for (; i < n; i++)
        dst[i] = dsc_f32_of_f16(src[i]);
}

static void narrow_f16(uint16_t *dst, const float *src, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(dst + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < n; i++)
        dst[i] = dsc_f16_of_f32(src[i]);
}

#define TIER avx2
#define VECTOR_BYTES 32
#include "loops.h"

DSC_TARGET_END
#endif
