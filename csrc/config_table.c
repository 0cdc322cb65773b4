/* The table of keys as data, and the questions that need nothing but the table.
 *
 * Decides: how a row of config_keys.def is laid out in memory. Invariant: rows, fields and defaults
 * come from one file, in one order. */
#include "config_parts.h"

#include <ctype.h>
#include <float.h>
#include <stdio.h>
#include <string.h>

#define NONE DSC_CONFIG_NONE
#define HUGE_INT INT64_MAX
#define EXACT                                                                                      \
    INT64_C(9007199254740991) /* a JSON number carries integers up to 2^53 - 1 exactly             \
                               */
#define OPEN true
#define CLOSED false
#define AT(field) offsetof(struct dsc_config, field)

const struct dsc_config dsc_config_defaults = {
#define DSC_BOOL(field, path, value, ...) .field = value,
#define DSC_TRI(field, ...) .field = -1,
#define DSC_INT(field, path, value, ...) .field = value,
#define DSC_INT_NOW(field, path, value, ...) .field = value,
#define DSC_INT_INF(field, path, value, ...) .field = value,
#define DSC_FLOAT(field, path, value, ...) .field = value,
#define DSC_FLOAT_OR_BOOL(field, path, value, ...) .field = value,
#define DSC_STR(field, path, value, ...) .field = value,
#define DSC_ENUM(field, path, value, ...) .field = value,
#include "config_keys.def"
};

#define ROW(row_path, row_kind, row_status, row_accessor, row_help, ...)                           \
    {.path = row_path,                                                                             \
     .kind = DSC_KEY_##row_kind,                                                                   \
     .status = DSC_KEY_##row_status,                                                               \
     .accessor = row_accessor,                                                                     \
     .help = row_help,                                                                             \
     __VA_ARGS__},

const struct dsc_key dsc_config_keys[DSC_CONFIG_N_KEYS] = {
#define DSC_SECTION(path, is_open, accessor, help)                                                 \
    ROW(path, SECTION, WORKS, accessor, help, .open = is_open)
#define DSC_SECTION_OR_TRUE(path, accessor, help)                                                  \
    ROW(path, SECTION, WORKS, accessor, help, .or_bool = true)
#define DSC_BOOL(field, path, value, status, accessor, help)                                       \
    ROW(path, BOOL, status, accessor, help, .offset = AT(field))
#define DSC_TRI(field, path, status, accessor, help)                                               \
    ROW(path, TRI, status, accessor, help, .offset = AT(field))
#define DSC_INT(field, path, value, least, most, status, accessor, help)                           \
    ROW(path, INT, status, accessor, help, .offset = AT(field), .low = least, .high = most,        \
        .now = most)
#define DSC_INT_NOW(field, path, value, least, most, works, accessor, help)                        \
    ROW(path, INT, WORKS, accessor, help, .offset = AT(field), .low = least, .high = most,         \
        .now = works)
#define DSC_INT_INF(field, path, value, least, accessor, help)                                     \
    ROW(path, INT, WORKS, accessor, help, .offset = AT(field), .low = least, .high = HUGE_INT,     \
        .now = HUGE_INT, .inf = true)
#define DSC_FLOAT(field, path, value, least, most, status, accessor, help)                         \
    ROW(path, FLOAT, status, accessor, help, .offset = AT(field), .float_low = least,              \
        .float_high = most)
#define DSC_FLOAT_OR_BOOL(field, path, value, least, most, accessor, help)                         \
    ROW(path, FLOAT, WORKS, accessor, help, .offset = AT(field), .float_low = least,               \
        .float_high = most, .or_bool = true)
#define DSC_STR(field, path, value, status, accessor, help)                                        \
    ROW(path, STR, status, accessor, help, .offset = AT(field))
#define DSC_ENUM(field, path, value, works, status, accessor, help, ...)                           \
    ROW(path, ENUM, status, accessor, help, .offset = AT(field), .n_now = works,                   \
        .names = (const char *const[]){__VA_ARGS__, NULL})
#define DSC_LIST(path, value, status, accessor, help)                                              \
    ROW(path, LIST, status, accessor, help, .text = value)
#define DSC_DICT(path, status, accessor, help)                                                     \
    ROW(path, DICT, status, accessor, help, .text = "null")
#define DSC_ANY(path, value, status, accessor, help)                                               \
    ROW(path, ANY, status, accessor, help, .text = value)
#include "config_keys.def"
};

const struct dsc_config_alias dsc__config_aliases[DSC_CONFIG_N_ALIASES] = {
#define DSC_ALIAS(old, new, way) {old, new, DSC_ALIAS_##way},
#include "config_keys.def"
};

int dsc__config_index(const char *path) {
    for (int i = 0; i < DSC_CONFIG_N_KEYS; i++)
        if (strcmp(dsc_config_keys[i].path, path) == 0)
            return i;
    return -1;
}

/* Whether `path` is `prefix` or lies below it; *rest is what follows. */
static bool lies_under(const char *path, const char *prefix, const char **rest) {
    size_t n = strlen(prefix);
    *rest = path + n;
    return strncmp(path, prefix, n) == 0 && (path[n] == '\0' || path[n] == '.');
}

/* Whether both names hold the same value, so that one may be read for the other. */
static bool same_value(const struct dsc_config_alias *alias) {
    return alias->how == DSC_ALIAS_RENAMED || alias->how == DSC_ALIAS_SPELLING;
}

const struct dsc_key *dsc_config_find(const char *path) {
    int index = dsc__config_index(path);
    for (int i = 0; index < 0 && i < DSC_CONFIG_N_ALIASES; i++) {
        const struct dsc_config_alias *alias = &dsc__config_aliases[i];
        const char *rest;
        char name[256];
        if (!same_value(alias) || !lies_under(path, alias->from, &rest))
            continue;
        int n = snprintf(name, sizeof name, "%s%s", alias->to, rest);
        if (n > 0 && (size_t)n < sizeof name)
            index = dsc__config_index(name);
    }
    return index < 0 ? NULL : &dsc_config_keys[index];
}

bool dsc_config_spelling(const char *path, size_t i, char *out, size_t n_out) {
    const char *rest = "";
    const char *from = path;
    for (size_t a = 0, seen = 0; i > 0; a++) {
        if (a == DSC_CONFIG_N_ALIASES)
            return false;
        const struct dsc_config_alias *alias = &dsc__config_aliases[a];
        if (same_value(alias) && lies_under(path, alias->to, &rest) && ++seen == i) {
            from = alias->from;
            break;
        }
    }
    int n = snprintf(out, n_out, "%s%s", from, i ? rest : "");
    return n > 0 && (size_t)n < n_out;
}

static void allowed_int(const struct dsc_key *key, char *out, size_t n) {
    if (key->now < key->high)
        snprintf(out, n, "an integer from %lld to %lld; not yet above %lld", (long long)key->low,
                 (long long)key->high, (long long)key->now);
    else if (key->high == EXACT)
        snprintf(out, n, "an integer from %lld to 2^53 - 1", (long long)key->low);
    else if (key->high != INT64_MAX)
        snprintf(out, n, "an integer from %lld to %lld", (long long)key->low, (long long)key->high);
    else if (key->low == -INT64_MAX)
        snprintf(out, n, "an integer");
    else
        snprintf(out, n, "an integer >= %lld%s", (long long)key->low, key->inf ? ", or inf" : "");
}

static void allowed_float(const struct dsc_key *key, char *out, size_t n) {
    if (key->float_high < DBL_MAX)
        snprintf(out, n, "a number from %g to %g", key->float_low, key->float_high);
    else if (key->float_low == -DBL_MAX)
        snprintf(out, n, "a number");
    else if (key->float_low == DBL_MIN)
        snprintf(out, n, "a number > 0");
    else
        snprintf(out, n, "a number >= %g%s%s", key->float_low,
                 isinf(key->float_high) ? ", or inf" : "", key->or_bool ? ", or true for 1" : "");
}

/* The names that work, then those that do not yet. */
static void allowed_names(const struct dsc_key *key, char *out, size_t n) {
    size_t used = 0;
    out[0] = '\0';
    for (size_t i = 0; key->names[i] && used < n; i++) {
        const char *before = i == key->n_now ? i ? "; not yet: " : "not yet: " : i ? ", " : "";
        int more = snprintf(out + used, n - used, "%s\"%s\"", before, key->names[i]);
        used += more > 0 ? (size_t)more : 0;
    }
}

void dsc_config_allowed(const struct dsc_key *key, char *out, size_t n_out) {
    switch (key->kind) {
    case DSC_KEY_INT:
        allowed_int(key, out, n_out);
        return;
    case DSC_KEY_FLOAT:
        allowed_float(key, out, n_out);
        return;
    case DSC_KEY_ENUM:
        allowed_names(key, out, n_out);
        return;
    case DSC_KEY_BOOL:
    case DSC_KEY_TRI:
        snprintf(out, n_out, "true or false");
        return;
    case DSC_KEY_STR:
        snprintf(out, n_out, "a string");
        return;
    case DSC_KEY_LIST:
        snprintf(out, n_out, "a list");
        return;
    case DSC_KEY_SECTION:
        snprintf(out, n_out, key->or_bool ? "an object, true or false" : "an object or false");
        return;
    case DSC_KEY_DICT:
        snprintf(out, n_out, "an object");
        return;
    case DSC_KEY_ANY:
        snprintf(out, n_out, "any value");
        return;
    }
}

static void default_int(int64_t value, char *out, size_t n) {
    if (value == DSC_CONFIG_NONE)
        snprintf(out, n, "null");
    else
        snprintf(out, n, "%lld", (long long)value);
}

void dsc_config_default(const struct dsc_key *key, char *out, size_t n_out) {
    const char *field = (const char *)&dsc_config_defaults + key->offset;
    const char *text = NULL;
    switch (key->kind) {
    case DSC_KEY_BOOL:
        snprintf(out, n_out, "%s", *(const bool *)field ? "true" : "false");
        return;
    case DSC_KEY_INT:
        default_int(*(const int64_t *)field, out, n_out);
        return;
    case DSC_KEY_FLOAT:
        snprintf(out, n_out, "%g", *(const double *)field);
        return;
    case DSC_KEY_STR:
    case DSC_KEY_ENUM:
        text = *(const char *const *)field;
        snprintf(out, n_out, text ? "\"%s\"" : "null", text);
        return;
    case DSC_KEY_TRI:
    case DSC_KEY_SECTION:
        snprintf(out, n_out, "null");
        return;
    case DSC_KEY_LIST:
    case DSC_KEY_DICT:
    case DSC_KEY_ANY:
        snprintf(out, n_out, "%s", key->text);
        return;
    }
}

enum { NAME_MAX_BYTES = 128 };

static size_t min3(size_t a, size_t b, size_t c) {
    return dsc_min(a, dsc_min(b, c));
}

/* Edit distance with swaps of neighbours (optimal string alignment), three rows at a time. */
static size_t edit_distance(const char *a, const char *b) {
    /* Longer names count by their beginning. */
    size_t n = dsc_min(strlen(a), NAME_MAX_BYTES), m = dsc_min(strlen(b), NAME_MAX_BYTES);
    size_t rows[3][NAME_MAX_BYTES + 1];
    for (size_t j = 0; j <= m; j++)
        rows[0][j] = j;
    for (size_t i = 1; i <= n; i++) {
        const size_t *before = rows[(i + 1) % 3], *above = rows[(i - 1) % 3];
        size_t *row = rows[i % 3];
        row[0] = i;
        for (size_t j = 1; j <= m; j++) {
            int x = tolower((unsigned char)a[i - 1]), y = tolower((unsigned char)b[j - 1]);
            row[j] = min3(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y));
            if (i > 1 && j > 1 && x == tolower((unsigned char)b[j - 2]) &&
                y == tolower((unsigned char)a[i - 2]))
                row[j] = dsc_min(row[j], before[j - 2] + 1);
        }
    }
    return rows[n % 3][m];
}

const char *dsc_config_nearest(const char *name, const char *const names[], size_t n,
                               size_t *distance) {
    const char *best = NULL;
    for (size_t i = 0; i < n; i++) {
        size_t d = edit_distance(name, names[i]);
        if (!best || d < *distance) {
            best = names[i];
            *distance = d;
        }
    }
    return best;
}
