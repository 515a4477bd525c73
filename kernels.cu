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
//      SwiGLU, rotary embedding          13  quantised weights
//                                         14  around linear attention: gated norm, output
//                                             gate, causal convolution
//                                         15  gated delta rule
//                                         16  magnitudes of weight-decomposed adapters
//                                         17  mixture of experts
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
#else
typedef float2 real2;
DEVICE float widen_low(real2 p) { return p.x; }
DEVICE float widen_high(real2 p) { return p.y; }
DEVICE real2 narrow_pair(float low, float high) { return make_float2(low, high); }
DEVICE real2 pair_of(real low, real high) { return make_float2(low, high); }
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

// Elements col to col + 7 (col a multiple of 8) of a row that ends at cols; zeros behind its end.
// wide says that all rows start at multiples of 16 bytes and end at one; eight floats are two of
// them, so that a row may end between.
DEVICE void load_pairs(real2* p, const real* row, int col, int cols, bool wide)
{
    if (wide && col + 8 <= cols)
    {
        u32 words[8 * sizeof(real) / 4];
        load_words<8 * sizeof(real) / 4>(words, row + col);
#pragma unroll
        for (int i = 0; i < 4; i++)
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
    for (int i = 0; i < 4; i++)
    {
        int c = col + 2 * i;
        p[i] = narrow_pair(
            c < cols ? widen(row[c]) : 0.0f, c + 1 < cols ? widen(row[c + 1]) : 0.0f);
    }
}

// The reverse; nothing is written behind the end.
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

// An index outside its table, for the host to report: which argument (a KernelFault), where in it,
// what stood there. The first one found is kept; faults[0] is 0 while all is well.
DEVICE void report(int* faults, int what, int position, int value, int limit)
{
    if (atomicCAS(faults, 0, what) != 0) return;
    faults[1] = position;
    faults[2] = value;
    faults[3] = limit;
}

// Where a sequence of a packed batch starts. A wrong list makes results without meaning, which the
// host refuses (check_starts), but no access outside of anything.
DEVICE int start_at(const int* starts, int sequence, int tokens)
{
    return min(max(starts[sequence], 0), tokens);
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

// Philox4x32-10 (Salmon et al. 2011): counter (block, layer, step low, step high), key the seed;
// which elements a block is for is the caller's. The same numbers as on the CPU.
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
    float epsilon, float weight_centre)
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
        for (int i = 0; i < KEPT; i++) v[i] = (v[i] - centre) * scale * (g[i] + weight_centre);
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
// and where mean and b are null, with nothing in their place, RMSNorm; weight_centre is added to w.
// A block per row, which has no more warps than the row needs. Moves 2 R C S + 8 R + 8 C bytes, 4
// (RMSNorm) to 7 R C FLOP.
extern "C" __global__ void __launch_bounds__(256) norm_forward(
    real* y, float* mean, float* rstd, const real* x, const float* w, const float* b, int cols,
    float epsilon, float weight_centre)
{
    bool wide = aligned16(x, cols, sizeof(real)) && aligned16(y, cols, sizeof(real))
        && aligned16(w, 4, 4) && aligned16(b, 4, 4);
    if (wide) norm_forward_row<true>(y, mean, rstd, x, w, b, cols, epsilon, weight_centre);
    else norm_forward_row<false>(y, mean, rstd, x, w, b, cols, epsilon, weight_centre);
}

template <bool WIDE> DEVICE void norm_backward_row(
    real* dx, const real* dy, const real* x, const float* w, const float* mean, const float* rstd,
    int cols, int accumulate, float weight_centre)
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
            g[i] *= other[i] + weight_centre;
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
            for (int i = 0; i < KEPT; i++) g[i] *= other[i] + weight_centre;
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
    int cols, int accumulate, float weight_centre)
{
    bool wide = aligned16(x, cols, sizeof(real)) && aligned16(dx, cols, sizeof(real))
        && aligned16(dy, cols, sizeof(real)) && aligned16(w, 4, 4);
    if (wide) norm_backward_row<true>(dx, dy, x, w, mean, rstd, cols, accumulate, weight_centre);
    else norm_backward_row<false>(dx, dy, x, w, mean, rstd, cols, accumulate, weight_centre);
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

// y = v where x > 0, else 0, or adds it: ReLU, where v is x itself and not given, and its gradient
// of v = dy. Moves 2 R C S, 3 with v, one more when adding.
extern "C" __global__ void __launch_bounds__(256) relu(
    real* y, const real* x, const real* v, long long count, int accumulate)
{
    long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    bool whole = is_whole(i, count, y, x, v);
    float a[VECTOR], g[VECTOR];
    load_run(a, x, i, count, whole);
    if (v) load_run(g, v, i, count, whole);
#pragma unroll
    for (int j = 0; j < VECTOR; j++)
        g[j] = a[j] <= 0 ? 0 : v ? g[j] : a[j];
    store_run(y, g, i, count, whole, accumulate);
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
// [limit, half]; a row with a position outside them becomes zeros. Columns of a head behind both
// halves stay as they are. A block per row, 16 bytes of both halves per thread where half allows
// it. Moves 2 R C S, or 3 when adding, + 4 R C bytes of
// tables, of which heads share each row; 3 R C FLOP.
extern "C" __global__ void __launch_bounds__(256) rope(
    real* y, const real* x, const int* positions, const float* cosines, const float* sines,
    int* faults, int cols, int head, int half, int limit, float direction, int accumulate)
{
    int row = blockIdx.x, position = positions[row];
    bool known = position >= 0 && position < limit;
    if (!known && threadIdx.x == 0) report(faults, FAULT_ROPE_POSITIONS, row, position, limit);
    bool wide = aligned16(x, half, sizeof(real)) && aligned16(y, half, sizeof(real))
        && aligned16(cosines, half, 4) && aligned16(sines, half, 4) && head % VECTOR == 0;
    int step = wide ? VECTOR : 1;
    for (int i = threadIdx.x * step; i < cols / head * half; i += blockDim.x * step)
    {
        int k = i % half;
        u64 table = (u64)(known ? position : 0) * half + k;
        u64 at = (u64)row * cols + i / half * head + k;
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
    int rest = head - 2 * half;
    for (int i = threadIdx.x * step; i < cols / head * rest; i += blockDim.x * step)
    {
        u64 at = (u64)row * cols + i / rest * head + 2 * half + i % rest;
        float a[VECTOR];
        load_run(a, x, at, at + step, wide);
        store_run(y, a, at, at + step, wide, accumulate);
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

// y[s, t, 3 c + j] = x[s, stride t + j - 1, c], j = 0 .. 2, zero outside the frames: the inputs of
// a convolution over time. One block per row of y; the three frames stay in the first cache. Moves
// (1 + 3) R C S, x read once.
#define UNFOLD_TAPS 3

extern "C" __global__ void __launch_bounds__(256) unfold_forward(
    real* y, const real* x, int frames, int out_frames, int channels, int stride)
{
    int clip = blockIdx.x / out_frames, first = (blockIdx.x % out_frames) * stride - 1;
    const real* from = x + (u64)clip * frames * channels;
    real* to = y + (u64)blockIdx.x * UNFOLD_TAPS * channels;
    for (int i = threadIdx.x; i < UNFOLD_TAPS * channels; i += blockDim.x)
    {
        int frame = first + i % UNFOLD_TAPS;
        to[i] = narrow((u32)frame < (u32)frames
            ? widen(from[(u64)frame * channels + i / UNFOLD_TAPS]) : 0);
    }
}

// dx[s, u, c] = sum over j of dy[s, t, 3 c + j] where stride t + j - 1 = u, or adds it. One block
// per frame. Moves the same.
extern "C" __global__ void __launch_bounds__(256) unfold_backward(
    real* dx, const real* dy, int frames, int out_frames, int channels, int stride, int accumulate)
{
    int clip = blockIdx.x / frames, frame = blockIdx.x % frames;
    const real* from = dy + (u64)clip * out_frames * UNFOLD_TAPS * channels;
    real* to = dx + (u64)blockIdx.x * channels;
    for (int c = threadIdx.x; c < channels; c += blockDim.x)
    {
        float sum = accumulate ? widen(to[c]) : 0;
#pragma unroll
        for (int j = 0; j < UNFOLD_TAPS; j++)
        {
            int at = frame + 1 - j, t = at / stride;
            if (at >= 0 && at % stride == 0 && t < out_frames)
                sum += widen(from[((u64)t * channels + c) * UNFOLD_TAPS + j]);
        }
        to[c] = narrow(sum);
    }
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
// Of a row's mask a word has 32 columns: bit p is that of column 2p, bit 16 + p of column 2p + 1,
// set where the element is kept. So a shift brings those of two neighbours to the signs of a
// word's halves. A row's words are a multiple of four, 16 bytes.

// mask[y, r, w] for the adapter whose layer is y's. Writes rows words 4 bytes for each adapter; a
// draw for eight elements, 16 bits for each, which is what it waits for.
extern "C" __global__ void __launch_bounds__(256) dropout_mask(
    int* mask, int rows, int words, long long seed, long long step, int layer0, int layer1,
    int layer2, int threshold)
{
    u32 i = blockIdx.x * blockDim.x + threadIdx.x, count = (u32)rows * words, bits = 0;
    if (i >= count) return;
    u32 layer = blockIdx.y == 0 ? layer0 : blockIdx.y == 1 ? layer1 : layer2;
    u32 limit = (u32)threshold << 16;
#pragma unroll
    for (int k = 0; k < 4; k++)
    {
        uint4 draw = philox((u64)seed, (u64)step, layer, 4 * i + k);
        u32 words_of[4] = {draw.x, draw.y, draw.z, draw.w};
#pragma unroll
        for (int j = 0; j < 4; j++)
        {
            if (words_of[j] << 16 >= limit) bits |= 1u << (4 * k + j);
            if (words_of[j] >= limit) bits |= 0x10000u << (4 * k + j);
        }
    }
    mask[(u64)blockIdx.y * count + i] = (int)bits;
}

// Two neighbours times 1 or 0 as the signs of keep's halves say: a NaN stays one. The factor
// 1 / (1 - p) comes when sums are done.
DEVICE real2 drop(real2 p, u32 keep)
{
#if defined(STORAGE_BF16)
    u32 factor;
    asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(factor) : "r"(keep)); // a byte is its sign
    factor &= 0x3f803f80;                                          // 1, 1
    asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(p) : "r"(factor), "r"(0x80008000)); // - 0
    return p;
#else
    return narrow_pair(p.x * (keep & 0x8000 ? 1.0f : 0.0f), p.y * (keep >> 31 ? 1.0f : 0.0f));
#endif
}

// The kernels: LORA_THREADS threads, four warps, have a tile of the result in registers. Tiles of
// the operands and of the mask come by asynchronous copies, LORA_STAGES steps of them in shared
// memory, 25 KiB each (floats: 49): while one is multiplied on the tensor cores the others are on
// their way. A block has the sums of one adapter and of LORA_RANKS of its ranks; where there are
// more, neighbouring blocks find x in cache.
#if defined(STORAGE_BF16)
#define LORA_STAGES 3
#define LORA_BLOCKS 3 // of a multiprocessor, that registers and the 228 KiB of sm_90 are left for
#else
#define LORA_STAGES 2
#define LORA_BLOCKS 1
#endif

alignas(1024) extern __shared__ uint4 lora_shared[];

// Where a stage begins, and in it its tiles: of BIG and LORA_RANKS rows or columns.
template <int BIG, int DEPTH> struct LoraStage
{
    static constexpr int FIRST = BIG * DEPTH * sizeof(real);
    static constexpr int SECOND = LORA_RANKS * DEPTH * sizeof(real);
    static constexpr int MASK = FIRST + SECOND, BYTES = MASK + 1024;
    u32 first, second, mask;

    __device__ __forceinline__ LoraStage(int step)
        : first(shared_address(lora_shared) + step % LORA_STAGES * BYTES), second(first + FIRST),
          mask(first + MASK)
    {
    }
};

template <typename T> DEVICE T* in_shared(u32 address)
{
    return (T*)((char*)lora_shared + (address - shared_address(lora_shared)));
}

// Starts the copy of a tile of rows that lie stride elements apart; what is not within rows and
// cols becomes zeros. Where rows are not made of 16 bytes, elements go through registers.
template <int ROWS, int COLS>
DEVICE void copy_lora_tile(u32 tile, const real* from, int stride, int rows, int cols, bool wide)
{
    constexpr int CHUNKS = COLS / VECTOR, STEP = LORA_THREADS / CHUNKS;
    static_assert(ROWS % STEP == 0, "threads take equal shares");
    int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS, col = chunk * VECTOR;
    from += (u64)row * stride + col;
    if (wide)
    {
#pragma unroll
        for (int i = 0; i < ROWS; i += STEP)
        {
            copy_async_16(tile_address<CHUNKS>(tile, row + i, chunk), from,
                row + i < rows && col < cols);
            from += STEP * stride;
        }
        return;
    }
#pragma unroll 1
    for (int i = 0; i < ROWS; i += STEP)
    {
        float x[VECTOR];
#pragma unroll
        for (int j = 0; j < VECTOR; j++)
            x[j] = row + i < rows && col + j < cols ? widen(from[j]) : 0.0f;
        store_vector(in_shared<real>(tile_address<CHUNKS>(tile, row + i, chunk)), x);
        from += STEP * stride;
    }
}

// The same of WORDS words of the mask of each row, a row per thread.
template <int WORDS> DEVICE void copy_lora_mask(u32 tile, const int* from, int words, int rows)
{
    u32 row = threadIdx.x;
    if (row * WORDS * 4 >= 1024) return;
    from += (u64)row * words;
    if constexpr (WORDS == 4) copy_async_16(tile + row * 16, from, row < rows);
    else copy_async_8(tile + row * 8, from, row < rows);
}

// The 16x16 block at a row and a column of a tile, in the registers of load_matrix_x4: down or
// across first, transposed or not.
template <int COLS, bool DOWN, bool TRANSPOSED>
DEVICE void load_block(real2* r, u32 tile, int row, int col)
{
    int lane = threadIdx.x % WARP;
    constexpr int CHUNKS = COLS / VECTOR;
#if defined(STORAGE_BF16)
    u32 own = DOWN ? tile_address<CHUNKS>(tile, lane % 16, lane / 16)
                   : tile_address<CHUNKS>(tile, lane / 16 * 8 + lane % 8, lane / 8 % 2);
    own = tile_step<CHUNKS>(own, row, col / VECTOR);
    if constexpr (TRANSPOSED) load_matrix_x4_transposed(r, own);
    else load_matrix_x4(r, own);
#else
    int g = lane / 4, t2 = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; i++)
    {
        int m = row + (DOWN ? i % 2 : i / 2) * 8 + (TRANSPOSED ? t2 : g);
        int n = col + (DOWN ? i / 2 : i % 2) * 8 + (TRANSPOSED ? g : t2);
        float x[2];
#pragma unroll
        for (int j = 0; j < 2; j++)
        {
            u32 at = tile_address<CHUNKS>(tile, m, n / VECTOR);
            x[j] = in_shared<float>(at)[n % VECTOR];
            (TRANSPOSED ? m : n)++;
        }
        r[i] = make_float2(x[0], x[1]);
    }
#endif
}

#define INLINED __attribute__((always_inline)) // a lambda: kernels call no functions

// Runs through the steps: copy starts what a step needs, multiply has it.
template <typename Copy, typename Multiply>
DEVICE void in_stages(int steps, const Copy& copy, const Multiply& multiply)
{
#pragma unroll 1
    for (int step = 1 - LORA_STAGES; step < steps; step++)
    {
        if (step >= 0)
        {
            wait_copies<LORA_STAGES - 2>();
            __syncthreads(); // the step is here, the one before may be overwritten
        }
        if (step + LORA_STAGES - 1 < steps) copy(step + LORA_STAGES - 1);
        commit_copies();
        if (step >= 0) multiply(step);
    }
}

// Of up to three adapters the one of a number.
template <typename T> DEVICE T* of_adapter(int n, T* first, T* second, T* third)
{
    return n == 0 ? first : n == 1 ? second : third;
}

DEVICE void put_two(float* to, float a, float b) { *(float2*)to = make_float2(a, b); }
DEVICE void put_two(bf16* to, float a, float b) { *(u32*)to = narrow_bf16x2(a, b); }
DEVICE void put_one(float* to, float a) { *to = a; }
DEVICE void put_one(bf16* to, float a) { *to = narrow_bf16(a); }

// Writes, from an offset on, scale times a lane's sums of a row, d[n][2 half] and its neighbour for
// columns 8n and 8n + 1, `left` of which the row still has; or adds it to the floats there. pairs
// says that two can be written as one.
template <int N, typename T>
DEVICE void put_sums(T* to, u64 at, const float (*d)[4], int half, float scale, int left,
    bool pairs, bool accumulate)
{
    asm("" : "+l"(at)); // what is further lies at constants from here
    to += at;
    float low[N], high[N];
#pragma unroll
    for (int n = 0; n < N; n++)
    {
        low[n] = scale * d[n][2 * half];
        high[n] = scale * d[n][2 * half + 1];
    }
    if (accumulate)
    {
#pragma unroll
        for (int n = 0; n < N; n++)
        {
            if (8 * n < left) low[n] += to[8 * n];
            if (8 * n + 1 < left) high[n] += to[8 * n + 1];
        }
    }
    if (pairs)
    {
#pragma unroll
        for (int n = 0; n < N; n++)
            if (8 * n < left) put_two(to + 8 * n, low[n], high[n]);
        return;
    }
#pragma unroll
    for (int n = 0; n < N; n++)
    {
        if (8 * n < left) put_one(to + 8 * n, low[n]);
        if (8 * n + 1 < left) put_one(to + 8 * n + 1, high[n]);
    }
}

// h[n, r, k] = scale * sum over c of mask x[r, c] a_n[k, c], or its sum over the columns of part z
// in part[z, n, r, k]. A block has LORA_DOWN_ROWS rows, a warp 32 of them, LORA_DOWN_COLS columns
// at a time. Reads R C S of x once from memory, and a from cache; writes h. 2 R C rank FLOP for
// each adapter, ranks rounded up to 64.
extern "C" __global__ void __launch_bounds__(LORA_THREADS, LORA_BLOCKS) lora_down(
    real* h, float* part, const real* x, const int* mask, const real* a0, const real* a1,
    const real* a2, int rows, int cols, int rank, int adapters, int words, int cols_per_part,
    float scale)
{
    constexpr int COLS = LORA_DOWN_COLS;
    static_assert(LORA_DOWN_ROWS == 4 * 32 && COLS == 2 * 32, "what four warps and two words have");
    using Stage = LoraStage<LORA_DOWN_ROWS, COLS>;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    int chunks = (rank + LORA_RANKS - 1) / LORA_RANKS, chunk = blockIdx.x % (chunks * adapters);
    int first_row = blockIdx.x / (chunks * adapters) * LORA_DOWN_ROWS;
    int adapter = chunk / chunks, first_rank = chunk % chunks * LORA_RANKS;
    int begin = blockIdx.z * cols_per_part, end = min(cols, begin + cols_per_part);
    const real* a = of_adapter(adapter, a0, a1, a2);
    bool wide = aligned16(x, cols, sizeof(real)), wide_a = aligned16(a, cols, sizeof(real));
    const real *own_x = x + (u64)first_row * cols, *own_a = a + (u64)first_rank * cols;
    const int* own_mask = mask + ((u64)adapter * rows + first_row) * words;
    float d[2][LORA_RANKS / 8][4] = {};
    in_stages(
        (end - begin + COLS - 1) / COLS,
        [&](int step) INLINED
        {
            Stage to(step);
            int c = begin + step * COLS;
            copy_lora_tile<LORA_DOWN_ROWS, COLS>(
                to.first, own_x + c, cols, rows - first_row, end - c, wide);
            copy_lora_tile<LORA_RANKS, COLS>(
                to.second, own_a + c, cols, rank - first_rank, end - c, wide_a);
            copy_lora_mask<2>(to.mask, own_mask + c / 32, words, rows - first_row);
        },
        [&](int step) INLINED
        {
            Stage from(step);
#pragma unroll
            for (int k = 0; k < COLS; k += 16)
            {
                real2 left[2][4];
#pragma unroll
                for (int m = 0; m < 2; m++)
                {
                    int r = warp * 32 + m * 16;
                    load_block<COLS, true, false>(left[m], from.first, r, k);
#pragma unroll
                    for (int i = 0; i < 4; i++)
                    {
                        // Columns 2t, 2t + 1 of the word's first, second, ... eight.
                        u32 word = in_shared<u32>(
                            from.mask)[(r + i % 2 * 8 + g) * 2 + k / 32] << (3 - t);
                        left[m][i] = drop(left[m][i], word << (12 - k % 32 / 2 - i / 2 * 4));
                    }
                }
#pragma unroll
                for (int n = 0; n < LORA_RANKS / 8; n += 2)
                {
                    real2 right[4];
                    load_block<COLS, false, false>(right, from.second, n * 8, k);
#pragma unroll
                    for (int m = 0; m < 2; m++)
                    {
                        multiply_add_16x8x16(d[m][n], left[m], right);
                        multiply_add_16x8x16(d[m][n + 1], left[m], right + 2);
                    }
                }
            }
        });
#pragma unroll
    for (int i = 0; i < 4; i++)
    {
        int r = first_row + warp * 32 + i * 8 + g;
        if (r >= rows) break;
        u64 at = (u64)(adapter * rows + r) * rank + first_rank + 2 * t;
        int left = rank - first_rank - 2 * t;
        if (part != nullptr)
            put_sums<LORA_RANKS / 8>(part, (u64)(blockIdx.z * adapters * rows) * rank + at,
                d[i / 2], i % 2, scale, left, rank % 2 == 0, false);
        else
            put_sums<LORA_RANKS / 8>(h, at, d[i / 2], i % 2, scale, left,
                rank % 2 == 0 && (u64)h % (2 * sizeof(real)) == 0, false);
    }
}

// A thread's four of to[i] = sum of part[p, i] over p, in order; or adds it.
template <typename T>
DEVICE void sum_four(T* to, const float* part, int parts, long long count, bool accumulate)
{
    long long i = 4 * ((long long)blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= count) return;
    if (count % 4 != 0 || ((u64)to & 7) != 0)
    {
        for (long long end = min(i + 4, count); i < end; i++)
        {
            float sum = 0;
            for (int p = 0; p < parts; p++) sum += part[p * count + i];
            put_one(to + i, accumulate ? to[i] + sum : sum);
        }
        return;
    }
    float sum[4] = {};
#pragma unroll 4
    for (int p = 0; p < parts; p++)
    {
        float4 v = *(const float4*)(part + p * count + i);
        sum[0] += v.x;
        sum[1] += v.y;
        sum[2] += v.z;
        sum[3] += v.w;
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (accumulate) sum[j] += to[i + j];
    put_two(to + i, sum[0], sum[1]);
    put_two(to + i + 2, sum[2], sum[3]);
}

// h[i] = sum of part[p, i] over p, in order.
extern "C" __global__ void __launch_bounds__(256) lora_down_parts(
    real* h, const float* part, int parts, long long count)
{
    sum_four(h, part, parts, count, false);
}

// da_n[i] = sum of part[n, p, i] over p, in order, or adds it where bit n of accumulate is set; n
// is y, and a da that is not there is not wanted.
extern "C" __global__ void __launch_bounds__(256) lora_gradient_a_parts(float* da0, float* da1,
    float* da2, const float* part, int parts, long long count, int accumulate)
{
    float* da = of_adapter(blockIdx.y, da0, da1, da2);
    if (da != nullptr)
        sum_four(da, part + blockIdx.y * parts * count, parts, count,
            accumulate >> blockIdx.y & 1);
}

// dx[r, c] = scale * sum over n of mask_n * sum over k of t[n, r, k] a_n[k, c], or adds it. A block
// has LORA_X_ROWS rows and LORA_X_COLS columns, a warp 32 rows and 64 columns. Writes (or reads and
// writes) R C S of dx, the rest from cache. 2 R C rank FLOP for each adapter, ranks rounded up to
// 64.
extern "C" __global__ void __launch_bounds__(LORA_THREADS, LORA_BLOCKS) lora_gradient_x(
    real* dx, const real* t, const int* mask, const real* a0, const real* a1, const real* a2,
    int rows, int cols, int rank, int adapters, int words, int accumulate, float scale)
{
    constexpr int ROWS = LORA_X_ROWS, COLS = LORA_X_COLS, RANKS = LORA_RANKS;
    static_assert(ROWS == 2 * 32 && COLS == 2 * 64, "what four warps have");
    using Stage = LoraStage<COLS, RANKS>;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, q = lane % 4;
    int first_row = blockIdx.y * ROWS, first_col = blockIdx.x * COLS;
    int own_row = warp / 2 * 32, own_col = warp % 2 * 64;
    int chunks = (rank + RANKS - 1) / RANKS;
    bool wide_t = aligned16(t, rank, sizeof(real));
    float sum[2][8][4] = {};
    in_stages(
        adapters * chunks,
        [&](int step) INLINED
        {
            Stage to(step);
            int n = step / chunks, k = step % chunks * RANKS;
            const real* a = of_adapter(n, a0, a1, a2);
            u64 row = (u64)n * rows + first_row;
            copy_lora_tile<RANKS, COLS>(to.first, a + (u64)k * cols + first_col, cols, rank - k,
                cols - first_col, aligned16(a, cols, sizeof(real)));
            copy_lora_tile<ROWS, RANKS>(
                to.second, t + row * rank + k, rank, rows - first_row, rank - k, wide_t);
            copy_lora_mask<4>(
                to.mask, mask + row * words + first_col / 32, words, rows - first_row);
        },
        [&](int step) INLINED
        {
            Stage from(step);
            real2 left[2][RANKS / 16][4];
            u32 keep[2][2][2];
#pragma unroll
            for (int m = 0; m < 2; m++)
            {
#pragma unroll
                for (int k = 0; k < RANKS / 16; k++)
                    load_block<RANKS, true, false>(
                        left[m][k], from.second, own_row + m * 16, k * 16);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    keep[m][i / 2][i % 2] = in_shared<u32>(from.mask)[
                        (own_row + m * 16 + i / 2 * 8 + g) * 4 + own_col / 32 + i % 2] >> q;
            }
#pragma unroll
            for (int n = 0; n < 8; n += 2)
            {
                float d[2][2][4] = {};
#pragma unroll
                for (int k = 0; k < RANKS / 16; k++)
                {
                    real2 right[4];
                    load_block<COLS, true, true>(right, from.first, k * 16, own_col + n * 8);
#pragma unroll
                    for (int m = 0; m < 2; m++)
                    {
                        multiply_add_16x8x16(d[m][0], left[m][k], right);
                        multiply_add_16x8x16(d[m][1], left[m][k], right + 2);
                    }
                }
#pragma unroll
                for (int i = 0; i < 16; i++)
                {
                    // Columns 2q, 2q + 1 of eights n and n + 1, of rows g and g + 8.
                    int m = i / 8, j = i / 4 % 2;
                    u32 bit = (n + j) % 4 * 4 + i % 2 * 16;
                    sum[m][n + j][i % 4] += d[m][j][i % 4]
                        * (keep[m][i / 2 % 2][n / 4] >> bit & 1 ? scale : 0.0f);
                }
            }
        });
    // A warp's sums become rows through its own shared memory, 32 columns at a time.
    __syncthreads();
    u32 own = shared_address(lora_shared) + warp * 4096;
    bool wide = aligned16(dx, cols, sizeof(real));
#pragma unroll
    for (int half = 0; half < 2; half++)
    {
#pragma unroll
        for (int i = 0; i < 16; i++)
        {
            int row = i / 4 * 8 + g, n = i % 4;
            const float* from = sum[i / 8][half * 4 + n] + i / 4 % 2 * 2;
            *in_shared<float2>(tile_address<8>(own, row, 2 * n + q / 2) + q % 2 * 8) =
                make_float2(from[0], from[1]);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++)
        {
            int row = i * 8 + g, r = first_row + own_row + row;
            int c = first_col + own_col + half * 32 + 8 * q;
            float4 low = *in_shared<float4>(tile_address<8>(own, row, 2 * q));
            float4 high = *in_shared<float4>(tile_address<8>(own, row, 2 * q + 1));
            if (r >= rows || c >= cols) continue;
            float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            real2 values[4];
            load_pairs(values, dx + (u64)r * cols, c, accumulate ? cols : 0, wide);
#pragma unroll
            for (int j = 0; j < 4; j++)
                values[j] = narrow_pair(
                    widen_low(values[j]) + v[2 * j], widen_high(values[j]) + v[2 * j + 1]);
            store_pairs(dx + (u64)r * cols, values, c, cols, wide);
        }
        __syncwarp();
    }
}

// da_n[y, k, c] = scale * sum of t[n, r, k] mask_n x[r, c] over the rows r of part y, or adds it
// where bit n of accumulate is set; a da that is not there is not wanted. A block has LORA_A_COLS
// columns, a warp 32 of them, LORA_A_ROWS rows at a time. Reads R C S of x once from memory, t from
// cache; writes 4 rank C for each adapter and part. 2 R C rank FLOP for each, ranks rounded up to
// 64.
extern "C" __global__ void __launch_bounds__(LORA_THREADS, LORA_BLOCKS) lora_gradient_a(
    float* da0, float* da1, float* da2, const real* t, const real* x, const int* mask, int rows,
    int cols, int rank, int adapters, int words, int rows_per_part, int accumulate, float scale)
{
    constexpr int ROWS = LORA_A_ROWS, COLS = LORA_A_COLS, RANKS = LORA_RANKS;
    static_assert(ROWS == 64 && COLS == 4 * 32, "what a mask's tile has, and four warps");
    using Stage = LoraStage<COLS, ROWS>;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, q = lane % 4;
    int chunks = (rank + RANKS - 1) / RANKS, chunk = blockIdx.x % (chunks * adapters);
    int first_col = blockIdx.x / (chunks * adapters) * COLS;
    int adapter = chunk / chunks, first_rank = chunk % chunks * RANKS;
    int begin = blockIdx.y * rows_per_part, end = min(rows, begin + rows_per_part);
    float* da = of_adapter(adapter, da0, da1, da2);
    if (da == nullptr) return;
    accumulate = accumulate >> adapter & 1;
    bool wide = aligned16(x, cols, sizeof(real)), wide_t = aligned16(t, rank, sizeof(real));
    // Rows 2q and 2q + 1 of the columns of g's parity, as halves of a word.
    u32 halves = g % 2 ? 0x7632 : 0x5410;
    float d[RANKS / 16][4][4] = {};
    in_stages(
        (end - begin + ROWS - 1) / ROWS,
        [&](int step) INLINED
        {
            Stage to(step);
            int r = begin + step * ROWS;
            u64 row = (u64)adapter * rows + r;
            copy_lora_tile<ROWS, COLS>(to.first, x + (u64)r * cols + first_col, cols, end - r,
                cols - first_col, wide);
            copy_lora_tile<ROWS, RANKS>(to.second, t + row * rank + first_rank, rank, end - r,
                rank - first_rank, wide_t);
            copy_lora_mask<4>(to.mask, mask + row * words + first_col / 32, words, end - r);
        },
        [&](int step) INLINED
        {
            Stage from(step);
#pragma unroll
            for (int k = 0; k < ROWS; k += 16)
            {
                real2 left[RANKS / 16][4];
#pragma unroll
                for (int m = 0; m < RANKS / 16; m++)
                    load_block<RANKS, false, true>(left[m], from.second, k, m * 16);
                u32 keep[2];
#pragma unroll
                for (int i = 0; i < 2; i++)
                {
                    const u32* row =
                        in_shared<u32>(from.mask) + (k + i * 8 + 2 * q) * 4 + warp;
                    keep[i] = __byte_perm(row[0], row[4], halves) << (3 - g / 2);
                }
#pragma unroll
                for (int n = 0; n < 4; n += 2)
                {
                    real2 right[4];
                    load_block<COLS, true, true>(right, from.first, k, warp * 32 + n * 8);
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        right[i] = drop(right[i], keep[i % 2] << (12 - 4 * (n + i / 2)));
#pragma unroll
                    for (int m = 0; m < RANKS / 16; m++)
                    {
                        multiply_add_16x8x16(d[m][n], left[m], right);
                        multiply_add_16x8x16(d[m][n + 1], left[m], right + 2);
                    }
                }
            }
        });
    bool pairs = cols % 2 == 0 && ((u64)da & 7) == 0;
#pragma unroll
    for (int i = 0; i < RANKS / 8; i++)
    {
        int k = first_rank + i * 8 + g;
        if (k >= rank) break;
        int c = first_col + warp * 32 + 2 * q;
        put_sums<4>(da, ((u64)blockIdx.y * rank + k) * cols + c, d[i / 2], i % 2, scale, cols - c,
            pairs, accumulate);
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

// -- one query of a sequence over its keys in a cache, as answers are generated --
//
// A block has the heads of one token that share a key head, ATTENTION_DECODE_HEADS of them at most,
// and a share of the keys, so that a single query fills the GPU; every key and value is read once
// for all of these heads. With more than one share each leaves a part, which attention_decode_merge
// joins: floats [splits, tokens, heads, dim + 2], the output before it is divided, the largest
// score and the sum of p. Shares depend on how many keys count, not on the room.

// Keys of a share: whole rounds of a block.
DEVICE int decode_share(int seen, int splits)
{
    constexpr int ROUND = ATTENTION_DECODE_KEYS;
    return max(ROUND, ((seen + splits - 1) / splits + ROUND - 1) / ROUND * ROUND);
}

// The sequence that a token belongs to.
DEVICE SequenceTile tile_of_token(const AttentionMask& mask, int token)
{
    SequenceTile at;
    int s = 0;
    while (s + 1 < mask.sequences && mask.starts_q[s + 1] <= token) s++;
    at.sequence = s;
    at.first = 0;
    at.first_token = start_at(mask.starts_q, s, mask.tokens);
    at.queries = start_at(mask.starts_q, s + 1, mask.tokens) - at.first_token;
    at.first_key_token = start_at(mask.starts_k, s, mask.key_tokens);
    at.keys = max(0, start_at(mask.starts_k, s + 1, mask.key_tokens) - at.first_key_token);
    at.visible = mask.key_lengths ? max(0, min(at.keys, mask.key_lengths[s])) : at.keys;
    at.before = (mask.causal == 2 ? at.visible : at.keys) - at.queries;
    return at;
}

// o and lse as attention_forward_tile has them, dim a multiple of 8. Grid: splits x key heads x
// parts of their heads, and tokens. Shared memory: floats q[heads, dim] and 8 per thread. Moves k
// and v of the keys that count once, 4 dim FLOP per query and key; the rest is small.
extern "C" __global__ void __launch_bounds__(128) attention_decode(
    real* o, float* lse, float* parts, const real* q, const real* k, const real* v,
    const int* starts_q, const int* starts_k, const int* key_lengths, int* faults, int sequences,
    int tokens, int key_tokens, int causal, int heads, int kv_heads, int dim, float scale,
    int splits)
{
    constexpr int HEADS = ATTENTION_DECODE_HEADS, KEYS = ATTENTION_DECODE_KEYS, THREADS = 128;
    constexpr int EIGHTS = THREADS / 8, WARPS = THREADS / WARP, OWN = HEADS / WARPS;
    constexpr int CHUNKS = ATTENTION_MOST_COLS / 64; // of 8 elements, for each of 8 lanes
    static_assert(KEYS == 2 * WARP && KEYS % (2 * EIGHTS) == 0, "two keys a lane");
    extern __shared__ float4 decode_shared[];
    __shared__ float scores[HEADS][KEYS], keeps[HEADS], sums[HEADS], maxima[HEADS];
    AttentionMask mask
        = {starts_q, starts_k, key_lengths, sequences, tokens, key_tokens, causal};
    if (blockIdx.x == 0 && blockIdx.y == 0) check_starts(faults, mask);
    int token = blockIdx.y, split = blockIdx.x % splits, group = heads / kv_heads;
    int pieces = (group + HEADS - 1) / HEADS, piece = blockIdx.x / splits;
    int kv_head = piece / pieces, head = kv_head * group + piece % pieces * HEADS;
    int own = min(HEADS, (kv_head + 1) * group - head);
    SequenceTile at = tile_of_token(mask, token);
    int seen = keys_seen(causal, at, token - at.first_token);
    int share = decode_share(seen, splits), first = split * share;
    int end = min(seen, first + share);
    if (split > 0 && first >= end) return;

    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int eight = threadIdx.x / 8, eighth = threadIdx.x % 8;
    int chunks = dim / 8, chunk = threadIdx.x % chunks, rows = THREADS / chunks;
    int row = threadIdx.x / chunks;
    float* query = (float*)decode_shared;
    float* reduced = query + HEADS * dim;
    long long first_row = ((long long)token * heads + head) * dim;
    long long first_key = ((long long)at.first_key_token * kv_heads + kv_head) * dim;
    long long stride = (long long)kv_heads * dim;
    // Of heads that are not there too, as compilers may read them in advance.
    for (int i = threadIdx.x; i < HEADS * dim; i += THREADS)
        query[i] = i < own * dim ? widen(q[first_row + i]) : 0;
    for (int i = threadIdx.x; i < HEADS * KEYS; i += THREADS) scores[i / KEYS][i % KEYS] = 0;
    if (threadIdx.x < HEADS)
        keeps[threadIdx.x] = sums[threadIdx.x] = maxima[threadIdx.x] = 0;
    __syncthreads();

    float factor = scale * LOG2_E, max[OWN], sum[OWN], out[HEADS][8] = {};
    for (int i = 0; i < OWN; i++)
    {
        max[i] = MINUS_INFINITY;
        sum[i] = 0;
    }
    for (; first < end; first += KEYS)
    {
        // Scores: eight lanes have a key, two keys at a time.
#pragma unroll 1
        for (int j = 0; j < KEYS; j += 2 * EIGHTS)
        {
            real2 x[2][CHUNKS][4];
#pragma unroll
            for (int i = 0; i < 2; i++)
            {
                int key = first + j + i * EIGHTS + eight;
#pragma unroll
                for (int c = 0; c < CHUNKS; c++)
                    if (key < end && eighth + 8 * c < chunks)
                        load_pairs(x[i][c], k + first_key + key * stride, 8 * (eighth + 8 * c),
                            dim, true);
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
            {
                int at_key = j + i * EIGHTS + eight;
                bool inside = first + at_key < end;
#pragma unroll
                for (int h = 0; h < HEADS; h++)
                {
                    if (h >= own) continue;
                    float dot = 0;
#pragma unroll
                    for (int c = 0; c < CHUNKS; c++)
                    {
                        if (!inside || eighth + 8 * c >= chunks) continue;
                        const float4* y
                            = (const float4*)(query + h * dim + 8 * (eighth + 8 * c));
                        float4 left = y[0], right = y[1];
                        dot += left.x * widen_low(x[i][c][0]) + left.y * widen_high(x[i][c][0])
                            + left.z * widen_low(x[i][c][1]) + left.w * widen_high(x[i][c][1])
                            + right.x * widen_low(x[i][c][2]) + right.y * widen_high(x[i][c][2])
                            + right.z * widen_low(x[i][c][3]) + right.w * widen_high(x[i][c][3]);
                    }
#pragma unroll
                    for (int step = 4; step > 0; step /= 2)
                        dot += __shfl_xor_sync(ALL_LANES, dot, step);
                    if (eighth == h) scores[h][at_key] = inside ? dot : MINUS_INFINITY;
                }
            }
        }
        __syncthreads(); // scores are here

#pragma unroll
        for (int i = 0; i < OWN; i++)
        {
            int h = warp + i * WARPS;
            if (h >= own) continue;
            float left = scores[h][lane], right = scores[h][lane + WARP], before = max[i];
            max[i] = fmaxf(before, warp_max(fmaxf(left, right)));
            float offset = softmax_offset(max[i], factor);
            float keep = softmax_keep(before, offset, factor);
            left = exp2_approx(fmaf(left, factor, -offset));
            right = exp2_approx(fmaf(right, factor, -offset));
            sum[i] = sum[i] * keep + (left + right); // this lane's share
            scores[h][lane] = left;
            scores[h][lane + WARP] = right;
            if (lane == 0) keeps[h] = keep;
        }
        __syncthreads(); // probabilities are here

        if (row < rows)
        {
#pragma unroll
            for (int h = 0; h < HEADS; h++)
#pragma unroll
                for (int i = 0; i < 8; i++)
                    if (h < own) out[h][i] *= keeps[h];
            int count = min(KEYS, end - first);
#pragma unroll 4
            for (int j = row; j < count; j += rows)
            {
                real2 x[4];
                load_pairs(x, v + first_key + (first + j) * stride, 8 * chunk, dim, true);
#pragma unroll
                for (int h = 0; h < HEADS; h++)
                {
                    if (h >= own) continue;
                    float p = scores[h][j];
#pragma unroll
                    for (int i = 0; i < 4; i++)
                    {
                        out[h][2 * i] += p * widen_low(x[i]);
                        out[h][2 * i + 1] += p * widen_high(x[i]);
                    }
                }
            }
        }
        __syncthreads(); // they are used no more
    }

#pragma unroll
    for (int i = 0; i < OWN; i++)
    {
        int h = warp + i * WARPS;
        float total = warp_sum(sum[i]);
        if (lane != 0 || h >= own) continue;
        sums[h] = total;
        maxima[h] = max[i];
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++)
    {
        if (h >= own) continue;
        __syncthreads(); // what is reduced may be written
        if (row < rows)
#pragma unroll
            for (int i = 0; i < 8; i++) reduced[row * dim + 8 * chunk + i] = out[h][i];
        __syncthreads(); // and read
        float total = sums[h];
        float inverse = total == 0 && seen == 0 ? 0 : 1 / total;
        float* part = parts + (((long long)split * tokens + token) * heads + head + h) * (dim + 2);
        for (int c = threadIdx.x; c < dim; c += THREADS)
        {
            float value = 0;
            for (int r = 0; r < rows; r++) value += reduced[r * dim + c];
            if (splits == 1) o[first_row + h * dim + c] = narrow(value * inverse);
            else part[c] = value;
        }
        if (threadIdx.x > 0) continue;
        if (splits == 1)
            lse[(long long)token * heads + head + h]
                = log_sum_exp(maxima[h], total, scale, factor, seen > 0);
        else
        {
            part[dim] = maxima[h];
            part[dim + 1] = total;
        }
    }
}

// Joins the shares of a token's head, in their order. Grid: heads and tokens. Moves the parts once.
extern "C" __global__ void __launch_bounds__(128) attention_decode_merge(
    real* o, float* lse, const float* parts, const int* starts_q, const int* starts_k,
    const int* key_lengths, int sequences, int tokens, int key_tokens, int causal, int heads,
    int dim, float scale, int splits)
{
    int head = blockIdx.x, token = blockIdx.y;
    AttentionMask mask
        = {starts_q, starts_k, key_lengths, sequences, tokens, key_tokens, causal};
    SequenceTile at = tile_of_token(mask, token);
    int seen = keys_seen(causal, at, token - at.first_token);
    int share = decode_share(seen, splits), used = max(1, (seen + share - 1) / share);
    long long row = (long long)token * heads + head, all = (long long)tokens * heads;
    float factor = scale * LOG2_E, largest = MINUS_INFINITY, total = 0;
    for (int s = 0; s < used; s++)
        largest = fmaxf(largest, parts[(s * all + row) * (dim + 2) + dim]);
    float offset = softmax_offset(largest, factor);
    for (int s = 0; s < used; s++)
    {
        const float* part = parts + (s * all + row) * (dim + 2) + dim;
        total += part[1] * softmax_keep(part[0], offset, factor);
    }
    float inverse = total == 0 && seen == 0 ? 0 : 1 / total;
    for (int c = threadIdx.x; c < dim; c += 128)
    {
        float value = 0;
        for (int s = 0; s < used; s++)
        {
            const float* part = parts + (s * all + row) * (dim + 2);
            value += part[c] * softmax_keep(part[dim], offset, factor);
        }
        o[row * dim + c] = narrow(value * inverse);
    }
    if (threadIdx.x == 0) lse[row] = log_sum_exp(largest, total, scale, factor, seen > 0);
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

// ---- 13. quantised weights ----------------------------------------------------------------------

// CAST neighbours at y + i, which is a multiple of 16 bytes, or what there is of them.
DEVICE void store_unpacked(real* y, long long i, long long count, const float* v)
{
    if (i + CAST <= count)
    {
#pragma unroll
        for (int j = 0; j < CAST; j += VECTOR) store_vector(y + i + j, v + j);
        return;
    }
    for (int j = 0; j < CAST && i + j < count; j++) y[i + j] = narrow(v[j]);
}

// Elements of W[outputs, cols] in fewer bits, row-major. load gives CAST neighbours from element i
// on, a multiple of CAST, at its row and column; of those behind the last only what there is.

// table[code] * scale of its block: codes of 4 bits, the first of a byte in its high half, in
// blocks of 2^block_shift elements, at least CAST. The scale of block b is scales[b], or
// scale_table[scale_codes[b]] * scales[(first_block + b) >> scale_shift] + offset, rounded twice.
// values is the table in shared memory, where its 16 lie in as many banks.
struct four_bit
{
    const float* values;
    const unsigned char* codes;
    const float* scales;
    const unsigned char* scale_codes;
    const float* scale_table;
    float offset;
    int block_shift, scale_shift;
    long long first_block, count;

    __device__ __forceinline__ void load(float* v, long long i, long long row, int column) const
    {
        u32 word = 0;
        if (i + CAST <= count)
            word = *(const u32*)(codes + i / 2);
        else
            for (int j = 0; i + 2 * j < count; j++) word |= (u32)codes[i / 2 + j] << 8 * j;
        long long block = i >> block_shift;
        float scale = scale_codes == 0 ? scales[block]
            : __fadd_rn(__fmul_rn(scale_table[scale_codes[block]],
                  scales[(first_block + block) >> scale_shift]), offset);
#pragma unroll
        for (int j = 0; j < CAST; j++)
            v[j] = values[word >> (8 * (j / 2) + 4 - 4 * (j % 2)) & 15] * scale;
    }
};

// The bytes of CAST elements of 8 bits.
DEVICE u64 load_bytes(const void* from, long long i, long long count)
{
    u64 word = 0;
    if (i + CAST <= count) return *(const u64*)((const unsigned char*)from + i);
    for (int j = 0; i + j < count; j++) word |= (u64)((const unsigned char*)from)[i + j] << 8 * j;
    return word;
}

// Signed bytes times scales[row] / 127, the product rounded first.
struct int8_rows
{
    const signed char* codes;
    const float* scales;
    int cols;
    long long count;

    __device__ __forceinline__ void load(float* v, long long i, long long row, int column) const
    {
        u64 word = load_bytes(codes, i, count);
        int left = cols - column;
        float scale = scales[row];
#pragma unroll
        for (int j = 0; j < CAST; j++)
        {
            if (left == 0 && i + j < count) { scale = scales[++row]; left = cols; }
            left--;
            v[j] = __fmul_rn((float)(signed char)(word >> 8 * j), scale) / 127.0f; // rounded twice
        }
    }
};

// (code - zeros[row, g]) * scales[row, g]: unsigned codes of 4 bits, the first of a byte in its low
// half, or of 8. g is the group of the column, group_of[column] or column / size.
struct grouped
{
    const unsigned char* codes;
    const float* scales;
    const unsigned char* zeros;
    const int* group_of;
    int bits, size, groups, cols;
    long long count;

    __device__ __forceinline__ void load(float* v, long long i, long long row, int column) const
    {
        u64 word = 0;
        if (bits == 8)
            word = load_bytes(codes, i, count);
        else if (i + CAST <= count)
            word = *(const u32*)(codes + i / 2);
        else
            for (int j = 0; i + 2 * j < count; j++) word |= (u64)codes[i / 2 + j] << 8 * j;
        u64 mask = (1 << bits) - 1;
        int left = 0, zero = 0;
        float scale = 0;
#pragma unroll
        for (int j = 0; j < CAST; j++)
        {
            if (i + j >= count) break;
            if (left == 0)
            {
                if (column == cols) { column = 0; row++; }
                int group = group_of ? group_of[column] : column / size;
                left = group_of ? 1 : min(size - column % size, cols - column);
                scale = scales[row * groups + group];
                zero = zeros[row * groups + group];
            }
            v[j] = (float)((int)(word >> bits * j & mask) - zero) * scale;
            column++, left--;
        }
    }
};

// y = W, a multiple of 16 bytes as the codes are. A thread takes CAST elements.
template <class Packed> DEVICE void unpack(real* y, const Packed& w, int cols)
{
    long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * CAST;
    if (i >= w.count) return;
    float v[CAST];
    long long row = i / cols;
    w.load(v, i, row, (int)(i - row * cols));
    store_unpacked(y, i, w.count, v);
}

// y = alpha x W^T + beta y for at most FEW_ROWS rows of x: W is unpacked, and rounded to the storage
// type, where it is multiplied by, so that memory gives its own bits once and nothing else. cols is
// a multiple of CAST. A warp has an output; its lanes' sums are joined as a tree.
template <class Packed> DEVICE void multiply_few(void* y, const real* x, const Packed& w, int rows,
    int outputs, int cols, int x_stride, int y_stride, int y_type, float alpha, float beta)
{
    int n = (int)((blockIdx.x * blockDim.x + threadIdx.x) / WARP), lane = threadIdx.x % WARP;
    if (n >= outputs) return;
    bool wide = aligned16(x, x_stride, sizeof(real));
    float sums[FEW_ROWS];
#pragma unroll
    for (int r = 0; r < FEW_ROWS; r++) sums[r] = 0;
    for (int k = lane * CAST; k < cols; k += WARP * CAST)
    {
        float v[CAST], a[CAST];
        w.load(v, (long long)n * cols + k, n, k);
#pragma unroll
        for (int j = 0; j < CAST; j++) v[j] = widen(narrow(v[j]));
#pragma unroll
        for (int r = 0; r < FEW_ROWS; r++)
        {
            if (r >= rows) break;
            const real* from = x + (u64)r * x_stride + k;
#pragma unroll
            for (int j = 0; j < CAST; j += VECTOR)
                if (wide) load_vector(a + j, from + j);
                else
                    for (int i = j; i < j + VECTOR; i++) a[i] = widen(from[i]);
#pragma unroll
            for (int j = 0; j < CAST; j++) sums[r] += a[j] * v[j];
        }
    }
#pragma unroll
    for (int r = 0; r < FEW_ROWS; r++)
    {
        if (r >= rows) break;
        float sum = alpha * warp_sum(sums[r]);
        if (lane != 0) continue;
        u64 at = (u64)r * y_stride + n;
        if (y_type == DTYPE_F32)
            ((float*)y)[at] = beta == 0 ? sum : sum + beta * ((float*)y)[at];
        else
            ((real*)y)[at] = narrow(beta == 0 ? sum : sum + beta * widen(((real*)y)[at]));
    }
}

DEVICE const float* in_banks(float* values, const float* table)
{
    if (threadIdx.x < 16) values[threadIdx.x] = table[threadIdx.x];
    __syncthreads();
    return values;
}

// Reads count / 2 bytes and the scales, writes S count; 1 FLOP each.
extern "C" __global__ void __launch_bounds__(256) unpack_4bit(
    real* y, const float* table, const unsigned char* codes, const float* scales,
    const unsigned char* scale_codes, const float* scale_table, float offset, int block_shift,
    int scale_shift, long long first_block, long long count)
{
    __shared__ float values[16];
    unpack(y, four_bit{in_banks(values, table), codes, scales, scale_codes, scale_table, offset,
        block_shift, scale_shift, first_block, count}, 1);
}

// Reads count / 2 bytes, the scales, and x from the cache; 2 FLOP each and row.
extern "C" __global__ void __launch_bounds__(256) multiply_4bit(
    void* y, const real* x, int rows, int outputs, int cols, int x_stride, int y_stride,
    int y_type, float alpha, float beta, const float* table, const unsigned char* codes,
    const float* scales, const unsigned char* scale_codes, const float* scale_table, float offset,
    int block_shift, int scale_shift, long long first_block, long long count)
{
    __shared__ float values[16];
    multiply_few(y, x, four_bit{in_banks(values, table), codes, scales, scale_codes, scale_table,
        offset, block_shift, scale_shift, first_block, count},
        rows, outputs, cols, x_stride, y_stride, y_type, alpha, beta);
}

// Reads count bytes and the scales, writes S count; 2 FLOP each.
extern "C" __global__ void __launch_bounds__(256) unpack_int8(
    real* y, const signed char* codes, const float* scales, int cols, long long count)
{
    unpack(y, int8_rows{codes, scales, cols, count}, cols);
}

// Reads count bytes, the scales, and x from the cache; 2 FLOP each and row.
extern "C" __global__ void __launch_bounds__(256) multiply_int8(
    void* y, const real* x, int rows, int outputs, int cols, int x_stride, int y_stride,
    int y_type, float alpha, float beta, const signed char* codes, const float* scales)
{
    multiply_few(y, x, int8_rows{codes, scales, cols, (long long)outputs * cols},
        rows, outputs, cols, x_stride, y_stride, y_type, alpha, beta);
}

// Reads count * bits / 8 bytes, zeros and scales, writes S count; 2 FLOP each.
extern "C" __global__ void __launch_bounds__(256) unpack_grouped(
    real* y, const unsigned char* codes, const float* scales, const unsigned char* zeros,
    const int* group_of, int bits, int size, int groups, int cols, long long count)
{
    unpack(y, grouped{codes, scales, zeros, group_of, bits, size, groups, cols, count}, cols);
}

// Reads count * bits / 8 bytes, zeros, scales, and x from the cache; 2 FLOP each and row.
extern "C" __global__ void __launch_bounds__(256, 4) multiply_grouped(
    void* y, const real* x, int rows, int outputs, int cols, int x_stride, int y_stride,
    int y_type, float alpha, float beta, const unsigned char* codes, const float* scales,
    const unsigned char* zeros, const int* group_of, int bits, int size, int groups)
{
    multiply_few(y, x, grouped{codes, scales, zeros, group_of, bits, size, groups, cols,
        (long long)outputs * cols},
        rows, outputs, cols, x_stride, y_stride, y_type, alpha, beta);
}

// ---- 14. around linear attention ----------------------------------------------------------------

// -- gated norm: y = x rstd w silu(gate) --

// The columns of a warp's row, of which each lane has its Share.
#define GATED_WARPS 8

template <bool WIDE> DEVICE void gated_norm_forward_row(real* y, float* rstd, const real* x,
    const float* w, const real* gate, int row, int cols, float epsilon)
{
    Share<WIDE> own = {(int)threadIdx.x % WARP, WARP, cols};
    u64 at = (u64)row * cols;
    const int stretch = WARP * VECTOR;
    float v[VECTOR], g[VECTOR], z[VECTOR], squares = 0;
    for (int first = 0; first < cols; first += stretch)
    {
        own.load(v, x + at, first);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) squares += v[i] * v[i];
    }
    float scale = 1.0f / sqrtf(warp_sum(squares) / cols + epsilon);
    if (threadIdx.x % WARP == 0) rstd[row] = scale;
    for (int first = 0; first < cols; first += stretch)
    {
        own.load(v, x + at, first);
        own.load(z, gate + at, first);
        own.load_weight(g, w, first);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) v[i] *= scale * g[i] * (z[i] * sigmoid(z[i]));
        own.store(y + at, v, first);
    }
}

// A warp per row: rows are heads. Moves 3 R C S + 4 R, of which x may be read twice from cache.
extern "C" __global__ void __launch_bounds__(256) gated_norm_forward(real* y, float* rstd,
    const real* x, const float* w, const real* gate, int rows, int cols, float epsilon)
{
    int row = blockIdx.x * GATED_WARPS + threadIdx.x / WARP;
    if (row >= rows) return;
    bool wide = aligned16(x, cols, sizeof(real)) && aligned16(y, cols, sizeof(real))
        && aligned16(gate, cols, sizeof(real)) && aligned16(w, 4, 4);
    if (wide) gated_norm_forward_row<true>(y, rstd, x, w, gate, row, cols, epsilon);
    else gated_norm_forward_row<false>(y, rstd, x, w, gate, row, cols, epsilon);
}

template <bool WIDE> DEVICE void gated_norm_backward_row(real* dx, real* dgate, const real* dy,
    const real* x, const float* w, const real* gate, const float* rstd, int row, int cols,
    int accumulate_x, int accumulate_gate)
{
    Share<WIDE> own = {(int)threadIdx.x % WARP, WARP, cols};
    u64 at = (u64)row * cols;
    const int stretch = WARP * VECTOR;
    float v[VECTOR], g[VECTOR], z[VECTOR], weight[VECTOR], scale = rstd[row], pull = 0;
    for (int first = 0; first < cols; first += stretch)
    {
        own.load(v, x + at, first);
        own.load(g, dy + at, first);
        own.load(z, gate + at, first);
        own.load_weight(weight, w, first);
#pragma unroll
        for (int i = 0; i < VECTOR; i++)
            pull += g[i] * weight[i] * (z[i] * sigmoid(z[i])) * v[i];
    }
    pull = warp_sum(pull) / cols * scale * scale;
    for (int first = 0; first < cols; first += stretch)
    {
        own.load(v, x + at, first);
        own.load(g, dy + at, first);
        own.load(z, gate + at, first);
        own.load_weight(weight, w, first);
#pragma unroll
        for (int i = 0; i < VECTOR; i++)
        {
            float s = sigmoid(z[i]), through = g[i] * weight[i];
            g[i] = (through * (z[i] * s) - v[i] * pull) * scale;
            z[i] = through * (v[i] * scale) * (s + z[i] * s * (1 - s));
        }
        if (dx)
        {
            if (accumulate_x)
            {
                own.load(v, dx + at, first);
#pragma unroll
                for (int i = 0; i < VECTOR; i++) g[i] += v[i];
            }
            own.store(dx + at, g, first);
        }
        if (dgate)
        {
            if (accumulate_gate)
            {
                own.load(v, dgate + at, first);
#pragma unroll
                for (int i = 0; i < VECTOR; i++) z[i] += v[i];
            }
            own.store(dgate + at, z, first);
        }
    }
}

// dx = rstd (g - n mean_c(g n)) with g = w silu(gate) dy and n = x rstd, dgate = dy w n
// silu'(gate); either may be null. A warp per row. Moves 5 R C S + 4 R.
extern "C" __global__ void __launch_bounds__(256, 2) gated_norm_backward(real* dx, real* dgate,
    const real* dy, const real* x, const float* w, const real* gate, const float* rstd, int rows,
    int cols, int accumulate_x, int accumulate_gate)
{
    int row = blockIdx.x * GATED_WARPS + threadIdx.x / WARP;
    if (row >= rows) return;
    bool wide = aligned16(x, cols, sizeof(real)) && aligned16(dx, cols, sizeof(real))
        && aligned16(dy, cols, sizeof(real)) && aligned16(gate, cols, sizeof(real))
        && aligned16(dgate, cols, sizeof(real)) && aligned16(w, 4, 4);
    if (wide)
        gated_norm_backward_row<true>(dx, dgate, dy, x, w, gate, rstd, row, cols, accumulate_x,
            accumulate_gate);
    else
        gated_norm_backward_row<false>(dx, dgate, dy, x, w, gate, rstd, row, cols, accumulate_x,
            accumulate_gate);
}

// dw[p, c] = sum of dy silu(gate) x rstd[r] over the rows r of part p. A warp has 32 columns of
// eight rows at a time; a block's sums are added in order. Reads 3 R C S + 4 R.
extern "C" __global__ void __launch_bounds__(256) gated_norm_weight_parts(float* dw,
    const real* dy, const real* x, const real* gate, const float* rstd, int rows, int cols,
    int rows_per_part)
{
    __shared__ float sums[GATED_WARPS][WARP];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, c = blockIdx.x * WARP + lane;
    int end = min(rows, (int)(blockIdx.y + 1) * rows_per_part);
    float sum = 0;
    if (c < cols)
    {
#pragma unroll 4
        for (int r = blockIdx.y * rows_per_part + warp; r < end; r += GATED_WARPS)
        {
            u64 at = (u64)r * cols + c;
            float z = widen(gate[at]);
            sum += widen(dy[at]) * (z * sigmoid(z)) * (widen(x[at]) * rstd[r]);
        }
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || c >= cols) return;
    for (int w = 1; w < GATED_WARPS; w++) sum += sums[w][lane];
    dw[(u64)blockIdx.y * cols + c] = sum;
}

// -- output gate of attention: y = x sigmoid(gate), gate the second half of each head of queries --

// An infinite gate is a run that went wrong, and is seen: 0 * infinity is not a number.
DEVICE float open_gate(float z) { return sigmoid(z) + 0 * z; }

// y = x sigmoid(gate), or adds it: forward, and dx from dy. Moves 3 R C S.
extern "C" __global__ void __launch_bounds__(256) sigmoid_gate(real* y, const real* x,
    const real* queries, int head_dim, long long count, int accumulate)
{
    bool wide = aligned16(x, head_dim, sizeof(real)) && aligned16(y, head_dim, sizeof(real))
        && aligned16(queries, head_dim, sizeof(real));
    int step = wide ? VECTOR : 1;
    long long threads = (long long)gridDim.x * blockDim.x;
    for (long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * step; i < count;
        i += threads * step)
    {
        long long gate = 2 * i - i % head_dim + head_dim;
        float v[VECTOR], z[VECTOR];
        load_run(v, x, i, i + step, wide);
        load_run(z, queries, gate, gate + step, wide);
#pragma unroll
        for (int j = 0; j < VECTOR; j++) v[j] *= open_gate(z[j]);
        store_run(y, v, i, i + step, wide, accumulate);
    }
}

// dgate = dy x s (1 - s), or adds it; zeros, or nothing, for the queries. Moves 5 R C S.
extern "C" __global__ void __launch_bounds__(256) sigmoid_gate_backward(real* dqueries,
    const real* dy, const real* x, const real* queries, int head_dim, long long count,
    int accumulate)
{
    bool wide = aligned16(x, head_dim, sizeof(real)) && aligned16(dy, head_dim, sizeof(real))
        && aligned16(queries, head_dim, sizeof(real))
        && aligned16(dqueries, head_dim, sizeof(real));
    int step = wide ? VECTOR : 1;
    long long threads = (long long)gridDim.x * blockDim.x;
    for (long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * step; i < count;
        i += threads * step)
    {
        long long query = 2 * i - i % head_dim, gate = query + head_dim;
        float v[VECTOR], z[VECTOR], g[VECTOR], none[VECTOR] = {};
        load_run(v, x, i, i + step, wide);
        load_run(g, dy, i, i + step, wide);
        load_run(z, queries, gate, gate + step, wide);
#pragma unroll
        for (int j = 0; j < VECTOR; j++)
        {
            float s = sigmoid(z[j]);
            v[j] *= g[j] * (s * (1 - s));
        }
        store_run(dqueries, v, gate, gate + step, wide, accumulate);
        if (!accumulate) store_run(dqueries, none, query, query + step, wide, 0);
    }
}

// -- causal convolution of four inputs, and SiLU --

// A thread has 16 bytes of channels, or one channel at a time where rows do not allow it.
#define CONV_BEFORE (CONV_TAPS - 1)

DEVICE int sequence_of(const int* starts, int sequences, int tokens, int token)
{
    int s = 0;
    while (s + 1 < sequences && start_at(starts, s + 1, tokens) <= token) s++;
    return s;
}

// N channels of the inputs before a token and at it, as the convolution goes along.
template <int N> struct ConvWindow
{
    float x[CONV_TAPS][N];

    __device__ __forceinline__ void load(int at, const real* from)
    {
        if (!from)
        {
#pragma unroll
            for (int i = 0; i < N; i++) x[at][i] = 0;
        }
        else if constexpr (N == VECTOR) load_vector(x[at], from);
        else x[at][0] = widen(from[0]);
    }

    // The inputs before a token of a sequence, from x or, before its start, from its state.
    __device__ __forceinline__ void begin(const real* input, const real* state, int cols, int token,
        int start, int sequence)
    {
#pragma unroll
        for (int back = CONV_BEFORE; back > 0; back--)
        {
            int into = token - back - start;
            load(CONV_TAPS - back, into >= 0 ? input + (u64)(token - back) * cols
                : state ? state + (u64)(sequence * CONV_BEFORE + CONV_BEFORE + into) * cols : 0);
        }
    }

    // Goes on to the next token.
    __device__ __forceinline__ void next(const real* from)
    {
#pragma unroll
        for (int j = 0; j < CONV_BEFORE; j++)
        {
#pragma unroll
            for (int i = 0; i < N; i++) x[j][i] = x[j + 1][i];
        }
        load(CONV_BEFORE, from);
    }

    __device__ __forceinline__ float sum(const float (&w)[N][CONV_TAPS], int i) const
    {
        float sum = 0;
#pragma unroll
        for (int j = CONV_BEFORE; j >= 0; j--) sum += w[i][j] * x[j][i];
        return sum;
    }
};

template <int N> DEVICE void load_taps(float (&w)[N][CONV_TAPS], const float* from)
{
#pragma unroll
    for (int i = 0; i < N; i++)
    {
#pragma unroll
        for (int j = 0; j < CONV_TAPS; j++) w[i][j] = from[i * CONV_TAPS + j];
    }
}

template <int N> DEVICE void conv_forward_part(real* y, const real* x, const float* w,
    const real* state, const int* starts, int sequences, int tokens, int cols, int c)
{
    int first = blockIdx.y * CONV_TOKENS;
    int s = sequence_of(starts, sequences, tokens, first);
    int start = start_at(starts, s, tokens), end = start_at(starts, s + 1, tokens);
    float taps[N][CONV_TAPS];
    load_taps(taps, w + (u64)c * CONV_TAPS);
    ConvWindow<N> window;
    if (state) state += c;
    window.begin(x + c, state, cols, first, start, s);
    for (int t = first; t < min(first + CONV_TOKENS, tokens); t++)
    {
        if (t >= end && s + 1 < sequences)
        {
            do
                end = start_at(starts, ++s + 1, tokens);
            while (end <= t && s + 1 < sequences);
            window.begin(x + c, state, cols, t, t, s);
        }
        window.next(x + (u64)t * cols + c);
        float v[N];
#pragma unroll
        for (int i = 0; i < N; i++)
        {
            v[i] = window.sum(taps, i);
            v[i] *= sigmoid(v[i]);
        }
        if constexpr (N == VECTOR) store_vector(y + (u64)t * cols + c, v);
        else y[(u64)t * cols + c] = narrow(v[0]);
    }
}

// y[t, c] = silu(sum over j of w[c, j] x[t - 3 + j, c]), with zeros, or the state's three rows,
// before the start of a sequence. Moves 2 R C S + 3 C S for a block's tokens before its first, from
// cache, + 16 C.
extern "C" __global__ void __launch_bounds__(256) conv_forward(real* y, const real* x,
    const float* w, const real* state, const int* starts, int* faults, int sequences, int tokens,
    int cols)
{
    if (blockIdx.x + blockIdx.y == 0)
        check_starts(faults, FAULT_CAUSAL_CONV_STARTS, starts, sequences, tokens);
    bool wide = aligned16(x, cols, sizeof(real)) && aligned16(y, cols, sizeof(real))
        && aligned16(state, cols, sizeof(real));
    int thread = blockIdx.x * blockDim.x + threadIdx.x;
    if (!wide)
        for (int c = thread; c < cols; c += gridDim.x * blockDim.x)
            conv_forward_part<1>(y, x, w, state, starts, sequences, tokens, cols, c);
    else if (thread * VECTOR < cols)
        conv_forward_part<VECTOR>(
            y, x, w, state, starts, sequences, tokens, cols, thread * VECTOR);
}

// The state's rows after the sequences: the last three inputs, of which a short sequence has fewer
// than the state keeps. A thread per channel, a row of blocks per sequence.
extern "C" __global__ void __launch_bounds__(256) conv_state(
    real* state, const real* x, const int* starts, int tokens, int cols)
{
    int c = blockIdx.x * blockDim.x + threadIdx.x, s = blockIdx.y;
    if (c >= cols) return;
    int start = start_at(starts, s, tokens), length = start_at(starts, s + 1, tokens) - start;
    real kept[CONV_BEFORE];
    real* rows = state + (u64)s * CONV_BEFORE * cols + c;
    for (int j = 0; j < CONV_BEFORE; j++)
    {
        int into = length - CONV_BEFORE + j;
        kept[j] = into >= 0 ? x[(u64)(start + into) * cols + c] : rows[(u64)(length + j) * cols];
    }
    for (int j = 0; j < CONV_BEFORE; j++) rows[(u64)j * cols] = kept[j];
}

template <int N> DEVICE void store_conv_gradient(real* dx, float (&v)[N], int accumulate)
{
    if constexpr (N == VECTOR) store_run(dx, v, 0, VECTOR, true, accumulate);
    else dx[0] = narrow(v[0] + (accumulate ? widen(dx[0]) : 0));
}

// Goes over the block's tokens and, as their dx needs, up to three more of the sequence.
template <int N> DEVICE void conv_backward_part(real* dx, float* dw, const real* dy, const real* x,
    const float* w, const int* starts, int sequences, int tokens, int cols, int c, int accumulate)
{
    int first = blockIdx.y * CONV_TOKENS, last = min(first + CONV_TOKENS, tokens);
    int s = sequence_of(starts, sequences, tokens, first);
    int start = start_at(starts, s, tokens), end = start_at(starts, s + 1, tokens);
    float taps[N][CONV_TAPS], sums[N][CONV_TAPS] = {};
    // dx of token t - 3 + j, as far as it is known.
    float pending[CONV_TAPS][N] = {};
    load_taps(taps, w + (u64)c * CONV_TAPS);
    ConvWindow<N> window;
    window.begin(x + c, 0, cols, first, start, s);
    for (int t = first; t < last + CONV_BEFORE; t++)
    {
        bool inside = t < end || s + 1 == sequences && t < tokens;
        if (!inside && t < last)
        {
            do
                end = start_at(starts, ++s + 1, tokens);
            while (end <= t && s + 1 < sequences);
            window.begin(x + c, 0, cols, t, t, s);
            inside = true;
            start = t;
        }
        float ds[N] = {};
        if (inside)
        {
            window.next(x + (u64)t * cols + c);
            if constexpr (N == VECTOR) load_vector(ds, dy + (u64)t * cols + c);
            else ds[0] = widen(dy[(u64)t * cols + c]);
#pragma unroll
            for (int i = 0; i < N; i++)
            {
                float sum = window.sum(taps, i), gate = sigmoid(sum);
                ds[i] *= gate + sum * gate * (1 - gate);
            }
        }
#pragma unroll
        for (int j = 0; j < CONV_TAPS; j++)
        {
            bool reached = t - CONV_BEFORE + j >= start;
#pragma unroll
            for (int i = 0; i < N; i++)
            {
                if (reached) pending[j][i] += taps[i][j] * ds[i];
                if (t < last) sums[i][j] += ds[i] * window.x[j][i];
            }
        }
        if (dx && t - CONV_BEFORE >= first)
            store_conv_gradient<N>(dx + (u64)(t - CONV_BEFORE) * cols + c, pending[0], accumulate);
#pragma unroll
        for (int j = 0; j < CONV_TAPS; j++)
        {
#pragma unroll
            for (int i = 0; i < N; i++)
                pending[j][i] = j < CONV_BEFORE ? pending[j < CONV_BEFORE ? j + 1 : j][i] : 0;
        }
    }
    if (!dw) return;
#pragma unroll
    for (int i = 0; i < N; i++)
    {
#pragma unroll
        for (int j = 0; j < CONV_TAPS; j++)
            dw[((u64)blockIdx.y * cols + c + i) * CONV_TAPS + j] = sums[i][j];
    }
}

// ds = dy silu'(s); dx[t] = sum over j of w[j] ds[t + 3 - j] within the sequence, or adds it; dw[p,
// c, j] = sum of ds[t] x[t - 3 + j] over the tokens of block p. Either may be null. Moves 3 R C S,
// and 32 C bytes of sums for every CONV_TOKENS rows.
extern "C" __global__ void __launch_bounds__(256) conv_backward(real* dx, float* dw,
    const real* dy, const real* x, const float* w, const int* starts, int* faults, int sequences,
    int tokens, int cols, int accumulate)
{
    if (blockIdx.x + blockIdx.y == 0)
        check_starts(faults, FAULT_CAUSAL_CONV_STARTS, starts, sequences, tokens);
    bool wide = aligned16(x, cols, sizeof(real)) && aligned16(dx, cols, sizeof(real))
        && aligned16(dy, cols, sizeof(real));
    int thread = blockIdx.x * blockDim.x + threadIdx.x;
    if (!wide)
        for (int c = thread; c < cols; c += gridDim.x * blockDim.x)
            conv_backward_part<1>(
                dx, dw, dy, x, w, starts, sequences, tokens, cols, c, accumulate);
    else if (thread * VECTOR < cols)
        conv_backward_part<VECTOR>(dx, dw, dy, x, w, starts, sequences, tokens, cols,
            thread * VECTOR, accumulate);
}

// ---- 15. gated delta rule -----------------------------------------------------------------------

// In chunks of 64 tokens; Kernels/Cpu/DeltaChunk.cs and DeltaBackward.cs have the equations and
// these names.
//
// What chunks do for themselves runs in a block for each of them and value head; only the state
// goes along a sequence, in blocks of 16 columns of it, which know nothing of each other. Operands
// of products are rounded to the storage type, sums and what products change are floats. All
// matrices of a product lie in shared memory, rows 8 elements longer than they need, so that rows
// begin in different banks; heads are padded with zeros to whole tiles of 16.

#define CHUNK 64
#define SQUARE (CHUNK + 8)
#define SLICE DELTA_SLICE
#define SLICE_PITCH (SLICE + 8)

// A chunk of a packed batch: those of a sequence begin at starts / 64 + the sequence's number.
struct ChunkPlace
{
    int number, first, count;
};

DEVICE int first_chunk(const int* starts, int sequence, int tokens)
{
    return start_at(starts, sequence, tokens) / CHUNK + sequence;
}

// False where there is no such chunk.
DEVICE bool take_chunk(
    ChunkPlace& at, const int* starts, int sequences, int tokens, int number)
{
    int s = 0;
    while (s + 1 < sequences && first_chunk(starts, s + 1, tokens) <= number) s++;
    at.number = number;
    at.first = start_at(starts, s, tokens) + (number - first_chunk(starts, s, tokens)) * CHUNK;
    at.count = min(CHUNK, start_at(starts, s + 1, tokens) - at.first);
    return at.count > 0;
}

// Rows and columns of an array in shared memory from one in global memory, zeros beyond it.
DEVICE void load_rows(real* to, int pitch, const real* from, u64 stride, int rows, int cols,
    int rows_padded, int cols_padded)
{
    bool wide = aligned16(from, VECTOR, sizeof(real)) && stride % VECTOR == 0 && cols % VECTOR == 0;
    int vectors = cols_padded / VECTOR;
    for (int i = threadIdx.x; i < rows_padded * vectors; i += blockDim.x)
    {
        int r = i / vectors, c = i % vectors * VECTOR;
        real* into = to + r * pitch + c;
        const real* row = from + r * stride;
        if (wide && r < rows && c < cols) *(uint4*)into = *(const uint4*)(row + c);
        else
            for (int j = 0; j < VECTOR; j++)
                into[j] = r < rows && c + j < cols ? row[c + j] : (real)0;
    }
}

// A product of two arrays in shared memory over a tile of 16 x 16, added to what the warp's lanes
// have of it; ACROSS says that an array lies the other way round than its product takes it.
template <bool LEFT_ACROSS, bool RIGHT_ACROSS> DEVICE void add_product(float (&d)[2][4],
    const real* left, int left_pitch, const real* right, int right_pitch, int row, int col,
    int depth)
{
    int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    for (int k = 2 * t; k < depth; k += 16)
    {
        real2 a[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
        {
            int r = row + g + i % 2 * 8, at = k + i / 2 * 8;
            if constexpr (LEFT_ACROSS)
                a[i] = pair_of(left[at * left_pitch + r], left[(at + 1) * left_pitch + r]);
            else a[i] = *(const real2*)(left + r * left_pitch + at);
        }
#pragma unroll
        for (int n = 0; n < 2; n++)
        {
            real2 b[2];
            int c = col + n * 8 + g;
#pragma unroll
            for (int i = 0; i < 2; i++)
            {
                int at = k + i * 8;
                if constexpr (RIGHT_ACROSS) b[i] = *(const real2*)(right + c * right_pitch + at);
                else b[i] = pair_of(right[at * right_pitch + c], right[(at + 1) * right_pitch + c]);
            }
            multiply_add_16x8x16(d[n], a, b);
        }
    }
}

// use(row, column, value) for each of the lane's elements of a tile.
template <class USE> DEVICE void each_of_tile(float (&d)[2][4], int row, int col, USE use)
{
    int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < 2; n++)
    {
#pragma unroll
        for (int i = 0; i < 4; i++) use(row + g + i / 2 * 8, col + n * 8 + 2 * t + i % 2, d[n][i]);
    }
}

// The same where rows are scaled.
DEVICE void scale_tile(float (&d)[2][4], int row, const float* scales)
{
    each_of_tile(d, row, 0, [&](int r, int, float& v) { v *= scales[r]; });
}

// b and beta of a chunk as floats in shared memory, and what follows from them; all threads call.
struct ChunkGates
{
    float sum[CHUNK], beta[CHUNK], decay[CHUNK], rest[CHUNK];

    __device__ __forceinline__ void load(const float* from)
    {
        int i = threadIdx.x;
        if (i < CHUNK)
        {
            float b = from[i];
            sum[i] = b;
            beta[i] = from[CHUNK + i];
            decay[i] = expf(b);
            rest[i] = expf(from[CHUNK - 1] - b);
        }
        __syncthreads();
    }
};

struct DeltaSizes
{
    int key_heads, value_heads, key_dim, value_dim;

    __device__ __forceinline__ int group() const { return value_heads / key_heads; }
    __device__ __forceinline__ int padded() const { return (key_dim + 15) / 16 * 16; }
    __device__ __forceinline__ int pitch() const { return padded() + 8; }
    __device__ __forceinline__ int unit_cols() const { return 2 * key_heads * key_dim; }
    __device__ __forceinline__ int cols() const { return unit_cols() + value_heads * value_dim; }
    // Of an array with a matrix for each chunk and value head.
    __device__ __forceinline__ u64 square(int chunk, int head) const
    {
        return ((u64)chunk * value_heads + head) * (CHUNK * CHUNK);
    }
    __device__ __forceinline__ u64 state(int chunk, int head) const
    {
        return ((u64)chunk * value_heads + head) * key_dim * value_dim;
    }
    __device__ __forceinline__ u64 gates(int chunk, int head) const
    {
        return ((u64)chunk * value_heads + head) * (2 * CHUNK);
    }
};

// Queries (which 0) or keys (1) of a chunk, of length 1, with what pads them.
DEVICE void load_units(real* to, const real* units, const DeltaSizes& z, const ChunkPlace& at,
    int head, int which)
{
    int column = (which * z.key_heads + head / z.group()) * z.key_dim;
    load_rows(to, z.pitch(), units + (u64)at.first * z.unit_cols() + column, z.unit_cols(),
        at.count, z.key_dim, CHUNK, z.padded());
}

// A matrix of a chunk by itself.
DEVICE void load_square(real* to, const real* from, const DeltaSizes& z, const ChunkPlace& at,
    int head)
{
    load_rows(to, SQUARE, from + z.square(at.number, head), CHUNK, CHUNK, CHUNK, CHUNK, CHUNK);
}

DEVICE float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }

extern __shared__ uint4 delta_shared[];

// The inverse of I + L, in floats [64, 65]: blocks of 16 on the diagonal by substitution, a thread
// per column; then X_IJ = -X_II sum over K of L_IK X_KJ, a row of blocks after the other.
DEVICE void invert_lower(float* x, const float* lower)
{
    const int pitch = CHUNK + 1, block = 16;
    for (int i = threadIdx.x; i < CHUNK * pitch; i += blockDim.x) x[i] = 0;
    __syncthreads();
    if (threadIdx.x < CHUNK)
    {
        int col = threadIdx.x, first = col / block * block;
        for (int r = first; r < first + block; r++)
        {
            float sum = r == col ? 1 : 0;
            for (int k = first; k < r; k++) sum -= lower[r * pitch + k] * x[k * pitch + col];
            x[r * pitch + col] = sum;
        }
    }
    __syncthreads();
    for (int first = block; first < CHUNK; first += block)
    {
        int r = first + threadIdx.x / block, c = threadIdx.x % block;
        float sums[CHUNK / block - 1] = {};
#pragma unroll
        for (int j = 0; j < CHUNK / block - 1; j++)
        {
            if (j * block >= first) continue;
            for (int k = j * block; k < first; k++)
                sums[j] += lower[r * pitch + k] * x[k * pitch + j * block + c];
            x[r * pitch + j * block + c] = sums[j];
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < CHUNK / block - 1; j++)
        {
            sums[j] = 0;
            if (j * block >= first) continue;
            for (int k = first; k <= r; k++)
                sums[j] -= x[r * pitch + k] * x[k * pitch + j * block + c];
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < CHUNK / block - 1; j++)
            if (j * block < first) x[r * pitch + j * block + c] = sums[j];
        __syncthreads();
    }
}

// What a chunk and value head needs before any state: queries and keys of length 1 (by the first
// value head of a key head), b and beta, (I + L)^-1 and P. A block of 256 threads.
extern "C" __global__ void __launch_bounds__(256) delta_chunks(real* units, float* chunk_gates,
    real* inverses, real* scores, const real* qkv, const real* gates, const float* a_log,
    const float* dt_bias, const int* starts, int* faults, int sequences, int tokens,
    int key_heads, int value_heads, int key_dim, int value_dim)
{
    __shared__ float lower[CHUNK * (CHUNK + 1)], sum[CHUNK], beta[CHUNK];
    if (blockIdx.x + blockIdx.y == 0)
        check_starts(faults, FAULT_DELTA_RULE_STARTS, starts, sequences, tokens);
    DeltaSizes z = {key_heads, value_heads, key_dim, value_dim};
    ChunkPlace at;
    if (!take_chunk(at, starts, sequences, tokens, blockIdx.x)) return;
    int head = blockIdx.y, key = head / z.group(), warp = threadIdx.x / WARP;
    int lane = threadIdx.x % WARP;
    real* rows = (real*)delta_shared;
    for (int i = warp; i < 2 * CHUNK; i += 256 / WARP)
    {
        int which = i / CHUNK, r = i % CHUNK, column = (which * key_heads + key) * key_dim;
        const real* from = qkv + (u64)(at.first + r) * z.cols() + column;
        float squares = 0;
        if (r < at.count)
            for (int c = lane; c < key_dim; c += WARP) squares += widen(from[c]) * widen(from[c]);
        float scale = 1 / sqrtf(warp_sum(squares) + 1e-6f);
        if (which == 0) scale *= 1 / sqrtf((float)key_dim);
        for (int c = lane; c < z.padded(); c += WARP)
        {
            bool there = r < at.count && c < key_dim;
            real unit = there ? narrow(widen(from[c]) * scale) : (real)0;
            rows[i * z.pitch() + c] = unit;
            if (there && head % z.group() == 0)
                units[(u64)(at.first + r) * z.unit_cols() + column + c] = unit;
        }
    }
    if (threadIdx.x < CHUNK)
    {
        int i = threadIdx.x;
        const real* row = gates + (u64)(at.first + i) * 2 * value_heads;
        beta[i] = i < at.count ? sigmoid(widen(row[head])) : 0;
        float a = i < at.count ? widen(row[value_heads + head]) + dt_bias[head] : 0;
        sum[i] = i < at.count ? -expf(a_log[head]) * softplus(a) : 0;
    }
    __syncthreads();
    if (threadIdx.x == 0)
        for (int i = 1; i < CHUNK; i++) sum[i] += sum[i - 1];
    __syncthreads();
    if (threadIdx.x < CHUNK)
    {
        float* to = chunk_gates + z.gates(at.number, head);
        to[threadIdx.x] = sum[threadIdx.x];
        to[CHUNK + threadIdx.x] = beta[threadIdx.x];
    }
    const real *queries = rows, *keys = rows + CHUNK * z.pitch();
    for (int tile = warp; tile < 16; tile += 256 / WARP)
    {
        int row = tile / 4 * 16, col = tile % 4 * 16;
        float d[2][4] = {}, p[2][4] = {};
        if (col <= row)
        {
            add_product<false, true>(d, keys, z.pitch(), keys, z.pitch(), row, col, z.padded());
            add_product<false, true>(p, queries, z.pitch(), keys, z.pitch(), row, col, z.padded());
        }
        each_of_tile(d, row, col, [&](int r, int c, float& v) {
            lower[r * (CHUNK + 1) + c] = c < r ? beta[r] * expf(sum[r] - sum[c]) * v : 0;
        });
        real* to = scores + z.square(at.number, head);
        each_of_tile(p, row, col, [&](int r, int c, float& v) {
            to[r * CHUNK + c] = c <= r ? narrow(expf(sum[r] - sum[c]) * v) : (real)0;
        });
    }
    __syncthreads();
    float* inverse = (float*)delta_shared;
    invert_lower(inverse, lower);
    real* to = inverses + z.square(at.number, head);
    for (int i = threadIdx.x; i < CHUNK * CHUNK; i += blockDim.x)
        to[i] = narrow(inverse[i / CHUNK * (CHUNK + 1) + i % CHUNK]);
}

// Tiles of 16 rows of a slice of a state that a warp has in registers.
#define STATE_TILES 2
#define STATE_WARPS 4

// s += left^T x over a chunk's tokens, left[CHUNK, z.pitch()]: the warp's tiles of a state's slice.
DEVICE void add_to_state(float (&s)[STATE_TILES][2][4], const real* left, const real* x,
    const DeltaSizes& z)
{
#pragma unroll
    for (int i = 0; i < STATE_TILES; i++)
    {
        int first = ((int)threadIdx.x / WARP + i * STATE_WARPS) * 16;
        if (first < z.padded())
            add_product<true, false>(s[i], left, z.pitch(), x, SLICE_PITCH, first, 0, CHUNK);
    }
}

// Along a sequence: the states at the starts of chunks, and X. Block (slice, head, sequence) of 128
// threads; state (may be null) is where S starts and ends.
extern "C" __global__ void __launch_bounds__(128, 4) delta_states(real* states, real* solved,
    float* state, const real* units, const float* chunk_gates, const real* inverses,
    const real* qkv, const int* starts, int tokens, int key_heads, int value_heads, int key_dim,
    int value_dim)
{
    __shared__ ChunkGates gates;
    DeltaSizes z = {key_heads, value_heads, key_dim, value_dim};
    int column = blockIdx.x * SLICE, head = blockIdx.y, sequence = blockIdx.z;
    int start = start_at(starts, sequence, tokens), end = start_at(starts, sequence + 1, tokens);
    int warp = threadIdx.x / WARP, cols = min(SLICE, value_dim - column);
    real* keys = (real*)delta_shared;
    real* inverse = keys + CHUNK * z.pitch();
    real* now = inverse + CHUNK * SQUARE;
    real* x = now + z.padded() * SLICE_PITCH;
    u64 kept = ((u64)sequence * value_heads + head) * key_dim;
    float s[STATE_TILES][2][4] = {};
#pragma unroll
    for (int i = 0; i < STATE_TILES; i++)
        if (state)
            each_of_tile(s[i], (warp + i * STATE_WARPS) * 16, 0, [&](int r, int c, float& v) {
                if (r < key_dim && c < cols) v = state[(kept + r) * value_dim + column + c];
            });
    ChunkPlace at = {first_chunk(starts, sequence, tokens), start, 0};
    for (; at.first < end; at.first += CHUNK, at.number++)
    {
        at.count = min(CHUNK, end - at.first);
        real* to = states + z.state(at.number, head) + column;
#pragma unroll
        for (int i = 0; i < STATE_TILES; i++)
            each_of_tile(s[i], (warp + i * STATE_WARPS) * 16, 0, [&](int r, int c, float& v) {
                if (r < z.padded()) now[r * SLICE_PITCH + c] = narrow(v);
                if (r < key_dim && c < cols) to[(u64)r * value_dim + c] = narrow(v);
            });
        gates.load(chunk_gates + z.gates(at.number, head));
        load_units(keys, units, z, at, head, 1);
        load_square(inverse, inverses, z, at, head);
        __syncthreads();
        // R, then X, of the warp's 16 tokens.
        float d[2][4] = {};
        int row = warp * 16;
        add_product<false, false>(d, keys, z.pitch(), now, SLICE_PITCH, row, 0, z.padded());
        const real* v = qkv + (u64)at.first * z.cols() + z.unit_cols() + head * value_dim + column;
        each_of_tile(d, row, 0, [&](int r, int c, float& y) {
            float value = r < at.count && c < cols ? widen(v[(u64)r * z.cols() + c]) : 0;
            x[r * SLICE_PITCH + c] = narrow(gates.beta[r] * (value - gates.decay[r] * y));
            y = 0;
        });
        __syncthreads();
        add_product<false, false>(d, inverse, SQUARE, x, SLICE_PITCH, row, 0, CHUNK);
        __syncthreads();
        real* out = solved + ((u64)at.first * value_heads + head) * value_dim + column;
        each_of_tile(d, row, 0, [&](int r, int c, float& y) {
            if (r < at.count && c < cols) out[(u64)r * value_heads * value_dim + c] = narrow(y);
            x[r * SLICE_PITCH + c] = narrow(gates.rest[r] * y);
        });
        __syncthreads();
        float decay = gates.decay[CHUNK - 1];
#pragma unroll
        for (int i = 0; i < STATE_TILES; i++)
            each_of_tile(s[i], 0, 0, [&](int, int, float& v) { v *= decay; });
        add_to_state(s, keys, x, z);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < STATE_TILES; i++)
        if (state)
            each_of_tile(s[i], (warp + i * STATE_WARPS) * 16, 0, [&](int r, int c, float& v) {
                if (r < key_dim && c < cols) state[(kept + r) * value_dim + column + c] = v;
            });
}

// O = e^b q S + P X, 32 columns of values at a time. A block of 256 threads per chunk and head.
#define OUTPUT_COLS 32

extern "C" __global__ void __launch_bounds__(256) delta_output(real* o, const real* units,
    const float* chunk_gates, const real* scores, const real* states, const real* solved,
    const int* starts, int sequences, int tokens, int key_heads, int value_heads, int key_dim,
    int value_dim)
{
    __shared__ ChunkGates gates;
    const int pitch = OUTPUT_COLS + 8;
    DeltaSizes z = {key_heads, value_heads, key_dim, value_dim};
    ChunkPlace at;
    if (!take_chunk(at, starts, sequences, tokens, blockIdx.x)) return;
    int head = blockIdx.y, warp = threadIdx.x / WARP, row = warp / 2 * 16, col = warp % 2 * 16;
    real* queries = (real*)delta_shared;
    real* p = queries + CHUNK * z.pitch();
    real* state = p + CHUNK * SQUARE;
    real* x = state + z.padded() * pitch;
    gates.load(chunk_gates + z.gates(at.number, head));
    load_units(queries, units, z, at, head, 0);
    load_square(p, scores, z, at, head);
    u64 stride = (u64)value_heads * value_dim, place = at.first * stride + head * value_dim;
    for (int first = 0; first < value_dim; first += OUTPUT_COLS)
    {
        int cols = min(OUTPUT_COLS, value_dim - first);
        load_rows(state, pitch, states + z.state(at.number, head) + first, value_dim, key_dim, cols,
            z.padded(), OUTPUT_COLS);
        load_rows(x, pitch, solved + place + first, stride, at.count, cols, CHUNK, OUTPUT_COLS);
        __syncthreads();
        float d[2][4] = {};
        add_product<false, false>(d, queries, z.pitch(), state, pitch, row, col, z.padded());
        scale_tile(d, row, gates.decay);
        add_product<false, false>(d, p, SQUARE, x, pitch, row, col, CHUNK);
        each_of_tile(d, row, col, [&](int r, int c, float& v) {
            if (r < at.count && c < cols) o[place + first + r * stride + c] = narrow(v);
        });
        __syncthreads();
    }
}

// Along a sequence from its end: the gradients of the states behind chunks, and dR. Blocks and
// registers as in delta_states; keys and queries, and P and the inverse, take turns in a place.
extern "C" __global__ void __launch_bounds__(128, 4) delta_state_gradients(real* dstates,
    real* dsolved, const real* dout, const real* units, const float* chunk_gates,
    const real* inverses, const real* scores, const int* starts, int tokens, int key_heads,
    int value_heads, int key_dim, int value_dim)
{
    __shared__ ChunkGates gates;
    DeltaSizes z = {key_heads, value_heads, key_dim, value_dim};
    int column = blockIdx.x * SLICE, head = blockIdx.y, sequence = blockIdx.z;
    int start = start_at(starts, sequence, tokens), end = start_at(starts, sequence + 1, tokens);
    int warp = threadIdx.x / WARP, row = warp * 16, cols = min(SLICE, value_dim - column);
    real* units_tile = (real*)delta_shared;
    real* square = units_tile + CHUNK * z.pitch();
    real* now = square + CHUNK * SQUARE;
    real* given = now + z.padded() * SLICE_PITCH;
    real* x = given + CHUNK * SLICE_PITCH;
    u64 stride = (u64)value_heads * value_dim;
    float s[STATE_TILES][2][4] = {};
    int chunks = (end - start + CHUNK - 1) / CHUNK, base = first_chunk(starts, sequence, tokens);
    for (int chunk = chunks - 1; chunk >= 0; chunk--)
    {
        ChunkPlace at = {base + chunk, start + chunk * CHUNK, 0};
        at.count = min(CHUNK, end - at.first);
        u64 place = at.first * stride + head * value_dim + column;
        real* to = dstates + z.state(at.number, head) + column;
        gates.load(chunk_gates + z.gates(at.number, head));
        float decay = gates.decay[CHUNK - 1];
#pragma unroll
        for (int i = 0; i < STATE_TILES; i++)
            each_of_tile(s[i], (warp + i * STATE_WARPS) * 16, 0, [&](int r, int c, float& v) {
                if (r < z.padded()) now[r * SLICE_PITCH + c] = narrow(v);
                if (r < key_dim && c < cols) to[(u64)r * value_dim + c] = narrow(v);
                v *= decay;
            });
        load_units(units_tile, units, z, at, head, 0);
        load_rows(given, SLICE_PITCH, dout + place, stride, at.count, cols, CHUNK, SLICE);
        load_square(square, scores, z, at, head);
        __syncthreads();
        for (int i = threadIdx.x; i < CHUNK * SLICE; i += blockDim.x)
        {
            int r = i / SLICE, at_x = r * SLICE_PITCH + i % SLICE;
            x[at_x] = narrow(gates.decay[r] * widen(given[at_x]));
        }
        __syncthreads();
        // (e^b q)^T dO.
        add_to_state(s, units_tile, x, z);
        __syncthreads();
        load_units(units_tile, units, z, at, head, 1);
        __syncthreads();
        // dX = e^(b_last - b) k dS' + P^T dO.
        float d[2][4] = {};
        add_product<false, false>(d, units_tile, z.pitch(), now, SLICE_PITCH, row, 0, z.padded());
        scale_tile(d, row, gates.rest);
        add_product<true, false>(d, square, SQUARE, given, SLICE_PITCH, row, 0, CHUNK);
        each_of_tile(d, row, 0, [&](int r, int c, float& v) {
            x[r * SLICE_PITCH + c] = narrow(v);
            v = 0;
        });
        __syncthreads();
        load_square(square, inverses, z, at, head);
        __syncthreads();
        add_product<true, false>(d, square, SQUARE, x, SLICE_PITCH, row, 0, CHUNK);
        __syncthreads();
        // dR, and in x dY = -beta e^b dR.
        each_of_tile(d, row, 0, [&](int r, int c, float& v) {
            if (r < at.count && c < cols) dsolved[place + r * stride + c] = narrow(v);
            x[r * SLICE_PITCH + c] = narrow(-gates.beta[r] * gates.decay[r] * v);
        });
        __syncthreads();
        add_to_state(s, units_tile, x, z);
        __syncthreads();
    }
}

// Tiles of a chunk by keys, 64 x 128, and of a chunk by itself, that each of 8 warps has.
#define KEY_TILES 4
#define SQUARE_TILES 2
#define GRADIENT_WARPS 8

// Sums of a warp's tile over its columns, for each row, to sums[row]; and over its rows.
DEVICE void sum_tile_rows(float low, float high, float* sums, int row)
{
    int g = threadIdx.x % WARP / 4;
#pragma unroll
    for (int lane = 1; lane < 4; lane *= 2)
    {
        low += __shfl_xor_sync(ALL_LANES, low, lane);
        high += __shfl_xor_sync(ALL_LANES, high, lane);
    }
    if (threadIdx.x % 4 != 0) return;
    sums[row + g] = low;
    sums[row + g + 8] = high;
}

// Products of gradients of unit rows with these, per row: parts[column tile][row].
DEVICE void dot_rows(float (*parts)[CHUNK], float (&d)[KEY_TILES][2][4], const real* rows,
    int pitch, int padded)
{
    int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4;
#pragma unroll
    for (int i = 0; i < KEY_TILES; i++)
    {
        int tile = warp + i * GRADIENT_WARPS, row = tile % 4 * 16, col = tile / 4 * 16;
        if (col >= padded) continue;
        float low = 0, high = 0;
        each_of_tile(d[i], row, col, [&](int r, int c, float& v) {
            float product = v * widen(rows[r * pitch + c]);
            if (r == row + g) low += product;
            else high += product;
        });
        sum_tile_rows(low, high, parts[col / 16], row);
    }
}

DEVICE float sum_column(const float (*parts)[CHUNK], int count, int i)
{
    float sum = 0;
    for (int p = 0; p < count; p++) sum += parts[p][i];
    return sum;
}

// Everything else of a chunk and value head: dv, the gates' gradients, and what dq and dk of its
// key head have of it, of length 1 still and as floats. A block of 256 threads.
extern "C" __global__ void __launch_bounds__(256) delta_gradients(float* dqueries, float* dkeys,
    real* dqkv, real* dgates, float* parameter_parts, const real* dout, const real* qkv,
    const real* gate_inputs, const float* a_log, const float* dt_bias, const real* units,
    const float* chunk_gates, const real* scores, const real* states, const real* solved,
    const real* dstates, const real* dsolved, const int* starts, int sequences, int tokens,
    int key_heads, int value_heads, int key_dim, int value_dim, int accumulate_qkv,
    int accumulate_gates)
{
    __shared__ ChunkGates gates;
    __shared__ float query_parts[8][CHUNK], key_parts[8][CHUNK], read_parts[8][CHUNK];
    __shared__ float row_parts[4][CHUNK], beta_parts[4][CHUNK], column_parts[4][CHUNK];
    __shared__ float db[CHUNK], dbeta[CHUNK], warp_sums[GRADIENT_WARPS], logs[CHUNK], biases[CHUNK];
    DeltaSizes z = {key_heads, value_heads, key_dim, value_dim};
    int head = blockIdx.y, warp = threadIdx.x / WARP;
    float* part = parameter_parts + (u64)blockIdx.x * 2 * value_heads;
    ChunkPlace at;
    if (!take_chunk(at, starts, sequences, tokens, blockIdx.x))
    {
        if (threadIdx.x == 0) part[head] = part[value_heads + head] = 0;
        return;
    }
    gates.load(chunk_gates + z.gates(at.number, head));
    int pitch = z.pitch(), padded = z.padded();

    // A slice of values at a time: what dO, X and dR give to dq, dk, dP and -dL.
    real* given = (real*)delta_shared;
    real* given_decayed = given + CHUNK * SLICE_PITCH;
    real* x = given_decayed + CHUNK * SLICE_PITCH;
    real* x_rest = x + CHUNK * SLICE_PITCH;
    real* dr = x_rest + CHUNK * SLICE_PITCH;
    real* state = dr + CHUNK * SLICE_PITCH;
    real* dstate = state + padded * SLICE_PITCH;
    u64 stride = (u64)value_heads * value_dim;
    float dq[KEY_TILES][2][4] = {}, dk[KEY_TILES][2][4] = {}, read[KEY_TILES][2][4] = {};
    float dp[SQUARE_TILES][2][4] = {}, dl[SQUARE_TILES][2][4] = {};
    float with_value = 0, with_state = 0;
    for (int column = 0; column < value_dim; column += SLICE)
    {
        int cols = min(SLICE, value_dim - column);
        u64 place = at.first * stride + head * value_dim + column;
        load_rows(given, SLICE_PITCH, dout + place, stride, at.count, cols, CHUNK, SLICE);
        load_rows(x, SLICE_PITCH, solved + place, stride, at.count, cols, CHUNK, SLICE);
        load_rows(dr, SLICE_PITCH, dsolved + place, stride, at.count, cols, CHUNK, SLICE);
        load_rows(state, SLICE_PITCH, states + z.state(at.number, head) + column, value_dim,
            key_dim, cols, padded, SLICE);
        load_rows(dstate, SLICE_PITCH, dstates + z.state(at.number, head) + column, value_dim,
            key_dim, cols, padded, SLICE);
        __syncthreads();
        // A thread has four columns of a row.
        int r = threadIdx.x / 4;
        for (int c = threadIdx.x % 4 * 4, i = 0; i < 4; i++, c++)
        {
            int e = r * SLICE_PITCH + c;
            given_decayed[e] = narrow(gates.decay[r] * widen(given[e]));
            x_rest[e] = narrow(gates.rest[r] * widen(x[e]));
            if (r >= at.count || c >= cols) continue;
            u64 value = (u64)(at.first + r) * z.cols() + z.unit_cols() + head * value_dim + column;
            value += c;
            with_value += widen(dr[e]) * widen(qkv[value]);
            if (!dqkv) continue;
            float dv = gates.beta[r] * widen(dr[e]);
            dqkv[value] = narrow(accumulate_qkv ? widen(dqkv[value]) + dv : dv);
        }
        for (int i = threadIdx.x; i < padded * SLICE; i += blockDim.x)
        {
            int e = i / SLICE * SLICE_PITCH + i % SLICE;
            with_state += widen(state[e]) * widen(dstate[e]);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < KEY_TILES; i++)
        {
            int tile = warp + i * GRADIENT_WARPS, row = tile % 4 * 16, col = tile / 4 * 16;
            if (col >= padded) continue;
            add_product<false, true>(dq[i], given_decayed, SLICE_PITCH, state, SLICE_PITCH, row,
                col, SLICE);
            add_product<false, true>(dk[i], x_rest, SLICE_PITCH, dstate, SLICE_PITCH, row, col,
                SLICE);
            add_product<false, true>(read[i], dr, SLICE_PITCH, state, SLICE_PITCH, row, col, SLICE);
        }
#pragma unroll
        for (int i = 0; i < SQUARE_TILES; i++)
        {
            int tile = warp + i * GRADIENT_WARPS, row = tile / 4 * 16, col = tile % 4 * 16;
            if (col > row) continue;
            add_product<false, true>(dp[i], given, SLICE_PITCH, x, SLICE_PITCH, row, col, SLICE);
            add_product<false, true>(dl[i], dr, SLICE_PITCH, x, SLICE_PITCH, row, col, SLICE);
        }
        __syncthreads();
    }
    with_state = block_sum(with_state, warp_sums);
#pragma unroll
    for (int lane = 1; lane < 4; lane *= 2)
        with_value += __shfl_xor_sync(ALL_LANES, with_value, lane);
    if (threadIdx.x % 4 == 0) dbeta[threadIdx.x / 4] = with_value;

    // Products of what goes to q and k with them are what the exponents have of it.
    real* rows = (real*)delta_shared;
    real* left = rows + CHUNK * pitch;
    real* lower = left + CHUNK * SQUARE;
    load_units(rows, units, z, at, head, 0);
    __syncthreads();
    dot_rows(query_parts, dq, rows, pitch, padded);
    __syncthreads();
    load_units(rows, units, z, at, head, 1);
    __syncthreads();
    dot_rows(key_parts, dk, rows, pitch, padded);
    dot_rows(read_parts, read, rows, pitch, padded);
#pragma unroll
    for (int i = 0; i < KEY_TILES; i++)
    {
        int row = (warp + i * GRADIENT_WARPS) % 4 * 16;
        scale_tile(read[i], row, gates.decay);
        scale_tile(read[i], row, gates.beta);
#pragma unroll
        for (int n = 0; n < 2; n++)
        {
#pragma unroll
            for (int e = 0; e < 4; e++) dk[i][n][e] -= read[i][n][e];
        }
    }

    // dP G and N, and what b and beta have of P and L.
#pragma unroll
    for (int i = 0; i < SQUARE_TILES; i++)
    {
        int tile = warp + i * GRADIENT_WARPS, row = tile / 4 * 16, col = tile % 4 * 16;
        int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
        float products[2][4] = {}, pull[2] = {}, of_beta[2] = {}, down[2][2] = {};
        const real* p = scores + z.square(at.number, head);
        if (col <= row)
            add_product<false, true>(products, rows, pitch, rows, pitch, row, col, padded);
#pragma unroll
        for (int n = 0; n < 2; n++)
        {
#pragma unroll
            for (int e = 0; e < 4; e++)
            {
                int r = row + g + e / 2 * 8, c = col + n * 8 + 2 * t + e % 2;
                float decay = c <= r ? expf(gates.sum[r] - gates.sum[c]) : 0;
                float score = c <= r ? dp[i][n][e] * decay : 0, key = 0;
                if (c < r)
                {
                    float drawn = -dl[i][n][e] * decay, of_lower = drawn * products[n][e];
                    key = gates.beta[r] * drawn;
                    float both = dp[i][n][e] * widen(p[r * CHUNK + c]) + gates.beta[r] * of_lower;
                    pull[e / 2] += both;
                    down[n][e % 2] += both;
                    of_beta[e / 2] += of_lower;
                }
                left[r * SQUARE + c] = narrow(score);
                lower[r * SQUARE + c] = narrow(key);
            }
        }
        sum_tile_rows(pull[0], pull[1], row_parts[col / 16], row);
        sum_tile_rows(of_beta[0], of_beta[1], beta_parts[col / 16], row);
#pragma unroll
        for (int n = 0; n < 2; n++)
        {
#pragma unroll
            for (int e = 0; e < 2; e++)
            {
#pragma unroll
                for (int lane = 4; lane < WARP; lane *= 2)
                    down[n][e] += __shfl_xor_sync(ALL_LANES, down[n][e], lane);
                if (g == 0) column_parts[row / 16][col + n * 8 + 2 * t + e] = down[n][e];
            }
        }
    }
    __syncthreads();
    u64 key_stride = (u64)value_heads * key_dim, place = at.first * key_stride + head * key_dim;
#pragma unroll
    for (int i = 0; i < KEY_TILES; i++)
    {
        int tile = warp + i * GRADIENT_WARPS, row = tile % 4 * 16, col = tile / 4 * 16;
        if (col >= padded) continue;
        add_product<false, false>(dq[i], left, SQUARE, rows, pitch, row, col, CHUNK);
        add_product<false, false>(dk[i], lower, SQUARE, rows, pitch, row, col, CHUNK);
        add_product<true, false>(dk[i], lower, SQUARE, rows, pitch, row, col, CHUNK);
        each_of_tile(dq[i], row, col, [&](int r, int c, float& v) {
            if (r < at.count && c < key_dim) dqueries[place + r * key_stride + c] = v;
        });
    }
    __syncthreads();
    load_units(rows, units, z, at, head, 0);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < KEY_TILES; i++)
    {
        int tile = warp + i * GRADIENT_WARPS, row = tile % 4 * 16, col = tile / 4 * 16;
        if (col >= padded) continue;
        add_product<true, false>(dk[i], left, SQUARE, rows, pitch, row, col, CHUNK);
        each_of_tile(dk[i], row, col, [&](int r, int c, float& v) {
            if (r < at.count && c < key_dim) dkeys[place + r * key_stride + c] = v;
        });
    }

    // The gates: db and dbeta of each token, then dg, the sum of db from its token on.
    int i = threadIdx.x;
    if (i < CHUNK)
    {
        float rest = sum_column(key_parts, padded / 16, i);
        float read_sum = gates.decay[i] * sum_column(read_parts, padded / 16, i);
        db[i] = sum_column(query_parts, padded / 16, i) - rest - gates.beta[i] * read_sum
            + sum_column(row_parts, 4, i) - sum_column(column_parts, 4, i);
        dbeta[i] += sum_column(beta_parts, 4, i) - read_sum;
        logs[i] = rest;
    }
    __syncthreads();
    if (i == 0)
    {
        float sum = gates.decay[CHUNK - 1] * with_state;
        for (int j = 0; j < CHUNK; j++) sum += logs[j];
        for (int j = CHUNK - 1; j >= 0; j--) db[j] = sum += db[j];
    }
    __syncthreads();
    if (i < CHUNK)
    {
        float da = 0, dlog = 0;
        if (i < at.count)
        {
            u64 row = (u64)(at.first + i) * 2 * value_heads;
            float b = gates.beta[i], strength = expf(a_log[head]);
            float a = widen(gate_inputs[row + value_heads + head]) + dt_bias[head];
            da = -db[i] * strength * sigmoid(a);
            dlog = -db[i] * strength * softplus(a);
            if (dgates)
            {
                real *to_b = dgates + row + head, *to_a = to_b + value_heads;
                float gradient = dbeta[i] * b * (1 - b);
                *to_b = narrow(accumulate_gates ? widen(*to_b) + gradient : gradient);
                *to_a = narrow(accumulate_gates ? widen(*to_a) + da : da);
            }
        }
        logs[i] = dlog;
        biases[i] = da;
    }
    __syncthreads();
    if (i > 0) return;
    float log_sum = 0, bias_sum = 0;
    for (int j = 0; j < CHUNK; j++)
    {
        log_sum += logs[j];
        bias_sum += biases[j];
    }
    part[head] = log_sum;
    part[value_heads + head] = bias_sum;
}

// dq and dk of the rows as they were before they had length 1: n (d - u (u d)), u = x n, n = 1 /
// |x|, d the sum over the value heads of the key head (for q over sqrt(key_dim)). A warp per token,
// key head, and q or k.
extern "C" __global__ void __launch_bounds__(256) delta_unit_gradients(real* dqkv,
    const float* dqueries, const float* dkeys, const real* qkv, int tokens, int key_heads,
    int value_heads, int key_dim, int value_dim, int accumulate)
{
    DeltaSizes z = {key_heads, value_heads, key_dim, value_dim};
    int item = blockIdx.x * (256 / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (item >= 2 * tokens * key_heads) return;
    int token = item / (2 * key_heads), which = item / key_heads % 2, head = item % key_heads;
    u64 at = (u64)token * z.cols() + (which * key_heads + head) * key_dim;
    const float* from = (which ? dkeys : dqueries)
        + ((u64)token * value_heads + head * z.group()) * key_dim;
    float squares = 0, pull = 0;
    for (int c = lane; c < key_dim; c += WARP)
    {
        float x = widen(qkv[at + c]), d = 0;
        for (int g = 0; g < z.group(); g++) d += from[g * key_dim + c];
        squares += x * x;
        pull += x * d;
    }
    float scale = 1 / sqrtf(warp_sum(squares) + 1e-6f);
    pull = warp_sum(pull) * scale * scale;
    if (which == 0) scale *= 1 / sqrtf((float)key_dim);
    for (int c = lane; c < key_dim; c += WARP)
    {
        float x = widen(qkv[at + c]), d = 0;
        for (int g = 0; g < z.group(); g++) d += from[g * key_dim + c];
        float v = scale * (d - x * pull);
        dqkv[at + c] = narrow(accumulate ? widen(dqkv[at + c]) + v : v);
    }
}

// ---- 16. magnitudes of weight-decomposed adapters -----------------------------------------------

// y[j] = sqrt(squares[j] + sum of bb[j, k] (2 scale p[k, j] + scale^2 z[j, k]) over k), the norm of
// a row of w + scale bb a from its parts. A thread has a row. Reads 4 (2 + 3 rank) outputs.
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

// g = (m / n) dy, and part[p, c] = sum of dy u / n over the rows of part p, of which the
// magnitudes' gradient is the sum. Blocks and warps as in sum_rows. Moves 3 R C S.
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

// y = factor x where x is kept, else 0, or adds it. A thread has eight elements of a row, which are
// one draw (section 8 has the numbering). Moves 2 or 3 R C S.
extern "C" __global__ void __launch_bounds__(256) dora_mask(real* y, const real* x, int rows,
    int cols, int words, long long seed, long long step, int layer, int threshold, float factor,
    int accumulate)
{
    int eights = (cols + 7) / 8;
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (long long)rows * eights) return;
    u32 row = i / eights, c = i % eights * 8, limit = (u32)threshold << 16;
    uint4 draw = philox((u64)seed, (u64)step, (u32)layer, row * 4 * words + c / 8);
    u32 halves[4] = {draw.x, draw.y, draw.z, draw.w};
    long long begin = (long long)row * cols + c, end = (long long)(row + 1) * cols;
    bool aligned = cols % VECTOR == 0;
    float v[VECTOR];
#pragma unroll
    for (int j = 0; j < 8; j += VECTOR)
    {
        bool whole = aligned && is_whole(begin + j, end, y, x);
        load_run(v, x, begin + j, end, whole);
#pragma unroll
        for (int k = 0; k < VECTOR; k++)
            v[k] *= halves[(j + k) / 2] << (k % 2 ? 0 : 16) >= limit ? factor : 0.0f;
        store_run(y, v, begin + j, end, whole, accumulate);
    }
}

// ---- 17. mixture of experts ---------------------------------------------------------------------

// A term is a row and an expert of its choice, row * chosen + rank; experts' terms have places side
// by side, in the order of their rows. Experts are so many that most have few places, and how many,
// the host does not know: blocks have tiles of a list, some of which are empty. E experts of I
// inner columns, T terms, C columns of rows.

// Whether an expert counts as larger than another: NaN as the largest, of equal ones the first.
DEVICE bool is_before(float a, int expert, float b, int other)
{
    if ((a != a) != (b != b)) return a != a;
    return a > b || (!(b > a) && expert < other);
}

// The chosen experts of each row from the largest logit on, and the softmax g of theirs. A warp has
// a row, which it reads anew, from cache, for each. Reads R E S, writes 8 T.
extern "C" __global__ void __launch_bounds__(256) route_experts(
    int* expert_of, float* g, const real* logits, int rows, int experts, int chosen)
{
    int lane = threadIdx.x % WARP, r = blockIdx.x * 8 + threadIdx.x / WARP;
    if (r >= rows) return;
    const real* z = logits + (u64)r * experts;
    int last = -1;
    float largest = 0, value_of_last = 0, sum = 0;
    for (int k = 0; k < chosen; k++)
    {
        int best = -1;
        float value = 0;
        for (int e = lane; e < experts; e += WARP)
        {
            float v = widen(z[e]);
            if (k > 0 && !is_before(value_of_last, last, v, e)) continue;
            if (best < 0 || is_before(v, e, value, best))
            {
                best = e;
                value = v;
            }
        }
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2)
        {
            float v = __shfl_xor_sync(ALL_LANES, value, step);
            int e = __shfl_xor_sync(ALL_LANES, best, step);
            if (e >= 0 && (best < 0 || is_before(v, e, value, best)))
            {
                best = e;
                value = v;
            }
        }
        if (k == 0) largest = value;
        float p = approximate_exp(value - largest);
        sum += p;
        if (lane == 0)
        {
            expert_of[r * chosen + k] = best;
            g[r * chosen + k] = p;
        }
        last = best;
        value_of_last = value;
    }
    if (lane > 0) return;
    for (int k = 0; k < chosen; k++) g[r * chosen + k] /= sum;
}

// A stable counting sort of the terms by expert: where each expert's places begin, the term at each
// place, and the place of each term. A block has an expert and counts what it needs: E times T
// comparisons, next to nothing beside the products. Reads 8 T E from cache, writes 8 T.
extern "C" __global__ void __launch_bounds__(256) sort_by_expert(int* begins, int* term_at,
    int* place_of, const int* expert_of, int experts, int terms)
{
    __shared__ int counts[8];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, own = blockIdx.x, place = 0;
    for (int i = threadIdx.x; i < terms; i += 256) place += expert_of[i] < own;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2)
        place += __shfl_xor_sync(ALL_LANES, place, step);
    if (lane == 0) counts[warp] = place;
    __syncthreads();
    place = 0;
    for (int w = 0; w < 8; w++) place += counts[w];
    if (threadIdx.x == 0) begins[own] = place;
    if (threadIdx.x == 0 && own == experts - 1) begins[experts] = terms;
    for (int first = 0; first < terms; first += 256)
    {
        int term = first + threadIdx.x;
        bool mine = term < terms && expert_of[term] == own;
        u32 lanes = __ballot_sync(ALL_LANES, mine);
        __syncthreads(); // the counts before are read
        if (lane == 0) counts[warp] = __popc(lanes);
        __syncthreads();
        int at = place + __popc(lanes & ((1u << lane) - 1));
        for (int w = 0; w < 8; w++)
        {
            if (w < warp) at += counts[w];
            place += counts[w];
        }
        if (!mine) continue;
        term_at[at] = term;
        place_of[term] = at;
    }
}

// The tiles of places: expert and first place of each, experts of -1 behind the last. A thread has
// an expert and counts the tiles of all.
extern "C" __global__ void __launch_bounds__(256) expert_tiles(
    int* tiles, const int* begins, int experts, int most)
{
    int own = blockIdx.x * blockDim.x + threadIdx.x, at = 0, all = 0, mine = 0;
    for (int e = 0; e < experts; e++)
    {
        int count = (begins[e + 1] - begins[e] + EXPERT_TILE_ROWS - 1) / EXPERT_TILE_ROWS;
        if (e < own) at += count;
        if (e == own) mine = count;
        all += count;
    }
    for (int i = 0; i < mine; i++)
    {
        tiles[2 * (at + i)] = own;
        tiles[2 * (at + i) + 1] = begins[own] + i * EXPERT_TILE_ROWS;
    }
    for (int i = all + own; i < most; i += gridDim.x * blockDim.x) tiles[2 * i] = -1;
}

// The rows that a thread copies of a tile of places (copy_lora_tile's shares): the places
// themselves, or the rows of their terms; -1 behind the end.
template <int ROWS, int COLS> struct ExpertRows
{
    static constexpr int CHUNKS = COLS / VECTOR, STEP = LORA_THREADS / CHUNKS;
    static_assert(ROWS % STEP == 0, "threads take equal shares");
    int row[ROWS / STEP];

    __device__ __forceinline__ ExpertRows(const int* terms, int chosen, int first, int end)
    {
#pragma unroll
        for (int i = 0; i < ROWS / STEP; i++)
        {
            int place = first + threadIdx.x / CHUNKS + i * STEP;
            row[i] = place >= end ? -1 : terms != nullptr ? terms[place] / chosen : place;
        }
    }

    // Starts the copy of their columns from col on, zeros behind cols.
    __device__ __forceinline__ void copy(
        u32 tile, const real* from, int col, int cols, bool wide) const
    {
        int own = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        col += chunk * VECTOR;
#pragma unroll
        for (int i = 0; i < ROWS / STEP; i++)
        {
            bool valid = row[i] >= 0 && col < cols;
            const real* at = from + (valid ? (u64)row[i] * cols + col : 0);
            u32 to = tile_address<CHUNKS>(tile, own + i * STEP, chunk);
            if (wide)
            {
                copy_async_16(to, at, valid);
                continue;
            }
            float x[VECTOR];
#pragma unroll
            for (int j = 0; j < VECTOR; j++) x[j] = valid && col + j < cols ? widen(at[j]) : 0.0f;
            store_vector(in_shared<real>(to), x);
        }
    }
};

// A tile of y[place, c] = sum over k of x[row, k] w[c, k], or, BACK, w[k, c] of the tile's expert. A
// warp has 32 places and 64 columns. Products and copies are those of section 8, floats as slow as
// there: such models are trained in 16 bits.
template <bool BACK>
DEVICE void expert_tile(real* y, const real* x, const real* w, const int* tiles, const int* begins,
    const int* terms, int chosen, int count, int depth, int cols, int parts)
{
    constexpr int ROWS = EXPERT_TILE_ROWS, COLS = EXPERT_TILE_COLS, DEPTH = 64;
    static_assert(ROWS == LORA_RANKS && COLS == 2 * 64, "what four warps and a stage have");
    using Stage = LoraStage<COLS, DEPTH>;
    int expert = tiles[2 * blockIdx.y];
    if (expert < 0) return;
    int first = tiles[2 * blockIdx.y + 1], end = begins[expert + 1];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, q = lane % 4;
    int first_col = blockIdx.x * COLS, own_row = warp / 2 * 32, own_col = warp % 2 * 64;
    // Forward the parts have blocks of their own, backward they are summed.
    int chunks = (depth + DEPTH - 1) / DEPTH, steps = BACK ? parts * chunks : chunks;
    w += ((u64)expert * parts + (BACK ? 0 : blockIdx.z)) * depth * cols;
    if (!BACK) y += (u64)blockIdx.z * count * cols;
    bool wide = aligned16(x, depth, sizeof(real));
    bool wide_w = aligned16(w, BACK ? cols : depth, sizeof(real));
    ExpertRows<ROWS, DEPTH> own(terms, chosen, first, end);
    float d[2][8][4] = {};
    in_stages(
        steps,
        [&](int step) INLINED
        {
            Stage to(step);
            int part = step / chunks, k = step % chunks * DEPTH;
            if constexpr (BACK)
                copy_lora_tile<DEPTH, COLS>(to.first,
                    w + ((u64)part * depth + k) * cols + first_col, cols, depth - k,
                    cols - first_col, wide_w);
            else
                copy_lora_tile<COLS, DEPTH>(to.first, w + (u64)first_col * depth + k, depth,
                    cols - first_col, depth - k, wide_w);
            own.copy(to.second, x + (u64)part * count * depth, k, depth, wide);
        },
        [&](int step) INLINED
        {
            Stage from(step);
#pragma unroll
            for (int k = 0; k < DEPTH; k += 16)
            {
                real2 left[2][4];
#pragma unroll
                for (int m = 0; m < 2; m++)
                    load_block<DEPTH, true, false>(left[m], from.second, own_row + m * 16, k);
#pragma unroll
                for (int n = 0; n < 8; n += 2)
                {
                    real2 right[4];
                    if constexpr (BACK)
                        load_block<COLS, true, true>(right, from.first, k, own_col + n * 8);
                    else load_block<DEPTH, false, false>(right, from.first, own_col + n * 8, k);
#pragma unroll
                    for (int m = 0; m < 2; m++)
                    {
                        multiply_add_16x8x16(d[m][n], left[m], right);
                        multiply_add_16x8x16(d[m][n + 1], left[m], right + 2);
                    }
                }
            }
        });
#pragma unroll
    for (int i = 0; i < 4; i++)
    {
        int place = first + own_row + i * 8 + g, c = first_col + own_col + 2 * q;
        if (place >= end) break;
        put_sums<8>(
            y, (u64)place * cols + c, d[i / 2], i % 2, 1, cols - c, cols % 2 == 0, false);
    }
}

// y[z, place, c] = sum over k of x[row, k] w[expert, z, c, k]; row is that of the place's term, or
// the place where there are no terms. Reads the w of each expert that has places once, of x what
// its rows are, from cache more than once; writes T C S for each z. 2 T C depth FLOP.
extern "C" __global__ void __launch_bounds__(LORA_THREADS, LORA_BLOCKS) expert_product(
    real* y, const real* x, const real* w, const int* tiles, const int* begins, const int* terms,
    int chosen, int count, int depth, int cols, int parts)
{
    expert_tile<false>(y, x, w, tiles, begins, terms, chosen, count, depth, cols, parts);
}

// y[place, c] = sum over parts and k of x[part, row, k] w[expert, part, k, c]. Moves as much.
extern "C" __global__ void __launch_bounds__(LORA_THREADS, LORA_BLOCKS) expert_product_back(
    real* y, const real* x, const real* w, const int* tiles, const int* begins, const int* terms,
    int chosen, int count, int depth, int cols, int parts)
{
    expert_tile<true>(y, x, w, tiles, begins, terms, chosen, count, depth, cols, parts);
}

// dw[expert, part, m, c] = sum of dy[part, row, m] x[row', c] over the expert's places in order, or
// adds it; zeros where it has none. A block has 64 m and 128 columns, a warp 32 of them. Writes
// 4 bytes an element; 2 FLOP for each and place.
extern "C" __global__ void __launch_bounds__(LORA_THREADS, LORA_BLOCKS) expert_gradient(
    float* dw, const real* dy, const real* x, const int* begins, const int* dy_terms,
    const int* x_terms, int chosen, int count, int rows, int cols, int parts, int accumulate)
{
    constexpr int M = EXPERT_TILE_ROWS, COLS = EXPERT_TILE_COLS, PLACES = 64;
    static_assert(M == LORA_RANKS && COLS == 4 * 32, "what four warps and a stage have");
    using Stage = LoraStage<COLS, PLACES>;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, q = lane % 4;
    int expert = blockIdx.z, begin = begins[expert], end = begins[expert + 1];
    int tiles = (rows + M - 1) / M, part = blockIdx.y / tiles;
    int first_row = blockIdx.y % tiles * M, first_col = blockIdx.x * COLS;
    if (begin == end && accumulate) return;
    dy += (u64)part * count * rows;
    dw += ((u64)expert * parts + part) * rows * cols;
    bool wide_x = aligned16(x, cols, sizeof(real)), wide_dy = aligned16(dy, rows, sizeof(real));
    float d[M / 16][4][4] = {};
    in_stages(
        (end - begin + PLACES - 1) / PLACES,
        [&](int step) INLINED
        {
            Stage to(step);
            int first = begin + step * PLACES;
            ExpertRows<PLACES, COLS>(x_terms, chosen, first, end)
                .copy(to.first, x, first_col, cols, wide_x);
            ExpertRows<PLACES, M>(dy_terms, chosen, first, end)
                .copy(to.second, dy, first_row, rows, wide_dy);
        },
        [&](int step) INLINED
        {
            Stage from(step);
#pragma unroll
            for (int k = 0; k < PLACES; k += 16)
            {
                real2 left[M / 16][4];
#pragma unroll
                for (int m = 0; m < M / 16; m++)
                    load_block<M, false, true>(left[m], from.second, k, m * 16);
#pragma unroll
                for (int n = 0; n < 4; n += 2)
                {
                    real2 right[4];
                    load_block<COLS, true, true>(right, from.first, k, warp * 32 + n * 8);
#pragma unroll
                    for (int m = 0; m < M / 16; m++)
                    {
                        multiply_add_16x8x16(d[m][n], left[m], right);
                        multiply_add_16x8x16(d[m][n + 1], left[m], right + 2);
                    }
                }
            }
        });
    bool pairs = cols % 2 == 0 && ((u64)dw & 7) == 0;
#pragma unroll
    for (int i = 0; i < M / 8; i++)
    {
        int r = first_row + i * 8 + g, c = first_col + warp * 32 + 2 * q;
        if (r >= rows) break;
        put_sums<4>(dw, (u64)r * cols + c, d[i / 2], i % 2, 1, cols - c, pairs, accumulate);
    }
}

// y[r] = sum of g x[place] over the terms of a row in the order of its choice, or adds it; without g
// the plain sum. A block has a row. Moves T C S and R C S.
extern "C" __global__ void __launch_bounds__(256) combine_experts(real* y, const real* x,
    const float* g, const int* place_of, int chosen, int cols, int accumulate)
{
    int first = blockIdx.x * chosen;
    bool wide = aligned16(x, cols, sizeof(real)) && aligned16(y, cols, sizeof(real));
    int step = wide ? VECTOR : 1;
    for (int c = threadIdx.x * step; c < cols; c += blockDim.x * step)
    {
        float sum[VECTOR] = {}, v[VECTOR];
        for (int term = first; term < first + chosen; term++)
        {
            float weight = g != nullptr ? g[term] : 1;
            load_run(v, x + (u64)place_of[term] * cols, c, c + step, wide);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) sum[i] += weight * v[i];
        }
        store_run(y + (u64)blockIdx.x * cols, sum, c, c + step, wide, accumulate);
    }
}

// Of a place's term with weight g, a = silu(gate) up and z the gradient of a before the weight:
// dg = a z, and times g the gradients of gate and up, and a for w1's gradient where it is wanted. A
// block has a place. Moves 6 T I S.
extern "C" __global__ void __launch_bounds__(256) experts_backward(real* dhidden, real* weighed,
    float* dg, const real* z, const real* hidden, const float* g, const int* term_at, int count,
    int cols)
{
    __shared__ float shared[8];
    int place = blockIdx.x, term = term_at[place];
    u64 own = (u64)place * cols, up = (u64)(count + place) * cols;
    float weight = g[term], sum = 0;
    bool wide = aligned16(dhidden, cols, sizeof(real)) && aligned16(weighed, cols, sizeof(real))
        && aligned16(z, cols, sizeof(real)) && aligned16(hidden, cols, sizeof(real));
    int step = wide ? VECTOR : 1;
    for (int c = threadIdx.x * step; c < cols; c += blockDim.x * step)
    {
        float p[VECTOR], u[VECTOR], v[VECTOR], a[VECTOR];
        load_run(p, hidden + own, c, c + step, wide);
        load_run(u, hidden + up, c, c + step, wide);
        load_run(v, z + own, c, c + step, wide);
#pragma unroll
        for (int i = 0; i < VECTOR; i++)
        {
            float s = sigmoid(p[i]), silu = p[i] * s, da = weight * v[i];
            a[i] = silu * u[i];
            sum += a[i] * v[i];
            p[i] = da * u[i] * (s + silu * (1 - s));
            u[i] = da * silu;
            a[i] *= weight;
        }
        store_run(dhidden + own, p, c, c + step, wide, 0);
        store_run(dhidden + up, u, c, c + step, wide, 0);
        if (weighed != nullptr) store_run(weighed + own, a, c, c + step, wide, 0);
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) dg[term] = sum;
}

// dlogits = g (dg - sum of g dg) of a row's chosen experts, 0 of all others, or adds it. A warp has
// a row. Writes R E S.
extern "C" __global__ void __launch_bounds__(256) route_experts_backward(real* dlogits,
    const float* dg, const float* g, const int* expert_of, int rows, int experts, int chosen,
    int accumulate)
{
    int r = blockIdx.x * 8 + threadIdx.x / WARP, first = r * chosen;
    if (r >= rows) return;
    float mean = 0;
    for (int i = first; i < first + chosen; i++) mean += g[i] * dg[i];
    for (int e = threadIdx.x % WARP; e < experts; e += WARP)
    {
        real* to = dlogits + (u64)r * experts + e;
        float v = accumulate ? widen(*to) : 0;
        for (int i = first; i < first + chosen; i++)
            if (expert_of[i] == e) v += g[i] * (dg[i] - mean);
        *to = narrow(v);
    }
}

// y = x + up sigmoid(gate) with a gate for each row, which is a block's. Moves 3 R C S.
extern "C" __global__ void __launch_bounds__(256) gated_add(
    real* y, const real* x, const real* up, const real* gate, int cols)
{
    u64 row = (u64)blockIdx.x * cols;
    float open = open_gate(widen(gate[blockIdx.x]));
    bool wide = aligned16(x, cols, sizeof(real)) && aligned16(up, cols, sizeof(real))
        && aligned16(y, cols, sizeof(real));
    int step = wide ? VECTOR : 1;
    for (int c = threadIdx.x * step; c < cols; c += blockDim.x * step)
    {
        float v[VECTOR], u[VECTOR];
        load_run(v, x + row, c, c + step, wide);
        load_run(u, up + row, c, c + step, wide);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) v[i] += open * u[i];
        store_run(y + row, v, c, c + step, wide, 0);
    }
}

// dup = s dy and dgate = s (1 - s) (dy . up), or adds them; either may be absent. Moves 3 R C S.
extern "C" __global__ void __launch_bounds__(256) gated_add_backward(real* dup, real* dgate,
    const real* dy, const real* up, const real* gate, int cols, int accumulate_up,
    int accumulate_gate)
{
    __shared__ float shared[8];
    u64 row = (u64)blockIdx.x * cols;
    float s = sigmoid(widen(gate[blockIdx.x])), sum = 0;
    bool wide = aligned16(dup, cols, sizeof(real)) && aligned16(up, cols, sizeof(real))
        && aligned16(dy, cols, sizeof(real));
    int step = wide ? VECTOR : 1;
    for (int c = threadIdx.x * step; c < cols; c += blockDim.x * step)
    {
        float v[VECTOR], u[VECTOR];
        load_run(v, dy + row, c, c + step, wide);
        if (dgate != nullptr)
        {
            load_run(u, up + row, c, c + step, wide);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) sum += v[i] * u[i];
        }
        if (dup == nullptr) continue;
#pragma unroll
        for (int i = 0; i < VECTOR; i++) v[i] *= s;
        store_run(dup + row, v, c, c + step, wide, accumulate_up);
    }
    if (dgate == nullptr) return;
    sum = s * (1 - s) * block_sum(sum, shared);
    if (threadIdx.x > 0) return;
    dgate[blockIdx.x] = narrow(accumulate_gate ? widen(dgate[blockIdx.x]) + sum : sum);
}

// ---- 18. optimizers beside AdamW, and moments in 8 bits -----------------------------------------

// One element of Lion, or of plain descent, which has no moment; m is changed, p is returned.
DEVICE float lion_element(const adamw_step& s, float p, float g, float& m, bool is_plain)
{
    if (is_plain) return p * s.keep - g * s.rate;
    float step = m * s.first + g * s.new_first;
    m = m * s.second + g * s.new_second;
    return p * s.keep - (step > 0 ? s.rate : step < 0 ? -s.rate : 0.0f);
}

// As adamw, for Lion with one moment or, where m is null, plain descent. Moves 20 bytes per element
// (12 without m), 2 more with a copy; 7 FLOP.
extern "C" __global__ void __launch_bounds__(256) lion(
    float* p, void* rounded, int rounded_type, const float* g, float* m, const double* norm,
    long long count, float keep, float first, float new_first, float second, float new_second,
    float rate)
{
    float factor;
    long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= count || !may_update(norm, &factor)) return;
    adamw_step s = {keep, first, new_first, second, new_second, rate, 1, 0};
    float x[4] = {0, 0, 0, 0};
    int mine = (int)min(4LL, count - i);
    bool wide = mine == 4 && aligned16(p, 4, 4) && aligned16(g, 4, 4) && aligned16(m, 4, 4)
        && aligned16(rounded, 4, 4);
    if (wide)
    {
        float4 value = *(float4*)(p + i), gradient = *(const float4*)(g + i);
        float4 mean = m ? *(float4*)(m + i) : make_float4(0, 0, 0, 0);
        x[0] = lion_element(s, value.x, gradient.x * factor, mean.x, !m);
        x[1] = lion_element(s, value.y, gradient.y * factor, mean.y, !m);
        x[2] = lion_element(s, value.z, gradient.z * factor, mean.z, !m);
        x[3] = lion_element(s, value.w, gradient.w * factor, mean.w, !m);
        *(float4*)(p + i) = make_float4(x[0], x[1], x[2], x[3]);
        if (m) *(float4*)(m + i) = mean;
    }
    else
    {
#pragma unroll
        for (int j = 0; j < 4; j++)
        {
            if (j >= mine) break;
            float mean = m ? m[i + j] : 0;
            x[j] = lion_element(s, p[i + j], g[i + j] * factor, mean, !m);
            p[i + j] = x[j];
            if (m) m[i + j] = mean;
        }
    }
    if (rounded) store_rounded(rounded, rounded_type, i, x, mine, wide);
}

// Place i of `steps` equal steps from 0.1 to 1, counted from the nearer end as torch.linspace does.
DEVICE float linspace(int i, int steps)
{
    float step = (1.0f - 0.1f) / steps;
    return i < (steps + 1) / 2 ? fmaf(step, i, 0.1f) : fmaf(-step, steps - i, 1.0f);
}

// Entry i from 0 on of the part above 0 of a table of src/Kernels/Updates/DynamicMap.cs, whose
// first decade has 1 << coarse entries. Those of decade d begin at ((1 << d) - 1) << coarse.
DEVICE float dynamic_entry(int i, int coarse)
{
    int decade = 31 - __clz((i >> coarse) + 1), steps = 1 << (decade + coarse);
    int at = i - (((1 << decade) - 1) << coarse);
    if (decade > 6) return 1;
    float power = decade == 0 ? 1e-6f : decade == 1 ? 1e-5f : decade == 2 ? 1e-4f
        : decade == 3 ? 1e-3f : decade == 4 ? 1e-2f : decade == 5 ? 1e-1f : 1.0f;
    return power * ((linspace(at, steps) + linspace(at + 1, steps)) / 2);
}

// The entry of the ascending table that is nearest to x; of a table with signs one of x's sign.
DEVICE u32 nearest_entry(const float* table, float x, bool is_signed)
{
    int code = 0;
#pragma unroll
    for (int step = 128; step > 0; step /= 2)
        if (table[code + step] <= x) code += step;
    if (code < 255 && x > (table[code] + table[code + 1]) * 0.5f) code++;
    if (is_signed && (__float_as_uint(table[code]) ^ __float_as_uint(x)) >> 31)
        code += x > 0 ? 1 : -1;
    return (u32)code;
}

// x[4] for 4 codes, and back: codes of the warp's new scale, which lane 0 stores.
DEVICE void read_codes(float* x, const float* table, u32 codes, float scale)
{
#pragma unroll
    for (int j = 0; j < 4; j++) x[j] = table[codes >> 8 * j & 0xff] * scale;
}

DEVICE void write_codes(
    unsigned char* codes, float* scale, long long first, long long count, const float* table,
    const float (*x)[4], bool is_signed, bool wide)
{
    float largest = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) largest = fmaxf(largest, fabsf(x[j / 4][j % 4]));
    largest = warp_max(largest);
#pragma unroll
    for (int half = 0; half < 2; half++)
    {
        long long i = first + half * UPDATE_BLOCK / 2;
        u32 word = 0;
#pragma unroll
        for (int j = 0; j < 4; j++)
            word |= nearest_entry(table, largest > 0 ? x[half][j] / largest : 0.0f, is_signed)
                << 8 * j;
        if (wide) *(u32*)(codes + i) = word;
        else
        {
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (i + j < count) codes[i + j] = (unsigned char)(word >> 8 * j);
        }
    }
    if (threadIdx.x % WARP == 0) *scale = largest;
}

DEVICE u32 load_codes(const unsigned char* codes, long long i, long long count, bool wide)
{
    if (wide) return *(const u32*)(codes + i);
    u32 word = 0;
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (i + j < count) word |= (u32)codes[i + j] << 8 * j;
    return word;
}

// As adamw with moments of 8 bits in blocks of UPDATE_BLOCK elements, each with a scale: a warp has
// a block, a lane two times four neighbours of it. Without v it is Lion. The values take the
// moments before they are rounded again. Moves 16 bytes per element, 14 with one moment, 2 more with
// a copy, and 16 per block; about 60 FLOP and 20 reads of shared memory, a warp's at random.
extern "C" __global__ void __launch_bounds__(256, 4) update_8bit(
    float* p, void* rounded, int rounded_type, const float* g, unsigned char* m, unsigned char* v,
    float* m_scales, float* v_scales, const double* norm, long long count, float keep, float first,
    float new_first, float second, float new_second, float rate, float root, float epsilon)
{
    __shared__ float means_of[256], squares_of[256];
    // Both tables hold 0; the signed one has the same entries on either side of it, and 1.
    int t = threadIdx.x;
    means_of[t] = t == 127 ? 0.0f
        : t > 127 ? dynamic_entry(t - 128, 0) : -dynamic_entry(126 - t, 0);
    squares_of[t] = t == 0 ? 0.0f : dynamic_entry(t - 1, 1);
    __syncthreads();
    float factor;
    long long block = (long long)blockIdx.x * (256 / WARP) + t / WARP;
    long long begin = block * UPDATE_BLOCK, mine = begin + t % WARP * 4;
    if (begin >= count || !may_update(norm, &factor)) return;
    adamw_step s = {keep, first, new_first, second, new_second, rate, root, epsilon};
    bool wide = begin + UPDATE_BLOCK <= count && aligned16(p, 4, 4) && aligned16(g, 4, 4)
        && aligned16(rounded, 4, 4) && (((u64)m | (u64)v) & 3) == 0;
    float m_scale = m_scales[block], v_scale = v ? v_scales[block] : 0;
    float means[2][4], squares[2][4];
#pragma unroll
    for (int half = 0; half < 2; half++)
    {
        long long i = mine + half * UPDATE_BLOCK / 2;
        float x[4] = {0, 0, 0, 0}, gradients[4] = {0, 0, 0, 0};
        if (wide)
        {
            float4 value = *(float4*)(p + i), gradient = *(const float4*)(g + i);
            x[0] = value.x, x[1] = value.y, x[2] = value.z, x[3] = value.w;
            gradients[0] = gradient.x, gradients[1] = gradient.y;
            gradients[2] = gradient.z, gradients[3] = gradient.w;
        }
        else
        {
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (i + j < count) x[j] = p[i + j], gradients[j] = g[i + j];
        }
        read_codes(means[half], means_of, load_codes(m, i, count, wide), m_scale);
        if (v) read_codes(squares[half], squares_of, load_codes(v, i, count, wide), v_scale);
#pragma unroll
        for (int j = 0; j < 4; j++)
        {
            // What lies behind the range has no moment that a scale could come from.
            if (!wide && i + j >= count) means[half][j] = squares[half][j] = 0;
            float gradient = gradients[j] * factor;
            x[j] = v ? adamw_element(s, x[j], gradient, &means[half][j], &squares[half][j])
                : lion_element(s, x[j], gradient, means[half][j], false);
        }
        if (wide) *(float4*)(p + i) = make_float4(x[0], x[1], x[2], x[3]);
        else
        {
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (i + j < count) p[i + j] = x[j];
        }
        if (rounded && i < count)
            store_rounded(rounded, rounded_type, i, x, (int)min(4LL, count - i), wide);
    }
    write_codes(m, m_scales + block, mine, count, means_of, means, true, wide);
    if (v) write_codes(v, v_scales + block, mine, count, squares_of, squares, false, wide);
}

// -- Adafactor: a tensor is batch matrices [rows, cols]; m has a number for each row, v for each
// -- column; without v the tensor is a vector, and m has a number for each element. Together they
// -- read the gradient four times and move 24 bytes per element, 2 more with a copy.

// What a mean of squares becomes with the next.
DEVICE float next_square(float old, float now, float second, float new_second)
{
    return old * second + now * new_second;
}

// m of a row: the mean of g^2 + least. A block per row.
extern "C" __global__ void __launch_bounds__(256) adafactor_rows(
    float* m, const float* g, const double* norm, int cols, int is_vector, float second,
    float new_second, float least)
{
    __shared__ float sums[256 / WARP];
    float factor, sum = 0;
    if (!may_update(norm, &factor)) return;
    long long first = (long long)blockIdx.x * cols;
    for (int c = threadIdx.x; c < cols; c += blockDim.x)
    {
        float x = g[first + c] * factor;
        if (is_vector) m[first + c] = next_square(m[first + c], x * x + least, second, new_second);
        sum += x * x;
    }
    sum = block_sum(sum, sums) / cols + least;
    if (!is_vector && threadIdx.x == 0)
        m[blockIdx.x] = next_square(m[blockIdx.x], sum, second, new_second);
}

// part[b, y, c] = sum of g^2 over rows_per_part rows: a thread has a column.
extern "C" __global__ void __launch_bounds__(256) adafactor_column_parts(
    float* part, const float* g, int rows, int cols, int rows_per_part)
{
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= cols) return;
    int first = blockIdx.y * rows_per_part, last = min(rows, first + rows_per_part);
    float sum = 0;
    for (int r = first; r < last; r++)
    {
        float x = g[((long long)blockIdx.z * rows + r) * cols + c];
        sum += x * x;
    }
    part[((long long)blockIdx.z * gridDim.y + blockIdx.y) * cols + c] = sum;
}

// v of a column, from the parts in order.
extern "C" __global__ void __launch_bounds__(256) adafactor_columns(
    float* v, const float* part, const double* norm, int batch, int rows, int cols, int parts,
    float second, float new_second, float least)
{
    float factor, sum = 0;
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (long long)batch * cols || !may_update(norm, &factor)) return;
    for (int y = 0; y < parts; y++) sum += part[(i / cols * parts + y) * cols + i % cols];
    v[i] = next_square(v[i], sum * factor * factor / rows + least, second, new_second);
}

// mean[b] of m over the rows of matrix b.
extern "C" __global__ void __launch_bounds__(256) adafactor_means(
    float* mean, const float* m, int rows)
{
    __shared__ float sums[256 / WARP];
    float sum = 0;
    for (int r = threadIdx.x; r < rows; r += blockDim.x)
        sum += m[(long long)blockIdx.x * rows + r];
    sum = block_sum(sum, sums) / rows;
    if (threadIdx.x == 0) mean[blockIdx.x] = sum;
}

// The change of element c of row `row`, before its rate. The roots are apart, since products of two
// means can be below the smallest float.
DEVICE float adafactor_element(float g, const float* m, const float* v, const float* mean, int row,
    int rows, int cols, int c)
{
    if (!v) return g / sqrtf(m[(long long)row * cols + c]);
    return g / sqrtf(m[row] / mean[row / rows]) / sqrtf(v[(long long)(row / rows) * cols + c]);
}

// squares[row] = sum of the squares of the changes of a row. A block per row.
extern "C" __global__ void __launch_bounds__(256) adafactor_squares(
    double* squares, const float* g, const float* m, const float* v, const float* mean,
    const double* norm, int rows, int cols)
{
    __shared__ float sums[256 / WARP];
    float factor, sum = 0;
    if (!may_update(norm, &factor)) return;
    long long first = (long long)blockIdx.x * cols;
    for (int c = threadIdx.x; c < cols; c += blockDim.x)
    {
        float x = adafactor_element(
            g[first + c] * factor, m, v, mean, blockIdx.x, rows, cols, c);
        sum += x * x;
    }
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

// rate = learning rate over what the root mean square of the changes is above `most`. One block.
extern "C" __global__ void __launch_bounds__(256) adafactor_rate(
    float* rate, const double* squares, const double* norm, int rows, long long count,
    float learning_rate, float most)
{
    __shared__ double sums[256];
    float factor;
    double sum = 0;
    if (!may_update(norm, &factor)) return;
    for (int r = threadIdx.x; r < rows; r += blockDim.x) sum += squares[r];
    sum = block_sum_double(sum, sums);
    if (threadIdx.x == 0)
        *rate = learning_rate / fmaxf(1.0f, (float)sqrt(sum / (double)count) / most);
}

// p = p keep - rate change, and its copy. A block per row.
extern "C" __global__ void __launch_bounds__(256) adafactor_change(
    float* p, void* rounded, int rounded_type, const float* g, const float* m, const float* v,
    const float* mean, const float* rate, const double* norm, int rows, int cols, float keep)
{
    float factor;
    if (!may_update(norm, &factor)) return;
    long long first = (long long)blockIdx.x * cols;
    for (int c = threadIdx.x; c < cols; c += blockDim.x)
    {
        float x[4] = {p[first + c] * keep - *rate * adafactor_element(
            g[first + c] * factor, m, v, mean, blockIdx.x, rows, cols, c), 0, 0, 0};
        p[first + c] = x[0];
        if (rounded) store_rounded(rounded, rounded_type, first + c, x, 1, false);
    }
}
