// The cluster of a token: the largest of K products with its centred input (see packed/gpu.py).
//
// Eight thread blocks, which share a token, take an eighth of its columns each; the first adds up.
// Defined before this file: INPUT (1 bfloat16, 2 half, 3 float), COLS, K.

typedef unsigned int u32;
typedef unsigned short u16;

#define ALL 0xffffffffu
#define BLOCKS 8
#define WARPS 16
#define PART ((COLS + BLOCKS * 4 - 1) / (BLOCKS * 4) * 4)  // columns of a block
#define FOURS ((PART + 127) / 128)                         // of a lane
#define EARLY (FOURS < 14 ? FOURS : 14)  // of them asked for before the tokens are there
#if INPUT == 3
typedef float input_t;
#else
typedef u16 input_t;
#endif

__device__ __forceinline__ float read_input(input_t bits) {
#if INPUT == 1
    return __uint_as_float((u32)bits << 16);
#elif INPUT == 2
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(bits));
    return wide;
#else
    return bits;
#endif
}

extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(WARPS * 32) route(
    const input_t* x, const float* mean, const float* directions, const float* offset,
    long long* clusters
) {
    __shared__ __align__(16) float centred[PART];
    __shared__ float scores[BLOCKS][K];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, block = blockIdx.x % BLOCKS;
    const int first = block * PART, columns = min(PART, max(COLS - first, 0));
    x += (long long)blockIdx.y * COLS;
    asm volatile("griddepcontrol.launch_dependents;");  // see sparse.cu
    auto direction = [&](int k, int four) {
        const int column = (four * 32 + lane) * 4;
        const float* from = directions + (long long)k * COLS + first + column;
        if (k >= K || column >= columns) return make_float4(0.f, 0.f, 0.f, 0.f);
        if (COLS % 4 == 0) return *(const float4*)from;
        return make_float4(from[0], column + 1 < columns ? from[1] : 0.f,
                           column + 2 < columns ? from[2] : 0.f,
                           column + 3 < columns ? from[3] : 0.f);
    };
    float4 early[EARLY];  // of the first cluster of this warp
#pragma unroll
    for (int i = 0; i < EARLY; i++) early[i] = direction(warp, i);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int i = threadIdx.x; i < PART; i += WARPS * 32)
        centred[i] = i < columns ? read_input(x[first + i]) - mean[first + i] : 0.f;
    // the first block has begun once all have come here
    asm volatile("barrier.cluster.arrive.release.aligned;");
    asm volatile("barrier.cluster.wait.acquire.aligned;");
    u32 there;  // scores[block][0] of the first block of the cluster
    asm("mapa.shared::cluster.u32 %0, %1, 0;"
        : "=r"(there) : "r"((u32)__cvta_generic_to_shared(&scores[block][0])));
    for (int k = warp; k < K; k += WARPS) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < FOURS; i++) {
            const int column = (i * 32 + lane) * 4;
            const float4 d = k == warp && i < EARLY ? early[i % EARLY] : direction(k, i);
            if (column >= PART) continue;
            const float4 c = *(const float4*)(centred + column);
            sum = fmaf(c.x, d.x, fmaf(c.y, d.y, fmaf(c.z, d.z, fmaf(c.w, d.w, sum))));
        }
#pragma unroll
        for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(ALL, sum, o);
        if (lane == 0)
            asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there + 4 * k), "f"(sum));
    }
    asm volatile("barrier.cluster.arrive.release.aligned;");
    asm volatile("barrier.cluster.wait.acquire.aligned;");
    if (block || warp) return;
    float best = __int_as_float(0xff800000);
    int found = K;
    for (int k = lane; k < K; k += 32) {
        float score = offset[k];
        for (int b = 0; b < BLOCKS; b++) score += scores[b][k];
        // as torch's argmax: a NaN is the largest, of equal ones the first
        if (found == K || score > best || (score != score && best == best)) best = score, found = k;
    }
#pragma unroll
    for (int o = 16; o; o >>= 1) {
        const float other = __shfl_xor_sync(ALL, best, o);
        const int k = __shfl_xor_sync(ALL, found, o);
        if (k == K) continue;
        const bool nan = best != best, other_nan = other != other;
        const bool less = found == K || (!nan && (other_nan || other > best));
        const bool same = (nan && other_nan) || other == best;
        if (less || (same && k < found)) best = other, found = k;
    }
    if (lane == 0) clusters[blockIdx.y] = found;
}
