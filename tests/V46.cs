using System.Text.Json;
using System.Text.Json.Nodes;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// The reference model of tests/reference/v46 and its batch of two texts and three pictures, with
/// what transformers computed from them. The weights are packed; they are unpacked into a folder of
/// this process.
/// </summary>
internal static class V46
{
    private const string Targets = @".*language_model\.layers\.\d+\.(self_attn\.(q_proj|k_proj|"
        + @"v_proj|o_proj)|linear_attn\.(in_proj_qkv|in_proj_z|in_proj_b|in_proj_a|out_proj))";

    private static readonly Lazy<string> s_folder = new(Unpack);
    private static readonly Lazy<JsonElement> s_case = new(() => Json("case.json"));
    private static readonly Lazy<ReferenceFile> s_inputs = new(() =>
        ReferenceFile.OpenAt(Path.Combine(s_folder.Value, "case")));

    /// <summary>The model's folder.</summary>
    public static string Model => Path.Combine(s_folder.Value, "model");

    /// <summary>Expected activations, gradients and results with adapters.</summary>
    public static JsonElement Expected => s_case.Value;

    /// <summary>The batch's tokens, labels and pictures.</summary>
    public static ReferenceFile Inputs => s_inputs.Value;

    public static TrainArguments Full => new()
    {
        ModelNameOrPath = Model,
        PerDeviceTrainBatchSize = 2,
        MaxSliceNums = 4,
        AdamBeta2 = 0.95,
        WeightDecay = 0.1,
        ReportTo = ReportTo.None,
        Device = DeviceChoice.Cpu,
    };

    public static TrainArguments Lora => Full with
    {
        UseLora = true,
        TuneLlm = false,
        LoraR = 8,
        LoraAlpha = 16,
        LoraDropout = 0,
        LoraTargetModules = new TargetModules(Targets),
        ModulesToSave = [],
    };

    public static string Adapter(string name) => Path.Combine(ReferenceFile.Root, "v46", name);

    public static JsonElement Json(string name) => ReferenceText.Json("v46/" + name);

    /// <summary>The texts of the batch that the reference was computed of, or some of
    /// them.</summary>
    public static Batch Batch(RowFormat format, params ReadOnlySpan<int> rows)
    {
        int[] ids = Ints("input_ids"), mask = Ints("attention_mask"), labels = Ints("labels");
        int length = Inputs.Shape("input_ids")[1], picture = 0;
        PatchStrips strips = format.NewStrips();
        var batch = new Batch();
        batch.Clear();
        foreach (int row in (ReadOnlySpan<int>)[0, 1])
        {
            int count = mask.AsSpan(row * length, length).Count(1);
            int[] text = ids[(row * length)..((row * length) + count)];
            ImageBound[] bounds = format.Placeholders.Bounds(text)!;
            int pictures = row == 0 ? 1 : 2, first = picture;
            picture += pictures;
            if (rows.Length > 0 && !rows.Contains(row)) continue;
            int start = batch.Tokens.Count;
            for (int t = 0; t + 1 < count; t++)
            {
                int target = labels[(row * length) + t + 1];
                if (target == -100) continue;
                batch.LabelRows.Add(start + t);
                batch.Targets.Add(target);
            }

            batch.AddRow(text, bounds);
            for (int i = first; i < picture; i++)
            {
                using Picture shown = Picture(i);
                SlicePlan plan = Plan(format, shown.Size);
                Assert.That(batch.TryAddPicture(
                    strips, shown, plan, format.Placeholders.Features(plan)), Is.True);
            }
        }

        return batch;

        int[] Ints(string name) => [.. Inputs.Doubles(name).Select(v => (int)v)];
    }

    /// <summary>A picture of the batch.</summary>
    public static Picture Picture(int index)
    {
        string name = $"image.{index}";
        int[] shape = Inputs.Shape(name);
        double[] pixels = Inputs.Doubles(name);
        var picture = new Picture(shape[1], shape[0]);
        int row = 3 * shape[1];
        for (int y = 0; y < shape[0]; y++)
            for (int x = 0; x < row; x++) picture.Row(y)[x] = (byte)pixels[(y * row) + x];
        return picture;
    }

    public static SlicePlan Plan(RowFormat format, PictureSize size) => Slicer.Plan(
        size, format.Slicing.MaxSliceNums, format.Slicing.ScaleResolution,
        format.Slicing.Multiple);

    /// <summary>A model like the reference's with other values in its files.</summary>
    /// <param name="folder">Where to; the weights are not copied.</param>
    /// <param name="change">Changes config.json and what is cut how.</param>
    public static ModelSpec Changed(string folder, Action<JsonObject, JsonObject> change)
    {
        foreach (string file in Directory.GetFiles(Model))
            if (!file.EndsWith(".safetensors", StringComparison.Ordinal))
                File.Copy(file, Path.Combine(folder, Path.GetFileName(file)), overwrite: true);
        JsonObject config = Read("config.json"), processor = Read("processor_config.json");
        change(config, processor["image_processor"]!.AsObject());
        File.WriteAllText(Path.Combine(folder, "config.json"), config.ToJsonString());
        File.WriteAllText(
            Path.Combine(folder, "processor_config.json"), processor.ToJsonString());
        return ModelSpec.Read(folder);

        JsonObject Read(string file) =>
            JsonNode.Parse(File.ReadAllText(Path.Combine(Model, file)))!.AsObject();
    }

    /// <summary>A tensor of a trace against the reference's, whatever axes of one it has.</summary>
    public static void AssertClose(
        Trace trace, string name, string expected, double tolerance = 1e-5)
    {
        var wanted = Fingerprint.Read(Expected.GetProperty("activations").GetProperty(expected));
        float[] got = trace.Floats[name].Values;
        Assert.That(got, Has.Length.EqualTo(wanted.Shape.Aggregate(1, (a, b) => a * b)), name);
        double error = Fingerprint.Of(got, wanted.Shape).ElementError(wanted, wanted.Max);
        TestContext.Out.WriteLine($"{name}: {error:E2}");
        Assert.That(error, Is.LessThan(tolerance), name);
    }

    /// <summary>A picture as a BMP of 24 bits.</summary>
    public static void SaveBmp(Picture picture, string path)
    {
        int width = picture.Size.Width, height = picture.Size.Height;
        int row = ((3 * width) + 3) / 4 * 4;
        using var file = new BinaryWriter(File.Create(path));
        file.Write("BM"u8);
        file.Write(54 + (row * height));
        file.Write(0);
        file.Write(54);
        file.Write(40);
        file.Write(width);
        file.Write(height);
        file.Write((short)1);
        file.Write((short)24);
        for (int i = 0; i < 6; i++) file.Write(0);
        var line = new byte[row];
        for (int y = height - 1; y >= 0; y--)
        {
            for (int x = 0; x < width; x++)
                for (int c = 0; c < 3; c++) line[(3 * x) + c] = picture.Row(y)[(3 * x) + 2 - c];
            file.Write(line);
        }
    }

    /// <summary>A file of two rows, one with a picture of the batch and one without.</summary>
    public static string Data(string folder)
    {
        using (Picture picture = Picture(1)) SaveBmp(picture, Path.Combine(folder, "b.bmp"));
        string path = Path.Combine(folder, "rows.json");
        File.WriteAllText(path, """
            [{"id": "one", "image": "b.bmp", "conversations": [
              {"role": "user", "content": "<image>\nWhich colour is the largest one?"},
              {"role": "assistant", "content": "It is yellow."}]},
             {"id": "text", "conversations": [
              {"role": "user", "content": "How many shapes are there?"},
              {"role": "assistant", "content": "Three."}]}]
            """);
        return path;
    }

    /// <summary>1 or -1, as if drawn.</summary>
    public static int Sign(int index) =>
        (((uint)index * 2654435761u) >> 13 & 1) == 0 ? 1 : -1;

    private static string Unpack()
    {
        string folder = Directory.CreateTempSubdirectory("cpmx-test-v46-").FullName;
        AppDomain.CurrentDomain.ProcessExit += (_, _) => Directory.Delete(folder, recursive: true);
        string model = Path.Combine(folder, "model");
        Directory.CreateDirectory(model);
        string packed = Path.Combine(ReferenceFile.Root, "v46", "model");
        foreach (string path in Directory.GetFiles(packed))
            if (!path.EndsWith(".gz", StringComparison.Ordinal))
                File.Copy(path, Path.Combine(model, Path.GetFileName(path)));
        foreach (string file in (string[])["model/model.safetensors", "case.safetensors"])
            File.WriteAllBytes(Path.Combine(folder, file), ReferenceText.Bytes("v46/" + file));
        return folder;
    }
}
