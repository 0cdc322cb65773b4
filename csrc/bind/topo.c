/* The type Grid, lay_out() and lay_out_experts(): csrc/topo.h for Python.
 *
 * A Grid is a plain value that never changes; groups come back as lists of ints. */
#include "bind.h"

#include "../topo.h"

typedef struct {
    PyObject_HEAD struct dsc_topo topo;
} GridObject;

static PyObject *wrap(PyTypeObject *type, const struct dsc_topo *topo) {
    GridObject *self = (GridObject *)type->tp_alloc(type, 0);
    if (self)
        self->topo = *topo;
    return (PyObject *)self;
}

/* Fills names and sizes from two sequences (of PySequence_Fast) of equal length; -1 with an
 * exception. Names stay owned by the sequence. */
static int read_dims(PyObject *names, PyObject *sizes, const char *name[], int64_t size[]) {
    const Py_ssize_t n = PySequence_Fast_GET_SIZE(names);
    if (n != PySequence_Fast_GET_SIZE(sizes) || n > DSC_TOPO_MAX_DIMS) {
        PyErr_Format(PyExc_ValueError, "%zd names and %zd sizes; allowed: as many, at most %d", n,
                     PySequence_Fast_GET_SIZE(sizes), DSC_TOPO_MAX_DIMS);
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        name[i] = PyUnicode_AsUTF8(PySequence_Fast_GET_ITEM(names, i));
        size[i] = name[i] ? PyLong_AsLongLong(PySequence_Fast_GET_ITEM(sizes, i)) : 0;
        if (PyErr_Occurred())
            return -1;
    }
    return 0;
}

static PyObject *grid_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *keys[] = {"names", "sizes", NULL};
    PyObject *names, *sizes, *self = NULL;
    const char *name[DSC_TOPO_MAX_DIMS];
    int64_t size[DSC_TOPO_MAX_DIMS];
    struct dsc_topo topo;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:Grid", keys, &names, &sizes))
        return NULL;
    names = PySequence_Tuple(names);
    sizes = PySequence_Tuple(sizes);
    if (names && sizes && read_dims(names, sizes, name, size) == 0) {
        const enum dsc_status status =
            dsc_topo_make(name, size, (int)PyTuple_GET_SIZE(names), &topo);
        self =
            status == DSC_OK ? wrap(type, &topo) : dsc_bind_raise(dsc_bind_state_of(type), status);
    }
    Py_XDECREF(names);
    Py_XDECREF(sizes);
    return self;
}

/* A family from names of dimensions, parts, across; 0, or -1 with an exception. */
static int read_family(GridObject *self, PyObject *dims, long long n_parts, int across,
                       struct dsc_topo_family *out) {
    struct dsc_topo_family family = {.n_parts = n_parts, .across = across};
    dims = PySequence_Tuple(dims);
    for (Py_ssize_t i = 0; dims && i < PyTuple_GET_SIZE(dims); i++) {
        const char *name = PyUnicode_AsUTF8(PyTuple_GET_ITEM(dims, i));
        const int dim = name ? dsc_topo_find(&self->topo, name) : -1;
        if (name && dim < 0)
            PyErr_Format(PyExc_ValueError, "the grid has no dimension '%.60s'", name);
        if (dim < 0)
            Py_CLEAR(dims);
        else
            family.dims |= UINT32_C(1) << dim;
    }
    if (!dims)
        return -1;
    Py_DECREF(dims);
    const enum dsc_status status = dsc_topo_check(&self->topo, &family);
    *out = family;
    if (status == DSC_OK)
        return 0;
    dsc_bind_raise(dsc_bind_state_of(Py_TYPE(self)), status);
    return -1;
}

static int check_rank(GridObject *self, long long rank) {
    if (rank >= 0 && rank < self->topo.n_ranks)
        return 0;
    PyErr_Format(PyExc_ValueError, "rank %lld; the grid has ranks 0 to %lld", rank,
                 (long long)self->topo.n_ranks - 1);
    return -1;
}

static PyObject *list_group(GridObject *self, const struct dsc_topo_family *family, int64_t group) {
    const int64_t n = dsc_topo_n_members(&self->topo, family);
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (int64_t i = 0; list && i < n; i++) {
        const struct dsc_topo_place place = {group, i};
        PyObject *rank = PyLong_FromLongLong(dsc_topo_member(&self->topo, family, place));
        if (!rank)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, rank);
    }
    return list;
}

PyDoc_STRVAR(
    group_doc,
    "group(rank, dims, n_parts=1, across=False) -> list of int\n\n"
    "The ranks, ascending, that differ from `rank` along the dimensions named in `dims` only,\n"
    "rank included. n_parts: cut into this many runs, of which that with `rank` is given;\n"
    "across: the ranks at its place of each run instead. ValueError with the numbers.");

static PyObject *grid_group(GridObject *self, PyObject *args, PyObject *kwargs) {
    static char *keys[] = {"rank", "dims", "n_parts", "across", NULL};
    struct dsc_topo_family family;
    PyObject *dims;
    long long rank, n_parts = 1;
    int across = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "LO|Lp:group", keys, &rank, &dims, &n_parts,
                                     &across) ||
        check_rank(self, rank) < 0 || read_family(self, dims, n_parts, across, &family) < 0)
        return NULL;
    return list_group(self, &family, dsc_topo_place(&self->topo, &family, rank).group);
}

PyDoc_STRVAR(groups_doc,
             "groups(dims, n_parts=1, across=False) -> list of lists of int\n\n"
             "All groups of which group() gives one: every rank is in exactly one of them.");

static PyObject *grid_groups(GridObject *self, PyObject *args, PyObject *kwargs) {
    static char *keys[] = {"dims", "n_parts", "across", NULL};
    struct dsc_topo_family family;
    PyObject *dims;
    long long n_parts = 1;
    int across = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|Lp:groups", keys, &dims, &n_parts, &across) ||
        read_family(self, dims, n_parts, across, &family) < 0)
        return NULL;
    const int64_t n = dsc_topo_n_groups(&self->topo, &family);
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (int64_t i = 0; list && i < n; i++) {
        PyObject *group = list_group(self, &family, i);
        if (!group)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, group);
    }
    return list;
}

PyDoc_STRVAR(coordinates_doc, "coordinates(rank) -> tuple of int, one per dimension");

static PyObject *grid_coordinates(GridObject *self, PyObject *arg) {
    const long long rank = PyLong_AsLongLong(arg);
    if ((rank == -1 && PyErr_Occurred()) || check_rank(self, rank) < 0)
        return NULL;
    PyObject *tuple = PyTuple_New(self->topo.n_dims);
    for (int i = 0; tuple && i < self->topo.n_dims; i++) {
        PyObject *item = PyLong_FromLongLong(dsc_topo_coordinate(&self->topo, i, rank));
        if (!item)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, i, item);
    }
    return tuple;
}

PyDoc_STRVAR(rank_doc, "rank(coordinates) -> int\n\n"
                       "The inverse of coordinates(); ValueError naming the one out of range.");

static PyObject *grid_rank(GridObject *self, PyObject *arg) {
    int64_t coordinates[DSC_TOPO_MAX_DIMS], rank;
    PyObject *given = PySequence_Tuple(arg);
    if (!given)
        return NULL;
    const Py_ssize_t n = PyTuple_GET_SIZE(given);
    if (n != self->topo.n_dims)
        PyErr_Format(PyExc_ValueError, "%zd coordinates for %d dimensions", n, self->topo.n_dims);
    for (Py_ssize_t i = 0; i < n && !PyErr_Occurred(); i++)
        coordinates[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(given, i));
    Py_DECREF(given);
    if (PyErr_Occurred())
        return NULL;
    const enum dsc_status status = dsc_topo_rank(&self->topo, coordinates, &rank);
    if (status != DSC_OK)
        return dsc_bind_raise(dsc_bind_state_of(Py_TYPE(self)), status);
    return PyLong_FromLongLong(rank);
}

/* A tuple of every dimension's name or size. */
static PyObject *per_dim(GridObject *self, void *wants_size) {
    PyObject *tuple = PyTuple_New(self->topo.n_dims);
    for (int i = 0; tuple && i < self->topo.n_dims; i++) {
        const struct dsc_topo_dim *dim = &self->topo.dim[i];
        PyObject *item =
            wants_size ? PyLong_FromLongLong(dim->size) : PyUnicode_FromString(dim->name);
        if (!item)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, i, item);
    }
    return tuple;
}

static PyObject *grid_n_ranks(GridObject *self, void *unused) {
    (void)unused;
    return PyLong_FromLongLong(self->topo.n_ranks);
}

static void grid_dealloc(GridObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyGetSetDef grid_getset[] = {
    {"names", (getter)per_dim, NULL, "The dimensions' names, the fastest first.", NULL},
    {"sizes", (getter)per_dim, NULL, "Their sizes.", (void *)1},
    {"n_ranks", (getter)grid_n_ranks, NULL, "The product of the sizes.", NULL},
    {NULL},
};

static PyMethodDef grid_methods[] = {
    {"group", (PyCFunction)(void (*)(void))grid_group, METH_VARARGS | METH_KEYWORDS, group_doc},
    {"groups", (PyCFunction)(void (*)(void))grid_groups, METH_VARARGS | METH_KEYWORDS, groups_doc},
    {"coordinates", (PyCFunction)grid_coordinates, METH_O, coordinates_doc},
    {"rank", (PyCFunction)grid_rank, METH_O, rank_doc},
    {NULL},
};

PyDoc_STRVAR(grid_doc, "Grid(names, sizes)\n\n"
                       "Ranks as a grid of named dimensions, the fastest first: rank = the sum of\n"
                       "coordinate * product of the sizes before. ValueError names the dimension.");

static PyType_Slot grid_slots[] = {
    {Py_tp_doc, (void *)grid_doc}, {Py_tp_new, grid_new},       {Py_tp_dealloc, grid_dealloc},
    {Py_tp_methods, grid_methods}, {Py_tp_getset, grid_getset}, {0, NULL},
};

static PyType_Spec grid_spec = {
    .name = "deepspeed_c._core.Grid",
    .basicsize = sizeof(GridObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = grid_slots,
};

PyDoc_STRVAR(
    lay_out_doc,
    "lay_out(n_ranks, order, tensor=1, pipe=1, context=1, sequence=1, expert=1,\n"
    "        expert_tensor=0, n_instances=1) -> (Grid, Grid)\n\n"
    "The ranks of a job as two grids of tp, ep, dp, pp, cp, sp in `order`: of what is not\n"
    "an expert's, and of experts. expert_tensor 0: as tensor. ValueError with the numbers.");

static PyObject *lay_out(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *keys[] = {"n_ranks",  "order",  "tensor",        "pipe",        "context",
                           "sequence", "expert", "expert_tensor", "n_instances", NULL};
    struct dsc_bind_state *state = dsc_bind_module_state(module);
    long long n_ranks, tensor = 1, pipe = 1, context = 1, sequence = 1, expert = 1;
    long long expert_tensor = 0, n_instances = 1;
    const char *order;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Ls|LLLLLLL:lay_out", keys, &n_ranks, &order,
                                     &tensor, &pipe, &context, &sequence, &expert, &expert_tensor,
                                     &n_instances))
        return NULL;
    const struct dsc_topo_sizes sizes = {tensor, pipe,          context,    sequence,
                                         expert, expert_tensor, n_instances};
    struct dsc_topo_layout layout;
    const enum dsc_status status = dsc_topo_lay_out(&sizes, order, n_ranks, &layout);
    if (status != DSC_OK)
        return dsc_bind_raise(state, status);
    PyObject *shared = wrap(state->grid_type, &layout.shared);
    PyObject *experts = shared ? wrap(state->grid_type, &layout.experts) : NULL;
    PyObject *both = experts ? PyTuple_Pack(2, shared, experts) : NULL;
    Py_XDECREF(shared);
    Py_XDECREF(experts);
    return both;
}

PyDoc_STRVAR(experts_doc,
             "lay_out_experts(n_ranks, expert, tensor=1, pipe=1, data_first=False) -> Grid\n\n"
             "The ranks of a job as MoE layers group them: tp, ep, dp, pp, or with data_first\n"
             "tp, dp, ep, pp. ValueError with the numbers.");

static PyObject *lay_out_experts(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *keys[] = {"n_ranks", "expert", "tensor", "pipe", "data_first", NULL};
    struct dsc_bind_state *state = dsc_bind_module_state(module);
    long long n_ranks, expert, tensor = 1, pipe = 1;
    int data_first = 0;
    struct dsc_topo topo;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "LL|LLp:lay_out_experts", keys, &n_ranks,
                                     &expert, &tensor, &pipe, &data_first))
        return NULL;
    const enum dsc_status status =
        dsc_topo_experts(n_ranks, expert, tensor, pipe, data_first, &topo);
    return status == DSC_OK ? wrap(state->grid_type, &topo) : dsc_bind_raise(state, status);
}

static PyMethodDef functions[] = {
    {"lay_out", (PyCFunction)(void (*)(void))lay_out, METH_VARARGS | METH_KEYWORDS, lay_out_doc},
    {"lay_out_experts", (PyCFunction)(void (*)(void))lay_out_experts, METH_VARARGS | METH_KEYWORDS,
     experts_doc},
    {NULL},
};

int dsc_bind_add_topo(PyObject *module) {
    struct dsc_bind_state *state = dsc_bind_module_state(module);
    state->grid_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &grid_spec, NULL);
    if (!state->grid_type || PyModule_AddType(module, state->grid_type) < 0)
        return -1;
    return PyModule_AddFunctions(module, functions);
}
