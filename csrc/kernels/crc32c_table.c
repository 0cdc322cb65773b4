/* CRC32C by tables, eight bytes at a time: what machines without instructions for it have, and the
 * truth that the others are tested against.
 *
 * Row k holds what each byte leaves behind k more bytes. A row is linear over GF(2), so the eight
 * values of its single bits make all 256, in the preprocessor. Invariant: the tables are constant;
 * bytes are taken in the order of memory on any machine. */
#include "crc32c.h"

#define ENTRY(i, b0, b1, b2, b3, b4, b5, b6, b7)                                                   \
    (((i)&1 ? b0 : 0u) ^ ((i)&2 ? b1 : 0u) ^ ((i)&4 ? b2 : 0u) ^ ((i)&8 ? b3 : 0u) ^               \
     ((i)&16 ? b4 : 0u) ^ ((i)&32 ? b5 : 0u) ^ ((i)&64 ? b6 : 0u) ^ ((i)&128 ? b7 : 0u))
#define FOUR(i, ...)                                                                               \
    ENTRY(i, __VA_ARGS__), ENTRY((i) + 1, __VA_ARGS__), ENTRY((i) + 2, __VA_ARGS__),               \
        ENTRY((i) + 3, __VA_ARGS__)
#define SIXTEEN(i, ...)                                                                            \
    FOUR(i, __VA_ARGS__), FOUR((i) + 4, __VA_ARGS__), FOUR((i) + 8, __VA_ARGS__),                  \
        FOUR((i) + 12, __VA_ARGS__)
#define SIXTY_FOUR(i, ...)                                                                         \
    SIXTEEN(i, __VA_ARGS__), SIXTEEN((i) + 16, __VA_ARGS__), SIXTEEN((i) + 32, __VA_ARGS__),       \
        SIXTEEN((i) + 48, __VA_ARGS__)
#define ROW(...)                                                                                   \
    {                                                                                              \
        SIXTY_FOUR(0, __VA_ARGS__), SIXTY_FOUR(64, __VA_ARGS__), SIXTY_FOUR(128, __VA_ARGS__),     \
            SIXTY_FOUR(192, __VA_ARGS__)                                                           \
    }

static const uint32_t rows[8][256] = {
    ROW(0xF26B8303, 0xE13B70F7, 0xC79A971F, 0x8AD958CF, 0x105EC76F, 0x20BD8EDE, 0x417B1DBC,
        0x82F63B78),
    ROW(0x13A29877, 0x274530EE, 0x4E8A61DC, 0x9D14C3B8, 0x3FC5F181, 0x7F8BE302, 0xFF17C604,
        0xFBC3FAF9),
    ROW(0xA541927E, 0x4F6F520D, 0x9EDEA41A, 0x38513EC5, 0x70A27D8A, 0xE144FB14, 0xC76580D9,
        0x8B277743),
    ROW(0xDD45AAB8, 0xBF672381, 0x7B2231F3, 0xF64463E6, 0xE964B13D, 0xD725148B, 0xABA65FE7,
        0x52A0C93F),
    ROW(0x38116FAC, 0x7022DF58, 0xE045BEB0, 0xC5670B91, 0x8F2261D3, 0x1BA8B557, 0x37516AAE,
        0x6EA2D55C),
    ROW(0xEF306B19, 0xDB8CA0C3, 0xB2F53777, 0x6006181F, 0xC00C303E, 0x85F4168D, 0x0E045BEB,
        0x1C08B7D6),
    ROW(0x68032CC8, 0xD0065990, 0xA5E0C5D1, 0x4E2DFD53, 0x9C5BFAA6, 0x3D5B83BD, 0x7AB7077A,
        0xF56E0EF4),
    ROW(0x493C7D27, 0x9278FA4E, 0x211D826D, 0x423B04DA, 0x847609B4, 0x0D006599, 0x1A00CB32,
        0x34019664),
};

uint32_t dsc__crc32c_table(uint32_t before, const void *data, size_t n_bytes) {
    const unsigned char *at = data;
    uint32_t crc = ~before;
    for (; n_bytes >= 8; n_bytes -= 8, at += 8) {
        uint32_t next = 0;
        for (int i = 0; i < 4; i++)
            next ^= rows[7 - i][(crc >> 8 * i & 255) ^ at[i]] ^ rows[3 - i][at[4 + i]];
        crc = next;
    }
    for (; n_bytes > 0; n_bytes--, at++)
        crc = crc >> 8 ^ rows[0][(crc & 255) ^ *at];
    return ~crc;
}
