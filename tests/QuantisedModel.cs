using System.Runtime.InteropServices;
using System.Security.Cryptography;
using System.Text;
using System.Text.Json.Nodes;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Quantised;

namespace MiniCpmNative.Tests;

/// <summary>
/// The reference model as bitsandbytes stores it in 4 bits, made here tensor by tensor: its hashes
/// are those of the files that bitsandbytes wrote (tests/reference/quant).
/// </summary>
internal static unsafe class QuantisedModel
{
    // What the released int4 models leave out, by the last part of a module's name.
    private static readonly string[] s_skipped = ["out_proj", "kv_proj", "lm_head"];

    /// <summary>The tensors of model-int4 of the reference: F16, vision tower and
    /// decoder.</summary>
    public static IEnumerable<TensorToSave> Int4()
    {
        using var model = Checkpoint.Open(V26.Model);
        foreach (ModelParameter p in V26.Spec.Parameters.All)
        {
            string module = p.Name.EndsWith(".weight", StringComparison.Ordinal)
                ? p.Name[..^".weight".Length] : "";
            float[] values = model.Get(p.Name).ToFloats();
            var halves = Array.ConvertAll(values, v => (Half)v);
            if (V26.Spec.Parameters.Linears.Any(l => l.Name == module)
                && !s_skipped.Contains(module.Split('.')[^1]))
            {
                foreach (TensorToSave part in Parts(p.Name, p.Shape, halves)) yield return part;
                continue;
            }

            yield return Tensor(p.Name, StoredType.Of(DType.F16), [.. Sizes(p.Shape)],
                MemoryMarshal.AsBytes<Half>(halves).ToArray());
        }
    }

    private static List<TensorToSave> Parts(string name, Shape shape, Half[] values)
    {
        fixed (Half* from = values) return Parts(name, shape, DType.F16, from, "float16");
    }

    /// <summary>The parts that one matrix is stored in.</summary>
    public static List<TensorToSave> Parts(
        string name, Shape shape, DType type, void* source, string torch)
    {
        var form = new FourBitForm(shape[0], shape[1], 64, 256);
        FourBitCodes codes = FourBitCodes.Of(form, FourBitKind.Nf4, type, source);
        string state = $$"""{"quant_type": "nf4", "blocksize": 64, "dtype": "{{torch}}", """
            + $$"""
              "shape": [{{shape[0]}}, {{shape[1]}}], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": {{(double)codes.Offset:R}}}
              """;
        byte[] json = Encoding.UTF8.GetBytes(state);
        return
        [
            Bytes("", codes.Codes, codes.Codes.Length, 1),
            Bytes(".absmax", codes.ScaleCodes!, codes.ScaleCodes!.Length),
            Floats(".nested_absmax", codes.Scales),
            Floats(".nested_quant_map", codes.ScaleTable!),
            Floats(".quant_map", codes.Table),
            Bytes(".quant_state.bitsandbytes__nf4", json, json.Length),
        ];

        TensorToSave Bytes(string part, byte[] bytes, params long[] sizes) =>
            Tensor(name + part, StoredType.Of(DType.U8), sizes, bytes);

        TensorToSave Floats(string part, float[] values) =>
            Tensor(name + part, StoredType.Of(DType.F32), [values.Length],
                MemoryMarshal.AsBytes<float>(values).ToArray());
    }

    /// <summary>The folder of such a model.</summary>
    public static string Write(string folder, IEnumerable<TensorToSave> tensors, string config)
    {
        foreach (string file in Directory.GetFiles(V26.Model, "*.json").Concat(
            Directory.GetFiles(V26.Model, "*.txt")))
            File.Copy(file, Path.Combine(folder, Path.GetFileName(file)));
        string path = Path.Combine(folder, "config.json");
        JsonNode json = JsonNode.Parse(File.ReadAllText(path))!;
        json["quantization_config"] = JsonNode.Parse(config);
        json["torch_dtype"] = "float16";
        File.WriteAllText(path, json.ToJsonString());
        CheckpointWriter.Write(folder, [.. tensors]);
        return folder;
    }

    /// <summary>The first half of a tensor's SHA-256 in hexadecimal.</summary>
    public static string Hash(TensorToSave tensor)
    {
        using var bytes = new MemoryStream();
        tensor.Write(bytes);
        return Convert.ToHexStringLower(SHA256.HashData(bytes.ToArray()))[..16];
    }

    private static TensorToSave Tensor(
        string name, StoredType type, IEnumerable<long> sizes, byte[] bytes) =>
        new(name, type, [.. sizes], stream => stream.Write(bytes));

    private static IEnumerable<long> Sizes(Shape shape)
    {
        var sizes = new long[shape.Rank];
        for (int i = 0; i < sizes.Length; i++) sizes[i] = shape[i];
        return sizes;
    }
}
