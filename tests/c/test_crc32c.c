/* CRC32C: known values, a reference that takes one bit at a time, and every tier of the machine. */
#include "crc32c.h"

#include "case.h"
#include "kernels/kernels.h"

enum { ROOM = 4 * 3 * 8192 };
static unsigned char bytes[ROOM + 64];

static uint32_t by_bits(uint32_t before, const unsigned char *data, size_t n) {
    uint32_t crc = ~before;
    for (size_t i = 0; i < n; i++) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0x82F63B78u : 0);
    }
    return ~crc;
}

static void fill_bytes(void) {
    for (size_t i = 0; i < sizeof bytes; i++)
        bytes[i] = (unsigned char)(i * 31 % 251 ^ i >> 8);
}

/* Of RFC 3720, appendix B.4, and the usual check value. */
static void known_values_come_out(void) {
    unsigned char block[32];
    CHECK_EQ_INT(dsc_crc32c(0, "123456789", 9), 0xE3069283);
    CHECK_EQ_INT(dsc_crc32c(0, "", 0), 0);
    memset(block, 0, sizeof block);
    CHECK_EQ_INT(dsc_crc32c(0, block, 32), 0x8A9136AA);
    memset(block, 0xFF, sizeof block);
    CHECK_EQ_INT(dsc_crc32c(0, block, 32), 0x62A8AB43);
    for (int i = 0; i < 32; i++)
        block[i] = (unsigned char)i;
    CHECK_EQ_INT(dsc_crc32c(0, block, 32), 0x46DD794E);
}

static void every_tier_gives_what_one_bit_at_a_time_gives(void) {
    static const size_t sizes[] = {63,    64,    65,    1000,  8191,  8192,  24575, 24576,
                                   24577, 24584, 32768, 49151, 49152, 50000, ROOM};
    fill_bytes();
    for (const char *const *tier = dsc_kernels_tiers(); *tier; tier++) {
        const struct dsc_kernels *kernels = dsc_kernels_tier(*tier);
        for (size_t offset = 0; offset < 9; offset++) {
            for (size_t n = 0; n < 40; n++)
                CHECK_EQ_INT(kernels->crc32c(7, bytes + offset, n), by_bits(7, bytes + offset, n));
            for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
                CHECK_EQ_INT(kernels->crc32c(0, bytes + offset, sizes[i]),
                             by_bits(0, bytes + offset, sizes[i]));
        }
    }
}

static void a_checksum_goes_on_where_another_ended(void) {
    fill_bytes();
    uint32_t whole = dsc_crc32c(0, bytes, ROOM);
    for (size_t cut = 0; cut <= ROOM; cut += 977) {
        uint32_t a = dsc_crc32c(0, bytes, cut), b = dsc_crc32c(0, bytes + cut, ROOM - cut);
        CHECK_EQ_INT(dsc_crc32c(a, bytes + cut, ROOM - cut), whole);
        CHECK_EQ_INT(dsc_crc32c_join(a, b, ROOM - cut), whole);
    }
    CHECK_EQ_INT(dsc_crc32c_join(whole, 0, 0), whole);
}

static void a_copy_is_the_same_bytes_and_their_checksum(void) {
    static unsigned char copy[ROOM + 64];
    static const size_t sizes[] = {0, 1, 24575, 24576, 24577, ROOM};
    fill_bytes();
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        memset(copy, 0xAA, sizeof copy);
        CHECK_EQ_INT(dsc_crc32c_copy(copy + 3, bytes + 5, sizes[i]),
                     dsc_crc32c(0, bytes + 5, sizes[i]));
        CHECK(memcmp(copy + 3, bytes + 5, sizes[i]) == 0);
        CHECK(copy[2] == 0xAA && copy[3 + sizes[i]] == 0xAA);
    }
}

static void every_flipped_bit_is_seen(void) {
    fill_bytes();
    uint32_t whole = dsc_crc32c(0, bytes, 30000);
    for (size_t bit = 0; bit < 30000 * 8; bit += 101) {
        bytes[bit / 8] ^= (unsigned char)(1 << bit % 8);
        CHECK(dsc_crc32c(0, bytes, 30000) != whole);
        bytes[bit / 8] ^= (unsigned char)(1 << bit % 8);
    }
}

static const struct test_case cases[] = {
    CASE(known_values_come_out),
    CASE(every_tier_gives_what_one_bit_at_a_time_gives),
    CASE(a_checksum_goes_on_where_another_ended),
    CASE(a_copy_is_the_same_bytes_and_their_checksum),
    CASE(every_flipped_bit_is_seen),
};
RUN_CASES(cases)
