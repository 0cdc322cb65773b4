/* Threads that move bytes with pread and pwrite. Invariant: a thread touches a request from the
 * moment it takes it off `todo` until it has put it on `ended`, both under the lock. */
#define _GNU_SOURCE
#include "file_io_impl.h"

#include "alloc.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

enum { MOST_THREADS = 64 };

struct threads {
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    struct dsc__io_request *todo, *last, *ended;
    bool closing;
    int n;
    pthread_t handles[MOST_THREADS];
};

static long move(const struct dsc__io_request *request) {
    const struct dsc_transfer *transfer = request->transfer;
    int fd = transfer->file->fd;
    ssize_t n = transfer->writes
                    ? pwrite(fd, request->data, request->n_bytes, (off_t)request->offset)
                    : pread(fd, request->data, request->n_bytes, (off_t)request->offset);
    return n < 0 ? -errno : (long)n;
}

static void *serve(void *context) {
    struct threads *threads = context;
    (void)pthread_mutex_lock(&threads->lock);
    for (;;) {
        while (!threads->todo && !threads->closing)
            (void)pthread_cond_wait(&threads->work, &threads->lock);
        struct dsc__io_request *request = threads->todo;
        if (!request)
            break;
        threads->todo = request->next;
        (void)pthread_mutex_unlock(&threads->lock);
        request->result = move(request);
        (void)pthread_mutex_lock(&threads->lock);
        request->next = threads->ended;
        threads->ended = request;
        (void)pthread_cond_signal(&threads->done);
    }
    (void)pthread_mutex_unlock(&threads->lock);
    return NULL;
}

static void end_threads(struct threads *threads) {
    (void)pthread_mutex_lock(&threads->lock);
    threads->closing = true;
    (void)pthread_cond_broadcast(&threads->work);
    (void)pthread_mutex_unlock(&threads->lock);
    for (int i = 0; i < threads->n; i++)
        (void)pthread_join(threads->handles[i], NULL);
    (void)pthread_cond_destroy(&threads->work);
    (void)pthread_cond_destroy(&threads->done);
    (void)pthread_mutex_destroy(&threads->lock);
}

static enum dsc_status open_threads(struct dsc_io *io) {
    struct threads *threads;
    DSC_TRY(dsc_alloc(sizeof *threads, (void **)&threads));
    (void)pthread_mutex_init(&threads->lock, NULL);
    (void)pthread_cond_init(&threads->work, NULL);
    (void)pthread_cond_init(&threads->done, NULL);
    int n = io->options.n_threads < 2 ? 2 : io->options.n_threads, error = 0;
    sigset_t all, before; /* a limit on file sizes is an error here, not a signal to the process */
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    for (; error == 0 && threads->n < n && threads->n < MOST_THREADS; threads->n += error == 0)
        error = pthread_create(&threads->handles[threads->n], NULL, serve, threads);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (threads->n == 0) {
        end_threads(threads);
        dsc_free(threads);
        return DSC_FAIL(DSC_EIO, "a thread for reading and writing files could not be started: %s",
                        strerror(error));
    }
    io->state = threads;
    return DSC_OK;
}

static void close_threads(struct dsc_io *io) {
    if (io->pid == getpid())
        end_threads(io->state);
    dsc_free(io->state);
}

static void start_request(struct dsc_io *io, struct dsc__io_request *request) {
    struct threads *threads = io->state;
    request->next = NULL;
    (void)pthread_mutex_lock(&threads->lock);
    if (threads->todo)
        threads->last->next = request;
    else
        threads->todo = request;
    threads->last = request;
    (void)pthread_cond_signal(&threads->work);
    (void)pthread_mutex_unlock(&threads->lock);
}

static void turn_threads(struct dsc_io *io, bool waits) {
    struct threads *threads = io->state;
    (void)pthread_mutex_lock(&threads->lock);
    while (waits && !threads->ended && io->n_busy > 0)
        (void)pthread_cond_wait(&threads->done, &threads->lock);
    struct dsc__io_request *ended = threads->ended, *next;
    threads->ended = NULL;
    (void)pthread_mutex_unlock(&threads->lock);
    for (; ended; ended = next) {
        next = ended->next;
        dsc__io_ended(io, ended, ended->result);
    }
}

const struct dsc__io_mover dsc__io_threads = {
    .open = open_threads,
    .close = close_threads,
    .start = start_request,
    .turn = turn_threads,
};
