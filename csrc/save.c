/* A save, its copy and its thread. Invariant: `writing` and what it points to belong to the thread
 * from its start until `done`; the rest of the object belongs to the caller. */
#define _GNU_SOURCE
#include "save.h"

#include "alloc.h"
#include "arena.h"
#include "crc32c.h"

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
    struct dsc_shard_writing writing;
    const void **data; /* of layout.tensors[i] */
    uint32_t *crcs;
    char *copy; /* the whole file, where a thread writes it */
    bool begun, threaded;

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

static void free_copy(struct dsc_save *save) {
    void *copy = save->copy;
    save->copy = NULL; /* first: a child that is forked in between must not free it again */
    dsc_arena_free(copy, save->layout.n_bytes);
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
    free_copy(save); /* still there in a forked child, and where a start ran out of memory */
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
    enum dsc_status status = dsc_shard_write(save->path, &save->writing);
    free_copy(save);
    save->status = status;
    if (status != DSC_OK) {
        size_t n = dsc_min(strlen(dsc_last_error()), sizeof save->text - 1);
        memcpy(save->text, dsc_last_error(), n);
        save->error = dsc_last_errno();
    }
    return status;
}

enum dsc_status dsc_save_write(struct dsc_save *save,
                               bool (*progress)(void *context, uint64_t n_done), void *context) {
    DSC_TRY(may_begin(save));
    save->begun = true;
    save->writing = (struct dsc_shard_writing){.layout = &save->layout,
                                               .data = save->data,
                                               .crcs = save->crcs,
                                               .progress = progress,
                                               .context = context};
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

/* Blocks of tensors, numbered as their checksums are. */
static void copy_blocks(void *context, size_t begin, size_t end) {
    struct dsc_save *save = context;
    const struct dsc_shard_layout *layout = &save->layout;
    size_t low = 0, high = layout->n_tensors;
    while (high - low > 1) { /* the tensor of the first block */
        size_t middle = low + (high - low) / 2;
        if (layout->first_crc[middle] <= begin)
            low = middle;
        else
            high = middle;
    }
    for (; begin < end; low++)
        for (; begin < end && begin < layout->first_crc[low + 1]; begin++) {
            const struct dsc_shard_tensor *tensor = &layout->tensors[low];
            uint64_t at = (begin - layout->first_crc[low]) * (uint64_t)DSC_SHARD_CRC_BYTES;
            save->crcs[begin] = dsc_crc32c_copy(save->copy + tensor->offset + at,
                                                (const char *)save->data[low] + at,
                                                dsc_min(DSC_SHARD_CRC_BYTES, tensor->n_bytes - at));
        }
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

enum dsc_status dsc_save_start(struct dsc_save *save, struct dsc_pool *pool) {
    const struct dsc_shard_layout *layout = &save->layout;
    DSC_TRY(may_begin(save));
    DSC_TRY(dsc_arena_alloc(layout->n_bytes, (void **)&save->copy));
    memcpy(save->copy, layout->header, layout->header_bytes);
    dsc_pool_run(pool, layout->n_crcs, 1, copy_blocks, save);
    save->writing = (struct dsc_shard_writing){.layout = layout, .image = save->copy};
    save->begun = true;
    save->threaded = start_thread(save) == 0;
    if (!save->threaded) /* then this one writes; how that ends is for whoever waits */
        (void)thread_main(save);
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
    if (!save->begun)
        return DSC_FAIL(DSC_ESTATE, "%s: nothing has begun to write it", save->path);
    if (save->pid != getpid())
        return DSC_FAIL(DSC_ESTATE, "%s: this is a forked child: the save is of process %ld",
                        save->path, (long)save->pid);
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
    return save->begun ? save->crcs : NULL;
}
