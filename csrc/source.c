/* Reading a source, part by part. */
#include "source.h"

#include <string.h>

const void *dsc_source_at(const struct dsc_source *source, const struct dsc_segment *segment,
                          size_t begin, enum dsc_dtype *dtype) {
    if (source->local && source->folded[segment->param]) {
        *dtype = DSC_F32;
        return source->local + begin;
    }
    const struct dsc_view *view = source->views ? &source->views[segment->param] : NULL;
    if (!view || !view->grad)
        return NULL;
    *dtype = view->grad_dtype;
    return (const char *)view->grad + (begin - segment->begin) * dsc_dtype_size(view->grad_dtype);
}

void dsc_source_read(const struct dsc_source *source, const struct dsc_space *space,
                     struct dsc_range range, float *dst) {
    struct dsc_parts it = dsc_parts(space, range);
    memset(dst, 0, dsc_range_size(range) * sizeof *dst);
    while (dsc_parts_next(&it)) {
        enum dsc_dtype dtype;
        const void *src = dsc_source_at(source, it.segment, it.part.begin, &dtype);
        if (src)
            dsc_wire_add(source->wire, dst + (it.part.begin - range.begin),
                         dsc_wire_dtype(source->wire, dtype), src, dtype, dsc_range_size(it.part));
    }
}
