using System.Numerics.Tensors;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Random operands with strides beyond their columns, and sentinels around C. NaN fills the
/// padding of A and B, so that anything read outside of them shows.
/// </summary>
internal sealed unsafe class GemmCase : IDisposable
{
    private const int Guard = 40;
    private readonly List<HugeMemory> _memories = [];
    private readonly int _m, _n, _k;
    private readonly MatrixView _unpackedB;
    private readonly byte[] _before;
    private readonly HugeMemory _c;
    private double[]? _bias;
    private void* _biasData;

    public GemmCase(Random random, int m, int n, int k, DType type, DType weight, bool aT, bool bT)
    {
        (_m, _n, _k) = (m, n, k);
        A = Fill(random, aT ? k : m, aT ? m : k, type, 3);
        B = Fill(random, bT ? n : k, bT ? k : n, weight, 5);
        if (aT) A = A.T;
        if (bT) B = B.T;
        _unpackedB = B;
        int stride = n + 2, size = type.Size();
        _c = new HugeMemory((((long)m * stride) + (2 * Guard)) * size);
        _memories.Add(_c);
        for (int i = 0; i < (m * stride) + (2 * Guard); i++)
            Write(_c.Data, type, i, random.NextDouble() - 0.5);
        C = new MatrixView(_c.Data + (Guard * size), type, m, n, stride);
        _before = new Span<byte>(_c.Data, (int)_c.Bytes).ToArray();
    }

    public MatrixView A { get; }

    public MatrixView B { get; private set; }

    public MatrixView C { get; }

    public double Alpha { get; set; } = 1;

    public double Beta { get; set; }

    public void Pack(Workers workers)
    {
        var w = B.IsTransposed ? B.T : B;
        var memory = new HugeMemory(PackedMatrix.Bytes(w.Rows, w.Cols, w.Type));
        _memories.Add(memory);
        var view = PackedMatrix.Pack(workers, w, memory.Data).View;
        B = B.IsTransposed ? view.T : view;
    }

    public void AddBias(Random random)
    {
        var bias = Fill(random, 1, _n, C.Type, 0);
        _bias = Read(bias);
        _biasData = bias.Data;
    }

    public float Result(int i, int j) => ((float*)C.Data)[(i * C.Stride) + j];

    public void Multiply(Gemm gemm) => gemm.Multiply(A, B, C, Alpha, Beta, _biasData);

    public void Check(Gemm gemm)
    {
        // What C holds now is what beta reads.
        new Span<byte>(_c.Data, (int)_c.Bytes).CopyTo(_before);
        Multiply(gemm);
        CheckResult();
    }

    public void CheckResult()
    {
        double[] a = Read(A), b = Read(_unpackedB.T);
        double[] absA = Array.ConvertAll(a, Math.Abs), absB = Array.ConvertAll(b, Math.Abs);
        double unit = Math.ScaleB(1, C.Type == DType.F64 ? -53 : -24);
        int stride = (int)C.Stride;
        fixed (byte* before = _before)
        {
            for (int i = 0; i < _m; i++)
            {
                for (int j = 0; j < _n; j++)
                {
                    var row = a.AsSpan(i * _k, _k);
                    var col = b.AsSpan(j * _k, _k);
                    double sum = TensorPrimitives.Dot<double>(row, col);
                    double magnitude = TensorPrimitives.Dot<double>(
                        absA.AsSpan(i * _k, _k), absB.AsSpan(j * _k, _k));
                    int at = Guard + (i * stride) + j;
                    double held = Get(before, C.Type, at);
                    double old = Beta == 0 ? 0 : Beta * held;
                    double bias = _bias?[j] ?? 0;
                    double expected = (Alpha * sum) + old + bias;
                    double bound = unit * (((_k + 2) * Math.Abs(Alpha) * magnitude)
                        + (4 * (Math.Abs(old) + Math.Abs(bias) + Math.Abs(expected))));
                    double got = Get(_c.Data, C.Type, at);
                    bool same = double.IsFinite(expected)
                        ? Math.Abs(got - expected) <= bound
                        : got.Equals(expected);
                    if (!same)
                        Assert.Fail($"{A} x {B}: c[{i}, {j}] = {got:R}, expected {expected:R}");
                    Write(_c.Data, C.Type, at, held);
                }
            }
        }

        // With C itself put back, everything must be as before.
        var now = new Span<byte>(_c.Data, (int)_c.Bytes);
        Assert.That(now.SequenceEqual(_before), "wrote outside C");
    }

    public void Dispose() => _memories.ForEach(memory => memory.Dispose());

    private static double Get(byte* data, DType type, long i) => type switch
    {
        DType.F32 => ((float*)data)[i],
        DType.F64 => ((double*)data)[i],
        DType.F16 => (double)((Half*)data)[i],
        _ => BitConverter.UInt32BitsToSingle((uint)((ushort*)data)[i] << 16),
    };

    private static void Write(byte* data, DType type, long i, double value)
    {
        if (type == DType.F32) ((float*)data)[i] = (float)value;
        else if (type == DType.F64) ((double*)data)[i] = value;
        else if (type == DType.F16) ((Half*)data)[i] = (Half)value;
        else ((ushort*)data)[i] = (ushort)(BitConverter.SingleToUInt32Bits((float)value) >> 16);
    }

    private static double[] Read(MatrixView x)
    {
        double[] values = new double[x.Rows * x.Cols];
        for (int i = 0; i < x.Rows; i++)
        {
            for (int j = 0; j < x.Cols; j++)
            {
                long at = x.IsTransposed ? (j * x.Stride) + i : (i * x.Stride) + j;
                values[(i * x.Cols) + j] = Get((byte*)x.Data, x.Type, at);
            }
        }

        return values;
    }

    private MatrixView Fill(Random random, int rows, int cols, DType type, int padding)
    {
        int stride = cols + padding;
        var memory = new HugeMemory(((long)rows * stride * type.Size()) + 64);
        _memories.Add(memory);
        for (int i = 0; i < rows * stride; i++)
        {
            // Also subnormal halves: about one value in ten is tiny.
            double value = (random.NextDouble() - 0.5) * (random.Next(10) == 0 ? 1e-5 : 1);
            Write(memory.Data, type, i, i % stride < cols ? value : double.NaN);
        }

        return new MatrixView(memory.Data, type, rows, cols, stride);
    }
}
