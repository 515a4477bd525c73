using System.Buffers.Binary;
using System.Runtime.InteropServices;

namespace MiniCpmNative.Engine.Weights;

/// <summary>
/// A safetensors file, held open: 8 bytes header length (little-endian), JSON header, data. Opening
/// reads and checks the header only; tensor bytes are read when they are asked for. The header is
/// checked completely: types, shapes, sizes, and that the tensors tile the data without gap or
/// overlap. Nothing is mapped, so a file that is cut, or a disk that fails, is an error and no
/// fault; a file that is renamed over or removed is still read as it was.
/// </summary>
public sealed unsafe class SafetensorsFile : IDisposable
{
    // The format's own limit.
    private const long MaxHeaderBytes = 100_000_000;

    // Large reads are split, so that all processors copy from the page cache.
    private const long PieceBytes = 16 << 20;

    private readonly FileStream _stream;
    private readonly long _bytes;
    private readonly DateTime _written;
    private readonly Dictionary<string, StoredTensor> _tensors;
    private void* _buffer;
    private long _bufferBytes;
    private StoredTensor? _buffered;

    private SafetensorsFile(string path, FileStream stream)
    {
        (Path, _stream, _bytes) = (path, stream, stream.Length);
        _written = File.GetLastWriteTimeUtc(stream.SafeFileHandle);
        Span<byte> prefix = stackalloc byte[8];
        fixed (byte* to = prefix) Read(0, to, prefix.Length);
        var json = new byte[HeaderBytes(path, prefix, _bytes)];
        fixed (byte* to = json) Read(8, to, json.Length);
        var parsed = SafetensorsHeader.Parse(
            this, json, 8 + json.Length, _bytes - 8 - json.Length);
        (_tensors, Metadata) = (parsed.Tensors, parsed.Metadata);
    }

    /// <summary>The path it was opened by; errors begin with it.</summary>
    public string Path { get; }

    /// <summary>Tensors in the order of the header.</summary>
    public IReadOnlyCollection<StoredTensor> Tensors => _tensors.Values;

    public IReadOnlyDictionary<string, string> Metadata { get; }

    /// <summary>
    /// Whether the open file was written to since it was opened: what is read now may differ.
    /// </summary>
    public bool HasChanged
    {
        get
        {
            try
            {
                return RandomAccess.GetLength(_stream.SafeFileHandle) != _bytes
                    || File.GetLastWriteTimeUtc(_stream.SafeFileHandle) != _written;
            }
            catch (IOException)
            {
                return true;
            }
        }
    }

    /// <summary>Tells it from other files (<see cref="FileDigest"/>).</summary>
    /// <exception cref="IOException">It cannot be read.</exception>
    internal string Digest() => FileDigest.Of(_stream.SafeFileHandle);

    /// <exception cref="InputException">
    /// The file is missing, unreadable or breaks the format.
    /// </exception>
    public static SafetensorsFile Open(string path)
    {
        var stream = InputFile.Open(path, leastBytes: 8, buffer: 0);
        try
        {
            return new SafetensorsFile(path, stream);
        }
        catch
        {
            stream.Dispose();
            throw;
        }
    }

    public StoredTensor? Find(string name) => _tensors.GetValueOrDefault(name);

    /// <exception cref="InputException">The file has no such tensor.</exception>
    public StoredTensor Get(string name) => Find(name)
        ?? throw new InputException($"{Path}: there is no tensor {Messages.Quote(name)}");

    /// <summary>Frees the memory behind <see cref="StoredTensor.Data"/>.</summary>
    public void Trim()
    {
        NativeMemory.Free(_buffer);
        _buffer = null;
        (_bufferBytes, _buffered) = (0, null);
    }

    public void Dispose()
    {
        Trim();
        _stream.Dispose();
    }

    /// <summary>Reads bytes offset to offset + bytes of the file.</summary>
    /// <exception cref="InputException">
    /// They cannot be read, or the file was written to since it was opened.
    /// </exception>
    internal void Read(long offset, void* target, long bytes)
    {
        ObjectDisposedException.ThrowIf(_stream.SafeFileHandle.IsClosed, this);
        int pieces = (int)((bytes + PieceBytes - 1) / PieceBytes);
        Exception? failure = null;
        if (pieces <= 1) ReadPiece(0);
        else Parallel.For(0, pieces, ReadPiece);
        if (failure is not null)
            throw new InputException(
                $"{Path}: cannot read: {Messages.OneLine(failure.Message)}", failure);
        if (HasChanged)
            throw new InputException(
                $"{Path}: was changed or cut while it was in use (it had {_bytes:N0} bytes): "
                + "put the file back and start again");

        void ReadPiece(int piece)
        {
            long at = piece * PieceBytes, end = Math.Min(bytes, at + PieceBytes);
            try
            {
                while (at < end)
                {
                    int read = RandomAccess.Read(
                        _stream.SafeFileHandle,
                        new Span<byte>((byte*)target + at, (int)(end - at)), offset + at);
                    // The end of a file that was cut, which HasChanged tells.
                    if (read == 0) return;
                    at += read;
                }
            }
            catch (Exception problem) when (problem is IOException or UnauthorizedAccessException)
            {
                failure = problem;
            }
        }
    }

    /// <summary>The bytes of a tensor in memory that the next call uses again.</summary>
    internal nint Load(StoredTensor tensor)
    {
        if (ReferenceEquals(_buffered, tensor)) return (nint)_buffer;
        _buffered = null;
        if (_bufferBytes < tensor.Bytes || _buffer is null)
        {
            Trim();
            _buffer = NativeMemory.Alloc((nuint)Math.Max(tensor.Bytes, 1));
            _bufferBytes = tensor.Bytes;
        }

        tensor.Fill(_buffer);
        _buffered = tensor;
        return (nint)_buffer;
    }

    private static long HeaderBytes(string path, ReadOnlySpan<byte> prefix, long fileBytes)
    {
        if (prefix.SequenceEqual("version "u8))
            throw new InputException(
                $"{path}: is a pointer of Git LFS, not the weights themselves: run git lfs pull");
        ulong claimed = BinaryPrimitives.ReadUInt64LittleEndian(prefix);
        if (claimed > (ulong)(fileBytes - 8))
            throw new InputException(
                $"{path}: header claims {claimed:N0} bytes, file has {fileBytes:N0}");
        if (claimed > (ulong)MaxHeaderBytes)
            throw new InputException(
                $"{path}: header claims {claimed:N0} bytes, more than the format's "
                    + $"{MaxHeaderBytes:N0}");
        return (long)claimed;
    }
}
