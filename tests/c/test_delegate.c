/* The delegate back end and the engine on it over a fake: ranks as threads, moves through memory
 * with random delays, a board in a table. ThreadSanitizer sees all of it. */
#define _GNU_SOURCE
#include "comm_ranks.h"

#include "alloc.h"
#include "comm/delegate.h"
#include "engine.h"

#include <arpa/inet.h>
#include <stdatomic.h>
#include <sys/socket.h>

enum { STAGING = 4 * 64 * 1024, KEYS_MAX = 512, FAKES_MAX = 6 };

/* ---- the fake: all ranks put their move down, the last one carries all of them out ---- */

struct world {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int size, n_came;
    uint64_t n_done; /* rounds of moves */
    bool cut;        /* connections are lost */
    struct rank {
        struct world *world;
        int rank, listener;
        struct dsc_move move;
        uint64_t awaits;
        unsigned seed;
        bool dead;
        char *staging; /* a rail's is that of all ranks */
    } ranks[FAKES_MAX];
    struct {
        char key[DSC_BOARD_KEY_MAX], text[DSC_BOARD_TEXT_MAX];
        int64_t value;
    } board[KEYS_MAX];
};

static void carry_out(struct world *w) {
    size_t at[FAKES_MAX] = {0};
    int64_t least[2], other[2];
    memcpy(least, w->ranks[0].staging + w->ranks[0].move.dst, sizeof least);
    for (int to = 0; to < w->size; to++) {
        const struct dsc_move *move = &w->ranks[to].move;
        char *dst = w->ranks[to].staging + move->dst;
        CHECK(move->kind == w->ranks[0].move.kind);
        for (int from = 0; from < w->size; from++) {
            const struct rank *source = &w->ranks[from];
            size_t n = move->n_bytes, src = source->move.src;
            if (move->kind == DSC_MOVE_EXCHANGE) {
                n = move->n_recv[from];
                CHECK(n == source->move.n_send[to]);
                src += at[from];
                at[from] += n;
            }
            if (move->kind == DSC_MOVE_MINIMUM) {
                memcpy(other, source->staging + source->move.dst, sizeof other);
                for (int i = 0; i < 2; i++)
                    least[i] = other[i] < least[i] ? other[i] : least[i];
            } else if (move->kind == DSC_MOVE_BROADCAST) {
                if (from == move->root && to != from)
                    memcpy(dst, source->staging + source->move.dst, n);
            } else {
                memcpy(dst, source->staging + src, n);
                dst += n;
            }
        }
    }
    for (int r = 0; r < w->size && w->ranks[0].move.kind == DSC_MOVE_MINIMUM; r++)
        memcpy(w->ranks[r].staging + w->ranks[r].move.dst, least, sizeof least);
}

static enum dsc_status start(void *context, const struct dsc_move *move) {
    struct rank *me = context;
    struct world *w = me->world;
    if (next_random(&me->seed) >> 28 == 0)
        nap_ms(1);
    pthread_mutex_lock(&w->lock);
    me->move = *move;
    me->awaits = w->n_done + 1;
    if (++w->n_came == w->size) {
        carry_out(w);
        w->n_came = 0;
        w->n_done++;
        pthread_cond_broadcast(&w->changed);
    }
    pthread_mutex_unlock(&w->lock);
    return DSC_OK;
}

static enum dsc_status wait_for(void *context, int ms, bool *done) {
    struct rank *me = context;
    struct world *w = me->world;
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += ms * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000L;
    until.tv_nsec %= 1000000000L;
    pthread_mutex_lock(&w->lock);
    while (w->n_done < me->awaits && !w->cut)
        if (pthread_cond_timedwait(&w->changed, &w->lock, &until) != 0)
            break;
    *done = w->n_done >= me->awaits;
    bool lost = w->cut && !*done;
    pthread_mutex_unlock(&w->lock);
    return lost ? DSC_FAIL(DSC_EDEAD, "connection closed by peer") : DSC_OK;
}

/* Lock held. */
static int slot_of(struct world *w, const char *key) {
    int i = 0;
    while (i < KEYS_MAX && w->board[i].key[0] && strcmp(w->board[i].key, key) != 0)
        i++;
    CHECK(i < KEYS_MAX);
    snprintf(w->board[i].key, sizeof w->board[i].key, "%s", key);
    return i;
}

static enum dsc_status add(void *context, const char *key, int64_t by, int64_t *value) {
    struct world *w = ((struct rank *)context)->world;
    pthread_mutex_lock(&w->lock);
    *value = w->board[slot_of(w, key)].value += by;
    pthread_mutex_unlock(&w->lock);
    return DSC_OK;
}

static enum dsc_status put(void *context, const char *key, const char *text, bool once) {
    struct world *w = ((struct rank *)context)->world;
    pthread_mutex_lock(&w->lock);
    int i = slot_of(w, key);
    if (!once || !w->board[i].text[0])
        snprintf(w->board[i].text, sizeof w->board[i].text, "%s", text);
    pthread_mutex_unlock(&w->lock);
    return DSC_OK;
}

static enum dsc_status look(void *context, const char *key, char text[DSC_BOARD_TEXT_MAX]) {
    struct world *w = ((struct rank *)context)->world;
    pthread_mutex_lock(&w->lock);
    snprintf(text, DSC_BOARD_TEXT_MAX, "%s", w->board[slot_of(w, key)].text);
    pthread_mutex_unlock(&w->lock);
    return DSC_OK;
}

static void dead(void *context, char text[DSC_BOARD_DEAD_MAX]) {
    struct world *w = ((struct rank *)context)->world;
    text[0] = '\0';
    pthread_mutex_lock(&w->lock);
    for (int r = 0; r < w->size; r++)
        if (w->ranks[r].dead)
            snprintf(text, DSC_BOARD_DEAD_MAX, "rank %d (pid 1)", r);
    pthread_mutex_unlock(&w->lock);
}

static void nothing(void *context) {
    (void)context;
}

#define TOKEN "0123456789abcdef0123456789abcdef"

/* A socket for messages, and its place on the board. */
static int listen_for(struct rank *me) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    char key[16], text[80];
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    CHECK(fd >= 0 && bind(fd, (struct sockaddr *)&address, size) == 0 && listen(fd, 8) == 0);
    CHECK(getsockname(fd, (struct sockaddr *)&address, &size) == 0);
    snprintf(key, sizeof key, "mail/%d", me->rank);
    snprintf(text, sizeof text, "127.0.0.1 %d " TOKEN, ntohs(address.sin_port));
    CHECK_OK(put(me, key, text, false));
    return fd;
}

static struct world *new_world(int size) {
    struct world *w = calloc(1, sizeof *w);
    CHECK(w != NULL);
    w->size = size;
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->changed, NULL);
    for (int r = 0; r < size; r++) {
        w->ranks[r].world = w;
        w->ranks[r].rank = r;
        w->ranks[r].seed = (unsigned)r;
    }
    return w;
}

/* What a rank on nodes of n_local ranks opens, in its own thread, because opening waits there. */
struct entrance {
    struct dsc_comm *comm, *node;
    struct rank *rail; /* NULL: no nodes */
    struct rank_thread inside;
};

static void *enter(void *arg) {
    struct entrance *e = arg;
    if (e->rail)
        CHECK_OK(dsc_comm_delegate_use_nodes(e->comm, e->node, e->rail));
    return run_rank(&e->inside);
}

static void open_rails(struct world *w, struct entrance *entrances, int n_local,
                       struct world **rails) {
    struct dsc_comm_options options = {.timeout_s = 30};
    struct dsc_comm *nodes[FAKES_MAX];
    for (int place = 0; place < n_local; place++)
        rails[place] = new_world(w->size / n_local);
    for (int first = 0; first < w->size; first += n_local)
        CHECK_OK(dsc_comm_open_threads(&options, n_local, &nodes[first]));
    for (int r = 0; r < w->size; r++) {
        entrances[r].node = nodes[r];
        entrances[r].rail = &rails[r % n_local]->ranks[r / n_local];
        entrances[r].rail->staging = w->ranks[r].staging;
    }
}

/* Runs body on `size` ranks over the fake, on nodes of n_local ranks. */
static void run_nodes(int size, int n_local, rank_fn body, void *arg) {
    struct dsc_comm_options options = {.timeout_s = 30};
    struct world *w = new_world(size), *rails[FAKES_MAX] = {NULL};
    struct entrance entrances[FAKES_MAX] = {{NULL}};
    pthread_t ids[FAKES_MAX];
    for (int r = 0; r < size; r++)
        w->ranks[r].listener = listen_for(&w->ranks[r]);
    for (int r = 0; r < size; r++) {
        struct dsc_comm *comm = NULL;
        w->ranks[r].staging = aligned_alloc(64, STAGING);
        CHECK(w->ranks[r].staging != NULL);
        const struct dsc_delegate fake = {.context = &w->ranks[r],
                                          .staging = w->ranks[r].staging,
                                          .n_staging = STAGING,
                                          .channel = "fake",
                                          .job_rank = r,
                                          .job_size = size,
                                          .listener = w->ranks[r].listener,
                                          .token = TOKEN,
                                          .start = start,
                                          .wait = wait_for,
                                          .add = add,
                                          .put = put,
                                          .look = look,
                                          .dead = dead,
                                          .leave = nothing,
                                          .release = nothing};
        CHECK_OK(dsc_comm_open_delegate(&options, &fake, r, size, &comm));
        entrances[r].comm = comm;
        entrances[r].inside =
            (struct rank_thread){.comm = comm, .body = body, .arg = arg ? arg : w};
    }
    if (n_local > 1)
        open_rails(w, entrances, n_local, rails);
    for (int r = 0; r < size; r++)
        CHECK(pthread_create(&ids[r], NULL, enter, &entrances[r]) == 0);
    for (int r = 0; r < size; r++)
        CHECK(pthread_join(ids[r], NULL) == 0);
    for (int r = 0; r < size; r++)
        dsc_comm_close(entrances[r].comm);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
    for (int r = 0; r < size; r++)
        free(w->ranks[r].staging);
    for (int place = 0; place < n_local; place++)
        free(rails[place]);
    free(w);
}

static void run_fake(int size, rank_fn body, void *arg) {
    run_nodes(size, 1, body, arg);
}

/* ---- every operation against its definition ---- */

static float value(int rank, size_t i) {
    return (float)((int)((i * 7 + (size_t)rank * 13) % 101) - 50);
}

static void check_operations(struct dsc_comm *comm, size_t n) {
    int rank = dsc_comm_rank(comm), size = dsc_comm_size(comm), root = size - 1;
    size_t total = n * (size_t)size;
    float *src = malloc(total * sizeof *src + 4), *dst = malloc(total * sizeof *dst + 4);
    struct dsc_coll coll = {
        .src = src, .dst = dst, .n_elems = n, .dtype = DSC_F32, .op = DSC_SUM, .root = root};
    CHECK(src && dst);
    for (size_t i = 0; i < total; i++)
        src[i] = value(rank, i);
    CHECK_OK(dsc_comm_all_to_all(comm, &coll));
    for (size_t i = 0; i < total; i++)
        CHECK(dst[i] == value((int)(i / n), (size_t)rank * n + i % n));
    CHECK_OK(dsc_comm_reduce_scatter(comm, &coll));
    for (size_t i = 0; i < n; i++) {
        float sum = 0;
        for (int r = 0; r < size; r++)
            sum += value(r, (size_t)rank * n + i);
        CHECK(dst[i] == sum);
    }
    CHECK_OK(dsc_comm_all_gather(comm, &coll));
    for (size_t i = 0; i < total; i++)
        CHECK(dst[i] == value((int)(i / n), i % n));
    memset(dst, 0, total * sizeof *dst);
    CHECK_OK(dsc_comm_gather(comm, &coll));
    for (size_t i = 0; i < total; i++)
        CHECK(dst[i] == (rank == root ? value((int)(i / n), i % n) : 0));
    CHECK_OK(dsc_comm_scatter(comm, &coll));
    for (size_t i = 0; i < n; i++)
        CHECK(dst[i] == value(root, (size_t)rank * n + i));
    CHECK_OK(dsc_comm_reduce(comm, &coll));
    coll.dst = src;
    CHECK_OK(dsc_comm_all_reduce(comm, &coll));
    for (size_t i = 0; i < n; i++) {
        float sum = 0;
        for (int r = 0; r < size; r++)
            sum += value(r, i);
        CHECK(src[i] == sum && (rank != root || dst[i] == sum));
    }
    src[0] = (float)rank;
    CHECK_OK(dsc_comm_broadcast(comm, &coll));
    CHECK(src[0] == (float)root);
    free(src);
    free(dst);
}

static void operations_body(struct dsc_comm *comm, int rank, void *arg) {
    static const size_t lengths[] = {1, 3, 1000, 16 * 1024, 50001};
    (void)rank;
    (void)arg;
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
        check_operations(comm, lengths[i]);
}

static void operations_do_what_they_say(void) {
    run_fake(2, operations_body, NULL);
    run_fake(3, operations_body, NULL);
}

static void operations_on_nodes_do_what_they_say(void) {
    run_nodes(4, 2, operations_body, NULL);
    run_nodes(6, 2, operations_body, NULL);
}

/* Magnitudes so far apart that every other order of additions gives other bits. */
static void order_body(struct dsc_comm *comm, int rank, void *arg) {
    static const float given[6] = {1.1e8f, -1e8f, 3.3f, 1e-3f, -1e7f, 7e4f};
    enum { N = 40000 };
    int n_local = *(const int *)arg, size = dsc_comm_size(comm);
    struct dsc_coll coll = {.dtype = DSC_F32, .op = DSC_SUM};
    float *x = malloc(N * sizeof *x);
    CHECK(x && size == 6);
    for (int is_small = 0; is_small < 2; is_small++) {
        coll.src = coll.dst = x;
        coll.n_elems = is_small ? 8 : N;
        for (int i = 0; i < N; i++)
            x[i] = given[(rank + i) % 6];
        CHECK_OK(dsc_comm_all_reduce(comm, &coll));
        for (size_t i = 0; i < coll.n_elems; i++) {
            float total = 0;
            for (int first = 0; first < size; first += n_local) {
                float sum = 0;
                for (int r = first; r < first + n_local; r++)
                    sum += given[((size_t)r + i) % 6];
                total += sum;
            }
            CHECK(x[i] == total);
        }
    }
    free(x);
}

static void nodes_add_their_ranks_first(void) {
    int pairs = 2, triples = 3, single = 1;
    run_nodes(6, 2, order_body, &pairs);
    run_nodes(6, 3, order_body, &triples);
    run_nodes(6, 1, order_body, &single);
}

/* Part sizes that differ, with and without a comparison of the counts. */
static void uneven_body(struct dsc_comm *comm, int rank, void *arg) {
    size_t n_send[3], n_recv[3], n_in = 0, n_max = 40000;
    static const size_t table[3][3] = {{5, 0, 40000}, {7, 1, 2}, {0, 0, 9}};
    float *src = malloc(50000 * sizeof *src), *dst = malloc(50000 * sizeof *dst);
    (void)arg;
    CHECK(src && dst);
    for (size_t i = 0; i < 50000; i++)
        src[i] = value(rank, i);
    for (int r = 0; r < 3; r++) {
        n_send[r] = table[rank][r];
        n_recv[r] = table[r][rank];
    }
    struct dsc_coll coll = {.src = src, .dst = dst, .n_elems = n_max, .dtype = DSC_F32};
    for (int covered = 0; covered < 2; covered++) {
        memset(dst, 0, 50000 * sizeof *dst);
        CHECK(!dsc_comm_cover(comm, covered));
        CHECK_OK(dsc_comm_all_to_all_v(comm, &coll, n_send, n_recv));
        CHECK(dsc_comm_cover(comm, false) == covered);
        n_in = 0;
        for (int r = 0; r < 3; r++) {
            size_t before = 0;
            for (int k = 0; k < rank; k++)
                before += table[r][k];
            for (size_t i = 0; i < n_recv[r]; i++)
                CHECK(dst[n_in + i] == value(r, before + i));
            n_in += n_recv[r];
        }
    }
    free(src);
    free(dst);
}

static void uneven_parts_arrive(void) {
    run_fake(3, uneven_body, NULL);
}

/* Uneven shares, in parts per node or per rank. */
static void parts_body(struct dsc_comm *comm, int rank, void *arg) {
    static const size_t shares[4] = {30000, 0, 17, 9000};
    size_t size = (size_t)dsc_comm_size(comm), n_parts = (size_t)dsc_comm_n_parts(comm);
    size_t n_mine = shares[rank], before = 0, n_src = 0;
    for (size_t r = 0; r < size; r++) {
        before += (int)r < rank ? shares[r] : 0;
        n_src += shares[r];
    }
    float *src = malloc(n_src * sizeof *src), *dst = malloc((n_parts * n_mine + 1) * sizeof *dst);
    struct dsc_coll coll = {.src = src, .dst = dst, .n_elems = 30000, .dtype = DSC_F32};
    CHECK(src && dst && n_parts == *(const size_t *)arg);
    for (size_t i = 0; i < n_src; i++)
        src[i] = value(rank, i);
    (void)dsc_comm_cover(comm, true);
    CHECK_OK(dsc_comm_part_sums(comm, &coll, shares, n_mine));
    (void)dsc_comm_cover(comm, false);
    for (size_t p = 0; p < n_parts; p++)
        for (size_t i = 0; i < n_mine; i++) {
            float sum = 0;
            for (size_t r = p * size / n_parts; r < (p + 1) * size / n_parts; r++)
                sum += value((int)r, before + i);
            CHECK(dst[p * n_mine + i] == sum);
        }
    free(src);
    free(dst);
}

static void sums_come_in_parts(void) {
    size_t per_rank = 4, per_node = 2;
    run_fake(4, parts_body, &per_rank);
    run_nodes(4, 2, parts_body, &per_node);
}

/* ---- gathering pieces ---- */

enum { N_PIECES = 12, PIECE_MAX = 50001 };

/* Uneven pieces, some empty, owners that have nothing; lengths in bytes that fit no element. */
static size_t piece_bytes(int piece, int size) {
    static const size_t lengths[] = {0, 1, 17, 40000, 3, PIECE_MAX, 0, 5000};
    return piece % (size + 1) == 0 ? 0 : lengths[(piece * 5 + size) % 8];
}

static int piece_owner(int piece, int size) {
    return piece * size / N_PIECES / 2 * 2 % size; /* ranks of odd number have nothing */
}

static void check_pieces(struct dsc_comm *comm, bool in_place, bool is_async) {
    int rank = dsc_comm_rank(comm), size = dsc_comm_size(comm);
    struct dsc_piece pieces[N_PIECES];
    struct dsc_work *work = NULL;
    for (int i = 0; i < N_PIECES; i++) {
        pieces[i] = (struct dsc_piece){piece_owner(i, size), NULL, NULL, piece_bytes(i, size)};
        unsigned char *dst = malloc(PIECE_MAX), *src = in_place ? dst : malloc(PIECE_MAX);
        CHECK(dst && src);
        memset(dst, 0, PIECE_MAX);
        for (size_t k = 0; k < PIECE_MAX && pieces[i].owner == rank; k++)
            src[k] = (unsigned char)(k * 7 + (size_t)i);
        pieces[i].src = src;
        pieces[i].dst = dst;
    }
    if (is_async) {
        CHECK_OK(dsc_comm_post_pieces(comm, "fetch", pieces, N_PIECES, &work));
        CHECK_OK(dsc_work_wait(work, 30, NULL, NULL));
        dsc_work_release(work);
    } else {
        CHECK_OK(dsc_comm_gather_pieces(comm, "fetch", pieces, N_PIECES));
    }
    for (int i = 0; i < N_PIECES; i++) {
        const unsigned char *dst = pieces[i].dst;
        for (size_t k = 0; k < pieces[i].n_bytes; k++)
            CHECK(dst[k] == (unsigned char)(k * 7 + (size_t)i));
        CHECK(pieces[i].owner == rank || dst[pieces[i].n_bytes] == 0);
        if (!in_place)
            free((void *)(uintptr_t)pieces[i].src);
        free(pieces[i].dst);
    }
}

static void pieces_body(struct dsc_comm *comm, int rank, void *arg) {
    (void)rank;
    (void)arg;
    for (int way = 0; way < 4; way++)
        check_pieces(comm, way & 1, way & 2);
    CHECK_OK(dsc_comm_gather_pieces(comm, "nothing", NULL, 0));
    struct dsc_piece wrong[] = {{.owner = 1}, {.owner = 0}};
    CHECK(dsc_comm_gather_pieces(comm, "wrong", wrong, 2) == DSC_EINVAL);
    wrong[1].owner = dsc_comm_size(comm);
    CHECK(dsc_comm_gather_pieces(comm, "wrong", wrong, 2) == DSC_EINVAL);
    CHECK_OK(dsc_comm_barrier(comm, NULL));
}

static void pieces_of_each_arrive_at_all(void) {
    run_fake(2, pieces_body, NULL);
    run_fake(3, pieces_body, NULL);
    run_nodes(4, 2, pieces_body, NULL);
    run_nodes(6, 3, pieces_body, NULL);
    run_threads(3, 30, false, pieces_body, NULL);
}

/* Asynchronous ones are compared although the caller has covered its own operations. */
static void covered_body(struct dsc_comm *comm, int rank, void *arg) {
    enum { N = 20000 };
    float *x = malloc(N * sizeof *x), *y = malloc(N * sizeof *y);
    struct dsc_work *work = NULL;
    (void)arg;
    CHECK(x && y);
    for (int turn = 0; turn < 50; turn++) {
        struct dsc_piece piece = {turn % 2, x, x, N * sizeof *x};
        struct dsc_coll coll = {.src = y, .dst = y, .n_elems = N, .dtype = DSC_F32};
        for (int i = 0; i < N; i++) {
            x[i] = rank == piece.owner ? (float)(turn + i) : 0;
            y[i] = 1;
        }
        CHECK_OK(dsc_comm_post_pieces(comm, "ahead", &piece, 1, &work));
        (void)dsc_comm_cover(comm, true);
        CHECK_OK(dsc_comm_all_reduce(comm, &coll));
        (void)dsc_comm_cover(comm, false);
        CHECK_OK(dsc_work_wait(work, 30, NULL, NULL));
        dsc_work_release(work);
        for (int i = 0; i < N; i++)
            CHECK(x[i] == (float)(turn + i) && y[i] == (float)dsc_comm_size(comm));
    }
    free(x);
    free(y);
}

static void pieces_go_round_beside_covered_operations(void) {
    run_fake(2, covered_body, NULL);
    run_nodes(4, 2, covered_body, NULL);
}

/* The labels differ behind what an operation shows of them. */
static void other_pieces_body(struct dsc_comm *comm, int rank, void *arg) {
    char label[200];
    float x[8] = {0};
    struct dsc_piece piece = {0, x, x, sizeof x};
    (void)arg;
    snprintf(label, sizeof label, "%0150d%c", 0, rank == 1 ? 'b' : 'a');
    CHECK(dsc_comm_gather_pieces(comm, label, &piece, 1) == DSC_EDIVERGED);
    CHECK_TEXT("rank 0 called gather of parts(32 bytes) [0000");
    CHECK(dsc_comm_gather_pieces(comm, label, &piece, 1) == DSC_EDIVERGED);
}

static void different_labels_are_an_error_on_all(void) {
    run_fake(3, other_pieces_body, NULL);
    run_nodes(4, 2, other_pieces_body, NULL);
}

/* ---- failures ---- */

static void diverged_body(struct dsc_comm *comm, int rank, void *arg) {
    float x = 1;
    struct dsc_coll coll = {.src = &x, .dst = &x, .n_elems = 1, .dtype = DSC_F32, .label = "one"};
    (void)arg;
    CHECK_OK(dsc_comm_barrier(comm, NULL));
    if (rank == 2)
        CHECK(dsc_comm_barrier(comm, "two") == DSC_EDIVERGED);
    else
        CHECK(dsc_comm_all_reduce(comm, &coll) == DSC_EDIVERGED);
    CHECK_TEXT("rank 0 called all_reduce(fp32 x 1, sum) [one] as operation 2 while rank 2 called "
               "barrier() [two]");
    CHECK(dsc_comm_barrier(comm, NULL) == DSC_EDIVERGED);
}

static void different_calls_are_an_error_on_all(void) {
    run_fake(3, diverged_body, NULL);
    run_nodes(4, 2, diverged_body, NULL);
}

static void dead_body(struct dsc_comm *comm, int rank, void *arg) {
    struct world *w = arg;
    CHECK_OK(dsc_comm_barrier(comm, NULL));
    if (rank == 1) {
        pthread_mutex_lock(&w->lock);
        w->cut = w->ranks[1].dead = true;
        pthread_cond_broadcast(&w->changed);
        pthread_mutex_unlock(&w->lock);
        return;
    }
    CHECK(dsc_comm_barrier(comm, "last") == DSC_EDEAD);
    CHECK_TEXT("rank 1 (pid 1) died or ended");
}

static void a_dead_rank_is_named(void) {
    run_fake(3, dead_body, NULL);
}

static void gives_up_body(struct dsc_comm *comm, int rank, void *arg) {
    (void)arg;
    if (rank == 1) {
        dsc_comm_abort(comm, "out of data");
        return;
    }
    CHECK(dsc_comm_barrier(comm, NULL) == DSC_EDEAD);
    CHECK_TEXT("out of data");
}

static void a_rank_that_gives_up_says_why(void) {
    run_fake(3, gives_up_body, NULL);
}

/* Without an agreement before, ranks 0, 2 and 3 wait inside the operation, each for another. */
static void gives_up_inside_body(struct dsc_comm *comm, int rank, void *arg) {
    enum { N = 100000 };
    float *x = calloc(N, sizeof *x);
    struct dsc_coll coll = {.src = x, .dst = x, .n_elems = N, .dtype = DSC_F32};
    (void)arg;
    CHECK(x);
    CHECK_OK(dsc_comm_barrier(comm, NULL));
    (void)dsc_comm_cover(comm, true);
    if (rank == 1) {
        nap_ms(30);
        dsc_comm_abort(comm, "out of data");
    } else {
        CHECK(dsc_comm_all_reduce(comm, &coll) == DSC_EDEAD);
        CHECK_TEXT("rank 1");
        CHECK_TEXT("out of data");
    }
    free(x);
}

static void a_rank_that_gives_up_ends_waits_in_its_node_and_in_others(void) {
    run_nodes(4, 2, gives_up_inside_body, NULL);
}

/* ---- the engine ---- */

enum { N_PARAMS = 3, N_STEPS = 3 };
static const size_t param_elems[N_PARAMS] = {5000, 17, 9001};

struct training {
    int stage;
    enum dsc_dtype dtype;
    float result[RANKS_MAX][15000];
};

static void fill_grads(uint16_t *narrow, float *wide, size_t n, int rank, int step) {
    for (size_t i = 0; i < n; i++) {
        float x = value(rank + 3 * step, i) * 0.01f;
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        wide[i] = x;
        narrow[i] = (uint16_t)(bits >> 16); /* any bf16 will do */
    }
}

/* At stage 3 a rank has nothing but its part of each parameter; what it steps there is its share of
 * the result of every rank. */
struct kept {
    void *part[N_PARAMS];
    size_t begin[N_PARAMS], n[N_PARAMS];
};

static void keep_parts(const struct dsc_engine *engine, int rank, struct dsc_view *views,
                       size_t elem_size, struct kept *kept) {
    for (int i = 0; i < N_PARAMS; i++) {
        dsc_engine_part(engine, (size_t)i, rank, &kept->begin[i], &kept->n[i]);
        kept->part[i] = malloc(kept->n[i] * elem_size + 1);
        CHECK(kept->part[i]);
        memcpy(kept->part[i], (char *)views[i].data + kept->begin[i] * elem_size,
               kept->n[i] * elem_size);
    }
}

static void use_parts(struct dsc_view *views, const struct kept *kept) {
    for (int i = 0; i < N_PARAMS; i++) {
        views[i].data = kept->part[i];
        views[i].begin = kept->begin[i];
    }
}

static float widened(const struct training *t, const void *data, size_t k) {
    return t->dtype == DSC_F32 ? ((const float *)data)[k] : (float)((const uint16_t *)data)[k];
}

static void show_parts(struct training *t, struct kept *kept) {
    size_t out = 0;
    for (int i = 0; i < N_PARAMS; out += param_elems[i++]) {
        for (int r = 0; r < RANKS_MAX; r++)
            for (size_t k = 0; k < kept->n[i]; k++)
                t->result[r][out + kept->begin[i] + k] = widened(t, kept->part[i], k);
        free(kept->part[i]);
    }
}

static void train_body(struct dsc_comm *comm, int rank, void *arg) {
    struct training *t = arg;
    struct kept kept;
    struct dsc_engine_options options = {.stage = t->stage,
                                         .bucket_elems = 3000,
                                         .clip = 0.5,
                                         .optim = DSC_OPTIM_ADAM,
                                         .scaler = {.scale = 1},
                                         .n_threads = 1};
    struct dsc_hyper hyper = {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.99, .eps = 1e-8};
    struct dsc_param params[N_PARAMS];
    struct dsc_view views[N_PARAMS];
    struct dsc_step_report report;
    struct dsc_engine *engine = NULL;
    uint16_t *narrow = calloc(2 * 9001 * N_PARAMS, sizeof *narrow);
    float *wide = calloc(2 * 9001 * N_PARAMS, sizeof *wide);
    CHECK(narrow && wide);
    for (int i = 0; i < N_PARAMS; i++) {
        size_t at = (size_t)i * 2 * 9001;
        params[i] = (struct dsc_param){.n_elems = param_elems[i], .dtype = t->dtype};
        fill_grads(narrow + at, wide + at, param_elems[i], 40 + i, 0);
    }
    struct dsc_engine_ranks ranks = dsc_engine_ranks_of(comm);
    CHECK_OK(dsc_engine_open(&ranks, &options, params, N_PARAMS, 1, &engine));
    for (int step = 0; step < N_STEPS; step++) {
        int need;
        for (int i = 0; i < N_PARAMS; i++) {
            size_t at = (size_t)i * 2 * 9001, n = param_elems[i];
            fill_grads(narrow + at + n, wide + at + n, n, rank + i, step);
            views[i] = (struct dsc_view){.grad_dtype = t->dtype};
            views[i].data = t->dtype == DSC_F32 ? (void *)(wide + at) : (void *)(narrow + at);
            views[i].grad =
                t->dtype == DSC_F32 ? (void *)(wide + at + n) : (void *)(narrow + at + n);
        }
        if (step == 0 && t->stage == 3)
            keep_parts(engine, rank, views, dsc_dtype_size(t->dtype), &kept);
        if (t->stage == 3)
            use_parts(views, &kept);
        if (step == 0)
            dsc_engine_load_masters(engine, views);
        CHECK_OK(dsc_engine_begin_backward(engine, true, &need));
        bool taken;
        for (size_t i = 0; i < N_PARAMS && dsc_engine_early(engine); i++) {
            CHECK_OK(dsc_engine_arrive(engine, i, views[i].grad, t->dtype, &taken));
            if (taken)
                views[i].grad = NULL;
        }
        CHECK_OK(dsc_engine_end_backward(engine, true, &need));
        if (need & DSC_NEED_HAND_OVER)
            CHECK_OK(dsc_engine_hand_over(engine, views));
        CHECK_OK(dsc_engine_step(engine, views, &hyper, &report));
        CHECK(report.stepped);
    }
    size_t out = 0;
    for (int i = 0; t->stage < 3 && i < N_PARAMS; i++)
        for (size_t k = 0; k < param_elems[i]; k++, out++)
            t->result[rank][out] = widened(t, views[i].data, k);
    if (t->stage == 3)
        show_parts(t, &kept);
    dsc_engine_close(engine);
    free(narrow);
    free(wide);
}

static void train_everywhere(enum dsc_dtype dtype) {
    struct training *shared = calloc(1, sizeof *shared), *faked = calloc(1, sizeof *faked);
    CHECK(shared && faked);
    for (int stage = 0; stage <= 3; stage++) {
        shared->stage = dsc_min(stage, 2);
        faked->stage = stage;
        memset(faked->result, 0, sizeof faked->result);
        shared->dtype = faked->dtype = dtype;
        run_threads(3, 30, false, train_body, shared);
        run_fake(3, train_body, faked);
        CHECK(memcmp(shared->result, faked->result, 3 * sizeof shared->result[0]) == 0);
        CHECK(shared->result[0][0] != 0);
        CHECK(memcmp(faked->result[0], faked->result[2], sizeof faked->result[0]) == 0);
    }
    free(shared);
    free(faked);
}

/* On nodes there is another order, the same at every stage and on every rank. */
static void stages_on_nodes_give_the_same_bits(void) {
    struct training *first = calloc(1, sizeof *first), *other = calloc(1, sizeof *other);
    CHECK(first && other);
    first->dtype = other->dtype = DSC_BF16;
    run_nodes(4, 2, train_body, first);
    CHECK(first->result[0][0] != 0);
    CHECK(memcmp(first->result[0], first->result[3], sizeof first->result[0]) == 0);
    for (other->stage = 1; other->stage <= 3; other->stage++) {
        memset(other->result, 0, sizeof other->result);
        run_nodes(4, 2, train_body, other);
        CHECK(memcmp(first->result, other->result, 4 * sizeof first->result[0]) == 0);
    }
    free(first);
    free(other);
}

static void training_has_the_bits_of_shared_memory_in_fp32(void) {
    train_everywhere(DSC_F32);
}

static void training_has_the_bits_of_shared_memory_in_bf16(void) {
    train_everywhere(DSC_BF16);
}

/* ---- the end of the process ---- */

static void *wait_in_a_thread(void *arg) {
    CHECK(dsc_comm_barrier(arg, NULL) == DSC_EINTR);
    return NULL;
}

static void halting_body(struct dsc_comm *comm, int rank, void *arg) {
    struct world *w = arg;
    pthread_t thread;
    bool waits = false;
    if (rank != 0)
        return;
    CHECK(pthread_create(&thread, NULL, wait_in_a_thread, comm) == 0);
    while (!waits) {
        nap_ms(1);
        pthread_mutex_lock(&w->lock);
        waits = w->n_came == 1;
        pthread_mutex_unlock(&w->lock);
    }
    double since = dsc_comm_now();
    dsc_comm_halt(comm);
    CHECK(dsc_comm_now() - since < 0.9);
    CHECK(pthread_join(thread, NULL) == 0);
}

static void the_end_of_a_process_ends_waits_of_its_threads(void) {
    run_fake(2, halting_body, NULL);
}

/* ---- messages ---- */

enum { MESSAGES = 60, LONGEST = 400 * 1024 };

static size_t length_of(int from, int to, int i) {
    unsigned seed = (unsigned)(from * 31 + to * 7 + i);
    return i % 5 == 0 ? next_random(&seed) % LONGEST : next_random(&seed) % 3000;
}

static struct dsc_p2p message_of(float *data, int from, int to, int i, int peer) {
    return (struct dsc_p2p){data, length_of(from, to, i), DSC_F32, peer, (uint64_t)i % 3, NULL};
}

static void check_message(const float *data, int from, int to, int i) {
    for (size_t k = 0; k < length_of(from, to, i); k++)
        CHECK(data[k] == (float)(from * 100 + to * 10 + i) + (float)(k % 1000));
}

/* Every rank sends to every other from a thread of the communicator's and takes in its own thread;
 * collectives go on beside it. */
static void messages_body(struct dsc_comm *comm, int rank, void *arg) {
    int size = dsc_comm_size(comm);
    float *out = malloc(sizeof *out * LONGEST * MESSAGES), *in = malloc(sizeof *in * LONGEST);
    struct dsc_work *works[MESSAGES];
    (void)arg;
    CHECK(out && in);
    for (int shift = 1; shift < size; shift++) {
        int to = (rank + shift) % size, from = (rank + size - shift) % size;
        for (int i = 0; i < MESSAGES; i++) {
            float *data = out + (size_t)i * LONGEST;
            for (size_t k = 0; k < length_of(rank, to, i); k++)
                data[k] = (float)(rank * 100 + to * 10 + i) + (float)(k % 1000);
            struct dsc_p2p what = message_of(data, rank, to, i, to);
            CHECK_OK(dsc_comm_post_message(comm, true, &what, &works[i]));
        }
        CHECK_OK(dsc_comm_barrier(comm, "beside"));
        for (int i = 0; i < MESSAGES; i++) {
            struct dsc_p2p what = message_of(in, from, rank, i, i % 2 ? from : -1);
            int who = -1;
            CHECK_OK(dsc_comm_recv(comm, &what, &who));
            CHECK_EQ_INT(who, from);
            check_message(in, from, rank, i);
        }
        for (int i = 0; i < MESSAGES; i++) {
            CHECK_OK(dsc_work_wait(works[i], 0, NULL, NULL));
            dsc_work_release(works[i]);
        }
        CHECK_OK(dsc_comm_barrier(comm, "all have theirs"));
    }
    free(out);
    free(in);
}

static void messages_arrive_in_order_beside_collectives(void) {
    run_fake(2, messages_body, NULL);
    run_fake(4, messages_body, NULL);
}

static void leaving_body(struct dsc_comm *comm, int rank, void *arg) {
    float x[3] = {0};
    struct dsc_p2p to = {x, 3, DSC_F32, 0, 0, NULL}, from = {x, 3, DSC_F32, 1, 0, NULL};
    (void)arg;
    if (rank == 1) {
        for (int i = 0; i < 8; i++)
            CHECK_OK(dsc_comm_send(comm, &to));
        return; /* and its communicator closes */
    }
    nap_ms(300);
    for (int i = 0; i < 8; i++)
        CHECK_OK(dsc_comm_recv(comm, &from, NULL));
}

static void what_a_rank_sent_can_be_taken_after_it_has_left(void) {
    run_fake(2, leaving_body, NULL);
}

static void differing_body(struct dsc_comm *comm, int rank, void *arg) {
    static const size_t n[2] = {1 << 20, 5};
    float *x = calloc(n[0], sizeof *x);
    struct dsc_p2p what = {x, n[rank], DSC_F32, 1 - rank, 7, NULL};
    (void)arg;
    CHECK(x && (rank == 0 ? dsc_comm_send(comm, &what) : dsc_comm_recv(comm, &what, NULL)) ==
                   DSC_EDIVERGED);
    CHECK_TEXT("rank 0 called send(fp32 x 1048576, to rank 1, tag 7) while rank 1 called "
               "recv(fp32 x 5, from rank 0, tag 7)");
    CHECK((rank == 0 ? dsc_comm_send(comm, &what) : dsc_comm_recv(comm, &what, NULL)) ==
          DSC_EDIVERGED);
    free(x);
}

static void ends_of_a_message_that_differ_are_an_error_on_both(void) {
    run_fake(2, differing_body, NULL);
}

struct abort_later {
    struct dsc_comm *comm;
    long us;
};

static void *abort_later(void *arg) {
    const struct abort_later *later = arg;
    const struct timespec pause = {.tv_nsec = later->us * 1000};
    (void)nanosleep(&pause, NULL);
    dsc_comm_abort(later->comm, "enough");
    return NULL;
}

/* One rank gives up while long messages go round; their memory is freed at once. */
static void dropping_body(struct dsc_comm *comm, int rank, void *arg) {
    enum { N = 2 << 20 };
    long round = *(const long *)arg;
    struct abort_later later = {comm, 1000 + 3000 * round};
    enum dsc_status status = DSC_OK;
    pthread_t thread;
    bool aborts = rank == round % 2;
    if (aborts)
        CHECK(pthread_create(&thread, NULL, abort_later, &later) == 0);
    for (int i = 0; status == DSC_OK; i++) {
        float *x = calloc(N, sizeof *x);
        struct dsc_p2p what = {x, N, DSC_F32, 1 - rank, 0, NULL};
        CHECK(x);
        status = i % 2 == rank ? dsc_comm_send(comm, &what) : dsc_comm_recv(comm, &what, NULL);
        free(x);
    }
    CHECK(status == DSC_EDEAD);
    CHECK_TEXT("enough");
    if (aborts)
        CHECK(pthread_join(thread, NULL) == 0);
}

static void a_message_that_fails_leaves_its_memory_alone(void) {
    for (long round = 0; round < 8; round++)
        run_fake(2, dropping_body, &round);
}

static const struct test_case cases[] = {
    CASE(messages_arrive_in_order_beside_collectives),
    CASE(what_a_rank_sent_can_be_taken_after_it_has_left),
    CASE(ends_of_a_message_that_differ_are_an_error_on_both),
    CASE(a_message_that_fails_leaves_its_memory_alone),
    CASE(operations_do_what_they_say),
    CASE(operations_on_nodes_do_what_they_say),
    CASE(nodes_add_their_ranks_first),
    CASE(uneven_parts_arrive),
    CASE(sums_come_in_parts),
    CASE(pieces_of_each_arrive_at_all),
    CASE(pieces_go_round_beside_covered_operations),
    CASE(different_labels_are_an_error_on_all),
    CASE(different_calls_are_an_error_on_all),
    CASE(a_dead_rank_is_named),
    CASE(a_rank_that_gives_up_says_why),
    CASE(a_rank_that_gives_up_ends_waits_in_its_node_and_in_others),
    CASE(stages_on_nodes_give_the_same_bits),
    CASE(the_end_of_a_process_ends_waits_of_its_threads),
    CASE(training_has_the_bits_of_shared_memory_in_fp32),
    CASE(training_has_the_bits_of_shared_memory_in_bf16),
};
RUN_CASES(cases)
