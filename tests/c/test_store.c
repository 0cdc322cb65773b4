/* The store: pieces are one memory on all ranks, live as long as somebody holds them, and leave
 * nothing behind. */
#define _GNU_SOURCE
#include "comm_processes.h"
#include "store.h"

#include "alloc.h"

#include <signal.h>
#include <unistd.h>

enum { N_PIECES = 6 };
static const size_t piece_bytes[N_PIECES] = {1, 64, 4000, 63, 1 << 20, 130};

struct pieces {
    struct dsc_slab *slab[N_PIECES];
    unsigned char *memory[N_PIECES];
};

static void take_all(struct dsc_store *store, struct pieces *pieces) {
    for (int k = 0; k < N_PIECES; k++) {
        void *memory;
        CHECK_OK(dsc_store_take(store, piece_bytes[k], &pieces->slab[k], &memory));
        CHECK((uintptr_t)memory % DSC_STORE_ALIGN == 0);
        pieces->memory[k] = memory;
        for (size_t i = 0; i < piece_bytes[k]; i++)
            CHECK(pieces->memory[k][i] == 0);
    }
}

static void release_all(struct pieces *pieces) {
    for (int k = 0; k < N_PIECES; k++)
        dsc_slab_release(pieces->slab[k]);
}

static void fill_piece(const struct pieces *pieces, int k, int mark) {
    memset(pieces->memory[k], 16 * k + mark, piece_bytes[k]);
}

static void check_piece(const struct pieces *pieces, int k, int mark) {
    CHECK_EQ_INT(pieces->memory[k][0], 16 * k + mark);
    CHECK_EQ_INT(pieces->memory[k][piece_bytes[k] - 1], 16 * k + mark);
}

static void shares(struct dsc_comm *comm, int rank, void *arg) {
    struct dsc_store *store;
    struct pieces pieces;
    int size = dsc_comm_size(comm);
    CHECK_OK(dsc_store_open(comm, arg, &store)); /* a folder, or NULL */
    take_all(store, &pieces);
    CHECK_OK(dsc_comm_barrier(comm, "before"));
    for (int k = rank; k < N_PIECES; k += size)
        fill_piece(&pieces, k, 1);
    CHECK_OK(dsc_store_agree(store, "after"));
    for (int k = 0; k < N_PIECES; k++)
        check_piece(&pieces, k, 1);
    CHECK_EQ_INT(dsc_store_counters(store).n_slabs, 1);
    CHECK_EQ_INT(dsc_store_counters(store).n_bytes, 64 + 64 + 4032 + 64 + (1 << 20) + 192);
    dsc_store_close(store);
    release_all(&pieces);
}

static void pieces_are_one_memory_on_all_ranks(void) {
    struct dsc_comm *self;
    struct dsc_comm_options options = {.timeout_s = 5};
    for (int size = 2; size <= 4; size++)
        run_threads(size, 5, false, shares, NULL);
    CHECK_OK(dsc_comm_open_self(&options, &self));
    shares(self, 0, NULL);
    dsc_comm_close(self);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

static void slabs_may_be_files(void) {
    char folder[] = "/var/tmp/dsc_test_XXXXXX";
    struct dsc_comm *self;
    struct dsc_comm_options options = {.timeout_s = 5};
    CHECK(mkdtemp(folder));
    run_threads(3, 5, false, shares, folder);
    CHECK_OK(dsc_comm_open_self(&options, &self));
    shares(self, 0, folder);
    dsc_comm_close(self);
    CHECK_EQ_INT(rmdir(folder), 0);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

static void no_file(struct dsc_comm *comm, int rank, void *arg) {
    struct dsc_store *store;
    struct dsc_slab *slab;
    void *memory;
    CHECK_OK(dsc_store_open(comm, arg, &store));
    CHECK_EQ_INT(dsc_store_take(store, 1, &slab, &memory), DSC_EIO);
    CHECK(strstr(dsc_last_error(), rank == 0 ? "/dev/null" : "rank 0 has no file"));
    CHECK_OK(dsc_comm_barrier(comm, "nothing is broken"));
    dsc_store_close(store);
}

static void ranks_fail_together_where_there_is_no_file(void) {
    run_threads(3, 5, false, no_file, "/dev/null");
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

/* More than a slab, and a slab that is not full yet. */
static void large(struct dsc_comm *comm, int rank, void *arg) {
    struct dsc_store *store;
    struct dsc_slab *slab[4];
    void *memory[4];
    static const size_t n_bytes[4] = {1000, (64 << 20) + 4096, 40 << 20, 40 << 20};
    (void)arg;
    CHECK_OK(dsc_store_open(comm, NULL, &store));
    for (int k = 0; k < 4; k++)
        CHECK_OK(dsc_store_take(store, n_bytes[k], &slab[k], &memory[k]));
    CHECK(slab[0] != slab[1] && slab[1] != slab[2] && slab[2] != slab[3]);
    CHECK_EQ_INT(dsc_store_counters(store).n_slabs, 4);
    if (rank == 0)
        for (int k = 0; k < 4; k++)
            ((char *)memory[k])[n_bytes[k] - 1] = (char)(1 + k);
    CHECK_OK(dsc_comm_barrier(comm, "written"));
    for (int k = 0; k < 4; k++)
        CHECK_EQ_INT(((char *)memory[k])[n_bytes[k] - 1], 1 + k);
    dsc_store_close(store);
    for (int k = 0; k < 4; k++)
        dsc_slab_release(slab[k]);
}

static void a_piece_may_be_larger_than_a_slab(void) {
    run_threads(2, 8, false, large, NULL);
}

static int outlives_body(struct dsc_comm *comm, int rank, void *arg) {
    struct dsc_store *store;
    struct pieces pieces;
    (void)arg;
    CHECK_OK(dsc_store_open(comm, NULL, &store));
    take_all(store, &pieces);
    CHECK_OK(dsc_comm_barrier(comm, "taken"));
    if (rank == 1)
        for (int k = 0; k < N_PIECES; k++)
            fill_piece(&pieces, k, 3);
    CHECK_OK(dsc_comm_barrier(comm, "written"));
    dsc_comm_leave(comm);
    dsc_store_close(store);
    for (int k = 0; k < N_PIECES; k++)
        check_piece(&pieces, k, 3);
    for (int k = 0; k < N_PIECES; k++)
        fill_piece(&pieces, k, 3); /* the same on both ranks: it can still be written to */
    release_all(&pieces);
    return 0;
}

static void pieces_outlive_store_and_communicator(void) {
    struct processes p = start_processes(2, 5, outlives_body, NULL);
    for (int r = 0; r < 2; r++)
        CHECK_EQ_INT(end_of(&p, r), 0);
}

static int count_maps(void) {
    FILE *file = fopen("/proc/self/maps", "r");
    int n = 0;
    for (int c = fgetc(file); c != EOF; c = fgetc(file))
        n += c == '\n';
    (void)fclose(file);
    return n;
}

static int leaves_nothing_body(struct dsc_comm *comm, int rank, void *arg) {
    int n_fds = count_fds(), n_maps = 0;
    int64_t n_live = dsc_alloc_counters().n_live;
    (void)arg, (void)rank;
    for (int i = 0; i < 40; i++) {
        struct dsc_store *store;
        struct dsc_slab *slab[2];
        void *memory;
        CHECK_OK(dsc_store_open(comm, NULL, &store));
        CHECK_OK(dsc_store_take(store, 5000, &slab[0], &memory));
        CHECK_OK(dsc_store_take(store, 1 << 20, &slab[1], &memory));
        dsc_store_close(store);
        dsc_slab_release(slab[0]);
        dsc_slab_release(slab[1]);
        if (i == 10)
            n_maps = count_maps();
    }
    CHECK_EQ_INT(count_fds(), n_fds);
    CHECK(count_maps() <= n_maps + 2);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, n_live);
    return 0;
}

static void many_stores_leave_no_descriptor_and_no_mapping(void) {
    struct processes p = start_processes(3, 8, leaves_nothing_body, NULL);
    for (int r = 0; r < 3; r++)
        CHECK_EQ_INT(end_of(&p, r), 0);
}

static void two_groups(struct dsc_comm *world, int rank, void *arg) {
    struct dsc_comm *pair;
    struct dsc_store *of_world, *of_pair;
    struct pieces mine, all;
    (void)arg;
    CHECK_OK(dsc_comm_open_group(world, NULL, rank % 2 ? (int[]){3, 1} : (int[]){0, 2}, 2,
                                 rank % 2 ? "odd" : "even", &pair));
    CHECK_OK(dsc_store_open(world, NULL, &of_world));
    CHECK_OK(dsc_store_open(pair, NULL, &of_pair));
    take_all(of_world, &all);
    take_all(of_pair, &mine);
    CHECK_OK(dsc_comm_barrier(world, "taken"));
    if (dsc_comm_rank(pair) == 1)
        fill_piece(&mine, 2, 1 + rank % 2);
    if (rank == 3)
        fill_piece(&all, 2, 5);
    CHECK_OK(dsc_comm_barrier(world, "written"));
    check_piece(&mine, 2, 1 + rank % 2);
    check_piece(&all, 2, 5);
    dsc_store_close(of_pair);
    dsc_comm_close(pair);
    check_piece(&mine, 2, 1 + rank % 2);
    dsc_store_close(of_world);
    release_all(&mine);
    release_all(&all);
}

static void groups_have_stores_of_their_own(void) {
    run_threads(4, 8, false, two_groups, NULL);
}

static void differs(struct dsc_comm *comm, int rank, void *arg) {
    struct dsc_store *store;
    struct dsc_slab *slab[3];
    void *memory;
    CHECK_OK(dsc_store_open(comm, NULL, &store));
    CHECK_OK(dsc_store_take(store, 1000, &slab[0], &memory));
    CHECK_OK(dsc_store_take(store, rank == 1 ? 2000 : 3000, &slab[1], &memory));
    enum dsc_status status = arg ? dsc_store_agree(store, "initialize")
                                 : dsc_store_take(store, 100 << 20, &slab[2], &memory);
    CHECK(status == DSC_EDIVERGED);
    CHECK(strstr(dsc_last_error(), "rank 0 has made ") && strstr(dsc_last_error(), " rank 1 "));
    dsc_store_close(store);
    dsc_slab_release(slab[0]);
    dsc_slab_release(slab[1]);
}

static void ranks_that_take_other_sizes_are_told(void) {
    int agrees = 1;
    run_threads(3, 5, false, differs, NULL);
    run_threads(3, 5, false, differs, &agrees);
}

/* A forked child (a loader's worker) reads parameters; it has them as its parent does. */
static int forked_body(struct dsc_comm *comm, int rank, void *arg) {
    struct dsc_store *store;
    struct pieces pieces;
    int end;
    (void)arg;
    CHECK_OK(dsc_store_open(comm, NULL, &store));
    take_all(store, &pieces);
    CHECK_OK(dsc_comm_barrier(comm, "taken"));
    if (rank == 0)
        fill_piece(&pieces, 4, 2);
    CHECK_OK(dsc_comm_barrier(comm, "written"));
    pid_t child = fork();
    if (child == 0) {
        check_piece(&pieces, 4, 2);
        dsc_store_close(store);
        release_all(&pieces);
        _exit(0);
    }
    CHECK(waitpid(child, &end, 0) == child && WIFEXITED(end) && WEXITSTATUS(end) == 0);
    check_piece(&pieces, 4, 2);
    dsc_store_close(store);
    release_all(&pieces);
    return 0;
}

static void a_forked_child_reads_what_its_parent_has(void) {
    struct processes p = start_processes(2, 5, forked_body, NULL);
    struct dsc_comm *self;
    struct dsc_comm_options options = {.timeout_s = 5};
    for (int r = 0; r < 2; r++)
        CHECK_EQ_INT(end_of(&p, r), 0);
    CHECK_OK(dsc_comm_open_self(&options, &self));
    CHECK_EQ_INT(forked_body(self, 0, NULL), 0);
    dsc_comm_close(self);
}

static const struct test_case cases[] = {
    CASE(pieces_are_one_memory_on_all_ranks),
    CASE(slabs_may_be_files),
    CASE(ranks_fail_together_where_there_is_no_file),
    CASE(a_piece_may_be_larger_than_a_slab),
    CASE(pieces_outlive_store_and_communicator),
    CASE(many_stores_leave_no_descriptor_and_no_mapping),
    CASE(groups_have_stores_of_their_own),
    CASE(ranks_that_take_other_sizes_are_told),
    CASE(a_forked_child_reads_what_its_parent_has),
};
RUN_CASES(cases)
