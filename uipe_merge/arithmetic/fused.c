/* θᵤ + α·(θᵤ − θ₀) and its moments in one pass, for the types most checkpoints have; for several
 * α at once if asked: θ₀ and θᵤ are then widened, and v is formed, once for all of them.
 *
 * The numbers are those of blocks.py, which says what they mean: every operation below is one
 * IEEE 754 operation of that module, in its order, so the weights have the same bits. The
 * moments are summed in a fixed number of lanes, so no processor changes them, and each α has
 * the sums that it has alone.
 */
#include "cells.h"

enum { MOST = 16 }; /* α at once */
enum { GROUPS = 4, MOST_LANES = GROUPS * VECTOR_BYTES / 4 };
enum { UPDATE, UNLEARNED, ALONG, ERROR, CHANGED, DIFFERING, MOMENTS };

typedef double Sums[MOMENTS][MOST_LANES];
typedef int64_t DoubleCounts __attribute__((vector_size(VECTOR_BYTES)));

/* Where θ₀ and θᵤ are. */
typedef struct {
    Py_buffer original, unlearned;
    int first, second;
} Inputs;

/* The arithmetic of a step, as blocks.py has it. */
enum { WIDER, SINGLE, TASK };

/* One result for each α; the weight, where the sum starts at θ₀, is one for all. */
typedef struct {
    int count, type, arithmetic;
    double weight, alphas[MOST];
    Py_buffer buffers[MOST];
} Outputs;

/* The update is formed with its sign turned, and so is the step, so that +0 stands where v = 0:
 * θᵤ − (+0) is θᵤ for either zero, where θᵤ + 0 would turn −0 into +0. Of a negative α the product
 * is −0 there, and + 0 makes it +0; all else, and everything of another α with −0, it leaves. */
#define DEFINE_UPDATE(NAME, REAL, VECTOR, COUNTS)                                                  \
    /* Put the update in the place of θ₀; sum what no α changes. */                                \
    VECTORISED static void NAME(                                                                   \
        VECTOR *restrict original, const VECTOR *restrict unlearned, Sums sums)                    \
    {                                                                                              \
        enum { WIDTH = VECTOR_BYTES / sizeof(REAL) };                                              \
        VECTOR update[GROUPS] = {0}, square[GROUPS] = {0};                                         \
        COUNTS differing[GROUPS] = {0};                                                            \
        for (int i = 0; i < CHUNK / WIDTH; i += GROUPS) {                                          \
            _Pragma("GCC unroll 4") for (int g = 0; g < GROUPS; g++) {                             \
                VECTOR theta = unlearned[i + g];                                                   \
                VECTOR back = original[i + g] - theta;                                             \
                original[i + g] = back;                                                            \
                update[g] += back * back;                                                          \
                square[g] += theta * theta;                                                        \
                differing[g] -= back != 0;                                                         \
            }                                                                                      \
        }                                                                                          \
        for (int lane = 0; lane < GROUPS * WIDTH; lane++) {                                        \
            const int g = lane / WIDTH, k = lane % WIDTH;                                          \
            sums[UPDATE][lane] += (double)update[g][k];                                            \
            sums[UNLEARNED][lane] += (double)square[g][k];                                         \
            sums[DIFFERING][lane] += (double)differing[g][k];                                      \
        }                                                                                          \
    }

DEFINE_UPDATE(update_in_float, float, Singles, SingleCounts)
DEFINE_UPDATE(update_in_double, double, Doubles, DoubleCounts)

#define FROM_UNLEARNED(theta, back, step, at) ((theta) - (step))
/* The other end, where zeros lose their sign: + 0 turns the −0 of a product into +0. */
#define FROM_ORIGINAL(theta, back, step, at) (base[at] + ((0 - (back)) * (float)weight + 0))
#define AS_IT_IS(sum, at) (sum)

/* ``base`` is θ₀ and ``weight`` its update's, where the sum starts there. */
#define DEFINE_CHUNK(NAME, REAL, VECTOR, COUNTS, SUM, ROUNDED)                                     \
    VECTORISED static void NAME(                                                                   \
        const VECTOR *restrict backward, const VECTOR *restrict unlearned,                         \
        VECTOR *restrict result, const SingleBits *restrict noise, double alpha,                   \
        const VECTOR *restrict base, double weight, Sums sums)                                     \
    {                                                                                              \
        enum { WIDTH = VECTOR_BYTES / sizeof(REAL) };                                              \
        (void)noise, (void)base, (void)weight;                                                     \
        const REAL size = alpha < 0 ? (REAL)alpha : (REAL)fabs(alpha);                             \
        const REAL zero = alpha < 0 ? 0 : -(REAL)0;                                                \
        VECTOR along[GROUPS] = {0}, error[GROUPS] = {0};                                           \
        COUNTS changed[GROUPS] = {0};                                                              \
        for (int i = 0; i < CHUNK / WIDTH; i += GROUPS) {                                          \
            _Pragma("GCC unroll 4") for (int g = 0; g < GROUPS; g++) {                             \
                VECTOR theta = unlearned[i + g], back = backward[i + g];                           \
                VECTOR step = back * size + zero;                                                  \
                VECTOR sum = SUM(theta, back, step, i + g);                                        \
                VECTOR rounded = ROUNDED(sum, i + g);                                              \
                VECTOR moved = rounded - theta;                                                    \
                VECTOR missed = moved + step;                                                      \
                result[i + g] = rounded;                                                           \
                along[g] -= moved * back;                                                          \
                error[g] += missed * missed;                                                       \
                changed[g] -= moved != 0;                                                          \
            }                                                                                      \
        }                                                                                          \
        for (int lane = 0; lane < GROUPS * WIDTH; lane++) {                                        \
            const int g = lane / WIDTH, k = lane % WIDTH;                                          \
            sums[ALONG][lane] += (double)along[g][k];                                              \
            sums[ERROR][lane] += (double)error[g][k];                                              \
            sums[CHANGED][lane] += (double)changed[g][k];                                          \
        }                                                                                          \
    }

DEFINE_CHUNK(chunk_in_float, float, Singles, SingleCounts, FROM_UNLEARNED, TO_BF16)
DEFINE_CHUNK(chunk_in_half, float, Singles, SingleCounts, FROM_UNLEARNED, TO_F16)
DEFINE_CHUNK(chunk_by_chance, float, Singles, SingleCounts, FROM_UNLEARNED, TO_BF16_BY_CHANCE)
DEFINE_CHUNK(chunk_in_double, double, Doubles, DoubleCounts, FROM_UNLEARNED, TO_F32)
DEFINE_CHUNK(chunk_single, float, Singles, SingleCounts, FROM_UNLEARNED, AS_IT_IS)
DEFINE_CHUNK(task_in_float, float, Singles, SingleCounts, FROM_ORIGINAL, TO_BF16)
DEFINE_CHUNK(task_in_half, float, Singles, SingleCounts, FROM_ORIGINAL, TO_F16)
DEFINE_CHUNK(task_single, float, Singles, SingleCounts, FROM_ORIGINAL, AS_IT_IS)

typedef void Chunk(
    const Singles *restrict, const Singles *restrict, Singles *restrict, const SingleBits *restrict,
    double, const Singles *restrict, double, Sums);

/* By the type of the output. */
static Chunk *const chunks[] = {[BF16] = chunk_in_float, [F16] = chunk_in_half, [F32] = chunk_single};
static Chunk *const tasks[] = {[BF16] = task_in_float, [F16] = task_in_half, [F32] = task_single};

/* The arithmetic is in float32: the outputs are of 16 bits, or that is asked for. */
static void cell_in_float(
    const Inputs *inputs, const Outputs *outputs, size_t start, size_t count, const Rule *rule,
    Sums *sums)
{
    NoiseChunk noise;
    SingleChunk wide[3], base;
    const int task = outputs->arithmetic == TASK;
    Chunk *chunk = rule->by_chance ? chunk_by_chance : (task ? tasks : chunks)[outputs->type];
    for (size_t at = start; at < start + count; at += CHUNK) {
        size_t some = start + count - at < CHUNK ? start + count - at : CHUNK;
        if (some < CHUNK)
            memset(wide, 0, sizeof wide);
        to_singles(&inputs->original, inputs->first, at, some, wide[0]);
        to_singles(&inputs->unlearned, inputs->second, at, some, wide[1]);
        if (task)
            memcpy(base, wide[0], sizeof base);
        update_in_float(wide[0], wide[1], sums[0]);
        if (rule->by_chance)
            draw(rule->key, rule->first + at, (void *)noise);
        for (int k = 0; k < outputs->count; k++) {
            chunk(
                wide[0], wide[1], wide[2], noise, outputs->alphas[k], base, outputs->weight, sums[k]);
            from_singles(wide[2], &outputs->buffers[k], outputs->type, at, some);
        }
    }
}

/* The outputs are float32, the arithmetic in float64. */
static void cell_in_double(
    const Inputs *inputs, const Outputs *outputs, size_t start, size_t count, Sums *sums)
{
    DoubleChunk wide[3];
    for (size_t at = start; at < start + count; at += CHUNK) {
        size_t some = start + count - at < CHUNK ? start + count - at : CHUNK;
        if (some < CHUNK)
            memset(wide, 0, sizeof wide);
        to_doubles(&inputs->original, inputs->first, at, some, wide[0]);
        to_doubles(&inputs->unlearned, inputs->second, at, some, wide[1]);
        update_in_double(wide[0], wide[1], sums[0]);
        for (int k = 0; k < outputs->count; k++) {
            chunk_in_double(
                wide[0], wide[1], wide[2], NULL, outputs->alphas[k], NULL, 0, sums[k]);
            f64_to_f32((void *)wide[2], (void *)position(&outputs->buffers[k], F32, at), some);
        }
    }
}

/* Add up the lanes, pair by pair, of every output; what no α changes is in the first one's. */
static void add_up(Sums *sums, int count, double *moments, size_t stride)
{
    for (int k = 0; k < count; k++) {
        for (int half = MOST_LANES / 2; half; half /= 2)
            for (int moment = 0; moment < MOMENTS; moment++)
                for (int lane = 0; lane < half; lane++)
                    sums[k][moment][lane] += sums[k][moment][lane + half];
        for (int moment = 0; moment < MOMENTS; moment++) {
            const int common = moment == UPDATE || moment == UNLEARNED || moment == DIFFERING;
            moments[(size_t)k * stride + (size_t)moment] = sums[common ? 0 : k][moment][0];
        }
    }
}

/* Return, for each output, the moments of its cells. */
static PyObject *run(
    const Inputs *inputs, const Outputs *outputs, size_t elements, const Rule *rule, size_t cell)
{
    const size_t cells = (elements + cell - 1) / cell, stride = cells * MOMENTS;
    double *found = PyMem_Calloc((size_t)outputs->count * stride + 1, sizeof *found);
    if (found == NULL)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    for (size_t number = 0; number < cells; number++) {
        const size_t start = number * cell;
        const size_t count = elements - start < cell ? elements - start : cell;
        Sums sums[MOST] = {0};
        if (outputs->type != F32 || outputs->arithmetic != WIDER)
            cell_in_float(inputs, outputs, start, count, rule, sums);
        else
            cell_in_double(inputs, outputs, start, count, sums);
        add_up(sums, outputs->count, found + number * MOMENTS, stride);
    }
    Py_END_ALLOW_THREADS
    PyObject *each = PyList_New(outputs->count);
    for (int k = 0; each != NULL && k < outputs->count; k++) {
        PyObject *rows = rows_of(found + (size_t)k * stride, cells, MOMENTS);
        if (rows == NULL)
            Py_CLEAR(each);
        else
            PyList_SetItem(each, k, rows); /* takes the reference */
    }
    PyMem_Free(found);
    return each;
}

/* Take the outputs with their α. On failure those taken so far wait for their release. */
static int take(PyObject *buffers, PyObject *alphas, size_t elements, Outputs *outputs)
{
    const Py_ssize_t count = PyTuple_Size(buffers);
    if (count < 1 || count > MOST || PyTuple_Size(alphas) != count)
        return refused("of 1 to 16 outputs, every one has an alpha");
    for (int k = 0; k < count; k++) {
        Py_buffer *buffer = &outputs->buffers[k];
        outputs->alphas[k] = PyFloat_AsDouble(PyTuple_GetItem(alphas, k));
        if (PyErr_Occurred()
            || PyObject_GetBuffer(PyTuple_GetItem(buffers, k), buffer, PyBUF_WRITABLE) < 0)
            return -1;
        outputs->count++;
        if ((size_t)buffer->len / size_of(outputs->type) != elements)
            return refused("the buffers hold different numbers of elements");
    }
    return 0;
}

static PyObject *extrapolate(PyObject *module, PyObject *arguments)
{
    (void)module;
    Inputs inputs;
    Outputs outputs = {.count = 0};
    PyObject *buffers, *alphas, *found = NULL;
    char one, two, three;
    Rule rule;
    unsigned long long key, position_of_first;
    Py_ssize_t cell;
    if (!PyArg_ParseTuple(
            arguments, "y*cy*cO!cO!npKK|id:extrapolate", &inputs.original, &one, &inputs.unlearned,
            &two, &PyTuple_Type, &buffers, &three, &PyTuple_Type, &alphas, &cell, &rule.by_chance,
            &key, &position_of_first, &outputs.arithmetic, &outputs.weight))
        return NULL;
    rule.key = key, rule.first = position_of_first;
    inputs.first = type_of(one), inputs.second = type_of(two), outputs.type = type_of(three);
    if (inputs.first < 0 || inputs.second < 0 || outputs.type < 0 || cell < 1) {
        refused("a type is 'B', 'H' or 'F', and a cell has an element");
    } else if (
        outputs.arithmetic < WIDER || outputs.arithmetic > TASK
        || (rule.by_chance && (outputs.arithmetic == TASK || outputs.type != BF16))) {
        refused("there is no such arithmetic, or none by chance");
    } else {
        const size_t elements = (size_t)inputs.unlearned.len / size_of(inputs.second);
        if ((size_t)inputs.original.len / size_of(inputs.first) != elements)
            refused("the buffers hold different numbers of elements");
        else if (take(buffers, alphas, elements, &outputs) == 0)
            found = run(&inputs, &outputs, elements, &rule, (size_t)cell);
    }
    while (outputs.count)
        PyBuffer_Release(&outputs.buffers[--outputs.count]);
    PyBuffer_Release(&inputs.original);
    PyBuffer_Release(&inputs.unlearned);
    return found;
}

static PyMethodDef methods[] = {
    {"extrapolate", extrapolate, METH_VARARGS,
     "Fill buffers with extrapolations of two others; return the moments of every cell of each."},
    {"mix", mix, METH_VARARGS,
     "Fill a buffer with a second operand plus a sum of terms; return the moments of every cell."},
    {"products", products, METH_VARARGS,
     "Return the inner products of differences of operands, cell by cell."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "fused",
    .m_doc = "The extrapolation of 16-bit and float32 blocks in one pass, and mixed steps.",
    .m_size = 0,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit_fused(void)
{
    return PyModuleDef_Init(&definition);
}
