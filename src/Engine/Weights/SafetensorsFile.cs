using System.Buffers.Binary;
using System.IO.MemoryMappedFiles;

namespace MiniCpmNative.Engine.Weights;

/// <summary>
/// A safetensors file, memory-mapped: 8 bytes header length (little-endian), JSON header, data.
/// Opening reads and checks the header only; tensor bytes are read when they are touched. The
/// header is checked completely: types, shapes, sizes, and that the tensors tile the data without
/// gap or overlap. The file must not be shortened while it is open
/// (writers rename whole files into place).
/// </summary>
public sealed unsafe class SafetensorsFile : IDisposable
{
    // The format's own limit.
    private const long MaxHeaderBytes = 100_000_000;

    private readonly MemoryMappedFile _map;
    private readonly MemoryMappedViewAccessor _view;
    private readonly Dictionary<string, StoredTensor> _tensors;
    private byte* _start;

    private SafetensorsFile(string path, MemoryMappedFile map, long bytes)
    {
        (Path, _map) = (path, map);
        _view = map.CreateViewAccessor(0, bytes, MemoryMappedFileAccess.Read);
        _view.SafeMemoryMappedViewHandle.AcquirePointer(ref _start);
        _start += _view.PointerOffset;
        try
        {
            long header = HeaderBytes(path, new ReadOnlySpan<byte>(_start, 8), bytes);
            var json = new ReadOnlySpan<byte>(_start + 8, (int)header);
            var parsed = SafetensorsHeader.Parse(this, json, 8 + header, bytes - 8 - header);
            (_tensors, Metadata) = (parsed.Tensors, parsed.Metadata);
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    /// <summary>The path it was opened by; errors begin with it.</summary>
    public string Path { get; }

    /// <summary>Tensors in the order of the header.</summary>
    public IReadOnlyCollection<StoredTensor> Tensors => _tensors.Values;

    public IReadOnlyDictionary<string, string> Metadata { get; }

    /// <exception cref="InputException">
    /// The file is missing, unreadable or breaks the format.
    /// </exception>
    public static SafetensorsFile Open(string path)
    {
        using var stream = InputFile.Open(path, leastBytes: 8, buffer: 0);
        try
        {
            var map = MemoryMappedFile.CreateFromFile(
                stream, null, 0, MemoryMappedFileAccess.Read, HandleInheritability.None,
                leaveOpen: true);
            return new SafetensorsFile(path, map, stream.Length);
        }
        catch (IOException failure)
        {
            throw new InputException($"{path}: cannot map: {Messages.OneLine(failure.Message)}",
                failure);
        }
    }

    public StoredTensor? Find(string name) => _tensors.GetValueOrDefault(name);

    /// <exception cref="InputException">The file has no such tensor.</exception>
    public StoredTensor Get(string name) => Find(name)
        ?? throw new InputException($"{Path}: there is no tensor {Messages.Quote(name)}");

    public void Dispose()
    {
        if (_start is null) return;
        _start = null;
        _view.SafeMemoryMappedViewHandle.ReleasePointer();
        _view.Dispose();
        _map.Dispose();
    }

    internal nint Address(long offset)
    {
        ObjectDisposedException.ThrowIf(_start is null, this);
        return (nint)(_start + offset);
    }

    private static long HeaderBytes(string path, ReadOnlySpan<byte> prefix, long fileBytes)
    {
        ulong claimed = BinaryPrimitives.ReadUInt64LittleEndian(prefix);
        if (claimed > (ulong)(fileBytes - 8))
            throw new InputException(
                $"{path}: header claims {claimed:N0} bytes, file has {fileBytes:N0}");
        if (claimed > (ulong)MaxHeaderBytes)
            throw new InputException(
                $"{path}: header claims {claimed:N0} bytes, more than the format's {MaxHeaderBytes:N0}");
        return (long)claimed;
    }
}
