using System.IO.Compression;
using System.Text.Json;
using System.Text.Json.Nodes;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Generate;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// The reference model of a member that is a class of transformers itself, tests/reference/NAME,
/// its batch, and what transformers computed of it. The files are packed; they are unpacked into a
/// folder of this process. V-4_7's weights are in the full set only.
/// </summary>
internal sealed class NativeCase
{
    private static readonly Dictionary<string, NativeCase> s_all = [];

    private readonly string _name, _folder;
    private readonly int[] _picturesOfRows;

    private NativeCase(string name, params int[] picturesOfRows)
    {
        (_name, _picturesOfRows) = (name, picturesOfRows);
        _folder = Directory.CreateTempSubdirectory($"cpmx-test-{name}-").FullName;
        AppDomain.CurrentDomain.ProcessExit += (_, _) => Directory.Delete(_folder, recursive: true);
        string root = Path.Combine(ReferenceFile.Root, name);
        foreach (string path in Directory.GetFiles(root, "*", SearchOption.AllDirectories))
        {
            string file = Path.GetRelativePath(root, path);
            bool packed = file.EndsWith(".gz", StringComparison.Ordinal);
            string target = Path.Combine(_folder, packed ? file[..^3] : file);
            Directory.CreateDirectory(Path.GetDirectoryName(target)!);
            if (packed) Unpack(path, target);
            else File.Copy(path, target);
        }

        Expected = Json("case.json");
        Inputs = ReferenceFile.OpenAt(Path.Combine(_folder, "case"));
    }

    public string Model => Path.Combine(_folder, "model");

    /// <summary>Expected activations, gradients and results with adapters.</summary>
    public JsonElement Expected { get; }

    /// <summary>The batch's tokens, labels and pictures.</summary>
    public ReferenceFile Inputs { get; }

    public TrainArguments Full => V46.Full with { ModelNameOrPath = Model, MaxSliceNums = 9 };

    public TrainArguments Lora
    {
        get
        {
            using var json = JsonDocument.Parse(
                File.ReadAllBytes(Path.Combine(Adapter("lora_init"), "adapter_config.json")));
            JsonElement config = json.RootElement;
            return V46.Lora with
            {
                ModelNameOrPath = Model,
                LoraR = config.GetProperty("r").GetInt32(),
                LoraAlpha = config.GetProperty("lora_alpha").GetInt32(),
                LoraTargetModules =
                    new TargetModules(config.GetProperty("target_modules").GetString()!),
            };
        }
    }

    public static NativeCase Of(string name)
    {
        lock (s_all)
            return s_all.TryGetValue(name, out var found) ? found : s_all[name] = name switch
            {
                "v47" => new NativeCase(name, 2, 0),
                "ocr" => new NativeCase(name, 1, 1, 2, 0),
                _ => throw new ArgumentException(name),
            };
    }

    public string Adapter(string name) => Path.Combine(_folder, name);

    /// <summary>One of its files.</summary>
    public string At(string file) => Path.Combine(_folder, file);

    public JsonElement Json(string name)
    {
        using var json = JsonDocument.Parse(File.ReadAllBytes(Path.Combine(_folder, name)));
        return json.RootElement.Clone();
    }

    /// <summary>The texts of the reference's batch, or some of them.</summary>
    public Batch Batch(RowFormat format, params ReadOnlySpan<int> rows)
    {
        int[] ids = Ints("input_ids"), mask = Ints("attention_mask"), labels = Ints("labels");
        int length = Inputs.Shape("input_ids")[1], picture = 0;
        var batch = new Batch();
        batch.Clear();
        for (int row = 0; row < _picturesOfRows.Length; row++)
        {
            int count = mask.AsSpan(row * length, length).Count(1);
            int[] shown = [.. Enumerable.Range(picture, _picturesOfRows[row])];
            picture += shown.Length;
            if (rows.Length > 0 && !rows.Contains(row)) continue;
            for (int t = 0; t + 1 < count; t++)
            {
                int target = labels[(row * length) + t + 1];
                if (target == -100) continue;
                batch.LabelRows.Add(batch.Tokens.Count + t);
                batch.Targets.Add(target);
            }

            Append(batch, format, ids[(row * length)..((row * length) + count)], shown);
        }

        return batch;
    }

    /// <summary>A text and its pictures, by number.</summary>
    public void Append(Batch batch, RowFormat format, int[] ids, int[] shown)
    {
        Picture[] pictures = [.. shown.Select(Picture)];
        SlicePlan[] plans =
            [.. pictures.Select(p => format.Slicing.Plan(p.Size, () => p.Cut(0, 0, p.Size)))];
        batch.AddRow(ids, format.Placeholders.Bounds(ids)!, places: format.Places(ids, plans));
        PatchStrips strips = format.NewStrips();
        foreach (var (one, plan) in pictures.Zip(plans))
            Assert.That(batch.TryAddPicture(
                strips, one, plan, format.Placeholders.Features(plan)), Is.True);
        foreach (Picture one in pictures) one.Dispose();
    }

    public int[] Ints(string name) => [.. Inputs.Doubles(name).Select(v => (int)v)];

    /// <summary>A picture of the batch.</summary>
    public Picture Picture(int index) => Pixels(Inputs, $"image.{index}");

    /// <summary>A tensor [height, width, 3] as a picture.</summary>
    public static Picture Pixels(ReferenceFile file, string name)
    {
        int[] shape = file.Shape(name);
        var picture = new Picture(shape[1], shape[0]);
        foreach (var (i, value) in file.Doubles(name).Index()) picture.Rgb[i] = (byte)value;
        return picture;
    }

    /// <summary>A model like it with other values in its files, without weights.</summary>
    public ModelSpec Changed(string folder, Action<JsonObject, JsonObject> change)
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

    /// <summary>A tensor of a trace against the reference's.</summary>
    public static void AssertClose(
        Trace trace, string name, JsonElement expected, double tolerance = 1e-5)
    {
        var wanted = Fingerprint.Read(expected);
        float[] got = trace.Floats[name].Values;
        Assert.That(got, Has.Length.EqualTo(wanted.Shape.Aggregate(1, (a, b) => a * b)), name);
        Fingerprint found = Fingerprint.Of(got, wanted.Shape);
        double error = tolerance > 1e-5
            ? found.NormError(wanted) : found.ElementError(wanted, wanted.Max);
        TestContext.Out.WriteLine($"{name}: {error:E2}");
        Assert.That(error, Is.LessThan(tolerance), name);
    }

    private static void Unpack(string path, string target)
    {
        using var packed = new GZipStream(File.OpenRead(path), CompressionMode.Decompress);
        using var file = File.Create(target);
        packed.CopyTo(file);
    }

    /// <summary>A prompt of generate.json without its padding.</summary>
    public GenerationInput Prompt(RowFormat format, JsonElement call, int row, int[] shown)
    {
        int padding =
            ReferenceText.Ints(call.GetProperty("attention_mask")[row]).Count(m => m == 0);
        int[] ids = ReferenceText.Ints(call.GetProperty("input_ids")[row])[padding..];
        return new GenerationInput(ids.Length, batch => Append(batch, format, ids, shown))
        {
            Ids = ids,
        };
    }
}
