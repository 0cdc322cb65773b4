/* What the binding's files share: module state, the one mapping from status to exception, borrowing
 * of tensors.
 *
 * Decides: how C failures become Python exceptions. Invariant: every method parses, borrows,
 * releases the GIL, makes one core call, takes the GIL and converts the status; logic lives in the
 * core. */
#ifndef DSC_BIND_H
#define DSC_BIND_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dlpack/dlpack.h>

#include "../dsc.h"
#include "../pool.h"

struct dsc_comm;

/* One row per file of this folder that adds types or functions: dsc_bind_add_<name>(module). */
#define DSC_BIND_MAP(X)                                                                            \
    X(errors)                                                                                      \
    X(tensor)                                                                                      \
    X(team)                                                                                        \
    X(kernels)                                                                                     \
    X(config)                                                                                      \
    X(files)                                                                                       \
    X(schedule)                                                                                    \
    X(topo)                                                                                        \
    X(comm)                                                                                        \
    X(work)                                                                                        \
    X(store)                                                                                       \
    X(engine)                                                                                      \
    X(fetch)                                                                                       \
    X(plan)                                                                                        \
    X(stepper)                                                                                     \
    X(moe)                                                                                         \
    X(shard_writer)                                                                                \
    X(manifest)                                                                                    \
    X(reader)                                                                                      \
    X(folder)

#define X(name) int dsc_bind_add_##name(PyObject *module);
DSC_BIND_MAP(X)
#undef X

struct dsc_bind_state {
    PyObject *config_error;     /* deepspeed_c.DeepSpeedConfigError, a ValueError */
    PyObject *comm_error;       /* deepspeed_c.CommError, a RuntimeError */
    PyObject *checkpoint_error; /* deepspeed_c.CheckpointError, a RuntimeError */
    PyTypeObject *config_type, *comm_type, *work_type, *engine_type, *hook_type, *grid_type;
    PyTypeObject *reader_type, *folder_type;
    PyObject *str_grad, *str_requires_grad, *str_dlpack; /* interned names */
    /* Tensor types seen, with their exchange table: a plain tensor and a Parameter in practice. */
    PyTypeObject *exchange_type[4];
    const DLPackExchangeAPI *exchange[4];
    pid_t importer; /* the process that imported the module; another is a forked child */
};

extern struct PyModuleDef dsc_bind_module;
/* Borrowed from the module; `self` is an instance of any type of this module. */
struct dsc_bind_state *dsc_bind_state_of(PyTypeObject *defining_or_own_type);
struct dsc_bind_state *dsc_bind_module_state(PyObject *module);

/* Sets the exception for a failed status from the core's last error and returns NULL. With
 * DSC_EINTR the exception is already set. */
PyObject *dsc_bind_raise(struct dsc_bind_state *state, enum dsc_status status);

/* dsc_interrupt_fn for communicators: takes the GIL and runs pending signal handlers. */
bool dsc_bind_interrupted(void *context);

/* torch's own threads for the loops of the core, or none. */
struct dsc_team dsc_bind_team(const struct dsc_bind_state *state);

/* The values of a _core.Config, valid while the object lives; NULL with a TypeError for anything
 * else. */
struct dsc_config;
const struct dsc_config *dsc_bind_config(struct dsc_bind_state *state, PyObject *object);

/* A borrowed view of a tensor: valid until the caller gives up its reference to the object. */
struct dsc_borrowed {
    void *data;
    size_t n_elems;
    enum dsc_dtype dtype;
    bool on_cpu;
    bool contiguous; /* C order, or 0/1 elements */
    bool dense;      /* some permutation of dimensions is C order: memory is one run of elements */
    int n_dims;
    int64_t shape[8], strides[8]; /* n_dims <= 8, else DSC_EINVAL */
};
/* Reads a tensor without copying: DLPack's C exchange table where the type has it (one table
 * look-up per type, no allocation), else __dlpack__ on a detached view. Returns 0, or -1 with an
 * exception that names `what`. dtypes outside enum dsc_dtype are a TypeError. */
int dsc_bind_borrow(struct dsc_bind_state *state, PyObject *tensor, const char *what,
                    struct dsc_borrowed *out);

/* The same for what is only moved: elements of any other type are DSC_U8, and n_elems then counts
 * bytes. */
int dsc_bind_borrow_any(struct dsc_bind_state *state, PyObject *tensor, const char *what,
                        struct dsc_borrowed *out);

/* Whether two dense tensors have their elements in the same order. */
bool dsc_bind_same_layout(const struct dsc_borrowed *a, const struct dsc_borrowed *b);

/* A new one-dimensional NumPy array of DSC_F32, DSC_F64 or DSC_I64 and its memory, or NULL with an
 * exception. Imports NumPy when first called. */
PyObject *dsc_bind_array(enum dsc_dtype dtype, Py_ssize_t count, void **data);

/* A new Work around `core`, which it takes over or, on failure, gives up. `keep` (a new reference,
 * taken over) stays alive until the operation has ended. `pending` is the list that keeps the Work;
 * those that have ended leave it. */
struct dsc_work;
PyObject *dsc_bind_work(struct dsc_bind_state *state, struct dsc_work *core, PyObject *keep,
                        PyObject *pending);

/* The communicator of a Comm, borrowed: valid while the caller holds a reference to the object,
 * also after its close() (calls then fail). NULL with TypeError for another object, with
 * RuntimeError for a closed Comm. */
struct dsc_comm *dsc_bind_comm(struct dsc_bind_state *state, PyObject *comm);

/* Whether the interpreter is on its way out, when a thread must not ask for the GIL. */
bool dsc_bind_interpreter_ends(void);

/* A Comm around a communicator, which it takes over or, on failure, closes. */
PyObject *dsc_bind_wrap_comm(PyTypeObject *type, struct dsc_comm *core);
/* Comm.delegate; see delegate.c. */
extern const char dsc_bind_delegate_doc[];
PyObject *dsc_bind_delegate(PyObject *type, PyObject *args);

#endif
