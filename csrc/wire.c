/* Conversions in small blocks that stay in the first-level cache. Invariant: see wire.h. */
#include "wire.h"

#include "kernels/kernels.h"

#include <string.h>

enum { BLOCK = 1024 };

enum dsc_dtype dsc_wire_dtype(const struct dsc_wire *wire, enum dsc_dtype from) {
    return wire->narrow ? wire->dtype : from;
}

static bool is_plain(const struct dsc_wire *wire, enum dsc_dtype to, enum dsc_dtype from) {
    return wire->divisor == 0.0f && (to == from || to == DSC_F32);
}

/* At most BLOCK elements. */
static void pack_block(const struct dsc_wire *wire, void *dst, enum dsc_dtype to, const void *src,
                       enum dsc_dtype from, size_t n) {
    float wide[BLOCK];
    dsc_kernels()->to_f32[from](wide, src, n);
    for (size_t i = 0; wire->divisor != 0.0f && i < n; i++)
        wide[i] /= wire->divisor;
    dsc_kernels()->from_f32[to](dst, wide, n);
}

void dsc_wire_pack(const struct dsc_wire *wire, void *dst, enum dsc_dtype to, const void *src,
                   enum dsc_dtype from, size_t n) {
    if (wire->divisor == 0.0f && to == from) {
        memcpy(dst, src, n * dsc_dtype_size(to));
        return;
    }
    if (is_plain(wire, to, from)) {
        dsc_kernels()->to_f32[from](dst, src, n);
        return;
    }
    for (size_t at = 0; at < n; at += BLOCK)
        pack_block(wire, (char *)dst + at * dsc_dtype_size(to), to,
                   (const char *)src + at * dsc_dtype_size(from), from, dsc_min(BLOCK, n - at));
}

void dsc_wire_add(const struct dsc_wire *wire, float *acc, enum dsc_dtype to, const void *src,
                  enum dsc_dtype from, size_t n) {
    if (is_plain(wire, to, from)) {
        dsc_kernels()->accumulate[from](acc, src, n, false);
        return;
    }
    for (size_t at = 0; at < n; at += BLOCK) {
        float packed[BLOCK];
        size_t part = dsc_min(BLOCK, n - at);
        pack_block(wire, packed, to, (const char *)src + at * dsc_dtype_size(from), from, part);
        dsc_kernels()->accumulate[to](acc + at, packed, part, false);
    }
}
