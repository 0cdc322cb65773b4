/* Making, publishing and cleaning of checkpoint folders. Everything that is not whole lies in one
 * folder, under its lock; who has the lock may do anything with the folder. */
#define _GNU_SOURCE
#include "publish.h"

#include "alloc.h"
#include "log.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define ASIDE ".saving-"

struct dsc_folder {
    char *dir, *tag;
    char *aside; /* <dir>/.saving-<tag> */
    char *path;  /* <aside>/files */
    int lock;
    bool published;
    pid_t owner;
};

static enum dsc_status refused(const char *what, const char *path) {
    const int error = errno;
    return DSC_FAIL_OS(error, "could not %s %s: %s", what, path, strerror(error));
}

/* A path from parts, for dsc_free. */
__attribute__((format(printf, 2, 3))) static enum dsc_status make_path(char **out,
                                                                       const char *format, ...) {
    va_list args;
    char *path;
    va_start(args, format);
    const int n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    DSC_TRY(dsc_alloc((size_t)n + 1, (void **)&path));
    va_start(args, format);
    vsnprintf(path, (size_t)n + 1, format, args);
    va_end(args);
    *out = path;
    return DSC_OK;
}

/* ---- files and folders, synced ---- */

static enum dsc_status sync_folder(const char *path) {
    const int descriptor = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor < 0)
        return refused("open the folder", path);
    /* EINVAL: a file system that has nothing to sync in a folder. */
    const bool failed = fsync(descriptor) != 0 && errno != EINVAL;
    const enum dsc_status status = failed ? refused("sync the folder", path) : DSC_OK;
    (void)close(descriptor);
    return status;
}

static enum dsc_status write_all(int descriptor, const char *data, size_t n, const char *path) {
    while (n > 0) {
        const ssize_t written = write(descriptor, data, n);
        if (written < 0 && errno == EINTR)
            continue;
        if (written < 0)
            return refused("write", path);
        data += written;
        n -= (size_t)written;
    }
    return fsync(descriptor) == 0 ? DSC_OK : refused("sync", path);
}

static enum dsc_status write_file(const char *path, mode_t mode, const void *data, size_t n) {
    const int descriptor = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, mode);
    if (descriptor < 0)
        return refused("write", path);
    const enum dsc_status status = write_all(descriptor, data, n, path);
    (void)close(descriptor);
    return status;
}

/* One folder, and its name on the disk; one that is there is fine. */
static enum dsc_status make_folder(char *path) {
    if (mkdir(path, 0777) != 0)
        return errno == EEXIST ? DSC_OK : refused("make the folder", path);
    char *slash = strrchr(path, '/');
    if (slash == path)
        return sync_folder("/");
    *slash = '\0';
    const enum dsc_status status = sync_folder(path);
    *slash = '/';
    return status;
}

/* `path`, which is absolute, and all folders above it. */
static enum dsc_status make_folders(char *path) {
    for (char *end = path + 1; *end; end++) {
        if (*end != '/')
            continue;
        *end = '\0';
        const enum dsc_status status = make_folder(path);
        *end = '/';
        DSC_TRY(status);
    }
    return make_folder(path);
}

static int remove_entry(const char *path, const struct stat *info, int kind, struct FTW *where) {
    (void)info;
    (void)where;
    (void)(kind == FTW_DP || kind == FTW_DNR ? rmdir(path) : unlink(path));
    return 0; /* what stays, stays: the next save tries again */
}

static void remove_tree(const char *path) {
    (void)nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

/* ---- the lock ---- */

/* Takes the folder `aside` with what a dead save left in it. make: it is made where it is missing.
 * *lock: -1 where a living save holds it, or there is none. */
static enum dsc_status take(const char *aside, bool make, int *lock) {
    char *path;
    enum dsc_status status = DSC_OK;
    DSC_TRY(make_path(&path, "%s/lock", aside));
    *lock = -1;
    for (int i = 0; i < 100; i++) { /* each time somebody else was quicker */
        struct stat held, named;
        if (make && mkdir(aside, 0777) != 0 && errno != EEXIST) {
            status = refused("make the folder", aside);
            break;
        }
        const int descriptor = open(path, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0666);
        if (descriptor < 0 && errno == ENOENT && make)
            continue; /* its owner removed it just now */
        if (descriptor < 0 && errno == ENOENT)
            break;
        if (descriptor < 0) {
            status = refused("make the lock", path);
            break;
        }
        if (flock(descriptor, LOCK_EX | LOCK_NB) != 0) {
            if (errno != EWOULDBLOCK)
                status = refused("lock (flock)", path);
            (void)close(descriptor);
            break;
        }
        /* It is the lock if it still has the name. */
        if (fstat(descriptor, &held) == 0 && stat(path, &named) == 0 &&
            held.st_ino == named.st_ino && held.st_dev == named.st_dev) {
            *lock = descriptor;
            break;
        }
        (void)close(descriptor);
    }
    dsc_free(path);
    return status;
}

/* Another process that looks for debris may hold it for a moment. */
static enum dsc_status take_patiently(const char *aside, int *lock) {
    const struct timespec moment = {0, 10 * 1000 * 1000};
    for (int i = 0; i < 50; i++) {
        DSC_TRY(take(aside, true, lock));
        if (*lock >= 0)
            break;
        (void)nanosleep(&moment, NULL);
    }
    return DSC_OK;
}

static bool ends_with(const char *name, const char *end) {
    const size_t n = strlen(name), n_end = strlen(end);
    return n >= n_end && strcmp(name + n - n_end, end) == 0;
}

/* Whether a file or folder in a checkpoint is one that saving writes. */
static bool is_ours(const char *name) {
    return strcmp(name, "manifest.json") == 0 || strcmp(name, "objects.pt") == 0 ||
           strcmp(name, "offloaded_tensors") == 0 || strncmp(name, "rank_", 5) == 0 ||
           ends_with(name, "_states.pt") || ends_with(name, ".part");
}

/* Does `handle` with the path of each entry of a folder. False where one said so, or the folder
 * could not be read; one that is not there has no entries. */
static bool each_entry(const char *folder,
                       bool (*handle)(const char *path, const char *name, const void *context),
                       const void *context) {
    DIR *list = opendir(folder);
    if (!list)
        return errno == ENOENT;
    bool fine = true;
    for (;;) {
        char *path;
        errno = 0;
        const struct dirent *entry = readdir(list);
        if (!entry)
            break;
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        errno = 0;
        if (make_path(&path, "%s/%s", folder, entry->d_name) == DSC_OK) {
            fine = handle(path, entry->d_name, context) && fine;
            dsc_free(path);
        } else {
            fine = false;
        }
    }
    fine = fine && errno == 0;
    (void)closedir(list);
    return fine;
}

/* What a user had put into the checkpoint that was replaced goes into the one in its place, unless
 * that has one of the name. */
static bool rescue(const char *path, const char *name, const void *target) {
    struct stat info;
    char *to;
    if (is_ours(name))
        return true;
    if (make_path(&to, "%s/%s", (const char *)target, name) != DSC_OK)
        return false;
    const bool fine = lstat(to, &info) == 0 || (errno == ENOENT && rename(path, to) == 0);
    if (!fine)
        dsc_log(DSC_LOG_WARNING, "could not move %s to %s: %s", path, to, strerror(errno));
    dsc_free(to);
    return fine;
}

static bool remove_in_aside(const char *path, const char *name, const void *unused) {
    (void)unused;
    if (strcmp(name, "lock") != 0 && strcmp(name, "replacing") != 0)
        remove_tree(path);
    return true;
}

/* Empties `aside`, whose lock we hold, but for the lock. Once "replacing" is there, "files" is, or
 * is about to be, a checkpoint that was replaced; it stays where a user's files cannot be saved. */
static void empty(const char *aside) {
    const char *tag = strrchr(aside, '/') + 1 + strlen(ASIDE);
    const int n_dir = (int)(strrchr(aside, '/') - aside);
    char *mark = NULL, *files = NULL, *target = NULL;
    bool fine = make_path(&mark, "%s/replacing", aside) == DSC_OK &&
                make_path(&files, "%s/files", aside) == DSC_OK &&
                make_path(&target, "%.*s/%s", n_dir, aside, tag) == DSC_OK;
    if (fine && access(mark, F_OK) == 0)
        fine = each_entry(files, rescue, target);
    else
        fine = fine && errno == ENOENT;
    if (fine) {
        (void)each_entry(aside, remove_in_aside, NULL);
        (void)unlink(mark);
    }
    dsc_free(mark);
    dsc_free(files);
    dsc_free(target);
}

/* The folder, whose lock we hold, goes, and the lock with it. Whoever takes it meanwhile has made a
 * lock of its own in it, and it stays. */
static void drop(const char *aside, int lock) {
    char *path;
    empty(aside);
    if (make_path(&path, "%s/lock", aside) == DSC_OK) {
        (void)unlink(path);
        (void)rmdir(aside);
        dsc_free(path);
    }
    (void)flock(lock, LOCK_UN); /* a forked child may have the descriptor too */
    (void)close(lock);
}

/* What a dead save left. Nothing that fails here stands in the way of another one. */
static bool clean(const char *path, const char *name, const void *unused) {
    int lock;
    (void)unused;
    if (strncmp(name, ASIDE, strlen(ASIDE)) != 0 || !name[strlen(ASIDE)] ||
        take(path, false, &lock) != DSC_OK || lock < 0)
        return true;
    dsc_log(DSC_LOG_WARNING, "removing what an unfinished save left: %s", path);
    drop(path, lock);
    return true;
}

/* ---- a folder's life ---- */

static enum dsc_status check_tag(const char *tag) {
    static const char *const taken[] = {".", "..", "latest", "zero_to_fp32.py"};
    const size_t most = 255 - strlen(ASIDE);
    bool wrong =
        !*tag || strlen(tag) > most || strchr(tag, '/') || strncmp(tag, ASIDE, strlen(ASIDE)) == 0;
    for (size_t i = 0; i < sizeof taken / sizeof *taken; i++)
        wrong = wrong || strcmp(tag, taken[i]) == 0;
    if (wrong)
        return DSC_FAIL(DSC_EINVAL,
                        "tag is \"%.300s\"; allowed: a text of 1 to %zu bytes without '/' that "
                        "is none of \".\", \"..\", \"latest\", \"zero_to_fp32.py\" and does not "
                        "begin with \"%s\"",
                        tag, most, ASIDE);
    return DSC_OK;
}

/* dir, absolute and there. The process may change its own folder before the save is over. */
static enum dsc_status settle_dir(const char *dir, char **out) {
    char here[PATH_MAX] = "", *path;
    size_t n = strlen(dir);
    if (n == 0)
        return DSC_FAIL(DSC_EINVAL, "the folder to save in has no name");
    while (n > 1 && dir[n - 1] == '/')
        n--;
    if (dir[0] != '/' && !getcwd(here, sizeof here))
        return refused("find the folder", dir);
    DSC_TRY(make_path(&path, "%s%s%.*s", here, dir[0] == '/' ? "" : "/", (int)n, dir));
    const enum dsc_status status = make_folders(path);
    if (status == DSC_OK)
        *out = path;
    else
        dsc_free(path);
    return status;
}

static enum dsc_status open_folder(struct dsc_folder *folder, const char *dir, const char *tag) {
    DSC_TRY(settle_dir(dir, &folder->dir));
    DSC_TRY(make_path(&folder->tag, "%s", tag));
    DSC_TRY(make_path(&folder->aside, "%s/%s%s", folder->dir, ASIDE, tag));
    DSC_TRY(make_path(&folder->path, "%s/files", folder->aside));
    (void)each_entry(folder->dir, clean, NULL);
    DSC_TRY(take_patiently(folder->aside, &folder->lock));
    if (folder->lock < 0)
        return DSC_FAIL(DSC_ESTATE,
                        "another save of tag \"%s\" in %s is under way: it holds %s/lock", tag,
                        folder->dir, folder->aside);
    empty(folder->aside);
    return mkdir(folder->path, 0777) == 0 ? DSC_OK : refused("make the folder", folder->path);
}

enum dsc_status dsc_folder_open(const char *dir, const char *tag, struct dsc_folder **out) {
    struct dsc_folder *folder;
    DSC_TRY(check_tag(tag));
    DSC_TRY(dsc_alloc(sizeof *folder, (void **)&folder));
    folder->lock = -1;
    folder->owner = getpid();
    const enum dsc_status status = open_folder(folder, dir, tag);
    if (status != DSC_OK)
        dsc_folder_close(folder);
    else
        *out = folder;
    return status;
}

const char *dsc_folder_path(const struct dsc_folder *folder) {
    return folder->path;
}

enum dsc_status dsc_folder_write(const struct dsc_folder *folder, const char *name,
                                 const void *data, size_t n_bytes) {
    char *path;
    if (!*name || strchr(name, '/'))
        return DSC_FAIL(DSC_EINVAL, "\"%s\" is no name of a file in %s", name, folder->path);
    DSC_TRY(make_path(&path, "%s/%s", folder->path, name));
    const enum dsc_status status = write_file(path, 0666, data, n_bytes);
    dsc_free(path);
    return status;
}

void dsc_folder_close(struct dsc_folder *folder) {
    if (!folder)
        return;
    if (folder->lock >= 0 && folder->owner == getpid())
        drop(folder->aside, folder->lock);
    else if (folder->lock >= 0)
        (void)close(folder->lock);
    dsc_free(folder->dir);
    dsc_free(folder->tag);
    dsc_free(folder->aside);
    dsc_free(folder->path);
    dsc_free(folder);
}

/* ---- publishing ---- */

/* Whether the file says exactly this. */
static bool file_is(const char *path, const void *data, size_t n) {
    const int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat info;
    const char *expected = data;
    char buffer[4096];
    bool same = descriptor >= 0 && fstat(descriptor, &info) == 0 && S_ISREG(info.st_mode) &&
                (info.st_mode & S_IXUSR) && (uint64_t)info.st_size == n;
    while (same && n > 0) {
        const ssize_t got = read(descriptor, buffer, dsc_min(sizeof buffer, n));
        same = got > 0 && memcmp(buffer, expected, (size_t)got) == 0;
        expected += got > 0 ? got : 0;
        n -= got > 0 ? (size_t)got : 0;
    }
    if (descriptor >= 0)
        (void)close(descriptor);
    return same;
}

static enum dsc_status put_beside(const struct dsc_folder *folder,
                                  const struct dsc_beside *beside) {
    char *aside = NULL, *path = NULL;
    if (strchr(beside->name, '/') || strcmp(beside->name, folder->tag) == 0)
        return DSC_FAIL(DSC_EINVAL, "\"%s\" is no name of a file beside the checkpoint %s",
                        beside->name, folder->tag);
    enum dsc_status status = make_path(&path, "%s/%s", folder->dir, beside->name);
    if (status == DSC_OK && !file_is(path, beside->data, beside->n_bytes)) {
        status = make_path(&aside, "%s/beside", folder->aside);
        if (status == DSC_OK)
            status = write_file(aside, 0777, beside->data, beside->n_bytes);
        if (status == DSC_OK && rename(aside, path) != 0)
            status = refused("write", path);
    }
    dsc_free(aside);
    dsc_free(path);
    return status;
}

static enum dsc_status replace(const struct dsc_folder *folder, const char *target) {
    char *mark;
    DSC_TRY(make_path(&mark, "%s/replacing", folder->aside));
    enum dsc_status status = write_file(mark, 0666, "", 0);
    if (status == DSC_OK &&
        renameat2(AT_FDCWD, folder->path, AT_FDCWD, target, RENAME_EXCHANGE) != 0) {
        const int error = errno;
        const bool cannot = error == EINVAL || error == ENOSYS;
        status = DSC_FAIL_OS(error, "could not replace %s%s: %s", target,
                             cannot ? ", because its file system cannot do so in one step "
                                      "(renameat2 with RENAME_EXCHANGE); save under another tag, "
                                      "or remove it"
                                    : "",
                             strerror(error));
        (void)unlink(mark);
    }
    dsc_free(mark);
    return status;
}

/* The folder gets its name; one that has it comes into its place aside. */
static enum dsc_status move_in(const struct dsc_folder *folder, const char *target) {
    struct stat info;
    if (lstat(target, &info) == 0) {
        if (S_ISDIR(info.st_mode))
            return replace(folder, target);
        errno = ENOTDIR;
        return refused("replace", target);
    }
    return errno == ENOENT && rename(folder->path, target) == 0 ? DSC_OK : refused("make", target);
}

/* `latest` is written before the checkpoint is there, so that a full disk leaves all as it was. */
static enum dsc_status prepare_latest(const struct dsc_folder *folder, const char *latest,
                                      const char *latest_aside) {
    struct stat info;
    if (lstat(latest, &info) != 0 || !S_ISDIR(info.st_mode))
        return write_file(latest_aside, 0666, folder->tag, strlen(folder->tag));
    errno = EISDIR;
    return refused("write", latest);
}

/* What comes after that moment. */
static enum dsc_status put_latest(const struct dsc_folder *folder, const char *latest,
                                  const char *latest_aside) {
    DSC_TRY(sync_folder(folder->dir));
    if (!latest)
        return DSC_OK;
    if (rename(latest_aside, latest) != 0)
        return refused("write", latest);
    return sync_folder(folder->dir);
}

/* Everything before the moment at which the checkpoint is there. */
static enum dsc_status prepare(const struct dsc_folder *folder, const struct dsc_beside *beside,
                               size_t n_beside) {
    DSC_TRY(sync_folder(folder->path));
    for (size_t i = 0; i < n_beside; i++)
        DSC_TRY(put_beside(folder, &beside[i]));
    return DSC_OK;
}

enum dsc_status dsc_folder_publish(struct dsc_folder *folder, bool latest,
                                   const struct dsc_beside *beside, size_t n_beside) {
    char *target = NULL, *latest_path = NULL, *latest_aside = NULL;
    if (folder->published || folder->owner != getpid())
        return DSC_FAIL(DSC_ESTATE, "%s: published already, or not by this process", folder->path);
    enum dsc_status status = make_path(&target, "%s/%s", folder->dir, folder->tag);
    if (status == DSC_OK)
        status = make_path(&latest_path, "%s/latest", folder->dir);
    if (status == DSC_OK)
        status = make_path(&latest_aside, "%s/latest", folder->aside);
    if (status == DSC_OK)
        status = prepare(folder, beside, n_beside);
    if (status == DSC_OK && latest)
        status = prepare_latest(folder, latest_path, latest_aside);
    if (status == DSC_OK)
        status = move_in(folder, target);
    if (status == DSC_OK) {
        folder->published = true;
        status = put_latest(folder, latest ? latest_path : NULL, latest_aside);
        const int error = dsc_last_errno();
        if (status == DSC_EIO)
            status =
                DSC_FAIL_OS(error, "the checkpoint %s is there, but: %s", target, dsc_last_error());
    }
    dsc_free(target);
    dsc_free(latest_path);
    dsc_free(latest_aside);
    return status;
}
