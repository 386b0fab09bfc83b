/* clang-format off */
/* hywu: runs bundles of hywu-export. An image editor whose weight deltas are inputs, made anew for every
 * request.
 *
 * This is the only header that a C program needs. Edit one photograph:
 *
 *     #include <hywu/hywu.h>
 *     #include <stdio.h>
 *
 *     // Edits `rgb`, width x height pixels of 3 bytes, and shows where the edited pixels are.
 *     static int edit(const char* bundle, const uint8_t* rgb, int32_t width, int32_t height) {
 *         hywu_editor* editor = NULL;
 *         hywu_images* images = NULL;
 *         hywu_pixels photo = {rgb, width, height, 0}, edited;
 *         const char* prompt = "make it sepia";
 *         hywu_edit_params params;
 *         hywu_edit_params_init(&params, sizeof params);
 *         params.photos = &photo;
 *         params.prompts = &prompt;
 *         params.seed = 42;
 *         if (hywu_editor_load(bundle, NULL, NULL, &editor) == HYWU_OK &&
 *             hywu_edit(editor, &params, &images) == HYWU_OK &&
 *             hywu_images_get(images, 0, &edited) == HYWU_OK)
 *             printf("%d x %d pixels at %p\n", (int)edited.width, (int)edited.height, (const void*)edited.data);
 *         else
 *             fprintf(stderr, "%s\n", hywu_last_error());
 *         hywu_images_free(images);
 *         hywu_editor_free(editor);
 *         return images != NULL ? 0 : 1;
 *     }
 *
 * Conventions
 *
 * - A function that can fail gives HYWU_OK (0) or a negative status, and keeps the text for hywu_last_error().
 *   It then leaves its results alone. NULL where it is not allowed, or a size that cannot be, is
 *   HYWU_ERROR_INPUT.
 * - Handles are opaque. `*_free` takes NULL. Handles may be freed in any order, and a call that runs keeps what
 *   it needs.
 * - Texts and paths are UTF-8. Texts end with a NUL unless their lengths are given beside them.
 * - Pixels are 8-bit RGB, rows from the top; tensors are dense and row-major, in the byte order of the machine.
 * - What the library gives (texts, pixels, tensors) belongs to the handle that it was got from, and is valid as
 *   long as that; what the caller gives is read during the call alone.
 *
 * Structs may grow at their end in later versions. A struct that begins with `struct_size` is filled with
 * defaults by its `*_init`, with the size that the caller's compiler knows. A library accepts structs of every
 * earlier version, and structs of a later version whose further fields are zero; other sizes are refused.
 *
 * Threads
 *
 * - Functions may be called from any thread. Several threads may use one bundle, one set of deltas, one cancel
 *   token.
 * - An editor serves one call at a time: a second thread waits. A callback must not call into the editor that
 *   called it (this is refused with HYWU_ERROR_INPUT). For edits at the same time, create several editors on one
 *   bundle: they share the loaded graphs and their weights, and each has buffers of its own.
 * - After an edit, a generation or a warm-up returns, or fails, the editor holds nothing of the request.
 * - hywu_last_error() is kept for each thread.
 *
 * The same bundle, backend library and options give the same bytes as the Python package hywu_runtime.
 */
/* clang-format on */
#ifndef HYWU_HYWU_H
#define HYWU_HYWU_H

#include <stddef.h>
#include <stdint.h>

#define HYWU_VERSION_MAJOR 0
#define HYWU_VERSION_MINOR 1
#define HYWU_VERSION_PATCH 0
#define HYWU_VERSION (HYWU_VERSION_MAJOR * 10000 + HYWU_VERSION_MINOR * 100 + HYWU_VERSION_PATCH)

#if defined(_WIN32) && !defined(HYWU_STATIC)
#if defined(HYWU_BUILD)
#define HYWU_API __declspec(dllexport)
#else
#define HYWU_API __declspec(dllimport)
#endif
#elif defined(__GNUC__)
#define HYWU_API __attribute__((visibility("default")))
#else
#define HYWU_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Versions, errors, logs ---- */

/* The library's own HYWU_VERSION, which may differ from the header's, and the same as "0.1.0". */
HYWU_API int32_t hywu_version(void);
HYWU_API const char* hywu_version_string(void);

typedef int32_t hywu_status;
enum {
    HYWU_OK = 0,
    HYWU_ERROR_BUNDLE = -1,      /* a bundle or one of its files is missing, damaged or of another format */
    HYWU_ERROR_CHECKPOINT = -2,  /* a checkpoint is missing, damaged or inconsistent */
    HYWU_ERROR_UNSUPPORTED = -3, /* the input is sound, but this version does not do it */
    HYWU_ERROR_DELTA = -4,       /* deltas do not fit, are needed and not given, or are not finite */
    HYWU_ERROR_ENGINE = -5,      /* a graph cannot be run */
    HYWU_ERROR_DEVICE = -6,      /* the backend or device is not there, or its memory ran out */
    HYWU_ERROR_INPUT = -7,       /* an argument, an image or a prompt cannot be used */
    HYWU_ERROR_CANCELLED = -8,   /* the caller cancelled; the editor can be used again */
    HYWU_ERROR_MEMORY = -9,      /* host memory ran out */
    HYWU_ERROR_CALLBACK = -10,   /* a callback threw a C++ exception, which was swallowed */
    HYWU_ERROR_INTERNAL = -11    /* a defect of the library */
};
/* "HYWU_ERROR_BUNDLE", …; "HYWU_ERROR_INTERNAL" for numbers that are none. */
HYWU_API const char* hywu_status_name(hywu_status status);

/* What the last call that failed in this thread said, until the next one fails: up to three sentences, or the
 * single parts: what is wrong with which thing, what was expected, what to do about it. Never NULL; empty if
 * there was no failure. */
HYWU_API const char* hywu_last_error(void);
HYWU_API hywu_status hywu_last_status(void);
enum { HYWU_ERROR_PART_WRONG = 0, HYWU_ERROR_PART_EXPECTED = 1, HYWU_ERROR_PART_REMEDY = 2 };
HYWU_API const char* hywu_last_error_part(int32_t part);

enum { HYWU_LOG_DEBUG = 0, HYWU_LOG_INFO = 1, HYWU_LOG_WARNING = 2, HYWU_LOG_OFF = 3 };
/* Called from the thread that called into the library, with one line. It must not call hywu_set_log. */
typedef void (*hywu_log_callback)(void* user, int32_t level, const char* message);
/* Sends messages of at least `level` to `callback`, for the whole process; NULL, the default, is silence.
 * When this returns the former callback has been called for the last time. */
HYWU_API hywu_status hywu_set_log(hywu_log_callback callback, void* user, int32_t level);

/* ---- Handles and plain values ---- */

typedef struct hywu_bundle hywu_bundle;   /* an opened bundle; what its editors share */
typedef struct hywu_editor hywu_editor;   /* runs a bundle on a backend */
typedef struct hywu_deltas hywu_deltas;   /* an immutable set of weight deltas */
typedef struct hywu_images hywu_images;   /* edited pictures */
typedef struct hywu_tensors hywu_tensors; /* what a module that is no editor made */
typedef struct hywu_cancel hywu_cancel;   /* a flag that ends a request early */

/* A picture: `height` rows of `width` pixels of 3 bytes; `stride` bytes from row to row, 0 for 3 * width. */
typedef struct hywu_pixels {
    const uint8_t* data;
    int32_t width, height;
    size_t stride;
} hywu_pixels;

enum {
    HYWU_DTYPE_UINT8 = 1,
    HYWU_DTYPE_INT32 = 2,
    HYWU_DTYPE_INT64 = 3,
    HYWU_DTYPE_FLOAT16 = 4, /* as uint16_t */
    HYWU_DTYPE_FLOAT32 = 5,
    HYWU_DTYPE_BFLOAT16 = 6, /* as uint16_t; deltas alone */
    HYWU_DTYPE_FLOAT64 = 7   /* deltas, noise and latents alone, which become float32 */
};
#define HYWU_MAX_RANK 8

/* In place of a length: the text ends with a NUL. */
#define HYWU_TERMINATED ((size_t)-1)

/* A named tensor on the host. */
typedef struct hywu_tensor {
    const char* name; /* may be NULL where the name is clear */
    const void* data;
    int32_t dtype; /* HYWU_DTYPE_… */
    int32_t rank;
    int64_t shape[HYWU_MAX_RANK];
} hywu_tensor;

/* ---- Bundles ---- */

typedef struct hywu_bundle_params {
    size_t struct_size;
    int32_t verify;                        /* 1: check the SHA-256 of every file */
    int32_t reserved;                      /* 0 */
    size_t source_count;                   /* for a bundle with linked weights: */
    const char* const* source_ids;         /* [source_count] source ids, */
    const char* const* source_directories; /* [source_count] and the directories of their checkpoints */
} hywu_bundle_params;
HYWU_API hywu_status hywu_bundle_params_init(hywu_bundle_params* params, size_t struct_size);

/* Opens a bundle directory and checks its files. `params` may be NULL. HYWU_ERROR_BUNDLE, _INPUT. */
HYWU_API hywu_status hywu_bundle_open(const char* path, const hywu_bundle_params* params,
                                      hywu_bundle** bundle);
HYWU_API void hywu_bundle_free(hywu_bundle* bundle);
HYWU_API const char* hywu_bundle_name(const hywu_bundle* bundle);
/* The names of its variants, and the keys of its engines, by index; NULL after the last. */
HYWU_API const char* hywu_bundle_variant(const hywu_bundle* bundle, size_t index);
HYWU_API const char* hywu_bundle_engine(const hywu_bundle* bundle, size_t index);

/* ---- Editors ---- */

/* The backends by index, best first, NULL after the last: tensorrt, tensorrt-rtx, ort-cuda, ort-cpu. */
HYWU_API const char* hywu_backend(size_t index);
/* Why a backend cannot be used here, or NULL if it can; valid until this thread asks again. */
HYWU_API const char* hywu_backend_missing(const char* name);
/* The version of the library behind a backend, or NULL if it cannot be used; valid until this thread asks
 * again. */
HYWU_API const char* hywu_backend_version(const char* name);

/* The backend "auto" is, of tensorrt and tensorrt-rtx, the first for which the bundle has an engine that can
 * be used here; else the best that runs the bundle's graphs as they are. */
typedef struct hywu_editor_params {
    size_t struct_size;
    const char* backend; /* NULL: "auto" */
    const char* variant; /* a precision variant of the bundle; NULL: its own graphs */
    int32_t device;      /* index of the GPU; -1: the first */
    int32_t threads;     /* CPU threads of one graph; 0: the backend decides */
    int32_t low_memory;  /* 1: hold the graphs of one stage at a time, and load them for every request */
    int32_t reserved;    /* 0 */
    const char* engine;  /* one of the bundle's engines, by key; NULL: the newest that serves a request */
} hywu_editor_params;
HYWU_API hywu_status hywu_editor_params_init(hywu_editor_params* params, size_t struct_size);

/* An editor on an opened bundle. Graphs are loaded when they are first needed, see hywu_editor_warm_up.
 * Editors of one bundle that agree in backend, device and threads share them. `params` may be NULL.
 * HYWU_ERROR_BUNDLE, _DEVICE, _ENGINE (the backend has no engine that can be used here), _INPUT. */
HYWU_API hywu_status hywu_editor_create(hywu_bundle* bundle, const hywu_editor_params* params,
                                        hywu_editor** editor);
/* Opens a bundle for one editor: hywu_bundle_open, hywu_editor_create. */
HYWU_API hywu_status hywu_editor_load(const char* path, const hywu_bundle_params* bundle_params,
                                      const hywu_editor_params* params, hywu_editor** editor);
HYWU_API void hywu_editor_free(hywu_editor* editor);

/* Loads what a default request needs, and runs one on a gray photo if the bundle takes no tensors from the
 * caller. */
HYWU_API hywu_status hywu_editor_warm_up(hywu_editor* editor);

/* The name of its backend. */
HYWU_API const char* hywu_editor_backend(const hywu_editor* editor);

typedef struct hywu_limits {
    size_t struct_size;
    int32_t batch_min, batch_max; /* samples of a request */
    int32_t has_size;      /* whether photos are brought to a working size, by the five numbers below, */
    int32_t size_multiple; /* all in pixels */
    int32_t size_min, size_max;
    int64_t size_default_area;
    int32_t rank;          /* the largest rank of deltas; 0: takes no deltas */
    int32_t edits;         /* whether it makes pictures */
    int32_t generates;     /* whether it makes deltas */
    int32_t default_steps; /* 0: no schedule */
    size_t sampler_count, guidance_count;
    double default_strength; /* 0: edits start from noise */
    size_t photo_count;      /* photos of each sample; 1 for nearly all bundles */
} hywu_limits;
/* Fills `limits`, whose struct_size the caller has set. On a backend that runs engines, batch and sizes are
 * those that its engines take, the sizes those of the newest. */
HYWU_API hywu_status hywu_editor_limits(const hywu_editor* editor, hywu_limits* limits);
/* The samplers, the default first, and the scales of guidance, by index; NULL after the last. */
HYWU_API const char* hywu_editor_sampler(const hywu_editor* editor, size_t index);
HYWU_API const char* hywu_editor_guidance(const hywu_editor* editor, size_t index, double* default_scale);
/* What hywu_run gives, by index; NULL after the last. */
HYWU_API const char* hywu_editor_output(const hywu_editor* editor, size_t index);
/* The step counts that a sampler takes, ascending; NULL is the default. Writes up to `capacity` of them, and
 * how many there are; `steps` may be NULL if `capacity` is 0. */
HYWU_API hywu_status hywu_editor_steps(const hywu_editor* editor, const char* sampler, int32_t* steps,
                                       size_t capacity, size_t* count);
/* The size at which a photo of width x height is edited. HYWU_ERROR_INPUT. */
HYWU_API hywu_status hywu_editor_working_size(const hywu_editor* editor, int32_t width, int32_t height,
                                              int32_t* working_width, int32_t* working_height);

typedef struct hywu_memory {
    size_t struct_size;
    uint64_t buffers;   /* bytes of the buffers between graphs, on the device */
    uint64_t constants; /* bytes of results that are kept from request to request, for each batch size */
    uint64_t graphs;    /* graphs that this editor holds loaded */
    uint64_t shared;    /* graphs that the bundle holds loaded for all its editors */
} hywu_memory;
HYWU_API hywu_status hywu_editor_memory(hywu_editor* editor, hywu_memory* memory);

typedef struct hywu_timings {
    size_t struct_size;
    double total, load; /* seconds of the last request, and those spent on loading graphs */
    size_t graph_count; /* graphs that ran outside the steps */
    size_t step_count;  /* evaluations of the steps */
} hywu_timings;
/* The times of the last request; zeros before the first. */
HYWU_API hywu_status hywu_editor_timings(hywu_editor* editor, hywu_timings* timings);
/* Name and seconds of a graph that ran outside the steps; seconds of an evaluation. HYWU_ERROR_INPUT: there
 * is none. */
HYWU_API hywu_status hywu_editor_graph_time(hywu_editor* editor, size_t index, const char** graph,
                                            double* seconds);
HYWU_API hywu_status hywu_editor_step_time(hywu_editor* editor, size_t index, double* seconds);

/* ---- Requests ---- */

/* Called after each evaluation of the steps, from the thread that called into the library. Anything but 0
 * cancels the request. */
typedef int32_t (*hywu_progress_callback)(void* user, int32_t done, int32_t total);

/* A flag: hywu_cancel_request ends every request that was given it, before its next graph or step, and may be
 * called from any thread; it stays set until hywu_cancel_reset. */
HYWU_API hywu_status hywu_cancel_create(hywu_cancel** cancel);
HYWU_API void hywu_cancel_request(hywu_cancel* cancel);
HYWU_API void hywu_cancel_reset(hywu_cancel* cancel);
HYWU_API void hywu_cancel_free(hywu_cancel* cancel);

/* One scale of guidance, for all samples, or one for each. */
typedef struct hywu_guidance {
    const char* name;     /* "text", "image", … */
    double scale;         /* for all samples */
    const double* scales; /* [count], one for each; NULL: `scale` for all */
} hywu_guidance;

/* A batch of requests. Arrays that are NULL leave the single value beside them, or the bundle's default, to
 * all samples. */
typedef struct hywu_edit_params {
    size_t struct_size;
    size_t count;                          /* samples; 1 by default */
    const hywu_pixels* photos;             /* [count * photo_count], sample by sample */
    const char* const* prompts;            /* [count] instructions; NULL: empty */
    const size_t* prompt_lengths;          /* [count] bytes; NULL: they end with a NUL */
    const char* const* negative_prompts;   /* [count] what guidance leads away from; NULL: empty */
    const size_t* negative_prompt_lengths; /* [count] bytes; NULL: they end with a NUL */
    uint64_t seed;                         /* gives each sample noise of its own */
    const uint64_t* seeds;                 /* [count]: sample i is what seeds[i] alone gives */
    const hywu_guidance* guidance;         /* [guidance_count]; others have the bundle's default */
    size_t guidance_count;
    double delta_strength;            /* 1 is as generated, 0 the base model */
    const double* delta_strengths;    /* [count] */
    const hywu_deltas* const* deltas; /* [delta_count]: use these and do not run the generator */
    size_t delta_count;               /* 0; 1: one set for all or for the batch; `count`: one for each */
    const char* sampler;              /* NULL: the bundle's default */
    int32_t steps;                    /* 0: the bundle's default */
    int32_t width, height;            /* pixels; 0: from the first photo, aspect kept */
    int32_t reserved;                 /* 0 */
    const hywu_tensor* noise;   /* float [evaluations, batch, …], for the random numbers of the steps */
    const hywu_tensor* latents; /* float [batch, …], for the initial ones; standard deviation 1 */
    const hywu_tensor* inputs; /* [input_count] tensors of the program by name: those that the bundle takes */
    size_t input_count;        /* from the caller, token ids in place of text, or intermediate results */
    hywu_progress_callback progress; /* may be NULL */
    void* progress_user;
    hywu_cancel* cancel; /* may be NULL */
    double strength;     /* where edits start from the photo: the part of the steps to run, above 0 and at */
                         /* most 1, which keeps nothing of the photo; 0: the bundle's default */
    size_t photo_count; /* photos of each sample; 1 by default. The size of the last is that of the picture */
} hywu_edit_params;
HYWU_API hywu_status hywu_edit_params_init(hywu_edit_params* params, size_t struct_size);

/* Edits a batch of photographs, each with its own deltas. All photos are brought to one working size.
 * HYWU_ERROR_INPUT, _DELTA, _CANCELLED, _UNSUPPORTED (the bundle makes no pictures), _BUNDLE, _ENGINE,
 * _DEVICE, _MEMORY, _CALLBACK. */
HYWU_API hywu_status hywu_edit(hywu_editor* editor, const hywu_edit_params* params, hywu_images** images);
/* The same into memory of the caller's: `count` pictures of 3 * width * height bytes, one after the other;
 * `size` bytes must be exactly that. `width` and `height` may be NULL. */
HYWU_API hywu_status hywu_edit_into(hywu_editor* editor, const hywu_edit_params* params, uint8_t* pixels,
                                    size_t size, int32_t* width, int32_t* height);

HYWU_API size_t hywu_images_count(const hywu_images* images);
HYWU_API hywu_status hywu_images_get(const hywu_images* images, size_t index, hywu_pixels* pixels);
HYWU_API void hywu_images_free(hywu_images* images);

typedef struct hywu_generate_params {
    size_t struct_size;
    const hywu_pixels* photo; /* NULL where `inputs` stand for what is made of it */
    const char* prompt;       /* NULL: empty */
    size_t prompt_length;     /* bytes; HYWU_TERMINATED by default */
    int32_t width, height;    /* as in hywu_edit_params */
    const hywu_tensor* inputs;
    size_t input_count; /* their batch is that of the deltas */
    hywu_cancel* cancel;
    size_t photo_count; /* photos at `photo`; 1 by default */
} hywu_generate_params;
HYWU_API hywu_status hywu_generate_params_init(hywu_generate_params* params, size_t struct_size);

/* The deltas that an edit of the photo with the prompt would use. HYWU_ERROR_…: as hywu_edit. */
HYWU_API hywu_status hywu_generate(hywu_editor* editor, const hywu_generate_params* params,
                                   hywu_deltas** deltas);

/* A request to a bundle of any module (hywu_export.trace): tensors in, tensors out. */
typedef struct hywu_run_params {
    size_t struct_size;
    const hywu_tensor* inputs; /* [input_count] by name; their batch is the request's */
    size_t input_count;
    const char* const* outputs;       /* [output_count] the results to compute, by name */
    size_t output_count;              /* 0: all that the bundle names */
    double delta_strength;            /* 1 is as generated, 0 the base model */
    const double* delta_strengths;    /* [strength_count], one for each sample */
    size_t strength_count;            /* 0: `delta_strength` for all */
    const hywu_deltas* const* deltas; /* [delta_count]: use these and do not run the generator */
    size_t delta_count;               /* 0; 1: one set for all or for the batch; the batch: one for each */
    hywu_cancel* cancel;              /* may be NULL */
} hywu_run_params;
HYWU_API hywu_status hywu_run_params_init(hywu_run_params* params, size_t struct_size);

/* Runs a bundle that names outputs. HYWU_ERROR_…: as hywu_edit; _UNSUPPORTED if it names none. */
HYWU_API hywu_status hywu_run(hywu_editor* editor, const hywu_run_params* params, hywu_tensors** tensors);

HYWU_API size_t hywu_tensors_count(const hywu_tensors* tensors);
/* A tensor by index, in the order of the outputs. */
HYWU_API hywu_status hywu_tensors_get(const hywu_tensors* tensors, size_t index, hywu_tensor* tensor);
HYWU_API void hywu_tensors_free(hywu_tensors* tensors);

/* ---- Deltas ---- */

/* From tensors "<module>.lora_A" [D, r, in] and "<module>.lora_B" [D, out, r], see docs/bundle.md; they are
 * copied. HYWU_ERROR_DELTA. */
HYWU_API hywu_status hywu_deltas_create(const hywu_tensor* tensors, size_t count, hywu_deltas** deltas);
/* Reads and writes a delta file; writing is whole or not at all. HYWU_ERROR_DELTA; HYWU_ERROR_INPUT. */
HYWU_API hywu_status hywu_deltas_load(const char* path, hywu_deltas** deltas);
HYWU_API hywu_status hywu_deltas_save(const hywu_deltas* deltas, const char* path);
/* The weighted sum of sets, exactly: ranks add up, to at most `max_rank` (0: any). HYWU_ERROR_DELTA. */
HYWU_API hywu_status hywu_deltas_blend(const hywu_deltas* const* sets, const double* weights, size_t count,
                                       int64_t max_rank, hywu_deltas** deltas);
/* One set for a batch, sample i using sets[i]; the set of one sample of such a batch. HYWU_ERROR_DELTA. */
HYWU_API hywu_status hywu_deltas_stack(const hywu_deltas* const* sets, size_t count, hywu_deltas** deltas);
HYWU_API hywu_status hywu_deltas_select(const hywu_deltas* set, int64_t sample, hywu_deltas** deltas);
/* Checks that a set is what an editor's bundle takes, for `batch` samples (0: any). HYWU_ERROR_DELTA names
 * the tensor. */
HYWU_API hywu_status hywu_deltas_check(const hywu_deltas* deltas, const hywu_editor* editor, int64_t batch);
/* The largest rank, D (1, or the number of samples), the number of tensors; and a tensor by index, float32,
 * in the order of names. */
HYWU_API int64_t hywu_deltas_rank(const hywu_deltas* deltas);
HYWU_API int64_t hywu_deltas_batch(const hywu_deltas* deltas);
HYWU_API size_t hywu_deltas_count(const hywu_deltas* deltas);
HYWU_API hywu_status hywu_deltas_tensor(const hywu_deltas* deltas, size_t index, hywu_tensor* tensor);
HYWU_API void hywu_deltas_free(hywu_deltas* deltas);

#ifdef __cplusplus
}
#endif

#endif /* HYWU_HYWU_H */
