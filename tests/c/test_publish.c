/* The folder of a checkpoint: what is there after a kill at any moment, who may write, what is
 * removed. */
#define _GNU_SOURCE
#include "case.h"
#include "publish.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char dir[64];

/* In memory where that is possible, so that syncing costs nothing. */
static void make_dir(void) {
    snprintf(dir, sizeof dir, "%s/dsc_publish_XXXXXX",
             access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
    CHECK(mkdtemp(dir));
}

/* A command with %s for the folder. */
static void run(const char *format) {
    char command[256];
    snprintf(command, sizeof command, format, dir);
    CHECK(system(command) == 0);
}

static int remove_one(const char *path, const struct stat *info, int kind, struct FTW *where) {
    (void)info, (void)kind, (void)where;
    return remove(path);
}

static void remove_dir(void) {
    CHECK(nftw(dir, remove_one, 16, FTW_DEPTH | FTW_PHYS) == 0);
}

/* A file that a user puts into the checkpoint "t". */
static void put_notes(void) {
    char path[128];
    snprintf(path, sizeof path, "%s/t/notes.txt", dir);
    FILE *file = fopen(path, "w");
    CHECK(file && fputs("mine\n", file) >= 0 && fclose(file) == 0);
}

/* The text of <dir>/<name>, "" where there is none. */
static const char *text_of(const char *name) {
    static char text[256];
    char path[640];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *file = fopen(path, "r");
    const size_t n = file ? fread(text, 1, sizeof text - 1, file) : 0;
    text[n] = '\0';
    if (file)
        fclose(file);
    return text;
}

static bool exists(const char *name) {
    char path[640];
    struct stat info;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return lstat(path, &info) == 0;
}

/* A checkpoint of two files that say the same version. */
static enum dsc_status save(const char *tag, int version) {
    struct dsc_folder *folder;
    char text[16];
    const size_t n = (size_t)snprintf(text, sizeof text, "%d", version);
    DSC_TRY(dsc_folder_open(dir, tag, &folder));
    enum dsc_status status = dsc_folder_write(folder, "rank_00000.safetensors", text, n);
    if (status == DSC_OK)
        status = dsc_folder_write(folder, "manifest.json", text, n);
    if (status == DSC_OK)
        status = dsc_folder_publish(folder, true, NULL, 0);
    dsc_folder_close(folder);
    return status;
}

/* The version of the checkpoint that `latest` names, which must be whole; 0: there is no latest. */
static int version_of_latest(void) {
    char tag[256], name[512], first[256];
    snprintf(tag, sizeof tag, "%s", text_of("latest"));
    if (!tag[0])
        return 0;
    snprintf(name, sizeof name, "%s/manifest.json", tag);
    snprintf(first, sizeof first, "%s", text_of(name));
    snprintf(name, sizeof name, "%s/rank_00000.safetensors", tag);
    CHECK(first[0] && strcmp(first, text_of(name)) == 0);
    return (int)strtol(first, NULL, 10);
}

static void check_no_debris(void) {
    DIR *list = opendir(dir);
    CHECK(list);
    for (const struct dirent *entry; (entry = readdir(list)) != NULL;)
        CHECK(!strstr(entry->d_name, "saving"));
    closedir(list);
}

static void a_published_folder_has_its_name_and_latest_names_it(void) {
    struct stat info;
    char path[128];
    struct dsc_folder *folder;
    make_dir();
    snprintf(path, sizeof path, "%s/a/b/", dir);
    CHECK_OK(dsc_folder_open(path, "step 1", &folder));
    CHECK_OK(dsc_folder_write(folder, "manifest.json", "1", 1));
    CHECK(!exists("a/b/step 1"));
    const struct dsc_beside beside = {"zero_to_fp32.py", "#!x", 3};
    CHECK_OK(dsc_folder_publish(folder, true, &beside, 1));
    CHECK_EQ_INT(dsc_folder_publish(folder, true, &beside, 1), DSC_ESTATE);
    dsc_folder_close(folder);
    CHECK(strcmp(text_of("a/b/latest"), "step 1") == 0);
    CHECK(strcmp(text_of("a/b/step 1/manifest.json"), "1") == 0);
    CHECK(strcmp(text_of("a/b/zero_to_fp32.py"), "#!x") == 0);
    snprintf(path, sizeof path, "%s/a/b/zero_to_fp32.py", dir);
    CHECK(stat(path, &info) == 0 && (info.st_mode & S_IXUSR));
    run("test \"$(ls -A %s/a/b | wc -l)\" = 3");
    remove_dir();
}

static void a_file_beside_is_written_where_it_is_another(void) {
    static const struct dsc_beside beside[] = {{"tool", "one", 3}, {"tool", "two", 3}};
    static const int which[] = {0, 0, 1};
    struct stat before = {0}, after;
    struct dsc_folder *folder;
    char path[128];
    make_dir();
    snprintf(path, sizeof path, "%s/tool", dir);
    for (int i = 0; i < 3; i++, before = after) {
        CHECK_OK(dsc_folder_open(dir, "t", &folder));
        CHECK_OK(dsc_folder_publish(folder, false, &beside[which[i]], 1));
        dsc_folder_close(folder);
        CHECK(stat(path, &after) == 0 && strcmp(text_of("tool"), beside[which[i]].data) == 0);
        CHECK((before.st_ino == after.st_ino && before.st_ctime == after.st_ctime) == (i == 1));
    }
    CHECK_OK(dsc_folder_open(dir, "tool", &folder));
    CHECK_EQ_INT(dsc_folder_publish(folder, false, beside, 1), DSC_EINVAL);
    dsc_folder_close(folder);
    CHECK(!exists("latest"));
    check_no_debris();
    remove_dir();
}

static void a_tag_that_is_there_is_replaced_and_its_users_files_stay(void) {
    make_dir();
    CHECK_OK(save("t", 1));
    put_notes();
    run("cd %s/t && mkdir tok && echo own > tok/a && touch rank_9");
    CHECK_OK(save("t", 2));
    CHECK_EQ_INT(version_of_latest(), 2);
    CHECK(strcmp(text_of("t/notes.txt"), "mine\n") == 0);
    CHECK(strcmp(text_of("t/tok/a"), "own\n") == 0);
    CHECK(!exists("t/rank_9") && !exists("t/replacing") && !exists("t/lock"));
    check_no_debris();
    remove_dir();
}

static void what_is_abandoned_leaves_all_as_it_was(void) {
    struct dsc_folder *folder;
    make_dir();
    CHECK_OK(save("t", 1));
    CHECK_OK(dsc_folder_open(dir, "t", &folder));
    CHECK_OK(dsc_folder_write(folder, "manifest.json", "2", 1));
    CHECK_OK(dsc_folder_write(folder, "extra", "2", 1));
    dsc_folder_close(folder);
    CHECK_EQ_INT(version_of_latest(), 1);
    CHECK(!exists("t/extra"));
    check_no_debris();
    remove_dir();
}

static void tags_that_no_folder_can_have_are_refused(void) {
    static const char *const tags[] = {
        "", ".", "..", "a/b", "latest", ".saving-x", "zero_to_fp32.py"};
    struct dsc_folder *folder;
    char tag[300];
    make_dir();
    for (size_t i = 0; i < sizeof tags / sizeof *tags; i++)
        CHECK_EQ_INT(dsc_folder_open(dir, tags[i], &folder), DSC_EINVAL);
    memset(tag, 'x', sizeof tag);
    tag[248] = '\0';
    CHECK_EQ_INT(dsc_folder_open(dir, tag, &folder), DSC_EINVAL);
    tag[247] = '\0';
    CHECK_OK(save(tag, 3));
    CHECK_EQ_INT(version_of_latest(), 3);
    CHECK_OK(save("lock", 4));
    CHECK_OK(save("files", 5));
    CHECK_OK(save("replacing", 6));
    CHECK_EQ_INT(version_of_latest(), 6);
    CHECK_EQ_INT(dsc_folder_open("", "t", &folder), DSC_EINVAL);
    remove_dir();
}

static void what_stands_in_the_way_is_named_and_left_alone(void) {
    struct dsc_folder *folder;
    char path[128];
    make_dir();
    run("echo x > %s/t");
    CHECK_EQ_INT(save("t", 1), DSC_EIO);
    CHECK_EQ_INT(dsc_last_errno(), ENOTDIR);
    CHECK(strcmp(text_of("t"), "x\n") == 0 && !exists("latest"));
    run("mkdir %s/latest");
    CHECK_EQ_INT(save("u", 1), DSC_EIO);
    CHECK_EQ_INT(dsc_last_errno(), EISDIR);
    CHECK(!exists("u"));
    snprintf(path, sizeof path, "%s/t/below", dir);
    CHECK_EQ_INT(dsc_folder_open(path, "u", &folder), DSC_EIO);
    CHECK(strstr(dsc_last_error(), path));
    check_no_debris();
    remove_dir();
}

static void two_saves_of_one_tag_exclude_each_other(void) {
    struct dsc_folder *folder, *second;
    make_dir();
    CHECK_OK(dsc_folder_open(dir, "t", &folder));
    CHECK_EQ_INT(dsc_folder_open(dir, "t", &second), DSC_ESTATE);
    CHECK(strstr(dsc_last_error(), "\"t\"") && strstr(dsc_last_error(), dir));
    CHECK_OK(save("u", 1)); /* and does not take the living one for debris */
    CHECK_OK(dsc_folder_write(folder, "manifest.json", "1", 1));
    dsc_folder_close(folder);
    CHECK_OK(save("t", 2));
    check_no_debris();
    remove_dir();
}

static void a_forked_child_leaves_the_folder_alone(void) {
    struct dsc_folder *folder, *second;
    make_dir();
    CHECK_OK(dsc_folder_open(dir, "t", &folder));
    CHECK_OK(dsc_folder_write(folder, "manifest.json", "1", 1));
    const pid_t child = fork();
    if (child == 0) {
        dsc_folder_close(folder);
        _exit(0);
    }
    CHECK(waitpid(child, NULL, 0) == child);
    CHECK_EQ_INT(dsc_folder_open(dir, "t", &second), DSC_ESTATE);
    CHECK_OK(dsc_folder_publish(folder, true, NULL, 0));
    dsc_folder_close(folder);
    CHECK(strcmp(text_of("t/manifest.json"), "1") == 0);
    remove_dir();
}

static void without_room_an_error_names_the_path_and_nothing_changes(void) {
    make_dir();
    CHECK_OK(save("t", 1));
    const pid_t child = fork();
    if (child == 0) {
        const struct rlimit none = {0, 0};
        struct dsc_folder *folder;
        signal(SIGXFSZ, SIG_IGN);
        CHECK_OK(dsc_folder_open(dir, "t", &folder));
        CHECK(setrlimit(RLIMIT_FSIZE, &none) == 0);
        CHECK_EQ_INT(dsc_folder_write(folder, "manifest.json", "2", 1), DSC_EIO);
        CHECK_EQ_INT(dsc_last_errno(), EFBIG);
        CHECK(strstr(dsc_last_error(), "manifest.json"));
        CHECK_EQ_INT(dsc_folder_publish(folder, true, NULL, 0), DSC_EIO);
        CHECK(strstr(dsc_last_error(), "latest"));
        dsc_folder_close(folder);
        _exit(0);
    }
    int how;
    CHECK(waitpid(child, &how, 0) == child && how == 0);
    CHECK_EQ_INT(version_of_latest(), 1);
    check_no_debris();
    remove_dir();
}

/* Each finds what others have just locked, published and removed. */
static void savers_of_one_folder_do_not_disturb_each_other(void) {
    enum { N_CHILDREN = 4, N_SAVES = 150 };
    pid_t children[N_CHILDREN];
    make_dir();
    for (int i = 0; i < N_CHILDREN; i++)
        if ((children[i] = fork()) == 0) {
            for (int k = 1; k <= N_SAVES; k++) {
                const enum dsc_status status = save(i % 2 ? "t" : "u", k);
                CHECK(status == DSC_OK || status == DSC_ESTATE);
            }
            _exit(0);
        }
    for (int i = 0; i < N_CHILDREN; i++) {
        int how;
        CHECK(waitpid(children[i], &how, 0) == children[i] && how == 0);
    }
    CHECK(version_of_latest() > 0);
    check_no_debris();
    remove_dir();
}

/* ---- kills ---- */

/* Lets a child save, up to its n-th entry into the kernel or return from it, and kills it there.
 * False: it came to its end before. */
static bool save_killed_at(int n, const char *tag, int version) {
    const pid_t child = fork();
    int how;
    if (child == 0) {
        if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) != 0)
            _exit(77);
        raise(SIGSTOP);
        _exit(save(tag, version) == DSC_OK ? 0 : 1);
    }
    CHECK(waitpid(child, &how, 0) == child);
    if (WIFEXITED(how) && WEXITSTATUS(how) == 77) /* no tracing here: random kills remain */
        return false;
    CHECK(WIFSTOPPED(how));
    for (int i = 0; i < n; i++) {
        CHECK(ptrace(PTRACE_SYSCALL, child, NULL, NULL) == 0);
        CHECK(waitpid(child, &how, 0) == child);
        if (WIFEXITED(how)) {
            CHECK_EQ_INT(WEXITSTATUS(how), 0);
            return false;
        }
        CHECK(WIFSTOPPED(how));
    }
    CHECK(kill(child, SIGKILL) == 0);
    CHECK(waitpid(child, &how, 0) == child);
    return true;
}

enum end { DONE, FAILED, CANNOT_EXCHANGE, CANNOT_LOCK };

/* The same, but the n-th call of a number (-1: of any) fails with an error instead. *end: how it
 * ended. */
static bool save_with_a_failure_at(int n, long number, int error, const char *tag, int version,
                                   enum end *end) {
#ifdef __x86_64__
    const pid_t child = fork();
    struct user_regs_struct registers;
    int how;
    if (child == 0) {
        if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) != 0)
            _exit(77);
        raise(SIGSTOP);
        if (save(tag, version) == DSC_OK)
            _exit(DONE);
        _exit(strstr(dsc_last_error(), "RENAME_EXCHANGE") ? CANNOT_EXCHANGE
              : strstr(dsc_last_error(), "flock")         ? CANNOT_LOCK
                                                          : FAILED);
    }
    CHECK(waitpid(child, &how, 0) == child);
    if (WIFEXITED(how) && WEXITSTATUS(how) == 77)
        return false;
    CHECK(ptrace(PTRACE_SETOPTIONS, child, NULL, PTRACE_O_EXITKILL) == 0);
    for (bool enters = true, fails = false; !fails || !enters; enters = !enters) {
        CHECK(ptrace(PTRACE_SYSCALL, child, NULL, NULL) == 0);
        CHECK(waitpid(child, &how, 0) == child);
        if (WIFEXITED(how)) {
            *end = WEXITSTATUS(how);
            return false;
        }
        CHECK(WIFSTOPPED(how));
        CHECK(ptrace(PTRACE_GETREGS, child, NULL, &registers) == 0);
        const long called = (long)registers.orig_rax;
        if (enters && called != SYS_exit_group && (number < 0 || called == number) && --n == 0) {
            fails = true;
            registers.orig_rax = (unsigned long long)-1; /* the kernel does nothing */
        } else if (fails) {
            registers.rax = (unsigned long long)-error;
        }
        CHECK(ptrace(PTRACE_SETREGS, child, NULL, &registers) == 0);
    }
    CHECK(ptrace(PTRACE_CONT, child, NULL, NULL) == 0);
    CHECK(waitpid(child, &how, 0) == child && WIFEXITED(how));
    *end = WEXITSTATUS(how);
    return true;
#else /* its registers have other names */
    (void)n, (void)number, (void)error;
    *end = save(tag, version) == DSC_OK ? DONE : FAILED;
    return false;
#endif
}

/* Whatever fails, a save that says it is done is done, and all else is as after a kill. */
static void stress_a_failure_of_any_call(void) {
    enum end end = FAILED;
    int n = 1;
    for (bool failed = true; failed; n++) {
        make_dir();
        CHECK_OK(save("t", 1));
        put_notes();
        failed = save_with_a_failure_at(n, -1, EIO, "t", 2, &end);
        const int version = version_of_latest();
        CHECK(version == 2 || (end != DONE && version == 1));
        CHECK_OK(save("v", 3));
        CHECK_EQ_INT(version_of_latest(), 3);
        CHECK(strcmp(text_of("t/notes.txt"), "mine\n") == 0);
        check_no_debris();
        remove_dir();
    }
    CHECK(n == 2 || n > 30);
}

static void a_file_system_that_cannot_is_an_error_that_says_so(void) {
    enum end end;
    make_dir();
    CHECK_OK(save("t", 1));
    if (save_with_a_failure_at(1, SYS_renameat2, EINVAL, "t", 2, &end)) {
        CHECK_EQ_INT(end, CANNOT_EXCHANGE);
        CHECK_EQ_INT(version_of_latest(), 1);
        CHECK(save_with_a_failure_at(1, SYS_flock, ENOLCK, "u", 2, &end));
        CHECK_EQ_INT(end, CANNOT_LOCK);
        CHECK_EQ_INT(version_of_latest(), 1);
    }
    CHECK_OK(save("u", 3));
    CHECK_EQ_INT(version_of_latest(), 3);
    check_no_debris();
    remove_dir();
}

static void kill_everywhere(const char *tag) {
    int n = 1;
    for (bool killed = true; killed; n++) {
        make_dir();
        CHECK_OK(save("t", 1));
        put_notes();
        killed = save_killed_at(n, tag, 2);
        const int version = version_of_latest();
        CHECK(version == 2 || (killed && version == 1));
        CHECK_OK(save("v", 3)); /* cleans up */
        CHECK_EQ_INT(version_of_latest(), 3);
        CHECK(strcmp(text_of("t/notes.txt"), "mine\n") == 0);
        check_no_debris();
        remove_dir();
    }
    CHECK(n == 2 || n > 50); /* it was about something */
}

static void stress_a_kill_at_any_call_of_a_new_tag(void) {
    kill_everywhere("u");
}

static void stress_a_kill_at_any_call_of_a_tag_that_is_there(void) {
    kill_everywhere("t");
}

static void stress_kills_at_random_moments(void) {
    uint32_t state = 12345;
    int last = 0;
    make_dir();
    for (int round = 0; round < 100; round++) {
        int pipe_ends[2], version;
        CHECK(pipe(pipe_ends) == 0);
        const pid_t child = fork();
        if (child == 0) {
            for (version = last + 1;; version++) {
                char tag[8];
                snprintf(tag, sizeof tag, "t%d", version % 3);
                if (save(tag, version) != DSC_OK ||
                    write(pipe_ends[1], &version, sizeof version) != sizeof version)
                    _exit(1);
            }
        }
        close(pipe_ends[1]);
        state = state * 1664525u + 1013904223u;
        const struct timespec moment = {0, (long)(state >> 8) % 3000000};
        nanosleep(&moment, NULL);
        CHECK(kill(child, SIGKILL) == 0);
        int how;
        CHECK(waitpid(child, &how, 0) == child && WIFSIGNALED(how));
        while (read(pipe_ends[0], &version, sizeof version) == sizeof version)
            last = version;
        close(pipe_ends[0]);
        const int found = version_of_latest();
        CHECK(found == last || found == last + 1);
        last = found;
    }
    CHECK_OK(save("end", 1));
    check_no_debris();
    remove_dir();
}

static const struct test_case cases[] = {
    CASE(a_published_folder_has_its_name_and_latest_names_it),
    CASE(a_file_beside_is_written_where_it_is_another),
    CASE(a_tag_that_is_there_is_replaced_and_its_users_files_stay),
    CASE(what_is_abandoned_leaves_all_as_it_was),
    CASE(tags_that_no_folder_can_have_are_refused),
    CASE(what_stands_in_the_way_is_named_and_left_alone),
    CASE(two_saves_of_one_tag_exclude_each_other),
    CASE(a_forked_child_leaves_the_folder_alone),
    CASE(without_room_an_error_names_the_path_and_nothing_changes),
    CASE(savers_of_one_folder_do_not_disturb_each_other),
    CASE(a_file_system_that_cannot_is_an_error_that_says_so),
    CASE(stress_a_kill_at_any_call_of_a_new_tag),
    CASE(stress_a_kill_at_any_call_of_a_tag_that_is_there),
    CASE(stress_kills_at_random_moments),
    CASE(stress_a_failure_of_any_call),
};
RUN_CASES(cases)
