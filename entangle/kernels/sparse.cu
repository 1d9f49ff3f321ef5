// Products of a few tokens with packed sparse experts (see packed/formats.py, packed/gpu.py).
//
// A block of threads computes some rows for the tokens of one expert: those tokens' inputs lie in
// shared memory, laid out so that a warp's lanes read 32 different banks whatever columns they ask
// for; the weights stream past once. gridDim.y is the number of tokens: the block of the first token
// of an expert computes all of that expert's tokens, the others' blocks end at once.
// Defined before this file: SINGLE (whether there is one expert), BITMAP, DELTA (or n of 16), BITS
// of a stored value, VALUE (0 codes, 1 bfloat16, 2 half, 3 float), GROUPED, INPUT (1 bfloat16,
// 2 half, 3 float), ROWS, COLS, TOKENS (most at once), MATRICES (2: a gate and what it lets
// through), ACTIVATION, WARPS, BLOCKS (a multiprocessor's), MOST_ROWS (of a block); for n of 16
// KEPT, LANES, ROUNDS, CHUNK, STEPS, TOGETHER (rows of a lane at once) and DEPTH (their steps
// loaded at once); for distances UNITS (of eight values, a lane's at once) and DEPTH (how many
// times that is under way).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define ALL 0xffffffffu
#define UNIT 8        // values in which `starts` counts
#define GROUPS ((COLS + 511) / 512 * 4)
#define GROUP_WORDS (GROUPS / 4)
#if INPUT == 3
typedef float input_t;
#else
typedef u16 input_t;
#endif

__device__ __forceinline__ float from_half(u32 bits) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"((u16)bits));
    return wide;
}

__device__ __forceinline__ u16 to_half(float wide) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(wide));
    return bits;
}

__device__ __forceinline__ u16 to_bfloat(float wide) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(wide));
    return bits;
}

// Kernels may begin before the last one has ended, and wait for it where they need what it wrote.
__device__ __forceinline__ void next_may_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_last() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A number of 16 bits out of one half of a word.
template <int KIND>
__device__ __forceinline__ float half_of(u32 word, bool upper) {
    if (KIND == 1) return __uint_as_float(upper ? word & 0xffff0000u : word << 16);
    return from_half(upper ? word >> 16 : word & 0xffffu);
}

__device__ __forceinline__ float read_input(const input_t* x) {
#if INPUT == 3
    return *x;
#else
    return half_of<INPUT>(*x, false);
#endif
}

__device__ __forceinline__ void write_output(input_t* y, float value) {
#if INPUT == 1
    *y = to_bfloat(value);
#elif INPUT == 2
    *y = to_half(value);
#else
    *y = value;
#endif
}

__device__ __forceinline__ float activate(float x) {
#if ACTIVATION == 0  // silu
    return x / (1.f + __expf(-x));
#elif ACTIVATION == 1  // gelu
    return 0.5f * x * (1.f + erff(x * 0.70710678118654752f));
#elif ACTIVATION == 2  // gelu, the approximation by tanh
    return 0.5f * x * (1.f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
#elif ACTIVATION == 3  // relu
    return x < 0.f ? 0.f : x;
#else  // relu squared
    return x < 0.f ? 0.f : x * x;
#endif
}

// What shared memory holds of one column: the inputs of M tokens. One token's are widened.
template <int M>
struct Inputs {
    static constexpr int BYTES = M == 1 ? 4 : M * (int)sizeof(input_t);
    static constexpr int WORDS = BYTES / 4;

    // `from` is an address in shared memory.
    static __device__ __forceinline__ void load(u32 from, float (&x)[M]) {
        u32 w[4];
        if (WORDS == 1) {
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(w[0]) : "r"(from));
        } else if (WORDS == 2) {
            asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "r"(from));
        } else {
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "r"(from));
        }
        if (M == 1 || INPUT == 3) {
#pragma unroll
            for (int m = 0; m < M; m++) x[m] = __uint_as_float(w[m]);
        } else {
#pragma unroll
            for (int m = 0; m < M; m++) x[m] = half_of<INPUT>(w[m / 2], m & 1);
        }
    }

    static __device__ __forceinline__ void store(char* to, int m, input_t value) {
        if (M == 1) *(float*)to = read_input(&value);
        else ((input_t*)to)[m] = value;
    }
};

// Eight neighbouring columns of all tokens go to places so many bytes apart.
template <int M>
__device__ __forceinline__ void spread(
    char* to, int apart, const input_t* x, int column, const int* token, int count
) {
    const bool whole = COLS % 8 == 0 && sizeof(input_t) == 2;
#pragma unroll
    for (int m = 0; m < M; m++) {
        input_t own[8];
        const input_t* from = x + (long long)token[m < count ? m : 0] * COLS + column;
        if (whole && m < count && column < COLS) {
            *(uint4*)own = *(const uint4*)from;
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++)
                own[j] = m < count && column + j < COLS ? from[j] : (input_t)0;
        }
#pragma unroll
        for (int j = 0; j < 8; j++) Inputs<M>::store(to + j * apart, m, own[j]);
    }
}

struct Matrix {
    const u8* places;      // the bitmap, or the indices of n of 16
    const int* starts;     // bitmap alone
    const u8* values;
    const float* scale;    // codes alone
    const u8* zero;
    const u8* steps;       // groups alone
    long long stored;      // bytes of the values
};

// The rows that a warp computes, next to each other.
__device__ __forceinline__ void share(int worker, int workers, int unit, int& first, int& stop) {
    const int units = (ROWS + unit - 1) / unit;
    first = (int)((long long)units * worker / workers) * unit;
    stop = (int)((long long)units * (worker + 1) / workers) * unit;
    stop = stop < ROWS ? stop : ROWS;
}

#if BITMAP
#include "sparse_bitmap.cuh"
#elif DELTA
#include "sparse_delta.cuh"
#else
#include "sparse_n16.cuh"
#endif

// The tokens of this block's expert: the block of the first of them computes them all.
__device__ __forceinline__ int tokens_of(const long long* clusters, int tokens, int* token) {
    const int self = blockIdx.y;
    const long long expert = clusters[self];
    int count = 0;
    for (int i = 0; i < tokens; i++) {
        if (clusters[i] != expert) continue;
        if (i < self) return 0;
        token[count++] = i;
    }
    return count;
}

template <int M>
__device__ void work(
    const input_t* x, long long expert, const int* token, int count, input_t* y,
    const Matrix& matrix, const input_t* bias, const input_t* bias2, char* shared
) {
    char* tile = shared;
    char* rest = shared + (TILE_BYTES(Inputs<M>::BYTES) + 15) / 16 * 16;
    const int warp = threadIdx.x >> 5, part = warp % MATRICES, worker = warp / MATRICES;
    int block_first, block_stop, first, stop;
    share(blockIdx.x, gridDim.x, ROW_UNIT, block_first, block_stop);
    {
        const int units = (block_stop - block_first + ROW_UNIT - 1) / ROW_UNIT;
        first = block_first + units * worker / (WARPS / MATRICES) * ROW_UNIT;
        stop = block_first + units * (worker + 1) / (WARPS / MATRICES) * ROW_UNIT;
        stop = stop < block_stop ? stop : block_stop;
    }
    float* results = (float*)rest;  // (MATRICES, M, rows of the block)
    const int block_rows = block_stop - block_first;
    char* ring = rest + (MATRICES * M * MOST_ROWS * 4 + 15) / 16 * 16 + warp * WARP_BYTES;
    float* out = results + part * M * MOST_ROWS;
    rows_of<M>(matrix, expert, first, stop, tile, ring, out, block_first, x, token, count);
    __syncthreads();
    for (int i = threadIdx.x; i < block_rows * count; i += WARPS * 32) {
        const int m = i / block_rows, row = i % block_rows, at = block_first + row;
        float value = results[m * MOST_ROWS + row];
        if (bias) value += read_input(bias + at);
#if MATRICES == 2
        float other = results[(M + m) * MOST_ROWS + row];
        if (bias2) other += read_input(bias2 + at);
        value = activate(value) * other;
#endif
        write_output(y + (long long)token[m] * ROWS + at, value);
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) product(
    const input_t* x, const long long* clusters, input_t* y, int tokens,
    const u8* places, const int* starts, const u8* values, const float* scale, const u8* zero,
    const u8* steps, const input_t* bias, long long stored
#if MATRICES == 2
    , const u8* places2, const int* starts2, const u8* values2, const float* scale2,
    const u8* zero2, const u8* steps2, const input_t* bias2, long long stored2
#endif
) {
    extern __shared__ __align__(128) char shared[];
    int token[TOKENS];
#if SINGLE
    // the weights can be asked for before the tokens are there
    next_may_begin();
    if (blockIdx.y) return;
    const long long expert = 0;
    const int count = tokens;
#pragma unroll
    for (int i = 0; i < TOKENS; i++) token[i] = i;
#else
    next_may_begin();
    wait_for_last();
    const int count = tokens_of(clusters, tokens, token);
    if (count == 0) return;
    const long long expert = clusters[blockIdx.y];
#endif
#if MATRICES == 2
    if ((threadIdx.x >> 5) % 2) {
        places = places2, starts = starts2, values = values2, scale = scale2;
        zero = zero2, steps = steps2, stored = stored2;
    }
#else
    const input_t* bias2 = nullptr;
#endif
    const Matrix own = {places, starts, values, scale, zero, steps, stored};
    if (TOKENS == 1 || count == 1) work<1>(x, expert, token, count, y, own, bias, bias2, shared);
#if TOKENS >= 2
    else if (count == 2) work<2>(x, expert, token, count, y, own, bias, bias2, shared);
#endif
#if TOKENS >= 4
    else if (count <= 4) work<4>(x, expert, token, count, y, own, bias, bias2, shared);
#endif
#if TOKENS >= 8
    else work<8>(x, expert, token, count, y, own, bias, bias2, shared);
#endif
}
