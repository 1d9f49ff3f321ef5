// Packed sparse experts back with their zeros, for products with many tokens (packed/gpu.py).
//
// A warp unpacks a row of an expert that has tokens: rows of gridDim.y experts go to
// out[expert][row - first]. Defined before this file: BITMAP, DELTA (or n of 16), BITS of a value,
// VALUE (0 codes, 1 bfloat16, 2 half, 3 float), GROUPED, OUTPUT (1 bfloat16, 2 half, 3 float), ROWS,
// COLS, WIDTH (of a row of the output, COLS and what fills it up), WARPS; for n of 16 KEPT, LANES,
// ROUNDS, CHUNK and STEPS.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define ALL 0xffffffffu
#define UNIT 8
#define GROUPS ((COLS + 511) / 512 * 4)
#define WORDS32 (2 * ((COLS + 63) / 64))
#if OUTPUT == 3
typedef float output_t;
#else
typedef u16 output_t;
#endif

__device__ __forceinline__ float stored_value(const u8* values, long long at, float zero) {
#if VALUE == 1
    return __uint_as_float((u32)((const u16*)values)[at] << 16);
#elif VALUE == 2
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(((const u16*)values)[at]));
    return wide;
#elif VALUE == 3
    return ((const float*)values)[at];
#elif BITS == 8
    return (float)values[at] - zero;
#else
    return (float)(at & 1 ? values[at / 2] >> 4 : values[at / 2] & 15) - zero;
#endif
}

__device__ __forceinline__ output_t narrow(float value) {
#if OUTPUT == 1
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#elif OUTPUT == 2
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    return value;
#endif
}

// A line of the output lies in shared memory: zeros, among which the lanes put values.
extern __shared__ __align__(16) char shared[];

extern "C" __global__ void __launch_bounds__(WARPS * 32) unpack(
    output_t* out, const int* ends, int first, int rows, const u8* places, const int* starts,
    const u8* values, const float* scale, const u8* zero, const u8* steps
) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, local = blockIdx.x * WARPS + warp;
    const long long expert = blockIdx.y;
    if (local >= rows || ends[expert] == (expert ? ends[expert - 1] : 0)) return;
    const long long row = expert * ROWS + first + local;
    output_t* line = (output_t*)shared + (long long)warp * WIDTH;
    constexpr int WHOLE = 16 / sizeof(output_t);
    for (int i = lane; i < WIDTH / WHOLE; i += 32) ((uint4*)line)[i] = make_uint4(0, 0, 0, 0);
    float base = 0.f, unit = 1.f;
#if VALUE == 0
    base = zero[row], unit = scale[row];
#endif
    __syncwarp();
    auto put = [&](int column, float value) {
#if GROUPED
        value *= steps[row * GROUPS + (column >> 7)];
#endif
        line[column] = narrow(unit * value);
    };
#if BITMAP
    const u32* words = (const u32*)places + row * WORDS32;
    long long begin = (long long)starts[expert * (ROWS + 1) + first + local] * UNIT;
    for (int w = 0; w < WORDS32; w += 32) {
        u32 bits = w + lane < WORDS32 ? words[w + lane] : 0;
        const int own = __popc(bits);
        int scan = own;
        for (int o = 1; o < 32; o <<= 1) {
            const int below = __shfl_up_sync(ALL, scan, o);
            if (lane >= o) scan += below;
        }
        long long at = begin + scan - own;
        begin += __shfl_sync(ALL, scan, 31);
        for (; bits; bits &= bits - 1)
            put((w + lane) * 32 + __ffs(bits) - 1, stored_value(values, at++, base));
    }
#elif DELTA
    const int* ends_of = starts + expert * (ROWS + 1) + first + local;
    int column = 0;
    for (int from = ends_of[0]; from < ends_of[1]; from += 32) {
        const int at = from + lane;
        const u32 gaps = at < ends_of[1] ? ((const u32*)places)[at] : 0;
        const u32 pairs = (gaps & 0x0f0f0f0f) + (gaps >> 4 & 0x0f0f0f0f);
        const int wide = (int)(pairs * 0x01010101u >> 24) + 8;
        int scan = wide;
        for (int o = 1; o < 32; o <<= 1) {
            const int below = __shfl_up_sync(ALL, scan, o);
            if (lane >= o) scan += below;
        }
        int own = column + scan - wide;
        column += __shfl_sync(ALL, scan, 31);
        if (at >= ends_of[1]) continue;
#pragma unroll
        for (int j = 0; j < 8; j++, own++) {
            own += gaps >> 4 * j & 15;
            const float value = stored_value(values, (long long)at * 8 + j, base);
            if (own < COLS && value != 0.f) put(own, value);
        }
    }
#else
    const int own_lane = lane % LANES;
#pragma unroll 2
    for (int c = lane / LANES; c < STEPS; c += 32 / LANES) {
        const long long at = ((row * STEPS + c) * LANES + own_lane) * CHUNK;
#pragma unroll
        for (int j = 0; j < CHUNK; j++) {
            const int t = (c * CHUNK + j) / KEPT;
            const float value = stored_value(values, at + j, base);
            const int place = places[(at + j) / 2] >> (j & 1) * 4 & 15;
            const int column = (t * LANES + own_lane) * 16 + place;
            if (t < ROUNDS && column < COLS && value != 0.f) put(column, value);
        }
    }
#endif
    __syncwarp();
    output_t* to = out + (expert * rows + local) * WIDTH;
    for (int i = lane; i < WIDTH / WHOLE; i += 32) ((uint4*)to)[i] = ((uint4*)line)[i];
}
