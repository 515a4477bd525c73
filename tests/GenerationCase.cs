using System.Text.Json;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Generate;
using MiniCpmNative.Engine.Model;

namespace MiniCpmNative.Tests;

/// <summary>
/// Conversations of tests/reference/generate and generation as the official chat() was given them:
/// what it answered is beside them.
/// </summary>
internal static class GenerationCase
{
    public static AskedModel Open(string folder, string? adapter = null) => AskedModel.Open(
        new TrainArguments { ModelNameOrPath = folder, Device = DeviceChoice.Cpu }, adapter);

    /// <summary>A case of V-2_6's kind, whose picture k is pk of its data.</summary>
    public static GenerationInput Input(AskedModel model, JsonElement arguments)
    {
        int? slices = arguments.TryGetProperty("max_slice_nums", out var most)
            ? most.GetInt32() : null;
        RowFormat rows = arguments.TryGetProperty("use_image_id", out var numbered)
            ? model.Rows with { Numbered = numbered.GetBoolean() } : model.Rows;
        return Input(new PromptMaker(model.Model.Spec, rows, slices), arguments, Shared);
    }

    /// <param name="maker">Makes the prompt.</param>
    /// <param name="arguments">chat()'s: msgs or messages, and a picture in front.</param>
    /// <param name="file">The file of a picture that is named or numbered.</param>
    public static GenerationInput Input(
        PromptMaker maker, JsonElement arguments, Func<JsonElement, string> file)
    {
        var pictures = new List<PromptPicture>();
        JsonElement messages = arguments.TryGetProperty("msgs", out var msgs)
            ? msgs : arguments.GetProperty("messages");
        string? system = arguments.TryGetProperty("system_prompt", out var given)
            ? given.GetString() : null;
        var turns = new List<PromptTurn>();
        foreach (JsonElement message in messages.EnumerateArray())
        {
            var parts = new List<PromptPart>();
            if (turns.Count == 0 && arguments.TryGetProperty("image", out var image)
                && image.ValueKind != JsonValueKind.Null) Show(image);
            if (turns.Count == 0 && arguments.TryGetProperty("images", out var images))
                foreach (JsonElement one in images.EnumerateArray()) Show(one);
            JsonElement content = message.GetProperty("content");
            foreach (JsonElement part in content.ValueKind == JsonValueKind.Array
                ? content.EnumerateArray().ToArray() : [content])
                if (part.ValueKind == JsonValueKind.Number) Show(part);
                else parts.Add(part.GetString()!);
            if (message.GetProperty("role").GetString() == "system")
                system = content.GetString();
            else turns.Add(new PromptTurn(message.GetProperty("role").GetString()!, parts));

            void Show(JsonElement picture)
            {
                parts.Add(pictures.Count);
                pictures.Add(maker.Open(file(picture)));
            }
        }

        return maker.Make(turns, pictures, system);
    }

    /// <summary>
    /// The same without "!": V-2_6's chat() takes token 0 for padding and hides it, which a prompt
    /// without it equals.
    /// </summary>
    public static GenerationInput Unmasked(GenerationInput input)
    {
        int[] ids = [.. input.Ids.Where(id => id != 0)];
        return ids.Length == input.Tokens ? input
            : new GenerationInput(ids.Length, batch => batch.AddRow(ids, [])) { Ids = ids };
    }

    /// <summary>Options under transformers' names; what is absent is off.</summary>
    public static GenerationSettings Settings(
        JsonElement options, IReadOnlyList<int> stopIds, int tokens)
    {
        return new()
        {
            MaxNewTokens = tokens,
            StopIds = stopIds,
            DoSample = Is("do_sample"),
            Temperature = Number("temperature", 1),
            TopP = Number("top_p", 1),
            TopK = (int)Number("top_k", 0),
            RepetitionPenalty = Number("repetition_penalty", 1),
            NumBeams = (int)Number("num_beams", 1),
            LengthPenalty = Number("length_penalty", 1),
            EarlyStopping = Is("early_stopping"),
            MinNewTokens = (int)Number("min_new_tokens", 0),
        };

        bool Is(string name) => options.TryGetProperty(name, out var value)
            && value.ValueKind == JsonValueKind.True;
        double Number(string name, double absent) =>
            options.TryGetProperty(name, out var value) ? value.GetDouble() : absent;
    }

    /// <summary>Logits behind a prompt.</summary>
    public static float[] Logits(AskedModel model, GenerationInput input)
    {
        var batch = new Batch();
        batch.Clear();
        input.Append(batch);
        batch.LabelRows.Add(batch.Tokens.Count - 1);
        LoadedModel loaded = model.Model;
        float[] logits = MiniCpmNative.Kernels.DeviceFloats.ReadFloats(loaded.Device,
            loaded.Model.LabelLogits(loaded.Graph, loaded.Hidden(batch)));
        loaded.Graph.EndStep();
        return logits;
    }

    private static string Shared(JsonElement number)
    {
        string folder = Path.Combine(ReferenceFile.Root, "v26", "data", "images");
        return Directory.EnumerateFiles(folder, $"p{number.GetInt32()}.*").Single();
    }
}
