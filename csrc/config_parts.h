/* What the files of the configuration share; nobody else includes this.
 *
 * Invariant: a fault is added to the reading and parsing goes on, so that a user sees all of them.
 */
#ifndef DSC_CONFIG_PARTS_H
#define DSC_CONFIG_PARTS_H

#include "config.h"

struct dsc_config_alias {
    const char *from, *to;
    enum { DSC_ALIAS_RENAMED, DSC_ALIAS_SPELLING, DSC_ALIAS_OFFLOAD, DSC_ALIAS_IGNORED } how;
};
enum {
    DSC_CONFIG_N_ALIASES = 0
#define DSC_ALIAS(...) +1
#include "config_keys.def"
};
extern const struct dsc_config_alias dsc__config_aliases[DSC_CONFIG_N_ALIASES];

/* Index of the row whose path is exactly this, or -1. */
int dsc__config_index(const char *path);
bool dsc__config_is_absent(const cJSON *item); /* null or "auto" */

enum dsc_status dsc__config_error(struct dsc_config_reading *reading, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
enum dsc_status dsc__config_warn(struct dsc_config_reading *reading, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
/* snprintf that never cuts a UTF-8 sequence in two; n > 0. */
void dsc__config_put(char *out, size_t n, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* A value as a message shows it: JSON, cut after some 60 bytes, inf and nan by name. */
enum { DSC_CONFIG_SHOWN = 96 };
const char *dsc__config_show(const cJSON *item, char out[DSC_CONFIG_SHOWN]);

/* Rules over several keys; `config` has every value, batch sizes as given. */
enum dsc_status dsc__config_rules(int64_t n_data, const struct dsc_config_layout *layout,
                                  struct dsc_config *config, struct dsc_config_reading *reading);

#endif
