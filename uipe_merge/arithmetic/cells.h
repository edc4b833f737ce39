/* What the compiled arithmetic of fused.c and of mixed.c shares: chunks, vectors, conversions.
 *
 * A cell goes through in chunks that stay in the first-level cache: the inputs are widened to
 * the working type, the result is formed and rounded in registers, and narrowed into the output.
 * The last chunk is padded with zeros, which add nothing to any sum.
 *
 * Compile with -ffp-contract=off: a fused multiply-add rounds once where two roundings are due.
 * And with -fno-strict-aliasing: the same buffers are looked at as numbers and as their bits.
 * And with -fno-trapping-math, or no loop with a choice in it is vectorised: nobody asks which
 * exceptions were raised.
 */
#ifndef UIPE_MERGE_CELLS_H
#define UIPE_MERGE_CELLS_H

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { CHUNK = 1024, VECTOR_BYTES = 32 };
enum { BF16, F16, F32 };

/* One copy of each loop per instruction set, chosen when the module is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORISED
#endif

/* No compiler need warn if only one of the two files calls it. */
#define SHARED __attribute__((unused)) static

typedef float Singles __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t SingleBits __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t SingleCounts __attribute__((vector_size(VECTOR_BYTES)));
typedef double Doubles __attribute__((vector_size(VECTOR_BYTES)));
typedef float HalfSingles __attribute__((vector_size(VECTOR_BYTES / 2)));

/* One chunk of an operand, of the noise or of the result. */
typedef Singles SingleChunk[CHUNK * sizeof(float) / VECTOR_BYTES];
typedef Doubles DoubleChunk[CHUNK * sizeof(double) / VECTOR_BYTES];
typedef SingleBits NoiseChunk[CHUNK * sizeof(uint32_t) / VECTOR_BYTES];

/* To nearest, ties to even, by carrying into the bits that stay. NaN may come out as anything:
 * it has shown in the moments by then, and the block is done again by blocks.py. */
#define CARRIED(bits) ((Singles)(((bits) + 0x7fff + (((bits) >> 16) & 1)) & 0xffff0000u))
#define TO_BF16(sum, at) CARRIED((SingleBits)(sum))
#define TO_F32(sum, at)                                                                            \
    __builtin_convertvector(__builtin_convertvector(sum, HalfSingles), Doubles)
/* Up as often as the bits that go are a part of their unit: noise is uniform in 0 … 2¹⁶ − 1. */
#define TO_BF16_BY_CHANCE(sum, at) ((Singles)(((SingleBits)(sum) + noise[at]) & 0xffff0000u))

/* float16, in bits of float32: its smallest normal number, the least that rounds to infinity, and
 * what float32's exponents are larger by. */
#define F16_NORMAL 0x38800000u
#define F16_TOO_LARGE 0x477ff000u
#define F16_REBIAS 0x38000000u
#define INFINITE 0x7f800000u

/* To nearest, ties to even: by carrying, and below the normal numbers, where all are multiples of
 * 2⁻²⁴, by adding 1/2: between 1/2 and 1 float32 has no other numbers. */
#define F16_CARRIED(size) (((size) + 0xfff + (((size) >> 13) & 1)) & 0xffffe000u)
#define F16_SMALL(size) ((SingleBits)(((Singles)(size) + 0.5f) - 0.5f))
#define PICK(mask, one, other) (((one) & (SingleBits)(mask)) | ((other) & ~(SingleBits)(mask)))
#define F16_FINITE(size) PICK((size) < F16_NORMAL, F16_SMALL(size), F16_CARRIED(size))
#define F16_SIZE(size) PICK((size) >= F16_TOO_LARGE, INFINITE, F16_FINITE(size))
#define TO_F16(sum, at)                                                                            \
    ((Singles)(F16_SIZE((SingleBits)(sum) & 0x7fffffffu) | ((SingleBits)(sum) & 0x80000000u)))

SHARED inline uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

SHARED inline float single_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

SHARED inline uint32_t f16_widened(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, size = (uint32_t)(half & 0x7fff) << 13;
    const uint32_t small = bits_of((float)(half & 0x3ff) * 0x1p-24f);
    const uint32_t normal = size + F16_REBIAS;
    const uint32_t large = (half & 0x7c00) == 0x7c00 ? normal + F16_REBIAS : normal; /* ∞, NaN */
    return sign | (half & 0x7c00 ? large : small);
}

/* Of a float32 that float16 holds. */
SHARED inline uint16_t f16_narrowed(uint32_t bits)
{
    const uint32_t sign = bits & 0x80000000u, size = bits ^ sign;
    const uint32_t small = bits_of(single_of(size) + 0.5f) - bits_of(0.5f);
    const uint32_t normal = (size - F16_REBIAS) >> 13;
    const uint32_t large = size >= INFINITE ? 0x7c00 : normal;
    return (uint16_t)(sign >> 16 | (size < F16_NORMAL ? small : large));
}

#define DEFINE_CONVERSION(NAME, FROM, TO, VALUE)                                                   \
    SHARED VECTORISED void NAME(const FROM *restrict from, TO *restrict to, size_t count)          \
    {                                                                                              \
        for (size_t i = 0; i < count; i++)                                                         \
            to[i] = (TO)(VALUE);                                                                   \
    }

DEFINE_CONVERSION(bf16_to_f32, uint16_t, uint32_t, (uint32_t)from[i] << 16)
DEFINE_CONVERSION(f32_to_bf16, uint32_t, uint16_t, from[i] >> 16)
DEFINE_CONVERSION(f16_to_f32, uint16_t, uint32_t, f16_widened(from[i]))
DEFINE_CONVERSION(f32_to_f16, uint32_t, uint16_t, f16_narrowed(from[i]))
DEFINE_CONVERSION(f32_to_f64, float, double, from[i])
DEFINE_CONVERSION(f64_to_f32, double, float, from[i])

/* Noise of a tensor's elements from ``first``, 16 bits each, as noise.py defines it: SplitMix64
 * (Steele, Lea, Flood 2014) of the tensor's key, a word for every four elements. */
SHARED VECTORISED void draw(uint64_t key, uint64_t first, uint32_t *restrict noise)
{
    uint64_t words[CHUNK / 4 + 1];
    for (int i = 0; i < CHUNK / 4 + 1; i++) {
        uint64_t word = key + (first / 4 + (uint64_t)i + 1) * 0x9e3779b97f4a7c15u;
        word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9u;
        word = (word ^ (word >> 27)) * 0x94d049bb133111ebu;
        words[i] = word ^ (word >> 31);
    }
    for (unsigned i = 0, at = first % 4; i < CHUNK; i++, at++)
        noise[i] = (uint32_t)(words[at / 4] >> (16 * (at % 4))) & 0xffff;
}

/* By which chance a result is rounded where it is not to the nearest. */
typedef struct {
    int by_chance;
    uint64_t key, first;
} Rule;

SHARED size_t size_of(int type)
{
    return type == F32 ? 4 : 2;
}

SHARED int type_of(char name)
{
    return name == 'B' ? BF16 : name == 'H' ? F16 : name == 'F' ? F32 : -1;
}

SHARED const char *position(const Py_buffer *buffer, int type, size_t at)
{
    return (const char *)buffer->buf + at * size_of(type);
}

/* Widen at most a chunk of stored elements to float32. */
SHARED void to_singles(const Py_buffer *buffer, int type, size_t at, size_t some, Singles *wide)
{
    const void *from = position(buffer, type, at);
    if (type == BF16)
        bf16_to_f32(from, (void *)wide, some);
    else if (type == F16)
        f16_to_f32(from, (void *)wide, some);
    else
        memcpy(wide, from, some * sizeof(float));
}

/* Store at most a chunk of values that the type holds. */
SHARED void from_singles(
    const Singles *wide, const Py_buffer *buffer, int type, size_t at, size_t some)
{
    void *to = (void *)position(buffer, type, at);
    if (type == BF16)
        f32_to_bf16((const void *)wide, to, some);
    else if (type == F16)
        f32_to_f16((const void *)wide, to, some);
    else
        memcpy(to, wide, some * sizeof(float));
}

/* Widen at most a chunk of stored elements to float64. */
SHARED void to_doubles(const Py_buffer *buffer, int type, size_t at, size_t some, Doubles *wide)
{
    SingleChunk narrow;
    to_singles(buffer, type, at, some, narrow);
    f32_to_f64((const void *)narrow, (void *)wide, some);
}

/* Return a list of tuples, one a cell, of ``width`` numbers each. */
SHARED PyObject *rows_of(const double *numbers, size_t cells, int width)
{
    PyObject *rows = PyList_New((Py_ssize_t)cells);
    for (size_t number = 0; rows != NULL && number < cells; number++) {
        PyObject *row = PyTuple_New(width);
        for (int i = 0; row != NULL && i < width; i++) {
            PyObject *value = PyFloat_FromDouble(numbers[number * (size_t)width + (size_t)i]);
            if (value == NULL)
                Py_CLEAR(row);
            else
                PyTuple_SetItem(row, i, value); /* takes the reference */
        }
        if (row == NULL)
            Py_CLEAR(rows);
        else
            PyList_SetItem(rows, (Py_ssize_t)number, row); /* takes the reference */
    }
    return rows;
}

SHARED int refused(const char *message)
{
    PyErr_SetString(PyExc_ValueError, message);
    return -1;
}

/* The functions of mixed.c, for the module's table in fused.c. */
__attribute__((visibility("hidden"))) PyObject *mix(PyObject *module, PyObject *arguments);
__attribute__((visibility("hidden"))) PyObject *products(PyObject *module, PyObject *arguments);

#endif
