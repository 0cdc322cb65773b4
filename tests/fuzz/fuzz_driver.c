/* A small fuzzer for where there is no libFuzzer: mutates inputs, keeps those that reach something
 * new (gcc's -fsanitize-coverage=trace-pc tells), and leaves the one that failed in a file.
 *
 *   fuzz_x SECONDS [SEED]   fuzzes; the same seed mutates alike
 *   fuzz_x FILE             runs one input again */
#define _GNU_SOURCE
#include "fuzz.h"

#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { ROOM = 1 << 16, MOST_INPUTS = 8192, PLACES = 1 << 13, ALARM_S = 20 };

static struct input {
    uint8_t *data;
    size_t size;
} inputs[MOST_INPUTS];
static size_t n_inputs;
static uint8_t current[ROOM], hits[PLACES], seen[PLACES];
static size_t current_size;
static char crash_path[4096];
static uint64_t state;

/* Called by the instrumented code at every branch. */
void __sanitizer_cov_trace_pc(void);
void __sanitizer_cov_trace_pc(void) {
    uintptr_t place = (uintptr_t)__builtin_return_address(0);
    uint8_t *hit = &hits[(place ^ place >> 16) % PLACES];
    *hit += *hit < 255;
}

/* ---- failures ---- */

void __sanitizer_set_death_callback(void (*callback)(void));

static void keep_current(void) {
    int fd = open(crash_path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || write(fd, current, current_size) != (ssize_t)current_size)
        fputs("the input could not be kept\n", stderr);
    fprintf(stderr, "the input that failed: %s\n", crash_path);
}

static void on_signal(int number) {
    fputs(number == SIGALRM ? "an input takes too long\n" : "aborted\n", stderr);
    keep_current();
    _exit(1);
}

/* ---- mutations ---- */

static size_t below(size_t n) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return n ? (size_t)((state * 0x2545F4914F6CDD1Du) >> 16) % n : 0;
}

static void replace(size_t at, size_t n_old, const void *with, size_t n_new) {
    if (current_size - n_old + n_new > ROOM)
        return;
    memmove(current + at + n_new, current + at + n_old, current_size - at - n_old);
    memcpy(current + at, with, n_new);
    current_size += n_new - n_old;
}

static void put_word(size_t at, bool over) {
    size_t n_words = 0;
    while (fuzz_words[n_words])
        n_words++;
    const char *word = fuzz_words[below(n_words)];
    size_t n = strlen(word), left = current_size - at;
    replace(at, over ? (n < left ? n : left) : 0, word, n);
}

/* A run of digits becomes another number. */
static void change_number(size_t at) {
    char text[32];
    size_t end, n_digits;
    while (at < current_size && (current[at] < '0' || current[at] > '9'))
        at++;
    for (end = at; end < current_size && current[end] >= '0' && current[end] <= '9'; end++)
        ;
    n_digits = end - at;
    if (n_digits == 0 || n_digits > 18)
        return;
    memcpy(text, current + at, n_digits);
    text[n_digits] = '\0';
    unsigned long long number = strtoull(text, NULL, 10);
    const unsigned long long others[] = {
        number + 1, number - 1, number * 2, number / 2, 0, 1ull << below(64), number + below(4096)};
    snprintf(text, sizeof text, "%llu", others[below(7)]);
    replace(at, n_digits, text, strlen(text));
}

static void mutate_once(void) {
    static uint8_t part[ROOM];
    size_t at = below(current_size + 1), n = below(current_size - at + 1);
    n = below(2) ? n : n % 16;
    const struct input *other = &inputs[below(n_inputs)];
    size_t from = below(other->size + 1), n_other = below(other->size - from + 1);
    switch (below(9)) {
    case 0:
        if (at < current_size)
            current[at] ^= (uint8_t)(1 << below(8));
        break;
    case 1:
        if (at < current_size)
            current[at] = (uint8_t)below(256);
        break;
    case 2:
        replace(at, n, part, 0);
        break;
    case 3:
        memcpy(part, current + at, n);
        replace(below(current_size + 1), 0, part, n);
        break;
    case 4:
        replace(at, n, other->data + from, n_other);
        break;
    case 5:
        put_word(at, false);
        break;
    case 6:
        put_word(at, true);
        break;
    default:
        change_number(at);
    }
}

static void mutate(void) {
    const struct input *input = &inputs[below(n_inputs)];
    memcpy(current, input->data, input->size);
    current_size = input->size;
    for (size_t n = 1 + below(4) * below(4); n > 0; n--)
        mutate_once();
    if (below(4))
        current_size = fuzz_repair(current, current_size, ROOM);
}

/* ---- the search ---- */

static void run_current(void) {
    memset(hits, 0, sizeof hits);
    (void)LLVMFuzzerTestOneInput(current, current_size);
}

/* How often a place was reached counts roughly: once, a few times, many times. */
static bool reached_new(void) {
    bool fresh = false;
    for (size_t i = 0; i < PLACES; i++) {
        uint8_t class = hits[i] == 0   ? 0
                        : hits[i] == 1 ? 1
                        : hits[i] < 8  ? 2
                        : hits[i] < 64 ? 4
                                       : 8;
        fresh |= (class & ~seen[i]) != 0;
        seen[i] |= class;
    }
    return fresh;
}

static void keep_if_new(void) {
    if (!reached_new() || n_inputs == MOST_INPUTS)
        return;
    struct input *input = &inputs[n_inputs];
    input->data = malloc(current_size + 1);
    if (!input->data)
        abort();
    memcpy(input->data, current, current_size);
    input->size = current_size;
    n_inputs++;
}

static int run_file(const char *path) {
    int fd = open(path, O_RDONLY);
    ssize_t n = fd < 0 ? -1 : read(fd, current, ROOM);
    if (n < 0) {
        fprintf(stderr, "%s cannot be read\n", path);
        return 2;
    }
    current_size = (size_t)n;
    run_current();
    return 0;
}

static void fuzz(double seconds) {
    struct timespec begin, now;
    size_t n_runs = 0, n_places = 0;
    (void)clock_gettime(CLOCK_MONOTONIC, &begin);
    while ((current_size = fuzz_seed(n_runs, current, ROOM)) > 0) {
        run_current();
        keep_if_new();
        n_runs++;
    }
    do {
        (void)alarm(ALARM_S);
        for (int i = 0; i < 256; i++, n_runs++) {
            mutate();
            run_current();
            keep_if_new();
        }
        (void)clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((double)(now.tv_sec - begin.tv_sec) + 1e-9 * (double)(now.tv_nsec - begin.tv_nsec) <
             seconds);
    for (size_t i = 0; i < PLACES; i++)
        n_places += seen[i] != 0;
    printf("%zu inputs, %zu places reached, %zu kept\n", n_runs, n_places, n_inputs);
}

int main(int argc, char **argv) {
    char *end;
    if (argc < 2) {
        fprintf(stderr, "%s SECONDS [SEED], or %s FILE\n", argv[0], argv[0]);
        return 2;
    }
    double seconds = strtod(argv[1], &end);
    snprintf(crash_path, sizeof crash_path, "%s.failed", argv[0]);
    __sanitizer_set_death_callback(keep_current);
    (void)signal(SIGABRT, on_signal);
    (void)signal(SIGALRM, on_signal);
    if (*end)
        return run_file(argv[1]);
    state = argc > 2 ? strtoull(argv[2], NULL, 10) : 0;
    state = state * 2 + 0x9E3779B97F4A7C15u; /* never 0 */
    fuzz(seconds);
    for (size_t i = 0; i < n_inputs; i++)
        free(inputs[i].data);
    return 0;
}
