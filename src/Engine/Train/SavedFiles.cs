using System.Text.Json;
using System.Text.Json.Nodes;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// The small files that a whole model is saved with: those of the model it started from, read at
/// the start, with what the run trained with put in. Files that need no change keep their bytes.
/// </summary>
internal static class SavedFiles
{
    private const long MostBytes = 256 << 20;

    private static readonly JsonSerializerOptions s_json = new()
    {
        WriteIndented = true,
        NewLine = "\n",
        Encoder = System.Text.Encodings.Web.JavaScriptEncoder.UnsafeRelaxedJsonEscaping,
    };

    /// <param name="folder">The model's folder.</param>
    /// <param name="spec">The model, as its files say.</param>
    /// <param name="arguments">The configuration it was trained with; null where that is not
    /// known, and nothing is changed.</param>
    /// <param name="storage">Type of the weights that are saved.</param>
    /// <param name="say">Takes a line for each file that cannot be taken over: links to nothing,
    /// pipes, devices, what is unreadable or too large.</param>
    /// <param name="which">Says by its name whether a file is taken; all of a model's when not
    /// given.</param>
    /// <exception cref="InputException">The folder cannot be listed.</exception>
    public static IReadOnlyList<(string Name, byte[] Content)> Read(
        string folder, ModelSpec spec, TrainArguments? arguments, DType storage,
        Action<string>? say, Func<string, bool>? which = null)
    {
        string[] files;
        try
        {
            files = Directory.GetFiles(folder);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw new InputException(
                $"{folder}: cannot list: {Messages.OneLine(failure.Message)}", failure);
        }

        var saved = new List<(string, byte[])>();
        long left = MostBytes;
        foreach (string file in files.Order(StringComparer.Ordinal))
        {
            string name = Path.GetFileName(file);
            if (!(which ?? ResultFiles.IsCopied)(name)) continue;
            try
            {
                byte[] content = InputFile.ReadAll(file, left);
                if (content.Length == 0)
                    throw new InputException($"{file}: has no content (empty, a pipe or a device)");
                left -= content.Length;
                saved.Add((name, arguments is null
                    ? content : Edited(name, content, arguments, spec, storage)));
            }
            catch (InputException failure)
            {
                say?.Invoke($"{failure.Message}; it is not taken over into what is saved");
            }
        }

        return saved;
    }

    private static byte[] Edited(
        string name, byte[] content, TrainArguments arguments, ModelSpec spec,
        DType storage) => name switch
        {
            "config.json" => Edit(content, json => Configure(json, arguments, spec, storage)),
            _ when name == spec.Family.ProcessorFile(spec.Directory).Name =>
                Edit(content, json => Configure(
                    spec.Family.ProcessorFile(spec.Directory).Key is { } key
                        ? json[key]!.AsObject() : json, arguments, spec, spec.Processor)),
            _ => content,
        };

    /// <summary>A JSON file with a change, which says whether there was one.</summary>
    public static byte[] Edit(byte[] content, Func<JsonObject, bool> change)
    {
        ReadOnlySpan<byte> text = content;
        if (text.StartsWith("\uFEFF"u8)) text = text[3..];
        JsonObject json = JsonNode.Parse(text)!.AsObject();
        return change(json)
            ? [.. JsonSerializer.SerializeToUtf8Bytes(json, s_json), (byte)'\n']
            : content;
    }

    private static bool Configure(
        JsonObject json, TrainArguments arguments, ModelSpec spec, DType storage)
    {
        // Newer versions of transformers call it dtype.
        string type = json.ContainsKey("dtype") ? "dtype" : "torch_dtype";
        json[type] = storage switch
        {
            DType.BF16 => "bfloat16",
            DType.F16 => "float16",
            _ => "float32",
        };
        if (!spec.Family.ConfiguresPictures) return true;
        bool imageId = spec.TrainsImageId(arguments);
        if (spec.Family.NumbersPictures && imageId != spec.UseImageId)
            json["use_image_id"] = imageId;
        SlicingSpec slicing = spec.TrainedSlicing(arguments);
        // Without slice_mode nothing is sliced, whatever the number.
        if (!spec.SliceMode || slicing == spec.Slicing) return true;
        JsonObject slices = json;
        if (spec.Family.SlicingKey is { } key && json[key] is JsonObject its) slices = its;
        else if (spec.Family.SlicingKey is { } absent)
            json[absent] = slices = new JsonObject
            {
                ["patch_size"] = slicing.PatchSize,
                ["scale_resolution"] = slicing.ScaleResolution,
            };
        slices["max_slice_nums"] = slicing.MaxSliceNums;
        return true;
    }

    private static bool Configure(
        JsonObject json, TrainArguments arguments, ModelSpec spec, ProcessorSpec its)
    {
        SlicingSpec slicing = spec.TrainedSlicing(arguments);
        bool imageId = spec.TrainsImageId(arguments), changed = false;
        int slices = its.SliceMode ? its.Slicing.MaxSliceNums : 1;
        Set("use_image_id",
            spec.Family.NumbersPictures && its.UseImageId != imageId, imageId);
        Set("max_slice_nums", slices != slicing.MaxSliceNums, slicing.MaxSliceNums);
        Set("slice_mode", !its.SliceMode && slicing.MaxSliceNums > 1, true);
        Set("scale_resolution", its.Slicing.ScaleResolution != slicing.ScaleResolution,
            slicing.ScaleResolution);
        return changed;

        void Set<T>(string key, bool differs, T value)
        {
            if (!differs) return;
            json[key] = System.Text.Json.Nodes.JsonValue.Create(value);
            changed = true;
        }
    }
}
