// Products of a few tokens with packed sparse experts (see packed/formats.py, packed/gpu.py).
//
// A block of threads computes some rows for the tokens of one expert: those tokens' inputs lie in
// shared memory, laid out so that a warp's lanes read 32 different banks whatever columns they ask
// for; the weights stream past once. gridDim.y is the number of tokens: the block of the first token
// of an expert computes all of that expert's tokens, the others' blocks end at once.
// Defined before this file: SINGLE (whether there is one expert), BITMAP (or n of 16), BITS of a stored value, VALUE (0 codes, 1 bfloat16,
// 2 half, 3 float), GROUPED, INPUT (1 bfloat16, 2 half, 3 float), ROWS, COLS, TOKENS (most at once),
// MATRICES (2: a gate and what it lets through), ACTIVATION, WARPS, MOST_ROWS (of a block); for n of 16 KEPT, LANES, ROUNDS,
// CHUNK, STEPS, TOGETHER (rows of a lane at once) and DEPTH (their steps loaded at once).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;

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

// Eight neighbouring columns of all tokens go to places a row of 32 lanes apart.
template <int M>
__device__ __forceinline__ void spread(
    char* to, const input_t* x, int column, const int* token, int count
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
        for (int j = 0; j < 8; j++) Inputs<M>::store(to + j * 32 * Inputs<M>::BYTES, m, own[j]);
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
// ---------------------------------------------------------------------------------------------
#define WORDS32 (2 * ((COLS + 63) / 64))
#define SPANS ((WORDS32 + 31) / 32)  // of 1,024 columns, a word of 32 a lane
#define RING (BITS == 32 ? 8192 : 4096)  // bytes of values that a warp holds; a power of two
#define PIECE 512
#define AHEAD 3                      // pieces under way beyond the one in use
#define ROW_UNIT 1
#define TILE_ROWS (SPANS * 33)       // of 32 lanes; the first of a span's 33 is zero

template <int M>
__device__ void stage(char* tile, const input_t* x, const int* token, int count) {
    // neighbouring lanes write neighbouring words: 32 banks
    for (int i = threadIdx.x; i < SPANS * 32 * 4; i += WARPS * 32) {
        const int lane = i & 31, part = i >> 5 & 3, span = i >> 7;
        char* to = tile + ((span * 33 + 1 + part * 8) * 32 + lane) * Inputs<M>::BYTES;
        spread<M>(to, x, span * 1024 + lane * 32 + part * 8, token, count);
    }
    for (int i = threadIdx.x; i < SPANS * 32 * Inputs<M>::WORDS; i += WARPS * 32) {
        const int word = i % (32 * Inputs<M>::WORDS), span = i / (32 * Inputs<M>::WORDS);
        ((u32*)(tile + span * 33 * 32 * Inputs<M>::BYTES))[word] = 0;
    }
}

__device__ __forceinline__ void fetch(u32 to, const u8* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}

// The stream of a warp's values through its ring, at their own addresses modulo the ring.
struct Stream {
    const u8* values;
    long long stored, next;  // next piece to ask for
    u32 ring;
    int lane;

    __device__ __forceinline__ void ask() {
        const long long at = next + lane * 16;
        long long left = stored - at;
        left = left < 0 ? 0 : left > 16 ? 16 : left;
        fetch(ring + ((u32)at & (RING - 1)), values + (left ? at : 0), (int)left);
        asm volatile("cp.async.commit_group;");
        next += PIECE;
    }

    // Wait until all bytes below `end` are there, and keep AHEAD pieces under way.
    __device__ __forceinline__ void need(long long end) {
        const long long last = (end + PIECE - 1) / PIECE * PIECE + AHEAD * PIECE;
        while (next < last) ask();
        asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD));
        __syncwarp();
    }
};

__device__ __forceinline__ u32 ring_word(const char* ring, int at) {
    return *(const u32*)(ring + (at & (RING - 4)));
}

// One lane's word of 32 columns: `bits`, whose values end before number `end` of the stream.
template <int M>
__device__ __forceinline__ void walk(
    u32 bits, int end, int most, const char* ring, u32 tile, float zero, float (&acc)[M]
) {
    const u32 base = tile + 32 * Inputs<M>::BYTES;
    int place, last = end - 1;
    float x[M];
#if BITS == 16
    const int shift = last & 1 ? 0 : 16;
    int at = (last & ~1) * 2;
    u32 upper = ring_word(ring, at);
#pragma unroll 2
    for (int i = 0; i < most; i += 2) {
        at -= 4;
        const u32 lower = ring_word(ring, at), pair = __funnelshift_l(lower, upper, shift);
        upper = lower;
#pragma unroll
        for (int part = 1; part >= 0; part--) {
            asm("bfind.u32 %0, %1;" : "=r"(place) : "r"(bits));
            u32 bit;
            asm("shl.b32 %0, 1, %1;" : "=r"(bit) : "r"(place));
            bits &= ~bit;
            Inputs<M>::load(base + place * (32 * Inputs<M>::BYTES), x);
            const float weight = half_of<VALUE>(pair, part);
#pragma unroll
            for (int m = 0; m < M; m++) acc[m] = fmaf(weight, x[m], acc[m]);
        }
    }
#else
    for (int i = 0; i < most; i++, last--) {
        asm("bfind.u32 %0, %1;" : "=r"(place) : "r"(bits));
        u32 bit;
        asm("shl.b32 %0, 1, %1;" : "=r"(bit) : "r"(place));
        bits &= ~bit;
        Inputs<M>::load(base + place * (32 * Inputs<M>::BYTES), x);
#if BITS == 32
        const float weight = __uint_as_float(ring_word(ring, last * 4));
#elif BITS == 8
        const float weight = (float)*(const u8*)(ring + (last & (RING - 1))) - zero;
#else
        const u8 both = *(const u8*)(ring + (last >> 1 & (RING - 1)));
        const float weight = (float)(last & 1 ? both >> 4 : both & 15) - zero;
#endif
#pragma unroll
        for (int m = 0; m < M; m++) acc[m] = fmaf(weight, x[m], acc[m]);
    }
#endif
}

template <int M>
__device__ void rows_of(
    const Matrix& matrix, long long expert, int first, int stop, char* tile, char* ring,
    float* out, int out_first, const input_t* x, const int* token, int count
) {
    const int lane = threadIdx.x & 31;
    const u32 own = (u32)__cvta_generic_to_shared(tile) + lane * Inputs<M>::BYTES;
    for (int i = lane; i < RING / 16; i += 32) ((uint4*)ring)[i] = make_uint4(0, 0, 0, 0);
    __syncwarp();
    const int* starts = matrix.starts + expert * (ROWS + 1);
    // numbers of values can pass 2**31; within a warp's rows they are counted from its first
    const long long origin_value = first < stop ? (long long)starts[first] * UNIT : 0;
    const long long origin = origin_value * BITS / 8 & ~(long long)(PIECE - 1);
    const int skip = (int)(origin_value - origin * 8 / BITS);
    Stream stream{matrix.values + origin, matrix.stored - origin, 0,
                  (u32)__cvta_generic_to_shared(ring), lane};
    const u32* words = (const u32*)matrix.places + (expert * ROWS + first) * WORDS32;
    u32 word[SPANS];
#pragma unroll
    for (int s = 0; s < SPANS; s++)
        word[s] = first < stop && s * 32 + lane < WORDS32 ? __ldcs(words + s * 32 + lane) : 0;
    if (first < stop) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) stream.ask();
    }
#if SINGLE
    wait_for_last();
#endif
    stage<M>(tile, x, token, count);
    __syncthreads();
    for (int row = first; row < stop; row++) {
        u32 now[SPANS];
#pragma unroll
        for (int s = 0; s < SPANS; s++) now[s] = word[s];
        words += WORDS32;
        if (row + 1 < stop) {
#pragma unroll
            for (int s = 0; s < SPANS; s++)
                word[s] = s * 32 + lane < WORDS32 ? __ldcs(words + s * 32 + lane) : 0;
        }
        int begin = skip + (int)((long long)starts[row] * UNIT - origin_value);
        float zero = 0.f;
#if VALUE == 0
        zero = matrix.zero[expert * ROWS + row];
#endif
        float acc[M], sum[M];
#pragma unroll
        for (int m = 0; m < M; m++) acc[m] = sum[m] = 0.f;
#pragma unroll
        for (int pair = 0; pair < (SPANS + 1) / 2; pair++) {
            // the counts of two spans are added up over the lanes in one word
            const int s = 2 * pair, t = s + 1 < SPANS ? s + 1 : s;
            const u32 counts = __popc(now[s]) | (s + 1 < SPANS ? __popc(now[t]) << 16 : 0);
            u32 scan = counts;
#pragma unroll
            for (int o = 1; o < 32; o <<= 1) {
                const u32 below = __shfl_up_sync(ALL, scan, o);
                if (lane >= o) scan += below;
            }
            const u32 total = __shfl_sync(ALL, scan, 31);
#pragma unroll
            for (int k = 0; k < 2; k++) {
                if (s + k >= SPANS) break;
                const int count = counts >> 16 * k & 0xffff, end = begin + (scan >> 16 * k & 0xffff);
                begin += total >> 16 * k & 0xffff;
                stream.need(((long long)begin * BITS + 7) / 8);
                const int most = __reduce_max_sync(ALL, count);
                walk<M>(now[s + k], end, most, ring,
                        own + (s + k) * 33 * 32 * Inputs<M>::BYTES, zero, sum);
                __syncwarp();  // all have read before the ring goes on
#if GROUPED
                const int group = (s + k) * 8 + (lane >> 2);
                const float step =
                    group < GROUPS ? matrix.steps[(expert * ROWS + row) * GROUPS + group] : 0;
#pragma unroll
                for (int m = 0; m < M; m++) acc[m] = fmaf(step, sum[m], acc[m]), sum[m] = 0.f;
#endif
            }
        }
#pragma unroll
        for (int m = 0; m < M; m++) {
            float total = GROUPED ? acc[m] : sum[m];
#pragma unroll
            for (int o = 16; o; o >>= 1) total += __shfl_xor_sync(ALL, total, o);
#if VALUE == 0
            total *= matrix.scale[expert * ROWS + row];
#endif
            if (lane == 0) out[m * MOST_ROWS + row - out_first] = total;
        }
    }
    asm volatile("cp.async.wait_all;");
}

#else
// ---------------------------------------------------------------------------------------------
#define ROW_UNIT (32 / LANES * TOGETHER)
#define PARTS ((STEPS + DEPTH - 1) / DEPTH)
#define FIRST_WORD(begin) ((begin) * CHUNK / KEPT * LANES / 32)  // of the groups of a part
#if GROUPED
#define PART_WORDS ((DEPTH * CHUNK / KEPT + 2) * LANES / 32 + 1)
#else
#define PART_WORDS 1
#endif
#define TILE_ROWS (ROUNDS * 16)  // of 32 lanes
#define VALUE_WORDS (CHUNK * BITS >= 32 ? CHUNK * BITS / 32 : 1)
#define INDEX_WORDS (CHUNK >= 8 ? CHUNK / 8 : 1)

template <int BYTES, int WORDS>
__device__ __forceinline__ void load_words(const u8* from, u32 (&w)[WORDS]) {
    if (BYTES == 16) {
        const uint4 v = __ldcs((const uint4*)from);
        w[0] = v.x, w[1 % WORDS] = v.y, w[2 % WORDS] = v.z, w[3 % WORDS] = v.w;
    } else if (BYTES == 8) {
        const uint2 v = __ldcs((const uint2*)from);
        w[0] = v.x, w[1 % WORDS] = v.y;
    } else if (BYTES == 4) {
        w[0] = __ldcs((const u32*)from);
    } else if (BYTES == 2) {
        w[0] = __ldcs((const u16*)from);
    } else {
        w[0] = __ldcs(from);
    }
}

template <int M>
__device__ void stage(char* tile, const input_t* x, const int* token, int count) {
    // neighbouring lanes write neighbouring blocks: 32 banks
    for (int i = threadIdx.x; i < ROUNDS * 32 * 2; i += WARPS * 32) {
        const int lane = i & 31, part = i >> 5 & 1, t = i >> 6;
        char* to = tile + ((t * 16 + part * 8) * 32 + lane) * Inputs<M>::BYTES;
        spread<M>(to, x, (t * LANES + lane % LANES) * 16 + part * 8, token, count);
    }
}

// Value number j of a chunk, as a float from which `zero` is to be taken.
__device__ __forceinline__ float value_of(const u32 (&w)[VALUE_WORDS], int j, float zero) {
#if VALUE == 3
    return __uint_as_float(w[j]);
#elif VALUE
    return half_of<VALUE>(w[j / 2], j & 1);
#elif BITS == 8
    return __uint_as_float(__byte_perm(w[j / 4], 0x4B000000, 0x7540 | (j & 3))) - zero;
#else
    const u32 nibbles = (j & 1 ? w[j / 8] >> 4 : w[j / 8]) & 0x0f0f0f0f;
    return __uint_as_float(__byte_perm(nibbles, 0x4B000000, 0x7540 | (j / 2 & 3))) - zero;
#endif
}

template <int M>
__device__ __forceinline__ u32 input_place(
    u32 own, const u32 (&w)[INDEX_WORDS], int j, int t
) {
    constexpr int SHIFT = M == 1 ? 7 : Inputs<M>::BYTES == 4 ? 7 : Inputs<M>::BYTES == 8 ? 8 : 9;
    const int from = 4 * (j % 8);
    const u32 nibble = w[j / 8] & 15u << from;  // moved and added in one instruction
    const u32 moved = from < SHIFT ? nibble << (SHIFT - from) : nibble >> (from - SHIFT);
    u32 place;
    asm("add.u32 %0, %1, %2;" : "=r"(place) : "r"(own), "r"(moved));  // so that t stays apart
    return place + t * 16 * 32 * Inputs<M>::BYTES;
}

template <int M>
__device__ void rows_of(
    const Matrix& matrix, long long expert, int first, int stop, char* tile, char*,
    float* out, int out_first, const input_t* x, const int* token, int count
) {
    const int lane = threadIdx.x & 31, own_lane = lane % LANES, own_row = lane / LANES;
    const u32 own = (u32)__cvta_generic_to_shared(tile) + lane * Inputs<M>::BYTES;
    constexpr int VALUE_BYTES = CHUNK * BITS / 8, INDEX_BYTES = CHUNK / 2;
    const u32 own_byte = 0x7540 + own_lane / 8;
    u32 value[2][TOGETHER][DEPTH][VALUE_WORDS], index[2][TOGETHER][DEPTH][INDEX_WORDS];
    u32 step[2][TOGETHER][PART_WORDS];  // of the groups of a part, four a word
    float scale[TOGETHER], zero[TOGETHER], next_scale[TOGETHER];
    int next_zero[TOGETHER];
    auto row_at = [&](int base, int r) {
        const int wanted = base + r * (32 / LANES) + own_row;
        return expert * ROWS + (wanted < ROWS ? wanted : ROWS - 1);
    };
    auto load = [&](int buffer, int base, int begin) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            if (begin + d >= STEPS) break;
#pragma unroll
            for (int r = 0; r < TOGETHER; r++) {
                const long long at = (row_at(base, r) * STEPS + begin + d) * LANES + own_lane;
                load_words<VALUE_BYTES>(matrix.values + at * VALUE_BYTES, value[buffer][r][d]);
                load_words<INDEX_BYTES>(matrix.places + at * INDEX_BYTES, index[buffer][r][d]);
            }
        }
#if GROUPED
#pragma unroll
        for (int r = 0; r < TOGETHER; r++) {
            const u32* words = (const u32*)matrix.steps + row_at(base, r) * GROUP_WORDS;
#pragma unroll
            for (int i = 0; i < PART_WORDS; i++) {
                const int word = FIRST_WORD(begin) + i;
                if (word < GROUP_WORDS) step[buffer][r][i] = words[word];
            }
        }
#endif
    };
    auto load_row = [&](int base) {
        load(0, base, 0);
#if VALUE == 0
#pragma unroll
        for (int r = 0; r < TOGETHER; r++) {
            next_zero[r] = matrix.zero[row_at(base, r)];
            next_scale[r] = matrix.scale[row_at(base, r)];
        }
#endif
    };
    if (first < stop) load_row(first);  // under way while the inputs are laid out
#if SINGLE
    wait_for_last();
#endif
    stage<M>(tile, x, token, count);
    __syncthreads();
    for (int base = first; base < stop; base += ROW_UNIT) {
        float acc[TOGETHER][M], sum[TOGETHER][M];
#pragma unroll
        for (int r = 0; r < TOGETHER; r++) {
#if VALUE == 0
            zero[r] = 8388608.f + (float)next_zero[r], scale[r] = next_scale[r];
#else
            zero[r] = 0.f;
#endif
#pragma unroll
            for (int m = 0; m < M; m++) acc[r][m] = sum[r][m] = 0.f;
        }
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            // every row begins in the first buffer
            const int buffer = part & 1, begin = part * DEPTH;
            if (part + 1 < PARTS) load(buffer ^ 1, base, begin + DEPTH);
            else if (buffer && base + ROW_UNIT < stop) load_row(base + ROW_UNIT);
#pragma unroll
            for (int r = 0; r < TOGETHER; r++) {
#pragma unroll
                for (int v = 0; v < DEPTH * CHUNK; v++) {
                    const int t = (begin * CHUNK + v) / KEPT;
                    if (t >= ROUNDS) break;
                    const float weight =
                        value_of(value[buffer][r][v / CHUNK], v % CHUNK, zero[r]);
                    float x[M];
                    Inputs<M>::load(
                        input_place<M>(own, index[buffer][r][v / CHUNK], v % CHUNK, t), x);
#pragma unroll
                    for (int m = 0; m < M; m++) sum[r][m] = fmaf(weight, x[m], sum[r][m]);
#if GROUPED
                    if ((begin * CHUNK + v) % KEPT != KEPT - 1) continue;
                    // byte 0 to 3 of a word: that of the round, and the lane's eighth block
                    const int at = t * LANES / 8;
                    const u32 word = step[buffer][r][at / 4 - FIRST_WORD(begin)];
                    const float unit =
                        __uint_as_float(__byte_perm(word, 0x4B000000, own_byte + at % 4)) - 8388608.f;
#pragma unroll
                    for (int m = 0; m < M; m++)
                        acc[r][m] = fmaf(unit, sum[r][m], acc[r][m]), sum[r][m] = 0.f;
#endif
                }
            }
        }
        if (PARTS % 2 && base + ROW_UNIT < stop) load_row(base + ROW_UNIT);
#pragma unroll
        for (int r = 0; r < TOGETHER; r++) {
            const int wanted = base + r * (32 / LANES) + own_row;
#pragma unroll
            for (int m = 0; m < M; m++) {
                float total = GROUPED ? acc[r][m] : sum[r][m];
#pragma unroll
                for (int o = LANES / 2; o; o >>= 1) total += __shfl_xor_sync(ALL, total, o);
#if VALUE == 0
                total *= scale[r];
#endif
                if (own_lane == 0 && wanted < stop) out[m * MOST_ROWS + wanted - out_first] = total;
            }
        }
    }
}
#endif
// ---------------------------------------------------------------------------------------------

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
    char* rest = shared + (TILE_ROWS * 32 * Inputs<M>::BYTES + 15) / 16 * 16;
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
#if BITMAP
    char* ring = rest + (MATRICES * M * MOST_ROWS * 4 + 15) / 16 * 16 + warp * RING;
#else
    char* ring = nullptr;
#endif
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

extern "C" __global__ void __launch_bounds__(WARPS * 32) product(
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
