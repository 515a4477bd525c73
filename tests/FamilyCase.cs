using System.Text.Json;
using System.Text.Json.Nodes;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;

namespace MiniCpmNative.Tests;

/// <summary>
/// The reference model of a family whose released code computed tests/reference/NAME: its rows and
/// what came out. rows.json is in tests/reference/families/NAME.
/// </summary>
internal sealed class FamilyCase
{
    private const string Targets = @"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)";

    private static readonly Dictionary<string, FamilyCase> s_all = [];

    private readonly (string Question, string Answer) _text;
    private readonly JsonElement _rows;
    private ModelSpec? _spec;
    private RowFormat? _format;

    private FamilyCase(string name, string question, string answer)
    {
        (Name, _text) = (name, (question, answer));
        _rows = ReferenceText.Json($"families/{name}/rows.json");
    }

    public string Name { get; }

    /// <summary>The committed files.</summary>
    public string Folder => Path.Combine(ReferenceFile.Root, Name);

    public string Model => Path.Combine(Folder, "model");

    public ModelSpec Spec => _spec ??= ModelSpec.Read(Model);

    public RowFormat Format => _format ??= Spec.Rows();

    public JsonElement Results => Json("results.json");

    /// <summary>The rows of the batch whose tensors are recorded.</summary>
    public string[] Pair { get; } = ["one", "sliced"];

    /// <summary>Everything is trained, on rows as the official script makes them.</summary>
    public TrainArguments Full => V26.Full with { ModelNameOrPath = Model, DataPath = null };

    /// <summary>Adapters on the decoder's attention, as the reference has them.</summary>
    public TrainArguments Lora => V26.Lora with { ModelNameOrPath = Model, DataPath = null };

    public static FamilyCase Of(string name)
    {
        if (s_all.TryGetValue(name, out var found)) return found;
        var (question, answer) = name switch
        {
            "v2" or "l3" => ("What is this?", "A star."),
            _ => throw new ArgumentException(name),
        };
        return s_all[name] = new FamilyCase(name, question, answer);
    }

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

    /// <summary>Loads the adapter that the reference starts from.</summary>
    public TunedModel OpenAdapted(TrainArguments arguments)
    {
        var model = TunedModel.Open(arguments);
        using var file = Engine.Weights.AdapterFile.Open(Path.Combine(Folder, "adapter_init"));
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
                ModelMaxLength = text
                    ? arguments.ModelMaxLength : Find(name).GetProperty("max_length").GetInt32(),
            };
            string model = arguments.ModelNameOrPath!;
            DataRows.Read(Data(folder, name), with,
                model == Model ? Format : ModelSpec.Read(model).Rows()).Append(0, batch);
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }
    }

    private JsonElement Find(string name) => _rows.EnumerateArray().First(
        r => r.GetProperty("name").GetString() == name);

    private JsonNode Row(string name)
    {
        if (name == "text")
            return new JsonObject
            {
                ["id"] = name,
                ["conversations"] = new JsonArray(
                    new JsonObject { ["role"] = "user", ["content"] = _text.Question },
                    new JsonObject { ["role"] = "assistant", ["content"] = _text.Answer }),
            };
        JsonNode row = JsonNode.Parse(Find(name).GetProperty("raw").GetRawText())!;
        row["id"] = name;
        if (row["image"] is JsonObject pictures)
            foreach (string tag in pictures.Select(p => p.Key).ToList())
                pictures[tag] = Path.Combine(Folder, (string)pictures[tag]!);
        else row["image"] = Path.Combine(Folder, (string)row["image"]!);
        return row;
    }
}
