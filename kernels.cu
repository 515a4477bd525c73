// Device code of MiniCpmNative: every operation of the engine, forward and backward, for sm_80 and
// newer. NVRTC compiles this file once per storage type of activations (STORAGE_F32 or STORAGE_BF16
// is defined), without any include. Numbers that the host shares are macros that it defines: those
// of src/Kernels/Cuda/KernelConstants.cs, of DTypes (DTYPE_) and of KernelFaults (FAULT_).
//
//   1  storage types, 16-byte accesses     7  lookups: embedding, position gather, splice
//   2  warps and blocks                    8  low-rank adapters with dropout
//   3  random numbers                      9  cross-entropy
//   4  casts, fills, sums                 10  attention, forward
//   5  normalisation                      11  attention, backward
//   6  element-wise: residual, GELU,      12  optimizer: gradient norm, AdamW
//      SwiGLU, rotary embedding          13  magnitudes of weight-decomposed adapters
//
// Conventions. `real` is the storage type; arithmetic, sums and saved statistics are float.
// Matrices are row-major. A gradient is written, or added to what is there when `accumulate` is not
// 0. Nothing is summed with floating-point atomics: the same input gives the same bits. A kernel
// reads 16 bytes at a time where its rows allow it (see aligned16) and element by element where
// they do not: the choice is the same for a whole block. Each kernel says what it moves and
// computes; R rows, C columns, S bytes of a `real`. Signatures are written out, since the host
// parses them and checks every launch against them.

// ---- 1. storage types, 16-byte accesses ---------------------------------------------------------

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short bf16;
typedef unsigned short f16;

#define DEVICE static __device__ __forceinline__

DEVICE float widen_bf16(bf16 x) { return __uint_as_float((u32)x << 16); }

DEVICE bf16 narrow_bf16(float x)
{
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// Two values in one word, the first in the low half.
DEVICE u32 narrow_bf16x2(float low, float high)
{
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

DEVICE float widen_f16(f16 x)
{
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

DEVICE f16 narrow_f16(float x)
{
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

#if defined(STORAGE_BF16)
typedef bf16 real;
DEVICE float widen(real x) { return widen_bf16(x); }
DEVICE real narrow(float x) { return narrow_bf16(x); }
DEVICE u32 narrow2(float low, float high) { return narrow_bf16x2(low, high); }
#else
typedef float real;
DEVICE float widen(real x) { return x; }
DEVICE real narrow(float x) { return x; }
#endif

// Elements in 16 bytes.
#define VECTOR ((int)(16 / sizeof(real)))

// Whether rows of this many elements can be read 16 bytes at a time from this address.
DEVICE bool aligned16(const void* address, int cols, int size)
{
    return ((u64)address & 15) == 0 && cols * size % 16 == 0;
}

// VECTOR elements as floats; the address is a multiple of 16.
DEVICE void load_vector(float* x, const real* from)
{
    uint4 bits = *(const uint4*)from;
    u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
    {
#if defined(STORAGE_BF16)
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
#else
        x[i] = __uint_as_float(words[i]);
#endif
    }
}

DEVICE void store_vector(real* to, const float* x)
{
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
    {
#if defined(STORAGE_BF16)
        words[i] = narrow2(x[2 * i], x[2 * i + 1]);
#else
        words[i] = __float_as_uint(x[i]);
#endif
    }
    *(uint4*)to = make_uint4(words[0], words[1], words[2], words[3]);
}

// VECTOR floats from a float array (a norm's weight);
// 16-byte aligned like the elements beside them.
DEVICE void load_floats(float* x, const float* from)
{
#pragma unroll
    for (int i = 0; i < VECTOR; i += 4)
    {
        float4 v = *(const float4*)(from + i);
        x[i] = v.x;
        x[i + 1] = v.y;
        x[i + 2] = v.z;
        x[i + 3] = v.w;
    }
}

// Two neighbours of a row as they are stored: what matrix instructions multiply.
#if defined(STORAGE_BF16)
typedef u32 real2;
DEVICE float widen_low(real2 p) { return widen((real)p); }
DEVICE float widen_high(real2 p) { return widen((real)(p >> 16)); }
DEVICE real2 narrow_pair(float low, float high) { return narrow2(low, high); }
DEVICE real2 pair_of(real low, real high) { return (u32)low | (u32)high << 16; }
DEVICE real2 lows(real2 p, real2 q) { return (p & 0xffff) | q << 16; }
DEVICE real2 highs(real2 p, real2 q) { return p >> 16 | (q & 0xffff0000u); }
#else
typedef float2 real2;
DEVICE float widen_low(real2 p) { return p.x; }
DEVICE float widen_high(real2 p) { return p.y; }
DEVICE real2 narrow_pair(float low, float high) { return make_float2(low, high); }
DEVICE real2 pair_of(real low, real high) { return make_float2(low, high); }
DEVICE real2 lows(real2 p, real2 q) { return make_float2(p.x, q.x); }
DEVICE real2 highs(real2 p, real2 q) { return make_float2(p.y, q.y); }
#endif

// Words of an array in one access: as many as fit 16 bytes.
template <int WORDS> DEVICE void load_words(u32* words, const void* from)
{
    if constexpr (WORDS == 1) words[0] = *(const u32*)from;
    else if constexpr (WORDS == 2)
    {
        uint2 v = *(const uint2*)from;
        words[0] = v.x;
        words[1] = v.y;
    }
    else
    {
#pragma unroll
        for (int i = 0; i < WORDS; i += 4)
        {
            uint4 v = *(const uint4*)((const u32*)from + i);
            words[i] = v.x;
            words[i + 1] = v.y;
            words[i + 2] = v.z;
            words[i + 3] = v.w;
        }
    }
}

// Elements col to col + N - 1 (N is 2, 4 or 8, col a multiple of it) of a row that ends at cols;
// zeros behind its end. wide says that all rows start at multiples of 16 bytes and end at one;
// eight floats are two of them, so that a row may end between.
template <int N> DEVICE void load_pairs(real2* p, const real* row, int col, int cols, bool wide)
{
    if (wide && col + N <= cols)
    {
        u32 words[N * sizeof(real) / 4];
        load_words<N * sizeof(real) / 4>(words, row + col);
#pragma unroll
        for (int i = 0; i < N / 2; i++)
        {
#if defined(STORAGE_BF16)
            p[i] = words[i];
#else
            p[i] = make_float2(__uint_as_float(words[2 * i]), __uint_as_float(words[2 * i + 1]));
#endif
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < N / 2; i++)
    {
        int c = col + 2 * i;
        p[i] = pair_of(c < cols ? row[c] : (real)0, c + 1 < cols ? row[c + 1] : (real)0);
    }
}

// The reverse, for N = 8; nothing is written behind the end.
DEVICE void store_pairs(real* row, const real2* p, int col, int cols, bool wide)
{
    if (wide && col + 8 <= cols)
    {
#if defined(STORAGE_BF16)
        *(uint4*)(row + col) = make_uint4(p[0], p[1], p[2], p[3]);
#else
        float v[] = {p[0].x, p[0].y, p[1].x, p[1].y, p[2].x, p[2].y, p[3].x, p[3].y};
        store_vector(row + col, v);
        store_vector(row + col + 4, v + 4);
#endif
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
    {
        int c = col + 2 * i;
        if (c < cols) row[c] = narrow(widen_low(p[i]));
        if (c + 1 < cols) row[c + 1] = narrow(widen_high(p[i]));
    }
}

// ---- 2. warps and blocks ------------------------------------------------------------------------

#define WARP 32
#define ALL_LANES 0xffffffffu

DEVICE float warp_sum(float x)
{
#pragma unroll
    for (int lane = WARP / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(ALL_LANES, x, lane);
    return x;
}

// fmaxf drops a NaN; here it stays, so that a bad row is seen.
DEVICE float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }

DEVICE float warp_max(float x)
{
#pragma unroll
    for (int lane = WARP / 2; lane > 0; lane /= 2)
        x = max_or_nan(x, __shfl_xor_sync(ALL_LANES, x, lane));
    return x;
}

// The sum over a block of whole warps, in every thread and always in the same order. shared holds a
// float per warp; it may be used again at once.
DEVICE float block_sum(float x, float* shared)
{
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    float sum = 0;
    for (int warp = 0; warp < blockDim.x / WARP; warp++) sum += shared[warp];
    __syncthreads();
    return sum;
}

DEVICE float block_max(float x, float* shared)
{
    x = warp_max(x);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    float max = shared[0];
    for (int warp = 1; warp < blockDim.x / WARP; warp++) max = max_or_nan(max, shared[warp]);
    __syncthreads();
    return max;
}

// -- products on the tensor cores: 16-bit values, sums in float --
//
// A warp multiplies A[16, 16] by B[16, 8] and adds D[16, 8]. With g = lane / 4 and t = lane % 4 a
// lane holds two neighbours per word, the first in the low half:
//
//   a[0] = A[g    ][2t, 2t + 1]    a[2] = A[g    ][2t + 8, 2t + 9]    b[0] = B[2t, 2t + 1    ][g]
//   a[1] = A[g + 8][2t, 2t + 1]    a[3] = A[g + 8][2t + 8, 2t + 9]    b[1] = B[2t + 8, 2t + 9][g]
//   d[0], d[1] = D[g][2t], D[g][2t + 1]      d[2], d[3] = D[g + 8][2t], D[g + 8][2t + 1]

#if defined(STORAGE_BF16)

// d += a b
DEVICE void multiply_add_16x8x16(float* d, const u32* a, const u32* b)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

// The same of floats, which have no such instruction that keeps their precision: lanes hand each
// other their operands, 64 shuffles for 64 products. For products that are small beside others.
DEVICE void multiply_add_16x8x16(float* d, const float2* a, const float2* b)
{
    int lane = threadIdx.x % WARP, g4 = lane / 4 * 4, right = lane % 4 * 8;
#pragma unroll
    for (int half = 0; half < 2; half++)
    {
#pragma unroll 1
        for (int t = 0; t < 4; t++)
        {
#pragma unroll
            for (int i = 0; i < 2; i++)
            {
                float top = i ? a[2 * half].y : a[2 * half].x;
                float bottom = i ? a[2 * half + 1].y : a[2 * half + 1].x;
                float other = i ? b[half].y : b[half].x;
                top = __shfl_sync(ALL_LANES, top, g4 + t);
                bottom = __shfl_sync(ALL_LANES, bottom, g4 + t);
                float even = __shfl_sync(ALL_LANES, other, right + t);
                float odd = __shfl_sync(ALL_LANES, other, right + 4 + t);
                d[0] += top * even;
                d[1] += top * odd;
                d[2] += bottom * even;
                d[3] += bottom * odd;
            }
        }
    }
}

#endif

// An index outside its table, for the host to report: which argument (a KernelFault), where in it,
// what stood there. The first one found is kept; faults[0] is 0 while all is well.
DEVICE void report(int* faults, int what, int position, int value, int limit)
{
    if (atomicCAS(faults, 0, what) != 0) return;
    faults[1] = position;
    faults[2] = value;
    faults[3] = limit;
}

// Reports starts that do not rise from 0 to the tokens; for one block of a launch.
DEVICE void check_starts(int* faults, int what, const int* starts, int sequences, int tokens)
{
    for (int s = threadIdx.x; s <= sequences; s += blockDim.x)
    {
        int lowest = s == 0 ? 0 : starts[s - 1], highest = s == 0 ? 0 : tokens;
        if (s == sequences) lowest = tokens;
        if (starts[s] < lowest || starts[s] > highest) report(faults, what, s, starts[s], tokens);
    }
}

// ---- 3. random numbers --------------------------------------------------------------------------

// Philox4x32-10 (Salmon et al. 2011): counter (element / 4, layer, step low, step high), key the
// seed; the element takes word element % 4. The same numbers as on the CPU.
DEVICE uint4 philox(u64 seed, u64 step, u32 layer, u32 block)
{
    u32 x0 = block, x1 = layer, x2 = (u32)step, x3 = (u32)(step >> 32);
    u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++)
    {
        u32 high0 = __umulhi(0xD2511F53u, x0), low0 = 0xD2511F53u * x0;
        u32 high2 = __umulhi(0xCD9E8D57u, x2), low2 = 0xCD9E8D57u * x2;
        x0 = high2 ^ x1 ^ k0;
        x1 = low2;
        x2 = high0 ^ x3 ^ k1;
        x3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return make_uint4(x0, x1, x2, x3);
}

// ---- 4. casts, fills, sums ----------------------------------------------------------------------

DEVICE float load_any(const void* from, int type, long long i)
{
    return type == DTYPE_F32 ? ((const float*)from)[i]
        : type == DTYPE_BF16 ? widen_bf16(((const bf16*)from)[i])
        : widen_f16(((const f16*)from)[i]);
}

// CAST elements of any type; the address is a multiple of 16.
DEVICE void load_any_vector(float* x, const void* from, int type, long long i)
{
    if (type == DTYPE_F32)
    {
        u32 words[CAST];
        load_words<CAST>(words, (const float*)from + i);
#pragma unroll
        for (int j = 0; j < CAST; j++) x[j] = __uint_as_float(words[j]);
        return;
    }
    u32 words[CAST / 2];
    load_words<CAST / 2>(words, (const bf16*)from + i);
#pragma unroll
    for (int j = 0; j < CAST; j++)
    {
        u32 bits = words[j / 2] >> (j % 2 * 16);
        x[j] = type == DTYPE_BF16 ? widen_bf16((bf16)bits) : widen_f16((f16)bits);
    }
}

// y[i] = x[i], or adds it. Reads and writes each element once.
extern "C" __global__ void __launch_bounds__(256) cast_to_real(
    real* y, const void* x, int type, long long count, int accumulate)
{
    long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * CAST;
    if (i + CAST <= count && aligned16(x, CAST, sizeof(real)) && aligned16(y, CAST, sizeof(real)))
    {
        float v[CAST], old[CAST];
        load_any_vector(v, x, type, i);
#pragma unroll
        for (int j = 0; j < CAST; j += VECTOR)
        {
            if (accumulate)
            {
                load_vector(old, y + i + j);
#pragma unroll
                for (int k = 0; k < VECTOR; k++) v[j + k] += old[k];
            }
            store_vector(y + i + j, v + j);
        }
        return;
    }
    for (int j = 0; j < CAST && i + j < count; j++)
    {
        float value = load_any(x, type, i + j);
        y[i + j] = narrow(accumulate ? widen(y[i + j]) + value : value);
    }
}

#if defined(STORAGE_BF16) // with F32 it would be cast_to_real

extern "C" __global__ void __launch_bounds__(256) cast_to_float(
    float* y, const void* x, int type, long long count, int accumulate)
{
    long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * CAST;
    if (i + CAST <= count && aligned16(x, CAST, 2) && aligned16(y, CAST, 4))
    {
        float v[CAST];
        load_any_vector(v, x, type, i);
#pragma unroll
        for (int j = 0; j < CAST; j += 4)
        {
            float4 value = make_float4(v[j], v[j + 1], v[j + 2], v[j + 3]);
            float4* to = (float4*)(y + i + j);
            if (accumulate)
            {
                float4 old = *to;
                value = make_float4(
                    old.x + value.x, old.y + value.y, old.z + value.z, old.w + value.w);
            }
            *to = value;
        }
        return;
    }
    for (int j = 0; j < CAST && i + j < count; j++)
    {
        float value = load_any(x, type, i + j);
        y[i + j] = accumulate ? y[i + j] + value : value;
    }
}

#endif

extern "C" __global__ void __launch_bounds__(256) fill_real(real* y, float value, long long count)
{
    long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * CAST;
    if (i + CAST <= count && aligned16(y, CAST, sizeof(real)))
    {
        float v[CAST];
#pragma unroll
        for (int j = 0; j < CAST; j++) v[j] = value;
#pragma unroll
        for (int j = 0; j < CAST; j += VECTOR) store_vector(y + i + j, v);
        return;
    }
    for (int j = 0; j < CAST && i + j < count; j++) y[i + j] = narrow(value);
}

// y[r, c] = b[c]: the bias, before a product adds to it. A thread has 16 bytes of columns and every
// gridDim.y-th row. Writes R C S.
extern "C" __global__ void __launch_bounds__(256) fill_rows(real* y, const float* b, int rows,
    int cols)
{
    int c = (blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    if (c >= cols) return;
    float v[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; i++) v[i] = c + i < cols ? b[c + i] : 0;
    bool wide = aligned16(y, cols, sizeof(real));
    for (int r = blockIdx.y; r < rows; r += gridDim.y)
    {
        real* to = y + (u64)r * cols + c;
        if (wide)
        {
            store_vector(to, v);
            continue;
        }
#pragma unroll
        for (int i = 0; i < VECTOR; i++)
            if (c + i < cols) to[i] = narrow(v[i]);
    }
}

// part[p, c] = sum of x[r, c] over the rows r of part p: the first half of a bias gradient. A block
// has 32 x VECTOR columns, each of its 8 warps every eighth row; their sums are added in order.
// Reads R C S, writes 4 C for each part, adds R C.
extern "C" __global__ void __launch_bounds__(256) sum_rows(
    float* part, const real* x, int rows, int cols, int rows_per_part)
{
    __shared__ float sums[8][WARP * VECTOR];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int c = (blockIdx.x * WARP + lane) * VECTOR;
    int first = blockIdx.y * rows_per_part, last = min(rows, first + rows_per_part);
    bool wide = aligned16(x, cols, sizeof(real));
    float sum[VECTOR] = {}, v[VECTOR];
    if (wide && c < cols)
    {
#pragma unroll 4
        for (int r = first + warp; r < last; r += 8)
        {
            load_vector(v, x + (u64)r * cols + c);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) sum[i] += v[i];
        }
    }
    else if (!wide)
    {
        for (int r = first + warp; r < last; r += 8)
        {
#pragma unroll
            for (int i = 0; i < VECTOR; i++)
                if (c + i < cols) sum[i] += widen(x[(u64)r * cols + c + i]);
        }
    }
#pragma unroll
    for (int i = 0; i < VECTOR; i++) sums[warp][lane * VECTOR + i] = sum[i];
    __syncthreads();
    int own = blockIdx.x * WARP * VECTOR + threadIdx.x;
    if (threadIdx.x >= WARP * VECTOR || own >= cols) return;
    float total = 0;
#pragma unroll
    for (int w = 0; w < 8; w++) total += sums[w][threadIdx.x];
    part[(u64)blockIdx.y * cols + own] = total;
}

// y[c] = sum of part[p, c] over p, in order, or adds it: the second half, and that of every
// gradient of a vector that blocks have summed in parts.
extern "C" __global__ void sum_parts(float* y, const float* part, int parts, int cols,
    int accumulate)
{
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= cols) return;
    float sum = 0;
    for (int p = 0; p < parts; p++) sum += part[(u64)p * cols + c];
    y[c] = accumulate ? y[c] + sum : sum;
}

#if defined(STORAGE_BF16) // with F32 sum_parts does it

// The same of a gradient in the storage type, four elements a thread: count is a multiple of 4.
// Nothing where a fault was found, since then nobody may have written some of the parts. Reads 4
// count bytes a part, writes count S.
extern "C" __global__ void __launch_bounds__(256) sum_parts_to_real(
    real* y, const float* part, int parts, int count, int accumulate, const int* faults)
{
    int i = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= count || faults[0]) return;
    float4 sum = make_float4(0, 0, 0, 0);
    for (int p = 0; p < parts; p++)
    {
        float4 v = *(const float4*)(part + (u64)p * count + i);
        sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
    }
    uint2* to = (uint2*)(y + i);
    if (accumulate)
    {
        uint2 old = *to;
        sum.x += widen_low(old.x);
        sum.y += widen_high(old.x);
        sum.z += widen_low(old.y);
        sum.w += widen_high(old.y);
    }
    *to = make_uint2(narrow_pair(sum.x, sum.y), narrow_pair(sum.z, sum.w));
}

#endif

// ---- 5. normalisation ---------------------------------------------------------------------------

// How the threads of a block, or the lanes of a warp, share a stretch of a row: 16 bytes each in
// turn where rows allow it, else one element each in turn. N elements of each are a stretch of N *
// threads columns; those beyond the row's end read as zeros and are not written.
template <bool WIDE> struct Share
{
    int thread, threads, cols;

    // The column of a thread's element i in the stretch that begins at column first.
    __device__ __forceinline__ int column(int first, int i) const
    {
        return first + (WIDE ? i / VECTOR * VECTOR * threads + thread * VECTOR + i % VECTOR
            : i * threads + thread);
    }

    template <int N>
    __device__ __forceinline__ void load(float (&v)[N], const real* row, int first) const
    {
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = 0;
        if constexpr (WIDE)
        {
#pragma unroll
            for (int i = 0; i < N; i += VECTOR)
                if (column(first, i) < cols) load_vector(v + i, row + column(first, i));
        }
        else
        {
#pragma unroll
            for (int i = 0; i < N; i++)
                if (column(first, i) < cols) v[i] = widen(row[column(first, i)]);
        }
    }

    template <int N>
    __device__ __forceinline__ void load_weight(float (&v)[N], const float* w, int first) const
    {
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = 0;
        if constexpr (WIDE)
        {
#pragma unroll
            for (int i = 0; i < N; i += VECTOR)
                if (column(first, i) < cols) load_floats(v + i, w + column(first, i));
        }
        else
        {
#pragma unroll
            for (int i = 0; i < N; i++)
                if (column(first, i) < cols) v[i] = w[column(first, i)];
        }
    }

    template <int N>
    __device__ __forceinline__ void store(real* row, const float (&v)[N], int first) const
    {
        if constexpr (WIDE)
        {
#pragma unroll
            for (int i = 0; i < N; i += VECTOR)
                if (column(first, i) < cols) store_vector(row + column(first, i), v + i);
        }
        else
        {
#pragma unroll
            for (int i = 0; i < N; i++)
                if (column(first, i) < cols) row[column(first, i)] = narrow(v[i]);
        }
    }

    // Whether element i of the thread lies in the row.
    __device__ __forceinline__ bool has(int first, int i) const
    {
        return column(first, WIDE ? i / VECTOR * VECTOR : i) < cols;
    }
};

// Elements of a row that each thread of a norm keeps in registers. A row of up to 16 * 256 columns
// is one stretch and read once; of a longer one every pass reads all stretches again, from cache.
// Element by element they are fewer, since every one's address takes registers too.
#define KEPT (WIDE ? 16 : 4)

template <bool WIDE> DEVICE void norm_forward_row(
    real* y, float* mean, float* rstd, const real* x, const float* w, const float* b, int cols,
    float epsilon)
{
    __shared__ float sums[256 / WARP];
    Share<WIDE> own = {(int)threadIdx.x, (int)blockDim.x, cols};
    const real* row = x + (u64)blockIdx.x * cols;
    int stretch = KEPT * blockDim.x;
    float v[KEPT], g[KEPT], sum = 0, squares = 0, centre = 0;
    own.load(v, row, 0);
    own.load_weight(g, w, 0);
    if (mean)
    {
        for (int first = 0; first < cols; first += stretch)
        {
            if (first > 0) own.load(v, row, first);
#pragma unroll
            for (int i = 0; i < KEPT; i++) sum += v[i];
        }
        centre = block_sum(sum, sums) / cols;
        if (threadIdx.x == 0) mean[blockIdx.x] = centre;
    }
    for (int first = 0; first < cols; first += stretch)
    {
        if (cols > stretch) own.load(v, row, first);
#pragma unroll
        for (int i = 0; i < KEPT; i++)
            if (own.has(first, i)) squares += (v[i] - centre) * (v[i] - centre);
    }
    float scale = 1.0f / sqrtf(block_sum(squares, sums) / cols + epsilon);
    if (threadIdx.x == 0) rstd[blockIdx.x] = scale;
    for (int first = 0; first < cols; first += stretch)
    {
        if (cols > stretch)
        {
            own.load(v, row, first);
            own.load_weight(g, w, first);
        }
#pragma unroll
        for (int i = 0; i < KEPT; i++) v[i] = (v[i] - centre) * scale * g[i];
        if (b)
        {
            own.load_weight(g, b, first);
#pragma unroll
            for (int i = 0; i < KEPT; i++) v[i] += g[i];
        }
        own.store(y + (u64)blockIdx.x * cols, v, first);
    }
}

// y = (x - mean[r]) rstd[r] w + b, rstd[r] = 1 / sqrt(mean_c (x - mean[r])^2 + epsilon): LayerNorm,
// and where mean and b are null, with nothing in their place, RMSNorm. A block per row, which has
// no more warps than the row needs. Moves 2 R C S + 8 R + 8 C bytes, 4 (RMSNorm) to 7 R C FLOP.
extern "C" __global__ void __launch_bounds__(256) norm_forward(
    real* y, float* mean, float* rstd, const real* x, const float* w, const float* b, int cols,
    float epsilon)
{
    bool wide = aligned16(x, cols, sizeof(real)) && aligned16(y, cols, sizeof(real))
        && aligned16(w, 4, 4) && aligned16(b, 4, 4);
    if (wide) norm_forward_row<true>(y, mean, rstd, x, w, b, cols, epsilon);
    else norm_forward_row<false>(y, mean, rstd, x, w, b, cols, epsilon);
}

template <bool WIDE> DEVICE void norm_backward_row(
    real* dx, const real* dy, const real* x, const float* w, const float* mean, const float* rstd,
    int cols, int accumulate)
{
    __shared__ float sums[256 / WARP];
    Share<WIDE> own = {(int)threadIdx.x, (int)blockDim.x, cols};
    u64 row = (u64)blockIdx.x * cols;
    int stretch = KEPT * blockDim.x;
    float scale = rstd[blockIdx.x], centre = mean ? mean[blockIdx.x] : 0;
    float v[KEPT], g[KEPT], other[KEPT], sum = 0, pull = 0;
    for (int first = 0; first < cols; first += stretch)
    {
        own.load(v, x + row, first);
        own.load(g, dy + row, first);
        own.load_weight(other, w, first);
#pragma unroll
        for (int i = 0; i < KEPT; i++)
        {
            g[i] *= other[i];
            sum += g[i];
            pull += g[i] * (v[i] - centre);
        }
    }
    pull = block_sum(pull, sums) / cols * scale * scale;
    float average = mean ? block_sum(sum, sums) / cols : 0;
    for (int first = 0; first < cols; first += stretch)
    {
        if (cols > stretch)
        {
            own.load(v, x + row, first);
            own.load(g, dy + row, first);
            own.load_weight(other, w, first);
#pragma unroll
            for (int i = 0; i < KEPT; i++) g[i] *= other[i];
        }
#pragma unroll
        for (int i = 0; i < KEPT; i++) g[i] = (g[i] - average - (v[i] - centre) * pull) * scale;
        if (accumulate)
        {
            own.load(other, dx + row, first);
#pragma unroll
            for (int i = 0; i < KEPT; i++) g[i] += other[i];
        }
        own.store(dx + row, g, first);
    }
}

// dx = rstd (g - mean_c(g) - n mean_c(g n)) with g = w dy and n = (x - mean) rstd, or adds it;
// without mean, mean_c(g) is left out too. A block per row. Moves 3 R C S + 8 R + 4 C bytes (4 R C
// S when adding), 8 R C FLOP.
extern "C" __global__ void __launch_bounds__(256) norm_backward(
    real* dx, const real* dy, const real* x, const float* w, const float* mean, const float* rstd,
    int cols, int accumulate)
{
    bool wide = aligned16(x, cols, sizeof(real)) && aligned16(dx, cols, sizeof(real))
        && aligned16(dy, cols, sizeof(real)) && aligned16(w, 4, 4);
    if (wide) norm_backward_row<true>(dx, dy, x, w, mean, rstd, cols, accumulate);
    else norm_backward_row<false>(dx, dy, x, w, mean, rstd, cols, accumulate);
}

// A lane's columns of dw and db over every eighth row of begin..end, its warp's.
template <bool WIDE> DEVICE void sum_norm_rows(
    float (&dw)[VECTOR], float (&db)[VECTOR], const real* dy, const real* x, const float* mean,
    const float* rstd, int cols, int first, int begin, int end)
{
    Share<WIDE> own = {(int)threadIdx.x % WARP, WARP, cols};
    float v[VECTOR], g[VECTOR];
#pragma unroll 4
    for (int r = begin + threadIdx.x / WARP; r < end; r += 256 / WARP)
    {
        own.load(v, x + (u64)r * cols, first);
        own.load(g, dy + (u64)r * cols, first);
        float scale = rstd[r], centre = mean ? mean[r] : 0;
#pragma unroll
        for (int i = 0; i < VECTOR; i++)
        {
            dw[i] += g[i] * ((v[i] - centre) * scale);
            db[i] += g[i];
        }
    }
}

// dw[p, c] = sum of dy (x - mean[r]) rstd[r], db[p, c] = sum of dy, over the rows r of part p; each
// may be null. A block has 32 * VECTOR columns, of which each lane sums its own; its warps take
// rows in turn, and their sums are added in order. Reads 2 R C S + 8 R bytes, 5 R C FLOP.
extern "C" __global__ void __launch_bounds__(256) norm_weight_parts(
    float* dw, float* db, const real* dy, const real* x, const float* mean, const float* rstd,
    int rows, int cols, int rows_per_part)
{
    // A lane's elements are as far apart as keeps both writers and readers in different banks.
    const int warps = 256 / WARP, width = WARP * VECTOR, apart = WARP + WARP / VECTOR;
    __shared__ float tile[warps][VECTOR * apart];
    bool wide = aligned16(x, cols, sizeof(real)) && aligned16(dy, cols, sizeof(real));
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, first = blockIdx.x * width;
    float sums[2][VECTOR] = {};
    int begin = blockIdx.y * rows_per_part, end = min(rows, begin + rows_per_part);
    if (wide)
        sum_norm_rows<true>(sums[0], sums[1], dy, x, mean, rstd, cols, first, begin, end);
    else
        sum_norm_rows<false>(sums[0], sums[1], dy, x, mean, rstd, cols, first, begin, end);

    // Thread c adds up column first + c, from where its lane left it.
    int c = threadIdx.x;
    int at = wide ? c % VECTOR * apart + c / VECTOR : c / WARP * apart + c % WARP;
#pragma unroll
    for (int which = 0; which < 2; which++)
    {
        float* part = which == 0 ? dw : db;
        if (!part) continue;
#pragma unroll
        for (int i = 0; i < VECTOR; i++) tile[warp][i * apart + lane] = sums[which][i];
        __syncthreads();
        if (c < width && first + c < cols)
        {
            float sum = 0;
            for (int w = 0; w < warps; w++) sum += tile[w][at];
            part[(u64)blockIdx.y * cols + first + c] = sum;
        }
        __syncthreads();
    }
}

// ---- 6. element-wise ----------------------------------------------------------------------------

// A thread has VECTOR consecutive elements of flat tensors, and moves them as one where they are
// all there and every tensor begins at a multiple of 16 bytes; absent tensors are null.
DEVICE bool is_whole(long long i, long long count, const void* a, const void* b = 0,
    const void* c = 0, const void* d = 0, const void* e = 0)
{
    return i + VECTOR <= count && (((u64)a | (u64)b | (u64)c | (u64)d | (u64)e) & 15) == 0;
}

DEVICE void load_run(float* v, const real* x, long long i, long long count, bool whole)
{
    if (whole)
    {
        load_vector(v, x + i);
        return;
    }
#pragma unroll
    for (int j = 0; j < VECTOR; j++) v[j] = i + j < count ? widen(x[i + j]) : 0;
}

// Stores, or adds to what is there.
DEVICE void store_run(
    real* y, float* v, long long i, long long count, bool whole, int accumulate)
{
    if (accumulate)
    {
        float before[VECTOR];
        load_run(before, y, i, count, whole);
#pragma unroll
        for (int j = 0; j < VECTOR; j++) v[j] += before[j];
    }
    if (whole)
    {
        store_vector(y + i, v);
        return;
    }
#pragma unroll
    for (int j = 0; j < VECTOR; j++)
        if (i + j < count) y[i + j] = narrow(v[j]);
}

// y = a + scale * b. Moves 3 R C S, 2 FLOP per element.
extern "C" __global__ void __launch_bounds__(256) add_forward(
    real* y, const real* a, const real* b, float scale, long long count)
{
    long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    bool whole = is_whole(i, count, y, a, b);
    float p[VECTOR], q[VECTOR];
    load_run(p, a, i, count, whole);
    load_run(q, b, i, count, whole);
#pragma unroll
    for (int j = 0; j < VECTOR; j++) p[j] += scale * q[j];
    store_run(y, p, i, count, whole, 0);
}

// y = scale * x, or adds it: both gradients of a residual sum. Moves 2 or 3 R C S.
extern "C" __global__ void __launch_bounds__(256) scale_rows(
    real* y, const real* x, float scale, long long count, int accumulate)
{
    long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    bool whole = is_whole(i, count, y, x);
    float v[VECTOR];
    load_run(v, x, i, count, whole);
#pragma unroll
    for (int j = 0; j < VECTOR; j++) v[j] *= scale;
    store_run(y, v, i, count, whole, accumulate);
}

// e^x by the hardware's 2^x: 0 below -87, infinity above 88, NaN stays. The product with log2 e is
// rounded, so the relative error is 2 units in the last place + 6e-8 |x|: where that is more, e^x
// is next to nothing in the sums below.
DEVICE float approximate_exp(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
    return y;
}

// 1 / x to one unit in the last place.
DEVICE float approximate_reciprocal(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float sigmoid(float x) { return approximate_reciprocal(1 + approximate_exp(-x)); }

// The normal distribution: its integral up to x, and its density at x. With z = |x| / sqrt 2 and
// t = 1 / (1 + z / 2), erfc(z) e^(z^2) = t P(2 t - 1): P is the Chebyshev series of
// Kernels/Cpu/VectorMath.cs up to the tenth power, in powers, to 2e-7 of itself.
DEVICE float normal_cdf(float x, float& density)
{
    const float series[] = {
        0.510791357f, 0.343580319f, 0.139735734f, 0.0182216694f, -0.0107516262f, -0.00324345192f,
        0.00152915716f, 0.000430670488f, -0.000299382712f, -3.66018769e-5f, 4.21611972e-5f,
    };
    float t = approximate_reciprocal(1 + fabsf(x) * 0.353553391f), s = 2 * t - 1, p = series[10];
#pragma unroll
    for (int k = 9; k >= 0; k--) p = p * s + series[k];
    float bell = approximate_exp(x * x * -0.5f), tail = 0.5f * t * bell * p;
    density = 0.398942280f * bell;
    return x < 0 ? tail : 1 - tail;
}

// GELU's tanh approximation, 0.5 (1 + tanh u) = sigmoid(2 u), 2 u = SLOPE (x + CUBIC x^3).
#define GELU_SLOPE 1.59576912f
#define GELU_CUBIC 0.044715f

DEVICE float gelu_gate(float x) { return sigmoid(x * (x * x * GELU_CUBIC + 1) * GELU_SLOPE); }

// y = x Phi(x), or its tanh approximation. Moves 2 R C S, 20 (erf) or 8 FLOP and 2 approximations
// per element.
extern "C" __global__ void __launch_bounds__(256) gelu_forward(
    real* y, const real* x, int erf, long long count)
{
    long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    bool whole = is_whole(i, count, y, x);
    float v[VECTOR], density;
    load_run(v, x, i, count, whole);
    if (erf)
    {
#pragma unroll
        for (int j = 0; j < VECTOR; j++) v[j] *= normal_cdf(v[j], density);
    }
    else
    {
#pragma unroll
        for (int j = 0; j < VECTOR; j++) v[j] *= gelu_gate(v[j]);
    }
    store_run(y, v, i, count, whole, 0);
}

// dx = dy (Phi(x) + x Phi'(x)), or for tanh dy (s + x s (1 - s) (2 u)') with s the gate, or adds
// it. Moves 3 R C S, or 4 when adding, 24 or 16 FLOP and 2 approximations per element.
extern "C" __global__ void __launch_bounds__(256) gelu_backward(
    real* dx, const real* dy, const real* x, int erf, long long count, int accumulate)
{
    long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    bool whole = is_whole(i, count, dx, dy, x);
    float v[VECTOR], g[VECTOR], density;
    load_run(v, x, i, count, whole);
    load_run(g, dy, i, count, whole);
    if (erf)
    {
#pragma unroll
        for (int j = 0; j < VECTOR; j++)
        {
            float cdf = normal_cdf(v[j], density);
            g[j] *= cdf + v[j] * density;
        }
    }
    else
    {
#pragma unroll
        for (int j = 0; j < VECTOR; j++)
        {
            float s = gelu_gate(v[j]);
            float slope = v[j] * v[j] * (3 * GELU_CUBIC * GELU_SLOPE) + GELU_SLOPE;
            g[j] *= s + v[j] * s * (1 - s) * slope;
        }
    }
    store_run(dx, g, i, count, whole, accumulate);
}

// y = gate sigmoid(gate) up. Moves 3 R C S, 4 FLOP and 2 approximations per element.
extern "C" __global__ void __launch_bounds__(256) swiglu_forward(
    real* y, const real* gate, const real* up, long long count)
{
    long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    bool whole = is_whole(i, count, y, gate, up);
    float p[VECTOR], q[VECTOR];
    load_run(p, gate, i, count, whole);
    load_run(q, up, i, count, whole);
#pragma unroll
    for (int j = 0; j < VECTOR; j++) p[j] *= sigmoid(p[j]) * q[j];
    store_run(y, p, i, count, whole, 0);
}

// dup = dy gate s, dgate = dy up (s + gate s (1 - s)) with s = sigmoid(gate), each written, added,
// or null when not wanted. Moves 5 R C S when both are written,
// 10 FLOP and 2 approximations per element.
extern "C" __global__ void __launch_bounds__(256) swiglu_backward(
    real* dgate, real* dup, const real* dy, const real* gate, const real* up, long long count,
    int accumulate_gate, int accumulate_up)
{
    long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    bool whole = is_whole(i, count, dgate, dup, dy, gate, up);
    float p[VECTOR], g[VECTOR], s[VECTOR], v[VECTOR];
    load_run(p, gate, i, count, whole);
    load_run(g, dy, i, count, whole);
#pragma unroll
    for (int j = 0; j < VECTOR; j++) s[j] = sigmoid(p[j]);
    if (dgate)
    {
        load_run(v, up, i, count, whole);
#pragma unroll
        for (int j = 0; j < VECTOR; j++) v[j] *= g[j] * (s[j] + p[j] * s[j] * (1 - s[j]));
        store_run(dgate, v, i, count, whole, accumulate_gate);
    }
    if (dup)
    {
#pragma unroll
        for (int j = 0; j < VECTOR; j++) v[j] = g[j] * p[j] * s[j];
        store_run(dup, v, i, count, whole, accumulate_up);
    }
}

// Rotates the halves [a, b] of every head by its token's angles, [a cos - b sin, b cos + a sin], or
// with direction -1 back; written or added. x and y [rows, cols], positions[rows], tables
// [limit, half]; a row with a position outside them becomes zeros. A block per row, 16 bytes of
// both halves per thread where half allows it. Moves 2 R C S, or 3 when adding, + 4 R C bytes of
// tables, of which heads share each row; 3 R C FLOP.
extern "C" __global__ void __launch_bounds__(256) rope(
    real* y, const real* x, const int* positions, const float* cosines, const float* sines,
    int* faults, int cols, int half, int limit, float direction, int accumulate)
{
    int row = blockIdx.x, position = positions[row];
    bool known = position >= 0 && position < limit;
    if (!known && threadIdx.x == 0) report(faults, FAULT_ROPE_POSITIONS, row, position, limit);
    bool wide = aligned16(x, half, sizeof(real)) && aligned16(y, half, sizeof(real))
        && aligned16(cosines, half, 4) && aligned16(sines, half, 4);
    int step = wide ? VECTOR : 1;
    for (int i = threadIdx.x * step; i < cols / 2; i += blockDim.x * step)
    {
        int k = i % half;
        u64 table = (u64)(known ? position : 0) * half + k, at = (u64)row * cols + 2 * i - k;
        float a[VECTOR], b[VECTOR], c[VECTOR] = {}, s[VECTOR] = {};
        if (known && wide)
        {
            load_floats(c, cosines + table);
            load_floats(s, sines + table);
        }
        else if (known)
        {
            c[0] = cosines[table];
            s[0] = sines[table];
        }
        load_run(a, x, at, at + step, wide);
        load_run(b, x, at + half, at + half + step, wide);
#pragma unroll
        for (int j = 0; j < VECTOR; j++)
        {
            float turn = s[j] * direction, low = a[j] * c[j] - b[j] * turn;
            b[j] = b[j] * c[j] + a[j] * turn;
            a[j] = low;
        }
        store_run(y, a, at, at + step, wide, accumulate);
        store_run(y, b, at + half, at + half + step, wide, accumulate);
    }
}

// Columns of heads in two layouts: side by side, [rows, cols0 + cols1 + cols2], as one product
// makes them, and as up to three matrices, one behind the other, as attention takes them. Forward
// (direction 1) x is the first and y the second, biases (where given) are added, and heads of the
// first `rotated` columns are rotated as rope does; backward (-1) the other way round, without
// biases. One block per row; moves 2 R C S.
extern "C" __global__ void __launch_bounds__(256) heads(
    real* y, const real* x, const float* bias0, const float* bias1, const float* bias2,
    const int* positions, const float* cosines, const float* sines, int* faults, int rows,
    int cols0, int cols1, int cols2, int rotated, int half, int limit, float direction)
{
    int row = blockIdx.x, cols = cols0 + cols1 + cols2, position = rotated > 0 ? positions[row] : 0;
    bool known = rotated > 0 && position >= 0 && position < limit, forward = direction > 0;
    if (rotated > 0 && !known && threadIdx.x == 0)
        report(faults, FAULT_ROPE_POSITIONS, row, position, limit);
    bool wide = aligned16(x, half, sizeof(real)) && aligned16(y, half, sizeof(real))
        && aligned16(cosines, half, 4) && aligned16(sines, half, 4) && aligned16(bias0, half, 4)
        && aligned16(bias1, half, 4) && aligned16(bias2, half, 4);
    int step = wide ? VECTOR : 1;
    for (int i = threadIdx.x * step; i < cols / 2; i += blockDim.x * step)
    {
        int k = i % half, column = 2 * i - k;
        int matrix = column < cols0 ? 0 : column < cols0 + cols1 ? 1 : 2;
        int first = matrix == 0 ? 0 : matrix == 1 ? cols0 : cols0 + cols1;
        int width = matrix == 0 ? cols0 : matrix == 1 ? cols1 : cols2;
        u64 beside = (u64)row * cols + column;
        u64 behind = (u64)rows * first + (u64)row * width + column - first;
        u64 from = forward ? beside : behind, to = forward ? behind : beside;
        float a[VECTOR], b[VECTOR], c[VECTOR] = {}, s[VECTOR] = {};
        load_run(a, x, from, from + step, wide);
        load_run(b, x, from + half, from + half + step, wide);
        const float* bias = matrix == 0 ? bias0 : matrix == 1 ? bias1 : bias2;
        if (bias != nullptr)
        {
            bias += column - first;
            if (wide)
            {
                load_floats(c, bias);
                load_floats(s, bias + half);
            }
            else
            {
                c[0] = bias[0];
                s[0] = bias[half];
            }
#pragma unroll
            for (int j = 0; j < VECTOR; j++)
            {
                a[j] += c[j];
                b[j] += s[j];
            }
        }
        if (column < rotated)
        {
            u64 table = (u64)(known ? position : 0) * half + k;
            if (known && wide)
            {
                load_floats(c, cosines + table);
                load_floats(s, sines + table);
            }
            else
            {
                c[0] = known ? cosines[table] : 0;
                s[0] = known ? sines[table] : 0;
            }
#pragma unroll
            for (int j = 0; j < VECTOR; j++)
            {
                float turn = s[j] * direction, low = a[j] * c[j] - b[j] * turn;
                b[j] = b[j] * c[j] + a[j] * turn;
                a[j] = low;
            }
        }
        store_run(y, a, to, to + step, wide, 0);
        store_run(y, b, to + half, to + half + step, wide, 0);
    }
}

// ---- 7. lookups ---------------------------------------------------------------------------------

// to[c] = scale * from[c] over a row of cols, by a whole block, or adds it. Without a row to read
// from it becomes zero, or stays as it is.
DEVICE void put_row(real* to, const real* from, float scale, int accumulate, int cols)
{
    if (from == 0 && accumulate) return;
    if (aligned16(to, cols, sizeof(real)) && aligned16(from, cols, sizeof(real)))
    {
        for (int c = threadIdx.x * VECTOR; c < cols; c += blockDim.x * VECTOR)
        {
            float v[VECTOR] = {}, old[VECTOR];
            if (from != 0)
            {
                load_vector(v, from + c);
#pragma unroll
                for (int i = 0; i < VECTOR; i++) v[i] *= scale;
            }
            if (accumulate)
            {
                load_vector(old, to + c);
#pragma unroll
                for (int i = 0; i < VECTOR; i++) v[i] += old[i];
            }
            store_vector(to + c, v);
        }
        return;
    }
    for (int c = threadIdx.x; c < cols; c += blockDim.x)
    {
        float value = from == 0 ? 0 : scale * widen(from[c]);
        to[c] = narrow(accumulate ? widen(to[c]) + value : value);
    }
}

// VECTOR elements of any stored type from element `at` of a 16-byte aligned array; at is a multiple
// of VECTOR.
DEVICE void load_any_vector(float* x, const void* from, int type, u64 at)
{
    if (type == DTYPE_F32)
    {
        load_floats(x, (const float*)from + at);
        return;
    }
#if defined(STORAGE_BF16)
    uint4 bits = *(const uint4*)((const bf16*)from + at);
    u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
#else
    uint2 bits = *(const uint2*)((const bf16*)from + at);
    u32 words[2] = {bits.x, bits.y};
#endif
#pragma unroll
    for (int i = 0; i < VECTOR / 2; i++)
    {
        bool is_bf16 = type == DTYPE_BF16;
        x[2 * i] = is_bf16 ? __uint_as_float(words[i] << 16) : widen_f16((f16)words[i]);
        x[2 * i + 1] =
            is_bf16 ? __uint_as_float(words[i] & 0xffff0000u) : widen_f16((f16)(words[i] >> 16));
    }
}

// y[t] = x[t] + scale * table[ids[t]], the table in any type; without x only the second. One block
// per token. A token whose id is not in the table gets x or zeros. Moves R C (2 S + bytes of a
// table's element), S less without x; 2 FLOP per element.
extern "C" __global__ void __launch_bounds__(256) lookup_rows(
    real* y, const real* x, const void* table, int type, const int* ids, int limit, int cols,
    float scale, int* faults, int fault)
{
    int token = blockIdx.x, id = ids[token];
    bool known = (u32)id < (u32)limit;
    if (!known && threadIdx.x == 0) report(faults, fault, token, id, limit);
    u64 from = (u64)(known ? id : 0) * cols, to = (u64)token * cols;
    if (aligned16(y, cols, sizeof(real)) && aligned16(x, cols, sizeof(real))
        && aligned16(table, VECTOR, sizeof(real)))
    {
        for (int c = threadIdx.x * VECTOR; c < cols; c += blockDim.x * VECTOR)
        {
            float v[VECTOR] = {}, w[VECTOR] = {};
            if (x != 0) load_vector(v, x + to + c);
            if (known) load_any_vector(w, table, type, from + c);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) v[i] += scale * w[i];
            store_vector(y + to + c, v);
        }
        return;
    }
    for (int c = threadIdx.x; c < cols; c += blockDim.x)
    {
        float value = known ? scale * load_any(table, type, from + c) : 0;
        y[to + c] = narrow(x != 0 ? widen(x[to + c]) + value : value);
    }
}

// The tokens ordered by id, those of one id by position, so that each row of a table's gradient has
// its tokens side by side: order[place] = token, sorted[place] = its id; ids outside the table
// become `limit` and come last. A token's place is the number of tokens before it, and every thread
// counts: R^2 comparisons beat a sort with its many launches (10 us for 8192 tokens, 2 ms for
// 100,000) and know no largest R.
extern "C" __global__ void __launch_bounds__(256) order_by_id(
    int* order, int* sorted, const int* ids, int count, int limit, int* faults, int fault)
{
    __shared__ u32 tile[256];
    int token = blockIdx.x * 256 + threadIdx.x, place = 0;
    u32 id = token < count ? min((u32)ids[token], (u32)limit) : 0;
    if (token < count && id == limit) report(faults, fault, token, ids[token], limit);
    for (int first = 0; first < count; first += 256)
    {
        int other = first + threadIdx.x, here = min(256, count - first);
        if (other < count) tile[threadIdx.x] = min((u32)ids[other], (u32)limit);
        __syncthreads();
        // An equal id counts when its token stands before.
        for (int i = 0; i < here; i++) place += tile[i] < id + (first + i < token);
        __syncthreads();
    }
    if (token >= count) return;
    order[place] = token;
    sorted[place] = id;
}

// y[id] = scale * sum of dy over the tokens of id in their order, or adds it; with row_of and
// weights the sum of weights[k] dy[row_of[k]] over the terms k. One block per place, which works
// where an id begins. Reads R C S, writes 4 C per different id (and reads them when it adds).
extern "C" __global__ void __launch_bounds__(256) sum_by_id(
    float* y, const real* dy, const int* order, const int* sorted, const int* row_of,
    const float* weights, int count, int limit, int cols, float scale, int accumulate)
{
    int first = blockIdx.x, id = sorted[first];
    if (id >= limit || (first > 0 && sorted[first - 1] == id)) return;
    int last = first + 1, beyond = count;
    while (last < beyond)
    {
        int middle = (last + beyond) / 2;
        if (sorted[middle] == id) last = middle + 1;
        else beyond = middle;
    }
    float* row = y + (u64)id * cols;
    if (aligned16(dy, cols, sizeof(real)) && aligned16(y, 4, 4))
    {
        for (int c = threadIdx.x * VECTOR; c < cols; c += blockDim.x * VECTOR)
        {
            float sum[VECTOR] = {}, v[VECTOR];
#pragma unroll 4
            for (int place = first; place < last; place++)
            {
                int term = order[place];
                float factor = weights ? weights[term] : 1;
                load_vector(v, dy + (u64)(row_of ? row_of[term] : term) * cols + c);
#pragma unroll
                for (int i = 0; i < VECTOR; i++) sum[i] += factor * v[i];
            }
            if (accumulate) load_floats(v, row + c);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) sum[i] = scale * sum[i] + (accumulate ? v[i] : 0);
#pragma unroll
            for (int i = 0; i < VECTOR; i += 4)
                *(float4*)(row + c + i) = make_float4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
        }
        return;
    }
    for (int c = threadIdx.x; c < cols; c += blockDim.x)
    {
        float sum = 0;
        for (int place = first; place < last; place++)
        {
            int term = order[place];
            float factor = weights ? weights[term] : 1;
            sum += factor * widen(dy[(u64)(row_of ? row_of[term] : term) * cols + c]);
        }
        row[c] = scale * sum + (accumulate ? row[c] : 0);
    }
}

// y[r] = x[r] + sum of weights[k] * table[ids[k]] over k from starts[r] to starts[r + 1], the table
// in any type. One block per row. Starts outside the terms are taken for their ends; an id that is
// not in the table adds nothing. Moves 2 R C S, and C bytes of a table's element per term,
// mostly from L2; 2 FLOP per element of a term.
extern "C" __global__ void __launch_bounds__(256) weighted_gather(
    real* y, const real* x, const void* table, int type, const int* starts, const int* ids,
    const float* weights, int rows, int terms, int limit, int cols, int* faults)
{
    int row = blockIdx.x, first = max(0, starts[row]), last = min(terms, starts[row + 1]);
    if (row == 0) check_starts(faults, FAULT_WEIGHTED_GATHER_STARTS, starts, rows, terms);
    for (int k = first + threadIdx.x; k < last; k += blockDim.x)
        if ((u32)ids[k] >= (u32)limit) report(faults, FAULT_WEIGHTED_GATHER_IDS, k, ids[k], limit);
    u64 at = (u64)row * cols;
    if (aligned16(y, cols, sizeof(real)) && aligned16(x, cols, sizeof(real))
        && aligned16(table, VECTOR, sizeof(real)))
    {
        for (int c = threadIdx.x * VECTOR; c < cols; c += blockDim.x * VECTOR)
        {
            float v[VECTOR], w[VECTOR];
            load_vector(v, x + at + c);
            for (int k = first; k < last; k++)
            {
                if ((u32)ids[k] >= (u32)limit) continue;
                load_any_vector(w, table, type, (u64)ids[k] * cols + c);
#pragma unroll
                for (int i = 0; i < VECTOR; i++) v[i] += weights[k] * w[i];
            }
            store_vector(y + at + c, v);
        }
        return;
    }
    for (int c = threadIdx.x; c < cols; c += blockDim.x)
    {
        float value = widen(x[at + c]);
        for (int k = first; k < last; k++)
            if ((u32)ids[k] < (u32)limit)
                value += weights[k] * load_any(table, type, (long long)ids[k] * cols + c);
        y[at + c] = narrow(value);
    }
}

// row_of[k] = the row whose terms starts[row] to starts[row + 1] hold term k: the last one that
// starts at k or before.
extern "C" __global__ void row_of_term(
    int* row_of, const int* starts, int rows, int terms, int* faults)
{
    int k = blockIdx.x * blockDim.x + threadIdx.x, low = 0, high = rows - 1;
    if (blockIdx.x == 0) check_starts(faults, FAULT_WEIGHTED_GATHER_STARTS, starts, rows, terms);
    if (k >= terms) return;
    while (low < high)
    {
        int middle = (low + high + 1) / 2;
        if (starts[middle] <= k) low = middle;
        else high = middle - 1;
    }
    row_of[k] = low;
}

// y[r, c] = x[r, begin + c] for the count columns of y. One block per row. Moves 2 R count S.
extern "C" __global__ void __launch_bounds__(256) columns_forward(
    real* y, const real* x, int cols, int begin, int count)
{
    u64 row = blockIdx.x;
    put_row(y + row * count, x + row * cols + begin, 1, 0, count);
}

// dx[r, begin + c] = dy[r, c] and zero in the other columns, or adds it. Moves R (count + C) S.
extern "C" __global__ void __launch_bounds__(256) columns_backward(
    real* dx, const real* dy, int cols, int begin, int count, int accumulate)
{
    u64 row = blockIdx.x;
    real *to = dx + row * cols, *behind = to + begin + count;
    put_row(to, 0, 1, accumulate, begin);
    put_row(to + begin, dy + row * count, 1, accumulate, count);
    put_row(behind, 0, 1, accumulate, cols - begin - count);
}

// cache[slots[i]] = x[i]; slots rise, and one behind a slot outside is held to nothing. One block
// per row of x. Moves 2 R C S.
extern "C" __global__ void __launch_bounds__(256) cache_append(
    real* cache, const real* x, const int* slots, int limit, int cols, int* faults)
{
    int i = blockIdx.x, slot = slots[i], before = i > 0 ? slots[i - 1] : -1;
    bool rises = (u32)before >= (u32)limit || slot > before;
    if ((u32)slot >= (u32)limit || !rises)
    {
        if (threadIdx.x == 0) report(faults, FAULT_CACHE_APPEND_SLOTS, i, slot, limit);
        return;
    }
    put_row(cache + (u64)slot * cols, x + (u64)i * cols, 1, 0, cols);
}

// y[i] = x[rows[i]], or adds it; zeros beyond the used rows and where there is no such row. One
// block per row of y. Moves 2 R C S.
extern "C" __global__ void __launch_bounds__(256) gather_rows(
    real* y, const real* x, const int* rows, int used, int tokens, int cols, int accumulate)
{
    int i = blockIdx.x, row = i < used ? rows[i] : -1;
    const real* from = (u32)row < (u32)tokens ? x + (u64)row * cols : 0;
    put_row(y + (u64)i * cols, from, 1, accumulate, cols);
}

// from[positions[i]] = i + 1, where from was 0: which row of the features stands in for a token.
// Of positions that stand twice the later one is reported, whichever comes first here.
extern "C" __global__ void splice_invert(
    int* from, const int* positions, int used, int tokens, int* faults)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= used) return;
    int position = positions[i];
    if ((u32)position >= (u32)tokens)
    {
        report(faults, FAULT_SPLICE_POSITIONS, i, position, tokens);
        return;
    }
    int other = atomicCAS(from + position, 0, i + 1);
    if (other != 0) report(faults, FAULT_SPLICE_REPEATED, max(i, other - 1), position, tokens);
}

// y[t] = features[from[t] - 1], or x[t] where that is 0. One block per token. Moves 2 R C S.
extern "C" __global__ void __launch_bounds__(256) splice_forward(
    real* y, const real* x, const real* features, const int* from, int cols)
{
    int token = blockIdx.x, i = from[token];
    put_row(y + (u64)token * cols, i > 0 ? features + (u64)(i - 1) * cols : x + (u64)token * cols,
        1, 0, cols);
}

// dx[t] = dy[t], or adds it; zero where features stand. Moves 2 R C S.
extern "C" __global__ void __launch_bounds__(256) splice_text_backward(
    real* dx, const real* dy, const int* from, int cols, int accumulate)
{
    int token = blockIdx.x;
    put_row(dx + (u64)token * cols, from[token] > 0 ? 0 : dy + (u64)token * cols, 1,
        accumulate, cols);
}

// ---- 8. low-rank adapters with dropout ----------------------------------------------------------

// The mask of an operation is drawn as bits into scratch, forward and again backward, and not kept.
// Adapters of one input are computed together, at most LORA_ADAPTERS of them: x comes from memory
// once, and dx is written once; h and t have theirs one behind the other. An operation that drops
// nothing needs none of this: then the products below are plain ones.
//
// The kernels multiply on the tensor cores, straight from global memory to registers. Which k, m or
// n of a product means which column or row is free as long as both sides agree; it is chosen here
// such that a lane loads neighbours in a row (16 bytes of x, 8 where a transposed operand is made
// of four rows).

// mask[y, r, w] = the bits of columns 32 w to 32 w + 31 of row r for the adapter whose layer is
// y's: set where the element is kept. Writes rows words 4 bytes for each adapter; a draw for four
// elements, which is what it waits for.
extern "C" __global__ void __launch_bounds__(256) dropout_mask(
    int* mask, int rows, int cols, int words, long long seed, long long step, int layer0,
    int layer1, int layer2, int threshold)
{
    u32 i = blockIdx.x * blockDim.x + threadIdx.x, count = (u32)rows * words, limit = threshold;
    if (i >= count) return;
    u64 element = (u64)(i / words) * cols + i % words * 32, bits = 0;
    u32 layer = blockIdx.y == 0 ? layer0 : blockIdx.y == 1 ? layer1 : layer2;
    u32 block = (u32)(element >> 2), shift = (u32)element & 3;
#pragma unroll
    for (int k = 0; k < 9; k++)
    {
        if (k == 8 && shift == 0) break;
        uint4 draw = philox((u64)seed, (u64)step, layer, block + k);
        u32 kept = (draw.x >= limit) | (draw.y >= limit) << 1 | (draw.z >= limit) << 2
            | (draw.w >= limit) << 3;
        bits |= (u64)kept << 4 * k;
    }
    mask[(u64)blockIdx.y * count + i] = (int)(u32)(bits >> shift);
}

// A product with 0 or 1: a NaN stays one. The factor 1 / (1 - p) comes when sums are done.
DEVICE real2 drop(real2 p, u32 kept)
{
    return narrow_pair(widen_low(p) * (kept & 1 ? 1.0f : 0.0f),
        widen_high(p) * (kept & 2 ? 1.0f : 0.0f));
}

// Four rows of four columns as the b of four products: b[j] is column j.
DEVICE void columns_of(real2 (*b)[2], real2 (*row)[2])
{
#pragma unroll
    for (int i = 0; i < 2; i++)
    {
#pragma unroll
        for (int j = 0; j < 2; j++)
        {
            b[2 * j][i] = lows(row[2 * i][j], row[2 * i + 1][j]);
            b[2 * j + 1][i] = highs(row[2 * i][j], row[2 * i + 1][j]);
        }
    }
}

// More ranks than LORA_RANKS are done by more blocks, which find x in cache.

// Blocks of a multiprocessor that registers must be left for;
// operands of floats take twice as many.
#if defined(STORAGE_BF16)
#define LORA_BLOCKS 2
#else
#define LORA_BLOCKS 1
#endif

// Of up to three adapters the one of a number.
template <typename T> DEVICE T* of_adapter(int n, T* first, T* second, T* third)
{
    return n == 0 ? first : n == 1 ? second : third;
}

// h[n, r, k] = scale * sum over c of mask x[r, c] a_n[k, c], or its sum over the columns of part z
// in part[z, n, r, k]. A block has 32 rows, and 64 ranks of an adapter; its 8 warps take 32 columns
// in turn. Reads R C S of x once from memory, and a from cache; writes h. 2 R C rank FLOP for each
// adapter.
extern "C" __global__ void __launch_bounds__(256, LORA_BLOCKS) lora_down(
    real* h, float* part, const real* x, const int* mask, const real* a0, const real* a1,
    const real* a2, int rows, int cols, int rank, int adapters, int words, int cols_per_part,
    float scale)
{
    static_assert(LORA_DOWN_ROWS == 32 && LORA_DOWN_COLS == 8 * 32, "what eight warps have");
    __shared__ float sums[8][2][32][8];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    int chunks = (rank + LORA_RANKS - 1) / LORA_RANKS, chunk = blockIdx.x % (chunks * adapters);
    int first_row = blockIdx.x / (chunks * adapters) * LORA_DOWN_ROWS;
    int adapter = chunk / chunks, first_rank = chunk % chunks * LORA_RANKS;
    int ranks = min(LORA_RANKS, rank - first_rank);
    int begin = blockIdx.z * cols_per_part, end = min(cols, begin + cols_per_part);
    const real* a = of_adapter(adapter, a0, a1, a2);
    bool wide = aligned16(x, cols, sizeof(real)) && aligned16(a, cols, sizeof(real));
    float d[2][LORA_RANKS / 8][4] = {};
    const real* own_x = x + (u64)(first_row + g) * cols;
    const real* own_a = a + (u64)(first_rank + g) * cols;
    // A lane has the mask of a row.
    const int* own_mask = mask + ((u64)adapter * rows + first_row + lane) * words;
#pragma unroll 1
    for (int base = begin + warp * 32; base < end; base += LORA_DOWN_COLS)
    {
        u32 word = first_row + lane < rows ? (u32)own_mask[base / 32] : 0;
        // Of the 32 columns 8t to 8t + 3 are k = 2t, 2t + 1, 2t + 8, 2t + 9 of a first product, 8t
        // + 4 to 8t + 7 of a second.
        int c = base + 8 * t;
        real2 left[2][2][4];
        // Offsets hidden from the compiler, which would keep all addresses and spill.
        u32 at_x = 0, at_a = 0;
#pragma unroll
        for (int i = 0; i < 4; i++)
        {
            int r = g + 8 * i;
            real2 p[4];
            load_pairs<8>(p, own_x + at_x, c, first_row + r < rows ? end : 0, wide);
            at_x += 8 * cols;
            asm("" : "+r"(at_x));
            u32 keep = __shfl_sync(ALL_LANES, word, r) >> 8 * t;
#pragma unroll
            for (int j = 0; j < 4; j++)
                left[i / 2][j / 2][j % 2 * 2 + i % 2] = drop(p[j], keep >> 2 * j);
        }
#pragma unroll
        for (int n = 0; n < LORA_RANKS / 8; n++)
        {
            if (n * 8 >= ranks) break;
            real2 right[4];
            load_pairs<8>(right, own_a + at_a, c, n * 8 + g < ranks ? end : 0, wide);
            at_a += 8 * cols;
            asm("" : "+r"(at_a));
#pragma unroll
            for (int m = 0; m < 2; m++)
            {
                multiply_add_16x8x16(d[m][n], left[m][0], right);
                multiply_add_16x8x16(d[m][n], left[m][1], right + 2);
            }
        }
    }
    // The warps' sums are added in order, 16 ranks at a time.
#pragma unroll
    for (int n = 0; n < LORA_RANKS / 8; n += 2)
    {
        if (n * 8 >= ranks) break;
#pragma unroll
        for (int i = 0; i < 4; i++)
        {
            float* from = d[i / 2][n + i % 2];
            float(*to)[8] = sums[warp][i % 2] + i / 2 * 16 + g;
            *(float2*)&to[0][2 * t] = make_float2(from[0], from[1]);
            *(float2*)&to[8][2 * t] = make_float2(from[2], from[3]);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < 32 * 16; i += 256)
        {
            int r = first_row + i / 16, k = n * 8 + i % 16;
            float sum = 0;
#pragma unroll
            for (int w = 0; w < 8; w++) sum += sums[w][i % 16 / 8][i / 16][i % 8];
            if (r >= rows || k >= ranks) continue;
            u64 at = (u64)(adapter * rows + r) * rank + first_rank + k;
            if (part != nullptr)
                part[(u64)(blockIdx.z * adapters * rows) * rank + at] = scale * sum;
            else h[at] = narrow(scale * sum);
        }
        __syncthreads();
    }
}

// h[i] = sum of part[p, i] over p, in order.
extern "C" __global__ void __launch_bounds__(256) lora_down_parts(
    real* h, const float* part, int parts, long long count)
{
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float sum = 0;
    for (int p = 0; p < parts; p++) sum += part[p * count + i];
    h[i] = narrow(sum);
}

// dx[r, c] = scale * sum over n of mask_n * sum over k of t[n, r, k] a_n[k, c], or adds it. A warp
// has 32 rows, 16 at a time, and 32 columns, a block 2 x 4 of them. Writes (or reads and writes)
// R C S of dx, the rest from cache. 2 R C rank FLOP for each adapter.
extern "C" __global__ void __launch_bounds__(256, LORA_BLOCKS) lora_gradient_x(
    real* dx, const real* t, const int* mask, const real* a0, const real* a1, const real* a2,
    int rows, int cols, int rank, int adapters, int words, int accumulate, float scale)
{
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, q = lane % 4;
    static_assert(LORA_X_ROWS == 2 * 32 && LORA_X_COLS == 4 * 32, "what eight warps have");
    int first_col = blockIdx.y * LORA_X_COLS + warp % 4 * 32, c = first_col + 8 * q;
    bool wide = aligned16(dx, cols, sizeof(real)), wide_t = aligned16(t, rank, sizeof(real));
#pragma unroll 1
    for (int half = 0; half < 2; half++)
    {
        int first_row = blockIdx.x * LORA_X_ROWS + warp / 4 * 32 + half * 16 + g;
        float sum[2][8] = {};
#pragma unroll 1
        for (int n = 0; n < adapters; n++)
        {
            const real *a = of_adapter(n, a0, a1, a2), *own_t = t + (u64)n * rows * rank;
            bool wide_a = aligned16(a, cols, sizeof(real));
            float d[4][4] = {};
            for (int base = 0; base < rank; base += 16)
            {
                // Ranks 4q to 4q + 3 are k = 2q, 2q + 1, 2q + 8, 2q + 9; column 4n + j is n of
                // product j.
                real2 left[4], row[4][2], right[4][2];
#pragma unroll
                for (int i = 0; i < 2; i++)
                {
                    int r = first_row + 8 * i;
                    real2 p[2];
                    load_pairs<4>(
                        p, own_t + (u64)r * rank, base + 4 * q, r < rows ? rank : 0, wide_t);
                    left[i] = p[0];
                    left[2 + i] = p[1];
                }
#pragma unroll
                for (int i = 0; i < 4; i++)
                {
                    int k = base + 4 * q + i;
                    load_pairs<4>(
                        row[i], a + (u64)k * cols, first_col + 4 * g, k < rank ? cols : 0, wide_a);
                }
                columns_of(right, row);
#pragma unroll
                for (int j = 0; j < 4; j++) multiply_add_16x8x16(d[j], left, right[j]);
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
            {
                int r = first_row + 8 * i;
                if (r >= rows || first_col >= cols) continue;
                u32 keep = (u32)mask[((u64)n * rows + r) * words + first_col / 32] >> 8 * q;
#pragma unroll
                for (int j = 0; j < 8; j++)
                    sum[i][j] += d[j % 4][i * 2 + j / 4] * (keep >> j & 1 ? scale : 0.0f);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
        {
            int r = first_row + 8 * i;
            if (r >= rows || c >= cols) continue;
            real2 values[4];
            load_pairs<8>(values, dx + (u64)r * cols, c, accumulate ? cols : 0, wide);
#pragma unroll
            for (int j = 0; j < 4; j++)
                values[j] = narrow_pair(widen_low(values[j]) + sum[i][2 * j],
                    widen_high(values[j]) + sum[i][2 * j + 1]);
            store_pairs(dx + (u64)r * cols, values, c, cols, wide);
        }
    }
}

// da_n[y, k, c] = scale * sum of t[n, r, k] mask_n x[r, c] over the rows r of part y, or adds it
// where bit n of accumulate is set; a da that is not there is not wanted. A block has 32 columns,
// and 64 ranks of an adapter, each of its 8 warps 16 rows in turn. Reads R C S of x once from
// memory, t from cache; writes 4 rank C for each adapter and part. 2 R C rank FLOP for each.
extern "C" __global__ void __launch_bounds__(256, LORA_BLOCKS) lora_gradient_a(
    float* da0, float* da1, float* da2, const real* t, const real* x, const int* mask, int rows,
    int cols, int rank, int adapters, int words, int rows_per_part, int accumulate, float scale)
{
    static_assert(LORA_A_ROWS == 8 * 16 && LORA_A_COLS == 32, "what eight warps have");
    __shared__ float sums[8][16][32];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, q = lane % 4;
    int chunks = (rank + LORA_RANKS - 1) / LORA_RANKS, adapter = blockIdx.z / chunks;
    int first_col = blockIdx.x * LORA_A_COLS, first_rank = blockIdx.z % chunks * LORA_RANKS;
    int ranks = min(LORA_RANKS, rank - first_rank);
    int begin = blockIdx.y * rows_per_part, end = min(rows, begin + rows_per_part);
    float* da = of_adapter(adapter, da0, da1, da2);
    if (da == nullptr) return;
    accumulate = accumulate >> adapter & 1;
    bool wide = aligned16(x, cols, sizeof(real)), wide_t = aligned16(t, rank, sizeof(real));
    const int* own_mask = mask + (u64)adapter * rows * words + blockIdx.x;
    float d[LORA_RANKS / 16][4][4] = {};
    for (int base = begin + warp * 16; base < end; base += LORA_A_ROWS)
    {
        // Rows 4q to 4q + 3 are k = 2q, 2q + 1, 2q + 8, 2q + 9; column 4n + j is n of product j,
        // and ranks 2g and 2g + 1 are m = g and g + 8.
        int c = first_col + 4 * g;
        real2 row[4][2], right[4][2];
#pragma unroll
        for (int i = 0; i < 4; i++)
        {
            int r = base + 4 * q + i;
            load_pairs<4>(row[i], x + (u64)r * cols, c, r < end ? cols : 0, wide);
            u32 keep = r < end ? (u32)own_mask[(u64)r * words] >> 4 * g : 0;
            row[i][0] = drop(row[i][0], keep);
            row[i][1] = drop(row[i][1], keep >> 2);
        }
        columns_of(right, row);
#pragma unroll
        for (int m = 0; m < LORA_RANKS / 16; m++)
        {
            if (m * 16 >= ranks) break;
            real2 p[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
            {
                int r = base + 4 * q + i;
                const real* from = t + ((u64)adapter * rows + r) * rank + first_rank;
                load_pairs<2>(p + i, from, m * 16 + 2 * g, r < end ? ranks : 0, wide_t);
            }
            real2 left[4] =
                {lows(p[0], p[1]), highs(p[0], p[1]), lows(p[2], p[3]), highs(p[2], p[3])};
#pragma unroll
            for (int j = 0; j < 4; j++) multiply_add_16x8x16(d[m][j], left, right[j]);
        }
    }
    // The warps' sums are added in order, 16 ranks at a time.
#pragma unroll
    for (int m = 0; m < LORA_RANKS / 16; m++)
    {
        if (m * 16 >= ranks) break;
#pragma unroll
        for (int i = 0; i < 4; i++)
            *(float4*)&sums[warp][2 * g + i / 2][8 * q + i % 2 * 4] =
                make_float4(d[m][0][i], d[m][1][i], d[m][2][i], d[m][3][i]);
        __syncthreads();
        for (int i = threadIdx.x; i < 16 * 32; i += 256)
        {
            int k = m * 16 + i / 32, c = first_col + i % 32;
            float sum = 0;
#pragma unroll
            for (int w = 0; w < 8; w++) sum += sums[w][i / 32][i % 32];
            if (k >= ranks || c >= cols) continue;
            float* to = da + ((u64)blockIdx.y * rank + first_rank + k) * cols + c;
            *to = accumulate ? *to + scale * sum : scale * sum;
        }
        __syncthreads();
    }
}

// ---- 9. cross-entropy ---------------------------------------------------------------------------

// Reports rows that do not rise within the tokens and targets outside the vocabulary. A row behind
// one outside is not held against it, so that one mistake is one report.
extern "C" __global__ void cross_entropy_check(
    const int* rows, const int* targets, int labels, int tokens, int vocabulary, int* faults)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= labels) return;
    int row = rows[i], before = i > 0 ? rows[i - 1] : -1, target = targets[i];
    bool rises = (u32)before >= (u32)tokens || row > before;
    if ((u32)row >= (u32)tokens || !rises) report(faults, FAULT_CROSS_ENTROPY_ROWS, i, row, tokens);
    if ((u32)target >= (u32)vocabulary)
        report(faults, FAULT_CROSS_ENTROPY_TARGETS, i, target, vocabulary);
}

// One step of the sum of exp(x - max) whose max is only known at the end: a larger x rescales the
// sum. A NaN becomes the max and stays.
DEVICE void add_exponentials(float& max, float& sum, float4 x)
{
    float largest = max_or_nan(max_or_nan(x.x, x.y), max_or_nan(x.z, x.w));
    if (!(largest <= max))
    {
        float raised = max_or_nan(max, largest);
        sum *= expf(max - raised);
        max = raised;
    }
    sum += (expf(x.x - max) + expf(x.y - max)) + (expf(x.z - max) + expf(x.w - max));
}

// Whether a logit takes the first place from the target's.
DEVICE int beats(float x, int c, float own, int target)
{
    return x > own || (x == own && c < target);
}

// Per row of logits: losses = ln sum exp(logits) - logits[target], correct = 1 where the target is
// the first largest, and gradient = scale * (softmax - one at the target), times *by if given;
// losses or gradient may be absent. The gradient takes the logits' place: its rows start where
// theirs do, `stride` floats apart, a multiple of 16 bytes. One block per row; a row of a large
// vocabulary (600 kB) fits no block's registers, so logits are read twice when there is a gradient:
// moves R C (8 + S) bytes with it and 4 R C without, one or two exponentials per element:
// memory-bound.
extern "C" __global__ void __launch_bounds__(LOGITS_THREADS) cross_entropy_rows(
    float* losses, float* correct, real* gradient, const float* logits, const int* targets,
    int vocabulary, int stride, float scale, const float* by)
{
    __shared__ float shared[LOGITS_THREADS / WARP];
    const float* row = logits + (u64)blockIdx.x * stride;
    int target = targets[blockIdx.x], whole = vocabulary / 4 * 4;
    float own = (u32)target < (u32)vocabulary ? row[target] : 0;
    // The lowest float, not -infinity: exp(-infinity - max) is then 0 and not NaN.
    const float lowest = __uint_as_float(0xff7fffffu);
    float max = lowest, sum = 0;
    int beaten = 0;
#pragma unroll 2
    for (int c = threadIdx.x * 4; c < whole; c += LOGITS_THREADS * 4)
    {
        float4 x = *(const float4*)(row + c);
        add_exponentials(max, sum, x);
        beaten |= beats(x.x, c, own, target) | beats(x.y, c + 1, own, target)
            | beats(x.z, c + 2, own, target) | beats(x.w, c + 3, own, target);
    }
    if (whole + threadIdx.x < vocabulary)
    {
        int c = whole + threadIdx.x;
        add_exponentials(max, sum, make_float4(row[c], lowest, lowest, lowest));
        beaten |= beats(row[c], c, own, target);
    }
    float top = block_max(max, shared);
    sum = block_sum(sum * expf(max - top), shared);
    if (losses != 0)
    {
        beaten = block_max(beaten, shared) > 0;
        if (threadIdx.x == 0)
        {
            losses[blockIdx.x] = logf(sum) - (own - top);
            correct[blockIdx.x] = own - top == 0 && !beaten ? 1 : 0;
        }
    }
    if (gradient == 0) return;
    if (by != 0) scale *= *by;
    float factor = scale / sum;
    // Element c is written over float c / 2 or c, which was read in this round or before it.
    real* out = (real*)((float*)gradient + (u64)blockIdx.x * stride);
    for (int first = 0; first < vocabulary; first += LOGITS_THREADS * VECTOR)
    {
        int c = first + threadIdx.x * VECTOR;
        float v[VECTOR];
        if (c + VECTOR <= vocabulary) load_floats(v, row + c);
        else
        {
#pragma unroll
            for (int i = 0; i < VECTOR; i++) v[i] = c + i < vocabulary ? row[c + i] : 0;
        }
#pragma unroll
        for (int i = 0; i < VECTOR; i++)
            v[i] = expf(v[i] - top) * factor - (c + i == target ? scale : 0);
        __syncthreads();
        // Rows are padded to whole vectors, which no product reads.
        if (c < vocabulary) store_vector(out + c, v);
    }
}

// loss = sum of losses, in double and in a fixed order: 100,000 labels lose nothing. One block.
extern "C" __global__ void __launch_bounds__(256) cross_entropy_sum(
    float* loss, const float* losses, int labels)
{
    __shared__ double sums[256];
    double sum = 0;
    for (int i = threadIdx.x; i < labels; i += 256) sum += losses[i];
    sums[threadIdx.x] = sum;
    for (int half = 128; half > 0; half /= 2)
    {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) loss[0] = (float)sums[0];
}

// dh[rows[i]] = *by * saved[i], or adds it; zero in rows without a label. One block per token,
// which looks for itself among the rising rows. Moves (tokens + labels) C S.
extern "C" __global__ void __launch_bounds__(256) cross_entropy_scatter(
    real* dh, const real* saved, const int* rows, int labels, const float* by, int cols,
    int accumulate)
{
    int token = blockIdx.x, low = 0, high = labels;
    while (low < high)
    {
        int middle = (low + high) / 2;
        if (rows[middle] < token) low = middle + 1;
        else high = middle;
    }
    bool labelled = low < labels && rows[low] == token;
    put_row(dh + (u64)token * cols, labelled ? saved + (u64)low * cols : 0, *by, accumulate, cols);
}

// ---- 10. attention, forward ---------------------------------------------------------------------

// -- matrix instructions: operands of multiply_add_16x8x16, in its letters --
//
// The d of two products side by side, narrowed, is the a of the next one (narrow_left).
//
// load_matrix_x4 reads four 8x8 matrices M from shared memory: lanes 8m to 8m + 7 give the
// addresses of the rows of matrix m, r[m] gets M[g][2t, 2t + 1], or M[2t, 2t + 1][g] when
// transposed. Every operand is two by two of them, two rows of matrices by two columns of them, in
// one of two orders:
//   down first:   row lane % 16, chunk lane / 16. A from rows m;
// transposed, B from rows k: r[0], r[1]
//                 are b for n = 0 to 7, r[2], r[3] for n = 8 to 15.
//   across first: row lane / 16 * 8 + lane % 8, chunk lane / 8 % 2. B from rows n, in the same
//                 registers; transposed, A from rows k.

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

DEVICE void load_matrix_x4(u32* r, u32 address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

DEVICE void load_matrix_x4_transposed(u32* r, u32 address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// Starts a copy of 16 bytes to shared memory, of zeros when not valid; both addresses are multiples
// of 16. The copying thread may read them after wait_copies, others after a barrier behind that.
DEVICE void copy_async_16(u32 address, const void* from, bool valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
        :: "r"(address), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

DEVICE void copy_async_8(u32 address, const void* from, bool valid)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
        :: "r"(address), "l"(from), "r"(valid ? 8 : 0) : "memory");
}

// Closes a group of copies.
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until no more than the N latest groups are on their way.
template <int N> DEVICE void wait_copies()
{
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}

// A tile of rows of CHUNKS x 16 bytes in shared memory, at a multiple of 256 bytes, or of a row's
// where that is longer. Chunks change places within a row so that eight rows' same chunk, which one
// matrix is, lies in 32 different banks: the order repeats every eight rows.
template <int CHUNKS> DEVICE u32 tile_address(u32 tile, int row, int chunk)
{
    static_assert(CHUNKS % 2 == 0, "no order for this width");
    int order = CHUNKS % 8 == 0 ? row % 8 : CHUNKS % 8 == 4 ? row / 2 % 4 : row / 4 % 2;
    return tile + (row * CHUNKS + (chunk ^ order)) * 16;
}

// From the address of a row's chunk 0 to that so many rows (a multiple of 8) and chunks further, or
// from that of chunk 1 an even number of chunks: for constants, next to no arithmetic and few
// registers.
template <int CHUNKS> DEVICE u32 tile_step(u32 address, int rows, int chunks)
{
    int turned = CHUNKS % 8 == 0 ? chunks : chunks % (CHUNKS % 8 == 4 ? 4 : 2);
    return (address ^ turned * 16) + (chunks - turned + rows * CHUNKS) * 16;
}

#if defined(STORAGE_BF16)

// The d of two products, columns 0 to 7 and 8 to 15, as the a of the next.
DEVICE void narrow_left(u32* a, const float* left, const float* right)
{
    a[0] = narrow2(left[0], left[1]);
    a[1] = narrow2(left[2], left[3]);
    a[2] = narrow2(right[0], right[1]);
    a[3] = narrow2(right[2], right[3]);
}

// Chunks of a tile's row of DIM elements: products take them 16 by 16.
#define TILE_CHUNKS(DIM) (((DIM) + 15) / 16 * 2)

// Starts the copy of a tile of ROWS rows of DIM elements that lie stride elements apart; rows from
// `rows` on and columns from DIM on become zeros. For a block of THREADS threads: eight of them
// take 128 bytes of a row, as many as there are chunks what may be left.
template <int DIM, int ROWS, int THREADS>
DEVICE void copy_tile(u32 tile, const real* from, int stride, int rows)
{
    constexpr int CHUNKS = TILE_CHUNKS(DIM), REST = CHUNKS % 8, LINES = CHUNKS - REST;
    static_assert(DIM % 8 == 0 && ROWS % (THREADS / 8) == 0, "threads take equal shares");
    int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
    u32 address = tile_address<CHUNKS>(tile, row, chunk); // 8 rows or chunks on, the same order
    const real* line = from + row * stride + chunk * 8;
#pragma unroll
    for (int step = 0; step < ROWS; step += THREADS / 8)
    {
#pragma unroll
        for (int c = 0; c < LINES; c += 8)
            copy_async_16(address + (step * CHUNKS + c) * 16, line + c * 8, row + step < rows);
        line += THREADS / 8 * stride;
    }
#pragma unroll
    for (int first = 0; first < ROWS * REST; first += THREADS)
    {
        int i = first + threadIdx.x;
        row = i / (REST + (REST == 0));
        chunk = LINES + i % (REST + (REST == 0));
        if (i < ROWS * REST)
            copy_async_16(tile_address<CHUNKS>(tile, row, chunk), from + row * stride + chunk * 8,
                row < rows && chunk * 8 < DIM);
    }
}

#endif

// -- packed sequences --

// The arguments that say which query sees which key, as the kernels take them.
struct AttentionMask
{
    const int *starts_q, *starts_k; // [sequences + 1]
    const int* key_lengths;         // [sequences]; may be null
    int sequences, tokens, key_tokens;
    int causal; // 1: the last query's own key is the last one; 2: it is the last that counts
};

// A tile of one sequence's queries, or keys. Queries and keys count within the sequence.
struct SequenceTile
{
    int first_token, queries, first_key_token, keys, sequence;
    int visible; // keys that are not masked for all
    int before;  // keys that stand before the first query's own, where the mask is causal
    int first;   // of the tile
};

// Keys that a query sees.
DEVICE int keys_seen(int causal, const SequenceTile& at, int query)
{
    return causal ? max(0, min(at.visible, query + 1 + at.before)) : at.visible;
}

// Finds tile number `tile` of `rows` queries (or keys) each, counted over the sequences; false when
// there are fewer. Every warp looks for itself, a sequence per lane; sequences outside the tokens
// have none.
DEVICE bool find_tile(SequenceTile& at, const AttentionMask& mask, int tile, int rows, bool of_keys)
{
    int lane = threadIdx.x % WARP;
    for (int base = 0; base < mask.sequences; base += WARP)
    {
        int s = base + lane, tiles = 0;
        if (s < mask.sequences)
        {
            int q = mask.starts_q[s], q_end = mask.starts_q[s + 1];
            int k = mask.starts_k[s], k_end = mask.starts_k[s + 1];
            bool inside = 0 <= q && q <= q_end && q_end <= mask.tokens
                && 0 <= k && k <= k_end && k_end <= mask.key_tokens;
            if (inside) tiles = ((of_keys ? k_end - k : q_end - q) + rows - 1) / rows;
        }
        int end = tiles; // the sum up to this lane
        for (int step = 1; step < WARP; step *= 2)
        {
            int before = __shfl_up_sync(ALL_LANES, end, step);
            if (lane >= step) end += before;
        }
        u32 behind = __ballot_sync(ALL_LANES, tile < end);
        if (behind == 0)
        {
            tile -= __shfl_sync(ALL_LANES, end, WARP - 1);
            continue;
        }
        int owner = __ffs(behind) - 1;
        s = base + owner;
        at.first = (tile - __shfl_sync(ALL_LANES, end - tiles, owner)) * rows;
        at.sequence = s;
        at.first_token = mask.starts_q[s];
        at.queries = mask.starts_q[s + 1] - at.first_token;
        at.first_key_token = mask.starts_k[s];
        at.keys = mask.starts_k[s + 1] - at.first_key_token;
        at.visible = at.keys;
        if (mask.key_lengths) at.visible = max(0, min(at.keys, mask.key_lengths[s]));
        at.before = (mask.causal == 2 ? at.visible : at.keys) - at.queries;
        return true;
    }
    return false;
}

// Takes tile number `tile` of `rows` queries (or keys) each from a list that AttentionTiles.cs
// describes, which says longest work first; false behind the end of a sequence or of the list.
DEVICE bool take_tile(SequenceTile& at, const int4* tiles, int tile, int rows, bool of_keys,
    const int* key_lengths, int causal)
{
    int of_row = ATTENTION_TILE_ROWS / rows;
    int4 tokens = tiles[2 * (tile / of_row)], place = tiles[2 * (tile / of_row) + 1];
    at.first_token = tokens.x;
    at.queries = tokens.y;
    at.first_key_token = tokens.z;
    at.keys = tokens.w;
    at.first = place.y + tile % of_row * rows;
    at.visible = key_lengths ? max(0, min(at.keys, key_lengths[place.x])) : at.keys;
    at.before = (causal == 2 ? at.visible : at.keys) - at.queries;
    return at.first < (of_keys ? at.keys : at.queries);
}

DEVICE void check_starts(int* faults, const AttentionMask& mask)
{
    check_starts(
        faults, FAULT_ATTENTION_QUERY_STARTS, mask.starts_q, mask.sequences, mask.tokens);
    check_starts(
        faults, FAULT_ATTENTION_KEY_STARTS, mask.starts_k, mask.sequences, mask.key_tokens);
}

// The list of tiles where only the device knows the starts: the last tiles of queries first, as
// causal ones have the most keys, and the first tiles of keys, which the most queries see; rows of
// zeros behind the last. A warp per row, which are tokens / 128 + sequences at most; checks the
// starts. Writes 32 bytes a row.
extern "C" __global__ void __launch_bounds__(256) attention_tiles(
    int* tiles, const int* starts_q, const int* starts_k, int* faults, int sequences, int tokens,
    int key_tokens, int count, int of_keys)
{
    AttentionMask mask = {starts_q, starts_k, 0, sequences, tokens, key_tokens, 0};
    if (blockIdx.x == 0) check_starts(faults, mask);
    int row = blockIdx.x * 8 + threadIdx.x / WARP;
    if (row >= count) return;
    SequenceTile at;
    bool found = find_tile(
        at, mask, of_keys ? row : count - 1 - row, ATTENTION_TILE_ROWS, of_keys);
    if (threadIdx.x % WARP != 0) return;
    int4 none = make_int4(0, 0, 0, 0);
    int4* into = (int4*)tiles + 2 * row;
    into[0] = found ? make_int4(at.first_token, at.queries, at.first_key_token, at.keys) : none;
    into[1] = found ? make_int4(at.sequence, at.first, 0, 0) : none;
}

// -- softmax, tile by tile (Milakov and Gimelshein 2018) --
//
// s is a raw score q.k, p = 2^(factor s - offset) with factor = scale log2(e) and offset = factor
// times the row's largest s so far, so that no p is above 1. fmaxf drops a NaN, but its own p keeps
// it; an infinite score gives one, as infinity - infinity.

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f
#define MINUS_INFINITY __int_as_float(0xff800000)

// 2^x, a few units in the last place; 0 for -infinity and where floats have few bits left.
DEVICE float exp2_approx(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Where no key was seen the maximum is -infinity; 0 in its place gives p = 0.
DEVICE float softmax_offset(float max, float factor)
{
    return max == MINUS_INFINITY ? 0 : __fmul_rn(max, factor);
}

// What p and sums under the maximum `before` shrink by.
DEVICE float softmax_keep(float before, float offset, float factor)
{
    return exp2_approx(__fmul_rn(before, factor) - offset);
}

// ln of the sum of exp(scale s) from the sum of p; the rounding of the offset is taken back, since
// it is large where scores are. A sum of 0 is that of no keys, or of scores that are all -infinity,
// of which there is no softmax: NaN.
DEVICE float log_sum_exp(float max, float sum, float scale, float factor, bool sees)
{
    if (sum == 0) return sees ? 0 / sum : MINUS_INFINITY;
    float rounding = fmaf(max, factor, -__fmul_rn(max, factor));
    return fmaf(max, scale, logf(sum) - rounding * LN_2);
}

#if defined(STORAGE_BF16)

#if SMALL_SHARED
#define SMALL_TILES true // blocks have no more than 99 KiB of shared memory, here and in backward
#else
#define SMALL_TILES false
#endif

// A block has ROWS queries, each warp BLOCKS x 16 of them, and takes KEYS keys at a time. Shared
// memory: a tile of queries, two of keys, one of values: 80 KiB for DIM 128.
template <int DIM> struct ForwardTiles
{
    static constexpr int BLOCKS = DIM > 128 ? 1 : 2, WARPS = DIM > 128 && !SMALL_TILES ? 8 : 4;
    static constexpr int ROWS = 16 * BLOCKS * WARPS, KEYS = DIM > 128 && SMALL_TILES ? 32 : 64;
    static constexpr int THREADS = WARPS * WARP, CHUNKS = TILE_CHUNKS(DIM);
    static constexpr int RESIDENT = DIM > 128 ? 1 : 2; // on a multiprocessor
};

struct AttentionForwardCall
{
    real* o;
    float* lse;
    const real *q, *k, *v;
    const int4* tiles;      // of queries, as AttentionTiles.cs lists them
    const int* key_lengths; // may be null
    int heads, kv_heads, causal;
    float scale;
};

// o = softmax(scale q k^T + mask) v and lse = ln(sum exp(scale q k^T)) for a tile of queries of one
// sequence and head; 0 and -infinity for a query that sees no key. q and o [tokens, heads, DIM], k
// and v [key tokens, kv_heads, DIM], lse [tokens, heads]; Dao et al. 2022, Dao 2023.
//
// Grid: a block per head and tile of the list, the heads of a tile neighbours. Scores and output
// are in registers; matrices of keys and values from shared memory serve two blocks of 16 queries.
// Keys come a tile ahead, values while their scores are computed. What was summed is rescaled only
// when a row's maximum has risen by a factor of 2^8: p is at most that then. 4 DIM FLOP per query
// and key seen, plus what the mask cuts from the last tiles; q and o move once, k and v once per
// tile of queries and head, mostly from L2.
template <int DIM> DEVICE void attention_forward_tile(const AttentionForwardCall& a)
{
    using F = ForwardTiles<DIM>;
    constexpr int BLOCKS = F::BLOCKS, ROWS = F::ROWS, KEYS = F::KEYS, THREADS = F::THREADS;
    constexpr int CHUNKS = F::CHUNKS, KEY_BYTES = KEYS * CHUNKS * 16;
    constexpr float MOST_RISE = 8;
    alignas(1024) extern __shared__ uint4 attention_shared[];
    SequenceTile at;
    int head = blockIdx.x % a.heads, number = blockIdx.x / a.heads;
    if (!take_tile(at, a.tiles, number, ROWS, false, a.key_lengths, a.causal)) return;

    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    int kv_stride = a.kv_heads * DIM, own = 16 * BLOCKS * warp; // this warp's first query
    u64 key_at = ((u64)at.first_key_token * a.kv_heads + head / (a.heads / a.kv_heads)) * DIM;
    int queries = min(ROWS, at.queries - at.first);
    int end = keys_seen(a.causal, at, at.first + queries - 1);
    // Keys that the warp's first query sees; every other one sees one more, where that is causal.
    int seen_first = a.causal ? at.first + own + 1 + at.before : at.visible;

    u32 query_tile = shared_address(attention_shared), key_tiles = query_tile + ROWS * CHUNKS * 16;
    u32 values = key_tiles + 2 * KEY_BYTES;
    copy_tile<DIM, ROWS, THREADS>(query_tile,
        a.q + ((u64)(at.first_token + at.first) * a.heads + head) * DIM, a.heads * DIM, queries);
    copy_tile<DIM, KEYS, THREADS>(key_tiles, a.k + key_at, kv_stride, end);
    commit_copies();
    // This lane's addresses of matrices, down first and across first.
    u32 query_lane = tile_address<CHUNKS>(query_tile, own + lane % 16, lane / 16);
    u32 value_lane = tile_address<CHUNKS>(values, lane % 16, lane / 16);
    u32 key_lane = tile_address<CHUNKS>(key_tiles, lane / 16 * 8 + lane % 8, lane / 8 % 2);

    float factor = a.scale * LOG2_E, max[BLOCKS][2], sum[BLOCKS][2] = {};
#pragma unroll
    for (int m = 0; m < BLOCKS; m++) max[m][0] = max[m][1] = MINUS_INFINITY;
    float out[BLOCKS][DIM / 8][4] = {};
    for (int first = 0; first < end; first += KEYS)
    {
        // Seen as new in every round, so that what follows from it does not fill registers.
        asm volatile("" : "+r"(seen_first));
        wait_copies<0>();
        __syncthreads(); // keys are here, values and the other keys may be overwritten
        copy_tile<DIM, KEYS, THREADS>(values, a.v + key_at, kv_stride, end - first);
        commit_copies();
        key_at += (u64)KEYS * kv_stride;
        u32 keys = key_lane + first / KEYS % 2 * KEY_BYTES;
        if (first + KEYS < end)
            copy_tile<DIM, KEYS, THREADS>(key_tiles + (first / KEYS + 1) % 2 * KEY_BYTES,
                a.k + key_at, kv_stride, end - first - KEYS);
        commit_copies();

        float s[BLOCKS][KEYS / 8][4] = {};
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk += 2)
        {
            u32 query[BLOCKS][4];
#pragma unroll
            for (int m = 0; m < BLOCKS; m++)
                load_matrix_x4(query[m], tile_step<CHUNKS>(query_lane, 16 * m, chunk));
#pragma unroll
            for (int n = 0; n < KEYS / 8; n += 2)
            {
                u32 key[4];
                load_matrix_x4(key, tile_step<CHUNKS>(keys, 8 * n, chunk));
#pragma unroll
                for (int m = 0; m < BLOCKS; m++)
                {
                    multiply_add_16x8x16(s[m][n], query[m], key);
                    multiply_add_16x8x16(s[m][n + 1], query[m], key + 2);
                }
            }
        }

        if (first + KEYS > min(seen_first, at.visible))
        {
#pragma unroll
            for (int m = 0; m < 2 * BLOCKS; m++)
            {
                int seen = min(at.visible, seen_first + (a.causal ? 8 * m + g : 0)) - first - 2 * t;
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        if (8 * n + i >= seen) s[m / 2][n][m % 2 * 2 + i] = MINUS_INFINITY;
            }
        }
        float highest[BLOCKS][2];
        bool rises = false;
#pragma unroll
        for (int m = 0; m < BLOCKS; m++)
#pragma unroll
            for (int i = 0; i < 2; i++)
            {
                float row = max[m][i];
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
                    row = fmaxf(row, fmaxf(s[m][n][2 * i], s[m][n][2 * i + 1]));
                row = fmaxf(row, __shfl_xor_sync(ALL_LANES, row, 1));
                row = fmaxf(row, __shfl_xor_sync(ALL_LANES, row, 2));
                highest[m][i] = row;
                rises |= row * factor > max[m][i] * factor + MOST_RISE;
            }
        if (__any_sync(ALL_LANES, rises))
        {
#pragma unroll
            for (int m = 0; m < BLOCKS; m++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                {
                    float keep = softmax_keep(
                        max[m][i], softmax_offset(highest[m][i], factor), factor);
                    max[m][i] = highest[m][i];
                    sum[m][i] *= keep; // this lane's share
#pragma unroll
                    for (int n = 0; n < DIM / 8; n++)
                    {
                        out[m][n][2 * i] *= keep;
                        out[m][n][2 * i + 1] *= keep;
                    }
                }
        }
        float offset[BLOCKS][2];
#pragma unroll
        for (int m = 0; m < BLOCKS; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) offset[m][i] = softmax_offset(max[m][i], factor);

        wait_copies<1>();
        __syncthreads(); // values are here
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++)
        {
            u32 p[BLOCKS][4];
#pragma unroll
            for (int m = 0; m < BLOCKS; m++)
            {
#pragma unroll
                for (int n = 2 * step; n < 2 * step + 2; n++)
                {
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        s[m][n][i] = exp2_approx(fmaf(s[m][n][i], factor, -offset[m][i / 2]));
                    sum[m][0] += s[m][n][0] + s[m][n][1];
                    sum[m][1] += s[m][n][2] + s[m][n][3];
                }
                narrow_left(p[m], s[m][2 * step], s[m][2 * step + 1]);
            }
#pragma unroll
            for (int n = 0; n < DIM / 8; n += 2)
            {
                u32 value[4];
                load_matrix_x4_transposed(value, tile_step<CHUNKS>(value_lane, 16 * step, n));
#pragma unroll
                for (int m = 0; m < BLOCKS; m++)
                {
                    multiply_add_16x8x16(out[m][n], p[m], value);
                    if (n + 1 < DIM / 8) multiply_add_16x8x16(out[m][n + 1], p[m], value + 2);
                }
            }
        }
    }
    if (end == 0)
    {
        wait_copies<0>();
        __syncthreads(); // nobody copies into what is written next
    }

    // Again, since registers are scarce in between: seen as another number.
    number = blockIdx.x;
    asm volatile("" : "+r"(number));
    head = number % a.heads;
    take_tile(at, a.tiles, number / a.heads, ROWS, false, a.key_lengths, a.causal);
    queries = min(ROWS, at.queries - at.first);
    int token = at.first_token + at.first;
    // Through shared memory, the warp's own rows of the queries' tile, to stores of 16 bytes.
    char* tile = (char*)attention_shared;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < 2 * BLOCKS; m++)
    {
        float total = sum[m / 2][m % 2];
        total += __shfl_xor_sync(ALL_LANES, total, 1);
        total += __shfl_xor_sync(ALL_LANES, total, 2);
        int r = own + 8 * m + g;
        bool sees = keys_seen(a.causal, at, at.first + r) > 0;
        float inverse = total == 0 && !sees ? 0 : 1 / total;
        if (t == 0 && r < queries)
            a.lse[(u64)(token + r) * a.heads + head]
                = log_sum_exp(max[m / 2][m % 2], total, a.scale, factor, sees);
#pragma unroll
        for (int n = 0; n < DIM / 8; n++)
        {
            const float* pair = out[m / 2][n] + m % 2 * 2;
            *(u32*)(tile + tile_address<CHUNKS>(0, r, n) + 4 * t)
                = narrow2(pair[0] * inverse, pair[1] * inverse);
        }
    }
    __syncwarp();
    for (int i = lane; i < 16 * BLOCKS * (DIM / 8); i += WARP)
    {
        int r = own + i / (DIM / 8), chunk = i % (DIM / 8);
        if (r < queries)
            *(uint4*)(a.o + ((u64)(token + r) * a.heads + head) * DIM + 8 * chunk)
                = *(uint4*)(tile + tile_address<CHUNKS>(0, r, chunk));
    }
}

// For the head dimensions of the models.
extern "C" __global__ void
__launch_bounds__(ForwardTiles<64>::THREADS, ForwardTiles<64>::RESIDENT) attention_forward_64(
    real* o, float* lse, const real* q, const real* k, const real* v, const int* tiles,
    const int* key_lengths, int heads, int kv_heads, int causal, float scale)
{
    attention_forward_tile<64>(
        {o, lse, q, k, v, (const int4*)tiles, key_lengths, heads, kv_heads, causal, scale});
}

extern "C" __global__ void
__launch_bounds__(ForwardTiles<72>::THREADS, ForwardTiles<72>::RESIDENT) attention_forward_72(
    real* o, float* lse, const real* q, const real* k, const real* v, const int* tiles,
    const int* key_lengths, int heads, int kv_heads, int causal, float scale)
{
    attention_forward_tile<72>(
        {o, lse, q, k, v, (const int4*)tiles, key_lengths, heads, kv_heads, causal, scale});
}

extern "C" __global__ void
__launch_bounds__(ForwardTiles<80>::THREADS, ForwardTiles<80>::RESIDENT) attention_forward_80(
    real* o, float* lse, const real* q, const real* k, const real* v, const int* tiles,
    const int* key_lengths, int heads, int kv_heads, int causal, float scale)
{
    attention_forward_tile<80>(
        {o, lse, q, k, v, (const int4*)tiles, key_lengths, heads, kv_heads, causal, scale});
}

extern "C" __global__ void
__launch_bounds__(ForwardTiles<96>::THREADS, ForwardTiles<96>::RESIDENT) attention_forward_96(
    real* o, float* lse, const real* q, const real* k, const real* v, const int* tiles,
    const int* key_lengths, int heads, int kv_heads, int causal, float scale)
{
    attention_forward_tile<96>(
        {o, lse, q, k, v, (const int4*)tiles, key_lengths, heads, kv_heads, causal, scale});
}

extern "C" __global__ void
__launch_bounds__(ForwardTiles<128>::THREADS, ForwardTiles<128>::RESIDENT) attention_forward_128(
    real* o, float* lse, const real* q, const real* k, const real* v, const int* tiles,
    const int* key_lengths, int heads, int kv_heads, int causal, float scale)
{
    attention_forward_tile<128>(
        {o, lse, q, k, v, (const int4*)tiles, key_lengths, heads, kv_heads, causal, scale});
}

extern "C" __global__ void
__launch_bounds__(ForwardTiles<256>::THREADS, ForwardTiles<256>::RESIDENT) attention_forward_256(
    real* o, float* lse, const real* q, const real* k, const real* v, const int* tiles,
    const int* key_lengths, int heads, int kv_heads, int causal, float scale)
{
    attention_forward_tile<256>(
        {o, lse, q, k, v, (const int4*)tiles, key_lengths, heads, kv_heads, causal, scale});
}

#endif

// The same for any storage and up to 256 columns per head (dim), in float throughout: a tile of 16
// queries, four per warp; 32 keys at a time, a key per lane for the scores, a column per lane for
// the output. Shared memory: with w = dim rounded up to 32, floats q[16, w], k[32, w + 1], v[32, w
// + 1], zeros behind dim and behind the last key; the odd width puts a column's keys into different
// banks. Grid: 8 blocks per row of the list of tiles and head. 4 dim FLOP per query and key, no
// tensor cores: for float, and for the small heads of tests.
extern "C" __global__ void __launch_bounds__(128) attention_forward_any(
    real* o, float* lse, const real* q, const real* k, const real* v, const int* tiles,
    const int* key_lengths, int heads, int kv_heads, int causal, float scale, int dim)
{
    constexpr int WARPS = 4, ROWS = ATTENTION_ANY_ROWS, KEYS = ATTENTION_ANY_KEYS;
    constexpr int PARTS = ATTENTION_MOST_COLS / WARP;
    static_assert(ROWS == 4 * WARPS && KEYS == WARP, "four rows a warp, a key a lane");
    extern __shared__ float4 attention_any_shared[];
    SequenceTile at;
    int head = blockIdx.x % heads;
    if (!take_tile(at, (const int4*)tiles, blockIdx.x / heads, ROWS, false, key_lengths, causal))
        return;

    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int width = (dim + WARP - 1) / WARP * WARP, kv_head = head / (heads / kv_heads);
    float* query = (float*)attention_any_shared;
    float* key = query + ROWS * width;
    float* value = key + KEYS * (width + 1);
    long long first_row = ((long long)(at.first_token + at.first) * heads + head) * dim;
    long long first_key = ((long long)at.first_key_token * kv_heads + kv_head) * dim;
    int queries = min(ROWS, at.queries - at.first);
    for (int r = warp; r < ROWS; r += WARPS)
        for (int c = lane; c < width; c += WARP)
            query[r * width + c] = r < queries && c < dim
                ? widen(q[first_row + (long long)r * heads * dim + c]) : 0;

    float factor = scale * LOG2_E, max[4], sum[4], out[4][PARTS] = {};
    for (int r = 0; r < 4; r++)
    {
        max[r] = MINUS_INFINITY;
        sum[r] = 0;
    }
    int end = keys_seen(causal, at, at.first + queries - 1);
    for (int first = 0; first < end; first += KEYS)
    {
        __syncthreads();
        for (int r = warp; r < KEYS; r += WARPS)
            for (int c = lane; c < width; c += WARP)
            {
                bool inside = first + r < end && c < dim;
                long long from = first_key + (long long)(first + r) * kv_heads * dim + c;
                key[r * (width + 1) + c] = inside ? widen(k[from]) : 0;
                value[r * (width + 1) + c] = inside ? widen(v[from]) : 0;
            }
        __syncthreads();

        float p[4] = {};
#pragma unroll 1
        for (int d = 0; d < dim; d += 4)
        {
            const float* y = key + lane * (width + 1) + d;
            float y0 = y[0], y1 = y[1], y2 = y[2], y3 = y[3];
#pragma unroll
            for (int r = 0; r < 4; r++)
            {
                float4 x = *(const float4*)(query + (4 * warp + r) * width + d);
                p[r] += x.x * y0 + x.y * y1 + x.z * y2 + x.w * y3;
            }
        }
#pragma unroll
        for (int r = 0; r < 4; r++)
        {
            if (first + lane >= keys_seen(causal, at, at.first + 4 * warp + r))
                p[r] = MINUS_INFINITY;
            float before = max[r];
            max[r] = fmaxf(before, warp_max(p[r]));
            float offset = softmax_offset(max[r], factor);
            float keep = softmax_keep(before, offset, factor);
            p[r] = exp2_approx(fmaf(p[r], factor, -offset));
            sum[r] = sum[r] * keep + p[r]; // this lane's share
#pragma unroll
            for (int i = 0; i < PARTS; i++) out[r][i] *= keep;
        }
#pragma unroll 1
        for (int j = 0; j < KEYS; j++)
        {
            float pj[4];
#pragma unroll
            for (int r = 0; r < 4; r++) pj[r] = __shfl_sync(ALL_LANES, p[r], j);
#pragma unroll
            for (int i = 0; i < PARTS; i++)
            {
                if (WARP * i >= dim) continue;
                float x = value[j * (width + 1) + WARP * i + lane];
#pragma unroll
                for (int r = 0; r < 4; r++) out[r][i] += pj[r] * x;
            }
        }
    }

#pragma unroll
    for (int r = 0; r < 4; r++)
    {
        int row = 4 * warp + r;
        float total = warp_sum(sum[r]);
        bool sees = keys_seen(causal, at, at.first + row) > 0;
        float inverse = total == 0 && !sees ? 0 : 1 / total;
        if (row >= queries) continue;
        if (lane == 0)
            lse[(long long)(at.first_token + at.first + row) * heads + head]
                = log_sum_exp(max[r], total, scale, factor, sees);
#pragma unroll
        for (int i = 0; i < PARTS; i++)
        {
            int c = WARP * i + lane;
            if (c < dim)
                o[first_row + (long long)row * heads * dim + c]
                    = narrow(out[r][i] * inverse);
        }
    }
}

// ---- 11. attention, backward --------------------------------------------------------------------

// With p = exp(scale q . k - lse) and delta = dO . o, over the pairs of a query and a key it sees:
//   dv = sum p dO,   ds = p (dO . v - delta),   dk = scale sum ds q,   dq = scale sum ds k.
// What is added is added in a fixed order. On tensor cores one kernel computes p and ds once. In
// float, where that matters less, every element has one owner: blocks of keys go over the queries
// (dk, dv; the query heads of a key head one after the other), blocks of queries over the keys
// (dq), and both compute p and ds anew. They are one algorithm. A block owns rows x, y and goes
// over rows u, w:
//   keys:      x = k, y = v,   u = q, w = dO:   dx = scale sum ds u,   dy = sum p w
//   queries:   x = q, y = dO,  u = k, w = v:    dx = scale sum ds u
// Per visible pair and query head 8 DIM FLOP for keys (4 when only dv is wanted), 6 DIM for
// queries.

// statistics[head, token] = (lse, delta): what is needed of a query beside its rows. For
// attention_backward_tile also no turns taken and, unless it adds to what is there, the dq of
// queries that see no key. A warp per token and head, 8 tokens per block. Reads 2 T H D S + 4 T H
// bytes, writes 8 T H or 12; 2 T H D FLOP.
extern "C" __global__ void __launch_bounds__(256) attention_statistics(
    float* statistics, int* turns, real* dq, const real* output_gradient, const real* output,
    const float* lse, int tokens, int heads, int head_dim)
{
    int token = blockIdx.x * 8 + threadIdx.x / WARP, head = blockIdx.y, lane = threadIdx.x % WARP;
    if (turns && blockIdx.x == 0 && head == 0 && threadIdx.x == 0) turns[0] = 0;
    if (token >= tokens) return;
    const real* a = output_gradient + ((u64)token * heads + head) * head_dim;
    const real* b = output + ((u64)token * heads + head) * head_dim;
    float delta = 0;
    if (aligned16(output_gradient, head_dim, sizeof(real))
        && aligned16(output, head_dim, sizeof(real)))
    {
        for (int c = lane * VECTOR; c < head_dim; c += WARP * VECTOR)
        {
            float v[VECTOR], w[VECTOR];
            load_vector(v, a + c);
            load_vector(w, b + c);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) delta += v[i] * w[i];
        }
    }
    else
    {
        for (int c = lane; c < head_dim; c += WARP) delta += widen(a[c]) * widen(b[c]);
    }
    delta = warp_sum(delta);
    float log_sum = lse[(u64)token * heads + head];
    if (dq && log_sum == MINUS_INFINITY)
        for (int c = lane; c < head_dim; c += WARP)
            dq[((u64)token * heads + head) * head_dim + c] = (real)0;
    if (lane != 0) return;
    ((float2*)statistics)[(u64)head * tokens + token] = make_float2(log_sum, delta);
    if (turns) turns[1 + head * tokens + token] = 0;
}

// The arguments of both kernels, as x, y, u, w.
struct AttentionBackward
{
    real *dx, *dy; // null where not wanted
    const real *x, *y, *u, *w;
    const float2* statistics; // [heads, tokens]
    AttentionMask mask;
    int heads, kv_heads, head_dim;
    float scale;
    int accumulate_x, accumulate_y;
};

// The rows u from low to high, within the sequence, that own row `row` meets.
struct SeenRange
{
    int low, high;
};

template <bool KEYS>
DEVICE SeenRange seen_range(const AttentionMask& mask, const SequenceTile& at, int row)
{
    if (!KEYS) return {0, row < at.queries ? keys_seen(mask.causal, at, row) : 0};
    if (row >= at.visible) return {0, 0};
    return {mask.causal ? max(0, row - at.before) : 0, at.queries};
}

// exp(scale product - lse). The difference is rounded once,
// so that large logits keep their precision.
DEVICE float probability(float product, float scale, float lse)
{
    return exp2_approx(fmaf(product, scale, -lse) * LOG2_E);
}

// Wrong starts, noted by one block of the launch.
// Any head dimension up to 256 and any storage type, in float: a block of 8 warps owns 8 rows, a
// warp one of them, and takes 32 rows u, w at a time: a lane computes p and ds of one of them, then
// every lane adds all 32 to its columns lane + 32 i. For F32 and for heads that tensor cores do not
// take. Reads u and w twice per own row, 4 D S bytes per pair and head, mostly from cache.
template <bool KEYS> DEVICE void attention_backward_by_rows(const AttentionBackward& a)
{
    constexpr int ROWS = ATTENTION_ANY_BACKWARD_ROWS, MOST = ATTENTION_MOST_COLS / WARP;
    SequenceTile at;
    if (!find_tile(at, a.mask, blockIdx.x, ROWS, KEYS)) return;
    int lane = threadIdx.x % WARP, row = at.first + threadIdx.x / WARP, dim = a.head_dim;
    if (row >= (KEYS ? at.keys : at.queries)) return;
    int group = a.heads / a.kv_heads, own_heads = KEYS ? a.kv_heads : a.heads;
    int other_heads = KEYS ? a.heads : a.kv_heads, own_head = blockIdx.y;
    u64 own_token = (KEYS ? at.first_key_token : at.first_token) + row;
    u64 own = (own_token * own_heads + own_head) * dim, stride = (u64)other_heads * dim;
    float dx[MOST] = {}, dy[MOST] = {};
    SeenRange seen = seen_range<KEYS>(a.mask, at, row);
    for (int j = 0; j < (KEYS ? group : 1); j++)
    {
        int query_head = KEYS ? own_head * group + j : own_head;
        u64 other = (KEYS ? at.first_token : at.first_key_token) * stride
            + (KEYS ? query_head : own_head / group) * dim;
        const float2* statistics = a.statistics + (u64)query_head * a.mask.tokens + at.first_token;
        for (int first = seen.low; first < seen.high; first += WARP)
        {
            int rows = min(WARP, seen.high - first);
            const real *u = a.u + other + first * stride, *w = a.w + other + first * stride;
            float p = 0, ds = 0;
            if (lane < rows)
            {
                float product = 0, dp = 0;
                for (int c = 0; c < dim; c++)
                {
                    product += widen(a.x[own + c]) * widen(u[lane * stride + c]);
                    dp += widen(a.y[own + c]) * widen(w[lane * stride + c]);
                }
                float2 statistic = statistics[KEYS ? first + lane : row];
                p = probability(product, a.scale, statistic.x);
                ds = p * (dp - statistic.y);
            }
            for (int r = 0; r < rows; r++)
            {
                float p_r = __shfl_sync(ALL_LANES, p, r), ds_r = __shfl_sync(ALL_LANES, ds, r);
#pragma unroll
                for (int i = 0; i < MOST; i++)
                {
                    int c = lane + i * WARP;
                    if (c >= dim) continue;
                    dx[i] += ds_r * widen(u[r * stride + c]);
                    if (KEYS) dy[i] += p_r * widen(w[r * stride + c]);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < MOST; i++)
    {
        int c = lane + i * WARP;
        if (c >= dim) continue;
        u64 to = own + c;
        if (a.dx) a.dx[to] = narrow(a.scale * dx[i] + (a.accumulate_x ? widen(a.dx[to]) : 0));
        if (a.dy) a.dy[to] = narrow(dy[i] + (a.accumulate_y ? widen(a.dy[to]) : 0));
    }
}

// dk[key tokens, kv_heads, head_dim] and dv, in tiles of keys by key heads.
extern "C" __global__ void __launch_bounds__(256) attention_keys_backward(
    real* dk, real* dv, const real* q, const real* k, const real* v, const real* output_gradient,
    const float* statistics, const int* starts_q, const int* starts_k, const int* key_lengths,
    int* faults, int sequences, int tokens, int key_tokens, int causal, int heads, int kv_heads,
    int head_dim, float scale, int accumulate_k, int accumulate_v)
{
    AttentionMask mask = {starts_q, starts_k, key_lengths, sequences, tokens, key_tokens, causal};
    AttentionBackward a = {dk, dv, k, v, q, output_gradient, (const float2*)statistics, mask, heads,
        kv_heads, head_dim, scale, accumulate_k, accumulate_v};
    if (blockIdx.x == 0 && blockIdx.y == 0) check_starts(faults, mask);
    attention_backward_by_rows<true>(a);
}

// dq[tokens, heads, head_dim], in tiles of queries by heads.
extern "C" __global__ void __launch_bounds__(256) attention_queries_backward(
    real* dq, const real* q, const real* k, const real* v, const real* output_gradient,
    const float* statistics, const int* starts_q, const int* starts_k, const int* key_lengths,
    int* faults, int sequences, int tokens, int key_tokens, int causal, int heads, int kv_heads,
    int head_dim, float scale, int accumulate)
{
    AttentionMask mask = {starts_q, starts_k, key_lengths, sequences, tokens, key_tokens, causal};
    AttentionBackward a = {dq, 0, q, output_gradient, k, v, (const float2*)statistics, mask, heads,
        kv_heads, head_dim, scale, accumulate, 0};
    if (blockIdx.x == 0 && blockIdx.y == 0) check_starts(faults, mask);
    attention_backward_by_rows<false>(a);
}

#if defined(STORAGE_BF16)

// -- on tensor cores: one kernel of five products --
//
// A block owns KEYS keys of a sequence and key head and goes over the queries that see them, STEP
// at a time and the last ones first. Its warps share out three things differently, each in pieces
// as square as can be, since what a piece reads from shared memory is its edges: p^T and ds^T,
// which go to shared memory rounded to the storage type; dv += p^T dO and dk += ds^T q, which stay
// in registers; and dq += ds k. dq is a sum over blocks. They add in turn, in the order of their
// keys, to floats that the last one narrows: turns[head, first query] counts those that have added.
// Blocks take numbers as they begin, and wait only for lower ones, so that they wait for blocks
// that run. The blocks of a tile's key heads are neighbours; tiles come as listed, with the most
// queries first.
//
// Shared memory: tiles k, v [KEYS, DIM], p, ds [KEYS, STEP], two stages of q, dO [STEP, DIM] and of
// (lse, delta) [STEP], eight numbers: 161 KiB for DIM 128. Where a multiprocessor has not as
// much (SMALL_TILES), tiles are smaller.
template <int DIM> struct BackwardTiles
{
    static constexpr bool SMALL = SMALL_TILES;
    static constexpr int KEYS = (SMALL ? 64 : 128) / (DIM > 128 ? 2 : 1);
    static constexpr int STEP = (DIM > 128 ? 32 : SMALL && DIM < 128 ? 128 : 64) / (SMALL ? 2 : 1);
    static constexpr int WARPS = SMALL ? 4 : 8, THREADS = WARPS * WARP;
    static constexpr int CHUNKS = TILE_CHUNKS(DIM), STEP_CHUNKS = STEP / 8;
    // Of p and ds a warp has SCORE_BLOCKS x 16 keys and SCORE_QUERIES queries; where these are
    // fewer pieces than warps, some compute the same.
    static constexpr int SCORE_BLOCKS = DIM > 128 ? 1 : 2, SCORE_QUERIES = STEP < 64 ? 16 : 32;
    static constexpr int SCORE_WARPS = STEP / SCORE_QUERIES;
    static constexpr int SCORE_PIECES = KEYS / 16 / SCORE_BLOCKS * SCORE_WARPS;
    // Of dk and dv 32 keys and TILES x 8 columns.
    static constexpr int KEY_BLOCKS = 2, TILE_WARPS = WARPS / (KEYS / 32);
    static constexpr int TILES = (DIM / 8 + TILE_WARPS - 1) / TILE_WARPS;
    // Of dq QUERIES rows and COLUMNS x 8 columns.
    static constexpr int QUERIES = STEP < 32 || (!SMALL && DIM % 64 != 0) || (SMALL && DIM == 128)
        ? 16 : 32;
    static constexpr int COLUMN_WARPS = WARPS / (STEP / QUERIES);
    static constexpr int COLUMNS = (DIM / 8 + COLUMN_WARPS - 1) / COLUMN_WARPS;
    // Bytes.
    static constexpr int OWN = KEYS * CHUNKS * 16, ROWS = STEP * CHUNKS * 16;
    static constexpr int SCORES = KEYS * STEP * 2, STATISTICS = STEP * 8, KEPT_BYTES = 32;
    static constexpr int BYTES = 2 * OWN + 2 * SCORES + 4 * ROWS + 2 * STATISTICS + KEPT_BYTES;
};

struct AttentionBackwardCall
{
    real *dq, *dk, *dv; // null where not wanted
    float *dq_sums;     // [tokens, heads, DIM], the columns of 16 in another order
    float *dk_parts, *dv_parts; // [parts, key tokens, kv_heads, DIM]; null with one part
    int* turns;         // [1 + heads tokens], the first the number of blocks that have begun
    const real *q, *k, *v, *output_gradient;
    const float2* statistics; // [heads, tokens]
    const int4* tiles;        // of keys, as AttentionTiles.cs lists them
    const int* key_lengths;   // may be null
    int tokens, key_tokens, causal, heads, kv_heads;
    float scale;
    int accumulate_q, accumulate_k, accumulate_v, parts;
};

// d[BLOCKS x 16, COLS] += a[BLOCKS x 16, all columns] b[COLS, all columns]^T, from a lane's
// addresses down first in a, across first in b.
template <int CHUNKS, int BLOCKS, int COLS>
DEVICE void multiply_transposed(float (*d)[COLS / 8][4], u32 a_lane, u32 b_lane)
{
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk += 2)
    {
        u32 a[BLOCKS][4];
#pragma unroll
        for (int m = 0; m < BLOCKS; m++)
            load_matrix_x4(a[m], tile_step<CHUNKS>(a_lane, 16 * m, chunk));
#pragma unroll
        for (int n = 0; n < COLS / 8; n += 2)
        {
            u32 b[4];
            load_matrix_x4(b, tile_step<CHUNKS>(b_lane, n * 8, chunk));
#pragma unroll
            for (int m = 0; m < BLOCKS; m++)
            {
                multiply_add_16x8x16(d[m][n], a[m], b);
                multiply_add_16x8x16(d[m][n + 1], a[m], b + 2);
            }
        }
    }
}

// d[BLOCKS x 16, TILES x 8] += a[BLOCKS x 16, 16] b[16, TILES x 8]: rows `row` on of a tile, and
// its columns from first x 8 on.
template <int CHUNKS, int BLOCKS, int TILES>
DEVICE void multiply_rows(
    float (*d)[TILES][4], const u32 (*a)[4], u32 tile, int row, int first)
{
    int lane = threadIdx.x % WARP;
    u32 lane_of_first = tile_address<CHUNKS>(tile, lane % 16, first + lane / 16);
#pragma unroll
    for (int n = 0; n < TILES; n += 2)
    {
        // Where `first` may be no multiple of 4, or behind this tile the row ends, steps are none
        // of constants.
        bool apart = CHUNKS % 8 == 4 || n + 1 == TILES;
        u32 from = !apart ? lane_of_first
            : tile_address<CHUNKS>(tile, lane % 16, first + n + (n + 1 < TILES ? lane / 16 : 0));
        u32 b[4];
        load_matrix_x4_transposed(b, tile_step<CHUNKS>(from, row, apart ? 0 : n));
#pragma unroll
        for (int m = 0; m < BLOCKS; m++)
        {
            multiply_add_16x8x16(d[m][n], a[m], b);
            if (n + 1 < TILES) multiply_add_16x8x16(d[m][n + 1], a[m], b + 2);
        }
    }
}

// Words of four neighbouring lanes change places: lane t gets word t of each, in their order.
DEVICE void transpose_quad(u32* w)
{
    int t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; i += 2)
    {
        u32 got = __shfl_xor_sync(ALL_LANES, t % 2 ? w[i] : w[i + 1], 1);
        if (t % 2) w[i] = got;
        else w[i + 1] = got;
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
    {
        u32 got = __shfl_xor_sync(ALL_LANES, t / 2 ? w[i] : w[i + 2], 2);
        if (t / 2) w[i] = got;
        else w[i + 2] = got;
    }
}

// A warp's 16 rows of a gradient, TILES x 8 columns wide, times scale: row r lies at to + r stride
// where it is one of `rows`, and is added to where asked for. Four tiles' 16 bytes of a lane at a
// time; of those left over only the first `tiles` exist.
template <int TILES>
DEVICE void store_gradient(
    real* to, u64 stride, int rows, const float (*d)[4], float scale, int accumulate,
    int tiles)
{
    int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; half++)
    {
        real* row = to + (g + half * 8) * stride;
        bool inside = g + half * 8 < rows;
        auto word_of = [&](int n)
        {
            float low = scale * d[n][half * 2], high = scale * d[n][half * 2 + 1];
            if (accumulate && inside)
            {
                u32 before = ((const u32*)(row + n * 8))[t];
                low += widen((real)before);
                high += widen((real)(before >> 16));
            }
            return narrow2(low, high);
        };
        constexpr int FOURS = TILES / 4 * 4;
#pragma unroll
        for (int n = 0; n < FOURS; n += 4)
        {
            u32 words[4] = {word_of(n), word_of(n + 1), word_of(n + 2), word_of(n + 3)};
            transpose_quad(words);
            if (inside)
                *(uint4*)(row + (n + t) * 8) =
                    make_uint4(words[0], words[1], words[2], words[3]);
        }
#pragma unroll
        for (int n = FOURS; n < TILES; n++)
        {
            if (n >= tiles) continue;
            u32 word = word_of(n);
            if (inside) ((u32*)(row + n * 8))[t] = word;
        }
    }
}

// The same of a part that is added to others: float, and nothing was there before.
template <int TILES>
DEVICE void store_part(
    float* to, u64 stride, int rows, const float (*d)[4], float scale, int tiles)
{
    int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; half++)
    {
        if (g + half * 8 >= rows) continue;
        float2* pairs = (float2*)(to + (g + half * 8) * stride) + t;
#pragma unroll
        for (int n = 0; n < TILES; n++)
            if (n < tiles)
                pairs[n * 4] = make_float2(scale * d[n][half * 2], scale * d[n][half * 2 + 1]);
    }
}

// -- sums that blocks add to in turn: read and written where all multiprocessors see them --

// What was read or written before, here or ahead of a barrier in the block, stays before.
DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

DEVICE int load_turn(const int* turn)
{
    int value;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(turn) : "memory");
    return value;
}

DEVICE void store_turn(int* turn, int value)
{
    asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" :: "l"(turn), "r"(value) : "memory");
}

// Of two tiles of 8 columns a lane's floats are neighbours, and of one.
DEVICE void load_sums(float* even, float* odd, const float* from)
{
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
        : "=f"(even[0]), "=f"(even[1]), "=f"(odd[0]), "=f"(odd[1]) : "l"(from) : "memory");
}

DEVICE void load_sums(float* x, const float* from)
{
    asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];"
        : "=f"(x[0]), "=f"(x[1]) : "l"(from) : "memory");
}

DEVICE void store_sums(float* to, const float* even, const float* odd)
{
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};"
        :: "l"(to), "f"(even[0]), "f"(even[1]), "f"(odd[0]), "f"(odd[1]) : "memory");
}

DEVICE void store_sums(float* to, const float* x)
{
    asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};"
        :: "l"(to), "f"(x[0]), "f"(x[1]) : "memory");
}

// dq, dk, dv of a tile of keys. Per visible pair and query head 10 DIM FLOP. Reads k and v once,
// q and dO once per tile of keys, and moves 8 DIM bytes of sums per query and tile of keys behind
// the first, mostly within L2.
template <int DIM> DEVICE void attention_backward_tile(const AttentionBackwardCall& a)
{
    using B = BackwardTiles<DIM>;
    constexpr int KEYS = B::KEYS, STEP = B::STEP, CHUNKS = B::CHUNKS, THREADS = B::THREADS;
    constexpr int STEP_CHUNKS = B::STEP_CHUNKS, TILES = B::TILES, COLUMNS = B::COLUMNS;
    constexpr int SCORE_BLOCKS = B::SCORE_BLOCKS, SCORE_QUERIES = B::SCORE_QUERIES;
    constexpr int KEY_BLOCKS = B::KEY_BLOCKS, STATISTICS = 2 * (B::OWN + B::SCORES) + 4 * B::ROWS;
    alignas(1024) extern __shared__ uint4 attention_shared[];
    u32 k_tile = shared_address(attention_shared), v_tile = k_tile + B::OWN;
    u32 p_tile = v_tile + B::OWN, stages = p_tile + 2 * B::SCORES;
    // What all threads need again: registers are scarce.
    volatile int* kept = (int*)((char*)attention_shared + B::BYTES - B::KEPT_BYTES);

    if (threadIdx.x == 0) kept[0] = atomicAdd(a.turns, 1);
    __syncthreads();
    int columns = a.kv_heads * a.parts, column = kept[0] % columns;
    SequenceTile at;
    if (!take_tile(at, a.tiles, kept[0] / columns, KEYS, true, a.key_lengths, a.causal)) return;

    int group = a.heads / a.kv_heads, key_head = column / a.parts, part = column % a.parts;
    int head = key_head * group + part * group / a.parts;
    int last_head = key_head * group + (part + 1) * group / a.parts - 1;
    int stride = a.heads * DIM, key_stride = a.kv_heads * DIM;
    u64 own = (u64)(at.first_key_token + at.first) * key_stride + key_head * DIM;

    // The queries of tile `tile` of the keys begin at a multiple of STEP.
    auto lowest_of = [&](int tile)
    {
        return a.causal ? max(0, tile * KEYS - at.before) / STEP * STEP : 0;
    };
    int tile = at.first / KEYS, lowest = lowest_of(tile), next_lowest = lowest_of(tile + 1);
    int highest = (at.queries - 1) / STEP * STEP;
    if (at.first + KEYS >= at.visible) next_lowest = at.queries; // there is no next
    bool any = lowest < at.queries && at.first < at.visible;

    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    // This warp's shares: where its scores, its dk and dv, and its dq begin.
    int score_key = warp % B::SCORE_PIECES / B::SCORE_WARPS * SCORE_BLOCKS * 16;
    int score_query = warp % B::SCORE_WARPS * SCORE_QUERIES;
    int key_row = warp / B::TILE_WARPS * 32, key_tile = warp % B::TILE_WARPS * TILES;
    int dq_row = warp / B::COLUMN_WARPS * B::QUERIES;
    int dq_tile = warp % B::COLUMN_WARPS * COLUMNS;
    // A lane's places in them, from which its matrices are constants away.
    u32 k_lane = tile_address<CHUNKS>(k_tile, score_key + lane % 16, lane / 16);
    u32 across = tile_address<CHUNKS>(0, score_query + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    u32 p_lane = tile_address<STEP_CHUNKS>(p_tile, key_row + lane % 16, lane / 16);
    u32 ds_lane = tile_address<STEP_CHUNKS>(
        p_tile + B::SCORES, lane / 16 * 8 + lane % 8, dq_row / 8 + lane / 8 % 2);

    auto copy_step = [&](int stage, int head, int first)
    {
        u32 to = stages + stage * 2 * B::ROWS;
        u64 from = (u64)(at.first_token + first) * stride + head * DIM;
        int rows = at.queries - first;
        copy_tile<DIM, STEP, THREADS>(to, a.q + from, stride, rows);
        copy_tile<DIM, STEP, THREADS>(to + B::ROWS, a.output_gradient + from, stride, rows);
        if ((int)threadIdx.x < STEP)
            copy_async_8(k_tile + STATISTICS + stage * B::STATISTICS + threadIdx.x * 8,
                a.statistics + (u64)head * a.tokens + at.first_token + first + threadIdx.x,
                (int)threadIdx.x < rows);
        commit_copies();
    };

    // Of this lane's first key: those that are not masked for all from there on, and the first
    // query that sees it. From seen_by_all on queries see all of the tile's keys.
    int keys_left = at.visible - at.first - score_key - g;
    int first_query = at.first + score_key + g - at.before, seen_by_all = 0;
    if (a.causal) seen_by_all = at.first + KEYS - 1 - at.before;
    if (at.first + KEYS > at.visible) seen_by_all = at.queries;
    if (threadIdx.x == 0)
    {
        kept[1] = lowest;
        kept[2] = highest;
        kept[3] = next_lowest;
        kept[4] = last_head;
        kept[5] = seen_by_all;
        kept[6] = tile;
    }

    float dk[KEY_BLOCKS][TILES][4] = {}, dv[KEY_BLOCKS][TILES][4] = {};
    float factor = a.scale * LOG2_E;
    int first = highest, stage = 0, added = -1; // a place in turns whose sums are not yet announced
    if (any)
    {
        copy_tile<DIM, KEYS, THREADS>(k_tile, a.k + own, key_stride, at.visible - at.first);
        copy_tile<DIM, KEYS, THREADS>(v_tile, a.v + own, key_stride, at.visible - at.first);
        copy_step(0, head, first);
    }
    for (bool more = any; more;)
    {
        wait_copies<0>();
        __syncthreads(); // this step's rows are there, nobody reads those of the step before
        u32 q_tile = stages + stage * 2 * B::ROWS, g_tile = q_tile + B::ROWS;
        const char* statistics = (const char*)attention_shared + STATISTICS
            + stage * B::STATISTICS + (score_query + 2 * t) * 8;
        int now = first, now_head = head;
        first -= STEP;
        if (first < kept[1])
        {
            first = kept[2];
            head++;
        }
        more = head <= kept[4];
        stage ^= 1;
        if (more) copy_step(stage, head, first);

        int place = 1 + now_head * a.tokens + at.first_token + now;
        int tile = kept[6];
        bool waits = a.dq && tile > 0, ends = now < kept[3];
        int turn = waits && threadIdx.x == 0 ? load_turn(a.turns + place) : tile;
        // Rows of zeros behind the last query have p = 1 and ds = 0, which nothing is added to by.
        bool masked = now < kept[5];

        float s[SCORE_BLOCKS][SCORE_QUERIES / 8][4] = {};
        float dp[SCORE_BLOCKS][SCORE_QUERIES / 8][4] = {};
        multiply_transposed<CHUNKS, SCORE_BLOCKS, SCORE_QUERIES>(s, k_lane, q_tile + across);
        multiply_transposed<CHUNKS, SCORE_BLOCKS, SCORE_QUERIES>(
            dp, k_lane + B::OWN, g_tile + across);
        if (added >= 0 && threadIdx.x == WARP)
        {
            // The barrier above has seen every thread's sums of the step before written.
            fence();
            store_turn(a.turns + added, tile + 1);
        }
#pragma unroll
        for (int n = 0; n < SCORE_QUERIES / 8; n++)
        {
            float4 of_two = *(const float4*)(statistics + n * 64);
            float offset[2] = {of_two.x * LOG2_E, of_two.z * LOG2_E};
            float delta[2] = {of_two.y, of_two.w};
#pragma unroll
            for (int m = 0; m < SCORE_BLOCKS; m++)
            {
#pragma unroll
                for (int i = 0; i < 4; i++)
                {
                    s[m][n][i] = exp2_approx(fmaf(s[m][n][i], factor, -offset[i % 2]));
                    dp[m][n][i] = s[m][n][i] * (dp[m][n][i] - delta[i % 2]);
                }
            }
        }
        if (masked)
        {
#pragma unroll
            for (int n = 0; n < SCORE_QUERIES / 8; n++)
#pragma unroll
                for (int m = 0; m < 4 * SCORE_BLOCKS; m++)
                {
                    int query = now + score_query + n * 8 + 2 * t + m % 2, key = m / 2 * 8;
                    bool sees = key < keys_left && (!a.causal || query >= first_query + key);
                    if (!sees) s[m / 4][n][m % 4] = dp[m / 4][n][m % 4] = 0;
                }
        }
#pragma unroll
        for (int n = 0; n < SCORE_QUERIES / 8; n++)
        {
#pragma unroll
            for (int m = 0; m < SCORE_BLOCKS; m++)
            {
                char* row = (char*)attention_shared + 2 * B::OWN + 4 * t
                    + tile_address<STEP_CHUNKS>(0, score_key + m * 16 + g, score_query / 8 + n);
                constexpr int EIGHT_ROWS = 8 * STEP_CHUNKS * 16;
                *(u32*)row = narrow2(s[m][n][0], s[m][n][1]);
                *(u32*)(row + EIGHT_ROWS) = narrow2(s[m][n][2], s[m][n][3]);
                *(u32*)(row + B::SCORES) = narrow2(dp[m][n][0], dp[m][n][1]);
                *(u32*)(row + B::SCORES + EIGHT_ROWS) = narrow2(dp[m][n][2], dp[m][n][3]);
            }
        }
        if (waits && threadIdx.x == 0)
        {
            while (turn < tile) turn = load_turn(a.turns + place);
            fence();
        }
        __syncthreads(); // p and ds are there, and it is this block's turn

        constexpr int BLOCKS = B::QUERIES / 16;
        float dq[BLOCKS][COLUMNS][4] = {};
        u64 dq_at = ((u64)(at.first_token + now + dq_row) * a.heads + now_head) * DIM + dq_tile * 8;
        int dq_rows = at.queries - now - dq_row;
        if (waits)
        {
#pragma unroll
            for (int m = 0; m < 2 * BLOCKS; m++)
            {
                if (m * 8 + g >= dq_rows) continue;
                const float* from = a.dq_sums + dq_at + (u64)(m * 8 + g) * stride;
#pragma unroll
                for (int n = 0; n < COLUMNS; n += 2)
                {
                    float* even = dq[m / 2][n] + m % 2 * 2;
                    if (n + 1 < COLUMNS)
                        load_sums(even, dq[m / 2][n + 1] + m % 2 * 2, from + n * 8 + t * 4);
                    else if (dq_tile + n < DIM / 8)
                        load_sums(even, from + n * 8 + t * 2);
                }
            }
        }
#pragma unroll
        for (int row = 0; row < STEP; row += 16)
        {
            u32 p[KEY_BLOCKS][4], ds[KEY_BLOCKS][4];
#pragma unroll
            for (int m = 0; m < KEY_BLOCKS; m++)
                load_matrix_x4(p[m], tile_step<STEP_CHUNKS>(p_lane, 16 * m, row / 8));
            multiply_rows<CHUNKS, KEY_BLOCKS, TILES>(dv, p, g_tile, row, key_tile);
#pragma unroll
            for (int m = 0; m < KEY_BLOCKS; m++)
                load_matrix_x4(
                    ds[m], tile_step<STEP_CHUNKS>(p_lane + B::SCORES, 16 * m, row / 8));
            multiply_rows<CHUNKS, KEY_BLOCKS, TILES>(dk, ds, q_tile, row, key_tile);
        }
        if (!a.dq) continue;
#pragma unroll
        for (int row = 0; row < KEYS; row += 16)
        {
            u32 left[BLOCKS][4];
#pragma unroll
            for (int m = 0; m < BLOCKS; m++)
                load_matrix_x4_transposed(left[m], tile_step<STEP_CHUNKS>(ds_lane, row, 2 * m));
            multiply_rows<CHUNKS, BLOCKS, COLUMNS>(dq, left, k_tile, row, dq_tile);
        }
        added = ends ? -1 : place;
        if (ends)
        {
#pragma unroll
            for (int m = 0; m < BLOCKS; m++)
                store_gradient<COLUMNS>(a.dq + dq_at + m * 16 * stride, stride, dq_rows - m * 16,
                    dq[m], a.scale, a.accumulate_q, DIM / 8 - dq_tile);
            continue;
        }
#pragma unroll
        for (int m = 0; m < 2 * BLOCKS; m++)
        {
            if (m * 8 + g >= dq_rows) continue;
            float* to = a.dq_sums + dq_at + (u64)(m * 8 + g) * stride;
#pragma unroll
            for (int n = 0; n < COLUMNS; n += 2)
            {
                const float* even = dq[m / 2][n] + m % 2 * 2;
                if (n + 1 < COLUMNS)
                    store_sums(to + n * 8 + t * 4, even, dq[m / 2][n + 1] + m % 2 * 2);
                else if (dq_tile + n < DIM / 8) store_sums(to + n * 8 + t * 2, even);
            }
        }
    }
    if (added >= 0)
    {
        __syncthreads();
        if (threadIdx.x == 0)
        {
            fence();
            store_turn(a.turns + added, kept[6] + 1);
        }
    }

    // Again, since registers are scarce in between.
    take_tile(at, a.tiles, kept[0] / columns, KEYS, true, a.key_lengths, a.causal);
    column = kept[0] % columns;
    own = (u64)(at.first_key_token + at.first) * key_stride + column / a.parts * DIM;
    u64 of_part = (u64)(column % a.parts) * a.key_tokens * key_stride;
#pragma unroll
    for (int m = 0; m < KEY_BLOCKS; m++)
    {
        u64 to = own + (u64)(key_row + 16 * m) * key_stride + key_tile * 8;
        int rows = at.keys - at.first - key_row - 16 * m, tiles = DIM / 8 - key_tile;
        if (a.dk_parts)
            store_part<TILES>(a.dk_parts + of_part + to, key_stride, rows, dk[m], a.scale, tiles);
        if (a.dv_parts)
            store_part<TILES>(a.dv_parts + of_part + to, key_stride, rows, dv[m], 1, tiles);
        if (a.dk)
            store_gradient<TILES>(
                a.dk + to, key_stride, rows, dk[m], a.scale, a.accumulate_k, tiles);
        if (a.dv)
            store_gradient<TILES>(a.dv + to, key_stride, rows, dv[m], 1, a.accumulate_v, tiles);
    }
}

// For the head dimensions of the models.
#define BACKWARD_CALL \
    {dq, dk, dv, dq_sums, dk_parts, dv_parts, turns, q, k, v, output_gradient, \
        (const float2*)statistics, (const int4*)tiles, key_lengths, tokens, key_tokens, causal, \
        heads, kv_heads, scale, accumulate_q, accumulate_k, accumulate_v, parts}

extern "C" __global__ void __launch_bounds__(BackwardTiles<64>::THREADS) attention_backward_64(
    real* dq, real* dk, real* dv, float* dq_sums, float* dk_parts, float* dv_parts, int* turns,
    const real* q, const real* k, const real* v, const real* output_gradient,
    const float* statistics, const int* tiles, const int* key_lengths, int tokens, int key_tokens,
    int causal, int heads, int kv_heads, float scale, int accumulate_q, int accumulate_k,
    int accumulate_v, int parts)
{
    AttentionBackwardCall a = BACKWARD_CALL;
    attention_backward_tile<64>(a);
}

extern "C" __global__ void __launch_bounds__(BackwardTiles<72>::THREADS) attention_backward_72(
    real* dq, real* dk, real* dv, float* dq_sums, float* dk_parts, float* dv_parts, int* turns,
    const real* q, const real* k, const real* v, const real* output_gradient,
    const float* statistics, const int* tiles, const int* key_lengths, int tokens, int key_tokens,
    int causal, int heads, int kv_heads, float scale, int accumulate_q, int accumulate_k,
    int accumulate_v, int parts)
{
    AttentionBackwardCall a = BACKWARD_CALL;
    attention_backward_tile<72>(a);
}

extern "C" __global__ void __launch_bounds__(BackwardTiles<80>::THREADS) attention_backward_80(
    real* dq, real* dk, real* dv, float* dq_sums, float* dk_parts, float* dv_parts, int* turns,
    const real* q, const real* k, const real* v, const real* output_gradient,
    const float* statistics, const int* tiles, const int* key_lengths, int tokens, int key_tokens,
    int causal, int heads, int kv_heads, float scale, int accumulate_q, int accumulate_k,
    int accumulate_v, int parts)
{
    AttentionBackwardCall a = BACKWARD_CALL;
    attention_backward_tile<80>(a);
}

extern "C" __global__ void __launch_bounds__(BackwardTiles<96>::THREADS) attention_backward_96(
    real* dq, real* dk, real* dv, float* dq_sums, float* dk_parts, float* dv_parts, int* turns,
    const real* q, const real* k, const real* v, const real* output_gradient,
    const float* statistics, const int* tiles, const int* key_lengths, int tokens, int key_tokens,
    int causal, int heads, int kv_heads, float scale, int accumulate_q, int accumulate_k,
    int accumulate_v, int parts)
{
    AttentionBackwardCall a = BACKWARD_CALL;
    attention_backward_tile<96>(a);
}

extern "C" __global__ void __launch_bounds__(BackwardTiles<128>::THREADS) attention_backward_128(
    real* dq, real* dk, real* dv, float* dq_sums, float* dk_parts, float* dv_parts, int* turns,
    const real* q, const real* k, const real* v, const real* output_gradient,
    const float* statistics, const int* tiles, const int* key_lengths, int tokens, int key_tokens,
    int causal, int heads, int kv_heads, float scale, int accumulate_q, int accumulate_k,
    int accumulate_v, int parts)
{
    AttentionBackwardCall a = BACKWARD_CALL;
    attention_backward_tile<128>(a);
}

extern "C" __global__ void __launch_bounds__(BackwardTiles<256>::THREADS) attention_backward_256(
    real* dq, real* dk, real* dv, float* dq_sums, float* dk_parts, float* dv_parts, int* turns,
    const real* q, const real* k, const real* v, const real* output_gradient,
    const float* statistics, const int* tiles, const int* key_lengths, int tokens, int key_tokens,
    int causal, int heads, int kv_heads, float scale, int accumulate_q, int accumulate_k,
    int accumulate_v, int parts)
{
    AttentionBackwardCall a = BACKWARD_CALL;
    attention_backward_tile<256>(a);
}

#endif

// ---- 12. optimizer ------------------------------------------------------------------------------

// The sum over a block of 256 threads of one double each, in a fixed order;
// the result is thread 0's.
DEVICE double block_sum_double(double x, double* shared)
{
    shared[threadIdx.x] = x;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2)
    {
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
        __syncthreads();
    }
    return shared[0];
}

DEVICE int not_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) == 0x7f800000u; }

// part[p] = {sum of g[i]^2, number of g[i] that are NaN or infinite} over the elements of part p,
// which are neighbours; with only_count the first is 0. Squares are added in double, which no
// float's square overflows: a thread adds its own in order, the block its threads'.
// Reads 4 count bytes, 2 FLOP each.
extern "C" __global__ void __launch_bounds__(256) gradient_norm_parts(
    double* part, const float* g, long long count, long long per_part, int only_count)
{
    __shared__ double sums[256];
    long long first = blockIdx.x * per_part, last = min(count, first + per_part);
    double squares = 0;
    int bad = 0;
    long long i = first + threadIdx.x * 4;
    // per_part is a multiple of 4, so that every part starts as well aligned as g.
    if (aligned16(g, 4, 4))
    {
#pragma unroll 4
        for (; i + 4 <= last; i += blockDim.x * 4)
        {
            float4 v = *(const float4*)(g + i);
            squares += (double)v.x * v.x + (double)v.y * v.y + (double)v.z * v.z
                + (double)v.w * v.w;
            bad += not_finite(v.x) + not_finite(v.y) + not_finite(v.z) + not_finite(v.w);
        }
    }
    for (; i < last; i += blockDim.x * 4)
    {
        for (int j = 0; j < 4 && i + j < last; j++)
        {
            squares += (double)g[i + j] * g[i + j];
            bad += not_finite(g[i + j]);
        }
    }
    double sum = block_sum_double(only_count ? 0 : squares, sums);
    __syncthreads();
    double found = block_sum_double(bad, sums);
    if (threadIdx.x != 0) return;
    part[2 * blockIdx.x] = sum;
    part[2 * blockIdx.x + 1] = found;
}

// norm = {sqrt(sum of squares), clipping factor, number of non-finite elements} of all parts, in
// order; max_norm 0 or below does not clip. One block.
extern "C" __global__ void __launch_bounds__(256) gradient_norm_finish(
    double* norm, const double* part, int parts, double max_norm)
{
    __shared__ double sums[256];
    double squares = 0, bad = 0;
    for (int p = threadIdx.x; p < parts; p += blockDim.x)
    {
        squares += part[2 * p];
        bad += part[2 * p + 1];
    }
    double sum = block_sum_double(squares, sums);
    __syncthreads();
    double found = block_sum_double(bad, sums);
    if (threadIdx.x != 0) return;
    double length = sqrt(sum), factor = max_norm > 0 ? max_norm / (length + 1e-6) : 1;
    norm[0] = length;
    norm[1] = factor > 1 ? 1 : factor;
    norm[2] = found;
}

// Whether an update goes ahead, and the factor of its gradients: norm as above, or none for 1.
DEVICE bool may_update(const double* norm, float* factor)
{
    *factor = norm ? (float)norm[1] : 1.0f;
    return !norm || !(norm[2] > 0);
}

// One element of AdamW, as src/Kernels/Updates/AdamW.cs has it: m and v are changed, p is returned.
struct adamw_step
{
    float keep, first, new_first, second, new_second, rate, root, epsilon;
};

DEVICE float adamw_element(const adamw_step& s, float p, float g, float* m, float* v)
{
    *m = *m * s.first + g * s.new_first;
    *v = *v * s.second + g * g * s.new_second;
    return p * s.keep - *m / (sqrtf(*v) / s.root + s.epsilon) * s.rate;
}

// The rounded copy of a master: 4 neighbours, or fewer of them one by one.
DEVICE void store_rounded(void* rounded, int type, long long i, const float* p, int count,
    bool wide)
{
    u32 bits[4];
#pragma unroll
    for (int j = 0; j < 4; j++) bits[j] = type == DTYPE_BF16 ? narrow_bf16(p[j]) : narrow_f16(p[j]);
    if (wide)
    {
        *(uint2*)((bf16*)rounded + i) =
            make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
        return;
    }
    // Loops over fewer than four are unrolled, so that no array needs an address.
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (j < count) ((bf16*)rounded)[i + j] = (bf16)bits[j];
}

// AdamW on p[count] with gradients g and moments m, v, all float; rounded, if given, is p's copy in
// a 16-bit type, rounded to nearest even. Nothing changes where norm counts elements that are not
// finite. Four elements per thread. Moves 28 bytes per element, 30 with a copy; 13 FLOP.
extern "C" __global__ void __launch_bounds__(256) adamw(
    float* p, void* rounded, int rounded_type, const float* g, float* m, float* v,
    const double* norm,
    long long count, float keep, float first, float new_first, float second, float new_second,
    float rate, float root, float epsilon)
{
    float factor;
    long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= count || !may_update(norm, &factor)) return;
    adamw_step s = {keep, first, new_first, second, new_second, rate, root, epsilon};
    float x[4] = {0, 0, 0, 0};
    int mine = (int)min(4LL, count - i);
    bool wide = mine == 4 && aligned16(p, 4, 4) && aligned16(g, 4, 4) && aligned16(m, 4, 4)
        && aligned16(v, 4, 4) && aligned16(rounded, 4, 4);
    if (wide)
    {
        float4 value = *(float4*)(p + i), gradient = *(const float4*)(g + i);
        float4 mean = *(float4*)(m + i), square = *(float4*)(v + i);
        value.x = adamw_element(s, value.x, gradient.x * factor, &mean.x, &square.x);
        value.y = adamw_element(s, value.y, gradient.y * factor, &mean.y, &square.y);
        value.z = adamw_element(s, value.z, gradient.z * factor, &mean.z, &square.z);
        value.w = adamw_element(s, value.w, gradient.w * factor, &mean.w, &square.w);
        *(float4*)(p + i) = value;
        *(float4*)(m + i) = mean;
        *(float4*)(v + i) = square;
        x[0] = value.x;
        x[1] = value.y;
        x[2] = value.z;
        x[3] = value.w;
    }
    else
    {
#pragma unroll
        for (int j = 0; j < 4; j++)
        {
            if (j >= mine) break;
            x[j] = adamw_element(s, p[i + j], g[i + j] * factor, &m[i + j], &v[i + j]);
            p[i + j] = x[j];
        }
    }
    if (rounded) store_rounded(rounded, rounded_type, i, x, mine, wide);
}

// x rounded to one of its two bf16 neighbours, up with the probability of the part that is cut off,
// so that the expected value is x: random has 16 bits. Infinities and NaNs stay what they are.
DEVICE bf16 round_randomly(float x, u32 random)
{
    u32 bits = __float_as_uint(x);
    if (not_finite(x)) return (bf16)(bits >> 16 | ((bits & 0x7fffffu) != 0) << 6);
    return (bf16)((bits + random) >> 16);
}

// As adamw with moments in bf16, rounded randomly: element n of the whole range (first_element + i)
// takes word n % 4 of the Philox counter (n / 4, layer, step), its low half for m and its high half
// for v. Moves 20 bytes per element, 22 with a copy.
extern "C" __global__ void __launch_bounds__(256) adamw_bf16_moments(
    float* p, void* rounded, int rounded_type, const float* g, bf16* m, bf16* v, const double* norm,
    long long count, float keep, float first, float new_first, float second, float new_second,
    float rate, float root, float epsilon, long long first_element, u64 seed, u64 step, int layer)
{
    float factor;
    long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= count || !may_update(norm, &factor)) return;
    adamw_step s = {keep, first, new_first, second, new_second, rate, root, epsilon};
    uint4 random = philox(seed, step, (u32)layer, (u32)((first_element + i) / 4));
    u32 words[4] = {random.x, random.y, random.z, random.w};
    float x[4] = {0, 0, 0, 0}, gradients[4] = {0, 0, 0, 0};
    u32 means[4] = {0, 0, 0, 0}, squares[4] = {0, 0, 0, 0};
    int mine = (int)min(4LL, count - i);
    bool wide = mine == 4 && aligned16(p, 4, 4) && aligned16(g, 4, 4) && aligned16(m, 8, 2)
        && aligned16(v, 8, 2) && aligned16(rounded, 4, 4);
    if (wide)
    {
        float4 value = *(float4*)(p + i), gradient = *(const float4*)(g + i);
        uint2 mean = *(uint2*)(m + i), square = *(uint2*)(v + i);
        x[0] = value.x, x[1] = value.y, x[2] = value.z, x[3] = value.w;
        gradients[0] = gradient.x, gradients[1] = gradient.y;
        gradients[2] = gradient.z, gradients[3] = gradient.w;
        means[0] = mean.x & 0xffff, means[1] = mean.x >> 16;
        means[2] = mean.y & 0xffff, means[3] = mean.y >> 16;
        squares[0] = square.x & 0xffff, squares[1] = square.x >> 16;
        squares[2] = square.y & 0xffff, squares[3] = square.y >> 16;
    }
    else
    {
#pragma unroll
        for (int j = 0; j < 4; j++)
        {
            if (j >= mine) break;
            x[j] = p[i + j], gradients[j] = g[i + j];
            means[j] = m[i + j], squares[j] = v[i + j];
        }
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
    {
        float mean = widen_bf16((bf16)means[j]), square = widen_bf16((bf16)squares[j]);
        x[j] = adamw_element(s, x[j], gradients[j] * factor, &mean, &square);
        means[j] = round_randomly(mean, words[j] & 0xffff);
        squares[j] = round_randomly(square, words[j] >> 16);
    }
    if (wide)
    {
        *(float4*)(p + i) = make_float4(x[0], x[1], x[2], x[3]);
        *(uint2*)(m + i) = make_uint2(means[0] | means[1] << 16, means[2] | means[3] << 16);
        *(uint2*)(v + i) = make_uint2(squares[0] | squares[1] << 16, squares[2] | squares[3] << 16);
    }
    else
    {
#pragma unroll
        for (int j = 0; j < 4; j++)
        {
            if (j >= mine) break;
            p[i + j] = x[j];
            m[i + j] = (bf16)means[j];
            v[i + j] = (bf16)squares[j];
        }
    }
    if (rounded) store_rounded(rounded, rounded_type, i, x, mine, wide);
}

// ---- 13. magnitudes of weight-decomposed adapters -----------------------------------------------

// y[j] = sqrt(squares[j] + sum of bb[j, k] (2 scale p[k, j] + scale^2 z[j, k]) over k), the norm of a
// row of w + scale bb a from its parts. A thread has a row. Reads 4 (2 + 3 rank) outputs.
extern "C" __global__ void adapted_norm(float* y, const float* squares, const float* bb,
    const float* p, const float* z, int outputs, int rank, float scale)
{
    int j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= outputs) return;
    float sum = squares[j];
    for (int k = 0; k < rank; k++)
    {
        u64 at = (u64)j * rank + k;
        sum += bb[at] * (2 * scale * p[(u64)k * outputs + j] + scale * scale * z[at]);
    }
    // What rounding leaves below 0 is 0; a NaN stays one.
    y[j] = sqrtf(sum < 0 ? 0 : sum);
}

// y = (m / n - minus) x + b for each column, or adds it; b may be absent. A thread has 16 bytes of
// columns and every gridDim.y-th row. Moves 2 or 3 R C S.
extern "C" __global__ void __launch_bounds__(256) dora_columns(real* y, const real* x,
    const float* m, const float* n, const float* b, int rows, int cols, float minus, int accumulate)
{
    int c = (blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    if (c >= cols) return;
    float factor[VECTOR], offset[VECTOR], v[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; i++)
    {
        // An infinite norm is no factor of 0.
        factor[i] = c + i < cols ? m[c + i] / n[c + i] + (n[c + i] - n[c + i]) - minus : 0;
        offset[i] = b && c + i < cols ? b[c + i] : 0;
    }
    bool whole = aligned16(y, cols, sizeof(real)) && aligned16(x, cols, sizeof(real));
    for (int r = blockIdx.y; r < rows; r += gridDim.y)
    {
        u64 row = (u64)r * cols;
        load_run(v, x + row, c, cols, whole);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) v[i] = factor[i] * v[i] + offset[i];
        store_run(y + row, v, c, cols, whole, accumulate);
    }
}

// g = (m / n) dy, and part[p, c] = sum of dy u / n over the rows of part p, of which the magnitudes'
// gradient is the sum. Blocks and warps as in sum_rows. Moves 3 R C S.
extern "C" __global__ void __launch_bounds__(256) dora_backward(real* g, float* part,
    const real* dy, const real* u, const float* m, const float* n, int rows, int cols,
    int rows_per_part)
{
    __shared__ float sums[8][WARP * VECTOR];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int c = (blockIdx.x * WARP + lane) * VECTOR;
    int first = blockIdx.y * rows_per_part, last = min(rows, first + rows_per_part);
    bool whole = aligned16(dy, cols, sizeof(real)) && aligned16(u, cols, sizeof(real))
        && aligned16(g, cols, sizeof(real));
    float factor[VECTOR], sum[VECTOR] = {}, v[VECTOR], w[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; i++) factor[i] = c + i < cols ? m[c + i] / n[c + i] : 0;
    for (int r = first + warp; r < last && c < cols; r += 8)
    {
        u64 row = (u64)r * cols;
        load_run(v, dy + row, c, cols, whole);
        load_run(w, u + row, c, cols, whole);
#pragma unroll
        for (int i = 0; i < VECTOR; i++)
        {
            sum[i] += v[i] * w[i];
            v[i] *= factor[i];
        }
        store_run(g + row, v, c, cols, whole, 0);
    }
#pragma unroll
    for (int i = 0; i < VECTOR; i++) sums[warp][lane * VECTOR + i] = sum[i];
    __syncthreads();
    int own = blockIdx.x * WARP * VECTOR + threadIdx.x;
    if (threadIdx.x >= WARP * VECTOR || own >= cols) return;
    float total = 0;
#pragma unroll
    for (int w = 0; w < 8; w++) total += sums[w][threadIdx.x];
    part[(u64)blockIdx.y * cols + own] = total / n[own];
}

// y = factor x where x is kept, else 0, or adds it. Eight elements a thread: two draws. Moves 2 or
// 3 R C S.
extern "C" __global__ void __launch_bounds__(256) dora_mask(real* y, const real* x,
    long long count, long long seed, long long step, int layer, int threshold, float factor,
    int accumulate)
{
    long long begin = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * CAST;
    if (begin >= count) return;
    u32 limit = threshold, kept = 0;
#pragma unroll
    for (int k = 0; k < CAST / 4; k++)
    {
        uint4 draw = philox((u64)seed, (u64)step, (u32)layer, (u32)(begin >> 2) + k);
        kept |= ((draw.x >= limit) | (draw.y >= limit) << 1 | (draw.z >= limit) << 2
            | (draw.w >= limit) << 3) << 4 * k;
    }
    float v[VECTOR];
#pragma unroll
    for (int j = 0; j < CAST; j += VECTOR)
    {
        bool whole = is_whole(begin + j, count, y, x);
        load_run(v, x, begin + j, count, whole);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) v[i] *= kept >> (j + i) & 1 ? factor : 0.0f;
        store_run(y, v, begin + j, count, whole, accumulate);
    }
}
