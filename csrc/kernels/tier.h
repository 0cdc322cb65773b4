/* What the tier files share: how a file sets its instruction set, and the tables that dispatch.c
 * picks from. Included first in each isa_*.c; only dispatch.c includes it otherwise.
 *
 * Invariant: code compiled for an instruction set stands between DSC_TARGET_BEGIN and
 * DSC_TARGET_END and is reached through a table only, so that the rest of the library runs on the
 * baseline. */
#ifndef DSC_KERNELS_TIER_H
#define DSC_KERNELS_TIER_H

#include "kernels.h"

/* Before any target is set: system headers are not ours to compile for one. */
#include <float.h>
#include <math.h>
#include <string.h>

#define DSC_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define DSC_TARGET_BEGIN(isa)                                                                      \
    DSC_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define DSC_TARGET_END DSC_PRAGMA(clang attribute pop)
#define DSC_PREFER_512 ""
/* The buffers of a loop are the same or apart: no element depends on an earlier one. */
#define DSC_IVDEP DSC_PRAGMA(clang loop vectorize(assume_safety))
/* Sanitizer builds are compiled at -O1, where no loop becomes vectors; that is no error. */
#pragma clang diagnostic ignored "-Wpass-failed"
#else
#define DSC_TARGET_BEGIN(isa) DSC_PRAGMA(GCC push_options) DSC_PRAGMA(GCC target(isa))
#define DSC_TARGET_END DSC_PRAGMA(GCC pop_options)
/* gcc makes 32-byte vectors otherwise. */
#define DSC_PREFER_512 ",prefer-vector-width=512"
#define DSC_IVDEP DSC_PRAGMA(GCC ivdep)
#endif

extern const struct dsc_kernels dsc__kernels_scalar;
#if defined(__x86_64__)
extern const struct dsc_kernels dsc__kernels_avx2, dsc__kernels_avx512;
#elif defined(__aarch64__)
extern const struct dsc_kernels dsc__kernels_neon;
#endif

#endif
