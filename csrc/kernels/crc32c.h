/* CRC32C where there are instructions for it, which have a latency of three cycles and start one in
 * each: three parts of a block at once, joined by arithmetic modulo the polynomial.
 *
 * Polynomials over GF(2) are reflected: bit 31 of a word is x^0. Invariant: the same value as
 * dsc__crc32c_table for every input. Included by tier files, inside their target. */
#ifndef DSC_KERNELS_CRC32C_H
#define DSC_KERNELS_CRC32C_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define DSC_CRC32C_POLYNOMIAL 0x82F63B78u
enum { DSC_CRC32C_PART = 8192 };
/* x^(8 * DSC_CRC32C_PART): what so many zero bytes multiply a remainder by. */
#define DSC_CRC32C_AFTER_PART 0x28461564u

/* By table, eight bytes at a time; every machine has it. */
uint32_t dsc__crc32c_table(uint32_t before, const void *data, size_t n_bytes);

/* a * b modulo the polynomial. */
static inline uint32_t dsc_crc32c_times(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (int bit = 31; bit >= 0; bit--) {
        product ^= b & (0u - (a >> bit & 1));
        b = b >> 1 ^ (DSC_CRC32C_POLYNOMIAL & (0u - (b & 1)));
    }
    return product;
}

/* One instruction's work. */
typedef uint32_t dsc_crc32c_step8(uint32_t crc, uint64_t eight);
typedef uint32_t dsc_crc32c_step1(uint32_t crc, uint8_t one);

static inline uint64_t dsc_crc32c_load(const unsigned char *bytes) {
    uint64_t eight;
    memcpy(&eight, bytes, sizeof eight);
    return eight;
}

/* step8, step1: the instructions. */
static inline __attribute__((always_inline)) uint32_t
dsc_crc32c_three(uint32_t before, const void *data, size_t n_bytes, dsc_crc32c_step8 *step8,
                 dsc_crc32c_step1 *step1) {
    enum { PART = DSC_CRC32C_PART };
    const unsigned char *at = data;
    uint32_t crc = ~before;
    for (; n_bytes >= 3 * PART; n_bytes -= 3 * PART, at += 3 * PART) {
        uint32_t second = 0, third = 0;
        for (size_t i = 0; i < PART; i += 8) {
            crc = step8(crc, dsc_crc32c_load(at + i));
            second = step8(second, dsc_crc32c_load(at + PART + i));
            third = step8(third, dsc_crc32c_load(at + 2 * PART + i));
        }
        crc = dsc_crc32c_times(DSC_CRC32C_AFTER_PART, crc) ^ second;
        crc = dsc_crc32c_times(DSC_CRC32C_AFTER_PART, crc) ^ third;
    }
    for (; n_bytes >= 8; n_bytes -= 8, at += 8)
        crc = step8(crc, dsc_crc32c_load(at));
    for (; n_bytes > 0; n_bytes--, at++)
        crc = step1(crc, *at);
    return ~crc;
}

#endif
