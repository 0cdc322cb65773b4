/* Window w lies in buffer w % n_buffers; see swap.h. Invariant: a buffer is read into only after
 * its last window has been written. */
#define _GNU_SOURCE
#include "swap.h"

#include "alloc.h"
#include "arena.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

struct buffer {
    char *data; /* DSC_SWAP_TENSORS parts, of those that there are */
    struct dsc_transfer transfers[DSC_SWAP_TENSORS];
};

struct dsc_swap {
    struct dsc_io *io;
    struct dsc_file *file;
    size_t n_elems;
    int first, n_tensors;
    bool used[DSC_SWAP_TENSORS];
    void *memory; /* of all buffers */
    size_t memory_bytes;
    size_t n_windows, n_buffers;
    struct buffer *buffers;
    bool failed;
    bool active;      /* between begin and finish or drop */
    bool taken;       /* `current` is somebody's */
    size_t current;   /* window */
    size_t next_read; /* window */
};

static size_t window_elems(size_t n_elems) {
    return dsc_min(n_elems, DSC_SWAP_ELEMS);
}

static size_t count_windows(size_t n_elems) {
    return (n_elems + DSC_SWAP_ELEMS - 1) / DSC_SWAP_ELEMS;
}

static size_t count_buffers(size_t n_elems, int64_t n_buffers) {
    return n_buffers > 0 ? dsc_min((size_t)n_buffers, count_windows(n_elems)) : 0;
}

size_t dsc_swap_file_bytes(size_t n_elems, int n_tensors) {
    return n_elems * sizeof(float) * (size_t)n_tensors;
}

size_t dsc_swap_private_bytes(size_t n_elems, int n_tensors, int64_t n_buffers) {
    return count_buffers(n_elems, n_buffers) * window_elems(n_elems) * sizeof(float) *
           (size_t)n_tensors;
}

static enum dsc_status allocate(struct dsc_swap *swap) {
    if (swap->n_buffers == 0)
        return DSC_OK;
    size_t buffer_bytes = swap->memory_bytes / swap->n_buffers;
    DSC_TRY(dsc_alloc(swap->n_buffers * sizeof *swap->buffers, (void **)&swap->buffers));
    DSC_TRY(dsc_arena_alloc(swap->memory_bytes, &swap->memory));
    /* open(2): a fork during direct I/O may tear private memory that the child inherits. */
    if (madvise(swap->memory, swap->memory_bytes, MADV_DONTFORK) != 0)
        return DSC_FAIL(DSC_ENOMEM, "could not keep %zu bytes from children: %s",
                        swap->memory_bytes, strerror(errno));
    for (size_t b = 0; b < swap->n_buffers; b++)
        swap->buffers[b].data = (char *)swap->memory + b * buffer_bytes;
    return DSC_OK;
}

enum dsc_status dsc_swap_open(struct dsc_io *io, const struct dsc_swap_options *options,
                              const char *name, size_t n_elems, int first, int n_tensors,
                              struct dsc_swap **out) {
    struct dsc_swap *swap;
    DSC_TRY(dsc_alloc(sizeof *swap, (void **)&swap));
    swap->io = io;
    swap->n_elems = n_elems;
    swap->first = first;
    swap->n_tensors = n_tensors;
    swap->n_windows = count_windows(n_elems);
    swap->n_buffers = count_buffers(n_elems, options->n_buffers);
    swap->memory_bytes = dsc_swap_private_bytes(n_elems, n_tensors, options->n_buffers);
    enum dsc_status status =
        dsc_file_open(options->folder, name, dsc_swap_file_bytes(n_elems, n_tensors), &swap->file);
    if (status == DSC_OK)
        status = allocate(swap);
    if (status != DSC_OK) {
        dsc_swap_close(swap);
        return status;
    }
    *out = swap;
    return DSC_OK;
}

void dsc_swap_close(struct dsc_swap *swap) {
    if (!swap)
        return;
    if (swap->buffers)
        dsc_swap_drop(swap);
    dsc_arena_free(swap->memory, swap->memory_bytes);
    dsc_free(swap->buffers);
    dsc_file_close(swap->file);
    dsc_free(swap);
}

size_t dsc_swap_memory_bytes(const struct dsc_swap *swap) {
    return swap->memory_bytes;
}

static size_t offset_of(const struct dsc_swap *swap, int tensor) {
    return (size_t)(tensor - swap->first) * swap->n_elems * sizeof(float);
}

enum dsc_status dsc_swap_map(struct dsc_swap *swap, int tensor, float **out) {
    DSC_TRY(dsc_arena_map(dsc_file_descriptor(swap->file), offset_of(swap, tensor),
                          swap->n_elems * sizeof(float), (void **)out));
    swap->used[tensor] = true;
    return DSC_OK;
}

static struct buffer *buffer_of(struct dsc_swap *swap, size_t window) {
    return &swap->buffers[window % swap->n_buffers];
}

static char *part_of(const struct dsc_swap *swap, const struct buffer *buffer, int tensor) {
    return buffer->data +
           (size_t)(tensor - swap->first) * window_elems(swap->n_elems) * sizeof(float);
}

static void transfer(struct dsc_swap *swap, size_t window, bool writes) {
    struct buffer *buffer = buffer_of(swap, window);
    size_t begin = window * DSC_SWAP_ELEMS;
    size_t n = dsc_min(DSC_SWAP_ELEMS, swap->n_elems - begin);
    for (int t = 0; t < DSC_SWAP_TENSORS; t++) {
        if (!swap->used[t])
            continue;
        buffer->transfers[t] =
            (struct dsc_transfer){.file = swap->file,
                                  .writes = writes,
                                  .offset = offset_of(swap, t) + begin * sizeof(float),
                                  .n_bytes = n * sizeof(float),
                                  .data = part_of(swap, buffer, t)};
        dsc_io_start(swap->io, &buffer->transfers[t]);
    }
}

static bool is_idle(const struct buffer *buffer) {
    bool idle = true;
    for (int t = 0; t < DSC_SWAP_TENSORS; t++)
        idle &= dsc_transfer_done(&buffer->transfers[t]);
    return idle;
}

static enum dsc_status wait_for(struct dsc_swap *swap, struct buffer *buffer) {
    enum dsc_status status = DSC_OK;
    for (int t = 0; status == DSC_OK && t < DSC_SWAP_TENSORS; t++)
        status = dsc_io_wait(swap->io, &buffer->transfers[t]);
    swap->failed |= status != DSC_OK;
    return status;
}

static enum dsc_status read_next(struct dsc_swap *swap) {
    DSC_TRY(wait_for(swap, buffer_of(swap, swap->next_read)));
    transfer(swap, swap->next_read++, false);
    return DSC_OK;
}

/* Windows whose buffers are free, so that nothing waits; a write that failed is found by whoever
 * waits for it. */
static enum dsc_status read_ahead(struct dsc_swap *swap) {
    while (swap->next_read < swap->n_windows && swap->next_read < swap->current + swap->n_buffers &&
           is_idle(buffer_of(swap, swap->next_read)))
        DSC_TRY(read_next(swap));
    dsc_io_poke(swap->io);
    return DSC_OK;
}

void dsc_swap_begin(struct dsc_swap *swap) {
    if (swap->active)
        return;
    swap->active = true;
    swap->taken = false;
    swap->current = swap->next_read = 0;
    (void)read_ahead(swap); /* all buffers are free and whole */
}

static void retire(struct dsc_swap *swap) {
    if (swap->taken)
        transfer(swap, swap->current, true);
    swap->taken = false;
}

enum dsc_status dsc_swap_take(struct dsc_swap *swap, size_t elem, struct dsc_swap_window *out) {
    size_t window = elem / DSC_SWAP_ELEMS;
    struct buffer *buffer = buffer_of(swap, window);
    dsc_swap_begin(swap);
    if (!swap->taken || swap->current != window) {
        retire(swap);
        swap->current = window;
        while (swap->next_read <= window)
            DSC_TRY(read_next(swap));
        DSC_TRY(wait_for(swap, buffer));
        swap->taken = true;
    }
    out->begin = window * DSC_SWAP_ELEMS;
    out->end = dsc_min(out->begin + DSC_SWAP_ELEMS, swap->n_elems);
    for (int t = 0; t < DSC_SWAP_TENSORS; t++)
        out->tensors[t] = swap->used[t] ? (float *)(void *)part_of(swap, buffer, t) : NULL;
    return read_ahead(swap);
}

enum dsc_status dsc_swap_finish(struct dsc_swap *swap) {
    retire(swap);
    for (size_t b = 0; b < swap->n_buffers; b++)
        DSC_TRY(wait_for(swap, &swap->buffers[b]));
    swap->active = false;
    return DSC_OK;
}

bool dsc_swap_failed(const struct dsc_swap *swap) {
    return swap->failed;
}

void dsc_swap_drop(struct dsc_swap *swap) {
    for (size_t b = 0; b < swap->n_buffers; b++)
        for (int t = 0; t < DSC_SWAP_TENSORS; t++)
            (void)dsc_io_wait(swap->io, &swap->buffers[b].transfers[t]);
    swap->active = swap->taken = false;
}
