/* The kernels as a program, for processors that are emulated: a job a line, "name input_bytes output_bytes count numbers...", and the
   input behind it; answers a byte, what the kernel returned, and the output. */
#include "kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern const struct kernels kernels_baseline;

static int run(const char *name, const double *n, const void *in, void *out)
{
    const struct kernels *k = &kernels_baseline;
    const size_t a = (size_t)n[0], b = (size_t)n[1], c = (size_t)n[2];
    const enum number type = (enum number)n[3];
    if (!strcmp(name, "weight_only_scales"))
        return k->weight_only_scales(in, type, a, b, c, (int)n[4], out);
    if (!strcmp(name, "weight_only_codes")) {
        const struct order order = {(int)n[4], (size_t)n[5], (int)n[6]};
        uint8_t *work = malloc(order.columns * b);
        float *scales = out; /* and the codes behind them */
        int bad = k->weight_only_codes(in, type, a, b, c, order, work, (uint8_t *)(scales + a * c), scales);
        free(work);
        return bad;
    }
    if (!strcmp(name, "float8_scales"))
        return k->float8_scales(in, type, a, b, c, (float)n[4], out);
    if (!strcmp(name, "float8_codes"))
        return k->float8_codes(in, type, a, b, c, (float)n[4], (uint8_t *)((float *)out + a * c), out);
    if (!strcmp(name, "float8_rescaled"))
        return k->float8_rescaled(in, a, (float)n[1], (float)n[2], out), 0;
    if (!strcmp(name, "cast"))
        return k->cast(in, (enum number)n[1], a, (enum number)n[2], out), 0;
    if (!strcmp(name, "arranged"))
        return k->arranged(in, a, b, (struct order){(int)n[2], (size_t)n[3], (int)n[4]}, out), 0;
    if (!strcmp(name, "transposed"))
        return k->transposed(in, b, a, b, out, a), 0;
    if (!strcmp(name, "awq_codes"))
        return k->awq_codes(in, b, a, b, out, a / 2), 0;
    if (!strcmp(name, "column_magnitudes"))
        return k->column_magnitudes(in, b, a, b, out), 0;
    if (!strcmp(name, "smoothed_magnitudes")) /* the factors, and the values behind them */
        return k->smoothed_magnitudes((const uint16_t *)((const double *)in + b), b, a, b, in, out), 0;
    if (!strcmp(name, "smoothed"))
        return k->smoothed((const uint16_t *)((const double *)in + b), b, a, b, in, (uint16_t *)out + a, out), 0;
    if (!strcmp(name, "smoothed_codes")) /* the scales, and the values behind them */
        return k->smoothed_codes((const uint16_t *)((const float *)in + a), b, a, b, in, (int)n[2], (int)n[3], out), 0;
    if (!strcmp(name, "gguf_numbers"))
        return k->gguf_numbers(in, a, (enum block)n[1], out), 0;
    if (!strcmp(name, "gguf_cast"))
        return k->gguf_cast(in, a, (enum block)n[1], (enum number)n[2], out), 0;
    return 2;
}

int main(void)
{
    char name[32];
    size_t in_bytes, out_bytes;
    int count;
    for (int i = 0; i < BLOCK_TYPES; i++)
        printf("%s %zu %zu%c", BLOCKS[i].name, BLOCKS[i].bytes, BLOCKS[i].elements, i + 1 < BLOCK_TYPES ? ' ' : '\n');
    fflush(stdout);
    while (scanf("%31s %zu %zu %d", name, &in_bytes, &out_bytes, &count) == 4) {
        double numbers[8] = {0};
        for (int i = 0; i < count && i < 8; i++)
            if (scanf("%lf", numbers + i) != 1)
                return 1;
        getchar();
        void *in = malloc(in_bytes + 1), *out = calloc(out_bytes + 1, 1);
        if (fread(in, 1, in_bytes, stdin) != in_bytes)
            return 1;
        putchar(run(name, numbers, in, out));
        fwrite(out, 1, out_bytes, stdout);
        fflush(stdout);
        free(in);
        free(out);
    }
    return 0;
}
