/* Communicators: arguments, values, then what goes wrong between ranks that live. Ranks are
 * threads, which ThreadSanitizer sees. Element values are formulas of (rank, index), so what must
 * come out is computed here. */
#define _GNU_SOURCE
#include "comm_processes.h"

#include "comm/backend.h"
#include "comm/shm.h"

#include <pthread.h>

enum { CHUNK_F32 = 2 * DSC__SHM_CELL_MAX, SMALL_F32 = DSC__SHM_SMALL / 4 };

/* ---- elements ---- */

static uint16_t bf16_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static void put(void *base, size_t i, enum dsc_dtype dtype, double x) {
    switch (dtype) {
    case DSC_F32:
        ((float *)base)[i] = (float)x;
        break;
    case DSC_BF16:
        ((uint16_t *)base)[i] = bf16_of((float)x);
        break;
    case DSC_F16:
        ((_Float16 *)base)[i] = (_Float16)(float)x;
        break;
    case DSC_F64:
        ((double *)base)[i] = x;
        break;
    case DSC_I32:
        ((int32_t *)base)[i] = (int32_t)x;
        break;
    case DSC_I64:
        ((int64_t *)base)[i] = (int64_t)x;
        break;
    case DSC_U8:
        ((uint8_t *)base)[i] = (uint8_t)(int)x;
        break;
    case DSC_DTYPE_COUNT:
        break;
    }
}

/* Small whole numbers: exact in every type, and so are four of them summed. */
static double value(int rank, size_t i, enum dsc_op op) {
    if (op == DSC_PROD)
        return (i + (size_t)rank) % 3 == 0 ? 2 : (i % 2 ? -1 : 1);
    return (double)((i * 7 + (size_t)rank * 13) % 31) - 15;
}

static double expected(int size, size_t i, enum dsc_op op, enum dsc_dtype dtype) {
    double x = value(0, i, op);
    for (int r = 1; r < size; r++) {
        double y = value(r, i, op);
        if (op == DSC_SUM || op == DSC_AVG)
            x += y;
        else if (op == DSC_PROD)
            x *= y;
        else if (op == DSC_MIN ? y < x : y > x)
            x = y;
    }
    if (op == DSC_AVG)
        x = dtype == DSC_F64 ? x / size : (double)((float)x / (float)size);
    return x;
}

static void check_equal(const void *got, const void *want, size_t n_bytes, const char *what,
                        size_t n, enum dsc_dtype dtype, int op) {
    if (n_bytes > 0 && memcmp(got, want, n_bytes) != 0) {
        fprintf(stderr, "%s of %zu x %s, op %d: wrong values\n", what, n, dsc_dtype_name(dtype),
                op);
        exit(1);
    }
}

/* Runs all four collectives for one (n, dtype, op) and compares every byte. */
static void check_collectives(struct dsc_comm *comm, size_t n, enum dsc_dtype dtype,
                              enum dsc_op op) {
    int rank = dsc_comm_rank(comm), size = dsc_comm_size(comm);
    size_t bytes = dsc_dtype_size(dtype), total = n * (size_t)size;
    char *src = malloc(total * bytes + 64), *dst = malloc(total * bytes + 64);
    char *want = malloc(total * bytes + 64);
    src += bytes, dst += bytes; /* aligned to an element, no further */
    struct dsc_coll coll = {.src = src, .dst = dst, .n_elems = n, .dtype = dtype, .op = op};

    for (size_t i = 0; i < total; i++) {
        put(src, i, dtype, value(rank, i, op));
        put(want, i, dtype, expected(size, i, op, dtype));
    }
    CHECK_OK(dsc_comm_all_reduce(comm, &coll));
    check_equal(dst, want, n * bytes, "all_reduce", n, dtype, op);
    CHECK_OK(dsc_comm_reduce_scatter(comm, &coll));
    check_equal(dst, want + (size_t)rank * n * bytes, n * bytes, "reduce_scatter", n, dtype, op);
    coll.src = coll.dst = src;
    CHECK_OK(dsc_comm_all_reduce(comm, &coll));
    check_equal(src, want, n * bytes, "all_reduce in place", n, dtype, op);

    for (size_t i = 0; i < n; i++)
        put(src, i, dtype, value(rank, i, DSC_SUM));
    for (size_t i = 0; i < total; i++)
        put(want, i, dtype, value((int)(i / dsc_max(n, 1)), i % dsc_max(n, 1), DSC_SUM));
    coll.dst = dst;
    CHECK_OK(dsc_comm_all_gather(comm, &coll));
    check_equal(dst, want, total * bytes, "all_gather", n, dtype, op);
    coll.root = size - 1;
    coll.dst = src;
    CHECK_OK(dsc_comm_broadcast(comm, &coll));
    check_equal(src, want + (size_t)(size - 1) * n * bytes, n * bytes, "broadcast", n, dtype, op);
    free(src - bytes), free(dst - bytes), free(want);
}

/* reduce, gather, scatter and both forms of all_to_all for one (n, dtype, op). `root` is the last
 * rank; elsewhere its buffers are NULL, because nobody may look at them. */
static void check_rooted(struct dsc_comm *comm, size_t n, enum dsc_dtype dtype, enum dsc_op op) {
    int rank = dsc_comm_rank(comm), size = dsc_comm_size(comm), root = size - 1;
    size_t bytes = dsc_dtype_size(dtype), total = n * (size_t)size;
    char *src = malloc(total * bytes + 64), *dst = malloc(total * bytes + 64);
    char *want = malloc(total * bytes + 64);
    struct dsc_coll coll = {.src = src, .n_elems = n, .dtype = dtype, .op = op, .root = root};
    coll.dst = rank == root ? dst : NULL;

    for (size_t i = 0; i < n && dtype != DSC_U8; i++) {
        put(src, i, dtype, value(rank, i, op));
        put(want, i, dtype, expected(size, i, op, dtype));
    }
    if (dtype != DSC_U8) {
        CHECK_OK(dsc_comm_reduce(comm, &coll));
        check_equal(dst, want, rank == root ? n * bytes : 0, "reduce", n, dtype, op);
    }
    for (size_t i = 0; i < total; i++) { /* element i of src is for rank i / n */
        put(src, i, dtype, value(rank, i, DSC_SUM));
        put(want, i, dtype, value((int)(i / dsc_max(n, 1)), i % dsc_max(n, 1), DSC_SUM));
    }
    CHECK_OK(dsc_comm_gather(comm, &coll));
    check_equal(dst, want, rank == root ? total * bytes : 0, "gather", n, dtype, op);
    coll.dst = dst, coll.src = rank == root ? src : NULL;
    CHECK_OK(dsc_comm_scatter(comm, &coll));
    for (size_t i = 0; i < n; i++)
        put(want, i, dtype, value(root, (size_t)rank * n + i, DSC_SUM));
    check_equal(dst, want, n * bytes, "scatter", n, dtype, op);
    coll.src = src;
    CHECK_OK(dsc_comm_all_to_all(comm, &coll));
    for (size_t i = 0; i < total; i++)
        put(want, i, dtype, value((int)(i / n), (size_t)rank * n + i % n, DSC_SUM));
    check_equal(dst, want, total * bytes, "all_to_all", n, dtype, op);
    free(src), free(dst), free(want);
}

static bool allowed(enum dsc_dtype dtype, enum dsc_op op) {
    return !(op == DSC_AVG && (dtype == DSC_I32 || dtype == DSC_I64));
}

/* Where the result is one of the sources: the first at root 0, the last at the other end. */
static void check_in_place(struct dsc_comm *comm, size_t n, enum dsc_dtype dtype, enum dsc_op op) {
    int rank = dsc_comm_rank(comm), size = dsc_comm_size(comm);
    size_t bytes = dsc_dtype_size(dtype), total = n * (size_t)size;
    char *data = malloc(total * bytes + 64), *want = malloc(total * bytes + 64);
    char *own = data + (size_t)rank * n * bytes;
    struct dsc_coll coll = {.n_elems = n, .dtype = dtype, .op = op};

    for (size_t i = 0; i < total; i++)
        put(want, i, dtype, expected(size, i, op, dtype));
    for (coll.root = 0; coll.root < size; coll.root += dsc_max(size - 1, 1)) {
        for (size_t i = 0; i < total; i++)
            put(data, i, dtype, value(rank, i, op));
        coll.src = data, coll.dst = rank == coll.root ? data : NULL;
        CHECK_OK(dsc_comm_reduce(comm, &coll));
        check_equal(data, want, rank == coll.root ? n * bytes : 0, "reduce in place", n, dtype, op);
    }
    for (size_t i = 0; i < total; i++)
        put(data, i, dtype, value(rank, i, op));
    coll.src = data, coll.dst = own;
    CHECK_OK(dsc_comm_reduce_scatter(comm, &coll));
    check_equal(own, want + (size_t)rank * n * bytes, n * bytes, "reduce_scatter in place", n,
                dtype, op);
    coll.src = own, coll.dst = data;
    CHECK_OK(dsc_comm_all_gather(comm, &coll));
    check_equal(data, want, total * bytes, "all_gather in place", n, dtype, op);
    coll.root = size - 1;
    coll.src = rank == coll.root ? data : NULL, coll.dst = own;
    CHECK_OK(dsc_comm_scatter(comm, &coll));
    coll.src = own, coll.dst = rank == coll.root ? data : NULL;
    CHECK_OK(dsc_comm_gather(comm, &coll));
    check_equal(data, want, total * bytes, "scatter and gather in place", n, dtype, op);
    free(data), free(want);
}

static void in_place_body(struct dsc_comm *comm, int rank, void *arg) {
    static const size_t sizes[] = {3, SMALL_F32 * 2 + 9};
    (void)rank, (void)arg;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int dtype = 0; dtype < DSC_REDUCE_DTYPE_COUNT; dtype++)
            for (int op = 0; op < DSC_OP_COUNT; op++)
                if (allowed((enum dsc_dtype)dtype, (enum dsc_op)op))
                    check_in_place(comm, sizes[i], (enum dsc_dtype)dtype, (enum dsc_op)op);
}

static void a_result_over_one_of_its_sources_is_right(void) {
    for (int size = 1; size <= RANKS_MAX; size++)
        run_threads(size, 0, false, in_place_body, NULL);
}

/* Rank a has (a + 2 b) n / 8 elements for rank b, so some parts are empty. */
static size_t split(size_t n, int from, int to) {
    return ((size_t)from + 2 * (size_t)to) * n / 8;
}

static void check_splits(struct dsc_comm *comm, size_t n, enum dsc_dtype dtype) {
    int rank = dsc_comm_rank(comm), size = dsc_comm_size(comm);
    size_t bytes = dsc_dtype_size(dtype), n_send[RANKS_MAX], n_recv[RANKS_MAX], k = 0;
    size_t room = 2 * RANKS_MAX * (n + 1) * bytes;
    char *src = malloc(room), *dst = malloc(room), *want = malloc(room);
    struct dsc_coll coll = {.src = src, .dst = dst, .dtype = dtype};
    for (int r = 0; r < size; r++) {
        n_send[r] = split(n, rank, r);
        n_recv[r] = split(n, r, rank);
        for (size_t i = 0; i < n_send[r]; i++)
            put(src, k++, dtype, value(10 * rank + r, i, DSC_SUM));
    }
    k = 0;
    for (int r = 0; r < size; r++)
        for (size_t i = 0; i < n_recv[r]; i++)
            put(want, k++, dtype, value(10 * r + rank, i, DSC_SUM));
    CHECK_OK(dsc_comm_all_to_all_v(comm, &coll, n_send, n_recv));
    check_equal(dst, want, k * bytes, "all_to_all with splits", n, dtype, 0);
    free(src), free(dst), free(want);
}

static void rooted_body(struct dsc_comm *comm, int rank, void *arg) {
    static const size_t sizes[] = {0, 1, 3, 17, 3000, 70000, 600001};
    (void)rank, (void)arg;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int dtype = 0; dtype < DSC_DTYPE_COUNT; dtype++) {
            if (sizes[i] > 3000 && dtype != DSC_F32 && dtype != DSC_U8)
                continue;
            check_rooted(comm, sizes[i], (enum dsc_dtype)dtype, i % 2 ? DSC_SUM : DSC_MAX);
            check_splits(comm, sizes[i], (enum dsc_dtype)dtype);
        }
}

static void roots_and_pairs_get_what_is_theirs(void) {
    struct dsc_comm *self = NULL;
    for (int size = 1; size <= RANKS_MAX; size++)
        run_threads(size, 0, false, rooted_body, NULL);
    CHECK_OK(dsc_comm_open_self(NULL, &self));
    rooted_body(self, 0, NULL);
    dsc_comm_close(self);
}

static void contradicting_body(struct dsc_comm *comm, int rank, void *arg) {
    size_t n_send[3] = {1, 1, 1}, n_recv[3] = {1, 1, 1};
    float x[3] = {0}, y[4] = {0};
    struct dsc_coll coll = {.src = x, .dst = y, .dtype = DSC_F32};
    (void)arg;
    n_recv[0] += rank == 2;
    CHECK(dsc_comm_all_to_all_v(comm, &coll, n_send, n_recv) == DSC_EDIVERGED);
    CHECK_TEXT("rank 0 sends 1 elements to rank 2, which expects 2");
}

static void splits_that_contradict_each_other_are_named_on_every_rank(void) {
    run_threads(3, 0, false, contradicting_body, NULL);
}

static void all_types_body(struct dsc_comm *comm, int rank, void *arg) {
    static const size_t sizes[] = {0, 1, 2, 3, 17, 1000};
    (void)rank, (void)arg;
    for (int dtype = 0; dtype < DSC_REDUCE_DTYPE_COUNT; dtype++)
        for (int op = 0; op < DSC_OP_COUNT; op++)
            for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
                if (allowed((enum dsc_dtype)dtype, (enum dsc_op)op))
                    check_collectives(comm, sizes[i], (enum dsc_dtype)dtype, (enum dsc_op)op);
}

static void every_type_and_reduction_gives_expected_bits(void) {
    for (int size = 1; size <= RANKS_MAX; size++)
        run_threads(size, 0, false, all_types_body, NULL);
}

static void self_gives_expected_bits(void) {
    struct dsc_comm *comm = NULL;
    CHECK_OK(dsc_comm_open_self(NULL, &comm));
    CHECK(strcmp(dsc_comm_backend(comm), "self") == 0);
    all_types_body(comm, 0, NULL);
    dsc_comm_close(comm);
}

static void boundary_body(struct dsc_comm *comm, int rank, void *arg) {
    const size_t chunk = CHUNK_F32, small = SMALL_F32;
    const size_t sizes[] = {small, small + 1, chunk, chunk + 1, 2 * chunk + 77};
    (void)rank, (void)arg;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        check_collectives(comm, sizes[i], DSC_F32, i % 2 ? DSC_SUM : DSC_MAX);
    check_collectives(comm, chunk + 3, DSC_BF16, DSC_AVG);
    check_collectives(comm, chunk / 2 - 1, DSC_F64, DSC_AVG);
    check_collectives(comm, chunk / 2 + 1, DSC_I64, DSC_MIN);
}

/* Beyond DSC__STREAM_FROM results go past the caches. */
static void stream_body(struct dsc_comm *comm, int rank, void *arg) {
    (void)rank, (void)arg;
    check_collectives(comm, DSC__STREAM_FROM / 4 + 33, DSC_F32, DSC_SUM);
}

static void streamed_results_lose_nothing(void) {
    run_threads(2, 0, false, stream_body, NULL);
}

static void chunk_boundaries_lose_nothing_on_2_ranks(void) {
    run_threads(2, 0, false, boundary_body, NULL);
}

static void chunk_boundaries_lose_nothing_on_3_ranks(void) {
    run_threads(3, 0, false, boundary_body, NULL);
}

static void chunk_boundaries_lose_nothing_on_4_ranks(void) {
    run_threads(4, 0, false, boundary_body, NULL);
}

/* ---- rounding and order ---- */

static void order_body(struct dsc_comm *comm, int rank, void *arg) {
    static const float terms[RANKS_MAX] = {1e8f, 3.0f, -1e8f, 1.5f};
    size_t n = *(size_t *)arg;
    int size = dsc_comm_size(comm);
    float *x = malloc(n * sizeof *x), want = 0.0f;
    for (size_t i = 0; i < n; i++)
        x[i] = terms[rank];
    for (int r = 0; r < size; r++)
        want += terms[r];
    struct dsc_coll coll = {.src = x, .dst = x, .n_elems = n, .dtype = DSC_F32, .op = DSC_SUM};
    CHECK_OK(dsc_comm_all_reduce(comm, &coll));
    for (size_t i = 0; i < n; i++)
        CHECK(memcmp(&x[i], &want, sizeof want) == 0);
    free(x);
}

static void sums_are_taken_in_rank_order(void) {
    for (size_t n = 5; n < 4 * CHUNK_F32; n = n * 200 + 1)
        for (int size = 2; size <= RANKS_MAX; size++)
            run_threads(size, 0, false, order_body, &n);
}

static void zero_body(struct dsc_comm *comm, int rank, void *arg) {
    float x = -0.0f, zero = 0.0f;
    struct dsc_coll coll = {.src = &x, .dst = &x, .n_elems = 1, .dtype = DSC_F32, .op = DSC_SUM};
    (void)rank, (void)arg;
    CHECK_OK(dsc_comm_all_reduce(comm, &coll));
    CHECK(memcmp(&x, &zero, sizeof x) == 0);
}

static void a_sum_of_negative_zeros_is_positive_zero(void) {
    for (int size = 1; size <= 3; size++)
        run_threads(size, 0, false, zero_body, NULL);
}

static void round_body(struct dsc_comm *comm, int rank, void *arg) {
    uint16_t x = bf16_of(rank == 0 ? 256.0f : 1.0f);
    struct dsc_coll coll = {.src = &x, .dst = &x, .n_elems = 1, .dtype = DSC_BF16, .op = DSC_SUM};
    (void)arg;
    CHECK_OK(dsc_comm_all_reduce(comm, &coll));
    CHECK_EQ_INT(x, bf16_of(259.0f)); /* 256 if each addition were rounded */
}

static void sixteen_bit_sums_round_once(void) {
    run_threads(4, 0, false, round_body, NULL);
}

static void flush_body(struct dsc_comm *comm, int rank, void *arg) {
    volatile float tiny = 1e-40f;
    float x = tiny, want = tiny + tiny;
    struct dsc_coll coll = {.src = &x, .dst = &x, .n_elems = 1, .dtype = DSC_F32, .op = DSC_SUM};
    (void)arg;
#ifdef __SSE__
    if (rank == 1)
        __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040);
#endif
    CHECK_OK(dsc_comm_all_reduce(comm, &coll));
    CHECK(memcmp(&x, &want, sizeof x) == 0);
#ifdef __SSE__
    CHECK(rank != 1 || (__builtin_ia32_stmxcsr() & 0x8040) == 0x8040);
#endif
}

static void a_rank_that_flushes_denormals_gets_the_same_bits(void) {
    run_threads(2, 0, false, flush_body, NULL);
}

/* ---- arguments ---- */

static void wrong_arguments_are_named_and_change_nothing(void) {
    struct dsc_comm *comm = NULL;
    float x[8] = {0};
    struct dsc_coll good = {.src = x, .dst = x, .n_elems = 4, .dtype = DSC_F32}, c = good;
    CHECK_OK(dsc_comm_open_self(NULL, &comm));
    c.src = NULL;
    CHECK(dsc_comm_all_reduce(comm, &c) == DSC_EINVAL);
    CHECK_TEXT("src is NULL");
    c = good, c.dtype = (enum dsc_dtype)77;
    CHECK(dsc_comm_broadcast(comm, &c) == DSC_EINVAL);
    c = good, c.op = (enum dsc_op)9;
    CHECK(dsc_comm_reduce_scatter(comm, &c) == DSC_EINVAL);
    CHECK_TEXT("9 is no reduction");
    c = good, c.dtype = DSC_I32, c.op = DSC_AVG;
    CHECK(dsc_comm_all_reduce(comm, &c) == DSC_EINVAL);
    CHECK_TEXT("avg of int32");
    c = good, c.root = 1;
    CHECK(dsc_comm_broadcast(comm, &c) == DSC_EINVAL);
    CHECK_TEXT("root is 1");
    c = good, c.dst = x + 1;
    CHECK(dsc_comm_all_reduce(comm, &c) == DSC_EINVAL);
    CHECK_TEXT("overlap");
    c = good, c.src = c.dst = (char *)x + 1;
    CHECK(dsc_comm_all_gather(comm, &c) == DSC_EINVAL);
    CHECK_TEXT("not aligned");
    c = good, c.n_elems = SIZE_MAX / 2;
    CHECK(dsc_comm_all_gather(comm, &c) == DSC_EINVAL);
    CHECK(dsc_comm_meet(comm, "m", 0, x, DSC_MEET_MAX + 1, x) == DSC_EINVAL);
    CHECK(dsc_comm_wait_bell(comm, dsc_comm_bell(comm), "nobody", dsc_comm_now()) == DSC_ESTATE);
    CHECK_OK(dsc_comm_all_reduce(comm, &good)); /* nothing above broke it */
    dsc_comm_close(comm);
    dsc_comm_close(NULL);
}

static void wrong_worlds_are_refused(void) {
    struct dsc_comm *comms[RANKS_MAX];
    struct dsc_shm_listener *listener = NULL;
    char address[DSC_SHM_ADDRESS_MAX], token[33];
    CHECK(dsc_comm_open_threads(NULL, 0, comms) == DSC_EINVAL);
    CHECK(dsc_comm_open_shm(NULL, NULL, "a", "t", 2, 2, comms) == DSC_EINVAL);
    CHECK(dsc_comm_open_shm(NULL, NULL, "a", "t", 0, 2, comms) == DSC_EINVAL);
    CHECK(dsc_comm_open_shm(NULL, NULL, "a", "short", 1, 2, comms) == DSC_EINVAL);
    CHECK_OK(dsc_shm_listen(&listener, address, token));
    CHECK(dsc_comm_open_shm(NULL, listener, address, token, 1, 2, comms) == DSC_EINVAL);
    CHECK_OK(dsc_comm_open_shm(NULL, listener, address, token, 0, 1, comms)); /* a world of one */
    CHECK_OK(dsc_comm_barrier(comms[0], NULL));
    dsc_comm_close(comms[0]);
}

static void node_names_this_machine(void) {
    char a[DSC_SHM_NODE_MAX], b[DSC_SHM_NODE_MAX];
    CHECK_OK(dsc_shm_node(a));
    CHECK_OK(dsc_shm_node(b));
    CHECK(strlen(a) > 36 && strcmp(a, b) == 0);
}

/* ---- meet, windows, bells ---- */

static void meet_body(struct dsc_comm *comm, int rank, void *arg) {
    int size = dsc_comm_size(comm);
    char mine[DSC_MEET_MAX], all[RANKS_MAX * DSC_MEET_MAX];
    (void)arg;
    for (int round = 0; round < 300; round++) {
        size_t n = (size_t)(round * 7 % (DSC_MEET_MAX + 1));
        memset(mine, rank + round, n);
        CHECK_OK(dsc_comm_meet(comm, "round", (uint64_t)round, mine, n, all));
        for (int r = 0; r < size; r++)
            for (size_t i = 0; i < n; i++)
                CHECK(all[(size_t)r * n + i] == (char)(r + round));
    }
}

static void meet_gives_everyones_bytes_in_rank_order(void) {
    for (int size = 1; size <= RANKS_MAX; size++)
        run_threads(size, 0, false, meet_body, NULL);
}

static void meet_tags_body(struct dsc_comm *comm, int rank, void *arg) {
    (void)arg;
    CHECK(dsc_comm_meet(comm, "engine.step", rank == 1 ? 8 : 7, NULL, 0, NULL) == DSC_EDIVERGED);
    CHECK_TEXT("rank 0 called meet(tag 7, 0 bytes) [engine.step] as operation 1 while rank 1 "
               "called meet(tag 8, 0 bytes) [engine.step]");
}

static void meet_with_other_tags_names_both(void) {
    run_threads(2, 0, false, meet_tags_body, NULL);
}

static void windows_show_what_others_wrote(void) {
    for (int size = 1; size <= RANKS_MAX; size++)
        run_threads(size, 0, false, window_body, NULL);
    struct dsc_comm *self = NULL;
    CHECK_OK(dsc_comm_open_self(NULL, &self));
    window_body(self, 0, NULL);
    dsc_comm_close(self);
}

static void bells_wake_who_waits(void) {
    int delays = 1;
    for (int size = 2; size <= RANKS_MAX; size++) {
        run_threads(size, 5, false, bell_body, NULL);
        run_threads(size, 5, false, bell_body, &delays);
    }
}

static void bell_timeout_body(struct dsc_comm *comm, int rank, void *arg) {
    (void)arg;
    if (rank == 0) {
        double since = dsc_comm_now();
        uint32_t seen = dsc_comm_bell(comm);
        CHECK(dsc_comm_wait_bell(comm, seen, "gradients of piece 5", since) == DSC_ETIMEDOUT);
        CHECK_TEXT("gradients of piece 5");
        CHECK(dsc_comm_now() - since < 2);
        CHECK(dsc_comm_barrier(comm, NULL) == DSC_ETIMEDOUT); /* the first error stays */
        CHECK_TEXT("gradients of piece 5");
    }
}

/* Rank 0 waits for rank 2's ring; rank 1 leaves a moment before it. Both are played by one thread.
 */
struct late_ring {
    struct dsc_comm *leaver, *ringer;
};

static void *leave_then_ring(void *arg) {
    struct late_ring *late = arg;
    nap_ms(5); /* rank 0 sleeps then */
    dsc_comm_leave(late->leaver);
    nap_ms(1);
    dsc_comm_ring(late->ringer, 0);
    return NULL;
}

/* A busy machine may hold the ring back for longer than anybody should wait: of many tries one. */
static void a_ring_just_after_a_rank_left_is_heard(void) {
    int n_heard = 0;
    for (int i = 0; i < 20 && n_heard == 0; i++) {
        struct dsc_comm *comms[3];
        pthread_t thread;
        CHECK_OK(dsc_comm_open_threads(NULL, 3, comms));
        struct late_ring late = {.leaver = comms[1], .ringer = comms[2]};
        uint32_t seen = dsc_comm_bell(comms[0]);
        CHECK(pthread_create(&thread, NULL, leave_then_ring, &late) == 0);
        enum dsc_status status = dsc_comm_wait_bell(comms[0], seen, "rank 2", dsc_comm_now());
        CHECK(status == DSC_OK || status == DSC_EDEAD);
        n_heard += status == DSC_OK;
        CHECK(pthread_join(thread, NULL) == 0);
        for (int r = 0; r < 3; r++)
            dsc_comm_close(comms[r]);
    }
    CHECK(n_heard > 0);
}

static void a_bell_that_nobody_rings_times_out(void) {
    run_threads(2, 0.3, false, bell_timeout_body, NULL);
}

/* ---- divergence, abort, time-out, close ---- */

static void other_op_body(struct dsc_comm *comm, int rank, void *arg) {
    float x[1024] = {0};
    struct dsc_coll coll = {.src = x, .dst = x, .n_elems = 1024, .dtype = DSC_F32, .op = DSC_SUM};
    enum dsc_status status;
    (void)arg;
    for (int i = 0; i < 16; i++)
        CHECK_OK(dsc_comm_barrier(comm, NULL));
    x[0] = 1;
    status = rank == 1 ? dsc_comm_barrier(comm, NULL) : dsc_comm_all_reduce(comm, &coll);
    CHECK(status == DSC_EDIVERGED);
    CHECK_TEXT("rank 0 called all_reduce(fp32 x 1024, sum) as operation 17 while rank 1 called "
               "barrier()");
    CHECK(x[0] == 1); /* no data moved */
    CHECK(dsc_comm_barrier(comm, NULL) == DSC_EDIVERGED);
    CHECK_TEXT("as operation 17");
}

static void a_diverged_rank_is_named_on_every_rank(void) {
    for (int size = 2; size <= RANKS_MAX; size++)
        run_threads(size, 5, false, other_op_body, NULL);
}

static void detail_body(struct dsc_comm *comm, int rank, void *arg) {
    float x[64] = {0};
    int what = *(int *)arg;
    struct dsc_coll coll = {.src = x, .dst = x, .n_elems = 8, .dtype = DSC_F32, .op = DSC_SUM};
    bool last = rank == dsc_comm_size(comm) - 1;
    if (what == 0)
        coll.n_elems = last ? 7 : 8;
    if (what == 1)
        coll.dtype = last ? DSC_I32 : DSC_F32;
    if (what == 2)
        coll.op = last ? DSC_MAX : DSC_SUM;
    if (what == 3)
        coll.label = last ? "engine.step #3" : "engine.step #4";
    if (what < 4)
        CHECK(dsc_comm_all_reduce(comm, &coll) == DSC_EDIVERGED);
    coll.root = last ? 0 : 1;
    if (what == 4)
        CHECK(dsc_comm_broadcast(comm, &coll) == DSC_EDIVERGED);
    static const char *const texts[] = {"fp32 x 7", "int32 x 8", "fp32 x 8, max",
                                        "[engine.step #3]", "root 0"};
    CHECK_TEXT(texts[what]);
}

static void every_field_of_a_call_is_compared(void) {
    for (int what = 0; what < 5; what++)
        run_threads(3, 5, false, detail_body, &what);
}

static void abort_body(struct dsc_comm *comm, int rank, void *arg) {
    (void)arg;
    if (rank == 1) {
        nap_ms(50);
        dsc_comm_abort(comm, "the loss is a pear");
        CHECK(dsc_comm_barrier(comm, NULL) == DSC_EDEAD);
    } else {
        double since = dsc_comm_now();
        CHECK(dsc_comm_barrier(comm, NULL) == DSC_EDEAD);
        CHECK(dsc_comm_now() - since < 2);
        CHECK_TEXT("rank 1");
    }
    CHECK_TEXT("the loss is a pear");
}

static void abort_ends_the_waits_of_others_with_its_text(void) {
    for (int size = 2; size <= RANKS_MAX; size++)
        run_threads(size, 8, false, abort_body, NULL);
}

static void absent_body(struct dsc_comm *comm, int rank, void *arg) {
    (void)arg;
    CHECK_OK(dsc_comm_barrier(comm, "start"));
    if (rank == 2)
        return;
    CHECK(dsc_comm_barrier(comm, "epoch") == DSC_ETIMEDOUT);
    CHECK_TEXT("barrier() [epoch] as operation 2");
    CHECK_TEXT("rank 2");
    CHECK_TEXT("barrier() [start] as operation 1");
}

static void a_time_out_names_who_did_not_come(void) {
    run_threads(3, 0.3, false, absent_body, NULL);
}

static void leave_body(struct dsc_comm *comm, int rank, void *arg) {
    (void)arg;
    CHECK_OK(dsc_comm_barrier(comm, NULL));
    if (rank == 1)
        nap_ms(30);
    else {
        CHECK(dsc_comm_barrier(comm, NULL) == DSC_EDEAD);
        CHECK_TEXT("rank 1");
        CHECK_TEXT("left");
    }
    dsc_comm_close(comm);
}

static void closing_ends_the_waits_of_others(void) {
    run_threads(2, 8, true, leave_body, NULL);
}

static void last_op_body(struct dsc_comm *comm, int rank, void *arg) {
    float x = (float)rank;
    struct dsc_coll coll = {.src = &x, .dst = &x, .n_elems = 1, .dtype = DSC_F32, .op = DSC_SUM};
    (void)arg;
    CHECK_OK(dsc_comm_all_reduce(comm, &coll)); /* although the others have closed by now */
    dsc_comm_close(comm);
}

static void closing_after_an_operation_harms_nobody_in_it(void) {
    for (int i = 0; i < 300; i++)
        run_threads(2 + i % 3, 5, true, last_op_body, NULL);
}

static bool always(void *context) {
    return ++*(int *)context >= 2;
}

static void *interrupted_rank(void *arg) {
    CHECK(dsc_comm_barrier(arg, NULL) == DSC_EINTR);
    return NULL;
}

static void an_interrupt_ends_a_wait(void) {
    int n_polls = 0;
    struct dsc_comm_options options = {.interrupted = always, .interrupt_context = &n_polls};
    struct dsc_comm *comms[2];
    pthread_t id;
    CHECK_OK(dsc_comm_open_threads(&options, 2, comms));
    CHECK(pthread_create(&id, NULL, interrupted_rank, comms[0]) == 0);
    CHECK(pthread_join(id, NULL) == 0);
    CHECK_EQ_INT(n_polls, 2);
    CHECK(dsc_comm_barrier(comms[1], NULL) == DSC_EDEAD);
    CHECK_TEXT("rank 0");
    CHECK_TEXT("interrupted");
    dsc_comm_close(comms[0]);
    dsc_comm_close(comms[1]);
}

static void stress_body(struct dsc_comm *comm, int rank, void *arg) {
    unsigned seed = (unsigned)rank * 977u + 5u, plan = 42;
    (void)arg;
    for (int i = 0; i < 60; i++) {
        size_t n = next_random(&plan) >> 8;
        /* Cells of every size follow each other. */
        n %= i % 20 == 0 ? 2 * CHUNK_F32 : i % 4 == 0 ? CHUNK_F32 / 2 : 5000;
        if (next_random(&seed) % 4 == 0)
            nap_ms((int)(next_random(&seed) >> 16) % 4);
        check_collectives(comm, n, i % 2 ? DSC_BF16 : DSC_F32, DSC_SUM);
    }
}

static void random_delays_change_no_bit(void) {
    for (int size = 2; size <= RANKS_MAX; size++)
        run_threads(size, 0, false, stress_body, NULL);
}

/* ---- ranks as processes ---- */

static int process_body(struct dsc_comm *comm, int rank, void *arg) {
    boundary_body(comm, rank, arg);
    window_body(comm, rank, arg);
    bell_body(comm, rank, NULL);
    return 0;
}

static void processes_give_the_same_bits_as_threads(void) {
    for (int size = 2; size <= RANKS_MAX; size++) {
        struct processes p = start_processes(size, 0, process_body, NULL);
        for (int r = 0; r < size; r++)
            CHECK_EQ_INT(end_of(&p, r), 0);
    }
}

static struct test_case cases[] = {
    CASE(wrong_arguments_are_named_and_change_nothing),
    CASE(wrong_worlds_are_refused),
    CASE(node_names_this_machine),
    CASE(self_gives_expected_bits),
    CASE(every_type_and_reduction_gives_expected_bits),
    CASE(chunk_boundaries_lose_nothing_on_2_ranks),
    CASE(chunk_boundaries_lose_nothing_on_3_ranks),
    CASE(chunk_boundaries_lose_nothing_on_4_ranks),
    CASE(streamed_results_lose_nothing),
    CASE(roots_and_pairs_get_what_is_theirs),
    CASE(a_result_over_one_of_its_sources_is_right),
    CASE(splits_that_contradict_each_other_are_named_on_every_rank),
    CASE(sums_are_taken_in_rank_order),
    CASE(a_sum_of_negative_zeros_is_positive_zero),
    CASE(sixteen_bit_sums_round_once),
    CASE(a_rank_that_flushes_denormals_gets_the_same_bits),
    CASE(meet_gives_everyones_bytes_in_rank_order),
    CASE(meet_with_other_tags_names_both),
    CASE(windows_show_what_others_wrote),
    CASE(bells_wake_who_waits),
    CASE(a_bell_that_nobody_rings_times_out),
    CASE(a_ring_just_after_a_rank_left_is_heard),
    CASE(a_diverged_rank_is_named_on_every_rank),
    CASE(every_field_of_a_call_is_compared),
    CASE(abort_ends_the_waits_of_others_with_its_text),
    CASE(a_time_out_names_who_did_not_come),
    CASE(closing_ends_the_waits_of_others),
    CASE(closing_after_an_operation_harms_nobody_in_it),
    CASE(an_interrupt_ends_a_wait),
    CASE(random_delays_change_no_bit),
    CASE(processes_give_the_same_bits_as_threads),
};
RUN_CASES(cases)
