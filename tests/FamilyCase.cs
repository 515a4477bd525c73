using System.Text.Json;
using System.Text.Json.Nodes;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Tests;

/// <summary>
/// The reference model of a family whose released code computed tests/reference/NAME: its rows and
/// what came out. rows.json is in tests/reference/families/NAME; or rows and files are those of
/// tests/reference/v26, with the family's own model ("alike").
/// </summary>
internal sealed class FamilyCase
{
    private const string Targets = @"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)";

    private static readonly Dictionary<string, FamilyCase> s_all = [];

    private readonly bool _alike;
    private readonly JsonElement _rows;
    private ModelSpec? _spec;
    private RowFormat? _format;

    private FamilyCase(string name)
    {
        (Name, _alike) = (name, name is not ("v2" or "l3"));
        _rows = ReferenceText.Json(_alike ? "v26/data/rows.json" : $"families/{name}/rows.json");
        Pair = ["one", _alike ? "two-small" : "sliced"];
        LongRow = _alike ? "tall" : "very_long";
    }

    public string Name { get; }

    /// <summary>The committed files.</summary>
    public string Folder => Path.Combine(ReferenceFile.Root, Name);

    public string Model => Path.Combine(Folder, "model");

    public ModelSpec Spec => _spec ??= ModelSpec.Read(Model);

    public RowFormat Format => _format ??= Spec.Rows();

    /// <summary>What came out beside the steps of training.</summary>
    public JsonElement Results => _alike ? Json("lora/cases.json") : Json("results.json");

    /// <summary>Loss, gradient norm and every gradient of the pair, everything trained.</summary>
    public JsonElement FullResult =>
        _alike ? Json("forward/case_a.json") : Results.GetProperty("full");

    public JsonElement Activations =>
        Json(_alike ? "forward/case_a_activations.json" : "activations.json");

    /// <summary>The rows of the batch whose tensors are recorded.</summary>
    public string[] Pair { get; }

    /// <summary>A row whose picture is many times as high as wide, or as wide as high.</summary>
    public string LongRow { get; }

    /// <summary>The rows of the ten steps, in turn.</summary>
    public string[] TrainedRows => _alike ? ["one", "turns", "wide"] :
        [.. Json("training.json").GetProperty("rows").EnumerateArray().Select(r => r.GetString()!)];

    /// <summary>The folder of the adapter whose gradients are recorded.</summary>
    public string Adapter =>
        Path.Combine(Folder, _alike ? "adapters/random_lora_only" : "adapter_init");

    /// <summary>The gradients of that adapter, and of what the ten steps made of theirs.</summary>
    public (string Gradients, string Trained) AdapterTensors => _alike
        ? ($"{Name}/lora/lora_only_gradients", $"{Name}/adapters/trained_lora_only/adapter_model")
        : ($"{Name}/lora_only_grads", $"{Name}/lora_only_final");

    /// <summary>Everything is trained, on rows as the official script makes them.</summary>
    public TrainArguments Full => V26.Full with { ModelNameOrPath = Model, DataPath = null };

    /// <summary>Adapters on the decoder's attention, as the reference has them.</summary>
    public TrainArguments Lora => V26.Lora with { ModelNameOrPath = Model, DataPath = null };

    public static FamilyCase Of(string name) => s_all.TryGetValue(name, out var found)
        ? found : s_all[name] = new FamilyCase(name);

    public JsonElement Json(string file) => ReferenceText.Json($"{Name}/{file}");

    /// <summary>A data file with these rows, by name, and "text", which has no picture.</summary>
    public string Data(string folder, params string[] names)
    {
        string path = Path.Combine(folder, "rows.json");
        File.WriteAllText(path, new JsonArray([.. names.Select(Row)]).ToJsonString());
        return path;
    }

    /// <summary>Rows as one batch, cut as the reference has them.</summary>
    public Batch Batch(TrainArguments arguments, params string[] names)
    {
        var batch = new Batch();
        batch.Clear();
        foreach (string name in names) Append(arguments, name, batch);
        return batch;
    }

    /// <summary>Ten steps of full training, or of adapters, and where they led.</summary>
    public JsonElement Training(string name) =>
        Json(_alike ? "train/runs.json" : "training.json").GetProperty(name);

    /// <summary>The names of trained tensors that weight decay leaves alone, as PEFT has them.</summary>
    public IEnumerable<string> NotDecayed(string name) => Training(name)
        .GetProperty(_alike ? "not_decayed" : "no_weight_decay").EnumerateArray()
        .Select(n => n.GetString()!);

    /// <summary>The global norm of a result's gradients.</summary>
    public double Norm(JsonElement result) =>
        result.GetProperty(_alike ? "gradient_norm" : "global_norm").GetDouble();

    /// <summary>The norm of a step's; where PyTorch's is known in F64, that one: in F32 it is off
    /// by what adding the squares up loses.</summary>
    public double StepNorm(JsonElement step) =>
        step.GetProperty(_alike ? "grad_norm" : "grad_norm_f64_run").GetDouble();

    /// <summary>Writes the adapter that the ten steps start from into a folder.</summary>
    public string InitialAdapter(string folder)
    {
        if (!_alike) return Adapter;
        Directory.CreateDirectory(folder);
        foreach (var (from, to) in (IEnumerable<(string, string)>)[
            (Path.Combine(Adapter, AdapterConfig.FileName), AdapterConfig.FileName),
            (Path.Combine(Folder, "train/lora_initial.safetensors"), AdapterFile.WeightsName)])
            File.WriteAllBytes(Path.Combine(folder, to), File.ReadAllBytes(from));
        return folder;
    }

    /// <summary>A traced tensor; whole numbers become floats.</summary>
    public static (Shape Shape, float[] Values) Traced(Trace trace, string name) =>
        trace.Ints.TryGetValue(name, out var ints)
            ? (ints.Shape, Array.ConvertAll(ints.Values, v => (float)v)) : trace.Floats[name];

    /// <summary>Loads the adapter whose gradients are recorded.</summary>
    public TrainingModel OpenAdapted(TrainArguments arguments)
    {
        var model = TrainingModel.Open(arguments);
        using var file = AdapterFile.Open(Adapter);
        model.CopyFrom(file);
        return model;
    }

    /// <summary>
    /// Whether training moves a part of the tensor by noise alone: a softmax ignores what all keys
    /// share, so a bias of keys has no gradient, and AdamW makes steps of full size of rounding.
    /// </summary>
    public static bool HasNoise(string name) => V26.IsKeyBias(name)
        || name.EndsWith("attn.qkv.bias", StringComparison.Ordinal)
        || name.EndsWith("attn.in_proj_bias", StringComparison.Ordinal);

    private void Append(TrainArguments arguments, string name, Batch batch)
    {
        string folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;
        try
        {
            bool text = name == "text";
            TrainArguments with = arguments with
            {
                OfficialCompat = arguments.OfficialCompat && !text,
                ModelMaxLength = text || _alike
                    ? arguments.ModelMaxLength : Find(name).GetProperty("max_length").GetInt32(),
            };
            string model = arguments.ModelNameOrPath!;
            TrainingRows.Read(Data(folder, name), with,
                model == Model ? Format : ModelSpec.Read(model).Rows()).Append(0, batch);
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }
    }

    private JsonElement Find(string name) => _rows.EnumerateArray().First(
        r => r.GetProperty(_alike ? "id" : "name").GetString() == name);

    private JsonNode Row(string name)
    {
        if (name == "text")
            return new JsonObject
            {
                ["id"] = name,
                ["conversations"] = new JsonArray(
                    new JsonObject { ["role"] = "user", ["content"] = "What is this?" },
                    new JsonObject { ["role"] = "assistant", ["content"] = "A star." }),
            };
        JsonElement found = Find(name);
        JsonNode row = JsonNode.Parse(
            (_alike ? found : found.GetProperty("raw")).GetRawText())!;
        row["id"] = name;
        string folder = _alike ? Path.Combine(ReferenceFile.Root, "v26", "data") : Folder;
        if (row["image"] is JsonObject pictures)
            foreach (string tag in pictures.Select(p => p.Key).ToList())
                pictures[tag] = Path.Combine(folder, (string)pictures[tag]!);
        else row["image"] = Path.Combine(folder, (string)row["image"]!);
        return row;
    }
}
