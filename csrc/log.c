/* The log sink: one process-wide pointer, set once by the binding. */
#include "log.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>

static _Atomic(dsc_log_sink) current_sink;

void dsc_log_set_sink(dsc_log_sink sink) {
    atomic_store(&current_sink, sink);
}

void dsc_log(enum dsc_log_level level, const char *format, ...) {
    dsc_log_sink sink = atomic_load(&current_sink);
    if (!sink)
        return;
    char text[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    sink(level, text);
}
