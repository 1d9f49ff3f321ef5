// Rows of a bitmap (see sparse.cu): a lane walks over the bits of its word of 32 columns, whose
// values a ring of the warp holds.

#define WORDS32 (2 * ((COLS + 63) / 64))
#define SPANS ((WORDS32 + 31) / 32)  // of 1,024 columns, a word of 32 a lane
#define RING (BITS == 32 ? 8192 : 4096)  // bytes of values that a warp holds; a power of two
#define SLACK 128                    // before the ring: what its last bytes are, for runs across
#define PIECE 512
#define AHEAD 3                      // pieces under way beyond the span in use
#define ROW_UNIT 1
#define TILE_BYTES(bytes) (SPANS * 33 * 32 * (bytes))  // the first row of 32 of each span is zero
#define WARP_BYTES (SLACK + RING)

template <int M>
__device__ void stage(char* tile, const input_t* x, const int* token, int count) {
    // neighbouring lanes write neighbouring words: 32 banks
    for (int i = threadIdx.x; i < SPANS * 32 * 4; i += WARPS * 32) {
        const int lane = i & 31, part = i >> 5 & 3, span = i >> 7;
        char* to = tile + ((span * 33 + 1 + part * 8) * 32 + lane) * Inputs<M>::BYTES;
        spread<M>(to, 32 * Inputs<M>::BYTES, x, span * 1024 + lane * 32 + part * 8, token, count);
    }
    for (int i = threadIdx.x; i < SPANS * 32 * Inputs<M>::WORDS; i += WARPS * 32) {
        const int word = i % (32 * Inputs<M>::WORDS), span = i / (32 * Inputs<M>::WORDS);
        ((u32*)(tile + span * 33 * 32 * Inputs<M>::BYTES))[word] = 0;
    }
}

// The stream of a warp's values through its ring, at their own addresses modulo the ring.
struct Stream {
    const u8* from;  // this lane's 16 bytes of the next piece
    u32 ring;        // its place in shared memory, of the ring's first piece
    int next, limit; // bytes that were asked for, and that there are to be asked for by this lane

    __device__ __forceinline__ void fetch(u32 to) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
    }

    __device__ __forceinline__ void ask() {
        const u32 at = next & (RING - 1), to = ring + at;
        if (next < limit) {
            fetch(to);
            if (at == RING - PIECE && (threadIdx.x & 31) >= 32 - SLACK / 16) fetch(to - RING);
        }
        asm volatile("cp.async.commit_group;");
        next += PIECE, from += PIECE;
    }

    // Wait until all bytes below `end` are there, and keep AHEAD pieces under way.
    __device__ __forceinline__ void need(int end) {
        while (next < end + AHEAD * PIECE) ask();
        asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD - 1));
        __syncwarp();
    }
};

template <int BYTES>
__device__ __forceinline__ u32 shared_word(u32 at) {
    u32 word;
    if (BYTES == 4) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(at));
    else asm volatile("ld.shared.u8 %0, [%1];" : "=r"(word) : "r"(at));
    return word;
}

// The column of the highest bit, which is taken away; where there is none, the row of zeros.
template <int M>
__device__ __forceinline__ void take(u32& bits, u32 base, float weight, float (&acc)[M]) {
    u32 place, bit;
    float x[M];
    asm("bfind.u32 %0, %1;" : "=r"(place) : "r"(bits));
    asm("shl.b32 %0, 1, %1;" : "=r"(bit) : "r"(place));  // by more than 31: 0
    bits ^= bit;
    Inputs<M>::load(base + place * (32 * Inputs<M>::BYTES), x);
#pragma unroll
    for (int m = 0; m < M; m++) acc[m] = fmaf(weight, x[m], acc[m]);
}

// One lane's word of 32 columns: `bits`, whose values end before number `end` of the stream. All
// lanes take as many steps as the fullest; what an empty one reads is multiplied by zero.
template <int M>
__device__ __forceinline__ void walk(
    u32 bits, int end, int most, u32 ring, u32 tile, float zero, float (&acc)[M]
) {
    const u32 base = tile + 32 * Inputs<M>::BYTES;
    const int last = max(end, 1) - 1;  // not behind the ring, where nothing may have come yet
#if BITS == 16
    const int shift = last & 1 ? 0 : 16;
    u32 at = ring + ((last & ~1) * 2 & (RING - 1)), upper = shared_word<4>(at);
    auto two = [&](int back) {
        const u32 lower = shared_word<4>(at - back), pair = __funnelshift_l(lower, upper, shift);
        upper = lower;
        take<M>(bits, base, half_of<VALUE>(pair, true), acc);
        take<M>(bits, base, half_of<VALUE>(pair, false), acc);
    };
    for (; most > 2; most -= 4, at -= 8) two(4), two(8);
    if (most > 0) two(4);
#elif BITS == 32
    u32 at = ring + (last * 4 & (RING - 1));
    for (; most > 0; most -= 2, at -= 8) {
        take<M>(bits, base, __uint_as_float(shared_word<4>(at)), acc);
        take<M>(bits, base, __uint_as_float(shared_word<4>(at - 4)), acc);
    }
#elif BITS == 8
    u32 at = ring + (last & (RING - 1));
    for (; most > 0; most -= 2, at -= 2) {
        take<M>(bits, base, (float)shared_word<1>(at) - zero, acc);
        take<M>(bits, base, (float)shared_word<1>(at - 1) - zero, acc);
    }
#else
    u32 at = ring + (last >> 1 & (RING - 1)), upper = shared_word<1>(at);
    const int shift = last & 1 ? 4 : 0;
    for (; most > 0; most -= 2) {
        const u32 lower = shared_word<1>(--at), pair = upper << 8 | lower;
        upper = lower;
        take<M>(bits, base, (float)(pair >> (8 + shift) & 15) - zero, acc);
        take<M>(bits, base, (float)(pair >> (4 + shift) & 15) - zero, acc);
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
    if (lane < SLACK / 16) ((uint4*)ring)[lane] = make_uint4(0, 0, 0, 0);
    const u32 ring_at = (u32)__cvta_generic_to_shared(ring) + SLACK;
    __syncwarp();
    const int* starts = matrix.starts + expert * (ROWS + 1);
    // numbers of values can pass 2**31; within a warp's rows they are counted from its first
    int start = first < stop ? starts[first] : 0;
    const long long origin_value = (long long)start * UNIT;
    const long long origin = origin_value * BITS / 8 & ~(long long)(PIECE - 1);
    const int origin_start = start, skip = (int)(origin_value - origin * 8 / BITS);
    const long long left = matrix.stored - origin;
    Stream stream{matrix.values + origin + lane * 16, ring_at + lane * 16, 0,
                  (int)(left < 1 << 30 ? left : 1 << 30) - lane * 16};
    const u32* words = (const u32*)matrix.places + (expert * ROWS + first) * WORDS32 + lane;
    u32 word[SPANS];
    float scale = 1.f, zero = 0.f, step[SPANS];
    auto load_row = [&](int row) {
#pragma unroll
        for (int s = 0; s < SPANS; s++) {
            word[s] = s * 32 + lane < WORDS32 ? __ldcs(words + s * 32) : 0;
#if GROUPED
            const int group = s * 8 + (lane >> 2);
            step[s] = group < GROUPS ? matrix.steps[(expert * ROWS + row) * GROUPS + group] : 0;
#endif
        }
        words += WORDS32;
        start = starts[row];
#if VALUE == 0
        scale = matrix.scale[expert * ROWS + row], zero = matrix.zero[expert * ROWS + row];
#endif
    };
    if (first < stop) {
        load_row(first);
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
        float own_step[SPANS];
#pragma unroll
        for (int s = 0; s < SPANS; s++) now[s] = word[s], own_step[s] = step[s];
        int begin = skip + (start - origin_start) * UNIT;
        const float own_scale = scale, own_zero = zero;
        if (row + 1 < stop) load_row(row + 1);
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
                const u32 count_here = k ? counts >> 16 : counts & 0xffff;
                const int end = begin + (k ? scan >> 16 : scan & 0xffff);
                begin += k ? total >> 16 : total & 0xffff;
                stream.need((begin * BITS + 7) / 8);
                const int most = __reduce_max_sync(ALL, count_here);
                walk<M>(now[s + k], end, most, ring_at,
                        own + (s + k) * 33 * 32 * Inputs<M>::BYTES, own_zero, sum);
                __syncwarp();  // all have read before the ring goes on
#if GROUPED
#pragma unroll
                for (int m = 0; m < M; m++)
                    acc[m] = fmaf(own_step[s + k], sum[m], acc[m]), sum[m] = 0.f;
#endif
            }
        }
#pragma unroll
        for (int m = 0; m < M; m++) {
            float total = GROUPED ? acc[m] : sum[m];
#pragma unroll
            for (int o = 16; o; o >>= 1) total += __shfl_xor_sync(ALL, total, o);
            if (lane == 0) out[m * MOST_ROWS + row - out_first] = total * own_scale;
        }
    }
    asm volatile("cp.async.wait_all;");
}
