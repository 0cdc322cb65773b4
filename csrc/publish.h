/* The folder of a checkpoint under way, and the moment at which it becomes one.
 *
 *   <dir>/.saving-<tag>/lock      held (flock) as long as the save lives
 *   <dir>/.saving-<tag>/files/    what is written: becomes <dir>/<tag> by one rename
 *   <dir>/.saving-<tag>/latest    becomes <dir>/latest by one rename; so does what else comes along
 *
 * Decides: when a checkpoint is there, who may write one, what is debris. Invariant: <dir>/<tag>
 * and <dir>/latest change each in one step, after what they stand for is on the disk; a kill at any
 * moment leaves the one before or the new one, and in .saving-* what the next save of anybody
 * removes, once nobody holds its lock. What a user put into <dir>/<tag> stays there. */
#ifndef DSC_PUBLISH_H
#define DSC_PUBLISH_H

#include "dsc.h"

struct dsc_folder;

/* Makes `dir` where it is missing, removes debris in it, and makes an empty folder for `tag`.
 * DSC_EINVAL: no tag that a folder can have. DSC_ESTATE: somebody is saving it right now. DSC_EIO
 * with errno and path. */
enum dsc_status dsc_folder_open(const char *dir, const char *tag, struct dsc_folder **out);
/* Where to write; absolute. */
const char *dsc_folder_path(const struct dsc_folder *folder);
/* One small file there, whole and synced. */
enum dsc_status dsc_folder_write(const struct dsc_folder *folder, const char *name,
                                 const void *data, size_t n_bytes);

/* An executable file that lies in <dir>. */
struct dsc_beside {
    const char *name;
    const void *data;
    size_t n_bytes;
};
/* Syncs the folder and makes it <dir>/<tag>; one that stood there goes. latest: <dir>/latest names
 * the tag from then on. beside: is written where it is not there already, before. Files in it were
 * synced by those who wrote them. On failure the checkpoint is not there, unless the text says
 * that it is. Once. */
enum dsc_status dsc_folder_publish(struct dsc_folder *folder, bool latest,
                                   const struct dsc_beside *beside, size_t n_beside);
/* Removes what is left aside and frees. NULL is fine. A forked child only frees. */
void dsc_folder_close(struct dsc_folder *folder);

#endif
