/* Rules over several keys: batch sizes, precision, and pairs that make sense only together.
 *
 * Invariant: train_batch_size == train_micro_batch_size_per_gpu * gradient_accumulation_steps *
 * world size holds for every configuration that is accepted. Called once, after all keys are read.
 */
#include "config_parts.h"

#include <stdio.h>
#include <string.h>

static bool is_given(const struct dsc_config_reading *reading, const char *path) {
    int index = dsc__config_index(path);
    return index >= 0 && reading->given[index];
}

static void show_size(int64_t value, char *out, size_t n) {
    if (value == DSC_CONFIG_NONE)
        snprintf(out, n, "not given");
    else
        snprintf(out, n, "%lld", (long long)value);
}

static enum dsc_status batch_error(const struct dsc_config *given, int64_t world_size,
                                   struct dsc_config_reading *reading) {
    char batch[24], micro[24], steps[24];
    show_size(given->train_batch_size, batch, sizeof batch);
    show_size(given->train_micro_batch_size_per_gpu, micro, sizeof micro);
    show_size(given->gradient_accumulation_steps, steps, sizeof steps);
    return dsc__config_error(
        reading,
        "train_batch_size (%s) must be train_micro_batch_size_per_gpu (%s) * "
        "gradient_accumulation_steps (%s) * world size (%lld), in whole numbers",
        batch, micro, steps, (long long)world_size);
}

/* a / b where that is a whole number >= 1, else 0. */
static int64_t whole_quotient(int64_t a, int64_t b) {
    return b > 0 && a % b == 0 ? a / b : 0;
}

/* The product of three, or 0 when it does not fit. */
static int64_t product(int64_t a, int64_t b, int64_t c) {
    int64_t ab, abc;
    return __builtin_mul_overflow(a, b, &ab) || __builtin_mul_overflow(ab, c, &abc) ? 0 : abc;
}

/* Any two of the three give the third; one of the first two suffices, with one micro-step. */
static enum dsc_status batch_rule(int64_t world_size, struct dsc_config *config,
                                  struct dsc_config_reading *reading) {
    const int64_t none = DSC_CONFIG_NONE;
    const struct dsc_config given = *config;
    int64_t *batch = &config->train_batch_size;
    int64_t *micro = &config->train_micro_batch_size_per_gpu;
    int64_t *steps = &config->gradient_accumulation_steps;
    if (*batch == none && *micro == none)
        return dsc__config_error(reading,
                                 "train_batch_size or train_micro_batch_size_per_gpu must be given "
                                 "(train_batch_size = train_micro_batch_size_per_gpu * "
                                 "gradient_accumulation_steps * world size, which is %lld)",
                                 (long long)world_size);
    if (*steps == none && (*batch == none || *micro == none))
        *steps = 1;
    if (*batch == none)
        *batch = product(*micro, *steps, world_size);
    else if (*micro == none)
        *micro = whole_quotient(*batch, product(*steps, world_size, 1));
    else if (*steps == none)
        *steps = whole_quotient(*batch, product(*micro, world_size, 1));
    if (*batch < 1 || *micro < 1 || *steps < 1 || *batch != product(*micro, *steps, world_size))
        return batch_error(&given, world_size, reading);
    return DSC_OK;
}

/* A size that is given but was refused: the rule would only repeat that. */
static bool sizes_are_sound(const struct dsc_config *config,
                            const struct dsc_config_reading *reading) {
    const int64_t none = DSC_CONFIG_NONE;
    return (config->train_batch_size != none || !is_given(reading, "train_batch_size")) &&
           (config->train_micro_batch_size_per_gpu != none ||
            !is_given(reading, "train_micro_batch_size_per_gpu")) &&
           (config->gradient_accumulation_steps != none ||
            !is_given(reading, "gradient_accumulation_steps"));
}

/* "fp32" unless a mode is on. */
static const char *model_dtype(const struct dsc_config *config) {
    return config->fp16_enabled ? "fp16" : config->bf16_enabled ? "bf16" : "fp32";
}

static enum dsc_status type_rules(const struct dsc_config *config,
                                  struct dsc_config_reading *reading) {
    const char *model = model_dtype(config), *sums = config->grad_accum_dtype;
    if (sums && strcmp(sums, "fp32") != 0 && strcmp(sums, model) != 0)
        DSC_TRY(dsc__config_error(reading,
                                  "data_types.grad_accum_dtype is \"%s\" and the model trains in "
                                  "%s; allowed: \"fp32\" or the model's own type",
                                  sums, model));
    if (config->param_dtype && strcmp(config->param_dtype, model) != 0)
        DSC_TRY(dsc__config_error(reading,
                                  "data_types.param_dtype is \"%s\" and fp16.enabled and "
                                  "bf16.enabled say %s; they must agree",
                                  config->param_dtype, model));
    if (config->fp16_master_weights_and_grads && !config->fp16_enabled)
        DSC_TRY(dsc__config_error(
            reading, "fp16.fp16_master_weights_and_grads is true and fp16.enabled is not"));
    if (config->bf16_master_weights_and_grads && !config->bf16_enabled)
        DSC_TRY(dsc__config_error(
            reading, "bf16.bf16_master_weights_and_grads is true and bf16.enabled is not"));
    if (config->torch_autocast_enabled && strcmp(model, "fp32") != 0)
        DSC_TRY(dsc__config_error(reading,
                                  "torch_autocast.enabled and %s.enabled are both true; autocast "
                                  "is for a float32 model: allowed: one of them",
                                  model));
    return DSC_OK;
}

static enum dsc_status precision_rules(const struct dsc_config *config,
                                       struct dsc_config_reading *reading) {
    if (config->fp16_enabled && config->bf16_enabled)
        DSC_TRY(dsc__config_error(reading,
                                  "fp16.enabled and bf16.enabled are both true; allowed: one"));
    DSC_TRY(type_rules(config, reading));
    double initial = ldexp(1.0, (int)config->fp16_initial_scale_power);
    if (config->fp16_enabled && config->fp16_loss_scale == 0 &&
        initial < (double)config->fp16_min_loss_scale)
        DSC_TRY(dsc__config_error(
            reading,
            "fp16.min_loss_scale is %lld, above the scale to start with, 2 to "
            "the power fp16.initial_scale_power (%lld)",
            (long long)config->fp16_min_loss_scale, (long long)config->fp16_initial_scale_power));
    return DSC_OK;
}

/* Keys that only print or write figures: training is the same without, so using one is no error,
 * but silence would be a lie. */
#define DSC_FIGURES_MAP(X)                                                                         \
    X(flops_profiler_enabled, "flops_profiler.enabled")                                            \
    X(tensorboard_enabled, "tensorboard.enabled")                                                  \
    X(wandb_enabled, "wandb.enabled")                                                              \
    X(comet_enabled, "comet.enabled")                                                              \
    X(csv_monitor_enabled, "csv_monitor.enabled")

/* Where files go, for "nvme". */
static enum dsc_status offload_rules(const struct dsc_config *config,
                                     struct dsc_config_reading *reading) {
    const char *device = config->zero_offload_optimizer_device;
    const char *path = config->zero_offload_optimizer_nvme_path;
    if (strcmp(device, "nvme") == 0 && (!path || !path[0]))
        return dsc__config_error(
            reading, "zero_optimization.offload_optimizer.device is \"nvme\" and "
                     "zero_optimization.offload_optimizer.nvme_path is not given; it names the "
                     "folder for the files");
    path = config->zero_offload_param_nvme_path;
    if (strcmp(config->zero_offload_param_device, "nvme") != 0)
        return DSC_OK;
    if (config->zero_stage != 3)
        return dsc__config_error(
            reading,
            "zero_optimization.offload_param.device is \"nvme\" and "
            "zero_optimization.stage is %lld; parameters are shared out at stage 3 only",
            (long long)config->zero_stage);
    if (!path || !path[0])
        return dsc__config_error(
            reading, "zero_optimization.offload_param.device is \"nvme\" and "
                     "zero_optimization.offload_param.nvme_path is not given; it names the folder "
                     "for the files");
    return DSC_OK;
}

static enum dsc_status warn_of_figures(const struct dsc_config *config,
                                       struct dsc_config_reading *reading) {
#define X(field, path)                                                                             \
    if (config->field)                                                                             \
        DSC_TRY(dsc__config_warn(reading, path " is true: not yet; nothing is printed or "         \
                                               "written"));
    DSC_FIGURES_MAP(X)
#undef X
    return DSC_OK;
}

/* A size that was given, against the mpu's; has: the number of the mpu, 0 if it does not say. */
static enum dsc_status match(const char *path, int64_t given,
                             const struct dsc_config_layout *layout, int64_t has,
                             struct dsc_config_reading *reading) {
    if (!is_given(reading, path) || given == DSC_CONFIG_NONE)
        return DSC_OK;
    if (!layout && given > 1)
        return dsc__config_error(reading,
                                 "%s is %lld and there is no mpu, which lays such ranks out; "
                                 "allowed: 1, or initialize(mpu="
                                 "initialize_parallel_state_from_config(config))",
                                 path, (long long)given);
    if (layout && has && given != has)
        return dsc__config_error(reading, "%s is %lld and the mpu's is %lld; they must be equal",
                                 path, (long long)given, (long long)has);
    return DSC_OK;
}

/* AutoTP itself splits modules, which is not there; with an mpu its size only repeats the mpu's. */
static enum dsc_status tensor_rule(const struct dsc_config *config,
                                   const struct dsc_config_layout *layout,
                                   struct dsc_config_reading *reading) {
    const int64_t split = config->autotp_size, tensor = config->tensor_model_parallel_size;
    const char *path = "tensor_parallel.autotp_size", *twin = "tensor_model_parallel_size";
    if (is_given(reading, path) && split > 0 && is_given(reading, twin) && split != tensor)
        return dsc__config_error(reading, "%s is %lld and %s is %lld; they are the same ranks",
                                 path, (long long)split, twin, (long long)tensor);
    if (split > 1 && !layout)
        return dsc__config_error(
            reading,
            "%s is %lld: not yet without an mpu (AutoTP splits modules); works "
            "now: 0 to 1, or an mpu with as many tensor-parallel ranks",
            path, (long long)split);
    return split > 1 ? match(path, split, layout, layout->tensor_model_parallel_size, reading)
                     : DSC_OK;
}

static enum dsc_status layout_rules(int64_t n_data, const struct dsc_config *config,
                                    const struct dsc_config_layout *layout,
                                    struct dsc_config_reading *reading) {
#define X(field) DSC_TRY(match(#field, config->field, layout, layout ? layout->field : 0, reading));
    DSC_CONFIG_LAYOUT_MAP(X)
#undef X
    DSC_TRY(match("num_distributed_optimizer_instances",
                  config->num_distributed_optimizer_instances, layout, 0, reading));
    DSC_TRY(tensor_rule(config, layout, reading));
    if (n_data > 0 && config->data_parallel_size != DSC_CONFIG_NONE &&
        config->data_parallel_size != n_data)
        DSC_TRY(dsc__config_error(reading,
                                  "data_parallel_size is %lld and there are %lld ranks over data; "
                                  "they must be equal",
                                  (long long)config->data_parallel_size, (long long)n_data));
    const char *const idle[] = {"order", "distributed_timeout_minutes",
                                "virtual_pipeline_model_parallel_size"};
    for (size_t i = 0; i < sizeof idle / sizeof *idle && !layout; i++)
        if (is_given(reading, idle[i]))
            DSC_TRY(dsc__config_warn(reading,
                                     "%s counts in initialize_parallel_state_from_config() only, "
                                     "and there is no mpu",
                                     idle[i]));
    return DSC_OK;
}

enum dsc_status dsc__config_rules(int64_t n_data, const struct dsc_config_layout *layout,
                                  struct dsc_config *config, struct dsc_config_reading *reading) {
    if (n_data > 0 && sizes_are_sound(config, reading))
        DSC_TRY(batch_rule(n_data, config, reading));
    DSC_TRY(precision_rules(config, reading));
    DSC_TRY(offload_rules(config, reading));
    if (is_given(reading, "optimizer.params") && !is_given(reading, "optimizer.type"))
        DSC_TRY(dsc__config_error(reading, "optimizer.params is given without optimizer.type"));
    if (is_given(reading, "scheduler.params") && !is_given(reading, "scheduler.type"))
        DSC_TRY(dsc__config_error(reading, "scheduler.params is given without scheduler.type"));
    DSC_TRY(warn_of_figures(config, reading));
    return layout_rules(n_data, config, layout, reading);
}
