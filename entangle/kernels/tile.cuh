// Statistics of the outputs of a layer, one pass over them (see stats/sketch.py, stats/bins.py).
// A thread block works on 64 neurons and on every gridDim.y-th part of the tokens: a warp reads one
// token's outputs at a time, a thread two neighbours. Counts lie in shared memory, a row of the 64
// neurons for every bin: thereby the lanes of a warp, which have a neuron each, use a bank each.
// NUMBER, the type of the outputs, is defined before this file: float, half16 or bfloat16.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define NEURONS 64
#define WARPS 32
#define PER_OCTAVE_SHIFT 17  // 64 bins an octave: the six leading bits of the fraction
#define ONE (0x3F800000 >> PER_OCTAVE_SHIFT)
#define ALL 0xffffffffu
#define INFINITE __int_as_float(0x7f800000)
#define NAN_BITS 0x7fffffff
#define AHEAD (int)(16 / sizeof(NUMBER))  // tokens whose loads are under way at the same time
#define PAIRS_AHEAD (AHEAD / 2)
#define ROWS 8  // of counts, written at a time

struct half16 { u16 bits; };
struct bfloat16 { u16 bits; };

__device__ __forceinline__ float as_float(float value) { return value; }

__device__ __forceinline__ float as_float(half16 value) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
}

__device__ __forceinline__ float as_float(bfloat16 value) {
    return __uint_as_float((u32)value.bits << 16);
}

// The numbers of both neurons of a thread.
template <class T>
struct Two {
    u32 bits;
    __device__ __forceinline__ float left() const { return as_float(T{(u16)bits}); }
    __device__ __forceinline__ float right() const { return as_float(T{(u16)(bits >> 16)}); }
    static __device__ __forceinline__ Two of(T a, T b) { return {a.bits | (u32)b.bits << 16}; }
    // Take one of the two numbers, or both, from another.
    __device__ __forceinline__ void take(bool first, bool second, Two from) {
        const u32 mask = (first ? 0xffffu : 0u) | (second ? 0xffff0000u : 0u);
        bits = (from.bits & mask) | (bits & ~mask);
    }
};

template <>
struct alignas(8) Two<float> {
    float a, b;
    __device__ __forceinline__ float left() const { return a; }
    __device__ __forceinline__ float right() const { return b; }
    static __device__ __forceinline__ Two of(float a, float b) { return {a, b}; }
    __device__ __forceinline__ void take(bool first, bool second, Two from) {
        if (first) a = from.a;
        if (second) b = from.b;
    }
};

// widen: the span from low to high, of both numbers, to y; NaN stays in both ends.
// count: more in a row of counts; `own` is the thread's place in the first row.
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void widen(Two<float>& low, Two<float>& high, Two<float> y) {
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(low.a) : "f"(y.a));
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(low.b) : "f"(y.b));
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(high.a) : "f"(y.a));
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(high.b) : "f"(y.b));
}

__device__ __forceinline__ void widen(Two<half16>& low, Two<half16>& high, Two<half16> y) {
    asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(low.bits) : "r"(y.bits));
    asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(high.bits) : "r"(y.bits));
}

__device__ __forceinline__ void widen(Two<bfloat16>& low, Two<bfloat16>& high, Two<bfloat16> y) {
    asm("min.NaN.bf16x2 %0, %0, %1;" : "+r"(low.bits) : "r"(y.bits));
    asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(high.bits) : "r"(y.bits));
}

__device__ __forceinline__ void count(u32* own, int row, u32 more) {
    u32 base = (u32)__cvta_generic_to_shared(own);
    asm("" : "+r"(base));  // else the compiler adds it to every address anew
    base += row * NEURONS * (int)sizeof(u32);
    asm volatile("red.shared.add.u32 [%0], %1;" : : "r"(base), "r"(more) : "memory");
}
#else
template <class T>
__device__ __forceinline__ void widen(Two<T>& low, Two<T>& high, Two<T> y) {
    const float a = y.left(), b = y.right();
    low.take(a < low.left() || a != a, b < low.right() || b != b, y);
    high.take(a > high.left() || a != a, b > high.right() || b != b, y);
}

__device__ __forceinline__ void count(u32* own, int row, u32 more) {
    atomicAdd(own + row * NEURONS, more);
}
#endif

// The two columns of a thread; those beyond the last neuron repeat it, and are left in the end.
struct Columns {
    int a, b;
    bool paired;  // whether both numbers of a row can be loaded at once
};

__device__ __forceinline__ Columns my_columns(size_t address, int neurons, int stride) {
    const bool paired = ((neurons | stride) & 1) == 0 && address % (2 * sizeof(NUMBER)) == 0;
    const int wanted = blockIdx.x * NEURONS + 2 * (threadIdx.x & 31);
    const int a = min(wanted, neurons - (paired ? 2 : 1));
    return {a, min(a + 1, neurons - 1), paired};
}

// The neuron whose counts lie in one of the 64 slots of a row: lane l has slots l and l + 32.
__device__ __forceinline__ int neuron_of(int slot) {
    return blockIdx.x * NEURONS + 2 * (slot & 31) + (slot >> 5);
}

template <bool PAIRED>
__device__ __forceinline__ Two<NUMBER> two_at(const NUMBER* from, int gap) {
    return PAIRED ? *(const Two<NUMBER>*)from : Two<NUMBER>::of(from[0], from[gap]);
}

// Where a neuron's bins lie. The inverse of the unit is NaN where it might not give quotients to
// the last bit.
struct Place { float centre, unit, inverse; };

__device__ __forceinline__ Place place_at(float centre, float unit) {
    const bool usual = unit > 1e-30f && unit < 1e30f;
    return {centre, unit, usual ? 1.0f / unit : __int_as_float(NAN_BITS)};
}

// gap / unit, to the last bit, given gap * inverse.
__device__ __forceinline__ float refined(float gap, float ratio, const Place& at) {
    return fmaf(fmaf(-ratio, at.unit, gap), at.inverse, ratio);
}

// The bin of a value that is not negative; NaN goes to the last one.
__device__ __forceinline__ int magnitude_bin(float magnitude, int bins) {
    return min((__float_as_int(magnitude + 1.0f) >> PER_OCTAVE_SHIFT) - ONE, bins - 1);
}

// The bin of any finite value.
__device__ __forceinline__ int signed_bin(float x, int half) {
    const int bin = magnitude_bin(fabsf(x), half);
    return x < 0.0f ? half - 1 - bin : half + bin;
}

// An integer in the order of the floats, and the float of such an integer.
__device__ __forceinline__ int ordered(float x) {
    const int bits = __float_as_int(x);
    return bits ^ (bits >> 31 & 0x7fffffff);
}

__device__ __forceinline__ float unordered(int bits) {
    return __int_as_float(bits ^ (bits >> 31 & 0x7fffffff));
}

__device__ __forceinline__ void clear(u32* counted, int rows) {
    uint4* quads = (uint4*)counted;
    for (int i = threadIdx.x; i < NEURONS / 4 * rows; i += 32 * WARPS)
        quads[i] = make_uint4(0, 0, 0, 0);
}

// Add rows of counts (rows, NEURONS), a multiple of ROWS, to counts (neurons, bins). SIGNED: a word
// of row k has the counts of bins half + k and, in its upper half, half - 1 - k; else of bin k.
template <bool SIGNED>
__device__ __forceinline__ void flush(u32* counted, int rows, int* counts, int bins, int neurons) {
    const int lane = threadIdx.x & 31, row = lane >> 2, part = (lane & 3) * ROWS;
    for (int task = threadIdx.x >> 5; task < 2 * rows / ROWS; task += WARPS) {
        const int first = task / 2 * ROWS, side = (task & 1) * 32;
        u32* tile = counted + first * NEURONS + side;
        u32 words[ROWS], any = 0;
        #pragma unroll
        for (int k = 0; k < ROWS; ++k) any |= words[k] = tile[k * NEURONS + lane];
        if (!__ballot_sync(ALL, any != 0)) continue;
        // Turn the tile in its place: row r gets the words of slots 4 r to 4 r + 3, moved on by r.
        #pragma unroll
        for (int k = 0; k < ROWS; ++k)
            tile[row * NEURONS + part + ((k + row) & (ROWS - 1))] = words[k];
        __syncwarp();
        #pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const u32 word = tile[r * NEURONS + lane];
            const int k = first + ((lane - r) & (ROWS - 1));
            const int neuron = neuron_of(side + 4 * r + lane / ROWS);
            if (!word || neuron >= neurons) continue;
            int* own = counts + (size_t)neuron * bins;
            if (!SIGNED) atomicAdd(own + k, (int)word);
            if (SIGNED && (word & 0xffffu)) atomicAdd(own + bins / 2 + k, (int)(word & 0xffffu));
            if (SIGNED && word >> 16) atomicAdd(own + bins / 2 - 1 - k, (int)(word >> 16));
        }
    }
}

// Tell the block that finishes last among those of one tile of neurons; all threads take part.
__device__ __forceinline__ bool is_last(u32* tickets) {
    __shared__ u32 last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(tickets + blockIdx.x, 1u) == gridDim.y - 1;
        if (last) tickets[blockIdx.x] = 0;
    }
    __syncthreads();
    __threadfence();
    return last;
}

// Sum N numbers of both neurons of every thread over the warps and the parts, in a fixed order.
// True for thread NEURONS * q + slot of the tile's last block, which gets the q-th sum of the
// slot's neuron. `partial` (N, gridDim.y, neurons) and `shared` are work space.
template <int N>
__device__ __forceinline__ bool summed(
    const double (&own)[2][N], double* shared, double* partial, u32* tickets, int neurons,
    double& sum) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    __syncthreads();
    #pragma unroll
    for (int q = 0; q < N; ++q)
        #pragma unroll
        for (int side = 0; side < 2; ++side)
            shared[(q * WARPS + warp) * NEURONS + side * 32 + lane] = own[side][q];
    __syncthreads();
    const int q = threadIdx.x / NEURONS, slot = threadIdx.x % NEURONS, parts = gridDim.y;
    const int neuron = neuron_of(slot);
    const bool mine = q < N && neuron < neurons;
    double* place = partial + (size_t)q * parts * neurons + neuron;
    sum = 0.0;
    if (mine) {
        #pragma unroll
        for (int i = 0; i < WARPS; ++i) sum += shared[(q * WARPS + i) * NEURONS + slot];
        place[(size_t)blockIdx.y * neurons] = sum;
    }
    if (!is_last(tickets) || !mine) return false;
    sum = 0.0;
    for (int part = 0; part < parts; ++part) sum += __ldcg(place + (size_t)part * neurons);
    return true;
}
