/* Comm.gather_parts: the parts of many tensors, each on its rank, into the whole tensors of all.
 *
 * Invariant: as in comm_calls.c; what is gathered is cut in elements, in the order of memory. */
#include "comm.h"

/* One tensor of the call. */
struct whole {
    char *data, *part;
    size_t elem_bytes;
    const int64_t *cuts;
};

static struct dsc_bind_state *state_of(CommObject *self) {
    return dsc_bind_state_of(Py_TYPE(self));
}

static size_t elem_bytes(const struct dsc_borrowed *t) {
    size_t n = 1;
    for (int i = 0; i < t->n_dims; i++)
        n *= (size_t)t->shape[i];
    return n > 0 ? t->n_elems * dsc_dtype_size(t->dtype) / n : 1;
}

static int check_cuts(CommObject *self, Py_ssize_t i, const struct dsc_borrowed *cuts) {
    const int64_t *cut = cuts->data;
    Py_ssize_t size = dsc_comm_size(self->core);
    bool is_good = cuts->dtype == DSC_I64 && cuts->on_cpu && cuts->contiguous &&
                   cuts->n_elems == (size_t)size + 1 && cut[0] == 0;
    for (Py_ssize_t r = 0; is_good && r < size; r++)
        is_good = cut[r] <= cut[r + 1];
    if (is_good)
        return 0;
    PyErr_Format(PyExc_ValueError,
                 "gather_parts: cuts[%zd] must be %zd ascending int64 numbers from 0 on, a part "
                 "for each rank",
                 i, size + 1);
    return -1;
}

/* The borrowed memory stays where it is as long as the tensors, which the caller's sequences hold.
 */
static int borrow_whole(CommObject *self, Py_ssize_t i, PyObject *full, PyObject *part,
                        PyObject *cuts, struct whole *out) {
    struct dsc_borrowed all, mine, edges;
    int rank = dsc_comm_rank(self->core), size = dsc_comm_size(self->core);
    if (dsc_bind_borrow(state_of(self), cuts, "cuts", &edges) < 0 ||
        check_cuts(self, i, &edges) < 0 ||
        dsc_bind_borrow_any(state_of(self), full, "fulls", &all) < 0 ||
        dsc_bind_borrow_any(state_of(self), part, "parts", &mine) < 0)
        return -1;
    *out = (struct whole){all.data, mine.data, elem_bytes(&all), edges.data};
    size_t n_mine = (size_t)(out->cuts[rank + 1] - out->cuts[rank]) * out->elem_bytes;
    if (all.on_cpu && mine.on_cpu && all.dense && mine.contiguous && all.dtype == mine.dtype &&
        all.n_elems * dsc_dtype_size(all.dtype) == (size_t)out->cuts[size] * out->elem_bytes &&
        mine.n_elems * dsc_dtype_size(mine.dtype) == n_mine)
        return 0;
    PyErr_Format(PyExc_ValueError,
                 "gather_parts: fulls[%zd] (%zu elements of %s) and parts[%zd] (%zu of %s) must be "
                 "runs of %lld and %zu bytes on the CPU, as cuts[%zd] says",
                 i, all.n_elems, dsc_dtype_name(all.dtype), i, mine.n_elems,
                 dsc_dtype_name(mine.dtype),
                 (long long)out->cuts[size] * (long long)out->elem_bytes, n_mine, i);
    return -1;
}

/* Sorted by owner: what a rank has of all tensors travels together. Returns how many. */
static size_t make_pieces(const struct whole *wholes, Py_ssize_t n, int size,
                          struct dsc_piece *pieces) {
    size_t n_pieces = 0;
    for (int r = 0; r < size; r++)
        for (Py_ssize_t i = 0; i < n; i++) {
            const struct whole *w = &wholes[i];
            size_t n_bytes = (size_t)(w->cuts[r + 1] - w->cuts[r]) * w->elem_bytes;
            if (n_bytes > 0)
                pieces[n_pieces++] = (struct dsc_piece){
                    r, w->part, w->data + (size_t)w->cuts[r] * w->elem_bytes, n_bytes};
        }
    return n_pieces;
}

static PyObject *run(CommObject *self, const char *label, const struct dsc_piece *pieces,
                     size_t n_pieces, PyObject *keep) {
    struct dsc_work *work = NULL;
    enum dsc_status status;
    if (keep) {
        status = dsc_comm_post_pieces(self->core, label, pieces, n_pieces, &work);
        return status == DSC_OK
                   ? dsc_bind_work(state_of(self), work, Py_NewRef(keep), self->pending)
                   : dsc_bind_raise(state_of(self), status);
    }
    if (dsc_bind_comm_enter(self, "gather_parts") < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    status = dsc_comm_gather_pieces(self->core, label, pieces, n_pieces);
    Py_END_ALLOW_THREADS;
    return dsc_bind_comm_leave(self, status);
}

/* keep: the three tuples, which hold what is borrowed. */
static PyObject *gather(CommObject *self, PyObject *keep, const char *label, bool is_async) {
    PyObject *fulls = PyTuple_GET_ITEM(keep, 0), *parts = PyTuple_GET_ITEM(keep, 1);
    PyObject *cuts = PyTuple_GET_ITEM(keep, 2), *result = NULL;
    Py_ssize_t n = PyTuple_GET_SIZE(fulls);
    size_t size = (size_t)dsc_comm_size(self->core), n_pieces = 0;
    struct whole *wholes = PyMem_New(struct whole, (size_t)n + 1);
    struct dsc_piece *pieces = PyMem_New(struct dsc_piece, (size_t)n * size + 1);
    if (!wholes || !pieces) {
        PyErr_NoMemory();
        goto out;
    }
    for (Py_ssize_t i = 0; i < n; i++)
        if (borrow_whole(self, i, PyTuple_GET_ITEM(fulls, i), PyTuple_GET_ITEM(parts, i),
                         PyTuple_GET_ITEM(cuts, i), &wholes[i]) < 0)
            goto out;
    n_pieces = make_pieces(wholes, n, (int)size, pieces);
    result = run(self, label, pieces, n_pieces, is_async ? keep : NULL);
out:
    PyMem_Free(wholes);
    PyMem_Free(pieces);
    return result;
}

PyObject *dsc_bind_comm_gather_parts(CommObject *self, PyObject *args) {
    PyObject *given[3], *keep = NULL, *result = NULL;
    const char *label = NULL;
    int is_async = 0;
    if (!PyArg_ParseTuple(args, "OOO|zp:gather_parts", &given[0], &given[1], &given[2], &label,
                          &is_async))
        return NULL;
    if (self->closed)
        return PyErr_Format(PyExc_RuntimeError, "gather_parts: this Comm is closed");
    PyObject *fulls = PySequence_Tuple(given[0]), *parts = NULL, *cuts = NULL;
    parts = fulls ? PySequence_Tuple(given[1]) : NULL;
    cuts = parts ? PySequence_Tuple(given[2]) : NULL;
    keep = cuts ? PyTuple_Pack(3, fulls, parts, cuts) : NULL;
    if (keep && (PyTuple_GET_SIZE(fulls) != PyTuple_GET_SIZE(parts) ||
                 PyTuple_GET_SIZE(fulls) != PyTuple_GET_SIZE(cuts)))
        PyErr_Format(PyExc_ValueError,
                     "gather_parts: %zd fulls, %zd parts and %zd cuts; as many "
                     "of each are expected",
                     PyTuple_GET_SIZE(fulls), PyTuple_GET_SIZE(parts), PyTuple_GET_SIZE(cuts));
    else if (keep)
        result = gather(self, keep, label, is_async);
    Py_XDECREF(keep);
    Py_XDECREF(cuts);
    Py_XDECREF(parts);
    Py_XDECREF(fulls);
    return result;
}
