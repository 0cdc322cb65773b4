/* Which tier serves: chosen once, from what CPU and operating system support and from DSC_ISA.
 *
 * Invariant: the choice never changes in a process. A DSC_ISA that cannot be followed is an error
 * of dsc_kernels_check, which the binding calls at import; it is never followed by half. */
#include "tier.h"

#include <pthread.h>
#include <stdlib.h>

enum { MAX_TIERS = 4 };

static struct {
    const struct dsc_kernels *tiers[MAX_TIERS]; /* slowest first */
    const char *names[MAX_TIERS + 1];           /* NULL-terminated */
    const struct dsc_kernels *chosen;
    char asked[16]; /* DSC_ISA, cut, where no tier here has that name; else "" */
} table;
static pthread_once_t table_filled = PTHREAD_ONCE_INIT;

static void add_tier(const struct dsc_kernels *tier) {
    size_t n = 0;
    while (table.names[n])
        n++;
    table.tiers[n] = tier;
    table.names[n] = tier->name;
    table.chosen = tier;
}

static const struct dsc_kernels *find_tier(const char *name) {
    for (size_t i = 0; table.names[i]; i++)
        if (strcmp(table.names[i], name) == 0)
            return table.tiers[i];
    return NULL;
}

static void fill_table(void) {
    add_tier(&dsc__kernels_scalar);
#if defined(__x86_64__)
    /* These ask the operating system, too (XGETBV): registers that it does not save are not there.
     */
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    if (avx2)
        add_tier(&dsc__kernels_avx2);
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        add_tier(&dsc__kernels_avx512);
#elif defined(__aarch64__)
    add_tier(&dsc__kernels_neon);
#endif
    const char *asked = getenv("DSC_ISA");
    if (!asked || !*asked)
        return;
    const struct dsc_kernels *forced = find_tier(asked);
    if (forced)
        table.chosen = forced;
    else
        strncat(table.asked, asked, sizeof table.asked - 1);
}

const struct dsc_kernels *dsc_kernels(void) {
    (void)pthread_once(&table_filled, fill_table);
    return table.chosen;
}

const struct dsc_kernels *dsc_kernels_tier(const char *name) {
    (void)pthread_once(&table_filled, fill_table);
    return find_tier(name);
}

const char *const *dsc_kernels_tiers(void) {
    (void)pthread_once(&table_filled, fill_table);
    return table.names;
}

enum dsc_status dsc_kernels_check(void) {
    char list[64] = "";
    (void)pthread_once(&table_filled, fill_table);
    if (!table.asked[0])
        return DSC_OK;
    for (size_t i = 0; table.names[i]; i++) {
        strncat(list, i ? ", " : "", sizeof list - strlen(list) - 1);
        strncat(list, table.names[i], sizeof list - strlen(list) - 1);
    }
    return DSC_FAIL(DSC_EINVAL, "DSC_ISA=%s: this machine and build have %s", table.asked, list);
}
