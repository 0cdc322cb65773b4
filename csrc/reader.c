/* Files are opened when they are needed and closed when others were needed since. */
#define _GNU_SOURCE
#include "reader.h"

#include "alloc.h"
#include "crc32c.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct open_file {
    struct dsc_shard *shard; /* NULL: free */
    uint32_t number;
    uint64_t used; /* the reader's clock then */
};

struct dsc_reader {
    const struct dsc_manifest *manifest;
    char *folder;
    struct open_file open[DSC_READER_OPEN];
    uint64_t clock;
};

enum dsc_status dsc_reader_open(const struct dsc_manifest *manifest, const char *folder,
                                struct dsc_reader **out) {
    struct dsc_reader *reader;
    const size_t n = strlen(folder) + 1;
    if (n > PATH_MAX - 256)
        return DSC_FAIL(DSC_EINVAL, "a folder's path has %zu bytes: too long", n - 1);
    DSC_TRY(dsc_alloc(sizeof *reader, (void **)&reader));
    const enum dsc_status status = dsc_alloc(n, (void **)&reader->folder);
    if (status != DSC_OK) {
        dsc_free(reader);
        return status;
    }
    memcpy(reader->folder, folder, n);
    reader->manifest = manifest;
    *out = reader;
    return DSC_OK;
}

void dsc_reader_close(struct dsc_reader *reader) {
    if (!reader)
        return;
    for (int i = 0; i < DSC_READER_OPEN; i++)
        dsc_shard_close(reader->open[i].shard);
    dsc_free(reader->folder);
    dsc_free(reader);
}

static void path_of(const struct dsc_reader *reader, const struct dsc_manifest_file *file,
                    char out[PATH_MAX]) {
    snprintf(out, PATH_MAX, "%s/%s", reader->folder, file->name);
}

/* The place of file `number` if it is open, else the one to give to it. */
static struct open_file *place_of(struct dsc_reader *reader, uint32_t number) {
    struct open_file *oldest = &reader->open[0];
    for (int i = 0; i < DSC_READER_OPEN; i++) {
        struct open_file *file = &reader->open[i];
        if (file->shard && file->number == number)
            return file;
        if (!file->shard || (oldest->shard && file->used < oldest->used))
            oldest = file;
    }
    return oldest;
}

/* The header and the manifest say the same about where data begins. */
static enum dsc_status open_shard(const char *path, const struct dsc_manifest_file *file,
                                  struct dsc_shard **out) {
    const struct dsc_shard_expected expected = {file->n_bytes, file->head_crc};
    struct dsc_shard *shard;
    DSC_TRY(dsc_shard_open(path, &expected, &shard));
    if (dsc_shard_count(shard) == 0 || dsc_shard_tensor(shard, 0)->offset != file->head_bytes) {
        dsc_shard_close(shard);
        return DSC_FAIL(DSC_EDAMAGED, "%s: its data should begin at offset %" PRIu64, path,
                        file->head_bytes);
    }
    *out = shard;
    return DSC_OK;
}

static enum dsc_status shard_of(struct dsc_reader *reader, uint32_t number,
                                const struct dsc_shard **out) {
    const struct dsc_manifest_file *file = dsc_manifest_file(reader->manifest, number);
    struct open_file *place = place_of(reader, number);
    if (!place->shard || place->number != number) {
        char path[PATH_MAX];
        path_of(reader, file, path);
        dsc_shard_close(place->shard);
        place->shard = NULL;
        DSC_TRY(open_shard(path, file, &place->shard));
        place->number = number;
    }
    place->used = ++reader->clock;
    *out = place->shard;
    return DSC_OK;
}

/* The text of the failure gets the tensor that wanted the file. */
static enum dsc_status with_tensor(enum dsc_status status,
                                   const struct dsc_manifest_tensor *tensor) {
    char label[DSC_MANIFEST_LABEL];
    const int error = dsc_last_errno();
    if (status == DSC_EIO)
        return DSC_FAIL_OS(error, "tensor %s: %s", dsc_manifest_label(tensor, label),
                           dsc_last_error());
    if (status == DSC_EDAMAGED)
        return DSC_FAIL(DSC_EDAMAGED, "tensor %s: %s", dsc_manifest_label(tensor, label),
                        dsc_last_error());
    return status;
}

/* ---- reading ---- */

/* The piece that has element `begin`; the tensor has one. */
static size_t piece_with(const struct dsc_manifest_piece *pieces, size_t n, uint64_t begin) {
    size_t low = 0, high = n; /* pieces[low].begin <= begin, and high is behind it */
    while (high - low > 1) {
        const size_t middle = low + (high - low) / 2;
        if (pieces[middle].begin <= begin)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* Elements [from, to) of a tensor, which lie in the piece. */
static enum dsc_status read_piece(struct dsc_reader *reader,
                                  const struct dsc_manifest_tensor *tensor,
                                  const struct dsc_manifest_piece *piece, uint64_t from,
                                  uint64_t to, void *out) {
    const uint64_t size = dsc_shard_dtype_size(tensor->dtype);
    const uint32_t *crcs = dsc_manifest_crcs(reader->manifest) + piece->first_crc;
    const struct dsc_shard *shard;
    char label[DSC_MANIFEST_LABEL];
    const struct dsc_shard_tensor entry = {
        .key = dsc_manifest_label(tensor, label),
        .dtype = tensor->dtype,
        .offset = piece->offset,
        .n_bytes = piece->n * size,
    };
    const enum dsc_status status = shard_of(reader, piece->file, &shard);
    if (status != DSC_OK)
        return with_tensor(status, tensor);
    return dsc_shard_read(shard, &entry, crcs, (from - piece->begin) * size, (to - from) * size,
                          out);
}

enum dsc_status dsc_reader_read(struct dsc_reader *reader, const struct dsc_manifest_tensor *tensor,
                                uint64_t begin, uint64_t n, void *out) {
    const struct dsc_manifest_piece *pieces =
        dsc_manifest_pieces(reader->manifest) + tensor->first_piece;
    const uint64_t size = dsc_shard_dtype_size(tensor->dtype);
    char label[DSC_MANIFEST_LABEL];
    char *to = out;
    if (begin > tensor->n_elems || n > tensor->n_elems - begin)
        return DSC_FAIL(DSC_EINVAL,
                        "tensor %s: %" PRIu64 " elements from %" PRIu64
                        " on were asked for; it has %" PRIu64,
                        dsc_manifest_label(tensor, label), n, begin, tensor->n_elems);
    if (n == 0)
        return DSC_OK;
    for (size_t i = piece_with(pieces, tensor->n_pieces, begin); n > 0; i++) {
        const uint64_t end = dsc_min(begin + n, pieces[i].begin + pieces[i].n);
        DSC_TRY(read_piece(reader, tensor, &pieces[i], begin, end, to));
        to = to ? to + (end - begin) * size : NULL;
        n -= end - begin;
        begin = end;
    }
    return DSC_OK;
}

/* ---- checking ---- */

static enum dsc_status refused(const char *what, const char *path) {
    const int error = errno;
    return DSC_FAIL_OS(error, "could not %s %s: %s", what, path, strerror(error));
}

static enum dsc_status check_bytes(int descriptor, const char *path,
                                   const struct dsc_manifest_file *file, char *buffer,
                                   size_t room) {
    struct stat info;
    uint32_t crc = 0;
    if (fstat(descriptor, &info) != 0)
        return refused("look at", path);
    if (!S_ISREG(info.st_mode) || (uint64_t)info.st_size != file->n_bytes)
        return DSC_FAIL(DSC_EDAMAGED, "%s has %" PRId64 " bytes; %" PRIu64 " were written", path,
                        (int64_t)info.st_size, file->n_bytes);
    for (uint64_t at = 0; at < file->n_bytes;) {
        const ssize_t n = pread(descriptor, buffer, room, (off_t)at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return refused("read", path);
        if (n == 0)
            break;
        crc = dsc_crc32c(crc, buffer, (size_t)n);
        at += (uint64_t)n;
    }
    if (crc != file->head_crc)
        return DSC_FAIL(DSC_EDAMAGED,
                        "%s is damaged: the checksum of its %" PRIu64 " bytes is %08" PRIx32
                        ", %08" PRIx32 " was written",
                        path, file->n_bytes, crc, file->head_crc);
    return DSC_OK;
}

/* A file without tensors need not be a shard. */
static enum dsc_status check_other(struct dsc_reader *reader,
                                   const struct dsc_manifest_file *file) {
    char path[PATH_MAX];
    void *buffer;
    path_of(reader, file, path);
    DSC_TRY(dsc_alloc(DSC_SHARD_CRC_BYTES, &buffer));
    enum dsc_status status = DSC_OK;
    const int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor < 0)
        status = refused("open", path);
    else
        status = check_bytes(descriptor, path, file, buffer, DSC_SHARD_CRC_BYTES);
    if (descriptor >= 0)
        (void)close(descriptor);
    dsc_free(buffer);
    return status;
}

enum dsc_status dsc_reader_check_file(struct dsc_reader *reader, uint32_t file) {
    const struct dsc_manifest_file *found = dsc_manifest_file(reader->manifest, file);
    const struct dsc_shard *shard;
    if (found->head_bytes == found->n_bytes)
        return check_other(reader, found);
    return shard_of(reader, file, &shard);
}

enum dsc_status dsc_reader_verify(struct dsc_reader *reader,
                                  bool (*progress)(void *context, uint64_t n_done), void *context) {
    const struct dsc_manifest *manifest = reader->manifest;
    uint64_t n_done = 0;
    for (uint32_t i = 0; i < dsc_manifest_n_files(manifest); i++) {
        DSC_TRY(dsc_reader_check_file(reader, i));
        n_done += dsc_manifest_file(manifest, i)->head_bytes;
        if (progress && !progress(context, n_done))
            return DSC_EINTR;
    }
    for (size_t i = 0; i < dsc_manifest_n_tensors(manifest); i++) {
        const struct dsc_manifest_tensor *tensor = dsc_manifest_tensor(manifest, i);
        const uint64_t size = dsc_shard_dtype_size(tensor->dtype);
        const uint64_t step = (64 << 20) / size;
        for (uint64_t at = 0, n; at < tensor->n_elems; at += n) {
            n = dsc_min(step, tensor->n_elems - at);
            DSC_TRY(dsc_reader_read(reader, tensor, at, n, NULL));
            n_done += n * size;
            if (progress && !progress(context, n_done))
                return DSC_EINTR;
        }
    }
    return DSC_OK;
}
