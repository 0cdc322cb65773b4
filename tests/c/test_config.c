/* Configuration: the table, JSON text, single values, rules over several keys, nearest names. */
#include "alloc.h"
#include "case.h"
#include "config.h"

#include <math.h>

/* Text to a tree; the test ends if it is not JSON. */
static cJSON *tree(const char *text) {
    cJSON *root = NULL;
    CHECK_OK(dsc_config_tree(text, strlen(text), "text", &root));
    return root;
}

/* Parses text that must be accepted on `world` ranks; `warning` must be part of a warning, NULL:
 * there is none. */
static struct dsc_config accepted(const char *text, int64_t world, const char *warning) {
    struct dsc_config config;
    struct dsc_config_reading reading = {0};
    cJSON *root = tree(text);
    CHECK_OK(dsc_config_parse(root, world, NULL, false, &config, &reading));
    CHECK_EQ_INT(reading.n_warnings > 0, warning != NULL);
    CHECK(!warning || strstr(reading.warnings[0], warning));
    dsc_config_reading_free(&reading);
    cJSON_Delete(root);
    return config;
}

/* Parses text that must be refused with `n` errors, one of which has `part` in it. */
static void refused_on(const char *text, int64_t world, bool strict, size_t n, const char *part) {
    struct dsc_config config, untouched;
    struct dsc_config_reading reading = {0};
    cJSON *root = tree(text);
    memset(&config, 0x5A, sizeof config);
    memcpy(&untouched, &config, sizeof config);
    CHECK_EQ_INT(dsc_config_parse(root, world, NULL, strict, &config, &reading), DSC_ECONFIG);
    CHECK(memcmp(&config, &untouched, sizeof config) == 0);
    bool found = false;
    for (size_t i = 0; i < reading.n_errors; i++)
        found = found || strstr(reading.errors[i], part);
    if (!found || reading.n_errors != n) {
        fprintf(stderr, "%s\ngave %zu errors: %s\nexpected %zu with: %s\n", text, reading.n_errors,
                dsc_last_error(), n, part);
        exit(1);
    }
    dsc_config_reading_free(&reading);
    cJSON_Delete(root);
}

static void refused(const char *text, const char *part) {
    refused_on(text, 1, false, 1, part);
}

static void not_json(const char *text, const char *part) {
    cJSON *root = NULL;
    CHECK_EQ_INT(dsc_config_tree(text, strlen(text), "text", &root), DSC_ECONFIG);
    CHECK(!root);
    CHECK(strstr(dsc_last_error(), part));
}

static void broken_json_is_placed_by_line_and_column(void) {
    not_json("", "line 1, column 1");
    not_json("{\n \"a\": 1,\n}", "line 3, column 1: expected a key in double quotes, found '}'");
    not_json("{\"a\": 01}", "column 8: expected ',' or '}', found '1'");
    not_json("{\"a\": 1.}", "expected a digit");
    not_json("{\"a\": -}", "expected a digit");
    not_json("{\"a\": NaN}", "expected a value, found 'N'");
    not_json("{\"a\" 1}", "expected ':'");
    not_json("{\"a\": [1 2]}", "expected ',' or ']'");
    not_json("{\"a\": \"x", "it ends at line 1, column 9");
    not_json("{\"a\": \"\\x\"}", "an escape that JSON has");
    not_json("{\"a\": \"\\ud800\"}", "surrogate pair");
    not_json("{\"a\": \"\\u0000\"}", "expected");
    not_json("{\"a\": 1} 2", "expected nothing more");
    not_json("{ # x\n}", "JSON has no comments");
    not_json("[1]", "must be a JSON object");
    cJSON_Delete(tree("\xEF\xBB\xBF {\"a\": [-0.5e+3, true, null, \"\\ud83d\\ude00\"]}"));
}

static void deep_nesting_is_an_error(void) {
    char text[400] = "{\"a\":";
    memset(text + 5, '[', 200);
    not_json(text, "less nesting");
}

static void a_zero_byte_is_not_the_end(void) {
    cJSON *root = NULL;
    CHECK_EQ_INT(dsc_config_tree("{}\0x", 4, "text", &root), DSC_ECONFIG);
    CHECK(strstr(dsc_last_error(), "zero byte at position 2"));
}

static void a_key_that_stands_twice_is_named_with_its_path(void) {
    not_json("{\"a\": 1, \"b\": 2, \"a\": 3}", "text: the key a stands twice");
    not_json("{\"fp16\": {\"enabled\": true, \"enabled\": true}}", "the key fp16.enabled stands");
    not_json("{\"x\": [{\"y\": {\"z\": 1, \"z\": 1}}]}", "x.[].y.z stands twice");
    cJSON_Delete(tree("{\"fp16\": {\"enabled\": true}, \"bf16\": {\"enabled\": false}}"));
}

static void a_missing_file_is_named(void) {
    char *text = NULL;
    size_t n = 0;
    CHECK_EQ_INT(dsc_config_read_file("no/such/file.json", &text, &n), DSC_ECONFIG);
    CHECK(strstr(dsc_last_error(), "no/such/file.json") && !text);
}

static void decodes(const char *base64, const char *expected) {
    char *text = NULL;
    size_t n = 0;
    CHECK_OK(dsc_config_decode(base64, &text, &n));
    CHECK_EQ_INT(n, strlen(expected));
    CHECK(strcmp(text, expected) == 0);
    dsc_free(text);
}

static void base64_of_both_alphabets_is_decoded_and_other_text_refused(void) {
    static const char *const wrong[] = {"", "=", "e", "eyJhI", "ey Jh", "ey=Jh", "config.json"};
    char *text = NULL;
    size_t n = 7;
    decodes("eyJhIjogMX0=", "{\"a\": 1}");
    decodes("eyJhIjogMX0", "{\"a\": 1}");
    decodes("_-4_", "\xff\xee\x3f");
    decodes("/+4/", "\xff\xee\x3f");
    decodes("YQ==", "a");
    decodes("YWI", "ab");
    decodes("eyJh\nIjog\r\nMX0=\n", "{\"a\": 1}");
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        CHECK_EQ_INT(dsc_config_decode(wrong[i], &text, &n), DSC_EINVAL);
    CHECK(!text && n == 7);
}

static void nothing_given_means_the_defaults(void) {
    struct dsc_config config = accepted("{\"train_batch_size\": 8}", 2, NULL);
    CHECK_EQ_INT(config.train_batch_size, 8);
    CHECK_EQ_INT(config.train_micro_batch_size_per_gpu, 4);
    CHECK_EQ_INT(config.gradient_accumulation_steps, 1);
    CHECK(config.gradient_clipping == 1.0);
    CHECK_EQ_INT(config.zero_overlap_comm, -1);
    CHECK_EQ_INT(config.zero_reduce_bucket_size, 500000000);
    CHECK_EQ_INT(config.steps_per_print, 10);
    CHECK(config.bf16_check_grad_overflow && !config.fp32_check_grad_overflow);
    CHECK(!config.optimizer_type && strcmp(config.zero_offload_param_device, "none") == 0);
}

static void null_and_auto_count_as_absent(void) {
    struct dsc_config config = accepted(
        "{\"train_batch_size\": 8, \"gradient_accumulation_steps\": \"auto\","
        " \"gradient_clipping\": \"auto\", \"fp16\": {\"enabled\": \"auto\"},"
        " \"bf16\": null, \"zero_optimization\": {\"stage\": null, \"offload_param\": null}}",
        1, NULL);
    CHECK(config.gradient_clipping == 1.0 && !config.fp16_enabled && config.zero_stage == 0);
}

static void integers_come_as_floats_and_nothing_is_rounded(void) {
    struct dsc_config config = accepted(
        "{\"train_batch_size\": 8.0, \"zero_optimization\": {\"reduce_bucket_size\": 5e7,"
        " \"sub_group_size\": 1e12, \"stage3_model_persistence_threshold\": 9223372036854775807}}",
        1, NULL);
    CHECK_EQ_INT(config.zero_reduce_bucket_size, 50000000);
    CHECK_EQ_INT(config.zero_sub_group_size, 1000000000000);
    CHECK_EQ_INT(config.zero_model_persistence_threshold, INT64_MAX);
    refused("{\"train_batch_size\": 8.5}", "train_batch_size is 8.5");
    refused("{\"train_batch_size\": 8, \"seed\": 9007199254740993}", "seed is");
}

static void a_value_of_the_wrong_type_names_key_value_and_what_is_allowed(void) {
    refused("{\"train_batch_size\": \"8\"}",
            "train_batch_size is \"8\", a string; allowed: an integer");
    refused("{\"train_batch_size\": true}", "a bool; allowed");
    refused("{\"train_batch_size\": 8, \"fp16\": {\"enabled\": \"true\"}}",
            "fp16.enabled is \"true\", a string; allowed: true or false");
    refused("{\"train_batch_size\": 8, \"fp16\": {\"loss_scale\": true}}",
            "fp16.loss_scale is true");
    refused("{\"train_batch_size\": 8, \"fp16\": 3}", "fp16 is 3, a number; allowed: an object");
    refused("{\"train_batch_size\": 8, \"optimizer\": {\"type\": \"Adam\", \"params\": [1]}}",
            "optimizer.params is [1], a list; allowed: an object");
    refused("{\"train_batch_size\": 8, \"bf16\": true}", "bf16 is true");
}

static void a_value_out_of_range_is_refused(void) {
    refused("{\"train_batch_size\": 0}", "train_batch_size is 0");
    refused("{\"train_batch_size\": 8, \"gradient_clipping\": -1}", "a number >= 0");
    refused("{\"train_batch_size\": 8, \"zero_optimization\": {\"stage\": 4}}", "from 0 to 3");
    refused("{\"train_batch_size\": 8, \"zero_optimization\": {\"reduce_bucket_size\": 0}}",
            ">= 1");
    refused("{\"train_batch_size\": 8, \"fp16\": {\"initial_scale_power\": 127}}", "from 0 to 126");
    refused("{\"train_batch_size\": 8, \"fp16\": {\"loss_scale\": -2}}", "fp16.loss_scale is -2");
    refused("{\"train_batch_size\": 8, \"checkpoint\": {\"tag_validation\": \"Maybe\"}}",
            "allowed: \"Warn\", \"Ignore\", \"Fail\"");
    refused("{\"train_batch_size\": 8, \"steps_per_print\": 0}", ", or inf");
}

static void infinite_steps_per_print_means_never(void) {
    struct dsc_config config;
    struct dsc_config_reading reading = {0};
    cJSON *root = tree("{\"train_batch_size\": 1, \"gradient_clipping\": 0}");
    cJSON_AddNumberToObject(root, "steps_per_print", INFINITY);
    CHECK_OK(dsc_config_parse(root, 1, NULL, false, &config, &reading));
    CHECK_EQ_INT(config.steps_per_print, INT64_MAX);
    cJSON_AddNumberToObject(root, "seed", INFINITY);
    dsc_config_reading_free(&reading);
    CHECK_EQ_INT(dsc_config_parse(root, 1, NULL, false, &config, &reading), DSC_ECONFIG);
    dsc_config_reading_free(&reading);
    cJSON_Delete(root);
}

static void a_bool_clips_at_one_and_says_so(void) {
    struct dsc_config config =
        accepted("{\"train_batch_size\": 1, \"gradient_clipping\": true}", 1, "taken as 1");
    CHECK(config.gradient_clipping == 1.0);
}

static void names_are_equal_in_any_case_and_come_back_canonical(void) {
    struct dsc_config config =
        accepted("{\"train_batch_size\": 1, \"data_types\": {\"param_dtype\": \"FP32\"}}", 1, NULL);
    CHECK(strcmp(config.param_dtype, "fp32") == 0);
}

static void what_is_not_there_says_not_yet(void) {
    static const char *const rows[][2] = {
        {"\"zero_optimization\": {\"zero_quantized_weights\": true}",
         "zero_quantized_weights is true: not yet"},
        {"\"sparse_attention\": {\"mode\": \"fixed\"}",
         "sparse_attention is {\"mode\":\"fixed\"}: not yet"},
        {"\"pipeline\": {\"stages\": 2}", "pipeline.stages is 2: not yet"},
        {"\"tensor_parallel\": {\"autotp_size\": 2}", "autotp_size is 2: not yet without an mpu"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char text[256];
        snprintf(text, sizeof text, "{\"train_batch_size\": 1, %s}", rows[i][0]);
        refused(text, rows[i][1]);
    }
}

/* Parses text for an mpu with 2 tensor-parallel ranks that says nothing else: the first error, or
 * NULL. */
static const char *with_mpu(const char *text, int64_t n_data, struct dsc_config *config) {
    static char said[512];
    const struct dsc_config_layout layout = {.tensor_model_parallel_size = 2};
    struct dsc_config_reading reading = {0};
    cJSON *root = tree(text);
    const enum dsc_status status = dsc_config_parse(root, n_data, &layout, false, config, &reading);
    snprintf(said, sizeof said, "%s", reading.n_errors ? reading.errors[0] : dsc_last_error());
    CHECK_EQ_INT(reading.n_warnings, 0);
    dsc_config_reading_free(&reading);
    cJSON_Delete(root);
    return status == DSC_OK ? NULL : said;
}

static void sizes_of_a_layout_need_an_mpu_that_has_them(void) {
    struct dsc_config config;
    refused("{\"train_batch_size\": 1, \"tensor_model_parallel_size\": 2}",
            "tensor_model_parallel_size is 2 and there is no mpu");
    refused("{\"train_batch_size\": 1, \"expert_tensor_parallel_size\": 2}", "there is no mpu");
    accepted("{\"train_batch_size\": 1, \"tensor_model_parallel_size\": 1}", 1, NULL);
    accepted("{\"train_batch_size\": 1, \"order\": \"dp-tp\"}", 1, "order counts in");
    CHECK(!with_mpu("{\"train_micro_batch_size_per_gpu\": 3, \"tensor_model_parallel_size\": 2,"
                    " \"sequence_parallel_size\": 7, \"order\": \"dp-tp\"}",
                    4, &config));
    CHECK_EQ_INT(config.train_batch_size, 12);
    CHECK(!with_mpu("{\"train_batch_size\": 4, \"tensor_parallel\": {\"autotp_size\": 2}}", 4,
                    &config));
    CHECK(!with_mpu("{\"train_batch_size\": 4, \"tensor_parallel\": {\"autotp_size\": 1}}", 4,
                    &config));
    const char *said =
        with_mpu("{\"train_batch_size\": 4, \"tensor_model_parallel_size\": 4}", 4, &config);
    CHECK(said && strstr(said, "tensor_model_parallel_size is 4 and the mpu's is 2"));
    said = with_mpu("{\"train_batch_size\": 4, \"tensor_parallel\": {\"autotp_size\": 4}}", 4,
                    &config);
    CHECK(said && strstr(said, "tensor_parallel.autotp_size is 4 and the mpu's is 2"));
    said = with_mpu("{\"train_batch_size\": 4, \"data_parallel_size\": 2}", 4, &config);
    CHECK(said && strstr(said, "data_parallel_size is 2 and there are 4 ranks over data"));
}

static void a_dimension_given_twice_must_have_one_size(void) {
    struct dsc_config config;
    const char *twice = "{\"train_batch_size\": 4, \"tensor_model_parallel_size\": 2,"
                        " \"tensor_parallel\": {\"autotp_size\": 4}}";
    const char *said = with_mpu(twice, 4, &config);
    CHECK(said && strstr(said, "autotp_size is 4 and tensor_model_parallel_size is 2"));
    CHECK(!with_mpu("{\"train_batch_size\": 4, \"tensor_model_parallel_size\": 2,"
                    " \"tensor_parallel\": {\"autotp_size\": 2}}",
                    4, &config));
}

static void a_layout_alone_needs_no_batch_size(void) {
    struct dsc_config config;
    CHECK(!with_mpu("{\"tensor_parallel\": {\"autotp_size\": 2}}", 0, &config));
    CHECK_EQ_INT(config.autotp_size, 2);
    CHECK_EQ_INT(config.train_batch_size, DSC_CONFIG_NONE);
    const char *said = with_mpu("{}", -1, &config);
    CHECK(said && strstr(said, "world_size is -1"));
}

static void the_default_of_a_key_that_is_not_yet_is_accepted(void) {
    accepted(
        "{\"train_batch_size\": 1, \"prescale_gradients\": false, \"sparse_gradients\": false,"
        " \"gradient_predivide_factor\": 1, \"communication_data_type\": \"fp32\","
        " \"wall_clock_breakdown\": false, \"sparse_attention\": {}, \"amp\": {\"enabled\": false,"
        " \"opt_level\": \"O1\"}, \"tensorboard\": {\"enabled\": false, \"job_name\": \"x\"},"
        " \"data_types\": {\"grad_accum_dtype\": \"fp32\"}}",
        1, NULL);
}

static void an_unknown_key_in_a_section_is_an_error_with_the_nearest(void) {
    refused("{\"train_batch_size\": 1, \"zero_optimization\": {\"stge\": 1}}",
            "unknown key zero_optimization.stge (value 1); did you mean zero_optimization.stage?");
    refused("{\"train_batch_size\": 1, \"fp16\": {\"reduce_bucket_size\": 5}}",
            "did you mean zero_optimization.reduce_bucket_size?");
    refused(
        "{\"train_batch_size\": 1, \"tensor_parallel\": {\"partition_config\": {\"layer_specs\":"
        " [{\"shape\": [1]}, {\"patern\": 3}]}}}",
        "layer_specs[1].patern");
}

static void a_slip_in_a_top_level_key_is_an_error(void) {
    refused("{\"train_batch_size\": 1, \"gradient_clipp1ng\": 1}",
            "did you mean gradient_clipping?");
    refused("{\"train_batch_size\": 1, \"gradient_cliping\": 1}",
            "did you mean gradient_clipping?");
    refused("{\"train_batch_size\": 1, \"optimzier\": {}}", "did you mean optimizer?");
    refused("{\"train_batch_size\": 1, \"FP16\": {}}", "did you mean fp16?");
}

static void any_other_top_level_key_is_a_warning_and_an_error_when_strict(void) {
    accepted("{\"train_batch_size\": 1, \"msamp\": {}}", 1, "unknown key msamp");
    accepted("{\"train_batch_size\": 1, \"stage\": 1}", 1, "zero_optimization.stage");
    accepted("{\"train_batch_size\": 1, \"zero_optimization.reduce_bucket_size\": 1e6}", 1,
             "nearest known key: zero_optimization.reduce_bucket_size");
    refused_on("{\"train_batch_size\": 1, \"my_own_note\": 1}", 1, true, 1, "my_own_note");
    refused_on("{\"train_batch_size\": 1, \"zero_optimization.stage\": 1}", 1, true, 1, "stage");
}

static void all_errors_are_reported_together(void) {
    refused_on("{\"train_batch_size\": 8, \"gradient_clipping\": -1, \"fp16\": {\"enabled\": 2},"
               " \"zero_optimization\": {\"stge\": 1}}",
               1, false, 3, "fp16.enabled");
    CHECK(strstr(dsc_last_error(), "3 errors:\n  1. gradient_clipping"));
    CHECK(strstr(dsc_last_error(), "\n  3. unknown key zero_optimization.stge"));
}

static void deprecated_names_work_and_name_the_new_one(void) {
    struct dsc_config config =
        accepted("{\"train_batch_size\": 1, \"bfloat16\": {\"enabled\": true}}", 1, "write bf16");
    CHECK(config.bf16_enabled);
    accepted("{\"train_batch_size\": 1, \"zero_optimization\": {\"cpu_offload\": false}}", 1,
             "write zero_optimization.offload_optimizer.device");
    config = accepted("{\"train_batch_size\": 1, \"zero_optimization\":"
                      " {\"stage3_gather_fp16_weights_on_model_save\": true}}",
                      1, "write zero_optimization.stage3_gather_16bit_weights_on_model_save");
    CHECK(config.zero_gather_16bit_weights_on_model_save);
    config = accepted("{\"train_batch_size\": 1, \"zero_optimization\": true}", 1, "\"stage\": 1");
    CHECK_EQ_INT(config.zero_stage, 1);
}

static void both_spellings_of_a_stage3_key_work_without_a_word(void) {
    struct dsc_config config = accepted("{\"train_batch_size\": 1, \"zero_optimization\":"
                                        " {\"prefetch_bucket_size\": 7}}",
                                        1, NULL);
    CHECK_EQ_INT(config.zero_prefetch_bucket_size, 7);
    config = accepted("{\"train_batch_size\": 1, \"zero_optimization\":"
                      " {\"stage3_prefetch_bucket_size\": 8}}",
                      1, NULL);
    CHECK_EQ_INT(config.zero_prefetch_bucket_size, 8);
}

static void two_names_of_one_key_together_are_an_error(void) {
    refused("{\"train_batch_size\": 1, \"bf16\": {}, \"bfloat16\": {}}",
            "bf16 is given under two names");
    refused("{\"train_batch_size\": 1, \"zero_optimization\": {\"cpu_offload\": false,"
            " \"offload_optimizer\": {\"device\": \"none\"}}}",
            "zero_optimization.offload_optimizer.device is given under two names");
}

static void one_or_two_batch_sizes_give_the_rest(void) {
    /* given T, m, a (0: not given), world; expected T, m, a */
    static const int64_t rows[][7] = {
        {32, 4, 2, 4, 32, 4, 2}, {32, 4, 0, 4, 32, 4, 2}, {32, 0, 2, 4, 32, 4, 2},
        {0, 4, 2, 4, 32, 4, 2},  {32, 0, 0, 4, 32, 8, 1}, {0, 4, 0, 4, 16, 4, 1},
        {1, 0, 0, 1, 1, 1, 1},   {0, 1, 7, 3, 21, 1, 7},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        static const char *const names[] = {"train_batch_size", "train_micro_batch_size_per_gpu",
                                            "gradient_accumulation_steps"};
        char text[256] = "{\"seed\": 0";
        for (int k = 0; k < 3; k++)
            if (rows[i][k])
                snprintf(text + strlen(text), sizeof text - strlen(text), ", \"%s\": %lld",
                         names[k], (long long)rows[i][k]);
        snprintf(text + strlen(text), sizeof text - strlen(text), "}");
        struct dsc_config config = accepted(text, rows[i][3], NULL);
        CHECK_EQ_INT(config.train_batch_size, rows[i][4]);
        CHECK_EQ_INT(config.train_micro_batch_size_per_gpu, rows[i][5]);
        CHECK_EQ_INT(config.gradient_accumulation_steps, rows[i][6]);
    }
}

static void batch_sizes_that_do_not_fit_are_shown_with_the_world_size(void) {
    refused_on("{\"train_batch_size\": 33, \"train_micro_batch_size_per_gpu\": 4,"
               " \"gradient_accumulation_steps\": 2}",
               4, false, 1,
               "train_batch_size (33) must be train_micro_batch_size_per_gpu (4) * "
               "gradient_accumulation_steps (2) * world size (4)");
    refused_on("{\"train_batch_size\": 1}", 2, false, 1, "(not given) * world size (2)");
    refused_on("{\"train_batch_size\": 15, \"gradient_accumulation_steps\": 2}", 1, false, 1,
               "(15)");
    refused_on("{\"gradient_accumulation_steps\": 2}", 1, false, 1, "must be given");
    refused_on("{}", 1, false, 1, "must be given");
    refused_on("{\"train_micro_batch_size_per_gpu\": 9007199254740991,"
               " \"gradient_accumulation_steps\": 9007199254740991}",
               4, false, 1, "must be");
}

static void a_refused_batch_size_is_one_error(void) {
    refused("{\"train_batch_size\": -1}", "train_batch_size is -1");
}

static void the_world_has_a_rank(void) {
    struct dsc_config config;
    struct dsc_config_reading reading = {0};
    cJSON *root = tree("{\"train_batch_size\": 1}");
    CHECK_EQ_INT(dsc_config_parse(root, 0, NULL, false, &config, &reading), DSC_EINVAL);
    cJSON_Delete(root);
}

static void two_precisions_are_an_error(void) {
    refused(
        "{\"train_batch_size\": 1, \"fp16\": {\"enabled\": true}, \"bf16\": {\"enabled\": true}}",
        "fp16.enabled and bf16.enabled are both true");
}

static void a_scale_cannot_start_below_its_minimum(void) {
    refused("{\"train_batch_size\": 1, \"fp16\": {\"enabled\": true, \"initial_scale_power\": 2,"
            " \"min_loss_scale\": 8}}",
            "fp16.min_loss_scale is 8");
}

static void parameters_need_a_type(void) {
    refused("{\"train_batch_size\": 1, \"optimizer\": {\"params\": {}}}", "without optimizer.type");
}

static void a_section_turned_off_is_not_read(void) {
    accepted("{\"train_batch_size\": 1, \"fp16\": false, \"zero_optimization\": {\"offload_param\":"
             " false}, \"tensorboard\": false}",
             1, NULL);
}

static void the_nearest_name_counts_swaps_as_one(void) {
    static const char *const names[] = {"stage", "overlap_comm", "stages"};
    size_t distance = 99;
    CHECK(strcmp(dsc_config_nearest("stgae", names, 3, &distance), "stage") == 0);
    CHECK_EQ_INT(distance, 1);
    CHECK(strcmp(dsc_config_nearest("STAGES", names, 3, &distance), "stages") == 0);
    CHECK_EQ_INT(distance, 0);
    CHECK(strcmp(dsc_config_nearest("", names, 3, &distance), "stage") == 0);
    CHECK_EQ_INT(distance, 5);
    CHECK(strcmp(dsc_config_nearest("overlap", names, 3, &distance), "overlap_comm") == 0);
    CHECK_EQ_INT(distance, 5);
    CHECK(!dsc_config_nearest("x", names, 0, &distance));
    char longer[1000];
    memset(longer, 'x', sizeof longer - 1);
    longer[sizeof longer - 1] = '\0';
    CHECK(dsc_config_nearest(longer, names, 3, &distance));
}

static void paths_of_the_table_are_unique_and_below_a_section(void) {
    for (size_t i = 0; i < DSC_CONFIG_N_KEYS; i++) {
        const struct dsc_key *key = &dsc_config_keys[i];
        CHECK(dsc_config_find(key->path) == key);
        const char *dot = strrchr(key->path, '.');
        if (!dot)
            continue;
        char parent[256];
        size_t n = (size_t)(dot - key->path);
        memcpy(parent, key->path, n);
        parent[n] = '\0';
        if (n > 2 && strcmp(parent + n - 2, "[]") == 0)
            parent[n - 2] = '\0';
        const struct dsc_key *above = dsc_config_find(parent);
        CHECK(above && (above->kind == DSC_KEY_SECTION || above->kind == DSC_KEY_LIST));
    }
}

static void every_spelling_leads_to_the_same_row(void) {
    char name[256];
    CHECK(dsc_config_spelling("bf16.enabled", 0, name, sizeof name) &&
          strcmp(name, "bf16.enabled") == 0);
    CHECK(dsc_config_spelling("bf16.enabled", 1, name, sizeof name) &&
          strcmp(name, "bfloat16.enabled") == 0);
    CHECK(!dsc_config_spelling("bf16.enabled", 2, name, sizeof name));
    CHECK(dsc_config_find("bfloat16.enabled") == dsc_config_find("bf16.enabled"));
    CHECK(!dsc_config_find("zero_optimization.cpu_offload"));
    CHECK(!dsc_config_find("fp16.enable"));
}

static void given_says_what_the_user_set(void) {
    struct dsc_config config;
    struct dsc_config_reading reading = {0};
    cJSON *root = tree("{\"train_batch_size\": 1, \"fp16\": {\"enabled\": false, \"hysteresis\":"
                       " \"auto\"}, \"zero_optimization\": {\"cpu_offload\": false}}");
    CHECK_OK(dsc_config_parse(root, 1, NULL, false, &config, &reading));
#define GIVEN(path) (reading.given[dsc_config_find(path) - dsc_config_keys] != NULL)
    CHECK(GIVEN("train_batch_size") && GIVEN("fp16") && GIVEN("fp16.enabled"));
    CHECK(!GIVEN("fp16.hysteresis") && !GIVEN("gradient_accumulation_steps"));
    CHECK(GIVEN("zero_optimization.offload_optimizer.device"));
    dsc_config_reading_free(&reading);
    cJSON_Delete(root);
}

static void reading_leaves_no_memory_behind(void) {
    int64_t before = dsc_alloc_counters().n_live;
    refused_on("{\"a\": 1, \"fp16\": 3, \"stge\": 1, \"bfloat16\": {}}", 1, false, 2, "fp16 is 3");
    accepted("{\"train_batch_size\": 1, \"bfloat16\": {}}", 1, "bf16");
    CHECK_EQ_INT(dsc_alloc_counters().n_live, before);
}

static void a_long_value_is_cut_and_stays_utf8(void) {
    struct dsc_config config;
    struct dsc_config_reading reading = {0};
    cJSON *root = cJSON_CreateObject();
    char text[400] = "x";
    for (int i = 0; i < 100; i++)
        memcpy(text + 1 + 3 * i, "\xE2\x82\xAC", 4);
    cJSON_AddStringToObject(root, "train_batch_size", text);
    CHECK_EQ_INT(dsc_config_parse(root, 1, NULL, false, &config, &reading), DSC_ECONFIG);
    const char *end = strstr(reading.errors[0], "..., a string");
    CHECK(end && memcmp(end - 3, "\xE2\x82\xAC", 3) == 0);
    dsc_config_reading_free(&reading);
    cJSON_Delete(root);
}

static const struct test_case cases[] = {
    CASE(broken_json_is_placed_by_line_and_column),
    CASE(deep_nesting_is_an_error),
    CASE(a_zero_byte_is_not_the_end),
    CASE(a_key_that_stands_twice_is_named_with_its_path),
    CASE(a_missing_file_is_named),
    CASE(base64_of_both_alphabets_is_decoded_and_other_text_refused),
    CASE(nothing_given_means_the_defaults),
    CASE(null_and_auto_count_as_absent),
    CASE(integers_come_as_floats_and_nothing_is_rounded),
    CASE(a_value_of_the_wrong_type_names_key_value_and_what_is_allowed),
    CASE(a_value_out_of_range_is_refused),
    CASE(infinite_steps_per_print_means_never),
    CASE(a_bool_clips_at_one_and_says_so),
    CASE(names_are_equal_in_any_case_and_come_back_canonical),
    CASE(what_is_not_there_says_not_yet),
    CASE(sizes_of_a_layout_need_an_mpu_that_has_them),
    CASE(a_dimension_given_twice_must_have_one_size),
    CASE(a_layout_alone_needs_no_batch_size),
    CASE(the_default_of_a_key_that_is_not_yet_is_accepted),
    CASE(an_unknown_key_in_a_section_is_an_error_with_the_nearest),
    CASE(a_slip_in_a_top_level_key_is_an_error),
    CASE(any_other_top_level_key_is_a_warning_and_an_error_when_strict),
    CASE(all_errors_are_reported_together),
    CASE(deprecated_names_work_and_name_the_new_one),
    CASE(both_spellings_of_a_stage3_key_work_without_a_word),
    CASE(two_names_of_one_key_together_are_an_error),
    CASE(one_or_two_batch_sizes_give_the_rest),
    CASE(batch_sizes_that_do_not_fit_are_shown_with_the_world_size),
    CASE(a_refused_batch_size_is_one_error),
    CASE(the_world_has_a_rank),
    CASE(two_precisions_are_an_error),
    CASE(a_scale_cannot_start_below_its_minimum),
    CASE(parameters_need_a_type),
    CASE(a_section_turned_off_is_not_read),
    CASE(the_nearest_name_counts_swaps_as_one),
    CASE(paths_of_the_table_are_unique_and_below_a_section),
    CASE(every_spelling_leads_to_the_same_row),
    CASE(given_says_what_the_user_set),
    CASE(reading_leaves_no_memory_behind),
    CASE(a_long_value_is_cut_and_stays_utf8),
};
RUN_CASES(cases)
