/* Operations that a communicator's own threads run, and messages from one rank to another. */
#include "comm_ranks.h"

#include "comm/backend.h"
#include "comm/shm.h"

enum { BIG = DSC__SHM_LANE_BYTES / 16 * 5 + 77 };

static enum dsc_status wait_for(struct dsc_work *work) {
    enum dsc_status status = dsc_work_wait(work, 0, NULL, NULL);
    CHECK(dsc_work_done(work));
    dsc_work_release(work);
    return status;
}

/* ---- collectives ---- */

static void order_body(struct dsc_comm *comm, int rank, void *arg) {
    enum { WORKS = 20 };
    struct dsc_work *works[WORKS] = {NULL};
    float x[WORKS], y = 0;
    unsigned seed = (unsigned)rank;
    int size = dsc_comm_size(comm);
    (void)arg;
    for (int round = 0; round < 30; round++) {
        for (int i = 0; i < WORKS; i++) {
            struct dsc_coll coll = {.src = &x[i], .dst = &x[i], .n_elems = 1, .dtype = DSC_F32};
            x[i] = (float)(rank + i);
            CHECK_OK(dsc_comm_post(comm, DSC_COMM_ALL_REDUCE, &coll, NULL, NULL, &works[i]));
            if (next_random(&seed) >> 16 & 1)
                nap_ms(0);
        }
        /* A synchronous one runs behind them, and sees what they did. */
        struct dsc_coll last = {.src = &x[0], .dst = &y, .n_elems = 1, .dtype = DSC_F32};
        CHECK_OK(dsc_comm_all_reduce(comm, &last));
        CHECK(y == (float)(size * size * (size - 1) / 2));
        for (int i = 0; i < WORKS; i++) {
            CHECK(dsc_work_done(works[i]));
            CHECK_OK(wait_for(works[i]));
            CHECK(x[i] == (float)(size * (size - 1) / 2 + size * i));
        }
    }
}

static void operations_run_in_the_order_of_their_calls(void) {
    struct dsc_comm *self = NULL;
    for (int size = 2; size <= RANKS_MAX; size++)
        run_threads(size, 8, false, order_body, NULL);
    CHECK_OK(dsc_comm_open_self(NULL, &self));
    order_body(self, 0, NULL);
    dsc_comm_close(self);
}

static void every_kind_body(struct dsc_comm *comm, int rank, void *arg) {
    enum { N = 50000 };
    float *a = calloc(N * RANKS_MAX, 4), *b = calloc(N * RANKS_MAX, 4);
    size_t counts[RANKS_MAX] = {5, 5, 5, 5};
    struct dsc_work *work = NULL;
    (void)arg, (void)rank;
    for (int op = 0; op <= DSC_COMM_BARRIER; op++) {
        struct dsc_coll coll = {.src = a, .dst = b, .n_elems = N, .dtype = DSC_F32, .label = "x"};
        if (op == DSC_COMM_SEND || op == DSC_COMM_RECV)
            continue;
        CHECK_OK(dsc_comm_post(comm, (enum dsc_comm_op)op, &coll, counts, counts, &work));
        CHECK_OK(wait_for(work));
    }
    struct dsc_coll wrong = {.src = a, .dst = b, .n_elems = 1, .dtype = DSC_F32, .root = 9};
    CHECK(dsc_comm_post(comm, DSC_COMM_WINDOW, &wrong, NULL, NULL, &work) == DSC_EINVAL);
    CHECK_OK(dsc_comm_post(comm, DSC_COMM_BROADCAST, &wrong, NULL, NULL, &work));
    CHECK(wait_for(work) == DSC_EINVAL);
    CHECK_TEXT("root is 9");
    CHECK_OK(dsc_comm_barrier(comm, NULL));
    free(a), free(b);
}

static void every_collective_can_be_asynchronous(void) {
    run_threads(3, 8, false, every_kind_body, NULL);
}

static void diverged_body(struct dsc_comm *comm, int rank, void *arg) {
    struct dsc_work *work = NULL;
    float x = 0;
    struct dsc_coll coll = {.src = &x, .dst = &x, .n_elems = 1, .dtype = rank ? DSC_F32 : DSC_I32};
    (void)arg;
    CHECK_OK(dsc_comm_post(comm, DSC_COMM_ALL_REDUCE, &coll, NULL, NULL, &work));
    CHECK(wait_for(work) == DSC_EDIVERGED);
    CHECK_TEXT("rank 0 called all_reduce(int32 x 1, sum)");
    CHECK(dsc_comm_barrier(comm, NULL) == DSC_EDIVERGED);
    CHECK(dsc_comm_post(comm, DSC_COMM_BARRIER, &coll, NULL, NULL, &work) == DSC_EDIVERGED);
}

static void an_error_surfaces_in_the_wait_and_in_every_later_call(void) {
    run_threads(2, 8, false, diverged_body, NULL);
}

static void in_flight_body(struct dsc_comm *comm, int rank, void *arg) {
    struct dsc_work *work = NULL;
    struct dsc_coll nothing = {.dtype = DSC_F32};
    (void)arg;
    if (rank == 0) {
        double since = dsc_comm_now();
        CHECK_OK(dsc_comm_post(comm, DSC_COMM_BARRIER, &nothing, NULL, NULL, &work));
        CHECK(dsc_work_wait(work, 0.05, NULL, NULL) == DSC_ETIMEDOUT);
        CHECK_TEXT("still runs");
        dsc_comm_close(comm);
        CHECK(wait_for(work) == DSC_ESTATE);
        CHECK_TEXT("closed before");
        CHECK(dsc_comm_now() - since < 2);
    } else {
        CHECK(dsc_comm_barrier(comm, NULL) == DSC_EDEAD); /* rank 0 gave up */
        CHECK_TEXT("gave up: the communicator was closed before");
        dsc_comm_close(comm);
    }
}

/* Rank 1 does not come before rank 0 has closed, or comes in vain. */
static void closing_ends_what_is_in_flight(void) {
    struct dsc_comm *comms[2];
    struct dsc_comm_options options = {.timeout_s = 8};
    CHECK_OK(dsc_comm_open_threads(&options, 2, comms));
    in_flight_body(comms[0], 0, NULL);
    in_flight_body(comms[1], 1, NULL);
}

/* Rank 0 waits in a group of both for rank 1, whose thread still has to come there, although its
 * main thread waits for rank 0 in the world: no standstill. */
static void pending_body(struct dsc_comm *world, int rank, void *arg) {
    struct dsc_comm *group = NULL, *slow = NULL;
    struct dsc_work *works[2] = {NULL};
    struct dsc_coll nothing = {.dtype = DSC_F32};
    (void)arg;
    if (rank != 2)
        CHECK_OK(dsc_comm_open_group(world, NULL, (int[]){0, 1}, 2, "g", &group));
    if (rank != 0)
        CHECK_OK(dsc_comm_open_group(world, NULL, (int[]){1, 2}, 2, "slow", &slow));
    if (rank == 0) {
        nap_ms(600);
        CHECK_OK(dsc_comm_barrier(group, NULL));
    } else if (rank == 1) {
        CHECK_OK(dsc_comm_post(group, DSC_COMM_BARRIER, &nothing, NULL, NULL, &works[0]));
        CHECK_OK(dsc_comm_barrier(slow, NULL));
        CHECK_OK(wait_for(works[0]));
    } else {
        CHECK_OK(dsc_comm_barrier(slow, NULL));
    }
    CHECK_OK(dsc_comm_barrier(world, NULL));
    dsc_comm_close(group);
    dsc_comm_close(slow);
}

static void asynchronous_operations_are_no_standstill(void) {
    run_threads(3, 8, false, pending_body, NULL);
}

/* ---- messages ---- */

static struct dsc_p2p message(float *data, size_t n, int peer, uint64_t tag) {
    return (struct dsc_p2p){.data = data, .n_elems = n, .dtype = DSC_F32, .peer = peer, .tag = tag};
}

static void pass_on_body(struct dsc_comm *comm, int rank, void *arg) {
    static const size_t sizes[] = {0, 1, 1000, DSC__SHM_LANE_BYTES / 4, BIG};
    int size = dsc_comm_size(comm);
    float *x = calloc(BIG, 4);
    (void)arg;
    for (int round = 0; round < 20; round++)
        for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
            size_t n = sizes[k];
            struct dsc_p2p to = message(x, n, (rank + 1) % size, 5);
            struct dsc_p2p from = message(x, n, (rank + size - 1) % size, 5);
            int who = -1;
            for (size_t i = 0; i < n && rank == 0; i++)
                x[i] = (float)(i % 1000) + (float)round;
            if (rank == 0)
                CHECK_OK(dsc_comm_send(comm, &to));
            CHECK_OK(dsc_comm_recv(comm, &from, &who));
            CHECK_EQ_INT(who, (rank + size - 1) % size);
            for (size_t i = 0; i < n; i++)
                CHECK(x[i] == (float)(i % 1000) + (float)(round + (rank ? rank - 1 : size - 1)));
            for (size_t i = 0; i < n; i++)
                x[i] += 1;
            if (rank != 0)
                CHECK_OK(dsc_comm_send(comm, &to));
        }
    free(x);
}

static void messages_go_round(void) {
    for (int size = 2; size <= RANKS_MAX; size++)
        run_threads(size, 8, false, pass_on_body, NULL);
}

/* All to all by messages, posted in an order that would lock up one after the other. */
static void crossing_body(struct dsc_comm *comm, int rank, void *arg) {
    int size = dsc_comm_size(comm);
    struct dsc_work *works[2 * RANKS_MAX];
    static float in[RANKS_MAX][RANKS_MAX][BIG], out[RANKS_MAX][BIG];
    (void)arg;
    for (size_t i = 0; i < BIG; i++)
        out[rank][i] = (float)(rank * 10) + (float)(i % 7);
    for (int round = 0; round < 5; round++) {
        int n = 0;
        for (int r = 0; r < size; r++) {
            struct dsc_p2p from = message(in[rank][r], BIG, r, 1);
            if (r != rank)
                CHECK_OK(dsc_comm_post_message(comm, false, &from, &works[n++]));
        }
        for (int r = 0; r < size; r++) {
            struct dsc_p2p to = message(out[rank], BIG, r, 1);
            if (r != rank)
                CHECK_OK(dsc_comm_post_message(comm, true, &to, &works[n++]));
        }
        while (n > 0)
            CHECK_OK(wait_for(works[--n]));
        for (int r = 0; r < size; r++)
            for (size_t i = 0; i < BIG && r != rank; i += 97)
                CHECK(in[rank][r][i] == (float)(r * 10) + (float)(i % 7));
    }
}

static void messages_under_way_do_not_wait_for_each_other(void) {
    for (int size = 2; size <= RANKS_MAX; size++)
        run_threads(size, 8, false, crossing_body, NULL);
}

/* Tags are taken in another order than they were sent; within a tag the order stays. */
static void tags_body(struct dsc_comm *comm, int rank, void *arg) {
    struct dsc_work *works[30];
    float x[30], y;
    (void)arg;
    for (int i = 0; i < 30 && rank == 0; i++) {
        struct dsc_p2p to = message(&x[i], 1, 1, (uint64_t)(i % 3));
        x[i] = (float)i;
        CHECK_OK(dsc_comm_post_message(comm, true, &to, &works[i]));
    }
    for (int i = 0; i < 6 && rank == 1; i++) {
        struct dsc_p2p from = message(&y, 1, 0, (uint64_t)(2 - i % 3));
        CHECK_OK(dsc_comm_recv(comm, &from, NULL));
        CHECK(y == (float)(2 - i % 3 + i / 3 * 3));
    }
    for (int i = 6; i < 30 && rank == 1; i++) {
        struct dsc_p2p from = message(&y, 1, -1, (uint64_t)(i % 3));
        int who = -1;
        CHECK_OK(dsc_comm_recv(comm, &from, &who));
        CHECK(y == (float)i && who == 0);
    }
    for (int i = 0; i < 30 && rank == 0; i++)
        CHECK_OK(wait_for(works[i]));
}

static void tags_are_taken_in_any_order(void) {
    run_threads(2, 8, false, tags_body, NULL);
}

static void different_body(struct dsc_comm *comm, int rank, void *arg) {
    static float x[BIG];
    struct dsc_p2p to = message(x, BIG, 1, 3), from = message(x, 2, 0, 3);
    (void)arg;
    to.label = "mine";
    CHECK((rank == 0 ? dsc_comm_send(comm, &to) : dsc_comm_recv(comm, &from, NULL)) ==
          DSC_EDIVERGED);
    CHECK_TEXT("rank 0 called send(fp32 x 327757, to rank 1, tag 3) [mine] while rank 1 called "
               "recv(fp32 x 2, from rank 0, tag 3)");
    CHECK(dsc_comm_barrier(comm, NULL) != DSC_OK);
}

static void ends_that_disagree_fail_both(void) {
    CHECK_EQ_INT(BIG, 327757);
    run_threads(2, 8, false, different_body, NULL);
}

static void left_body(struct dsc_comm *comm, int rank, void *arg) {
    float x = 7;
    struct dsc_p2p to = message(&x, 1, 1, 0), from = message(&x, 1, 0, 0);
    (void)arg;
    if (rank == 0) {
        CHECK_OK(dsc_comm_send(comm, &to)); /* small: gone before it is received */
    } else {
        nap_ms(30);
        CHECK_OK(dsc_comm_recv(comm, &from, NULL));
        CHECK(dsc_comm_recv(comm, &from, NULL) == DSC_EDEAD);
        CHECK_TEXT("rank 0");
        CHECK_TEXT("rank 1 waits in recv(fp32 x 1, from rank 0, tag 0)");
    }
    dsc_comm_close(comm);
}

static void what_a_rank_sent_before_it_left_arrives(void) {
    run_threads(2, 8, true, left_body, NULL);
}

static void both_receive_body(struct dsc_comm *comm, int rank, void *arg) {
    float x = 0;
    struct dsc_p2p from = message(&x, 1, 1 - rank, 0);
    (void)arg;
    CHECK((rank == 0 ? dsc_comm_recv(comm, &from, NULL) : dsc_comm_barrier(comm, NULL)) ==
          DSC_EDIVERGED);
    CHECK_TEXT("ranks wait for each other in different operations");
    CHECK_TEXT("rank 0 in recv(fp32 x 1, from rank 1, tag 0) for rank 1");
}

static void a_message_that_cannot_come_is_a_standstill(void) {
    run_threads(2, 60, false, both_receive_body, NULL);
}

static void refused_body(struct dsc_comm *comm, int rank, void *arg) {
    float x = 0;
    struct dsc_p2p own = message(&x, 1, rank, 0), far = message(&x, 1, 7, 0);
    struct dsc_p2p any = message(&x, 1, -1, 0);
    (void)arg;
    CHECK(dsc_comm_send(comm, &own) == DSC_EINVAL);
    CHECK(dsc_comm_recv(comm, &far, NULL) == DSC_EINVAL);
    CHECK_TEXT("the other rank is 7");
    CHECK(dsc_comm_send(comm, &any) == DSC_EINVAL);
    CHECK_OK(dsc_comm_barrier(comm, NULL));
}

static void wrong_messages_are_refused(void) {
    run_threads(2, 8, false, refused_body, NULL);
}

/* Two channels of the same ranks share the lanes: what one takes and frees is the other's next. */
static void two_channels_body(struct dsc_comm *world, int rank, void *arg) {
    enum { WORKS = 4, LONG = 300 };
    static const int ranks[2] = {0, 1};
    float x[2][WORKS][LONG] = {{{0}}};
    struct dsc_work *works[2][WORKS];
    struct dsc_comm *comms[2] = {world, NULL};
    (void)arg;
    CHECK_OK(dsc_comm_open_group(world, NULL, ranks, 2, "second", &comms[1]));
    for (int round = 0; round < 400; round++) {
        for (int i = 0; i < WORKS; i++)
            for (int c = 0; c < 2; c++) {
                struct dsc_p2p m = message(x[c][i], c ? LONG : 1, 1 - rank, (uint64_t)c);
                if (rank == 0)
                    x[c][i][0] = (float)(round * 100 + i * 10 + c);
                CHECK_OK(dsc_comm_post_message(comms[c], rank == 0, &m, &works[c][i]));
            }
        for (int i = 0; i < WORKS; i++)
            for (int c = 0; c < 2; c++) {
                CHECK_OK(wait_for(works[c][i]));
                CHECK(x[c][i][0] == (float)(round * 100 + i * 10 + c));
            }
    }
    CHECK_OK(dsc_comm_barrier(world, NULL));
    dsc_comm_close(comms[1]);
}

static void channels_that_share_lanes_take_only_their_own(void) {
    run_threads(2, 20, false, two_channels_body, NULL);
}

/* A receiver that waits long enough to be described, while its communicator runs collectives. */
static void busy_body(struct dsc_comm *comm, int rank, void *arg) {
    struct dsc_work *work = NULL;
    float x = 1;
    struct dsc_p2p m = message(&x, 1, 1 - rank, 0);
    struct dsc_coll nothing = {.dtype = DSC_F32};
    (void)arg;
    for (int i = 0; i < 400; i++) {
        if (work)
            dsc_work_release(work);
        CHECK_OK(dsc_comm_post(comm, DSC_COMM_BARRIER, &nothing, NULL, NULL, &work));
        if (rank == 0)
            nap_ms(1);
    }
    CHECK_OK(rank == 0 ? dsc_comm_send(comm, &m) : dsc_comm_recv(comm, &m, NULL));
    CHECK_OK(wait_for(work));
}

static void a_message_may_wait_while_collectives_run(void) {
    run_threads(2, 20, false, busy_body, NULL);
}

static void alone_body(struct dsc_comm *comm, int rank, void *arg) {
    float x = 7;
    struct dsc_p2p to = message(&x, 1, 0, 0), any = message(&x, 1, -1, 0);
    (void)arg;
    if (rank == 0) {
        CHECK_OK(dsc_comm_recv(comm, &any, NULL));
        CHECK(dsc_comm_recv(comm, &any, NULL) == DSC_EDEAD);
        CHECK_TEXT("left");
    } else if (rank == 1) {
        CHECK_OK(dsc_comm_send(comm, &to));
    }
    dsc_comm_close(comm);
}

static void a_message_from_any_rank_ends_with_the_last_that_could_send(void) {
    run_threads(3, 8, true, alone_body, NULL);
}

static bool always(void *context) {
    return context != NULL;
}

/* A recv behind an asynchronous one is moved by another thread, which must be done with the buffer
 * when an interrupt ends the recv. */
static void an_interrupted_recv_lets_go_of_its_buffer(void) {
    float x = 7, y = 3;
    struct dsc_comm *comms[2];
    struct dsc_comm_options options = {
        .timeout_s = 8, .interrupted = always, .interrupt_context = &x};
    struct dsc_work *other = NULL;
    struct dsc_p2p to = message(&y, 1, 1, 1), from = message(&x, 1, 0, 1);
    struct dsc_p2p never = message(&y, 1, 0, 2);
    CHECK_OK(dsc_comm_open_threads(&options, 2, comms));
    CHECK_OK(dsc_comm_post_message(comms[1], false, &never, &other));
    CHECK(dsc_comm_recv(comms[1], &from, NULL) == DSC_EINTR);
    CHECK(dsc_comm_send(comms[0], &to) == DSC_EDEAD);
    CHECK(wait_for(other) == DSC_EDEAD); /* as every later call */
    CHECK(x == 7);
    dsc_comm_close(comms[0]);
    dsc_comm_close(comms[1]);
}

static void stress_body(struct dsc_comm *comm, int rank, void *arg) {
    static float in[RANKS_MAX][BIG], out[RANKS_MAX][BIG];
    unsigned seed = (unsigned)rank * 31 + 1, plan = 7;
    int size = dsc_comm_size(comm);
    (void)arg;
    for (int i = 0; i < 150; i++) {
        size_t n = (next_random(&plan) >> 8) % (i % 10 ? 3000 : BIG);
        struct dsc_work *works[3];
        struct dsc_p2p to = message(out[rank], n, (rank + 1) % size, (uint64_t)i % 4);
        struct dsc_p2p from = message(in[rank], n, (rank + size - 1) % size, (uint64_t)i % 4);
        float sum = 1;
        struct dsc_coll coll = {.src = &sum, .dst = &sum, .n_elems = 1, .dtype = DSC_F32};
        for (size_t k = 0; k < n; k++)
            out[rank][k] = (float)(rank + i) + (float)(k % 5);
        CHECK_OK(dsc_comm_post_message(comm, true, &to, &works[0]));
        if (next_random(&seed) >> 16 & 1)
            nap_ms((int)(next_random(&seed) >> 16) % 3);
        CHECK_OK(dsc_comm_post(comm, DSC_COMM_ALL_REDUCE, &coll, NULL, NULL, &works[1]));
        CHECK_OK(dsc_comm_post_message(comm, false, &from, &works[2]));
        for (int k = 0; k < 3; k++)
            CHECK_OK(wait_for(works[k]));
        CHECK(sum == (float)size);
        for (size_t k = 0; k < n; k++)
            CHECK(in[rank][k] == (float)((rank + size - 1) % size + i) + (float)(k % 5));
    }
}

static void random_delays_lose_no_message(void) {
    for (int size = 2; size <= RANKS_MAX; size++)
        run_threads(size, 30, false, stress_body, NULL);
}

static struct test_case cases[] = {
    CASE(wrong_messages_are_refused),
    CASE(operations_run_in_the_order_of_their_calls),
    CASE(every_collective_can_be_asynchronous),
    CASE(an_error_surfaces_in_the_wait_and_in_every_later_call),
    CASE(closing_ends_what_is_in_flight),
    CASE(asynchronous_operations_are_no_standstill),
    CASE(messages_go_round),
    CASE(messages_under_way_do_not_wait_for_each_other),
    CASE(tags_are_taken_in_any_order),
    CASE(ends_that_disagree_fail_both),
    CASE(what_a_rank_sent_before_it_left_arrives),
    CASE(a_message_that_cannot_come_is_a_standstill),
    CASE(channels_that_share_lanes_take_only_their_own),
    CASE(a_message_may_wait_while_collectives_run),
    CASE(a_message_from_any_rank_ends_with_the_last_that_could_send),
    CASE(an_interrupted_recv_lets_go_of_its_buffer),
    CASE(random_delays_lose_no_message),
};
RUN_CASES(cases)
