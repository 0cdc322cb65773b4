/* The extension module deepspeed_c._core: module state and the list of what it holds.
 *
 * Invariant: multi-phase initialisation, no static PyObject; sub-interpreters are declared not
 * supported, as torch and NumPy do not support them either. */
#include "bind.h"

struct dsc_bind_state *dsc_bind_module_state(PyObject *module) {
    return PyModule_GetState(module);
}

struct dsc_bind_state *dsc_bind_state_of(PyTypeObject *type) {
    return PyModule_GetState(PyType_GetModule(type));
}

#ifdef __clang__
#define COMPILER "clang"
#else
#define COMPILER "gcc"
#endif

static int module_exec(PyObject *module) {
#define X(name)                                                                                    \
    if (dsc_bind_add_##name(module) < 0)                                                           \
        return -1;
    DSC_BIND_MAP(X)
#undef X
    return PyModule_AddStringConstant(module, "compiler", COMPILER " " __VERSION__);
}

#define DSC_BIND_STATE_OBJECTS(X)                                                                  \
    X(config_error)                                                                                \
    X(comm_error)                                                                                  \
    X(checkpoint_error)                                                                            \
    X(config_type)                                                                                 \
    X(comm_type)                                                                                   \
    X(work_type)                                                                                   \
    X(engine_type)                                                                                 \
    X(hook_type)                                                                                   \
    X(grid_type)                                                                                   \
    X(reader_type)                                                                                 \
    X(folder_type)                                                                                 \
    X(str_grad)                                                                                    \
    X(str_requires_grad)                                                                           \
    X(str_dlpack) X(exchange_type[0]) X(exchange_type[1]) X(exchange_type[2]) X(exchange_type[3])

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    struct dsc_bind_state *state = dsc_bind_module_state(module);
#define X(name) Py_VISIT(state->name);
    DSC_BIND_STATE_OBJECTS(X)
#undef X
    return 0;
}

static int module_clear(PyObject *module) {
    struct dsc_bind_state *state = dsc_bind_module_state(module);
#define X(name) Py_CLEAR(state->name);
    DSC_BIND_STATE_OBJECTS(X)
#undef X
    return 0;
}

static void module_free(void *module) {
    (void)module_clear(module);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, module_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

struct PyModuleDef dsc_bind_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "deepspeed_c._core",
    .m_doc = "The C core of deepspeed_c.",
    .m_size = sizeof(struct dsc_bind_state),
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__core(void) {
    return PyModuleDef_Init(&dsc_bind_module);
}
