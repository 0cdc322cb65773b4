/* Borrowing tensors. One function reads device, dtype, shape, strides and byte offset; the rest of
 * the binding sees struct dsc_borrowed only. Nothing is copied and no reference is kept: the view
 * is valid while the caller holds the tensor. */
#include "bind.h"

#include <string.h>

static const DLPackExchangeAPI *usable_table(PyTypeObject *type) {
    PyObject *capsule = PyObject_GetAttrString((PyObject *)type, "__dlpack_c_exchange_api__");
    if (!capsule) {
        PyErr_Clear(); /* an older torch: __dlpack__ serves */
        return NULL;
    }
    const DLPackExchangeAPI *api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    Py_DECREF(capsule); /* the type keeps the table alive */
    if (!api) {
        PyErr_Clear(); /* a capsule of another kind: __dlpack__ serves */
        return NULL;
    }
    if (api->header.version.major != DLPACK_MAJOR_VERSION || !api->dltensor_from_py_object_no_sync)
        return NULL;
    return api;
}

/* The table of a type, looked up once; NULL where it has none. The last place is reused when full.
 */
static const DLPackExchangeAPI *table_of(struct dsc_bind_state *state, PyTypeObject *type) {
    enum { N = sizeof state->exchange / sizeof state->exchange[0] };
    size_t i = 0;
    for (; i < N && state->exchange_type[i]; i++)
        if (state->exchange_type[i] == type)
            return state->exchange[i];
    if (i == N) {
        i--; /* outside of Py_CLEAR, which may evaluate its argument twice */
        Py_CLEAR(state->exchange_type[i]);
    }
    const DLPackExchangeAPI *api = usable_table(type);
    Py_INCREF(type);
    state->exchange_type[i] = type;
    state->exchange[i] = api;
    return api;
}

static int dtype_of(DLDataType type, enum dsc_dtype *out) {
    static const struct {
        uint8_t code, bits;
        enum dsc_dtype dtype;
    } known[] = {
        {kDLFloat, 32, DSC_F32}, {kDLBfloat, 16, DSC_BF16}, {kDLFloat, 16, DSC_F16},
        {kDLFloat, 64, DSC_F64}, {kDLInt, 32, DSC_I32},     {kDLInt, 64, DSC_I64},
    };
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (type.code == known[i].code && type.bits == known[i].bits && type.lanes == 1) {
            *out = known[i].dtype;
            return 0;
        }
    return -1;
}

static bool is_contiguous(const struct dsc_borrowed *t) {
    int64_t run = 1;
    for (int i = t->n_dims - 1; i >= 0; i--) {
        if (t->shape[i] != 1 && t->strides[i] != run)
            return false;
        run *= t->shape[i];
    }
    return true;
}

/* Dense: sorted by stride, each dimension's stride is the product of the smaller ones. */
static bool is_dense(const struct dsc_borrowed *t) {
    bool used[8] = {false};
    int64_t run = 1;
    for (int k = 0; k < t->n_dims; k++) {
        int best = -1;
        for (int i = 0; i < t->n_dims; i++)
            if (!used[i] && (best < 0 || t->strides[i] < t->strides[best] ||
                             (t->strides[i] == t->strides[best] && t->shape[i] == 1)))
                best = i;
        used[best] = true;
        if (t->shape[best] != 1 && t->strides[best] != run)
            return false;
        run *= t->shape[best];
    }
    return true;
}

/* Elements of a type that the core does not have, as bytes. */
static size_t bytes_of(DLDataType type) {
    return (size_t)type.bits * type.lanes % 8 == 0 ? (size_t)type.bits * type.lanes / 8 : 0;
}

static int describe(const DLTensor *tensor, const char *what, bool any, struct dsc_borrowed *out) {
    size_t scale = 1;
    if (tensor->ndim > 8) {
        PyErr_Format(PyExc_ValueError, "%s has %d dimensions, allowed: at most 8", what,
                     (int)tensor->ndim);
        return -1;
    }
    if (dtype_of(tensor->dtype, &out->dtype) < 0 && any && bytes_of(tensor->dtype) > 0) {
        out->dtype = DSC_U8;
        scale = bytes_of(tensor->dtype);
    } else if (dtype_of(tensor->dtype, &out->dtype) < 0) {
        PyErr_Format(
            PyExc_TypeError,
            "%s has a dtype that the core does not have (DLPack code %d, %d bits), allowed: "
            "float32, bfloat16, float16, float64, int32, int64",
            what, (int)tensor->dtype.code, (int)tensor->dtype.bits);
        return -1;
    }
    out->n_dims = tensor->ndim;
    out->n_elems = 1;
    for (int i = 0; i < tensor->ndim; i++) {
        out->shape[i] = tensor->shape[i];
        out->n_elems *= (size_t)tensor->shape[i];
    }
    int64_t run = 1;
    for (int i = tensor->ndim - 1; i >= 0; i--) {
        out->strides[i] = tensor->strides ? tensor->strides[i] : run;
        run *= tensor->shape[i];
    }
    out->on_cpu = tensor->device.device_type == kDLCPU;
    out->contiguous = out->n_elems <= 1 || is_contiguous(out);
    out->dense = out->contiguous || is_dense(out);
    out->data = out->n_elems ? (char *)tensor->data + tensor->byte_offset : NULL;
    out->n_elems *= scale;
    return 0;
}

/* __dlpack__ of a detached view. The capsule is dropped on return: its memory is the tensor's. */
static int borrow_by_capsule(struct dsc_bind_state *state, PyObject *tensor, const char *what,
                             bool any, struct dsc_borrowed *out) {
    int result = -1;
    PyObject *detached = NULL, *capsule = NULL;
    if (PyObject_HasAttrString(tensor, "detach"))
        detached = PyObject_CallMethod(tensor, "detach", NULL);
    else
        detached = Py_NewRef(tensor);
    if (!detached)
        goto out;
    capsule = PyObject_CallMethodNoArgs(detached, state->str_dlpack);
    if (!capsule) {
        if (PyErr_ExceptionMatches(PyExc_AttributeError))
            PyErr_Format(PyExc_TypeError, "%s must be a tensor, got %.100s", what,
                         Py_TYPE(tensor)->tp_name);
        goto out;
    }
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        result = describe(&managed->dl_tensor, what, any, out);
    } else {
        DLManagedTensor *managed = PyCapsule_GetPointer(capsule, "dltensor");
        if (managed)
            result = describe(&managed->dl_tensor, what, any, out);
    }
out:
    Py_XDECREF(capsule);
    Py_XDECREF(detached);
    return result;
}

static int borrow(struct dsc_bind_state *state, PyObject *tensor, const char *what, bool any,
                  struct dsc_borrowed *out) {
    const DLPackExchangeAPI *api = table_of(state, Py_TYPE(tensor));
    if (!api)
        return borrow_by_capsule(state, tensor, what, any, out);
    DLTensor view;
    memset(&view, 0, sizeof view);
    if (api->dltensor_from_py_object_no_sync(tensor, &view) != 0) {
        PyObject *type, *value, *trace;
        PyErr_Fetch(&type, &value, &trace);
        PyErr_Format(type ? type : PyExc_TypeError, "%s cannot be read: %S", what,
                     value ? value : Py_None);
        Py_XDECREF(type);
        Py_XDECREF(value);
        Py_XDECREF(trace);
        return -1;
    }
    return describe(&view, what, any, out);
}

int dsc_bind_borrow(struct dsc_bind_state *state, PyObject *tensor, const char *what,
                    struct dsc_borrowed *out) {
    return borrow(state, tensor, what, false, out);
}

int dsc_bind_borrow_any(struct dsc_bind_state *state, PyObject *tensor, const char *what,
                        struct dsc_borrowed *out) {
    return borrow(state, tensor, what, true, out);
}

bool dsc_bind_same_layout(const struct dsc_borrowed *a, const struct dsc_borrowed *b) {
    if (a->n_elems != b->n_elems)
        return false;
    if (a->contiguous && b->contiguous)
        return true;
    if (a->n_dims != b->n_dims)
        return false;
    for (int i = 0; i < a->n_dims; i++)
        if (a->shape[i] != b->shape[i] || (a->shape[i] != 1 && a->strides[i] != b->strides[i]))
            return false;
    return a->dense;
}

int dsc_bind_add_tensor(PyObject *module) {
    struct dsc_bind_state *state = dsc_bind_module_state(module);
    state->str_grad = PyUnicode_InternFromString("grad");
    state->str_requires_grad = PyUnicode_InternFromString("requires_grad");
    state->str_dlpack = PyUnicode_InternFromString("__dlpack__");
    return state->str_grad && state->str_requires_grad && state->str_dlpack ? 0 : -1;
}
