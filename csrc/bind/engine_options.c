/* From the configuration to what the core's engine is opened with.
 *
 * Decides: which keys mean what together (a loss scale also under torch_autocast in fp16, and so
 * on); nothing here reads Python. */
#include "engine_object.h"

#include "../config.h"

#include <math.h>
#include <string.h>

/* Then the loss needs a scale, as in fp16 mode. */
static bool autocasts_to_f16(const struct dsc_config *config) {
    return config->torch_autocast_enabled && strstr(config->torch_autocast_dtype, "bfloat") == NULL;
}

static bool skips_nonfinite(const struct dsc_config *config) {
    if (config->fp16_enabled || autocasts_to_f16(config))
        return true;
    return config->bf16_enabled ? config->bf16_check_grad_overflow
                                : config->fp32_check_grad_overflow;
}

/* The type that a key names; DSC_F32 where it names none. */
static enum dsc_dtype dtype_of(const char *name) {
    if (name && strcmp(name, "bf16") == 0)
        return DSC_BF16;
    if (name && strcmp(name, "bfp16") == 0) /* upstream's other spelling */
        return DSC_BF16;
    return name && strcmp(name, "fp16") == 0 ? DSC_F16 : DSC_F32;
}

/* Sums of gradients are fp32, so only a type with 16 bits changes what travels. */
static struct dsc_wire wire_of(const struct dsc_config *config, int n_averaged) {
    struct dsc_wire wire = {.dtype = dtype_of(config->communication_data_type)};
    wire.narrow = wire.dtype != DSC_F32;
    if (strcmp(config->gradient_allreduce_op, "sum") == 0)
        return wire;
    if (config->prescale_gradients)
        wire.divisor = (float)n_averaged;
    else if (config->gradient_predivide_factor != 1.0)
        wire.divisor = (float)config->gradient_predivide_factor;
    return wire;
}

static struct dsc_swap_options swap_of(const struct dsc_config *config) {
    bool to_files = strcmp(config->zero_offload_optimizer_device, "nvme") == 0;
    return (struct dsc_swap_options){
        .folder = to_files ? config->zero_offload_optimizer_nvme_path : NULL,
        .n_buffers = (int64_t)dsc_max((size_t)config->zero_offload_optimizer_buffer_count, 1),
        .io = {.kind = DSC_IO_BEST,
               .block_bytes = (size_t)config->aio_block_size,
               .queue_depth = (size_t)config->aio_queue_depth,
               .n_threads = (int)dsc_min((size_t)config->aio_thread_count, 64),
               .single_submit = config->aio_single_submit,
               .in_batches = !config->aio_overlap_events},
    };
}

struct dsc_engine_options dsc_bind_engine_options(const struct dsc_config *config,
                                                  enum dsc_optim_kind optimizer, bool whole,
                                                  int n_threads, uint64_t names_hash,
                                                  int n_averaged) {
    bool no_masters =
        config->fp16_master_weights_and_grads || config->bf16_master_weights_and_grads;
    struct dsc_engine_options options = {
        .stage = (int)config->zero_stage,
        .overlap = config->zero_overlap_comm == 1,
        .bucket_elems = (size_t)config->zero_reduce_bucket_size,
        .clip = config->gradient_clipping,
        .skip_nonfinite = skips_nonfinite(config),
        .many_micro_steps = config->gradient_accumulation_steps > 1,
        .narrow_sums = no_masters || dtype_of(config->grad_accum_dtype) != DSC_F32,
        .no_masters = no_masters,
        .sum_only = strcmp(config->gradient_allreduce_op, "sum") == 0,
        .wire = wire_of(config, n_averaged),
        .swap = swap_of(config),
        .optim = optimizer,
        .whole = whole,
        .n_threads = n_threads,
        .names_hash = names_hash,
    };
    bool scales = config->fp16_enabled || autocasts_to_f16(config);
    if (scales && config->fp16_loss_scale == 0)
        dsc_scaler_init_dynamic(&options.scaler, ldexp(1.0, (int)config->fp16_initial_scale_power),
                                (double)config->fp16_min_loss_scale, config->fp16_loss_scale_window,
                                config->fp16_hysteresis, config->fp16_consecutive_hysteresis);
    else
        dsc_scaler_init_static(&options.scaler, scales ? config->fp16_loss_scale : 1.0);
    return options;
}
