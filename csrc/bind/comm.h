/* Inside the binding of communicators: what comm.c (the type) and comm_calls.c (its operations)
 * share. */
#ifndef DSC_BIND_COMM_H
#define DSC_BIND_COMM_H

#include "bind.h"

#include "../comm/comm.h"

typedef struct {
    PyObject_HEAD struct dsc_comm *core; /* NULL once closed */
    PyObject *pending; /* list of Works, which keeps the tensors of what is under way */
    int n_messages;    /* synchronous ones under way, in any number of threads */
    bool busy, lent, closed;
} CommObject;

/* Under the GIL: the Comm is this call's until dsc_bind_comm_leave. -1 with an exception if it is
 * closed, or another thread's. */
int dsc_bind_comm_enter(CommObject *self, const char *what);
/* Ends that: None, or the exception of the status. */
PyObject *dsc_bind_comm_leave(CommObject *self, enum dsc_status status);

/* Takes the communicator out of a Comm that nobody else uses, which is then closed; NULL with an
 * exception. */
struct dsc_comm *dsc_bind_comm_take(struct dsc_bind_state *state, PyObject *comm);

/* Methods of Comm: name and arguments, as their documentation has them. */
#define DSC_BIND_COMM_CALLS(X)                                                                     \
    X(all_reduce, "(tensor, op='sum', label=None, is_async=False)\n\n"                             \
                  "Replaces every rank's tensor by all of them combined, in rank order.")          \
    X(reduce_scatter, "(output, input, op='sum', label=None, is_async=False)\n\n"                  \
                      "output: this rank's part of all ranks' inputs combined; input is size\n"    \
                      "times as long.")                                                            \
    X(all_gather, "(output, input, label=None, is_async=False)\n\n"                                \
                  "output: all ranks' inputs in rank order; it is size times as long as input.")   \
    X(broadcast, "(tensor, root=0, label=None, is_async=False)\n\n"                                \
                 "Replaces every rank's tensor by that of rank `root`.")                           \
    X(reduce, "(tensor, root=0, op='sum', label=None, is_async=False)\n\n"                         \
              "Replaces the root's tensor by all of them combined; the others' stay.")             \
    X(gather, "(output, input, root=0, label=None, is_async=False)\n\n"                            \
              "output, on the root: all ranks' inputs; elsewhere None.")                           \
    X(scatter, "(output, input, root=0, label=None, is_async=False)\n\n"                           \
               "output: this rank's part of the root's input, which is None elsewhere.")           \
    X(all_to_all, "(output, input, output_splits=None, input_splits=None, label=None,\n"           \
                  "is_async=False)\n\n"                                                            \
                  "Part r of output = this rank's part of rank r's input. Splits: elements per\n"  \
                  "rank, on all ranks or on none.")                                                \
    X(gather_parts,                                                                                \
      "(fulls, parts, cuts, label=None, is_async=False)\n\n"                                       \
      "fulls[i]: a tensor whose elements [cuts[i][r], cuts[i][r + 1]), in the order\n"             \
      "of memory, become rank r's parts[i]; cuts[i]: int64 tensor of size + 1. One\n"              \
      "operation for all of them. The label is compared, however long.")                           \
    X(barrier, "(label=None, is_async=False)\n\nReturns once every rank has called it.")           \
    X(send, "(tensor, to, tag=0, label=None, is_async=False)\n\n"                                  \
            "Returns when the tensor may be overwritten.")                                         \
    X(recv, "(tensor, source=-1, tag=0, label=None, is_async=False) -> int\n\n"                    \
            "The sender's rank; source -1 takes the first message with the tag.")

#define X(name, text) PyObject *dsc_bind_comm_##name(CommObject *self, PyObject *args);
DSC_BIND_COMM_CALLS(X)
#undef X

#endif
