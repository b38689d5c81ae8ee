/* A rank's codes of 4 bits held against the source's, which it has kept, where the source packs them along columns; and what both
   make of them, summed.

   Codes that are equal stand, within a group, for at most sixteen numbers, of the rank and of the source: how many of each there
   are is all that sums need. Sixteen rows are computed with at once, a lane each, as words of eight codes of neighbouring
   in-features. */
#include "numbers_of.h"

/* Rows at once: as many as the processor's vectors have words. */
#ifndef LANES
#if defined(__AVX512BW__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#endif
#define AHEAD 64 /* words further on in a row, which memory is asked for beforehand: its own guesses end with a page */
#define CODES 16
#define RUN 4        /* words of the 16 bytes that an order mixes */
#define DEPTH 16     /* words of a row at once: 128 in-features */
#define OF_WORD 8    /* codes */
#define MODERATE 1e30f /* scales below give no infinite number */

typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t patterns __attribute__((vector_size(4 * LANES)));
typedef float numbers __attribute__((vector_size(4 * LANES)));
typedef uint16_t shorts __attribute__((vector_size(4 * LANES)));
typedef uint32_t four __attribute__((vector_size(16)));
typedef uint8_t some_codes __attribute__((vector_size(4 * LANES)));

#ifdef __clang__
#define SHUFFLED(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SHUFFLED(a, b, i, j, k, l) __builtin_shuffle(a, b, (four){i, j, k, l})
#endif

/* An order of the codes of a run. `mixed`: the word that holds a code, and where in it; otherwise all are in their places. `codes`: the
   code that each place of a word holds. `sign`: differs from the source's codes in each. */
struct run_places {
    int mixed;
    uint32_t word[RUN][OF_WORD], shift[RUN][OF_WORD], codes[RUN][OF_WORD], sign;
};

/* Sixteen rows: where a rank has their codes, their places among the factors, and ones in the lanes that are rows. */
struct sixteen_rows {
    const uint8_t *own[LANES];
    size_t place[LANES];
    words valid;
    numbers one;
};

INLINE size_t fewer(size_t a, size_t b)
{
    return a < b ? a : b;
}

static struct run_places places_of(const uint8_t *places)
{
    struct run_places result = {.mixed = places != NULL, .sign = places != NULL ? 0 : 0x88888888u};
    for (uint32_t code = 0; code < RUN * OF_WORD; code++) {
        const uint32_t place = places != NULL ? places[code] : code;
        result.word[code / OF_WORD][code % OF_WORD] = place / OF_WORD;
        result.shift[code / OF_WORD][code % OF_WORD] = 4u * (place % OF_WORD);
        result.codes[place / OF_WORD][place % OF_WORD] = code;
    }
    return result;
}

/* Words in a row, those behind `count` zero. */
INLINE words words_at(const uint32_t *from, size_t count)
{
    words result = {0};
    if (count >= LANES) {
        if (count >= AHEAD)
            __builtin_prefetch(from + AHEAD);
        memcpy(&result, from, sizeof result);
    }
    else
        memcpy(&result, from, count * sizeof *from);
    return result;
}

/* A run of each row, as a word of each row. */
INLINE void runs_as_words(const struct sixteen_rows *rows, size_t offset, words run[RUN])
{
    for (int lane = 0; lane < LANES; lane += 4) {
        four a, b, c, d;
        memcpy(&a, rows->own[lane] + offset, sizeof a);
        memcpy(&b, rows->own[lane + 1] + offset, sizeof b);
        memcpy(&c, rows->own[lane + 2] + offset, sizeof c);
        memcpy(&d, rows->own[lane + 3] + offset, sizeof d);
        const four low = SHUFFLED(a, b, 0, 4, 1, 5), high = SHUFFLED(a, b, 2, 6, 3, 7);
        const four low_too = SHUFFLED(c, d, 0, 4, 1, 5), high_too = SHUFFLED(c, d, 2, 6, 3, 7);
        const four each[RUN] = {SHUFFLED(low, low_too, 0, 1, 4, 5), SHUFFLED(low, low_too, 2, 3, 6, 7),
                                SHUFFLED(high, high_too, 0, 1, 4, 5), SHUFFLED(high, high_too, 2, 3, 6, 7)};
        for (int word = 0; word < RUN; word++)
            memcpy((uint32_t *)&run[word] + lane, &each[word], sizeof each[word]);
    }
}

/* Where the rank's codes from an in-feature on are others than the source's `deep` words, a whole number of runs. A unit's rows,
   `columns` of them, alternate in tiles of 64 codes. `mixed`: as the source's are not. */
INLINE words differing(const struct sixteen_rows *rows, size_t columns, size_t feature, const struct run_places *places, int mixed,
                       const words *source, size_t deep)
{
    words result = {0};
    for (size_t at = 0; at < deep; at += RUN) {
        words run[RUN];
        const size_t code = feature + at * OF_WORD;
        runs_as_words(rows, code / 64 * columns * 32 + code % 64 / 2, run);
        for (int word = 0; word < RUN; word++) {
            words codes = {0};
            if (!mixed)
                codes = run[word];
            for (int code = 0; mixed && code < OF_WORD; code++)
                codes |= (run[places->word[word][code]] >> places->shift[word][code] & 15u) << 4 * code;
            result |= codes ^ source[at + word] ^ places->sign;
        }
    }
    return result & rows->valid;
}

/* How many of each code there are in the words of each row. */
INLINE void counted(const words *source, size_t deep, const struct sixteen_rows *rows, numbers counts[CODES])
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

INLINE numbers factors_of(const float *factors, const struct sixteen_rows *rows)
{
    float each[LANES];
    numbers result = {0};
    for (int lane = 0; factors != NULL && lane < LANES; lane++)
        each[lane] = factors[rows->place[lane]];
    if (factors != NULL)
        memcpy(&result, each, sizeof result);
    return result;
}

/* What a group of each row has. */
struct group {
    numbers scale, zero, source_scale, source_zero, constant;
};

INLINE struct group group_of(const struct kept_factors *each, size_t own, size_t theirs, const struct sixteen_rows *rows)
{
    return (struct group){
        .scale = factors_of(each->scales + own, rows),
        .zero = factors_of(each->zeros ? each->zeros + own : NULL, rows),
        .source_scale = factors_of(each->source_scales + theirs, rows),
        .source_zero = factors_of(each->source_zeros + theirs, rows),
        .constant = factors_of(each->constant + own, rows),
    };
}

INLINE numbers magnitudes(numbers values)
{
    return (numbers)((patterns)values & 0x7FFFFFFF);
}

/* The numbers that a code stands for, of sixteen rows, what is allowed between them, and how far they are apart. */
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
INLINE int same_numbers(const struct group *group, const struct sixteen_rows *rows)
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
                          const struct sixteen_rows *rows, struct figures *figures)
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
                    const struct sixteen_rows *rows, struct figures *figures)
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

/* Eight rows of words that hold a code of each of eight columns, as the word of eight codes of each column. */
INLINE void columns_of(words rows[OF_WORD])
{
    static const uint32_t MASKS[] = {0x0000FFFFu, 0x00FF00FFu, 0x0F0F0F0Fu};
    for (int step = OF_WORD / 2, level = 0; step > 0; step /= 2, level++)
        for (int i = 0; i < OF_WORD; i++)
            if (!(i & step)) {
                const words both = ((rows[i] >> 4 * step) ^ rows[i + step]) & MASKS[level];
                rows[i + step] ^= both;
                rows[i] ^= both << 4 * step;
            }
}

/* Sixteen rows from `first` on, `apart` from one another, of `count` in all; those before `skip` are none. */
static struct sixteen_rows rows_of(const struct stored *stored, size_t first_row, size_t first, size_t apart, size_t skip,
                                   size_t count)
{
    struct sixteen_rows rows = {0};
    for (size_t lane = 0; lane < LANES; lane++) {
        const size_t place = first + lane * apart;
        const int valid = place >= skip && place - skip < count;
        const size_t row = first_row + (valid ? place - skip : 0);
        rows.own[lane] = stored->data + row / stored->columns * stored->columns * stored->features / 2;
        rows.own[lane] += row % stored->columns * 32;
        rows.place[lane] = valid ? place - skip : 0;
        rows.valid[lane] = valid ? ~0u : 0;
        rows.one[lane] = (float)valid;
    }
    return rows;
}

/* The in-features from `at` on that are of one group of the rank and of the source, and no more than are computed with at once. */
INLINE size_t of_a_group(size_t at, size_t left, size_t size, size_t source_size)
{
    size_t count = fewer(left, DEPTH * OF_WORD);
    count = fewer(count, size - at % size);
    return fewer(count, source_size - at % source_size);
}

int AT_LEVEL(kept)(const struct stored *stored, size_t first, const struct packed *packed, const struct kept_factors *each,
                   struct figures *figures)
{
    const struct run_places places = places_of(stored->places);
    const size_t columns = packed->order ? OF_WORD : 1, rows = each->rows;
    const int mixed = places.mixed && packed->order == NULL;
    for (size_t word = 0; word < packed->columns; word += LANES) {
        struct sixteen_rows some[OF_WORD];
        for (size_t column = 0; column < columns; column++)
            some[column] = rows_of(stored, first, word * columns + column, columns, packed->skip, rows);
        const size_t wide = packed->columns - word;
        for (size_t at = 0, count; at < packed->features; at += count) {
            const size_t feature = packed->start + at;
            count = of_a_group(feature, packed->features - at, each->size, each->source_size);
            const size_t deep = count / OF_WORD, own = feature / each->size * rows, theirs = feature / each->source_size * rows;
            words source[OF_WORD][DEPTH];
            /* Words of eight columns are made words of eight codes of each in any order: in the rank's. */
            for (size_t i = 0; i < deep; i++) {
                if (packed->order == NULL) {
                    source[0][i] = words_at(packed->words + (at / OF_WORD + i) * packed->stride + word, wide);
                    continue;
                }
                words eight[OF_WORD];
                const uint32_t *codes = places.codes[i % RUN];
                const size_t run = at + i / RUN * RUN * OF_WORD;
                for (size_t row = 0; row < OF_WORD; row++)
                    eight[row] = words_at(packed->words + (run + codes[row]) * packed->stride + word, wide);
                columns_of(eight);
                for (size_t column = 0; column < OF_WORD; column++)
                    source[column][i] = eight[packed->order[column]];
            }
            for (size_t column = 0; column < columns; column++) {
                const struct sixteen_rows *these = &some[column];
                const words different = differing(these, stored->columns, feature, &places, mixed, source[column], deep);
                uint32_t any = 0;
                for (int lane = 0; lane < LANES; lane++)
                    any |= different[lane];
                if (any || !taken_in(source[column], deep, each, own, theirs, these, figures))
                    return 0;
            }
        }
    }
    return 1;
}
