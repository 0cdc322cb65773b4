/* Failure as a value: the sentence of each code, and the calling thread's last failure.
 *
 * Invariant: a failure is written once, where it happens; callers pass the code on untouched. */
#include "dsc.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char last_text[2048];
static _Thread_local char last_place[128];
static _Thread_local int last_errno;

const char *dsc_status_sentence(enum dsc_status status) {
    switch (status) {
#define X(name, value, sentence, kind)                                                             \
    case name:                                                                                     \
        return sentence;
        DSC_STATUS_MAP(X)
#undef X
    }
    return "unknown status";
}

const char *dsc_last_error(void) {
    return last_text;
}

const char *dsc_last_error_place(void) {
    return last_place;
}

enum dsc_status dsc__fail(enum dsc_status status, const char *file, int line, const char *format,
                          ...) {
    va_list args;
    const char *base = strrchr(file, '/');
    va_start(args, format);
    /* A text may quote the previous one ("...: %s", dsc_last_error()), so it is built aside. */
    char text[sizeof last_text];
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    memcpy(last_text, text, sizeof text);
    last_errno = 0;
    snprintf(last_place, sizeof last_place, "%s:%d", base ? base + 1 : file, line);
    return status;
}

enum dsc_status dsc__with_errno(enum dsc_status status, int error) {
    last_errno = error;
    return status;
}

int dsc_last_errno(void) {
    return last_errno;
}

size_t dsc_dtype_size(enum dsc_dtype dtype) {
    switch (dtype) {
#define X(name, bytes, text)                                                                       \
    case name:                                                                                     \
        return bytes;
        DSC_DTYPE_MAP(X)
#undef X
    case DSC_DTYPE_COUNT:
        break;
    }
    return 0;
}

const char *dsc_dtype_name(enum dsc_dtype dtype) {
    switch (dtype) {
#define X(name, bytes, text)                                                                       \
    case name:                                                                                     \
        return text;
        DSC_DTYPE_MAP(X)
#undef X
    case DSC_DTYPE_COUNT:
        break;
    }
    return "?";
}

const char *dsc_op_name(enum dsc_op op) {
    static const char *const names[DSC_OP_COUNT] = {"sum", "avg", "min", "max", "prod"};
    return op >= 0 && op < DSC_OP_COUNT ? names[op] : "?";
}
