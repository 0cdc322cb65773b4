/* Files for what does not fit in memory, and asynchronous reads and writes of ranges of them.
 *
 * Decides: who moves the bytes (io_uring, through liburing, where kernel and library are there;
 * else threads with pread and pwrite), whether past the page cache, and how a range is cut into
 * requests. Invariant: a file has no name from the moment it is made, so that its space is free
 * again when its process ends, however it ends; all of its space is there from the start; what
 * fails says operation, path, offset and the kernel's reason.
 *
 * A queue and its transfers belong to one thread at a time. */
#ifndef DSC_FILE_IO_H
#define DSC_FILE_IO_H

#include "dsc.h"

struct dsc_file;
struct dsc_io;

/* Ranges, lengths and buffers are multiples of this. */
enum { DSC_FILE_ALIGN = 4096 };

/* A file of n_bytes (a multiple of DSC_FILE_ALIGN, > 0), all zero, in `folder`, which is made where
 * it is missing. name: for texts. DSC_EIO with path and reason: no such folder, no space, ... */
enum dsc_status dsc_file_open(const char *folder, const char *name, size_t n_bytes,
                              struct dsc_file **out);
/* NULL is fine. The space is free once nobody maps the file either. */
void dsc_file_close(struct dsc_file *file);
/* Transfers go past the page cache. */
bool dsc_file_is_direct(const struct dsc_file *file);
/* For a mapping; stays the file's. */
int dsc_file_descriptor(const struct dsc_file *file);

enum dsc_io_kind { DSC_IO_BEST, DSC_IO_RING, DSC_IO_THREADS };
struct dsc_io_options {
    enum dsc_io_kind kind;
    size_t block_bytes; /* of one request, rounded up to DSC_FILE_ALIGN */
    size_t queue_depth; /* requests under way, at least 1 */
    int n_threads;      /* where threads move the bytes; two at least do */
    bool single_submit; /* requests go to the kernel one by one, not together */
    bool in_batches;    /* no request starts before those under way have ended */
};
/* DSC_ENOTYET where kind is DSC_IO_RING and there is none. */
enum dsc_status dsc_io_open(const struct dsc_io_options *options, struct dsc_io **out);
/* Waits for what is under way; NULL is fine. In a forked child it frees memory only. */
void dsc_io_close(struct dsc_io *io);

/* One range. The caller fills the first part, zeroes the rest, and keeps it until it has waited. */
struct dsc_transfer {
    struct dsc_file *file;
    bool writes;
    size_t offset, n_bytes;
    char *data;

    size_t n_started, n_done; /* bytes */
    size_t failed_at;         /* offset */
    int error;                /* errno of the first failure; -1: nothing more could be moved */
    struct dsc_transfer *next;
};
/* Queues a transfer; never fails, never waits. Transfers start in order and may end in any. */
void dsc_io_start(struct dsc_io *io, struct dsc_transfer *transfer);
/* Lets the queue move on; never waits. */
void dsc_io_poke(struct dsc_io *io);
bool dsc_transfer_done(const struct dsc_transfer *transfer);
/* DSC_EIO where some of it could not be moved. A transfer that was never started is done. In a
 * forked child, where nothing moves, DSC_ESTATE at once. */
enum dsc_status dsc_io_wait(struct dsc_io *io, struct dsc_transfer *transfer);

#endif
