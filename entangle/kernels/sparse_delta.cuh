// Rows of values with the distance of each from the last (see sparse.cu): a lane has UNITS times
// eight values at a time, and finds its first column by adding up the lanes before it.

#define ROW_UNIT 1
#define PADDED ((COLS + 31) / 8 * 8)  // columns of the tile: what fills a row may stand past it
#define TILE_BYTES(bytes) (PADDED * (bytes))
#define WARP_BYTES 0
#define WORDS (BITS / 4)              // of eight values

template <int M>
__device__ void stage(char* tile, const input_t* x, const int* token, int count) {
    for (int i = threadIdx.x; i < PADDED / 8; i += WARPS * 32)
        spread<M>(tile + i * 8 * Inputs<M>::BYTES, Inputs<M>::BYTES, x, i * 8, token, count);
}

// Neighbouring values of a row, eight a unit, and how far each stands from the one before.
struct Values {
    u32 value[UNITS][WORDS], gaps[UNITS];

    __device__ __forceinline__ float weight(int i, int j, float zero) const {
#if VALUE == 3
        return __uint_as_float(value[i][j]);
#elif VALUE
        return half_of<VALUE>(value[i][j / 2], j & 1);
#elif BITS == 8
        return __uint_as_float(__byte_perm(value[i][j / 4], 0x4B000000, 0x7540 | (j & 3))) - zero;
#else
        const u32 nibbles = (j & 1 ? value[i][0] >> 4 : value[i][0]) & 0x0f0f0f0f;
        return __uint_as_float(__byte_perm(nibbles, 0x4B000000, 0x7540 | j / 2)) - zero;
#endif
    }
};

// The sum over this lane and those before it.
__device__ __forceinline__ int summed(int own) {
#pragma unroll
    for (int o = 1; o < 32; o <<= 1)
        asm volatile("{\n .reg .pred p;\n .reg .s32 below;\n"
                     " shfl.sync.up.b32 below|p, %0, %1, 0, 0xffffffff;\n"
                     " @p add.s32 %0, %0, below;\n}"
                     : "+r"(own) : "r"(o));
    return own;
}

template <int M>
__device__ void rows_of(
    const Matrix& matrix, long long expert, int first, int stop, char* tile, char*,
    float* out, int out_first, const input_t* x, const int* token, int count
) {
    constexpr int SHIFT = Inputs<M>::BYTES == 4 ? 2 : Inputs<M>::BYTES == 8 ? 3 : 4;
    const int lane = threadIdx.x & 31;
    const u32 own = (u32)__cvta_generic_to_shared(tile);
    const int* starts = matrix.starts + expert * (ROWS + 1);
    // a warp's units follow each other in memory, row after row
    int unit = first < stop ? starts[first] : 0, row_end = unit;
    int next_end = first < stop ? starts[first + 1] : 0;
    Values ahead[DEPTH];
    auto load = [&](Values& to, int at, int end) {
#pragma unroll
        for (int i = 0; i < UNITS; i++) {
            to.gaps[i] = 0;
#pragma unroll
            for (int w = 0; w < WORDS; w++) to.value[i][w] = 0;
            if (at + i >= end) continue;
            to.gaps[i] = __ldcs((const u32*)matrix.places + at + i);
            const u32* from = (const u32*)matrix.values + (long long)(at + i) * WORDS;
            if (WORDS == 1) {
                to.value[i][0] = __ldcs(from);
            } else if (WORDS == 2) {
                const uint2 v = __ldcs((const uint2*)from);
                to.value[i][0] = v.x, to.value[i][1 % WORDS] = v.y;
            } else {
#pragma unroll
                for (int w = 0; w < WORDS; w += 4) {
                    const uint4 v = __ldcs((const uint4*)from + w / 4);
                    to.value[i][w] = v.x, to.value[i][(w + 1) % WORDS] = v.y;
                    to.value[i][(w + 2) % WORDS] = v.z, to.value[i][(w + 3) % WORDS] = v.w;
                }
            }
        }
    };
    // the next loads of this lane: of the row's next units, or of the first of another row
    int ask_row = first, ask_from = unit, ask_end = next_end;
    auto ask = [&](Values& to) {
        load(to, ask_from + lane * UNITS, ask_end);
        ask_from += 32 * UNITS;
        if (ask_from >= ask_end && ask_row + 1 < stop) {
            ask_row++, ask_from = ask_end, ask_end = starts[ask_row + 1];
        }
    };
#pragma unroll
    for (int d = 0; d < DEPTH; d++) ask(ahead[d]);
#if SINGLE
    wait_for_last();
#endif
    stage<M>(tile, x, token, count);
    __syncthreads();
    row_end = next_end;
    for (int row = first; row < stop; row++) {
        float zero = 0.f, scale = 1.f;
#if VALUE == 0
        scale = matrix.scale[expert * ROWS + row];
        zero = 8388608.f + matrix.zero[expert * ROWS + row];
#endif
#if GROUPED
        const u8* steps = matrix.steps + (expert * ROWS + row) * GROUPS;
#endif
        next_end = starts[row + 2 <= ROWS ? row + 2 : ROWS];
        float sum[M];
#pragma unroll
        for (int m = 0; m < M; m++) sum[m] = 0.f;
        int column = 0;  // the first that may come next
        do {
            const Values now = ahead[0];
#pragma unroll
            for (int d = 0; d + 1 < DEPTH; d++) ahead[d] = ahead[d + 1];
            ask(ahead[DEPTH - 1]);
            u32 pairs = 0;
#pragma unroll
            for (int i = 0; i < UNITS; i++)
                pairs += (now.gaps[i] & 0x0f0f0f0f) + (now.gaps[i] >> 4 & 0x0f0f0f0f);
            const int wide = (int)(pairs * 0x01010101u >> 24) + 8 * UNITS;
            const int scan = summed(wide);
            const int left = row_end - unit - lane * UNITS;  // units, of this lane and later ones
            // what has none reads the first columns, by zeros
            u32 at = left > 0 ? own + (column + scan - wide << SHIFT) : own;
            column += __shfl_sync(ALL, scan, 31);
#pragma unroll
            for (int i = 0; i < UNITS; i++) {
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const u32 nibble = now.gaps[i] & 15u << 4 * j;
                    const u32 moved =
                        4 * j < SHIFT ? nibble << (SHIFT - 4 * j) : nibble >> (4 * j - SHIFT);
                    asm("add.u32 %0, %0, %1;" : "+r"(at) : "r"(moved));
                    const u32 place = at + (i * 8 + j) * Inputs<M>::BYTES;
                    float weight = now.weight(i, j, zero);
#if VALUE == 0
                    if (left <= i) weight = 0.f;
#endif
#if GROUPED
                    const int group = (int)(place - own >> SHIFT) >> 7;
                    weight *= steps[group < GROUPS ? group : 0];
#endif
                    float x[M];
                    Inputs<M>::load(place, x);
#pragma unroll
                    for (int m = 0; m < M; m++) sum[m] = fmaf(weight, x[m], sum[m]);
                }
            }
            unit += 32 * UNITS;
        } while (unit < row_end);
        unit = row_end, row_end = next_end;
#pragma unroll
        for (int m = 0; m < M; m++) {
            float total = sum[m];
#pragma unroll
            for (int o = 16; o; o >>= 1) total += __shfl_xor_sync(ALL, total, o);
            if (lane == 0) out[m * MOST_ROWS + row - out_first] = total * scale;
        }
    }
}
