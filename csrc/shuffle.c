/* A balanced Feistel network over the smallest even number of bits that holds n, with cycle
 * walking.
 *
 * Decides: the data order. Invariant: a bijection of [0, n) for every key: a Feistel network is one
 * of [0, 4^h), and walking its cycle until the value is below n restricts it to [0, n); 4^h < 4n,
 * so four steps are expected at most. Pure arithmetic; called by the data loader through the
 * binding. */
#include "shuffle.h"

/* Never change a number in this file: the order of every run that was ever started depends on it.
 */
enum { N_ROUNDS = 12 };

struct permutation {
    uint64_t n;
    unsigned half_bits;
    uint64_t mask; /* half_bits ones */
    uint64_t key[N_ROUNDS];
};

/* Every bit of the result depends on every bit of x (the finalizer constants are David Stafford's
 * variant 13, as in splitmix64: Steele, Lea, Flood, OOPSLA 2014). */
static uint64_t mix(uint64_t x) {
    x ^= x >> 30;
    x *= UINT64_C(0xbf58476d1ce4e5b9);
    x ^= x >> 27;
    x *= UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

static struct permutation make_permutation(uint64_t seed, uint64_t epoch, uint64_t n) {
    struct permutation p = {.n = n, .half_bits = 1};
    while (p.half_bits < 32 && (UINT64_C(1) << (2 * p.half_bits)) < n)
        p.half_bits++;
    p.mask = (UINT64_C(1) << p.half_bits) - 1;
    /* Mixed one after the other, so that (seed, epoch) and (epoch, seed) or (seed + 1, epoch - 1)
     * are unrelated keys. */
    const uint64_t odd = UINT64_C(0x9e3779b97f4a7c15);
    const uint64_t start = mix(mix(seed + odd) + epoch * odd + 1);
    for (unsigned r = 0; r < N_ROUNDS; r++)
        p.key[r] = mix(start + (r + 1) * odd);
    return p;
}

static uint64_t permute(const struct permutation *p, uint64_t x) {
    uint64_t left = x >> p->half_bits, right = x & p->mask;
    for (unsigned r = 0; r < N_ROUNDS; r++) {
        /* High bits of the product chain are the best mixed ones. */
        const uint64_t f = mix(right + p->key[r]) >> (64 - p->half_bits);
        const uint64_t next = left ^ f;
        left = right;
        right = next;
    }
    return left << p->half_bits | right;
}

static uint64_t sample_at(const struct permutation *p, uint64_t i) {
    uint64_t x = i % p->n;
    do
        x = permute(p, x);
    while (x >= p->n);
    return x;
}

uint64_t dsc_shuffle_at(uint64_t seed, uint64_t epoch, uint64_t n, uint64_t i) {
    if (n == 0)
        return 0;
    const struct permutation p = make_permutation(seed, epoch, n);
    return sample_at(&p, i);
}

enum dsc_status dsc_shuffle_fill(uint64_t seed, uint64_t epoch, uint64_t n, uint64_t start,
                                 uint64_t stride, uint64_t count, int64_t *out) {
    if (count == 0)
        return DSC_OK;
    if (n == 0)
        return DSC_FAIL(DSC_EINVAL, "an order over no samples has no positions");
    if (n > INT64_MAX)
        return DSC_FAIL(DSC_EINVAL, "%llu samples do not fit int64 indices", (unsigned long long)n);
    uint64_t last;
    if (__builtin_mul_overflow(stride, count - 1, &last) ||
        __builtin_add_overflow(start, last, &last))
        return DSC_FAIL(DSC_EINVAL, "position start + stride * (count - 1) does not fit 64 bits");
    const struct permutation p = make_permutation(seed, epoch, n);
    for (uint64_t k = 0; k < count; k++)
        out[k] = (int64_t)sample_at(&p, start + k * stride);
    return DSC_OK;
}
