using System.Runtime.Intrinsics;
using MiniCpmNative.GpuEmulator.Alu;
using MiniCpmNative.GpuEmulator.Memory;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.GpuEmulator.Driver;

/// <summary>One column-major matrix of a product: element (r, c) is at Address + r + c *
/// Leading.</summary>
internal readonly record struct GemmMatrix(ulong Address, int Type, int Leading, long Stride)
{
    public int Bytes => Type == CublasApi.F32 ? 4 : 2;
    public bool IsKnown => Type is CublasApi.F32 or CublasApi.F16 or CublasApi.BF16;
}

/// <summary>
/// C = alpha * op(A) op(B) + beta * C, column-major, sums in float in order of k. Where beta is 0,
/// C is not read (cuBLAS documents so). Every element it touches must lie in an allocation and,
/// when read, have been written.
/// </summary>
internal sealed unsafe record Gemm(
    string Call, int TransA, int TransB, int M, int N, int K, GemmMatrix A, GemmMatrix B,
        GemmMatrix C, int Count)
{
    public float Alpha { get; init; }
    public float Beta { get; init; }

    /// <summary>Whether operands in float are rounded to TF32 first: 10 bits of
    /// mantissa.</summary>
    public bool Tf32 { get; init; }

    private int RowsA => TransA == 0 ? M : K;
    private int ColsA => TransA == 0 ? K : M;
    private int RowsB => TransB == 0 ? K : N;
    private int ColsB => TransB == 0 ? N : K;

    /// <summary>Why CUBLAS_STATUS_INVALID_VALUE; null when the values are right.</summary>
    public string? RefusedValue()
    {
        if (TransA is not (0 or 1) || TransB is not (0 or 1))
            return $"{Call}: an operation is neither 0 nor 1";
        if (M < 0 || N < 0 || K < 0 || Count < 0) return $"{Call}: a negative size";
        if (A.Leading < Math.Max(1, RowsA)) return $"{Call}: lda {A.Leading} is below {RowsA}";
        if (B.Leading < Math.Max(1, RowsB)) return $"{Call}: ldb {B.Leading} is below {RowsB}";
        if (C.Leading < Math.Max(1, M)) return $"{Call}: ldc {C.Leading} is below {M}";
        if (M > 0 && N > 0 && Count > 0
            && (C.Address == 0 || (K > 0 && (A.Address == 0 || B.Address == 0))))
            return $"{Call}: a null pointer";
        return null;
    }

    /// <summary>Equal input types; the output is float or of the inputs' type.</summary>
    public bool IsSupported() => A.IsKnown && A.Type == B.Type
        && (C.Type == A.Type || C.Type == CublasApi.F32);

    public void Run(EmulatedGpu gpu)
    {
        if (M == 0 || N == 0) return;
        for (int batch = 0; batch < Count; batch++)
        {
            float[] a = Read(gpu, A, batch, RowsA, ColsA, "A"),
                b = Read(gpu, B, batch, RowsB, ColsB, "B");
            if (Tf32)
            {
                Shorten(a);
                Shorten(b);
            }

            float[]? c = Beta != 0 ? Read(gpu, C, batch, M, N, "C") : null;
            Write(gpu, batch, Multiply(a, b, c));
        }
    }

    private static void Shorten(float[] values)
    {
        for (int i = 0; i < values.Length; i++)
        {
            uint bits = BitConverter.SingleToUInt32Bits(values[i]);
            bits += 0xFFF + (bits >> 13 & 1);
            values[i] = BitConverter.UInt32BitsToSingle(bits & ~0x1FFFu);
        }
    }

    private float[] Multiply(float[] a, float[] b, float[]? c)
    {
        // A as k rows of M values, so that a column of C is a sum of scaled rows.
        float[] rows = TransA == 0 ? a : Turn(a, K, M);
        float[] cols = TransB == 0 ? b : Turn(b, N, K);
        var result = new float[(long)M * N];
        Parallel.For(0, N, n =>
        {
            var column = result.AsSpan(n * M, M);
            for (int k = 0; k < K; k++)
            {
                float scale = cols[n * K + k];
                var row = rows.AsSpan(k * M, M);
                int m = 0;
                for (; m + 8 <= M; m += 8)
                    Vector256.FusedMultiplyAdd(Vector256.Create<float>(row.Slice(m, 8)),
                        Vector256.Create(scale),
                        Vector256.Create<float>(column.Slice(m, 8))).CopyTo(column[m..]);
                for (; m < M; m++) column[m] = MathF.FusedMultiplyAdd(row[m], scale, column[m]);
            }
            for (int m = 0; m < M; m++)
                column[m] = Alpha * column[m] + (c == null ? 0 : Beta * c[n * M + m]);
        });
        return result;
    }

    // x[rows + rows * cols] column-major to its transpose.
    private static float[] Turn(float[] x, int rows, int cols)
    {
        var turned = new float[x.Length];
        for (int c = 0; c < cols; c++)
            for (int r = 0; r < rows; r++) turned[r * cols + c] = x[c * rows + r];
        return turned;
    }

    private byte* Column(EmulatedGpu gpu, GemmMatrix x, int batch, int column, int rows,
        string name, out Allocation at)
    {
        ulong address = x.Address
            + (ulong)((batch * x.Stride + (long)column * x.Leading) * x.Bytes);
        if (address % (ulong)x.Bytes != 0)
            throw new FaultException(new(Check.Misaligned, $"{name} at 0x{address:x}", Call));
        if (gpu.Memory.Refusal(address, (long)rows * x.Bytes) is { } refusal)
            throw new FaultException(new(refusal.Check,
                $"{name}, column {column}: {refusal.Detail}", Call));
        at = gpu.Memory.Find(address)!;
        return at.Host + (address - at.Start);
    }

    private float[] Read(EmulatedGpu gpu, GemmMatrix x, int batch, int rows, int cols, string name)
    {
        var values = new float[(long)rows * cols];
        for (int c = 0; c < cols; c++)
        {
            byte* from = Column(gpu, x, batch, c, rows, name, out var allocation);
            var state = new Span<byte>(allocation.State + (from - allocation.Host), rows * x.Bytes);
            int unwritten = state.IndexOfAnyExcept((byte)255);
            if (unwritten >= 0)
                throw new FaultException(new(Check.Uninitialised,
                    $"{name}[{unwritten / x.Bytes}, {c}] was never written", Call));
            for (int r = 0; r < rows; r++) values[(long)c * rows + r] = Load(from, r, x.Type);
        }
        return values;
    }

    private void Write(EmulatedGpu gpu, int batch, float[] values)
    {
        for (int n = 0; n < N; n++)
        {
            byte* to = Column(gpu, C, batch, n, M, "C", out var allocation);
            if (allocation.ReadOnly)
                throw new FaultException(new(Check.ConstantWrite, $"C is {allocation.What}", Call));
            for (int m = 0; m < M; m++) Store(to, m, C.Type, values[(long)n * M + m]);
            new Span<byte>(allocation.State + (to - allocation.Host), M * C.Bytes).Fill(255);
        }
    }

    private static float Load(byte* at, int n, int type) => type switch
    {
        CublasApi.F32 => ((float*)at)[n],
        CublasApi.F16 => HalfToFloat.Run(((ushort*)at)[n]),
        _ => BrainToFloat.Run(((ushort*)at)[n]),
    };

    private static void Store(byte* at, int n, int type, float value)
    {
        if (type == CublasApi.F32) ((float*)at)[n] = value;
        else ((ushort*)at)[n] = type == CublasApi.F16 ? FloatToHalf.Run(value)
            : FloatToBrain.Run(value);
    }
}
