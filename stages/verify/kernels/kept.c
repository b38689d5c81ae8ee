/* A rank's codes of 4 bits held against the source's, which it has kept, where the source packs them along columns; and what both
   make of them, summed (group_sums.h). LANES rows are computed with at once, a lane each, as words of eight codes of neighbouring
   in-features. */
#include "group_sums.h"

#define AHEAD 64 /* words further on in a row, which memory is asked for beforehand: its own guesses end with a page */
#define RUN 4 /* words of the 16 bytes that an order mixes */
#define OF_LINE 16 /* words of what memory gives at once, which are all used when it does */

typedef uint32_t four __attribute__((vector_size(16)));
typedef uint32_t eight __attribute__((vector_size(32)));

/* Every four lanes of two vectors alike: those of the first from 0 on, of the second from LANES on. */
#define CHUNK(n, i, j, k, l) 4 * (n) + (i), 4 * (n) + (j), 4 * (n) + (k), 4 * (n) + (l)
#if LANES == 16
#define CHUNKS(...) CHUNK(0, __VA_ARGS__), CHUNK(1, __VA_ARGS__), CHUNK(2, __VA_ARGS__), CHUNK(3, __VA_ARGS__)
#elif LANES == 8
#define CHUNKS(...) CHUNK(0, __VA_ARGS__), CHUNK(1, __VA_ARGS__)
#else
#define CHUNKS(...) CHUNK(0, __VA_ARGS__)
#endif
/* Whether vectors can be joined without a way through memory, where the processor would wait for its parts to be written. */
#if defined(__clang__) || __GNUC__ >= 12
#define JOINS 1
#else
#define JOINS 0
#endif
#ifdef __clang__
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (words){__VA_ARGS__})
#endif

/* The code of a run that the kernels' order has at a place of a word. */
INLINE size_t mixed_code(size_t word, size_t place)
{
    return place % RUN * OF_WORD + word * 2 + place / RUN;
}

/* Whether a table of the places of a run's codes is that order. */
static int is_mixed_code(const uint8_t *places)
{
    int same = 1;
    for (size_t word = 0; word < RUN; word++)
        for (size_t place = 0; place < OF_WORD; place++)
            same &= places[mixed_code(word, place)] == word * OF_WORD + place;
    return same;
}

INLINE size_t fewer(size_t a, size_t b)
{
    return a < b ? a : b;
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

#if LANES > 4 && JOINS
INLINE eight joined8(four a, four b)
{
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
}
#endif

/* The runs of every fourth row, one behind the other. */
INLINE words runs_of(const struct lane_rows *rows, int lane, size_t offset)
{
    four each[LANES / 4];
    for (int i = 0; i < LANES / 4; i++)
        memcpy(&each[i], rows->own[lane + 4 * i] + offset, sizeof each[i]);
#if LANES == 16 && JOINS
    return __builtin_shufflevector(joined8(each[0], each[1]), joined8(each[2], each[3]), 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,
                                   14, 15);
#elif LANES == 8 && JOINS
    return joined8(each[0], each[1]);
#else
    words result;
    memcpy(&result, each, sizeof result);
    return result;
#endif
}

/* A run of each row, as a word of each row. */
INLINE void runs_as_words(const struct lane_rows *rows, size_t offset, words run[RUN])
{
    const words a = runs_of(rows, 0, offset), b = runs_of(rows, 1, offset);
    const words c = runs_of(rows, 2, offset), d = runs_of(rows, 3, offset);
    const words low = SHUFFLED(a, b, CHUNKS(0, LANES, 1, LANES + 1)), high = SHUFFLED(a, b, CHUNKS(2, LANES + 2, 3, LANES + 3));
    const words low_too = SHUFFLED(c, d, CHUNKS(0, LANES, 1, LANES + 1));
    const words high_too = SHUFFLED(c, d, CHUNKS(2, LANES + 2, 3, LANES + 3));
    run[0] = SHUFFLED(low, low_too, CHUNKS(0, 1, LANES, LANES + 1));
    run[1] = SHUFFLED(low, low_too, CHUNKS(2, 3, LANES + 2, LANES + 3));
    run[2] = SHUFFLED(high, high_too, CHUNKS(0, 1, LANES, LANES + 1));
    run[3] = SHUFFLED(high, high_too, CHUNKS(2, 3, LANES + 2, LANES + 3));
}

/* Where a row's codes from an in-feature on lie behind its first: a unit's rows, `columns` of them, alternate in tiles of 64 codes. */
INLINE size_t tile_offset(size_t columns, size_t feature)
{
    return feature / 64 * columns * 32 + feature % 64 / 2;
}

/* Asks memory for the codes of rows from an in-feature on. */
INLINE void asked_for(const struct lane_rows *rows, size_t columns, size_t feature, size_t count)
{
    for (size_t at = 0; at < count; at += 64)
        for (int lane = 0; lane < LANES; lane++)
            __builtin_prefetch(rows->own[lane] + tile_offset(columns, feature + at));
}

/* Where the rank's codes from an in-feature on are others than the source's `deep` words in the rank's order, a whole number of runs.
   A unit's rows, `columns` of them, alternate in tiles of 64 codes. `sign`: differs in all codes. */
INLINE words differing(const struct lane_rows *rows, size_t columns, size_t feature, uint32_t sign, const words *source, size_t deep)
{
    words result = {0};
    for (size_t at = 0; at < deep; at += RUN) {
        words run[RUN];
        const size_t code = feature + at * OF_WORD;
        runs_as_words(rows, tile_offset(columns, code), run);
        for (int word = 0; word < RUN; word++)
            result |= run[word] ^ source[at + word] ^ sign;
    }
    return result & rows->valid;
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

/* A run's words, whose codes are in their places, in the kernels' order: bytes of two codes that are 16 apart are transposed. */
INLINE void mix(words run[RUN])
{
    words low[RUN], high[RUN], bytes[RUN];
    for (int i = 0; i < RUN; i++) {
        low[i] = run[i] & 0x0F0F0F0Fu;
        high[i] = run[i] >> 4 & 0x0F0F0F0Fu;
    }
    for (int i = 0; i < RUN / 2; i++) {
        bytes[i] = low[2 * i] | low[2 * i + 1] << 4;
        bytes[i + RUN / 2] = high[2 * i] | high[2 * i + 1] << 4;
    }
    for (int step = RUN / 2; step > 0; step /= 2)
        for (int i = 0; i < RUN; i++)
            if (!(i & step)) {
                const words both = ((bytes[i] >> 8 * step) ^ bytes[i + step]) & (step == 2 ? 0x0000FFFFu : 0x00FF00FFu);
                bytes[i + step] ^= both;
                bytes[i] ^= both << 8 * step;
            }
    for (int i = 0; i < RUN; i++)
        run[i] = bytes[i];
}

/* LANES rows from `first` on, `apart` from one another, of `count` in all; those before `skip` are none. */
static struct lane_rows rows_of(const struct stored *stored, size_t first_row, size_t first, size_t apart, size_t skip,
                                size_t count)
{
    struct lane_rows rows = {0};
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
    rows.in_a_row = apart == 1 && first >= skip && first - skip + LANES <= count;
    return rows;
}

/* The in-features from `at` on that are of one group of the rank and of the source, and no more than are computed with at once. */
INLINE size_t of_a_group(size_t at, size_t left, size_t size, size_t source_size)
{
    size_t count = fewer(left, DEPTH * OF_WORD);
    count = fewer(count, size - at % size);
    return fewer(count, source_size - at % source_size);
}

/* The source's words of some columns from in-feature `at` on, `deep` of each, in the rank's order. `word`: the first column's. */
INLINE void words_of(const struct packed *packed, int mixed, size_t word, size_t at, size_t deep, words source[OF_WORD][DEPTH])
{
    const size_t wide = packed->columns - word;
    if (packed->order == NULL) {
        for (size_t i = 0; i < deep; i++)
            source[0][i] = words_at(packed->words + (at / OF_WORD + i) * packed->stride + word, wide);
        for (size_t i = 0; mixed && i < deep; i += RUN)
            mix(source[0] + i);
        return;
    }
    /* Words of eight columns are made words of eight codes of each in any order: in the rank's. */
    for (size_t i = 0; i < deep; i++) {
        words eight[OF_WORD];
        const size_t run = i / RUN * RUN * OF_WORD;
        for (size_t place = 0; place < OF_WORD; place++) {
            const size_t code = mixed ? run + mixed_code(i % RUN, place) : i * OF_WORD + place;
            eight[place] = words_at(packed->words + (at + code) * packed->stride + word, wide);
        }
        columns_of(eight);
        for (size_t column = 0; column < OF_WORD; column++)
            source[column][i] = eight[packed->order[column]];
    }
}

int AT_LEVEL(kept)(const struct stored *stored, size_t first, const struct packed *packed, const struct kept_factors *each,
                   struct figures *figures)
{
    const int mixed = stored->places != NULL;
    const size_t columns = packed->order ? OF_WORD : 1, rows = each->rows;
    const uint32_t sign = mixed ? 0 : 0x88888888u;
    if (mixed && !is_mixed_code(stored->places))
        return 0;
    for (size_t word = 0; word < packed->columns; word += OF_LINE) {
        const size_t end = fewer(word + OF_LINE, packed->columns);
        struct lane_rows some[OF_LINE / LANES][OF_WORD];
        for (size_t part = 0; part < OF_LINE / LANES; part++)
            for (size_t column = 0; column < columns; column++)
                some[part][column] = rows_of(stored, first, (word + part * LANES) * columns + column, columns, packed->skip, rows);
        for (size_t at = 0, count; at < packed->features; at += count) {
            const size_t feature = packed->start + at;
            count = of_a_group(feature, packed->features - at, each->size, each->source_size);
            const size_t deep = count / OF_WORD, own = feature / each->size * rows, theirs = feature / each->source_size * rows;
            for (size_t part = 0; word + part * LANES < end; part++) {
                words source[OF_WORD][DEPTH];
                words_of(packed, mixed, word + part * LANES, at, deep, source);
                for (size_t column = 0; column < columns; column++) {
                    const struct lane_rows *these = &some[part][column];
                    if (at + 2 * count <= packed->features)
                        asked_for(these, stored->columns, feature + count, count);
                    const words different = differing(these, stored->columns, feature, sign, source[column], deep);
                    uint32_t any = 0;
                    for (int lane = 0; lane < LANES; lane++)
                        any |= different[lane];
                    if (any || !taken_in(source[column], deep, each, own, theirs, these, figures))
                        return 0;
                }
            }
        }
    }
    return 1;
}
