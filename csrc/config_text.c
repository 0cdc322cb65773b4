/* JSON text to a tree: files, base64, syntax errors with line and column, keys that stand twice.
 *
 * Invariant: a tree that comes out of here has no object with two equal keys; cJSON would keep both
 * and everybody would read the first. */
#include "config_parts.h"

#include "alloc.h"
#include "json.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

/* Column counts bytes from 1. */
static void place(const char *text, const char *at, long *line, long *column) {
    *line = *column = 1;
    for (; text < at && *text; text++) {
        *column = *text == '\n' ? 1 : *column + 1;
        *line += *text == '\n';
    }
}

static enum dsc_status syntax_error(const char *text, const char *at, const char *expected,
                                    const char *name) {
    long line, column;
    place(text, at, &line, &column);
    if (!*at)
        return DSC_FAIL(DSC_ECONFIG, "%s: not JSON: it ends at line %ld, column %ld; expected %s",
                        name, line, column, expected);
    const char *hint = *at == '/' || *at == '#' ? " (JSON has no comments)" : "";
    char found[8];
    /* One character, which may be several bytes. */
    size_t n = 1;
    while (n < 4 && ((unsigned char)at[n] & 0xC0) == 0x80)
        n++;
    memcpy(found, at, n);
    found[n] = '\0';
    return DSC_FAIL(DSC_ECONFIG,
                    "%s: not JSON at line %ld, column %ld: expected %s, found %s%s%s%s", name, line,
                    column, expected, (unsigned char)*at < 0x20 ? "" : "'",
                    (unsigned char)*at < 0x20 ? "a control character" : found,
                    (unsigned char)*at < 0x20 ? "" : "'", hint);
}

/* A path under construction; steps that do not fit are left out and shown as dots. */
struct trail {
    const struct trail *up;
    const char *name;
};

static void show_trail(const struct trail *trail, char *out, size_t n) {
    if (trail->up)
        show_trail(trail->up, out, n);
    size_t used = strlen(out);
    snprintf(out + used, n - used, "%s%s", used ? "." : "", trail->name);
}

static enum dsc_status check_twice(const cJSON *item, const struct trail *up, const char *name) {
    for (const cJSON *child = item->child; child; child = child->next) {
        struct trail here = {up, child->string ? child->string : "[]"};
        for (const cJSON *other = child->next; child->string && other; other = other->next) {
            if (strcmp(child->string, other->string) != 0)
                continue;
            char path[512] = "";
            show_trail(&here, path, sizeof path);
            return DSC_FAIL(DSC_ECONFIG, "%s: the key %s stands twice", name, path);
        }
        DSC_TRY(check_twice(child, &here, name));
    }
    return DSC_OK;
}

enum dsc_status dsc_config_tree(const char *text, size_t n, const char *name, cJSON **out) {
    const char *expected = "";
    if (strlen(text) != n)
        return DSC_FAIL(DSC_ECONFIG, "%s: not JSON: a zero byte at position %zu", name,
                        strlen(text));
    const char *at = dsc_json_syntax(text, &expected);
    if (at)
        return syntax_error(text, at, expected, name);
    cJSON *root = cJSON_ParseWithLength(text, n);
    if (!root)
        return DSC_FAIL(DSC_ENOMEM, "%s: could not build the tree of %zu bytes of JSON", name, n);
    enum dsc_status status = check_twice(root, NULL, name);
    if (status == DSC_OK && !cJSON_IsObject(root))
        status = DSC_FAIL(DSC_ECONFIG, "%s: the configuration must be a JSON object", name);
    if (status != DSC_OK)
        cJSON_Delete(root);
    else
        *out = root;
    return status;
}

enum dsc_status dsc_config_read_file(const char *path, char **text, size_t *n) {
    enum { FIRST = 64 << 10, MOST = 64 << 20 };
    char *buffer = NULL;
    size_t used = 0, size = FIRST;
    enum dsc_status status = DSC_OK;
    FILE *file = fopen(path, "rb");
    if (!file)
        return DSC_FAIL(DSC_ECONFIG, "%s: cannot read the configuration: %s", path,
                        strerror(errno));
    while (status == DSC_OK) {
        status = dsc_realloc((void **)&buffer, size + 1);
        if (status != DSC_OK)
            break;
        used += fread(buffer + used, 1, size - used, file);
        if (used < size)
            break;
        size *= 2;
        if (size > MOST)
            status = DSC_FAIL(DSC_ECONFIG, "%s: larger than %d MiB", path, MOST >> 20);
    }
    if (status == DSC_OK && ferror(file))
        status =
            DSC_FAIL(DSC_ECONFIG, "%s: cannot read the configuration: %s", path, strerror(errno));
    fclose(file);
    if (status != DSC_OK) {
        dsc_free(buffer);
        return status;
    }
    buffer[used] = '\0';
    *text = buffer;
    *n = used;
    return DSC_OK;
}

/* The six bits of a base64 digit of either alphabet, or -1. */
static int six_bits(char digit) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const char *at = digit ? strchr(digits, digit == '-' ? '+' : digit == '_' ? '/' : digit) : NULL;
    return at ? (int)(at - digits) : -1;
}

enum dsc_status dsc_config_decode(const char *base64, char **text, size_t *n) {
    static const char breaks[] = "\r\n"; /* the command base64 makes lines */
    char *out = NULL;
    size_t n_digits = 0, used = 0;
    uint32_t bits = 0;
    const char *at = base64;
    DSC_TRY(dsc_realloc((void **)&out, strlen(base64) + 1));
    for (; six_bits(*at) >= 0; at += 1 + strspn(at + 1, breaks), n_digits++) {
        bits = bits << 6 | (uint32_t)six_bits(*at);
        /* After digits 2, 3 and 4 of a group, 4, 2 and 0 bits are left over. */
        if (n_digits % 4 > 0)
            out[used++] = (char)(bits >> (6 - 2 * (n_digits % 4)));
    }
    const char *end = at + strspn(at, "=\r\n");
    if (n_digits == 0 || n_digits % 4 == 1 || *end) {
        dsc_free(out);
        return DSC_FAIL(DSC_EINVAL, "not base64: position %zu", (size_t)(end - base64));
    }
    out[used] = '\0';
    *text = out;
    *n = used;
    return DSC_OK;
}
