/* _core.plan: the planner's numbers as a dict; and the memory that there is. */
#include "engine_object.h"

#include "../alloc.h"
#include "../config.h"
#include "../memory_limit.h"
#include "../plan.h"

#include <string.h>

/* The type of a name as DSC_DTYPE_MAP has it; DSC_TRAIN_DTYPE_COUNT for what cannot be trained. */
static enum dsc_dtype dtype_named(const char *name) {
    for (int dtype = 0; dtype < (int)DSC_TRAIN_DTYPE_COUNT; dtype++)
        if (strcmp(dsc_dtype_name((enum dsc_dtype)dtype), name) == 0)
            return (enum dsc_dtype)dtype;
    return (enum dsc_dtype)DSC_TRAIN_DTYPE_COUNT;
}

/* [(n_elems, bytes of one, reduce group), ...] */
static int read_frozen(PyObject *list, size_t n_reduce, struct dsc_plan_frozen *frozen) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); i++) {
        Py_ssize_t n_elems, elem_size;
        int reduce;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(list, i), "nni:frozen", &n_elems, &elem_size,
                              &reduce))
            return -1;
        if (n_elems < 0 || elem_size < 1 || reduce < 0 || reduce >= (int)n_reduce) {
            PyErr_Format(PyExc_ValueError,
                         "frozen[%zd] is (%zd, %zd, %d); allowed: a number of elements, the bytes "
                         "of one, and one of %zu groups",
                         i, n_elems, elem_size, reduce, n_reduce);
            return -1;
        }
        frozen[i] = (struct dsc_plan_frozen){(size_t)n_elems, (size_t)elem_size, reduce};
    }
    return 0;
}

/* [(n_elems, dtype, reduce group), ...] */
static int read_params(PyObject *list, size_t n_reduce, struct dsc_param *params) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); i++) {
        Py_ssize_t n_elems;
        const char *dtype;
        int reduce;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(list, i), "nsi:params", &n_elems, &dtype, &reduce))
            return -1;
        params[i] = (struct dsc_param){
            .n_elems = (size_t)n_elems, .dtype = dtype_named(dtype), .reduce = reduce};
        if (n_elems < 0 || (int)params[i].dtype == (int)DSC_TRAIN_DTYPE_COUNT || reduce < 0 ||
            reduce >= (int)n_reduce) {
            PyErr_Format(PyExc_ValueError,
                         "params[%zd] is (%zd, '%s', %d); allowed: a number of elements, 'fp32', "
                         "'bf16' or 'fp16', and one of %zu groups",
                         i, n_elems, dtype, reduce, n_reduce);
            return -1;
        }
    }
    return 0;
}

/* ((n_ranks, stride, kept_elems, used_elems), ...) */
static int read_groups(PyObject *groups, struct dsc_plan_job *job) {
    job->n_reduce = (size_t)PyTuple_GET_SIZE(groups);
    if (job->n_reduce < 1 || job->n_reduce > DSC_REDUCE_MAX) {
        PyErr_Format(PyExc_ValueError, "%zu reduce groups; allowed: 1 to %d", job->n_reduce,
                     DSC_REDUCE_MAX);
        return -1;
    }
    for (size_t g = 0; g < job->n_reduce; g++) {
        struct dsc_plan_group *group = &job->reduce[g];
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(groups, (Py_ssize_t)g), "iinn:groups",
                              &group->n_ranks, &group->stride, &group->kept_elems,
                              &group->used_elems))
            return -1;
        if (group->n_ranks < 1 || group->stride < 1) {
            PyErr_Format(PyExc_ValueError, "groups[%zu] begins (%d, %d); allowed: numbers >= 1", g,
                         group->n_ranks, group->stride);
            return -1;
        }
    }
    return 0;
}

static int set_bytes(PyObject *dict, const char *name, size_t n_bytes) {
    PyObject *number = PyLong_FromSize_t(n_bytes);
    int failed = number ? PyDict_SetItemString(dict, name, number) : -1;
    Py_XDECREF(number);
    return failed;
}

static PyObject *dict_of(const struct dsc_plan *plan, double scale) {
    PyObject *own = PyDict_New(), *shared = PyDict_New(), *rank = PyDict_New();
    PyObject *node = PyDict_New(), *traffic = PyDict_New(), *file = PyDict_New(), *all = NULL;
    if (!own || !shared || !file || !rank || !node || !traffic)
        goto out;
    for (int k = 0; k < DSC_PLAN_KIND_COUNT; k++) {
        const char *name = dsc_plan_kind_name((enum dsc_plan_kind)k);
        if (set_bytes(own, name, plan->private_bytes[k]) < 0 ||
            set_bytes(shared, name, plan->shared_bytes[k]) < 0 ||
            set_bytes(file, name, plan->file_bytes[k]) < 0)
            goto out;
    }
    for (int k = 0; k < DSC_PLAN_PHASE_COUNT; k++) {
        const char *name = dsc_plan_phase_name((enum dsc_plan_phase)k);
        if (set_bytes(rank, name, plan->rank_bytes[k]) < 0 ||
            set_bytes(node, name, plan->node_bytes[k]) < 0)
            goto out;
    }
    for (int k = 0; k < DSC_PLAN_TRAFFIC_COUNT; k++) {
        const struct dsc_plan_bytes *t = &plan->traffic[k];
        PyObject *row = Py_BuildValue(
            "{sK sn sn sn}", "times", (unsigned long long)t->times, "sent", (Py_ssize_t)t->sent,
            "received", (Py_ssize_t)t->received, "between nodes", (Py_ssize_t)t->between_nodes);
        int failed = row ? PyDict_SetItemString(
                               traffic, dsc_plan_traffic_name((enum dsc_plan_traffic)k), row)
                         : -1;
        Py_XDECREF(row);
        if (failed < 0)
            goto out;
    }
    all = Py_BuildValue("{sO sO sO sO sO sO sd}", "private", own, "shared", shared, "file", file,
                        "rank", rank, "node", node, "traffic", traffic, "scale", scale);
out:
    Py_XDECREF(own);
    Py_XDECREF(shared);
    Py_XDECREF(file);
    Py_XDECREF(rank);
    Py_XDECREF(node);
    Py_XDECREF(traffic);
    return all;
}

PyDoc_STRVAR(
    plan_doc,
    "plan(config, optimizer, whole, params, groups, n_ranks, n_nodes, frozen, buffer_bytes,\n"
    "     given_bytes, cast_bytes, foreign_state_bytes, momentum, comm_bytes, n_bytes) -> dict\n\n"
    "Bytes that training takes. optimizer, whole: as Engine has them. params: list of (elements,\n"
    "'fp32', 'bf16' or 'fp16', reduce group) of what is trained. groups: ((ranks, stride, "
    "elements\n"
    "that stay gathered at stage 3, others that are used at a time), ...); the first has all "
    "ranks.\n"
    "frozen: list of (elements, bytes of one, reduce group). given_bytes: of the model as it is\n"
    "made; cast_bytes: of the largest parameter that is cast. foreign_state_bytes: per element.\n"
    "comm_bytes: (private, shared) of a rank's communicator. n_bytes: of a node; `scale` is by "
    "what\n"
    "every tensor can grow to fill it.\n"
    "The dict: private (fullest rank), shared and file (fullest node) {kind: bytes}, rank and "
    "node\n"
    "{phase: bytes}, traffic {what: {times, sent, received, between nodes}} of a step, scale.");

/* Fills what points to `params` and `frozen`, which the caller frees. */
static int read_model(struct dsc_plan_job *job, PyObject *params, PyObject *frozen,
                      struct dsc_param **param_list, struct dsc_plan_frozen **frozen_list) {
    struct dsc_plan_model *model = &job->model;
    model->n_params = (size_t)PyList_GET_SIZE(params);
    model->n_frozen = (size_t)PyList_GET_SIZE(frozen);
    if (dsc_alloc(model->n_params * sizeof **param_list, (void **)param_list) != DSC_OK ||
        dsc_alloc(model->n_frozen * sizeof **frozen_list, (void **)frozen_list) != DSC_OK) {
        PyErr_NoMemory();
        return -1;
    }
    model->params = *param_list;
    model->frozen = *frozen_list;
    return read_params(params, job->n_reduce, *param_list) < 0 ||
                   read_frozen(frozen, job->n_reduce, *frozen_list) < 0
               ? -1
               : 0;
}

static PyObject *make(struct dsc_bind_state *state, const struct dsc_plan_job *job,
                      size_t n_bytes) {
    struct dsc_plan made;
    double scale;
    enum dsc_status status = dsc_plan_make(job, 1.0, &made);
    if (status == DSC_OK)
        status = dsc_plan_fit(job, n_bytes, &scale);
    return status == DSC_OK ? dict_of(&made, scale) : dsc_bind_raise(state, status);
}

static PyObject *plan(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *keys[] = {"config",       "optimizer",   "whole",      "params",
                           "groups",       "n_ranks",     "n_nodes",    "frozen",
                           "buffer_bytes", "given_bytes", "cast_bytes", "foreign_state_bytes",
                           "momentum",     "comm_bytes",  "n_bytes",    NULL};
    struct dsc_bind_state *state = dsc_bind_module_state(module);
    PyObject *config, *params, *groups, *frozen; /* borrowed from args */
    const char *optimizer;
    int whole, momentum;
    Py_ssize_t n_bytes;
    enum dsc_optim_kind kind;
    struct dsc_plan_job job = {0};
    struct dsc_plan_model *model = &job.model;
    _Static_assert(sizeof(Py_ssize_t) == sizeof(size_t), "bytes are read as Py_ssize_t");
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OspO!O!iiO!nnndp(nn)n:plan", keys, &config,
                                     &optimizer, &whole, &PyList_Type, &params, &PyTuple_Type,
                                     &groups, &job.n_ranks, &job.n_nodes, &PyList_Type, &frozen,
                                     &model->buffer_bytes, &model->given_bytes, &model->cast_bytes,
                                     &model->foreign_state_bytes, &momentum,
                                     &job.comm_private_bytes, &job.comm_shared_bytes, &n_bytes))
        return NULL;
    const struct dsc_config *core_config = dsc_bind_config(state, config);
    if (!core_config || read_groups(groups, &job) < 0)
        return NULL;
    if (dsc_optim_find(optimizer, &kind) != DSC_OK)
        return dsc_bind_raise(state, DSC_EINVAL);
    struct dsc_engine_options options =
        dsc_bind_engine_options(core_config, kind, whole, 1, 0, job.reduce[0].n_ranks);
    job.options = &options;
    job.n_micro_steps = (uint64_t)core_config->gradient_accumulation_steps;
    model->momentum = momentum;
    job.params_in_files = strcmp(core_config->zero_offload_param_device, "nvme") == 0;
    job.fetch = (struct dsc_fetch_limits){
        .ahead = (size_t)core_config->zero_prefetch_bucket_size,
        .live = (size_t)core_config->zero_max_live_parameters,
        .reuse = (size_t)core_config->zero_max_reuse_distance,
    };
    struct dsc_param *param_list = NULL;
    struct dsc_plan_frozen *frozen_list = NULL;
    PyObject *result = NULL;
    if (read_model(&job, params, frozen, &param_list, &frozen_list) == 0)
        result = make(state, &job, (size_t)n_bytes);
    dsc_free(param_list);
    dsc_free(frozen_list);
    return result;
}

PyDoc_STRVAR(
    memory_limit_doc,
    "memory_limit() -> int or None\n\n"
    "Bytes that the memory control groups of this process allow; None where none has a limit.");

static PyObject *memory_limit(PyObject *module, PyObject *unused) {
    struct dsc_memory_limit limits[DSC_MEMORY_LIMITS];
    uint64_t least = UINT64_MAX;
    (void)module;
    (void)unused;
    for (size_t n = dsc_memory_limits("", limits); n > 0; n--)
        least = limits[n - 1].limit < least ? limits[n - 1].limit : least;
    if (least == UINT64_MAX)
        Py_RETURN_NONE;
    return PyLong_FromUnsignedLongLong(least);
}

static PyMethodDef functions[] = {
    {"memory_limit", memory_limit, METH_NOARGS, memory_limit_doc},
    {"plan", (PyCFunction)(void (*)(void))plan, METH_VARARGS | METH_KEYWORDS, plan_doc},
    {NULL},
};

int dsc_bind_add_plan(PyObject *module) {
    return PyModule_AddFunctions(module, functions);
}
