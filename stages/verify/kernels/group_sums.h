/* What the codes of one group stand for, in a rank and in its source, which have the same codes: compared, and summed.

   They stand for at most sixteen numbers of each: how many of each there are is all that sums need, and often less. */
#ifndef GROUP_SUMS_H
#define GROUP_SUMS_H
#include "lanes.h"

#define MODERATE 1e30f /* scales below give no infinite number */

/* How many of each code there are in the words of each row. */
INLINE void counted(const words *source, size_t deep, const struct lane_rows *rows, numbers counts[CODES])
{
    some_codes low[DEPTH], high[DEPTH];
    for (size_t at = 0; at < deep; at++) {
        low[at] = (some_codes)(source[at] & 0x0F0F0F0Fu);
        high[at] = (some_codes)(source[at] >> 4 & 0x0F0F0F0Fu);
    }
    for (int code = 0; code < CODES; code++) {
        some_codes found = {0}, found_too = {0};
        for (size_t at = 0; at < deep; at++) {
            found -= (some_codes)(low[at] == (uint8_t)code);
            found_too -= (some_codes)(high[at] == (uint8_t)code);
        }
        words sums = (words)(found + found_too);
        sums = (sums & 0x00FF00FFu) + (sums >> 8 & 0x00FF00FFu);
        sums = (sums + (sums >> 16)) & 0xFFFFu & rows->valid;
        counts[code] = __builtin_convertvector((patterns)sums, numbers);
    }
}

/* The sum of the two shorts of each word. */
INLINE numbers of_pairs(shorts sums)
{
    const words both = (words)sums;
    return __builtin_convertvector((patterns)((both & 0xFFFFu) + (both >> 16)), numbers);
}

/* Factors of one group of each row; memory is asked for those of the next, which lie `next` further on: a page away. */
INLINE numbers factors_of(const float *factors, const struct lane_rows *rows, size_t next)
{
    float each[LANES];
    numbers result = {0};
    if (factors == NULL)
        return result;
    if (rows->in_a_row) {
        __builtin_prefetch((const void *)((uintptr_t)(factors + rows->place[0]) + next * sizeof *factors)); /* or behind the last */
        memcpy(&result, factors + rows->place[0], sizeof result);
        return result;
    }
    for (int lane = 0; lane < LANES; lane++)
        each[lane] = factors[rows->place[lane]];
    memcpy(&result, each, sizeof result);
    return result;
}

/* What a group of each row has. */
struct group {
    numbers scale, zero, source_scale, source_zero, constant;
};

INLINE struct group group_of(const struct kept_factors *each, size_t own, size_t theirs, const struct lane_rows *rows)
{
    return (struct group){
        .scale = factors_of(each->scales + own, rows, each->rows),
        .zero = factors_of(each->zeros ? each->zeros + own : NULL, rows, each->rows),
        .source_scale = factors_of(each->source_scales + theirs, rows, each->rows),
        .source_zero = factors_of(each->source_zeros + theirs, rows, each->rows),
        .constant = factors_of(each->constant + own, rows, each->rows),
    };
}

INLINE numbers magnitudes(numbers values)
{
    return (numbers)((patterns)values & 0x7FFFFFFF);
}

/* The numbers that a code stands for, of LANES rows, what is allowed between them, and how far they are apart. */
struct pair {
    numbers actual, expected, allowed, difference, error;
};

INLINE struct pair pair_of(int code, const struct group *group, float slope)
{
    struct pair pair;
    /* In the order in which NumPy computes it. */
    pair.actual = (float)(code - CODES / 2) * group->scale + group->zero;
    pair.expected = ((float)code - group->source_zero) * group->source_scale;
    pair.allowed = magnitudes(pair.actual - group->zero) * slope + group->constant;
    pair.difference = pair.actual - pair.expected;
    pair.error = magnitudes(pair.difference);
    return pair;
}

/* Sums in double: squares of very small or very large values are no float32. */
static void summed_widely(const numbers counts[CODES], const struct group *group, struct figures *figures)
{
    for (int code = 0; code < CODES; code++) {
        const struct pair pair = pair_of(code, group, 0);
        for (int lane = 0; lane < LANES; lane++)
            if (counts[code][lane] > 0) {
                const double count = (double)counts[code][lane], error = (double)pair.error[lane];
                const double actual = (double)pair.actual[lane], expected = (double)pair.expected[lane];
                figures->noise += count * error * error;
                figures->power += count * expected * expected;
                figures->square += count * actual * actual;
            }
    }
}

INLINE double all_lanes(numbers lanes)
{
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++)
        sum += (double)lanes[lane];
    return sum;
}

/* Adds to the sums; returns 0 where they are too small or too large for what they were computed in. */
INLINE int added(numbers noise, numbers power, numbers square, struct figures *figures)
{
    const double noisy = all_lanes(noise), sums[2] = {all_lanes(power), all_lanes(square)};
    int fine = noisy == 0 || (noisy > LEAST_SUM && noisy < GREATEST_SUM);
    for (int i = 0; i < 2; i++)
        fine &= sums[i] > LEAST_SUM && sums[i] < GREATEST_SUM;
    if (fine) {
        figures->noise += noisy;
        figures->power += sums[0];
        figures->square += sums[1];
    }
    return fine;
}

/* Whether the rank's numbers of a group are the source's, as exact as they are: its scale, times a whole number of no more than five
   bits. Scales of 11 bits leave room for these. */
INLINE int same_numbers(const struct group *group, const struct lane_rows *rows)
{
    const numbers shift = CODES / 2 - group->source_zero;
    const numbers whole = __builtin_convertvector(__builtin_convertvector(shift, patterns), numbers);
    const patterns same = (group->scale == group->source_scale) & (group->zero == shift * group->scale) & (whole == shift)
        & (magnitudes(shift) <= (float)CODES) & (magnitudes(group->scale) < MODERATE)
        & (((patterns)group->scale & 0x1FFF) == 0);
    const patterns other = ~same & (patterns)rows->valid;
    int32_t any = 0;
    for (int lane = 0; lane < LANES; lane++)
        any |= other[lane];
    return !any;
}

/* Takes in some codes of one group, if the rank's numbers are as far from the source's whatever the code, and surely right: then the
   codes' sum and that of their squares are enough. Otherwise returns 0. */
INLINE int taken_in_alike(const words *source, size_t deep, const struct group *group, float slope,
                          const struct lane_rows *rows, struct figures *figures)
{
    const float sure = figures->worst * ALIKE;
    const int same = same_numbers(group, rows);
    const numbers apart = same ? (numbers){0} : pair_of(0, group, slope).difference;
    patterns other = {0};
    for (int code = 0; !same && code < CODES; code++) {
        const struct pair pair = pair_of(code, group, slope);
        other |= ~((pair.difference == apart) & (pair.error <= pair.allowed * sure));
    }
    other &= (patterns)rows->valid;
    int32_t any = 0;
    uint32_t most = as_bits(figures->greatest);
    const patterns error = (patterns)magnitudes(apart) & (patterns)rows->valid;
    for (int lane = 0; lane < LANES; lane++) {
        any |= other[lane];
        most = (uint32_t)error[lane] > most ? (uint32_t)error[lane] : most;
    }
    if (any)
        return 0;
    /* Two codes a word: sums of a group are no more than 16 bits. */
    shorts sum = {0}, squares = {0};
    for (size_t at = 0; at < deep; at++)
        for (int place = 0; place < 16; place += 4) {
            const shorts codes = (shorts)(source[at] >> place & 0x000F000Fu);
            sum += codes;
            squares += codes * codes;
        }
    const numbers codes = of_pairs(sum) * rows->one, square = of_pairs(squares) * rows->one;
    const numbers count = (float)(int)(deep * OF_WORD) * rows->one, zero = group->source_zero, scale = group->source_scale;
    const numbers alone = codes - count * zero, power = scale * scale * (square - zero * (alone + codes));
    const numbers noise = count * apart * apart;
    if (!added(noise, power, power + 2 * apart * scale * alone + noise, figures))
        return 0;
    figures->greatest = as_float(most);
    return 1;
}

/* Takes in some codes of one group; `own` and `theirs`: where the factors of the group begin. Returns 0 where a value is not right
   for sure. */
INLINE int taken_in(const words *source, size_t deep, const struct kept_factors *each, size_t own, size_t theirs,
                    const struct lane_rows *rows, struct figures *figures)
{
    numbers counts[CODES], noise = {0}, power = {0}, square = {0};
    patterns wrong = {0}, greatest = {0};
    const float sure = figures->worst * ALIKE;
    const struct group group = group_of(each, own, theirs, rows);
    if (taken_in_alike(source, deep, &group, each->slope, rows, figures))
        return 1;
    counted(source, deep, rows, counts);
    for (int code = 0; code < CODES; code++) {
        const struct pair pair = pair_of(code, &group, each->slope);
        const patterns there = counts[code] > 0, error = (patterns)pair.error & there, more = error > greatest;
        greatest = (error & more) | (greatest & ~more);
        wrong |= there & ~(pair.error <= pair.allowed * sure);
        const numbers noisy = (numbers)((patterns)pair.error & there);
        noise += counts[code] * noisy * noisy;
        power += counts[code] * pair.expected * pair.expected;
        square += counts[code] * pair.actual * pair.actual;
    }
    uint32_t most = as_bits(figures->greatest);
    int any = 0;
    for (int lane = 0; lane < LANES; lane++) {
        most = (uint32_t)greatest[lane] > most ? (uint32_t)greatest[lane] : most;
        any |= wrong[lane];
    }
    for (int code = 0; any && code < CODES; code++) {
        const struct pair pair = pair_of(code, &group, each->slope);
        const numbers parts = pair.error / pair.allowed;
        for (int lane = 0; lane < LANES; lane++)
            if (counts[code][lane] > 0)
                figures->worst = parts[lane] <= figures->worst ? figures->worst
                    : parts[lane] > figures->worst ? parts[lane] : __builtin_inff();
    }
    if (!(figures->worst < NEARLY) || most >= 0x7F800000u)
        return 0;
    figures->greatest = as_float(most);
    if (!added(noise, power, square, figures))
        summed_widely(counts, &group, figures);
    return 1;
}

#endif
