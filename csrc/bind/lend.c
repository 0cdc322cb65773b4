/* Lending the core's memory to tensors.
 *
 * Decides: what a lent tensor holds: an owner's share of the block, never a Python object, so that
 * its deleter runs in any thread and without the GIL. Invariant: a lent tensor stays readable and
 * writable when the engine or the store is gone. */
#include "bind.h"
#include "lend.h"

#include "../alloc.h"
#include "../arena.h"

struct loan {
    DLManagedTensor managed;
    int64_t shape[1], strides[1];
    struct dsc_lent lent;
};

static void end_loan(DLManagedTensor *managed) {
    struct loan *loan = managed->manager_ctx;
    loan->lent.release(loan->lent.owner, loan->lent.owner_bytes);
    dsc_free(loan);
}

/* A consumer renames the capsule and calls the deleter itself. */
static void drop_capsule(PyObject *capsule) {
    if (PyCapsule_IsValid(capsule, "dltensor"))
        end_loan(PyCapsule_GetPointer(capsule, "dltensor"));
}

PyObject *dsc_bind_lend(struct dsc_bind_state *state, const struct dsc_lent *lent) {
    struct loan *loan;
    enum dsc_status status = dsc_alloc(sizeof *loan, (void **)&loan);
    if (status != DSC_OK) {
        lent->release(lent->owner, lent->owner_bytes);
        return dsc_bind_raise(state, status);
    }
    loan->shape[0] = (int64_t)lent->n_elems;
    loan->strides[0] = 1;
    loan->lent = *lent;
    loan->managed = (DLManagedTensor){
        .dl_tensor = {.data = lent->data,
                      .device = {kDLCPU, 0},
                      .ndim = 1,
                      .dtype = lent->type,
                      .shape = loan->shape,
                      .strides = loan->strides},
        .manager_ctx = loan,
        .deleter = end_loan,
    };
    PyObject *capsule = PyCapsule_New(&loan->managed, "dltensor", drop_capsule);
    if (!capsule)
        end_loan(&loan->managed);
    return capsule;
}

PyObject *dsc_bind_lend_held(struct dsc_bind_state *state, const struct dsc_held *held) {
    dsc_arena_retain(held->block, held->block_bytes);
    return dsc_bind_lend(state, &(struct dsc_lent){.data = held->values,
                                                   .n_elems = held->n,
                                                   .type = {kDLFloat, 32, 1},
                                                   .owner = held->block,
                                                   .owner_bytes = held->block_bytes,
                                                   .release = dsc_arena_free});
}
