/* What a queue (file_io.c) and who moves its bytes (file_io_ring.c, file_io_threads.c) share.
 *
 * Invariant: a request is with its mover from `start` until the mover passes it to
 * dsc__io_ended. */
#ifndef DSC_FILE_IO_IMPL_H
#define DSC_FILE_IO_IMPL_H

#include "file_io.h"

#include <sys/types.h>

struct dsc_file {
    int fd;
    bool direct;
    size_t n_bytes;
    char path[256]; /* for texts */
};

/* A part of a transfer that is under way. */
struct dsc__io_request {
    struct dsc_transfer *transfer;
    size_t offset, n_bytes; /* what is left of it */
    char *data;
    int n_tries; /* in vain, since some of it was moved */
    long result; /* for the mover */
    struct dsc__io_request *next;
};

struct dsc__io_mover {
    enum dsc_status (*open)(struct dsc_io *io);
    void (*close)(struct dsc_io *io);
    void (*start)(struct dsc_io *io, struct dsc__io_request *request);
    /* What was started gets under way; ends of requests are reported; waits for one if asked. */
    void (*turn)(struct dsc_io *io, bool waits);
};

struct dsc_io {
    struct dsc_io_options options;
    const struct dsc__io_mover *mover;
    void *state; /* the mover's */
    pid_t pid;
    struct dsc_transfer *first, *last; /* not wholly started */
    struct dsc__io_request *requests, *idle;
    size_t n_busy;
};

/* result: bytes moved, or -errno. */
void dsc__io_ended(struct dsc_io *io, struct dsc__io_request *request, long result);

extern const struct dsc__io_mover dsc__io_ring, dsc__io_threads;

#endif
