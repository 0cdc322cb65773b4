/* The JSON configuration: a cJSON tree becomes struct dsc_config, or a list of everything wrong.
 *
 * Decides: which keys exist, their types, ranges and defaults (all in config_keys.def), what is
 * 'not yet', and the batch-size rule. Invariant: a key that is given either does what it says,
 * provably changes nothing, or is an error; all errors of a configuration are reported together.
 * Called by bind/config.c; the engine reads the fields. */
#ifndef DSC_CONFIG_H
#define DSC_CONFIG_H

#include "dsc.h"

#include <cjson/cJSON.h>
#include <math.h>

/* An integer whose default is null and that was not given. A float in the same state is NaN, a
 * string or enumeration NULL, a three-state bool -1. */
#define DSC_CONFIG_NONE INT64_MIN

/* A plain value, one field per scalar key. Enumerations point to static text in the spelling of the
 * table; a free string points into the tree that was parsed and lives as long as that. */
struct dsc_config {
#define DSC_BOOL(field, ...) bool field;
#define DSC_TRI(field, ...) int field;
#define DSC_INT(field, ...) int64_t field;
#define DSC_INT_NOW(field, ...) int64_t field;
#define DSC_INT_INF(field, ...) int64_t field;
#define DSC_FLOAT(field, ...) double field;
#define DSC_FLOAT_OR_BOOL(field, ...) double field;
#define DSC_STR(field, ...) const char *field;
#define DSC_ENUM(field, ...) const char *field;
#include "config_keys.def"
};

enum dsc_key_kind {
    DSC_KEY_SECTION,
    DSC_KEY_BOOL,
    DSC_KEY_TRI,
    DSC_KEY_INT,
    DSC_KEY_FLOAT,
    DSC_KEY_STR,
    DSC_KEY_ENUM,
    DSC_KEY_LIST,
    DSC_KEY_DICT,
    DSC_KEY_ANY,
};
enum dsc_key_status { DSC_KEY_WORKS, DSC_KEY_NO_EFFECT, DSC_KEY_NOT_YET };

/* A row of the table. What a kind does not use is zero. */
struct dsc_key {
    const char *path;
    const char *accessor; /* method of DeepSpeedEngine that returns the value, or NULL */
    const char *help;
    enum dsc_key_kind kind;
    enum dsc_key_status status;
    size_t offset;          /* of the field in struct dsc_config */
    int64_t low, high, now; /* INT: allowed; above `now` not yet */
    double float_low, float_high;
    const char *text;         /* LIST, ANY: the default as JSON */
    const char *const *names; /* ENUM: NULL-terminated; a last "..." stands for any other name */
    size_t n_now;             /* ENUM: this many names work now */
    bool open;                /* SECTION: keys without a row are let through */
    bool inf;                 /* INT: inf is allowed and means INT64_MAX */
    bool or_bool;             /* FLOAT: true is allowed and means 1; SECTION: true is allowed */
};

enum {
    DSC_CONFIG_N_KEYS = 0
#define DSC_SECTION(...) +1
#define DSC_SECTION_OR_TRUE(...) +1
#define DSC_BOOL(...) +1
#define DSC_TRI(...) +1
#define DSC_INT(...) +1
#define DSC_INT_NOW(...) +1
#define DSC_INT_INF(...) +1
#define DSC_FLOAT(...) +1
#define DSC_FLOAT_OR_BOOL(...) +1
#define DSC_STR(...) +1
#define DSC_ENUM(...) +1
#define DSC_LIST(...) +1
#define DSC_DICT(...) +1
#define DSC_ANY(...) +1
#include "config_keys.def"
};

extern const struct dsc_key dsc_config_keys[DSC_CONFIG_N_KEYS];
/* The values of a configuration in which nothing is given; batch sizes are NONE here. */
extern const struct dsc_config dsc_config_defaults;

/* The row of a dotted path, other names included; NULL if there is none. */
const struct dsc_key *dsc_config_find(const char *path);
/* Spelling `i` of a table path, 0 being itself; false when there are no more. */
bool dsc_config_spelling(const char *path, size_t i, char *out, size_t n_out);
/* "an integer >= 1", for messages and for docs/config.md. */
void dsc_config_allowed(const struct dsc_key *key, char *out, size_t n_out);
/* The default as JSON text; inf and INT64_MAX as numbers. */
void dsc_config_default(const struct dsc_key *key, char *out, size_t n_out);
/* The name that is fewest insertions, deletions, replacements and swaps of neighbours away, and in
 * *distance how many; upper and lower case are equal. n 0 gives NULL. */
const char *dsc_config_nearest(const char *name, const char *const names[], size_t n,
                               size_t *distance);

/* What reading found besides values. Start with all zero; free with dsc_config_reading_free. */
struct dsc_config_reading {
    /* Into the tree, under whatever name the user wrote. */
    const cJSON *given[DSC_CONFIG_N_KEYS];
    const cJSON *absent[DSC_CONFIG_N_KEYS]; /* null or "auto", which count as not given */
    char **errors, **warnings;
    size_t n_errors, n_warnings;
};

/* Keys of sizes that an mpu tells. */
#define DSC_CONFIG_LAYOUT_MAP(X)                                                                   \
    X(tensor_model_parallel_size)                                                                  \
    X(pipeline_model_parallel_size)                                                                \
    X(sequence_parallel_size)                                                                      \
    X(context_parallel_size)                                                                       \
    X(expert_model_parallel_size)                                                                  \
    X(expert_tensor_parallel_size)
/* What it says; 0 where it says nothing, and the configuration may say anything. */
struct dsc_config_layout {
#define X(field) int64_t field;
    DSC_CONFIG_LAYOUT_MAP(X)
#undef X
};

/* Reads a tree. n_data: the ranks that share a batch out; 0, with a layout only: not known, and
 * batch sizes stay as given. `layout` NULL: there is no mpu. DSC_ECONFIG when anything is wrong:
 * reading->errors has every fault and the last error text the first ones, numbered; *out is
 * untouched then. `strict` makes unknown top-level keys errors. `reading` may be freed in any case.
 */
enum dsc_status dsc_config_parse(const cJSON *root, int64_t n_data,
                                 const struct dsc_config_layout *layout, bool strict,
                                 struct dsc_config *out, struct dsc_config_reading *reading);
void dsc_config_reading_free(struct dsc_config_reading *reading);
/* Appends the dotted path of a node below `root`, as written there, to the text in `out`; false if
 * it is not there or too long. */
bool dsc_config_written(const cJSON *root, const cJSON *node, char *out, size_t n_out);
/* All errors as one text, numbered; free with dsc_free. */
enum dsc_status dsc_config_report(const struct dsc_config_reading *reading, char **text);

/* JSON text (n bytes and a terminating zero) to a tree for cJSON_Delete. `name` says in messages
 * where it is from. DSC_ECONFIG with line and column, or naming the key that stands twice. */
enum dsc_status dsc_config_tree(const char *text, size_t n, const char *name, cJSON **out);
/* A whole file with a terminating zero added; free with dsc_free. DSC_ECONFIG if it can't be read.
 */
enum dsc_status dsc_config_read_file(const char *path, char **text, size_t *n);
/* What base64 text, URL-safe or not, padded or not, in lines or not, stands for, likewise.
 * DSC_EINVAL for other text. */
enum dsc_status dsc_config_decode(const char *base64, char **text, size_t *n);

#endif
