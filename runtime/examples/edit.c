/* Edits a picture with the C ABI. Pictures are binary PPM files (P6), which need no library:
 *
 *     cc -std=c99 edit.c $(pkg-config --cflags --libs hywu) -o edit
 *     ./edit BUNDLE photo.ppm "make it sepia" edited.ppm
 */
#include <hywu/hywu.h>
#include <stdio.h>
#include <stdlib.h>

static uint8_t* read_ppm(const char* path, int32_t* width, int32_t* height) {
    FILE* file = fopen(path, "rb");
    uint8_t* pixels = NULL;
    int w = 0, h = 0, most = 0;
    if (file != NULL && fscanf(file, "P6 %5d %5d %3d", &w, &h, &most) == 3 && w > 0 && h > 0 && most == 255 &&
        fgetc(file) != EOF) {
        const size_t size = (size_t)w * (size_t)h * 3;
        pixels = malloc(size);
        if (pixels != NULL && fread(pixels, 1, size, file) != size) {
            free(pixels);
            pixels = NULL;
        }
    }
    if (file != NULL) fclose(file);
    *width = w;
    *height = h;
    return pixels;
}

static int write_ppm(const char* path, hywu_pixels picture) {
    FILE* file = fopen(path, "wb");
    int good = file != NULL && fprintf(file, "P6\n%d %d\n255\n", (int)picture.width, (int)picture.height) > 0;
    int32_t y;
    for (y = 0; good && y < picture.height; ++y) {
        const size_t row = (size_t)picture.width * 3;
        good = fwrite(picture.data + (size_t)y * picture.stride, 1, row, file) == row;
    }
    if (file != NULL) good = fclose(file) == 0 && good;
    return good;
}

static int32_t show_progress(void* user, int32_t done, int32_t total) {
    (void)user;
    fprintf(stderr, "step %d of %d\n", (int)done, (int)total);
    return 0; /* go on */
}

int main(int count, char** values) {
    hywu_editor* editor = NULL;
    hywu_images* images = NULL;
    hywu_edit_params params;
    hywu_pixels photo = {0}, edited;
    uint8_t* rgb;
    const char* prompt;
    int failed = 1;

    if (count != 5) {
        fprintf(stderr, "Usage: %s BUNDLE PHOTO.ppm PROMPT OUT.ppm\n", values[0]);
        return 2;
    }
    rgb = read_ppm(values[2], &photo.width, &photo.height);
    if (rgb == NULL) {
        fprintf(stderr, "%s cannot be read as a binary PPM picture.\n", values[2]);
        return 2;
    }
    photo.data = rgb;
    prompt = values[3];
    hywu_edit_params_init(&params, sizeof params);
    params.photos = &photo;
    params.prompts = &prompt;
    params.seed = 42;
    params.progress = show_progress;

    if (hywu_editor_load(values[1], NULL, NULL, &editor) != HYWU_OK ||
        hywu_edit(editor, &params, &images) != HYWU_OK || hywu_images_get(images, 0, &edited) != HYWU_OK) {
        fprintf(stderr, "%s: %s\n", hywu_status_name(hywu_last_status()), hywu_last_error());
    } else if (!write_ppm(values[4], edited)) {
        fprintf(stderr, "%s cannot be written.\n", values[4]);
    } else {
        printf("%s: %dx%d on %s\n", values[4], (int)edited.width, (int)edited.height,
               hywu_editor_backend(editor));
        failed = 0;
    }
    hywu_images_free(images);
    hywu_editor_free(editor);
    free(rgb);
    return failed;
}
