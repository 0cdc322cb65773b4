/* A fixed-point number of 640 bits: exact sums of partial norms, and the clipping factor.
 *
 * Invariant: integer addition has no order, so neither has the norm. A partial sum of fp32 squares
 * is a multiple of 2^-298 and below 2^256 * count, so all of its bits have a place here, with room
 * for 2^64 such sums. */
#include "clip.h"

#include <math.h>
#include <string.h>

/* Bit k of the number weighs 2^(k - LOW). */
enum { LOW = 320, N_BITS = 64 * DSC_NORM_WORDS, MANTISSA_BITS = 52, EXPONENT_BIAS = 1023 };

/* Adds `value` at word `at`, carrying upwards. What leaves the top cannot be told apart from a
 * smaller sum, so it counts as not finite; no sum of fp32 squares comes near. */
static void add_word(struct dsc_norm *norm, size_t at, uint64_t value) {
    for (; value && at < DSC_NORM_WORDS; at++) {
        norm->word[at] += value;
        value = norm->word[at] < value;
    }
    norm->n_nonfinite += value;
}

void dsc_norm_add(struct dsc_norm *norm, double sum_squares) {
    uint64_t bits;
    memcpy(&bits, &sum_squares, sizeof bits);
    if (!(sum_squares >= 0) || sum_squares >= 0x1p319) { /* NaN, a caller's negative, inf */
        norm->n_nonfinite++;
        return;
    }
    int exponent = (int)(bits >> MANTISSA_BITS & 0x7FF);
    uint64_t mantissa = bits & (((uint64_t)1 << MANTISSA_BITS) - 1);
    if (exponent)
        mantissa |= (uint64_t)1 << MANTISSA_BITS;
    int shift = exponent - EXPONENT_BIAS - MANTISSA_BITS + LOW;
    if (shift < 0) { /* below 2^-268: bits under 2^-320, which no sum of squares has, are dropped */
        add_word(norm, 0, shift > -64 ? mantissa >> -shift : 0);
        return;
    }
    size_t at = (size_t)shift / 64;
    int in_word = shift % 64;
    add_word(norm, at, mantissa << in_word);
    if (in_word > 64 - 1 - MANTISSA_BITS)
        add_word(norm, at + 1, mantissa >> (64 - in_word));
}

void dsc_norm_merge(struct dsc_norm *into, const struct dsc_norm *from) {
    struct dsc_norm add = *from; /* `from` may be `into` */
    for (size_t i = 0; i < DSC_NORM_WORDS; i++)
        add_word(into, i, add.word[i]);
    into->n_nonfinite += add.n_nonfinite;
}

/* The 64 bits from bit `low` up; below bit 0 there are zeros. */
static uint64_t bits_from(const struct dsc_norm *norm, int low) {
    if (low < 0)
        return norm->word[0] << -low;
    int at = low / 64, in_word = low % 64;
    uint64_t bits = norm->word[at] >> in_word;
    if (in_word && at + 1 < DSC_NORM_WORDS)
        bits |= norm->word[at + 1] << (64 - in_word);
    return bits;
}

static bool any_below(const struct dsc_norm *norm, int bit) {
    if (bit <= 0)
        return false;
    uint64_t any = 0;
    for (int i = 0; i < bit / 64; i++)
        any |= norm->word[i];
    if (bit % 64)
        any |= norm->word[bit / 64] << (64 - bit % 64);
    return any != 0;
}

double dsc_norm_sum(const struct dsc_norm *norm) {
    if (norm->n_nonfinite)
        return NAN;
    int at = DSC_NORM_WORDS - 1;
    while (at >= 0 && norm->word[at] == 0)
        at--;
    if (at < 0)
        return 0.0;
    int top = at * 64 + 63 - __builtin_clzll(norm->word[at]); /* the highest set bit */
    uint64_t window = bits_from(norm, top - 63);              /* its bit 63 is set */
    /* To nearest, ties to even: the bit below the mantissa, then everything under it. */
    enum { N_DROPPED = 63 - MANTISSA_BITS };
    uint64_t mantissa = window >> N_DROPPED;
    uint64_t dropped = window & (((uint64_t)1 << N_DROPPED) - 1);
    uint64_t half = (uint64_t)1 << (N_DROPPED - 1);
    bool sticky = any_below(norm, top - 63);
    mantissa += dropped > half || (dropped == half && (sticky || (mantissa & 1)));
    return ldexp((double)mantissa, top - LOW - MANTISSA_BITS);
}

double dsc_clip_factor(double norm, double clip) {
    if (clip <= 0 || norm <= clip - 1e-6)
        return 1.0;
    /* At most 1: norm + 1e-6 is at least clip before it is rounded, and rounding is monotonic. */
    return clip / (norm + 1e-6);
}
