using System.Buffers.Binary;
using System.Numerics;
using System.Text;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// A TensorBoard event file: TFRecords (length, masked CRC-32C of it, data, masked CRC-32C of that)
/// of Event messages, encoded here because the four fields needed are less than a protobuf library:
/// Event { double wall_time = 1; int64 step = 2; string file_version = 3; Summary summary = 5;
/// SessionLog session_log = 7 }, Summary.Value { string tag = 1; float simple_value = 2 }.
/// </summary>
internal sealed class TensorBoardWriter : ILogFile
{
    private const uint MaskDelta = 0xA282EAD8;
    private readonly FileStream _file;
    private readonly TimeProvider _clock;
    private readonly int? _resumedStep;
    private bool _isBegun;

    /// <param name="folder">Created when it is not there; the file name starts with
    /// events.out.tfevents.</param>
    /// <param name="clock">Gives the wall time of events.</param>
    /// <param name="resumedStep">TensorBoard forgets what earlier files hold after this
    /// step.</param>
    /// <exception cref="RunException">The file cannot be created.</exception>
    public TensorBoardWriter(string folder, TimeProvider clock, int? resumedStep)
    {
        (_clock, _resumedStep) = (clock, resumedStep);
        long seconds = clock.GetUtcNow().ToUnixTimeSeconds();
        string name =
            $"events.out.tfevents.{seconds}.{Environment.MachineName}.{Environment.ProcessId}";
        string path = Path.Combine(folder, name);
        try
        {
            Directory.CreateDirectory(folder);
            for (int n = 0; File.Exists(path); n++) path = Path.Combine(folder, $"{name}.{n}");
            _file = new FileStream(path, FileMode.CreateNew, FileAccess.Write, FileShare.Read,
                bufferSize: 0);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw new RunException(
                $"{path}: cannot write: {Messages.Reason(failure, path)}", failure);
        }
    }

    public void Write(LogEntry entry)
    {
        if (!_isBegun) Begin();
        var summary = new MemoryStream();
        foreach (var (name, value) in entry.Values.Concat(entry.Timing))
            Scalar(summary, name, value);
        Scalar(summary, "epoch", entry.Epoch);
        var record = Event(entry.Step);
        Bytes(record, 5, summary.ToArray());
        WriteRecord(record);
    }

    public void Dispose() => _file.Dispose();

    /// <summary>CRC-32C with the rotation and offset that TFRecord applies to it.</summary>
    internal static uint MaskedCrc(ReadOnlySpan<byte> data)
    {
        uint crc = uint.MaxValue;
        foreach (byte value in data) crc = BitOperations.Crc32C(crc, value);
        crc = ~crc;
        return BitOperations.RotateRight(crc, 15) + MaskDelta;
    }

    // eval_loss is shown as eval/loss, everything else under train, as the Trainer's callback does.
    private static void Scalar(MemoryStream summary, string name, double number)
    {
        bool isEvaluation = name.StartsWith("eval_", StringComparison.Ordinal);
        var value = new MemoryStream();
        Text(value, 1, isEvaluation ? "eval/" + name[5..] : "train/" + name);
        Span<byte> bits = stackalloc byte[sizeof(float)];
        BinaryPrimitives.WriteSingleLittleEndian(bits, (float)number);
        value.WriteByte((2 << 3) | 5);
        value.Write(bits);
        Bytes(summary, 1, value.ToArray());
    }

    private MemoryStream Event(long step)
    {
        var record = new MemoryStream();
        Span<byte> bits = stackalloc byte[sizeof(double)];
        double seconds = (_clock.GetUtcNow() - DateTimeOffset.UnixEpoch).TotalSeconds;
        BinaryPrimitives.WriteDoubleLittleEndian(bits, seconds);
        record.WriteByte((1 << 3) | 1);
        record.Write(bits);
        record.WriteByte(2 << 3);
        Varint(record, (ulong)step);
        return record;
    }

    private static void Text(MemoryStream message, int field, string text) =>
        Bytes(message, field, Encoding.UTF8.GetBytes(text));

    private static void Bytes(MemoryStream message, int field, ReadOnlySpan<byte> data)
    {
        message.WriteByte((byte)((field << 3) | 2));
        Varint(message, (ulong)data.Length);
        message.Write(data);
    }

    private static void Varint(MemoryStream message, ulong value)
    {
        for (; value >= 0x80; value >>= 7) message.WriteByte((byte)(value | 0x80));
        message.WriteByte((byte)value);
    }

    private void Begin()
    {
        _isBegun = true;
        var version = Event(0);
        Text(version, 3, "brain.Event:2");
        WriteRecord(version);
        if (_resumedStep is not { } step) return;
        // SessionLog { status = START }: events from this step on in earlier files are purged.
        var session = Event(step + 1);
        Bytes(session, 7, [8, 1]);
        WriteRecord(session);
    }

    private void WriteRecord(MemoryStream record)
    {
        ReadOnlySpan<byte> data = record.GetBuffer().AsSpan(0, (int)record.Length);
        Span<byte> head = stackalloc byte[12];
        BinaryPrimitives.WriteInt64LittleEndian(head, data.Length);
        BinaryPrimitives.WriteUInt32LittleEndian(head[8..], MaskedCrc(head[..8]));
        Span<byte> tail = stackalloc byte[4];
        BinaryPrimitives.WriteUInt32LittleEndian(tail, MaskedCrc(data));
        try
        {
            _file.Write([.. head, .. data, .. tail]);
        }
        catch (IOException failure)
        {
            throw new RunException(
                $"{_file.Name}: cannot write: {Messages.Reason(failure, _file.Name)}", failure);
        }
    }
}
