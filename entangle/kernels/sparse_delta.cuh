// Rows of values with the distance of each from the last (see sparse.cu): a lane has eight values at
// a time, and finds its first column by adding up the distances of the lanes before it.

#define ROW_UNIT 1
#define PADDED ((COLS + 31) / 8 * 8)  // columns of the tile: what fills a row may stand past it
#define TILE_BYTES(bytes) (PADDED * (bytes))
#define WARP_BYTES 0
#define WORDS (BITS / 4)              // of eight values
#define DEPTH 2                       // units of a lane under way

template <int M>
__device__ void stage(char* tile, const input_t* x, const int* token, int count) {
    for (int i = threadIdx.x; i < PADDED / 8; i += WARPS * 32)
        spread<M>(tile + i * 8 * Inputs<M>::BYTES, Inputs<M>::BYTES, x, i * 8, token, count);
}

// Eight neighbouring values of a row, and how far each stands from the one before.
struct Unit {
    u32 value[WORDS], gaps;

    __device__ __forceinline__ float weight(int j, float zero) const {
#if VALUE == 3
        return __uint_as_float(value[j]);
#elif VALUE
        return half_of<VALUE>(value[j / 2], j & 1);
#elif BITS == 8
        return __uint_as_float(__byte_perm(value[j / 4], 0x4B000000, 0x7540 | (j & 3))) - zero;
#else
        const u32 nibbles = (j & 1 ? value[0] >> 4 : value[0]) & 0x0f0f0f0f;
        return __uint_as_float(__byte_perm(nibbles, 0x4B000000, 0x7540 | j / 2)) - zero;
#endif
    }
};

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
    const int last = first < stop ? starts[stop] : 0;
    int next_end = first < stop ? starts[first + 1] : 0;
    Unit ahead[DEPTH];
    auto load = [&](Unit& to, int at) {
        to.gaps = 0;
#pragma unroll
        for (int i = 0; i < WORDS; i++) to.value[i] = 0;
        if (at >= last) return;
        to.gaps = __ldcs((const u32*)matrix.places + at);
        const u32* from = (const u32*)matrix.values + (long long)at * WORDS;
        if (WORDS == 1) {
            to.value[0] = __ldcs(from);
        } else if (WORDS == 2) {
            const uint2 v = __ldcs((const uint2*)from);
            to.value[0] = v.x, to.value[1 % WORDS] = v.y;
        } else {
#pragma unroll
            for (int i = 0; i < WORDS; i += 4) {
                const uint4 v = __ldcs((const uint4*)from + i / 4);
                to.value[i] = v.x, to.value[(i + 1) % WORDS] = v.y;
                to.value[(i + 2) % WORDS] = v.z, to.value[(i + 3) % WORDS] = v.w;
            }
        }
    };
    // the next loads of this lane: its unit of the row's next 32, or of the first 32 of another row
    int ask_row = first, ask_from = unit, ask_end = next_end;
    auto ask = [&](Unit& to) {
        load(to, ask_from + lane < ask_end ? ask_from + lane : last);
        ask_from += 32;
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
            const Unit now = ahead[0];
#pragma unroll
            for (int d = 0; d + 1 < DEPTH; d++) ahead[d] = ahead[d + 1];
            ask(ahead[DEPTH - 1]);
            const u32 pairs = (now.gaps & 0x0f0f0f0f) + (now.gaps >> 4 & 0x0f0f0f0f);
            const int wide = (int)(pairs * 0x01010101u >> 24) + 8;
            int scan = wide;
#pragma unroll
            for (int o = 1; o < 32; o <<= 1) {
                const int below = __shfl_up_sync(ALL, scan, o);
                if (lane >= o) scan += below;
            }
            u32 at = own + (column + scan - wide << SHIFT);
            column += __shfl_sync(ALL, scan, 31);
            const bool there = unit + lane < row_end;
            if (!there) at = own;  // all its values are zero
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const u32 nibble = now.gaps & 15u << 4 * j;
                u32 moved = 4 * j < SHIFT ? nibble << (SHIFT - 4 * j) : nibble >> (4 * j - SHIFT);
                asm("add.u32 %0, %0, %1;" : "+r"(at) : "r"(moved));
                float weight = now.weight(j, zero);
#if VALUE == 0
                if (!there) weight = 0.f;
#endif
#if GROUPED
                const int group = (int)(at + j * Inputs<M>::BYTES - own >> SHIFT) >> 7;
                weight *= steps[group < GROUPS ? group : 0];
#endif
                float x[M];
                Inputs<M>::load(at + j * Inputs<M>::BYTES, x);
#pragma unroll
                for (int m = 0; m < M; m++) sum[m] = fmaf(weight, x[m], sum[m]);
            }
            unit += 32;
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
