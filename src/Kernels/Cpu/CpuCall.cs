using System.Numerics;
using System.Numerics.Tensors;
using System.Runtime.CompilerServices;

namespace MiniCpmNative.Kernels.Cpu;

/// <summary>
/// One run of an operation on the CPU as typed matrices. Inputs stored in another float type than T
/// are widened into scratch when asked for, so that only operations with large weights care about
/// storage types. Scratch lives until the operation returns.
/// </summary>
public readonly unsafe ref struct CpuCall<T>(CpuDevice device, Op op, OpCall call)
    where T : unmanaged, IBinaryFloatingPointIeee754<T>
{
    private readonly OpCall _call = call;

    public Workers Workers => device.Workers;

    public Gemm Gemm => device.Gemm;

    public Randomness Random => device.Random;

    /// <summary>False in a forward whose backward will never come.</summary>
    public bool Recorded => _call.Recorded;

    /// <summary>The tensor itself, for operations that handle its storage type.</summary>
    public Tensor Input(int index) =>
        index < _call.Inputs.Length ? _call.Inputs[index] : Tensor.None;

    /// <summary>An input as a matrix of T; no data if it was not given.</summary>
    public Matrix<T> In(int index)
    {
        Tensor tensor = Input(index);
        if (!tensor.Exists) return default;
        if (tensor.Type == Float) return Typed<T>(tensor);
        var wide = Scratch(tensor.Shape);
        Widen(tensor, wide);
        return wide;
    }

    /// <summary>
    /// The weight of the operation: of this input, or of another kind where there is no input.
    /// </summary>
    public CpuWeight<T> Weight(int index, Weight? weight) => new(this, Input(index), weight);

    /// <summary>An input as a matrix product takes it: in its storage type, maybe packed.</summary>
    public MatrixView View(int index) => View(Input(index));

    /// <inheritdoc cref="View(int)"/>
    internal static MatrixView View(in Tensor w) => w.Spec.Layout == Layout.Packed
        ? new PackedMatrix((void*)w.Data, w.Type, w.Shape[0], w.Shape[1]).View
        : new MatrixView((void*)w.Data, w.Type, w.Shape[0], w.Shape[1]);

    /// <summary>into = alpha * a b, or adds it, if the gradient is wanted.</summary>
    public void Multiply(MatrixView a, MatrixView b, Gradient<T> into, double alpha = 1)
    {
        if (into.Wanted)
            Gemm.Multiply(a, b, into.Into.View, alpha, into.Accumulate ? 1 : 0);
    }

    public Matrix<int> Ints(int index) => Typed<int>(Input(index));

    public Matrix<T> Output => Typed<T>(_call.Output);

    /// <summary>False where nobody reads the output, see <see cref="Op.CanSkipOutput"/>.</summary>
    public bool HasOutput => _call.Output.Exists;

    public Matrix<T> Saved(int index) => Typed<T>(_call.Saved[index]);

    public Matrix<int> SavedInts(int index) => Typed<int>(_call.Saved[index]);

    public Matrix<T> OutputGradient => Typed<T>(_call.OutputGradient);

    /// <summary>Where the gradient of an input goes; no data when it is not wanted.</summary>
    public Gradient<T> Gradient(int index)
    {
        GradientTarget target = index < _call.Gradients.Length
            ? _call.Gradients[index]
            : GradientTarget.None;
        return target.Wanted ? new(Typed<T>(target.Buffer), target.Accumulate) : default;
    }

    /// <summary>A matrix of undefined content that lives until the operation returns.</summary>
    public Matrix<T> Scratch(Shape shape) =>
        Typed<T>(device.Step.Push(new Spec(Float, shape), op.Name));

    /// <summary>Integers of undefined content that live until the operation returns.</summary>
    public Matrix<int> ScratchInts(int count) =>
        Typed<int>(device.Step.Push(new Spec(DType.I32, new Shape(count)), op.Name));

    private static DType Float => typeof(T) == typeof(double) ? DType.F64 : DType.F32;

    private static Matrix<TElement> Typed<TElement>(in Tensor tensor)
        where TElement : unmanaged
    {
        if (tensor.Exists && tensor.Type.Size() != Unsafe.SizeOf<TElement>())
            throw new ShapeException($"{tensor.Spec} read as {typeof(TElement).Name}");
        return tensor.Exists
            ? new((TElement*)tensor.Data, checked((int)tensor.Shape.Rows), tensor.Shape.Cols)
            : default;
    }

    private static void Widen(in Tensor from, Matrix<T> to)
    {
        if (typeof(T) != typeof(float))
            throw new ShapeException($"{from.Spec} in an F64 computation");
        FloatBits.Widen((void*)from.Data, from.Type, (float*)to.Data, (nint)to.Count);
    }
}

/// <summary>
/// A contiguous row-major matrix in host memory; Data is null when there is none.
/// </summary>
public readonly unsafe struct Matrix<T>(T* data, int rows, int cols)
    where T : unmanaged
{
    public readonly T* Data = data;
    public readonly int Rows = rows;
    public readonly int Cols = cols;

    public bool Exists => Data is not null;

    public long Count => (long)Rows * Cols;

    /// <summary>The operand of a matrix product; T is float or double.</summary>
    public MatrixView View =>
        new(Data, typeof(T) == typeof(double) ? DType.F64 : DType.F32, Rows, Cols);

    /// <summary>Rows from first on, at most count.</summary>
    public Matrix<T> Slice(int first, int count) =>
        new(Row(first), Math.Min(count, Rows - first), Cols);

    public T* Row(int row) => Data + ((long)row * Cols);

    public Span<T> RowSpan(int row) => new(Row(row), Cols);

    public ref T this[int index] => ref Data[index];
}

/// <summary>Where a gradient is written, and whether it is added to what is there.</summary>
public readonly unsafe struct Gradient<T>(Matrix<T> into, bool accumulate)
    where T : unmanaged, IBinaryFloatingPointIeee754<T>
{
    public readonly Matrix<T> Into = into;
    public readonly bool Accumulate = accumulate;

    public bool Wanted => Into.Exists;

    /// <summary>Writes one element, or adds it.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public void Put(long index, T value) =>
        Into.Data[index] = Accumulate ? Into.Data[index] + value : value;

    /// <summary>
    /// Writes row sourceRow of source as row row, or adds it; zero where there is no source.
    /// </summary>
    public void PutRow(int row, Matrix<T> source, int sourceRow)
    {
        Span<T> into = Into.RowSpan(row);
        if (!source.Exists)
        {
            if (!Accumulate) into.Clear();
        }
        else if (Accumulate)
        {
            TensorPrimitives.Add<T>(into, source.RowSpan(sourceRow), into);
        }
        else
        {
            source.RowSpan(sourceRow).CopyTo(into);
        }
    }
}
