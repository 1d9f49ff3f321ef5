// Packed sparse experts back with their zeros, for products with many tokens (packed/gpu.py).
//
// A warp unpacks a row of an expert that has tokens: rows of gridDim.y experts go to
// out[expert][row - first]. Defined before this file: BITMAP, DELTA (or n of 16), BITS of a value,
// VALUE (0 codes, 1 bfloat16, 2 half, 3 float), GROUPED, OUTPUT (1 bfloat16, 2 half, 3 float), ROWS,
// COLS, WIDTH (of a row of the output, COLS and what fills it up); for n of 16 KEPT, LANES, ROUNDS,
// CHUNK and STEPS.

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

extern "C" __global__ void __launch_bounds__(256) unpack(
    output_t* out, const int* ends, int first, int rows, const u8* places, const int* starts,
    const u8* values, const float* scale, const u8* zero, const u8* steps
) {
    const int lane = threadIdx.x & 31, local = blockIdx.x * 8 + (threadIdx.x >> 5);
    const long long expert = blockIdx.y;
    if (local >= rows || ends[expert] == (expert ? ends[expert - 1] : 0)) return;
    const long long row = expert * ROWS + first + local;
    output_t* line = out + (expert * rows + local) * WIDTH;
    float base = 0.f, unit = 1.f;
#if VALUE == 0
    base = zero[row], unit = scale[row];
#endif
#if BITMAP
    const u32* words = (const u32*)places + row * WORDS32;
    long long begin = (long long)starts[expert * (ROWS + 1) + first + local] * UNIT;
    for (int w = 0; w < (WIDTH + 1023) / 1024 * 32; w += 32) {
        const u32 bits = w + lane < WORDS32 ? words[w + lane] : 0;
        const int own = __popc(bits);
        int scan = own;
        for (int o = 1; o < 32; o <<= 1) {
            const int below = __shfl_up_sync(ALL, scan, o);
            if (lane >= o) scan += below;
        }
        long long at = begin + scan - own;
        begin += __shfl_sync(ALL, scan, 31);
        float step = unit;
#if GROUPED
        const int group = (w + lane) >> 2;
        step *= group < GROUPS ? steps[row * GROUPS + group] : 0;
#endif
        for (int eight = 0; eight < 32; eight += 8) {
            const int column = (w + lane) * 32 + eight;
            if (column >= WIDTH) break;
            output_t kept[8];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float value = 0.f;
                if (bits >> (eight + j) & 1) value = step * stored_value(values, at++, base);
                kept[j] = narrow(value);
            }
#pragma unroll
            for (int j = 0; j < 8; j += 16 / sizeof(output_t))
                *(uint4*)(line + column + j) = *(uint4*)(kept + j);
        }
    }
#elif DELTA
    for (int i = lane * 16 / sizeof(output_t); i < WIDTH; i += 512 / sizeof(output_t))
        *(uint4*)(line + i) = make_uint4(0, 0, 0, 0);
    __syncwarp();
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
        for (int j = 0; j < 8 && at < ends_of[1]; j++, own++) {
            own += gaps >> 4 * j & 15;
            float value = unit * stored_value(values, (long long)at * 8 + j, base);
            if (value == 0.f || own >= COLS) continue;
#if GROUPED
            value *= steps[row * GROUPS + (own >> 7)];
#endif
            line[own] = narrow(value);
        }
    }
#else
    for (int t = lane / LANES; t < ROUNDS; t += 32 / LANES) {
        const int block = t * LANES + lane % LANES;
        if (block * 16 >= WIDTH) continue;
        for (int j = 0; j < 16 && block * 16 + j < WIDTH; j += 16 / sizeof(output_t))
            *(uint4*)(line + block * 16 + j) = make_uint4(0, 0, 0, 0);
        float step = unit;
#if GROUPED
        step *= steps[row * GROUPS + (block >> 3)];
#endif
        for (int k = 0; k < KEPT; k++) {
            const int v = t * KEPT + k;
            const long long at =
                ((row * STEPS + v / CHUNK) * LANES + lane % LANES) * CHUNK + v % CHUNK;
            const float value = step * stored_value(values, at, base);
            const int column = places[at / 2] >> (at & 1) * 4 & 15;
            if (value != 0.f) line[block * 16 + column] = narrow(value);
        }
    }
#endif
}
