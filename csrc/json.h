/* JSON as the core takes it: a strict grammar (RFC 8259), read from front to back, or checked first
 * and then made cJSON's tree.
 *
 * Decides: the grammar, here alone; nothing about content. Invariant: what passes here, cJSON and
 * Python's json read alike; cJSON by itself takes numbers like 01, ends a text at a byte 0 and
 * reports errors a few bytes off. At most 64 objects and arrays stand inside each other. A text
 * ends with a byte 0; whoever has its length compares it. */
#ifndef DSC_JSON_H
#define DSC_JSON_H

#include "dsc.h"

#include <cJSON.h>

/* NULL for JSON text; else where it stops being that, and in *expected what should stand there. A
 * byte order mark may stand before it. */
const char *dsc_json_syntax(const char *text, const char **expected);
/* A file's text, which is one object; text[n_bytes] is 0. The tree goes with cJSON_Delete. what:
 * for texts. DSC_EDAMAGED names the byte. */
enum dsc_status dsc_json_parse(const char *text, size_t n_bytes, const char *what, cJSON **out);
/* A whole number from 0 to 2^53; false for anything else, NULL included. */
bool dsc_json_count(const cJSON *item, uint64_t *out);
/* Writes a text as it stands between the quotes of a JSON string, without a terminator, and gives
 * the bytes of it: at most six for each of the text. out NULL: only counts. */
size_t dsc_json_quote(char *out, const char *text);

/* ---- from front to back, for texts with many items ---- */

/* Where a reading stands; it begins with {text}. What returns false leaves `at` where the text is
 * wrong, and in `expected` what should stand there. */
struct dsc_json {
    const char *at, *expected;
    bool expects_key; /* `expected` is the name of a key */
};
/* The inside of a string as it stands in the text. */
struct dsc_json_string {
    const char *begin;
    size_t n;
};

/* Over one value of any kind. */
bool dsc_json_skip(struct dsc_json *json);
/* Over one of the characters "{}[]:,". */
bool dsc_json_char(struct dsc_json *json, char c);
/* Whether the array or object that `close` ends has one more item: 1, and it is next; 0, and it is
 * over; -1: neither. first: nothing of it has been read but what opens it. */
int dsc_json_more(struct dsc_json *json, char close, bool first);
/* "name": of an object. */
bool dsc_json_key(struct dsc_json *json, const char *name);
/* A string; escapes are valid but stand as they are. */
bool dsc_json_text(struct dsc_json *json, struct dsc_json_string *out);
/* A number without fraction or exponent, in [low, 2^63). */
bool dsc_json_integer(struct dsc_json *json, int64_t low, int64_t *out);
/* Nothing but space until the end. */
bool dsc_json_end(struct dsc_json *json);

/* What a string says, with a zero byte behind it: at most string.n + 1 bytes of `out`. Returns the
 * bytes before that. */
size_t dsc_json_unescape(struct dsc_json_string string, char *out);
/* Whether the bytes are UTF-8 (RFC 3629). */
bool dsc_utf8_valid(const char *text, size_t n);

#endif
