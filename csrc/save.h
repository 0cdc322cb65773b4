/* One rank's part of a save under way: its tensors, their checksums, and who writes them.
 *
 * Decides: whether the caller's thread writes, or one of its own, so that training goes on; that
 * one reads the tensors where they lie until the caller wants to change them. Invariant: the memory
 * of a save is given back as soon as it is on the disk, or has failed to get there. A failure
 * stays: every later question gives it. A forked child may only close: that frees memory. */
#ifndef DSC_SAVE_H
#define DSC_SAVE_H

#include "pool.h"
#include "shard.h"

struct dsc_save;

/* Borrows the memory of data[i], of tensors[i], until dsc_save_write or dsc_save_detach has
 * returned, or the save is done; the rest is copied here. Otherwise as dsc_shard_layout. */
enum dsc_status dsc_save_open(const char *path, const struct dsc_shard_tensor *tensors,
                              const void *const *data, size_t n_tensors,
                              const char *const *metadata, struct dsc_save **out);
/* Waits for the thread; NULL is fine. */
void dsc_save_close(struct dsc_save *save);

/* Writes in this thread; progress as in shard.h. DSC_ESTATE where one was begun before. */
enum dsc_status dsc_save_write(struct dsc_save *save,
                               bool (*progress)(void *context, uint64_t n_done), void *context);
/* Leaves the writing to a thread (where none can be started, it is done on return). The tensors are
 * not to change until dsc_save_detach has returned, or the save is done. */
enum dsc_status dsc_save_start(struct dsc_save *save);
/* After a start: on return the tensors may change. See dsc_shard_job_detach. */
enum dsc_status dsc_save_detach(struct dsc_save *save, struct dsc_pool *pool);
/* Whether the file is there or will not be; true before a write has begun. Never waits. */
bool dsc_save_done(struct dsc_save *save);
/* Waits, and gives what the write gave. interrupted: asked ten times a second, may be NULL; true is
 * DSC_EINTR, and the write goes on. DSC_ESTATE where none was begun. */
enum dsc_status dsc_save_wait(struct dsc_save *save, bool (*interrupted)(void *), void *context);

/* Where everything stands in the file; known from the opening on. */
const struct dsc_shard_layout *dsc_save_layout(const struct dsc_save *save);
/* layout->n_crcs of them, once they are final: detached, or written. NULL before. */
const uint32_t *dsc_save_crcs(const struct dsc_save *save);

#endif
