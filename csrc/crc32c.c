/* The checksum by the fastest loop of this machine. Invariant: as in the header. */
#include "crc32c.h"

#include "kernels/crc32c.h"
#include "kernels/kernels.h"

uint32_t dsc_crc32c(uint32_t before, const void *data, size_t n_bytes) {
    return dsc_kernels()->crc32c(before, data, n_bytes);
}

uint32_t dsc_crc32c_copy(void *dst, const void *src, size_t n_bytes) {
    enum { CHUNK = 24 * 1024 }; /* the copy finds it in the first cache */
    const struct dsc_kernels *kernels = dsc_kernels();
    uint32_t crc = 0;
    for (size_t at = 0; at < n_bytes; at += CHUNK) {
        size_t n = dsc_min(CHUNK, n_bytes - at);
        crc = kernels->crc32c(crc, (const char *)src + at, n);
        dsc__stream_copy((char *)dst + at, (const char *)src + at, n);
    }
    return crc;
}

/* a moves on by 8 * n bits: it is multiplied by x^(8 n), by squaring. */
uint32_t dsc_crc32c_join(uint32_t a, uint32_t b, size_t n_bytes_of_b) {
    uint32_t power = 0x00800000u; /* x^8 */
    for (size_t n = n_bytes_of_b; n > 0; n >>= 1) {
        if (n & 1)
            a = dsc_crc32c_times(power, a);
        power = dsc_crc32c_times(power, power);
    }
    return a ^ b;
}
