/* One rank's part of a save under way: its tensors, their checksums, and who writes them.
 *
 * Decides: whether the caller's thread writes from the tensors themselves, or a thread of its own
 * from a copy, so that training goes on. Invariant: once a write has begun, layout and checksums
 * are final when dsc_save_write or dsc_save_start returns; the memory of a copy is given back as
 * soon as it is on the disk, or has failed to get there. A failure stays: every later question
 * gives it. A forked child may only close: that frees memory. */
#ifndef DSC_SAVE_H
#define DSC_SAVE_H

#include "pool.h"
#include "shard.h"

struct dsc_save;

/* Borrows the memory of data[i], of tensors[i], until the write has returned (or the start, which
 * copies); the rest is copied here. Otherwise as dsc_shard_layout. */
enum dsc_status dsc_save_open(const char *path, const struct dsc_shard_tensor *tensors,
                              const void *const *data, size_t n_tensors,
                              const char *const *metadata, struct dsc_save **out);
/* Waits for the thread; NULL is fine. */
void dsc_save_close(struct dsc_save *save);

/* Writes in this thread; progress as in shard.h. DSC_ESTATE where one was begun before. */
enum dsc_status dsc_save_write(struct dsc_save *save,
                               bool (*progress)(void *context, uint64_t n_done), void *context);
/* Copies all tensors, on the threads of `pool`, and leaves the writing to a thread (where none can
 * be started, it is done on return). DSC_ENOMEM where there is no room for the copy; dsc_save_write
 * serves then. */
enum dsc_status dsc_save_start(struct dsc_save *save, struct dsc_pool *pool);
/* Whether the file is there or will not be; true before a write has begun. Never waits. */
bool dsc_save_done(struct dsc_save *save);
/* Waits, and gives what the write gave. interrupted: asked ten times a second, may be NULL; true is
 * DSC_EINTR, and the write goes on. DSC_ESTATE where none was begun. */
enum dsc_status dsc_save_wait(struct dsc_save *save, bool (*interrupted)(void *), void *context);

/* Where everything stands in the file; known from the opening on. */
const struct dsc_shard_layout *dsc_save_layout(const struct dsc_save *save);
/* layout->n_crcs of them; final once a write has begun (dsc_save_start) or ended well
 * (dsc_save_write). NULL before. */
const uint32_t *dsc_save_crcs(const struct dsc_save *save);

#endif
