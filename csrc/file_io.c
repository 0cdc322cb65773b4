/* Files and the queue of requests. Invariant: at most queue_depth requests are under way, and a
 * transfer is done when every byte of it is moved or given up. */
#define _GNU_SOURCE
#include "file_io_impl.h"

#include "alloc.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- files ---- */

/* The folder and those above it, as far as they are missing. */
static enum dsc_status make_folder(const char *folder) {
    char path[4096];
    size_t n = strlen(folder);
    if (n == 0 || n >= sizeof path)
        return DSC_FAIL(DSC_EINVAL, "a folder's path has %zu bytes; allowed: 1 to %zu", n,
                        sizeof path - 1);
    for (size_t i = 1; i <= n; i++) {
        if (folder[i] != '/' && folder[i] != '\0')
            continue;
        memcpy(path, folder, i);
        path[i] = '\0';
        int error = mkdir(path, 0777) == 0 ? 0 : errno;
        if (error != 0 && error != EEXIST)
            return DSC_FAIL_OS(error, "could not make the folder %s: %s", path, strerror(error));
    }
    return DSC_OK;
}

/* Where the file system has no files without a name, one loses its name at once. */
static int open_unnamed(const char *folder) {
    char path[4096 + 64];
    int fd = open(folder, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL && errno != ENOENT))
        return fd;
    for (int i = 0; i < 1000; i++) {
        snprintf(path, sizeof path, "%s/deepspeed_c.%ld.%d", folder, (long)getpid(), i);
        fd = open(path, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
        if (fd >= 0)
            (void)unlink(path);
        if (fd >= 0 || errno != EEXIST)
            return fd;
    }
    return fd;
}

/* Writes zeros, where the file system cannot reserve space without. */
static int fill(int fd, size_t n_bytes) {
    static const char zeros[64 * 1024];
    for (size_t at = 0; at < n_bytes;) {
        ssize_t n = pwrite(fd, zeros, dsc_min(sizeof zeros, n_bytes - at), (off_t)at);
        if (n < 0 && errno != EINTR)
            return errno;
        at += n > 0 ? (size_t)n : 0;
    }
    return 0;
}

static int reserve(int fd, size_t n_bytes) {
    int failed;
    do
        failed = fallocate(fd, 0, 0, (off_t)n_bytes) == 0 ? 0 : errno;
    while (failed == EINTR);
    return failed == EOPNOTSUPP || failed == ENOSYS ? fill(fd, n_bytes) : failed;
}

/* Past the page cache where a read shows that it works. */
static bool make_direct(int fd) {
    _Alignas(DSC_FILE_ALIGN) char probe[DSC_FILE_ALIGN];
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_DIRECT) != 0)
        return false;
    if (pread(fd, probe, sizeof probe, 0) == (ssize_t)sizeof probe)
        return true;
    (void)fcntl(fd, F_SETFL, flags);
    return false;
}

enum dsc_status dsc_file_open(const char *folder, const char *name, size_t n_bytes,
                              struct dsc_file **out) {
    struct dsc_file *file;
    DSC_TRY(make_folder(folder));
    DSC_TRY(dsc_alloc(sizeof *file, (void **)&file));
    file->n_bytes = n_bytes;
    snprintf(file->path, sizeof file->path, "%.180s/(%.60s)", folder, name);
    file->fd = open_unnamed(folder);
    if (file->fd < 0) {
        int error = errno;
        dsc_free(file);
        return DSC_FAIL_OS(error, "could not make a file in %s: %s", folder, strerror(error));
    }
    int error = reserve(file->fd, n_bytes);
    if (error != 0) {
        enum dsc_status status = DSC_FAIL_OS(error, "could not reserve %zu bytes for %s: %s",
                                             n_bytes, file->path, strerror(error));
        dsc_file_close(file);
        return status;
    }
    file->direct = make_direct(file->fd);
    *out = file;
    return DSC_OK;
}

void dsc_file_close(struct dsc_file *file) {
    if (!file)
        return;
    (void)close(file->fd);
    dsc_free(file);
}

bool dsc_file_is_direct(const struct dsc_file *file) {
    return file->direct;
}

int dsc_file_descriptor(const struct dsc_file *file) {
    return file->fd;
}

/* ---- the queue ---- */

static enum dsc_status open_mover(struct dsc_io *io) {
    if (io->options.kind != DSC_IO_THREADS) {
        io->mover = &dsc__io_ring;
        enum dsc_status status = io->mover->open(io);
        if (status == DSC_OK || io->options.kind == DSC_IO_RING)
            return status;
    }
    io->mover = &dsc__io_threads;
    return io->mover->open(io);
}

enum dsc_status dsc_io_open(const struct dsc_io_options *options, struct dsc_io **out) {
    enum { MOST = 1 << 30, DEEPEST = 4096 };
    struct dsc_io *io;
    DSC_TRY(dsc_alloc(sizeof *io, (void **)&io));
    io->options = *options;
    io->options.block_bytes =
        dsc_round_up(dsc_min(dsc_max(options->block_bytes, 1), MOST), DSC_FILE_ALIGN);
    io->options.queue_depth = dsc_min(dsc_max(options->queue_depth, 1), DEEPEST);
    io->pid = getpid();
    enum dsc_status status =
        dsc_alloc(io->options.queue_depth * sizeof *io->requests, (void **)&io->requests);
    for (size_t i = 0; status == DSC_OK && i < io->options.queue_depth; i++) {
        io->requests[i].next = io->idle;
        io->idle = &io->requests[i];
    }
    if (status == DSC_OK)
        status = open_mover(io);
    if (status != DSC_OK) {
        dsc_free(io->requests);
        dsc_free(io);
        return status;
    }
    *out = io;
    return DSC_OK;
}

bool dsc_transfer_done(const struct dsc_transfer *transfer) {
    return transfer->n_done == transfer->n_bytes || !transfer->file;
}

static bool is_last_part(const struct dsc_transfer *transfer) {
    return transfer->n_started == transfer->n_bytes;
}

/* What is not under way yet will not be: the transfer has failed, or nobody waits for it. */
static void give_up(struct dsc_io *io, struct dsc_transfer *transfer) {
    struct dsc_transfer **link = &io->first, *before = NULL;
    transfer->n_done += transfer->n_bytes - transfer->n_started;
    if (is_last_part(transfer))
        return;
    transfer->n_started = transfer->n_bytes;
    for (; *link != transfer; link = &before->next)
        before = *link;
    *link = transfer->next;
    if (io->last == transfer)
        io->last = before;
}

void dsc_io_close(struct dsc_io *io) {
    if (!io)
        return;
    bool ours = io->pid == getpid();
    while (ours && io->first)
        give_up(io, io->first);
    while (ours && io->n_busy > 0)
        io->mover->turn(io, true);
    io->mover->close(io);
    dsc_free(io->requests);
    dsc_free(io);
}

/* The kernel may have room for it a moment later. */
static bool may_be_tried_again(const struct dsc__io_request *request, long result) {
    enum { MOST_TRIES = 1000 };
    bool passes = result == -EINTR || result == -EAGAIN || result == -EBUSY || result == -ENOMEM;
    return passes && request->n_tries < MOST_TRIES;
}

void dsc__io_ended(struct dsc_io *io, struct dsc__io_request *request, long result) {
    struct dsc_transfer *transfer = request->transfer;
    if (may_be_tried_again(request, result) || (result > 0 && (size_t)result < request->n_bytes)) {
        size_t n = result > 0 ? (size_t)result : 0;
        request->n_tries = result > 0 ? 0 : request->n_tries + 1;
        transfer->n_done += n;
        request->offset += n;
        request->data += n;
        request->n_bytes -= n;
        io->mover->start(io, request);
        return;
    }
    if (result <= 0 && transfer->error == 0) {
        transfer->error = result < 0 ? (int)-result : -1;
        transfer->failed_at = request->offset;
    }
    transfer->n_done += request->n_bytes;
    request->next = io->idle;
    io->idle = request;
    io->n_busy--;
    if (transfer->error != 0)
        give_up(io, transfer);
}

/* Requests of waiting transfers start as long as the queue has room. */
static void feed(struct dsc_io *io) {
    if (io->options.in_batches && io->n_busy > 0)
        return;
    while (io->first && io->idle) {
        struct dsc_transfer *transfer = io->first;
        struct dsc__io_request *request = io->idle;
        size_t n = dsc_min(io->options.block_bytes, transfer->n_bytes - transfer->n_started);
        io->idle = request->next;
        *request = (struct dsc__io_request){.transfer = transfer,
                                            .offset = transfer->offset + transfer->n_started,
                                            .n_bytes = n,
                                            .data = transfer->data + transfer->n_started};
        transfer->n_started += n;
        if (is_last_part(transfer)) {
            io->first = transfer->next;
            io->last = io->first ? io->last : NULL;
        }
        io->n_busy++;
        io->mover->start(io, request);
        if (io->options.single_submit)
            io->mover->turn(io, false);
    }
}

void dsc_io_start(struct dsc_io *io, struct dsc_transfer *transfer) {
    transfer->next = NULL;
    transfer->n_started = transfer->n_done = 0;
    transfer->error = 0;
    if (transfer->n_bytes == 0)
        return;
    if (io->last)
        io->last->next = transfer;
    else
        io->first = transfer;
    io->last = transfer;
    dsc_io_poke(io);
}

void dsc_io_poke(struct dsc_io *io) {
    if (io->n_busy > 0)
        io->mover->turn(io, false);
    feed(io);
    if (io->n_busy > 0) /* what has been fed gets under way */
        io->mover->turn(io, false);
}

enum dsc_status dsc_io_wait(struct dsc_io *io, struct dsc_transfer *transfer) {
    if (io->pid != getpid())
        return DSC_FAIL(DSC_ESTATE, "this is a forked child: files belong to process %ld",
                        (long)io->pid);
    dsc_io_poke(io);
    while (!dsc_transfer_done(transfer)) {
        feed(io); /* first: what was under way may all have ended, and nothing more would */
        if (io->n_busy > 0)
            io->mover->turn(io, true);
    }
    if (transfer->error == 0 || !transfer->file)
        return DSC_OK;
    return DSC_FAIL_OS(
        transfer->error, "%s of %zu bytes at offset %zu of %s failed at offset %zu: %s",
        transfer->writes ? "write" : "read", transfer->n_bytes, transfer->offset,
        transfer->file->path, transfer->failed_at,
        transfer->error < 0 ? "nothing more could be moved" : strerror(transfer->error));
}
