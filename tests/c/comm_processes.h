/* Ranks as processes, which can be killed, for the tests of communicators. */
#ifndef DSC_TEST_COMM_PROCESSES_H
#define DSC_TEST_COMM_PROCESSES_H

#include "comm_ranks.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

typedef int (*process_fn)(struct dsc_comm *comm, int rank, void *arg);

struct processes {
    pid_t pids[RANKS_MAX];
    int size;
};

/* Forks `size` ranks; body's result is the exit code, 40 stands for a failed opening. */
static inline struct processes start_processes(int size, double timeout_s, process_fn body,
                                               void *arg) {
    struct processes p = {.size = size};
    struct dsc_shm_listener *listener = NULL;
    char address[DSC_SHM_ADDRESS_MAX], token[33];
    CHECK_OK(dsc_shm_listen(&listener, address, token));
    for (int r = 0; r < size; r++) {
        p.pids[r] = fork();
        CHECK(p.pids[r] >= 0);
        if (p.pids[r] > 0)
            continue;
        struct dsc_comm_options options = {.timeout_s = timeout_s};
        struct dsc_comm *comm = NULL;
        alarm(9);
        if (dsc_comm_open_shm(&options, r == 0 ? listener : NULL, address, token, r, size, &comm)) {
            fprintf(stderr, "rank %d: %s\n", r, dsc_last_error());
            _exit(40);
        }
        int code = body(comm, r, arg);
        dsc_comm_close(comm);
        _exit(code);
    }
    dsc_shm_listener_close(listener);
    return p;
}

/* The exit code of a rank, 128 + signal for a killed one. */
static inline int end_of(struct processes *p, int rank) {
    int status = 0;
    CHECK(waitpid(p->pids[rank], &status, 0) == p->pids[rank]);
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

static inline int count_fds(void) {
    int n = 0;
    for (int fd = 0; fd < 256; fd++)
        n += fcntl(fd, F_GETFD) >= 0;
    return n;
}

#endif
