/* Writing a file: threads take chunks of it in turn, gather each in a buffer of their own, and
 * write it through the page cache, or past it where the file system lets them.
 *
 * Copying into the page cache costs a processor more than the disk needs for the bytes, and where
 * it goes past it, the processor has a training to do. Who wants to change the tensors meanwhile
 * has what is not gathered yet copied first, and threads find it in the copy. Invariant: what is
 * written is what the layout says, header and data, and has its name only once it is on the disk;
 * every chunk is gathered once, by who took it under the lock. */
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

/* A chunk is longer than a block that has a checksum, so that a block lies in two chunks at most;
 * with what arena memory keeps behind it, it fills whole huge pages. */
enum { CHUNK = (4 << 20) - DSC_SHARD_ALIGN, N_THREADS = 4, PATH_BYTES = 4096 };

/* The end, in this chunk, of a block that begins in the one before. */
struct rest {
    uint32_t crc;
    size_t n_bytes, block;
};

/* A chunk that was copied and is to be written. */
struct copied {
    struct copied *next;
    size_t chunk;
    char *data; /* CHUNK bytes */
};

struct dsc_shard_job {
    struct dsc_shard_writing writing;
    const struct dsc_shard_layout *layout;
    char path[PATH_BYTES], part[PATH_BYTES];
    int fd;
    size_t n_chunks, n_buffers;
    struct rest *rests; /* of each chunk */
    char *buffers;      /* a chunk for each thread */
    atomic_bool direct;

    pthread_mutex_t lock;
    pthread_cond_t changed;
    size_t next_chunk, n_taken; /* n_taken: buffers */
    size_t n_gathering;         /* chunks that are being read from tensors now */
    size_t n_copying;           /* of these, to be found in `copied` soon */
    struct copied *copied;
    bool stopped;
    uint64_t n_done;
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
static void gather_tensor(struct dsc_shard_job *job, size_t i, uint64_t from, uint64_t to,
                          struct rest *rest, char *out) {
    enum { BLOCK = DSC_SHARD_CRC_BYTES };
    const char *data = job->writing.data[i];
    while (from < to) {
        size_t block = job->layout->first_crc[i] + (size_t)(from / BLOCK);
        size_t n = dsc_min(BLOCK - from % BLOCK, to - from);
        uint32_t crc = dsc_crc32c_copy(out, data + from, n);
        if (from % BLOCK == 0)
            job->writing.crcs[block] = crc;
        else
            *rest = (struct rest){crc, n, block};
        from += n;
        out += n;
    }
}

static void gather(struct dsc_shard_job *job, size_t chunk, char *out) {
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

/* Blocks that lie in two chunks, once all are gathered. */
static void join_rests(struct dsc_shard_job *job) {
    (void)pthread_mutex_lock(&job->lock); /* who detaches and who writes may both come here */
    for (size_t i = 0; i < job->n_chunks; i++) {
        struct rest *rest = &job->rests[i];
        if (rest->n_bytes > 0)
            job->writing.crcs[rest->block] =
                dsc_crc32c_join(job->writing.crcs[rest->block], rest->crc, rest->n_bytes);
        rest->n_bytes = 0;
    }
    (void)pthread_mutex_unlock(&job->lock);
}

/* ---- threads ---- */

static void leave_direct(struct dsc_shard_job *job) {
    int flags = fcntl(job->fd, F_GETFL);
    if (flags >= 0)
        (void)fcntl(job->fd, F_SETFL, flags & ~O_DIRECT);
    atomic_store(&job->direct, false);
}

static void stop(struct dsc_shard_job *job, int error, uint64_t offset) {
    (void)pthread_mutex_lock(&job->lock);
    if (job->error == 0) {
        job->error = error;
        job->failed_at = offset;
    }
    job->stopped = true;
    (void)pthread_cond_broadcast(&job->changed);
    (void)pthread_mutex_unlock(&job->lock);
}

/* Past the page cache in whole sectors; what is too much at the end is cut off later. Where the
 * file system does not want that, through the page cache from then on. */
static void write_chunk(struct dsc_shard_job *job, const char *data, uint64_t offset,
                        size_t n_bytes) {
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
            stop(job, error, offset + at);
            return;
        }
    }
    /* The disk begins now, so that the sync at the end is short. Advice: its failure is none. */
    if (!atomic_load(&job->direct))
        (void)sync_file_range(job->fd, (off_t)offset, (off_t)n_bytes, SYNC_FILE_RANGE_WRITE);
}

/* A chunk that nobody has taken, to be read from the tensors; n_chunks where there is none. Under
 * the lock. */
static size_t take_source(struct dsc_shard_job *job) {
    if (job->stopped || job->next_chunk == job->n_chunks)
        return job->n_chunks;
    job->n_gathering++;
    return job->next_chunk++;
}

/* What a thread that writes does next: *copy where it is in memory, which is then the caller's,
 * else a chunk to gather; n_chunks where nothing is left. */
static size_t take_chunk(struct dsc_shard_job *job, struct copied **copy) {
    size_t chunk = job->n_chunks;
    *copy = NULL;
    (void)pthread_mutex_lock(&job->lock);
    while (!job->stopped && !job->copied && job->next_chunk == job->n_chunks && job->n_copying > 0)
        (void)pthread_cond_wait(&job->changed, &job->lock);
    if (job->copied && !job->stopped) {
        *copy = job->copied;
        job->copied = (*copy)->next;
        chunk = (*copy)->chunk;
    } else {
        chunk = take_source(job);
    }
    (void)pthread_mutex_unlock(&job->lock);
    return chunk;
}

static void end_gathering(struct dsc_shard_job *job) {
    (void)pthread_mutex_lock(&job->lock);
    job->n_gathering--;
    (void)pthread_cond_broadcast(&job->changed);
    (void)pthread_mutex_unlock(&job->lock);
}

static void free_copied(struct copied *copy) {
    if (!copy)
        return;
    dsc_arena_free(copy->data, CHUNK);
    dsc_free(copy);
}

/* One chunk; false where none is left. */
static bool work_once(struct dsc_shard_job *job, char *buffer) {
    struct copied *copy;
    size_t chunk = take_chunk(job, &copy);
    if (chunk == job->n_chunks)
        return false;
    uint64_t offset = chunk * (uint64_t)CHUNK;
    size_t n_bytes = dsc_min(CHUNK, job->layout->n_bytes - offset);
    if (!copy) {
        gather(job, chunk, buffer);
        end_gathering(job);
    }
    write_chunk(job, copy ? copy->data : buffer, offset, n_bytes);
    free_copied(copy);
    (void)pthread_mutex_lock(&job->lock);
    job->n_done += n_bytes;
    (void)pthread_mutex_unlock(&job->lock);
    return true;
}

static char *take_buffer(struct dsc_shard_job *job) {
    (void)pthread_mutex_lock(&job->lock);
    char *buffer = job->buffers + job->n_taken++ * CHUNK;
    (void)pthread_mutex_unlock(&job->lock);
    return buffer;
}

static void *helper_main(void *context) {
    struct dsc_shard_job *job = context;
    char *buffer = take_buffer(job);
    while (work_once(job, buffer))
        ;
    return NULL;
}

/* Asks whoever wants to know how far it is; false: the write is to end. */
static bool report(struct dsc_shard_job *job) {
    (void)pthread_mutex_lock(&job->lock);
    uint64_t n_done = job->n_done;
    (void)pthread_mutex_unlock(&job->lock);
    return !job->writing.progress || job->writing.progress(job->writing.context, n_done);
}

/* The caller's thread and others, with no signal of the process; as many as could be started. */
static bool write_chunks(struct dsc_shard_job *job) {
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
        goes_on = report(job);
    if (!goes_on)
        stop(job, EINTR, 0);
    for (size_t i = 0; i < n_helpers; i++)
        (void)pthread_join(helpers[i], NULL);
    return goes_on;
}

/* ---- the caller wants its tensors ---- */

static enum dsc_status new_copied(struct copied **out) {
    struct copied *copy = NULL;
    void *data = NULL;
    DSC_TRY(dsc_alloc(sizeof *copy, (void **)&copy));
    enum dsc_status status = dsc_arena_alloc(CHUNK, &data);
    if (status != DSC_OK) {
        dsc_free(copy);
        return status;
    }
    copy->data = data;
    *out = copy;
    return DSC_OK;
}

/* Copies one chunk; false where none is left, or no memory. Those who write go on meanwhile, so
 * that whoever is quicker, they or memory, has more of the chunks. */
static bool copy_once(struct dsc_shard_job *job) {
    struct copied *copy = NULL;
    if (new_copied(&copy) != DSC_OK)
        return false;
    (void)pthread_mutex_lock(&job->lock);
    copy->chunk = take_source(job);
    bool taken = copy->chunk < job->n_chunks;
    job->n_copying += taken;
    (void)pthread_mutex_unlock(&job->lock);
    if (!taken) {
        free_copied(copy);
        return false;
    }
    gather(job, copy->chunk, copy->data);
    (void)pthread_mutex_lock(&job->lock);
    copy->next = job->copied;
    job->copied = copy;
    job->n_copying--;
    job->n_gathering--;
    (void)pthread_cond_broadcast(&job->changed);
    (void)pthread_mutex_unlock(&job->lock);
    return true;
}

static void copy_chunks(void *context, size_t begin, size_t end) {
    (void)begin;
    (void)end;
    while (copy_once(context))
        ;
}

static bool has_sources(struct dsc_shard_job *job) {
    (void)pthread_mutex_lock(&job->lock);
    bool has = !job->stopped && job->next_chunk < job->n_chunks;
    (void)pthread_mutex_unlock(&job->lock);
    return has;
}

void dsc_shard_job_detach(struct dsc_shard_job *job, struct dsc_pool *pool) {
    if (has_sources(job))
        dsc_pool_run(pool, (size_t)dsc_pool_size(pool), 1, copy_chunks, job);
    (void)pthread_mutex_lock(&job->lock);
    while (job->n_gathering > 0 || (job->next_chunk < job->n_chunks && !job->stopped))
        (void)pthread_cond_wait(&job->changed, &job->lock);
    bool all = job->next_chunk == job->n_chunks;
    (void)pthread_mutex_unlock(&job->lock);
    if (all)
        join_rests(job);
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

static enum dsc_status failed(const struct dsc_shard_job *job, const char *what, int error) {
    return DSC_FAIL_OS(error, "%s: could not %s: %s", job->path, what, strerror(error));
}

static enum dsc_status fill_file(struct dsc_shard_job *job) {
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
    if (ftruncate(job->fd, (off_t)n_bytes) != 0)
        return failed(job, "cut what is too much", errno);
    return fdatasync(job->fd) == 0 ? DSC_OK : failed(job, "sync", errno);
}

static enum dsc_status write_part(struct dsc_shard_job *job) {
    enum { FLAGS = O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC };
    job->fd = -1;
    if (!job->writing.cached)
        job->fd = open(job->part, FLAGS | O_DIRECT, 0666);
    atomic_store(&job->direct, job->fd >= 0);
    if (job->writing.cached || (job->fd < 0 && errno == EINVAL))
        job->fd = open(job->part, FLAGS, 0666);
    if (job->fd < 0) {
        int error = errno;
        return DSC_FAIL_OS(error, "could not make the file %s: %s", job->part, strerror(error));
    }
    enum dsc_status status = fill_file(job);
    if (close(job->fd) != 0 && status == DSC_OK)
        status = failed(job, "close", errno);
    if (status == DSC_OK && rename(job->part, job->path) != 0)
        status = failed(job, "rename", errno);
    if (status != DSC_OK)
        (void)unlink(job->part);
    return status;
}

/* A small file needs no whole chunk. */
static size_t buffer_bytes(const struct dsc_shard_job *job) {
    return job->n_chunks == 1 ? dsc_round_up(job->layout->n_bytes, DSC_SHARD_ALIGN)
                              : job->n_buffers * CHUNK;
}

/* Memory that is not needed once the file is written, or not to be written. */
static void give_back(struct dsc_shard_job *job) {
    void *buffers = job->buffers;
    struct copied *copy = job->copied, *next;
    job->buffers = NULL; /* first: a child that is forked in between frees once */
    job->copied = NULL;
    dsc_arena_free(buffers, buffer_bytes(job));
    for (; copy; copy = next) {
        next = copy->next;
        free_copied(copy);
    }
}

enum dsc_status dsc_shard_job_run(struct dsc_shard_job *job) {
    enum dsc_status status = write_part(job);
    (void)pthread_mutex_lock(&job->lock);
    job->stopped = true;
    (void)pthread_cond_broadcast(&job->changed);
    while (job->n_gathering > 0) /* who copies, for a file that will not be */
        (void)pthread_cond_wait(&job->changed, &job->lock);
    (void)pthread_mutex_unlock(&job->lock);
    if (status == DSC_OK)
        join_rests(job);
    give_back(job);
    return status;
}

static enum dsc_status fill_job(struct dsc_shard_job *job, const char *path) {
    uint64_t n_bytes = job->layout->n_bytes;
    if ((size_t)snprintf(job->part, PATH_BYTES, "%s.part", path) >= PATH_BYTES)
        return DSC_FAIL(DSC_EINVAL, "a path has more than %d bytes: %.200s...", PATH_BYTES - 6,
                        path);
    memcpy(job->path, path, strlen(path) + 1);
    job->n_chunks = (size_t)((n_bytes - 1) / CHUNK + 1);
    job->n_buffers = dsc_min(N_THREADS, job->n_chunks);
    DSC_TRY(dsc_alloc(job->n_chunks * sizeof *job->rests, (void **)&job->rests));
    return dsc_arena_alloc(buffer_bytes(job), (void **)&job->buffers);
}

enum dsc_status dsc_shard_job_open(const char *path, const struct dsc_shard_writing *writing,
                                   struct dsc_shard_job **out) {
    struct dsc_shard_job *job = NULL;
    DSC_TRY(dsc_alloc(sizeof *job, (void **)&job));
    job->writing = *writing;
    job->layout = writing->layout;
    (void)pthread_mutex_init(&job->lock, NULL);
    (void)pthread_cond_init(&job->changed, NULL);
    enum dsc_status status = fill_job(job, path);
    if (status == DSC_OK)
        *out = job;
    else
        dsc_shard_job_close(job);
    return status;
}

void dsc_shard_job_close(struct dsc_shard_job *job) {
    if (!job)
        return;
    /* The lock is left alone: in a forked child a thread that is not there may hold it. */
    give_back(job);
    dsc_free(job->rests);
    dsc_free(job);
}

enum dsc_status dsc_shard_write(const char *path, const struct dsc_shard_writing *writing) {
    struct dsc_shard_job *job;
    DSC_TRY(dsc_shard_job_open(path, writing, &job));
    enum dsc_status status = dsc_shard_job_run(job);
    dsc_shard_job_close(job);
    return status;
}
