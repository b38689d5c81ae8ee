/* A rank's codes and the source's numbers, compared: decoded some hundred numbers at a time, which stay in the processor's
   nearest cache, and summed. What is not right for sure is left to the twin, which says what is wrong and where: comparison.py.
   */
#include "lanes.h"

#define CHUNK 2048

/* What is summed over a chunk, lane by lane. */
struct lanes {
    numbers noise, power, square;
    patterns greatest;
};

/* What some numbers of one group have in common. */
struct segment {
    float constant, zero, top;
};

INLINE numbers loaded(const float *from)
{
    numbers values;
    memcpy(&values, from, sizeof values);
    return values;
}

INLINE numbers magnitudes(numbers values)
{
    return (numbers)((patterns)values & 0x7FFFFFFF);
}

INLINE numbers allowed(const struct bound *bound, const struct segment *segment, numbers actual, numbers expected, enum base base,
                       int over)
{
    numbers of = base == OF_EXPECTED ? expected : base == OF_ACTUAL ? actual : actual - segment->zero;
    numbers result = magnitudes(of) * bound->slope + segment->constant;
    if (over) {
        numbers more = expected - segment->top;
        patterns above = expected > segment->top;
        result += (numbers)((patterns)more & above) * bound->slack;
    }
    return result;
}

/* The worst part of what is allowed, of `count` numbers; infinite where one is no number. */
INLINE float worst_of(const float *actual, const float *expected, size_t count, const struct bound *bound,
                      const struct segment *segment, enum base base, int over, float worst)
{
    for (size_t i = 0; i < count; i += LANES) {
        numbers a = loaded(actual + i), e = loaded(expected + i);
        numbers parts = magnitudes(a - e) / allowed(bound, segment, a, e, base, over);
        for (int j = 0; j < LANES; j++)
            worst = parts[j] <= worst ? worst : parts[j] > worst ? parts[j] : __builtin_inff();
    }
    return worst;
}

/* Takes in LANES numbers; returns where they are right. */
INLINE patterns taken_in(struct lanes *lanes, const float *actual, const float *expected, const struct bound *bound,
                         const struct segment *segment, enum base base, int over, float sure)
{
    numbers a = loaded(actual), e = loaded(expected), difference = a - e;
    patterns error = (patterns)difference & 0x7FFFFFFF, more = error > lanes->greatest;
    lanes->greatest = (error & more) | (lanes->greatest & ~more);
    lanes->noise += difference * difference;
    lanes->power += e * e;
    lanes->square += a * a;
    return (numbers)error <= allowed(bound, segment, a, e, base, over) * sure;
}

INLINE struct lanes joined(struct lanes one, struct lanes two)
{
    patterns more = two.greatest > one.greatest;
    one.greatest = (two.greatest & more) | (one.greatest & ~more);
    one.noise += two.noise;
    one.power += two.power;
    one.square += two.square;
    return one;
}

INLINE float compared_segment(const float *actual, const float *expected, size_t count, const struct bound *bound,
                              const struct segment *segment, enum base base, int over, float worst, struct lanes *lanes)
{
    /* Two at once: one sum has not ended when the next begins. */
    struct lanes even = *lanes, odd = {0};
    patterns right = {0};
    right = ~right;
    const float sure = worst * ALIKE;
    size_t i = 0;
    for (; i + LANES < count; i += 2 * LANES) {
        right &= taken_in(&even, actual + i, expected + i, bound, segment, base, over, sure);
        right &= taken_in(&odd, actual + i + LANES, expected + i + LANES, bound, segment, base, over, sure);
    }
    if (i < count)
        right &= taken_in(&even, actual + i, expected + i, bound, segment, base, over, sure);
    *lanes = joined(even, odd);
    int32_t all = -1;
    for (int j = 0; j < LANES; j++)
        all &= right[j];
    return all ? worst : worst_of(actual, expected, count, bound, segment, base, over, worst);
}

/* Each base, with and without numbers above the top, is a loop of its own. */
static float compared_some(const float *actual, const float *expected, size_t count, const struct bound *bound,
                           const struct segment *segment, float worst, struct lanes *lanes)
{
    if (bound->base == OF_ACTUAL)
        return compared_segment(actual, expected, count, bound, segment, OF_ACTUAL, 0, worst, lanes);
    if (bound->base == OF_PRODUCT)
        return compared_segment(actual, expected, count, bound, segment, OF_PRODUCT, 0, worst, lanes);
    if (bound->top > 0)
        return compared_segment(actual, expected, count, bound, segment, OF_EXPECTED, 1, worst, lanes);
    return compared_segment(actual, expected, count, bound, segment, OF_EXPECTED, 0, worst, lanes);
}

static double summed(numbers lanes, const float *values, const float *less, size_t count)
{
    double sum = 0;
    for (int j = 0; j < LANES; j++)
        sum += lanes[j];
    if (sum > LEAST_SUM && sum < GREATEST_SUM)
        return sum;
    sum = 0;
    for (size_t i = 0; i < count; i++) {
        double value = (double)(less ? values[i] - less[i] : values[i]);
        sum += value * value;
    }
    return sum;
}

/* The end of the group of a row of `features` that column `at` is in. */
INLINE size_t group_end(size_t at, size_t features, size_t groups)
{
    const size_t size = features / groups;
    return (at / size + 1) * size;
}

/* Unsigned or signed codes of a row, one a byte, and what is taken from each to make it signed. */
INLINE int codes_of_row(const struct stored *stored, const struct run *run, size_t row, size_t at, size_t count, uint8_t *codes)
{
    const int middle = 1 << (stored->bits - 1);
    const size_t bits = (size_t)stored->bits;
    if (stored->kind == PAIRS) {
        const uint8_t *own = stored->data + row / 2 * stored->features + at;
        const int shift = row % 2 ? 4 : 0;
        for (size_t i = 0; i < count; i++)
            codes[i] = (uint8_t)((own[i] >> shift & 15) ^ 8);
        return 8;
    }
    if (stored->places == NULL) {
        const uint8_t *own = stored->data + (row * stored->features + at) * bits / 8;
        if (bits == 4)
            halves(own, count, codes);
        else
            memcpy(codes, own, count);
        for (size_t i = 0; i < count; i++)
            codes[i] ^= (uint8_t)middle;
        return middle;
    }
    /* Tiles of the unit's rows alternate, 64 in-features each; of a unit of one row they follow one another. */
    const uint8_t *unit = stored->data + row / stored->columns * stored->columns * stored->features * bits / 8;
    for (size_t done = 0; done < count; done += 64) {
        const size_t tile = (at + done) / 64, some = count - done < 64 ? count - done : 64;
        const uint8_t *own = unit + (tile * stored->columns + row % stored->columns) * 64 * bits / 8;
        if (bits == 8)
            unmixed8(own, some, run, codes + done);
        else
            unmixed4(own, some, run, codes + done);
    }
    return middle;
}

static void actual_numbers(const struct stored *stored, const struct run *run, size_t row, size_t of, size_t at, size_t count,
                           uint8_t *restrict codes, float *restrict out)
{
    const float *scales = stored->scales + (stored->scale_rows > 1 ? of * stored->groups : 0);
    const float *zeros = stored->zeros ? stored->zeros + of * stored->groups : NULL;
    const size_t size = stored->features / stored->groups;
    int middle = 0;
    if (stored->kind == SMALL_FLOATS)
        memcpy(codes, stored->data + row * stored->features + at, count);
    else
        middle = codes_of_row(stored, run, row, at, count, codes);
    for (size_t i = 0, end; i < count; i = end) {
        end = group_end(at + i, stored->features, stored->groups) - at;
        end = end < count ? end : count;
        const float scale = scales[(at + i) / size];
        if (stored->kind == SMALL_FLOATS)
            for (size_t j = i; j < end; j++)
                out[j] = of_eight(codes[j]) * scale;
        else if (zeros == NULL)
            for (size_t j = i; j < end; j++)
                out[j] = (float)((int32_t)codes[j] - middle) * scale;
        else {
            const float zero = zeros[(at + i) / size];
            for (size_t j = i; j < end; j++)
                out[j] = (float)((int32_t)codes[j] - middle) * scale + zero;
        }
    }
}

static void plain_numbers(const struct expected *expected, size_t row, size_t at, size_t count, uint8_t *restrict codes,
                          float *restrict out)
{
    const size_t first = row * expected->stride + at;
    switch (expected->kind) {
    case BRAIN:
        for (size_t i = 0; i < count; i++)
            out[i] = of_brain(((const uint16_t *)expected->data)[first + i]);
        break;
    case HALF:
        for (size_t i = 0; i < count; i++)
            out[i] = of_half(((const uint16_t *)expected->data)[first + i]);
        break;
    case SINGLE:
        memcpy(out, (const float *)expected->data + first, count * sizeof *out);
        break;
    case EIGHT:
        for (size_t i = 0; i < count; i++)
            out[i] = of_eight(((const uint8_t *)expected->data)[first + i]);
        break;
    case CODES4:
        halves((const uint8_t *)expected->data + row * expected->stride + at / 2, count, codes);
        for (size_t i = 0; i < count; i++)
            out[i] = (float)(int32_t)codes[i];
        break;
    case CODES8:
        for (size_t i = 0; i < count; i++)
            out[i] = (float)(int32_t)((const uint8_t *)expected->data)[first + i];
        break;
    }
}

static void expected_numbers(const struct expected *expected, size_t row, size_t features, size_t at, size_t count, uint8_t *codes,
                             float *out)
{
    plain_numbers(expected, row, at, count, codes, out);
    if (expected->scales == NULL)
        return;
    const float *scales = expected->scales + (expected->scale_rows > 1 ? row * expected->groups : 0);
    const float *zeros = expected->zeros ? expected->zeros + (expected->zero_rows > 1 ? row * expected->groups : 0) : NULL;
    const size_t size = features / expected->groups;
    for (size_t i = 0, end; i < count; i = end) {
        end = group_end(at + i, features, expected->groups) - at;
        end = end < count ? end : count;
        const float scale = scales[(at + i) / size], zero = zeros ? zeros[(at + i) / size] : 0;
        for (size_t j = i; j < end; j++)
            out[j] = (out[j] - zero) * scale;
    }
}

INLINE float largest_of(const float *values, size_t count, float largest)
{
    uint32_t most = as_bits(largest);
    for (size_t i = 0; i < count; i++) {
        uint32_t magnitude = as_bits(values[i]) & 0x7FFFFFFFu;
        most = magnitude > most ? magnitude : most;
    }
    return as_float(most);
}

/* The largest magnitude of a row of the source. */
static float largest_of_row(const struct expected *expected, size_t row, size_t features, uint8_t *codes, float *some)
{
    if ((expected->kind == BRAIN || expected->kind == HALF) && expected->scales == NULL) {
        /* Magnitudes of 16-bit floats order as their patterns do. */
        const uint16_t *values = (const uint16_t *)expected->data + row * expected->stride;
        uint16_t most = 0;
        for (size_t i = 0; i < features; i++) {
            uint16_t magnitude = values[i] & 0x7FFF;
            most = magnitude > most ? magnitude : most;
        }
        return expected->kind == BRAIN ? of_brain(most) : of_half(most);
    }
    float largest = 0;
    for (size_t at = 0; at < features; at += CHUNK) {
        const size_t count = features - at < CHUNK ? features - at : CHUNK;
        expected_numbers(expected, row, features, at, count, codes, some);
        largest = largest_of(some, count, largest);
    }
    return largest;
}

int AT_LEVEL(compared)(const struct stored *stored, size_t first, size_t rows, const struct expected *expected,
                       const struct bound *bound, struct figures *figures)
{
    _Alignas(64) float actual[CHUNK + LANES], wanted[CHUNK + LANES];
    _Alignas(64) uint8_t codes[CHUNK + 64];
    const size_t features = stored->features;
    const struct run run = run_of(stored->places, stored->bits);
    uint32_t greatest = 0;
    for (size_t row = 0; row < rows; row++) {
        float largest = bound->largest == OF_ROW ? largest_of_row(expected, row, features, codes, wanted) : 0;
        for (size_t at = 0; at < features; at += CHUNK) {
            const size_t count = features - at < CHUNK ? features - at : CHUNK;
            actual_numbers(stored, &run, first + row, row, at, count, codes, actual);
            expected_numbers(expected, row, features, at, count, codes, wanted);
            memset(actual + count, 0, LANES * sizeof *actual);
            memset(wanted + count, 0, LANES * sizeof *wanted);
            struct lanes lanes = {0};
            for (size_t i = 0, end; i < count; i = end) {
                end = group_end(at + i, features, bound->groups) - at;
                end = end < count ? end : count;
                const size_t group = (at + i) / (features / bound->groups);
                if (bound->largest == OF_GROUP)
                    largest = largest_of(wanted + i, end - i, 0);
                struct segment segment = {
                    .constant = bound->constant[(bound->rows > 1 ? row * bound->groups : 0) + group],
                    .zero = bound->base == OF_PRODUCT ? stored->zeros[row * stored->groups + group] : 0,
                    .top = largest * bound->top,
                };
                if (bound->largest != OF_NONE)
                    segment.constant = largest * bound->factor + segment.constant;
                figures->worst = compared_some(actual + i, wanted + i, end - i, bound, &segment, figures->worst, &lanes);
            }
            uint32_t most = 0;
            for (int j = 0; j < LANES; j++)
                most = (uint32_t)lanes.greatest[j] > most ? (uint32_t)lanes.greatest[j] : most;
            greatest = most > greatest ? most : greatest;
            if (!(figures->worst < NEARLY) || most >= 0x7F800000u)
                return 0;
            figures->noise += most ? summed(lanes.noise, actual, wanted, count) : 0;
            figures->power += summed(lanes.power, wanted, NULL, count);
            figures->square += summed(lanes.square, actual, NULL, count);
        }
    }
    figures->greatest = as_float(greatest);
    return 1;
}
