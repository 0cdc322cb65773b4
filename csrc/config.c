/* Walks a configuration tree along the table of keys and fills struct dsc_config.
 *
 * Decides: what a given value means for its key: absent, taken, out of range, 'not yet', unknown.
 * Invariant: every fault is noted and the walk goes on; the result is used only if there is none.
 */
#include "config_parts.h"

#include "alloc.h"

#include <float.h>
#include <stdio.h>
#include <string.h>

enum {
    PATH_BYTES = 512,
    NEAR_MISS = 2,
    N_NAMES = DSC_CONFIG_N_KEYS + DSC_CONFIG_N_ALIASES,
};

struct walk {
    struct dsc_config *config;
    struct dsc_config_reading *reading;
    bool strict;
};

/* A given value with its row and the path under which the user wrote it. */
struct entry {
    const struct dsc_key *key;
    const cJSON *item;
    const char *path, *shown;
};

static enum dsc_status read_section(struct walk *walk, const cJSON *object, const char *path,
                                    const char *shown);

bool dsc__config_is_absent(const cJSON *item) {
    return cJSON_IsNull(item) || (cJSON_IsString(item) && strcmp(item->valuestring, "auto") == 0);
}

/* Whether `path` names a key directly inside `section` ("" is the top), and that key's own name. */
static const char *child_of(const char *path, const char *section) {
    size_t n = strlen(section);
    if (n > 0 && (strncmp(path, section, n) != 0 || path[n] != '.'))
        return NULL;
    const char *name = n > 0 ? path + n + 1 : path;
    return strchr(name, '.') ? NULL : name;
}

/* Names that a section has; `section` NULL: whole paths. */
static size_t names_in(const char *section, const char *out[]) {
    size_t n = 0;
    for (size_t i = 0; i < N_NAMES; i++) {
        const char *path = i < DSC_CONFIG_N_KEYS ? dsc_config_keys[i].path
                                                 : dsc__config_aliases[i - DSC_CONFIG_N_KEYS].from;
        const char *name = section ? child_of(path, section) : path;
        if (name)
            out[n++] = name;
    }
    return n;
}

static const char *kind_of(const cJSON *item) {
    if (cJSON_IsBool(item))
        return "a bool";
    if (cJSON_IsString(item))
        return "a string";
    if (cJSON_IsArray(item))
        return "a list";
    return cJSON_IsObject(item) ? "an object" : "a number";
}

static enum dsc_status refuse(struct walk *walk, const struct entry *entry) {
    char value[DSC_CONFIG_SHOWN], allowed[256];
    dsc_config_allowed(entry->key, allowed, sizeof allowed);
    return dsc__config_error(walk->reading, "%s is %s, %s; allowed: %s", entry->shown,
                             dsc__config_show(entry->item, value), kind_of(entry->item), allowed);
}

/* What a row that is only partly there takes today. */
static void works_now(const struct dsc_key *key, char *out, size_t n) {
    size_t used = 0;
    if (key->kind == DSC_KEY_INT && key->now < key->high) {
        snprintf(out, n, "%lld to %lld", (long long)key->low, (long long)key->now);
    } else if (key->kind == DSC_KEY_ENUM && key->n_now > 0) {
        for (size_t i = 0; i < key->n_now && used < n; i++)
            used +=
                (size_t)snprintf(out + used, n - used, "%s\"%s\"", i ? ", " : "", key->names[i]);
    } else {
        dsc_config_default(key, out, n);
        if (strcmp(out, "null") == 0)
            snprintf(out, n, "leaving it out");
    }
}

static enum dsc_status not_yet(struct walk *walk, const struct entry *entry) {
    char value[DSC_CONFIG_SHOWN], now[256];
    bool names = entry->key->kind == DSC_KEY_ENUM;
    works_now(entry->key, now, sizeof now);
    return dsc__config_error(walk->reading, "%s is %s: not yet; works now: %s%s%s%s", entry->shown,
                             dsc__config_show(entry->item, value), now, names ? "" : " (",
                             names ? "" : entry->key->help, names ? "" : ")");
}

static void *field_of(struct dsc_config *config, const struct dsc_key *key) {
    return (char *)config + key->offset;
}

static const void *default_of(const struct dsc_key *key) {
    return (const char *)&dsc_config_defaults + key->offset;
}

/* true, false, 1 and 0. */
static bool as_bool(const cJSON *item, bool *out) {
    bool number = cJSON_IsNumber(item) && (item->valuedouble == 0 || item->valuedouble == 1);
    *out = number ? item->valuedouble == 1 : cJSON_IsTrue(item);
    return number || cJSON_IsBool(item);
}

static enum dsc_status read_bool(struct walk *walk, const struct entry *entry) {
    bool value;
    if (!as_bool(entry->item, &value))
        return refuse(walk, entry);
    if (entry->key->kind == DSC_KEY_TRI) {
        *(int *)field_of(walk->config, entry->key) = value;
        return entry->key->status == DSC_KEY_NOT_YET ? not_yet(walk, entry) : DSC_OK;
    }
    *(bool *)field_of(walk->config, entry->key) = value;
    if (entry->key->status == DSC_KEY_NOT_YET && value != *(const bool *)default_of(entry->key))
        return not_yet(walk, entry);
    return DSC_OK;
}

/* Whole numbers, also written as 5e8; beyond int64 they saturate, which only sizes without an upper
 * bound can be. */
static bool as_int(const cJSON *item, const struct dsc_key *key, int64_t *out) {
    double value = item->valuedouble;
    if (!cJSON_IsNumber(item) || isnan(value) || floor(value) != value)
        return false;
    if (isinf(value) && !(key->inf && value > 0))
        return false;
    if (value >= 0x1p63)
        *out = INT64_MAX;
    else
        *out = value <= -0x1p63 ? -INT64_MAX : (int64_t)value;
    return *out >= key->low && *out <= key->high;
}

static enum dsc_status read_int(struct walk *walk, const struct entry *entry) {
    const struct dsc_key *key = entry->key;
    int64_t value;
    if (!as_int(entry->item, key, &value))
        return refuse(walk, entry);
    *(int64_t *)field_of(walk->config, key) = value;
    bool later = key->status == DSC_KEY_NOT_YET && value != *(const int64_t *)default_of(key);
    return later || value > key->now ? not_yet(walk, entry) : DSC_OK;
}

static enum dsc_status read_float(struct walk *walk, const struct entry *entry) {
    const struct dsc_key *key = entry->key;
    double value = entry->item->valuedouble;
    if (key->or_bool && cJSON_IsBool(entry->item)) {
        value = cJSON_IsTrue(entry->item) ? 1 : 0;
        DSC_TRY(dsc__config_warn(walk->reading, "%s is %s; taken as %g", entry->shown,
                                 value != 0 ? "true" : "false", value));
    } else if (!cJSON_IsNumber(entry->item)) {
        return refuse(walk, entry);
    }
    if (!(value >= key->float_low && value <= key->float_high))
        return refuse(walk, entry);
    *(double *)field_of(walk->config, key) = value;
    if (key->status == DSC_KEY_NOT_YET && value != *(const double *)default_of(key))
        return not_yet(walk, entry);
    return DSC_OK;
}

static enum dsc_status read_string(struct walk *walk, const struct entry *entry) {
    if (!cJSON_IsString(entry->item))
        return refuse(walk, entry);
    const char *value = entry->item->valuestring,
               *usual = *(const char *const *)default_of(entry->key);
    *(const char **)field_of(walk->config, entry->key) = value;
    if (entry->key->status == DSC_KEY_NOT_YET && !(usual && strcmp(value, usual) == 0))
        return not_yet(walk, entry);
    return DSC_OK;
}

static enum dsc_status read_enum(struct walk *walk, const struct entry *entry) {
    const struct dsc_key *key = entry->key;
    size_t n = 0, distance = 0;
    if (!cJSON_IsString(entry->item))
        return refuse(walk, entry);
    while (key->names[n])
        n++;
    const char *near = dsc_config_nearest(entry->item->valuestring, key->names, n, &distance);
    if (distance > 0)
        return refuse(walk, entry);
    *(const char **)field_of(walk->config, key) = near;
    for (size_t i = 0; i < key->n_now; i++)
        if (near == key->names[i])
            return DSC_OK;
    return not_yet(walk, entry);
}

/* Objects inside a list, where the table knows their keys. */
static enum dsc_status read_objects_in(struct walk *walk, const struct entry *entry) {
    const char *names[N_NAMES];
    char path[PATH_BYTES], shown[PATH_BYTES];
    int i = 0;
    dsc__config_put(path, sizeof path, "%s[]", entry->path);
    if (names_in(path, names) == 0)
        return DSC_OK;
    for (const cJSON *child = entry->item->child; child; child = child->next, i++) {
        dsc__config_put(shown, sizeof shown, "%s[%d]", entry->shown, i);
        if (cJSON_IsObject(child))
            DSC_TRY(read_section(walk, child, path, shown));
    }
    return DSC_OK;
}

/* Lists, objects without rows of their own, and values of any type stay in the tree. */
static enum dsc_status read_tree(struct walk *walk, const struct entry *entry) {
    const struct dsc_key *key = entry->key;
    const cJSON *item = entry->item;
    if (key->kind == DSC_KEY_DICT && cJSON_IsFalse(item))
        return DSC_OK;
    if ((key->kind == DSC_KEY_LIST && !cJSON_IsArray(item)) ||
        (key->kind == DSC_KEY_DICT && !cJSON_IsObject(item)))
        return refuse(walk, entry);
    bool empty = (cJSON_IsArray(item) || cJSON_IsObject(item)) && !item->child;
    if (key->status == DSC_KEY_NOT_YET && !empty)
        return not_yet(walk, entry);
    if (key->kind != DSC_KEY_LIST)
        return DSC_OK;
    return read_objects_in(walk, entry);
}

static enum dsc_status enter_section(struct walk *walk, const struct entry *entry) {
    if (cJSON_IsObject(entry->item))
        return read_section(walk, entry->item, entry->path, entry->shown);
    if (cJSON_IsFalse(entry->item))
        return DSC_OK;
    if (!entry->key->or_bool || !cJSON_IsTrue(entry->item))
        return refuse(walk, entry);
    walk->config->zero_stage = 1;
    walk->reading->given[dsc__config_index("zero_optimization.stage")] = entry->item;
    return dsc__config_warn(walk->reading,
                            "zero_optimization is true: taken as {\"stage\": 1}; write that");
}

static enum dsc_status read_value(struct walk *walk, const struct entry *entry) {
    switch (entry->key->kind) {
    case DSC_KEY_SECTION:
        return enter_section(walk, entry);
    case DSC_KEY_BOOL:
    case DSC_KEY_TRI:
        return read_bool(walk, entry);
    case DSC_KEY_INT:
        return read_int(walk, entry);
    case DSC_KEY_FLOAT:
        return read_float(walk, entry);
    case DSC_KEY_STR:
        return read_string(walk, entry);
    case DSC_KEY_ENUM:
        return read_enum(walk, entry);
    case DSC_KEY_LIST:
    case DSC_KEY_DICT:
    case DSC_KEY_ANY:
        return read_tree(walk, entry);
    }
    return DSC_OK;
}

/* The path of a key that has this name in another section, so that a key at the wrong level is
 * told where it belongs. */
static const char *elsewhere(const char *name) {
    for (size_t i = 0; i < DSC_CONFIG_N_KEYS; i++) {
        const char *dot = strrchr(dsc_config_keys[i].path, '.');
        if (dot && strcmp(dot + 1, name) == 0 && strcmp(name, "enabled") != 0)
            return dsc_config_keys[i].path;
    }
    return NULL;
}

/* A short name is near only what differs little: "fp8" is no slip for "fp16". */
static bool is_near_miss(const char *name, size_t distance) {
    return distance <= dsc_min(NEAR_MISS, strlen(name) / 3);
}

static enum dsc_status unknown_key(struct walk *walk, const cJSON *item, const char *section,
                                   const char *shown) {
    const char *names[N_NAMES];
    char value[DSC_CONFIG_SHOWN];
    size_t distance = 0;
    const char *name = item->string;
    const bool top = section[0] == '\0', dotted = top && strchr(name, '.');
    size_t n = names_in(dotted ? NULL : section, names);
    const char *near = dsc_config_nearest(name, names, n, &distance);
    const char *other = elsewhere(name);
    dsc__config_show(item, value);
    if (dotted && !walk->strict)
        return dsc__config_warn(walk->reading,
                                "unknown key %s (value %s) is ignored: a name with a dot is not "
                                "taken apart; nearest known key: %s",
                                shown, value, near);
    if (other && !(near && is_near_miss(name, distance)))
        near = other;
    if (top && !walk->strict && (near == other || !is_near_miss(name, distance)))
        return dsc__config_warn(walk->reading,
                                "unknown key %s (value %s) is ignored; nearest known key: %s",
                                shown, value, near);
    return dsc__config_error(walk->reading, "unknown key %s (value %s); did you mean %s%s%s?",
                             shown, value, near == other || dotted ? "" : section,
                             top || near == other ? "" : ".", near ? near : "");
}

/* Follows another name to the row's own path. *item changes where the value does. */
static enum dsc_status follow_alias(struct walk *walk, char *path, char *shown, const cJSON **item,
                                    bool *ignored) {
    static const cJSON cpu = {.type = cJSON_String, .valuestring = (char *)"cpu"};
    static const cJSON none = {.type = cJSON_String, .valuestring = (char *)"none"};
    for (int i = 0; i < DSC_CONFIG_N_ALIASES; i++) {
        const struct dsc_config_alias *alias = &dsc__config_aliases[i];
        char value[DSC_CONFIG_SHOWN];
        bool on = false;
        if (strcmp(alias->from, path) != 0)
            continue;
        dsc__config_put(path, PATH_BYTES, "%s", alias->to);
        if (alias->how == DSC_ALIAS_SPELLING || dsc__config_is_absent(*item))
            return DSC_OK;
        *ignored = alias->how == DSC_ALIAS_IGNORED;
        if (alias->how == DSC_ALIAS_OFFLOAD && !as_bool(*item, &on)) {
            *ignored = true;
            return dsc__config_error(walk->reading, "%s is %s, %s; allowed: true or false", shown,
                                     dsc__config_show(*item, value), kind_of(*item));
        }
        DSC_TRY(dsc__config_warn(walk->reading, "%s is a deprecated name%s; write %s", shown,
                                 *ignored ? " and does nothing" : "", alias->to));
        if (alias->how == DSC_ALIAS_OFFLOAD) {
            *item = on ? &cpu : &none;
            dsc__config_put(shown, PATH_BYTES, "%s (now %s)", alias->from, alias->to);
        }
        return DSC_OK;
    }
    return DSC_OK;
}

static enum dsc_status read_entry(struct walk *walk, const cJSON *item, const char *section,
                                  const char *section_shown) {
    char path[PATH_BYTES], shown[PATH_BYTES];
    const char *dot = section[0] ? "." : "";
    const cJSON *written = item;
    bool ignored = false;
    dsc__config_put(path, sizeof path, "%s%s%s", section, dot, item->string);
    dsc__config_put(shown, sizeof shown, "%s%s%s", section_shown, dot, item->string);
    /* A dotted name at the top is not the path that it looks like. */
    int index = !section[0] && strchr(item->string, '.') ? -2 : -1;
    if (index == -1) {
        DSC_TRY(follow_alias(walk, path, shown, &item, &ignored));
        index = dsc__config_index(path);
    }
    if (index < 0) {
        int parent = dsc__config_index(section);
        bool open = parent >= 0 && dsc_config_keys[parent].open;
        return open ? DSC_OK : unknown_key(walk, item, section, shown);
    }
    if (dsc__config_is_absent(item))
        walk->reading->absent[index] = item;
    if (ignored || dsc__config_is_absent(item))
        return DSC_OK;
    const struct entry entry = {&dsc_config_keys[index], item, path, shown};
    if (walk->reading->given[index] && !strstr(path, "[]"))
        return dsc__config_error(walk->reading, "%s is given under two names; give one of them",
                                 path);
    walk->reading->given[index] = written;
    return read_value(walk, &entry);
}

static enum dsc_status read_section(struct walk *walk, const cJSON *object, const char *path,
                                    const char *shown) {
    for (const cJSON *item = object->child; item; item = item->next)
        DSC_TRY(read_entry(walk, item, path, shown));
    return DSC_OK;
}

enum dsc_status dsc_config_parse(const cJSON *root, int64_t n_data,
                                 const struct dsc_config_layout *layout, bool strict,
                                 struct dsc_config *out, struct dsc_config_reading *reading) {
    struct dsc_config config = dsc_config_defaults;
    struct walk walk = {&config, reading, strict};
    char *text = NULL;
    if (n_data < (layout ? 0 : 1))
        return DSC_FAIL(DSC_EINVAL, "world_size is %lld; allowed: >= 1", (long long)n_data);
    if (!cJSON_IsObject(root))
        return DSC_FAIL(DSC_ECONFIG, "the configuration must be an object");
    DSC_TRY(read_section(&walk, root, "", ""));
    DSC_TRY(dsc__config_rules(n_data, layout, &config, reading));
    if (reading->n_errors == 0) {
        *out = config;
        return DSC_OK;
    }
    DSC_TRY(dsc_config_report(reading, &text));
    enum dsc_status status = DSC_FAIL(DSC_ECONFIG, "%s", text);
    dsc_free(text);
    return status;
}
