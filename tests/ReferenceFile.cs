using System.Buffers.Binary;
using System.Text.Json;
using MiniCpmNative.Engine;

namespace MiniCpmNative.Tests;

/// <summary>
/// Reference tensors of one operation: NAME.safetensors, and NAME.json with its cases, under
/// tests/reference. The environment variable CPMX_REFERENCE may name a folder with the full set in
/// the same layout; it is used instead of the committed subset. Every element type is read as
/// double, which holds them all exactly. Trusted files only: nothing is validated beyond what
/// reading needs.
/// </summary>
internal sealed class ReferenceFile
{
    private readonly byte[] _bytes;
    private readonly int _dataStart;
    private readonly JsonElement _header;

    private ReferenceFile(string path)
    {
        _bytes = File.ReadAllBytes(path + ".safetensors");
        int headerLength = (int)BinaryPrimitives.ReadInt64LittleEndian(_bytes);
        _dataStart = sizeof(long) + headerLength;
        using var header = JsonDocument.Parse(_bytes.AsMemory(sizeof(long), headerLength));
        _header = header.RootElement.Clone();
        if (!File.Exists(path + ".json")) return;
        using var index = JsonDocument.Parse(File.ReadAllBytes(path + ".json"));
        Index = index.RootElement.Clone();
        if (Index.ValueKind == JsonValueKind.Object && Index.TryGetProperty("cases", out var cases))
            Cases = [.. cases.EnumerateArray().Select(c => new ReferenceCase(this, c))];
    }

    /// <summary>The whole JSON file; undefined where there is none.</summary>
    public JsonElement Index { get; }

    /// <summary>The cases of the JSON file, in its order.</summary>
    public IReadOnlyList<ReferenceCase> Cases { get; } = [];

    /// <summary>Names of all tensors.</summary>
    public IEnumerable<string> Names =>
        _header.EnumerateObject().Select(p => p.Name).Where(n => n != "__metadata__");

    /// <summary>Opens tests/reference/NAME, for instance "ops/attention" (no extension).</summary>
    public static ReferenceFile Open(string name)
    {
        string? full = Environment.GetEnvironmentVariable("CPMX_REFERENCE");
        string root = string.IsNullOrEmpty(full) ? Root : full;
        return new ReferenceFile(Path.Combine(root, name));
    }

    /// <summary>The committed file, for those that the full set has in another layout.</summary>
    public static ReferenceFile OpenCommitted(string name) => new(Path.Combine(Root, name));

    /// <summary>A file anywhere, its path without the extension.</summary>
    public static ReferenceFile OpenAt(string path) => new(path);

    /// <summary>The committed folder tests/reference.</summary>
    public static string Root { get; } = FindRoot();

    public bool Has(string name) => _header.TryGetProperty(name, out _);

    /// <summary>F64, F32, BF16, F16, I64, I32, I8 or U8.</summary>
    public string Type(string name) => _header.GetProperty(name).GetProperty("dtype").GetString()!;

    public int[] Shape(string name) =>
    [
        .. _header.GetProperty(name).GetProperty("shape").EnumerateArray()
        .Select(e => e.GetInt32()),
    ];

    /// <summary>All elements, row-major, widened to double.</summary>
    public double[] Doubles(string name)
    {
        string type = Type(name);
        int size = type switch
        {
            "F64" or "I64" => 8,
            "F32" or "I32" => 4,
            "BF16" or "F16" => 2,
            "I8" or "U8" => 1,
            _ => throw new InvalidDataException($"{name}: dtype {type} is not read here"),
        };
        ReadOnlySpan<byte> data = Bytes(name);
        var values = new double[data.Length / size];
        for (int i = 0; i < values.Length; i++)
            values[i] = Read(type, data.Slice(i * size, size));
        return values;
    }

    /// <summary>
    /// All elements rounded to float; exact for inputs, which bf16 can represent.
    /// </summary>
    public float[] Floats(string name) => Array.ConvertAll(Doubles(name), v => (float)v);

    /// <summary>All elements of an integer tensor (ids, positions, lengths, masks).</summary>
    public int[] Ints(string name) => Array.ConvertAll(Doubles(name), v => (int)v);

    /// <summary>The bytes as stored.</summary>
    public ReadOnlySpan<byte> Bytes(string name)
    {
        JsonElement offsets = _header.GetProperty(name).GetProperty("data_offsets");
        int begin = offsets[0].GetInt32();
        return _bytes.AsSpan(_dataStart + begin, offsets[1].GetInt32() - begin);
    }

    private static double Read(string type, ReadOnlySpan<byte> b) => type switch
    {
        "F64" => BinaryPrimitives.ReadDoubleLittleEndian(b),
        "F32" => BinaryPrimitives.ReadSingleLittleEndian(b),
        "F16" => (double)BinaryPrimitives.ReadHalfLittleEndian(b),
        "BF16" => BitConverter.Int32BitsToSingle(BinaryPrimitives.ReadUInt16LittleEndian(b) << 16),
        "I64" => BinaryPrimitives.ReadInt64LittleEndian(b),
        "I32" => BinaryPrimitives.ReadInt32LittleEndian(b),
        "I8" => (sbyte)b[0],
        _ => b[0],
    };

    private static string FindRoot()
    {
        var folder = new DirectoryInfo(AppContext.BaseDirectory);
        const string Solution = "MiniCpmNative.sln";
        while (folder is not null && !File.Exists(Path.Combine(folder.FullName, Solution)))
            folder = folder.Parent;
        string root = folder?.FullName
            ?? throw new DirectoryNotFoundException("no MiniCpmNative.sln above the test binaries");
        return Path.Combine(root, "tests", "reference");
    }
}

/// <summary>One case of a reference file; tensors by their key (case3/dx is "dx" here).</summary>
internal sealed class ReferenceCase(ReferenceFile file, JsonElement json)
{
    public string Name { get; } = json.GetProperty("name").GetString()!;

    /// <summary>
    /// The hyper-parameters, for instance Params.GetProperty("epsilon").GetDouble().
    /// </summary>
    public JsonElement Params { get; } = json.GetProperty("params");

    /// <summary>Results are rounded to F32 and inputs stored as BF16.</summary>
    public bool Small { get; } =
        json.TryGetProperty("small", out var small) && small.ValueKind == JsonValueKind.True;

    public string Note { get; } =
        json.TryGetProperty("note", out var note) ? note.ToString() : "";

    public bool Has(string key) => file.Has($"{Name}/{key}");

    public string Type(string key) => file.Type($"{Name}/{key}");

    public int[] Shape(string key) => file.Shape($"{Name}/{key}");

    public double[] Doubles(string key) => file.Doubles($"{Name}/{key}");

    public float[] Floats(string key) => file.Floats($"{Name}/{key}");

    public int[] Ints(string key) => file.Ints($"{Name}/{key}");

    /// <summary>
    /// Largest absolute difference between PyTorch's own float32 run and the float64 result, or 0
    /// where the case gives none. Float results should stay within a few times of it.
    /// </summary>
    public double F32Error(string key) =>
        Params.TryGetProperty("f32_error", out var errors)
            && errors.TryGetProperty(key, out var error)
            ? error.GetDouble()
            : 0;

    public override string ToString() => $"{Name} {Note}".TrimEnd();
}
