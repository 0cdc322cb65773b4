/* Masters and optimizer states of one space in a file, streamed through memory during a step.
 *
 * Decides: the windows in which a step walks over them, which are read ahead and written behind,
 * and the memory that takes. For everybody else (tensors of a state dict, optimizers that need
 * whole parameters) the same bytes are mapped. Invariant: between steps the file holds everything;
 * during one a window belongs to whoever took it last. */
#ifndef DSC_SWAP_H
#define DSC_SWAP_H

#include "dsc.h"
#include "file_io.h"
#include "optim.h"

/* Elements of a window, a multiple of DSC_BLOCK. */
enum { DSC_SWAP_ELEMS = 512 * 1024 };
/* What a window can have: the master, and the states. */
enum { DSC_SWAP_MASTER, DSC_SWAP_STATE, DSC_SWAP_TENSORS = DSC_SWAP_STATE + DSC_OPTIM_MAX_STATES };

struct dsc_swap_options {
    const char *folder; /* NULL: states stay in memory */
    int64_t n_buffers;  /* windows in memory; 0: no step will walk over them */
    struct dsc_io_options io;
};

struct dsc_swap;

/* Bytes of the file, and of the windows in memory, for n_elems (a multiple of DSC_BLOCK). */
size_t dsc_swap_file_bytes(size_t n_elems, int n_tensors);
size_t dsc_swap_private_bytes(size_t n_elems, int n_tensors, int64_t n_buffers);

/* A file for n_tensors, all zero, and the windows for them; n_elems > 0. `io` stays the caller's.
 * first: DSC_SWAP_MASTER, or DSC_SWAP_STATE where there is no master. */
enum dsc_status dsc_swap_open(struct dsc_io *io, const struct dsc_swap_options *options,
                              const char *name, size_t n_elems, int first, int n_tensors,
                              struct dsc_swap **out);
/* NULL is fine. */
void dsc_swap_close(struct dsc_swap *swap);
/* Of its windows. */
size_t dsc_swap_memory_bytes(const struct dsc_swap *swap);
/* All of one tensor as memory of the arena's, of n_elems floats, for outside of steps. From here on
 * it is in the windows too. */
enum dsc_status dsc_swap_map(struct dsc_swap *swap, int tensor, float **out);

struct dsc_swap_window {
    size_t begin, end;                /* elements */
    float *tensors[DSC_SWAP_TENSORS]; /* of `begin` on; NULL: not mapped, so nobody's yet */
};
/* The first windows are read; a step will come. Never waits. */
void dsc_swap_begin(struct dsc_swap *swap);
/* The window that `elem` is in; the one before is written. Elements come in ascending order. */
enum dsc_status dsc_swap_take(struct dsc_swap *swap, size_t elem, struct dsc_swap_window *out);
/* The step has walked over everything; returns when it is in the file. */
enum dsc_status dsc_swap_finish(struct dsc_swap *swap);
/* A read or a write has failed, so what the file holds is not what it should. */
bool dsc_swap_failed(const struct dsc_swap *swap);
/* There was no step, or it failed: waits for what is under way, whatever becomes of it. */
void dsc_swap_drop(struct dsc_swap *swap);

#endif
