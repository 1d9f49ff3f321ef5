// Rows of n of 16 (see sparse.cu): a lane has blocks of 16 columns, whose inputs are its own bank.

#define ROW_UNIT (32 / LANES * TOGETHER)
#define PARTS ((STEPS + DEPTH - 1) / DEPTH)
#define FIRST_WORD(begin) ((begin) * CHUNK / KEPT * LANES / 32)  // of the groups of a part
#if GROUPED
#define PART_WORDS ((DEPTH * CHUNK / KEPT + 2) * LANES / 32 + 2)
#else
#define PART_WORDS 1
#endif
#define TILE_BYTES(bytes) (ROUNDS * 16 * 32 * (bytes))
#define WARP_BYTES 0
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
        spread<M>(to, 32 * Inputs<M>::BYTES, x, (t * LANES + lane % LANES) * 16 + part * 8, token,
                  count);
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
                    const u32 byte = __byte_perm(word, 0x4B000000, own_byte + at % 4);
                    const float unit = __uint_as_float(byte) - 8388608.f;
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
