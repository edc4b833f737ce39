/* θᵤ + α·(θᵤ − θ₀) and its moments in one pass, for the types most checkpoints have.
 *
 * The numbers are those of blocks.py, which says what they mean: every operation below is one
 * IEEE 754 operation of that module, in its order, so the weights have the same bits. The
 * moments are summed in a fixed number of lanes, so no processor changes them.
 */
#include "cells.h"

enum { GROUPS = 4, MOST_LANES = GROUPS * VECTOR_BYTES / 4 };
enum { UPDATE, UNLEARNED, ALONG, ERROR, CHANGED, DIFFERING, MOMENTS };

typedef double Sums[MOMENTS][MOST_LANES];

/* The arithmetic of a step, as blocks.py has it. */
enum { WIDER, SINGLE, TASK };

/* What a chunk is multiplied by: |α|, and the weight where the sum starts at θ₀. */
typedef struct {
    double size, weight;
    int negative;
} Factors;

/* The update is formed with its sign turned, and so is the step, so that +0 stands where v = 0:
 * θᵤ − (+0) is θᵤ for either zero, where θᵤ + 0 would turn −0 into +0. */
#define FROM_UNLEARNED(base, theta, back, step, weight) ((theta) - (step))
/* The other end, where zeros lose their sign: + 0 turns the −0 of a product into +0. */
#define FROM_ORIGINAL(base, theta, back, step, weight) ((base) + ((0 - (back)) * (weight) + 0))
#define AS_IT_IS(sum, at) (sum)

#define DEFINE_CHUNK(NAME, REAL, VECTOR, SUM, ROUNDED)                                             \
    VECTORISED static void NAME(                                                                   \
        const VECTOR *restrict original, const VECTOR *restrict unlearned,                         \
        VECTOR *restrict result, const SingleBits *restrict noise, const Factors *factors,         \
        Sums sums)                                                                                 \
    {                                                                                              \
        enum { WIDTH = VECTOR_BYTES / sizeof(REAL) };                                              \
        const REAL size = (REAL)factors->size, weight = (REAL)factors->weight;                     \
        const int negative = factors->negative;                                                    \
        (void)noise, (void)weight;                                                                 \
        VECTOR update[GROUPS] = {0}, square[GROUPS] = {0}, along[GROUPS] = {0};                    \
        VECTOR error[GROUPS] = {0};                                                                \
        VECTOR changed[GROUPS] = {0}, differing[GROUPS] = {0};                                     \
        for (int i = 0; i < CHUNK / WIDTH; i += GROUPS) {                                          \
            _Pragma("GCC unroll 4") for (int g = 0; g < GROUPS; g++) {                             \
                VECTOR theta = unlearned[i + g];                                                   \
                VECTOR back = original[i + g] - theta;                                             \
                VECTOR step = negative ? 0 - back * size : back * size;                            \
                VECTOR sum = SUM(original[i + g], theta, back, step, weight);                      \
                VECTOR rounded = ROUNDED(sum, i + g);                                              \
                VECTOR moved = rounded - theta;                                                    \
                VECTOR missed = moved + step;                                                      \
                result[i + g] = rounded;                                                           \
                update[g] += back * back;                                                          \
                square[g] += theta * theta;                                                        \
                along[g] -= moved * back;                                                          \
                error[g] += missed * missed;                                                       \
                changed[g] -= __builtin_convertvector(moved != 0, VECTOR);                         \
                differing[g] -= __builtin_convertvector(back != 0, VECTOR);                        \
            }                                                                                      \
        }                                                                                          \
        for (int lane = 0; lane < GROUPS * WIDTH; lane++) {                                        \
            const int g = lane / WIDTH, k = lane % WIDTH;                                          \
            sums[UPDATE][lane] += (double)update[g][k];                                            \
            sums[UNLEARNED][lane] += (double)square[g][k];                                         \
            sums[ALONG][lane] += (double)along[g][k];                                              \
            sums[ERROR][lane] += (double)error[g][k];                                              \
            sums[CHANGED][lane] += (double)changed[g][k];                                          \
            sums[DIFFERING][lane] += (double)differing[g][k];                                      \
        }                                                                                          \
    }

DEFINE_CHUNK(chunk_in_float, float, Singles, FROM_UNLEARNED, TO_BF16)
DEFINE_CHUNK(chunk_by_chance, float, Singles, FROM_UNLEARNED, TO_BF16_BY_CHANCE)
DEFINE_CHUNK(chunk_in_double, double, Doubles, FROM_UNLEARNED, TO_F32)
DEFINE_CHUNK(chunk_single, float, Singles, FROM_UNLEARNED, AS_IT_IS)
DEFINE_CHUNK(task_in_float, float, Singles, FROM_ORIGINAL, TO_BF16)
DEFINE_CHUNK(task_single, float, Singles, FROM_ORIGINAL, AS_IT_IS)

/* The arithmetic is in float32: the output is of 16 bits, or that is asked for. */
static void cell_in_float(
    const Py_buffer *original, int first, const Py_buffer *unlearned, int second, Py_buffer *out,
    int third, size_t start, size_t count, const Factors *factors, const Rule *rule,
    int arithmetic, Sums sums)
{
    NoiseChunk noise;
    SingleChunk wide[3];
    for (size_t at = start; at < start + count; at += CHUNK) {
        size_t some = start + count - at < CHUNK ? start + count - at : CHUNK;
        if (some < CHUNK)
            memset(wide, 0, sizeof wide);
        to_singles(original, first, at, some, wide[0]);
        to_singles(unlearned, second, at, some, wide[1]);
        if (third == F32) {
            (arithmetic == TASK ? task_single : chunk_single)(
                wide[0], wide[1], wide[2], NULL, factors, sums);
        } else if (rule->by_chance) {
            draw(rule->key, rule->first + at, (void *)noise);
            chunk_by_chance(wide[0], wide[1], wide[2], noise, factors, sums);
        } else {
            (arithmetic == TASK ? task_in_float : chunk_in_float)(
                wide[0], wide[1], wide[2], NULL, factors, sums);
        }
        void *to = (void *)position(out, third, at);
        if (third == F32)
            memcpy(to, wide[2], some * sizeof(float));
        else
            f32_to_bf16((void *)wide[2], to, some);
    }
}

/* The output is float32, the arithmetic in float64. */
static void cell_in_double(
    const Py_buffer *original, int first, const Py_buffer *unlearned, int second, Py_buffer *out,
    size_t start, size_t count, const Factors *factors, Sums sums)
{
    DoubleChunk wide[3];
    for (size_t at = start; at < start + count; at += CHUNK) {
        size_t some = start + count - at < CHUNK ? start + count - at : CHUNK;
        if (some < CHUNK)
            memset(wide, 0, sizeof wide);
        to_doubles(original, first, at, some, wide[0]);
        to_doubles(unlearned, second, at, some, wide[1]);
        chunk_in_double(wide[0], wide[1], wide[2], NULL, factors, sums);
        f64_to_f32((void *)wide[2], (void *)position(out, F32, at), some);
    }
}

/* Add up the lanes, pair by pair, and return the moments of one cell as a tuple. */
static PyObject *moments(Sums sums)
{
    for (int half = MOST_LANES / 2; half; half /= 2)
        for (int moment = 0; moment < MOMENTS; moment++)
            for (int lane = 0; lane < half; lane++)
                sums[moment][lane] += sums[moment][lane + half];
    return Py_BuildValue(
        "(dddddd)", sums[UPDATE][0], sums[UNLEARNED][0], sums[ALONG][0], sums[ERROR][0],
        sums[CHANGED][0], sums[DIFFERING][0]);
}

static PyObject *run(
    const Py_buffer *original, int first, const Py_buffer *unlearned, int second, Py_buffer *out,
    int third, const Factors *factors, const Rule *rule, int arithmetic, Py_ssize_t cell)
{
    size_t elements = (size_t)out->len / size_of(third);
    size_t cells = (elements + (size_t)cell - 1) / (size_t)cell;
    Sums *sums = PyMem_Calloc(cells ? cells : 1, sizeof(Sums));
    if (sums == NULL)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    for (size_t number = 0; number < cells; number++) {
        size_t start = number * (size_t)cell;
        size_t count = elements - start < (size_t)cell ? elements - start : (size_t)cell;
        if (third == BF16 || arithmetic != WIDER)
            cell_in_float(
                original, first, unlearned, second, out, third, start, count, factors, rule,
                arithmetic, sums[number]);
        else
            cell_in_double(
                original, first, unlearned, second, out, start, count, factors, sums[number]);
    }
    Py_END_ALLOW_THREADS
    PyObject *found = PyList_New((Py_ssize_t)cells);
    for (size_t number = 0; found != NULL && number < cells; number++) {
        PyObject *row = moments(sums[number]);
        if (row == NULL)
            Py_CLEAR(found);
        else
            PyList_SetItem(found, (Py_ssize_t)number, row); /* takes the reference */
    }
    PyMem_Free(sums);
    return found;
}

static PyObject *extrapolate(PyObject *module, PyObject *arguments)
{
    (void)module;
    Py_buffer original, unlearned, out;
    char one, two, three;
    Rule rule;
    double alpha, weight = 0;
    unsigned long long key, position_of_first;
    Py_ssize_t cell;
    int arithmetic = WIDER;
    if (!PyArg_ParseTuple(
            arguments, "y*cy*cw*cdnpKK|id:extrapolate", &original, &one, &unlearned, &two, &out,
            &three, &alpha, &cell, &rule.by_chance, &key, &position_of_first, &arithmetic,
            &weight))
        return NULL;
    rule.key = key, rule.first = position_of_first;
    const Factors factors = {fabs(alpha), weight, alpha < 0};
    PyObject *found = NULL;
    const int first = type_of(one), second = type_of(two), third = type_of(three);
    if (first < 0 || second < 0 || third < 0 || cell < 1)
        PyErr_SetString(PyExc_ValueError, "a type is 'B' or 'F', and a cell has an element");
    else if (arithmetic < WIDER || arithmetic > TASK || (rule.by_chance && arithmetic == TASK))
        PyErr_SetString(PyExc_ValueError, "there is no such arithmetic, or none by chance");
    else if ((size_t)original.len / size_of(first) != (size_t)out.len / size_of(third)
             || (size_t)unlearned.len / size_of(second) != (size_t)out.len / size_of(third))
        PyErr_SetString(PyExc_ValueError, "the three buffers hold different numbers of elements");
    else
        found = run(&original, first, &unlearned, second, &out, third, &factors, &rule,
                    arithmetic, cell);
    PyBuffer_Release(&original);
    PyBuffer_Release(&unlearned);
    PyBuffer_Release(&out);
    return found;
}

static PyMethodDef methods[] = {
    {"extrapolate", extrapolate, METH_VARARGS,
     "Fill a buffer with the extrapolation of two others; return the moments of every cell."},
    {"mix", mix, METH_VARARGS,
     "Fill a buffer with a second operand plus a sum of terms; return the moments of every cell."},
    {"products", products, METH_VARARGS,
     "Return the inner products of differences of operands, cell by cell."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "fused",
    .m_doc = "The extrapolation of bfloat16 and float32 blocks in one pass, and mixed steps.",
    .m_size = 0,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit_fused(void)
{
    return PyModuleDef_Init(&definition);
}
