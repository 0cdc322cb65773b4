/* A save and its thread. Invariant: the job belongs to the thread from its start until `done`, but
 * for detaching, which a job takes from anybody; the rest of the object belongs to the caller. */
#define _GNU_SOURCE
#include "save.h"

#include "alloc.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

struct dsc_save {
    pid_t pid;
    char *path;
    struct dsc_shard_layout layout;
    struct dsc_shard_job *job;
    const void **data; /* of layout.tensors[i] */
    uint32_t *crcs;
    bool begun, threaded, detached;

    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t ended;
    atomic_bool done;
    /* How it ended: written before `done`. */
    enum dsc_status status;
    int error;
    char text[1024];
};

/* ---- life ---- */

static enum dsc_status fill(struct dsc_save *save, const char *path,
                            const struct dsc_shard_tensor *tensors, const void *const *data,
                            size_t n_tensors, const char *const *metadata) {
    DSC_TRY(dsc_alloc(strlen(path) + 1, (void **)&save->path));
    memcpy(save->path, path, strlen(path) + 1);
    DSC_TRY(dsc_shard_layout(tensors, n_tensors, metadata, &save->layout));
    DSC_TRY(dsc_alloc(n_tensors * sizeof *save->data, (void **)&save->data));
    DSC_TRY(dsc_alloc(save->layout.n_crcs * sizeof *save->crcs, (void **)&save->crcs));
    for (size_t i = 0; i < n_tensors; i++)
        save->data[i] = data[save->layout.source[i]];
    return DSC_OK;
}

enum dsc_status dsc_save_open(const char *path, const struct dsc_shard_tensor *tensors,
                              const void *const *data, size_t n_tensors,
                              const char *const *metadata, struct dsc_save **out) {
    struct dsc_save *save = NULL;
    DSC_TRY(dsc_alloc(sizeof *save, (void **)&save));
    save->pid = getpid();
    (void)pthread_mutex_init(&save->lock, NULL);
    pthread_condattr_t clock;
    (void)pthread_condattr_init(&clock);
    (void)pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    (void)pthread_cond_init(&save->ended, &clock);
    (void)pthread_condattr_destroy(&clock);
    enum dsc_status status = fill(save, path, tensors, data, n_tensors, metadata);
    if (status == DSC_OK)
        *out = save;
    else
        dsc_save_close(save);
    return status;
}

void dsc_save_close(struct dsc_save *save) {
    if (!save)
        return;
    if (save->pid == getpid()) {
        if (save->threaded)
            (void)pthread_join(save->thread, NULL);
        (void)pthread_cond_destroy(&save->ended);
        (void)pthread_mutex_destroy(&save->lock);
    }
    dsc_shard_job_close(save->job);
    dsc_free(save->crcs);
    dsc_free(save->data);
    dsc_shard_layout_free(&save->layout);
    dsc_free(save->path);
    dsc_free(save);
}

/* ---- writing ---- */

static enum dsc_status may_begin(const struct dsc_save *save) {
    if (save->pid != getpid())
        return DSC_FAIL(DSC_ESTATE, "%s: this is a forked child: the save is of process %ld",
                        save->path, (long)save->pid);
    if (save->begun)
        return DSC_FAIL(DSC_ESTATE, "%s: it has been written already", save->path);
    return DSC_OK;
}

/* Writes, and keeps how that ended. */
static enum dsc_status write_now(struct dsc_save *save) {
    enum dsc_status status = dsc_shard_job_run(save->job);
    save->status = status;
    if (status != DSC_OK) {
        size_t n = dsc_min(strlen(dsc_last_error()), sizeof save->text - 1);
        memcpy(save->text, dsc_last_error(), n);
        save->error = dsc_last_errno();
    }
    return status;
}

/* Who waits for the write has its bytes in the page cache; a thread's go past it, which leaves the
 * processor to whoever goes on. */
static enum dsc_status begin(struct dsc_save *save,
                             bool (*progress)(void *context, uint64_t n_done), void *context,
                             bool cached) {
    const struct dsc_shard_writing writing = {&save->layout, save->data, save->crcs,
                                              progress,      context,    cached};
    DSC_TRY(may_begin(save));
    DSC_TRY(dsc_shard_job_open(save->path, &writing, &save->job));
    save->begun = true;
    return DSC_OK;
}

enum dsc_status dsc_save_write(struct dsc_save *save,
                               bool (*progress)(void *context, uint64_t n_done), void *context) {
    DSC_TRY(begin(save, progress, context, true));
    enum dsc_status status = write_now(save);
    atomic_store(&save->done, true);
    return status;
}

static void *thread_main(void *context) {
    struct dsc_save *save = context;
    (void)write_now(save);
    (void)pthread_mutex_lock(&save->lock);
    atomic_store(&save->done, true);
    (void)pthread_cond_broadcast(&save->ended);
    (void)pthread_mutex_unlock(&save->lock);
    return NULL;
}

/* With no signal of the process: its handlers run in the caller's threads. */
static int start_thread(struct dsc_save *save) {
    sigset_t all, before;
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&save->thread, NULL, thread_main, save);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

enum dsc_status dsc_save_start(struct dsc_save *save) {
    DSC_TRY(begin(save, NULL, NULL, false));
    save->threaded = start_thread(save) == 0;
    if (!save->threaded) /* then this one writes; how that ends is for whoever waits */
        (void)thread_main(save);
    return DSC_OK;
}

static enum dsc_status may_look(const struct dsc_save *save) {
    if (!save->begun)
        return DSC_FAIL(DSC_ESTATE, "%s: nothing has begun to write it", save->path);
    if (save->pid != getpid())
        return DSC_FAIL(DSC_ESTATE, "%s: this is a forked child: the save is of process %ld",
                        save->path, (long)save->pid);
    return DSC_OK;
}

enum dsc_status dsc_save_detach(struct dsc_save *save, struct dsc_pool *pool) {
    DSC_TRY(may_look(save));
    dsc_shard_job_detach(save->job, pool);
    save->detached = true;
    return DSC_OK;
}

bool dsc_save_done(struct dsc_save *save) {
    return !save->begun || atomic_load(&save->done);
}

/* Waits a tenth of a second at most. */
static void wait_a_little(struct dsc_save *save) {
    struct timespec until;
    (void)clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += 100 * 1000 * 1000;
    until.tv_sec += until.tv_nsec / (1000 * 1000 * 1000);
    until.tv_nsec %= 1000 * 1000 * 1000;
    (void)pthread_mutex_lock(&save->lock);
    if (!atomic_load(&save->done))
        (void)pthread_cond_timedwait(&save->ended, &save->lock, &until);
    (void)pthread_mutex_unlock(&save->lock);
}

enum dsc_status dsc_save_wait(struct dsc_save *save, bool (*interrupted)(void *), void *context) {
    DSC_TRY(may_look(save));
    while (!atomic_load(&save->done)) {
        wait_a_little(save);
        if (!atomic_load(&save->done) && interrupted && interrupted(context))
            return DSC_FAIL(DSC_EINTR, "%s: waiting for it was interrupted", save->path);
    }
    if (save->status == DSC_EIO)
        return DSC_FAIL_OS(save->error, "%s", save->text);
    return save->status == DSC_OK ? DSC_OK : DSC_FAIL(save->status, "%s", save->text);
}

const struct dsc_shard_layout *dsc_save_layout(const struct dsc_save *save) {
    return &save->layout;
}

const uint32_t *dsc_save_crcs(const struct dsc_save *save) {
    return save->detached || (save->begun && atomic_load(&save->done)) ? save->crcs : NULL;
}
