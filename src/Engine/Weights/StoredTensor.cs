using System.Collections.Immutable;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;

namespace MiniCpmNative.Engine.Weights;

/// <summary>
/// One tensor of an open <see cref="SafetensorsFile"/>: its description and where its bytes are.
/// Row-major, little-endian. The tensors of one file are read by one thread at a time.
/// </summary>
public unsafe class StoredTensor
{
    private const int PieceElements = 1 << 20;

    private readonly SafetensorsFile _file;
    private readonly long _offset;
    private DType? _kept;

    internal StoredTensor(
        SafetensorsFile file, string name, StoredType storedType, ImmutableArray<long> sizes,
        long offset, long bytes)
    {
        (_file, Name, StoredType, Sizes, _offset, Bytes) =
            (file, name, storedType, sizes, offset, bytes);
    }

    public string Name { get; }

    /// <summary>The file it lies in.</summary>
    internal SafetensorsFile File => _file;

    /// <summary>The type as the file names it, among them some that no kernel takes.</summary>
    public StoredType StoredType { get; }

    /// <summary>
    /// Sizes as stored, of any rank and magnitude; <see cref="Shape"/> is the kernels' view.
    /// </summary>
    public ImmutableArray<long> Sizes { get; }

    public long Bytes { get; }

    /// <summary>Where its bytes begin in the file.</summary>
    internal long Offset => _offset;

    public long Count => Bytes / StoredType.Size;

    /// <summary>What its files hold in its place: itself, but of a <see cref="JoinedTensor"/>.
    /// </summary>
    public virtual IReadOnlyList<StoredTensor> Pieces => [this];

    /// <summary>File and tensor, as errors name them.</summary>
    public string Place => $"{_file.Path}: tensor {Messages.Quote(Name)}";

    /// <exception cref="InputException">
    /// The kernels have no such type (BOOL counts as U8).
    /// </exception>
    public DType Type => StoredType.Kernel ?? throw new InputException(
        $"{Place} has type {StoredType.Name}, expected one of F32, BF16, F16, F64, I32, I64, U8, "
            + "BOOL");

    /// <exception cref="InputException">
    /// More than four axes, or one of 2^31 elements and more.
    /// </exception>
    public Shape Shape
    {
        get
        {
            // A zero axis lets the others be anything, so their product is bounded here too.
            if (Sizes.Length > Shape.MaxRank || Sizes.Any(size => size > int.MaxValue)
                || Sizes.Aggregate(1.0, (product, size) =>
                    product * Math.Max(1, size)) > long.MaxValue / 2)
                throw new InputException($"{Place} has shape {SizesText}, expected at most"
                    + $" {Shape.MaxRank} axes of less than 2^31 elements each, 2^62 in all");
            Span<int> sizes = stackalloc int[Sizes.Length];
            for (int axis = 0; axis < sizes.Length; axis++) sizes[axis] = (int)Sizes[axis];
            return new Shape(sizes);
        }
    }

    public string SizesText => "[" + string.Join(", ", Sizes) + "]";

    /// <summary>
    /// Address of all its bytes, read now: valid until the bytes of another tensor of the file are
    /// asked for, or the file is trimmed or disposed.
    /// </summary>
    /// <exception cref="ObjectDisposedException">The file was closed.</exception>
    /// <exception cref="InputException">
    /// The file cannot be read, or was changed; or see <see cref="MustBeFinite"/>.
    /// </exception>
    public nint Data
    {
        get
        {
            nint data = _file.Load(this);
            if (_kept is not { } kept) return data;
            _kept = null;
            FiniteValues.Require(this, kept);
            return data;
        }
    }

    /// <summary>
    /// Lets the first reading of the values fail unless all are finite in the type that a run keeps
    /// them in.
    /// </summary>
    public void MustBeFinite(DType kept) => _kept = kept;

    /// <summary>
    /// The bytes of a tensor below 2 GiB; larger ones are read through <see cref="Data"/>.
    /// </summary>
    /// <exception cref="InvalidOperationException">The tensor is larger.</exception>
    public ReadOnlySpan<byte> Span => Bytes <= int.MaxValue
        ? new ReadOnlySpan<byte>((void*)Data, (int)Bytes)
        : throw new InvalidOperationException($"{Place} has {Bytes:N0} bytes, too many for a span");

    /// <summary>Reads bytes from..from + target.Length of the tensor.</summary>
    /// <exception cref="InputException">The file cannot be read, or was changed.</exception>
    public virtual void Read(long from, Span<byte> target)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(from);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(target.Length, Bytes - from);
        fixed (byte* to = target) _file.Read(_offset + from, to, target.Length);
    }

    /// <summary>Writes all bytes.</summary>
    internal virtual void Fill(void* target) => _file.Read(_offset, target, Bytes);

    /// <summary>target[i] = (float)tensor[i] for all <see cref="Count"/> elements.</summary>
    /// <exception cref="InputException">The tensor does not hold floats, or cannot be
    /// read.</exception>
    public void CopyTo(float* target)
    {
        if (!Type.IsFloat())
            throw new InputException($"{Place} has type {StoredType.Name}, expected floats");
        if (_kept is not null)
        {
            FloatBits.Widen((void*)Data, Type, target, (nint)Count);
            return;
        }

        long piece = Math.Min(Count, PieceElements);
        var bytes = new byte[piece * StoredType.Size];
        for (long done = 0; done < Count; done += piece)
        {
            int count = (int)Math.Min(piece, Count - done);
            Span<byte> part = bytes.AsSpan(0, count * StoredType.Size);
            Read(done * StoredType.Size, part);
            fixed (byte* from = part) FloatBits.Widen(from, Type, target + done, count);
        }
    }

    /// <summary>The same values under another name.</summary>
    internal virtual StoredTensor As(string name) =>
        new(_file, name, StoredType, Sizes, _offset, Bytes);

    /// <summary>All elements as floats, for small tensors and tests.</summary>
    /// <exception cref="InputException">As <see cref="CopyTo"/>.</exception>
    public float[] ToFloats()
    {
        var values = new float[checked((int)Count)];
        fixed (float* target = values) CopyTo(target);
        return values;
    }

    /// <summary>Some rows of a matrix, one behind the other.</summary>
    /// <exception cref="InputException">As <see cref="CopyTo"/>.</exception>
    public float[] RowsToFloats(IReadOnlyList<int> rows)
    {
        int cols = Shape.Cols, size = StoredType.Size;
        var values = new float[rows.Count * cols];
        var bytes = new byte[cols * size];
        for (int i = 0; i < rows.Count; i++)
        {
            Read((long)rows[i] * cols * size, bytes);
            fixed (byte* from = bytes)
            fixed (float* to = values) FloatBits.Widen(from, Type, to + (i * cols), cols);
        }

        return values;
    }

    /// <summary>
    /// The tensor as it goes into a file of its own, its bytes as they are, read piece by piece.
    /// </summary>
    public TensorToSave ToSave() => new(Name, StoredType, Sizes, stream =>
    {
        var bytes = new byte[Math.Min(Bytes, PieceElements)];
        for (long done = 0; done < Bytes; done += bytes.Length)
        {
            Span<byte> part = bytes.AsSpan(0, (int)Math.Min(bytes.Length, Bytes - done));
            Read(done, part);
            stream.Write(part);
        }
    });

    /// <summary>
    /// The tensor as it goes into a file of its own, rounded to a type, read piece by piece.
    /// </summary>
    public TensorToSave ToSave(DType type) => new(Name, type, Shape, stream =>
    {
        long piece = Math.Min(Count, PieceElements);
        var bytes = new byte[piece * StoredType.Size];
        var values = new float[type == Type ? 0 : piece];
        for (long done = 0; done < Count; done += piece)
        {
            int count = (int)Math.Min(piece, Count - done);
            Span<byte> part = bytes.AsSpan(0, count * StoredType.Size);
            Read(done * StoredType.Size, part);
            if (type == Type)
            {
                stream.Write(part);
                continue;
            }

            fixed (byte* from = part)
            fixed (float* wide = values)
            {
                FloatBits.Widen(from, Type, wide, count);
                TensorToSave.Floats(Name, type, new Shape(count), (nint)wide).Write(stream);
            }
        }
    });
}
