/* The floating-point control state in which every C pass computes: round to nearest even, denormals
 * kept, no traps.
 *
 * Decides: what a caller's rounding mode, flush-to-zero or denormals-are-zero may change: nothing.
 * Invariant: leave() gives back exactly what enter() found, flags included. The state belongs to
 * the thread. Arithmetic between the two stands behind a call that is not inlined (a kernel), so
 * that no compiler moves it across. */
#ifndef DSC_FPENV_H
#define DSC_FPENV_H

#include "dsc.h"

#if defined(__x86_64__)
#include <xmmintrin.h>

/* All exceptions masked, everything else off. */
enum { DSC_MXCSR = 0x1F80 };

static inline uint64_t dsc_fp_enter(void) {
    uint64_t saved = _mm_getcsr();
    _mm_setcsr(DSC_MXCSR);
    return saved;
}
static inline void dsc_fp_leave(uint64_t saved) {
    _mm_setcsr((unsigned)saved);
}

#elif defined(__aarch64__)

/* FPCR 0: nearest, no FZ, no FZ16, no default NaN, IEEE half precision, no traps. */
static inline uint64_t dsc_fp_enter(void) {
    uint64_t saved;
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved) : : "memory");
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0) : "memory");
    return saved;
}
static inline void dsc_fp_leave(uint64_t saved) {
    __asm__ volatile("msr fpcr, %0" : : "r"(saved) : "memory");
}

#else
#include <fenv.h>

/* Elsewhere C offers the rounding mode only. */
static inline uint64_t dsc_fp_enter(void) {
    int saved = fegetround();
    (void)fesetround(FE_TONEAREST);
    return (uint64_t)saved;
}
static inline void dsc_fp_leave(uint64_t saved) {
    (void)fesetround((int)saved);
}
#endif

#endif
