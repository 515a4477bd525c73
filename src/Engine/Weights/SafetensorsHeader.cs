using System.Collections.Immutable;
using System.Text;
using System.Text.Json;

namespace MiniCpmNative.Engine.Weights;

/// <summary>
/// Parser of a safetensors header: {"__metadata__": {text: text}, name: {"dtype", "shape",
/// "data_offsets": [begin, end]}, ...}, UTF-8, padded with spaces. It reads tokens straight from
/// the bytes, so what it allocates is bounded by the header that is there. The tensors must
/// tile the data exactly, as the format demands: neither gaps nor overlaps can hide anything.
/// </summary>
internal ref struct SafetensorsHeader
{
    private const int MaxDepth = 4;
    private const int MaxAxes = 32;

    private readonly SafetensorsFile _file;
    private readonly long _dataStart;
    private readonly long _dataBytes;
    private Utf8JsonReader _reader;

    private SafetensorsHeader(SafetensorsFile file, ReadOnlySpan<byte> json, long dataStart,
        long dataBytes)
    {
        (_file, _dataStart, _dataBytes) = (file, dataStart, dataBytes);
        _reader = new Utf8JsonReader(json, new JsonReaderOptions { MaxDepth = MaxDepth });
    }

    public Dictionary<string, StoredTensor> Tensors { get; } = new(StringComparer.Ordinal);

    public Dictionary<string, string> Metadata { get; } = new(StringComparer.Ordinal);

    /// <exception cref="InputException">
    /// The header breaks the format; names file and tensor.
    /// </exception>
    public static SafetensorsHeader Parse(
        SafetensorsFile file, ReadOnlySpan<byte> json, long dataStart, long dataBytes)
    {
        if (json.IsEmpty || json[0] != (byte)'{')
            throw Bad(file, "does not start with \"{\"; is this a safetensors file?");
        try
        {
            var header = new SafetensorsHeader(file, json, dataStart, dataBytes);
            header.ReadAll();
            return header;
        }
        catch (JsonException failure)
        {
            throw Bad(file, $"is not valid JSON at byte {8 + (failure.BytePositionInLine ?? 0)}");
        }
        catch (InvalidOperationException)
        {
            throw Bad(file, "is not valid UTF-8");
        }
    }

    private static InputException Bad(SafetensorsFile file, string problem) =>
        new($"{file.Path}: the header {problem}");

    private void ReadAll()
    {
        _reader.Read();
        bool hasMetadata = false;
        var spans = new List<(long Begin, long End, string Name)>();
        while (NextName() is { } name)
        {
            if (name == "__metadata__")
            {
                if (hasMetadata) throw Bad(_file, "has \"__metadata__\" twice");
                hasMetadata = true;
                ReadMetadata();
                continue;
            }

            var (tensor, begin) = ReadTensor(name);
            if (!Tensors.TryAdd(name, tensor))
                throw Bad(_file, $"has tensor {Messages.Quote(name)} twice");
            spans.Add((begin, begin + tensor.Bytes, name));
        }

        while (_reader.Read())
        {
            // Reads what follows the object: anything but spaces throws.
        }

        CheckTiling(spans);
    }

    private void CheckTiling(List<(long Begin, long End, string Name)> spans)
    {
        spans.Sort();
        long end = 0;
        string before = "";
        foreach (var span in spans)
        {
            if (span.Begin != end)
            {
                string between = before == "" ? "the start of the data" : Messages.Quote(before);
                throw Bad(_file, span.Begin < end
                    ? $"lets tensors {Messages.Quote(before)} and {Messages.Quote(span.Name)} "
                        + "overlap"
                    : $"leaves {span.Begin - end:N0} unused bytes between {between}"
                        + $" and {Messages.Quote(span.Name)}");
            }

            (end, before) = (span.End, span.Name);
        }

        if (end != _dataBytes)
            throw new InputException($"{_file.Path}: the tensors take {end:N0} bytes,"
                + $" the file has {_dataBytes:N0} after the header; was it cut or appended to?");
    }

    private void ReadMetadata()
    {
        if (!_reader.Read() || _reader.TokenType != JsonTokenType.StartObject)
            throw Bad(_file, "has a \"__metadata__\" that is not an object");
        while (NextName() is { } key)
        {
            _reader.Read();
            if (_reader.TokenType != JsonTokenType.String)
                throw Bad(_file, $"has metadata {Messages.Quote(key)} that is not text");
            if (!Metadata.TryAdd(key, _reader.GetString()!))
                throw Bad(_file, $"has metadata {Messages.Quote(key)} twice");
        }
    }

    private (StoredTensor Tensor, long Begin) ReadTensor(string name)
    {
        string place = $"{_file.Path}: tensor {Messages.Quote(name)}";
        if (!_reader.Read() || _reader.TokenType != JsonTokenType.StartObject)
            throw new InputException($"{place} is not described by an object");
        StoredType? type = null;
        List<long>? sizes = null, offsets = null;
        while (NextName() is { } key)
        {
            bool again = key switch
            {
                "dtype" => type is not null,
                "shape" => sizes is not null,
                "data_offsets" => offsets is not null,
                _ => throw new InputException($"{place} has unknown key {Messages.Quote(key)}"),
            };
            if (again) throw new InputException($"{place} has \"{key}\" twice");
            if (key == "dtype") type = ReadType(place);
            else if (key == "shape") sizes = ReadNumbers(place, key, MaxAxes);
            else offsets = ReadNumbers(place, key, 2);
        }

        string? missing = type is null ? "dtype" : sizes is null ? "shape"
            : offsets is not { Count: 2 } ? "data_offsets" : null;
        if (missing is not null) throw new InputException($"{place} lacks \"{missing}\"");
        return Check(place, name, type!, sizes!, offsets![0], offsets[1]);
    }

    private readonly (StoredTensor Tensor, long Begin) Check(
        string place, string name, StoredType type, List<long> sizes, long begin, long end)
    {
        if (begin > end || end > _dataBytes)
            throw new InputException($"{place} lies at bytes {begin:N0} to {end:N0},"
                + $" the file has {_dataBytes:N0} after the header; was it cut?");
        UInt128 bytes = (UInt128)type.Size;
        foreach (long size in sizes)
        {
            bytes *= (UInt128)size;
            if (bytes <= long.MaxValue) continue;
            // A later axis of 0 would make an empty tensor of it; no writer does that.
            throw new InputException(
                $"{place} has shape [{string.Join(", ", sizes)}], more than 2^63 bytes");
        }

        if (bytes != (UInt128)(end - begin))
            throw new InputException(
                $"{place} is {type.Name} [{string.Join(", ", sizes)}] = {bytes:N0} bytes,"
                + $" its data_offsets give {end - begin:N0}");
        var tensor =
            new StoredTensor(_file, name, type, [.. sizes], _dataStart + begin, end - begin);
        return (tensor, begin);
    }

    private StoredType ReadType(string place)
    {
        _reader.Read();
        if (_reader.TokenType != JsonTokenType.String)
            throw new InputException($"{place} has a \"dtype\" that is not text");
        string name = _reader.GetString()!;
        return StoredType.Find(name) ?? throw new InputException(
            $"{place} has unknown dtype {Messages.Quote(name)}, expected one of "
                + $"{StoredType.Names}");
    }

    private List<long> ReadNumbers(string place, string key, int most)
    {
        _reader.Read();
        if (_reader.TokenType != JsonTokenType.StartArray)
            throw new InputException($"{place} has a \"{key}\" that is not an array");
        var numbers = new List<long>(most > 2 ? 4 : 2);
        while (_reader.Read() && _reader.TokenType != JsonTokenType.EndArray)
        {
            if (_reader.TokenType != JsonTokenType.Number || !_reader.TryGetInt64(out long number)
                || number < 0)
                throw new InputException(
                    $"{place} has a \"{key}\" entry that is not a whole number from 0 to 2^63 - 1");
            if (numbers.Count == most)
                throw new InputException($"{place} has more than {most} numbers in \"{key}\"");
            numbers.Add(number);
        }

        return numbers;
    }

    /// <summary>The next member's name, or null at the end of the object.</summary>
    private string? NextName() =>
        _reader.Read() && _reader.TokenType == JsonTokenType.PropertyName
            ? _reader.GetString() : null;
}
