/* Buckets of ranks that share no memory: one exchange is one walk of all ranks, in step, over
 * chunks of every owner's range. Each rank packs what it contributes to chunk k of each owner; one
 * operation (dsc_comm_part_sums) brings every owner what all ranks contribute to its own chunk, a
 * part per rank, or per node where a node's ranks add up first; it adds the parts in order.
 * Invariant: one order of additions at every stage; where a part is a rank's, it is that of shared
 * memory (bucket.c), with the same bits. Nothing travels as zeros, which change no sum. */
#include "bucket_impl.h"

#include "alloc.h"
#include "arena.h"
#include "kernels/kernels.h"

#include <string.h>

struct dsc__remote {
    char *send, *recv; /* slot_elems fp32 elements for each rank */
    size_t n_bytes;    /* of each */
    size_t *n_send;
    uint32_t n_rounds; /* exchanged in this step */
};

enum dsc_status dsc__remote_open(struct dsc_buckets *set) {
    struct dsc__remote *remote = NULL;
    size_t size = (size_t)set->size;
    DSC_TRY(dsc_alloc(sizeof *remote, (void **)&remote));
    set->remote = remote;
    remote->n_bytes = set->sizes.staging_bytes / 2;
    DSC_TRY(dsc_arena_alloc(remote->n_bytes, (void **)&remote->send));
    DSC_TRY(dsc_arena_alloc(remote->n_bytes, (void **)&remote->recv));
    DSC_TRY(dsc_alloc(size * sizeof(size_t), (void **)&remote->n_send));
    DSC_TRY(dsc_alloc(set->slot_elems / DSC_BLOCK * sizeof *set->squares, (void **)&set->squares));
    return dsc__bucket_hold(set);
}

void dsc__remote_close(struct dsc_buckets *set) {
    struct dsc__remote *remote = set->remote;
    dsc_arena_free(remote->send, remote->n_bytes);
    dsc_arena_free(remote->recv, remote->n_bytes);
    dsc_free(remote->n_send);
    dsc_free(remote);
}

void dsc__remote_reset(struct dsc_buckets *set) {
    set->remote->n_rounds = 0;
}

/* Chunk k of what a rank owns; may be empty. */
static struct dsc_range chunk_of(const struct dsc_buckets *set, int owner, size_t k) {
    struct dsc_range owned = dsc_space_owned(set->space, owner);
    struct dsc_range chunk = {owned.begin + k * set->slot_elems,
                              owned.begin + (k + 1) * set->slot_elems};
    return dsc_range_cut(chunk, owned);
}

static void pack(struct dsc_buckets *set, const struct dsc_source *source, size_t k) {
    struct dsc__remote *remote = set->remote;
    size_t elem_size = dsc_dtype_size(set->slot_dtype);
    char *to = remote->send;
    for (int r = 0; r < set->size; r++) {
        struct dsc_range chunk = chunk_of(set, r, k);
        remote->n_send[r] = dsc_range_size(chunk);
        if (source)
            dsc__bucket_pack(set, source, chunk, set->slot_dtype, to);
        else
            memset(to, 0, remote->n_send[r] * elem_size);
        to += remote->n_send[r] * elem_size;
    }
}

struct sum_job {
    const struct dsc_buckets *set;
    float *sums;
    size_t n; /* elements of this rank's chunk */
    size_t n_parts;
    enum dsc_dtype dtype; /* of the parts */
    bool takes_norm;
};

static void sum_blocks(void *context, size_t begin, size_t end) {
    const struct sum_job *job = context;
    const struct dsc_buckets *set = job->set;
    const struct dsc__remote *remote = set->remote;
    size_t elem_size = dsc_dtype_size(job->dtype);
    for (size_t block = begin; block < end; block++) {
        float *dst = job->sums + block * DSC_BLOCK;
        if (remote->n_rounds == 0)
            memset(dst, 0, DSC_BLOCK * sizeof *dst);
        else
            dsc__bucket_round_sums(set, dst);
        for (size_t p = 0; p < job->n_parts; p++)
            dsc_kernels()->accumulate[job->dtype](
                dst, remote->recv + (p * job->n + block * DSC_BLOCK) * elem_size, DSC_BLOCK, false);
        if (job->takes_norm)
            set->squares[block] = dsc_kernels()->sum_squares(dst, DSC_BLOCK);
    }
}

static void sum_chunk(struct dsc_buckets *set, struct dsc_range chunk, struct dsc_norm *norm) {
    size_t n = dsc_range_size(chunk);
    struct sum_job job = {.set = set,
                          .sums = set->private_sums + (chunk.begin - set->sizes.held.begin),
                          .n = n,
                          .n_parts = (size_t)dsc_comm_n_parts(set->comm),
                          .dtype = dsc_comm_part_dtype(set->comm, set->slot_dtype),
                          .takes_norm = norm};
    dsc_pool_run(set->options.pool, n / DSC_BLOCK, 32, sum_blocks, &job);
    for (size_t block = 0; norm && block < n / DSC_BLOCK; block++)
        dsc_norm_add(norm, set->squares[block]);
    set->counters.n_settled += n > 0;
    set->counters.n_bytes_settled += n * sizeof(float);
}

/* Every owner's sums of chunk k to all ranks; n: elements of the longest one. */
static enum dsc_status share_sums(struct dsc_buckets *set, size_t k, size_t n, const char *label) {
    struct dsc__remote *remote = set->remote;
    struct dsc_range own = chunk_of(set, set->rank, k);
    struct dsc_coll coll = {
        .src = remote->send, .dst = remote->recv, .n_elems = n, .dtype = DSC_F32, .label = label};
    memcpy(remote->send, set->private_sums + own.begin, dsc_range_size(own) * sizeof(float));
    DSC_TRY(dsc_comm_all_gather(set->comm, &coll));
    for (int r = 0; r < set->size; r++) {
        struct dsc_range chunk = chunk_of(set, r, k);
        memcpy(set->private_sums + chunk.begin, remote->recv + (size_t)r * n * sizeof(float),
               dsc_range_size(chunk) * sizeof(float));
    }
    return DSC_OK;
}

enum dsc_status dsc__remote_exchange(struct dsc_buckets *set, const struct dsc_source *source,
                                     struct dsc_norm *norm, const char *label) {
    struct dsc__remote *remote = set->remote;
    size_t most = dsc_space_most_owned(set->space);
    for (size_t k = 0; k * set->slot_elems < most; k++) {
        size_t n = dsc_min(set->slot_elems, most - k * set->slot_elems);
        struct dsc_coll coll = {.src = remote->send,
                                .dst = remote->recv,
                                .n_elems = n,
                                .dtype = set->slot_dtype,
                                .label = label};
        pack(set, source, k);
        struct dsc_range own = chunk_of(set, set->rank, k);
        DSC_TRY(dsc_comm_part_sums(set->comm, &coll, remote->n_send, dsc_range_size(own)));
        sum_chunk(set, own, norm);
        if (set->options.shared_sums)
            DSC_TRY(share_sums(set, k, n, label));
    }
    remote->n_rounds++;
    return DSC_OK;
}

void dsc_buckets_norm(struct dsc_buckets *set, struct dsc_norm *norm) {
    size_t n_own = dsc_range_size(dsc_space_owned(set->space, set->rank));
    for (size_t at = 0; at < n_own; at += set->slot_elems) {
        size_t n_blocks = dsc_min(set->slot_elems, n_own - at) / DSC_BLOCK;
        dsc__bucket_add_squares(set, dsc_buckets_sums(set, set->rank) + at, n_blocks, norm);
    }
}
