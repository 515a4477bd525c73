using System.Buffers.Binary;
using System.Text;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

[TestFixture]
public sealed class SafetensorsTests
{
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void ReadsWhatPyTorchWrote()
    {
        string path = Path.Combine(ReferenceFile.Root, "ops", "float_bits.safetensors");
        var reference = ReferenceFile.Open("ops/float_bits");
        using var file = SafetensorsFile.Open(path);
        Assert.That(file.Metadata,
            Is.EqualTo(new Dictionary<string, string> { ["format"] = "pt" }));
        Assert.That(file.Tensors.Select(t => t.Name), Is.EqualTo(reference.Names));
        foreach (var tensor in file.Tensors)
        {
            Assert.That(tensor.Type, Is.EqualTo(DType.I32));
            Assert.That(tensor.Shape, Is.EqualTo(new Shape(reference.Shape(tensor.Name))));
            Assert.That(tensor.Span.SequenceEqual(reference.Bytes(tensor.Name)), tensor.Name);
            Assert.That(tensor.Count * 4, Is.EqualTo(tensor.Bytes));
        }
    }

    [Test]
    public void EveryTypeIsReadAndFloatsAreWidened()
    {
        string header = """
            {"d":{"dtype":"F64","shape":[],"data_offsets":[0,8]},
             "f":{"dtype":"F32","shape":[1,1,1,1],"data_offsets":[8,12]},
             "b":{"dtype":"BF16","shape":[1],"data_offsets":[12,14]},
             "h":{"dtype":"F16","shape":[1],"data_offsets":[14,16]},
             "l":{"dtype":"I64","shape":[1],"data_offsets":[16,24]},
             "u":{"dtype":"U8","shape":[2],"data_offsets":[24,26]},
             "t":{"dtype":"BOOL","shape":[1],"data_offsets":[26,27]},
             "none":{"dtype":"F32","shape":[0,5],"data_offsets":[27,27]},
             "c":{"dtype":"I8","shape":[1],"data_offsets":[27,28]}}
            """;
        var data = new byte[28];
        BinaryPrimitives.WriteDoubleLittleEndian(data, -2.5);
        BinaryPrimitives.WriteSingleLittleEndian(data.AsSpan(8), 0.75f);
        BinaryPrimitives.WriteUInt16LittleEndian(data.AsSpan(12), 0x3FC0);
        BinaryPrimitives.WriteHalfLittleEndian(data.AsSpan(14), (Half)3.5);
        BinaryPrimitives.WriteInt64LittleEndian(data.AsSpan(16), -9);
        using var file = SafetensorsFile.Open(Save(header, data));
        Assert.That(file.Get("d").ToFloats(), Is.EqualTo(new[] { -2.5f }));
        Assert.That(file.Get("d").Shape.Rank, Is.EqualTo(0));
        Assert.That(file.Get("f").ToFloats(), Is.EqualTo(new[] { 0.75f }));
        Assert.That(file.Get("b").ToFloats(), Is.EqualTo(new[] { 1.5f }));
        Assert.That(file.Get("h").ToFloats(), Is.EqualTo(new[] { 3.5f }));
        Assert.That(file.Get("none").ToFloats(), Is.Empty);
        Assert.That(file.Get("t").Type, Is.EqualTo(DType.U8));
        Assert.That(BinaryPrimitives.ReadInt64LittleEndian(file.Get("l").Span), Is.EqualTo(-9));
        Assert.That(() =>
            file.Get("u").ToFloats(), Refuses("tensor \"u\" has type U8, expected floats"));
        Assert.That(() => file.Get("c").Type, Refuses("has type I8, expected one of F32"));
        Assert.That(() => file.Get("x"), Refuses("there is no tensor \"x\""));
    }

    [Test]
    public void ShapesTheKernelsCannotHoldAreReportedWhenAsked()
    {
        string header = """
            {"five":{"dtype":"U8","shape":[1,1,1,1,1],"data_offsets":[0,1]},
             "wide":{"dtype":"U8","shape":[0,4294967296],"data_offsets":[1,1]},
             "huge":{"dtype":"U8","shape":[0,2147483647,2147483647,2147483647],"data_offsets":[1,1]}}
            """;
        using var file = SafetensorsFile.Open(Save(header, [0]));
        Assert.That(file.Get("five").Sizes, Has.Length.EqualTo(5));
        foreach (var tensor in file.Tensors)
            Assert.That(() => tensor.Shape, Refuses($"tensor \"{tensor.Name}\" has shape ["));
    }

    // Each breaks one rule of the format; the data is eight bytes.
    [TestCase("""{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[0],"data_offsets":[8,8]}}""", "tensor \"a\" twice")]
    [TestCase("""{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}""",
        "the tensors take 4 bytes, the file has 8")]
    [TestCase("""{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}""",
        "leaves 4 unused bytes between the start of the data and \"a\"")]
    [TestCase("""{"a":{"dtype":"U8","shape":[6],"data_offsets":[0,6]},"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}""", "\"a\" and \"b\" overlap")]
    [TestCase("""{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}""",
        "lies at bytes 0 to 12, the file has 8")]
    [TestCase("""{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}""", "lies at bytes 8 to 0")]
    [TestCase("""{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}""",
        "is F32 [3] = 12 bytes, its data_offsets give 8")]
    [TestCase("""{"a":{"dtype":"F32","shape":[4611686018427387905,2],"data_offsets":[0,8]}}""",
        "more than 2^63 bytes")]
    [TestCase("""{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}""",
        "\"shape\" entry that is not a whole number")]
    [TestCase("""{"a":{"dtype":"F32","shape":[2.5],"data_offsets":[0,8]}}""",
        "\"shape\" entry that is not a whole number")]
    [TestCase("""{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]}}""",
        "\"data_offsets\" entry")]
    [TestCase("""{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}}""",
        "more than 2 numbers in \"data_offsets\"")]
    [TestCase("""{"a":{"dtype":"F32","shape":[2],"data_offsets":[8]}}""", "lacks \"data_offsets\"")]
    [TestCase("""{"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}""",
        "unknown dtype \"F33\"")]
    [TestCase("""{"a":{"dtype":7,"shape":[2],"data_offsets":[0,8]}}""",
        "\"dtype\" that is not text")]
    [TestCase("""{"a":{"shape":[2],"data_offsets":[0,8]}}""", "lacks \"dtype\"")]
    [TestCase("""{"a":{"dtype":"F32","data_offsets":[0,8]}}""", "lacks \"shape\"")]
    [TestCase("""{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}""",
        "has \"shape\" twice")]
    [TestCase("""{"a":{"dtype":"F32","shape":2,"data_offsets":[0,8]}}""",
        "\"shape\" that is not an array")]
    [TestCase("""{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}}""",
        "unknown key \"x\"")]
    [TestCase("""{"a":[1]}""", "is not described by an object")]
    [TestCase("""{"__metadata__":{"format":1}}""", "metadata \"format\" that is not text")]
    [TestCase("""{"__metadata__":3}""", "\"__metadata__\" that is not an object")]
    [TestCase("""{"__metadata__":{},"__metadata__":{}}""", "\"__metadata__\" twice")]
    [TestCase("""{"__metadata__":{"a":{"b":{"c":{"d":1}}}}}""", "not text")]
    [TestCase("""{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} x""", "not valid JSON")]
    [TestCase("""{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}""", "not valid JSON")]
    [TestCase(""" {}""", "does not start with \"{\"")]
    [TestCase("""{"a\n\u001b[31m":{"dtype":"F33"}}""",
        "tensor \"a\\u000a\\u001b[31m\" has unknown dtype")]
    [TestCase("""{"\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}""", "not valid UTF-8")]
    public void BrokenHeadersAreRefused(string header, string expected) =>
        Assert.That(() => SafetensorsFile.Open(Save(header, new byte[8])), Refuses(expected));

    [TestCase(1UL << 60, "header claims 1,152,921,504,606,846,976 bytes, file has 20")]
    [TestCase(ulong.MaxValue, "header claims 18,446,744,073,709,551,615 bytes")]
    [TestCase(13UL, "header claims 13 bytes, file has 20")]
    [TestCase(0UL, "does not start with")]
    public void WrongHeaderLengthsAreRefused(ulong claimed, string expected)
    {
        var bytes = new byte[20];
        BinaryPrimitives.WriteUInt64LittleEndian(bytes, claimed);
        string path = Path.Combine(_folder, "length.safetensors");
        File.WriteAllBytes(path, bytes);
        Assert.That(() => SafetensorsFile.Open(path), Refuses(expected));
    }

    [Test]
    public void InvalidUtf8IsRefused()
    {
        byte[] header =
            Encoding.UTF8.GetBytes("""{"a?":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}""");
        header[3] = 0xFF;
        string path = Path.Combine(_folder, "utf8.safetensors");
        File.WriteAllBytes(path, Bytes(header, []));
        Assert.That(() => SafetensorsFile.Open(path), Refuses("not valid"));
    }

    [Test]
    public void FilesThatCannotBeReadAreRefused()
    {
        string shortFile = Path.Combine(_folder, "short.safetensors");
        File.WriteAllBytes(shortFile, new byte[7]);
        Assert.That(() =>
            SafetensorsFile.Open(shortFile), Refuses("has 7 bytes, expected at least 8"));
        Assert.That(() => SafetensorsFile.Open(_folder), Refuses("is a directory"));
        Assert.That(() =>
            SafetensorsFile.Open(Path.Combine(_folder, "x")), Refuses("there is no such file"));
        Assert.That(() => SafetensorsFile.Open(shortFile + "/x"), Refuses(shortFile + "/x: "));
        Assert.That(() => SafetensorsFile.Open("a\0b"), Throws.TypeOf<InputException>());
    }

    [Test]
    public void AClosedFileGivesNoAddresses()
    {
        var file = SafetensorsFile.Open(
            Save("""{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}""", [9]));
        var tensor = file.Get("a");
        Assert.That(tensor.Span[0], Is.EqualTo(9));
        file.Dispose();
        Assert.Throws<ObjectDisposedException>(() => _ = tensor.Data);
    }

    internal static NUnit.Framework.Constraints.Constraint Refuses(string expected) =>
        Throws.TypeOf<InputException>().With.Message.Contain(expected)
            .And.Message.Not.Contain("\n");

    internal static byte[] Bytes(ReadOnlySpan<byte> header, ReadOnlySpan<byte> data)
    {
        var bytes = new byte[8 + header.Length + data.Length];
        BinaryPrimitives.WriteInt64LittleEndian(bytes, header.Length);
        header.CopyTo(bytes.AsSpan(8));
        data.CopyTo(bytes.AsSpan(8 + header.Length));
        return bytes;
    }

    private string Save(string header, byte[] data)
    {
        string path = Path.Combine(_folder, "model.safetensors");
        File.WriteAllBytes(path, Bytes(Encoding.UTF8.GetBytes(header), data));
        return path;
    }
}
