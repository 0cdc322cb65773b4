/* What every module may include: status codes, element types, small helpers.
 *
 * Decides: how failure travels (a value with a sentence and a place), and which element types
 * exist. Invariant: nothing here prints, exits, allocates or knows Python. */
#ifndef DSC_H
#define DSC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* name, value, sentence, Python exception kind (see bind/errors.c) */
#define DSC_STATUS_MAP(X)                                                                          \
    X(DSC_OK, 0, "success", NONE)                                                                  \
    X(DSC_EINVAL, -1, "an argument is outside what is allowed", VALUE)                             \
    X(DSC_ETYPE, -2, "an argument has the wrong type", TYPE)                                       \
    X(DSC_ENOMEM, -3, "memory could not be had", MEMORY)                                           \
    X(DSC_EIO, -4, "the operating system refused an operation", OS)                                \
    X(DSC_ETIMEDOUT, -5, "other ranks did not come in time", TIMEOUT)                              \
    X(DSC_EDEAD, -6, "another rank died or gave up", COMM)                                         \
    X(DSC_EDIVERGED, -7, "ranks called different operations", COMM)                                \
    X(DSC_EINTR, -8, "a signal handler raised", PENDING)                                           \
    X(DSC_ENOTYET, -9, "the feature is not there yet", NOTYET)                                     \
    X(DSC_ESTATE, -10, "the object is not in a state that allows this", RUNTIME)                   \
    X(DSC_ECONFIG, -11, "the configuration is wrong", CONFIG)                                      \
    X(DSC_EDAMAGED, -12, "a file of a checkpoint is not as it was written", CHECKPOINT)

enum dsc_status {
#define X(name, value, sentence, kind) name = value,
    DSC_STATUS_MAP(X)
#undef X
};

/* The sentence of a code; never NULL. */
const char *dsc_status_sentence(enum dsc_status status);

/* Text of the calling thread's last failure, "" if none; valid until its next failure. */
const char *dsc_last_error(void);
/* "file.c:123" of the same failure. */
const char *dsc_last_error_place(void);

/* Records text and place in thread-local storage and returns `status`. Use through DSC_FAIL. */
enum dsc_status dsc__fail(enum dsc_status status, const char *file, int line, const char *format,
                          ...) __attribute__((format(printf, 4, 5), cold));

#define DSC_FAIL(status, ...) dsc__fail(status, __FILE__, __LINE__, __VA_ARGS__)
/* DSC_EIO, with the errno of the call that failed. */
#define DSC_FAIL_OS(error, ...) dsc__with_errno(DSC_FAIL(DSC_EIO, __VA_ARGS__), error)
enum dsc_status dsc__with_errno(enum dsc_status status, int error);
/* Of this thread's last failure; 0: it has none. */
int dsc_last_errno(void);
/* Propagates a failure untouched. */
#define DSC_TRY(expr)                                                                              \
    do {                                                                                           \
        enum dsc_status dsc_try_status_ = (expr);                                                  \
        if (dsc_try_status_ != DSC_OK)                                                             \
            return dsc_try_status_;                                                                \
    } while (0)

/* Element types: name, bytes, short name. The first three are the types that a model may train in.
 */
#define DSC_DTYPE_MAP(X)                                                                           \
    X(DSC_F32, 4, "fp32")                                                                          \
    X(DSC_BF16, 2, "bf16")                                                                         \
    X(DSC_F16, 2, "fp16")                                                                          \
    X(DSC_F64, 8, "fp64")                                                                          \
    X(DSC_I32, 4, "int32")                                                                         \
    X(DSC_I64, 8, "int64")                                                                         \
    X(DSC_U8, 1, "bytes")

enum dsc_dtype {
#define X(name, bytes, text) name,
    DSC_DTYPE_MAP(X)
#undef X
        DSC_DTYPE_COUNT
};
/* Those before DSC_U8 can be combined; elements of any other type only move, as bytes. */
enum { DSC_TRAIN_DTYPE_COUNT = DSC_F16 + 1, DSC_REDUCE_DTYPE_COUNT = DSC_I64 + 1 };

/* Bytes of one element. */
size_t dsc_dtype_size(enum dsc_dtype dtype);
/* The short name of the table; "?" for what is not a dtype. */
const char *dsc_dtype_name(enum dsc_dtype dtype);

enum dsc_op { DSC_SUM, DSC_AVG, DSC_MIN, DSC_MAX, DSC_PROD, DSC_OP_COUNT };
/* "sum", "avg", ...; "?" for what is not an operation. */
const char *dsc_op_name(enum dsc_op op);

/* Every parameter starts at a multiple of this many elements in its space (contract N1). */
enum { DSC_PARAM_ALIGN = 16 };
/* Elements of one norm block; every rank's range is a whole number of blocks (contract N2). */
enum { DSC_BLOCK = 1024 };

/* FNV-1a: `hash` goes on over these bytes; DSC_HASH_START begins one. */
#define DSC_HASH_START ((uint64_t)0xcbf29ce484222325u)
static inline uint64_t dsc_hash(uint64_t hash, const void *data, size_t n_bytes) {
    const unsigned char *bytes = (const unsigned char *)data;
    for (size_t i = 0; i < n_bytes; i++)
        hash = (hash ^ bytes[i]) * 0x100000001b3u;
    return hash;
}
static inline size_t dsc_round_up(size_t n, size_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}
static inline size_t dsc_min(size_t a, size_t b) {
    return a < b ? a : b;
}
static inline size_t dsc_max(size_t a, size_t b) {
    return a > b ? a : b;
}

#endif
