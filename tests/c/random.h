/* Numbers that look random and are the same in every run: xorshift64, one sequence per program. */
#ifndef DSC_TEST_RANDOM_H
#define DSC_TEST_RANDOM_H

#include <stdint.h>

static uint64_t random_state = 0x9E3779B97F4A7C15u;

static inline uint64_t next_random(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

#endif
