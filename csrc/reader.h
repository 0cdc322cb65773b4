/* Reading the tensors of a checkpoint through its manifest.
 *
 * Decides: which pieces an element range touches and which files are open. Invariant: what is given
 * out was checked: size and head of a file when it is opened, and every block of a piece that a
 * range touches. A file that nobody asks for need not be there. At most DSC_READER_OPEN files are
 * open at a time. One thread at a time. */
#ifndef DSC_READER_H
#define DSC_READER_H

#include "manifest.h"

enum { DSC_READER_OPEN = 64 };

struct dsc_reader;

/* manifest: closed; it outlives the reader. folder: where its files are. */
enum dsc_status dsc_reader_open(const struct dsc_manifest *manifest, const char *folder,
                                struct dsc_reader **out);
/* NULL is fine. */
void dsc_reader_close(struct dsc_reader *reader);

/* Elements [begin, begin + n) of a tensor of the manifest. out: NULL to check only. DSC_EDAMAGED
 * names file and tensor, DSC_EIO the file; `out` is undefined then. */
enum dsc_status dsc_reader_read(struct dsc_reader *reader, const struct dsc_manifest_tensor *tensor,
                                uint64_t begin, uint64_t n, void *out);
/* Size and head of a file, which is all of a file without tensors. */
enum dsc_status dsc_reader_check_file(struct dsc_reader *reader, uint32_t file);
/* Everything, to the first fault. progress, which may be NULL, hears how many bytes have been
 * looked at; false ends with DSC_EINTR. */
enum dsc_status dsc_reader_verify(struct dsc_reader *reader,
                                  bool (*progress)(void *context, uint64_t n_done), void *context);

#endif
