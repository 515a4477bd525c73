using System.Numerics;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Kernels.Quantised;

/// <summary>Elements of a row-major matrix that are not stored as floats.</summary>
public unsafe interface IPackedElements
{
    /// <summary>to = elements from..from + count.</summary>
    void Unpack(long from, float* to, int count);
}

/// <summary>
/// A frozen matrix in fewer bits, unpacked whenever it is multiplied by: on the CPU some rows at a
/// time, which stay in the cache until the product has read them; on a GPU whole, by one kernel
/// into the step's memory, of which all layers use the same place one after the other, so that the
/// product is that of a dense matrix. For the few rows of an answer's step one kernel unpacks and
/// multiplies, and reads nothing but the codes.
/// </summary>
public abstract unsafe class QuantisedWeight<TElements>(int outputs, int inputs) : Weight
    where TElements : unmanaged, IPackedElements
{
    // Of rows that are unpacked at a time.
    private const int Elements = 1 << 20;

    // Up to so many times codes are read by products of few rows rather than unpacked into memory,
    // which costs ten times their bytes.
    private const int MostTimes = 2;

    public override int Outputs => outputs;

    public override int Inputs => inputs;

    /// <summary>Where its elements lie, in host memory.</summary>
    protected abstract TElements Packed { get; }

    // y = x W^T has columns of its own for each row of W.
    public override void Multiply<T>(in CpuCall<T> call, Matrix<T> x, Matrix<T> y, double alpha,
        double beta, Matrix<T> bias)
    {
        Matrix<T> room = Room(call);
        for (int row = 0; row < outputs; row += room.Rows)
        {
            Matrix<T> w = Unpacked(call, row, room);
            T* b = bias.Exists ? bias.Data + row : null;
            call.Gemm.Multiply(x.View, w.View.T, Columns(y, row, w.Rows), alpha, beta, b);
        }
    }

    // y = x W is a sum over the rows of W.
    public override void MultiplyTransposed<T>(in CpuCall<T> call, Matrix<T> x, Matrix<T> y,
        double alpha, double beta, Matrix<T> bias)
    {
        Matrix<T> room = Room(call);
        for (int row = 0; row < outputs; row += room.Rows)
        {
            Matrix<T> w = Unpacked(call, row, room);
            call.Gemm.Multiply(Columns(x, row, w.Rows), w.View, y.View, alpha,
                row == 0 ? beta : 1, row == 0 ? bias.Data : null);
        }
    }

    public override void Multiply(in CudaCall call, CudaMatrix x, CudaMatrix y, double alpha,
        double beta)
    {
        const int each = KernelConstants.FewRows;
        if (x.Rows <= MostTimes * each && inputs % KernelConstants.Cast == 0)
        {
            for (int row = 0; row < x.Rows; row += each)
            {
                int count = Math.Min(each, x.Rows - row);
                MultiplyFew(call, x.RowsFrom(row, count), y.RowsFrom(row, count), alpha, beta);
            }

            return;
        }

        ArenaMark mark = call.Mark();
        call.Multiply(x, ((CudaMatrix)Unpacked(call)).T, y, alpha, beta);
        call.Pop(mark);
    }

    public override void MultiplyTransposed(in CudaCall call, CudaMatrix x, CudaMatrix y,
        double alpha, double beta)
    {
        ArenaMark mark = call.Mark();
        call.Multiply(x, Unpacked(call), y, alpha, beta);
        call.Pop(mark);
    }

    /// <summary>Queues the kernel that unpacks all elements.</summary>
    protected abstract void Unpack(in CudaCall call, in Tensor to);

    /// <summary>Queues the kernel that unpacks and multiplies, for few rows.</summary>
    protected abstract void MultiplyFew(
        in CudaCall call, CudaMatrix x, CudaMatrix y, double alpha, double beta);

    /// <summary>A warp for each output.</summary>
    protected Grid Warps => Grid.Elements(outputs * 32L);

    private Tensor Unpacked(in CudaCall call)
    {
        Tensor w = call.Unpacked(this, out bool isThere);
        if (!isThere) Unpack(call, w);
        return w;
    }

    // Whole panels, so that products are in the order of those of the whole matrix.
    private Matrix<T> Room<T>(in CpuCall<T> call)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        int panel = PackedMatrix.PanelRows, most = Elements / Math.Max(1, inputs);
        int rows = Math.Max(panel, most / panel * panel);
        return call.Scratch(new Shape(Math.Min(rows, Math.Max(1, outputs)), inputs));
    }

    private Matrix<T> Unpacked<T>(in CpuCall<T> call, int row, Matrix<T> room)
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        Matrix<T> w = room.Slice(0, Math.Min(room.Rows, outputs - row));
        call.Workers.For(w.Rows, new Rows<T> { From = Packed, First = row, To = w });
        return w;
    }

    private static MatrixView Columns<T>(Matrix<T> x, int begin, int count)
        where T : unmanaged =>
        new(x.Data + begin, x.View.Type, x.Rows, count, x.Cols);

    private struct Rows<T> : IRangeBody
        where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        public TElements From;
        public int First;
        public Matrix<T> To;

        public readonly void Run(int begin, int end, int worker)
        {
            for (int row = begin; row < end; row++)
            {
                T* to = To.Row(row);
                From.Unpack((long)(First + row) * To.Cols, (float*)to, To.Cols);
                if (typeof(T) == typeof(float)) continue;
                // In place, from the end.
                for (int i = To.Cols - 1; i >= 0; i--) to[i] = T.CreateChecked(((float*)to)[i]);
            }
        }
    }
}
