/* Lending the core's fp32 memory to tensors.
 *
 * Decides: what a lent tensor holds: an owner's share of the arena block, never a Python object, so
 * that its deleter runs in any thread and without the GIL. Invariant: a lent tensor stays readable
 * and writable when the engine is gone. */
#include "bind.h"
#include "lend.h"

#include "../alloc.h"
#include "../arena.h"

struct loan {
    DLManagedTensor managed;
    int64_t shape[1], strides[1];
    void *block;
    size_t block_bytes;
};

static void end_loan(DLManagedTensor *managed) {
    struct loan *loan = managed->manager_ctx;
    dsc_arena_free(loan->block, loan->block_bytes);
    dsc_free(loan);
}

/* A consumer renames the capsule and calls the deleter itself. */
static void drop_capsule(PyObject *capsule) {
    if (PyCapsule_IsValid(capsule, "dltensor"))
        end_loan(PyCapsule_GetPointer(capsule, "dltensor"));
}

PyObject *dsc_bind_lend(struct dsc_bind_state *state, const struct dsc_held *held) {
    struct loan *loan;
    enum dsc_status status = dsc_alloc(sizeof *loan, (void **)&loan);
    if (status != DSC_OK)
        return dsc_bind_raise(state, status);
    loan->shape[0] = (int64_t)held->n;
    loan->strides[0] = 1;
    loan->block = held->block;
    loan->block_bytes = held->block_bytes;
    loan->managed = (DLManagedTensor){
        .dl_tensor = {.data = held->values,
                      .device = {kDLCPU, 0},
                      .ndim = 1,
                      .dtype = {kDLFloat, 32, 1},
                      .shape = loan->shape,
                      .strides = loan->strides},
        .manager_ctx = loan,
        .deleter = end_loan,
    };
    dsc_arena_retain(loan->block, loan->block_bytes);
    PyObject *capsule = PyCapsule_New(&loan->managed, "dltensor", drop_capsule);
    if (!capsule)
        end_loan(&loan->managed);
    return capsule;
}
