/* Communicators of processes: first meeting, descriptors, forked children, ranks that die. */
#define _GNU_SOURCE
#include "comm_processes.h"

#include "comm/shm.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>

enum { CHUNK_F32 = 2 * DSC__SHM_CELL_MAX };

static int windows_leak_body(struct dsc_comm *comm, int rank, void *arg) {
    int before = count_fds();
    (void)arg, (void)rank;
    for (int i = 0; i < 200; i++) {
        struct dsc_window *window = NULL;
        CHECK_OK(dsc_comm_window_open(comm, 10000, "leak", &window));
        window->base[rank][9999] = 1;
        dsc_comm_window_close(comm, window);
    }
    return count_fds() == before ? 0 : 1;
}

static void windows_leave_no_descriptor(void) {
    struct processes p = start_processes(3, 5, windows_leak_body, NULL);
    for (int r = 0; r < 3; r++)
        CHECK_EQ_INT(end_of(&p, r), 0);
}

/* Descriptors of a group's window travel between its members alone: rank 0 is no member here. */
static int group_windows_body(struct dsc_comm *comm, int rank, void *arg) {
    struct dsc_comm *group = NULL;
    int before = count_fds();
    (void)arg;
    if (rank > 0) {
        CHECK_OK(dsc_comm_open_group(comm, NULL, (int[]){3, 1, 2}, 3, "others", &group));
        for (int i = 0; i < 50; i++)
            window_body(group, dsc_comm_rank(group), NULL);
        bell_body(group, dsc_comm_rank(group), NULL);
        CHECK_EQ_INT(count_fds(), before);
        dsc_comm_close(group);
    }
    return dsc_comm_barrier(comm, NULL) == DSC_OK ? 0 : 1;
}

static void windows_of_a_group_need_its_members_only(void) {
    struct processes p = start_processes(4, 5, group_windows_body, NULL);
    for (int r = 0; r < 4; r++)
        CHECK_EQ_INT(end_of(&p, r), 0);
}

/* Rank 1 dies between two windows of a group that rank 0 is not in. */
static int killed_member_body(struct dsc_comm *comm, int rank, void *arg) {
    struct dsc_comm *group = NULL;
    struct dsc_window *window = NULL;
    (void)arg;
    if (rank == 0)
        return dsc_comm_barrier(comm, NULL) == DSC_EDEAD ? 0 : 1;
    CHECK_OK(dsc_comm_open_group(comm, NULL, (int[]){1, 2}, 2, "pair", &group));
    CHECK_OK(dsc_comm_window_open(group, 4096, "first", &window));
    if (rank == 1)
        (void)kill(getpid(), SIGKILL);
    CHECK(dsc_comm_window_open(group, 4096, "second", &window) == DSC_EDEAD);
    CHECK_TEXT("died");
    CHECK_TEXT("of group pair");
    return 0;
}

static void a_killed_member_ends_its_groups_window(void) {
    struct processes p = start_processes(3, 0, killed_member_body, NULL);
    CHECK_EQ_INT(end_of(&p, 0), 0);
    CHECK_EQ_INT(end_of(&p, 1), 128 + SIGKILL);
    CHECK_EQ_INT(end_of(&p, 2), 0);
}

/* Two threads of rank 0 look for dead ranks meanwhile, which ThreadSanitizer sees. */
static int late_in_two_channels_body(struct dsc_comm *comm, int rank, void *arg) {
    struct dsc_coll nothing = {0};
    struct dsc_comm *group = NULL;
    struct dsc_work *work = NULL;
    (void)arg;
    CHECK_OK(dsc_comm_open_group(comm, NULL, (int[]){1, 0}, 2, "pair", &group));
    if (rank == 1)
        nap_ms(350);
    CHECK_OK(dsc_comm_post(comm, DSC_COMM_BARRIER, &nothing, NULL, NULL, &work));
    CHECK_OK(dsc_comm_barrier(group, NULL));
    CHECK_OK(dsc_work_wait(work, 0, NULL, NULL));
    dsc_work_release(work);
    dsc_comm_close(group);
    return 0;
}

static void a_rank_that_is_late_in_two_channels_is_waited_for(void) {
    struct processes p = start_processes(2, 5, late_in_two_channels_body, NULL);
    CHECK_EQ_INT(end_of(&p, 0), 0);
    CHECK_EQ_INT(end_of(&p, 1), 0);
}

/* Rank 0 may open one more descriptor: its listener has one, its part of the window none. */
static int short_of_descriptors_body(struct dsc_comm *comm, int rank, void *arg) {
    struct dsc_window *window = NULL;
    (void)arg;
    if (rank == 0) {
        int next = dup(0);
        struct rlimit limit = {.rlim_cur = (rlim_t)next + 1, .rlim_max = (rlim_t)next + 1};
        CHECK(next > 0 && close(next) == 0 && setrlimit(RLIMIT_NOFILE, &limit) == 0);
        CHECK(dsc_comm_window_open(comm, 4096, "staging", &window) == DSC_EIO);
        CHECK_TEXT("Too many open files");
        return 0;
    }
    CHECK(dsc_comm_window_open(comm, 4096, "staging", &window) == DSC_EDEAD);
    CHECK_TEXT("rank 0");
    return 0;
}

static void a_window_that_rank_0_cannot_open_fails_alike_on_the_others(void) {
    for (int i = 0; i < 5; i++) {
        struct processes p = start_processes(4, 5, short_of_descriptors_body, NULL);
        for (int r = 0; r < 4; r++)
            CHECK_EQ_INT(end_of(&p, r), 0);
    }
}

enum victim { IN_BARRIER, IN_LARGE, IN_BELL, IN_WINDOW };

/* Rank 1 dies by SIGKILL while the others wait for it; a child of its own, forked before, lives on
 * and holds what a fork inherits. */
static int killed_body(struct dsc_comm *comm, int rank, void *arg) {
    enum victim where = *(enum victim *)arg;
    static float x[2 * CHUNK_F32];
    struct dsc_coll coll = {
        .src = x, .dst = x, .n_elems = 2 * CHUNK_F32, .dtype = DSC_F32, .op = DSC_SUM};
    struct dsc_window *window = NULL;
    CHECK_OK(dsc_comm_barrier(comm, "start"));
    if (rank == 1) {
        if (fork() == 0) {
            alarm(3);
            for (;;)
                pause();
        }
        nap_ms(200);
        (void)kill(getpid(), SIGKILL);
    }
    double since = dsc_comm_now();
    uint32_t seen = dsc_comm_bell(comm);
    enum dsc_status status = DSC_OK;
    if (where == IN_BARRIER)
        status = dsc_comm_barrier(comm, "epoch end");
    else if (where == IN_LARGE)
        status = dsc_comm_all_reduce(comm, &coll);
    else if (where == IN_BELL)
        status = dsc_comm_wait_bell(comm, seen, "gradients of piece 3", since);
    else
        status = dsc_comm_window_open(comm, 4096, "staging", &window);
    CHECK(status == DSC_EDEAD);
    CHECK(dsc_comm_now() - since < 5);
    CHECK_TEXT("rank 1 (pid ");
    CHECK_TEXT("died");
    CHECK_TEXT("barrier() [start] as operation 1");
    if (where == IN_BELL)
        CHECK_TEXT("gradients of piece 3");
    return 0;
}

static void a_killed_rank_is_named_within_seconds(void) {
    for (enum victim where = IN_BARRIER; where <= IN_WINDOW; where++) {
        struct processes p = start_processes(3, 0, killed_body, &where);
        CHECK_EQ_INT(end_of(&p, 0), 0);
        CHECK_EQ_INT(end_of(&p, 1), 128 + SIGKILL);
        CHECK_EQ_INT(end_of(&p, 2), 0);
    }
}

static int killed_inside_body(struct dsc_comm *comm, int rank, void *arg) {
    static float x[CHUNK_F32 * 16];
    struct dsc_coll coll = {
        .src = x, .dst = x, .n_elems = CHUNK_F32 * 16, .dtype = DSC_F32, .op = DSC_SUM};
    int n = *(int *)arg;
    if (rank == 1) {
        struct itimerspec at = {.it_value = {.tv_nsec = 5000000L * (n + 1)}};
        struct sigevent kill_me = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGKILL};
        timer_t timer;
        CHECK(timer_create(CLOCK_MONOTONIC, &kill_me, &timer) == 0);
        CHECK(timer_settime(timer, 0, &at, NULL) == 0);
    }
    for (;;) {
        enum dsc_status status = dsc_comm_all_reduce(comm, &coll);
        if (status == DSC_OK)
            continue;
        CHECK(status == DSC_EDEAD);
        CHECK_TEXT("all_reduce(fp32 x 4194304, sum)");
        return 0;
    }
}

static void a_rank_killed_in_the_middle_of_data_is_noticed(void) {
    for (int n = 0; n < 8; n++) {
        struct processes p = start_processes(2, 0, killed_inside_body, &n);
        CHECK_EQ_INT(end_of(&p, 0), 0);
        CHECK_EQ_INT(end_of(&p, 1), 128 + SIGKILL);
    }
}

static int slow_body(struct dsc_comm *comm, int rank, void *arg) {
    (void)arg;
    if (rank == 1) {
        (void)kill(getpid(), SIGSTOP);
        return dsc_comm_barrier(comm, NULL) == DSC_OK ? 0 : 1;
    }
    return dsc_comm_barrier(comm, NULL) == DSC_OK ? 0 : 1;
}

static void slow_is_not_dead(void) {
    struct processes p = start_processes(2, 0, slow_body, NULL);
    int status = 0;
    CHECK(waitpid(p.pids[1], &status, WUNTRACED) == p.pids[1] && WIFSTOPPED(status));
    nap_ms(700);
    CHECK(kill(p.pids[1], SIGCONT) == 0);
    CHECK_EQ_INT(end_of(&p, 0), 0);
    CHECK_EQ_INT(end_of(&p, 1), 0);
}

static int child_body(struct dsc_comm *comm, int rank, void *arg) {
    struct dsc_window *window = NULL;
    int before = count_fds(), status = 0;
    (void)arg, (void)rank;
    CHECK_OK(dsc_comm_window_open(comm, 4096, "w", &window));
    pid_t pid = fork();
    if (pid == 0) {
        CHECK(dsc_comm_barrier(comm, NULL) == DSC_ESTATE);
        CHECK_TEXT("forked child");
        CHECK(dsc_comm_bell(comm) == 0);
        dsc_comm_ring(comm, 0);
        dsc_comm_abort(comm, "not mine to abort");
        dsc_comm_window_close(comm, window);
        dsc_comm_close(comm);
        /* one pidfd less per peer */
        _exit(count_fds() < before ? 0 : 1);
    }
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK_EQ_INT(WEXITSTATUS(status), 0);
    CHECK_OK(dsc_comm_barrier(comm, NULL)); /* the parent's world is whole */
    dsc_comm_window_close(comm, window);
    return 0;
}

static void a_forked_child_can_harm_nothing(void) {
    struct processes p = start_processes(2, 5, child_body, NULL);
    CHECK_EQ_INT(end_of(&p, 0), 0);
    CHECK_EQ_INT(end_of(&p, 1), 0);
}

/* ---- rendezvous ---- */

static int connect_raw(const char *address) {
    struct sockaddr_un where = {.sun_family = AF_UNIX};
    size_t n = strlen(address);
    memcpy(where.sun_path + 1, address, n);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    socklen_t size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + n);
    CHECK(fd >= 0 && connect(fd, (struct sockaddr *)&where, size) == 0);
    return fd;
}

/* Strangers of all kinds queue before the one true rank. */
static void send_strangers(const char *address, int fds[5]) {
    struct dsc__shm_message hello = dsc__shm_message_of(DSC__SHM_HELLO, 1, 2);
    struct dsc_comm_options none = {0};
    struct dsc__shm_patience patience = {.options = &none, .what = "being hostile"};
    for (int i = 0; i < 5; i++)
        fds[i] = connect_raw(address);
    CHECK(send(fds[0], "hello?", 6, 0) == 6);                     /* garbage */
    memset(hello.text, 'f', 32);                                  /* a wrong token, no memory */
    CHECK_OK(dsc__shm_send(fds[1], 0, &patience, &hello));        /* */
    hello.fds[0] = hello.fds[1] = STDERR_FILENO, hello.n_fds = 2; /* a wrong token and a file */
    CHECK_OK(dsc__shm_send(fds[2], 0, &patience, &hello));        /* */
    CHECK(shutdown(fds[3], SHUT_RDWR) == 0);                      /* gone; fds[4] says nothing */
}

static void strangers_do_not_disturb_the_rendezvous(void) {
    struct dsc_shm_listener *listener = NULL;
    struct dsc_comm_options options = {.timeout_s = 5};
    struct dsc_comm *comm = NULL;
    char address[DSC_SHM_ADDRESS_MAX], token[33];
    int strangers[5], status = 0, before = count_fds();
    CHECK_OK(dsc_shm_listen(&listener, address, token));
    send_strangers(address, strangers);
    pid_t pid = fork();
    if (pid == 0) {
        CHECK_OK(dsc_comm_open_shm(&options, NULL, address, token, 1, 2, &comm));
        CHECK_OK(dsc_comm_barrier(comm, NULL));
        _exit(0);
    }
    CHECK_OK(dsc_comm_open_shm(&options, listener, address, token, 0, 2, &comm));
    CHECK_OK(dsc_comm_barrier(comm, NULL));
    CHECK(waitpid(pid, &status, 0) == pid && status == 0);
    dsc_comm_close(comm);
    for (int i = 0; i < 5; i++)
        close(strangers[i]);
    CHECK_EQ_INT(count_fds(), before);
}

static void a_rank_that_does_not_connect_is_named(void) {
    struct dsc_shm_listener *listener = NULL;
    struct dsc_comm_options options = {.timeout_s = 0.4};
    struct dsc_comm *comm = NULL;
    char address[DSC_SHM_ADDRESS_MAX], token[33];
    int before = count_fds();
    CHECK_OK(dsc_shm_listen(&listener, address, token));
    CHECK(dsc_comm_open_shm(&options, listener, address, token, 0, 3, &comm) == DSC_ETIMEDOUT);
    CHECK_TEXT("absent of 3: 1, 2");
    dsc_shm_listener_close(listener); /* not consumed by a failure */
    CHECK_EQ_INT(count_fds(), before);
    CHECK(dsc_comm_open_shm(&options, NULL, address, token, 1, 3, &comm) == DSC_EIO);
    CHECK_TEXT("could not connect to rank 0");
    CHECK_EQ_INT(count_fds(), before);
}

/* Sockets that bear the listener's name: itself and the connections, accepted or not. */
static int count_connected(const char *address) {
    char line[512];
    int n = 0;
    FILE *table = fopen("/proc/net/unix", "r");
    CHECK(table);
    while (fgets(line, sizeof line, table))
        n += strstr(line, address) != NULL;
    (void)fclose(table);
    return n;
}

/* Nobody is dropped for silence who merely was not listened to. */
static void many_ranks_may_come_before_rank_0(void) {
    enum { MANY = 80 };
    struct dsc_shm_listener *listener = NULL;
    struct dsc_comm_options options = {.timeout_s = 5};
    struct dsc_comm *comm = NULL;
    char address[DSC_SHM_ADDRESS_MAX], token[33];
    CHECK_OK(dsc_shm_listen(&listener, address, token));
    for (int r = 1; r < MANY; r++)
        if (fork() == 0) {
            alarm(20);
            _exit(dsc_comm_open_shm(&options, NULL, address, token, r, MANY, &comm) ? 1 : 0);
        }
    while (count_connected(address) < MANY)
        nap_ms(1);
    CHECK_OK(dsc_comm_open_shm(&options, listener, address, token, 0, MANY, &comm));
    for (int r = 1, status; r < MANY; r++)
        CHECK(wait(&status) > 0 && status == 0);
    dsc_comm_close(comm);
}

/* One of two ranks comes, and hears no answer: rank 0 still says which one did not. */
static void the_absent_are_named_although_refusing_the_others_fails(void) {
    struct dsc_shm_listener *listener = NULL;
    struct dsc_comm_options options = {.timeout_s = 0.4};
    struct dsc__shm_patience patience = {.options = &options, .what = "joining"};
    struct dsc_comm *comm = NULL;
    char address[DSC_SHM_ADDRESS_MAX], token[33];
    CHECK_OK(dsc_shm_listen(&listener, address, token));
    struct dsc__shm_message hello = dsc__shm_message_of(DSC__SHM_HELLO, 1, 3);
    memcpy(hello.text, token, sizeof token);
    hello.fds[0] = hello.fds[1] = STDERR_FILENO, hello.n_fds = 2;
    int fd = connect_raw(address);
    CHECK_OK(dsc__shm_send(fd, 0, &patience, &hello));
    CHECK(shutdown(fd, SHUT_RD) == 0); /* the refusal meets EPIPE */
    CHECK(dsc_comm_open_shm(&options, listener, address, token, 0, 3, &comm) == DSC_ETIMEDOUT);
    CHECK_TEXT("absent of 3: 2");
    dsc_shm_listener_close(listener);
    close(fd);
}

/* An ordinary user may have as many descriptors in flight as it may open. */
static int send_beyond_the_limit(void) {
    struct dsc_comm_options options = {.timeout_s = 5};
    struct dsc__shm_patience patience = {
        .options = &options, .since = dsc_comm_now(), .what = "sending"};
    struct dsc__shm_message message = dsc__shm_message_of(DSC__SHM_WINDOW, 0, 2);
    const struct rlimit few = {.rlim_cur = 16, .rlim_max = 16};
    int pair[2];
    enum { MESSAGES = 60 };
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, pair) == 0);
    CHECK(setrlimit(RLIMIT_NOFILE, &few) == 0);
    /* The limit is not root's, and a user namespace may know nobody else. */
    if (geteuid() == 0 && (setresgid(65534, 65534, 65534) || setresuid(65534, 65534, 65534)))
        return 0;
    message.fds[0] = message.fds[1] = STDERR_FILENO, message.n_fds = 2;
    pid_t reader = fork();
    if (reader == 0) {
        alarm(9);
        nap_ms(50);
        for (int n = 0; n < MESSAGES; n++) {
            struct dsc__shm_message got;
            if (dsc__shm_receive(pair[1], 0, &patience, &got) != DSC_OK)
                _exit(1);
            dsc__shm_close_fds(&got);
        }
        _exit(0);
    }
    for (int n = 0; n < MESSAGES; n++)
        CHECK_OK(dsc__shm_send(pair[0], 1, &patience, &message));
    int status = 0;
    CHECK(waitpid(reader, &status, 0) == reader);
    return status;
}

static void too_many_descriptors_in_flight_are_waited_out(void) {
    int status = 0;
    pid_t pid = fork();
    if (pid == 0)
        _exit(send_beyond_the_limit());
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK_EQ_INT(status, 0);
}

/* Two processes as rank 1: the rendezvous ends for all, saying so. */
static void a_rank_taken_twice_is_refused(void) {
    struct dsc_shm_listener *listener = NULL;
    struct dsc_comm_options options = {.timeout_s = 5};
    struct dsc_comm *comm = NULL;
    char address[DSC_SHM_ADDRESS_MAX], token[33];
    CHECK_OK(dsc_shm_listen(&listener, address, token));
    for (int i = 0; i < 2; i++)
        if (fork() == 0) {
            enum dsc_status status = dsc_comm_open_shm(&options, NULL, address, token, 1, 3, &comm);
            _exit(status == DSC_EDEAD && strstr(dsc_last_error(), "two processes are rank 1") ? 0
                                                                                              : 1);
        }
    CHECK(dsc_comm_open_shm(&options, listener, address, token, 0, 3, &comm) == DSC_EDIVERGED);
    CHECK_TEXT("two processes are rank 1");
    dsc_shm_listener_close(listener);
    for (int i = 0, status; i < 2; i++)
        CHECK(wait(&status) > 0 && status == 0);
}

static struct test_case cases[] = {
    CASE(windows_leave_no_descriptor),
    CASE(windows_of_a_group_need_its_members_only),
    CASE(a_killed_member_ends_its_groups_window),
    CASE(a_rank_that_is_late_in_two_channels_is_waited_for),
    CASE(a_window_that_rank_0_cannot_open_fails_alike_on_the_others),
    CASE(a_killed_rank_is_named_within_seconds),
    CASE(a_rank_killed_in_the_middle_of_data_is_noticed),
    CASE(slow_is_not_dead),
    CASE(a_forked_child_can_harm_nothing),
    CASE(strangers_do_not_disturb_the_rendezvous),
    CASE(a_rank_that_does_not_connect_is_named),
    CASE(many_ranks_may_come_before_rank_0),
    CASE(the_absent_are_named_although_refusing_the_others_fails),
    CASE(too_many_descriptors_in_flight_are_waited_out),
    CASE(a_rank_taken_twice_is_refused),
};
RUN_CASES(cases)
