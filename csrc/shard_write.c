/* Writing a file: threads take chunks of it in turn, gather each in a buffer of their own (or find
 * it in an image of the file), and write it past the page cache where the file system lets them.
 *
 * Copying into the page cache costs a processor more than the disk needs for the bytes, and the
 * processor has a training to do. Invariant: what is written is what the layout says, header and
 * data, and has its name only once it is on the disk. */
#define _GNU_SOURCE
#include "shard.h"

#include "alloc.h"
#include "arena.h"
#include "crc32c.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* A chunk is longer than a block that has a checksum, so that a block lies in two chunks at most.
 */
enum { CHUNK = 4 << 20, N_THREADS = 4, PATH_BYTES = 4096 };

/* The end, in this chunk, of a block that begins in the one before. */
struct rest {
    uint32_t crc;
    size_t n_bytes, block;
};

struct job {
    const struct dsc_shard_writing *writing;
    const struct dsc_shard_layout *layout;
    const char *path;
    int fd;
    size_t n_chunks;
    struct rest *rests; /* of each chunk; unless there is an image */
    char *buffers;      /* a chunk for each thread; unless there is an image */
    atomic_size_t next_chunk;
    atomic_uint n_workers; /* that have taken a buffer */
    _Atomic uint64_t n_done;
    atomic_bool direct, stop;
    pthread_mutex_t lock;
    int error; /* the first that failed, and where */
    uint64_t failed_at;
};

/* ---- what a chunk holds ---- */

/* The first tensor that ends behind `offset`. */
static size_t tensor_at(const struct dsc_shard_layout *layout, uint64_t offset) {
    size_t low = 0, high = layout->n_tensors;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (layout->tensors[middle].offset + layout->tensors[middle].n_bytes > offset)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/* For texts. */
static const char *name_at(const struct dsc_shard_layout *layout, uint64_t offset) {
    size_t i = tensor_at(layout, offset);
    return offset < layout->header_bytes || i == layout->n_tensors ? "header"
                                                                   : layout->tensors[i].key;
}

/* Copies bytes [from, to) of a tensor, block by block, with their checksums. */
static void gather_tensor(struct job *job, size_t i, uint64_t from, uint64_t to, struct rest *rest,
                          char *out) {
    enum { BLOCK = DSC_SHARD_CRC_BYTES };
    const char *data = job->writing->data[i];
    while (from < to) {
        size_t block = job->layout->first_crc[i] + (size_t)(from / BLOCK);
        size_t n = dsc_min(BLOCK - from % BLOCK, to - from);
        uint32_t crc = dsc_crc32c_copy(out, data + from, n);
        if (from % BLOCK == 0)
            job->writing->crcs[block] = crc;
        else
            *rest = (struct rest){crc, n, block};
        from += n;
        out += n;
    }
}

static void gather(struct job *job, size_t chunk, char *out) {
    const struct dsc_shard_layout *layout = job->layout;
    uint64_t begin = chunk * (uint64_t)CHUNK, end = dsc_min(begin + CHUNK, layout->n_bytes);
    if (begin < layout->header_bytes)
        memcpy(out, layout->header + begin, dsc_min(layout->header_bytes, end) - begin);
    for (size_t i = tensor_at(layout, begin); i < layout->n_tensors; i++) {
        const struct dsc_shard_tensor *tensor = &layout->tensors[i];
        if (tensor->offset >= end)
            break;
        uint64_t first = dsc_max(tensor->offset, begin);
        uint64_t last = dsc_min(tensor->offset + tensor->n_bytes, end);
        gather_tensor(job, i, first - tensor->offset, last - tensor->offset, &job->rests[chunk],
                      out + (first - begin));
    }
}

/* Blocks that lie in two chunks. */
static void join_rests(struct job *job) {
    for (size_t i = 0; i < job->n_chunks; i++) {
        const struct rest *rest = &job->rests[i];
        if (rest->n_bytes > 0)
            job->writing->crcs[rest->block] =
                dsc_crc32c_join(job->writing->crcs[rest->block], rest->crc, rest->n_bytes);
    }
}

/* ---- threads ---- */

static void leave_direct(struct job *job) {
    int flags = fcntl(job->fd, F_GETFL);
    if (flags >= 0)
        (void)fcntl(job->fd, F_SETFL, flags & ~O_DIRECT);
    atomic_store(&job->direct, false);
}

static void fail(struct job *job, int error, uint64_t offset) {
    (void)pthread_mutex_lock(&job->lock);
    if (job->error == 0) {
        job->error = error;
        job->failed_at = offset;
    }
    (void)pthread_mutex_unlock(&job->lock);
    atomic_store(&job->stop, true);
}

/* Past the page cache in whole sectors; what is too much at the end is cut off later. Where the
 * file system does not want that, through the page cache from then on. */
static void write_chunk(struct job *job, const char *data, uint64_t offset, size_t n_bytes) {
    bool refused = false;
    for (size_t at = 0; at < n_bytes;) {
        size_t n = atomic_load(&job->direct) ? dsc_round_up(n_bytes, DSC_SHARD_ALIGN) : n_bytes;
        ssize_t moved = pwrite(job->fd, data + at, n - at, (off_t)(offset + at));
        int error = moved < 0 ? errno : ENOSPC;
        if (moved > 0) {
            at += (size_t)moved;
        } else if (error == EINVAL && !refused) {
            refused = true;
            leave_direct(job);
        } else if (error != EINTR) {
            fail(job, error, offset + at);
            return;
        }
    }
    /* The disk begins now, so that the sync at the end is short. Advice: its failure is none. */
    if (!atomic_load(&job->direct))
        (void)sync_file_range(job->fd, (off_t)offset, (off_t)n_bytes, SYNC_FILE_RANGE_WRITE);
    atomic_fetch_add(&job->n_done, n_bytes);
}

/* Takes one chunk; false where none is left. */
static bool work_once(struct job *job, char *buffer) {
    const char *image = job->writing->image;
    size_t chunk = atomic_fetch_add(&job->next_chunk, 1);
    if (chunk >= job->n_chunks || atomic_load(&job->stop))
        return false;
    uint64_t offset = chunk * (uint64_t)CHUNK;
    if (!image)
        gather(job, chunk, buffer);
    write_chunk(job, image ? image + offset : buffer, offset,
                dsc_min(CHUNK, job->layout->n_bytes - offset));
    return true;
}

static char *take_buffer(struct job *job) {
    size_t i = atomic_fetch_add(&job->n_workers, 1);
    return job->buffers ? job->buffers + i * CHUNK : NULL;
}

static void *helper_main(void *context) {
    struct job *job = context;
    char *buffer = take_buffer(job);
    while (work_once(job, buffer))
        ;
    return NULL;
}

/* The caller's thread and others, with no signal of the process; as many as could be started. */
static bool write_chunks(struct job *job) {
    const struct dsc_shard_writing *writing = job->writing;
    pthread_t helpers[N_THREADS - 1];
    size_t n_helpers = 0, most = dsc_min(N_THREADS, job->n_chunks) - 1;
    sigset_t all, before;
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    while (n_helpers < most && pthread_create(&helpers[n_helpers], NULL, helper_main, job) == 0)
        n_helpers++;
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    bool goes_on = true;
    char *buffer = take_buffer(job);
    while (goes_on && work_once(job, buffer))
        if (writing->progress)
            goes_on = writing->progress(writing->context, atomic_load(&job->n_done));
    if (!goes_on)
        atomic_store(&job->stop, true);
    for (size_t i = 0; i < n_helpers; i++)
        (void)pthread_join(helpers[i], NULL);
    return goes_on;
}

/* ---- the file ---- */

/* All of its space at once: a full disk is known before anything is written. */
static int reserve(int fd, uint64_t n_bytes) {
    int error;
    do
        error = fallocate(fd, 0, 0, (off_t)n_bytes) == 0 ? 0 : errno;
    while (error == EINTR);
    return error == EOPNOTSUPP || error == ENOSYS ? 0 : error;
}

static enum dsc_status failed(const struct job *job, const char *what, int error) {
    return DSC_FAIL_OS(error, "%s: could not %s: %s", job->path, what, strerror(error));
}

static enum dsc_status fill_file(struct job *job) {
    uint64_t n_bytes = job->layout->n_bytes;
    int error = reserve(job->fd, n_bytes);
    if (error)
        return DSC_FAIL_OS(error, "%s: could not reserve %" PRIu64 " bytes: %s", job->path, n_bytes,
                           strerror(error));
    if (!write_chunks(job))
        return DSC_FAIL(DSC_EINTR, "%s: writing was interrupted", job->path);
    if (job->error)
        return DSC_FAIL_OS(job->error, "%s: could not write at offset %" PRIu64 " (%s): %s",
                           job->path, job->failed_at, name_at(job->layout, job->failed_at),
                           strerror(job->error));
    if (!job->writing->image)
        join_rests(job);
    if (ftruncate(job->fd, (off_t)n_bytes) != 0)
        return failed(job, "cut what is too much", errno);
    return fdatasync(job->fd) == 0 ? DSC_OK : failed(job, "sync", errno);
}

static enum dsc_status write_part(struct job *job, const char *part) {
    enum { FLAGS = O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC };
    job->fd = open(part, FLAGS | O_DIRECT, 0666);
    atomic_init(&job->direct, job->fd >= 0);
    if (job->fd < 0 && errno == EINVAL)
        job->fd = open(part, FLAGS, 0666);
    if (job->fd < 0) {
        int error = errno;
        return DSC_FAIL_OS(error, "could not make the file %s: %s", part, strerror(error));
    }
    enum dsc_status status = fill_file(job);
    if (close(job->fd) != 0 && status == DSC_OK)
        status = failed(job, "close", errno);
    if (status == DSC_OK && rename(part, job->path) != 0)
        status = failed(job, "rename", errno);
    if (status != DSC_OK)
        (void)unlink(part);
    return status;
}

enum dsc_status dsc_shard_write(const char *path, const struct dsc_shard_writing *writing) {
    const struct dsc_shard_layout *layout = writing->layout;
    struct job job = {.writing = writing, .layout = layout, .path = path};
    char part[PATH_BYTES];
    enum dsc_status status = DSC_OK;
    if ((size_t)snprintf(part, sizeof part, "%s.part", path) >= sizeof part)
        return DSC_FAIL(DSC_EINVAL, "a path has more than %d bytes: %.200s...", PATH_BYTES - 6,
                        path);
    job.n_chunks = (size_t)((layout->n_bytes - 1) / CHUNK + 1);
    size_t n_buffers = dsc_min(N_THREADS, job.n_chunks) * CHUNK;
    if (!writing->image) {
        status = dsc_alloc(job.n_chunks * sizeof *job.rests, (void **)&job.rests);
        if (status == DSC_OK)
            status = dsc_arena_alloc(n_buffers, (void **)&job.buffers);
    }
    (void)pthread_mutex_init(&job.lock, NULL);
    if (status == DSC_OK)
        status = write_part(&job, part);
    (void)pthread_mutex_destroy(&job.lock);
    dsc_arena_free(job.buffers, n_buffers);
    dsc_free(job.rests);
    return status;
}
