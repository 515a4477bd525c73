using System.Text.Json;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;

namespace MiniCpmNative.Tests;

/// <summary>
/// The reference model of a family in tests/reference/NAME, with the files that V-2_6's has:
/// case a, adapters, ten steps. Rows without a file of their own are V-2_6's.
/// </summary>
internal sealed class ReferenceModel
{
    private static readonly Dictionary<string, ReferenceModel> s_all = [];

    private ReferenceModel(string name)
    {
        Name = name;
        Spec = ModelSpec.Read(Path.Combine(Folder, "model"));
        Format = Spec.Rows();
        string rows = Path.Combine(Folder, "data", "rows.json");
        RowFile = File.Exists(rows) ? rows : V26.Rows;
        Full = V26.Full with
        {
            ModelNameOrPath = Spec.Directory,
            DataPath = RowFile,
            MaxSliceNums = Spec.Slicing.MaxSliceNums,
        };
        Lora = Full with
        {
            UseLora = true,
            TuneLlm = false,
            LoraR = V26.Lora.LoraR,
            LoraAlpha = V26.Lora.LoraAlpha,
            LoraDropout = 0,
            LoraTargetModules = V26.Lora.LoraTargetModules,
            ModulesToSave = [],
        };
    }

    public string Name { get; }

    /// <summary>The committed files.</summary>
    public string Folder => Path.Combine(ReferenceFile.Root, Name);

    public ModelSpec Spec { get; }

    public RowFormat Format { get; }

    public string RowFile { get; }

    /// <summary>Everything is trained, on rows as the official script makes them.</summary>
    public TrainArguments Full { get; }

    /// <summary>Adapters on the decoder's attention, as the reference has them.</summary>
    public TrainArguments Lora { get; }

    /// <summary>The rows of case a.</summary>
    public string[] CaseA => [.. Json("forward/case_a.json").GetProperty("samples")
        .EnumerateArray().Select(s => s.GetString()!)];

    public static ReferenceModel Of(string name) => s_all.TryGetValue(name, out var found)
        ? found : s_all[name] = new ReferenceModel(name);

    // The full set has other files for some.
    public JsonElement Json(string file)
    {
        string path = Path.Combine(Folder, file + ".gz");
        using var packed = new System.IO.Compression.GZipStream(
            File.OpenRead(path), System.IO.Compression.CompressionMode.Decompress);
        using var json = JsonDocument.Parse(packed);
        return json.RootElement.Clone();
    }

    public string Adapter(string name) => Path.Combine(Folder, "adapters", name);

    /// <summary>Rows as one batch.</summary>
    public Batch Batch(TrainArguments arguments, params string[] ids) =>
        V26.Batch(Format, arguments, ids);
}
