/* θᵤ + Σₜ cₜ·xₜ and its moments in one pass, and the inner products that steps are made from.
 *
 * The numbers are those of mixed.py, which says what they mean: every operation below is one
 * IEEE 754 operation of that module, in its order, so the weights have the same bits. So have
 * the inner products, summed in the same order; the moments are summed in a fixed number of
 * lanes, so no processor changes them.
 */
#include "cells.h"

enum { MOST = 12 }; /* operands, terms or vectors */
enum { PAIRS = MOST * (MOST + 1) / 2 };
enum { GROUPS = 2, MOST_LANES = GROUPS * VECTOR_BYTES / 4 };
enum { UPDATE, UNLEARNED, ALONG, ERROR, CHANGED, STEP, ASKED, REALISED, MOMENTS };

/* Of an inner product: one for each remainder of an element's number in its cell. */
enum { LANES = 16, LANE_VECTORS = LANES * sizeof(double) / VECTOR_BYTES };

typedef double Sums[MOMENTS][MOST_LANES];
typedef Doubles Lanes[LANE_VECTORS];

/* A difference of two operands, or the one alone if ``old`` is −1. */
typedef struct {
    int new, old;
} Vector;

typedef struct {
    int count;
    double coefficients[MOST];
    Vector vectors[MOST];
} Terms;

typedef struct {
    int count;
    Py_buffer buffers[MOST];
    int types[MOST];
    size_t elements;
} Operands;

/* Row 0 of the widened operands is zero, and operand i is in row i + 1: so −1 is zero too. */
enum { ROWS = MOST + 1 };
#define ROW(operand) ((operand) + 1)

/* Each x is formed with its sign turned, and so is the step, so that +0 stands where all x = 0:
 * θᵤ − (+0) is θᵤ for either zero, where θᵤ + 0 would turn −0 into +0. The step begins at +0,
 * and what is added to +0 is never −0. */
#define DEFINE_CHUNK(NAME, REAL, VECTOR, CHUNKED, ROUNDED)                                         \
    VECTORISED static void NAME(                                                                   \
        CHUNKED *restrict wide, VECTOR *restrict result, const SingleBits *restrict noise,         \
        const Terms *restrict terms, Sums sums)                                                    \
    {                                                                                              \
        enum { WIDTH = VECTOR_BYTES / sizeof(REAL) };                                              \
        (void)noise;                                                                               \
        const VECTOR *original = wide[ROW(0)], *unlearned = wide[ROW(1)];                          \
        const int count = terms->count;                                                            \
        const VECTOR *news[MOST], *olds[MOST];                                                     \
        REAL sizes[MOST];                                                                          \
        for (int t = 0; t < count; t++) {                                                          \
            news[t] = wide[ROW(terms->vectors[t].new)];                                            \
            olds[t] = wide[ROW(terms->vectors[t].old)];                                            \
            sizes[t] = (REAL)terms->coefficients[t];                                               \
        }                                                                                          \
        VECTOR update[GROUPS] = {0}, square[GROUPS] = {0}, along[GROUPS] = {0};                    \
        VECTOR error[GROUPS] = {0}, changed[GROUPS] = {0};                                         \
        VECTOR length[GROUPS] = {0}, asked[GROUPS] = {0}, realised[GROUPS] = {0};                  \
        for (int i = 0; i < CHUNK / WIDTH; i += GROUPS) {                                          \
            VECTOR steps[GROUPS] = {0};                                                            \
            for (int t = 0; t < count; t++)                                                        \
                _Pragma("GCC unroll 4") for (int g = 0; g < GROUPS; g++)                           \
                    steps[g] += (olds[t][i + g] - news[t][i + g]) * sizes[t];                      \
            _Pragma("GCC unroll 4") for (int g = 0; g < GROUPS; g++) {                             \
                VECTOR theta = unlearned[i + g];                                                   \
                VECTOR back = original[i + g] - theta;                                             \
                VECTOR step = steps[g];                                                            \
                VECTOR rounded = ROUNDED(theta - step, i + g);                                     \
                VECTOR moved = rounded - theta;                                                    \
                VECTOR missed = moved + step;                                                      \
                result[i + g] = rounded;                                                           \
                update[g] += back * back;                                                          \
                square[g] += theta * theta;                                                        \
                along[g] -= moved * back;                                                          \
                error[g] += missed * missed;                                                       \
                changed[g] -= __builtin_convertvector(moved != 0, VECTOR);                         \
                length[g] += step * step;                                                          \
                asked[g] += step * back;                                                           \
                realised[g] -= moved * step;                                                       \
            }                                                                                      \
        }                                                                                          \
        for (int lane = 0; lane < GROUPS * WIDTH; lane++) {                                        \
            const int g = lane / WIDTH, k = lane % WIDTH;                                          \
            sums[UPDATE][lane] += (double)update[g][k];                                            \
            sums[UNLEARNED][lane] += (double)square[g][k];                                         \
            sums[ALONG][lane] += (double)along[g][k];                                              \
            sums[ERROR][lane] += (double)error[g][k];                                              \
            sums[CHANGED][lane] += (double)changed[g][k];                                          \
            sums[STEP][lane] += (double)length[g][k];                                              \
            sums[ASKED][lane] += (double)asked[g][k];                                              \
            sums[REALISED][lane] += (double)realised[g][k];                                        \
        }                                                                                          \
    }

DEFINE_CHUNK(chunk_in_float, float, Singles, SingleChunk, TO_BF16)
DEFINE_CHUNK(chunk_in_half, float, Singles, SingleChunk, TO_F16)
DEFINE_CHUNK(chunk_by_chance, float, Singles, SingleChunk, TO_BF16_BY_CHANCE)
DEFINE_CHUNK(chunk_in_double, double, Doubles, DoubleChunk, TO_F32)

/* The output is of 16 bits, the arithmetic in float32. */
static void cell_in_float(
    const Operands *operands, const Terms *terms, Py_buffer *out, int type, size_t start,
    size_t count, const Rule *rule, Sums sums)
{
    NoiseChunk noise;
    SingleChunk wide[ROWS], result;
    memset(wide[ROW(-1)], 0, sizeof *wide);
    for (size_t at = start; at < start + count; at += CHUNK) {
        size_t some = start + count - at < CHUNK ? start + count - at : CHUNK;
        if (some < CHUNK)
            memset(wide, 0, (size_t)ROW(operands->count) * sizeof *wide);
        for (int i = 0; i < operands->count; i++)
            to_singles(&operands->buffers[i], operands->types[i], at, some, wide[ROW(i)]);
        if (rule->by_chance) {
            draw(rule->key, rule->first + at, (void *)noise);
            chunk_by_chance(wide, result, noise, terms, sums);
        } else {
            (type == BF16 ? chunk_in_float : chunk_in_half)(wide, result, NULL, terms, sums);
        }
        from_singles(result, out, type, at, some);
    }
}

/* The output is float32, the arithmetic in float64. */
static void cell_in_double(
    const Operands *operands, const Terms *terms, Py_buffer *out, size_t start, size_t count,
    Sums sums)
{
    DoubleChunk wide[ROWS], result;
    memset(wide[ROW(-1)], 0, sizeof *wide);
    for (size_t at = start; at < start + count; at += CHUNK) {
        size_t some = start + count - at < CHUNK ? start + count - at : CHUNK;
        if (some < CHUNK)
            memset(wide, 0, (size_t)ROW(operands->count) * sizeof *wide);
        for (int i = 0; i < operands->count; i++)
            to_doubles(&operands->buffers[i], operands->types[i], at, some, wide[ROW(i)]);
        chunk_in_double(wide, result, NULL, terms, sums);
        f64_to_f32((void *)result, (void *)position(out, F32, at), some);
    }
}

/* Add up the lanes of one cell, pair by pair. */
static void add_up(Sums sums, double *moments)
{
    for (int moment = 0; moment < MOMENTS; moment++) {
        for (int half = MOST_LANES / 2; half; half /= 2)
            for (int lane = 0; lane < half; lane++)
                sums[moment][lane] += sums[moment][lane + half];
        moments[moment] = sums[moment][0];
    }
}

/* x of a vector, its sign not turned, in float64. */
#define DEFINE_DIFFERENCE(NAME, REAL)                                                              \
    VECTORISED static void NAME(                                                                   \
        const REAL *restrict new, const REAL *restrict old, double *restrict to)                   \
    {                                                                                              \
        for (int i = 0; i < CHUNK; i++)                                                            \
            to[i] = (double)(new[i] - old[i]);                                                     \
    }

DEFINE_DIFFERENCE(difference_in_float, float)
DEFINE_DIFFERENCE(difference_in_double, double)

/* Add the products of two chunks to their lanes, each in the order of its elements. */
VECTORISED static void accumulate(const Doubles *one, const Doubles *two, Doubles *restrict lanes)
{
    Lanes sums;
    for (int k = 0; k < (int)LANE_VECTORS; k++)
        sums[k] = lanes[k];
    for (int i = 0; i < CHUNK / LANES; i++)
        _Pragma("GCC unroll 4") for (int k = 0; k < (int)LANE_VECTORS; k++)
            sums[k] += one[i * (int)LANE_VECTORS + k] * two[i * (int)LANE_VECTORS + k];
    for (int k = 0; k < (int)LANE_VECTORS; k++)
        lanes[k] = sums[k];
}

/* Fill the chunks with every x, of ``some`` elements and zeros after them. */
static void differences(
    const Operands *operands, const Vector *vectors, int count, int wide, size_t at, size_t some,
    DoubleChunk *chunks)
{
    union {
        SingleChunk singles[ROWS];
        DoubleChunk doubles[ROWS];
    } rows;
    const size_t used = (size_t)ROW(operands->count);
    if (wide) {
        memset(rows.doubles, 0, (some < CHUNK ? used : 1) * sizeof *rows.doubles);
        for (int i = 0; i < operands->count; i++)
            to_doubles(&operands->buffers[i], operands->types[i], at, some, rows.doubles[ROW(i)]);
    } else {
        memset(rows.singles, 0, (some < CHUNK ? used : 1) * sizeof *rows.singles);
        for (int i = 0; i < operands->count; i++)
            to_singles(&operands->buffers[i], operands->types[i], at, some, rows.singles[ROW(i)]);
    }
    for (int v = 0; v < count; v++) {
        const int new = ROW(vectors[v].new), old = ROW(vectors[v].old);
        if (wide)
            difference_in_double(
                (void *)rows.doubles[new], (void *)rows.doubles[old], (void *)chunks[v]);
        else
            difference_in_float(
                (void *)rows.singles[new], (void *)rows.singles[old], (void *)chunks[v]);
    }
}

/* Write the inner products of one cell, row by row of the upper triangle. */
static void cell_of_products(
    const Operands *operands, const Vector *vectors, int count, int wide, size_t start,
    size_t elements, double *found)
{
    DoubleChunk chunks[MOST];
    Lanes lanes[PAIRS];
    memset(lanes, 0, sizeof lanes);
    for (size_t at = start; at < start + elements; at += CHUNK) {
        size_t some = start + elements - at < CHUNK ? start + elements - at : CHUNK;
        differences(operands, vectors, count, wide, at, some, chunks);
        int pair = 0;
        for (int i = 0; i < count; i++)
            for (int j = i; j < count; j++)
                accumulate(chunks[i], chunks[j], lanes[pair++]);
    }
    for (int pair = 0; pair < count * (count + 1) / 2; pair++) {
        double *sums = (void *)lanes[pair];
        for (int half = LANES / 2; half; half /= 2)
            for (int lane = 0; lane < half; lane++)
                sums[lane] += sums[lane + half];
        found[pair] = sums[0];
    }
}

static void release(Operands *operands)
{
    while (operands->count)
        PyBuffer_Release(&operands->buffers[--operands->count]);
}

/* Take the buffers of all operands. On failure those taken so far wait for their release. */
static int take(PyObject *buffers, const char *types, Py_ssize_t letters, Operands *operands)
{
    operands->count = 0;
    const Py_ssize_t count = PyTuple_Size(buffers);
    if (count < 1 || count > MOST || letters != count)
        return refused("of 1 to 12 operands, every one has a type");
    for (int i = 0; i < count; i++) {
        Py_buffer *buffer = &operands->buffers[i];
        const int type = operands->types[i] = type_of(types[i]);
        if (type < 0)
            return refused("a type is 'B', 'H' or 'F'");
        if (PyObject_GetBuffer(PyTuple_GetItem(buffers, i), buffer, PyBUF_SIMPLE) < 0)
            return -1;
        operands->count++;
        if (i == 0)
            operands->elements = (size_t)buffer->len / size_of(type);
        if ((size_t)buffer->len != operands->elements * size_of(type))
            return refused("the buffers hold different numbers of elements");
    }
    return 0;
}

/* Read the operands of a vector. One past any C integer is as wrong as any other. */
static int indices(PyObject *new, PyObject *old, const Operands *operands, Vector *vector)
{
    const Py_ssize_t first = PyNumber_AsSsize_t(new, NULL);
    if (first == -1 && PyErr_Occurred())
        return -1;
    const Py_ssize_t second = PyNumber_AsSsize_t(old, NULL);
    if (second == -1 && PyErr_Occurred())
        return -1;
    if (first < 0 || first >= operands->count || second < -1 || second >= operands->count)
        return refused("there is no operand of that number");
    *vector = (Vector){(int)first, (int)second};
    return 0;
}

/* Return item i of a tuple as the tuple that it has to be; borrowed. */
static PyObject *tuple_at(PyObject *items, Py_ssize_t i)
{
    PyObject *item = PyTuple_GetItem(items, i);
    if (item != NULL && !PyTuple_Check(item)) {
        PyErr_SetString(PyExc_TypeError, "a term and a vector are tuples");
        return NULL;
    }
    return item;
}

static int read_terms(PyObject *items, const Operands *operands, Terms *terms)
{
    const Py_ssize_t count = PyTuple_Size(items);
    if (count > MOST)
        return refused("a step has 12 terms at most");
    terms->count = (int)count;
    for (int t = 0; t < count; t++) {
        PyObject *new, *old, *item = tuple_at(items, t);
        if (item == NULL
            || !PyArg_ParseTuple(item, "dOO:term", &terms->coefficients[t], &new, &old)
            || indices(new, old, operands, &terms->vectors[t]) < 0)
            return -1;
    }
    return 0;
}

/* Return how many, or −1. */
static int read_vectors(PyObject *items, const Operands *operands, Vector *vectors)
{
    const Py_ssize_t count = PyTuple_Size(items);
    if (count > MOST)
        return refused("there are 12 vectors at most");
    for (int v = 0; v < count; v++) {
        PyObject *new, *old, *item = tuple_at(items, v);
        if (item == NULL || !PyArg_ParseTuple(item, "OO:vector", &new, &old)
            || indices(new, old, operands, &vectors[v]) < 0)
            return -1;
    }
    return (int)count;
}

static PyObject *run_mix(
    const Operands *operands, const Terms *terms, Py_buffer *out, int type, const Rule *rule,
    size_t cell)
{
    const size_t elements = operands->elements, cells = (elements + cell - 1) / cell;
    double *found = PyMem_Calloc(cells ? cells : 1, MOMENTS * sizeof *found);
    if (found == NULL)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    for (size_t number = 0; number < cells; number++) {
        size_t start = number * cell;
        size_t count = elements - start < cell ? elements - start : cell;
        Sums sums = {{0}};
        if (type != F32)
            cell_in_float(operands, terms, out, type, start, count, rule, sums);
        else
            cell_in_double(operands, terms, out, start, count, sums);
        add_up(sums, found + number * MOMENTS);
    }
    Py_END_ALLOW_THREADS
    PyObject *rows = rows_of(found, cells, MOMENTS);
    PyMem_Free(found);
    return rows;
}

static PyObject *run_products(
    const Operands *operands, const Vector *vectors, int count, int wide, size_t cell)
{
    const size_t elements = operands->elements, cells = (elements + cell - 1) / cell;
    const int pairs = count * (count + 1) / 2;
    double *found = PyMem_Calloc(cells ? cells : 1, (size_t)(pairs ? pairs : 1) * sizeof *found);
    if (found == NULL)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    for (size_t number = 0; number < cells && pairs; number++) {
        size_t start = number * cell;
        size_t some = elements - start < cell ? elements - start : cell;
        cell_of_products(
            operands, vectors, count, wide, start, some, found + number * (size_t)pairs);
    }
    Py_END_ALLOW_THREADS
    PyObject *rows = rows_of(found, cells, pairs);
    PyMem_Free(found);
    return rows;
}

PyObject *mix(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *buffers, *items, *found = NULL;
    const char *types;
    Py_ssize_t letters, cell;
    Py_buffer out;
    char letter;
    Rule rule;
    unsigned long long key, position_of_first;
    Operands operands;
    Terms terms;
    if (!PyArg_ParseTuple(
            arguments, "O!y#w*cO!npKK:mix", &PyTuple_Type, &buffers, &types, &letters, &out,
            &letter, &PyTuple_Type, &items, &cell, &rule.by_chance, &key, &position_of_first))
        return NULL;
    rule.key = key, rule.first = position_of_first;
    const int type = type_of(letter);
    if (take(buffers, types, letters, &operands) < 0)
        ; /* an exception is set */
    else if (type < 0 || cell < 1)
        refused("a type is 'B', 'H' or 'F', and a cell has an element");
    else if (rule.by_chance && type == F16)
        refused("by chance only bfloat16 is rounded");
    else if (operands.count < 2)
        refused("there are two operands at least, the original and the unlearned");
    else if ((size_t)out.len != operands.elements * size_of(type))
        refused("the buffers hold different numbers of elements");
    else if (read_terms(items, &operands, &terms) == 0)
        found = run_mix(&operands, &terms, &out, type, &rule, (size_t)cell);
    release(&operands);
    PyBuffer_Release(&out);
    return found;
}

PyObject *products(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *buffers, *items, *found = NULL;
    const char *types;
    Py_ssize_t letters, cell;
    int wide, count;
    Operands operands;
    Vector vectors[MOST];
    if (!PyArg_ParseTuple(
            arguments, "O!y#pO!n:products", &PyTuple_Type, &buffers, &types, &letters, &wide,
            &PyTuple_Type, &items, &cell))
        return NULL;
    if (take(buffers, types, letters, &operands) < 0)
        ; /* an exception is set */
    else if (cell < 1)
        refused("a cell has an element");
    else if ((count = read_vectors(items, &operands, vectors)) >= 0)
        found = run_products(&operands, vectors, count, wide, (size_t)cell);
    release(&operands);
    return found;
}
