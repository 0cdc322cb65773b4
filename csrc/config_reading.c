/* What reading a configuration has to say: errors, warnings, and values as messages show them.
 *
 * Invariant: messages are valid UTF-8 whenever the configuration is, whatever is cut. */
#include "config_parts.h"

#include "alloc.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MESSAGE_BYTES = 1024 };

/* Keeps at most `n` bytes of a text and no part of a UTF-8 sequence. */
static void cut(char *text, size_t n) {
    if (strlen(text) <= n)
        return;
    while (n > 0 && ((unsigned char)text[n] & 0xC0) == 0x80)
        n--;
    text[n] = '\0';
}

/* One byte more is printed than is kept, so that `cut` sees where the rest begins. */
static void put(char *out, size_t n, const char *format, va_list args) {
    char text[MESSAGE_BYTES + 1];
    vsnprintf(text, sizeof text, format, args);
    cut(text, dsc_min(n, MESSAGE_BYTES) - 1);
    memcpy(out, text, strlen(text) + 1);
}

void dsc__config_put(char *out, size_t n, const char *format, ...) {
    va_list args;
    va_start(args, format);
    put(out, n, format, args);
    va_end(args);
}

static enum dsc_status add(char ***list, size_t *n, const char *format, va_list args) {
    char text[MESSAGE_BYTES];
    char *copy = NULL;
    put(text, sizeof text, format, args);
    DSC_TRY(dsc_realloc((void **)list, (*n + 1) * sizeof **list));
    DSC_TRY(dsc_alloc(strlen(text) + 1, (void **)&copy));
    memcpy(copy, text, strlen(text) + 1);
    (*list)[(*n)++] = copy;
    return DSC_OK;
}

enum dsc_status dsc__config_error(struct dsc_config_reading *reading, const char *format, ...) {
    va_list args;
    va_start(args, format);
    enum dsc_status status = add(&reading->errors, &reading->n_errors, format, args);
    va_end(args);
    return status;
}

enum dsc_status dsc__config_warn(struct dsc_config_reading *reading, const char *format, ...) {
    va_list args;
    va_start(args, format);
    enum dsc_status status = add(&reading->warnings, &reading->n_warnings, format, args);
    va_end(args);
    return status;
}

void dsc_config_reading_free(struct dsc_config_reading *reading) {
    for (size_t i = 0; i < reading->n_errors; i++)
        dsc_free(reading->errors[i]);
    for (size_t i = 0; i < reading->n_warnings; i++)
        dsc_free(reading->warnings[i]);
    dsc_free(reading->errors);
    dsc_free(reading->warnings);
    *reading = (struct dsc_config_reading){0};
}

bool dsc_config_written(const cJSON *root, const cJSON *node, char *out, size_t n_out) {
    const size_t used = strlen(out);
    for (const cJSON *child = root->child; child; child = child->next) {
        const char *name = child->string ? child->string : "[]";
        int n = snprintf(out + used, n_out - used, "%s%s", used ? "." : "", name);
        const bool fits = n > 0 && (size_t)n < n_out - used;
        if (fits && (child == node || dsc_config_written(child, node, out, n_out)))
            return true;
        out[used] = '\0';
    }
    return false;
}

enum dsc_status dsc_config_report(const struct dsc_config_reading *reading, char **text) {
    const char *first = "the configuration is wrong: ";
    size_t n = 96;
    for (size_t i = 0; i < reading->n_errors; i++)
        n += strlen(reading->errors[i]) + 32;
    DSC_TRY(dsc_alloc(n, (void **)text));
    if (reading->n_errors == 1) {
        snprintf(*text, n, "%s%s", first, reading->errors[0]);
        return DSC_OK;
    }
    size_t used =
        (size_t)snprintf(*text, n, "the configuration has %zu errors:", reading->n_errors);
    for (size_t i = 0; i < reading->n_errors; i++)
        used += (size_t)snprintf(*text + used, n - used, "\n  %zu. %s", i + 1, reading->errors[i]);
    return DSC_OK;
}

/* The shortest decimal that reads back as the same double. */
static void show_number(double value, char *out, size_t n) {
    char *end;
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(out, n, "%.*g", digits, value);
        if (isnan(value) || strtod(out, &end) == value)
            return;
    }
}

const char *dsc__config_show(const cJSON *item, char out[DSC_CONFIG_SHOWN]) {
    if (cJSON_IsNumber(item)) {
        show_number(item->valuedouble, out, DSC_CONFIG_SHOWN);
        return out;
    }
    char *text = cJSON_PrintUnformatted(item);
    bool whole = !text || strlen(text) <= 64;
    dsc__config_put(out, whole ? DSC_CONFIG_SHOWN : 61, "%s", text ? text : "a value");
    if (!whole)
        memcpy(out + strlen(out), "...", 4);
    cJSON_free(text);
    return out;
}
