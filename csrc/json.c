/* The grammar of JSON, one function for each of its rules; reading and writing of texts in it. */
#include "json.h"

#include <string.h>

enum { NESTING_LIMIT = 64 };

static bool scan_value(struct dsc_json *json, int depth);

static bool stop(struct dsc_json *json, const char *expected) {
    json->expected = expected;
    json->expects_key = false;
    return false;
}

static void skip_space(struct dsc_json *json) {
    while (*json->at == ' ' || *json->at == '\n' || *json->at == '\t' || *json->at == '\r')
        json->at++;
}

static bool is_digit(char c) {
    return c >= '0' && c <= '9';
}

static bool scan_digits(struct dsc_json *json) {
    if (!is_digit(*json->at))
        return stop(json, "a digit");
    while (is_digit(*json->at))
        json->at++;
    return true;
}

static bool scan_number(struct dsc_json *json) {
    json->at += *json->at == '-';
    if (*json->at == '0')
        json->at++;
    else if (!scan_digits(json))
        return false;
    if (*json->at == '.') {
        json->at++;
        if (!scan_digits(json))
            return false;
    }
    if (*json->at != 'e' && *json->at != 'E')
        return true;
    json->at++;
    json->at += *json->at == '+' || *json->at == '-';
    return scan_digits(json);
}

/* The value of a hexadecimal digit, or -1. */
static int hex_value(char c) {
    if (is_digit(c))
        return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* After "\u": four digits; *code is their value. */
static bool scan_hex(struct dsc_json *json, unsigned *code) {
    *code = 0;
    for (int i = 0; i < 4; i++) {
        const int value = hex_value(*json->at);
        if (value < 0)
            return stop(json, "four hexadecimal digits");
        *code = *code * 16 + (unsigned)value;
        json->at++;
    }
    return true;
}

/* After a backslash. Halves of a surrogate pair must stand together, and \u0000 would end a C
 * string. */
static bool scan_escape(struct dsc_json *json) {
    unsigned code, low;
    if (*json->at != 'u') {
        if (!*json->at || !strchr("\"\\/bfnrt", *json->at))
            return stop(json, "an escape that JSON has");
        json->at++;
        return true;
    }
    json->at++;
    if (!scan_hex(json, &code))
        return false;
    if (code == 0 || (code >= 0xDC00 && code <= 0xDFFF))
        return stop(json, "a character before this");
    if (code < 0xD800 || code > 0xDBFF)
        return true;
    if (strncmp(json->at, "\\u", 2) != 0)
        return stop(json, "the second half of a surrogate pair");
    json->at += 2;
    if (!scan_hex(json, &low))
        return false;
    return (low >= 0xDC00 && low <= 0xDFFF) || stop(json, "a surrogate pair before this");
}

static bool scan_string(struct dsc_json *json) {
    json->at++;
    while (*json->at != '"') {
        if ((unsigned char)*json->at < 0x20)
            return stop(json, *json->at ? "no control character inside a string"
                                        : "a double quote that ends the string");
        if (*json->at++ == '\\' && !scan_escape(json))
            return false;
    }
    json->at++;
    return true;
}

static bool scan_object(struct dsc_json *json, int depth) {
    json->at++;
    for (bool first = true;; first = false) {
        const int more = dsc_json_more(json, '}', first);
        if (more <= 0)
            return more == 0;
        if (*json->at != '"')
            return stop(json, "a key in double quotes");
        if (!scan_string(json) || !dsc_json_char(json, ':') || !scan_value(json, depth))
            return false;
    }
}

static bool scan_array(struct dsc_json *json, int depth) {
    json->at++;
    for (bool first = true;; first = false) {
        const int more = dsc_json_more(json, ']', first);
        if (more <= 0)
            return more == 0;
        if (!scan_value(json, depth))
            return false;
    }
}

static bool scan_word(struct dsc_json *json) {
    static const char *const words[] = {"true", "false", "null"};
    for (size_t i = 0; i < 3; i++)
        if (strncmp(json->at, words[i], strlen(words[i])) == 0) {
            json->at += strlen(words[i]);
            return true;
        }
    return stop(json, "a value");
}

static bool scan_value(struct dsc_json *json, int depth) {
    skip_space(json);
    if (depth == NESTING_LIMIT)
        return stop(json, "less nesting");
    if (*json->at == '{')
        return scan_object(json, depth + 1);
    if (*json->at == '[')
        return scan_array(json, depth + 1);
    if (*json->at == '"')
        return scan_string(json);
    return *json->at == '-' || is_digit(*json->at) ? scan_number(json) : scan_word(json);
}

/* ---- whole texts ---- */

const char *dsc_json_syntax(const char *text, const char **expected) {
    struct dsc_json json = {text + (strncmp(text, "\xEF\xBB\xBF", 3) == 0 ? 3 : 0)};
    if (scan_value(&json, 0) && dsc_json_end(&json))
        return NULL;
    *expected = json.expected;
    return json.at;
}

enum dsc_status dsc_json_parse(const char *text, size_t n_bytes, const char *what, cJSON **out) {
    const char *expected = "'{'", *stop = text;
    if (*text == '{')
        stop = dsc_json_syntax(text, &expected);
    if (!stop && strlen(text) != n_bytes) {
        stop = text + strlen(text);
        expected = "no byte 0";
    }
    if (stop)
        return DSC_FAIL(DSC_EDAMAGED, "%s: byte %zu of the JSON text: expected %s", what,
                        (size_t)(stop - text), expected);
    cJSON *tree = cJSON_Parse(text);
    if (!tree)
        return DSC_FAIL(DSC_EDAMAGED,
                        "%s: JSON that could not be taken in (a number of more than "
                        "60 digits, or no memory)",
                        what);
    *out = tree;
    return DSC_OK;
}

bool dsc_json_count(const cJSON *item, uint64_t *out) {
    const double limit = 9007199254740992.0; /* 2^53: each whole number up to here is a double */
    if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0) || item->valuedouble > limit ||
        (double)(uint64_t)item->valuedouble != item->valuedouble)
        return false;
    *out = (uint64_t)item->valuedouble;
    return true;
}

size_t dsc_json_quote(char *out, const char *text) {
    static const char digits[] = "0123456789abcdef";
    size_t n = 0;
    char ignored[6];
    for (const unsigned char *c = (const unsigned char *)text; *c; c++) {
        char *to = out ? out + n : ignored;
        if (*c < 0x20) {
            memcpy(to, "\\u00", 4);
            to[4] = digits[*c >> 4];
            to[5] = digits[*c & 15];
            n += 6;
        } else {
            if (*c == '"' || *c == '\\') {
                *to++ = '\\';
                n++;
            }
            *to = (char)*c;
            n++;
        }
    }
    return n;
}

/* ---- from front to back ---- */

bool dsc_json_skip(struct dsc_json *json) {
    return scan_value(json, 0);
}

bool dsc_json_end(struct dsc_json *json) {
    skip_space(json);
    return !*json->at || stop(json, "nothing more");
}

bool dsc_json_char(struct dsc_json *json, char c) {
    static const char *const expected[] = {"'{'", "'}'", "'['", "']'", "':'", "','"};
    skip_space(json);
    if (*json->at == c) {
        json->at++;
        return true;
    }
    size_t i = 0;
    while (i < 5 && expected[i][1] != c)
        i++;
    return stop(json, expected[i]);
}

int dsc_json_more(struct dsc_json *json, char close, bool first) {
    skip_space(json);
    if (*json->at == close) {
        json->at++;
        return 0;
    }
    if (first)
        return 1;
    if (*json->at != ',') {
        (void)stop(json, close == '}' ? "',' or '}'" : "',' or ']'");
        return -1;
    }
    json->at++;
    skip_space(json);
    return 1;
}

bool dsc_json_key(struct dsc_json *json, const char *name) {
    const size_t n = strlen(name);
    skip_space(json);
    if (json->at[0] != '"' || strncmp(json->at + 1, name, n) != 0 || json->at[n + 1] != '"') {
        json->expected = name;
        json->expects_key = true;
        return false;
    }
    json->at += n + 2;
    return dsc_json_char(json, ':');
}

bool dsc_json_text(struct dsc_json *json, struct dsc_json_string *out) {
    skip_space(json);
    if (*json->at != '"')
        return stop(json, "a string");
    const char *begin = json->at + 1;
    if (!scan_string(json))
        return false;
    *out = (struct dsc_json_string){begin, (size_t)(json->at - begin) - 1};
    return true;
}

bool dsc_json_integer(struct dsc_json *json, int64_t low, int64_t *out) {
    skip_space(json);
    const char *begin = json->at;
    const bool minus = *json->at == '-';
    int64_t value = 0;
    if (!(minus || is_digit(*json->at)) || !scan_number(json)) {
        json->at = begin;
        return stop(json, "a whole number");
    }
    bool whole = true;
    for (const char *at = begin + minus; at < json->at && whole; at++)
        whole = is_digit(*at) && !__builtin_mul_overflow(value, 10, &value) &&
                !__builtin_add_overflow(value, *at - '0', &value);
    if (minus && whole)
        value = -value;
    if (!whole || value < low) {
        json->at = begin;
        return stop(json, low < 0 ? "a whole number" : "a whole number that is not negative");
    }
    *out = value;
    return true;
}

/* ---- texts ---- */

/* A character that UTF-8 has as bytes of `out`; returns how many. */
static size_t put_character(uint32_t code, char *out) {
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    const size_t n = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, code >>= 6)
        out[i] = (char)(0x80 | (code & 0x3F));
    out[0] = (char)((0xF00 >> n & 0xFF) | code);
    return n;
}

static uint32_t four_digits(const char *at) {
    uint32_t code = 0;
    for (int i = 0; i < 4; i++)
        code = code * 16 + (uint32_t)hex_value(at[i]);
    return code;
}

size_t dsc_json_unescape(struct dsc_json_string string, char *out) {
    static const char letters[] = "bfnrt", meant[] = "\b\f\n\r\t";
    const char *at = string.begin, *end = at + string.n;
    size_t used = 0;
    while (at < end) {
        if (*at != '\\') {
            out[used++] = *at++;
            continue;
        }
        const char kind = at[1];
        const char *letter = strchr(letters, kind);
        at += 2;
        if (kind == 'u') {
            uint32_t code = four_digits(at);
            at += 4;
            if (code >= 0xD800 && code <= 0xDBFF) {
                code = 0x10000 + ((code - 0xD800) << 10) + (four_digits(at + 2) - 0xDC00);
                at += 6;
            }
            used += put_character(code, out + used);
        } else {
            out[used++] = letter ? meant[letter - letters] : kind;
        }
    }
    out[used] = '\0';
    return used;
}

/* Bytes of the character at text[0 .. n), 0 where it is none: what is too long for its value, a
 * surrogate or above U+10FFFF. */
static size_t character_bytes(const unsigned char *text, size_t n) {
    const unsigned char c = text[0];
    const size_t size = c < 0x80   ? 1
                        : c < 0xC2 ? 0
                        : c < 0xE0 ? 2
                        : c < 0xF0 ? 3
                        : c < 0xF5 ? 4
                                   : 0;
    if (size == 0 || size > n)
        return 0;
    for (size_t i = 1; i < size; i++)
        if ((text[i] & 0xC0) != 0x80)
            return 0;
    if ((c == 0xE0 && text[1] < 0xA0) || (c == 0xED && text[1] > 0x9F) ||
        (c == 0xF0 && text[1] < 0x90) || (c == 0xF4 && text[1] > 0x8F))
        return 0;
    return size;
}

bool dsc_utf8_valid(const char *text, size_t n) {
    size_t at = 0;
    while (at < n) {
        const size_t size = character_bytes((const unsigned char *)text + at, n - at);
        if (size == 0)
            return false;
        at += size;
    }
    return true;
}
