/* Copies that go around the caches, for results larger than they are.
 *
 * Decides: how a chunk reaches a large output. An ordinary store first reads the line that it
 * overwrites and evicts what the next chunk needs; a non-temporal store does neither (64 MiB from a
 * cached chunk, two cores: 8.6 ms with memcpy, 2.5 ms so). SSE2 is x86-64's baseline, so there is
 * nothing to choose. Invariant: the same bytes as memcpy, visible to other threads as after
 * ordinary stores. */
#include "kernels.h"

#include <string.h>

#if defined(__x86_64__)
#include <emmintrin.h>

void dsc__stream_copy(void *dst, const void *src, size_t n_bytes) {
    char *d = dst;
    const char *s = src;
    size_t head = dsc_min((size_t)(-(uintptr_t)d & 63), n_bytes);

    memcpy(d, s, head);
    size_t i = head;
    for (; n_bytes - i >= 64; i += 64) {
        __m128i a = _mm_loadu_si128((const __m128i *)(const void *)(s + i));
        __m128i b = _mm_loadu_si128((const __m128i *)(const void *)(s + i + 16));
        __m128i c = _mm_loadu_si128((const __m128i *)(const void *)(s + i + 32));
        __m128i e = _mm_loadu_si128((const __m128i *)(const void *)(s + i + 48));
        _mm_stream_si128((__m128i *)(void *)(d + i), a);
        _mm_stream_si128((__m128i *)(void *)(d + i + 16), b);
        _mm_stream_si128((__m128i *)(void *)(d + i + 32), c);
        _mm_stream_si128((__m128i *)(void *)(d + i + 48), e);
    }
    memcpy(d + i, s + i, n_bytes - i);
    /* Non-temporal stores are not ordered by a later release store without this. */
    _mm_sfence();
}
#else
void dsc__stream_copy(void *dst, const void *src, size_t n_bytes) {
    memcpy(dst, src, n_bytes);
}
#endif
